//! A conversation at a (pseudo) terminal.
#![cfg(unix)]

use std::process::Command;

use rexpect::session::{PtySession, spawn_command};

/// Long enough for a loaded machine; nothing here waits for it to pass.
const TIMEOUT_MS: u64 = 60_000;

fn start(args: &[&str]) -> PtySession {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ds4"));
    command.arg("run").args(args);
    command.env_remove("DS4_MODEL").env("XDG_DATA_HOME", "/nonexistent").env("TERM", "dumb");
    let mut session = spawn_command(command, Some(TIMEOUT_MS)).unwrap();
    session.exp_string("Ctrl-D leaves.").unwrap();
    session
}

#[test]
fn turns_reuse_what_is_known() {
    let mut session = start(&["--nothink", "-n", "4", "--seed", "1"]);
    session.send_line("Hello").unwrap();
    let (_, first) = session.exp_regex(r"read \d+ tokens at [0-9.]+ t/s, wrote \d+").unwrap();
    assert!(
        first.contains("read 5 ") || first.contains("read 6 ") || first.contains("read 7 "),
        "{first}"
    );
    session.send_line("Again").unwrap();
    session.exp_regex(r"\(\d+ more were known\)").unwrap();
    session.send_line("/quit").unwrap();
    session.exp_eof().unwrap();
}

#[test]
fn commands_work_and_unknown_ones_are_refused() {
    let mut session = start(&["--seed", "1", "-n", "3"]);
    session.send_line("/help").unwrap();
    session.exp_string("/read FILE").unwrap();
    session.send_line("/dance").unwrap();
    session.exp_string("/dance: no such command: /help lists them").unwrap();
    session.send_line("/ctx 0").unwrap();
    session.exp_string("/ctx: found 0, expected 1 to").unwrap();
    session.send_line("/ctx 64").unwrap();
    session.send_line("/nothink").unwrap();
    session.send_line("Hi").unwrap();
    session.exp_regex(r"context \d+ of 64").unwrap();
    session.send_line("/read /no/such/file").unwrap();
    session.exp_string("/read: /no/such/file").unwrap();
    session.send_control('d').unwrap();
    session.exp_eof().unwrap();
}

#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let mut session = start(&["--nothink", "--seed", "5", "--ctx", "1000000"]);
    session.send_line("Tell me everything").unwrap();
    // Some of the answer is there before it is stopped.
    session.exp_regex(r"\n.{20}").unwrap();
    session.send_control('c').unwrap();
    session.exp_regex(r"wrote \d+ at").unwrap();
    session.send_line("/quit").unwrap();
    session.exp_eof().unwrap();
}
