//! Exceptions from a recipe: asked for by name of a tensor, or forced by the length of its rows.

use std::str::FromStr;

use gguf::TensorType;

/// The type for rows of `cols` elements where `ty` has longer blocks than fit in them.
pub(crate) fn fallback(ty: TensorType, cols: usize) -> TensorType {
    let fits = |ty: &TensorType| ty.row_bytes(cols).is_some();
    [ty, TensorType::Q8_0].into_iter().find(fits).unwrap_or(TensorType::F16)
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
