//! Plain-Rust hot routines in f32: the yardstick for every faster version, and its documentation.
//!
//! Weights are dequantised exactly and activations are not rounded at all.

pub mod attention;
pub mod experts;
pub mod products;

/// Σ a·b, in eight partial sums (f32 sums of up to 16384 terms stay accurate that way).
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a8, a_rest) = a.as_chunks::<8>();
    let (b8, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0; 8];
    for (a, b) in a8.iter().zip(b8) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// x / sqrt(mean(x²) + epsilon), times `weight` if there is one.
pub fn rms_norm(x: &mut [f32], weight: Option<&[f32]>, epsilon: f32) {
    let scale = 1.0 / (dot(x, x) / x.len() as f32 + epsilon).sqrt();
    match weight {
        Some(w) => x.iter_mut().zip(w).for_each(|(x, w)| *x *= scale * w),
        None => x.iter_mut().for_each(|x| *x *= scale),
    }
}

/// 1 / (1 + e^−x).
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
