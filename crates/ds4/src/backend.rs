//! The backend that was chosen: one type over all of them, so that commands need no parameter.
//!
//! Every stage goes to the backend inside. State of one backend never meets another: a session
//! belongs to the engine that made it, and a program has one engine.

use ds4_cpu::CpuBackend;
use ds4_cuda::CudaBackend;
use ds4_engine::{
    Backend,
    backend::{Batch, Frontier, HeadOutput, LayerRows, StageResult, Sublayer},
    rows::CacheRounding,
};
use ds4_model::config::Config;

/// Tokens of a prompt that the CPU computes together.
///
/// Weights are read once per chunk, so small chunks are slow; activations of a chunk take memory
/// and Ctrl-C waits for its end, so large ones are unwieldy.
pub const CPU_PREFILL_CHUNK: usize = 512;

/// Any backend.
pub enum AnyBackend {
    /// The processor.
    Cpu(CpuBackend),
    /// A CUDA device.
    Cuda(CudaBackend),
}

/// Activations of [`AnyBackend`].
pub enum Activations {
    /// On the processor.
    Cpu(Box<ds4_cpu::Activations>),
    /// On a CUDA device.
    Cuda(ds4_cuda::Activations),
}

/// The cache of a session on [`AnyBackend`].
pub enum Cache {
    /// Of the processor.
    Cpu(ds4_cpu::Cache),
    /// Of a CUDA device.
    Cuda(ds4_cuda::Cache),
}

impl AnyBackend {
    /// Tokens of a prompt to compute together.
    pub fn prefill_chunk(&self) -> usize {
        match self {
            AnyBackend::Cpu(_) => CPU_PREFILL_CHUNK,
            AnyBackend::Cuda(_) => ds4_cuda::PREFILL_CHUNK,
        }
    }
}

/// Calls the same method of the backend inside.
macro_rules! inside {
    ($self:ident, $b:ident => $call:expr) => {
        match $self {
            AnyBackend::Cpu($b) => $call,
            AnyBackend::Cuda($b) => $call,
        }
    };
}

/// The same, with the state inside an enum of the same variants.
macro_rules! inside_with {
    ($self:ident, $state:ident: $Enum:ident, $b:ident => $call:expr) => {
        match ($self, $state) {
            (AnyBackend::Cpu($b), $Enum::Cpu($state)) => $call,
            (AnyBackend::Cuda($b), $Enum::Cuda($state)) => $call,
            _ => foreign(),
        }
    };
}

/// A stage without caches.
macro_rules! stage {
    ($name:ident($($arg:ident: $ty:ty),*)) => {
        fn $name(&self, $($arg: $ty,)* batch: &Batch, x: &mut Activations) -> StageResult {
            inside_with!(self, x: Activations, b => b.$name($($arg,)* batch, x))
        }
    };
}

/// A stage with caches.
macro_rules! cache_stage {
    ($name:ident) => {
        fn $name(
            &self,
            layer: usize,
            batch: &Batch,
            x: &mut Activations,
            caches: &mut [&mut Cache],
        ) -> StageResult {
            match (self, x) {
                (AnyBackend::Cpu(b), Activations::Cpu(x)) => {
                    b.$name(layer, batch, x, &mut cpu_caches(caches))
                }
                (AnyBackend::Cuda(b), Activations::Cuda(x)) => {
                    b.$name(layer, batch, x, &mut cuda_caches(caches))
                }
                _ => foreign(),
            }
        }
    };
}

fn cpu_caches<'a>(caches: &'a mut [&mut Cache]) -> Vec<&'a mut ds4_cpu::Cache> {
    let inside = |cache: &'a mut &mut Cache| match cache {
        Cache::Cpu(cache) => cache,
        Cache::Cuda(_) => foreign(),
    };
    caches.iter_mut().map(inside).collect()
}

fn cuda_caches<'a>(caches: &'a mut [&mut Cache]) -> Vec<&'a mut ds4_cuda::Cache> {
    let inside = |cache: &'a mut &mut Cache| match cache {
        Cache::Cuda(cache) => cache,
        Cache::Cpu(_) => foreign(),
    };
    caches.iter_mut().map(inside).collect()
}

fn foreign() -> ! {
    unreachable!("a session of another backend")
}

impl Backend for AnyBackend {
    type Activations = Activations;
    type Cache = Cache;

    fn config(&self) -> &Config {
        inside!(self, b => b.config())
    }

    fn cache_rounding(&self) -> CacheRounding {
        inside!(self, b => b.cache_rounding())
    }

    fn model_identity(&self) -> [u8; 32] {
        inside!(self, b => b.model_identity())
    }

    fn new_cache(&self) -> StageResult<Cache> {
        match self {
            AnyBackend::Cpu(b) => b.new_cache().map(Cache::Cpu),
            AnyBackend::Cuda(b) => b.new_cache().map(Cache::Cuda),
        }
    }

    fn cache_bytes(&self, cache: &Cache) -> usize {
        inside_with!(self, cache: Cache, b => b.cache_bytes(cache))
    }

    fn reserve(&self, cache: &mut Cache, tokens: usize) -> StageResult {
        inside_with!(self, cache: Cache, b => b.reserve(cache, tokens))
    }

    fn run_step<R: Send>(&self, stages: impl FnOnce() -> R + Send) -> R {
        inside!(self, b => b.run_step(stages))
    }

    fn embed(&self, batch: &Batch) -> StageResult<Activations> {
        match self {
            AnyBackend::Cpu(b) => b.embed(batch).map(|x| Activations::Cpu(Box::new(x))),
            AnyBackend::Cuda(b) => b.embed(batch).map(Activations::Cuda),
        }
    }

    stage!(hc_pre(layer: usize, sublayer: Sublayer));
    stage!(project_qkv(layer: usize));
    cache_stage!(compress);
    cache_stage!(select_rows);
    cache_stage!(attend);
    stage!(project_output(layer: usize));
    stage!(route(layer: usize));
    stage!(run_experts(layer: usize));
    stage!(hc_post(layer: usize, sublayer: Sublayer));

    fn head(&self, batch: &Batch, x: Activations) -> StageResult<HeadOutput> {
        match (self, x) {
            (AnyBackend::Cpu(b), Activations::Cpu(x)) => b.head(batch, *x),
            (AnyBackend::Cuda(b), Activations::Cuda(x)) => b.head(batch, x),
            _ => foreign(),
        }
    }

    fn rewind(&self, cache: &mut Cache, position: usize) {
        inside_with!(self, cache: Cache, b => b.rewind(cache, position));
    }

    fn frontier(&self, cache: &Cache, position: usize) -> StageResult<Frontier> {
        inside_with!(self, cache: Cache, b => b.frontier(cache, position))
    }

    fn set_frontier(&self, cache: &mut Cache, frontier: &Frontier) -> StageResult {
        inside_with!(self, cache: Cache, b => b.set_frontier(cache, frontier))
    }

    fn layer_rows(&self, cache: &Cache, layer: usize) -> StageResult<LayerRows> {
        inside_with!(self, cache: Cache, b => b.layer_rows(cache, layer))
    }

    fn set_layer_rows(&self, cache: &mut Cache, layer: usize, rows: &LayerRows) -> StageResult {
        inside_with!(self, cache: Cache, b => b.set_layer_rows(cache, layer, rows))
    }
}
