//! Parameters of kernels: one `repr(C)` struct for each, with the name and the layout of the struct
//! in kernels/.
//!
//! Rust's size of a struct is a constant of `constants.cuh`, which kernels are compiled with and
//! compare with their own. What a kernel takes is asked of the driver when it is used first.
//!
//! A struct holds addresses. Whoever launches a kernel takes them from buffers that it has
//! borrowed, and answers for that in the `unsafe` block of the launch.

mod attention;
mod experts;
mod products;
mod routing;
mod streams;
mod weights;

pub(crate) use attention::*;
pub(crate) use experts::*;
pub(crate) use products::*;
pub(crate) use routing::*;
pub(crate) use streams::*;
pub(crate) use weights::*;

/// Names and bytes of all structs.
pub(crate) fn sizes() -> Vec<(&'static str, usize)> {
    [
        attention::sizes(),
        experts::sizes(),
        products::sizes(),
        routing::sizes(),
        streams::sizes(),
        weights::sizes(),
    ]
    .concat()
}
