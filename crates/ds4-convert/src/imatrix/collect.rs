//! Collects an importance matrix while a model runs.

use std::sync::Mutex;

use ds4_engine::observer::{ExpertObserver, Observation};
use ds4_model::{
    binding::{Binding, Slot},
    config::Config,
};

use super::ImportanceMatrix;

/// Sums up the squares of everything that routed experts are given.
///
/// Sums of several collectors over parts of a text are those of one over the whole of it.
pub struct Collector {
    config: Config,
    layers: Vec<Mutex<LayerSums>>,
}

/// Sums of one layer, expert after expert.
#[derive(Clone)]
struct LayerSums {
    /// Rows seen by each expert.
    rows: Vec<u64>,
    /// Squares of the inputs of gate and up, `[experts, hidden]`.
    input: Vec<f64>,
    /// Squares of the inputs of down, `[experts, width]`.
    activations: Vec<f64>,
}

impl Collector {
    /// One that has seen nothing.
    pub fn new(config: &Config) -> Collector {
        let sums = LayerSums {
            rows: vec![0; config.experts],
            input: vec![0.0; config.experts * config.hidden],
            activations: vec![0.0; config.experts * config.expert_width],
        };
        let layers = config.layers.iter().map(|_| Mutex::new(sums.clone())).collect();
        Collector { config: config.clone(), layers }
    }

    /// How many rows each expert of each layer has seen.
    pub fn rows(&self) -> Vec<Vec<u64>> {
        self.layers.iter().map(|layer| locked(layer).rows.clone()).collect()
    }

    /// The means so far; 1 in all columns of experts that have seen nothing. `dataset` names the
    /// text, of which `chunks` were read.
    pub fn matrix(&self, dataset: &str, chunks: u64) -> ImportanceMatrix {
        let mut matrix = ImportanceMatrix {
            file: String::new(),
            dataset: dataset.to_owned(),
            chunks,
            entries: Default::default(),
        };
        for (layer, sums) in self.layers.iter().enumerate() {
            let sums = locked(sums);
            let mut put = |slot, values: Vec<f32>| {
                let name = Binding::of(slot).expected(&self.config, Some(layer)).name;
                matrix.entries.insert(name, values);
            };
            let input = means(&sums.rows, &sums.input);
            put(Slot::ExpertGate, input.clone());
            put(Slot::ExpertUp, input);
            put(Slot::ExpertDown, means(&sums.rows, &sums.activations));
        }
        matrix
    }
}

impl ExpertObserver for Collector {
    fn observe(&self, seen: &Observation<'_>) {
        let (hidden, width) = (self.config.hidden, self.config.expert_width);
        let mut sums = locked(&self.layers[seen.layer]);
        sums.rows[seen.expert] += seen.rows.len() as u64;
        let input = &mut sums.input[seen.expert * hidden..][..hidden];
        for &row in seen.rows {
            add_squares(input, &seen.input[row * hidden..][..hidden]);
        }
        let activations = &mut sums.activations[seen.expert * width..][..width];
        for row in seen.activations.chunks_exact(width) {
            add_squares(activations, row);
        }
    }
}

fn add_squares(sums: &mut [f64], row: &[f32]) {
    for (sum, x) in sums.iter_mut().zip(row) {
        *sum += f64::from(*x) * f64::from(*x);
    }
}

fn means(rows: &[u64], sums: &[f64]) -> Vec<f32> {
    let experts = rows.iter().zip(sums.chunks_exact(sums.len() / rows.len()));
    let means = experts.flat_map(|(&rows, sums)| {
        sums.iter().map(move |sum| if rows == 0 { 1.0 } else { (sum / rows as f64) as f32 })
    });
    means.collect()
}

/// A panic of another thread leaves at worst a row half added, which the panic reports anyway.
fn locked(sums: &Mutex<LayerSums>) -> std::sync::MutexGuard<'_, LayerSums> {
    sums.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
