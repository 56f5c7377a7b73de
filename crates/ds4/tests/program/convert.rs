//! `ds4 imatrix` and `ds4 quantize`.

use std::fs;

use crate::process::{error, json, run, stdout, str, text};

#[test]
fn a_model_is_quantized_with_what_it_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (model, read, matrix) = (path("f16.gguf"), path("text.txt"), path("text.dat"));
    stdout(&["synth", "--shape", "tiny", "--recipe", "f16", str(&model)]);
    fs::write(&read, "<｜User｜>What is a telescope?<｜Assistant｜>".repeat(40)).unwrap();
    let imatrix = ["imatrix", "-m", str(&model), "--text", str(&read), "--ctx", "64"];
    let output = run(&imatrix);
    let stderr = text(&output.stderr);
    assert!(output.status.success() && stderr.contains("tokens seen by an expert"), "{stderr}");
    assert!(error(&imatrix).ends_with("exists already: choose another name, or --force"));

    let quantize = |name: &str, extra: &[&str]| {
        let output = path(name);
        stdout(&[&["quantize", str(&model), str(&output), "--recipe", "q2"], extra].concat());
        fs::read(output).unwrap()
    };
    let with = ["--imatrix", str(&matrix)];
    let one = quantize("one.gguf", &[&with[..], &["--threads", "1"]].concat());
    let two = quantize("two.gguf", &[&with[..], &["--threads", "2"]].concat());
    assert!(one == two, "threads change no byte");
    assert!(one != quantize("without.gguf", &[]), "importance changes the experts");
    let report = json(&["inspect", "-m", str(&path("one.gguf")), "--json"]);
    let types: Vec<_> =
        report["weights"].as_array().unwrap().iter().map(|g| g["type"].to_string()).collect();
    assert!(types.iter().any(|ty| ty.contains("IQ2_XXS")), "{report}");
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 6, "no parts or journals are left: {left:?}");
}

#[test]
fn a_plan_can_be_seen_first() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (model, output) = (path("f16.gguf"), path("out.gguf"));
    stdout(&["synth", "--shape", "tiny", "--recipe", "f16", str(&model)]);
    let args = ["quantize", str(&model), str(&output), "--recipe", "q8"];
    let plan = |tensor| [&args[..], &["--dry-run", "--tensor", tensor]].concat();
    let shown = stdout(&plan("output.weight=Q4_K"));
    assert!(shown.contains("F16 to Q4_K") && shown.contains("whole file"), "{shown}");
    assert!(!output.exists());
    let unused = error(&plan("no.such.*=Q4_K"));
    assert!(unused.contains("no.such.*"), "{unused}");
    fs::write(&output, "").unwrap();
    let exists = error(&args);
    assert!(exists.ends_with("--force to replace it"), "{exists}");
}
