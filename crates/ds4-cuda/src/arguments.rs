//! Arguments of kernels.

use std::ffi::c_void;

use bytemuck::Pod;

use crate::device::Pointer;

/// One kernel argument.
pub struct Arg {
    words: Vec<u64>,
}

/// Kernel arguments, each a [`Pointer`], a number, or a `repr(C)` struct of pointers.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &[$($crate::arguments::Arg::from($arg)),*] };
}
pub(crate) use args;

impl Arg {
    /// Where the value is, as the driver wants it.
    pub(crate) fn pointer(&self) -> *mut c_void {
        self.words.as_ptr().cast_mut().cast()
    }

    /// A plain value, as the kernel declares it.
    pub fn value<T: Pod>(value: T) -> Arg {
        let mut words = vec![0u64; size_of::<T>().div_ceil(size_of::<u64>())];
        bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..size_of::<T>()]
            .copy_from_slice(bytemuck::bytes_of(&value));
        Arg { words }
    }
}

macro_rules! plain_args {
    ($($ty:ty),*) => { $(impl From<$ty> for Arg {
        fn from(value: $ty) -> Arg { Arg::value(value) }
    })* };
}
plain_args!(Pointer, u32, i32, f32, u64);

impl From<usize> for Arg {
    /// As a 32-bit integer.
    fn from(value: usize) -> Arg {
        Arg::value(value as u32)
    }
}
