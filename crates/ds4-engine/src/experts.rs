//! The seam for routed experts: who runs them, given rows and routes.
//!
//! A backend runs routed experts itself, on its device and fused with the stages around them, or
//! hands rows and routes to a [`RoutedExperts`]. The shared expert is always the backend's.

use crate::backend::StageResult;

/// Rows of a step in one layer, and the experts that each row was routed to.
#[derive(Debug, Clone, Copy)]
pub struct RoutedRows<'a> {
    /// The layer.
    pub layer: usize,
    /// Leading rows in [`Phase::Decode`](crate::Phase::Decode).
    pub decode_rows: usize,
    /// Normalised inputs `[n, hidden]`.
    pub x: &'a [f32],
    /// Experts of each row `[n, used]`; a row may name an expert twice.
    pub ids: &'a [u32],
    /// Weights of their outputs `[n, used]`.
    pub weights: &'a [f32],
}

/// Runs routed experts.
pub trait RoutedExperts: Send + Sync {
    /// Adds the weighted outputs of each row's experts to `y [n, hidden]`:
    /// `y[t] += Σ_j weights[t][j] · expert ids[t][j] (x[t])`.
    ///
    /// A row's result must not depend on the other rows.
    ///
    /// # Errors
    /// If the device that runs them fails.
    fn run(&self, rows: &RoutedRows<'_>, y: &mut [f32]) -> StageResult;
}
