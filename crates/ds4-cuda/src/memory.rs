//! Memory of a device, and page-locked memory of the host.

#![allow(unsafe_code, reason = "talks to the driver")]

use std::{marker::PhantomData, ops::Range, ptr, sync::Arc};

use bytemuck::Pod;
use cudarc::driver::sys;
use ds4_engine::backend::{BackendError, StageResult};

use crate::{
    context::{Context, Event, device_error},
    driver::check,
    kernel::Pointer,
};

/// Device memory for `len` elements; freed when dropped, after the work that uses it.
pub struct Buffer<T> {
    memory: Arc<Memory>,
    len: usize,
    element: PhantomData<T>,
}

/// An allocation. Whoever keeps addresses of it keeps it alive.
pub(crate) struct Memory {
    context: Arc<Context>,
    pointer: Pointer,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Where the wait fails the context is lost, and its memory with it.
        if self.pointer != Pointer::NULL && self.context.synchronize().is_ok() {
            // SAFETY: allocated by `Buffer::new`, and no work is under way.
            unsafe { sys::cuMemFree_v2(self.pointer.address()) };
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
    pub(crate) fn pointer(&self) -> Pointer {
        self.memory.pointer
    }

    /// Address of element `index`.
    ///
    /// # Panics
    /// If `index` is beyond the end.
    pub(crate) fn at(&self, index: usize) -> Pointer {
        self.range(index, 0)
    }

    /// Address of the first of `len` elements.
    ///
    /// # Panics
    /// If there are fewer.
    pub(crate) fn first(&self, len: usize) -> Pointer {
        self.range(0, len)
    }

    /// Address of the first of `len` elements from `at` on.
    ///
    /// # Panics
    /// If there are fewer.
    pub(crate) fn range(&self, at: usize, len: usize) -> Pointer {
        let fits = at.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(fits, "{len} elements from {at} on of a buffer of {}", self.len);
        self.pointer().offset(at * size_of::<T>())
    }

    /// The allocation, to be kept with an address of it.
    pub(crate) fn memory(&self) -> Arc<Memory> {
        self.memory.clone()
    }
}

impl<T: Pod> Buffer<T> {
    /// Memory for `len` elements, not initialised.
    pub(crate) fn new(context: &Arc<Context>, len: usize) -> StageResult<Buffer<T>> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| out_of_memory(usize::MAX))?;
        let mut address = 0;
        if bytes > 0 {
            context.make_current()?;
            // SAFETY: `address` is valid.
            match unsafe { sys::cuMemAlloc_v2(&mut address, bytes) } {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(out_of_memory(bytes)),
                result => check("allocate memory", result).map_err(device_error)?,
            }
        }
        let memory = Memory { context: context.clone(), pointer: Pointer::new(address) };
        Ok(Buffer { memory: Arc::new(memory), len, element: PhantomData })
    }

    /// Makes every byte zero.
    pub(crate) fn clear(&mut self) -> StageResult {
        if self.len == 0 {
            return Ok(());
        }
        self.memory.context.run("clear memory", |stream| {
            let bytes = self.len * size_of::<T>();
            // SAFETY: the buffer has that many bytes.
            unsafe { sys::cuMemsetD8Async(self.pointer().address(), 0, bytes, stream) }
        })
    }

    /// Copies `from` to the elements from `at` on, after all earlier work, and waits.
    pub(crate) fn upload(&mut self, at: usize, from: &[T]) -> StageResult {
        let (to, bytes) = (self.range(at, from.len()), size_of_val(from));
        if from.is_empty() {
            return Ok(());
        }
        self.memory.context.run("copy to the device", |stream| {
            // SAFETY: both sides have that many bytes, and the copy has ended before `from` does.
            unsafe { sys::cuMemcpyHtoDAsync_v2(to.address(), from.as_ptr().cast(), bytes, stream) }
        })?;
        self.memory.context.synchronize()
    }

    /// Copies a range out, after all earlier work.
    pub(crate) fn download(&self, range: Range<usize>) -> StageResult<Vec<T>> {
        let from = self.range(range.start, range.len());
        let mut out = vec![T::zeroed(); range.len()];
        if !out.is_empty() {
            self.memory.context.synchronize()?;
            let bytes = size_of_val(out.as_slice());
            self.memory.context.run("copy from the device", |_| {
                // SAFETY: both sides have that many bytes; the copy has ended when the call
                // returns.
                unsafe { sys::cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), from.address(), bytes) }
            })?;
        }
        Ok(out)
    }

    /// Copies a range of this buffer to the elements of `to` from `at` on, without waiting.
    pub(crate) fn copy_to(
        &self,
        range: Range<usize>,
        to: &mut Buffer<T>,
        at: usize,
    ) -> StageResult {
        let (from, to) = (self.range(range.start, range.len()), to.range(at, range.len()));
        if range.is_empty() {
            return Ok(());
        }
        self.memory.context.run("copy on the device", |stream| {
            let bytes = range.len() * size_of::<T>();
            // SAFETY: both sides have that many bytes, and are freed after all work.
            unsafe { sys::cuMemcpyDtoDAsync_v2(to.address(), from.address(), bytes, stream) }
        })
    }
}

/// Page-locked host memory.
pub struct Pinned<T> {
    context: Arc<Context>,
    pointer: *mut T,
    len: usize,
    /// Behind the last copy from here.
    copied: Event,
}

// SAFETY: the memory is owned, and shared access is read-only.
unsafe impl<T: Send> Send for Pinned<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Pinned<T> {}

impl<T: Pod> Pinned<T> {
    /// Memory for `len` elements, zero.
    pub(crate) fn new(context: &Arc<Context>, len: usize) -> StageResult<Pinned<T>> {
        let copied = Event::new(context, false)?;
        let bytes =
            len.checked_mul(size_of::<T>()).ok_or_else(|| out_of_memory(usize::MAX))?.max(1);
        let mut pointer = ptr::null_mut();
        context.run("allocate page-locked memory", |_| {
            // SAFETY: `pointer` is valid.
            unsafe { sys::cuMemHostAlloc(&mut pointer, bytes, 0) }
        })?;
        // SAFETY: the memory was just allocated with that size.
        unsafe { ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        Ok(Pinned { context: context.clone(), pointer: pointer.cast(), len, copied })
    }

    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: allocated with `len` elements, all initialised; copies to here were waited for.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }
    }

    /// The elements, to be changed: waits for the last copy from here.
    pub fn as_mut_slice(&mut self) -> StageResult<&mut [T]> {
        self.copied.wait()?;
        // SAFETY: as above, borrowed exclusively, and no copy from here is under way.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) })
    }

    /// Copies the first `len` elements to `to`, from element `at` on, without waiting.
    pub(crate) fn upload(&mut self, len: usize, to: &mut Buffer<T>, at: usize) -> StageResult {
        assert!(len <= self.len, "{len} elements of page-locked memory for {}", self.len);
        let to = to.range(at, len);
        if len == 0 {
            return Ok(());
        }
        self.context.run("copy to the device", |stream| {
            let bytes = len * size_of::<T>();
            // SAFETY: both sides have that many bytes; this one is neither changed nor freed before
            // `copied`, and `to` is freed after all work.
            unsafe { sys::cuMemcpyHtoDAsync_v2(to.address(), self.pointer.cast(), bytes, stream) }
        })?;
        // Without the event there is a wait for everything.
        self.copied.record().or_else(|_| self.context.synchronize())
    }

    /// Copies a range of `from` to the start, after all earlier work, and waits.
    pub(crate) fn download(&mut self, from: &Buffer<T>, range: Range<usize>) -> StageResult<&[T]> {
        let len = range.len();
        assert!(len <= self.len, "{len} elements of page-locked memory for {}", self.len);
        let from = from.range(range.start, len);
        if len > 0 {
            self.context.run("copy from the device", |stream| {
                let bytes = len * size_of::<T>();
                // SAFETY: both sides have that many bytes, and the copy has ended when the borrow
                // does.
                unsafe {
                    sys::cuMemcpyDtoHAsync_v2(self.pointer.cast(), from.address(), bytes, stream)
                }
            })?;
        }
        self.context.synchronize()?;
        Ok(&self.as_slice()[..len])
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        if self.context.synchronize().is_ok() {
            // SAFETY: allocated by `new`, and no copy is under way.
            unsafe { sys::cuMemFreeHost(self.pointer.cast()) };
        }
    }
}

fn out_of_memory(bytes: usize) -> BackendError {
    BackendError::OutOfMemory(format!("the device has no room for {bytes} more bytes"))
}
