//! Requests under load on the device.

mod support;

/// Long tests: an hour on the emulator.
mod on_a_gpu {
    use std::sync::Arc;

    use ds4_conformance::load::Load;
    use ds4_cuda::device::Device;
    use ds4_engine::rows::CacheRounding;
    use ds4_model::Model;
    use ds4_text::tokenizer::Tokenizer;

    use super::support::{cuda, tiny_file};

    #[test]
    #[ignore = "needs a CUDA device that is a GPU"]
    fn a_greedy_request_has_the_same_answer_under_any_load() {
        let model = Arc::new(Model::open(&tiny_file("tiny-b-q2.gguf")).unwrap());
        let tokenizer = Tokenizer::from_gguf(&model.files()[0], model.config.vocab).unwrap();
        let engine = cuda(&model, CacheRounding::On);
        let engine = || engine.clone();
        Load { engine: &engine, tokenizer: Arc::new(tokenizer), requests: 1000 }.check();
    }

    /// Memory is left for a dozen sessions, beside the share that the backend keeps for the driver.
    #[test]
    #[ignore = "needs a CUDA device that is a GPU"]
    fn requests_are_admitted_against_the_memory_that_there_is() {
        let model = Arc::new(Model::open(&tiny_file("tiny-b-q2.gguf")).unwrap());
        let tokenizer = Tokenizer::from_gguf(&model.files()[0], model.config.vocab).unwrap();
        let engine = cuda(&model, CacheRounding::On);
        engine.warm_up(32).unwrap();
        let report = engine.backend().memory(1024).unwrap();
        let sessions = 12 * engine.backend().session_bytes(300);
        let device = Device::open(0).unwrap();
        let taken = report.left.unwrap() - sessions;
        let _taken = device.alloc::<u8>(taken as usize).unwrap();
        let engine = || engine.clone();
        Load { engine: &engine, tokenizer: Arc::new(tokenizer), requests: 300 }.check_admission();
    }
}
