//! The interface of a device: the stages of the model, and the KV state of sessions.
//!
//! [`Step`] has the stages as methods. A stage works on every row of a [`Batch`] at once, and the
//! rows may belong to different sessions. Activations and caches are the backend's own types; a
//! backend may fuse and reorder inside a stage. KV state leaves a backend only in the canonical
//! form of [`crate::layout`], which every backend reads and writes.

use std::{any::Any, fmt, ops::Range};

use ds4_model::config::Config;

use crate::{
    TokenId,
    layout::{Frontier, Plane, StateLayout},
    sampling::{UnusableLogits, argmax},
};

/// The arithmetic that computes a token.
///
/// The results of the two differ in their last bits. Within a phase, a token's results depend on
/// the tokens before it alone: not on other sessions in the batch, and not on where a prompt was
/// cut into chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Many rows at a time, by matrix–matrix products.
    Prefill,
    /// Row by row, by matrix–vector products that read weights once for all rows.
    Decode,
}

/// The two sublayers of a layer, each wrapped in its own hyper-connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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

/// The tokens of one step. Spans in [`Phase::Decode`] come first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// One token per row.
    pub tokens: Vec<TokenId>,
    /// Spans in row order; together they cover all rows.
    pub spans: Vec<Span>,
    /// Leading rows in [`Phase::Decode`].
    pub decode_rows: usize,
    /// Rows that the output head computes: first those it computes row by row.
    pub logit_rows: Vec<usize>,
    /// Leading entries of `logit_rows` for which only the argmax is wanted.
    pub argmax_rows: usize,
    /// Leading entries of `logit_rows` that the head computes row by row.
    pub decode_logits: usize,
}

impl Batch {
    /// The phase of a span.
    pub fn phase(&self, span: &Span) -> Phase {
        if span.rows.end <= self.decode_rows { Phase::Decode } else { Phase::Prefill }
    }
}

/// Results of the output head for the rows in [`Batch::logit_rows`].
#[derive(Debug, Clone, PartialEq)]
pub struct HeadOutput {
    /// Argmax of the first [`Batch::argmax_rows`] of them, chosen as by [`argmax`].
    pub argmax: Vec<Result<TokenId, UnusableLogits>>,
    /// Logits of the others, `[rows, vocab]`.
    pub logits: Vec<f32>,
}

impl HeadOutput {
    /// The output of a backend that has the logits `[logit_rows, vocab]` of all rows at hand.
    pub fn from_logits(batch: &Batch, vocab: usize, mut logits: Vec<f32>) -> Self {
        let best = logits.chunks_exact(vocab).take(batch.argmax_rows).map(argmax).collect();
        logits.drain(..batch.argmax_rows * vocab);
        HeadOutput { argmax: best, logits }
    }
}

/// A failure of the device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// Memory ran out; other sessions are intact.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// A cache, a checkpoint or a step that another backend made. Nothing was changed.
    #[error("this state belongs to another backend: use it with the engine that made it")]
    OtherBackend,
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

/// A step under way: a batch, its activations, and the caches of its sessions.
///
/// [`forward`](crate::forward) calls the stages in order, once each. A backend may postpone work of a stage to
/// a later stage of the same step; the order of calls stays the same.
pub trait Step {
    /// Embeds the tokens and copies each embedding to the four streams.
    fn embed(&mut self) -> StageResult;
    /// Mixes the streams into the sublayer's input, normalises it, and keeps the weights that
    /// [`hc_post`](Self::hc_post) needs.
    fn hc_pre(&mut self, layer: usize, sublayer: Sublayer) -> StageResult;
    /// Projects queries and the key/value row, normalises and rotates them, and rounds the row.
    /// Feeds the layer's compressors with the same input, and appends the compressed rows and
    /// index keys that become complete.
    fn project_and_compress(&mut self, layer: usize) -> StageResult;
    /// Selects each query's compressed rows with the indexer.
    fn select_rows(&mut self, layer: usize) -> StageResult;
    /// Attends over the window and the visible compressed rows, rotates the result back, and
    /// stores the batch's key/value rows.
    fn attend(&mut self, layer: usize) -> StageResult;
    /// Grouped output projection.
    fn project_output(&mut self, layer: usize) -> StageResult;
    /// Selects and weighs each row's experts.
    fn route(&mut self, layer: usize) -> StageResult;
    /// Runs the routed and shared experts.
    fn run_experts(&mut self, layer: usize) -> StageResult;
    /// Spreads the sublayer's output over the streams.
    fn hc_post(&mut self, layer: usize, sublayer: Sublayer) -> StageResult;
    /// Logits of [`Batch::logit_rows`].
    fn head(&mut self) -> StageResult;
}

/// The forward pass, as [`Backend::step`] gets it: calls every stage of a step once.
pub type Forward<'a> = &'a (dyn Fn(&mut dyn Step) -> StageResult + Sync);

/// KV state of one session.
///
/// A cache stands at a position, the number of tokens that it holds between steps.
pub trait Cache: Any + Send {
    /// Bytes that it takes now.
    fn bytes(&self) -> u64;
    /// Ensures capacity for `tokens` tokens. The contents stay as they are, also on failure.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is no room.
    fn reserve(&mut self, tokens: usize) -> StageResult;
    /// Goes back to `position`, at most [`MAX_REWIND`](crate::MAX_REWIND) tokens before the
    /// highest one written.
    fn rewind(&mut self, position: usize);
    /// A copy of the first `position` tokens' state, made where the cache is.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is no room for it.
    fn fork(&self, position: usize) -> StageResult<Box<dyn Cache>>;
    /// Saves the part that later tokens overwrite, where the cache is. `position` is where the
    /// cache stands.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is no room for it.
    fn save_frontier(&self, position: usize) -> StageResult<Box<dyn SavedFrontier>>;
    /// Puts a saved frontier back and drops all rows beyond it.
    ///
    /// # Errors
    /// [`BackendError::OtherBackend`] if another backend saved it.
    fn restore_frontier(&mut self, saved: &dyn SavedFrontier) -> StageResult;
    /// Copies out the part that later tokens overwrite. `position` is where the cache stands.
    ///
    /// # Errors
    /// If the device fails.
    fn read_frontier(&self, position: usize) -> StageResult<Frontier>;
    /// Puts a frontier back and drops all rows beyond it. The rows before it are there already.
    ///
    /// # Errors
    /// If the device fails.
    fn write_frontier(&mut self, frontier: &Frontier) -> StageResult;
    /// Copies out a range of a layer's append-only rows, which are complete.
    ///
    /// # Errors
    /// If the device fails.
    fn read_rows(&self, layer: usize, plane: Plane, rows: Range<usize>) -> StageResult<Vec<u8>>;
    /// Writes rows of a layer from row `first` on, which is at most the number of rows there are.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is no room.
    fn write_rows(&mut self, layer: usize, plane: Plane, first: usize, bytes: &[u8])
    -> StageResult;
}

/// A frontier that stays where its cache is; see [`Cache::save_frontier`].
pub trait SavedFrontier: Any + Send + Sync {
    /// Bytes that it takes.
    fn bytes(&self) -> u64;
}

/// The cache as the backend's own type.
///
/// # Errors
/// [`BackendError::OtherBackend`] if it is of another type.
pub fn own_cache<C: Cache>(cache: &mut dyn Cache) -> StageResult<&mut C> {
    (cache as &mut dyn Any).downcast_mut().ok_or(BackendError::OtherBackend)
}

/// The saved frontier as the backend's own type.
///
/// # Errors
/// [`BackendError::OtherBackend`] if it is of another type.
pub fn own_frontier<F: SavedFrontier>(saved: &dyn SavedFrontier) -> StageResult<&F> {
    (saved as &dyn Any).downcast_ref().ok_or(BackendError::OtherBackend)
}

/// Memory of a device after the model was loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryReport {
    /// Where the model computes.
    pub device: String,
    /// Bytes of weights that the device holds itself.
    pub weights: u64,
    /// Bytes of activations for the largest step.
    pub activations: u64,
    /// Bytes left for sessions; `None` where they share memory with everything else.
    pub left: Option<u64>,
    /// Tokens of context that were asked for.
    pub context: usize,
    /// Bytes of one session of that length.
    pub session: u64,
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        write!(
            f,
            "{}: weights {:.1} GiB, activations {:.1}, a session of {} tokens {:.1}",
            self.device,
            gib(self.weights),
            gib(self.activations),
            self.context,
            gib(self.session),
        )?;
        match self.left {
            Some(left) => write!(f, ", left for sessions {:.1} GiB", gib(left)),
            None => Ok(()),
        }
    }
}

/// A model on a device.
pub trait Backend: Send + Sync {
    /// Shape of the model.
    fn config(&self) -> &Config;
    /// Content hash of the model, for matching snapshots.
    fn model_identity(&self) -> [u8; 32];
    /// Layout of a session's KV state.
    fn layout(&self) -> &StateLayout;
    /// The backend's name, as `--backend` takes it.
    fn name(&self) -> &'static str;
    /// The device in words for people, such as `2 threads, AVX-512 kernels`.
    fn device(&self) -> String;
    /// Tokens of a prompt that are best computed together.
    fn prefill_chunk(&self) -> usize;
    /// Memory that is taken and left, with a session of `context` tokens in view.
    ///
    /// # Errors
    /// If the device fails.
    fn memory(&self, context: usize) -> StageResult<MemoryReport>;
    /// Bytes per second that the memory of the weights can deliver, measured now.
    ///
    /// # Errors
    /// If the device fails or has no room for the measurement.
    fn bandwidth(&self) -> StageResult<f64>;

    /// An empty cache.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is no room for another session.
    fn new_cache(&self) -> StageResult<Box<dyn Cache>>;
    /// Bytes that a cache with capacity for `tokens` tokens takes on this device.
    fn session_bytes(&self, tokens: usize) -> u64 {
        self.layout().bytes(tokens)
    }
    /// Does ahead of time the work that the first steps of up to `sessions` sessions would wait
    /// for.
    ///
    /// # Errors
    /// If the device fails or has no room.
    fn warm_up(&self, _sessions: usize, _forward: Forward<'_>) -> StageResult {
        Ok(())
    }

    /// Computes a batch: makes a [`Step`] of it and calls `forward` with that, or does the same
    /// work that `forward` would do. `caches[i]` belongs to session `i` of the batch, has capacity
    /// for the span, and advances by it.
    ///
    /// # Errors
    /// If the device fails; the sessions of the batch are unusable then.
    fn step(
        &self,
        batch: &Batch,
        caches: &mut [&mut dyn Cache],
        forward: Forward<'_>,
    ) -> StageResult<HeadOutput>;
}
