//! Synthetic models: real shapes and storage types, random weights.
//!
//! They show what a machine will do before anyone downloads a real model, and
//! serve tests that need a model of some odd shape. The same shape, recipe and
//! seed give the same bytes, and a model of fewer layers equals the beginning of a longer one.

mod metadata;
mod random;
mod recipe;
mod shape;

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
use random::Generator;

/// Bytes that are generated before they are written.
const PIECE: usize = 32 << 20;
/// Bytes of a piece that one task generates.
const TASK: usize = 1 << 20;

/// The size of the file that [`write()`] makes, in bytes.
///
/// # Errors
/// If the shape does not suit the recipe.
pub fn file_bytes(config: &Config, recipe: Recipe) -> Result<u64> {
    Ok(Plan::new(config, recipe)?.layout.file_bytes())
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
    let plan = Plan::new(config, recipe)?;
    let mut writer = Writer::new(out, plan.layout)?;
    let mut piece = Vec::new();
    for (expected, spec) in &plan.tensors {
        let generator = Generator::new(config, expected, spec, seed);
        // A whole number of blocks and of random words.
        let unit = spec.ty.block_bytes() * 8;
        let (piece_bytes, task_bytes) = (PIECE / unit * unit, TASK / unit * unit);
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

struct Plan {
    layout: FileLayout,
    tensors: Vec<(ExpectedTensor, TensorSpec)>,
}

impl Plan {
    fn new(config: &Config, recipe: Recipe) -> Result<Self> {
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
        let layout = FileLayout::new("synthetic model", &metadata::of(config, recipe)?, &specs)?;
        Ok(Plan { layout, tensors })
    }
}

#[cfg(test)]
mod tests {
    use gguf::GgufFile;

    use super::*;
    use crate::Model;

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
