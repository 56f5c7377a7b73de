//! How to compute: the options that all commands share, and the engine they ask for.

use std::{num::NonZeroUsize, sync::Arc};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use ds4_cpu::{CpuBackend, Kernels};
use ds4_engine::{observer::ExpertObserver, rows::CacheRounding};
use ds4_model::Model;

use crate::backend::AnyBackend;

/// The engine of this program.
pub type Engine = ds4_engine::Engine<AnyBackend>;
/// A session of [`Engine`].
pub type Session = ds4_engine::Session<AnyBackend>;

/// Options for the computation.
#[derive(Args)]
#[command(next_help_heading = "Computation")]
pub struct ComputeArgs {
    /// Compute with plain, exact code: slow, the yardstick for the fast one
    #[arg(long)]
    reference: bool,
    /// Round cached rows as in the model's training
    #[arg(long, value_name = "on|off", hide_possible_values = true, default_value = "on")]
    cache_rounding: Switch,
    /// Threads to compute with [default: one per processor]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Switch {
    On,
    Off,
}

impl ComputeArgs {
    /// An engine for `model`. Called once: the threads are the program's.
    pub fn engine(&self, model: Arc<Model>) -> Result<Engine> {
        Ok(Engine::new(AnyBackend::Cpu(self.cpu(model)?)))
    }

    /// The same, and shows what routed experts are given to `observer`.
    pub fn observed_engine(
        &self,
        model: Arc<Model>,
        observer: Arc<dyn ExpertObserver>,
    ) -> Result<Engine> {
        Ok(Engine::new(AnyBackend::Cpu(self.cpu(model)?.with_observer(observer))))
    }

    fn cpu(&self, model: Arc<Model>) -> Result<CpuBackend> {
        let threads = self.threads.map_or(0, NonZeroUsize::get);
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .context("cannot start threads")?;
        Ok(CpuBackend::new(model, self.kernels(), self.rounding()))
    }

    /// The implementation of the hot routines.
    pub fn kernels(&self) -> Kernels {
        if self.reference { Kernels::Reference } else { Kernels::detect() }
    }

    fn rounding(&self) -> CacheRounding {
        match self.cache_rounding {
            Switch::On => CacheRounding::On,
            Switch::Off => CacheRounding::Off,
        }
    }
}
