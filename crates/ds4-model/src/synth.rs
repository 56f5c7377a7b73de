//! Synthetic models: real shapes and storage types, random weights.
//!
//! They show what a machine will do before anyone downloads a real model, and
//! serve tests that need a model of some odd shape. The same shape, recipe and
//! seed give the same bytes, and a model of fewer layers equals the beginning of a longer one.

pub mod generator;
mod metadata;
mod recipe;
mod shape;

pub use generator::{Content, Generator};
pub use recipe::Recipe;
pub use shape::{flash, tiny};

use std::io::Write;

use gguf::{FileLayout, TensorSpec, Writer};
use rayon::prelude::*;

use crate::{
    binding::{ExpectedTensor, expected_tensors},
    config::Config,
    error::{Error, Result},
};

/// Bytes that are generated before they are written.
const PIECE: usize = 32 << 20;
/// Bytes of a piece that one task generates.
const TASK: usize = 1 << 20;

/// The size of the file that [`write()`] makes, in bytes.
///
/// # Errors
/// If the shape does not suit the recipe.
pub fn file_bytes(config: &Config, recipe: Recipe) -> Result<u64> {
    Ok(layout("synthetic model", config, recipe)?.file_bytes())
}

/// Writes a model of shape `config` with random weights. `progress` hears of every piece of
/// tensor data: its bytes.
///
/// # Errors
/// If the shape does not suit the recipe, or `out` fails.
pub fn write<W: Write>(
    config: &Config,
    recipe: Recipe,
    seed: u64,
    out: W,
    mut progress: impl FnMut(u64),
) -> Result<W> {
    let plan = Plan::new("synthetic model", config, recipe)?;
    let mut writer = Writer::new(out, plan.layout)?;
    let mut piece = Vec::new();
    for (expected, spec) in &plan.tensors {
        let generator = Generator::new(config, expected, spec.ty, seed)?;
        let (piece_bytes, task_bytes) = (generator.piece_bytes(PIECE), generator.piece_bytes(TASK));
        let total = generator.bytes();
        let mut start = 0;
        while start < total {
            piece.resize(piece_bytes.min(total - start), 0);
            piece.par_chunks_mut(task_bytes).enumerate().for_each(|(i, bytes)| {
                generator.fill(start + i * task_bytes, bytes);
            });
            writer.append(&spec.name, &piece)?;
            progress(piece.len() as u64);
            start += piece.len();
        }
        writer.end_tensor(&spec.name)?;
    }
    Ok(writer.finish()?)
}

/// What [`write()`] makes, without its tensors' data. `name` is that of the file.
///
/// # Errors
/// If the shape does not suit the recipe.
pub(crate) fn layout(name: &str, config: &Config, recipe: Recipe) -> Result<FileLayout> {
    Ok(Plan::new(name, config, recipe)?.layout)
}

struct Plan {
    layout: FileLayout,
    tensors: Vec<(ExpectedTensor, TensorSpec)>,
}

impl Plan {
    fn new(name: &str, config: &Config, recipe: Recipe) -> Result<Self> {
        let tensors: Vec<(ExpectedTensor, TensorSpec)> = expected_tensors(config)
            .map(|expected| {
                let ty = recipe.type_of(expected.binding.role);
                let row = expected.dims[0];
                if !row.is_multiple_of(ty.block_len() as u64) {
                    let (recipe, name, block) = (recipe.name(), &expected.name, ty.block_len());
                    let what = format!("recipe {recipe}: {name} has rows of {row}, expected a multiple of {block} ({ty})");
                    return Err(Error::Unmakeable { what });
                }
                let spec =
                    TensorSpec { name: expected.name.clone(), dims: expected.dims.clone(), ty };
                Ok((expected, spec))
            })
            .collect::<Result<_>>()?;
        let specs: Vec<TensorSpec> = tensors.iter().map(|(_, spec)| spec.clone()).collect();
        let layout = FileLayout::new(name, &metadata::of(config, recipe)?, &specs)?;
        Ok(Plan { layout, tensors })
    }
}

#[cfg(test)]
mod tests {
    use gguf::GgufFile;

    use super::*;
    use crate::{
        Model,
        weights::{Routing, TensorData},
    };

    fn bytes(config: &Config, recipe: Recipe, seed: u64) -> Vec<u8> {
        write(config, recipe, seed, Vec::new(), |_| {}).unwrap()
    }

    #[test]
    fn every_recipe_makes_a_model_that_loads_with_the_same_shape() {
        for recipe in Recipe::ALL {
            let config = tiny();
            let file = bytes(&config, *recipe, 1);
            assert_eq!(file.len() as u64, file_bytes(&config, *recipe).unwrap());
            let model = Model::from_gguf(GgufFile::from_vec("synthetic", file).unwrap()).unwrap();
            assert_eq!(model.config, config, "{recipe:?}");
            assert!(model.warnings.is_empty(), "{:?}", model.warnings);
        }
    }

    #[test]
    fn a_dummy_is_the_model_in_the_file() {
        for recipe in Recipe::ALL {
            let config = tiny();
            let file = bytes(&config, *recipe, 5);
            let size = file.len() as u64;
            let written = Model::from_gguf(GgufFile::from_vec("file", file).unwrap()).unwrap();
            let dummy = Model::dummy("dummy", &config, *recipe, 5).unwrap();
            assert!(dummy.is_dummy() && !written.is_dummy());
            assert_eq!(dummy.config, config);
            assert_eq!(dummy.file_bytes(), size);
            assert_eq!(dummy.weight_bytes(), written.weight_bytes());
            for (dummy, written) in matrices(&dummy).into_iter().zip(matrices(&written)) {
                assert_eq!(dummy.byte_count(), written.byte_count());
                assert!(dummy.bytes() == written.bytes());
                assert!(dummy.generator().is_some() && written.generator().is_none());
            }
            for (dummy, written) in dummy.weights.layers.iter().zip(&written.weights.layers) {
                assert_eq!(dummy.attn.norm, written.attn.norm);
                match (&dummy.ffn.routing, &written.ffn.routing) {
                    (Routing::Hash(dummy), Routing::Hash(written)) => assert_eq!(dummy, written),
                    (Routing::Bias(dummy), Routing::Bias(written)) => assert_eq!(dummy, written),
                    _ => panic!("another way of routing"),
                }
            }
        }
    }

    /// One matrix of every role, and a stack of either type.
    fn matrices(model: &Model) -> Vec<&TensorData> {
        let weights = &model.weights;
        let layer = &weights.layers[1];
        let (compressor, indexer) =
            (layer.compressor.as_ref().unwrap(), layer.indexer.as_ref().unwrap());
        let matrices = [
            &weights.token_embedding,
            &weights.output,
            &layer.attn.q_b,
            &layer.attn_hc.function,
            &layer.ffn.router,
            &layer.ffn.shared_down,
            &compressor.kv,
            &indexer.q_b,
        ];
        let stacks = [&layer.ffn.gate, &layer.ffn.down].map(|stack| &stack.data);
        matrices.map(|matrix| &matrix.data).into_iter().chain(stacks).collect()
    }

    #[test]
    fn dummies_are_told_apart_without_their_weights() {
        let identity = |recipe, seed| Model::dummy("a", &tiny(), recipe, seed).unwrap().identity();
        let same = Model::dummy("b", &tiny(), Recipe::Q2, 1).unwrap().identity();
        assert_eq!(identity(Recipe::Q2, 1), same);
        assert_ne!(identity(Recipe::Q2, 2), same);
        assert_ne!(identity(Recipe::Q4, 1), same);
    }

    #[test]
    fn a_dummy_of_the_full_size_costs_nothing() {
        let dummy = Model::dummy("flash", &flash(43), Recipe::Q2, 0).unwrap();
        assert!(dummy.file_bytes() > 80 << 30);
        assert_eq!(dummy.config.context_length, 1 << 20);
    }

    #[test]
    fn the_seed_decides_and_layers_do_not_depend_on_their_number() {
        let config = tiny();
        assert_eq!(bytes(&config, Recipe::Q2, 1), bytes(&config, Recipe::Q2, 1));
        assert_ne!(bytes(&config, Recipe::Q2, 1), bytes(&config, Recipe::Q2, 2));
        let mut short = tiny();
        short.layers.truncate(2);
        let [long, short] = [config, short]
            .map(|c| GgufFile::from_vec("synthetic", bytes(&c, Recipe::Q2, 1)).unwrap());
        let data = |file: &GgufFile| {
            file.tensor_bytes(file.tensor("blk.1.ffn_down_exps.weight").unwrap()).to_vec()
        };
        assert_eq!(data(&long), data(&short));
    }

    #[test]
    fn matrices_have_the_intended_spread_in_every_type() {
        for recipe in Recipe::ALL {
            let file = GgufFile::from_vec("synthetic", bytes(&tiny(), *recipe, 3)).unwrap();
            for tensor in file.tensors().iter().filter(|t| t.name.ends_with("_exps.weight")) {
                let count: u64 = tensor.dims.iter().product();
                let mut values = vec![0.0; count as usize];
                gguf::dequantize_row(tensor.ty, file.tensor_bytes(tensor), &mut values).unwrap();
                let square: f32 = values.iter().map(|v| v * v).sum::<f32>() / count as f32;
                let gain = square.sqrt() * (tensor.dims[0] as f32).sqrt();
                assert!((gain - 1.0).abs() < 0.03, "{} {}: {gain}", tensor.name, tensor.ty);
            }
        }
    }

    #[test]
    fn hash_routed_layers_come_first() {
        let mut config = tiny();
        config.layers[2].hash_routed = true;
        assert_eq!(
            file_bytes(&config, Recipe::Q2).unwrap_err().to_string(),
            "cannot make a model with layer 2 routed by token id after layers routed by score"
        );
    }

    #[test]
    fn a_shape_that_does_not_suit_the_recipe_is_refused() {
        let config = Config { expert_width: 96, ..tiny() };
        let error = file_bytes(&config, Recipe::Q2).unwrap_err().to_string();
        assert_eq!(
            error,
            "cannot make a model with recipe q2: blk.0.ffn_down_exps.weight has rows of 96, \
             expected a multiple of 256 (Q2_K)"
        );
    }
}
