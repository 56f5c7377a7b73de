//! How to compute: the options that all commands share, and the engine they ask for.

use std::{num::NonZeroUsize, sync::Arc};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use ds4_cpu::{CpuBackend, Kernels};
use ds4_cuda::{CudaBackend, Error as CudaError};
use ds4_engine::{Backend, Engine, observer::ExpertObserver, rows::CacheRounding};
use ds4_model::Model;

use crate::{
    memory,
    terminal::{self, Unit},
};

/// Options for the computation.
#[derive(Args)]
#[command(next_help_heading = "Computation")]
pub struct ComputeArgs {
    /// What computes: auto takes a CUDA device with room for the model, else the processor
    #[arg(long, value_name = "auto|cpu|cuda", hide_possible_values = true, default_value = "auto")]
    backend: Choice,
    /// Number of the CUDA device [default: the one with the most free memory]
    #[arg(long, value_name = "N")]
    device: Option<usize>,
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Choice {
    Auto,
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, ValueEnum)]
enum Switch {
    On,
    Off,
}

impl ComputeArgs {
    /// An engine for `model` and sessions of `context` tokens together. Called once: the threads
    /// are the program's.
    pub fn engine(&self, model: Arc<Model>, context: usize) -> Result<Engine> {
        self.start_threads()?;
        match self.choice()? {
            Choice::Cpu => Ok(Engine::new(self.cpu(model)?)),
            Choice::Cuda => Ok(Engine::new(self.cuda(model, context)?)),
            Choice::Auto => match self.cuda(model.clone(), context) {
                Ok(backend) => Ok(Engine::new(backend)),
                Err(error) => {
                    // Who has no GPU need not hear of it.
                    let none = matches!(error, CudaError::NoDriver | CudaError::NoDevice { .. });
                    if !none {
                        terminal::note(format_args!("Computing on the CPU: {error}"));
                    }
                    Ok(Engine::new(self.cpu(model)?))
                }
            },
        }
    }

    /// An engine that shows what routed experts are given to `observer`.
    pub fn observed_engine(
        &self,
        model: Arc<Model>,
        observer: Arc<dyn ExpertObserver>,
    ) -> Result<Engine> {
        self.start_threads()?;
        ensure!(self.choice()? != Choice::Cuda, "--backend: only cpu shows what experts are given");
        Ok(Engine::new(self.cpu(model)?.with_observer(observer)))
    }

    /// What was asked for, in whichever words.
    fn choice(&self) -> Result<Choice> {
        match (self.backend, self.reference) {
            (Choice::Auto, false) if self.device.is_some() => Ok(Choice::Cuda),
            (Choice::Auto, true) if self.device.is_none() => Ok(Choice::Cpu),
            (choice, reference) => {
                let cpu = reference || choice == Choice::Cpu;
                ensure!(!cpu || self.device.is_none(), "--device: the CPU has none");
                ensure!(!reference || choice == Choice::Cpu, "--reference: computes on the CPU");
                Ok(choice)
            }
        }
    }

    fn start_threads(&self) -> Result<()> {
        let threads = self.threads.map_or(0, NonZeroUsize::get);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build_global().context("cannot start threads")
    }

    fn cpu(&self, model: Arc<Model>) -> Result<CpuBackend> {
        if model.is_dummy() {
            memory::check_room(model.file_bytes())?;
        }
        Ok(CpuBackend::new(model, self.kernels(), self.rounding()))
    }

    fn cuda(&self, model: Arc<Model>, context: usize) -> Result<CudaBackend, CudaError> {
        let options =
            ds4_cuda::Options { device: self.device, cache_rounding: self.rounding(), context };
        let bar = terminal::progress_bar(0, "loading", Unit::Bytes);
        let backend = CudaBackend::new(model, options, |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        let backend = backend?;
        let report = backend.memory(context).map_err(CudaError::from)?;
        terminal::note(report);
        Ok(backend)
    }

    fn kernels(&self) -> Kernels {
        if self.reference { Kernels::Reference } else { Kernels::detect() }
    }

    fn rounding(&self) -> CacheRounding {
        match self.cache_rounding {
            Switch::On => CacheRounding::On,
            Switch::Off => CacheRounding::Off,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        compute: ComputeArgs,
    }

    fn choice(args: &[&str]) -> Result<Choice> {
        Command::parse_from([&["ds4"], args].concat()).compute.choice()
    }

    #[test]
    fn the_backend_follows_from_what_is_asked_for() {
        assert_eq!(choice(&[]).unwrap(), Choice::Auto);
        assert_eq!(choice(&["--device", "1"]).unwrap(), Choice::Cuda);
        assert_eq!(choice(&["--reference"]).unwrap(), Choice::Cpu);
        assert_eq!(choice(&["--backend", "cpu", "--reference"]).unwrap(), Choice::Cpu);
        assert_eq!(choice(&["--backend", "cuda", "--device", "0"]).unwrap(), Choice::Cuda);
        for contradiction in [
            &["--backend", "cpu", "--device", "0"][..],
            &["--reference", "--device", "0"],
            &["--reference", "--backend", "cuda"],
        ] {
            assert!(choice(contradiction).is_err(), "{contradiction:?}");
        }
    }
}
