//! A CUDA device that is lost while it computes. It is the emulated one, which must be on the
//! library path: `.ci/run` shows how.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::{
    process::{ds4, text},
    serve::{ask, greedy, post, served},
    terminal::{exit_code, opened, say},
};

/// Launches of kernels that succeed: more than a prompt takes, fewer than the answer would.
const LAUNCHES: &str = "1500";

const LOST: &str = "device failed: the CUDA device failed to";

fn on_device(args: &[&str]) -> Command {
    let mut command = ds4(&[args, &["--backend", "cuda"]].concat());
    command.env("CUDA_EMULATOR_FAIL_AFTER", LAUNCHES).env_remove("CUDA_VISIBLE_DEVICES");
    command
}

#[test]
#[ignore = "needs the emulated device"]
fn one_answer_ends_with_a_line_and_a_code() {
    let output = on_device(&["run", "-p", "Hello", "--nothink", "-n", "5000"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(stderr.lines().last().unwrap().starts_with(&format!("error: {LOST}")), "{stderr}");
    assert!(stderr.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{stderr}");
    assert!(!output.stdout.is_empty(), "it was lost after some of the answer");
}

#[test]
#[ignore = "needs the emulated device"]
fn a_conversation_ends_too() {
    let mut session = opened(on_device(&["run", "--nothink", "-n", "5000"]), &[]);
    session.exp_string("Ctrl-D leaves.").unwrap();
    say(&mut session, "Hello");
    session.exp_string(LOST).unwrap();
    session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 1);
}

#[test]
#[ignore = "needs the emulated device"]
fn a_server_says_so_and_ends() {
    let args = ["serve", "--port", "0", "-c", "8192"];
    let (mut child, address, mut rest) = served(on_device(&args).stderr(Stdio::piped()));
    let mut asked = greedy();
    asked["max_tokens"] = Value::from(5000);
    let (status, body) = post(&address, &asked, "");
    assert_eq!(status, "500", "{body}");
    let body: Value = serde_json::from_str(&body).unwrap();
    let message = body["error"]["message"].as_str().unwrap();
    assert!(message.starts_with(LOST), "{message}");
    let (status, body) = ask(&address, "GET /health", "", "");
    assert_eq!(status, "503", "{body}");
    assert!(body.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{body}");
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let mut stderr = String::new();
    std::io::Read::read_to_string(&mut rest, &mut stderr).unwrap();
    let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("error:")).collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    assert!(errors[0].contains(LOST), "{stderr}");
}
