//! `ds4 run` with one prompt.

use std::{fs, io::Write, process::Stdio};

use crate::process::{ds4, error, json, run, stdout, str, text};

const ANSWER: [&str; 8] = ["run", "-p", "Hello", "--nothink", "-n", "12", "--seed", "7"];

#[test]
fn an_answer_is_all_of_stdout() {
    let output = run(&ANSWER);
    assert!(output.status.success());
    assert!(!output.stdout.is_empty() && !output.stdout.contains(&0x1b));
    let stderr = text(&output.stderr);
    assert!(!stderr.contains("No model given"), "{stderr}");
    assert!(stderr.contains("wrote 12 at"), "{stderr}");
    assert!(!output.stderr.contains(&0x1b), "{stderr}");
}

#[test]
fn the_seed_decides_the_answer() {
    assert_eq!(run(&ANSWER).stdout, run(&ANSWER).stdout);
    let mut other = ANSWER;
    other[7] = "8";
    assert_ne!(run(&ANSWER).stdout, run(&other).stdout);
    let greedy = ["run", "-p", "Hello", "--nothink", "-n", "12", "--temp", "0"];
    assert_eq!(run(&greedy).stdout, run(&greedy).stdout);
}

#[test]
fn the_prompt_can_come_from_a_file_or_a_pipe() {
    let expected = stdout(&ANSWER);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt");
    let mut args = ANSWER;
    (args[1], args[2]) = ("--prompt-file", str(&file));
    // Editors add a byte order mark and line ends.
    for content in ["Hello", "Hello\n", "\u{feff}Hello\r\n"] {
        fs::write(&file, content).unwrap();
        assert_eq!(stdout(&args), expected, "{content:?}");
    }

    let rest = [&ANSWER[..1], &ANSWER[3..]].concat();
    let mut child = ds4(&rest)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"Hello").unwrap();
    assert_eq!(text(&child.wait_with_output().unwrap().stdout), expected);
}

#[test]
fn reasoning_stays_out_of_stdout() {
    // The tiny model does not stop thinking by itself.
    let output = run(&["run", "-p", "Hello", "-n", "12", "--seed", "7"]);
    assert!(output.status.success());
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
}

#[test]
fn json_tells_everything() {
    let args = ["run", "-p", "Hi", "-n", "5", "--seed", "3", "--json", "--logprobs", "2"];
    let report = json(&args);
    assert_eq!(report["finish"], "length");
    assert_eq!(report["seed"], 3);
    assert_eq!(report["answer_tokens"], 5);
    assert_eq!(report["token_ids"].as_array().unwrap().len(), 5);
    assert!(report["reasoning"].as_str().unwrap().len() > 1);
    let logprobs = report["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), 5);
    for (entry, id) in logprobs.iter().zip(report["token_ids"].as_array().unwrap()) {
        assert_eq!(&entry["id"], id);
        let top = entry["top"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
    }
}

#[test]
fn the_context_is_a_limit() {
    let report = json(&["run", "-p", "Hi", "--nothink", "--ctx", "12", "--seed", "3", "--json"]);
    assert_eq!(report["finish"], "context_full");
    let tokens =
        report["prompt_tokens"].as_u64().unwrap() + report["answer_tokens"].as_u64().unwrap();
    // The last token was drawn but had no place any more.
    assert_eq!(tokens, 13);
    let error = error(&["run", "-p", "Hello, how are you today?", "--ctx", "8"]);
    assert!(error.ends_with("the context takes 8: raise --ctx (or /ctx), or start anew (/new)"));
}

#[test]
fn noise_ends_by_itself() {
    let report = json(&["run", "--dummy", "tiny-q2", "-p", "Hi", "--seed", "1", "--json"]);
    assert!(report["answer_tokens"].as_u64() <= Some(100), "{report}");
}

#[test]
fn nobody_reading_is_no_error() {
    let mut args = ANSWER;
    args[5] = "2000";
    let mut child = ds4(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!text(&output.stderr).contains("panicked"), "{}", text(&output.stderr));
}
