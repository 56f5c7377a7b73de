//! Opens arbitrary bytes as a GGUF file and touches everything in it.
#![no_main]

use gguf::{GgufFile, dequantize_row};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let file = match GgufFile::from_vec("fuzz", bytes.to_vec()) {
        Ok(file) => file,
        Err(error) => {
            let message = error.to_string();
            assert!(message.len() < 4096 && !message.chars().any(char::is_control), "{message:?}");
            return;
        }
    };
    for (key, value) in file.metadata().iter() {
        let metadata = file.metadata();
        let _ = std::hint::black_box(metadata.usize(key));
        let _ = std::hint::black_box(metadata.f32_array(key));
        let _ = std::hint::black_box(metadata.strings(key));
        std::hint::black_box(value.to_string());
    }
    for tensor in file.tensors() {
        // The first row; a longer one would only repeat what its first blocks do.
        let block = tensor.ty.block_len();
        let row = (tensor.dims[0] as usize).min(4096 / block * block);
        let Some(size) = tensor.ty.row_bytes(row) else { continue };
        let mut out = vec![0.0; row];
        let _ = dequantize_row(tensor.ty, &file.tensor_bytes(tensor)[..size], &mut out);
    }
});
