//! What a kernel takes: one struct of numbers and addresses.

use std::marker::PhantomData;

/// An address in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Pointer(u64);

impl Pointer {
    /// No address.
    pub(crate) const NULL: Pointer = Pointer(0);

    /// What the driver calls `address`.
    pub(crate) fn new(address: u64) -> Pointer {
        Pointer(address)
    }

    /// Its number for the driver.
    pub(crate) fn address(self) -> u64 {
        self.0
    }

    /// The address `bytes` further on.
    pub(crate) fn offset(self, bytes: usize) -> Pointer {
        Pointer(self.0 + bytes as u64)
    }
}

/// A struct that kernels know by the same name.
pub(crate) trait Params: Copy {
    /// The name.
    const NAME: &'static str;
}

/// A kernel whose only parameter is a `P`.
pub(crate) struct Kernel<P> {
    pub name: &'static str,
    params: PhantomData<fn(P)>,
}

impl<P> Clone for Kernel<P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Kernel<P> {}

impl<P: Params> Kernel<P> {
    pub const fn new(name: &'static str) -> Self {
        Kernel { name, params: PhantomData }
    }
}

/// Structs that are parameters or parts of some.
macro_rules! params {
    ($($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $ty:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Copy)]
            #[repr(C)]
            pub(crate) struct $name {
                $($(#[$field_meta])* pub $field: $ty,)*
            }

            impl $crate::kernel::Params for $name {
                const NAME: &'static str = stringify!($name);
            }
        )*

        /// Names and bytes of these structs.
        pub(super) fn sizes() -> Vec<(&'static str, usize)> {
            vec![$((stringify!($name), size_of::<$name>())),*]
        }
    };
}
pub(crate) use params;

/// Kernels with the struct that each takes.
macro_rules! kernels {
    ($($name:ident: $params:ty = $kernel:literal;)*) => {
        $(pub(crate) const $name: $crate::kernel::Kernel<$params> =
            $crate::kernel::Kernel::new($kernel);)*
    };
}
pub(crate) use kernels;
