//! The CUDA backend: the stages of the model as kernels, compiled at run time for the device found.
//!
//! [`device`] and the modules below it are all that talks to the driver. [`weights`] brings the
//! model to the device in the order in which kernels read it; `stages` launches the kernels of
//! `kernels/` with the structs of `params`; `scratch` holds the activations of a step, and
//! [`backend`] puts the stages together. Steps that only decode are captured as CUDA graphs, one
//! for each shape.
//!
//! Launching a kernel is `unsafe`. It happens in the few modules that allow it, in functions that
//! take buffers and check that these have room for the rows of the launch.

#![deny(unsafe_code)]

pub mod backend;
pub mod device;
pub mod weights;

mod cache;
mod compile;
mod constants;
mod context;
mod driver;
mod formats;
mod generate;
mod header;
mod kernel;
mod memory;
mod modules;
mod params;
mod products;
mod scratch;
mod stages;
mod step;

pub use backend::{CudaBackend, Options, PREFILL_CHUNK};
pub use cache::Cache;
pub use driver::devices;

/// What the driver says of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// Bytes of memory.
    pub total_bytes: u64,
    /// Bytes free when it was asked.
    pub free_bytes: u64,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
}

/// Why a model can't run on a device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no driver.
    #[error("no CUDA driver found (libcuda): install NVIDIA's driver, or run on the CPU")]
    NoDriver,
    /// There is a driver but no device.
    #[error("no CUDA device {wanted}: the driver shows {found}")]
    NoDevice {
        /// The number asked for.
        wanted: usize,
        /// How many there are.
        found: usize,
    },
    /// The device is too old.
    #[error("{name}: compute capability {major}.{minor}, expected 8.0 or more")]
    Capability {
        /// The device.
        name: String,
        /// Its capability.
        major: u32,
        /// Its capability.
        minor: u32,
    },
    /// There is no run-time compiler, and no kernels in the cache.
    #[error(
        "no CUDA compiler found (libnvrtc): install it (package cuda-nvrtc, or pip's \
         nvidia-cuda-nvrtc on the library path), or run on the CPU"
    )]
    NoCompiler,
    /// A kernel file was refused.
    #[error("{program}: {error}")]
    Compile {
        /// The file.
        program: &'static str,
        /// The compiler's log.
        error: String,
    },
    /// Text with a zero byte where C wants none.
    #[error("{0:?}: not a C string")]
    CString(String),
    /// A kernel takes other parameters than it is going to get.
    #[error(
        "kernel {kernel}: found parameters of {found:?} bytes, expected one {params} of {expected}"
    )]
    Params {
        /// The kernel.
        kernel: &'static str,
        /// The struct that it should take.
        params: &'static str,
        /// Bytes of each parameter that it does take.
        found: Vec<usize>,
        /// Bytes of the struct.
        expected: usize,
    },
    /// No program has a kernel of this name.
    #[error("no kernel is called {0}")]
    NoKernel(&'static str),
    /// A call of the driver failed.
    #[error("the CUDA device failed to {what}: {error}")]
    Driver {
        /// What was tried.
        what: String,
        /// The driver's words.
        error: String,
    },
    /// The model does not fit.
    #[error("{name}: found {free} free, expected {needed}: {advice}")]
    TooLarge {
        /// The device.
        name: String,
        /// Memory free.
        free: String,
        /// Memory needed.
        needed: String,
        /// What would fit.
        advice: String,
    },
    /// A matrix whose shape the kernels don't take.
    #[error("{tensor}: found {found}, expected {expected}: run this model on the CPU")]
    Shape {
        /// Which.
        tensor: String,
        /// Its shape.
        found: String,
        /// What the kernels take.
        expected: String,
    },
    /// Memory ran out or the device failed while loading.
    #[error(transparent)]
    Backend(#[from] ds4_engine::backend::BackendError),
}
