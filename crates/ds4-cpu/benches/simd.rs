//! Speed of every SIMD routine: bytes of weights and multiply-adds ("items") per
//! second. Before that, the memory bandwidth of the machine, and the share of it
//! at which products with one token read their weights.
//!
//! `cargo bench -p ds4-cpu --bench simd -- decode` runs the routines whose names
//! contain a word.

#[path = "../tests/simd_support/mod.rs"]
mod simd_support;

use std::{
    fmt,
    time::{Duration, Instant},
};

use divan::{
    Bencher, black_box,
    counter::{BytesCount, ItemsCount},
};
use ds4_cpu::simd::{Experts, Input, Isa, attend, experts, index_scores, matmul};
use ds4_model::config::{HEAD_DIM, INDEX_DIM};
use gguf::TensorType;
use rayon::{ThreadPool, prelude::*};
use simd_support::{Matrix, Random, TYPES};

/// Flash's hidden size, the width of most matrices.
const HIDDEN: usize = 4096;
/// Flash's expert width.
const EXPERT_WIDTH: usize = 2048;
/// Weights of a decoding benchmark: several times any cache.
const BYTES: usize = 128 << 20;

fn main() {
    print_shares();
    divan::main();
}

/// What is measured, with what.
struct Case {
    isa: Isa,
    threads: usize,
    ty: TensorType,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} × {} {}", self.isa.name(), self.threads, self.ty)
    }
}

impl Case {
    fn pool(&self) -> ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(self.threads).build().expect("threads")
    }
}

/// Every instruction set with one and with all threads.
fn cases_of(types: &[TensorType]) -> Vec<Case> {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    let mut cases = Vec::new();
    for isa in Isa::available() {
        for threads in if all == 1 { vec![1] } else { vec![1, all] } {
            cases.extend(types.iter().map(|&ty| Case { isa, threads, ty }));
        }
    }
    cases
}

fn products() -> Vec<Case> {
    cases_of(&TYPES)
}

/// For routines that have no type.
fn plain() -> Vec<Case> {
    cases_of(&[TensorType::F32])
}

/// Experts as the q2 recipe has them; the case names the type of gate and up.
fn q2_experts() -> Vec<Case> {
    cases_of(&[TensorType::IQ2_XXS])
}

/// A matrix of [`BYTES`].
fn large_matrix(ty: TensorType) -> Matrix {
    let rows = BYTES / ty.row_bytes(HIDDEN).expect("whole blocks");
    Matrix::random(ty, rows, HIDDEN, &mut Random(1))
}

/// One token times a matrix read from memory.
#[divan::bench(args = products(), max_time = 0.5)]
fn decode(bencher: Bencher, case: &Case) {
    let w = large_matrix(case.ty);
    let x = Random(2).normals(HIDDEN);
    let mut y = vec![0.0; w.rows];
    let pool = case.pool();
    bencher
        .counter(BytesCount::new(w.bytes.len()))
        .counter(ItemsCount::new(w.rows * HIDDEN))
        .bench_local(|| {
            pool.install(|| matmul(w.view(), &Input::new(case.isa, &x, HIDDEN, 1), &mut y))
        });
}

/// A chunk of a prompt times a matrix.
#[divan::bench(args = products(), max_time = 0.5)]
fn prefill(bencher: Bencher, case: &Case) {
    let (rows, tokens) = (1024, 256);
    let w = Matrix::random(case.ty, rows, HIDDEN, &mut Random(1));
    let x = Random(2).normals(tokens * HIDDEN);
    let mut y = vec![0.0; tokens * rows];
    let pool = case.pool();
    bencher.counter(ItemsCount::new(tokens * rows * HIDDEN)).bench_local(|| {
        pool.install(|| matmul(w.view(), &Input::new(case.isa, &x, HIDDEN, 0), &mut y))
    });
}

/// A layer's experts, fewer than the model has: six for each token.
struct Layer {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    x: Vec<f32>,
    ids: Vec<u32>,
}

const EXPERTS: usize = 24;

impl Layer {
    fn random(tokens: usize) -> Layer {
        let mut random = Random(3);
        let mut matrix = |ty, rows, cols| Matrix::random(ty, EXPERTS * rows, cols, &mut random);
        Layer {
            gate: matrix(TensorType::IQ2_XXS, EXPERT_WIDTH, HIDDEN),
            up: matrix(TensorType::IQ2_XXS, EXPERT_WIDTH, HIDDEN),
            down: matrix(TensorType::Q2_K, HIDDEN, EXPERT_WIDTH),
            x: Random(4).normals(tokens * HIDDEN).iter().map(|x| 0.01 * x).collect(),
            ids: (0..tokens * 6).map(|i| ((i / 6 + i % 6 * 4) % EXPERTS) as u32).collect(),
        }
    }

    fn bytes_of(&self, experts: usize) -> usize {
        (self.gate.bytes.len() + self.up.bytes.len() + self.down.bytes.len()) / EXPERTS * experts
    }

    /// `shift` chooses other experts, so that weights come from memory.
    fn run(&self, isa: Isa, decoding: usize, shift: u32, y: &mut [f32]) {
        let layer = Experts {
            gate: self.gate.view(),
            up: self.up.view(),
            down: self.down.view(),
            count: EXPERTS,
            limit: 10.0,
        };
        let ids: Vec<u32> = self.ids.iter().map(|id| (id + shift) % EXPERTS as u32).collect();
        let weights = vec![0.25; ids.len()];
        experts(&layer, &ids, &weights, &Input::new(isa, &self.x, HIDDEN, decoding), y);
    }
}

/// Six experts for one token.
#[divan::bench(args = q2_experts(), max_time = 0.5)]
fn experts_decode(bencher: Bencher, case: &Case) {
    let layer = Layer::random(1);
    let mut y = vec![0.0; HIDDEN];
    let pool = case.pool();
    let mut shift = 0;
    bencher
        .counter(BytesCount::new(layer.bytes_of(6)))
        .counter(ItemsCount::new(6 * 3 * HIDDEN * EXPERT_WIDTH))
        .bench_local(|| {
            shift += 1;
            pool.install(|| layer.run(case.isa, 1, shift, &mut y));
        });
}

/// Twelve tokens for each expert, as a chunk of 512 gives Flash's 256.
#[divan::bench(args = q2_experts(), max_time = 1)]
fn experts_prefill(bencher: Bencher, case: &Case) {
    let tokens = 12 * EXPERTS / 6;
    let layer = Layer::random(tokens);
    let mut y = vec![0.0; tokens * HIDDEN];
    let pool = case.pool();
    bencher
        .counter(BytesCount::new(layer.bytes_of(EXPERTS)))
        .counter(ItemsCount::new(tokens * 6 * 3 * HIDDEN * EXPERT_WIDTH))
        .bench_local(|| pool.install(|| layer.run(case.isa, 0, 0, &mut y)));
}

const HEADS: usize = 64;

/// One query over 640 rows: a full window and as many rows as the indexer picks.
#[divan::bench(args = plain(), max_time = 0.3)]
fn attention(bencher: Bencher, case: &Case) {
    let rows = 640;
    let mut random = Random(5);
    let (q, kv) = (random.normals(HEADS * HEAD_DIM), random.normals(rows * HEAD_DIM));
    let (mut heads, sinks) = (q.clone(), vec![0.0; HEADS]);
    let pool = case.pool();
    bencher
        .counter(BytesCount::new(4 * kv.len()))
        .counter(ItemsCount::new(2 * HEADS * kv.len()))
        .bench_local(|| {
            heads.copy_from_slice(&q);
            // Threads share the heads.
            let share = HEADS.div_ceil(case.threads);
            pool.install(|| {
                heads.par_chunks_mut(share * HEAD_DIM).zip(sinks.par_chunks(share)).for_each(
                    |(heads, sinks)| attend(case.isa, heads, &[&kv], sinks, 0.04, &mut Vec::new()),
                );
            });
        });
}

/// One query's index scores at a context of 32,768 tokens.
#[divan::bench(args = plain(), max_time = 0.3)]
fn indexer(bencher: Bencher, case: &Case) {
    let keys = 8192;
    let mut random = Random(6);
    let (q, k) = (random.normals(HEADS * INDEX_DIM), random.normals(keys * INDEX_DIM));
    let (weights, mut scores) = (random.normals(HEADS), vec![0.0; keys]);
    let pool = case.pool();
    let share = keys.div_ceil(case.threads);
    bencher
        .counter(BytesCount::new(4 * k.len()))
        .counter(ItemsCount::new(HEADS * k.len()))
        .bench_local(|| {
            pool.install(|| {
                scores
                    .par_chunks_mut(share)
                    .zip(k.par_chunks(share * INDEX_DIM))
                    .for_each(|(scores, keys)| index_scores(case.isa, &q, keys, &weights, scores));
            });
        });
}

/// Prints at what share of the memory's bandwidth decoding reads weights.
fn print_shares() {
    println!("share of the bandwidth of plain reads at which one token reads its weights:");
    for case in products() {
        let pool = case.pool();
        let w = large_matrix(case.ty);
        let x = Random(2).normals(HIDDEN);
        let mut y = vec![0.0; w.rows];
        let read = rate(w.bytes.len(), || pool.install(|| read_all(&w.bytes)));
        let decode = rate(w.bytes.len(), || {
            pool.install(|| matmul(w.view(), &Input::new(case.isa, &x, HIDDEN, 1), &mut y));
        });
        let share = 100.0 * decode / read;
        println!("{:<20} {decode:5.1} of {read:5.1} GB/s, {share:3.0} %", case.to_string());
    }
    println!();
}

/// GB/s of the fastest of many runs.
fn rate(bytes: usize, mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed() < Duration::from_millis(300) {
        let run_start = Instant::now();
        run();
        best = best.min(run_start.elapsed().as_secs_f64());
    }
    bytes as f64 / best / 1e9
}

/// Reads every byte, on all threads of the pool.
fn read_all(bytes: &[u8]) {
    let combine = |bytes: &[u8]| {
        let mut sums = [0u64; 16];
        for line in bytes.as_chunks::<128>().0 {
            for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
                *sum ^= u64::from_ne_bytes(*word);
            }
        }
        sums.into_iter().fold(0, |all, sum| all ^ sum)
    };
    black_box(bytes.par_chunks(1 << 20).map(combine).reduce(|| 0, |a, b| a ^ b));
}
