//! The `.dat` format: a count, then for each tensor its name, a number of calls and f32 values
//! that are sums over the calls; at the end a number of chunks and the dataset's name. Integers
//! are i32, everything is little-endian.

use std::collections::BTreeMap;

use super::{ImportanceMatrix, check_values};
use crate::error::{Error, Result, shown};

pub(super) fn read(file: String, bytes: &[u8]) -> Result<ImportanceMatrix> {
    let mut reader = Reader { file: &file, rest: bytes };
    let count = reader.count("number of entries")?;
    let mut entries = BTreeMap::new();
    for number in 0..count {
        let what = format!("entry {number}");
        let name = reader.text(&what)?;
        let calls = reader.count(&what)?;
        if calls == 0 {
            return Err(reader.wrong(&what, "0 calls", "at least one"));
        }
        let length = reader.count(&what)?;
        let values = reader.take(length.checked_mul(4), &what)?.as_chunks::<4>().0;
        let values = values.iter().map(|bytes| f32::from_le_bytes(*bytes) / calls as f32);
        let values: Vec<f32> = values.collect();
        check_values(&file, &name, &values)?;
        if entries.contains_key(&name) {
            return Err(reader.wrong(&what, &format!("{} again", shown(&name)), "another tensor"));
        }
        entries.insert(name, values);
    }
    // Older writers end here.
    let (chunks, dataset) = match reader.rest.is_empty() {
        true => (0, String::new()),
        false => (reader.count("number of chunks")?, reader.text("dataset")?),
    };
    if !reader.rest.is_empty() {
        let found = format!("{} bytes more", reader.rest.len());
        return Err(reader.wrong("end", &found, "none"));
    }
    Ok(ImportanceMatrix { file, dataset, chunks: chunks as u64, entries })
}

pub(super) fn write(matrix: &ImportanceMatrix) -> Vec<u8> {
    let mut out = Vec::new();
    put_count(&mut out, matrix.entries.len());
    for (name, values) in &matrix.entries {
        put_text(&mut out, name);
        put_count(&mut out, 1);
        put_count(&mut out, values.len());
        out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
    put_count(&mut out, matrix.chunks as usize);
    put_text(&mut out, &matrix.dataset);
    out
}

/// Counts of everything that this program writes are far below the format's limit.
fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend(i32::try_from(count).unwrap_or(i32::MAX).to_le_bytes());
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_count(out, text.len());
    out.extend(text.as_bytes());
}

struct Reader<'a> {
    file: &'a str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: Option<usize>, what: &str) -> Result<&'a [u8]> {
        match length.and_then(|length| self.rest.split_at_checked(length)) {
            Some((taken, rest)) => {
                self.rest = rest;
                Ok(taken)
            }
            None => {
                let found = format!("{} bytes", self.rest.len());
                Err(self.wrong(what, &found, "more (no importance matrix, or a damaged one)"))
            }
        }
    }

    fn count(&mut self, what: &str) -> Result<usize> {
        let bytes = self.take(Some(4), what)?;
        let count = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let wrong = || self.wrong(what, &count.to_string(), "a count of at least 0");
        usize::try_from(count).map_err(|_| wrong())
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let length = self.count(what)?;
        let bytes = self.take(Some(length), what)?;
        let text = std::str::from_utf8(bytes);
        text.map(str::to_owned).map_err(|_| self.wrong(what, "a name that is no UTF-8", "UTF-8"))
    }

    fn wrong(&self, entry: &str, found: &str, expected: &str) -> Error {
        Error::Importance {
            file: self.file.to_owned(),
            entry: entry.to_owned(),
            found: found.to_owned(),
            expected: expected.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix() -> ImportanceMatrix {
        let entries = BTreeMap::from([
            ("blk.0.ffn_gate_exps.weight".to_owned(), vec![0.5, 1.0, 2.0, 0.0]),
            ("blk.0.ffn_down_exps.weight".to_owned(), vec![3.0, 4.0]),
        ]);
        ImportanceMatrix {
            file: "m.dat".to_owned(),
            dataset: "text.txt".to_owned(),
            chunks: 7,
            entries,
        }
    }

    fn message(bytes: &[u8]) -> String {
        read("m.dat".to_owned(), bytes).unwrap_err().to_string()
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(read("m.dat".to_owned(), &matrix().to_dat()).unwrap(), matrix());
    }

    #[test]
    fn sums_are_divided_by_calls() {
        let mut bytes = matrix().to_dat();
        // Count, length of the name, name, calls.
        let calls = 4 + 4 + "blk.0.ffn_down_exps.weight".len();
        bytes[calls] = 2;
        let read = read("m.dat".to_owned(), &bytes).unwrap();
        assert_eq!(read.entry("blk.0.ffn_down_exps.weight"), Some([1.5, 2.0].as_slice()));
        bytes[calls] = 0;
        assert_eq!(message(&bytes), "m.dat: entry 0: found 0 calls, expected at least one");
    }

    #[test]
    fn the_end_may_lack_the_dataset_and_nothing_else() {
        let bytes = matrix().to_dat();
        let end = bytes.len() - 8 - "text.txt".len();
        assert_eq!(read("m".to_owned(), &bytes[..end]).unwrap().chunks(), 0);
        for length in (0..end).chain(end + 1..bytes.len()) {
            assert!(message(&bytes[..length]).contains("expected more"), "{length}");
        }
        assert!(message(&[bytes, vec![0]].concat()).contains("found 1 bytes more"));
    }

    #[test]
    fn hostile_counts_are_refused_without_memory() {
        let huge = i32::MAX.to_le_bytes();
        assert!(message(&huge).contains("expected more"));
        assert!(message(&[1i32.to_le_bytes(), huge].concat()).contains("expected more"));
        let negative = (-1i32).to_le_bytes();
        assert!(message(&negative).contains("found -1, expected a count"));
        let name = [1i32.to_le_bytes(), 1i32.to_le_bytes()].concat();
        assert!(message(&[name.as_slice(), &[0xff]].concat()).contains("no UTF-8"));
    }

    #[test]
    fn values_must_be_mean_squares() {
        for value in [f32::NAN, f32::INFINITY, -1.0] {
            let mut matrix = matrix();
            matrix.entries.insert("x".to_owned(), vec![1.0, value]);
            assert!(message(&matrix.to_dat()).contains("x, value 1: found"), "{value}");
        }
    }
}
