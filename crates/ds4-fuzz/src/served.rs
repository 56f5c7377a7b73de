//! Readers of what clients of a server send, and of what a server kept.

use std::sync::{Arc, LazyLock};

use ds4_engine::{Engine, Phase, Wanted, Work};
use ds4_model::{chat::ChatRequest, config::Config, tokenizer::Tokenizer};
use ds4_runtime::grammar::Grammars;
use gguf::GgufFile;

use crate::models;

static NANO: &[u8] = include_bytes!("../../../models/nano/nano.gguf");

/// Reads the bytes as a chat request.
pub(crate) fn chat_request(bytes: &[u8]) {
    if let Ok(request) = ChatRequest::from_json(bytes) {
        let _ = request.convert();
    }
}

/// Compiles the bytes as the JSON schema of an answer.
pub(crate) fn json_schema(bytes: &[u8]) {
    static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| {
        let file = GgufFile::from_static("nano", NANO).expect("nano can be read");
        let config = Config::from_metadata(&file).expect("it has a shape");
        let tokenizer = Tokenizer::from_gguf(&file, config.vocab).expect("it has a tokenizer");
        Grammars::new(Arc::new(tokenizer)).expect("it suits grammars")
    });
    if let Ok(schema) = serde_json::from_slice(bytes) {
        let _ = GRAMMARS.json_schema(&schema);
    }
}

/// Restores the bytes as a session, and goes on with it.
pub(crate) fn snapshot(bytes: &[u8]) {
    static ENGINE: LazyLock<Engine> = LazyLock::new(models::engine);
    let engine = &*ENGINE;
    let Ok(mut session) = engine.restore(bytes) else { return };
    assert!(engine.snapshot(&session).expect("a restored session can be saved") == bytes);
    let (phase, wanted) = (Phase::Decode, &[Wanted::Argmax]);
    let work = Work { session: &mut session, tokens: &[1], phase, wanted };
    // Damaged values may make unusable logits; that is an error and no panic.
    let _ = engine.step(&mut [work]);
}
