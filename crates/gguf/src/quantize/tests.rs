//! Quality, limits and repeatability of the quantisers.

use proptest::prelude::*;

use super::{iq2_xxs, k_quants, mxfp4_from_fp4, quantize_row, vectors};
use crate::{Error, TensorType, dequantize_row};

const COLS: usize = 2048;
const ROWS: usize = 24;

/// Repeatable rows of numbers.
struct Random(u64);

impl Random {
    /// Uniform in (0, 1).
    fn uniform(&mut self) -> f64 {
        // Knuth's MMIX generator; its upper bits are good enough here.
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn gaussian(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    fn rows(&mut self) -> Vec<f32> {
        (0..ROWS * COLS).map(|_| 0.02 * self.gaussian() as f32).collect()
    }

    /// Importance of the columns, log-normal.
    fn importance(&mut self) -> Vec<f32> {
        (0..COLS).map(|_| self.gaussian().exp() as f32).collect()
    }
}

fn round_trip(ty: TensorType, x: &[f32], importance: Option<&[f32]>) -> Vec<f32> {
    let mut bytes = vec![0xa5; ty.row_bytes(x.len()).unwrap()];
    quantize_row(ty, x, importance, &mut bytes).unwrap();
    let mut y = vec![f32::NAN; x.len()];
    dequantize_row(ty, &bytes, &mut y).unwrap();
    y
}

/// Squared error over the square of the rows, both weighted by `measure`.
/// Rows are quantised with `importance`.
fn error(ty: TensorType, rows: &[f32], importance: Option<&[f32]>, measure: &[f32]) -> f64 {
    let (mut error, mut energy) = (0.0, 0.0);
    for x in rows.chunks_exact(COLS) {
        for ((x, y), w) in x.iter().zip(round_trip(ty, x, importance)).zip(measure) {
            error += f64::from(*w) * f64::from(x - y).powi(2);
            energy += f64::from(*w) * f64::from(*x).powi(2);
        }
    }
    error / energy
}

/// Bounds a little above what is measured, and below what the format's
/// reference quantisers reach on such rows (docs/gguf.md, "Quantisers").
#[test]
fn gaussian_rows_keep_their_quality() {
    let rows = Random(1).rows();
    for (ty, bound) in [
        (TensorType::F32, 0.0),
        (TensorType::F16, 3e-7),
        (TensorType::BF16, 3e-6),
        (TensorType::Q8_0, 3.0e-5),
        (TensorType::Q4_K, 0.004_98),
        (TensorType::MXFP4, 0.012_6),
        (TensorType::Q2_K, 0.071_5),
        (TensorType::IQ2_XXS, 0.112),
    ] {
        let found = error(ty, &rows, None, &[1.0; COLS]);
        assert!(found <= bound, "{ty}: {found}");
    }
}

#[test]
fn importance_lowers_the_error_where_it_matters() {
    let mut random = Random(2);
    let (rows, importance) = (random.rows(), random.importance());
    for (ty, bound, gain) in [
        (TensorType::Q4_K, 0.004_2, 0.88),
        (TensorType::Q2_K, 0.057, 0.86),
        (TensorType::IQ2_XXS, 0.080, 0.78),
    ] {
        let without = error(ty, &rows, None, &importance);
        let with = error(ty, &rows, Some(&importance), &importance);
        assert!(with <= bound, "{ty}: {with}");
        assert!(with < gain * without, "{ty}: {with} with, {without} without");
    }
}

#[test]
fn no_importance_is_equal_importance() {
    let rows = Random(3).rows();
    for ty in [TensorType::Q2_K, TensorType::IQ2_XXS, TensorType::MXFP4] {
        let plain = round_trip(ty, &rows[..COLS], None);
        assert_eq!(plain, round_trip(ty, &rows[..COLS], Some(&[7.0; COLS])));
        assert_eq!(plain, round_trip(ty, &rows[..COLS], Some(&[0.0; COLS])));
    }
}

#[test]
fn values_of_the_format_come_back_as_they_were() {
    let mut random = Random(4);
    let steps: Vec<f32> = (0..COLS)
        .map(
            |i| if i % 32 == 0 { 127.0 } else { (random.uniform() * 255.0).floor() as f32 - 127.0 },
        )
        .map(|q| q * 0.25)
        .collect();
    assert_eq!(round_trip(TensorType::Q8_0, &steps, None), steps);
    let floats: Vec<f32> = (0..COLS)
        .map(|i| if i % 32 == 0 { -6.0 } else { [0.0, 0.5, 1.0, -1.5, 2.0, -3.0, 4.0][i % 7] })
        .collect();
    assert_eq!(round_trip(TensorType::MXFP4, &floats, None), floats);
    let largest = [f32::from(half::f16::MAX), -65504.0];
    assert_eq!(round_trip(TensorType::F16, &largest, None), largest);
}

#[test]
fn what_is_out_of_range_becomes_the_largest() {
    for ty in TensorType::ALL.iter().copied().filter(|ty| ty.is_readable()) {
        let mut x = vec![0.0; 256];
        (x[0], x[1]) = (f32::MAX, f32::MIN);
        let y = round_trip(ty, &x, None);
        assert!(y.iter().all(|y| y.is_finite()), "{ty}: {y:?}");
        assert!(y[0] >= 60000.0, "{ty}: {y:?}");
    }
}

#[test]
fn zeros_stay_zeros() {
    for ty in TensorType::ALL.iter().copied().filter(|ty| ty.is_readable()) {
        assert_eq!(round_trip(ty, &[0.0; 256], None), [0.0; 256], "{ty}");
    }
}

#[test]
fn constant_blocks_are_close() {
    for ty in [TensorType::Q2_K, TensorType::Q4_K, TensorType::Q8_0] {
        for value in [-0.375f32, 0.375] {
            for y in round_trip(ty, &[value; 256], None) {
                assert!((y - value).abs() < 0.004, "{ty}: {value} became {y}");
            }
        }
    }
}

/// What runs with vector instructions gives the same bytes as what does not.
#[test]
fn vector_instructions_change_nothing() {
    let mut random = Random(5);
    let (rows, importance) = (random.rows(), random.importance());
    let importance = importance.as_chunks().0;
    for (index, x) in rows.as_chunks().0.iter().enumerate() {
        let w = &importance[index % importance.len()];
        let (mut a, mut b) = ([0; 84], [1; 84]);
        vectors::q2_k(x, w, &mut a);
        k_quants::q2_k(x, w, &mut b);
        assert_eq!(a, b);
        let (mut a, mut b) = ([0; 144], [1; 144]);
        vectors::q4_k(x, w, &mut a);
        k_quants::q4_k(x, w, &mut b);
        assert_eq!(a, b);
        let (mut a, mut b) = ([0; 66], [1; 66]);
        vectors::iq2_xxs(x, w, &mut a);
        iq2_xxs::quantize(x, w, &mut b);
        assert_eq!(a, b);
    }
}

#[test]
fn official_fp4_is_only_repacked() {
    const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let mut random = Random(6);
    let values: Vec<u8> = (0..64).map(|_| (random.uniform() * 256.0) as u8).collect();
    let scales = [127u8, 120, 1, 254];
    let expected: Vec<f32> = (0..128)
        .map(|i| {
            let code = values[i / 2] >> (4 * (i % 2)) & 15;
            let value = E2M1[usize::from(code & 7)] * 2f32.powi(i32::from(scales[i / 32]) - 127);
            if code > 7 { -value } else { value }
        })
        .collect();
    let mut bytes = [0; 68];
    mxfp4_from_fp4(&values, &scales, &mut bytes).unwrap();
    let mut y = [0.0; 128];
    dequantize_row(TensorType::MXFP4, &bytes, &mut y).unwrap();
    assert_eq!(
        y.map(f32::to_bits).to_vec(),
        expected.iter().map(|y| y.to_bits()).collect::<Vec<_>>()
    );
}

#[test]
fn bad_arguments_are_refused() {
    let message = |result: Result<(), Error>| result.unwrap_err().to_string();
    let mut out = [0; 34];
    assert_eq!(
        message(quantize_row(TensorType::Q6_K, &[0.0; 256], None, &mut out)),
        "tensor type Q6_K cannot be read here \
         (supported: F32, F16, Q8_0, Q2_K, Q4_K, IQ2_XXS, BF16, MXFP4)"
    );
    assert_eq!(
        message(quantize_row(TensorType::Q8_0, &[0.0; 31], None, &mut out)),
        "Q8_0 row of 31 elements: found 34 bytes, expected a multiple of 32 elements"
    );
    assert_eq!(
        message(quantize_row(TensorType::Q8_0, &[0.0; 64], None, &mut out)),
        "Q8_0 row of 64 elements: found 34 bytes, expected 68"
    );
    let mut x = [0.0; 32];
    assert_eq!(
        message(quantize_row(TensorType::Q8_0, &x, Some(&[1.0; 31]), &mut out)),
        "importance: found 31 weights, expected 32"
    );
    assert_eq!(
        message(quantize_row(TensorType::Q8_0, &x, Some(&[-1.0; 32]), &mut out)),
        "importance of column 0: found -1, expected a finite number of at least 0"
    );
    x[3] = f32::NAN;
    assert_eq!(
        message(quantize_row(TensorType::Q8_0, &x, None, &mut out)),
        "column 3: found NaN, expected a finite number"
    );
    assert_eq!(
        message(mxfp4_from_fp4(&[0; 32], &[0], &mut [0; 17])),
        "FP4 values: found 32 bytes, 1 scales and room for 17 bytes, expected 16 to 1 to 17"
    );
    assert_eq!(
        message(mxfp4_from_fp4(&[0; 32], &[1, 255], &mut [0; 34])),
        "FP4 scale of block 1: found NaN, expected a power of two"
    );
}

proptest! {
    /// Any finite numbers, tiny and huge ones among them, give finite numbers
    /// back.
    #[test]
    fn any_row_can_be_quantised(
        x in prop::collection::vec(prop::num::f32::ANY, 256),
        importance in prop::collection::vec(prop::num::f32::POSITIVE | prop::num::f32::ZERO, 256),
    ) {
        let x: Vec<f32> = x.into_iter().map(|x| if x.is_finite() { x } else { 0.0 }).collect();
        let importance: Vec<f32> = importance.into_iter().map(|w| w.min(f32::MAX)).collect();
        for ty in TensorType::ALL.iter().copied().filter(|ty| ty.is_readable()) {
            for y in round_trip(ty, &x, Some(&importance)) {
                prop_assert!(y.is_finite(), "{}", ty);
            }
        }
    }

    /// Rows of one scale, far from the ends of what a block can hold.
    #[test]
    fn ordinary_rows_come_back_close(
        x in prop::collection::vec(-1f32..1.0, 256), exponent in -8i32..10,
    ) {
        let scale = 2f32.powi(exponent);
        let x: Vec<f32> = x.into_iter().map(|x| x * scale).collect();
        for (ty, bound) in [
            (TensorType::Q8_0, 1e-4),
            (TensorType::MXFP4, 0.04),
            (TensorType::Q4_K, 0.02),
            (TensorType::Q2_K, 0.15),
            (TensorType::IQ2_XXS, 0.25),
        ] {
            let y = round_trip(ty, &x, None);
            let error: f32 = x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum();
            let energy: f32 = x.iter().map(|x| x * x).sum();
            prop_assert!(error <= bound * energy, "{}: {}", ty, error / energy);
        }
    }
}
