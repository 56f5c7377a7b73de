//! Models: made, inspected, chosen, measured, refused.

use std::fs;

use serde_json::Value;

use crate::process::{ds4, error, json, stdout, str, tiny};

#[test]
fn synthetic_models_run() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    let synth = ["synth", "--shape", "tiny", "--recipe", "q4", str(&model)];
    stdout(&synth);
    assert!(error(&synth).ends_with("--force to replace it"));
    let report = json(&["inspect", "-m", str(&model), "--json"]);
    assert_eq!(report["layers"], 4, "{report}");
    let answer = json(&["run", "-m", str(&model), "-p", "Hi", "-n", "3", "--seed", "1", "--json"]);
    // Noise may end at any token.
    assert!(answer["answer_tokens"].as_u64() <= Some(3), "{answer}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left behind");
}

#[test]
fn a_failed_synth_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("no").join("model.gguf");
    error(&["synth", "--shape", "tiny", str(&missing)]);
    let model = folder.path().join("model.gguf");
    let error = error(&["synth", "--shape", "tiny", "--layers", "9", str(&model)]);
    assert!(error.ends_with("the tiny shape has its own, use flash"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn bad_models_give_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    let message = || error(&["run", "-m", str(&model), "-p", "Hi"]);
    assert!(message().contains("no such file: name a GGUF file with -m"));
    fs::write(&model, "GGML").unwrap();
    assert!(message().ends_with("not a GGUF file: only 4 bytes"), "{}", message());
    let good = fs::read(tiny("tiny-b-q2.gguf")).unwrap();
    fs::write(&model, &good[..good.len() / 2]).unwrap();
    assert!(message().contains("truncated download?"), "{}", message());
    fs::write(&model, [b"GGUF\x01\0\0\0", &good[8..]].concat()).unwrap();
    assert!(message().ends_with("GGUF version: found 1, expected 3"), "{}", message());
}

#[test]
fn speed_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (csv, json, svg) = (path("b.csv"), path("b.json"), path("b.svg"));
    let args = ["bench", "--dummy", "tiny-q2", "--ctx", "32..64", "--sessions", "1,3"];
    let brief = ["--decode", "4", "--repeat", "1"];
    let files = ["--csv", str(&csv), "--json", str(&json), "--svg", str(&svg)];
    stdout(&[&args[..], &brief[..], &files[..]].concat());
    let csv = fs::read_to_string(csv).unwrap();
    let rows: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    let head = ["ctx_tokens", "prefill_tokens", "prefill_tps", "gen_tokens", "gen_tps"];
    assert_eq!(rows[0][..5], head, "{csv}");
    // Depth, tokens prefilled since the depth before, tokens decoded, sessions.
    let found: Vec<[&str; 4]> = rows[1..].iter().map(|r| [r[0], r[1], r[3], r[6]]).collect();
    let expected = [["32", "32", "4", "1"], ["32", "", "4", "3"]];
    assert_eq!(found[..2], expected, "{csv}");
    assert_eq!(found[2..], [["64", "32", "4", "1"], ["64", "", "4", "3"]], "{csv}");
    let json: Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    let rows = json["rows"].as_array().unwrap();
    assert!(rows.iter().all(|row| row["gen_tps"].as_f64() > Some(0.0)), "{json}");
    assert!(rows[1]["kvcache_bytes"].as_u64() > rows[0]["kvcache_bytes"].as_u64(), "{json}");
    assert!(json["machine"]["memory_bytes_per_second"].as_f64() > Some(0.0), "{json}");
    let svg = fs::read_to_string(svg).unwrap();
    assert!(svg.contains("3 sessions") && svg.ends_with("</svg>\n"), "{svg}");
}

#[test]
fn bench_refuses_depths_that_it_cannot_reach() {
    let bench = |ctx| error(&["bench", "--dummy", "tiny-q2", "--ctx", ctx]);
    assert!(bench("1024k").contains("1048576 and 64 decoded tokens"), "{}", bench("1024k"));
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text");
    fs::write(&text, "few words").unwrap();
    let message = error(&["bench", "--dummy", "tiny-q2", "--prompt-file", str(&text)]);
    assert!(message.ends_with("expected 512 or more for this --ctx"), "{message}");
}

#[test]
fn a_model_is_described() {
    let model = tiny("tiny-b-q2.gguf");
    let report = json(&["inspect", "-m", str(&model), "--json", "--tensors", "--ctx", "1000"]);
    assert_eq!(report["compress_ratios"], serde_json::json!([0, 4, 128, 4]));
    assert_eq!(report["memory"]["context"], 1000);
    assert_eq!(report["memory"]["weights"], fs::metadata(&model).unwrap().len());
    let tensors = report["tensors"].as_array().unwrap();
    let groups = report["weights"].as_array().unwrap();
    let count: u64 = groups.iter().map(|group| group["tensors"].as_u64().unwrap()).sum();
    assert_eq!(count, tensors.len() as u64);
    let shown = stdout(&["inspect", "-m", str(&model), "--tensors", "--metadata"]);
    for part in [
        "4: 1 SWA (window only), 2 CSA (ratio 4), 1 HCA (ratio 128); 1 routed by token id",
        "4096 tokens, tokenizer gpt2 (joyai-llm)",
        "preview profile",
        "blk.3.ffn_down_exps.weight              Q2_K",
        "deepseek4.attention.compress_ratios",
    ] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    let error = error(&["inspect", "-m", str(&model), "--ctx", "2000000"]);
    assert!(
        error.ends_with("found 2000000, expected at most 1048576, the model's longest context")
    );
}

#[cfg(target_os = "linux")] // Elsewhere the models directory is not told by this variable.
#[test]
fn models_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let models = folder.path().join("ds4/models");
    fs::create_dir_all(&models).unwrap();
    let inspect = |extra: &[&str], variable: &str| {
        let args = [&["inspect", "--json"], extra].concat();
        let output = ds4(&args)
            .env("XDG_DATA_HOME", folder.path())
            .env("DS4_MODEL", variable)
            .output()
            .unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        report["files"][0]["name"].as_str().unwrap().to_owned()
    };
    assert_eq!(inspect(&[], ""), "built-in");
    let found = models.join("a.gguf");
    fs::copy(tiny("tiny-b-q2.gguf"), &found).unwrap();
    assert_eq!(inspect(&[], ""), str(&found));
    let other = folder.path().join("b.gguf");
    fs::copy(&found, &other).unwrap();
    assert_eq!(inspect(&[], str(&other)), str(&other));
    assert_eq!(inspect(&["-m", str(&models)], str(&other)), str(&found));
}
