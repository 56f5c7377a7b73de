//! The plain path at work, and the device after it with the same inputs, stage by stage.

use std::sync::Arc;

use ds4_conformance::phase_of;
use ds4_cpu::{CpuBackend, CpuStep, Kernels};
use ds4_engine::{
    Phase,
    backend::{Batch, Cache as _, Span, Sublayer},
    layout::StateLayout,
    rows::CacheRounding,
};
use ds4_model::{Model, config::LayerKind};

use super::{checks::Step, on_device::OnDevice};
use crate::{Cache, device::Device, stages::layer::visible};

/// Rows of the longest step.
const MOST_ROWS: usize = 256;
/// Rows of a chunk whose logits are wanted.
const CHUNK_LOGITS: usize = 9;

/// The same sessions on both sides.
pub struct SideBySide {
    plain: CpuBackend,
    plain_caches: Vec<ds4_cpu::Cache>,
    ours: OnDevice,
    positions: Vec<usize>,
}

impl SideBySide {
    /// `sessions` empty sessions.
    pub fn new(
        device: Device,
        model: Arc<Model>,
        rounding: CacheRounding,
        sessions: usize,
    ) -> SideBySide {
        let layout = StateLayout::new(&model.config, rounding);
        let plain = CpuBackend::new(model.clone(), Kernels::Reference, rounding);
        let ours = OnDevice::new(device, model, layout, sessions, MOST_ROWS);
        SideBySide {
            plain_caches: (0..sessions).map(|_| plain.empty_cache()).collect(),
            plain,
            ours,
            positions: vec![0; sessions],
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
        let plain = CpuStep::new(&self.plain, &batch, self.plain_caches.iter_mut().collect());
        let layers = self.ours.model.config.layers.clone();
        let mut step = Step::new(&mut self.ours, plain, &batch);
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
        self.ours.closeness.report();
    }

    fn batch(&self, work: &[(usize, &[u32])]) -> Batch {
        let mut batch = Batch::default();
        for &(session, tokens) in work {
            let first = batch.tokens.len();
            batch.tokens.extend_from_slice(tokens);
            let rows = first..batch.tokens.len();
            if phase_of(tokens.len()) == Phase::Decode {
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
        let ours = &mut self.ours;
        for span in &batch.spans {
            let from = &self.plain_caches[span.session];
            for layer in 0..ours.layout.layers().len() {
                ours.copy_rows(layer, span.session, from, span.start);
            }
            let to = &mut ours.caches[span.session];
            let frontier = from.read_frontier(span.start).expect("a frontier");
            to.write_frontier(&frontier).expect("a frontier");
            to.reserve(span.start + span.rows.len()).expect("memory for rows");
        }
        let (config, scratch) = (&ours.model.config, &mut ours.scratch);
        let pointers = ours.caches.iter().map(Cache::pointers);
        scratch.caches.upload(&ours.device, pointers, config.layers.len()).expect("addresses");
        let crowded = batch.spans.iter().any(|s| visible(s) > config.index_top_k);
        scratch.step.fill(batch, crowded).expect("tables");
        scratch.step.upload(&ours.device).expect("tables");
        scratch.head.rows.upload(&ours.device, &batch.logit_rows).expect("rows");
    }
}
