//! Header, metadata and tensor table of a file, checked in file order; the
//! first broken rule is the error.
//!
//! The bytes are hostile: nothing is allocated before it is known that the
//! file has bytes for it, so memory stays within a small multiple of the file.

use std::{collections::HashMap, ops::Range};

use indexmap::{IndexMap, map::Entry};

use crate::{
    Array, Error, TensorInfo, TensorType, Value,
    cursor::Cursor,
    error::{Place, Problem},
    layout::{
        ALIGNMENT_KEY, HEADER_BYTES, MAGIC, MAX_DIMENSIONS, MAX_ENTRIES, MAX_NAME_BYTES, VERSION,
        align_up, alignment, tensor_bytes,
    },
};

/// What a file says about itself.
pub(crate) struct Contents {
    /// Metadata in file order.
    pub(crate) metadata: IndexMap<String, Value>,
    /// Tensors in file order.
    pub(crate) tensors: Vec<TensorInfo>,
    /// Index into `tensors` by name.
    pub(crate) by_name: HashMap<String, usize>,
}

/// Reads everything but tensor data from `bytes`, the beginning of a file of `file_bytes`. `file`
/// is the file's name in messages.
pub(crate) fn parse(file: &str, bytes: &[u8], file_bytes: usize) -> Result<Contents, Error> {
    check_magic(file, bytes)?;
    let mut cursor = Cursor::new(bytes, MAGIC.len());
    parse_after_magic(&mut cursor, file_bytes).map_err(|(place, problem)| Error::Malformed {
        file: file.to_owned(),
        place,
        problem,
    })
}

/// A problem and where it is; the file's name is added at the end.
type Located<T> = Result<T, (Place, Problem)>;

/// Adds the place to a problem.
trait At<T> {
    fn at(self, place: impl FnOnce() -> Place) -> Located<T>;
}

impl<T> At<T> for Result<T, Problem> {
    fn at(self, place: impl FnOnce() -> Place) -> Located<T> {
        self.map_err(|problem| (place(), problem))
    }
}

fn check_magic(file: &str, bytes: &[u8]) -> Result<(), Error> {
    let not_gguf = |reason| Err(Error::NotGguf { file: file.to_owned(), reason });
    if bytes.len() < HEADER_BYTES {
        return not_gguf(format!("only {} bytes", bytes.len()));
    }
    if !bytes.starts_with(&MAGIC) {
        let start: Vec<_> = bytes[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        return not_gguf(format!("starts with {}, expected 47 47 55 46", start.join(" ")));
    }
    Ok(())
}

fn parse_after_magic(cursor: &mut Cursor<'_>, file_bytes: usize) -> Located<Contents> {
    check_version(cursor).at(|| Place::Header("GGUF version"))?;
    let tensor_count = entry_count(cursor).at(|| Place::Header("n_tensors"))?;
    let key_count = entry_count(cursor).at(|| Place::Header("n_kv"))?;
    check_room(tensor_count, MIN_TENSOR_BYTES, cursor).at(|| Place::Header("n_tensors"))?;
    check_room(key_count, MIN_KEY_BYTES, cursor).at(|| Place::Header("n_kv"))?;

    let metadata = parse_metadata(cursor, key_count)?;
    let alignment =
        alignment(metadata.get(ALIGNMENT_KEY)).at(|| Place::Key(ALIGNMENT_KEY.to_owned()))?;
    let entries = parse_tensor_table(cursor, tensor_count)?;
    let data = DataSection::after(cursor.position(), alignment, file_bytes);
    let tensors = place_tensors(entries, &data)?;
    let by_name = index_names(&tensors)?;
    check_overlap(&tensors)?;
    Ok(Contents { metadata, tensors, by_name })
}

fn check_version(cursor: &mut Cursor<'_>) -> Result<(), Problem> {
    match cursor.u32()? {
        VERSION | 2 => Ok(()),
        swapped if matches!(swapped.swap_bytes(), 1..=VERSION) => Err(Problem::BigEndian),
        found => Err(Problem::Version { found }),
    }
}

/// Bytes of the smallest metadata entry: an empty key, a type, one byte.
const MIN_KEY_BYTES: usize = 8 + 4 + 1;
/// Bytes of the smallest tensor entry: an empty name, one dimension, type, offset.
const MIN_TENSOR_BYTES: usize = 8 + 4 + 8 + 4 + 8;

fn entry_count(cursor: &mut Cursor<'_>) -> Result<u64, Problem> {
    let found = cursor.u64()?;
    if found > MAX_ENTRIES {
        return Err(Problem::CountLimit { found, limit: MAX_ENTRIES });
    }
    Ok(found)
}

/// Refuses a `count` (at most [`MAX_ENTRIES`]) of entries that can't all be there.
fn check_room(count: u64, entry_bytes: usize, cursor: &Cursor<'_>) -> Result<(), Problem> {
    if count * entry_bytes as u64 > cursor.remaining() as u64 {
        return Err(Problem::CountPastEnd { found: count });
    }
    Ok(())
}

fn parse_metadata(cursor: &mut Cursor<'_>, count: u64) -> Located<IndexMap<String, Value>> {
    let mut metadata = IndexMap::new();
    for number in 0..count {
        let key = name(cursor).at(|| Place::KeyNumber(number))?;
        let value = value(cursor).at(|| Place::Key(key.to_owned()))?;
        match metadata.entry(key.to_owned()) {
            Entry::Vacant(vacant) => vacant.insert(value),
            Entry::Occupied(_) => return Err((Place::Key(key.to_owned()), Problem::Duplicate)),
        };
    }
    Ok(metadata)
}

/// A key or a tensor's name.
fn name<'a>(cursor: &mut Cursor<'a>) -> Result<&'a str, Problem> {
    let name = cursor.string()?;
    let length = name.len() as u64;
    if length > MAX_NAME_BYTES {
        return Err(Problem::NameLimit { length, limit: MAX_NAME_BYTES });
    }
    Ok(name)
}

fn value(cursor: &mut Cursor<'_>) -> Result<Value, Problem> {
    Ok(match cursor.u32()? {
        0 => Value::U8(u8::from_le_bytes(cursor.array()?)),
        1 => Value::I8(i8::from_le_bytes(cursor.array()?)),
        2 => Value::U16(u16::from_le_bytes(cursor.array()?)),
        3 => Value::I16(i16::from_le_bytes(cursor.array()?)),
        4 => Value::U32(cursor.u32()?),
        5 => Value::I32(i32::from_le_bytes(cursor.array()?)),
        6 => Value::F32(f32::from_le_bytes(cursor.array()?)),
        7 => Value::Bool(boolean(cursor)?),
        8 => Value::String(cursor.string()?.to_owned()),
        9 => Value::Array(array(cursor)?),
        10 => Value::U64(cursor.u64()?),
        11 => Value::I64(i64::from_le_bytes(cursor.array()?)),
        12 => Value::F64(f64::from_le_bytes(cursor.array()?)),
        id => return Err(Problem::UnknownValueType { id }),
    })
}

fn boolean(cursor: &mut Cursor<'_>) -> Result<bool, Problem> {
    match cursor.array()? {
        [0] => Ok(false),
        [1] => Ok(true),
        [byte] => Err(Problem::BadBool { byte }),
    }
}

fn array(cursor: &mut Cursor<'_>) -> Result<Array, Problem> {
    Ok(match cursor.u32()? {
        0 => Array::U8(numbers(cursor, u8::from_le_bytes)?),
        1 => Array::I8(numbers(cursor, i8::from_le_bytes)?),
        2 => Array::U16(numbers(cursor, u16::from_le_bytes)?),
        3 => Array::I16(numbers(cursor, i16::from_le_bytes)?),
        4 => Array::U32(numbers(cursor, u32::from_le_bytes)?),
        5 => Array::I32(numbers(cursor, i32::from_le_bytes)?),
        6 => Array::F32(numbers(cursor, f32::from_le_bytes)?),
        7 => Array::Bool(elements(cursor, 1, boolean)?),
        // An empty string is its length alone.
        8 => Array::String(elements(cursor, 8, |cursor| cursor.string().map(str::to_owned))?),
        9 => return Err(Problem::NestedArray),
        10 => Array::U64(numbers(cursor, u64::from_le_bytes)?),
        11 => Array::I64(numbers(cursor, i64::from_le_bytes)?),
        12 => Array::F64(numbers(cursor, f64::from_le_bytes)?),
        id => return Err(Problem::UnknownValueType { id }),
    })
}

fn numbers<T, const N: usize>(
    cursor: &mut Cursor<'_>,
    convert: fn([u8; N]) -> T,
) -> Result<Vec<T>, Problem> {
    elements(cursor, N, |cursor| cursor.array().map(convert))
}

/// A count, then that many elements of at least `element_bytes` bytes each.
fn elements<'a, T>(
    cursor: &mut Cursor<'a>,
    element_bytes: usize,
    mut read: impl FnMut(&mut Cursor<'a>) -> Result<T, Problem>,
) -> Result<Vec<T>, Problem> {
    let count = cursor.count(element_bytes)?;
    (0..count).map(|_| read(cursor)).collect()
}

/// An entry of the tensor table.
struct TableEntry {
    name: String,
    dims: Vec<u64>,
    ty: TensorType,
    /// From the start of the data section.
    offset: u64,
    bytes: u64,
}

fn parse_tensor_table(cursor: &mut Cursor<'_>, count: u64) -> Located<Vec<TableEntry>> {
    (0..count)
        .map(|number| {
            let name = name(cursor).at(|| Place::TensorNumber(number))?;
            parse_tensor_entry(cursor, name).at(|| Place::Tensor(name.to_owned()))
        })
        .collect()
}

fn parse_tensor_entry(cursor: &mut Cursor<'_>, name: &str) -> Result<TableEntry, Problem> {
    let count = cursor.u32()?;
    if count == 0 || count > MAX_DIMENSIONS {
        return Err(Problem::DimensionCount { found: count });
    }
    let dims = (0..count).map(|_| cursor.u64()).collect::<Result<Vec<_>, _>>()?;
    let id = cursor.u32()?;
    let ty = TensorType::from_id(id).ok_or(Problem::UnknownTensorType { id })?;
    let bytes = tensor_bytes(ty, &dims)?;
    let offset = cursor.u64()?;
    Ok(TableEntry { name: name.to_owned(), dims, ty, offset, bytes })
}

/// Where tensor data lies.
struct DataSection {
    /// From the start of the file. `None` if the padding before it overflows.
    start: Option<u64>,
    alignment: u64,
    file_bytes: u64,
}

impl DataSection {
    fn after(table_end: usize, alignment: u64, file_bytes: usize) -> Self {
        let start = align_up(table_end as u64, alignment);
        DataSection { start, alignment, file_bytes: file_bytes as u64 }
    }

    /// Bytes `offset..offset + bytes` of the section, as a range of the file.
    fn range(&self, offset: u64, bytes: u64) -> Result<Range<usize>, Problem> {
        let alignment = self.alignment;
        if !offset.is_multiple_of(alignment) {
            return Err(Problem::Misaligned { offset, alignment });
        }
        let overflow = Problem::OffsetOverflow { offset };
        let Some(start) = self.start.and_then(|start| start.checked_add(offset)) else {
            return Err(overflow);
        };
        let Some(end) = start.checked_add(bytes) else {
            return Err(overflow);
        };
        let past_end = Problem::PastEnd { start, end, size: self.file_bytes };
        if end > self.file_bytes {
            return Err(past_end);
        }
        // The file is in memory, so its positions fit in a usize.
        match (usize::try_from(start), usize::try_from(end)) {
            (Ok(start), Ok(end)) => Ok(start..end),
            _ => Err(past_end),
        }
    }
}

fn place_tensors(entries: Vec<TableEntry>, data: &DataSection) -> Located<Vec<TensorInfo>> {
    entries
        .into_iter()
        .map(|TableEntry { name, dims, ty, offset, bytes }| match data.range(offset, bytes) {
            Ok(range) => Ok(TensorInfo { name, dims, ty, range }),
            Err(problem) => Err((Place::Tensor(name), problem)),
        })
        .collect()
}

fn index_names(tensors: &[TensorInfo]) -> Located<HashMap<String, usize>> {
    let mut by_name = HashMap::with_capacity(tensors.len());
    for (index, tensor) in tensors.iter().enumerate() {
        if by_name.insert(tensor.name.clone(), index).is_some() {
            return Err((Place::Tensor(tensor.name.clone()), Problem::Duplicate));
        }
    }
    Ok(by_name)
}

fn check_overlap(tensors: &[TensorInfo]) -> Located<()> {
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.range.start);
    for pair in order.windows(2) {
        if pair[0].range.end > pair[1].range.start {
            let other = pair[0].name.clone();
            return Err((Place::Tensor(pair[1].name.clone()), Problem::Overlap { other }));
        }
    }
    Ok(())
}
