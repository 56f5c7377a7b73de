//! How close results are, and how close the number formats say they must be.

use std::collections::BTreeMap;

use ds4_engine::rows::RowCodec;
use ds4_model::config::{HEAD_DIM, NOPE_DIM};
use half::f16;

use crate::stages::attention_tests::reference::decode;

/// Unit roundoff of halves, of pairs of halves, and of f32.
const HALF: f64 = 1.0 / (1 << 11) as f64;
const PAIR: f64 = HALF * HALF;
const SINGLE: f64 = 1.0 / (1 << 24) as f64;

/// Deviations that single elements may be off by: beyond, a million elements see none.
pub const MOST_DEVIATIONS: f64 = 6.0;

/// Standard deviation of a sum whose terms were rounded to halves `times` times, relative to the
/// sum's typical magnitude: a rounding error is spread evenly up to a unit roundoff, and errors of
/// terms add up as the terms of random sign do.
pub fn halves(times: usize) -> f64 {
    HALF * (times as f64 / 3.0).sqrt()
}

/// The same for f32: each of two sums passes through a rounding for each of its terms.
pub fn singles(terms: usize) -> f64 {
    SINGLE * (2.0 * terms as f64 / 3.0).sqrt()
}

/// The same for what is kept in pairs of halves.
pub fn pairs() -> f64 {
    PAIR / 3f64.sqrt()
}

/// The same for products of pairs of halves: tensor cores add up 16 terms of either half at a time,
/// and cut sums off rather than round them, by two unit roundoffs each, all in one direction.
pub fn pair_products(terms: usize) -> f64 {
    pairs() + 2.0 * SINGLE * (2 * terms / 16) as f64
}

/// How rows are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Decoded,
    InChunks,
}

/// Rows of a result: the decoded ones come first.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    pub decoded: usize,
    pub all: usize,
}

/// The worst that was seen of each result.
#[derive(Default)]
pub struct Closeness {
    seen: BTreeMap<(&'static str, Way), Seen>,
}

#[derive(Clone, Copy, Default)]
struct Seen {
    deviation: f64,
    worst: f64,
    bound: f64,
}

impl Closeness {
    /// Compares found and expected rows, those decoded and the others each with their bound.
    pub fn compare(
        &mut self,
        what: &'static str,
        place: &str,
        (found, expected): (&[f32], &[f32]),
        rows: Rows,
        bounds: [f64; 2],
    ) {
        assert_eq!(found.len(), expected.len(), "{what} of {place}");
        let Some(width) = expected.len().checked_div(rows.all) else { return };
        let at = rows.decoded * width;
        let (decoded, chunks) = (0..at, at..expected.len());
        for (way, part, bound) in
            [(Way::Decoded, decoded, bounds[0]), (Way::InChunks, chunks, bounds[1])]
        {
            let (found, expected) = (&found[part.clone()], &expected[part]);
            if !found.is_empty() {
                self.check((what, way), place, found, expected, width, bound);
            }
        }
    }

    /// Compares stored rows: of rounded ones the codes, and the rest of them (named second).
    pub fn compare_stored(
        &mut self,
        [what, rest]: [&'static str; 2],
        place: &str,
        codec: RowCodec,
        (found, expected): (&[u8], &[u8]),
        rows: Rows,
        bounds: [f64; 2],
    ) {
        let decoded = |bytes: &[u8]| {
            decode(codec, &bytes.chunks_exact(codec.row_bytes()).collect::<Vec<_>>())
        };
        let (found, expected) = (decoded(found), decoded(expected));
        let part = |rows: &[f32], from: usize, to: usize| -> Vec<f32> {
            rows.chunks_exact(HEAD_DIM).flat_map(|row| &row[from..to]).copied().collect()
        };
        let place_of = |what: &str| format!("{what} of {place}");
        match codec {
            RowCodec::F32 { .. } => self.compare(what, place, (&found, &expected), rows, bounds),
            RowCodec::Fp4Index => {
                check_codes(&place_of(what), (&found, &expected), bounds[1], 1.0);
            }
            RowCodec::Fp8Kv => {
                let rotated = |rows: &[f32]| part(rows, NOPE_DIM, HEAD_DIM);
                let pair = (&rotated(&found)[..], &rotated(&expected)[..]);
                self.compare(rest, place, pair, rows, bounds);
                let coded = |rows: &[f32]| part(rows, 0, NOPE_DIM);
                let pair = (&coded(&found)[..], &coded(&expected)[..]);
                check_codes(&place_of(what), pair, bounds[1], 0.25);
            }
        }
    }

    /// Compares rows of `width` elements. Errors are relative to the row's root mean square, or to
    /// the element where that is larger; all of them together may have a standard deviation of
    /// `bound`.
    fn check(
        &mut self,
        (what, way): (&'static str, Way),
        place: &str,
        found: &[f32],
        expected: &[f32],
        width: usize,
        bound: f64,
    ) {
        let (mut worst, mut squares) = (0.0, 0.0);
        for (r, (found, expected)) in
            found.chunks_exact(width).zip(expected.chunks_exact(width)).enumerate()
        {
            let norm: f64 = expected.iter().map(|x| f64::from(*x).powi(2)).sum();
            let magnitude = (norm / width as f64).sqrt().max(f64::MIN_POSITIVE);
            for (i, (x, y)) in found.iter().zip(expected).enumerate() {
                let magnitude = magnitude.max(f64::from(y.abs()));
                let error = f64::from(x - y).abs() / magnitude;
                assert!(
                    error <= MOST_DEVIATIONS * bound,
                    "{what} of {place}: row {r} has {x} at {i}, expected {y} (off by {error:.1e} \
                     of {magnitude:.1e}, at most {MOST_DEVIATIONS} × {bound:.1e})"
                );
                worst = f64::max(worst, error);
                squares += error * error;
            }
        }
        let deviation = (squares / expected.len().max(1) as f64).sqrt();
        assert!(deviation <= bound, "{what} of {place}: off by {deviation:.1e}, bound {bound:.1e}");
        let seen = self.seen.entry((what, way)).or_default();
        seen.deviation = seen.deviation.max(deviation);
        seen.worst = seen.worst.max(worst);
        seen.bound = seen.bound.max(bound);
    }

    /// Prints the worst of all.
    pub fn report(&self) {
        for ((what, way), Seen { deviation, worst, bound }) in &self.seen {
            println!(
                "{what}, {way:?}: off by {deviation:.1e} (single {worst:.1e}), bound {bound:.1e}"
            );
        }
    }
}

/// Compares values that were rounded to codes, after errors with a standard deviation of `bound`.
/// Few fall to another code, and those by one step, which is `step` of a value at most (E4M3 has
/// eighths, twice that where their block's scale fell so; E2M1 goes from nothing to its smallest).
///
/// # Panics
/// Unless that is so.
fn check_codes(place: &str, (found, expected): (&[f32], &[f32]), bound: f64, step: f64) {
    let squares: f64 = expected.iter().map(|x| f64::from(x * x)).sum();
    let close = MOST_DEVIATIONS * bound * (squares / expected.len().max(1) as f64).sqrt();
    let mut different = 0;
    for (i, (x, y)) in found.iter().zip(expected).enumerate() {
        let most = close + step * f64::from(x.abs().max(y.abs()));
        let error = f64::from(x - y).abs();
        assert!(error <= most, "code {i} of {place} is {x}, expected {y}");
        different += usize::from(error > 0.0);
    }
    // Steps of most values are more than a fortieth of their root mean square, half of it to
    // either side; and one block may have another scale.
    let most = 80.0 * bound * found.len() as f64 + 64.0;
    assert!(different as f64 <= most, "{place}: {different} codes of {} differ", found.len());
}

/// Compares what was chosen by scores. It must be the same, but for those whose scores lie closer
/// together than the errors of both.
///
/// # Panics
/// Unless that is so.
pub fn check_choice(what: &str, found: &[u32], expected: &[u32], scores: &[f32], errors: &[f32]) {
    assert!(found.is_sorted_by(|a, b| a < b), "{what}: {found:?} is not in order");
    assert_eq!(found.len(), expected.len(), "{what}");
    let without = |a: &[u32], b: &[u32]| -> Vec<usize> {
        a.iter().filter(|i| !b.contains(i)).map(|i| *i as usize).collect()
    };
    for &wrong in &without(found, expected) {
        for &missing in &without(expected, found) {
            let gap = scores[missing] - scores[wrong];
            assert!(
                gap <= errors[missing] + errors[wrong],
                "{what}: {wrong} instead of {missing}, which scores better by {gap}"
            );
        }
    }
}

/// Halves of `x`, and of what they leave over.
pub fn split(x: &[f32]) -> (Vec<u16>, Vec<u16>) {
    let half = |x: f32| f16::from_f32(x).to_bits();
    let high: Vec<u16> = x.iter().map(|x| half(*x)).collect();
    let low = x.iter().zip(&high).map(|(x, high)| half(x - f16::from_bits(*high).to_f32()));
    let low = low.collect();
    (high, low)
}

/// The values of halves.
pub fn values(halves: &[u16]) -> Vec<f32> {
    halves.iter().map(|x| f16::from_bits(*x).to_f32()).collect()
}

/// The values of pairs of halves.
pub fn pair_values(high: &[u16], low: &[u16]) -> Vec<f32> {
    values(high).iter().zip(values(low)).map(|(high, low)| high + low).collect()
}
