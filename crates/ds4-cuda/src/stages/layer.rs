//! The stages of one step, each as launches of kernels on the step's buffers. Under a stream
//! capture the launches become a CUDA graph.

use ds4_engine::{
    backend::{Batch, Phase, Span, StageResult, Step, Sublayer},
    rope::PAIRS,
    rows::CacheRounding,
};
use ds4_model::config::{Config, HEAD_DIM, INDEX_DIM, LayerKind};

use super::{
    attention::{self, Attend, AttentionLayer, Partials},
    columns::Columns,
    compressor::{self, Compressor, Inputs, KeyValues, Latent},
    embed,
    experts::ExpertStage,
    hyper_connection::{self, Pending, Reader, Streams},
    indexer::{self, Select},
};
use crate::{
    device::{Buffer, Device},
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
    pub pending: Option<Sublayer>,
}

impl Step for CudaStep<'_> {
    /// Embeds the tokens, and computes the rotations of their positions.
    fn embed(&mut self) -> StageResult {
        let (s, rows, table) = (self.scratch, self.shape.rows, &self.weights.token_embedding);
        let (step, grid) = (s.step.rows(), &self.weights.iq2_grid);
        embed::embed(self.device, step, rows, table, grid, &s.streams)?;
        attention::rotations(self.device, step, rows, self.frequencies, &s.rotations)
    }

    fn hc_pre(&mut self, layer: usize, sublayer: Sublayer) -> StageResult {
        let (s, w) = (self.scratch, &self.weights.layers[layer]);
        let (hc, norm) = match sublayer {
            Sublayer::Attention => (&w.attn_hc, &w.attn.norm),
            Sublayer::Experts => (&w.ffn_hc, &w.ffn.norm),
        };
        let reader = Reader { hc, norm, x: &s.x, x_low: &s.x_low };
        let Shape { decode_rows, rows, .. } = self.shape;
        let streams = self.streams();
        hyper_connection::read(self.device, self.config, &streams, decode_rows, rows, &reader)?;
        self.pending = None;
        Ok(())
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
            queries: Columns::all(&s.index_queries, heads * INDEX_DIM),
            head_weights: Columns::all(&s.head_weights, heads),
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
            sinks: &self.weights.layers[layer].attn.sinks,
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
        self.experts(layer).route(&self.scratch.layers[layer].experts_input)
    }

    fn run_experts(&mut self, layer: usize) -> StageResult {
        self.experts(layer).run(layer, &self.scratch.layers[layer].shared_down)
    }

    /// Left to the next stage that reads the streams, whose kernel spreads the output first.
    fn hc_post(&mut self, _layer: usize, sublayer: Sublayer) -> StageResult {
        self.pending = Some(sublayer);
        Ok(())
    }

    /// Logits go to `scratch.head.logits`.
    fn head(&mut self) -> StageResult {
        let (s, w) = (self.scratch, self.weights);
        let Shape { decode_logits, logits, rows, .. } = self.shape;
        if logits == 0 {
            return Ok(());
        }
        let head = &s.head;
        let (hc, norm) = (&w.output_hc, &w.output_norm);
        let reader = Reader { hc, norm, x: &head.x, x_low: &head.x_low };
        let (device, config, streams) = (self.device, self.config, self.streams());
        let wanted = head.rows.buffer();
        hyper_connection::read_head(device, config, &streams, rows, logits, wanted, &reader)?;
        head.products.run(&self.context(), decode_logits, logits)
    }
}

impl CudaStep<'_> {
    /// The streams, and the output that is still to be spread over them: attention's is one part,
    /// the experts' one for each expert.
    fn streams(&self) -> Streams<'_> {
        let s = self.scratch;
        let pending = self.pending.map(|sublayer| match sublayer {
            Sublayer::Attention => Pending { y: &s.y, slots: 1 },
            Sublayer::Experts => Pending { y: &s.y, slots: self.config.experts_used + 1 },
        });
        Streams {
            streams: &s.streams,
            pending,
            post: &s.post,
            comb: &s.comb,
            sums: &s.mix_sums,
            arrivals: &s.arrivals,
        }
    }

    fn inputs(&self, layer: usize) -> Inputs<'_> {
        let (s, w) = (self.scratch, &self.weights.layers[layer]);
        let width = self.config.q_rank;
        let latent = Latent {
            raw: Columns::all(&s.raw_latent, width),
            width,
            norm: &w.attn.q_a_norm,
            out: &s.latent,
            low: &s.latent_low,
        };
        let key_values = KeyValues {
            raw: Columns::all(&s.raw_kv, HEAD_DIM),
            norm: &w.attn.kv_norm,
            rows: &s.kv_rows,
        };
        let index = w.indexer.as_ref().map(|i| &i.compressor);
        Inputs {
            latent: Some(latent),
            key_values: Some(key_values),
            compressor: w.compressor.as_ref().map(|c| self.compressor(c, &s.values, &s.scores)),
            index: index.map(|c| self.compressor(c, &s.index_values, &s.index_scores)),
        }
    }

    fn compressor<'a>(
        &'a self,
        c: &'a weights::Compressor,
        values: &'a Buffer<f32>,
        scores: &'a Buffer<f32>,
    ) -> Compressor<'a> {
        Compressor {
            values: Columns::all(values, c.kv.rows),
            scores: Columns::all(scores, c.kv.rows),
            bias: &c.position_bias,
            norm: &c.norm,
            frequencies: self.frequencies,
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
        let (grid, workspace) = (&self.weights.iq2_grid, &self.scratch.workspace);
        Context { device: self.device, grid, workspace }
    }

    fn attention(&self, layer: usize) -> AttentionLayer<'_> {
        let kind = self.config.layers[layer].kind;
        // The YaRN rotations follow the plain ones of all rows.
        let set = if kind == LayerKind::Swa { 0 } else { self.shape.rows * PAIRS * 2 };
        AttentionLayer {
            device: self.device,
            step: self.scratch.step.rows(),
            caches: self.scratch.caches.buffer(),
            layer,
            layers: self.config.layers.len(),
            kind,
            rounding: self.rounding,
            epsilon: self.config.rms_epsilon,
            rotations: Columns { buffer: &self.scratch.rotations, first: set, stride: 2 * PAIRS },
        }
    }

    fn experts(&self, layer: usize) -> ExpertStage<'_> {
        let s = self.scratch;
        ExpertStage {
            context: self.context(),
            config: self.config,
            step: s.step.rows(),
            weights: &self.weights.layers[layer].ffn,
            scratch: &s.experts,
            selectors: &self.weights.iq2_selectors,
            x: &s.x,
            x_low: &s.x_low,
            y: &s.y,
            arrivals: &s.arrivals,
            decode_rows: self.shape.decode_rows,
            rows: self.shape.rows,
        }
    }
}
