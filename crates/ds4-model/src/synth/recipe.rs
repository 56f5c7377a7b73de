//! Which storage type each kind of tensor gets.

use std::str::FromStr;

use gguf::TensorType;

use crate::binding::Role;

/// A mix of storage types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recipe {
    /// Everything in F32.
    F32,
    /// Matrices in F16.
    F16,
    /// Matrices in Q8_0, except for the small ones that are computed in f32.
    Q8,
    /// Like the published 2-bit files: experts in IQ2_XXS and Q2_K.
    Q2,
    /// Like the published 4-bit files: experts in Q4_K.
    Q4,
    /// Experts in MXFP4, as in direct conversions of the released model.
    Mxfp4,
}

impl Recipe {
    /// All of them.
    pub const ALL: &[Recipe] =
        &[Recipe::F32, Recipe::F16, Recipe::Q8, Recipe::Q2, Recipe::Q4, Recipe::Mxfp4];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Recipe::F32 => "f32",
            Recipe::F16 => "f16",
            Recipe::Q8 => "q8",
            Recipe::Q2 => "q2",
            Recipe::Q4 => "q4",
            Recipe::Mxfp4 => "mxfp4",
        }
    }

    /// The storage type of tensors with this role.
    pub fn type_of(self, role: Role) -> TensorType {
        use TensorType::*;
        match role {
            Role::Table => I32,
            Role::Vector => F32,
            _ if self == Recipe::F32 => F32,
            _ if self == Recipe::F16 => F16,
            Role::ExpertGateUp | Role::ExpertDown => self.expert_type(role),
            Role::Output | Role::Attention | Role::SharedExpert => Q8_0,
            Role::Embedding
            | Role::Router
            | Role::HyperConnection
            | Role::Compressor
            | Role::Indexer
            | Role::PositionBias => F16,
        }
    }

    /// The value of `general.file_type` in such files.
    pub fn file_type(self) -> u32 {
        match self {
            Recipe::F32 => 0,
            Recipe::F16 => 1,
            Recipe::Q8 => 7,
            Recipe::Q2 => 19,
            Recipe::Q4 => 15,
            Recipe::Mxfp4 => 38,
        }
    }

    fn expert_type(self, role: Role) -> TensorType {
        match self {
            Recipe::Q2 if role == Role::ExpertGateUp => TensorType::IQ2_XXS,
            Recipe::Q2 => TensorType::Q2_K,
            Recipe::Q4 => TensorType::Q4_K,
            Recipe::Mxfp4 => TensorType::MXFP4,
            Recipe::F32 | Recipe::F16 | Recipe::Q8 => TensorType::Q8_0,
        }
    }
}

impl FromStr for Recipe {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Recipe::ALL.iter().find(|recipe| recipe.name() == name).copied().ok_or_else(|| {
            let names: Vec<_> = Recipe::ALL.iter().map(|recipe| recipe.name()).collect();
            format!("no recipe of that name (there are {})", names.join(", "))
        })
    }
}
