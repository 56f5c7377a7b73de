//! Memory-mapped safetensors files: a checked header, and the tensors' bytes.

use std::{collections::HashMap, fs, io, ops::Range, path::Path, time::UNIX_EPOCH};

use gguf::Mapping;
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result, io_error};

/// A safetensors file; every tensor's range lies inside its mapping.
pub(crate) struct SafetensorsFile {
    name: String,
    mapping: Mapping,
    /// By name.
    pub(crate) tensors: HashMap<String, Info>,
    identity: blake3::Hash,
}

/// What the header says of a tensor.
pub(crate) struct Info {
    pub(crate) dtype: Dtype,
    /// Rows first.
    pub(crate) shape: Vec<usize>,
    /// Its bytes in the file.
    pub(crate) range: Range<usize>,
}

impl SafetensorsFile {
    /// Maps the file at `path` and checks its header.
    pub(crate) fn open(path: &Path) -> Result<SafetensorsFile> {
        let name = path.display().to_string();
        let mapping = Mapping::open(path).map_err(io_error(path))?;
        let modified = modified(path).map_err(io_error(path))?;
        let header = SafeTensors::read_metadata(&mapping);
        let (header_bytes, metadata) =
            header.map_err(|source| Error::Safetensors { file: name.clone(), source })?;
        // The header follows its own length in eight bytes; offsets count from its end.
        let data_start = header_bytes + 8;
        let info = |(tensor, info): (String, &safetensors::tensor::TensorInfo)| {
            let (start, end) = info.data_offsets;
            let range = data_start + start..data_start + end;
            (tensor, Info { dtype: info.dtype, shape: info.shape.clone(), range })
        };
        let tensors: HashMap<_, _> = metadata.tensors().into_iter().map(info).collect();
        if let Some((tensor, info)) = tensors.iter().find(|(_, i)| i.range.end > mapping.len()) {
            return Err(Error::Value {
                file: name,
                key: format!("tensor {}", crate::error::shown(tensor)),
                found: format!("end at byte {}", info.range.end),
                expected: format!("at most {}", mapping.len()),
            });
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&mapping[..data_start]);
        hasher.update(&(mapping.len() as u64).to_le_bytes());
        hasher.update(&modified.to_le_bytes());
        let identity = hasher.finalize();
        Ok(SafetensorsFile { name, mapping, tensors, identity })
    }

    /// The file's name, as in messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The whole file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.mapping
    }

    /// A hash of the header, the size and the time of the last change.
    pub(crate) fn identity(&self) -> blake3::Hash {
        self.identity
    }
}

/// When the file was changed, in nanoseconds.
fn modified(path: &Path) -> io::Result<u128> {
    let modified = fs::metadata(path)?.modified()?;
    Ok(modified.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos())
}
