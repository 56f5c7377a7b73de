//! Readers of what clients of a server send, and of what a server kept.

use std::sync::{Arc, LazyLock};

use ds4_engine::{Engine, Phase, Wanted, Work};
use ds4_model::config::Config;
use ds4_runtime::grammar::Grammars;
use ds4_text::{
    request::{self, chat, completions, messages, responses},
    tokenizer::Tokenizer,
};
use gguf::GgufFile;

use crate::models;

static NANO: &[u8] = include_bytes!("../../../models/nano/nano.gguf");

/// Reads the bytes as a Chat Completions request, as the server does.
pub(crate) fn chat_request(bytes: &[u8]) -> bool {
    request::parse(bytes).and_then(chat::read).is_ok()
}

/// Reads the bytes as a Messages request, as the server does.
pub(crate) fn messages_request(bytes: &[u8]) -> bool {
    request::parse(bytes).and_then(messages::read).is_ok()
}

/// Reads the bytes as a Responses request, as the server does.
pub(crate) fn responses_request(bytes: &[u8]) -> bool {
    request::parse(bytes).and_then(responses::read).is_ok()
}

/// Reads the bytes as a Completions request, as the server does.
pub(crate) fn completions_request(bytes: &[u8]) -> bool {
    request::parse(bytes).and_then(completions::read).is_ok()
}

/// Compiles the bytes as the JSON schema of an answer.
pub(crate) fn json_schema(bytes: &[u8]) -> bool {
    static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| {
        let file = GgufFile::from_static("nano", NANO).expect("nano can be read");
        let config = Config::from_metadata(&file).expect("it has a shape");
        let tokenizer = Tokenizer::from_gguf(&file, config.vocab).expect("it has a tokenizer");
        Grammars::new(Arc::new(tokenizer)).expect("it suits grammars")
    });
    serde_json::from_slice(bytes).is_ok_and(|schema| GRAMMARS.json_schema(&schema).is_ok())
}

/// Restores the bytes as a session, and goes on with it.
pub(crate) fn snapshot(bytes: &[u8]) -> bool {
    static ENGINE: LazyLock<Engine> = LazyLock::new(models::engine);
    let engine = &*ENGINE;
    let Ok(mut session) = engine.restore(bytes) else { return false };
    assert!(engine.snapshot(&session).expect("a restored session can be saved") == bytes);
    let (phase, wanted) = (Phase::Decode, &[Wanted::Argmax]);
    let work = Work { session: &mut session, tokens: &[1], phase, wanted };
    // Damaged values may make unusable logits; that is an error and no panic.
    let _ = engine.step(&mut [work]);
    true
}
