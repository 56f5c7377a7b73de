//! Every stage against the plain one, with the plain path's own inputs while it runs golden
//! sequences: so an error neither grows from stage to stage, nor hides behind a choice that fell
//! the other way.

mod checks;
mod closeness;
mod on_device;
mod side_by_side;

use std::sync::Arc;

use ds4_conformance::{golden::golden, tiny_file};
use ds4_engine::rows::CacheRounding;
use ds4_model::Model;

use crate::stages::attention_tests::harness::device;
use side_by_side::SideBySide;

/// Steps of two sessions, and the tokens that each adds: whole chunks, decoded rows beside chunks,
/// and decoded rows alone, those that close a compressor's windows and see more rows than the
/// indexer chooses among them. The model has a layer of each kind, and one with hashed experts.
const STEPS: [&[(usize, usize)]; 5] = [
    &[(0, 96), (1, 61)],
    &[(1, 3), (0, 104)],
    &[(1, 1), (0, 49)],
    &[(0, 7), (1, 5)],
    &[(0, 1), (1, 60)],
];

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn stages_equal_the_plain_ones_on_golden_sequences() {
    run("tiny-b-q2.safetensors", CacheRounding::Off);
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn stages_with_rounded_caches_equal_the_plain_ones_on_golden_sequences() {
    run("tiny-b-q2-qat.safetensors", CacheRounding::On);
}

fn run(file: &str, rounding: CacheRounding) {
    let device = device();
    let sequences = golden(file);
    let tokens = ["n257", "n130"].map(|name| {
        let golden = sequences.iter().find(|golden| golden.name == name);
        golden.expect("a sequence of that length").tokens.as_slice()
    });
    let model = Model::open(&tiny_file("tiny-b-q2.gguf")).expect("the model");
    let mut both = SideBySide::new(device, Arc::new(model), rounding, tokens.len());
    for step in STEPS {
        let work = step.iter().map(|&(session, len)| {
            let start = both.position(session);
            (session, &tokens[session][start..start + len])
        });
        both.step(&work.collect::<Vec<_>>());
    }
    for (session, tokens) in tokens.iter().enumerate() {
        assert_eq!(both.position(session), tokens.len());
    }
    both.report();
}
