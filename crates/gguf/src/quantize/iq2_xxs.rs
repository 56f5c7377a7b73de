//! IQ2_XXS: groups of 32 with a scale, in four runs of eight elements whose
//! magnitudes are an entry of the grid and whose signs have an even number of
//! minuses.
//!
//! Every search looks at all 256 entries for eight scales side by side. An
//! entry's error is a sum over its elements, so the two halves of a run are
//! tabulated for all 81 combinations of levels, and an entry costs two look-ups.

use super::fit::{Weighted, argmin, storable};
use crate::iq2_tables::GRID_LEVELS;

/// Magnitudes of the three levels, in units of the smallest: y = scale·magnitude.
const MAGNITUDES: [f32; 3] = [1.0, 25.0 / 8.0, 43.0 / 8.0];

/// Scales compared side by side.
const LANES: usize = 8;

/// Scales to start from: the group's largest element over these. Nearly all of
/// the best scales of Gaussian and Laplacian groups lie between.
const START_DIVISORS: Lanes = [4.9, 5.4, 5.9, 6.5, 7.1, 7.8, 8.6, 9.5];

type Lanes = [f32; LANES];
const LANE_NUMBERS: Lanes = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];

/// A group's scale is 1, 3, 5, … or this many of the block's steps.
const LARGEST_MULTIPLE: f32 = 31.0;

#[inline(always)]
pub(super) fn quantize(x: &[f32; 256], importance: &[f32; 256], out: &mut [u8; 66]) {
    let block = Weighted::new(x, importance, 1.0);
    let mut tables = Tables { low: [[0.0; LANES]; 128], high: [[0.0; LANES]; 128] };
    let mut groups = Vec::with_capacity(8);
    let mut largest = 0.0f32;
    for (x, w) in block.x.as_chunks().0.iter().zip(block.w.as_chunks().0) {
        let group = Group::fit(x, w, &mut tables);
        largest = largest.max(group.scale);
        groups.push(group);
    }
    let mut d = storable(largest / LARGEST_MULTIPLE);
    if d == half::f16::ZERO {
        return out.fill(0);
    }
    let mut fit = Fit::default();
    for group in &mut groups {
        fit = fit + group.settle(d.to_f32(), &mut tables);
    }
    // With everything else settled, the step that fits best.
    d = storable(fit.scale());
    out[..2].copy_from_slice(&d.to_le_bytes());
    for (group, out) in groups.iter().zip(out[2..].as_chunks_mut().0) {
        *out = group.pack();
    }
}

/// Errors of the 81 combinations of levels of each half of a run, at every
/// scale. The length makes every 7-bit index valid. They are kept from run to
/// run so that they need not be cleared.
struct Tables {
    low: [Lanes; 128],
    high: [Lanes; 128],
}

/// 32 elements with one scale.
struct Group {
    runs: [Run; 4],
    /// Grid entry of each run.
    entries: [u8; 4],
    /// Best scale, free of the block's step.
    scale: f32,
    /// The scale is 2·`half_multiple` + 1 steps.
    half_multiple: u8,
}

impl Group {
    /// Finds the entries of the best of several scales, then the scale that
    /// suits those.
    #[inline(always)]
    fn fit(x: &[f32; 32], w: &[f32; 32], tables: &mut Tables) -> Self {
        let (x8, w8) = (x.as_chunks().0, w.as_chunks().0);
        let runs = [0, 1, 2, 3].map(|i| Run::new(x8[i], w8[i]));
        let mut group = Group { runs, entries: [0; 4], scale: 0.0, half_multiple: 0 };
        let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        group.search(&START_DIVISORS.map(|divisor| largest / divisor), tables);
        group.scale = group.scale_fit().scale();
        group
    }

    /// Chooses the multiple of the step `d` and the entries that suit it.
    /// Returns the fit of the step.
    #[inline(always)]
    fn settle(&mut self, d: f32, tables: &mut Tables) -> Fit {
        let nearest = (0.5 * (self.scale / d - 1.0)).round();
        let first = (nearest - 3.0).clamp(0.0, 16.0 - LANES as f32);
        let multiples = LANE_NUMBERS.map(|lane| 2.0 * (first + lane) + 1.0);
        let best = self.search(&multiples.map(|multiple| d * multiple), tables);
        self.half_multiple = first as u8 + best as u8;
        let fit = self.scale_fit();
        let multiple = multiples[best];
        Fit { wuq: multiple * fit.wuq, wqq: multiple * multiple * fit.wqq }
    }

    /// Sets the entries with the least error at any of the scales, and returns
    /// the lane of that scale.
    #[inline(always)]
    fn search(&mut self, scales: &Lanes, tables: &mut Tables) -> usize {
        let mut errors = [0.0; LANES];
        let mut entries = [[0; LANES]; 4];
        for (run, entries) in self.runs.iter().zip(&mut entries) {
            let (run_errors, run_entries) = run.search(scales, tables);
            *entries = run_entries;
            for (sum, error) in errors.iter_mut().zip(run_errors) {
                *sum += error;
            }
        }
        let best = argmin(&errors);
        self.entries = entries.map(|entries| entries[best] as u8);
        best
    }

    /// The fit of the scale to the entries.
    #[inline(always)]
    fn scale_fit(&self) -> Fit {
        let mut fit = Fit::default();
        for (run, entry) in self.runs.iter().zip(self.entries) {
            fit = fit + run.fit(entry);
        }
        fit
    }

    fn pack(&self) -> [u8; 8] {
        let mut codes = u32::from(self.half_multiple) << 28;
        for (i, run) in self.runs.iter().enumerate() {
            codes |= u32::from(run.signs & 127) << (7 * i);
        }
        let [c0, c1, c2, c3] = codes.to_le_bytes();
        let [e0, e1, e2, e3] = self.entries;
        [e0, e1, e2, e3, c0, c1, c2, c3]
    }
}

/// Sums of a weighted least-squares fit u ≈ scale·q.
#[derive(Clone, Copy, Default)]
struct Fit {
    wuq: f32,
    wqq: f32,
}

impl Fit {
    fn scale(self) -> f32 {
        if self.wqq > 0.0 { (self.wuq / self.wqq).max(0.0) } else { 0.0 }
    }
}

impl std::ops::Add for Fit {
    type Output = Fit;

    fn add(self, other: Fit) -> Fit {
        Fit { wuq: self.wuq + other.wuq, wqq: self.wqq + other.wqq }
    }
}

/// Eight elements with one grid entry.
struct Run {
    /// Elements times their signs: magnitudes, but for the one whose sign had
    /// to be the wrong one.
    u: [f32; 8],
    w: [f32; 8],
    /// Bit i makes element i negative. An even number are set.
    signs: u8,
}

impl Run {
    #[inline(always)]
    fn new(x: [f32; 8], w: [f32; 8]) -> Self {
        let mut u = x.map(f32::abs);
        let mut signs = 0;
        for (i, x) in x.iter().enumerate() {
            signs |= u8::from(*x < 0.0) << i;
        }
        if signs.count_ones() % 2 == 1 {
            // The error of a wrong sign is 4·w·u·y, so about this much.
            let costs: [f32; 8] = std::array::from_fn(|i| w[i] * u[i]);
            let cheapest = argmin(&costs);
            signs ^= 1 << cheapest;
            u[cheapest] = -u[cheapest];
        }
        Run { u, w, signs }
    }

    /// For each scale the least weighted squared error (without the part that
    /// is the same for all entries) and the grid entry that has it.
    #[inline(always)]
    fn search(&self, scales: &Lanes, tables: &mut Tables) -> (Lanes, [u32; LANES]) {
        self.half_errors(0, scales, &mut tables.low);
        self.half_errors(4, scales, &mut tables.high);
        let mut least = [f32::MAX; LANES];
        let mut best = [0; LANES];
        for (entry, [low_code, high_code]) in (0u32..).zip(&ENTRY_HALVES) {
            let low = &tables.low[usize::from(low_code & 127)];
            let high = &tables.high[usize::from(high_code & 127)];
            for lane in 0..LANES {
                let error = low[lane] + high[lane];
                best[lane] = if error < least[lane] { entry } else { best[lane] };
                least[lane] = if error < least[lane] { error } else { least[lane] };
            }
        }
        (least, best)
    }

    /// Errors of all combinations of levels of four elements from `first` on;
    /// the combination's levels are the base-3 digits of its index.
    #[inline(always)]
    fn half_errors(&self, first: usize, scales: &Lanes, sums: &mut [Lanes; 128]) {
        let lower = self.pair_errors(first, scales);
        let upper = self.pair_errors(first + 2, scales);
        for (sums, upper) in sums.as_chunks_mut::<9>().0.iter_mut().zip(&upper) {
            for (sum, lower) in sums.iter_mut().zip(&lower) {
                for lane in 0..LANES {
                    sum[lane] = lower[lane] + upper[lane];
                }
            }
        }
    }

    /// Errors of all combinations of levels of two elements from `first` on.
    #[inline(always)]
    fn pair_errors(&self, first: usize, scales: &Lanes) -> [Lanes; 9] {
        let mut errors = [[[0.0; LANES]; 3]; 2];
        for (i, errors) in errors.iter_mut().enumerate() {
            let (u, w) = (self.u[first + i], self.w[first + i]);
            for (errors, magnitude) in errors.iter_mut().zip(MAGNITUDES) {
                for lane in 0..LANES {
                    let y = scales[lane] * magnitude;
                    errors[lane] = w * y * (y - 2.0 * u);
                }
            }
        }
        let mut sums = [[0.0; LANES]; 9];
        for (combination, sum) in sums.iter_mut().enumerate() {
            for lane in 0..LANES {
                sum[lane] = errors[0][combination % 3][lane] + errors[1][combination / 3][lane];
            }
        }
        sums
    }

    #[inline(always)]
    fn fit(&self, entry: u8) -> Fit {
        let mut fit = Fit::default();
        for i in 0..8 {
            let level = GRID_LEVELS[usize::from(entry)] >> (2 * i) & 3;
            let q = MAGNITUDES[usize::from(level)];
            fit.wuq += self.w[i] * self.u[i] * q;
            fit.wqq += self.w[i] * q * q;
        }
        fit
    }
}

/// Levels of the lower and upper four elements of each entry, base 3.
static ENTRY_HALVES: [[u8; 2]; 256] = {
    let mut halves = [[0; 2]; 256];
    let mut entry = 0;
    while entry < 256 {
        let mut element = 8;
        while element > 0 {
            element -= 1;
            let level = (GRID_LEVELS[entry] >> (2 * element) & 3) as u8;
            halves[entry][element / 4] = 3 * halves[entry][element / 4] + level;
        }
        entry += 1;
    }
    halves
};
