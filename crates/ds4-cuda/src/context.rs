//! A device's context and its one stream, in which all work is done in order.

#![allow(unsafe_code, reason = "talks to the driver")]

use std::{ptr, sync::Arc};

use cudarc::driver::sys;
use ds4_engine::backend::{BackendError, StageResult};

use crate::{
    DeviceInfo, Error,
    driver::{check, info},
};

/// An open device.
pub(crate) struct Context {
    pub info: DeviceInfo,
    pub ordinal: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
}

// SAFETY: the driver's handles may be used from any thread; every use makes the context current
// first, and work goes through one stream in order.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens device `index`.
    pub fn open(index: usize) -> Result<Context, Error> {
        let (ordinal, info) = info(index)?;
        let mut context = ptr::null_mut();
        // SAFETY: `ordinal` came from the driver.
        check("open the device", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, ordinal) })?;
        let mut opened = Context { info, ordinal, context, stream: ptr::null_mut() };
        // SAFETY: the context was just retained.
        check("open the device", unsafe { sys::cuCtxSetCurrent(context) })?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a context is current.
        check("make a stream", unsafe { sys::cuStreamCreate(&mut opened.stream, flags) })?;
        Ok(opened)
    }

    /// Makes the context that of the calling thread.
    pub fn make_current(&self) -> StageResult {
        // SAFETY: the context is retained until `self` is dropped.
        check("be used", unsafe { sys::cuCtxSetCurrent(self.context) }).map_err(device_error)
    }

    /// Calls the driver, which is asked to do `what`.
    pub fn run(
        &self,
        what: &str,
        call: impl FnOnce(sys::CUstream) -> sys::CUresult,
    ) -> StageResult {
        self.make_current()?;
        match call(self.stream) {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(BackendError::OutOfMemory(format!("the device has no room to {what}")))
            }
            result => check(what, result).map_err(device_error),
        }
    }

    /// Waits for all work. After an error there is none any more: the context is lost.
    pub fn synchronize(&self) -> StageResult {
        // SAFETY: the stream lives as long as `self`.
        self.run("finish its work", |stream| unsafe { sys::cuStreamSynchronize(stream) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: nothing uses the handles any more; errors at the end have no one to go to.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            if !self.stream.is_null() {
                sys::cuStreamSynchronize(self.stream);
                sys::cuStreamDestroy_v2(self.stream);
            }
            sys::cuDevicePrimaryCtxRelease_v2(self.ordinal);
        }
    }
}

/// A point in the stream.
pub struct Event {
    context: Arc<Context>,
    event: sys::CUevent,
}

// SAFETY: the handle may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event that is nowhere yet, with a time or without one.
    pub(crate) fn new(context: &Arc<Context>, timed: bool) -> StageResult<Event> {
        let flags = if timed {
            sys::CUevent_flags::CU_EVENT_DEFAULT
        } else {
            sys::CUevent_flags::CU_EVENT_DISABLE_TIMING
        };
        let mut event = ptr::null_mut();
        context.run("make an event", |_| {
            // SAFETY: `event` is valid.
            unsafe { sys::cuEventCreate(&mut event, flags as u32) }
        })?;
        Ok(Event { context: context.clone(), event })
    }

    /// Puts it behind all work so far.
    pub(crate) fn record(&self) -> StageResult {
        // SAFETY: event and stream are alive.
        self.context
            .run("record an event", |stream| unsafe { sys::cuEventRecord(self.event, stream) })
    }

    /// Waits until the stream gets here; at once for an event that is nowhere.
    pub fn wait(&self) -> StageResult {
        // SAFETY: the event is alive.
        self.context.run("reach an event", |_| unsafe { sys::cuEventSynchronize(self.event) })
    }

    /// Seconds from `self` to `later`, once both are reached.
    ///
    /// # Errors
    /// If the device fails, or an event has no time.
    pub fn seconds_until(&self, later: &Event) -> StageResult<f64> {
        let mut milliseconds = 0.0;
        later.wait()?;
        self.context.run("compare events", |_| {
            // SAFETY: both events are alive.
            unsafe { sys::cuEventElapsedTime(&mut milliseconds, self.event, later.event) }
        })?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: made by `new` and not used again.
            unsafe { sys::cuEventDestroy_v2(self.event) };
        }
    }
}

pub(crate) fn device_error(error: Error) -> BackendError {
    BackendError::Device(error.to_string())
}
