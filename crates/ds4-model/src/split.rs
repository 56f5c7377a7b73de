//! The file or files of a model. A split model has its metadata in the first
//! of several files, named `…-00001-of-0000N.gguf`, and its tensors in any of them.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use gguf::{GgufFile, TensorInfo};

use crate::error::{Error, Result};

/// All files of a model. No two hold a tensor of the same name.
pub(crate) struct Parts {
    files: Vec<Arc<GgufFile>>,
}

impl Parts {
    /// Opens the file at `path` and, if it is any part of a split model, all others.
    pub(crate) fn open(path: &Path) -> Result<Parts> {
        let file = GgufFile::open(path)?;
        let (part, parts) = place(&file)?;
        if parts == 1 {
            return Ok(Parts { files: vec![Arc::new(file)] });
        }
        let Some(stem) = stem(path, part, parts) else {
            return Err(Error::PartName { file: file.name().to_owned(), part, parts });
        };
        let opened = (1..=parts).map(|part| open_part(&stem, part, parts));
        let files = opened.collect::<Result<Vec<_>>>()?;
        check_tensors(&files)?;
        Ok(Parts { files })
    }

    /// A model in one file.
    pub(crate) fn single(file: GgufFile) -> Result<Parts> {
        match place(&file)? {
            (_, 1) => Ok(Parts { files: vec![Arc::new(file)] }),
            (part, parts) => Err(Error::PartName { file: file.name().to_owned(), part, parts }),
        }
    }

    /// The part with the metadata.
    pub(crate) fn first(&self) -> &GgufFile {
        &self.files[0]
    }

    /// All parts in order.
    pub(crate) fn files(&self) -> &[Arc<GgufFile>] {
        &self.files
    }

    /// The tensor called `name`, and the part that holds it.
    pub(crate) fn tensor(&self, name: &str) -> Option<(&Arc<GgufFile>, &TensorInfo)> {
        self.files.iter().find_map(|file| Some((file, file.tensor(name)?)))
    }

    /// All tensors of all parts.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.files.iter().flat_map(|file| file.tensors())
    }
}

/// Which part a file is, from 1, and of how many.
fn place(file: &GgufFile) -> Result<(usize, usize)> {
    let metadata = file.metadata();
    let parts = metadata.optional::<usize>("split.count")?.unwrap_or(1);
    if parts <= 1 {
        return Ok((1, 1));
    }
    let index = metadata.usize("split.no")?;
    if index >= parts {
        let expected = format!("less than {parts}");
        return Err(wrong(file, "split.no", index, expected));
    }
    Ok((index + 1, parts))
}

/// `path` without the end that numbers the parts, if it has the right one.
fn stem(path: &Path, part: usize, parts: usize) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    Some(path.with_file_name(name.strip_suffix(&ending(part, parts))?))
}

fn ending(part: usize, parts: usize) -> String {
    format!("-{part:05}-of-{parts:05}.gguf")
}

fn open_part(stem: &Path, part: usize, parts: usize) -> Result<Arc<GgufFile>> {
    let mut path = stem.as_os_str().to_owned();
    path.push(ending(part, parts));
    let path = PathBuf::from(path);
    if !path.exists() {
        return Err(Error::MissingPart { part, parts, path });
    }
    let file = GgufFile::open(&path)?;
    let (found_part, found_parts) = place(&file)?;
    if found_parts != parts {
        return Err(wrong(&file, "split.count", found_parts, parts));
    }
    if found_part != part {
        return Err(wrong(&file, "split.no", found_part - 1, part - 1));
    }
    Ok(Arc::new(file))
}

/// Checks that the parts together hold each tensor once, and as many as they should.
fn check_tensors(files: &[Arc<GgufFile>]) -> Result<()> {
    let mut holders = HashMap::new();
    for file in files {
        for tensor in file.tensors() {
            if let Some(first) = holders.insert(tensor.name.as_str(), file.name()) {
                return Err(Error::TensorTwice {
                    tensor: tensor.name.clone(),
                    first: first.to_owned(),
                    second: file.name().to_owned(),
                });
            }
        }
    }
    let stated = files[0].metadata().optional::<usize>("split.tensors.count")?;
    match stated {
        Some(found) if found != holders.len() => {
            let expected = format!("{}, the tensors of all parts", holders.len());
            Err(wrong(&files[0], "split.tensors.count", found, expected))
        }
        _ => Ok(()),
    }
}

fn wrong(file: &GgufFile, key: &str, found: usize, expected: impl ToString) -> Error {
    Error::Value {
        file: file.name().to_owned(),
        key: key.to_owned(),
        found: found.to_string(),
        expected: expected.to_string(),
    }
}
