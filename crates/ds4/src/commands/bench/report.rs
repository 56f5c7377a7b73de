//! What was measured, as a table, CSV and JSON.

use std::{
    fmt::Write as _,
    io::{self, Write},
};

use anyhow::Result;
use ds4_model::Model;
use serde_json::{Value, json};

use super::machine::Machine;
use crate::terminal;

/// All rows, and what they were measured on.
pub struct Report {
    /// Name of the model's first file.
    pub model: String,
    model_bytes: u64,
    layers: usize,
    /// What computed.
    pub machine: Machine,
    /// The measurements.
    pub rows: Vec<Row>,
}

/// Measurements of a number of sessions at one depth of context.
pub struct Row {
    /// The depth, in tokens.
    pub ctx_tokens: usize,
    /// How many sessions.
    pub sessions: usize,
    /// How the depth was reached, in its first row.
    pub prefill: Option<Prefill>,
    /// Tokens that each session decoded.
    pub gen_tokens: usize,
    /// Time of each step of each run.
    pub step_seconds: Vec<Vec<f64>>,
    /// KV state of all sessions at the depth.
    pub kvcache_bytes: u64,
    /// Weights and KV state that a step reads.
    pub read_bytes_per_step: u64,
}

/// How a depth was reached.
pub struct Prefill {
    /// Tokens that were timed.
    pub tokens: usize,
    /// Time of each run.
    pub seconds: Vec<f64>,
    /// From the very start to the first token after the depth.
    pub first_token_seconds: f64,
}

impl Report {
    /// A report without rows.
    pub fn new(model: &Model, machine: Machine) -> Self {
        Report {
            model: model.files()[0].name().to_owned(),
            model_bytes: model.file_bytes(),
            layers: model.config.layers.len(),
            machine,
            rows: Vec::new(),
        }
    }

    /// Prints what comes before the rows.
    pub fn print_head(&self) -> Result<()> {
        let (machine, bytes) = (&self.machine, terminal::bytes(self.model_bytes));
        let speed = machine.memory_bytes_per_second / 1e9;
        let mut out = io::stdout().lock();
        writeln!(out, "model    {} ({bytes}, {} layers)", self.model, self.layers)?;
        writeln!(out, "machine  {}: {}, memory {speed:.1} GB/s", machine.backend, machine.device)?;
        writeln!(
            out,
            "\n{:>9} {:>8} {:>12} {:>12} {:>11} {:>11} {:>8} {:>7} {:>11}",
            "context",
            "sessions",
            "prefill t/s",
            "first token",
            "decode t/s",
            "per session",
            "GB/s",
            "share",
            "KV state"
        )?;
        Ok(())
    }

    /// Adds a row and prints it.
    pub fn add(&mut self, row: Row) -> Result<()> {
        let prefill = row.prefill.as_ref();
        writeln!(
            io::stdout(),
            "{:>9} {:>8} {:>12} {:>12} {:>11.2} {:>11.2} {:>8.2} {:>5.0} % {:>11}",
            row.ctx_tokens,
            row.sessions,
            prefill.map_or(String::new(), |p| format!("{:.2}", p.per_second())),
            prefill.map_or(String::new(), |p| format!("{:.3} s", p.first_token_seconds)),
            row.decode_per_second(),
            row.decode_per_second() / row.sessions as f64,
            row.read_bytes_per_second() / 1e9,
            100.0 * self.share(&row),
            terminal::bytes(row.kvcache_bytes),
        )?;
        self.rows.push(row);
        Ok(())
    }

    /// The rows as CSV. Prefill is that of a depth's first row.
    pub fn csv(&self) -> String {
        let mut csv = String::from(
            "ctx_tokens,prefill_tokens,prefill_tps,gen_tokens,gen_tps,kvcache_bytes,sessions,\
             gen_tps_per_session,first_token_seconds,read_bytes_per_step,read_share\n",
        );
        for row in &self.rows {
            let prefill = row.prefill.as_ref();
            let cell = |value: &dyn Fn(&Prefill) -> String| prefill.map_or(String::new(), value);
            // Writing to a string cannot fail.
            let _ = writeln!(
                csv,
                "{},{},{},{},{:.3},{},{},{:.3},{},{},{:.4}",
                row.ctx_tokens,
                cell(&|p| p.tokens.to_string()),
                cell(&|p| format!("{:.3}", p.per_second())),
                row.gen_tokens,
                row.decode_per_second(),
                row.kvcache_bytes,
                row.sessions,
                row.decode_per_second() / row.sessions as f64,
                cell(&|p| format!("{:.4}", p.first_token_seconds)),
                row.read_bytes_per_step,
                self.share(row),
            );
        }
        csv
    }

    /// Everything as JSON.
    pub fn json(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": { "file": self.model, "bytes": self.model_bytes, "layers": self.layers },
            "machine": self.machine,
            "rows": self.rows.iter().map(|row| row.json(self.share(row))).collect::<Vec<_>>(),
        })
    }

    /// What part of the memory's speed decode uses.
    fn share(&self, row: &Row) -> f64 {
        row.read_bytes_per_second() / self.machine.memory_bytes_per_second
    }
}

impl Row {
    /// Of all sessions together; 0 if nothing was decoded.
    pub fn decode_per_second(&self) -> f64 {
        let runs = self.step_seconds.iter().map(|steps| steps.iter().sum());
        match self.gen_tokens {
            0 => 0.0,
            n => (self.sessions * n) as f64 / median(runs.collect()),
        }
    }

    fn read_bytes_per_second(&self) -> f64 {
        self.read_bytes_per_step as f64 * self.decode_per_second() / self.sessions as f64
    }

    fn json(&self, share: f64) -> Value {
        let mut steps: Vec<f64> = self.step_seconds.concat();
        steps.sort_by(f64::total_cmp);
        let percentile = |p: usize| steps.get(p * steps.len().saturating_sub(1) / 100);
        json!({
            "ctx_tokens": self.ctx_tokens,
            "sessions": self.sessions,
            "prefill": self.prefill.as_ref().map(Prefill::json),
            "gen_tokens": self.gen_tokens,
            "gen_tps": self.decode_per_second(),
            "gen_tps_per_session": self.decode_per_second() / self.sessions as f64,
            "step_seconds": { "p50": percentile(50), "p90": percentile(90), "p99": percentile(99) },
            "kvcache_bytes": self.kvcache_bytes,
            "read_bytes_per_step": self.read_bytes_per_step,
            "read_bytes_per_second": self.read_bytes_per_second(),
            "read_share": share,
        })
    }
}

impl Prefill {
    /// Tokens per second.
    pub fn per_second(&self) -> f64 {
        self.tokens as f64 / median(self.seconds.clone())
    }

    fn json(&self) -> Value {
        json!({
            "tokens": self.tokens,
            "tps": self.per_second(),
            "seconds": self.seconds,
            "first_token_seconds": self.first_token_seconds,
        })
    }
}

/// The middle one, or the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (values[(n - 1) / 2] + values[n / 2]) / 2.0
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Sessions that decode two steps a second.
    pub fn row(ctx_tokens: usize, sessions: usize) -> Row {
        Row {
            ctx_tokens,
            sessions,
            prefill: Some(Prefill {
                tokens: 50,
                seconds: vec![5.0, 2.0, 1.0],
                first_token_seconds: 4.0,
            }),
            gen_tokens: 4,
            step_seconds: vec![vec![0.5; 4], vec![1.0; 4], vec![0.25; 4]],
            kvcache_bytes: 7,
            read_bytes_per_step: 1000,
        }
    }

    pub fn report(rows: Vec<Row>) -> Report {
        let machine = Machine {
            backend: "cpu",
            device: "2 threads".to_owned(),
            memory_bytes_per_second: 4000.0,
        };
        Report { model: "tiny".to_owned(), model_bytes: 1, layers: 4, machine, rows }
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
    }

    #[test]
    fn speeds_follow_from_times() {
        let row = row(100, 8);
        assert_eq!(row.prefill.as_ref().unwrap().per_second(), 25.0);
        assert_eq!(row.decode_per_second(), 16.0);
        assert_eq!(row.read_bytes_per_second(), 2000.0);
        assert_eq!(row.json(0.5)["step_seconds"]["p50"], 0.5);
        let nothing = Row { gen_tokens: 0, step_seconds: vec![vec![]], ..row };
        assert_eq!(nothing.decode_per_second(), 0.0);
        assert!(nothing.json(0.0)["step_seconds"]["p50"].is_null());
    }

    #[test]
    fn csv_has_a_line_per_row() {
        let report = report(vec![row(100, 8), Row { prefill: None, ..row(100, 16) }]);
        let csv = report.csv();
        let lines: Vec<_> = csv.lines().collect();
        assert_eq!(lines[1], "100,50,25.000,4,16.000,7,8,2.000,4.0000,1000,0.5000");
        assert_eq!(lines[2], "100,,,4,32.000,7,16,2.000,,1000,0.5000");
        assert_eq!(lines[0].split(',').count(), lines[1].split(',').count());
    }
}
