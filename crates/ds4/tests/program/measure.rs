//! `ds4 eval` and `ds4 perplexity`.

use std::{fs, path::Path};

use serde_json::{Value, json};

use crate::process::{built_in, error, json, stdout, str, text};

fn write_suite(path: &Path) {
    let case = |id: &str, task: &str, prompt: &str, grade: Value| {
        json!({ "id": id, "task": task, "prompt": prompt, "thinking": false, "grade": grade,
                "max_tokens": 24 })
    };
    let capital = json!({ "type": "exact", "answer": "The capital of France is Paris." });
    let cases = [
        case("right", "capital", "What is the capital of France?", capital.clone()),
        case("wrong", "capital", "What is the capital of Japan?", capital),
        case("sum", "sums", "What is 20 + 30?", json!({ "type": "numeric", "answer": 50 })),
    ];
    fs::write(path, cases.map(|case| case.to_string()).join("\n")).unwrap();
}

fn report(args: &[&str]) -> Value {
    let output = built_in(&[&["eval", "--json"], args].concat()).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn task<'a>(report: &'a Value, name: &str) -> &'a Value {
    let mut tasks = report["tasks"].as_array().unwrap().iter();
    tasks.find(|task| task["task"] == name).unwrap()
}

#[test]
fn a_suite_is_graded_and_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (suite, answers) = (path("suite.jsonl"), path("answers.jsonl"));
    write_suite(&suite);
    let args = ["--suite", str(&suite), "--resume", str(&answers)];
    let first = report(&args);
    assert_eq!(
        (&task(&first, "capital")["right"], &task(&first, "sums")["right"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(task(&first, "capital")["cases"], 2);
    assert_eq!(first["complete"], true);
    let ids: Vec<_> = first["answers"].as_array().unwrap().iter().map(|a| &a["id"]).collect();
    assert_eq!(ids, ["right", "wrong", "sum"], "in the order of the suite");

    // What is in the file is not answered again, but graded again.
    let lines = fs::read_to_string(&answers).unwrap();
    assert_eq!(lines.lines().count(), 3);
    let changed = lines.replace("Tokyo", "Kyoto");
    assert_ne!(changed, lines);
    fs::write(&answers, changed).unwrap();
    let second = report(&args);
    assert_eq!(second["answers"][1]["answer"], "The capital of Japan is Kyoto.");
    assert_eq!(fs::read_to_string(&answers).unwrap().lines().count(), 3);

    fs::write(&answers, lines.clone() + "notes\n").unwrap();
    let refused = error(&[&["eval"], &args[..]].concat());
    assert!(refused.contains("answers.jsonl: line 4: not an answer of ds4 eval"), "{refused}");
}

#[test]
fn a_table_has_intervals() {
    let folder = tempfile::tempdir().unwrap();
    let suite = folder.path().join("suite.jsonl");
    write_suite(&suite);
    let output = built_in(&["eval", "--suite", str(&suite)]).output().unwrap();
    let table = text(&output.stdout);
    // Wilson's interval of one in two.
    assert!(table.contains("capital      2      1   50.0%    9.5 –  90.5  100.0%"), "{table}");
}

#[test]
fn seeds_make_new_built_in_cases() {
    let add = |seed: &str| report(&["--task", "add", "--cases", "3", "--seed", seed]);
    let (seven, eight) = (add("7"), add("8"));
    assert_eq!(task(&seven, "add")["right"], 3, "{seven}");
    let answers = |report: &Value| {
        let answers = report["answers"].as_array().unwrap().iter();
        answers.map(|answer| answer["answer"].to_string()).collect::<Vec<_>>()
    };
    assert_ne!(answers(&seven), answers(&eight));
    assert_eq!(seven["seed"], 7);
    assert_eq!(answers(&seven), answers(&add("7")));
}

#[test]
fn unusable_suites_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let suite = folder.path().join("suite.jsonl");
    fs::write(&suite, "{\"prompt\": \"Hi\"}\n").unwrap();
    let message = error(&["eval", "--suite", str(&suite)]);
    assert!(message.contains("suite.jsonl") && message.contains("grade"), "{message}");
    write_suite(&suite);
    let no_task = error(&["eval", "--suite", str(&suite), "--task", "dance"]);
    assert!(no_task.ends_with("no task of the suite has that in its name"), "{no_task}");
    let seed = error(&["eval", "--suite", str(&suite), "--seed", "1"]);
    assert!(seed.contains("--seed: the cases of a file are what they are"), "{seed}");
}

#[test]
fn a_model_is_no_distance_from_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (novel, saved, other) = (path("novel.txt"), path("saved.logits"), path("other.txt"));
    fs::write(&novel, "It was a dark and stormy night. ".repeat(20)).unwrap();
    fs::write(&other, "It was a bright and quiet morning. ".repeat(20)).unwrap();
    let measure = |text: &Path, extra: &[&str]| {
        json(&[&["perplexity", str(text), "--json", "--ctx", "100"], extra].concat())
    };
    let first = measure(&novel, &["--save-logits", str(&saved)]);
    let second = measure(&novel, &["--kl-from", str(&saved)]);
    assert_eq!(first["nll"], second["nll"]);
    let divergence = &second["divergence"];
    // Saved to a 1024th.
    assert!(divergence["mean"].as_f64().unwrap().abs() < 1e-3, "{divergence}");
    assert_eq!(divergence["top1"], 1.0);
    let decoded = measure(&novel, &["--decode"]);
    let difference = decoded["avg_nll"].as_f64().unwrap() - first["avg_nll"].as_f64().unwrap();
    // Prefill rounds elsewhere than decode; random weights amplify that.
    assert!(difference.abs() < 0.02, "{difference}");
    let refused = error(&["perplexity", str(&other), "--ctx", "100", "--kl-from", str(&saved)]);
    assert!(refused.contains("saved.logits"), "{refused}");
}

#[test]
fn markers_are_markers_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("chat.txt");
    fs::write(&file, "<｜User｜>What is it?<｜Assistant｜></think>A telescope.".repeat(9)).unwrap();
    let tokens = |extra: &[&str]| {
        json(&[&["perplexity", str(&file), "--json"], extra].concat())["tokens"].as_u64().unwrap()
    };
    assert!(tokens(&["--markers"]) + 9 * 3 * 2 < tokens(&[]));
    let short = folder.path().join("short.txt");
    fs::write(&short, "Too short.").unwrap();
    assert!(error(&["perplexity", str(&short)]).contains("expected more than 32"));
    assert!(stdout(&["perplexity", str(&file)]).contains(" avg_nll="));
}
