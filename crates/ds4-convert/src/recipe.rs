//! Recipes: which type each kind of tensor gets, and exceptions from that.

use std::{fmt, str::FromStr};

use ds4_model::binding::{ExpectedTensor, Role, Slot};
use gguf::TensorType;

/// A choice of types for all tensors, by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recipe {
    /// Routed experts in 2 bits.
    Q2,
    /// Routed experts in 4.5 bits.
    Q4,
    /// Routed experts in the official 4-bit floats, the rest close to the official types.
    Mxfp4,
    /// Every large matrix in 8.5 bits.
    Q8,
    /// Every matrix in f16.
    F16,
}

impl Recipe {
    /// Every recipe.
    pub const ALL: [Recipe; 5] = [Recipe::Q2, Recipe::Q4, Recipe::Mxfp4, Recipe::Q8, Recipe::F16];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Recipe::Q2 => "q2",
            Recipe::Q4 => "q4",
            Recipe::Mxfp4 => "mxfp4",
            Recipe::Q8 => "q8",
            Recipe::F16 => "f16",
        }
    }

    /// The type of `tensor`.
    pub fn type_of(self, tensor: &ExpectedTensor) -> TensorType {
        use TensorType::*;
        let role = tensor.binding.role;
        match (self, role) {
            (_, Role::Vector) => F32,
            (_, Role::Table) => I32,
            (Recipe::F16, _) => F16,
            (Recipe::Q2, Role::ExpertGateUp) => IQ2_XXS,
            (Recipe::Q2, Role::ExpertDown) => Q2_K,
            (Recipe::Q4, Role::ExpertGateUp | Role::ExpertDown) => Q4_K,
            (Recipe::Mxfp4, Role::ExpertGateUp | Role::ExpertDown) => MXFP4,
            (Recipe::Q8, Role::ExpertGateUp | Role::ExpertDown) => Q8_0,
            (_, Role::Attention | Role::SharedExpert) => Q8_0,
            (Recipe::Mxfp4, Role::HyperConnection | Role::PositionBias) => F32,
            (Recipe::Mxfp4, Role::Indexer) if tensor.binding.slot == Slot::IndexerQB => Q8_0,
            (Recipe::Mxfp4, _) => BF16,
            (_, Role::Output) => Q8_0,
            (_, _) => F16,
        }
    }

    /// What `general.file_type` calls it; for display only.
    pub(crate) fn file_type(self) -> u32 {
        match self {
            Recipe::F16 => 1,
            Recipe::Q8 => 7,
            Recipe::Q4 => 15,
            Recipe::Q2 => 19,
            Recipe::Mxfp4 => 38,
        }
    }
}

/// The type for rows of `cols` elements where `ty` has longer blocks than fit in them.
pub(crate) fn fallback(ty: TensorType, cols: usize) -> TensorType {
    let fits = |ty: &TensorType| ty.row_bytes(cols).is_some();
    [ty, TensorType::Q8_0].into_iter().find(fits).unwrap_or(TensorType::F16)
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Recipe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Recipe::ALL
            .into_iter()
            .find(|recipe| recipe.name() == text)
            .ok_or_else(|| format!("expected one of {}", Recipe::ALL.map(Recipe::name).join(", ")))
    }
}

/// A type for all tensors whose names match a pattern: `blk.3.*=Q8_0`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// A name in which `*` stands for any text.
    pub pattern: String,
    /// The type.
    pub ty: TensorType,
}

impl Override {
    /// Whether the pattern matches the whole of `name`.
    pub fn matches(&self, name: &str) -> bool {
        let Some((start, rest)) = self.pattern.split_once('*') else {
            return self.pattern == name;
        };
        let Some(mut name) = name.strip_prefix(start) else {
            return false;
        };
        let mut pieces = rest.split('*').peekable();
        while let Some(piece) = pieces.next() {
            if pieces.peek().is_none() {
                return name.ends_with(piece);
            }
            match name.find(piece) {
                Some(at) => name = &name[at + piece.len()..],
                None => return false,
            }
        }
        true
    }
}

impl FromStr for Override {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (pattern, ty) =
            text.split_once('=').ok_or("expected PATTERN=TYPE, such as blk.3.*=Q8_0")?;
        let is_known = |ty: &TensorType| ty.is_readable() || *ty == TensorType::I32;
        let found = TensorType::from_name(&ty.to_ascii_uppercase()).filter(is_known);
        let ty = found.ok_or_else(|| {
            let known = TensorType::ALL.iter().filter(|ty| is_known(ty));
            let known: Vec<_> = known.map(|ty| ty.name()).collect();
            format!("type {ty:?} is not one of {}", known.join(", "))
        })?;
        Ok(Override { pattern: pattern.to_owned(), ty })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        let matches = |pattern: &str, name: &str| {
            format!("{pattern}=F16").parse::<Override>().unwrap().matches(name)
        };
        for (pattern, name) in [
            ("output.weight", "output.weight"),
            ("*", "output.weight"),
            ("blk.*.ffn_*_exps.weight", "blk.17.ffn_gate_exps.weight"),
            ("*exps*", "blk.1.ffn_up_exps.weight"),
            ("a*a", "aa"),
            ("**", "x"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("output", "output.weight"),
            ("blk.1.*", "blk.10.attn_kv.weight"),
            ("*.bias", "output.weight"),
            ("a*a", "a"),
            ("*b*c", "acb"),
            ("", "x"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn overrides_are_parsed() {
        let parsed: Override = "*=q8_0".parse().unwrap();
        assert_eq!(parsed.ty, TensorType::Q8_0);
        assert!("*".parse::<Override>().unwrap_err().contains("PATTERN=TYPE"));
        for unknown in ["*=q9", "*=IQ1_S", "*="] {
            assert!(unknown.parse::<Override>().unwrap_err().contains("is not one of"));
        }
    }

    #[test]
    fn rows_shorter_than_a_block_get_another_type() {
        assert_eq!(fallback(TensorType::Q2_K, 512), TensorType::Q2_K);
        assert_eq!(fallback(TensorType::Q2_K, 128), TensorType::Q8_0);
        assert_eq!(fallback(TensorType::Q8_0, 100), TensorType::F16);
    }
}
