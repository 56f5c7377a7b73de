//! The stages of one step, each as launches of kernels on the step's buffers. Under a stream
//! capture the launches become a CUDA graph.

use ds4_engine::{
    backend::{Batch, Phase, Span, StageResult, Step, Sublayer},
    rope::PAIRS,
    rows::CacheRounding,
};
use ds4_model::config::{Config, HEAD_DIM, INDEX_DIM, LayerKind};

use super::{
    attention::{self, Attend, AttentionLayer, Partials, Products},
    compressor::{self, Compressor, Inputs, KeyValues, Latent},
    experts::ExpertStage,
    hyper_connection::{self, Pending, Reader},
    indexer::{self, Select},
};
use crate::{
    arguments::{Arg, args},
    device::{Buffer, Device, Pointer},
    products::Context,
    scratch::{PARTIAL_ROWS, Scratch, key_capacity},
    weights::{self, Weights},
};

#[cfg(test)]
mod golden_tests;

/// The shape of a step: everything that grids and branches on the host depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows that are decoded; they come first.
    pub decode_rows: usize,
    pub rows: usize,
    /// Rows of logits wanted of rows that are decoded, and of all.
    pub decode_logits: usize,
    pub logits: usize,
    /// Most compressed rows that a row beyond `decode_rows` sees in a CSA layer.
    pub visible: usize,
}

impl Shape {
    /// The shape of `batch`.
    pub fn of(batch: &Batch) -> Shape {
        let prefill = batch.spans.iter().filter(|s| batch.phase(s) == Phase::Prefill);
        Shape {
            decode_rows: batch.decode_rows,
            rows: batch.tokens.len(),
            decode_logits: batch.decode_logits,
            logits: batch.logit_rows.len(),
            visible: prefill.map(visible).max().unwrap_or(0),
        }
    }

    /// The shape of every step that decodes `rows` rows and nothing else: the head computes all of
    /// them, so that one CUDA graph does for any results that are wanted.
    pub fn decode(rows: usize) -> Shape {
        Shape { decode_rows: rows, rows, decode_logits: rows, logits: rows, visible: 0 }
    }
}

/// Compressed rows that the last token of a span sees in a CSA layer.
pub fn visible(span: &Span) -> usize {
    (span.start + span.rows.len()) / LayerKind::Csa.ratio()
}

/// A step under way.
pub struct CudaStep<'a> {
    pub device: &'a Device,
    pub config: &'a Config,
    pub weights: &'a Weights,
    pub rounding: CacheRounding,
    /// Frequencies of plain and YaRN rotations `[2, 32]`.
    pub frequencies: &'a Buffer<f32>,
    pub scratch: &'a Scratch,
    pub shape: Shape,
    /// The sublayer whose output is spread over the streams when they are read next.
    pub pending: Option<Pending>,
}

impl Step for CudaStep<'_> {
    /// Embeds the tokens, and computes the rotations of their positions.
    fn embed(&mut self) -> StageResult {
        let (s, table) = (self.scratch, &self.weights.token_embedding);
        let step = s.step.pointers();
        self.device.launch(
            "embed",
            [self.shape.rows, 1, 1],
            256,
            0,
            args![
                step,
                Arg::value(table.planes),
                table.ty as i32,
                self.config.hidden,
                s.streams.pointer(),
                self.grid()
            ],
        )?;
        let (frequencies, out) = (self.frequencies.pointer(), s.rotations.pointer());
        attention::rotations(self.device, step, self.shape.rows, frequencies, out)
    }

    fn hc_pre(&mut self, layer: usize, sublayer: Sublayer) -> StageResult {
        let w = &self.weights.layers[layer];
        let reader = match sublayer {
            Sublayer::Attention => Reader { hc: &w.attn_hc, norm: &w.attn.norm },
            Sublayer::Experts => Reader { hc: &w.ffn_hc, norm: &w.ffn.norm },
        };
        let (device, config, s) = (self.device, self.config, self.scratch);
        let Shape { decode_rows, rows, .. } = self.shape;
        let pending = self.pending.take();
        hyper_connection::read(device, config, s, decode_rows, rows, pending, &reader)
    }

    /// Nothing in a layer's compressors waits for its queries, so that all inputs are finished in
    /// one launch.
    fn project_and_compress(&mut self, layer: usize) -> StageResult {
        let products = &self.scratch.layers[layer];
        self.products(&products.attention_input)?;
        let Shape { rows, decode_rows, .. } = self.shape;
        let inputs = self.inputs(layer);
        compressor::finish_inputs(&self.attention(layer), rows, decode_rows, &inputs)?;
        self.products(&products.queries)
    }

    fn select_rows(&mut self, layer: usize) -> StageResult {
        let (s, config) = (self.scratch, self.config);
        let heads = config.index_heads;
        let select = |decoded, capacity| Select {
            heads,
            top_k: config.index_top_k,
            queries: Products { pointer: s.index_queries.pointer(), stride: heads * INDEX_DIM },
            head_weights: Products { pointer: s.head_weights.pointer(), stride: heads },
            scores: &s.key_scores,
            capacity,
            arrivals: &s.arrivals,
            decoded,
            selected: &s.selected,
        };
        let Shape { decode_rows, rows, visible, .. } = self.shape;
        let attention = self.attention(layer);
        if decode_rows > 0 {
            // The same for every step, so that a CUDA graph stays right as the context grows.
            indexer::select(&attention, 0..decode_rows, &select(true, key_capacity(config)))?;
        }
        if rows > decode_rows && visible > config.index_top_k {
            indexer::select(&attention, decode_rows..rows, &select(false, visible))?;
        }
        Ok(())
    }

    fn attend(&mut self, layer: usize) -> StageResult {
        let s = self.scratch;
        let attend = Attend {
            heads: self.config.heads,
            queries: &s.queries,
            kv_rows: &s.kv_rows,
            selected: &s.selected,
            top_k: self.config.index_top_k,
            sinks: self.weights.layers[layer].attn.sinks.pointer(),
            out: &s.attended,
        };
        let partials = Partials { sums: &s.partial_sums, totals: &s.partial_totals };
        let Shape { decode_rows, rows, .. } = self.shape;
        let attention = self.attention(layer);
        for first in (0..decode_rows).step_by(PARTIAL_ROWS) {
            let some = first..decode_rows.min(first + PARTIAL_ROWS);
            attention::attend_decode(&attention, some, &attend, &partials)?;
        }
        if rows > decode_rows {
            attention::attend_prefill(&attention, decode_rows..rows, &attend)?;
            attention::store_window(&attention, decode_rows..rows, &s.kv_rows)?;
        }
        Ok(())
    }

    fn project_output(&mut self, layer: usize) -> StageResult {
        let products = &self.scratch.layers[layer];
        self.products(&products.output_a)?;
        self.products(&products.output_b)
    }

    fn route(&mut self, layer: usize) -> StageResult {
        let (s, experts) = (self.scratch, self.experts(layer));
        let Shape { decode_rows, rows, .. } = self.shape;
        s.layers[layer].experts_input.run_and_prepare(
            &self.context(),
            decode_rows,
            rows,
            &experts.preparation(&s.x, &s.x_low, &s.arrivals),
        )?;
        experts.route()
    }

    fn run_experts(&mut self, layer: usize) -> StageResult {
        let s = self.scratch;
        self.experts(layer).run(layer, &s.x, &s.y, &s.layers[layer].shared_down)
    }

    /// Left to the next stage that reads the streams, whose kernel spreads the output first.
    fn hc_post(&mut self, _layer: usize, sublayer: Sublayer) -> StageResult {
        self.pending = Some(self.output_of(sublayer));
        Ok(())
    }

    /// Logits go to `scratch.head.logits`.
    fn head(&mut self) -> StageResult {
        let (s, w) = (self.scratch, self.weights);
        let Shape { decode_logits, logits, .. } = self.shape;
        if logits == 0 {
            return Ok(());
        }
        let reader = Reader { hc: &w.output_hc, norm: &w.output_norm };
        let (device, config, pending) = (self.device, self.config, self.pending.take());
        hyper_connection::read_head(device, config, s, logits, pending, &reader)?;
        s.head.products.run(&self.context(), decode_logits, logits)
    }
}

impl CudaStep<'_> {
    /// The output of a sublayer in `scratch.y`: attention's is one part, the experts' one for each
    /// expert.
    pub fn output_of(&self, sublayer: Sublayer) -> Pending {
        match sublayer {
            Sublayer::Attention => Pending { slots: 1 },
            Sublayer::Experts => Pending { slots: self.config.experts_used + 1 },
        }
    }

    fn inputs(&self, layer: usize) -> Inputs<'_> {
        let (s, w) = (self.scratch, &self.weights.layers[layer]);
        let width = self.config.q_rank;
        let latent = Latent {
            raw: Products { pointer: s.raw_latent.pointer(), stride: width },
            width,
            norm: w.attn.q_a_norm.pointer(),
            out: &s.latent,
            low: &s.latent_low,
        };
        let key_values = KeyValues {
            raw: Products { pointer: s.raw_kv.pointer(), stride: HEAD_DIM },
            norm: w.attn.kv_norm.pointer(),
            rows: &s.kv_rows,
        };
        let part = |c: &weights::Compressor, values: &Buffer<f32>, scores: &Buffer<f32>| {
            let products = |b: &Buffer<f32>| Products { pointer: b.pointer(), stride: c.kv.rows };
            Compressor {
                values: products(values),
                scores: products(scores),
                bias: c.position_bias.pointer(),
                norm: c.norm.pointer(),
                frequencies: self.frequencies.at(PAIRS),
            }
        };
        let index = w.indexer.as_ref().map(|i| &i.compressor);
        Inputs {
            latent: Some(latent),
            key_values: Some(key_values),
            compressor: w.compressor.as_ref().map(|c| part(c, &s.values, &s.scores)),
            index: index.map(|c| part(c, &s.index_values, &s.index_scores)),
        }
    }

    /// The likeliest tokens of the first `rows` rows of logits, to `scratch.head.best`.
    pub fn argmax(&self, rows: usize) -> StageResult {
        let s = self.scratch;
        s.head.best.find(self.device, rows, &s.head.logits, &s.arrivals)
    }

    fn products(&self, products: &crate::products::Products) -> StageResult {
        products.run(&self.context(), self.shape.decode_rows, self.shape.rows)
    }

    fn context(&self) -> Context<'_> {
        Context { device: self.device, grid: self.grid(), workspace: &self.scratch.workspace }
    }

    fn grid(&self) -> Pointer {
        self.weights.iq2_grid.pointer()
    }

    fn attention(&self, layer: usize) -> AttentionLayer<'_> {
        let kind = self.config.layers[layer].kind;
        // The YaRN rotations follow the plain ones of all rows.
        let set = if kind == LayerKind::Swa { 0 } else { self.shape.rows * PAIRS * 2 };
        AttentionLayer {
            device: self.device,
            step: self.scratch.step.pointers(),
            caches: self.scratch.caches.pointer(),
            layer,
            layers: self.config.layers.len(),
            kind,
            rounding: self.rounding,
            epsilon: self.config.rms_epsilon,
            rotations: self.scratch.rotations.at(set),
        }
    }

    fn experts(&self, layer: usize) -> ExpertStage<'_> {
        ExpertStage {
            device: self.device,
            config: self.config,
            step: self.scratch.step.pointers(),
            weights: &self.weights.layers[layer].ffn,
            scratch: &self.scratch.experts,
            grid: self.grid(),
            selectors: self.weights.iq2_selectors.pointer(),
            decode_rows: self.shape.decode_rows,
            rows: self.shape.rows,
        }
    }
}
