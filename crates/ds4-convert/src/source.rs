//! What is converted: a GGUF model, or a checkpoint in safetensors with the official names.

mod checkpoint;
mod mapping;
mod official;
mod stored;

use std::path::{Path, PathBuf};

use ds4_model::{Model, binding::ExpectedTensor, config::Config};
use gguf::GgufFile;

use crate::error::{Error, Result};

use checkpoint::Checkpoint;
pub(crate) use stored::{Bytes, Encoding, Stored};

/// A model to convert.
pub struct Source {
    kind: Kind,
}

enum Kind {
    Gguf(Box<Model>),
    Safetensors(Checkpoint),
}

/// Where a tensor of the output comes from: one matrix, or one for each expert of a stack.
pub(crate) struct Input {
    pub(crate) parts: Vec<Stored>,
}

impl Source {
    /// Opens what `paths` name: a GGUF file (of a split model any part), or a checkpoint as a
    /// directory, as the JSON index of its files, or as those files.
    ///
    /// The files must not be changed or shortened while the source is open.
    ///
    /// # Errors
    /// If a file cannot be opened or is damaged, or the paths make up no checkpoint.
    pub fn open(paths: &[PathBuf]) -> Result<Source> {
        let is_gguf = |path: &Path| path.extension().is_some_and(|extension| extension == "gguf");
        let kind = match paths {
            [path] if is_gguf(path) => Kind::Gguf(Box::new(Model::open(path)?)),
            _ => match paths.iter().find(|path| is_gguf(path)) {
                Some(path) => {
                    return Err(Error::Input {
                        file: path.display().to_string(),
                        problem:
                            "a GGUF model must be the only input; of a split one name any part"
                                .to_owned(),
                    });
                }
                None => Kind::Safetensors(Checkpoint::open(paths)?),
            },
        };
        Ok(Source { kind })
    }

    /// The source's own GGUF file with metadata, if it has one.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.kind {
            Kind::Gguf(model) => model.files().first().map(|file| &**file),
            Kind::Safetensors(_) => None,
        }
    }

    /// The directory of a checkpoint, where its configuration is expected.
    pub fn directory(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Gguf(_) => None,
            Kind::Safetensors(checkpoint) => Some(checkpoint.directory()),
        }
    }

    /// Finds a tensor and checks that it has the shape and a type that can be converted.
    pub(crate) fn find(&self, expected: &ExpectedTensor, config: &Config) -> Result<Input> {
        match &self.kind {
            Kind::Gguf(model) => find_in_gguf(model, expected, config),
            Kind::Safetensors(checkpoint) => checkpoint.find(expected),
        }
    }

    /// A line for each kind of tensors that are in the source and not in `expected`.
    pub(crate) fn unused(&self, expected: &[ExpectedTensor]) -> Vec<String> {
        match &self.kind {
            Kind::Gguf(model) => model.warnings.clone(),
            Kind::Safetensors(checkpoint) => checkpoint.unused(expected),
        }
    }

    /// A hash that changes when the source does.
    pub(crate) fn identity(&self) -> [u8; 32] {
        match &self.kind {
            Kind::Gguf(model) => model.identity(),
            Kind::Safetensors(checkpoint) => checkpoint.identity(),
        }
    }
}

impl Input {
    /// Name of the way of storage, of the first matrix.
    pub(crate) fn type_name(&self) -> &'static str {
        self.parts.first().map_or("", Stored::type_name)
    }
}

fn find_in_gguf(model: &Model, expected: &ExpectedTensor, config: &Config) -> Result<Input> {
    let holder = model.files().iter().find_map(|file| Some((file, file.tensor(&expected.name)?)));
    let Some((file, info)) = holder else {
        let file = model.files().first().map_or("", |file| file.name()).to_owned();
        return Err(Error::MissingTensor { file, tensor: expected.name.clone() });
    };
    let (rows, cols) = matrix_shape(expected);
    if !expected.accepts_dims(&info.dims, config) {
        let found = info.dims.iter().rev().map(|&dim| dim as usize).collect();
        let (file, tensor) = (file.name().to_owned(), expected.name.clone());
        return Err(Error::TensorShape { file, tensor, found, expected: vec![rows, cols] });
    }
    let data = Bytes::Gguf(file.clone(), info.range.clone());
    Ok(Input { parts: vec![Stored { encoding: Encoding::Gguf(info.ty), rows, cols, data }] })
}

/// Rows, of all experts together, and columns of a tensor.
pub(crate) fn matrix_shape(expected: &ExpectedTensor) -> (usize, usize) {
    let rows = expected.dims[1..].iter().product::<u64>();
    (rows as usize, expected.dims[0] as usize)
}
