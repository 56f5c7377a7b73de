//! One CUDA device: its memory, its stream, and launching kernels on it.
//!
//! This, `driver` and `compile` are all that talks to the driver.

use std::{
    collections::HashMap,
    ffi::{CString, c_void},
    marker::PhantomData,
    mem,
    ops::Range,
    ptr,
    sync::{Arc, Mutex, PoisonError},
};

use bytemuck::Pod;
use cudarc::driver::sys;
use ds4_engine::backend::{BackendError, StageResult};
use rayon::prelude::*;

use crate::{
    DeviceInfo, Error,
    arguments::Arg,
    compile,
    driver::{attribute, check, info},
};

/// A device with the program's kernels loaded. Cheap to clone.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    info: DeviceInfo,
    ordinal: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    /// Kernels found so far.
    kernels: Mutex<HashMap<&'static str, sys::CUfunction>>,
    /// Whether launches may overlap the end of the kernel before (compute capability 9.0).
    overlap: bool,
}

// SAFETY: the driver's handles may be used from any thread; every use makes the context current
// first, and work goes through one stream in order.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// An address in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Pointer(u64);

impl Pointer {
    /// No address.
    pub const NULL: Pointer = Pointer(0);

    /// The address `bytes` further on.
    pub fn offset(self, bytes: usize) -> Pointer {
        Pointer(self.0 + bytes as u64)
    }
}

/// Device memory for `len` elements; freed when dropped.
pub struct Buffer<T> {
    device: Device,
    pointer: Pointer,
    len: usize,
    element: PhantomData<T>,
}

impl Device {
    /// Opens device `index` and loads the kernels, compiling them unless they are in the cache.
    pub fn open(index: usize) -> Result<Device, Error> {
        let (ordinal, info) = info(index)?;
        let mut context = ptr::null_mut();
        // SAFETY: `ordinal` came from the driver.
        check("open the device", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, ordinal) })?;
        // SAFETY: the context was just retained.
        check("open the device", unsafe { sys::cuCtxSetCurrent(context) })?;
        let mut stream = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a context is current.
        check("make a stream", unsafe { sys::cuStreamCreate(&mut stream, flags) })?;
        let overlap = info.capability >= (9, 0);
        let (modules, kernels) = (Vec::new(), Mutex::default());
        let mut inner = Inner { info, ordinal, context, stream, modules, kernels, overlap };
        let capability = inner.info.capability;
        let images: Vec<_> =
            compile::PROGRAMS.par_iter().map(|p| compile::image(p, capability)).collect();
        for image in images {
            inner.modules.push(load(&image?)?);
        }
        Ok(Device(Arc::new(inner)))
    }

    /// What this device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// Multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        attribute(self.0.ordinal, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_or(1, |n| n.max(1) as usize)
    }

    /// Bytes of shared memory that a block can have.
    pub fn shared_per_block(&self) -> usize {
        let which = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        attribute(self.0.ordinal, which).map_or(48 << 10, |n| n.max(0) as usize)
    }

    /// Free bytes now.
    pub fn free_bytes(&self) -> StageResult<u64> {
        let (mut free, mut total) = (0, 0);
        self.run("read the free memory", || {
            // SAFETY: both pointers are valid.
            unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }
        })?;
        Ok(free as u64)
    }

    /// Memory for `len` elements, not initialised.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if the device has no room.
    pub fn alloc<T: Pod>(&self, len: usize) -> StageResult<Buffer<T>> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| out_of_memory(usize::MAX))?;
        let mut pointer = 0;
        if bytes > 0 {
            self.make_current()?;
            // SAFETY: `pointer` is valid.
            match unsafe { sys::cuMemAlloc_v2(&mut pointer, bytes) } {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(out_of_memory(bytes)),
                result => check("allocate memory", result).map_err(device_error)?,
            }
        }
        Ok(Buffer { device: self.clone(), pointer: Pointer(pointer), len, element: PhantomData })
    }

    /// The same, with every byte zero.
    pub fn alloc_zeroed<T: Pod>(&self, len: usize) -> StageResult<Buffer<T>> {
        let buffer = self.alloc(len)?;
        if len > 0 {
            self.run("clear memory", || {
                let bytes = len * size_of::<T>();
                // SAFETY: the buffer has that many bytes.
                unsafe { sys::cuMemsetD8Async(buffer.pointer.0, 0, bytes, self.0.stream) }
            })?;
        }
        Ok(buffer)
    }

    /// A buffer with the elements of `from`.
    pub fn buffer<T: Pod>(&self, from: &[T]) -> StageResult<Buffer<T>> {
        let mut buffer = self.alloc(from.len())?;
        self.upload(&mut buffer, 0, from)?;
        Ok(buffer)
    }

    /// Copies `from` to `to[at..]`, after all earlier work; returns when `from` may be reused.
    ///
    /// # Panics
    /// If `to` is too short.
    pub fn upload<T: Pod>(&self, to: &mut Buffer<T>, at: usize, from: &[T]) -> StageResult {
        assert!(at + from.len() <= to.len, "upload beyond the end of a buffer");
        if from.is_empty() {
            return Ok(());
        }
        let (target, bytes) = (to.at(at).0, size_of_val(from));
        self.run("copy to the device", || {
            // SAFETY: both sides have that many bytes; pageable memory is staged before return.
            unsafe { sys::cuMemcpyHtoDAsync_v2(target, from.as_ptr().cast(), bytes, self.0.stream) }
        })
    }

    /// Copies `from` to `to[at..]` without waiting.
    ///
    /// # Panics
    /// If `to` is too short.
    pub fn upload_pinned<T: Pod>(
        &self,
        to: &mut Buffer<T>,
        at: usize,
        from: &Pinned<T>,
        len: usize,
    ) -> StageResult {
        assert!(at + len <= to.len && len <= from.len, "upload beyond the end of a buffer");
        let (target, bytes) = (to.at(at).0, len * size_of::<T>());
        self.run("copy to the device", || {
            // SAFETY: both sides have that many bytes, and `Pinned` waits before it is changed.
            unsafe { sys::cuMemcpyHtoDAsync_v2(target, from.pointer.cast(), bytes, self.0.stream) }
        })
    }

    /// Copies a range out, after all earlier work.
    ///
    /// # Panics
    /// If the buffer has no such range.
    pub fn download<T: Pod>(&self, from: &Buffer<T>, range: Range<usize>) -> StageResult<Vec<T>> {
        assert!(range.end <= from.len, "download beyond the end of a buffer");
        let mut out = vec![T::zeroed(); range.len()];
        if !out.is_empty() {
            let bytes = size_of_val(out.as_slice());
            self.run("copy from the device", || {
                let source = from.at(range.start).0;
                // SAFETY: both sides have that many bytes.
                unsafe {
                    sys::cuMemcpyDtoHAsync_v2(out.as_mut_ptr().cast(), source, bytes, self.0.stream)
                }
            })?;
            self.synchronize()?;
        }
        Ok(out)
    }

    /// Copies a range to the start of pinned memory, after all earlier work, and waits.
    ///
    /// # Panics
    /// If the buffer has no such range, or `to` no room for it.
    pub fn download_pinned<'a, T: Pod>(
        &self,
        from: &Buffer<T>,
        range: Range<usize>,
        to: &'a mut Pinned<T>,
    ) -> StageResult<&'a [T]> {
        let len = range.len();
        assert!(range.end <= from.len && len <= to.len, "download beyond the end of a buffer");
        if len > 0 {
            let (source, bytes) = (from.at(range.start).0, len * size_of::<T>());
            self.run("copy from the device", || {
                // SAFETY: both sides have that many bytes.
                unsafe {
                    sys::cuMemcpyDtoHAsync_v2(to.pointer.cast(), source, bytes, self.0.stream)
                }
            })?;
        }
        self.synchronize()?;
        Ok(&to.as_slice()[..len])
    }

    /// Copies between buffers of the device.
    ///
    /// # Panics
    /// If either has no such range.
    pub fn copy<T: Pod>(
        &self,
        from: &Buffer<T>,
        range: Range<usize>,
        to: &mut Buffer<T>,
        at: usize,
    ) -> StageResult {
        assert!(range.end <= from.len && at + range.len() <= to.len, "copy beyond a buffer's end");
        if range.is_empty() {
            return Ok(());
        }
        let bytes = range.len() * size_of::<T>();
        self.run("copy on the device", || {
            // SAFETY: both sides have that many bytes.
            unsafe {
                sys::cuMemcpyDtoDAsync_v2(to.at(at).0, from.at(range.start).0, bytes, self.0.stream)
            }
        })
    }

    /// Starts `kernel` after all earlier work.
    pub fn launch(
        &self,
        kernel: &'static str,
        blocks: [usize; 3],
        threads: usize,
        shared_bytes: usize,
        args: &[Arg],
    ) -> StageResult {
        if blocks.contains(&0) {
            return Ok(());
        }
        let function = self.kernel(kernel)?;
        let mut pointers: Vec<*mut c_void> = args.iter().map(|arg| arg.pointer()).collect();
        let mut overlap = programmatic_launch();
        let config = sys::CUlaunchConfig {
            gridDimX: blocks[0] as u32,
            gridDimY: blocks[1] as u32,
            gridDimZ: blocks[2] as u32,
            blockDimX: threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes as u32,
            hStream: self.0.stream,
            attrs: &mut overlap,
            numAttrs: u32::from(self.0.overlap),
        };
        self.run(kernel, || {
            // SAFETY: the stages pass the arguments that the kernel declares, with buffers that
            // outlive the work; the conformance tests run every kernel under a memory checker.
            unsafe {
                sys::cuLaunchKernelEx(&config, function, pointers.as_mut_ptr(), ptr::null_mut())
            }
        })
    }

    /// Waits for all work.
    pub fn synchronize(&self) -> StageResult {
        // SAFETY: the stream lives as long as `self`.
        self.run("finish its work", || unsafe { sys::cuStreamSynchronize(self.0.stream) })
    }

    /// Records the launches of `work` instead of running them.
    pub fn capture(&self, work: impl FnOnce() -> StageResult) -> StageResult<Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as `self`.
        self.run("record", || unsafe { sys::cuStreamBeginCapture_v2(self.0.stream, mode) })?;
        let result = work();
        let mut graph = ptr::null_mut();
        // SAFETY: recording began above.
        self.run("record", || unsafe { sys::cuStreamEndCapture(self.0.stream, &mut graph) })?;
        let mut executable = ptr::null_mut();
        let made = result.and_then(|()| {
            // SAFETY: `graph` was just recorded.
            self.run("instantiate a graph", || unsafe {
                sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0)
            })
        });
        // SAFETY: the executable graph does not need its source.
        unsafe { sys::cuGraphDestroy(graph) };
        made.map(|()| Graph { device: self.clone(), executable })
    }

    /// An event at this point of the stream, for timing.
    pub fn event(&self) -> StageResult<Event> {
        let mut event = ptr::null_mut();
        // SAFETY: `event` is valid.
        self.run("make an event", || unsafe { sys::cuEventCreate(&mut event, 0) })?;
        let event = Event { device: self.clone(), event };
        // SAFETY: event and stream are alive.
        self.run("record an event", || unsafe { sys::cuEventRecord(event.event, self.0.stream) })?;
        Ok(event)
    }

    /// Page-locked host memory for `len` elements, zero.
    pub fn pinned<T: Pod>(&self, len: usize) -> StageResult<Pinned<T>> {
        let mut pointer = ptr::null_mut();
        let bytes = (len * size_of::<T>()).max(1);
        self.run("allocate page-locked memory", || {
            // SAFETY: `pointer` is valid.
            unsafe { sys::cuMemHostAlloc(&mut pointer, bytes, 0) }
        })?;
        // SAFETY: the memory was just allocated with that size.
        unsafe { ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        Ok(Pinned { device: self.clone(), pointer: pointer.cast(), len })
    }

    fn kernel(&self, name: &'static str) -> StageResult<sys::CUfunction> {
        let mut known = self.0.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&function) = known.get(name) {
            return Ok(function);
        }
        self.make_current()?;
        let function = find(&self.0.modules, name)
            .ok_or_else(|| BackendError::Device(format!("no kernel is called {name}")))?;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let limit = shared_limit(self.0.ordinal, function);
        // SAFETY: the function was just found.
        check(name, unsafe { sys::cuFuncSetAttribute(function, attribute, limit) })
            .map_err(device_error)?;
        known.insert(name, function);
        Ok(function)
    }

    fn make_current(&self) -> StageResult {
        // SAFETY: the context is retained until `Inner` is dropped.
        check("be used", unsafe { sys::cuCtxSetCurrent(self.0.context) }).map_err(device_error)
    }

    fn run(&self, what: &str, call: impl FnOnce() -> sys::CUresult) -> StageResult {
        self.make_current()?;
        match call() {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(BackendError::OutOfMemory(format!("the device has no room to {what}")))
            }
            result => check(what, result).map_err(device_error),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: nothing uses the handles any more; errors at the end have no one to go to.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            sys::cuStreamSynchronize(self.stream);
            for module in &self.modules {
                sys::cuModuleUnload(*module);
            }
            sys::cuStreamDestroy_v2(self.stream);
            sys::cuDevicePrimaryCtxRelease_v2(self.ordinal);
        }
    }
}

impl<T> Buffer<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it starts.
    pub fn pointer(&self) -> Pointer {
        self.pointer
    }

    /// Address of element `index`.
    ///
    /// # Panics
    /// If `index` is beyond the end.
    pub fn at(&self, index: usize) -> Pointer {
        assert!(index <= self.len, "index {index} of a buffer of {}", self.len);
        self.pointer.offset(index * size_of::<T>())
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.pointer != Pointer::NULL && self.device.make_current().is_ok() {
            // SAFETY: allocated by `alloc`; freeing waits for work that uses it.
            unsafe { sys::cuMemFree_v2(self.pointer.0) };
        }
    }
}

/// Page-locked host memory.
pub struct Pinned<T> {
    device: Device,
    pointer: *mut T,
    len: usize,
}

// SAFETY: the memory is owned, and shared access is read-only.
unsafe impl<T: Send> Send for Pinned<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Pinned<T> {}

impl<T: Pod> Pinned<T> {
    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: allocated with `len` elements, all initialised.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }
    }

    /// The elements, to be changed when no copy from here is under way.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        if self.device.synchronize().is_ok() {
            // SAFETY: allocated by `Device::pinned`, and no copy is under way.
            unsafe { sys::cuMemFreeHost(self.pointer.cast()) };
        }
    }
}

/// Recorded launches.
pub struct Graph {
    device: Device,
    executable: sys::CUgraphExec,
}

// SAFETY: the handle may be used from any thread.
unsafe impl Send for Graph {}

impl Graph {
    /// Runs the launches.
    pub fn launch(&self) -> StageResult {
        self.device.run("run a graph", || {
            // SAFETY: graph and stream are alive.
            unsafe { sys::cuGraphLaunch(self.executable, self.device.0.stream) }
        })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.synchronize().is_ok() {
            // SAFETY: no launch is under way.
            unsafe { sys::cuGraphExecDestroy(self.executable) };
        }
    }
}

/// A point in the stream.
pub struct Event {
    device: Device,
    event: sys::CUevent,
}

impl Event {
    /// Waits until the stream gets here.
    pub fn wait(&self) -> StageResult {
        // SAFETY: the event was recorded.
        self.device.run("reach an event", || unsafe { sys::cuEventSynchronize(self.event) })
    }

    /// Seconds from `self` to `later`, once both are reached.
    pub fn seconds_until(&self, later: &Event) -> StageResult<f64> {
        let mut milliseconds = 0.0;
        later.wait()?;
        self.device.run("compare events", || {
            // SAFETY: both events were recorded and reached.
            unsafe { sys::cuEventElapsedTime(&mut milliseconds, self.event, later.event) }
        })?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `Device::event`.
        unsafe { sys::cuEventDestroy_v2(self.event) };
    }
}

/// Dynamic shared memory that `function` may ask for: what a block can have, less its own.
fn shared_limit(ordinal: sys::CUdevice, function: sys::CUfunction) -> i32 {
    let which = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    let mut own = 0;
    // SAFETY: the function is loaded.
    unsafe {
        sys::cuFuncGetAttribute(
            &mut own,
            sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
            function,
        )
    };
    (attribute(ordinal, which).unwrap_or(48 << 10) - own).max(0)
}

fn load(image: &[u8]) -> Result<sys::CUmodule, Error> {
    let mut module = ptr::null_mut();
    // SAFETY: the image is a complete cubin, from the compiler or checked by its hash.
    check("load kernels", unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) })?;
    Ok(module)
}

fn find(modules: &[sys::CUmodule], name: &str) -> Option<sys::CUfunction> {
    let symbol = CString::new(name).ok()?;
    let programs = compile::PROGRAMS.iter().zip(modules);
    programs.filter(|(program, _)| program.mentions(name)).find_map(|(_, module)| {
        let mut function = ptr::null_mut();
        // SAFETY: module and name are valid.
        let result = unsafe { sys::cuModuleGetFunction(&mut function, *module, symbol.as_ptr()) };
        (result == sys::CUresult::CUDA_SUCCESS).then_some(function)
    })
}

fn programmatic_launch() -> sys::CUlaunchAttribute {
    // SAFETY: a plain C struct for which zeros are valid.
    let mut attribute: sys::CUlaunchAttribute = unsafe { mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    attribute
}

fn device_error(error: Error) -> BackendError {
    BackendError::Device(error.to_string())
}

fn out_of_memory(bytes: usize) -> BackendError {
    BackendError::OutOfMemory(format!("the device has no room for {bytes} more bytes"))
}
