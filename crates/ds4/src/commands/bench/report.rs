//! What was measured, as a table, CSV and JSON.

use std::{
    fmt::Write as _,
    io::{self, Write},
};

use anyhow::Result;
use ds4_model::Model;
use serde::Serialize;
use serde_json::{Value, json};

use crate::terminal;

/// All rows, and what they were measured on.
pub struct Report {
    model: Value,
    machine: Machine,
    rows: Vec<Row>,
}

/// The machine as the program uses it.
#[derive(Serialize)]
pub struct Machine {
    /// Instruction set, or `reference`.
    pub kernels: String,
    /// Threads.
    pub threads: usize,
    /// Measured.
    pub read_bytes_per_second: f64,
}

/// Measurements at one depth of context.
pub struct Row {
    /// The depth, in tokens.
    pub ctx_tokens: usize,
    /// Tokens prefilled before it.
    pub prefill_tokens: usize,
    /// Time of each run.
    pub prefill_seconds: Vec<f64>,
    /// Tokens decoded after it.
    pub gen_tokens: usize,
    /// Time of each token of each run.
    pub token_seconds: Vec<Vec<f64>>,
    /// KV state at the depth.
    pub kvcache_bytes: u64,
    /// Weights and KV state that a decoded token reads.
    pub read_bytes_per_token: u64,
}

impl Report {
    /// A report without rows.
    pub fn new(model: &Model, machine: Machine) -> Self {
        let model = json!({
            "file": model.files()[0].name(),
            "bytes": model.file_bytes(),
            "layers": model.config.layers.len(),
        });
        Report { model, machine, rows: Vec::new() }
    }

    /// Prints what comes before the rows.
    pub fn print_head(&self) -> Result<()> {
        let (model, machine) = (&self.model, &self.machine);
        let bytes = terminal::bytes(model["bytes"].as_u64().unwrap_or_default());
        let mut out = io::stdout().lock();
        writeln!(
            out,
            "model    {} ({bytes}, {} layers)",
            model["file"].as_str().unwrap_or_default(),
            model["layers"]
        )?;
        writeln!(
            out,
            "machine  {} threads, {} kernels, reads {:.1} GB/s",
            machine.threads,
            machine.kernels,
            machine.read_bytes_per_second / 1e9
        )?;
        writeln!(out)?;
        writeln!(
            out,
            "{:>9} {:>13} {:>12} {:>13} {:>9} {:>7} {:>11}",
            "context", "prefill t/s", "decode t/s", "MB per token", "GB/s", "share", "KV state"
        )?;
        Ok(())
    }

    /// Adds a row and prints it.
    pub fn add(&mut self, row: Row) -> Result<()> {
        let share = 100.0 * row.read_bytes_per_second() / self.machine.read_bytes_per_second;
        writeln!(
            io::stdout(),
            "{:>9} {:>13.2} {:>12.2} {:>13.1} {:>9.2} {share:>5.0} % {:>11}",
            row.ctx_tokens,
            row.prefill_per_second(),
            row.decode_per_second(),
            row.read_bytes_per_token as f64 / 1e6,
            row.read_bytes_per_second() / 1e9,
            terminal::bytes(row.kvcache_bytes),
        )?;
        self.rows.push(row);
        Ok(())
    }

    /// The rows as CSV.
    pub fn csv(&self) -> String {
        let mut csv = String::from(
            "ctx_tokens,prefill_tokens,prefill_tps,gen_tokens,gen_tps,kvcache_bytes,read_bytes_per_token,read_share\n",
        );
        for row in &self.rows {
            let share = row.read_bytes_per_second() / self.machine.read_bytes_per_second;
            // Writing to a string cannot fail.
            let _ = writeln!(
                csv,
                "{},{},{:.3},{},{:.3},{},{},{share:.4}",
                row.ctx_tokens,
                row.prefill_tokens,
                row.prefill_per_second(),
                row.gen_tokens,
                row.decode_per_second(),
                row.kvcache_bytes,
                row.read_bytes_per_token,
            );
        }
        csv
    }

    /// Everything as JSON.
    pub fn json(&self) -> Value {
        let rows: Vec<_> = self.rows.iter().map(Row::json).collect();
        json!({ "version": env!("CARGO_PKG_VERSION"), "model": self.model, "machine": self.machine, "rows": rows })
    }
}

impl Row {
    fn prefill_per_second(&self) -> f64 {
        self.prefill_tokens as f64 / median(self.prefill_seconds.clone())
    }

    /// 0 if nothing was decoded.
    fn decode_per_second(&self) -> f64 {
        let runs = self.token_seconds.iter().map(|tokens| tokens.iter().sum());
        match self.gen_tokens {
            0 => 0.0,
            n => n as f64 / median(runs.collect()),
        }
    }

    fn read_bytes_per_second(&self) -> f64 {
        self.read_bytes_per_token as f64 * self.decode_per_second()
    }

    fn json(&self) -> Value {
        let mut tokens: Vec<f64> = self.token_seconds.concat();
        tokens.sort_by(f64::total_cmp);
        let percentile = |p: usize| tokens.get(p * tokens.len().saturating_sub(1) / 100);
        json!({
            "ctx_tokens": self.ctx_tokens,
            "prefill_tokens": self.prefill_tokens,
            "prefill_tps": self.prefill_per_second(),
            "prefill_seconds": self.prefill_seconds,
            "gen_tokens": self.gen_tokens,
            "gen_tps": self.decode_per_second(),
            "token_seconds": { "p50": percentile(50), "p90": percentile(90), "p99": percentile(99) },
            "kvcache_bytes": self.kvcache_bytes,
            "read_bytes_per_token": self.read_bytes_per_token,
            "read_bytes_per_second": self.read_bytes_per_second(),
        })
    }
}

/// The middle one, or the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (values[(n - 1) / 2] + values[n / 2]) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
    }

    #[test]
    fn speeds_follow_from_times() {
        let row = Row {
            ctx_tokens: 100,
            prefill_tokens: 50,
            prefill_seconds: vec![5.0, 2.0, 1.0],
            gen_tokens: 4,
            token_seconds: vec![vec![0.5; 4], vec![1.0; 4], vec![0.25; 4]],
            kvcache_bytes: 7,
            read_bytes_per_token: 1000,
        };
        assert_eq!(row.prefill_per_second(), 25.0);
        assert_eq!(row.decode_per_second(), 2.0);
        assert_eq!(row.read_bytes_per_second(), 2000.0);
        assert_eq!(row.json()["token_seconds"]["p50"], 0.5);
        let nothing = Row { gen_tokens: 0, token_seconds: vec![vec![]], ..row };
        assert_eq!(nothing.decode_per_second(), 0.0);
        assert!(nothing.json()["token_seconds"]["p50"].is_null());
    }
}
