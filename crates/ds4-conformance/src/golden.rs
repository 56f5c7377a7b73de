//! Golden logits: those of an independent implementation for given tokens.

use std::fs;

use ds4_engine::sampling;
use safetensors::SafeTensors;

use crate::{divergence::kl, tiny_file};

/// One sequence of a golden file.
pub struct Golden {
    /// Its name in the file.
    pub name: String,
    /// Its tokens.
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
    /// Largest difference of two logits.
    pub max_abs: f64,
    /// Mean KL divergence over the positions, in nats.
    pub kl_mean: f64,
    /// Largest KL divergence at a position.
    pub kl_max: f64,
    /// Share of positions whose best token is the golden one (or ties with it within 1e-3).
    pub top1: f64,
}

/// All sequences of `file` in models/tiny.
pub fn golden(file: &str) -> Vec<Golden> {
    let bytes = fs::read(tiny_file(file)).expect("a golden file");
    let tensors = SafeTensors::deserialize(&bytes).expect("a golden file");
    let mut names: Vec<String> = tensors
        .names()
        .iter()
        .filter_map(|n| Some(n.strip_suffix(".tokens")?.to_string()))
        .collect();
    names.sort_by_key(|n| n[1..].parse::<usize>().expect("a golden file"));
    names.into_iter().map(|name| Golden::read(&tensors, name)).collect()
}

impl Golden {
    fn read(tensors: &SafeTensors<'_>, name: String) -> Self {
        let words = |key: &str| -> Vec<u32> {
            let data =
                tensors.tensor(&format!("{name}.{key}")).expect("a golden file").data().to_vec();
            data.chunks_exact(4)
                .map(|b| u32::from_le_bytes(b.try_into().expect("a golden file")))
                .collect()
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
            let best = sampling::argmax(row).expect("finite logits");
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
    let apart = golden.iter().zip(row).map(|(g, x)| (f64::from(*g) - f64::from(*x)).abs());
    (apart.fold(0.0, f64::max), kl(golden, row))
}
