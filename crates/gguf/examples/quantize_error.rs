//! Measures the quantisers on rows from a file.
//!
//! `quantize_error ROWS.f32 IMPORTANCE.f32`: raw little-endian f32, one
//! importance per column, any number of rows. Prints for each type the squared
//! error over the square of the rows, both weighted by importance; the same
//! with the weights that the quantisers fit with; and million weights per
//! second of the fastest of five passes, on one core.

use std::{error::Error, path::Path, time::Instant};

use gguf::{TensorType, dequantize_row, quantize_row};

fn main() -> Result<(), Box<dyn Error>> {
    let paths: Vec<_> = std::env::args_os().skip(1).collect();
    let [rows, importance] = paths.as_slice() else {
        return Err("usage: quantize_error ROWS.f32 IMPORTANCE.f32".into());
    };
    let (rows, importance) = (read(rows.as_ref())?, read(importance.as_ref())?);
    println!("{:8} {:>12} {:>12} {:>10}", "type", "importance", "fit weights", "M/s");
    for &ty in TensorType::ALL.iter().filter(|ty| ty.is_readable()) {
        measure(ty, &rows, &importance)?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<f32>, Box<dyn Error>> {
    let bytes = std::fs::read(path)?;
    Ok(bytes.as_chunks().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect())
}

fn measure(ty: TensorType, rows: &[f32], importance: &[f32]) -> Result<(), Box<dyn Error>> {
    let cols = importance.len();
    let row_bytes = ty.row_bytes(cols).ok_or("the row is not a whole number of blocks")?;
    let mut bytes = vec![0; rows.len() / cols * row_bytes];
    let mut seconds = f64::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        for (x, bytes) in rows.chunks_exact(cols).zip(bytes.chunks_exact_mut(row_bytes)) {
            quantize_row(ty, x, Some(importance), bytes)?;
        }
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    let (mut by_importance, mut by_fit_weights) = (Ratio::default(), Ratio::default());
    let mut y = vec![0.0; cols];
    for (x, bytes) in rows.chunks_exact(cols).zip(bytes.chunks_exact(row_bytes)) {
        dequantize_row(ty, bytes, &mut y)?;
        for block in (0..cols).step_by(256) {
            let block = block..cols.min(block + 256);
            let squares = x[block.clone()].iter().map(|x| f64::from(x * x));
            let mean_square = squares.sum::<f64>() / block.len() as f64;
            for i in block {
                let weight = f64::from(importance[i]);
                by_importance.add(x[i], y[i], weight);
                let spread = (mean_square + f64::from(x[i] * x[i])).sqrt();
                by_fit_weights.add(x[i], y[i], weight * spread);
            }
        }
    }
    let (a, b) = (by_importance.value(), by_fit_weights.value());
    println!("{ty:8} {a:12.7} {b:12.7} {:10.2}", rows.len() as f64 / seconds / 1e6);
    Ok(())
}

/// Weighted squared error over weighted square.
#[derive(Default)]
struct Ratio {
    error: f64,
    energy: f64,
}

impl Ratio {
    fn add(&mut self, x: f32, y: f32, weight: f64) {
        self.error += weight * f64::from(x - y).powi(2);
        self.energy += weight * f64::from(x).powi(2);
    }

    fn value(&self) -> f64 {
        self.error / self.energy
    }
}
