//! Experts: gate, up, SwiGLU and down, for the tokens routed to each.
//!
//! Tokens are grouped by expert, so that each expert's weights are read and
//! unpacked once. A first pass computes the hidden activations of all pairs of
//! token and expert, a second one their down projections; that is split by
//! output rows and visits experts in ascending order, so that a token's sum has
//! one order and no two tasks add to the same place.

use ds4_model::weights::MatrixView;
use gguf::TensorType;
use rayon::prelude::*;

use super::{
    kernels::Kernels,
    matmul::{Input, Operand, Out, Scratch, check, is_float, multiply, split_rows},
    q8::{Panel, Q8Rows},
};

/// Pairs of token and expert whose hidden activations are held at once. Bounds
/// memory to some 100 MB at Flash's widths.
const BATCH: usize = 4096;

/// The experts of a layer, or its shared expert.
#[derive(Clone, Copy)]
pub struct Experts<'a> {
    /// `[count·width, hidden]`, expert after expert.
    pub gate: MatrixView<'a>,
    /// `[count·width, hidden]`.
    pub up: MatrixView<'a>,
    /// `[count·hidden, width]`.
    pub down: MatrixView<'a>,
    /// Experts.
    pub count: usize,
    /// SwiGLU clamp: gate above, up on both sides.
    pub limit: f32,
}

/// Adds the outputs of each token's experts to `y`, `[tokens, hidden]`:
/// `y[t] += Σ_j weights[t][j] · down_e(silu(min(gate_e·x, limit)) ⊙
/// clamp(up_e·x, ±limit))` with `e = ids[t][j]`.
///
/// `ids` and `weights` have equally many entries for each token. For a shared
/// expert `count` is 1, every id 0 and every weight 1.
///
/// # Panics
/// If lengths disagree, an id is not below `count`, or a type is none of
/// [`Isa::supports`].
pub fn experts(experts: &Experts, ids: &[u32], weights: &[f32], x: &Input, y: &mut [f32]) {
    experts_seen(experts, ids, weights, x, y, None);
}

/// The same, and shows each expert's number, tokens and hidden activations `[tokens, width]`
/// (the weight included) to `seen`.
pub(crate) fn experts_seen(
    experts: &Experts,
    ids: &[u32],
    weights: &[f32],
    x: &Input,
    y: &mut [f32],
    mut seen: Option<Seen<'_>>,
) {
    let hidden = x.cols;
    let width = experts.gate.rows / experts.count;
    check(&experts.gate, hidden);
    check(&experts.up, hidden);
    check(&experts.down, width);
    assert_eq!(experts.gate.rows, experts.count * width, "experts of one width");
    assert_eq!(experts.up.rows, experts.gate.rows, "gate and up of one shape");
    assert_eq!(experts.down.rows, experts.count * hidden, "down of gate's shape transposed");
    assert_eq!(y.len(), x.rows() * hidden, "one output per token and column");
    assert_eq!(ids.len(), weights.len(), "one weight per id");
    if ids.is_empty() {
        return;
    }
    assert!(ids.len().is_multiple_of(x.rows()), "equally many experts for each token");

    let used = ids.len() / x.rows();
    let assigned = assign(experts.count, ids, weights, used);
    for batch in batches(&assigned) {
        let activations = activate(experts, width, batch, x);
        if let Some(seen) = &mut seen {
            show(batch, width, &activations, seen);
        }
        project(experts, width, batch, &activations, x, y);
    }
}

/// Called with an expert, its tokens and their hidden activations.
pub(crate) type Seen<'a> = &'a mut dyn FnMut(usize, &[usize], &[f32]);

fn show(batch: &[Assigned], width: usize, activations: &[f32], seen: &mut Seen<'_>) {
    let mut rest = activations;
    for Assigned { expert, tokens } in batch {
        let (own, others) = rest.split_at(tokens.len() * width);
        let tokens: Vec<usize> = tokens.iter().map(|&(token, _)| token).collect();
        seen(*expert, &tokens, own);
        rest = others;
    }
}

/// An expert and the tokens routed to it, in ascending order.
struct Assigned {
    expert: usize,
    /// Token and weight.
    tokens: Vec<(usize, f32)>,
}

/// Experts that have tokens, in ascending order.
fn assign(count: usize, ids: &[u32], weights: &[f32], used: usize) -> Vec<Assigned> {
    let mut assigned: Vec<_> =
        (0..count).map(|expert| Assigned { expert, tokens: Vec::new() }).collect();
    for (i, (&id, &weight)) in ids.iter().zip(weights).enumerate() {
        assigned[id as usize].tokens.push((i / used, weight));
    }
    assigned.retain(|a| !a.tokens.is_empty());
    assigned
}

/// Splits into runs of at most [`BATCH`] pairs, or of one expert.
fn batches(assigned: &[Assigned]) -> impl Iterator<Item = &[Assigned]> {
    let mut rest = assigned;
    std::iter::from_fn(move || {
        let mut pairs = 0;
        let fits = |a: &&Assigned| {
            pairs += a.tokens.len();
            pairs <= BATCH
        };
        let count = rest.iter().take_while(fits).count().max(1).min(rest.len());
        let (batch, after) = rest.split_at(count);
        rest = after;
        (!batch.is_empty()).then_some(batch)
    })
}

/// The first pair of each expert of the batch, and the number of all pairs.
fn offsets(batch: &[Assigned]) -> (Vec<usize>, usize) {
    let mut total = 0;
    let offsets = batch
        .iter()
        .map(|a| {
            let start = total;
            total += a.tokens.len();
            start
        })
        .collect();
    (offsets, total)
}

/// Hidden activations of all pairs, `[pairs, width]`, the weight included.
fn activate(experts: &Experts, width: usize, batch: &[Assigned], x: &Input) -> Vec<f32> {
    let kernels = x.isa.kernels;
    let needs_quantized = !is_float(experts.gate.ty) || !is_float(experts.up.ty);
    let source = Source { x: x.x, cols: x.cols, quantized: needs_quantized.then(|| x.quantized()) };
    let rows = batch.iter().map(|a| a.tokens.iter().map(|&(token, _)| token).collect()).collect();
    let gathered = Gathered::new(kernels, source, rows, &decoding_counts(batch, x.decoding));

    let (offsets, pairs) = offsets(batch);
    let mut hidden = vec![0.0; pairs * width];
    let out = Out::new(&mut hidden, width);
    let ranges = split_rows(width, kernels.lanes);
    let tasks = batch.len() * ranges.len();
    (0..tasks).into_par_iter().for_each_init(<(Scratch, Vec<f32>)>::default, |scratch, task| {
        let (i, range) = (task / ranges.len(), ranges[task % ranges.len()].clone());
        let Assigned { expert, tokens } = &batch[i];
        let (scratch, products) = scratch;
        products.resize(2 * tokens.len() * range.len(), 0.0);
        let (gate, up) = products.split_at_mut(tokens.len() * range.len());
        let rows = expert * width + range.start..expert * width + range.end;
        for (w, products) in [(experts.gate, &mut *gate), (experts.up, &mut *up)] {
            let (w, operand) = (w.slice_rows(rows.clone()), gathered.operand(i, w.ty));
            // SAFETY: `products` has a place for each token and row.
            unsafe { multiply(kernels, w, &operand, scratch, Out::new(products, range.len())) };
        }
        let products = gate.chunks(range.len()).zip(up.chunks(range.len()));
        for (t, (gate, up)) in products.enumerate() {
            // SAFETY: tasks have disjoint pairs or columns, and kernels exist
            // only where they can run.
            unsafe {
                let out = out.column(range.start).slice(offsets[i] + t, range.len());
                (kernels.swiglu)(gate, up, experts.limit, tokens[t].1, out);
            }
        }
    });
    hidden
}

/// Adds the down projections of all pairs to their tokens in `y`.
fn project(
    experts: &Experts,
    width: usize,
    batch: &[Assigned],
    hidden: &[f32],
    x: &Input,
    y: &mut [f32],
) {
    let kernels = x.isa.kernels;
    let quantized = (!is_float(experts.down.ty)).then(|| kernels.quantized(hidden, width));
    let source = Source { x: hidden, cols: width, quantized: quantized.as_ref() };
    let (offsets, _) = offsets(batch);
    let rows =
        offsets.iter().zip(batch).map(|(&start, a)| (start..start + a.tokens.len()).collect());
    let gathered =
        Gathered::new(kernels, source, rows.collect(), &decoding_counts(batch, x.decoding));

    let outputs = x.cols;
    let out = Out::new(y, outputs);
    let ranges = split_rows(outputs, kernels.lanes);
    ranges.par_iter().for_each_init(
        <(Scratch, Vec<f32>)>::default,
        |(scratch, products), range| {
            for (i, Assigned { expert, tokens }) in batch.iter().enumerate() {
                let rows = expert * outputs + range.start..expert * outputs + range.end;
                let (w, operand) =
                    (experts.down.slice_rows(rows), gathered.operand(i, experts.down.ty));
                products.resize(tokens.len() * range.len(), 0.0);
                // SAFETY: `products` has a place for each token and row; tasks have
                // disjoint columns of `y`.
                unsafe {
                    multiply(kernels, w, &operand, scratch, Out::new(products, range.len()));
                    for (&(token, _), products) in tokens.iter().zip(products.chunks(range.len())) {
                        let sums = out.column(range.start).slice(token, range.len());
                        sums.iter_mut().zip(products).for_each(|(sum, product)| *sum += product);
                    }
                }
            }
        },
    );
}

/// How many of each expert's tokens are decoding ones.
fn decoding_counts(batch: &[Assigned], decoding: usize) -> Vec<usize> {
    let count = |a: &Assigned| a.tokens.partition_point(|&(token, _)| token < decoding);
    batch.iter().map(count).collect()
}

/// Rows of activations in all forms that are needed.
struct Source<'a> {
    x: &'a [f32],
    cols: usize,
    /// Made if a matrix is quantised.
    quantized: Option<&'a Q8Rows>,
}

/// The rows of each expert of a batch.
struct Gathered<'a> {
    source: Source<'a>,
    experts: Vec<GatheredRows>,
}

struct GatheredRows {
    rows: Vec<usize>,
    /// How many of them are decoding, at the front.
    decoding: usize,
    /// Of the others, if a matrix is quantised.
    panels: Vec<Panel>,
}

impl<'a> Gathered<'a> {
    fn new(
        kernels: &Kernels,
        source: Source<'a>,
        rows: Vec<Vec<usize>>,
        decoding: &[usize],
    ) -> Self {
        let experts = rows
            .into_par_iter()
            .zip(decoding)
            .map(|(rows, &decoding)| {
                let panels = source.quantized.map_or(Vec::new(), |quantized| {
                    let blocks: Vec<_> =
                        rows[decoding..].iter().map(|&r| quantized.row(r)).collect();
                    Panel::split(&blocks, kernels.panel)
                });
                GatheredRows { rows, decoding, panels }
            })
            .collect();
        Gathered { source, experts }
    }

    /// What a matrix of type `ty` of the batch's expert `i` is multiplied with.
    fn operand(&self, i: usize, ty: TensorType) -> Operand<'_> {
        let GatheredRows { rows, decoding, panels } = &self.experts[i];
        match self.source.quantized {
            Some(quantized) if !is_float(ty) => Operand::Quantized {
                decoding: rows[..*decoding].iter().map(|&r| quantized.row(r)).collect(),
                panels,
            },
            _ => {
                let cols = self.source.cols;
                Operand::Float(rows.iter().map(|r| &self.source.x[r * cols..][..cols]).collect())
            }
        }
    }
}
