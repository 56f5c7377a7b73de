//! Damaged files and random bytes: any result but a panic is fine, and what
//! opens must be usable.

use crate::file_bytes::{FileBytes, array, string};
use gguf::{GgufFile, TensorType, dequantize_row};
use proptest::prelude::*;

/// A small file with every value type and a tensor of every readable type.
fn valid_file() -> Vec<u8> {
    let mut file = FileBytes::new();
    for value_type in [0u32, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12] {
        let size = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8][value_type as usize];
        let one = &[1, 0, 0, 0, 0, 0, 0, 0][..size];
        file = file.key(&format!("v{value_type}"), value_type, one);
        file = file.key(&format!("a{value_type}"), 9, array(value_type, 2, &one.repeat(2)));
    }
    file = file.key("general.alignment", 4, 32u32.to_le_bytes());
    file = file.key("s", 8, string("text"));
    file = file.key("as", 9, array(8, 2, &[string("one"), string("two")].concat()));
    let mut offset = 0;
    for ty in TensorType::ALL.iter().filter(|ty| ty.is_readable()) {
        let rows = 2;
        file = file.tensor(ty.name(), &[ty.block_len() as u64, rows], ty.id(), offset);
        offset = (offset + rows * ty.block_bytes() as u64).next_multiple_of(32);
    }
    file.data(offset as usize).build()
}

/// Reads everything that can be read of a file, if it opens.
fn use_file(bytes: Vec<u8>) {
    let file = match GgufFile::from_vec("f", bytes) {
        Ok(file) => file,
        Err(error) => {
            let message = error.to_string();
            assert!(!message.chars().any(char::is_control) && message.len() < 2000, "{message:?}");
            return;
        }
    };
    for (key, value) in file.metadata().iter() {
        assert_eq!(file.metadata().get(key).map(|v| v.to_string()), Some(value.to_string()));
    }
    for tensor in file.tensors() {
        assert_eq!(file.tensor(&tensor.name), Some(tensor));
        let row_bytes = usize::try_from(tensor.cols())
            .ok()
            .and_then(|cols| tensor.ty.row_bytes(cols))
            .expect("row size was checked");
        let row = &file.tensor_bytes(tensor)[..row_bytes];
        if tensor.ty.is_readable() {
            dequantize_row(tensor.ty, row, &mut vec![0.0; tensor.cols() as usize]).unwrap();
        }
    }
}

#[test]
fn the_undamaged_file_opens() {
    let file = GgufFile::from_vec("f", valid_file()).unwrap();
    assert_eq!((file.metadata().len(), file.tensors().len()), (25, 8));
    use_file(valid_file());
}

#[test]
fn cut_anywhere_it_is_refused() {
    let bytes = valid_file();
    let last_tensor_end =
        GgufFile::from_vec("f", bytes.clone()).unwrap().tensors().last().unwrap().range.end;
    for length in 0..last_tensor_end {
        assert!(GgufFile::from_vec("f", bytes[..length].to_vec()).is_err(), "{length}");
    }
    assert!(GgufFile::from_vec("f", bytes[..last_tensor_end].to_vec()).is_ok());
}

#[test]
fn every_byte_can_be_wrong() {
    let bytes = valid_file();
    for position in 0..bytes.len() {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff, bytes[position] ^ 0x10] {
            let mut damaged = bytes.clone();
            damaged[position] = value;
            use_file(damaged);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn many_bytes_can_be_wrong(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..30)
    ) {
        let mut bytes = valid_file();
        for (position, value) in damage {
            let position = position.index(bytes.len());
            bytes[position] = value;
        }
        use_file(bytes);
    }

    #[test]
    fn random_bytes_after_a_valid_header(
        counts in (0u64..4, 0u64..4), rest in prop::collection::vec(any::<u8>(), 0..300)
    ) {
        let header = FileBytes::new().n_tensors(counts.0).n_kv(counts.1).build();
        use_file([header, rest].concat());
    }

    #[test]
    fn random_blocks_dequantise(bytes in prop::collection::vec(any::<u8>(), 292)) {
        for &ty in TensorType::ALL {
            let mut row = vec![0.0; ty.block_len()];
            let result = dequantize_row(ty, &bytes[..ty.block_bytes()], &mut row);
            prop_assert_eq!(result.is_ok(), ty.is_readable());
        }
    }

    #[test]
    fn rows_of_a_wrong_size_are_refused(bytes in 0usize..600, cols in 0usize..600) {
        for &ty in TensorType::ALL.iter().filter(|ty| ty.is_readable()) {
            let result = dequantize_row(ty, &vec![0; bytes], &mut vec![0.0; cols]);
            prop_assert_eq!(result.is_ok(), ty.row_bytes(cols) == Some(bytes));
        }
    }
}
