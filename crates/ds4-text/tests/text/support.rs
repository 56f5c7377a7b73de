//! The two tokenizers that the tests use.

use std::{
    io::Read,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

use ds4_model::TokenId;
use ds4_text::tokenizer::Tokenizer;
use gguf::GgufFile;

/// Tokens of the real tokenizer.
pub const FULL_VOCAB: usize = 129_280;
/// Tokens of the tiny models' tokenizer.
pub const TINY_VOCAB: usize = 4096;

/// DeepSeek V4's tokenizer (see data/README.md).
pub fn full() -> Arc<Tokenizer> {
    static FULL: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
        Arc::new(Tokenizer::from_gguf(&full_gguf(), FULL_VOCAB).expect("the tokenizer loads"))
    });
    FULL.clone()
}

/// The file that [`full`] is made of.
pub fn full_gguf() -> GgufFile {
    let packed = read(&data("deepseek-v4-tokenizer.gguf.gz"));
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut bytes).expect("it is intact");
    GgufFile::from_vec("deepseek-v4-tokenizer.gguf", bytes).expect("it is a GGUF file")
}

/// The tokenizer in the tiny models: the first merges of the real one, other ids for markers.
pub fn tiny() -> Arc<Tokenizer> {
    static TINY: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny/tiny-b-q2.gguf");
        let file = GgufFile::open(&path).expect("the tiny model opens");
        Arc::new(Tokenizer::from_gguf(&file, TINY_VOCAB).expect("its tokenizer loads"))
    });
    TINY.clone()
}

/// Texts and their ids.
#[derive(serde::Deserialize)]
pub struct Sample {
    pub text: String,
    pub ids: Vec<TokenId>,
}

/// A file among the test data.
pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// The content of a file.
pub fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
