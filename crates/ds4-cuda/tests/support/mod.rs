//! A device to test on, models for it, and what tests do with sessions.

#![allow(dead_code, unused_imports, reason = "each test file uses a part")]

#[path = "../../../ds4-cpu/tests/common/mod.rs"]
mod common;

use std::{ops::Range, sync::Arc};

pub use common::{CpuEngine, Distance, Golden, feed, golden, tiny_file};
use ds4_cpu::{CpuBackend, Kernels};
use ds4_cuda::{CudaBackend, Options};
use ds4_engine::{
    Backend, Engine, Logits, LogitsWanted, Session, Work, rows::CacheRounding, sampling,
};
use ds4_model::{
    Model,
    config::Config,
    synth::{self, Recipe},
};

pub type CudaEngine = Engine<CudaBackend>;
pub type CudaSession = Session<CudaBackend>;

/// `model` on the device. Tests that call it are ignored unless they are asked for.
pub fn cuda(model: &Arc<Model>, rounding: CacheRounding) -> CudaEngine {
    let options = Options { device: None, cache_rounding: rounding, context: 1024 };
    match CudaBackend::new(model.clone(), options, |_, _| {}) {
        Ok(backend) => Engine::new(backend),
        Err(error) => panic!("{error}"),
    }
}

/// `model` on the CPU, computed plainly.
pub fn cpu(model: &Arc<Model>, rounding: CacheRounding) -> CpuEngine {
    Engine::new(CpuBackend::new(model.clone(), Kernels::Reference, rounding))
}

/// Whether the device is a GPU. The emulator gets smaller sizes, which take it seconds, not minutes.
pub fn is_real(engine: &CudaEngine) -> bool {
    !engine.backend().device_name().contains("emulator")
}

/// A model with one layer of every kind, whose indexer chooses from position 64 on.
pub fn small_model(recipe: Recipe) -> Arc<Model> {
    small_model_of(0..3, recipe)
}

/// Some layers of the small model: 0 has a window alone, 1 an indexer, 2 neither.
pub fn small_model_of(layers: Range<usize>, recipe: Recipe) -> Arc<Model> {
    let tiny = synth::tiny();
    let config = Config { layers: tiny.layers[layers].into(), context_length: 4096, ..tiny };
    Arc::new(Model::dummy("small", &config, recipe, 7).unwrap())
}

/// Random tokens of the small model.
pub fn random_tokens(seed: u64, len: usize) -> Vec<u32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| random.u32(0..synth::tiny().vocab as u32)).collect()
}

/// One step: `tokens[i]` to `sessions[i]`.
pub fn step<B: Backend>(
    engine: &Engine<B>,
    sessions: &mut [Session<B>],
    tokens: &[&[u32]],
    logits: LogitsWanted,
) -> Vec<Logits> {
    assert_eq!(sessions.len(), tokens.len());
    let work = sessions.iter_mut().zip(tokens);
    let mut work: Vec<_> = work.map(|(session, tokens)| Work { session, tokens, logits }).collect();
    engine.step(&mut work).unwrap()
}

/// A session that has had `tokens`, 64 at a time.
pub fn session_after<B: Backend>(engine: &Engine<B>, tokens: &[u32]) -> Session<B> {
    let mut session = engine.new_session().unwrap();
    for tokens in tokens.chunks(64) {
        let logits = LogitsWanted::None;
        engine.step(&mut [Work { session: &mut session, tokens, logits }]).unwrap();
    }
    session
}

/// How far rows of logits are from those they should be.
#[derive(Debug)]
pub struct Difference {
    pub kl: f64,
    pub top1: f64,
    pub max_abs: f32,
}

impl Difference {
    pub fn of(rows: &[Vec<f32>], expected: &[Vec<f32>]) -> Difference {
        assert_eq!(rows.len(), expected.len());
        let n = rows.len() as f64;
        let pairs = || rows.iter().zip(expected);
        let apart = |(a, b): (&Vec<f32>, &Vec<f32>)| {
            assert!(a.iter().all(|x| x.is_finite()));
            a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        let agree = pairs().filter(|(a, b)| sampling::argmax(a) == sampling::argmax(b)).count();
        Difference {
            kl: pairs().map(|(row, expected)| divergence(expected, row)).sum::<f64>() / n,
            top1: agree as f64 / n,
            max_abs: pairs().map(apart).fold(0.0, f32::max),
        }
    }
}

fn divergence(expected: &[f32], row: &[f32]) -> f64 {
    let (total, own) = (sampling::log_sum_exp(expected), sampling::log_sum_exp(row));
    let terms = expected.iter().zip(row).map(|(&e, &x)| {
        let (e, x) = (f64::from(e) - total, f64::from(x) - own);
        e.exp() * (e - x)
    });
    terms.sum()
}
