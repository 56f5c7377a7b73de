//! Writes files: first the layout (metadata and table of tensors), then the
//! tensors' data as a stream, so that a model never has to fit in memory.

use std::{collections::HashSet, io::Write, ops::Range};

use crate::{
    Array, Error, TensorType, Value,
    error::{Place, Problem, Turn},
    layout::{
        ALIGNMENT_KEY, MAGIC, MAX_ENTRIES, MAX_NAME_BYTES, VERSION, align_up, alignment,
        tensor_bytes,
    },
};

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name, unique in the file.
    pub name: String,
    /// One to four dimensions, the fastest first.
    pub dims: Vec<u64>,
    /// Element type.
    pub ty: TensorType,
}

/// Everything about a file but its tensors' data: the header as bytes, and
/// where each tensor goes.
#[derive(Debug, Clone)]
pub struct FileLayout {
    file: String,
    header: Vec<u8>,
    tensors: Vec<(String, Range<u64>)>,
    file_bytes: u64,
}

impl FileLayout {
    /// Lays out a file with `metadata` and `tensors` in the given order. Data
    /// is aligned to `general.alignment` if the metadata holds that key, else
    /// to 32 bytes. `file` is the file's name in messages.
    ///
    /// # Errors
    /// [`Error::Malformed`] if a reader would refuse such a file.
    pub fn new(
        file: impl Into<String>,
        metadata: &[(String, Value)],
        tensors: &[TensorSpec],
    ) -> Result<Self, Error> {
        let file = file.into();
        let malformed = |(place, problem)| Error::Malformed { file: file.clone(), place, problem };
        let (header, tensors) = lay_out(metadata, tensors).map_err(malformed)?;
        let file_bytes = tensors.last().map_or(header.len() as u64, |(_, range)| range.end);
        Ok(FileLayout { file, header, tensors, file_bytes })
    }

    /// The file's name, as in messages.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Everything before the first tensor's data, padding included.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// Where the data of tensor number `index` goes in the file.
    ///
    /// # Panics
    /// If there is no such tensor.
    pub fn tensor_range(&self, index: usize) -> Range<u64> {
        self.tensors[index].1.clone()
    }

    /// Size of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }
}

/// Streams a file that was laid out before: the tensors' data in order, each
/// in any number of pieces.
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
    layout: FileLayout,
    /// Number of the tensor being written.
    current: usize,
    /// Bytes of it so far.
    written: u64,
}

impl<W: Write> Writer<W> {
    /// Writes the header.
    ///
    /// # Errors
    /// If `out` fails.
    pub fn new(out: W, layout: FileLayout) -> Result<Self, Error> {
        let mut writer = Writer { out, layout, current: 0, written: 0 };
        let header = std::mem::take(&mut writer.layout.header);
        writer.put(&header)?;
        writer.layout.header = header;
        Ok(writer)
    }

    /// Writes the whole data of the next tensor, which must be `name`.
    ///
    /// # Errors
    /// As [`Writer::append`] and [`Writer::end_tensor`].
    pub fn write_tensor(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.append(name, bytes)?;
        self.end_tensor(name)
    }

    /// Writes the next piece of the data of the tensor `name`.
    ///
    /// # Errors
    /// [`Error::WriteOrder`] if it is another tensor's turn,
    /// [`Error::WriteSize`] if the tensor would get too many bytes (and then
    /// nothing is written), or if the output fails.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let expected = self.check_turn(name)?;
        let found = self.written.saturating_add(bytes.len() as u64);
        if found > expected {
            return Err(self.wrong_size(name, found, expected));
        }
        self.put(bytes)?;
        self.written = found;
        Ok(())
    }

    /// Ends the tensor `name` and writes the padding up to the next one.
    ///
    /// # Errors
    /// [`Error::WriteOrder`] if it is another tensor's turn,
    /// [`Error::WriteSize`] if it got too few bytes, or if the output fails.
    pub fn end_tensor(&mut self, name: &str) -> Result<(), Error> {
        let expected = self.check_turn(name)?;
        if self.written != expected {
            return Err(self.wrong_size(name, self.written, expected));
        }
        let end = self.layout.tensors[self.current].1.end;
        if let Some((_, next)) = self.layout.tensors.get(self.current + 1) {
            let padding = next.start - end;
            std::io::copy(&mut std::io::Read::take(std::io::repeat(0), padding), &mut self.out)
                .map_err(|source| Error::Io { file: self.layout.file.clone(), source })?;
        }
        self.current += 1;
        self.written = 0;
        Ok(())
    }

    /// Flushes and returns the output.
    ///
    /// # Errors
    /// [`Error::WriteOrder`] if a tensor is missing, or if the output fails.
    pub fn finish(mut self) -> Result<W, Error> {
        if self.current != self.layout.tensors.len() {
            return Err(self.out_of_order(Turn::End));
        }
        match self.out.flush() {
            Ok(()) => Ok(self.out),
            Err(source) => Err(Error::Io { file: self.layout.file, source }),
        }
    }

    /// Bytes of the current tensor, if it is `name`.
    fn check_turn(&self, name: &str) -> Result<u64, Error> {
        match self.layout.tensors.get(self.current) {
            Some((current, range)) if current == name => Ok(range.end - range.start),
            _ => Err(self.out_of_order(Turn::Tensor(name.to_owned()))),
        }
    }

    fn out_of_order(&self, found: Turn) -> Error {
        let next = self.layout.tensors.get(self.current);
        let expected = next.map_or(Turn::End, |(name, _)| Turn::Tensor(name.clone()));
        Error::WriteOrder { file: self.layout.file.clone(), found, expected }
    }

    fn wrong_size(&self, tensor: &str, found: u64, expected: u64) -> Error {
        let file = self.layout.file.clone();
        Error::WriteSize { file, tensor: tensor.to_owned(), found, expected }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.out
            .write_all(bytes)
            .map_err(|source| Error::Io { file: self.layout.file.clone(), source })
    }
}

/// The header with its padding, and each tensor's name and range in the file.
type Parts = (Vec<u8>, Vec<(String, Range<u64>)>);

fn lay_out(
    metadata: &[(String, Value)],
    tensors: &[TensorSpec],
) -> Result<Parts, (Place, Problem)> {
    check_count(tensors.len()).map_err(|problem| (Place::Header("n_tensors"), problem))?;
    check_count(metadata.len()).map_err(|problem| (Place::Header("n_kv"), problem))?;
    let mut header = Vec::new();
    header.extend(MAGIC);
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());

    let alignment = put_metadata(&mut header, metadata)?;
    let ranges = put_tensor_table(&mut header, tensors, alignment)?;
    let start = header.len().next_multiple_of(alignment as usize);
    header.resize(start, 0);

    let mut placed = Vec::with_capacity(tensors.len());
    for (spec, range) in tensors.iter().zip(ranges) {
        let start = start as u64;
        let shifted = range.start.checked_add(start).zip(range.end.checked_add(start));
        let Some((start, end)) = shifted else {
            let problem = Problem::OffsetOverflow { offset: range.start };
            return Err((Place::Tensor(spec.name.clone()), problem));
        };
        placed.push((spec.name.clone(), start..end));
    }
    Ok((header, placed))
}

fn check_count(count: usize) -> Result<(), Problem> {
    let found = count as u64;
    if found > MAX_ENTRIES {
        return Err(Problem::CountLimit { found, limit: MAX_ENTRIES });
    }
    Ok(())
}

/// Appends the metadata and returns the alignment.
fn put_metadata(
    header: &mut Vec<u8>,
    metadata: &[(String, Value)],
) -> Result<u64, (Place, Problem)> {
    let mut alignment_value = None;
    let mut keys = HashSet::new();
    for (key, value) in metadata {
        let at = |problem| (Place::Key(key.clone()), problem);
        check_name(key, &mut keys).map_err(at)?;
        if key == ALIGNMENT_KEY {
            alignment_value = Some(value);
        }
        put_string(header, key);
        put_value(header, value);
    }
    let at = |problem| (Place::Key(ALIGNMENT_KEY.to_owned()), problem);
    alignment(alignment_value).map_err(at)
}

/// Appends the tensor table and returns each tensor's range in the data section.
fn put_tensor_table(
    header: &mut Vec<u8>,
    tensors: &[TensorSpec],
    alignment: u64,
) -> Result<Vec<Range<u64>>, (Place, Problem)> {
    let mut names = HashSet::new();
    let mut ranges: Vec<Range<u64>> = Vec::with_capacity(tensors.len());
    for TensorSpec { name, dims, ty } in tensors {
        let at = |problem| (Place::Tensor(name.clone()), problem);
        check_name(name, &mut names).map_err(at)?;
        let bytes = tensor_bytes(*ty, dims).map_err(at)?;
        let end = ranges.last().map_or(0, |range| range.end);
        let overflow = || at(Problem::OffsetOverflow { offset: end });
        let offset = align_up(end, alignment).ok_or_else(overflow)?;
        ranges.push(offset..offset.checked_add(bytes).ok_or_else(overflow)?);

        put_string(header, name);
        header.extend((dims.len() as u32).to_le_bytes());
        header.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        header.extend(ty.id().to_le_bytes());
        header.extend(offset.to_le_bytes());
    }
    Ok(ranges)
}

fn check_name<'a>(name: &'a str, seen: &mut HashSet<&'a str>) -> Result<(), Problem> {
    let length = name.len() as u64;
    if length > MAX_NAME_BYTES {
        return Err(Problem::NameLimit { length, limit: MAX_NAME_BYTES });
    }
    if !seen.insert(name) {
        return Err(Problem::Duplicate);
    }
    Ok(())
}

fn put_string(out: &mut Vec<u8>, string: &str) {
    out.extend((string.len() as u64).to_le_bytes());
    out.extend(string.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    out.extend(value.type_id().to_le_bytes());
    match value {
        Value::U8(v) => out.push(*v),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_string(out, v),
        Value::Array(v) => put_array(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.type_id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::U16(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::I16(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::U32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::I32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::F32(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::Bool(v) => out.extend(v.iter().map(|v| u8::from(*v))),
        Array::String(v) => v.iter().for_each(|v| put_string(out, v)),
        Array::U64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::I64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
        Array::F64(v) => out.extend(v.iter().flat_map(|v| v.to_le_bytes())),
    }
}
