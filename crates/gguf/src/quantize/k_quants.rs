//! Q2_K and Q4_K: groups with a scale and a minimum, which are themselves
//! multiples of two steps per block.

use half::f16;

use super::fit::{LEAST_DETERMINANT, Weighted, argmin, round_level, scale_and_min, step, storable};

/// What tells the two formats apart.
struct Format {
    /// Highest level of an element.
    max_level: f32,
    /// Highest multiple of a step that a scale or minimum can be.
    max_scale: f32,
    /// How much the block's mean square counts in an element's weight.
    spread: f32,
}

const Q2_K: Format = Format { max_level: 3.0, max_scale: 15.0, spread: 1.0 };
const Q4_K: Format = Format { max_level: 15.0, max_scale: 63.0, spread: 2.0 };

/// Times that the steps are refitted after the first fit. Each round takes a
/// little off the error (0.4 %, then 0.1 %) and costs a seventh of the speed.
const ROUNDS: usize = 2;

#[inline(always)]
pub(super) fn q2_k(x: &[f32; 256], importance: &[f32; 256], out: &mut [u8; 84]) {
    let parts: Parts<16> = fit_block(x, importance, &Q2_K);
    for (out, (scale, min)) in out[..16].iter_mut().zip(parts.scales.iter().zip(parts.mins)) {
        *out = scale | min << 4;
    }
    // 128 elements share 32 bytes: each run of 32 has two bits of every byte.
    for (bytes, levels) in out[16..80].chunks_exact_mut(32).zip(parts.levels.chunks_exact(128)) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = levels[i] | levels[i + 32] << 2 | levels[i + 64] << 4 | levels[i + 96] << 6;
        }
    }
    out[80..82].copy_from_slice(&parts.d.to_le_bytes());
    out[82..].copy_from_slice(&parts.dmin.to_le_bytes());
}

#[inline(always)]
pub(super) fn q4_k(x: &[f32; 256], importance: &[f32; 256], out: &mut [u8; 144]) {
    let parts: Parts<8> = fit_block(x, importance, &Q4_K);
    out[..2].copy_from_slice(&parts.d.to_le_bytes());
    out[2..4].copy_from_slice(&parts.dmin.to_le_bytes());
    let (scales, mins) = (&parts.scales, &parts.mins);
    for j in 0..4 {
        out[4 + j] = scales[j] | scales[j + 4] >> 4 << 6;
        out[8 + j] = mins[j] | mins[j + 4] >> 4 << 6;
        out[12 + j] = scales[j + 4] & 15 | mins[j + 4] << 4;
    }
    // Two groups share 32 bytes: the even one has the low nibbles.
    for (bytes, levels) in out[16..].chunks_exact_mut(32).zip(parts.levels.chunks_exact(64)) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = levels[i] | levels[i + 32] << 4;
        }
    }
}

/// A block in parts, before it is packed: y = (d·scale)·level − dmin·min.
struct Parts<const GROUPS: usize> {
    d: f16,
    dmin: f16,
    scales: [u8; GROUPS],
    mins: [u8; GROUPS],
    levels: [u8; 256],
}

/// Scale and minimum of each group as the fit of that group alone has them:
/// where to look for multiples of the steps.
struct Targets<const GROUPS: usize> {
    scales: [f32; GROUPS],
    mins: [f32; GROUPS],
}

/// Fits scale and minimum of each group, then the steps to those; then looks
/// for better multiples of the steps and for better steps in turn.
#[inline(always)]
fn fit_block<const GROUPS: usize>(
    x: &[f32; 256],
    importance: &[f32; 256],
    format: &Format,
) -> Parts<GROUPS> {
    let block = Weighted::new(x, importance, format.spread);
    let mut targets = Targets { scales: [0.0; GROUPS], mins: [0.0; GROUPS] };
    let mut weights = [0.0; GROUPS];
    let len = 256 / GROUPS;
    for (group, (x, w)) in block.x.chunks_exact(len).zip(block.w.chunks_exact(len)).enumerate() {
        let (scale, min) = scale_and_min(x, w, format.max_level);
        (targets.scales[group], targets.mins[group]) = (scale, min);
        weights[group] = w.iter().sum();
    }
    let d = step(&targets.scales, &weights, format.max_scale);
    let dmin = step(&targets.mins, &weights, format.max_scale);
    let (mut best, mut least) = fit_groups(&block, d, dmin, &targets, format);
    for _ in 0..ROUNDS {
        let (d, dmin) = best.refit_steps(&block);
        let (parts, error) = fit_groups(&block, d, dmin, &targets, format);
        if error < least {
            (best, least) = (parts, error);
        }
    }
    best
}

/// The best parts with given steps (rounded to what can be stored), and their
/// weighted squared error.
#[inline(always)]
fn fit_groups<const GROUPS: usize>(
    block: &Weighted,
    d: f32,
    dmin: f32,
    targets: &Targets<GROUPS>,
    format: &Format,
) -> (Parts<GROUPS>, f32) {
    let (d, dmin) = (storable(d), storable(dmin));
    let mut parts = Parts { d, dmin, scales: [0; GROUPS], mins: [0; GROUPS], levels: [0; 256] };
    let (d, dmin) = (d.to_f32(), dmin.to_f32());
    let mut error = 0.0;
    let len = 256 / GROUPS;
    for group in 0..GROUPS {
        let elements = group * len..(group + 1) * len;
        let (x, w) = (&block.x[elements.clone()], &block.w[elements.clone()]);
        let scale_candidates = nearby(targets.scales[group], d, format.max_scale);
        let min_candidates = nearby(targets.mins[group], dmin, format.max_scale);
        let scale: [f32; 16] = std::array::from_fn(|k| d * scale_candidates[k % 4]);
        let min: [f32; 16] = std::array::from_fn(|k| dmin * min_candidates[k / 4]);
        let inverse = scale.map(|scale| if scale > 0.0 { 1.0 / scale } else { 0.0 });
        let mut errors = [0.0; 16];
        for (&x, &w) in x.iter().zip(w) {
            for k in 0..16 {
                let shifted = x + min[k];
                let q = round_level(inverse[k] * shifted, format.max_level);
                let difference = shifted - scale[k] * q;
                errors[k] += w * difference * difference;
            }
        }
        let best = argmin(&errors);
        error += errors[best];
        parts.scales[group] = scale_candidates[best % 4] as u8;
        parts.mins[group] = min_candidates[best / 4] as u8;
        for (level, &x) in parts.levels[elements].iter_mut().zip(x) {
            *level = round_level(inverse[best] * (x + min[best]), format.max_level) as u8;
        }
    }
    (parts, error)
}

/// Four whole numbers from 0 to `max` around `value` over `step`.
#[inline(always)]
fn nearby(value: f32, step: f32, max: f32) -> [f32; 4] {
    let middle = if step > 0.0 { (value / step).floor() } else { 0.0 };
    let first = (middle - 1.0).clamp(0.0, max - 3.0);
    [first, first + 1.0, first + 2.0, first + 3.0]
}

impl<const GROUPS: usize> Parts<GROUPS> {
    /// The steps that fit best with everything else unchanged.
    #[inline(always)]
    fn refit_steps(&self, block: &Weighted) -> (f32, f32) {
        // x ≈ d·a − dmin·b, with a = scale·q and b = min.
        let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (i, (&x, &w)) in block.x.iter().zip(&block.w).enumerate() {
            let group = i * GROUPS / 256;
            let a = f32::from(self.scales[group]) * f32::from(self.levels[i]);
            let b = f32::from(self.mins[group]);
            aa += w * a * a;
            ab += w * a * b;
            bb += w * b * b;
            ax += w * a * x;
            bx += w * b * x;
        }
        let determinant = aa * bb - ab * ab;
        let (d, dmin) = ((ax * bb - bx * ab) / determinant, (ax * ab - bx * aa) / determinant);
        if determinant > LEAST_DETERMINANT * aa * bb && d > 0.0 && dmin > 0.0 {
            (d, dmin)
        } else {
            (self.d.to_f32(), self.dmin.to_f32())
        }
    }
}
