//! Asking the driver: which devices there are, what they are, and what a result code means.

#![allow(unsafe_code, reason = "talks to the driver")]

use std::{ffi::CStr, ptr};

use cudarc::driver::sys;

use crate::{DeviceInfo, Error};

/// The devices that the driver shows.
///
/// # Errors
/// [`Error::NoDriver`] if there is no driver to ask, [`Error::NoDevice`] if it has none to show.
pub fn devices() -> Result<Vec<DeviceInfo>, Error> {
    start()?;
    let mut count = 0;
    // SAFETY: `count` is valid.
    check("count devices", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    (0..count as usize).map(|index| Ok(info(index)?.1)).collect()
}

fn start() -> Result<(), Error> {
    // SAFETY: only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver);
    }
    // SAFETY: the library is there.
    match unsafe { sys::cuInit(0) } {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => Err(Error::NoDevice { wanted: 0, found: 0 }),
        result => check("start the driver", result),
    }
}

pub(crate) fn info(index: usize) -> Result<(sys::CUdevice, DeviceInfo), Error> {
    use sys::CUdevice_attribute as A;
    start()?;
    let (mut ordinal, mut total, mut name) = (0, 0, [0; 256]);
    // SAFETY: all pointers are valid for the sizes given.
    unsafe {
        check("find the device", sys::cuDeviceGet(&mut ordinal, index as i32))?;
        check("read its memory size", sys::cuDeviceTotalMem_v2(&mut total, ordinal))?;
        check("read its name", sys::cuDeviceGetName(name.as_mut_ptr(), 255, ordinal))?;
    }
    let capability = |part| attribute(ordinal, part).map(|n| n.max(0) as u32);
    let info = DeviceInfo {
        index,
        // SAFETY: the driver ended it with a zero, and the last byte is one.
        name: unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned(),
        total_bytes: total as u64,
        free_bytes: free_bytes(ordinal)?,
        capability: (
            capability(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            capability(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
    };
    Ok((ordinal, info))
}

fn free_bytes(ordinal: sys::CUdevice) -> Result<u64, Error> {
    let (mut context, mut free, mut total) = (ptr::null_mut(), 0, 0);
    // SAFETY: the context is retained while it is used.
    unsafe {
        check("open the device", sys::cuDevicePrimaryCtxRetain(&mut context, ordinal))?;
        let result = check("be used", sys::cuCtxSetCurrent(context)).and_then(|()| {
            check("read the free memory", sys::cuMemGetInfo_v2(&mut free, &mut total))
        });
        sys::cuDevicePrimaryCtxRelease_v2(ordinal);
        result?;
    }
    Ok(free as u64)
}

pub(crate) fn attribute(
    ordinal: sys::CUdevice,
    which: sys::CUdevice_attribute,
) -> Result<i32, Error> {
    let mut value = 0;
    // SAFETY: `value` is valid.
    check("describe itself", unsafe { sys::cuDeviceGetAttribute(&mut value, which, ordinal) })?;
    Ok(value)
}

/// The driver's version of CUDA: 12040 for 12.4.
pub(crate) fn version() -> Result<i32, Error> {
    let mut version = 0;
    // SAFETY: `version` is valid.
    check("say its version", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    Ok(version)
}

pub(crate) fn check(what: &str, result: sys::CUresult) -> Result<(), Error> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: the driver returns a static string or leaves the pointer null.
    let text = unsafe {
        sys::cuGetErrorString(result, &mut text);
        if text.is_null() { c"unknown error" } else { CStr::from_ptr(text) }
    };
    let text = text.to_string_lossy();
    Err(Error::Driver { what: what.to_owned(), error: format!("{text} ({result:?})") })
}
