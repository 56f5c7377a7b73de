//! The plain path at work, and the device after it with the same inputs, stage by stage.

use std::sync::Arc;

use ds4_cpu::{CpuBackend, Kernels};
use ds4_engine::{
    Backend,
    backend::{Batch, PREFILL_MIN, Span, Sublayer},
    rope::frequencies,
    rows::CacheRounding,
};
use ds4_model::{Model, config::LayerKind};

use super::{checks::Step, closeness::Closeness};
use crate::{
    Cache,
    device::{Buffer, Device},
    scratch::Scratch,
    stages::layer::{Shape, Stages, visible},
    weights::Weights,
};

/// Rows of the longest step.
const MOST_ROWS: usize = 256;
/// Rows of a chunk whose logits are wanted.
const CHUNK_LOGITS: usize = PREFILL_MIN + 1;

/// The same sessions on both sides.
pub struct SideBySide {
    pub(super) model: Arc<Model>,
    pub(super) rounding: CacheRounding,
    pub(super) plain: CpuBackend,
    pub(super) plain_caches: Vec<ds4_cpu::Cache>,
    pub(super) device: Device,
    weights: Weights,
    frequencies: Buffer<f32>,
    pub(super) scratch: Scratch,
    pub(super) caches: Vec<Cache>,
    positions: Vec<usize>,
    pub(super) closeness: Closeness,
}

impl SideBySide {
    /// `sessions` empty sessions.
    pub fn new(
        device: Device,
        model: Arc<Model>,
        rounding: CacheRounding,
        sessions: usize,
    ) -> SideBySide {
        let config = &model.config;
        let plain = CpuBackend::new(model.clone(), Kernels::Reference, rounding);
        let weights = Weights::load(&device, &model, |_, _| {}).expect("weights");
        let both = [LayerKind::Swa, LayerKind::Csa].map(|kind| frequencies(config, kind));
        let cache = |_| Cache::new(&device, config, rounding).expect("memory for a session");
        SideBySide {
            rounding,
            plain_caches: (0..sessions).map(|_| plain.new_cache().expect("a cache")).collect(),
            plain,
            frequencies: device.buffer(both.as_flattened()).expect("frequencies"),
            scratch: Scratch::new(&device, config, rounding, &weights, MOST_ROWS).expect("scratch"),
            caches: (0..sessions).map(cache).collect(),
            positions: vec![0; sessions],
            closeness: Closeness::default(),
            weights,
            device,
            model,
        }
    }

    /// Tokens that a session has had.
    pub fn position(&self, session: usize) -> usize {
        self.positions[session]
    }

    /// Advances sessions by tokens, the short ones first, and compares every stage.
    pub fn step(&mut self, work: &[(usize, &[u32])]) {
        let batch = self.batch(work);
        self.begin(&batch);
        let x = self.plain.embed(&batch).expect("embeddings");
        let layers = self.model.config.layers.clone();
        let mut step = Step::new(self, &batch, x);
        step.embed();
        for (l, layer) in layers.iter().enumerate() {
            step.read_streams(l, Sublayer::Attention);
            step.project(l);
            if layer.kind == LayerKind::Csa {
                step.select_rows(l);
            }
            step.attend(l);
            step.project_output(l);
            step.read_streams(l, Sublayer::Experts);
            step.route(l);
            step.run_experts(l);
        }
        step.head();
        for span in &batch.spans {
            self.positions[span.session] += span.rows.len();
        }
    }

    /// Prints how close results were.
    pub fn report(&self) {
        self.closeness.report();
    }

    fn batch(&self, work: &[(usize, &[u32])]) -> Batch {
        let mut batch = Batch::default();
        for &(session, tokens) in work {
            let first = batch.tokens.len();
            batch.tokens.extend_from_slice(tokens);
            let rows = first..batch.tokens.len();
            if tokens.len() < PREFILL_MIN {
                batch.decode_rows += tokens.len();
                batch.decode_logits += tokens.len();
            }
            batch.logit_rows.extend(first.max(rows.end.saturating_sub(CHUNK_LOGITS))..rows.end);
            batch.spans.push(Span { session, start: self.positions[session], rows });
        }
        batch
    }

    /// Puts the sessions where the plain path has them, and makes the tables of a step.
    fn begin(&mut self, batch: &Batch) {
        let layers = self.model.config.layers.len();
        for span in &batch.spans {
            let from = &self.plain_caches[span.session];
            let to = &mut self.caches[span.session];
            for l in 0..layers {
                to.set_layer_rows(l, &self.plain.layer_rows(from, l).expect("rows")).expect("rows");
            }
            to.set_frontier(&self.plain.frontier(from, span.start).expect("a frontier"))
                .expect("a frontier");
            to.reserve(span.start + span.rows.len()).expect("memory for rows");
        }
        let pointers = self.caches.iter().map(Cache::pointers);
        self.scratch.caches.upload(&self.device, pointers, layers).expect("addresses");
        let crowded = batch.spans.iter().any(|s| visible(s) > self.model.config.index_top_k);
        self.scratch.step.fill(batch, crowded).expect("tables");
        self.scratch.step.upload(&self.device).expect("tables");
        self.scratch.head.rows.upload(&self.device, &batch.logit_rows).expect("rows");
    }

    pub(super) fn stages(&self, shape: Shape) -> Stages<'_> {
        Stages {
            device: &self.device,
            config: &self.model.config,
            weights: &self.weights,
            rounding: self.rounding,
            frequencies: &self.frequencies,
            scratch: &self.scratch,
            shape,
        }
    }

    /// The plain path's caches, as its stages want them.
    pub(super) fn with_plain_caches(
        &mut self,
        stage: impl FnOnce(&CpuBackend, &mut [&mut ds4_cpu::Cache]),
    ) {
        let mut caches: Vec<_> = self.plain_caches.iter_mut().collect();
        stage(&self.plain, &mut caches);
    }

    pub(super) fn floats(&self, pick: impl Fn(&Scratch) -> &Buffer<f32>, len: usize) -> Vec<f32> {
        self.device.download(pick(&self.scratch), 0..len).expect("a result")
    }
}
