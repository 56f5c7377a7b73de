//! Runs the program.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

/// The program with these arguments, nothing on stdin, and the tiny model unless another is given.
pub fn ds4(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ds4"));
    // Neither the user's models nor GPU nor terminal decide what is tested.
    command.env("CUDA_VISIBLE_DEVICES", "");
    command.args(args).env("DS4_MODEL", tiny("tiny-b-q2.gguf"));
    command.env("XDG_DATA_HOME", "/nonexistent").env_remove("NO_COLOR").stdin(Stdio::null());
    command
}

/// The same with the built-in model.
pub fn built_in(args: &[&str]) -> Command {
    let mut command = ds4(args);
    command.env_remove("DS4_MODEL");
    command
}

pub fn run(args: &[&str]) -> Output {
    ds4(args).output().unwrap()
}

/// What a command that must succeed prints.
pub fn stdout(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// The same as JSON.
pub fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(args)).unwrap()
}

/// The one line on stderr of a command that must fail.
pub fn error(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}", text(&output.stderr));
    let stderr = text(&output.stderr);
    let lines: Vec<_> = stderr.lines().filter(|line| line.starts_with("error:")).collect();
    assert_eq!(lines.len(), 1, "{stderr}");
    lines[0].to_owned()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A file of the tiny model, whose weights are random.
pub fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny").join(name)
}

pub fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}
