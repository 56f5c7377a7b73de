//! The stages in terms of one step's buffers: what the backend calls, and what it records.

use ds4_engine::{
    backend::{Batch, PREFILL_MIN, Span, StageResult, Sublayer},
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

/// The shape of a step.
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
        let prefill = batch.spans.iter().filter(|s| s.rows.len() >= PREFILL_MIN);
        Shape {
            decode_rows: batch.decode_rows,
            rows: batch.tokens.len(),
            decode_logits: batch.decode_logits,
            logits: batch.logit_rows.len(),
            visible: prefill.map(visible).max().unwrap_or(0),
        }
    }
}

/// Compressed rows that the last token of a span sees in a CSA layer.
pub fn visible(span: &Span) -> usize {
    (span.start + span.rows.len()) / LayerKind::Csa.ratio()
}

/// Everything that the stages of one step need.
pub struct Stages<'a> {
    pub device: &'a Device,
    pub config: &'a Config,
    pub weights: &'a Weights,
    pub rounding: CacheRounding,
    /// Frequencies of plain and YaRN rotations `[2, 32]`.
    pub frequencies: &'a Buffer<f32>,
    pub scratch: &'a Scratch,
    pub shape: Shape,
}

impl Stages<'_> {
    /// All stages of a step in order.
    pub fn run(&self) -> StageResult {
        self.embed()?;
        for (l, layer) in self.config.layers.iter().enumerate() {
            self.hc_pre(l, Sublayer::Attention)?;
            self.project_and_compress(l)?;
            if layer.kind == LayerKind::Csa {
                self.select_rows(l)?;
            }
            self.attend(l)?;
            self.project_output(l)?;
            self.hc_pre(l, Sublayer::Experts)?;
            self.route(l)?;
            self.run_experts(l)?;
        }
        self.head()
    }

    /// Embeds the tokens, and computes the rotations of their positions.
    pub fn embed(&self) -> StageResult {
        let (s, rows, table) = (self.scratch, self.shape.rows, &self.weights.token_embedding);
        let (step, grid) = (s.step.rows(), &self.weights.iq2_grid);
        embed::embed(self.device, step, rows, table, grid, &s.streams)?;
        attention::rotations(self.device, step, rows, self.frequencies, &s.rotations)
    }

    pub fn hc_pre(&self, layer: usize, sublayer: Sublayer) -> StageResult {
        let (s, w) = (self.scratch, &self.weights.layers[layer]);
        let (hc, norm, pending) = match sublayer {
            Sublayer::Attention => (&w.attn_hc, &w.attn.norm, self.experts_before(layer)),
            Sublayer::Experts => (&w.ffn_hc, &w.ffn.norm, Some(Pending { y: &s.y, slots: 1 })),
        };
        let reader = Reader { hc, norm, x: &s.x, x_low: &s.x_low };
        let Shape { decode_rows, rows, .. } = self.shape;
        let streams = self.streams(pending);
        hyper_connection::read(self.device, self.config, &streams, decode_rows, rows, &reader)
    }

    fn streams<'a>(&'a self, pending: Option<Pending<'a>>) -> Streams<'a> {
        let s = self.scratch;
        Streams {
            streams: &s.streams,
            pending,
            post: &s.post,
            comb: &s.comb,
            sums: &s.mix_sums,
            arrivals: &s.arrivals,
        }
    }

    /// The experts of the layer before: their output is spread when the streams are read next.
    fn experts_before(&self, layer: usize) -> Option<Pending<'_>> {
        let slots = self.config.experts_used + 1;
        (layer > 0).then_some(Pending { y: &self.scratch.y, slots })
    }

    pub fn project_qkv(&self, layer: usize) -> StageResult {
        self.project(layer, &self.projected(layer))
    }

    pub fn compress(&self, layer: usize) -> StageResult {
        self.finish_inputs(layer, &self.compressed(layer))
    }

    /// Both in one: nothing in a layer's compressors waits for its queries.
    fn project_and_compress(&self, layer: usize) -> StageResult {
        let Inputs { latent, key_values, .. } = self.projected(layer);
        self.project(layer, &Inputs { latent, key_values, ..self.compressed(layer) })
    }

    /// The projections, with `inputs` finished before the queries need their latent.
    fn project(&self, layer: usize, inputs: &Inputs<'_>) -> StageResult {
        let products = &self.scratch.layers[layer];
        self.products(&products.attention_input)?;
        self.finish_inputs(layer, inputs)?;
        self.products(&products.queries)
    }

    fn finish_inputs(&self, layer: usize, inputs: &Inputs<'_>) -> StageResult {
        let Shape { rows, decode_rows, .. } = self.shape;
        compressor::finish_inputs(&self.attention(layer), rows, decode_rows, inputs)
    }

    fn projected(&self, layer: usize) -> Inputs<'_> {
        let (s, w) = (self.scratch, &self.weights.layers[layer].attn);
        let width = self.config.q_rank;
        let latent = Latent {
            raw: Columns::all(&s.raw_latent, width),
            width,
            norm: &w.q_a_norm,
            out: &s.latent,
            low: &s.latent_low,
        };
        let key_values = KeyValues {
            raw: Columns::all(&s.raw_kv, HEAD_DIM),
            norm: &w.kv_norm,
            rows: &s.kv_rows,
        };
        Inputs { latent: Some(latent), key_values: Some(key_values), ..Inputs::default() }
    }

    fn compressed(&self, layer: usize) -> Inputs<'_> {
        let (s, w) = (self.scratch, &self.weights.layers[layer]);
        let index = w.indexer.as_ref().map(|i| &i.compressor);
        Inputs {
            compressor: w.compressor.as_ref().map(|c| self.compressor(c, &s.values, &s.scores)),
            index: index.map(|c| self.compressor(c, &s.index_values, &s.index_scores)),
            ..Inputs::default()
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

    pub fn select_rows(&self, layer: usize) -> StageResult {
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
            // The same for every step, so that a recorded one stays right as the context grows.
            indexer::select(&attention, 0..decode_rows, &select(true, key_capacity(config)))?;
        }
        if rows > decode_rows && visible > config.index_top_k {
            indexer::select(&attention, decode_rows..rows, &select(false, visible))?;
        }
        Ok(())
    }

    pub fn attend(&self, layer: usize) -> StageResult {
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

    pub fn project_output(&self, layer: usize) -> StageResult {
        let products = &self.scratch.layers[layer];
        self.products(&products.output_a)?;
        self.products(&products.output_b)
    }

    pub fn route(&self, layer: usize) -> StageResult {
        self.experts(layer).route(&self.scratch.layers[layer].experts_input)
    }

    pub fn run_experts(&self, layer: usize) -> StageResult {
        self.experts(layer).run(layer, &self.scratch.layers[layer].shared_down)
    }

    /// The logits of the wanted rows, to `scratch.head.logits`.
    pub fn head(&self) -> StageResult {
        let (s, w) = (self.scratch, self.weights);
        let Shape { decode_logits, logits, rows, .. } = self.shape;
        if logits == 0 {
            return Ok(());
        }
        let head = &s.head;
        let (hc, norm) = (&w.output_hc, &w.output_norm);
        let reader = Reader { hc, norm, x: &head.x, x_low: &head.x_low };
        let streams = self.streams(self.experts_before(self.config.layers.len()));
        let (device, config, wanted) = (self.device, self.config, head.rows.buffer());
        hyper_connection::read_head(device, config, &streams, rows, logits, wanted, &reader)?;
        head.products.run(&self.context(), decode_logits, logits)
    }

    /// The likeliest tokens of the first `rows` of them, to `scratch.head.best`.
    pub fn best(&self, rows: usize) -> StageResult {
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
