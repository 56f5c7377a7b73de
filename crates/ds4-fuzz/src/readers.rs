//! Readers of files.

use std::{fs, hint::black_box, path::PathBuf};

use ds4_convert::{ImportanceMatrix, ModelMetadata, Options, Plan, Recipe, Source};
use ds4_model::{Model, config::Config};
use ds4_text::{profile::Profile, tokenizer::Tokenizer};
use gguf::{GgufFile, dequantize_row};

use crate::models;

/// Opens the bytes as a GGUF file and touches everything in it.
pub(crate) fn gguf(bytes: &[u8]) -> bool {
    let file = match GgufFile::from_vec("fuzz", bytes.to_vec()) {
        Ok(file) => file,
        Err(error) => return refused(&error.to_string()),
    };
    let metadata = file.metadata();
    for (key, value) in metadata.iter() {
        let _ = black_box(metadata.usize(key));
        let _ = black_box(metadata.f32_array(key));
        let _ = black_box(metadata.strings(key));
        black_box(value.to_string());
    }
    for tensor in file.tensors() {
        // The first row; a longer one would only repeat what its first blocks do.
        let block = tensor.ty.block_len();
        let row = (tensor.dims[0] as usize).min(4096 / block * block);
        let Some(size) = tensor.ty.row_bytes(row) else { continue };
        let mut out = vec![0.0; row];
        let _ = dequantize_row(tensor.ty, &file.tensor_bytes(tensor)[..size], &mut out);
    }
    true
}

/// Loads the bytes as a model, with its tokenizer.
pub(crate) fn model(bytes: &[u8]) -> bool {
    let Ok(file) = GgufFile::from_vec("fuzz", bytes.to_vec()) else { return false };
    let _ = Config::from_metadata(&file);
    let _ = Profile::of(&file);
    let tokens = file.metadata().strings("tokenizer.ggml.tokens").map_or(0, <[String]>::len);
    if let Ok(tokenizer) = Tokenizer::from_gguf(&file, tokens) {
        let _ = tokenizer.encode("Hi, 123 wörld\n<think>");
    }
    Model::from_gguf(file).is_ok()
}

/// Plans the conversion of a checkpoint whose one file has these bytes.
pub(crate) fn safetensors(bytes: &[u8]) -> bool {
    let path = file_of("model.safetensors", bytes);
    let source = match Source::open(std::slice::from_ref(&path.0)) {
        Ok(source) => source,
        Err(error) => return refused(&error.to_string()),
    };
    let template = models::file(&models::smallest()).expect("the smallest model can be written");
    let template = GgufFile::from_vec("template", template).expect("and read");
    let metadata = ModelMetadata::from_gguf(&template).expect("and converted");
    let options = Options { recipe: Recipe::Q8, overrides: Vec::new(), importance: None };
    Plan::new("fuzz", &source, &metadata, options)
        .map_or_else(|error| refused(&error.to_string()), |_| true)
}

/// Reads the bytes as an importance matrix in either format, and what is written of it.
pub(crate) fn imatrix(bytes: &[u8]) -> bool {
    let path = file_of("imatrix.dat", bytes);
    let matrix = match ImportanceMatrix::read(&path.0) {
        Ok(matrix) => matrix,
        Err(error) => return refused(&error.to_string()),
    };
    let again = file_of("again.dat", &matrix.to_dat());
    let again = ImportanceMatrix::read(&again.0).expect("what was written can be read");
    assert_eq!(again.len(), matrix.len());
    true
}

/// A file for readers that take a path, and the folder that goes with it.
struct Written(PathBuf, #[expect(dead_code, reason = "removes the folder")] tempfile::TempDir);

fn file_of(name: &str, bytes: &[u8]) -> Written {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join(name);
    fs::write(&path, bytes).expect("a temporary file");
    Written(path, folder)
}

/// False. The message shows what a file says; that must not take over a terminal.
fn refused(message: &str) -> bool {
    assert!(message.len() < 4096 && !message.chars().any(char::is_control), "{message:?}");
    false
}
