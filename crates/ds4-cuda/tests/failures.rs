//! What happens where there is no device, no memory, or a damaged cache of kernels.

mod support;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use ds4_cuda::{CudaBackend, Error, Options, devices};
use ds4_engine::{Backend, rows::CacheRounding};
use ds4_model::{
    Model,
    synth::{self, Recipe},
};
use support::small_model;

/// Run by other tests in processes of their own, and wherever a device is expected.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn there_is_a_device() {
    let options = Options { device: None, cache_rounding: CacheRounding::On, context: 1024 };
    match CudaBackend::new(small_model(Recipe::Q2), options, |_, _| {}) {
        Ok(backend) => println!("{}", backend.memory(1024).unwrap()),
        Err(error) => panic!("{error:?}: {error}"),
    }
}

/// The test above in a process of its own.
fn child(cache: &Path, environment: &[(&str, Option<&str>)]) -> Output {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "there_is_a_device", "--ignored", "--nocapture"]);
    command.env("XDG_CACHE_HOME", cache).env("RUST_BACKTRACE", "0");
    for &(key, value) in environment {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    command.output().unwrap()
}

#[test]
fn without_a_device_the_error_says_so() {
    let cache = tempfile::tempdir().unwrap();
    let hidden = [("LD_LIBRARY_PATH", None), ("CUDA_VISIBLE_DEVICES", Some(""))];
    let output = child(cache.path(), &hidden);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{text}");
    let reasons = ["NoDriver: no CUDA driver found", "found: 0 }: no CUDA device 0"];
    assert!(reasons.iter().any(|reason| text.contains(reason)), "{text}");
}

fn kernels(cache: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let Ok(files) = fs::read_dir(cache.join("ds4/kernels")) else { return Vec::new() };
    let mut files: Vec<_> = files
        .map(|file| file.unwrap().path())
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn damaged_kernels_are_compiled_again() {
    let cache = tempfile::tempdir().unwrap();
    let open = || {
        let output = child(cache.path(), &[]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    open();
    let good = kernels(cache.path());
    assert!(good.len() >= 10, "{} files", good.len());
    for (i, (path, bytes)) in good.iter().enumerate() {
        let mut bytes = bytes.clone();
        match i % 4 {
            0 => bytes.truncate(bytes.len() / 2),
            1 => *bytes.last_mut().unwrap() ^= 1,
            2 => bytes[100] ^= 1,
            _ => bytes.clear(),
        }
        fs::write(path, bytes).unwrap();
    }
    let damaged = kernels(cache.path());
    open();
    let repaired = kernels(cache.path());
    assert_eq!(repaired.len(), good.len());
    for ((path, repaired), (_, damaged)) in repaired.iter().zip(&damaged) {
        assert!(repaired != damaged, "{}", path.display());
    }
    // Whole ones are left alone.
    let modified = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    let before: Vec<_> = repaired.iter().map(|(path, _)| modified(path)).collect();
    open();
    let after: Vec<_> = kernels(cache.path()).iter().map(|(path, _)| modified(path)).collect();
    assert_eq!(before, after);
}

/// Nothing is loaded to find that out.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn a_model_that_does_not_fit_is_refused_with_what_would() {
    let new = |model: &Arc<Model>, context| {
        let options = Options { device: None, cache_rounding: CacheRounding::Off, context };
        let progress = |_, _| panic!("loading began");
        match CudaBackend::new(model.clone(), options, progress) {
            Err(Error::TooLarge { free, needed, advice, .. }) => (free, needed, advice),
            Err(error) => panic!("{error}"),
            Ok(backend) => panic!("{}", backend.memory(context).unwrap()),
        }
    };
    // 580 GB.
    let flash = Arc::new(Model::dummy("flash", &synth::flash(43), Recipe::F16, 1).unwrap());
    let (_, needed, advice) = new(&flash, 1024);
    assert!(advice.starts_with("weights take 5"), "{advice}");
    assert!(needed.starts_with('5') && needed.ends_with("GiB"), "{needed}");

    // A context that is too long, and then the one that would fit.
    let small = small_model(Recipe::Q2);
    let free = devices().unwrap().iter().map(|d| d.free_bytes).max().unwrap();
    let (_, _, advice) = new(&small, free as usize / 100);
    let tokens = advice.strip_prefix("a context of about ").and_then(|a| a.split(' ').next());
    let tokens: usize = tokens.and_then(|t| t.parse().ok()).expect(&advice);
    assert!(tokens > 1 << 20 && tokens < free as usize / 100, "{advice}");
    let options = Options { device: None, cache_rounding: CacheRounding::Off, context: tokens / 2 };
    let backend = CudaBackend::new(small, options, |_, _| {}).unwrap();
    let report = backend.memory(tokens / 2).unwrap();
    assert!(report.session > free / 4, "{report}");
    assert!(report.left.unwrap() > report.session, "{report}");
}
