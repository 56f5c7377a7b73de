//! The built-in model: it answers, and always the same.

use std::{fs, path::Path};

use serde_json::Value;

use crate::process::{built_in, text};

fn answer(args: &[&str]) -> Value {
    let output = built_in(&[&["run", "--temp", "0", "--json"], args].concat()).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_question_is_answered_without_a_model_or_network() {
    let output = built_in(&["run", "-p", "What is a telescope?", "--seed", "1"]).output().unwrap();
    let answer = text(&output.stdout);
    assert!(output.status.success() && answer.starts_with("A telescope is a "), "{answer}");
    let stderr = text(&output.stderr);
    assert!(stderr.contains("No model given: this is nano"), "{stderr}");
}

/// `models/nano/golden.jsonl` holds prompts and the ids of the likeliest tokens after them.
#[test]
fn answers_are_the_golden_ones() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano/golden.jsonl");
    let mut seen = 0;
    for line in fs::read_to_string(file).unwrap().lines() {
        let golden: Value = serde_json::from_str(line).unwrap();
        let prompt = golden["prompt"].as_str().unwrap();
        let mut args = vec!["-p", prompt];
        if golden["thinking"] == false {
            args.push("--nothink");
        }
        let report = answer(&args);
        assert_eq!(report["token_ids"], golden["token_ids"], "{prompt}: {report}");
        assert_eq!(report["text"], golden["text"], "{prompt}");
        assert_eq!(report["finish"], "stop", "{prompt}");
        seen += 1;
    }
    assert!(seen >= 10, "only {seen} prompts");
}

#[test]
fn the_plain_code_gives_the_same_answers() {
    let args = ["-p", "What is 47 + 38?"];
    let fast = answer(&args);
    let plain = answer(&[&args[..], &["--reference"]].concat());
    assert_eq!(fast["token_ids"], plain["token_ids"]);
    assert_eq!(fast["text"], "47 + 38 = 85");
}
