//! Models without a file, and the backend that computes them.

use std::fs;

use crate::process::{error, json, run, stdout, str};

#[test]
fn a_dummy_is_what_synth_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (ids, model) = (path("ids"), path("model"));
    fs::write(&ids, "0 17 300 4 511 200").unwrap();
    stdout(&["synth", "--shape", "tiny", "--recipe", "mxfp4", str(&model)]);
    let logits = |model: &[&str], out: &str| {
        let args = ["logits", "--token-ids", str(&ids), "-o"];
        stdout(&[&args[..], &[str(&path(out))], model].concat());
        fs::read(path(out)).unwrap()
    };
    let written = logits(&["-m", str(&model)], "written");
    assert_eq!(written.len(), 6 * 512 * 4);
    assert!(logits(&["--dummy", "tiny-mxfp4"], "generated") == written);
    assert!(logits(&["--dummy", "tiny-q2"], "other") != written);
}

#[test]
fn a_dummy_of_the_full_size_is_described_at_once() {
    let report = json(&["inspect", "--dummy", "flash-q2", "--json"]);
    assert_eq!(report["layers"], 43);
    assert_eq!(report["files"][0]["name"], "flash-q2");
    assert!(report["memory"]["weights"].as_u64() > Some(80 << 30), "{report}");
    let report = json(&["inspect", "--dummy", "flash-q4:4", "--json"]);
    assert_eq!(report["layers"], 4);
}

#[test]
fn a_wrong_dummy_is_explained() {
    let output = run(&["bench", "--dummy", "flash-q2:44"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("flash-q2:4 for 4 of flash's 43"));
}

#[test]
fn the_backend_is_the_one_asked_for() {
    let bench = ["bench", "--dummy", "tiny-q2", "--ctx", "8", "--decode", "1", "--repeat", "1"];
    let with = |more: &[&'static str]| [&bench[..], more].concat();
    assert!(stdout(&with(&[])).contains("cpu: "), "without a GPU, auto is the CPU");
    assert!(stdout(&with(&["--backend", "cpu"])).contains("cpu: "));
    for asked in [&["--backend", "cuda"][..], &["--device", "0"]] {
        let message = error(&with(asked));
        assert!(message.contains("no CUDA d"), "{message}");
    }
    let contradiction = error(&with(&["--backend", "cuda", "--reference"]));
    assert!(contradiction.ends_with("--reference: computes on the CPU"), "{contradiction}");
}

#[test]
fn a_dummy_that_no_memory_holds_is_refused() {
    // 43 layers in f32 take more than a terabyte.
    let message = error(&["bench", "--dummy", "flash-f32", "--backend", "cpu"]);
    assert!(message.ends_with("choose fewer layers, such as flash-q2:4"), "{message}");
}
