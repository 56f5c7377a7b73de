//! A checkpoint: safetensors files that together hold every tensor once.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use ds4_model::binding::{ExpectedTensor, Role};
use gguf::TensorType;
use safetensors::Dtype;
use serde::Deserialize;

use super::{
    Input,
    mapping::{Info, SafetensorsFile},
    matrix_shape, official,
    stored::{Bytes, Encoding, Scales, Stored, fp4_scale_shape, fp8_scale_shape},
};
use crate::error::{Error, Result, io_error, shown};

/// The usual name of the index of a checkpoint in several files.
const INDEX: &str = "model.safetensors.index.json";

pub(super) struct Checkpoint {
    name: String,
    directory: PathBuf,
    files: Vec<Arc<SafetensorsFile>>,
    /// Which file holds a tensor.
    holders: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    pub(super) fn open(paths: &[PathBuf]) -> Result<Checkpoint> {
        let Some(first) = paths.first() else {
            return Err(input(Path::new("inputs"), "none given, expected at least one file"));
        };
        match paths {
            [path] if path.is_dir() => {
                let index = path.join(INDEX);
                match index.exists() {
                    true => Checkpoint::from_index(&index),
                    false => Checkpoint::from_files(path, path, &safetensors_in(path)?),
                }
            }
            [path] if path.extension().is_some_and(|extension| extension == "json") => {
                Checkpoint::from_index(path)
            }
            _ => Checkpoint::from_files(first, first.parent().unwrap_or(first), paths),
        }
    }

    fn from_index(path: &Path) -> Result<Checkpoint> {
        let text = fs::read_to_string(path).map_err(io_error(path))?;
        let file = path.display().to_string();
        let index: Index =
            serde_json::from_str(&text).map_err(|source| Error::Json { file, source })?;
        let directory = path.parent().unwrap_or(Path::new(""));
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        let mut paths = Vec::new();
        for name in names {
            let mut components = Path::new(name).components();
            let plain = matches!(components.next(), Some(Component::Normal(_)));
            if !plain || components.next().is_some() {
                let problem =
                    format!("names {:?}, expected a file in the same directory", shown(name));
                return Err(input(path, &problem));
            }
            paths.push(directory.join(name));
        }
        let checkpoint = Checkpoint::from_files(path, directory, &paths)?;
        for (tensor, name) in &index.weight_map {
            let holder = checkpoint.holders.get(tensor).map(|&i| checkpoint.files[i].name());
            if holder != Some(&directory.join(name).display().to_string()) {
                let (file, tensor) = (directory.join(name).display().to_string(), shown(tensor));
                return Err(Error::MissingTensor { file, tensor });
            }
        }
        Ok(checkpoint)
    }

    fn from_files(name: &Path, directory: &Path, paths: &[PathBuf]) -> Result<Checkpoint> {
        if paths.is_empty() {
            return Err(input(name, "found no .safetensors files, expected at least one"));
        }
        let mut files: Vec<Arc<SafetensorsFile>> = Vec::with_capacity(paths.len());
        let mut holders = HashMap::new();
        for path in paths {
            let file = SafetensorsFile::open(path)?;
            for tensor in file.tensors.keys() {
                if let Some(other) = holders.insert(tensor.clone(), files.len()) {
                    let (tensor, other) = (shown(tensor), files[other].name());
                    let problem =
                        format!("tensor {tensor}: found also in {other}, expected in one file");
                    return Err(input(path, &problem));
                }
            }
            files.push(Arc::new(file));
        }
        let (name, directory) = (name.display().to_string(), directory.to_owned());
        Ok(Checkpoint { name, directory, files, holders })
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn find(&self, expected: &ExpectedTensor) -> Result<Input> {
        let (rows, cols) = matrix_shape(expected);
        let role = expected.binding.role;
        if !official::is_stack(expected.binding.slot) {
            let name = official::name(expected, 0);
            return Ok(Input { parts: vec![self.matrix(&name, role, rows, cols)?] });
        }
        let experts = expected.dims.last().map_or(1, |&count| count as usize);
        let part =
            |expert| self.matrix(&official::name(expected, expert), role, rows / experts, cols);
        Ok(Input { parts: (0..experts).map(part).collect::<Result<_>>()? })
    }

    pub(super) fn unused(&self, expected: &[ExpectedTensor]) -> Vec<String> {
        const NAMED: usize = 8;
        let mut used = HashSet::new();
        for tensor in expected {
            let experts = match official::is_stack(tensor.binding.slot) {
                true => tensor.dims.last().copied().unwrap_or(1) as usize,
                false => 1,
            };
            for name in (0..experts).map(|expert| official::name(tensor, expert)) {
                used.insert(official::scale_name(&name));
                used.insert(name);
            }
        }
        let mut others: Vec<_> = self.holders.keys().filter(|name| !used.contains(*name)).collect();
        others.sort();
        let (draft, unknown): (Vec<_>, Vec<_>) =
            others.into_iter().partition(|name| name.starts_with("mtp."));
        let mut lines = Vec::new();
        if !draft.is_empty() {
            lines.push(format!("{} tensors of draft (MTP) blocks are not converted", draft.len()));
        }
        let named = unknown.iter().take(NAMED);
        lines.extend(named.map(|name| format!("unknown tensor {} is not converted", shown(name))));
        if unknown.len() > NAMED {
            lines.push(format!("{} more unknown tensors are not converted", unknown.len() - NAMED));
        }
        lines
    }

    pub(super) fn identity(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for file in &self.files {
            hasher.update(file.identity().as_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    /// The matrix `name`, which must be `[rows, cols]`.
    fn matrix(&self, name: &str, role: Role, rows: usize, cols: usize) -> Result<Stored> {
        let (file, info) = self.tensor(name)?;
        let gguf = |ty| Some(Encoding::Gguf(ty));
        let is_matrix = !matches!(role, Role::Vector | Role::Table);
        let mut stored_cols = cols;
        let encoding = match (info.dtype, role) {
            (Dtype::I64, Role::Table) => Some(Encoding::I64),
            (Dtype::I32, Role::Table) => gguf(TensorType::I32),
            (_, Role::Table) => None,
            (Dtype::F32, _) => gguf(TensorType::F32),
            (Dtype::F16, _) => gguf(TensorType::F16),
            (Dtype::BF16, _) => gguf(TensorType::BF16),
            (Dtype::F8_E4M3, _) if is_matrix => Some(self.fp8(name, rows, cols)?),
            // Two values to a byte, which only the type made for that counts as two.
            (Dtype::I8 | Dtype::U8, _) if is_matrix => {
                stored_cols = cols / 2;
                Some(self.fp4(name, rows, cols)?)
            }
            (Dtype::F4, _) if is_matrix => Some(self.fp4(name, rows, cols)?),
            _ => None,
        };
        let Some(encoding) = encoding else {
            return Err(Error::TensorType {
                file: file.name().to_owned(),
                tensor: name.to_owned(),
                found: format!("{:?}", info.dtype),
                expected: match role {
                    Role::Table => "I64 or I32",
                    Role::Vector => "F32, F16 or BF16",
                    _ => "F32, F16, BF16, F8_E4M3, or packed FP4 as I8, U8 or F4",
                },
            });
        };
        check_shape(file, name, info, &[rows, stored_cols])?;
        let data = Bytes::Safetensors(file.clone(), info.range.clone());
        Ok(Stored { encoding, rows, cols, data })
    }

    fn fp8(&self, name: &str, rows: usize, cols: usize) -> Result<Encoding> {
        let (file, info, name) = self.scales(name)?;
        check_shape(file, &name, info, &fp8_scale_shape(rows, cols))?;
        let e8m0 = match info.dtype {
            Dtype::F8_E8M0 | Dtype::U8 => true,
            Dtype::F32 => false,
            _ => return Err(wrong_scales(file, name, info, "F8_E8M0, U8 or F32")),
        };
        let data = Bytes::Safetensors(file.clone(), info.range.clone());
        Ok(Encoding::Fp8(Scales { data, e8m0 }))
    }

    fn fp4(&self, name: &str, rows: usize, cols: usize) -> Result<Encoding> {
        let (file, info, scales) = self.scales(name)?;
        let Some(shape) = fp4_scale_shape(rows, cols) else {
            let (holder, info) = self.tensor(name)?;
            return Err(Error::TensorShape {
                file: holder.name().to_owned(),
                tensor: name.to_owned(),
                found: info.shape.clone(),
                expected: vec![rows, cols],
            });
        };
        check_shape(file, &scales, info, &shape)?;
        if !matches!(info.dtype, Dtype::F8_E8M0 | Dtype::U8) {
            return Err(wrong_scales(file, scales, info, "F8_E8M0 or U8"));
        }
        Ok(Encoding::Fp4 { scales: Bytes::Safetensors(file.clone(), info.range.clone()) })
    }

    fn scales(&self, name: &str) -> Result<(&Arc<SafetensorsFile>, &Info, String)> {
        let name = official::scale_name(name);
        let (file, info) = self.tensor(&name)?;
        Ok((file, info, name))
    }

    fn tensor(&self, name: &str) -> Result<(&Arc<SafetensorsFile>, &Info)> {
        let file = self.holders.get(name).map(|&index| &self.files[index]);
        file.and_then(|file| Some((file, file.tensors.get(name)?))).ok_or_else(|| {
            Error::MissingTensor { file: self.name.clone(), tensor: name.to_owned() }
        })
    }
}

/// Checks a shape, whose first dimensions of 1 don't matter.
fn check_shape(file: &SafetensorsFile, name: &str, info: &Info, expected: &[usize]) -> Result<()> {
    fn trimmed(shape: &[usize]) -> &[usize] {
        &shape[shape.iter().position(|&dim| dim != 1).unwrap_or(shape.len())..]
    }
    if trimmed(&info.shape) == trimmed(expected) {
        return Ok(());
    }
    Err(Error::TensorShape {
        file: file.name().to_owned(),
        tensor: name.to_owned(),
        found: info.shape.clone(),
        expected: expected.to_vec(),
    })
}

fn wrong_scales(
    file: &SafetensorsFile,
    tensor: String,
    info: &Info,
    expected: &'static str,
) -> Error {
    let (file, found) = (file.name().to_owned(), format!("{:?}", info.dtype));
    Error::TensorType { file, tensor, found, expected }
}

fn safetensors_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(io_error(directory))? {
        let path = entry.map_err(io_error(directory))?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn input(path: &Path, problem: &str) -> Error {
    Error::Input { file: path.display().to_string(), problem: problem.to_owned() }
}
