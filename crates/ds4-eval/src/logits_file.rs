//! Files of predictions, for comparing another model with this one later.
//!
//! Log-probabilities are stored in 16 bits as multiples of −1/1024 nat, down to −64: errors of
//! half a step change a divergence by some 1e-7. A header says which text they belong to, and a
//! hash at the end shows damage. docs/evaluation.md has the layout.

use std::{
    fs::File,
    io::{BufReader, BufWriter, Read, Write},
    path::Path,
};

use ds4_engine::sampling::{argmax, log_sum_exp};

use crate::{Error, Result, divergence::Prediction, error::io_error};

const MAGIC: &[u8; 8] = b"DS4LOGP1";
/// Magic, vocabulary, rows, hash of the text, hash of the model.
const HEADER: usize = 8 + 8 + 8 + 32 + 32;
const STEPS_PER_NAT: f64 = 1024.0;
/// Largest vocabulary that is believed.
const MAX_VOCAB: u64 = 1 << 24;

/// What the predictions are of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Scored tokens.
    pub rows: usize,
    /// [`Text::hash`](crate::perplexity::Text::hash).
    pub text: [u8; 32],
    /// Identity of the model.
    pub model: [u8; 32],
}

/// Writes a file of predictions.
pub struct LogitsWriter {
    name: String,
    out: BufWriter<File>,
    hasher: blake3::Hasher,
    row: Vec<u8>,
}

impl LogitsWriter {
    /// Begins the file at `path`, replacing what is there.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn create(path: &Path, header: &Header) -> Result<LogitsWriter> {
        let file = File::create(path).map_err(io_error(path))?;
        let name = path.display().to_string();
        let (out, hasher) = (BufWriter::new(file), blake3::Hasher::new());
        let mut writer = LogitsWriter { name, out, hasher, row: Vec::new() };
        writer.row.extend(MAGIC);
        writer.row.extend((header.vocab as u64).to_le_bytes());
        writer.row.extend((header.rows as u64).to_le_bytes());
        writer.row.extend(header.text);
        writer.row.extend(header.model);
        writer.put()?;
        Ok(writer)
    }

    /// Adds the prediction of one position.
    ///
    /// # Errors
    /// If the logits hold no usable numbers, or the file cannot be written.
    pub fn add(&mut self, logits: &[f32]) -> Result<()> {
        let top = argmax(logits)?;
        let total = log_sum_exp(logits);
        self.row.extend(top.to_le_bytes());
        for logit in logits {
            // Casting keeps to the range, so that −64 nat and less are the last step.
            let steps = ((total - f64::from(*logit)) * STEPS_PER_NAT).round() as u16;
            self.row.extend(steps.to_le_bytes());
        }
        self.put()
    }

    /// Ends the file with the hash of everything in it.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(mut self) -> Result<()> {
        self.row.extend(self.hasher.finalize().as_bytes());
        self.put()?;
        self.out.flush().map_err(|source| Error::Io { file: self.name, source })
    }

    fn put(&mut self) -> Result<()> {
        self.hasher.update(&self.row);
        let written = self.out.write_all(&self.row);
        self.row.clear();
        written.map_err(|source| Error::Io { file: self.name.clone(), source })
    }
}

/// Reads a file of predictions.
pub struct LogitsReader {
    name: String,
    input: BufReader<File>,
    hasher: blake3::Hasher,
    header: Header,
    row: Vec<u8>,
    prediction: Prediction,
    read: usize,
}

impl LogitsReader {
    /// Opens the file at `path` and checks its header and size.
    ///
    /// # Errors
    /// If it cannot be read or is no such file.
    pub fn open(path: &Path) -> Result<LogitsReader> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(io_error(path))?;
        let size = file.metadata().map_err(io_error(path))?.len();
        let mut input = BufReader::new(file);
        let mut bytes = [0; HEADER];
        let wrong = |what, found: String, expected: String| Error::Value {
            file: name.clone(),
            what,
            found,
            expected,
        };
        if size < HEADER as u64 {
            let expected = format!("at least {HEADER} bytes of a file of logits");
            return Err(wrong("size", format!("{size} bytes"), expected));
        }
        input.read_exact(&mut bytes).map_err(io_error(path))?;
        if &bytes[..8] != MAGIC {
            let expected = "a file from --save-logits".to_owned();
            return Err(wrong("first bytes", format!("{:02x?}", &bytes[..8]), expected));
        }
        let number = |at: usize| {
            bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        let (vocab, rows) = (number(8), number(16));
        if !(1..=MAX_VOCAB).contains(&vocab) {
            return Err(wrong("vocabulary", vocab.to_string(), format!("1 to {MAX_VOCAB}")));
        }
        let expected =
            rows.checked_mul(4 + 2 * vocab).and_then(|n| n.checked_add(HEADER as u64 + 32));
        if expected != Some(size) {
            let expected = format!("{rows} rows of {vocab} tokens (unfinished?)");
            return Err(wrong("size", format!("{size} bytes"), expected));
        }
        let part = |at: usize| std::array::from_fn(|i| bytes[at + i]);
        let (vocab, rows) = (vocab as usize, rows as usize);
        let header = Header { vocab, rows, text: part(24), model: part(56) };
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes);
        let (row, prediction) = (vec![0; 4 + 2 * vocab], Prediction::default());
        Ok(LogitsReader { name, input, hasher, header, row, prediction, read: 0 })
    }

    /// What the predictions are of.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Checks that they are of this text in this vocabulary.
    ///
    /// # Errors
    /// If they are not.
    pub fn check(&self, vocab: usize, text: &[u8; 32]) -> Result<()> {
        let wrong = |what, found: String, expected: String| {
            Err(Error::Value { file: self.name.clone(), what, found, expected })
        };
        if self.header.vocab != vocab {
            return wrong("vocabulary", self.header.vocab.to_string(), vocab.to_string());
        }
        if self.header.text != *text {
            let found = "other tokens or windows".to_owned();
            return wrong("text", found, "the same text, --ctx, --tokens and BOS".to_owned());
        }
        Ok(())
    }

    /// The prediction of the next position.
    ///
    /// # Errors
    /// If there is none, the file cannot be read, or it is damaged: the hash is checked with the
    /// last position.
    pub fn next_row(&mut self) -> Result<&Prediction> {
        let io = |source| Error::Io { file: self.name.clone(), source };
        if self.read == self.header.rows {
            return Err(io(std::io::ErrorKind::UnexpectedEof.into()));
        }
        self.input.read_exact(&mut self.row).map_err(io)?;
        self.hasher.update(&self.row);
        self.read += 1;
        let (top, steps) = self.row.split_at(4);
        self.prediction.top = u32::from_le_bytes([top[0], top[1], top[2], top[3]]);
        self.prediction.logprobs.clear();
        let logprob =
            |steps: &[u8; 2]| -f32::from(u16::from_le_bytes(*steps)) / STEPS_PER_NAT as f32;
        self.prediction.logprobs.extend(steps.as_chunks::<2>().0.iter().map(logprob));
        if self.read == self.header.rows {
            self.check_hash()?;
        }
        Ok(&self.prediction)
    }

    fn check_hash(&mut self) -> Result<()> {
        let mut stored = [0; 32];
        let read = self.input.read_exact(&mut stored);
        read.map_err(|source| Error::Io { file: self.name.clone(), source })?;
        if self.hasher.finalize() == stored {
            return Ok(());
        }
        Err(Error::Value {
            file: self.name.clone(),
            what: "hash of the contents",
            found: blake3::Hash::from_bytes(stored).to_hex()[..16].to_owned(),
            expected: "that of undamaged contents".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const LOGITS: [[f32; 3]; 2] = [[1.0, -2.0, 0.5], [0.0, 300.0, -4.0]];

    fn header() -> Header {
        Header { vocab: 3, rows: 2, text: [1; 32], model: [2; 32] }
    }

    fn written(path: &Path) -> Vec<u8> {
        let mut writer = LogitsWriter::create(path, &header()).unwrap();
        LOGITS.iter().for_each(|row| writer.add(row).unwrap());
        writer.finish().unwrap();
        fs::read(path).unwrap()
    }

    fn error(path: &Path) -> String {
        let read = || -> Result<()> {
            let mut reader = LogitsReader::open(path)?;
            reader.check(3, &[1; 32])?;
            for _ in 0..2 {
                reader.next_row()?;
            }
            Ok(())
        };
        read().unwrap_err().to_string()
    }

    #[test]
    fn what_is_written_is_read_to_half_a_step() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        written(&path);
        let mut reader = LogitsReader::open(&path).unwrap();
        assert_eq!(reader.header(), &header());
        for logits in &LOGITS {
            let prediction = reader.next_row().unwrap();
            assert_eq!(prediction.top, argmax(logits).unwrap());
            let total = log_sum_exp(logits);
            for (found, logit) in prediction.logprobs.iter().zip(logits) {
                let expected = (f64::from(*logit) - total).max(-65535.0 / STEPS_PER_NAT);
                assert!((f64::from(*found) - expected).abs() <= 0.5 / STEPS_PER_NAT + 1e-9);
            }
        }
        assert!(reader.next_row().is_err(), "there are two rows");
    }

    #[test]
    fn other_and_damaged_files_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        let good = written(&path);
        for length in [0, HEADER - 1, HEADER, good.len() - 1] {
            fs::write(&path, &good[..length]).unwrap();
            assert!(error(&path).contains(": size: found "), "{length}");
        }
        for (at, message) in [
            (0, "first bytes: found"),
            (8, "size: found"),
            (14, "vocabulary: found"),
            (23, "size: found"),
            (24, "text: found other tokens"),
            (HEADER + 5, "hash of the contents"),
            (good.len() - 1, "hash of the contents"),
        ] {
            let mut bad = good.clone();
            bad[at] ^= 0x55;
            fs::write(&path, bad).unwrap();
            assert!(error(&path).contains(message), "{at}: {}", error(&path));
        }
        fs::write(&path, &good).unwrap();
        let reader = LogitsReader::open(&path).unwrap();
        assert!(reader.check(4, &[1; 32]).unwrap_err().to_string().contains("found 3, expected 4"));
    }
}
