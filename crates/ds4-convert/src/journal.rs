//! The unfinished output and the record of what in it is finished, so that a stopped conversion
//! can go on.
//!
//! Beside `OUT` stand `OUT.part`, of the final size from the beginning, and `OUT.part.journal`:
//! a line with the plan's fingerprint, then for each finished tensor a line with the hash of its
//! bytes. A line is written after the bytes it speaks of have reached the disk, and on resuming
//! the bytes are hashed again. So whatever is believed is there.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read, Seek, SeekFrom, Write},
    ops::Range,
    path::{Path, PathBuf},
};

use gguf::FileLayout;

use crate::error::{Error, Result, io_error};

/// Bytes hashed at once on resuming.
const PIECE: usize = 1 << 20;

pub(crate) struct Unfinished {
    output: PathBuf,
    part: PathBuf,
    file: File,
    journal_path: PathBuf,
    journal: File,
    /// Tensors that are there.
    pub(crate) finished: usize,
}

impl Unfinished {
    /// Goes on with the unfinished file of `output` if it was made by the same plan, or begins.
    /// `checked` is called for each tensor that was found finished, and may stop.
    pub(crate) fn open(
        output: &Path,
        layout: &FileLayout,
        fingerprint: &blake3::Hash,
        tensors: usize,
    ) -> Result<Unfinished> {
        let part = with_suffix(output, ".part");
        let journal_path = with_suffix(output, ".part.journal");
        let file = open(&part)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Busy { file: part.display().to_string() });
            }
            Err(TryLockError::Error(source)) => return Err(io_error(&part)(source)),
        }
        let mut unfinished = Unfinished {
            output: output.to_owned(),
            journal: open(&journal_path)?,
            part,
            file,
            journal_path,
            finished: 0,
        };
        let found = unfinished.read_journal()?;
        let mut lines = found.lines();
        if lines.next() == Some(fingerprint.to_hex().as_str()) && unfinished.has_header(layout)? {
            let hashes: Vec<&str> = lines.take(tensors).collect();
            unfinished.finished = unfinished.count_finished(layout, &hashes)?;
            unfinished.rewrite_journal(fingerprint, &hashes[..unfinished.finished])?;
        } else {
            unfinished.begin(layout, fingerprint)?;
        }
        Ok(unfinished)
    }

    /// Writes bytes of a tensor.
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.seek(SeekFrom::Start(at)).map_err(io_error(&self.part))?;
        self.file.write_all(bytes).map_err(io_error(&self.part))
    }

    /// Records that the next tensor is there, and that its bytes have this hash.
    pub(crate) fn finish_tensor(&mut self, hash: &blake3::Hash) -> Result<()> {
        self.file.sync_data().map_err(io_error(&self.part))?;
        writeln!(self.journal, "{}", hash.to_hex()).map_err(io_error(&self.journal_path))?;
        self.finished += 1;
        Ok(())
    }

    /// Gives the file its name and removes the journal.
    pub(crate) fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(io_error(&self.part))?;
        fs::rename(&self.part, &self.output).map_err(io_error(&self.output))?;
        fs::remove_file(&self.journal_path).map_err(io_error(&self.journal_path))
    }

    fn read_journal(&mut self) -> Result<String> {
        let mut found = Vec::new();
        self.journal.read_to_end(&mut found).map_err(io_error(&self.journal_path))?;
        Ok(String::from_utf8_lossy(&found).into_owned())
    }

    fn has_header(&mut self, layout: &FileLayout) -> Result<bool> {
        let length = self.file.metadata().map_err(io_error(&self.part))?.len();
        if length != layout.file_bytes() {
            return Ok(false);
        }
        let mut header = vec![0; layout.header().len()];
        self.file.seek(SeekFrom::Start(0)).map_err(io_error(&self.part))?;
        self.file.read_exact(&mut header).map_err(io_error(&self.part))?;
        Ok(header == layout.header())
    }

    /// How many of the first tensors have the bytes that the journal says.
    fn count_finished(&mut self, layout: &FileLayout, hashes: &[&str]) -> Result<usize> {
        for (index, hash) in hashes.iter().enumerate() {
            if self.hash(layout.tensor_range(index))?.to_hex().as_str() != *hash {
                return Ok(index);
            }
        }
        Ok(hashes.len())
    }

    fn hash(&mut self, range: Range<u64>) -> Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        self.file.seek(SeekFrom::Start(range.start)).map_err(io_error(&self.part))?;
        let mut rest = range.end - range.start;
        let mut piece = vec![0; PIECE];
        while rest > 0 {
            let n = rest.min(PIECE as u64) as usize;
            self.file.read_exact(&mut piece[..n]).map_err(io_error(&self.part))?;
            hasher.update(&piece[..n]);
            rest -= n as u64;
        }
        Ok(hasher.finalize())
    }

    fn begin(&mut self, layout: &FileLayout, fingerprint: &blake3::Hash) -> Result<()> {
        // Emptied first: what is left of another file must not show between tensors.
        self.file.set_len(0).map_err(io_error(&self.part))?;
        self.write(0, layout.header())?;
        self.file.set_len(layout.file_bytes()).map_err(io_error(&self.part))?;
        self.file.sync_data().map_err(io_error(&self.part))?;
        self.rewrite_journal(fingerprint, &[])
    }

    fn rewrite_journal(&mut self, fingerprint: &blake3::Hash, hashes: &[&str]) -> Result<()> {
        let mut text = format!("{}\n", fingerprint.to_hex());
        hashes.iter().for_each(|hash| text.extend([hash, "\n"]));
        let journal = &mut self.journal;
        let rewritten = journal
            .set_len(0)
            .and_then(|()| journal.seek(SeekFrom::Start(0)))
            .and_then(|_| journal.write_all(text.as_bytes()));
        rewritten.map_err(io_error(&self.journal_path))
    }
}

fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(io_error(path))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}
