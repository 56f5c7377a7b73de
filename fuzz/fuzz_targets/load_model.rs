//! Loads arbitrary bytes as a model, with its tokenizer.
#![no_main]

use ds4_model::{Model, config::Config};
use ds4_text::{profile::Profile, tokenizer::Tokenizer};
use gguf::GgufFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = GgufFile::from_vec("fuzz", bytes.to_vec()) else { return };
    let _ = Config::from_metadata(&file);
    let _ = Profile::of(&file);
    let tokens = file.metadata().strings("tokenizer.ggml.tokens").map_or(0, <[String]>::len);
    if let Ok(tokenizer) = Tokenizer::from_gguf(&file, tokens) {
        let _ = tokenizer.encode("Hi, 123 wörld\n<think>");
    }
    let _ = Model::from_gguf(file);
});
