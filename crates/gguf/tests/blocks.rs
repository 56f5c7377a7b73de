//! Known answers for every block format: a block made by a formula, its first
//! and last values and its sums.

use gguf::{TensorType, dequantize_row};

/// Bytes (73·i + 41) mod 256 with plausible scales in place.
fn block(ty: TensorType) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..ty.block_bytes()).map(|i| (73 * i + 41) as u8).collect();
    let (d, dmin) = ([0x00, 0x2c], [0x00, 0x28]);
    match ty {
        TensorType::Q8_0 | TensorType::IQ2_XXS => bytes[..2].copy_from_slice(&d),
        TensorType::Q2_K => {
            bytes[80..82].copy_from_slice(&d);
            bytes[82..].copy_from_slice(&dmin);
        }
        TensorType::Q4_K => {
            bytes[..2].copy_from_slice(&d);
            bytes[2..4].copy_from_slice(&dmin);
        }
        TensorType::MXFP4 => bytes[0] = 125,
        _ => panic!("{ty} has no scale"),
    }
    bytes
}

fn check(ty: TensorType, first: [f32; 8], last: [f32; 2], sum: f64, sum_of_squares: f64) {
    let mut y = vec![f32::NAN; ty.block_len()];
    dequantize_row(ty, &block(ty), &mut y).unwrap();
    assert_eq!(y[..8], first, "{ty}");
    assert_eq!(y[y.len() - 2..], last, "{ty}");
    assert_eq!(y.iter().map(|&v| f64::from(v)).sum::<f64>(), sum, "{ty}");
    assert_eq!(y.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>(), sum_of_squares, "{ty}");
}

#[test]
fn q8_0() {
    check(
        TensorType::Q8_0,
        [-4.3125, 0.25, 4.8125, -6.625, -2.0625, 2.5, 7.0625, -4.375],
        [4.5625, -6.875],
        -3.0,
        672.4375,
    );
}

#[test]
fn q2_k() {
    check(
        TensorType::Q2_K,
        [0.5, 1.0625, 1.625, -0.0625, 0.5, 1.0625, 1.625, -0.0625],
        [-0.21875, -0.21875],
        127.6875,
        194.8984375,
    );
}

#[test]
fn q4_k() {
    check(
        TensorType::Q4_K,
        [5.78125, 0.09375, 7.40625, 1.71875, 9.03125, 3.34375, 10.65625, 4.96875],
        [-0.71875, -0.71875],
        3334.5,
        86108.015625,
    );
}

#[test]
fn iq2_xxs() {
    check(
        TensorType::IQ2_XXS,
        [-7.7265625, -7.7265625, -1.4375, -1.4375, -4.4921875, 4.4921875, -4.4921875, 4.4921875],
        [1.4375, -4.4921875],
        -18.640625,
        2449.569580078125,
    );
}

#[test]
fn mxfp4() {
    check(
        TensorType::MXFP4,
        [0.25, -0.375, 0.5, -0.75, 1.0, -1.5, 0.0, 0.125],
        [1.5, -0.375],
        3.125,
        17.515625,
    );
}

#[test]
fn mxfp4_scales_reach_the_subnormals() {
    let mut y = [0.0; 32];
    for exponent in 0..=255u8 {
        let mut bytes = [0x11; 17];
        bytes[0] = exponent;
        dequantize_row(TensorType::MXFP4, &bytes, &mut y).unwrap();
        assert_eq!(f64::from(y[31]), 2f64.powi(i32::from(exponent) - 128));
    }
}

#[test]
fn plain_types() {
    let mut y = [0.0; 2];
    let bytes: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    dequantize_row(TensorType::F32, &bytes, &mut y).unwrap();
    assert_eq!(y, [1.5, -2.0]);
    // The smallest f16 subnormal, and -2.
    dequantize_row(TensorType::F16, &[0x01, 0x00, 0x00, 0xc0], &mut y).unwrap();
    assert_eq!(y, [2f32.powi(-24), -2.0]);
    dequantize_row(TensorType::BF16, &[0xc0, 0x3f, 0x80, 0xff], &mut y).unwrap();
    assert_eq!(y, [1.5, f32::NEG_INFINITY]);
}
