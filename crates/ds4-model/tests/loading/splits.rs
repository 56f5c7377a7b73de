//! Models in several files.

use std::{
    fs,
    path::{Path, PathBuf},
};

use ds4_model::{Model, synth};
use gguf::Value;

use crate::draft::Draft;

/// Writes the tiny model in three parts; returns the path of each.
fn split(folder: &Path) -> Vec<PathBuf> {
    let whole = Draft::tiny();
    let count = whole.tensors.len();
    let mut tensors = whole.tensors.into_iter();
    (0..3u16)
        .map(|no| {
            let taken = if no == 2 { count } else { count / 3 };
            let mut part = Draft {
                metadata: if no == 0 { whole.metadata.clone() } else { Vec::new() },
                tensors: tensors.by_ref().take(taken).collect(),
            };
            part.set("split.no", Value::U16(no));
            part.set("split.count", Value::U16(3));
            part.set("split.tensors.count", count as i32);
            let path = folder.join(format!("model-0000{}-of-00003.gguf", no + 1));
            fs::write(&path, part.bytes()).unwrap();
            path
        })
        .collect()
}

fn refused(path: &Path) -> String {
    Model::open(path).err().unwrap().to_string()
}

#[test]
fn any_part_opens_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let parts = split(folder.path());
    for part in &parts {
        let model = Model::open(part).unwrap();
        assert_eq!(model.config, synth::tiny());
        assert_eq!(model.files().len(), 3);
        let sizes: u64 = parts.iter().map(|p| fs::metadata(p).unwrap().len()).sum();
        assert_eq!(model.file_bytes(), sizes);
    }
}

#[test]
fn a_missing_part_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let parts = split(folder.path());
    fs::remove_file(&parts[2]).unwrap();
    let expected = format!("part 3 of 3 is missing: {}", parts[2].display());
    assert_eq!(refused(&parts[0]), expected);
}

#[test]
fn a_renamed_part_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let parts = split(folder.path());
    let renamed = folder.path().join("model.gguf");
    fs::rename(&parts[0], &renamed).unwrap();
    assert!(refused(&renamed).ends_with("expected a name that ends in -00001-of-00003.gguf"));
}

#[test]
fn parts_of_different_sets_do_not_mix() {
    let folder = tempfile::tempdir().unwrap();
    let parts = split(folder.path());
    fs::copy(&parts[1], &parts[2]).unwrap();
    assert!(refused(&parts[0]).ends_with("split.no: found 1, expected 2"));
}

#[test]
fn a_tensor_in_two_parts_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let parts = split(folder.path());
    let mut last = Draft { metadata: Vec::new(), tensors: Draft::tiny().tensors };
    last.set("split.no", Value::U16(2));
    last.set("split.count", Value::U16(3));
    fs::write(&parts[2], last.bytes()).unwrap();
    let error = refused(&parts[0]);
    assert!(error.contains("tensor token_embd.weight: found also in"), "{error}");
}

#[test]
fn a_lost_tensor_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let parts = split(folder.path());
    let mut first = Draft::tiny();
    first.tensors.truncate(first.tensors.len() / 3 - 1);
    first.set("split.no", Value::U16(0));
    first.set("split.count", Value::U16(3));
    first.set("split.tensors.count", Draft::tiny().tensors.len() as i32);
    fs::write(&parts[0], first.bytes()).unwrap();
    let error = refused(&parts[0]);
    assert!(error.contains("split.tensors.count: found "), "{error}");
}
