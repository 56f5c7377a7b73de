//! The machine, and how fast its memory is: the limit that decode is measured against.

use anyhow::Result;
use ds4_engine::Engine;
use serde::Serialize;

/// The machine as the program uses it.
#[derive(Serialize)]
pub struct Machine {
    /// As `--backend` names it.
    pub backend: &'static str,
    /// In words, such as `2 threads, AVX-512 kernels`.
    pub device: String,
    /// Measured bandwidth of the memory that holds the weights.
    pub memory_bytes_per_second: f64,
}

impl Machine {
    /// Describes and measures the machine that `engine` runs on.
    pub fn of(engine: &Engine) -> Result<Self> {
        let backend = engine.backend();
        Ok(Machine {
            backend: backend.name(),
            device: backend.device(),
            memory_bytes_per_second: backend.bandwidth()?,
        })
    }
}
