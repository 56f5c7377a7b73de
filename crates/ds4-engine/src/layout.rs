//! The KV state of a session: its planes, their sizes, and its canonical form.
//!
//! A layer's state has a part that only grows ([`Plane`]: compressed rows, index keys) and a part
//! that later tokens overwrite ([`LayerFrontier`]: window rows, compressor inputs). This is the
//! only place that says how large each is after a number of tokens. Backends keep the overwritten
//! part in rings with [`MAX_REWIND`] spare slots and say themselves what they allocate
//! ([`Backend::session_bytes`](crate::Backend::session_bytes)).
//!
//! Layers are the model's main layers. Layers of a draft model would follow them; snapshots with
//! such layers need a new version.

use std::ops::Range;

use ds4_model::config::{Config, INDEX_DIM, LayerKind, WINDOW};

use crate::{MAX_REWIND, rows::CacheRounding};

/// Sizes of a session's KV state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateLayout {
    rounding: CacheRounding,
    layers: Vec<LayerLayout>,
}

/// Sizes of one layer's KV state. Rows are in the storage format of the rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerLayout {
    /// What the layer attends to.
    pub kind: LayerKind,
    /// Bytes of a window row and of a compressed row.
    pub row_bytes: usize,
    /// The layer's compressor, in CSA and HCA layers.
    pub rows: Option<PlaneLayout>,
    /// The indexer's compressor, in CSA layers.
    pub index_keys: Option<PlaneLayout>,
}

/// An append-only part of a layer's state, made by a compressor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Plane {
    /// Compressed key/value rows.
    Rows,
    /// Index keys.
    IndexKeys,
}

/// Sizes of a plane, and of the compressor inputs that make its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlaneLayout {
    /// Tokens of a row.
    pub ratio: usize,
    /// Bytes of a row.
    pub row_bytes: usize,
    /// Elements of a token's input: so many values and as many scores, all f32.
    pub input_width: usize,
}

/// The part of a session's state that later tokens overwrite, after `position` tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Frontier {
    /// Tokens processed.
    pub position: usize,
    /// One entry per layer.
    pub layers: Vec<LayerFrontier>,
}

/// One layer of a [`Frontier`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerFrontier {
    /// Stored window rows of the last min(position, 128) positions, oldest first.
    pub window: Vec<u8>,
    /// Inputs of the layer's compressor that an unfinished row may still need.
    pub compressor: CompressorInputs,
    /// The same for the indexer's compressor.
    pub indexer: CompressorInputs,
}

/// Compressor inputs of consecutive positions ([`PlaneLayout::tail`]), each `[tokens, width]`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CompressorInputs {
    /// Values.
    pub values: Vec<f32>,
    /// Gate scores, position bias included.
    pub scores: Vec<f32>,
}

/// The window's positions after `position` tokens.
pub fn window_positions(position: usize) -> Range<usize> {
    position.saturating_sub(WINDOW)..position
}

/// Slots of a ring of window rows.
pub const WINDOW_SLOTS: usize = WINDOW + MAX_REWIND;

impl StateLayout {
    /// The layout for a model and a rounding.
    pub fn new(config: &Config, rounding: CacheRounding) -> Self {
        let layer = |kind: LayerKind| {
            let plane = |input_width, row_bytes| PlaneLayout {
                ratio: kind.ratio(),
                row_bytes,
                input_width,
            };
            let row_bytes = rounding.kv_codec().row_bytes();
            LayerLayout {
                kind,
                row_bytes,
                rows: (kind != LayerKind::Swa).then(|| plane(kind.compressor_width(), row_bytes)),
                index_keys: (kind == LayerKind::Csa)
                    .then(|| plane(2 * INDEX_DIM, rounding.index_codec().row_bytes())),
            }
        };
        let layers = config.layers.iter().map(|l| layer(l.kind)).collect();
        StateLayout { rounding, layers }
    }

    /// Whether rows are rounded.
    pub fn rounding(&self) -> CacheRounding {
        self.rounding
    }

    /// One entry per layer.
    pub fn layers(&self) -> &[LayerLayout] {
        &self.layers
    }

    /// Bytes of the state after `tokens` tokens, rings with their spare slots included.
    pub fn bytes(&self, tokens: usize) -> u64 {
        let layer = |l: &LayerLayout| {
            let planes =
                l.planes().map(|(_, p)| p.rows(tokens) * p.row_bytes + p.ring_bytes(tokens));
            tokens.min(WINDOW_SLOTS) * l.row_bytes + planes.sum::<usize>()
        };
        self.layers.iter().map(|l| layer(l) as u64).sum()
    }
}

impl LayerLayout {
    /// The planes that the layer has.
    pub fn planes(&self) -> impl Iterator<Item = (Plane, PlaneLayout)> + use<> {
        let rows = self.rows.map(|p| (Plane::Rows, p));
        rows.into_iter().chain(self.index_keys.map(|p| (Plane::IndexKeys, p)))
    }

    /// Bytes of the window rows of a frontier after `tokens` tokens.
    pub fn window_bytes(&self, tokens: usize) -> usize {
        window_positions(tokens).len() * self.row_bytes
    }
}

impl PlaneLayout {
    /// Rows that are complete after `tokens` tokens.
    pub fn rows(&self, tokens: usize) -> usize {
        tokens / self.ratio
    }

    /// Positions whose compressor inputs are still needed after `position` tokens.
    ///
    /// At ratio 128 these are the unfinished window; at ratio 4 also the window before it, because
    /// windows overlap (docs/model.md, "Compressor").
    pub fn tail(&self, position: usize) -> Range<usize> {
        let unfinished = position / self.ratio * self.ratio;
        let before = if self.overlaps() { self.ratio } else { 0 };
        unfinished.saturating_sub(before)..position
    }

    /// Slots of the ring of compressor inputs.
    pub fn ring_slots(&self) -> usize {
        let windows = if self.overlaps() { 2 } else { 1 };
        windows * self.ratio + MAX_REWIND
    }

    /// Bytes of a frontier's inputs after `tokens` tokens, values and scores together.
    pub fn tail_bytes(&self, tokens: usize) -> usize {
        self.tail(tokens).len() * self.input_bytes()
    }

    fn ring_bytes(&self, tokens: usize) -> usize {
        tokens.min(self.ring_slots()) * self.input_bytes()
    }

    fn input_bytes(&self) -> usize {
        2 * size_of::<f32>() * self.input_width
    }

    fn overlaps(&self) -> bool {
        self.ratio == LayerKind::Csa.ratio()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::config;

    #[test]
    fn the_state_grows_by_its_rows_once_the_rings_are_full() {
        let layout = StateLayout::new(&config(), CacheRounding::On);
        let (row, key) = (712, 68);
        let rings = layout.bytes(256) - 2 * row - 64 * (row + key);
        assert_eq!(layout.bytes(0), 0);
        assert_eq!(layout.bytes(256 + 1024), rings + 10 * row + 320 * (row + key));
    }

    #[test]
    fn a_tail_ends_at_the_position_and_starts_a_window_earlier_where_windows_overlap() {
        let layout = StateLayout::new(&config(), CacheRounding::On);
        let [swa, csa, hca] = layout.layers() else { panic!("three layers") };
        assert!(swa.planes().next().is_none());
        let tail = |plane: Option<PlaneLayout>, n| plane.map(|p| p.tail(n));
        assert_eq!(tail(csa.rows, 11), Some(4..11));
        assert_eq!(tail(csa.index_keys, 3), Some(0..3));
        assert_eq!(tail(hca.rows, 130), Some(128..130));
    }
}
