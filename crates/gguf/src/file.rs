//! An opened file: its bytes (mapped, owned or embedded) and what they say.

use std::{collections::HashMap, ops::Range, path::Path};

use crate::{Error, FileLayout, Mapping, Metadata, TensorType, parse::parse};

/// A GGUF file. Everything but the values of tensors has been checked: every
/// tensor's range lies inside the file, and no two overlap.
#[derive(Debug)]
pub struct GgufFile {
    name: String,
    data: Data,
    len: usize,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

/// Name, shape, type and place of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, unique in the file.
    pub name: String,
    /// One to four dimensions, the fastest first: `[cols, rows, …]`.
    pub dims: Vec<u64>,
    /// Element type.
    pub ty: TensorType,
    /// Its bytes in the file.
    pub range: Range<usize>,
}

/// Who holds the file's bytes.
#[derive(Debug)]
enum Data {
    Mapped(Mapping),
    Owned(Vec<u8>),
    Static(&'static [u8]),
}

impl GgufFile {
    /// Maps the file at `path` and reads everything but tensor data.
    ///
    /// The file must not be shortened while it is open: its pages are read
    /// when they are first used, and one that is gone ends the process.
    ///
    /// # Errors
    /// If the file cannot be opened, or breaks a rule of the format.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let name = path.display().to_string();
        match Mapping::open(path) {
            Ok(mapping) => Self::new(name, Data::Mapped(mapping)),
            Err(source) => Err(Error::Io { file: name, source }),
        }
    }

    /// Reads a file held in memory. `name` stands for it in messages.
    ///
    /// # Errors
    /// If it breaks a rule of the format.
    pub fn from_vec(name: impl Into<String>, bytes: Vec<u8>) -> Result<Self, Error> {
        Self::new(name.into(), Data::Owned(bytes))
    }

    /// Reads a file embedded in the program. `name` stands for it in messages.
    ///
    /// # Errors
    /// If it breaks a rule of the format.
    pub fn from_static(name: impl Into<String>, bytes: &'static [u8]) -> Result<Self, Error> {
        Self::new(name.into(), Data::Static(bytes))
    }

    /// The header of a file that was laid out and not written: metadata and table of tensors,
    /// whose data exist nowhere.
    ///
    /// # Errors
    /// If a file of that size could not be mapped.
    pub fn from_layout(layout: &FileLayout) -> Result<Self, Error> {
        let header = Data::Owned(layout.header().to_vec());
        let len = usize::try_from(layout.file_bytes()).unwrap_or(usize::MAX);
        Self::with_len(layout.file().to_owned(), header, len)
    }

    fn new(name: String, data: Data) -> Result<Self, Error> {
        let len = data.bytes().len();
        Self::with_len(name, data, len)
    }

    fn with_len(name: String, data: Data, len: usize) -> Result<Self, Error> {
        let contents = parse(&name, data.bytes(), len)?;
        let metadata = Metadata::new(name.clone(), contents.metadata);
        let (tensors, by_name) = (contents.tensors, contents.by_name);
        Ok(GgufFile { name, data, len, metadata, tensors, by_name })
    }

    /// The file's name, as in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.len as u64
    }

    /// The whole file, or the header of one [from a layout](Self::from_layout). Where tensors
    /// start is aligned inside the file, but an embedded file itself may start at any address.
    pub fn bytes(&self) -> &[u8] {
        self.data.bytes()
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// The bytes of a tensor of this file.
    ///
    /// # Panics
    /// If `tensor` belongs to another file and lies outside this one, or this is a
    /// [header](Self::from_layout).
    pub fn tensor_bytes(&self, tensor: &TensorInfo) -> &[u8] {
        &self.bytes()[tensor.range.clone()]
    }
}

impl TensorInfo {
    /// Elements of a row: the fastest dimension.
    pub fn cols(&self) -> u64 {
        self.dims[0]
    }

    /// Rows: the product of all other dimensions.
    pub fn rows(&self) -> u64 {
        self.dims[1..].iter().product()
    }
}

impl Data {
    fn bytes(&self) -> &[u8] {
        match self {
            Data::Mapped(mapping) => mapping,
            Data::Owned(bytes) => bytes,
            Data::Static(bytes) => bytes,
        }
    }
}
