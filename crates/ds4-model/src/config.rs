//! Shape and constants of one model, read from GGUF metadata.
//!
//! Widths and counts come from the file. What the kernels are written for
//! (the constants below) is fixed, and a file that differs is refused.

mod read;

pub(crate) use read::{ARCHITECTURE, GATING_SQRT_SOFTPLUS};

/// Elements of one attention head, of one key/value row and of one compressed row.
pub const HEAD_DIM: usize = 512;
/// Trailing elements of a head or row that RoPE rotates.
pub const ROPE_DIM: usize = 64;
/// Leading elements of a head or row that RoPE leaves alone.
pub const NOPE_DIM: usize = HEAD_DIM - ROPE_DIM;
/// Tokens a query sees in the sliding window, its own included.
pub const WINDOW: usize = 128;
/// Residual streams of the hyper-connections.
pub const STREAMS: usize = 4;
/// Mixing weights of one hyper-connection: pre (4), post (4), comb (4 × 4).
pub const HC_MIX: usize = (2 + STREAMS) * STREAMS;
/// Elements of one indexer head and of one index key.
pub const INDEX_DIM: usize = 128;

/// What a layer's attention sees besides the sliding window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerKind {
    /// Sliding window only (compress ratio 0).
    Swa,
    /// Compressed sparse attention (ratio 4): rows chosen by the indexer.
    Csa,
    /// Heavily compressed attention (ratio 128): every row.
    Hca,
}

impl LayerKind {
    /// The kind with this compress ratio.
    pub fn from_ratio(ratio: usize) -> Option<LayerKind> {
        [LayerKind::Swa, LayerKind::Csa, LayerKind::Hca]
            .into_iter()
            .find(|kind| kind.ratio() == ratio)
    }

    /// Tokens per compressed row; 0 where there are none.
    pub const fn ratio(self) -> usize {
        match self {
            LayerKind::Swa => 0,
            LayerKind::Csa => 4,
            LayerKind::Hca => 128,
        }
    }

    /// Width of the compressor's projections: CSA's windows overlap, so each
    /// token contributes to two of them ([`HEAD_DIM`] for each).
    pub fn compressor_width(self) -> usize {
        match self {
            LayerKind::Swa => 0,
            LayerKind::Csa => 2 * HEAD_DIM,
            LayerKind::Hca => HEAD_DIM,
        }
    }
}

/// What differs from layer to layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerConfig {
    /// What its attention sees.
    pub kind: LayerKind,
    /// Experts come from a table indexed by the token id, not from scores.
    pub hash_routed: bool,
    /// SwiGLU clamp of the routed experts.
    pub swiglu_limit: f32,
    /// SwiGLU clamp of the shared expert.
    pub shared_swiglu_limit: f32,
}

/// YaRN extension of the compressed layers' RoPE.
#[derive(Debug, Clone, PartialEq)]
pub struct Yarn {
    /// Factor by which low frequencies are slowed.
    pub factor: f32,
    /// Context length before extension, in tokens.
    pub original_context: usize,
    /// Rotations above which a frequency is kept.
    pub beta_fast: f32,
    /// Rotations below which a frequency is fully slowed.
    pub beta_slow: f32,
}

/// Shape and constants of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// One entry per layer.
    pub layers: Vec<LayerConfig>,
    /// Token ids, and columns of the logits.
    pub vocab: usize,
    /// Longest context the model was made for, in tokens.
    pub context_length: usize,
    /// Width of a residual stream.
    pub hidden: usize,
    /// Query heads (each [`HEAD_DIM`] wide; keys and values have one head).
    pub heads: usize,
    /// Width of the query latent.
    pub q_rank: usize,
    /// Groups of the output projection.
    pub output_groups: usize,
    /// Rows of each group's first output projection.
    pub output_rank: usize,
    /// Routed experts.
    pub experts: usize,
    /// Routed experts used per token.
    pub experts_used: usize,
    /// Width of a routed expert and of the shared expert.
    pub expert_width: usize,
    /// Indexer heads (each [`INDEX_DIM`] wide).
    pub index_heads: usize,
    /// Compressed rows the indexer selects.
    pub index_top_k: usize,
    /// Sinkhorn iterations of the hyper-connections.
    pub sinkhorn_iterations: usize,
    /// Epsilon inside the hyper-connections.
    pub hc_epsilon: f32,
    /// Epsilon of every RMS norm.
    pub rms_epsilon: f32,
    /// Factor on the routed experts' normalised weights.
    pub routed_scale: f32,
    /// RoPE base of the sliding-window layers.
    pub rope_base: f32,
    /// RoPE base of the compressed layers.
    pub compress_rope_base: f32,
    /// YaRN of the compressed layers.
    pub yarn: Yarn,
}

impl Config {
    /// Query heads of one output group.
    pub fn heads_per_group(&self) -> usize {
        self.heads / self.output_groups
    }
}
