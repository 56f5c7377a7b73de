//! What a device must provide: the stages of the model.
//!
//! A stage works on every row of a [`Batch`] at once, and the rows may belong to different
//! sessions. Activations and cached state are the backend's own types; it may fuse and reorder
//! inside a stage as it likes. Cached state leaves it only in the canonical form of
//! [`Frontier`] and [`LayerRows`], which every backend reads and writes.

use std::ops::Range;

use ds4_model::config::Config;

use crate::{
    TokenId,
    rows::CacheRounding,
    sampling::{UnusableLogits, argmax},
};

/// Shortest span that takes the matrix–matrix path; shorter ones are decoded row by row.
///
/// The choice depends on the session's own span alone, so that a session's numbers never depend
/// on what else is in the batch.
pub const PREFILL_MIN: usize = 8;

/// The two sublayers of a layer, each wrapped in its own hyper-connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sublayer {
    /// Attention.
    Attention,
    /// Mixture of experts.
    Experts,
}

/// Consecutive tokens of one session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Index into the caches passed along with the batch.
    pub session: usize,
    /// Position of the first token in its session.
    pub start: usize,
    /// Rows of the batch.
    pub rows: Range<usize>,
}

/// The tokens of one step. Spans shorter than [`PREFILL_MIN`] come first.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// One token per row.
    pub tokens: Vec<TokenId>,
    /// Spans in row order; together they cover all rows.
    pub spans: Vec<Span>,
    /// Leading rows that belong to short spans.
    pub decode_rows: usize,
    /// Rows whose logits are wanted: first those of spans that want few, then the others.
    pub logit_rows: Vec<usize>,
    /// Leading entries of `logit_rows` of which no more than the likeliest token is wanted.
    pub best_rows: usize,
    /// Leading entries of `logit_rows` whose spans want fewer than [`PREFILL_MIN`].
    pub decode_logits: usize,
}

/// What the output head makes of the rows in [`Batch::logit_rows`].
#[derive(Debug, Clone, PartialEq)]
pub struct HeadOutput {
    /// The likeliest tokens after the first [`Batch::best_rows`] of them, chosen as by [`argmax`].
    pub best: Vec<Result<TokenId, UnusableLogits>>,
    /// Logits of the others, `[rows, vocab]`.
    pub logits: Vec<f32>,
}

impl HeadOutput {
    /// What a backend without a faster way makes of the logits `[logit_rows, vocab]` of all rows.
    pub fn from_logits(batch: &Batch, vocab: usize, mut logits: Vec<f32>) -> Self {
        let best = logits.chunks_exact(vocab).take(batch.best_rows).map(argmax).collect();
        logits.drain(..batch.best_rows * vocab);
        HeadOutput { best, logits }
    }
}

/// A failure of the device.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// Memory ran out; other sessions are intact.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The device is unusable from here on, for every session: nothing but a new process helps.
    #[error("device failed: {0}")]
    Device(String),
}

impl BackendError {
    /// Whether nothing can be computed any more.
    pub fn is_fatal(&self) -> bool {
        matches!(self, BackendError::Device(_))
    }
}

/// Result of a stage.
pub type StageResult<T = ()> = Result<T, BackendError>;

/// The part of a session's cache that later tokens overwrite, after `position` tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Frontier {
    /// Tokens processed.
    pub position: usize,
    /// One entry per layer.
    pub layers: Vec<LayerFrontier>,
}

/// One layer of a [`Frontier`].
#[derive(Debug, Clone, PartialEq)]
pub struct LayerFrontier {
    /// Stored window rows of the last min(position, 128) positions, oldest first.
    pub window: Vec<u8>,
    /// Inputs of the layer's compressor that an unfinished row may still need.
    pub compressor: CompressorInputs,
    /// The same for the indexer's compressor.
    pub indexer: CompressorInputs,
}

/// Compressor inputs of consecutive positions (`compressor_tail`), each `[tokens, width]`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CompressorInputs {
    /// Values.
    pub values: Vec<f32>,
    /// Gate scores, position bias included.
    pub scores: Vec<f32>,
}

/// The append-only part of one layer's cache, in storage format.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerRows {
    /// Compressed rows, oldest first.
    pub rows: Vec<u8>,
    /// Index keys, oldest first.
    pub index_keys: Vec<u8>,
}

/// Positions whose compressor inputs are still needed after `position` tokens.
///
/// At ratio 128 that is the unfinished window; at ratio 4 also the window before it, because
/// windows overlap (docs/model.md, "Compressor").
pub fn compressor_tail(ratio: usize, position: usize) -> Range<usize> {
    match ratio {
        0 => position..position,
        4 => (position / 4 * 4).saturating_sub(4)..position,
        _ => position / ratio * ratio..position,
    }
}

/// A device that runs the model's stages.
pub trait Backend: Send + Sync {
    /// Residual streams and intermediate results of one step.
    type Activations;
    /// Cached state of one session; grows with use.
    type Cache: Send;

    /// Shape of the model.
    fn config(&self) -> &Config;
    /// Whether cached rows are rounded.
    fn cache_rounding(&self) -> CacheRounding;
    /// Content hash of the model, for matching snapshots.
    fn model_identity(&self) -> [u8; 32];

    /// An empty cache.
    fn new_cache(&self) -> StageResult<Self::Cache>;
    /// Bytes a cache holds now.
    fn cache_bytes(&self, cache: &Self::Cache) -> usize;
    /// Makes room for `tokens` tokens in a cache, which holds what it held, also if there is none.
    /// Caches in the memory of the process need not do anything ahead of time.
    fn reserve(&self, _cache: &mut Self::Cache, _tokens: usize) -> StageResult {
        Ok(())
    }

    /// Calls `stages`, which calls every stage of a step and returns what they gave.
    ///
    /// A backend whose stages divide their work among a pool of threads calls it on one of these:
    /// from any other thread each part has to be handed over and waited for.
    fn run_step<R: Send>(&self, stages: impl FnOnce() -> R + Send) -> R {
        stages()
    }

    /// Embeds the tokens and copies each embedding to the four streams.
    fn embed(&self, batch: &Batch) -> StageResult<Self::Activations>;
    /// Mixes the streams into the sublayer's input, normalises it, and keeps the weights that
    /// [`hc_post`](Self::hc_post) needs.
    fn hc_pre(
        &self,
        layer: usize,
        sublayer: Sublayer,
        batch: &Batch,
        x: &mut Self::Activations,
    ) -> StageResult;
    /// Projects queries and the key/value row, normalises and rotates them, and rounds the row.
    fn project_qkv(&self, layer: usize, batch: &Batch, x: &mut Self::Activations) -> StageResult;
    /// Feeds the compressors and appends the rows and index keys that become complete.
    fn compress(
        &self,
        layer: usize,
        batch: &Batch,
        x: &mut Self::Activations,
        caches: &mut [&mut Self::Cache],
    ) -> StageResult;
    /// Chooses each query's compressed rows with the indexer.
    fn select_rows(
        &self,
        layer: usize,
        batch: &Batch,
        x: &mut Self::Activations,
        caches: &mut [&mut Self::Cache],
    ) -> StageResult;
    /// Attends over the window and the visible compressed rows, rotates the result back, and
    /// stores the batch's key/value rows.
    fn attend(
        &self,
        layer: usize,
        batch: &Batch,
        x: &mut Self::Activations,
        caches: &mut [&mut Self::Cache],
    ) -> StageResult;
    /// Grouped output projection.
    fn project_output(&self, layer: usize, batch: &Batch, x: &mut Self::Activations)
    -> StageResult;
    /// Chooses and weighs each row's experts.
    fn route(&self, layer: usize, batch: &Batch, x: &mut Self::Activations) -> StageResult;
    /// Runs the routed and shared experts.
    fn run_experts(&self, layer: usize, batch: &Batch, x: &mut Self::Activations) -> StageResult;
    /// Spreads the sublayer's output over the streams.
    fn hc_post(
        &self,
        layer: usize,
        sublayer: Sublayer,
        batch: &Batch,
        x: &mut Self::Activations,
    ) -> StageResult;
    /// Logits of the wanted rows, or their likeliest tokens where those are enough.
    fn head(&self, batch: &Batch, x: Self::Activations) -> StageResult<HeadOutput>;

    /// Goes back to `position`, at most [`MAX_REWIND`](crate::MAX_REWIND) tokens before the
    /// highest one written.
    fn rewind(&self, cache: &mut Self::Cache, position: usize);
    /// Copies out the part that later tokens overwrite. `position` is where the cache stands.
    fn frontier(&self, cache: &Self::Cache, position: usize) -> StageResult<Frontier>;
    /// Puts a frontier back and drops all rows beyond it.
    fn set_frontier(&self, cache: &mut Self::Cache, frontier: &Frontier) -> StageResult;
    /// Copies out one layer's rows.
    fn layer_rows(&self, cache: &Self::Cache, layer: usize) -> StageResult<LayerRows>;
    /// Replaces one layer's rows.
    fn set_layer_rows(
        &self,
        cache: &mut Self::Cache,
        layer: usize,
        rows: &LayerRows,
    ) -> StageResult;
}
