//! The real program, from the outside.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

fn ds4(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ds4"));
    // Neither the user's models nor terminal decide what is tested.
    command.args(args).env_remove("DS4_MODEL").env("XDG_DATA_HOME", "/nonexistent");
    command.stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    ds4(args).output().unwrap()
}

fn stdout(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// The one line on stderr of a command that must fail.
fn error(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}", text(&output.stderr));
    let stderr = text(&output.stderr);
    let lines: Vec<_> = stderr.lines().filter(|line| line.starts_with("error:")).collect();
    assert_eq!(lines.len(), 1, "{stderr}");
    lines[0].to_owned()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(args)).unwrap()
}

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny/tiny-b-q2.gguf")
}

fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}

const ANSWER: [&str; 8] = ["run", "-p", "Hello", "--nothink", "-n", "12", "--seed", "7"];

#[test]
fn an_answer_is_all_of_stdout() {
    let output = run(&ANSWER);
    assert!(output.status.success());
    assert!(!output.stdout.is_empty() && !output.stdout.contains(&0x1b));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("whose text is noise"), "{stderr}");
    assert!(stderr.contains("wrote 12 at"), "{stderr}");
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
    fs::write(&file, "Hello").unwrap();
    let mut args = ANSWER;
    (args[1], args[2]) = ("--prompt-file", str(&file));
    assert_eq!(stdout(&args), expected);

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
fn tokens_are_shown_and_special_text_is_text() {
    assert_eq!(stdout(&["tokenize", "--ids", "Hi"]), "42 75\n");
    let shown = stdout(&["tokenize", "a\n<think>"]);
    assert_eq!(shown.lines().next(), Some("     67  a"));
    assert!(shown.lines().all(|line| !line.ends_with("<think>")), "{shown}");
    let special = stdout(&["tokenize", "--special", "<think>"]);
    assert_eq!(special.trim(), "4079  <think>");
}

#[test]
fn chat_requests_are_rendered() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("request.json");
    let request =
        r#"{"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": "none"}"#;
    fs::write(&file, request).unwrap();
    assert_eq!(stdout(&["tokenize", "--ids", "--chat", str(&file)]), "0 4076 42 75 4077 4080\n");
    fs::write(&file, r#"{"messages": [{"role": "user", "content": 5}]}"#).unwrap();
    let error = error(&["tokenize", "--chat", str(&file)]);
    assert!(error.starts_with("error: request, messages[0]"), "{error}");
}

#[test]
fn synthetic_models_run() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    let synth = ["synth", "--shape", "tiny", "--recipe", "q4", str(&model)];
    stdout(&synth);
    assert!(error(&synth).ends_with("--force to replace it"));
    let report = json(&["inspect", "-m", str(&model), "--json"]);
    assert_eq!(report["layers"], 4, "{report}");
    let answer = json(&["run", "-m", str(&model), "-p", "Hi", "-n", "3", "--json"]);
    assert_eq!(answer["answer_tokens"], 3);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left behind");
}

#[test]
fn a_failed_synth_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("no").join("model.gguf");
    error(&["synth", "--shape", "tiny", str(&missing)]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn logits_are_written_as_documented() {
    let folder = tempfile::tempdir().unwrap();
    let (ids, out) = (folder.path().join("ids"), folder.path().join("out.f32"));
    fs::write(&ids, "0 17\n\t42 7 1000\n").unwrap();
    let logits = |extra: &[&str]| {
        let model = tiny();
        let fixed =
            ["logits", "-m", str(&model), "--token-ids", str(&ids), "-o", str(&out), "--reference"];
        stdout(&[&fixed[..], extra].concat());
        let bytes = fs::read(&out).unwrap();
        let meta = fs::read(folder.path().join("out.f32.json")).unwrap();
        (bytes, serde_json::from_slice::<Value>(&meta).unwrap())
    };
    let (all, meta) = logits(&[]);
    assert_eq!(all.len(), 5 * 4096 * 4);
    assert_eq!(meta["vocab"], 4096);
    assert_eq!(meta["tokens"], serde_json::json!([0, 17, 42, 7, 1000]));
    assert_eq!(meta["positions"], serde_json::json!([0, 1, 2, 3, 4]));
    let (last, meta) = logits(&["--positions", "last"]);
    assert_eq!(last, all[4 * 4096 * 4..]);
    assert_eq!(meta["positions"], serde_json::json!([4]));
    let (some, _) = logits(&["--positions", "1,3"]);
    assert_eq!(some, [&all[4096 * 4..2 * 4096 * 4], &all[3 * 4096 * 4..4 * 4096 * 4]].concat());
    let (chunked, _) = logits(&["--chunk", "2"]);
    let close = |a: &[u8], b: &[u8]| {
        let float = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
        a.chunks(4).zip(b.chunks(4)).all(|(a, b)| (float(a) - float(b)).abs() < 1e-4)
    };
    assert!(close(&chunked, &all));
    assert_ne!(logits(&["--cache-rounding", "off"]).0, all);
}

#[test]
fn wrong_token_ids_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (ids, out) = (folder.path().join("ids"), folder.path().join("out"));
    for (content, found) in [("1 2 4096", "\"4096\""), ("1 x", "\"x\""), ("-1", "\"-1\"")] {
        fs::write(&ids, content).unwrap();
        let error = error(&["logits", "--token-ids", str(&ids), "-o", str(&out)]);
        assert!(
            error.contains(&format!("found {found}, expected a token id below 4096")),
            "{error}"
        );
    }
    fs::write(&ids, " \n").unwrap();
    assert!(error(&["logits", "--token-ids", str(&ids), "-o", str(&out)]).contains("no token ids"));
    assert!(!out.exists());
}

#[test]
fn bad_models_give_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    let message = || error(&["run", "-m", str(&model), "-p", "Hi"]);
    assert!(message().contains("no such file: name a GGUF file with -m"));
    fs::write(&model, "GGML").unwrap();
    assert!(message().ends_with("not a GGUF file: only 4 bytes"), "{}", message());
    let good = fs::read(tiny()).unwrap();
    fs::write(&model, &good[..good.len() / 2]).unwrap();
    assert!(message().contains("truncated download?"), "{}", message());
    fs::write(&model, [b"GGUF\x01\0\0\0", &good[8..]].concat()).unwrap();
    assert!(message().ends_with("GGUF version: found 1, expected 3"), "{}", message());
}

#[test]
fn speed_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let (csv, json) = (folder.path().join("b.csv"), folder.path().join("b.json"));
    let args = ["bench", "--prefill", "32", "--ctx", "32,64", "--decode", "4", "--repeat", "1"];
    stdout(&[&args[..], &["--csv", str(&csv), "--json", str(&json)]].concat());
    let csv = fs::read_to_string(csv).unwrap();
    let rows: Vec<_> = csv.lines().collect();
    assert!(
        rows[0].starts_with("ctx_tokens,prefill_tokens,prefill_tps,gen_tokens,gen_tps"),
        "{csv}"
    );
    assert_eq!(rows.len(), 3);
    assert!(rows[2].starts_with("64,32,"));
    let json: Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    assert!(json.to_string().contains("read_bytes_per_second"), "{json}");
}

#[test]
fn help_names_every_command() {
    let help = stdout(&["--help"]);
    for command in ["run", "inspect", "tokenize", "synth", "logits", "bench", "completions"] {
        assert!(help.contains(&format!("\n  {command} ")), "{command} in {help}");
        assert!(stdout(&[command, "--help"]).contains("Usage: ds4 "));
    }
}

#[test]
fn a_wrong_command_line_exits_with_2() {
    for args in [&["run", "--no-such"][..], &["nothing"], &["run", "-p", "a", "--prompt-file", "b"]]
    {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
    assert!(
        error(&["run", "-p", "Hi", "--top-p", "2"]).ends_with("--top-p: found 2, expected 0 to 1")
    );
}
