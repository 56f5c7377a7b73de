//! What comes out has the values that went in.

use std::{collections::HashMap, path::Path, sync::Arc};

use ds4_convert::{Collector, ImportanceMatrix, Recipe};
use ds4_cpu::{CpuBackend, Kernels};
use ds4_engine::{Engine, Phase, Wanted, Work, rows::CacheRounding, sampling};
use ds4_model::{Model, binding::expected_tensors, config::Config};
use gguf::{GgufFile, TensorType};
use safetensors::Dtype;

use super::{
    TINY, exact,
    generate::{self, Content, Tensor, official_name},
    options, run, tiny_metadata, values, with_importance,
};

#[test]
fn official_storage_keeps_its_values() {
    let directory = tempfile::tempdir().unwrap();
    let metadata = generate::describe(directory.path(), &generate::small_config());
    let tensors = generate::tensors(metadata.config());
    generate::write(&directory.path().join("model.safetensors"), &tensors);
    let output = directory.path().join("out.gguf");
    let inputs = [directory.path().to_owned()];

    // FP8 fits no block format exactly, so that everything but experts is made f32 here.
    let mut options = exact();
    options.recipe = Recipe::Mxfp4;
    options.overrides.push("*_exps.*=MXFP4".parse().unwrap());
    run(&inputs, &metadata, options, &output).unwrap();
    let file = GgufFile::open(&output).unwrap();
    let stored: HashMap<_, _> = tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    for tensor in expected_tensors(metadata.config()) {
        let found = values(&file, &tensor.name);
        let expected = official_values(&stored, &tensor.name, metadata.config().experts);
        assert!(found == expected, "{}", tensor.name);
        let is_stack = tensor.name.contains("_exps.");
        let ty = file.tensor(&tensor.name).unwrap().ty;
        assert_eq!(ty == TensorType::MXFP4, is_stack, "{}", tensor.name);
    }
    assert_eq!(logits(&output, Kernels::Reference).len(), TOKENS * metadata.config().vocab);
}

#[test]
fn without_rounding_logits_are_equal_to_the_last_bit() {
    let directory = tempfile::tempdir().unwrap();
    write_tiny_as_safetensors(directory.path());
    let output = directory.path().join("out.gguf");
    run(&[directory.path().to_owned()], &tiny_metadata(), exact(), &output).unwrap();
    let logits = |path: &Path| logits(path, Kernels::Reference);
    assert!(logits(&output) == logits(Path::new(TINY)));
}

/// Rounding flips a choice of experts or rows now and then, and with random weights that costs a
/// whole position; hence the loose bound on the mean and the tight one on the median.
#[test]
fn f16_changes_logits_by_rounding_alone() {
    let directory = tempfile::tempdir().unwrap();
    write_tiny_as_safetensors(directory.path());
    let output = directory.path().join("out.gguf");
    let inputs = [directory.path().to_owned()];
    run(&inputs, &tiny_metadata(), options(Recipe::F16, &[]), &output).unwrap();
    let d = Distance::between(Path::new(TINY), &output, Kernels::Reference);
    assert!(d.kl_median < 1e-4 && d.kl_mean < 5e-3 && d.top1 > 0.98, "{d:?}");

    let (before, after) =
        (GgufFile::open(Path::new(TINY)).unwrap(), GgufFile::open(&output).unwrap());
    for tensor in before.tensors() {
        let pairs = values(&before, &tensor.name).into_iter().zip(values(&after, &tensor.name));
        for (before, after) in pairs {
            let spacing = (before.abs() / 2048.0).max(2f32.powi(-24));
            assert!((before - after).abs() <= spacing, "{}: {before} {after}", tensor.name);
        }
    }
}

#[test]
fn each_recipe_makes_a_model_with_a_bounded_error() {
    let directory = tempfile::tempdir().unwrap();
    let metadata = generate::describe(directory.path(), &generate::small_config());
    let tensors = generate::tensors(metadata.config());
    generate::write(&directory.path().join("model.safetensors"), &tensors);
    let stored: HashMap<_, _> = tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    // Squared error relative to the values' own, of routed experts and of the rest: what each
    // format costs on values without structure.
    let bounds = [
        (Recipe::Q2, 0.15, 1e-4),
        (Recipe::Q4, 0.01, 1e-4),
        (Recipe::Mxfp4, 0.0, 1e-4),
        (Recipe::Q8, 1e-4, 1e-4),
        (Recipe::F16, 1e-7, 1e-7),
    ];
    for (recipe, experts, others) in bounds {
        let output = directory.path().join(format!("{}.gguf", recipe.name()));
        let inputs = [directory.path().to_owned()];
        run(&inputs, &metadata, options(recipe, &[]), &output).unwrap();
        let file = GgufFile::open(&output).unwrap();
        for tensor in expected_tensors(metadata.config()) {
            let expected = official_values(&stored, &tensor.name, metadata.config().experts);
            let error = relative_error(&expected, &values(&file, &tensor.name));
            let bound = if tensor.name.contains("_exps.") { experts } else { others };
            assert!(error <= bound, "{recipe:?} {}: {error:.2e}", tensor.name);
        }
        Model::open(&output).unwrap();
    }
}

#[test]
fn types_that_stay_keep_their_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out.gguf");
    run(&[TINY.into()], &tiny_metadata(), options(Recipe::Q2, &[]), &output).unwrap();
    let (before, after) =
        (GgufFile::open(Path::new(TINY)).unwrap(), GgufFile::open(&output).unwrap());
    assert_eq!(before.tensors().len(), after.tensors().len());
    for tensor in before.tensors() {
        let other = after.tensor(&tensor.name).unwrap();
        assert_eq!((tensor.ty, &tensor.dims), (other.ty, &other.dims), "{}", tensor.name);
        assert!(before.tensor_bytes(tensor) == after.tensor_bytes(other), "{}", tensor.name);
    }
    for (key, value) in before.metadata().iter() {
        if key != "general.file_type" {
            assert_eq!(after.metadata().get(key), Some(value), "{key}");
        }
    }
}

#[test]
fn importance_lowers_the_weighted_error() {
    let directory = tempfile::tempdir().unwrap();
    write_tiny_as_safetensors(directory.path());
    let metadata = tiny_metadata();
    let config = metadata.config().clone();
    let collector = Arc::new(Collector::new(&config));
    let observed = |backend: CpuBackend| backend.with_observer(collector.clone());
    all_logits(Path::new(TINY), Kernels::detect(), 1, observed);
    let importance = collector.matrix("random tokens", 1);

    let weighted_error = |options| {
        let output = directory.path().join("out.gguf");
        run(&[directory.path().to_owned()], &metadata, options, &output).unwrap();
        let (before, after) =
            (GgufFile::open(Path::new(TINY)).unwrap(), GgufFile::open(&output).unwrap());
        let mut sum = 0.0;
        for name in ["blk.1.ffn_down_exps.weight", "blk.2.ffn_down_exps.weight"] {
            let (cols, rows) = (config.expert_width, config.hidden);
            let importance = importance.entry(name).unwrap();
            let pairs = values(&before, name).into_iter().zip(values(&after, name));
            for (i, (before, after)) in pairs.enumerate() {
                let expert = i / (cols * rows);
                let weight = importance[expert * cols + i % cols];
                sum += f64::from(weight * (before - after) * (before - after));
            }
        }
        sum
    };
    // Down in another 2-bit format than the source has, so that nothing fits by itself.
    let other = ["*ffn_down_exps*=IQ2_XXS"];
    let plain = weighted_error(options(Recipe::Q2, &other));
    let mut weighted = with_importance(Recipe::Q2, importance.clone());
    weighted.overrides = options(Recipe::Q2, &other).overrides;
    let weighted = weighted_error(weighted);
    assert!(weighted < 0.99 * plain, "{weighted:.4e} with, {plain:.4e} without");
}

#[test]
fn observing_changes_no_logits_and_halves_add_up() {
    let config = tiny_metadata().config().clone();
    for kernels in Kernels::available() {
        let collect = |seeds: &[u64]| {
            let collector = Arc::new(Collector::new(&config));
            for &seed in seeds {
                let observed = |backend: CpuBackend| backend.with_observer(collector.clone());
                let seen = all_logits(Path::new(TINY), kernels, seed, observed);
                assert!(seen == all_logits(Path::new(TINY), kernels, seed, |b| b), "{kernels}");
            }
            (collector.rows(), collector.matrix("", 1))
        };
        let ((rows_a, a), (rows_b, b), (rows, whole)) =
            (collect(&[1]), collect(&[2]), collect(&[1, 2]));
        let used = config.experts_used as u64 * TOKENS as u64;
        assert!(rows_a.iter().chain(&rows_b).all(|rows| rows.iter().sum::<u64>() == used));
        for (layer, rows) in rows.iter().enumerate() {
            for name in ["gate", "up", "down"].map(|m| format!("blk.{layer}.ffn_{m}_exps.weight")) {
                let whole = whole.entry(&name).unwrap();
                let cols = whole.len() / config.experts;
                for (i, whole) in whole.iter().enumerate() {
                    let (n_a, n_b) = (rows_a[layer][i / cols], rows_b[layer][i / cols]);
                    assert_eq!(n_a + n_b, rows[i / cols]);
                    let part = |n: u64, m: &ImportanceMatrix| n as f32 * m.entry(&name).unwrap()[i];
                    let sum = part(n_a, &a) + part(n_b, &b);
                    let difference = (sum - (n_a + n_b) as f32 * whole).abs();
                    assert!(difference <= 1e-6 * sum, "{kernels} {name} {i}");
                }
            }
        }
    }
}

#[test]
fn experts_that_saw_nothing_have_importance_one() {
    let config = tiny_metadata().config().clone();
    let matrix = Collector::new(&config).matrix("text.txt", 0);
    assert_eq!(matrix.len(), 3 * config.layers.len());
    assert!(matrix.entry("blk.0.ffn_up_exps.weight").unwrap().iter().all(|v| *v == 1.0));
}

const TOKENS: usize = 300;

/// Writes the tests' model as a checkpoint of f32.
pub fn write_tiny_as_safetensors(directory: &Path) {
    let file = GgufFile::open(Path::new(TINY)).unwrap();
    let config = Config::from_metadata(&file).unwrap();
    let mut tensors = Vec::new();
    for tensor in expected_tensors(&config) {
        let values = values(&file, &tensor.name);
        let shape: Vec<usize> = tensor.dims.iter().rev().map(|&dim| dim as usize).collect();
        let mut push = |name: String, shape: &[usize], values: &[f32]| {
            let (dtype, bytes) = match name.contains("tid2eid") {
                true => {
                    (Dtype::I64, values.iter().flat_map(|id| (*id as i64).to_le_bytes()).collect())
                }
                false => (Dtype::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
            };
            let content = Content::Bytes(bytes);
            tensors.push(Tensor { name, dtype, shape: shape.to_vec(), content });
        };
        if shape.len() < 3 {
            push(official_name(&tensor.name, 0), &shape, &values);
            continue;
        }
        for (expert, values) in values.chunks_exact(shape[1] * shape[2]).enumerate() {
            push(official_name(&tensor.name, expert), &shape[1..], values);
        }
    }
    generate::write(&directory.join("model.safetensors"), &tensors);
}

/// The values of a GGUF tensor as the official storage has them, worked out from its definition.
fn official_values(stored: &HashMap<&str, &Tensor>, gguf: &str, experts: usize) -> Vec<f32> {
    let count = if gguf.contains("_exps.") { experts } else { 1 };
    let names = (0..count).map(|expert| official_name(gguf, expert));
    names
        .flat_map(|name| {
            let tensor = stored[name.as_str()];
            let bytes = tensor.bytes();
            let scale = |index: usize| {
                let scales = stored[name.replace(".weight", ".scale").as_str()].bytes();
                2f64.powi(i32::from(scales[index]) - 127)
            };
            match tensor.dtype {
                Dtype::F32 => words::<4>(&bytes).map(f32::from_le_bytes).collect::<Vec<_>>(),
                Dtype::BF16 => {
                    let wide = |b: [u8; 2]| f32::from_le_bytes([0, 0, b[0], b[1]]);
                    words::<2>(&bytes).map(wide).collect()
                }
                Dtype::I64 => words::<8>(&bytes).map(|id| i64::from_le_bytes(id) as f32).collect(),
                Dtype::F8_E4M3 => {
                    let scales: Vec<f64> = (0..)
                        .map_while(|i| {
                            let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
                            (i < rows.div_ceil(128) * cols.div_ceil(128)).then(|| scale(i))
                        })
                        .collect();
                    let cols = tensor.shape[1];
                    let value = |(i, &byte): (usize, &u8)| {
                        let (row, col) = (i / cols, i % cols);
                        let block = row / 128 * cols.div_ceil(128) + col / 128;
                        (e4m3(byte) * scales[block]) as f32
                    };
                    bytes.iter().enumerate().map(value).collect()
                }
                _ => {
                    const E2M1: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
                    let scales = stored[name.replace(".weight", ".scale").as_str()].bytes();
                    let value = |(i, &byte): (usize, &u8)| {
                        let scale = 2f64.powi(i32::from(scales[i / 16]) - 127);
                        [byte & 15, byte >> 4].map(|nibble| {
                            let magnitude = E2M1[usize::from(nibble & 7)] * scale;
                            (if nibble & 8 == 0 { magnitude } else { -magnitude }) as f32
                        })
                    };
                    bytes.iter().enumerate().flat_map(value).collect()
                }
            }
        })
        .collect()
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks::<N>().0.iter().copied()
}

fn e4m3(byte: u8) -> f64 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
    let magnitude = match exponent {
        0 => fraction * 2f64.powi(-9),
        _ => (8.0 + fraction) * 2f64.powi(exponent - 10),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

fn relative_error(expected: &[f32], found: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = expected.iter().zip(found).map(|(a, b)| square(a - b)).sum();
    error / expected.iter().map(|x| square(*x)).sum::<f64>().max(1e-30)
}

fn logits(path: &Path, kernels: Kernels) -> Vec<f32> {
    all_logits(path, kernels, 5, |backend| backend)
}

/// Logits after every one of some random tokens.
fn all_logits(
    path: &Path,
    kernels: Kernels,
    seed: u64,
    prepare: impl FnOnce(CpuBackend) -> CpuBackend,
) -> Vec<f32> {
    let model = Arc::new(Model::open(path).unwrap());
    let mut rng = fastrand::Rng::with_seed(seed);
    let tokens: Vec<u32> = (0..TOKENS).map(|_| rng.u32(..model.config.vocab as u32)).collect();
    let engine = Engine::new(prepare(CpuBackend::new(model, kernels, CacheRounding::Off)));
    let mut session = engine.new_session().unwrap();
    let wanted = vec![Wanted::Logits; TOKENS];
    let phase = Phase::Prefill;
    let work = Work { session: &mut session, tokens: &tokens, phase, wanted: &wanted };
    let output = engine.step(&mut [work]).unwrap().remove(0);
    output.logits().flatten().copied().collect()
}

#[derive(Debug)]
struct Distance {
    kl_mean: f64,
    kl_median: f64,
    /// Share of equal best tokens.
    top1: f64,
}

impl Distance {
    fn between(a: &Path, b: &Path, kernels: Kernels) -> Self {
        let (a, b) = (logits(a, kernels), logits(b, kernels));
        let vocab = a.len() / TOKENS;
        let pairs = || a.chunks_exact(vocab).zip(b.chunks_exact(vocab));
        let same = pairs().filter(|(a, b)| sampling::argmax(a) == sampling::argmax(b)).count();
        let mut kl: Vec<f64> = pairs()
            .map(|(a, b)| {
                let (la, lb) = (sampling::log_sum_exp(a), sampling::log_sum_exp(b));
                let terms = a.iter().zip(b).map(|(a, b)| {
                    let p = f64::from(*a) - la;
                    p.exp() * (p - (f64::from(*b) - lb))
                });
                terms.sum()
            })
            .collect();
        kl.sort_by(f64::total_cmp);
        let kl_mean = kl.iter().sum::<f64>() / TOKENS as f64;
        Distance { kl_mean, kl_median: kl[TOKENS / 2], top1: same as f64 / TOKENS as f64 }
    }
}
