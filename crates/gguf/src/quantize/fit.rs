//! Weighted least-squares searches for the scale of a group of elements.
//!
//! Trials run side by side in the lanes of arrays, which the compiler turns
//! into vectors; each lane adds its terms in element order.

use half::f16;

/// Values further out are out of range for every block format; clamping them
/// keeps squares and their sums finite.
const LARGEST: f32 = 1e8;

/// Least determinant of a fit of two unknowns, relative to the product of its
/// diagonal: below, what is left of it is rounding.
pub(super) const LEAST_DETERMINANT: f32 = 1e-5;

/// A block ready for fitting: its elements, and the weight of each one's
/// squared error.
pub(super) struct Weighted {
    pub(super) x: [f32; 256],
    pub(super) w: [f32; 256],
}

impl Weighted {
    /// Weight is importance times √(`spread`·mean square + x²), as the reference
    /// quantisers of the format have it: errors of large elements count for more
    /// than their squares say (docs/gguf.md, "Quantisers").
    #[inline(always)]
    pub(super) fn new(x: &[f32; 256], importance: &[f32; 256], spread: f32) -> Self {
        let x = x.map(|v| v.clamp(-LARGEST, LARGEST));
        let mean_square = x.iter().map(|v| v * v).sum::<f32>() / 256.0;
        let mut w = *importance;
        for (w, x) in w.iter_mut().zip(&x) {
            *w *= (spread * mean_square + x * x).sqrt();
        }
        Weighted { x, w }
    }
}

/// `v` to the nearest whole number from 0 to `max`, ties to even. The sum has
/// no bits below one, so adding rounds; `max` is far below its 23 bits.
#[inline(always)]
pub(super) fn round_level(v: f32, max: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (v.clamp(0.0, max) + SHIFT) - SHIFT
}

/// `v` as the f16 that a block stores, at most the largest finite one.
#[inline(always)]
pub(super) fn storable(v: f32) -> f16 {
    f16::from_f32(v.clamp(-65504.0, 65504.0))
}

/// Index of the smallest element.
#[inline(always)]
pub(super) fn argmin<T: PartialOrd>(values: &[T]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value < values[best] {
            best = index;
        }
    }
    best
}

/// Scale and minimum (≥ 0) of a group: x ≈ scale·q − min, with whole q from 0
/// to `levels`.
#[inline(always)]
pub(super) fn scale_and_min(x: &[f32], w: &[f32], levels: f32) -> (f32, f32) {
    /// Spacings tried between those of `levels` − 0.9 and `levels` + 1.05 steps
    /// over the range of x.
    const TRIALS: usize = 40;
    let low = x.iter().copied().fold(0.0, f32::min);
    let high = x.iter().copied().fold(f32::MIN, f32::max);
    if high <= low {
        return (0.0, -low);
    }
    let inverse: [f32; TRIALS] =
        std::array::from_fn(|k| (levels - 0.9 + 0.05 * k as f32) / (high - low));
    let mut sums = Sums::<TRIALS>::default();
    for (&x, &w) in x.iter().zip(w) {
        let q: [f32; TRIALS] = std::array::from_fn(|k| round_level(inverse[k] * (x - low), levels));
        sums.add(x, w, &q);
    }
    let fits: [Fit; TRIALS] = std::array::from_fn(|k| sums.fit(k));
    let mut best = fits[argmin(&fits.map(|fit| fit.error))];
    // What was left on the table by trying only some spacings, and only with the
    // smallest element on the lowest level.
    for _ in 0..2 {
        let mut sums = Sums::<1>::default();
        let inverse = 1.0 / best.scale;
        for (&x, &w) in x.iter().zip(w) {
            sums.add(x, w, &[round_level(inverse * (x + best.min), levels)]);
        }
        let refined = sums.fit(0);
        if refined.error < best.error {
            best = refined;
        }
    }
    (best.scale, best.min)
}

#[derive(Clone, Copy)]
struct Fit {
    scale: f32,
    min: f32,
    /// Without the part that does not depend on the fit.
    error: f32,
}

/// Sums of a weighted least-squares fit of x by q, for several q at once.
struct Sums<const LANES: usize> {
    w: f32,
    wx: f32,
    wq: [f32; LANES],
    wqq: [f32; LANES],
    wqx: [f32; LANES],
}

impl<const LANES: usize> Default for Sums<LANES> {
    fn default() -> Self {
        Sums { w: 0.0, wx: 0.0, wq: [0.0; LANES], wqq: [0.0; LANES], wqx: [0.0; LANES] }
    }
}

impl<const LANES: usize> Sums<LANES> {
    #[inline(always)]
    fn add(&mut self, x: f32, w: f32, q: &[f32; LANES]) {
        self.w += w;
        self.wx += w * x;
        for (lane, &q) in q.iter().enumerate() {
            let wq = w * q;
            self.wq[lane] += wq;
            self.wqq[lane] += wq * q;
            self.wqx[lane] += wq * x;
        }
    }

    #[inline(always)]
    fn fit(&self, lane: usize) -> Fit {
        let (wq, wqq, wqx) = (self.wq[lane], self.wqq[lane], self.wqx[lane]);
        let determinant = self.w * wqq - wq * wq;
        let mut scale = (self.w * wqx - self.wx * wq) / determinant;
        let mut min = (wq * wqx - wqq * self.wx) / determinant;
        if !(determinant > LEAST_DETERMINANT * self.w * wqq && min >= 0.0 && scale > 0.0) {
            // Through zero.
            scale = self.step(lane).max(0.0);
            min = 0.0;
        }
        let error = scale * (scale * wqq - 2.0 * wqx)
            + min * (min * self.w + 2.0 * self.wx - 2.0 * scale * wq);
        Fit { scale, min, error }
    }

    /// The scale of the best fit through zero.
    #[inline(always)]
    fn step(&self, lane: usize) -> f32 {
        if self.wqq[lane] > 0.0 { self.wqx[lane] / self.wqq[lane] } else { 0.0 }
    }
}

/// Step d so that values ≈ d·q with whole q from 0 to `levels`, for values ≥ 0.
#[inline(always)]
pub(super) fn step(values: &[f32], w: &[f32], levels: f32) -> f32 {
    const TRIALS: usize = 16;
    let high = values.iter().copied().fold(0.0, f32::max);
    if high <= 0.0 {
        return 0.0;
    }
    let inverse: [f32; TRIALS] = std::array::from_fn(|k| (levels - 0.8 + 0.1 * k as f32) / high);
    let mut sums = Sums::<TRIALS>::default();
    for (&value, &w) in values.iter().zip(w) {
        let q: [f32; TRIALS] = std::array::from_fn(|k| round_level(inverse[k] * value, levels));
        sums.add(value, w, &q);
    }
    let errors = std::array::from_fn::<f32, TRIALS, _>(|k| -sums.wqx[k] * sums.step(k));
    sums.step(argmin(&errors))
}
