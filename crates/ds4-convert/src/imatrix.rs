//! Importance matrices: for each column of a matrix the mean square of its inputs, by expert.
//!
//! [`Collector`] makes one while a model reads text, and `quantize --imatrix` weighs errors with
//! it. Files come in two formats, both of which are read: the older `.dat`, which is also
//! written, and GGUF.

mod collect;
mod dat;
mod gguf_file;

use std::{collections::BTreeMap, fs, path::Path};

use ds4_model::{
    binding::{ExpectedTensor, Slot, expected_tensors},
    config::Config,
};

use crate::error::{Error, Result, io_error};

pub use collect::Collector;

/// How much each column of some matrices matters.
#[derive(Debug, Clone, PartialEq)]
pub struct ImportanceMatrix {
    file: String,
    dataset: String,
    chunks: u64,
    /// Mean squares by tensor name, expert after expert; finite and not negative.
    entries: BTreeMap<String, Vec<f32>>,
}

impl ImportanceMatrix {
    /// Reads a file in either format.
    ///
    /// # Errors
    /// If the file cannot be read, is damaged, or holds values that are no mean squares.
    pub fn read(path: &Path) -> Result<ImportanceMatrix> {
        let bytes = fs::read(path).map_err(io_error(path))?;
        let file = path.display().to_string();
        match bytes.starts_with(b"GGUF") {
            true => gguf_file::read(file, bytes),
            false => dat::read(file, &bytes),
        }
    }

    /// The matrix as a `.dat` file.
    pub fn to_dat(&self) -> Vec<u8> {
        dat::write(self)
    }

    /// Name of the file it was read from, without directories.
    pub fn file_name(&self) -> &str {
        Path::new(&self.file).file_name().and_then(|name| name.to_str()).unwrap_or("")
    }

    /// The text that it was made from, by name.
    pub fn dataset(&self) -> &str {
        &self.dataset
    }

    /// Pieces of text that it was made from.
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it says nothing of any tensor.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The values of all experts of a tensor.
    pub fn entry(&self, tensor: &str) -> Option<&[f32]> {
        self.entries.get(tensor).map(Vec::as_slice)
    }

    /// The values of `cols` columns of a tensor, of expert `expert` if experts differ.
    pub(crate) fn columns(&self, tensor: &str, expert: usize, cols: usize) -> Option<&[f32]> {
        let values = self.entry(tensor)?;
        let start = if values.len() == cols { 0 } else { expert * cols };
        values.get(start..start + cols)
    }

    /// Checks that entries have the sizes of the tensors that they name.
    pub(crate) fn check(&self, config: &Config) -> Result<()> {
        for tensor in expected_tensors(config) {
            let Some(values) = self.entry(&tensor.name) else {
                continue;
            };
            let cols = tensor.dims[0] as usize;
            let experts = tensor.dims.get(2).map_or(1, |&count| count as usize);
            if values.len() != experts * cols {
                return Err(Error::Importance {
                    file: self.file.clone(),
                    entry: tensor.name,
                    found: format!("{} values", values.len()),
                    expected: format!("{experts} times {cols}"),
                });
            }
        }
        Ok(())
    }

    /// What a user should know about using it with a model.
    pub(crate) fn remarks(&self, config: &Config) -> Vec<String> {
        let stacks: Vec<_> = expected_tensors(config).filter(is_routed).collect();
        let missing: Vec<_> = stacks.iter().filter(|t| self.entry(&t.name).is_none()).collect();
        match missing.first() {
            Some(first) => vec![format!(
                "{}: says nothing of {} of {} tensors of routed experts, such as {}",
                self.file,
                missing.len(),
                stacks.len(),
                first.name
            )],
            None => Vec::new(),
        }
    }

    /// Feeds the values into a hash.
    pub(crate) fn hash(&self, hasher: &mut blake3::Hasher) {
        for (name, values) in &self.entries {
            hasher.update(name.as_bytes());
            for value in values {
                hasher.update(&value.to_le_bytes());
            }
        }
    }
}

fn is_routed(tensor: &ExpectedTensor) -> bool {
    matches!(tensor.binding.slot, Slot::ExpertGate | Slot::ExpertUp | Slot::ExpertDown)
}

/// Checks values read from a file.
fn check_values(file: &str, entry: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite() || *value < 0.0) {
        Some(index) => Err(Error::Importance {
            file: file.to_owned(),
            entry: format!("{}, value {index}", crate::error::shown(entry)),
            found: values[index].to_string(),
            expected: "a finite number of at least 0".to_owned(),
        }),
        None => Ok(()),
    }
}
