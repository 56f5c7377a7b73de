//! `ds4 logits`.

use std::fs;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::process::{error, stdout, str, tiny};

#[test]
fn logits_are_written_as_documented() {
    let folder = tempfile::tempdir().unwrap();
    let (ids, out) = (folder.path().join("ids"), folder.path().join("out.f32"));
    fs::write(&ids, "0 17\n\t42 7 1000\n").unwrap();
    let logits = |extra: &[&str]| {
        let model = tiny("tiny-b-q2.gguf");
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

/// The golden logits come from an independent implementation, in f32.
#[test]
fn logits_are_the_golden_ones() {
    let vectors = fs::read(tiny("tiny-b-q2.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&vectors).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for sequence in ["n5", "n130", "n257"] {
        let tensor = |key: &str| golden.tensor(&format!("{sequence}.{key}")).unwrap().data();
        let positions: Vec<_> = words(tensor("logit_positions")).map(|p| p.to_string()).collect();
        let ids: Vec<_> = words(tensor("tokens")).map(|id| id.to_string()).collect();
        let (file, out) = (folder.path().join("ids"), folder.path().join("out"));
        fs::write(&file, ids.join(" ")).unwrap();
        stdout(&[
            "logits",
            "-m",
            str(&tiny("tiny-b-q2.gguf")),
            "--token-ids",
            str(&file),
            "--positions",
            &positions.join(","),
            "--reference",
            "--cache-rounding",
            "off",
            "-o",
            str(&out),
        ]);
        let (found, expected) = (fs::read(&out).unwrap(), tensor("logits"));
        assert_eq!(found.len(), expected.len());
        let float = |bytes| words(bytes).map(f32::from_bits);
        let largest =
            float(&found).zip(float(expected)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest < 5e-3, "{sequence}: off by {largest}");
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap()))
}
