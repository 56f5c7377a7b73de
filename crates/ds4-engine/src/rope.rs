//! Rotary position embedding: frequencies and angles (docs/model.md, "RoPE").
//!
//! Pairs are adjacent: element 2i and 2i + 1 of the rotated part. There is no amplitude factor.

use ds4_model::config::{Config, LayerKind, ROPE_DIM};

/// Pairs of elements that rotate together.
pub const PAIRS: usize = ROPE_DIM / 2;

/// Radians per position of each pair.
pub type Frequencies = [f32; PAIRS];

/// Cosine and sine of each pair's angle at one position.
#[derive(Debug, Clone, Copy)]
pub struct Rotation {
    /// Cosines.
    pub cos: [f32; PAIRS],
    /// Sines.
    pub sin: [f32; PAIRS],
}

/// Frequencies of a layer of this kind: plain in sliding-window layers, YaRN in compressed ones.
pub fn frequencies(config: &Config, kind: LayerKind) -> Frequencies {
    match kind {
        LayerKind::Swa => plain(config.rope_base),
        LayerKind::Csa | LayerKind::Hca => yarn(config),
    }
}

/// The rotation at `position`.
///
/// The angle is the f32 product, as in the official code; at a million tokens it is off by
/// 0.02 rad from the exact one, and the model was trained with that.
pub fn rotation(frequencies: &Frequencies, position: usize) -> Rotation {
    let mut r = Rotation { cos: [0.0; PAIRS], sin: [0.0; PAIRS] };
    for (i, f) in frequencies.iter().enumerate() {
        (r.sin[i], r.cos[i]) = (position as f32 * f).sin_cos();
    }
    r
}

impl Rotation {
    /// The opposite rotation.
    pub fn inverse(&self) -> Rotation {
        Rotation { cos: self.cos, sin: self.sin.map(|s| -s) }
    }

    /// Rotates the last [`ROPE_DIM`] elements of `x`.
    pub fn apply(&self, x: &mut [f32]) {
        let start = x.len() - ROPE_DIM;
        for (i, pair) in x[start..].chunks_exact_mut(2).enumerate() {
            let (a, b) = (pair[0], pair[1]);
            pair[0] = a * self.cos[i] - b * self.sin[i];
            pair[1] = a * self.sin[i] + b * self.cos[i];
        }
    }
}

fn plain(base: f32) -> Frequencies {
    std::array::from_fn(|i| exact(base, i) as f32)
}

fn exact(base: f32, pair: usize) -> f64 {
    (base as f64).powf(-2.0 * pair as f64 / ROPE_DIM as f64)
}

/// YaRN (Peng et al. 2023, section 3.2) without its attention temperature: pairs that turn more
/// than `beta_fast` times within the original context keep their frequency, those that turn less
/// than `beta_slow` times are slowed by `factor`, and a linear ramp lies between.
fn yarn(config: &Config) -> Frequencies {
    let (base, yarn) = (config.compress_rope_base, &config.yarn);
    let pair_turning = |turns: f32| {
        let wavelength = yarn.original_context as f64 / (std::f64::consts::TAU * turns as f64);
        ROPE_DIM as f64 * wavelength.ln() / (2.0 * (base as f64).ln())
    };
    let low = pair_turning(yarn.beta_fast).floor().max(0.0);
    let high = pair_turning(yarn.beta_slow).ceil().min(ROPE_DIM as f64 - 1.0);
    let width = if high > low { high - low } else { 0.001 };
    std::array::from_fn(|i| {
        let ramp = ((i as f64 - low) / width).clamp(0.0, 1.0);
        let f = exact(base, i);
        (f * (1.0 - ramp) + f / yarn.factor as f64 * ramp) as f32
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ds4_model::config::Yarn;

    fn close(a: f32, b: f32) -> bool {
        (a - b).abs() <= 2e-7 * b.abs()
    }

    #[test]
    fn frequencies_of_the_released_model() {
        let main = plain(10000.0);
        for (i, f) in [(1, 0.749_894_2), (16, 0.01), (31, 1.333_521_4e-4)] {
            assert!(close(main[i], f), "main f_{i} = {}", main[i]);
        }
        let config = Config {
            compress_rope_base: 160000.0,
            yarn: Yarn { factor: 16.0, original_context: 65536, beta_fast: 32.0, beta_slow: 1.0 },
            ..crate::tests::config()
        };
        let compressed = yarn(&config);
        for (i, f) in [
            (0, 1.0),
            (1, 0.687_656_02),
            (15, 0.003_635_538_6),
            (16, 0.002_265_625),
            (20, 2.969_777_8e-4),
            (24, 1.953_125e-5),
            (25, 5.372_313e-6),
            (31, 5.680_529e-7),
        ] {
            assert!(close(compressed[i], f), "compressed f_{i} = {}", compressed[i]);
        }
    }

    #[test]
    fn inverse_undoes_a_rotation_and_leaves_the_leading_part_alone() {
        let r = rotation(&plain(10000.0), 12345);
        let x: Vec<f32> = (0..80).map(|i| i as f32 - 40.0).collect();
        let mut y = x.clone();
        r.apply(&mut y);
        assert_eq!(x[..16], y[..16]);
        assert_ne!(x[16..], y[16..]);
        r.inverse().apply(&mut y);
        assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-4));
    }
}
