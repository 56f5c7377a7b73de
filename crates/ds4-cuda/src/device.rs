//! One CUDA device: its memory, and launching kernels on it.
//!
//! This module and the modules below it (`memory`, `modules`, `context`, `compile` and `driver`) are
//! all that talks to the driver.

#![allow(unsafe_code, reason = "talks to the driver")]

use std::{ffi::c_void, mem, ops::Range, ptr, sync::Arc};

use bytemuck::Pod;
use cudarc::driver::sys;
use ds4_engine::backend::StageResult;

use crate::{
    DeviceInfo, Error,
    context::{Context, device_error},
    driver::attribute,
    kernel::{Kernel, Params},
    modules::Modules,
};
pub use crate::{
    context::Event,
    memory::{Buffer, Pinned},
};

/// A device with the program's kernels loaded. Cheap to clone.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    modules: Modules,
    context: Arc<Context>,
    /// Whether launches may overlap the end of the kernel before (compute capability 9.0).
    overlap: bool,
}

/// How many threads run a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub blocks: [usize; 3],
    /// Of a block.
    pub threads: usize,
    /// Bytes of dynamic shared memory of a block.
    pub shared: usize,
}

impl Device {
    /// Opens device `index` and loads the kernels, compiling them unless they are in the cache.
    ///
    /// # Errors
    /// If there is no such device, or no compiler for kernels that are not in the cache.
    pub fn open(index: usize) -> Result<Device, Error> {
        let context = Arc::new(Context::open(index)?);
        let overlap = context.info.capability >= (9, 0);
        let modules = Modules::load(context.clone())?;
        Ok(Device(Arc::new(Inner { modules, context, overlap })))
    }

    /// What this device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.context().info
    }

    /// Multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        let which = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        attribute(self.context().ordinal, which).map_or(1, |n| n.max(1) as usize)
    }

    /// Bytes of shared memory that a block can have.
    pub fn shared_per_block(&self) -> usize {
        let which = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        attribute(self.context().ordinal, which).map_or(48 << 10, |n| n.max(0) as usize)
    }

    /// Free bytes now.
    ///
    /// # Errors
    /// If the device fails.
    pub fn free_bytes(&self) -> StageResult<u64> {
        let (mut free, mut total) = (0, 0);
        self.context().run("read the free memory", |_| {
            // SAFETY: both pointers are valid.
            unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }
        })?;
        Ok(free as u64)
    }

    /// Memory for `len` elements, not initialised.
    ///
    /// # Errors
    /// [`OutOfMemory`](ds4_engine::BackendError::OutOfMemory) if the device has no room.
    pub fn alloc<T: Pod>(&self, len: usize) -> StageResult<Buffer<T>> {
        Buffer::new(self.context(), len)
    }

    /// The same, with every byte zero.
    ///
    /// # Errors
    /// As [`alloc`](Self::alloc).
    pub fn alloc_zeroed<T: Pod>(&self, len: usize) -> StageResult<Buffer<T>> {
        let mut buffer = self.alloc(len)?;
        buffer.clear()?;
        Ok(buffer)
    }

    /// A buffer with the elements of `from`.
    ///
    /// # Errors
    /// As [`alloc`](Self::alloc).
    pub fn buffer<T: Pod>(&self, from: &[T]) -> StageResult<Buffer<T>> {
        let mut buffer = self.alloc(from.len())?;
        self.upload(&mut buffer, 0, from)?;
        Ok(buffer)
    }

    /// Page-locked host memory for `len` elements, zero.
    ///
    /// # Errors
    /// If the host has no room.
    pub fn pinned<T: Pod>(&self, len: usize) -> StageResult<Pinned<T>> {
        Pinned::new(self.context(), len)
    }

    /// Copies `from` to `to[at..]`, after all earlier work, and waits for that.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Panics
    /// If `to` is too short.
    pub fn upload<T: Pod>(&self, to: &mut Buffer<T>, at: usize, from: &[T]) -> StageResult {
        to.upload(at, from)
    }

    /// Copies the first `len` elements of `from` to `to[at..]` without waiting.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Panics
    /// If either is too short.
    pub fn upload_pinned<T: Pod>(
        &self,
        to: &mut Buffer<T>,
        at: usize,
        from: &mut Pinned<T>,
        len: usize,
    ) -> StageResult {
        from.upload(len, to, at)
    }

    /// Copies a range out, after all earlier work.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Panics
    /// If the buffer has no such range.
    pub fn download<T: Pod>(&self, from: &Buffer<T>, range: Range<usize>) -> StageResult<Vec<T>> {
        from.download(range)
    }

    /// Copies a range to the start of page-locked memory, after all earlier work, and waits.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Panics
    /// If the buffer has no such range, or `to` no room for it.
    pub fn download_pinned<'a, T: Pod>(
        &self,
        from: &Buffer<T>,
        range: Range<usize>,
        to: &'a mut Pinned<T>,
    ) -> StageResult<&'a [T]> {
        to.download(from, range)
    }

    /// Copies between buffers of the device, without waiting.
    ///
    /// # Errors
    /// If the device fails.
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
        from.copy_to(range, to, at)
    }

    /// Starts a kernel after all earlier work; nothing if the grid has no blocks.
    ///
    /// # Errors
    /// If the kernel takes other parameters, or the device fails.
    ///
    /// # Safety
    /// With this grid and these parameters the kernel reads and writes nothing beyond the buffers
    /// whose addresses are in `params`, and in the memory that these lead to. All that memory is
    /// alive now; buffers that are dropped later wait for the work.
    pub(crate) unsafe fn launch<P: Params>(
        &self,
        kernel: Kernel<P>,
        grid: Grid,
        params: &P,
    ) -> StageResult {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let function = self.0.modules.function(kernel).map_err(device_error)?;
        let mut overlap = programmatic_launch();
        let mut params = [ptr::from_ref(params).cast_mut().cast::<c_void>()];
        self.context().run(kernel.name, |stream| {
            let config = sys::CUlaunchConfig {
                gridDimX: grid.blocks[0] as u32,
                gridDimY: grid.blocks[1] as u32,
                gridDimZ: grid.blocks[2] as u32,
                blockDimX: grid.threads as u32,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: grid.shared as u32,
                hStream: stream,
                attrs: &mut overlap,
                numAttrs: u32::from(self.0.overlap),
            };
            // SAFETY: the kernel takes one `P`, as `function` has found, and the driver copies it
            // before it returns; the caller answers for the memory.
            unsafe {
                sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), ptr::null_mut())
            }
        })
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// If the device fails.
    pub fn synchronize(&self) -> StageResult {
        self.context().synchronize()
    }

    /// Captures the launches of `work` as a CUDA graph instead of running them.
    ///
    /// # Errors
    /// Those of `work`, or if the device fails.
    pub fn capture(&self, work: impl FnOnce() -> StageResult) -> StageResult<Graph> {
        let context = self.context();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as the context.
        context.run("capture", |stream| unsafe { sys::cuStreamBeginCapture_v2(stream, mode) })?;
        let result = work();
        let mut graph = ptr::null_mut();
        // SAFETY: capturing began above.
        context.run("capture", |stream| unsafe { sys::cuStreamEndCapture(stream, &mut graph) })?;
        let mut executable = ptr::null_mut();
        let made = result.and_then(|()| {
            // SAFETY: `graph` was just captured.
            context.run("instantiate a graph", |_| unsafe {
                sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0)
            })
        });
        // SAFETY: the executable graph does not need its source.
        unsafe { sys::cuGraphDestroy(graph) };
        made.map(|()| Graph { device: self.clone(), executable })
    }

    /// An event at this point of the stream, for timing.
    ///
    /// # Errors
    /// If the device fails.
    pub fn event(&self) -> StageResult<Event> {
        let event = Event::new(self.context(), true)?;
        event.record()?;
        Ok(event)
    }

    fn context(&self) -> &Arc<Context> {
        &self.0.context
    }
}

/// A CUDA graph: captured launches.
pub struct Graph {
    device: Device,
    executable: sys::CUgraphExec,
}

// SAFETY: the handle may be used from any thread.
unsafe impl Send for Graph {}

impl Graph {
    /// Runs the launches again.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Safety
    /// What was said of each launch when it was captured is true now: the buffers are still alive,
    /// and what is in them still leads to memory that is.
    pub(crate) unsafe fn launch(&self) -> StageResult {
        self.device.context().run("run a graph", |stream| {
            // SAFETY: graph and stream are alive; the caller answers for the memory.
            unsafe { sys::cuGraphLaunch(self.executable, stream) }
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

fn programmatic_launch() -> sys::CUlaunchAttribute {
    // SAFETY: a plain C struct for which zeros are valid.
    let mut attribute: sys::CUlaunchAttribute = unsafe { mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    attribute
}
