//! Conversions of whole checkpoints: values, logits, resuming, and what is refused.

mod fidelity;
mod generate;
mod refused;
mod resume;

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use ds4_convert::{
    ImportanceMatrix, ModelMetadata, Options, Outcome, Override, Plan, Recipe, Result, Source,
    convert,
};
use gguf::{GgufFile, TensorType};

/// The model that the tests share: trained by nobody, quantised as the real files are.
pub const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny/tiny-b-q2.gguf");

/// Options without importance.
pub fn options(recipe: Recipe, overrides: &[&str]) -> Options {
    let overrides = overrides.iter().map(|text| text.parse::<Override>().unwrap()).collect();
    Options { recipe, overrides, importance: None }
}

/// Options with importance.
pub fn with_importance(recipe: Recipe, importance: ImportanceMatrix) -> Options {
    Options { importance: Some(importance), ..options(recipe, &[]) }
}

/// Everything in f32 but the tables of ids.
pub fn exact() -> Options {
    options(Recipe::F16, &["*=F32", "*tid2eid*=I32"])
}

/// Plans and converts without interruption.
pub fn run(
    inputs: &[PathBuf],
    metadata: &ModelMetadata,
    options: Options,
    output: &Path,
) -> Result<Outcome> {
    let source = Source::open(inputs)?;
    let plan = Plan::new("out.gguf", &source, metadata, options)?;
    convert(&plan, output, |_| ControlFlow::Continue(()))
}

/// The metadata of the tests' model.
pub fn tiny_metadata() -> ModelMetadata {
    ModelMetadata::from_gguf(&GgufFile::open(Path::new(TINY)).unwrap()).unwrap()
}

/// A tensor as f32, or its ids.
pub fn values(file: &GgufFile, name: &str) -> Vec<f32> {
    let info = file.tensor(name).unwrap();
    let bytes = file.tensor_bytes(info);
    if info.ty == TensorType::I32 {
        let ids = bytes.as_chunks::<4>().0.iter();
        return ids.map(|id| i32::from_le_bytes(*id) as f32).collect();
    }
    let mut values = vec![0.0; (info.cols() * info.rows()) as usize];
    let rows = values.chunks_exact_mut(info.cols() as usize);
    let row_bytes = info.ty.row_bytes(info.cols() as usize).unwrap();
    for (row, bytes) in rows.zip(bytes.chunks_exact(row_bytes)) {
        gguf::dequantize_row(info.ty, bytes, row).unwrap();
    }
    values
}
