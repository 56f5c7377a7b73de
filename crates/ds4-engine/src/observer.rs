//! Watching what the routed experts are given, for calibration.
//!
//! A backend that offers it calls the observer during
//! [`run_experts`](crate::backend::Step::run_experts). Results don't depend on the observer.

/// Sees what every routed expert is given.
pub trait ExpertObserver: Send + Sync {
    /// Called once in each stage for each expert that has rows, or for each part of its rows.
    fn observe(&self, seen: &Observation<'_>);
}

/// Inputs of one expert.
#[derive(Debug, Clone, Copy)]
pub struct Observation<'a> {
    /// The layer.
    pub layer: usize,
    /// The expert.
    pub expert: usize,
    /// Which rows of `input` go through it.
    pub rows: &'a [usize],
    /// The layer's normalised expert inputs of the whole batch, `[n, hidden]`.
    pub input: &'a [f32],
    /// What goes into the down projection, one row for each of `rows`, the expert's weight
    /// included: `[rows, width]`.
    pub activations: &'a [f32],
}
