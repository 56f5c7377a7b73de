//! The kernels, loaded on a device.

#![allow(unsafe_code, reason = "talks to the driver")]

use std::{
    collections::HashMap,
    ffi::CString,
    ptr,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::driver::sys;
use rayon::prelude::*;

use crate::{
    Error, compile,
    context::Context,
    driver::{attribute, check, version},
    kernel::{Kernel, Params},
};

/// Since when the driver can say what a kernel takes (CUDA 12.4). With an older one nothing but the
/// kernels' own assertions compares the sizes of parameters.
const PARAMS_KNOWN: i32 = 12040;

/// All programs, and the kernels found in them so far.
pub(crate) struct Modules {
    context: Arc<Context>,
    modules: Vec<sys::CUmodule>,
    functions: Mutex<HashMap<&'static str, sys::CUfunction>>,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Modules {}
// SAFETY: as above.
unsafe impl Sync for Modules {}

impl Modules {
    /// Loads the kernels, compiling them unless they are in the cache.
    pub fn load(context: Arc<Context>) -> Result<Modules, Error> {
        let capability = context.info.capability;
        let mut loaded = Modules { context, modules: Vec::new(), functions: Mutex::default() };
        let images: Vec<_> =
            compile::PROGRAMS.par_iter().map(|p| compile::image(p, capability)).collect();
        for image in images {
            let (image, mut module) = (image?, ptr::null_mut());
            // SAFETY: a context is current, and the image is a complete cubin, from the compiler or
            // checked by its hash.
            let result = unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
            check("load kernels", result)?;
            loaded.modules.push(module);
        }
        Ok(loaded)
    }

    /// A kernel, which at its first use is compared with what Rust takes it for.
    ///
    /// # Errors
    /// [`Error::Params`] if it has other parameters than one `P`.
    pub fn function<P: Params>(&self, kernel: Kernel<P>) -> Result<sys::CUfunction, Error> {
        let mut known = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&function) = known.get(kernel.name) {
            return Ok(function);
        }
        self.context.make_current()?;
        let function = self.find(kernel.name).ok_or(Error::NoKernel(kernel.name))?;
        if version()? >= PARAMS_KNOWN {
            compare_params(kernel, &param_sizes(function)?)?;
        }
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let limit = shared_limit(self.context.ordinal, function)?;
        // SAFETY: the function was just found.
        check(kernel.name, unsafe { sys::cuFuncSetAttribute(function, attribute, limit) })?;
        known.insert(kernel.name, function);
        Ok(function)
    }

    fn find(&self, name: &str) -> Option<sys::CUfunction> {
        let symbol = CString::new(name).ok()?;
        let programs = compile::PROGRAMS.iter().zip(&self.modules);
        programs.filter(|(program, _)| program.mentions(name)).find_map(|(_, module)| {
            let mut function = ptr::null_mut();
            // SAFETY: module and name are valid.
            let result =
                unsafe { sys::cuModuleGetFunction(&mut function, *module, symbol.as_ptr()) };
            (result == sys::CUresult::CUDA_SUCCESS).then_some(function)
        })
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        // Kernels of these modules may be under way.
        if self.context.synchronize().is_ok() {
            for module in &self.modules {
                // SAFETY: nothing uses its functions any more.
                unsafe { sys::cuModuleUnload(*module) };
            }
        }
    }
}

fn compare_params<P: Params>(kernel: Kernel<P>, found: &[usize]) -> Result<(), Error> {
    let expected = size_of::<P>();
    if found == [expected] {
        return Ok(());
    }
    let (kernel, found) = (kernel.name, found.to_vec());
    Err(Error::Params { kernel, params: P::NAME, found, expected })
}

/// Bytes of each parameter.
fn param_sizes(function: sys::CUfunction) -> Result<Vec<usize>, Error> {
    let mut sizes = Vec::new();
    loop {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function is loaded, and both pointers are valid.
        match unsafe { sys::cuFuncGetParamInfo(function, sizes.len(), &mut offset, &mut size) } {
            // There is none with this number.
            sys::CUresult::CUDA_ERROR_INVALID_VALUE => return Ok(sizes),
            result => check("describe a kernel", result)?,
        }
        sizes.push(size);
    }
}

/// Dynamic shared memory that `function` may ask for: what a block can have, less its own.
fn shared_limit(ordinal: sys::CUdevice, function: sys::CUfunction) -> Result<i32, Error> {
    let which = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    let own_size = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
    let mut own = 0;
    // SAFETY: the function is loaded.
    let result = unsafe { sys::cuFuncGetAttribute(&mut own, own_size, function) };
    check("describe a kernel", result)?;
    Ok((attribute(ordinal, which).unwrap_or(48 << 10) - own).max(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{ARGMAX, ArgmaxParams};

    #[derive(Clone, Copy)]
    struct Other;

    impl Params for Other {
        const NAME: &'static str = "Other";
    }

    fn modules() -> Modules {
        let context = Context::open(0).expect("a CUDA device");
        Modules::load(Arc::new(context)).expect("kernels")
    }

    #[test]
    #[ignore = "needs a CUDA device or the emulator"]
    fn a_kernel_with_other_parameters_is_refused() {
        let modules = modules();
        assert!(version().unwrap() >= PARAMS_KNOWN, "the driver is too old for this test");
        match modules.function(Kernel::<Other>::new(ARGMAX.name)) {
            Err(Error::Params { kernel: "argmax", params: "Other", found, expected: 0 }) => {
                assert_eq!(found, [size_of::<ArgmaxParams>()]);
            }
            other => panic!("{:?}", other.map(|_| ())),
        }
        assert!(modules.function(ARGMAX).is_ok());
    }

    #[test]
    #[ignore = "needs a CUDA device or the emulator"]
    fn a_kernel_that_is_missing_is_named() {
        let modules = modules();
        let missing = modules.function(Kernel::<ArgmaxParams>::new("no_such_kernel"));
        assert!(matches!(missing, Err(Error::NoKernel("no_such_kernel"))));
    }
}
