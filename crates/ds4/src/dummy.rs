//! `--dummy`: a model that needs no file. Its shape and storage types are real, its weights random
//! and generated where they are used.

use std::{fmt, str::FromStr};

use anyhow::Result;
use ds4_model::{
    Model,
    config::Config,
    synth::{self, Recipe},
};

/// Layers of the full model.
const FLASH_LAYERS: usize = 43;

/// Which dummy: `flash-q2` or `flash-q2:4`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DummySpec {
    shape: Shape,
    recipe: Recipe,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// The real widths, and so many layers.
    Flash(usize),
    /// A few megabytes.
    Tiny,
}

impl DummySpec {
    /// Makes the model; costs no more than its vectors.
    pub fn model(&self) -> Result<Model> {
        Ok(Model::dummy(&self.to_string(), &self.config(), self.recipe, 0)?)
    }

    fn config(&self) -> Config {
        match self.shape {
            Shape::Flash(layers) => synth::flash(layers),
            Shape::Tiny => synth::tiny(),
        }
    }
}

impl FromStr for DummySpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "expected flash or tiny and a recipe, such as flash-q2, or flash-q2:4 for 4 of \
                 flash's {FLASH_LAYERS} layers"
            )
        };
        let (shape, recipe) = text.split_once('-').ok_or_else(wrong)?;
        let (recipe, layers) = recipe.split_once(':').unwrap_or((recipe, ""));
        let layers = match layers {
            "" => None,
            text => {
                let known = |n: &usize| (1..=FLASH_LAYERS).contains(n);
                Some(text.parse().ok().filter(known).ok_or_else(wrong)?)
            }
        };
        let shape = match (shape, layers) {
            ("flash", layers) => Shape::Flash(layers.unwrap_or(FLASH_LAYERS)),
            ("tiny", None) => Shape::Tiny,
            _ => return Err(wrong()),
        };
        Ok(DummySpec { shape, recipe: recipe.parse()? })
    }
}

impl fmt::Display for DummySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let recipe = self.recipe.name();
        match self.shape {
            Shape::Flash(FLASH_LAYERS) => write!(f, "flash-{recipe}"),
            Shape::Flash(layers) => write!(f, "flash-{recipe}:{layers}"),
            Shape::Tiny => write!(f, "tiny-{recipe}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_are_parsed() {
        let parsed = |text: &str| text.parse::<DummySpec>();
        let flash = |layers| DummySpec { shape: Shape::Flash(layers), recipe: Recipe::Q2 };
        assert_eq!(parsed("flash-q2"), Ok(flash(43)));
        assert_eq!(parsed("flash-q2:4"), Ok(flash(4)));
        for text in ["flash-mxfp4", "flash-q4:1", "tiny-q8", "tiny-f16"] {
            assert_eq!(parsed(text).unwrap().to_string(), text);
        }
        for wrong in ["", "flash", "q2", "flash-q2:0", "flash-q2:44", "flash-q2:x", "tiny-q2:4"] {
            assert!(parsed(wrong).unwrap_err().starts_with("expected flash or tiny"), "{wrong}");
        }
        assert!(parsed("flash-q3").unwrap_err().starts_with("no recipe of that name"));
    }
}
