//! Attention of one query over its visible rows, and the indexer's scores
//! (docs/model.md, "Attention" and "Indexer").
//!
//! A row serves all heads as key and as value, so both products are matrix
//! products and are blocked as such. Heads don't mix: splitting the heads of a
//! query over several calls changes no bit.

use ds4_model::config::{HEAD_DIM, INDEX_DIM};

use super::{
    float::{self, FloatRows},
    formats::F32,
    math::exp,
    vector::Vector,
};

/// Rows whose values are added to all heads before the next ones are read;
/// a block of columns of them stays in the first-level cache.
const ROW_TILE: usize = 64;

/// What the heads of a query attend to.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    /// Keys and values, each `[512]`.
    pub rows: &'a [*const f32],
    /// One logit per head.
    pub sinks: &'a [f32],
    /// Factor on q·k.
    pub scale: f32,
}

/// Numbers of scratch that [`attend`] needs.
pub(super) fn scratch_len(heads: usize, rows: usize) -> usize {
    (rows + 1) * padded_heads(heads)
}

fn padded_heads(heads: usize) -> usize {
    heads.next_multiple_of(16)
}

/// Turns every head of `heads`, `[heads, 512]`, into its weighted mean of the
/// rows. Scores and values are computed in blocks of `R` heads,
/// with `T` rows or `C` registers of columns.
///
/// # Safety
/// Needs the instruction set of `V`; one sink per head, `scratch` as long as
/// [`scratch_len`].
#[inline(always)]
pub(super) unsafe fn attend<V: Vector, const R: usize, const T: usize, const C: usize>(
    heads: &mut [f32],
    context: Context,
    scratch: &mut [f32],
) {
    let Context { rows, sinks, scale } = context;
    let stride = padded_heads(sinks.len());
    // `weights` has a line of `stride` numbers for each row; those beyond the
    // heads are computed along and never read.
    let (factors, weights) = scratch.split_at_mut(stride);
    let queries = FloatRows {
        data: heads.as_ptr().cast(),
        count: sinks.len(),
        row_bytes: HEAD_DIM * 4,
        cols: HEAD_DIM,
    };
    // SAFETY: the caller has the instruction set, and lengths are as promised.
    unsafe {
        float::multiply::<V, F32, R, T>(queries, rows, weights.as_mut_ptr(), stride);
        for h in (0..sinks.len()).step_by(V::LANES) {
            let weights = weights.as_mut_ptr().add(h);
            let sum = softmax::<V>(weights, rows.len(), stride, scale, &sinks[h..]);
            V::store(factors.as_mut_ptr().add(h), V::div(V::splat(1.0), sum));
        }
        for (tile, rows) in rows.chunks(ROW_TILE).enumerate() {
            let weights = weights.as_ptr().add(tile * ROW_TILE * stride);
            add_values::<V, R, C>(rows, weights, stride, tile == 0, heads);
        }
        for (head, &factor) in heads.chunks_exact_mut(HEAD_DIM).zip(&*factors) {
            for part in head.chunks_exact_mut(V::LANES) {
                let p = part.as_mut_ptr();
                V::store(p, V::mul(V::load(p), V::splat(factor)));
            }
        }
    }
}

/// Turns the products of `LANES` heads into e^(score − largest), and returns
/// their sum, the sink's term included. `sinks` may be fewer.
#[inline(always)]
unsafe fn softmax<V: Vector>(
    products: *mut f32,
    count: usize,
    stride: usize,
    scale: f32,
    sinks: &[f32],
) -> V::Float {
    let mut padded_sinks = [0.0; 16];
    let live = V::LANES.min(sinks.len());
    padded_sinks[..live].copy_from_slice(&sinks[..live]);
    // SAFETY: the caller has the instruction set, and `count` lines.
    unsafe {
        let sink = V::load(padded_sinks.as_ptr());
        let mut largest = sink;
        for r in 0..count {
            let p = products.add(r * stride);
            let score = V::mul(V::load(p), V::splat(scale));
            V::store(p, score);
            largest = V::max(largest, score);
        }
        let negative = V::mul(largest, V::splat(-1.0));
        let mut sum = exp::<V>(V::add(sink, negative));
        for r in 0..count {
            let p = products.add(r * stride);
            let weight = exp::<V>(V::add(V::load(p), negative));
            V::store(p, weight);
            sum = V::add(sum, weight);
        }
        sum
    }
}

/// Adds weight times row to every head of `out`, or sets it if these are the
/// `first` rows.
#[inline(always)]
unsafe fn add_values<V: Vector, const H: usize, const C: usize>(
    rows: &[*const f32],
    weights: *const f32,
    stride: usize,
    first: bool,
    out: &mut [f32],
) {
    let heads = out.len() / HEAD_DIM;
    for k in (0..HEAD_DIM).step_by(C * V::LANES) {
        let mut h = 0;
        // SAFETY: the caller has the instruction set; heads `h..h + H` exist.
        unsafe {
            while h + H <= heads {
                let out = out.as_mut_ptr().add(h * HEAD_DIM + k);
                add_values_block::<V, H, C>(rows, k, weights.add(h), stride, first, out);
                h += H;
            }
            while h < heads {
                let out = out.as_mut_ptr().add(h * HEAD_DIM + k);
                add_values_block::<V, 1, C>(rows, k, weights.add(h), stride, first, out);
                h += 1;
            }
        }
    }
}

/// Columns `k..k + C·LANES` of `H` heads.
#[inline(always)]
unsafe fn add_values_block<V: Vector, const H: usize, const C: usize>(
    rows: &[*const f32],
    k: usize,
    weights: *const f32,
    stride: usize,
    first: bool,
    out: *mut f32,
) {
    // SAFETY: as the caller promises.
    unsafe {
        let mut sums = [[V::splat(0.0); C]; H];
        if !first {
            for h in 0..H {
                for c in 0..C {
                    sums[h][c] = V::load(out.add(h * HEAD_DIM + c * V::LANES));
                }
            }
        }
        for (r, row) in rows.iter().enumerate() {
            let mut values = [V::splat(0.0); C];
            for c in 0..C {
                values[c] = V::load(row.add(k + c * V::LANES));
            }
            for h in 0..H {
                let weight = V::splat(*weights.add(r * stride + h));
                for c in 0..C {
                    sums[h][c] = V::fma(weight, values[c], sums[h][c]);
                }
            }
        }
        for h in 0..H {
            for c in 0..C {
                V::store(out.add(h * HEAD_DIM + c * V::LANES), sums[h][c]);
            }
        }
    }
}

/// The indexer's query with heads in lanes, and the weight of each head.
pub(super) struct IndexQuery {
    /// `[128, padded heads]`.
    q: Vec<f32>,
    /// Zero for the padding.
    weights: Vec<f32>,
}

impl IndexQuery {
    /// From `q`, `[heads, 128]`. Heads are filled up to a multiple of `lanes`.
    pub fn new(q: &[f32], weights: &[f32], lanes: usize) -> Self {
        let padded = weights.len().next_multiple_of(lanes);
        let mut transposed = vec![0.0; INDEX_DIM * padded];
        for (h, q) in q.chunks_exact(INDEX_DIM).enumerate() {
            for (i, &q) in q.iter().enumerate() {
                transposed[i * padded + h] = q;
            }
        }
        let mut weights = weights.to_vec();
        weights.resize(padded, 0.0);
        IndexQuery { q: transposed, weights }
    }
}

/// Writes Σ_h weight_h · max(0, q_h·key) for each key. Heads are computed in
/// blocks of `H` registers, what is left of them in single ones, with `K` keys.
///
/// # Safety
/// Needs the instruction set of `V`; `query` was made for its `LANES`, and
/// `keys` hold 128 numbers for each of `out`.
#[inline(always)]
pub(super) unsafe fn index_scores<V: Vector, const H: usize, const K: usize>(
    query: &IndexQuery,
    keys: &[f32],
    out: &mut [f32],
) {
    let (blocks, rest) = out.as_chunks_mut::<K>();
    // SAFETY: as the caller promises.
    unsafe {
        for (keys, out) in keys.chunks_exact(K * INDEX_DIM).zip(blocks.iter_mut()) {
            index_scores_block::<V, H, K>(query, keys.as_ptr(), out);
        }
        let keys = &keys[blocks.len() * K * INDEX_DIM..];
        for (keys, out) in keys.chunks_exact(INDEX_DIM).zip(rest) {
            index_scores_block::<V, H, 1>(query, keys.as_ptr(), std::array::from_mut(out));
        }
    }
}

#[inline(always)]
unsafe fn index_scores_block<V: Vector, const H: usize, const K: usize>(
    query: &IndexQuery,
    keys: *const f32,
    out: &mut [f32; K],
) {
    let (heads, block) = (query.weights.len(), H * V::LANES);
    let whole = heads / block * block;
    // SAFETY: as the caller promises.
    unsafe {
        let mut scores = [V::splat(0.0); K];
        for h in (0..whole).step_by(block) {
            add_scores::<V, H, K>(query, h, keys, &mut scores);
        }
        for h in (whole..heads).step_by(V::LANES) {
            add_scores::<V, 1, K>(query, h, keys, &mut scores);
        }
        for k in 0..K {
            out[k] = V::sum(scores[k]);
        }
    }
}

/// Adds what the `H·LANES` heads from `h` on give each of `K` keys.
#[inline(always)]
unsafe fn add_scores<V: Vector, const H: usize, const K: usize>(
    query: &IndexQuery,
    h: usize,
    keys: *const f32,
    scores: &mut [V::Float; K],
) {
    let heads = query.weights.len();
    // SAFETY: as the caller promises.
    unsafe {
        let mut dots = [[V::splat(0.0); H]; K];
        for i in 0..INDEX_DIM {
            let mut q = [V::splat(0.0); H];
            for j in 0..H {
                q[j] = V::load(query.q.as_ptr().add(i * heads + h + j * V::LANES));
            }
            for k in 0..K {
                let key = V::splat(*keys.add(k * INDEX_DIM + i));
                for j in 0..H {
                    dots[k][j] = V::fma(key, q[j], dots[k][j]);
                }
            }
        }
        for j in 0..H {
            let weight = V::load(query.weights.as_ptr().add(h + j * V::LANES));
            for k in 0..K {
                let positive = V::max(V::splat(0.0), dots[k][j]);
                scores[k] = V::fma(weight, positive, scores[k]);
            }
        }
    }
}
