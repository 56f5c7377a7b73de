//! What rounded activations cost a model that was trained: how well it predicts a text.

mod support;

use std::{fs, ops::ControlFlow, path::PathBuf, sync::Arc};

use ds4_engine::{Engine, rows::CacheRounding};
use ds4_eval::perplexity::{Reading, Text, log_probability, read};
use ds4_model::Model;
use ds4_text::tokenizer::Tokenizer;
use support::{cpu, cuda};

const ROUNDINGS: [CacheRounding; 2] = [CacheRounding::On, CacheRounding::Off];

fn nano_file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/nano").join(name)
}

fn nano() -> Arc<Model> {
    Arc::new(Model::open(&nano_file("nano.gguf")).unwrap())
}

/// The first tokens of the text that nano was not trained on.
fn held_out(model: &Model, tokens: usize) -> Text {
    let tokenizer = Tokenizer::from_gguf(&model.files()[0], model.config.vocab).unwrap();
    let text = fs::read_to_string(nano_file("held-out.txt")).unwrap();
    let all = tokenizer.encode_with_markers(&text).unwrap();
    Text::new(&all[..tokens], Some(tokenizer.special().bos), tokens).unwrap()
}

/// Log-probabilities of all scored tokens.
fn log_probabilities(engine: &Engine, text: &Text, reading: Reading) -> Vec<f64> {
    let mut all = Vec::new();
    let score = |token, logits: &[f32]| {
        all.push(log_probability(logits, token)?);
        Ok(())
    };
    read(engine, text, reading, score, |_| ControlFlow::Continue(())).unwrap();
    all
}

/// Most that single log-probabilities may be off by, as their root mean square. Rounding to halves
/// changes logits of several units by parts of a thousand; with a rounded cache some values fall to
/// the code beside their own, and the CPU's two ways of computing are a hundredth apart, too.
fn most_off(rounding: CacheRounding) -> f64 {
    match rounding {
        CacheRounding::On => 1.5e-2,
        CacheRounding::Off => 3e-3,
    }
}

/// The mean log-probability is the logarithm of the perplexity: what single tokens are off by
/// cancels there, but for what chance leaves, which is seldom more than four standard errors.
fn compare(model: &Arc<Model>, engine: &Engine, tokens: usize, reading: Reading) {
    let rounding = engine.layout().rounding();
    let text = held_out(model, tokens);
    let found = log_probabilities(engine, &text, reading);
    let expected = log_probabilities(&cpu(model, rounding), &text, reading);
    assert_eq!((found.len(), expected.len()), (text.scored(), text.scored()));
    let n = expected.len() as f64;
    let off: Vec<f64> = found.iter().zip(&expected).map(|(x, y)| x - y).collect();
    let each = (off.iter().map(|x| x * x).sum::<f64>() / n).sqrt();
    let mean = off.iter().sum::<f64>() / n;
    let what = format!("{rounding:?}, {reading:?}, {n} tokens: off by {mean:.1e}, each {each:.1e}");
    println!("{what}");
    let most = most_off(rounding);
    assert!(each <= most && mean.abs() <= 4.0 * most / n.sqrt(), "{what}");
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn nanos_perplexity_is_that_of_the_cpu() {
    let model = nano();
    for rounding in ROUNDINGS {
        let engine = cuda(&model, rounding);
        compare(&model, &engine, 192, Reading::Prefill);
    }
}

/// Long tests: minutes on the emulator.
mod on_a_gpu {
    use super::*;

    #[test]
    #[ignore = "needs a CUDA device that is a GPU"]
    fn nanos_perplexity_in_a_longer_text_and_by_the_token_is_that_of_the_cpu() {
        let model = nano();
        for rounding in ROUNDINGS {
            let engine = cuda(&model, rounding);
            compare(&model, &engine, 1024, Reading::Prefill);
            compare(&model, &engine, 256, Reading::Decode);
        }
    }
}
