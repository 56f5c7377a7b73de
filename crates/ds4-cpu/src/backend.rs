//! The CPU backend: a model, kernels to run it with, and a step's place in the thread pool.

use std::sync::Arc;

use ds4_engine::{
    Backend,
    backend::{self, Batch, Forward, HeadOutput, MemoryReport, StageResult, own_cache},
    experts::RoutedExperts,
    layout::StateLayout,
    observer::ExpertObserver,
    rope::{Frequencies, frequencies},
    rows::CacheRounding,
};
use ds4_model::{
    Model,
    config::{Config, LayerKind},
};

use crate::{Activations, Cache, CpuExperts, CpuStep, Kernels, bandwidth, cache};

/// Tokens of a prompt that are computed together.
///
/// Weights are read once per chunk, so small chunks are slow; activations of a chunk take memory
/// and Ctrl-C waits for its end, so large ones are unwieldy.
pub const PREFILL_CHUNK: usize = 512;

/// Runs a model on the processor, in the current `rayon` thread pool.
pub struct CpuBackend {
    pub(crate) model: Arc<Model>,
    pub(crate) kernels: Kernels,
    layout: StateLayout,
    pub(crate) plain: Frequencies,
    pub(crate) yarn: Frequencies,
    pub(crate) experts: Arc<dyn RoutedExperts>,
}

impl CpuBackend {
    /// A backend for `model`; its weights stay where they are.
    pub fn new(model: Arc<Model>, kernels: Kernels, rounding: CacheRounding) -> Self {
        let layout = StateLayout::new(&model.config, rounding);
        let plain = frequencies(&model.config, LayerKind::Swa);
        let yarn = frequencies(&model.config, LayerKind::Csa);
        let experts = Arc::new(CpuExperts::new(model.clone(), kernels));
        CpuBackend { model, kernels, layout, plain, yarn, experts }
    }

    /// The same, and shows the inputs of routed experts to `observer`.
    pub fn with_observer(self, observer: Arc<dyn ExpertObserver>) -> Self {
        let experts = CpuExperts::new(self.model.clone(), self.kernels).with_observer(observer);
        self.with_experts(Arc::new(experts))
    }

    /// The same, with routed experts that something else runs.
    pub fn with_experts(self, experts: Arc<dyn RoutedExperts>) -> Self {
        CpuBackend { experts, ..self }
    }

    /// An empty cache, as this backend's own type.
    pub fn empty_cache(&self) -> Cache {
        Cache::new(&self.layout)
    }

    pub(crate) fn rounding(&self) -> CacheRounding {
        self.layout.rounding()
    }
}

impl Backend for CpuBackend {
    fn config(&self) -> &Config {
        &self.model.config
    }

    fn model_identity(&self) -> [u8; 32] {
        self.model.identity()
    }

    fn layout(&self) -> &StateLayout {
        &self.layout
    }

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn device(&self) -> String {
        format!("{} threads, {} kernels", rayon::current_num_threads(), self.kernels)
    }

    fn prefill_chunk(&self) -> usize {
        PREFILL_CHUNK
    }

    /// Weights are the file's mapping, and sessions share memory with all other programs.
    fn memory(&self, context: usize) -> StageResult<MemoryReport> {
        Ok(MemoryReport {
            device: self.device(),
            weights: 0,
            activations: Activations::bytes(self.config(), PREFILL_CHUNK.min(context)),
            left: None,
            context,
            session: self.session_bytes(context),
        })
    }

    fn bandwidth(&self) -> StageResult<f64> {
        Ok(bandwidth::read_bandwidth())
    }

    fn new_cache(&self) -> StageResult<Box<dyn backend::Cache>> {
        Ok(Box::new(self.empty_cache()))
    }

    fn session_bytes(&self, tokens: usize) -> u64 {
        cache::bytes_at(&self.layout, tokens)
    }

    /// Runs on a thread of the pool: from any other thread, each part of a stage would have to be
    /// handed over and waited for.
    fn step(
        &self,
        batch: &Batch,
        caches: &mut [&mut dyn backend::Cache],
        forward: Forward<'_>,
    ) -> StageResult<HeadOutput> {
        let own = caches.iter_mut().map(|cache| own_cache::<Cache>(&mut **cache));
        let caches: Vec<&mut Cache> = own.collect::<StageResult<_>>()?;
        let mut step = CpuStep::new(self, batch, caches);
        rayon::scope(|_| forward(&mut step))?;
        Ok(step.into_output())
    }
}
