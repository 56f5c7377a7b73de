//! A device to test on, models for it, and what tests do with sessions.

#![allow(dead_code, unused_imports, reason = "each test file uses a part")]

use std::sync::Arc;

pub use ds4_conformance::{
    divergence::Difference,
    feed,
    golden::{Distance, Golden, golden},
    phase_of, random_tokens, session_after, small_model, small_model_of, tiny_file,
};
use ds4_cpu::{CpuBackend, Kernels};
use ds4_cuda::{CudaBackend, Options};
use ds4_engine::{Engine, Session, StepOutput, Wanted, Work, rows::CacheRounding};
use ds4_model::Model;

/// `model` on the device, or none where there is no device.
pub fn cuda(model: &Arc<Model>, rounding: CacheRounding) -> Engine {
    let options = Options { device: None, cache_rounding: rounding, context: 1024 };
    match CudaBackend::new(model.clone(), options, |_, _| {}) {
        Ok(backend) => Engine::new(backend),
        Err(error) => panic!("{error}"),
    }
}

/// `model` on the CPU, computed plainly.
pub fn cpu(model: &Arc<Model>, rounding: CacheRounding) -> Engine {
    Engine::new(CpuBackend::new(model.clone(), Kernels::Reference, rounding))
}

/// Whether the device is one that has seconds, not minutes, for a long test.
pub fn is_real(engine: &Engine) -> bool {
    !engine.backend().device().contains("emulator")
}

/// The results that a work wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    None,
    Argmax,
    LastLogits,
    AllLogits,
}

impl Wants {
    /// For a work of `tokens` tokens.
    pub fn of(self, tokens: usize) -> Vec<Wanted> {
        match self {
            Wants::None => Vec::new(),
            Wants::Argmax => vec![Wanted::Argmax],
            Wants::LastLogits => vec![Wanted::Logits],
            Wants::AllLogits => vec![Wanted::Logits; tokens],
        }
    }
}

/// One step: `tokens[i]` to `sessions[i]`, which wants `wants(i)`.
pub fn step_with(
    engine: &Engine,
    sessions: &mut [Session],
    tokens: &[&[u32]],
    wants: impl Fn(usize) -> Wants,
) -> Vec<StepOutput> {
    assert_eq!(sessions.len(), tokens.len());
    let wanted: Vec<_> = tokens.iter().enumerate().map(|(i, t)| wants(i).of(t.len())).collect();
    let work = sessions.iter_mut().zip(tokens).zip(&wanted);
    let mut work: Vec<_> = work
        .map(|((session, tokens), wanted)| Work {
            session,
            tokens,
            phase: phase_of(tokens.len()),
            wanted,
        })
        .collect();
    engine.step(&mut work).unwrap()
}

/// The same, with one kind of result for all.
pub fn step(
    engine: &Engine,
    sessions: &mut [Session],
    tokens: &[&[u32]],
    wants: Wants,
) -> Vec<StepOutput> {
    step_with(engine, sessions, tokens, |_| wants)
}
