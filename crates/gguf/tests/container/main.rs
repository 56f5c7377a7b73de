//! The container: good files, bad files, damaged files, and writing.

mod bad_files;
mod file_bytes;
mod hostile;
mod round_trip;
