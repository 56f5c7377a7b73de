//! Every product kernel against plain computations on dequantised weights.

mod simd_support;

use ds4_cpu::simd::{Experts, Input, Isa, experts, matmul};
use ds4_model::weights::MatrixView;
use gguf::TensorType;
use proptest::prelude::*;
use simd_support::{Matrix, Random, TYPES, as_seen, every_isa, products};

/// Rounding of f32 sums, relative to the magnitudes summed. Measured: at most
/// 6e-7 on random inputs and 9e-7 on extreme ones, where mins and biases make
/// terms larger than they look.
const ROUNDING: f64 = 1e-6;

fn product(isa: Isa, w: MatrixView, x: &[f32], decoding: usize) -> Vec<f32> {
    let input = Input::new(isa, x, w.cols, decoding);
    let mut y = vec![f32::NAN; input.rows() * w.rows];
    matmul(w, &input, &mut y);
    y
}

/// Checks `y` against f64 products with the activations that the kernels see.
fn assert_products(isa: Isa, w: &Matrix, x: &[f32], y: &[f32]) {
    let expected = products(&w.values(), &as_seen(w.ty, x, w.cols), w.cols);
    assert_eq!(y.len(), expected.len());
    for (i, (y, (expected, size))) in y.iter().zip(expected).enumerate() {
        let error = (f64::from(*y) - expected).abs();
        assert!(
            error <= ROUNDING * size + 1e-30,
            "{} {}: output {i} is {y}, expected {expected}, {:e} of the terms' size",
            isa.name(),
            w.ty,
            error / size,
        );
    }
}

/// `cols` rounded up to whole blocks.
fn whole_blocks(ty: TensorType, cols: usize) -> usize {
    cols.next_multiple_of(ty.block_len())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn products_are_exact_but_for_f32_sums(
        seed: u64,
        ty in prop::sample::select(&TYPES[..]),
        rows in 1usize..70,
        cols in 1usize..900,
        tokens in 1usize..40,
        decoding in 0usize..40,
    ) {
        let mut random = Random(seed);
        let cols = whole_blocks(ty, cols);
        let w = Matrix::random(ty, rows, cols, &mut random);
        let x = random.normals(tokens * cols);
        for isa in every_isa() {
            let y = product(isa, w.view(), &x, decoding.min(tokens));
            assert_products(isa, &w, &x, &y);
        }
    }
}

#[test]
fn products_at_the_widths_of_flash() {
    let mut random = Random(1);
    for (ty, cols) in [
        (TensorType::Q8_0, 4096),
        (TensorType::Q8_0, 8192),
        (TensorType::IQ2_XXS, 4096),
        (TensorType::Q2_K, 2048),
        (TensorType::Q4_K, 4096),
        (TensorType::MXFP4, 4096),
        (TensorType::F16, 4096),
        (TensorType::F32, 16384),
    ] {
        let w = Matrix::random(ty, 100, cols, &mut random);
        let x = random.normals(30 * cols);
        for isa in every_isa() {
            assert_products(isa, &w, &x, &product(isa, w.view(), &x, 3));
        }
    }
}

/// The largest integers that can meet: no intermediate may saturate.
#[test]
fn extreme_weights_and_activations_do_not_overflow() {
    for ty in TYPES.into_iter().filter(|ty| ty.block_len() > 1) {
        for fill in [0x00u8, 0x7f, 0x80, 0xff] {
            let mut w = Matrix::random(ty, 33, 512, &mut Random(5));
            let scales = Matrix::random(ty, 33, 512, &mut Random(5)).bytes;
            let header = match ty {
                TensorType::Q8_0 | TensorType::IQ2_XXS => 0..2,
                TensorType::Q2_K => 80..84,
                TensorType::Q4_K => 0..4,
                _ => 0..1,
            };
            w.bytes.fill(fill);
            let size = ty.block_bytes();
            for (block, scales) in w.bytes.chunks_mut(size).zip(scales.chunks(size)) {
                block[header.clone()].copy_from_slice(&scales[header.clone()]);
            }
            for x in [1.0, -1.0] {
                let mut x = vec![x; 512 * 5];
                x[512..].iter_mut().step_by(2).for_each(|x| *x = -*x);
                for isa in every_isa() {
                    assert_products(isa, &w, &x, &product(isa, w.view(), &x, 2));
                }
            }
        }
    }
}

#[test]
fn zero_and_tiny_activations_give_zero() {
    let mut random = Random(6);
    for ty in TYPES {
        let w = Matrix::random(ty, 20, 256, &mut random);
        for isa in every_isa() {
            let y = product(isa, w.view(), &[0.0; 256 * 4], 2);
            assert!(y.iter().all(|&y| y == 0.0), "{} {ty}: {y:?}", isa.name());
            let y = product(isa, w.view(), &[1e-40; 256 * 4], 2);
            assert!(y.iter().all(|y| y.abs() < 1e-35), "{} {ty}: {y:?}", isa.name());
        }
    }
}

/// The error that rounding activations makes: what decides that groups of 32
/// are fine enough.
#[test]
fn rounded_activations_keep_dots_within_a_percent() {
    let mut random = Random(7);
    for ty in TYPES.into_iter().filter(|ty| ty.block_len() > 1) {
        let w = Matrix::random(ty, 64, 4096, &mut random);
        let x = random.normals(16 * 4096);
        let expected = products(&w.values(), &x, 4096);
        let power: f64 = expected.iter().map(|(y, _)| y * y).sum();
        for isa in every_isa() {
            let y = product(isa, w.view(), &x, 8);
            let errors = y.iter().zip(&expected).map(|(&y, (e, _))| f64::from(y) - e);
            let relative = (errors.map(|e| e * e).sum::<f64>() / power).sqrt();
            assert!(relative < 0.008, "{} {ty}: relative error {relative}", isa.name());
        }
    }
}

#[test]
fn a_token_gets_the_same_bits_in_any_company() {
    let mut random = Random(8);
    let pools = [1, 2, 3].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
    for ty in TYPES {
        let cols = if ty.block_len() == 256 { 512 } else { 544 };
        let w = Matrix::random(ty, 150, cols, &mut random);
        let x = random.normals(40 * cols);
        for isa in every_isa() {
            for decoding in [true, false] {
                let all = product(isa, w.view(), &x, if decoding { 40 } else { 0 });
                for n in [1, 2, 5, 9, 13, 26] {
                    for pool in &pools {
                        let decoding = if decoding { n } else { 0 };
                        let y = pool.install(|| product(isa, w.view(), &x[..n * cols], decoding));
                        assert!(y == all[..y.len()], "{} {ty}, {n} tokens", isa.name());
                    }
                }
            }
        }
    }
}

#[test]
fn grouped_products_see_their_group_alone() {
    let mut random = Random(9);
    let (groups, rank, tokens) = (3, 21, 15);
    for ty in TYPES {
        let cols = whole_blocks(ty, 96);
        let w = Matrix::random(ty, groups * rank, cols, &mut random);
        let x = random.normals(tokens * groups * cols);
        for isa in every_isa() {
            let input = Input::grouped(isa, &x, cols, groups, 4);
            let mut y = vec![f32::NAN; tokens * groups * rank];
            matmul(w.view(), &input, &mut y);
            for group in 0..groups {
                let part = |x: &[f32], size: usize| -> Vec<f32> {
                    let rows = x.chunks_exact(groups * size);
                    rows.flat_map(|x| &x[group * size..(group + 1) * size]).copied().collect()
                };
                let bytes = w.view().slice_rows(group * rank..(group + 1) * rank).bytes.to_vec();
                let w = Matrix { rows: rank, bytes, ..w };
                assert_products(isa, &w, &part(&x, cols), &part(&y, rank));
            }
        }
    }
}

/// Experts of mixed types, with their tokens' ids and weights.
struct Routed {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    count: usize,
    ids: Vec<u32>,
    weights: Vec<f32>,
    x: Vec<f32>,
}

const LIMIT: f32 = 4.0;

impl Routed {
    fn random(types: [TensorType; 3], shape: [usize; 4], tokens: usize, seed: u64) -> Routed {
        let mut random = Random(seed);
        let [count, used, hidden, width] = shape;
        let x: Vec<f32> = random.normals(tokens * hidden).iter().map(|x| 0.3 * x).collect();
        let mut ids = Vec::new();
        for _ in 0..tokens {
            let first = random.next() as usize;
            ids.extend((0..used).map(|j| ((first + j * (1 + first % 3)) % count) as u32));
        }
        Routed {
            gate: Matrix::random(types[0], count * width, hidden, &mut random),
            up: Matrix::random(types[1], count * width, hidden, &mut random),
            down: Matrix::random(types[2], count * hidden, width, &mut random),
            count,
            weights: ids.iter().map(|_| random.uniform()).collect(),
            ids,
            x,
        }
    }

    fn hidden(&self) -> usize {
        self.gate.cols
    }

    fn run(&self, isa: Isa, tokens: usize, decoding: usize) -> Vec<f32> {
        let used = self.ids.len() * self.hidden() / self.x.len();
        let x = Input::new(isa, &self.x[..tokens * self.hidden()], self.hidden(), decoding);
        let mut y = vec![1.0; tokens * self.hidden()];
        let layer = Experts {
            gate: self.gate.view(),
            up: self.up.view(),
            down: self.down.view(),
            count: self.count,
            limit: LIMIT,
        };
        let n = tokens * used;
        experts(&layer, &self.ids[..n], &self.weights[..n], &x, &mut y);
        y
    }

    /// 1 plus every expert's output, in f32 on the activations that kernels see.
    fn expected(&self) -> Vec<f32> {
        let (hidden, width) = (self.hidden(), self.down.cols);
        let used = self.ids.len() * hidden / self.x.len();
        let [gate, up, down] = [&self.gate, &self.up, &self.down].map(Matrix::values);
        let mut y = vec![1.0; self.x.len()];
        for (i, (&e, &weight)) in self.ids.iter().zip(&self.weights).enumerate() {
            let (e, token) = (e as usize, i / used);
            let x = &self.x[token * hidden..][..hidden];
            let first = |w: &[f32], ty| {
                let x = as_seen(ty, x, hidden);
                products(&w[e * width * hidden..][..width * hidden], &x, hidden)
            };
            let gate = first(&gate, self.gate.ty);
            let up = first(&up, self.up.ty);
            let activation = |((gate, _), (up, _)): (&(f64, f64), &(f64, f64))| {
                let gate = gate.min(f64::from(LIMIT));
                let up = up.clamp(f64::from(-LIMIT), f64::from(LIMIT));
                (gate / (1.0 + (-gate).exp()) * up) as f32 * weight
            };
            let activations: Vec<f32> = gate.iter().zip(&up).map(activation).collect();
            let activations = as_seen(self.down.ty, &activations, width);
            let down = &down[e * hidden * width..][..hidden * width];
            for (y, (product, _)) in
                y[token * hidden..].iter_mut().zip(products(down, &activations, width))
            {
                *y += product as f32;
            }
        }
        y
    }
}

/// Types of gate, up and down as files mix them.
const MIXES: [[TensorType; 3]; 5] = [
    [TensorType::IQ2_XXS, TensorType::IQ2_XXS, TensorType::Q2_K],
    [TensorType::Q4_K, TensorType::Q4_K, TensorType::Q4_K],
    [TensorType::MXFP4, TensorType::MXFP4, TensorType::MXFP4],
    [TensorType::Q8_0, TensorType::F16, TensorType::BF16],
    [TensorType::F32, TensorType::F32, TensorType::Q8_0],
];

#[test]
fn experts_match_a_loop_over_tokens() {
    for (seed, types) in MIXES.into_iter().enumerate() {
        for (tokens, decoding) in [(1, 1), (3, 3), (40, 0), (25, 4)] {
            let routed = Routed::random(types, [7, 3, 256, 512], tokens, seed as u64);
            let expected = routed.expected();
            let size = (expected.iter().map(|y| y * y).sum::<f32>() / expected.len() as f32).sqrt();
            for isa in every_isa() {
                for (i, (y, e)) in
                    routed.run(isa, tokens, decoding).iter().zip(&expected).enumerate()
                {
                    // Hidden activations on the edge between two quants may
                    // round the other way, each by 1/127 of its group's largest.
                    assert!(
                        (y - e).abs() < 1e-2 * size,
                        "{} {types:?}, {tokens} tokens: output {i} is {y}, expected {e}",
                        isa.name(),
                    );
                }
            }
        }
    }
}

#[test]
fn experts_give_a_token_the_same_bits_in_any_company() {
    let pools = [1, 2].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
    for types in MIXES {
        let routed = Routed::random(types, [5, 2, 256, 256], 40, 11);
        for isa in every_isa() {
            for decoding in [true, false] {
                let run = |n| routed.run(isa, n, if decoding { n } else { 0 });
                let all = run(40);
                for n in [1, 5, 9, 33] {
                    for pool in &pools {
                        let y = pool.install(|| run(n));
                        assert!(y == all[..y.len()], "{} {types:?}, {n} tokens", isa.name());
                    }
                }
            }
        }
    }
}

/// More pairs than are held at once.
#[test]
fn many_tokens_go_through_experts_in_batches() {
    let types = [TensorType::F32, TensorType::F32, TensorType::F32];
    let routed = Routed::random(types, [3, 2, 8, 8], 5000, 12);
    let expected = routed.expected();
    for isa in every_isa() {
        for (y, e) in routed.run(isa, 5000, 0).iter().zip(&expected) {
            assert!((y - e).abs() < 1e-4 * (1.0 + e.abs()), "{y}, expected {e}");
        }
    }
}
