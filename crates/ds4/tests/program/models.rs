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
