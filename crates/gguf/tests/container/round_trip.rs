//! What the writer writes, the reader reads; and the writer's own errors.

use std::io::Write;

use gguf::{Array, Error, FileLayout, GgufFile, Metadata, TensorSpec, TensorType, Value, Writer};
use proptest::prelude::*;

fn spec(name: &str, dims: &[u64], ty: TensorType) -> TensorSpec {
    TensorSpec { name: name.to_owned(), dims: dims.to_vec(), ty }
}

fn write(
    metadata: &[(String, Value)],
    tensors: &[(TensorSpec, Vec<u8>)],
) -> Result<Vec<u8>, Error> {
    let specs: Vec<_> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let layout = FileLayout::new("new.gguf", metadata, &specs)?;
    let file_bytes = layout.file_bytes();
    let mut writer = Writer::new(Vec::new(), layout)?;
    for (spec, bytes) in tensors {
        writer.write_tensor(&spec.name, bytes)?;
    }
    let bytes = writer.finish()?;
    assert_eq!(bytes.len() as u64, file_bytes);
    Ok(bytes)
}

/// A file with one value of each kind that the getters are tried on.
fn sample_metadata() -> Vec<(String, Value)> {
    let entries: Vec<(&str, Value)> = vec![
        ("u32", 43u32.into()),
        ("i64", 43i64.into()),
        ("negative", (-1i32).into()),
        ("large", (1u64 << 40).into()),
        ("f32", 1.5f32.into()),
        ("f64", 2.5f64.into()),
        ("bool", true.into()),
        ("string", "deepseek4".into()),
        ("strings", vec!["a".to_owned(), "b".to_owned()].into()),
        ("ratios", vec![0i32, 4, 128].into()),
        ("floats", vec![10.0f32, 11.0].into()),
        ("doubles", vec![0.5f64].into()),
    ];
    entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

fn with_sample(check: impl FnOnce(&Metadata)) {
    let bytes = write(&sample_metadata(), &[]).unwrap();
    check(GgufFile::from_vec("sample.gguf", bytes).unwrap().metadata());
}

#[test]
fn getters_convert_what_loses_nothing() {
    with_sample(|metadata| {
        assert_eq!(metadata.usize("u32").unwrap(), 43);
        assert_eq!(metadata.u64("i64").unwrap(), 43);
        assert_eq!(metadata.u64("large").unwrap(), 1 << 40);
        assert_eq!(metadata.f32("f32").unwrap(), 1.5);
        assert_eq!(metadata.f32("f64").unwrap(), 2.5);
        assert!(metadata.bool("bool").unwrap());
        assert_eq!(metadata.str("string").unwrap(), "deepseek4");
        assert_eq!(metadata.strings("strings").unwrap(), ["a", "b"]);
        assert_eq!(metadata.usize_array("ratios").unwrap(), [0, 4, 128]);
        assert_eq!(metadata.u32_array("ratios").unwrap(), [0, 4, 128]);
        assert_eq!(metadata.f32_array("floats").unwrap(), [10.0, 11.0]);
        assert_eq!(metadata.f32_array("doubles").unwrap(), [0.5]);
        assert_eq!(metadata.optional::<u64>("absent").unwrap(), None);
        assert_eq!(metadata.optional::<u64>("u32").unwrap(), Some(43));
    });
}

#[test]
fn getters_say_what_they_found() {
    let message = |result: Result<(), Error>| result.unwrap_err().to_string();
    with_sample(|metadata| {
        assert_eq!(message(metadata.u64("absent").map(drop)), "sample.gguf: missing key absent");
        assert_eq!(
            message(metadata.u64("string").map(drop)),
            "sample.gguf: key string: found string, expected non-negative integer"
        );
        assert_eq!(
            message(metadata.usize("negative").map(drop)),
            "sample.gguf: key negative: found i32 -1, expected non-negative integer"
        );
        assert_eq!(
            message(metadata.required::<u32>("large").map(drop)),
            "sample.gguf: key large: found u64 1099511627776, \
             expected non-negative 32-bit integer"
        );
        assert_eq!(
            message(metadata.optional::<f32>("u32").map(drop)),
            "sample.gguf: key u32: found u32 43, expected float"
        );
        assert_eq!(
            message(metadata.strings("ratios").map(drop)),
            "sample.gguf: key ratios: found array of i32, expected array of string"
        );
        assert_eq!(
            message(metadata.usize_array("u32").map(drop)),
            "sample.gguf: key u32: found u32 43, expected array of non-negative integers"
        );
    });
}

#[test]
fn values_print_short() {
    let array = Value::from((0..100u32).collect::<Vec<_>>());
    assert_eq!(array.to_string(), "[0, 1, 2, 3, 4, 5, 6, 7, …] (100 elements)");
    assert_eq!(Value::from("a\nb").to_string(), "\"a\\nb\"");
    assert_eq!(array.type_name(), "array of u32");
}

#[test]
fn data_is_aligned_as_asked() {
    let tensors = [
        (spec("a", &[3], TensorType::F32), vec![1; 12]),
        (spec("b", &[32, 2], TensorType::Q8_0), vec![2; 68]),
        (spec("c", &[1], TensorType::F16), vec![3; 2]),
    ];
    for alignment in [8u32, 32, 4096] {
        let metadata = [("general.alignment".to_owned(), Value::from(alignment))];
        let bytes = write(&metadata, &tensors).unwrap();
        let file = GgufFile::from_vec("f", bytes).unwrap();
        for (tensor, (spec, data)) in file.tensors().iter().zip(&tensors) {
            assert_eq!((&tensor.name, &tensor.dims, tensor.ty), (&spec.name, &spec.dims, spec.ty));
            assert_eq!(tensor.range.start % alignment as usize, 0);
            assert_eq!(file.tensor_bytes(tensor), data);
        }
        assert_eq!(file.tensor("b").unwrap().rows(), 2);
    }
}

#[test]
fn writing_in_pieces_gives_the_same_file() {
    let tensors = [
        (spec("a", &[64], TensorType::F32), (0..=255).collect::<Vec<u8>>()),
        (spec("b", &[5], TensorType::F32), vec![7; 20]),
    ];
    let whole = write(&[], &tensors).unwrap();
    let specs: Vec<_> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let layout = FileLayout::new("new.gguf", &[], &specs).unwrap();
    let ranges: Vec<_> = (0..2).map(|index| layout.tensor_range(index)).collect();
    let mut writer = Writer::new(Vec::new(), layout).unwrap();
    for (spec, bytes) in &tensors {
        for piece in bytes.chunks(7) {
            writer.append(&spec.name, piece).unwrap();
        }
        writer.end_tensor(&spec.name).unwrap();
    }
    assert_eq!(writer.finish().unwrap(), whole);
    for (range, (_, bytes)) in ranges.into_iter().zip(&tensors) {
        assert_eq!(whole[range.start as usize..range.end as usize], bytes[..]);
    }
}

#[test]
fn writing_the_wrong_amount_or_order_is_an_error() {
    let writer = || {
        let specs = [spec("a", &[2], TensorType::F32), spec("b", &[2], TensorType::F32)];
        Writer::new(Vec::new(), FileLayout::new("new.gguf", &[], &specs).unwrap()).unwrap()
    };
    let message = |error: Error| error.to_string();
    assert_eq!(
        message(writer().write_tensor("a", &[0; 7]).unwrap_err()),
        "new.gguf: tensor a: given 7 bytes, expected 8"
    );
    assert_eq!(
        message(writer().write_tensor("a", &[0; 9]).unwrap_err()),
        "new.gguf: tensor a: given 9 bytes, expected 8"
    );
    assert_eq!(
        message(writer().write_tensor("b", &[0; 8]).unwrap_err()),
        "new.gguf: tensor b written out of order, expected tensor a"
    );
    assert_eq!(
        message(writer().finish().unwrap_err()),
        "new.gguf: end of file written out of order, expected tensor a"
    );
}

#[test]
fn a_layout_no_reader_would_accept_is_refused() {
    let layout = |metadata: &[(&str, Value)], specs: &[TensorSpec]| {
        let metadata: Vec<_> =
            metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        FileLayout::new("new.gguf", &metadata, specs).unwrap_err().to_string()
    };
    let f32 = TensorType::F32;
    assert_eq!(
        layout(&[("k", 1u32.into()), ("k", 2u32.into())], &[]),
        "new.gguf: key k: duplicate"
    );
    assert_eq!(
        layout(&[("general.alignment", 24u32.into())], &[]),
        "new.gguf: key general.alignment: found 24, expected a power of two, at least 8"
    );
    assert_eq!(
        layout(&[], &[spec("t", &[1], f32), spec("t", &[2], f32)]),
        "new.gguf: tensor t: duplicate"
    );
    assert_eq!(
        layout(&[], &[spec("t", &[100], TensorType::IQ2_XXS)]),
        "new.gguf: tensor t: row length 100 is not a multiple of 256 (IQ2_XXS)"
    );
    assert_eq!(
        layout(&[], &[spec("t", &[1 << 40, 1 << 40], f32)]),
        "new.gguf: tensor t: dims overflow: [1099511627776, 1099511627776]"
    );
    assert_eq!(
        layout(&[], &[spec("a", &[3 << 60], f32), spec("b", &[3 << 60], f32)]),
        "new.gguf: tensor b: offset 13835058055282163712 overflows"
    );
}

#[test]
fn files_on_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let message = |error: Error| error.to_string();
    assert!(message(GgufFile::open(&path).unwrap_err()).ends_with("(os error 2)"));
    assert_eq!(
        message(GgufFile::open(directory.path()).unwrap_err()),
        format!("{}: not a regular file", directory.path().display())
    );
    std::fs::File::create(&path).unwrap();
    assert_eq!(
        message(GgufFile::open(&path).unwrap_err()),
        format!("{}: not a GGUF file: only 0 bytes", path.display())
    );
    let tensor = (spec("t", &[4], TensorType::F32), (0..16).collect());
    let bytes = write(&sample_metadata(), &[tensor]).unwrap();
    std::fs::File::create(&path).unwrap().write_all(&bytes).unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.name(), path.display().to_string());
    assert_eq!(file.bytes(), bytes);
    assert_eq!(file.tensor_bytes(file.tensor("t").unwrap()), (0..16).collect::<Vec<u8>>());
}

#[test]
fn a_file_can_be_embedded() {
    let bytes: &'static [u8] = write(&sample_metadata(), &[]).unwrap().leak();
    let file = GgufFile::from_static("embedded", bytes).unwrap();
    assert_eq!(file.metadata().str("string").unwrap(), "deepseek4");
}

fn any_value() -> impl Strategy<Value = Value> {
    // Floats from integers: NaN would not compare equal.
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<i32>().prop_map(|v| Value::F32(v as f32)),
        any::<bool>().prop_map(Value::Bool),
        ".*".prop_map(Value::String),
        any_array().prop_map(Value::Array),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<i64>().prop_map(|v| Value::F64(v as f64)),
    ]
}

fn any_array() -> impl Strategy<Value = Array> {
    let n = 0..5usize;
    prop_oneof![
        prop::collection::vec(any::<u8>(), n.clone()).prop_map(Array::U8),
        prop::collection::vec(any::<i8>(), n.clone()).prop_map(Array::I8),
        prop::collection::vec(any::<u16>(), n.clone()).prop_map(Array::U16),
        prop::collection::vec(any::<i16>(), n.clone()).prop_map(Array::I16),
        prop::collection::vec(any::<u32>(), n.clone()).prop_map(Array::U32),
        prop::collection::vec(any::<i32>(), n.clone()).prop_map(Array::I32),
        prop::collection::vec(-1e9f32..1e9, n.clone()).prop_map(Array::F32),
        prop::collection::vec(any::<bool>(), n.clone()).prop_map(Array::Bool),
        prop::collection::vec(".*", n.clone()).prop_map(Array::String),
        prop::collection::vec(any::<u64>(), n.clone()).prop_map(Array::U64),
        prop::collection::vec(any::<i64>(), n.clone()).prop_map(Array::I64),
        prop::collection::vec(-1e9f64..1e9, n).prop_map(Array::F64),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        values in prop::collection::vec(any_value(), 0..20),
        shapes in prop::collection::vec((0usize..5, 1u64..4, 1u64..4), 0..6),
    ) {
        let metadata: Vec<_> =
            values.into_iter().enumerate().map(|(i, value)| (format!("key {i}"), value)).collect();
        let types = [TensorType::F32, TensorType::BF16, TensorType::Q8_0, TensorType::Q2_K, TensorType::I32];
        let tensors: Vec<_> = shapes.iter().enumerate().map(|(i, &(ty, blocks, rows))| {
            let ty = types[ty];
            let dims = [blocks * ty.block_len() as u64, rows];
            let bytes = vec![i as u8; ty.block_bytes() * (blocks * rows) as usize];
            (spec(&format!("tensor {i}"), &dims, ty), bytes)
        }).collect();

        let bytes = write(&metadata, &tensors).unwrap();
        let file = GgufFile::from_vec("f", bytes.clone()).unwrap();
        let read: Vec<_> =
            file.metadata().iter().map(|(key, value)| (key.to_owned(), value.clone())).collect();
        prop_assert_eq!(&read, &metadata);
        let read: Vec<_> = file.tensors().iter().map(|tensor| {
            let spec = TensorSpec { name: tensor.name.clone(), dims: tensor.dims.clone(), ty: tensor.ty };
            (spec, file.tensor_bytes(tensor).to_vec())
        }).collect();
        prop_assert_eq!(&read, &tensors);
        prop_assert_eq!(write(&metadata, &read).unwrap(), bytes);
    }
}

#[test]
fn a_layout_alone_can_be_read() {
    let specs = [spec("a", &[8, 1 << 30], TensorType::F32), spec("b", &[4], TensorType::F32)];
    let layout = FileLayout::new("planned.gguf", &sample_metadata(), &specs).unwrap();
    let file = GgufFile::from_layout(&layout).unwrap();
    assert_eq!(file.name(), "planned.gguf");
    assert_eq!(file.file_bytes(), layout.file_bytes());
    assert_eq!(file.bytes(), layout.header());
    assert_eq!(file.metadata().usize("u32").unwrap(), 43);
    for (i, (tensor, spec)) in file.tensors().iter().zip(&specs).enumerate() {
        assert_eq!((&tensor.name, &tensor.dims, tensor.ty), (&spec.name, &spec.dims, spec.ty));
        let range = layout.tensor_range(i);
        assert_eq!(tensor.range, range.start as usize..range.end as usize);
    }
}
