//! Intermediate results of one step.

use ds4_engine::rope::Rotation;
use ds4_model::config::{Config, HEAD_DIM, STREAMS};

/// What flows through the stages, `n` rows of each. Buffers are reused from layer to layer.
///
/// Open to all, so that stages of other backends can be given the same and compared.
pub struct Activations {
    /// Residual streams `[n, 4, hidden]`.
    pub streams: Vec<f32>,
    /// Weight of the sublayer's output in each stream `[n, 4]`.
    pub post: Vec<f32>,
    /// Mixing of the streams `[n, 4 (from), 4 (to)]`.
    pub comb: Vec<f32>,
    /// The sublayer's normalised input `[n, hidden]`.
    pub x: Vec<f32>,
    /// The sublayer's output `[n, hidden]`.
    pub y: Vec<f32>,
    /// Normalised query latent `[n, q_rank]`.
    pub q_latent: Vec<f32>,
    /// Queries, then attention outputs `[n, heads, 512]`.
    pub heads: Vec<f32>,
    /// Key/value rows, rounded `[n, 512]`.
    pub kv: Vec<f32>,
    /// Compressed rows the indexer chose, ascending; `None`: all that are visible.
    pub selected: Vec<Option<Vec<u32>>>,
    /// Chosen experts `[n, experts_used]`.
    pub expert_ids: Vec<u32>,
    /// Their weights `[n, experts_used]`.
    pub expert_weights: Vec<f32>,
    /// Rotations at the rows' positions, for sliding-window layers.
    pub plain_rotations: Vec<Rotation>,
    /// The same for compressed layers.
    pub yarn_rotations: Vec<Rotation>,
}

impl Activations {
    /// Bytes of the activations of `rows` rows, about.
    pub fn bytes(config: &Config, rows: usize) -> u64 {
        let streams = STREAMS * config.hidden;
        let heads = 2 * config.heads * HEAD_DIM;
        let sublayer = 4 * config.hidden + 2 * config.q_rank + HEAD_DIM;
        let experts = config.experts_used * (config.hidden + 2 * config.expert_width);
        (rows * size_of::<f32>() * (streams + heads + sublayer + experts)) as u64
    }

    pub(crate) fn new(config: &Config, n: usize) -> Self {
        let zeros = |width: usize| vec![0.0; n * width];
        Activations {
            streams: zeros(STREAMS * config.hidden),
            post: zeros(STREAMS),
            comb: zeros(STREAMS * STREAMS),
            x: zeros(config.hidden),
            y: zeros(config.hidden),
            q_latent: zeros(config.q_rank),
            heads: zeros(config.heads * HEAD_DIM),
            kv: zeros(HEAD_DIM),
            selected: vec![None; n],
            expert_ids: vec![0; n * config.experts_used],
            expert_weights: zeros(config.experts_used),
            plain_rotations: Vec::with_capacity(n),
            yarn_rotations: Vec::with_capacity(n),
        }
    }
}
