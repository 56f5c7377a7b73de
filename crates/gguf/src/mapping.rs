//! A file's bytes, mapped into memory.

use std::{
    fs::{self, File},
    io,
    ops::Deref,
    path::Path,
};

use memmap2::Mmap;

/// A file's bytes, mapped into memory and never written.
///
/// The file must not be shortened while it is mapped: its pages are read when
/// they are first used, and one that is gone ends the process. Its bytes may
/// change where another process writes to it.
#[derive(Debug)]
pub struct Mapping(Mmap);

impl Mapping {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// If it cannot be opened or is no regular file.
    pub fn open(path: &Path) -> io::Result<Mapping> {
        // Asked before opening: opening a pipe would wait for its writer.
        if !fs::metadata(path)?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let file = File::open(path)?;
        // SAFETY: the mapping is private to this process and never written. Another
        // process could change the file meanwhile: then values change, which no
        // code relies on not to happen (ranges are checked against the mapping's
        // length, not against contents read twice), or the file gets shorter and
        // the next access ends the process, which the check below makes unlikely
        // and `Mapping` documents.
        let mapping = unsafe { Mmap::map(&file)? };
        if file.metadata()?.len() < mapping.len() as u64 {
            return Err(io::Error::other("the file got shorter while it was opened"));
        }
        Ok(Mapping(mapping))
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
