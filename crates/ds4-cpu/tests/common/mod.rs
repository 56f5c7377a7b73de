//! Golden vectors: logits of an independent implementation for given tokens.

use std::{fs, path::PathBuf, sync::Arc};

use ds4_cpu::{CpuBackend, Kernels};
use ds4_engine::{Backend, Engine, LogitsWanted, Session, Work, rows::CacheRounding, sampling};
use ds4_model::Model;
use safetensors::SafeTensors;

pub type CpuEngine = Engine<CpuBackend>;

pub fn tiny_file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny").join(name)
}

pub fn tiny_engine(kernels: Kernels, rounding: CacheRounding) -> CpuEngine {
    let model = Model::open(&tiny_file("tiny-b-q2.gguf")).unwrap();
    Engine::new(CpuBackend::new(Arc::new(model), kernels, rounding))
}

/// Appends `tokens` in chunks; returns the logits after every one of them.
pub fn feed<B: Backend>(
    engine: &Engine<B>,
    session: &mut Session<B>,
    tokens: &[u32],
    chunk: usize,
) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    for tokens in tokens.chunks(chunk) {
        let mut work = [Work { session: &mut *session, tokens, logits: LogitsWanted::All }];
        let logits = engine.step(&mut work).unwrap().remove(0);
        rows.extend(logits.data.chunks_exact(logits.vocab).map(<[f32]>::to_vec));
    }
    rows
}

/// One sequence of a golden file.
pub struct Golden {
    pub name: String,
    pub tokens: Vec<u32>,
    /// Positions with complete logits, and the logits.
    full: Vec<(usize, Vec<f32>)>,
    /// The ten best tokens at every position.
    top: Vec<Vec<(u32, f32)>>,
    /// Log-sum-exp at every position.
    lse: Vec<f32>,
}

/// How far logits are from golden ones.
#[derive(Debug)]
pub struct Distance {
    pub max_abs: f64,
    pub kl_mean: f64,
    pub kl_max: f64,
    /// Share of positions whose best token is the golden one (or ties with it within 1e-3).
    pub top1: f64,
}

/// All sequences of `file` in models/tiny.
pub fn golden(file: &str) -> Vec<Golden> {
    let bytes = fs::read(tiny_file(file)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut names: Vec<String> = tensors
        .names()
        .iter()
        .filter_map(|n| Some(n.strip_suffix(".tokens")?.to_string()))
        .collect();
    names.sort_by_key(|n| n[1..].parse::<usize>().unwrap());
    names.into_iter().map(|name| Golden::read(&tensors, name)).collect()
}

impl Golden {
    fn read(tensors: &SafeTensors<'_>, name: String) -> Self {
        let words = |key: &str| -> Vec<u32> {
            let data = tensors.tensor(&format!("{name}.{key}")).unwrap().data().to_vec();
            data.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let floats =
            |key: &str| -> Vec<f32> { words(key).into_iter().map(f32::from_bits).collect() };
        let positions = words("logit_positions");
        let logits = floats("logits");
        let vocab = logits.len() / positions.len();
        let full = positions
            .iter()
            .zip(logits.chunks_exact(vocab))
            .map(|(p, row)| (*p as usize, row.to_vec()))
            .collect();
        let top = words("topk_ids")
            .chunks_exact(10)
            .zip(floats("topk_logits").chunks_exact(10))
            .map(|(ids, logits)| ids.iter().copied().zip(logits.iter().copied()).collect())
            .collect();
        Golden { tokens: words("tokens"), lse: floats("lse"), full, top, name }
    }

    /// Distance of `rows`, the logits at every position.
    ///
    /// Exact where the file has complete logits; elsewhere over the ten best tokens, with the
    /// rest of the distribution as one more class.
    pub fn distance(&self, rows: &[Vec<f32>]) -> Distance {
        assert_eq!(rows.len(), self.tokens.len());
        let (mut max_abs, mut kl, mut agree) = (0f64, Vec::new(), 0);
        for (p, row) in rows.iter().enumerate() {
            assert!(row.iter().all(|x| x.is_finite()), "{}: position {p} is not finite", self.name);
            let (diff, divergence) = match self.full.iter().find(|(q, _)| *q == p) {
                Some((_, golden)) => complete(golden, row),
                None => self.partial(p, row),
            };
            max_abs = max_abs.max(diff);
            kl.push(divergence.max(0.0));
            let best = sampling::argmax(row).unwrap();
            let (_, largest) = self.top[p][0];
            agree +=
                usize::from(self.top[p].iter().any(|(t, x)| *t == best && largest - x <= 1e-3));
        }
        Distance {
            max_abs,
            kl_mean: kl.iter().sum::<f64>() / kl.len() as f64,
            kl_max: kl.iter().copied().fold(0.0, f64::max),
            top1: agree as f64 / rows.len() as f64,
        }
    }

    fn partial(&self, p: usize, row: &[f32]) -> (f64, f64) {
        let total = sampling::log_sum_exp(row);
        let (mut diff, mut kl) = (0f64, 0.0);
        let (mut rest_golden, mut rest) = (1.0, 1.0);
        for (token, golden) in &self.top[p] {
            let x = row[*token as usize] as f64;
            diff = diff.max((*golden as f64 - x).abs());
            let (golden, x) = ((*golden - self.lse[p]) as f64, x - total);
            kl += golden.exp() * (golden - x);
            rest_golden -= golden.exp();
            rest -= x.exp();
        }
        let (rest_golden, rest) = (f64::max(rest_golden, 1e-12), f64::max(rest, 1e-12));
        (diff, kl + rest_golden * (rest_golden / rest).ln())
    }
}

fn complete(golden: &[f32], row: &[f32]) -> (f64, f64) {
    let (total_golden, total) = (sampling::log_sum_exp(golden), sampling::log_sum_exp(row));
    let (mut diff, mut kl) = (0f64, 0.0);
    for (g, x) in golden.iter().zip(row) {
        let (g, x) = (*g as f64, *x as f64);
        diff = diff.max((g - x).abs());
        kl += (g - total_golden).exp() * ((g - total_golden) - (x - total));
    }
    (diff, kl)
}
