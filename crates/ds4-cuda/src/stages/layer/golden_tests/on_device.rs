//! The device's side of a comparison: its weights, activations and sessions.

use std::sync::Arc;

use ds4_engine::{
    backend::{Cache as _, Sublayer},
    layout::{LayerLayout, StateLayout},
    rope::frequencies,
};
use ds4_model::{Model, config::LayerKind};

use super::closeness::Closeness;
use crate::{
    Cache,
    device::{Buffer, Device},
    scratch::Scratch,
    stages::layer::{CudaStep, Shape},
    weights::Weights,
};

/// What the device holds.
pub struct OnDevice {
    pub model: Arc<Model>,
    pub layout: StateLayout,
    pub device: Device,
    weights: Weights,
    frequencies: Buffer<f32>,
    pub scratch: Scratch,
    pub caches: Vec<Cache>,
    pub closeness: Closeness,
}

impl OnDevice {
    /// `sessions` empty sessions, and scratch for steps of `most_rows` rows.
    pub fn new(
        device: Device,
        model: Arc<Model>,
        layout: StateLayout,
        sessions: usize,
        most_rows: usize,
    ) -> OnDevice {
        let config = &model.config;
        let weights = Weights::load(&device, &model, |_, _| {}).expect("weights");
        let both = [LayerKind::Swa, LayerKind::Csa].map(|kind| frequencies(config, kind));
        let cache = |_| Cache::new(&device, &layout, 0).expect("memory for a session");
        let (rounding, sizes) = (layout.rounding(), (most_rows, most_rows));
        OnDevice {
            frequencies: device.buffer(both.as_flattened()).expect("frequencies"),
            scratch: Scratch::new(&device, config, rounding, &weights, sizes).expect("scratch"),
            caches: (0..sessions).map(cache).collect(),
            closeness: Closeness::default(),
            layout,
            weights,
            device,
            model,
        }
    }

    /// Gives a layer of a session the compressed rows and index keys that `from` has after `tokens`
    /// tokens.
    pub fn copy_rows(
        &mut self,
        layer: usize,
        session: usize,
        from: &ds4_cpu::Cache,
        tokens: usize,
    ) {
        for (plane, layout) in self.layout.layers()[layer].planes() {
            let rows = from.read_rows(layer, plane, 0..layout.rows(tokens)).expect("rows");
            self.caches[session].write_rows(layer, plane, 0, &rows).expect("room for rows");
        }
    }

    pub fn layer(&self, layer: usize) -> &LayerLayout {
        &self.layout.layers()[layer]
    }

    /// A step of the device, with the output of `pending` still to be spread.
    pub fn begin_step(&self, shape: Shape, pending: Option<Sublayer>) -> CudaStep<'_> {
        CudaStep {
            device: &self.device,
            config: &self.model.config,
            weights: &self.weights,
            rounding: self.layout.rounding(),
            frequencies: &self.frequencies,
            scratch: &self.scratch,
            shape,
            pending,
        }
    }

    pub fn floats(&self, pick: impl Fn(&Scratch) -> &Buffer<f32>, len: usize) -> Vec<f32> {
        self.device.download(pick(&self.scratch), 0..len).expect("a result")
    }
}
