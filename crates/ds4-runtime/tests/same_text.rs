//! A greedy request has the same answer under any load, on the CPU's fast kernels.

use std::sync::Arc;

use ds4_conformance::{load::Load, tiny_file};
use ds4_cpu::{CpuBackend, Kernels};
use ds4_engine::{Engine, rows::CacheRounding};
use ds4_model::Model;
use ds4_text::tokenizer::Tokenizer;

#[test]
fn a_greedy_request_has_the_same_answer_under_any_load() {
    let model = Arc::new(Model::open(&tiny_file("tiny-b-q2.gguf")).unwrap());
    let tokenizer = Tokenizer::from_gguf(&model.files()[0], model.config.vocab).unwrap();
    let engine =
        || Engine::new(CpuBackend::new(model.clone(), Kernels::detect(), CacheRounding::On));
    Load { engine: &engine, tokenizer: Arc::new(tokenizer), requests: 1000 }.check();
}
