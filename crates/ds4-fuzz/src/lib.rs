//! Targets of fuzzing: functions that take hostile bytes and must not panic, hang or take memory
//! without bound.
//!
//! `tests/targets.rs` runs them on [`seeds`] and on mutations of these; the programs in
//! `fuzz/fuzz_targets` hand them to libFuzzer.

#![forbid(unsafe_code)]

pub mod models;
mod readers;
pub mod seeds;
mod served;

/// A target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, and that of the folder with its seeds.
    pub name: &'static str,
    /// Takes the bytes; returns whether they were right.
    pub run: fn(&[u8]) -> bool,
}

/// All targets.
pub const TARGETS: [Target; 10] = [
    Target { name: "read_gguf", run: readers::gguf },
    Target { name: "load_model", run: readers::model },
    Target { name: "safetensors", run: readers::safetensors },
    Target { name: "imatrix", run: readers::imatrix },
    Target { name: "chat_request", run: served::chat_request },
    Target { name: "messages_request", run: served::messages_request },
    Target { name: "responses_request", run: served::responses_request },
    Target { name: "completions_request", run: served::completions_request },
    Target { name: "json_schema", run: served::json_schema },
    Target { name: "snapshot", run: served::snapshot },
];

/// Runs the target `name` on bytes that may be wrong.
///
/// # Panics
/// If there is none of that name, or if the target finds an error.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("a target of that name").run)(bytes);
}
