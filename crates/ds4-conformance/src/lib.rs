//! What tests of several crates share: golden logits, divergence, a toy backend, and the suite
//! that every backend passes. Never part of the program.
//!
//! Functions here panic when a check fails, as tests do.

#![forbid(unsafe_code)]

pub mod divergence;
pub mod golden;
pub mod load;
pub mod suite;
pub mod toy;

use std::{ops::Range, path::PathBuf, sync::Arc};

use ds4_engine::{Engine, Phase, Session, StepOutput, TokenId, Wanted, Work};
use ds4_model::{
    Model,
    config::Config,
    synth::{self, Recipe},
};

/// A file in models/tiny.
pub fn tiny_file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny").join(name)
}

/// A model with one layer of every kind, whose indexer selects from position 64 on.
pub fn small_model(recipe: Recipe) -> Arc<Model> {
    small_model_of(0..3, recipe)
}

/// Some layers of the small model: 0 has a window alone, 1 an indexer, 2 neither.
pub fn small_model_of(layers: Range<usize>, recipe: Recipe) -> Arc<Model> {
    let tiny = synth::tiny();
    let config = Config { layers: tiny.layers[layers].into(), context_length: 4096, ..tiny };
    Arc::new(Model::dummy("small", &config, recipe, 7).expect("a model"))
}

/// Random tokens of the small model.
pub fn random_tokens(seed: u64, len: usize) -> Vec<TokenId> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| random.u32(0..synth::tiny().vocab as u32)).collect()
}

/// Chunks under this length are decoded by [`feed`], longer ones prefilled.
const PREFILL_MIN: usize = 8;

/// The phase of a chunk of `len` tokens in [`feed`].
pub fn phase_of(len: usize) -> Phase {
    if len < PREFILL_MIN { Phase::Decode } else { Phase::Prefill }
}

/// Appends `tokens` in chunks; returns the logits after every one of them.
pub fn feed(
    engine: &Engine,
    session: &mut Session,
    tokens: &[TokenId],
    chunk: usize,
) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    let phase = phase_of(chunk.min(tokens.len()));
    for tokens in tokens.chunks(chunk) {
        let wanted = vec![Wanted::Logits; tokens.len()];
        let work = Work { session, tokens, phase, wanted: &wanted };
        let output = engine.step(&mut [work]).expect("a step").remove(0);
        rows.extend(output.logits().map(<[f32]>::to_vec));
    }
    rows
}

/// A session after `tokens` as a prompt, 64 at a time.
pub fn session_after(engine: &Engine, tokens: &[TokenId]) -> Session {
    let mut session = engine.new_session().expect("a session");
    for tokens in tokens.chunks(64) {
        prefill(engine, &mut session, tokens, &[]);
    }
    session
}

/// Appends a piece of a prompt in one step.
pub fn prefill(
    engine: &Engine,
    session: &mut Session,
    tokens: &[TokenId],
    wanted: &[Wanted],
) -> StepOutput {
    let work = Work { session, tokens, phase: Phase::Prefill, wanted };
    engine.step(&mut [work]).expect("a step").remove(0)
}
