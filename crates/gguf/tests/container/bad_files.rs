//! Files that break one rule each, and the message that each must give.

use crate::file_bytes::{FileBytes, array, string};
use gguf::GgufFile;

const F32: u32 = 0;
const Q4_0: u32 = 2;
const Q2_K: u32 = 10;
const I8: u32 = 24;
const I32: u32 = 26;

/// What is wrong, the file, and the message after the file's name.
type Row = (&'static str, Vec<u8>, &'static str);

fn check(rows: Vec<Row>) {
    let mut failures = String::new();
    for (label, bytes, message) in rows {
        let found = match GgufFile::from_vec("bad.gguf", bytes) {
            Ok(_) => "accepted".to_owned(),
            Err(error) => error.to_string(),
        };
        if found != format!("bad.gguf: {message}") {
            failures += &format!("{label}:\n  found    {found}\n  expected {message}\n");
        }
    }
    assert!(failures.is_empty(), "\n{failures}");
}

fn new() -> FileBytes {
    FileBytes::new()
}

#[test]
fn header() {
    check(vec![
        ("empty", vec![], "not a GGUF file: only 0 bytes"),
        ("magic alone", b"GGUF".to_vec(), "not a GGUF file: only 4 bytes"),
        ("header cut", new().build()[..23].to_vec(), "not a GGUF file: only 23 bytes"),
        (
            "a zip file",
            new().magic(b"PK\x03\x04").build(),
            "not a GGUF file: starts with 50 4b 03 04, expected 47 47 55 46",
        ),
        (
            "magic swapped",
            new().magic(b"FUGG").build(),
            "not a GGUF file: starts with 46 55 47 47, expected 47 47 55 46",
        ),
        ("version 0", new().version(0).build(), "GGUF version: found 0, expected 3"),
        ("version 1", new().version(1).build(), "GGUF version: found 1, expected 3"),
        ("version 4", new().version(4).build(), "GGUF version: found 4, expected 3"),
        (
            "big-endian",
            new().version(3u32.swap_bytes()).build(),
            "GGUF version: big-endian GGUF is not supported",
        ),
        (
            "count of tensors: all ones",
            new().n_tensors(u64::MAX).build(),
            "n_tensors: found 18446744073709551615, expected at most 65536",
        ),
        (
            "count of keys: sign bit",
            new().n_kv(1 << 63).build(),
            "n_kv: found 9223372036854775808, expected at most 65536",
        ),
        (
            "count of tensors: one above the limit",
            new().n_tensors(65537).data(1 << 22).build(),
            "n_tensors: found 65537, expected at most 65536",
        ),
        // CVE-2026-27940: the count times the size of a descriptor wrapped, and the
        // table that was allocated for it was too small.
        (
            "count of tensors times descriptor wraps",
            new().n_tensors(u64::MAX / 368 + 1).build(),
            "n_tensors: found 50127021939428130, expected at most 65536",
        ),
        (
            "more tensors than bytes",
            new().n_tensors(65536).build(),
            "n_tensors: found 65536, more than the file can hold",
        ),
        (
            "one tensor and no byte for it",
            new().n_tensors(1).build(),
            "n_tensors: found 1, more than the file can hold",
        ),
        (
            "more keys than bytes",
            new().n_kv(3).key("a", 0, [1]).key("b", 0, [1]).build(),
            "n_kv: found 3, more than the file can hold",
        ),
    ]);
}

#[test]
fn keys() {
    let long_key = "k".repeat(65536);
    check(vec![
        (
            "key longer than the file",
            new().raw_key([&[0xff; 8][..], &[b'k'; 8]].concat()).build(),
            "key number 0: length 18446744073709551615 runs past the end of the file",
        ),
        (
            "key of 2^63 bytes",
            new().raw_key([&(1u64 << 63).to_le_bytes()[..], &[b'k'; 8]].concat()).build(),
            "key number 0: length 9223372036854775808 runs past the end of the file",
        ),
        (
            "second key one byte longer than the file",
            new().key("a", 0, [1]).raw_key([&6u64.to_le_bytes()[..], b"abcde"].concat()).build(),
            "key number 1: length 6 runs past the end of the file",
        ),
        (
            "key above the limit",
            new().key(&long_key, 0, [1]).build(),
            "key number 0: name of 65536 bytes, expected at most 65535",
        ),
        (
            "key not UTF-8",
            new().raw_key([&string(b"ab\xff"), &[0; 8][..]].concat()).build(),
            "key number 0: not UTF-8 at byte 2",
        ),
        (
            "key twice",
            new().key("a", 0, [1]).key("b", 0, [1]).key("a", 4, [1, 0, 0, 0]).build(),
            "key a: duplicate",
        ),
        (
            "duplicate key with control characters",
            new().key("a\x1b[2J\n", 0, [1]).key("a\x1b[2J\n", 0, [1]).build(),
            "key a\\u{1b}[2J\\n: duplicate",
        ),
        (
            "duplicate key that reverses the text",
            new().key("a\u{202e}b", 0, [1]).key("a\u{202e}b", 0, [1]).build(),
            "key a\\u{202e}b: duplicate",
        ),
        ("value type 13", new().key("k", 13, [0; 8]).build(), "key k: value type 13 unknown"),
        (
            "value type all ones",
            new().key("k", u32::MAX, [0; 8]).build(),
            "key k: value type 4294967295 unknown",
        ),
        (
            "value type cut",
            new().raw_key([&string("the key")[..], &[4, 0, 0]].concat()).build(),
            "key the key: the file ends inside it (truncated download?)",
        ),
        (
            "value cut",
            new().key("the key", 10, [0; 7]).build(),
            "key the key: the file ends inside it (truncated download?)",
        ),
        ("bool 2", new().key("k", 7, [2]).build(), "key k: bool is byte 2, expected 0 or 1"),
    ]);
}

#[test]
fn strings_and_arrays() {
    let string_past_end = [&9u64.to_le_bytes()[..], b"12345678"].concat();
    let second_string_past_end = [string("a"), string_past_end.clone()].concat();
    check(vec![
        (
            "string one byte longer than the file",
            new().key("k", 8, &string_past_end).build(),
            "key k: length 9 runs past the end of the file",
        ),
        (
            "string of 2^63 bytes",
            new().key("k", 8, (1u64 << 63).to_le_bytes()).build(),
            "key k: length 9223372036854775808 runs past the end of the file",
        ),
        (
            "string not UTF-8",
            new().key("k", 8, string(b"caf\xe9")).build(),
            "key k: not UTF-8 at byte 3",
        ),
        (
            "string that encodes a surrogate",
            new().key("k", 8, string(b"\xed\xa0\x80")).build(),
            "key k: not UTF-8 at byte 0",
        ),
        (
            "array of 2^61 u64: the size wraps to 0",
            new().key("k", 9, array(10, 1 << 61, &[0; 8])).build(),
            "key k: length 2305843009213693952 runs past the end of the file",
        ),
        (
            "array of 2^61 + 1 u64: the size wraps to 8",
            new().key("k", 9, array(10, (1 << 61) + 1, &[0; 8])).build(),
            "key k: length 2305843009213693953 runs past the end of the file",
        ),
        (
            "array of all ones bytes",
            new().key("k", 9, array(0, u64::MAX, &[0; 8])).build(),
            "key k: length 18446744073709551615 runs past the end of the file",
        ),
        (
            "array one element longer than the file",
            new().key("k", 9, array(4, 3, &[0; 11])).build(),
            "key k: length 3 runs past the end of the file",
        ),
        (
            "array of a billion strings",
            new().key("k", 9, array(8, 1 << 30, &string("a"))).build(),
            "key k: length 1073741824 runs past the end of the file",
        ),
        (
            "array of strings whose second is too long",
            new().key("k", 9, array(8, 2, &second_string_past_end)).build(),
            "key k: length 9 runs past the end of the file",
        ),
        (
            "array of bools with a 255",
            new().key("k", 9, array(7, 3, &[0, 1, 255])).build(),
            "key k: bool is byte 255, expected 0 or 1",
        ),
        (
            "array of arrays",
            new().key("k", 9, array(9, 1, &array(0, 1, &[0]))).build(),
            "key k: arrays of arrays are not supported",
        ),
        (
            "arrays nested 1000 deep",
            new().key("k", 9, array(9, 1, &[]).repeat(1000)).build(),
            "key k: arrays of arrays are not supported",
        ),
        (
            "array of an unknown type",
            new().key("k", 9, array(13, 1, &[0; 8])).build(),
            "key k: value type 13 unknown",
        ),
    ]);
}

#[test]
fn alignment() {
    let with = |value_type: u32, value: &[u8]| new().key("general.alignment", value_type, value);
    check(vec![
        (
            "0",
            with(4, &0u32.to_le_bytes()).build(),
            "key general.alignment: found 0, expected a power of two, at least 8",
        ),
        (
            "12",
            with(4, &12u32.to_le_bytes()).build(),
            "key general.alignment: found 12, expected a power of two, at least 8",
        ),
        (
            "4",
            with(4, &4u32.to_le_bytes()).build(),
            "key general.alignment: found 4, expected a power of two, at least 8",
        ),
        (
            "-32",
            with(5, &(-32i32).to_le_bytes()).build(),
            "key general.alignment: found -32, expected a power of two, at least 8",
        ),
        (
            "2^63",
            with(10, &(1u64 << 63).to_le_bytes()).build(),
            "key general.alignment: found 9223372036854775808, expected a power of two, at least 8",
        ),
        (
            "a string",
            with(8, &string("32")).build(),
            "key general.alignment: found \"32\", expected a power of two, at least 8",
        ),
        (
            "padding of 2 GiB in a small file",
            with(4, &(1u32 << 31).to_le_bytes()).tensor("t", &[8], F32, 0).data(32).build(),
            "tensor t: needs bytes 2147483648..2147483680, file has 128 (truncated download?)",
        ),
    ]);
}

#[test]
fn tensor_table() {
    let many_dims = [&string("t")[..], &u32::MAX.to_le_bytes(), &[1; 64]].concat();
    check(vec![
        (
            "name longer than the file",
            new().raw_tensor([&[0xff; 8][..], &[b't'; 32]].concat()).build(),
            "tensor number 0: length 18446744073709551615 runs past the end of the file",
        ),
        (
            "name not UTF-8",
            new().raw_tensor([&string(b"\xc0\x80")[..], &[0; 32]].concat()).build(),
            "tensor number 0: not UTF-8 at byte 0",
        ),
        (
            "name twice",
            new().tensor("t", &[8], F32, 0).tensor("t", &[8], F32, 32).data(64).build(),
            "tensor t: duplicate",
        ),
        (
            "no dimensions",
            new().tensor("t", &[], F32, 0).data(64).build(),
            "tensor t: found 0 dimensions, expected 1 to 4",
        ),
        (
            "five dimensions",
            new().tensor("t", &[1; 5], F32, 0).data(64).build(),
            "tensor t: found 5 dimensions, expected 1 to 4",
        ),
        (
            "four billion dimensions",
            new().raw_tensor(many_dims).build(),
            "tensor t: found 4294967295 dimensions, expected 1 to 4",
        ),
        (
            "a dimension of zero",
            new().tensor("t", &[8, 0, 8], F32, 0).data(64).build(),
            "tensor t: dimension 1 is 0",
        ),
        (
            "entry cut after its dimensions",
            new().raw_tensor([&string("a tensor")[..], &[2, 0, 0, 0], &[1; 19]].concat()).build(),
            "tensor a tensor: the file ends inside it (truncated download?)",
        ),
        (
            "type removed from the format",
            new().tensor("t", &[32], 4, 0).data(64).build(),
            "tensor t: type 4 unknown",
        ),
        (
            "type all ones",
            new().tensor("t", &[32], u32::MAX, 0).data(64).build(),
            "tensor t: type 4294967295 unknown",
        ),
        (
            "row of part of a block",
            new().tensor("t", &[100, 2], Q2_K, 0).data(256).build(),
            "tensor t: row length 100 is not a multiple of 256 (Q2_K)",
        ),
        (
            "row of part of a block, whole blocks in all",
            new().tensor("t", &[128, 2], Q2_K, 0).data(256).build(),
            "tensor t: row length 128 is not a multiple of 256 (Q2_K)",
        ),
        (
            "elements wrap to 0",
            new().tensor("t", &[1 << 32, 1 << 32], F32, 0).data(64).build(),
            "tensor t: dims overflow: [4294967296, 4294967296]",
        ),
        (
            "elements wrap to a small number",
            new().tensor("t", &[u64::MAX, u64::MAX], I8, 0).data(64).build(),
            "tensor t: dims overflow: [18446744073709551615, 18446744073709551615]",
        ),
        (
            "elements fit in 64 bits but not with a sign",
            new().tensor("t", &[i64::MAX as u64, 2], I8, 0).data(64).build(),
            "tensor t: offset 0 overflows",
        ),
        // CVE-2026-33298: elements fit, bytes wrap.
        (
            "bytes wrap to 0",
            new().tensor("t", &[1 << 62], F32, 0).data(64).build(),
            "tensor t: dims overflow: [4611686018427387904]",
        ),
        (
            "elements times block size wraps before it is divided",
            new().tensor("t", &[5124095576030431008], Q4_0, 0).data(64).build(),
            "tensor t: needs bytes 64..2882303761517117506, file has 128 (truncated download?)",
        ),
    ]);
}

#[test]
fn tensor_data() {
    check(vec![
        (
            "offset off the alignment",
            new().tensor("t", &[4], F32, 16).data(64).build(),
            "tensor t: offset 16 is not a multiple of the alignment 32",
        ),
        (
            "offset 2^64 − 32: its start wraps",
            new().tensor("t", &[4], F32, u64::MAX - 31).data(64).build(),
            "tensor t: offset 18446744073709551584 overflows",
        ),
        (
            "offset 2^64 − 128: its end wraps",
            new().tensor("t", &[32], F32, u64::MAX - 127).data(64).build(),
            "tensor t: offset 18446744073709551488 overflows",
        ),
        // CVE-2026-7482: an offset and a size beyond the file were read all the same.
        (
            "offset behind the file",
            new().tensor("t", &[8], F32, 4096).data(64).build(),
            "tensor t: needs bytes 4160..4192, file has 128 (truncated download?)",
        ),
        (
            "a large tensor in a small file",
            new().tensor("t", &[4096, 129280], F32, 0).data(64).build(),
            "tensor t: needs bytes 96..2118123616, file has 160 (truncated download?)",
        ),
        (
            "one byte short",
            new().tensor("t", &[16], F32, 0).data(63).build(),
            "tensor t: needs bytes 64..128, file has 127 (truncated download?)",
        ),
        (
            "no data section",
            new().tensor("t", &[1], F32, 0).build(),
            "tensor t: needs bytes 64..68, file has 57 (truncated download?)",
        ),
        // CVE-2025-53630: each size was right, their sum wrapped, and the buffer
        // for all was too small.
        (
            "sizes whose sum wraps",
            new()
                .tensor("a", &[1 << 60, 7], I8, 0)
                .tensor("b", &[1 << 60, 9], I8, 7 << 60)
                .data(64)
                .build(),
            "tensor a: needs bytes 128..8070450532247928960, file has 192 (truncated download?)",
        ),
        (
            "one tensor inside another",
            new().tensor("a", &[32], F32, 0).tensor("b", &[8], I32, 32).data(128).build(),
            "tensor b: overlaps tensor a",
        ),
        (
            "two tensors in one place, out of order",
            new()
                .tensor("a", &[8], F32, 64)
                .tensor("b", &[8], F32, 0)
                .tensor("c", &[8], F32, 64)
                .data(128)
                .build(),
            "tensor c: overlaps tensor a",
        ),
    ]);
}
