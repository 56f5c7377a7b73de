//! Cached state of one session on the device.
//!
//! What later tokens overwrite lives in rings addressed by position modulo a capacity that exceeds
//! the need by [`MAX_REWIND`], allocated at once; compressed rows and index keys are append-only
//! and grow by copying. The device keeps no counts: what a query sees follows from its position,
//! and so a rewind changes nothing but the position.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use ds4_engine::{
    MAX_REWIND,
    backend::{
        BackendError, CompressorInputs, Frontier, LayerFrontier, LayerRows, StageResult,
        compressor_tail,
    },
    rows::CacheRounding,
};
use ds4_model::config::{Config, INDEX_DIM, LayerKind, WINDOW};

use crate::{
    device::{Buffer, Device},
    kernel::Pointer,
};

/// Slots of a window's ring.
const WINDOW_SLOTS: usize = WINDOW + MAX_REWIND;
/// Rows that a layer has room for at first.
const FIRST_ROWS: usize = 256;
/// Rows up to which a layer's room doubles; beyond, it grows by half.
const DOUBLING_ROWS: usize = 4096;

/// KV state of one session.
pub struct Cache {
    device: Device,
    /// Tokens that the cache has room for and, between steps, holds.
    position: usize,
    layers: Vec<Layer>,
    /// Window rings of all layers, each `[WINDOW_SLOTS, row bytes]`.
    windows: Buffer<u8>,
    /// Input rings of all compressors.
    inputs: Buffer<f32>,
    pointers: Vec<LayerPointers>,
}

/// Addresses of one layer's state, as the kernels read them; null where a layer has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct LayerPointers {
    /// Ring of stored key/value rows.
    pub window: Pointer,
    /// Ring of compressor values.
    pub values: Pointer,
    /// Ring of compressor scores.
    pub scores: Pointer,
    /// Compressed rows.
    pub rows: Pointer,
    /// Ring of values of the indexer's compressor.
    pub index_values: Pointer,
    /// Ring of its scores.
    pub index_scores: Pointer,
    /// Index keys.
    pub index_keys: Pointer,
}

/// KV state of one layer.
struct Layer {
    /// Where its window starts in the buffer of windows.
    window: usize,
    row_bytes: usize,
    compressed: Option<Compressed>,
    index: Option<Compressed>,
}

/// Rows made by a compressor, and where its rings are.
struct Compressed {
    ratio: usize,
    /// Elements of an input.
    width: usize,
    slots: usize,
    /// Where the ring of values starts in the buffer of inputs; that of scores follows it.
    values: usize,
    row_bytes: usize,
    rows: Buffer<u8>,
}

impl Cache {
    /// An empty cache.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if the device has no room for another session.
    pub fn new(device: &Device, config: &Config, rounding: CacheRounding) -> StageResult<Cache> {
        let row_bytes = rounding.kv_codec().row_bytes();
        let key_bytes = rounding.index_codec().row_bytes();
        let mut inputs = 0;
        let layers = config.layers.iter().enumerate().map(|(l, layer)| {
            let kind = layer.kind;
            let mut compressed =
                |width, bytes| Compressed::new(device, kind, width, bytes, &mut inputs);
            Ok(Layer {
                window: l * WINDOW_SLOTS * row_bytes,
                row_bytes,
                compressed: match kind {
                    LayerKind::Swa => None,
                    _ => Some(compressed(kind.compressor_width(), row_bytes)?),
                },
                index: match kind {
                    LayerKind::Csa => Some(compressed(2 * INDEX_DIM, key_bytes)?),
                    _ => None,
                },
            })
        });
        let layers: Vec<Layer> = layers.collect::<StageResult<_>>()?;
        let windows = device.alloc_zeroed(layers.len() * WINDOW_SLOTS * row_bytes)?;
        let inputs = device.alloc_zeroed(inputs)?;
        let device = device.clone();
        let mut cache =
            Cache { device, position: 0, layers, windows, inputs, pointers: Vec::new() };
        cache.update_pointers();
        Ok(cache)
    }

    /// Bytes of a cache that holds `position` tokens, at the least.
    pub fn bytes_at(config: &Config, rounding: CacheRounding, position: usize) -> u64 {
        let (row, key) = (rounding.kv_codec().row_bytes(), rounding.index_codec().row_bytes());
        let layer = |kind: LayerKind| {
            let rows = position.checked_div(kind.ratio()).unwrap_or(0);
            let per_row = row + if kind == LayerKind::Csa { key } else { 0 };
            WINDOW_SLOTS * row + rows * per_row
        };
        config.layers.iter().map(|l| layer(l.kind) as u64).sum()
    }

    /// Addresses of every layer's state. They change when [`reserve`](Self::reserve) grows it.
    pub fn pointers(&self) -> &[LayerPointers] {
        &self.pointers
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        let rows = self.layers.iter().flat_map(Layer::compressors).map(|c| c.rows.len());
        self.windows.len() + size_of::<f32>() * self.inputs.len() + rows.sum::<usize>()
    }

    /// Makes room for `position` tokens, which the session holds after the coming step.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if the device has no room; the cache is as it was.
    pub fn reserve(&mut self, position: usize) -> StageResult {
        self.make_room(position)?;
        self.position = position;
        Ok(())
    }

    /// Makes room for `position` tokens, without a step that would use it.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if the device has no room; the cache is as it was.
    pub fn make_room(&mut self, position: usize) -> StageResult {
        let mut result = Ok(());
        for c in self.layers.iter_mut().flat_map(Layer::compressors_mut) {
            result = c.reserve(&self.device, position / c.ratio);
            if result.is_err() {
                break;
            }
        }
        // Layers that did grow have moved, whatever became of the others.
        self.update_pointers();
        result
    }

    /// Goes back to `position`, at most [`MAX_REWIND`] tokens before the highest one written.
    pub fn rewind(&mut self, position: usize) {
        self.position = position;
    }

    /// Copies out the part that later tokens overwrite.
    pub fn frontier(&self, position: usize) -> StageResult<Frontier> {
        let windows = self.device.download(&self.windows, 0..self.windows.len())?;
        let inputs = self.device.download(&self.inputs, 0..self.inputs.len())?;
        let layer = |layer: &Layer| {
            let tail = |c: &Option<Compressed>| c.as_ref().map(|c| c.tail(&inputs, position));
            LayerFrontier {
                window: window_positions(position)
                    .flat_map(|p| &windows[layer.window_slot(p)])
                    .copied()
                    .collect(),
                compressor: tail(&layer.compressed).unwrap_or_default(),
                indexer: tail(&layer.index).unwrap_or_default(),
            }
        };
        Ok(Frontier { position, layers: self.layers.iter().map(layer).collect() })
    }

    /// Puts a frontier back and drops all rows beyond it.
    ///
    /// Slots of positions that it does not hold are cleared: a session never goes back beyond a
    /// restored position.
    pub fn set_frontier(&mut self, frontier: &Frontier) -> StageResult {
        let mut windows = vec![0; self.windows.len()];
        let mut inputs = vec![0.0; self.inputs.len()];
        for (layer, saved) in self.layers.iter().zip(&frontier.layers) {
            let rows = saved.window.chunks_exact(layer.row_bytes);
            for (p, row) in window_positions(frontier.position).zip(rows) {
                windows[layer.window_slot(p)].copy_from_slice(row);
            }
            for (c, saved) in
                [(&layer.compressed, &saved.compressor), (&layer.index, &saved.indexer)]
            {
                if let Some(c) = c {
                    c.set_tail(&mut inputs, frontier.position, saved);
                }
            }
        }
        self.device.upload(&mut self.windows, 0, &windows)?;
        self.device.upload(&mut self.inputs, 0, &inputs)?;
        self.position = frontier.position;
        Ok(())
    }

    /// Copies out one layer's rows.
    pub fn layer_rows(&self, layer: usize) -> StageResult<LayerRows> {
        let layer = &self.layers[layer];
        let bytes = |c: &Option<Compressed>| match c {
            Some(c) => self.device.download(&c.rows, 0..c.used_bytes(self.position)),
            None => Ok(Vec::new()),
        };
        Ok(LayerRows { rows: bytes(&layer.compressed)?, index_keys: bytes(&layer.index)? })
    }

    /// Replaces one layer's rows.
    pub fn set_layer_rows(&mut self, layer: usize, rows: &LayerRows) -> StageResult {
        let layer = &mut self.layers[layer];
        for (c, bytes) in
            [(&mut layer.compressed, &rows.rows), (&mut layer.index, &rows.index_keys)]
        {
            if let Some(c) = c {
                c.reserve(&self.device, bytes.len() / c.row_bytes)?;
                self.device.upload(&mut c.rows, 0, bytes)?;
            }
        }
        self.update_pointers();
        Ok(())
    }

    fn update_pointers(&mut self) {
        let pointers = |layer: &Layer| {
            let part = |c: &Option<Compressed>| match c {
                Some(c) => [
                    self.inputs.at(c.values),
                    self.inputs.at(c.values + c.slots * c.width),
                    c.rows.pointer(),
                ],
                None => [Pointer::NULL; 3],
            };
            let [values, scores, rows] = part(&layer.compressed);
            let [index_values, index_scores, index_keys] = part(&layer.index);
            let window = self.windows.at(layer.window);
            LayerPointers { window, values, scores, rows, index_values, index_scores, index_keys }
        };
        self.pointers = self.layers.iter().map(pointers).collect();
    }
}

impl Layer {
    fn compressors(&self) -> impl Iterator<Item = &Compressed> {
        self.compressed.iter().chain(&self.index)
    }

    fn compressors_mut(&mut self) -> impl Iterator<Item = &mut Compressed> {
        self.compressed.iter_mut().chain(&mut self.index)
    }

    /// Bytes of a position's row in the buffer of windows.
    fn window_slot(&self, position: usize) -> Range<usize> {
        let start = self.window + position % WINDOW_SLOTS * self.row_bytes;
        start..start + self.row_bytes
    }
}

/// The window's positions after `position` tokens.
fn window_positions(position: usize) -> Range<usize> {
    position.saturating_sub(WINDOW)..position
}

impl Compressed {
    /// One whose rings start at `inputs`, which is moved behind them.
    fn new(
        device: &Device,
        kind: LayerKind,
        width: usize,
        row_bytes: usize,
        inputs: &mut usize,
    ) -> StageResult<Compressed> {
        // Inputs of the window being filled, and at ratio 4 of the one before it.
        let needed = if kind == LayerKind::Csa { 2 * kind.ratio() } else { kind.ratio() };
        let (slots, values) = (needed + MAX_REWIND, *inputs);
        *inputs += 2 * slots * width;
        let rows = device.alloc_zeroed(FIRST_ROWS * row_bytes)?;
        Ok(Compressed { ratio: kind.ratio(), width, slots, values, row_bytes, rows })
    }

    /// Makes room for `rows` rows.
    fn reserve(&mut self, device: &Device, rows: usize) -> StageResult {
        let capacity = self.rows.len() / self.row_bytes;
        if rows <= capacity {
            return Ok(());
        }
        let bytes = grown(capacity, rows).checked_mul(self.row_bytes).ok_or_else(|| {
            BackendError::OutOfMemory(format!("{rows} compressed rows are too many to address"))
        })?;
        let mut larger = device.alloc_zeroed(bytes)?;
        device.copy(&self.rows, 0..self.rows.len(), &mut larger, 0)?;
        self.rows = larger;
        Ok(())
    }

    /// Bytes of the rows that are complete after `position` tokens.
    fn used_bytes(&self, position: usize) -> usize {
        (position / self.ratio * self.row_bytes).min(self.rows.len())
    }

    /// Elements of a position's value in the buffer of inputs; those of its score are `slots`
    /// rows further on.
    fn input_slot(&self, position: usize) -> Range<usize> {
        let start = self.values + position % self.slots * self.width;
        start..start + self.width
    }

    fn score_slot(&self, position: usize) -> Range<usize> {
        let Range { start, end } = self.input_slot(position);
        let offset = self.slots * self.width;
        start + offset..end + offset
    }

    fn tail(&self, inputs: &[f32], position: usize) -> CompressorInputs {
        let positions = compressor_tail(self.ratio, position);
        let values = positions.clone().flat_map(|p| &inputs[self.input_slot(p)]);
        let scores = positions.clone().flat_map(|p| &inputs[self.score_slot(p)]);
        CompressorInputs { values: values.copied().collect(), scores: scores.copied().collect() }
    }

    fn set_tail(&self, inputs: &mut [f32], position: usize, saved: &CompressorInputs) {
        let rows = saved.values.chunks_exact(self.width).zip(saved.scores.chunks_exact(self.width));
        for (p, (values, scores)) in compressor_tail(self.ratio, position).zip(rows) {
            inputs[self.input_slot(p)].copy_from_slice(values);
            inputs[self.score_slot(p)].copy_from_slice(scores);
        }
    }
}

/// Rows to have room for when `needed` exceeds `capacity`.
fn grown(capacity: usize, needed: usize) -> usize {
    if needed <= DOUBLING_ROWS {
        return needed.next_power_of_two();
    }
    needed.max(capacity.saturating_add(capacity / 2))
}

#[cfg(test)]
mod tests {
    use super::grown;

    #[test]
    fn room_doubles_at_first_and_then_grows_by_half() {
        assert_eq!(grown(256, 257), 512);
        assert_eq!(grown(256, 4096), 4096);
        assert_eq!(grown(4096, 4097), 6144);
        assert_eq!(grown(6144, 250_000), 250_000);
    }
}
