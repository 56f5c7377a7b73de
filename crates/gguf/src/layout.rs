//! Rules that reader and writer share: limits, alignment, and the size of a
//! tensor from its type and shape. All arithmetic is checked.

use crate::{TensorType, Value, error::Problem};

/// First bytes of every file.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
/// Version that is written. Version 2 has the same layout and is read too.
pub(crate) const VERSION: u32 = 3;
/// Magic, version, number of tensors and number of metadata entries.
pub(crate) const HEADER_BYTES: usize = 24;
/// Most metadata entries, and most tensors, of a file. The largest real files
/// have a few thousand.
pub(crate) const MAX_ENTRIES: u64 = 65536;
/// Longest key or tensor name, in bytes.
pub(crate) const MAX_NAME_BYTES: u64 = 65535;
/// Most dimensions of a tensor.
pub(crate) const MAX_DIMENSIONS: u32 = 4;
/// Key of the alignment.
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
/// Alignment of a file that names none.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Smallest alignment: that of the widest element.
const MIN_ALIGNMENT: u64 = 8;
/// Largest alignment: the key is meant to be a u32.
const MAX_ALIGNMENT: u64 = 1 << 31;

/// The alignment that the value of [`ALIGNMENT_KEY`] asks for.
pub(crate) fn alignment(value: Option<&Value>) -> Result<u64, Problem> {
    let Some(value) = value else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let valid = |n: &u64| n.is_power_of_two() && (MIN_ALIGNMENT..=MAX_ALIGNMENT).contains(n);
    let problem = || Problem::Alignment { found: value.to_string(), least: MIN_ALIGNMENT };
    value.as_u64().filter(valid).ok_or_else(problem)
}

/// Bytes of a tensor of type `ty` with dimensions `dims`, fastest first.
pub(crate) fn tensor_bytes(ty: TensorType, dims: &[u64]) -> Result<u64, Problem> {
    let count = u32::try_from(dims.len()).unwrap_or(u32::MAX);
    if count == 0 || count > MAX_DIMENSIONS {
        return Err(Problem::DimensionCount { found: count });
    }
    if let Some(index) = dims.iter().position(|&dim| dim == 0) {
        return Err(Problem::ZeroDimension { index });
    }
    let overflow = || Problem::DimsOverflow { dims: dims.to_vec() };
    let elements = dims.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim)).ok_or_else(overflow)?;
    let block_len = ty.block_len() as u64;
    if !dims[0].is_multiple_of(block_len) {
        return Err(Problem::PartialBlock { cols: dims[0], ty });
    }
    (elements / block_len).checked_mul(ty.block_bytes() as u64).ok_or_else(overflow)
}

/// `offset` rounded up to a multiple of the power of two `alignment`.
pub(crate) fn align_up(offset: u64, alignment: u64) -> Option<u64> {
    Some(offset.checked_add(alignment - 1)? & !(alignment - 1))
}
