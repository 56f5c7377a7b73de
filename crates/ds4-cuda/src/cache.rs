//! Cached state of one session on the device.
//!
//! State that later tokens overwrite lives in rings addressed by position modulo a capacity that
//! exceeds the need by [`MAX_REWIND`](ds4_engine::MAX_REWIND), allocated at once; compressed rows
//! and index keys are append-only and grow by copying. The device keeps no counts: the rows that a
//! query sees follow from its position, and so a rewind changes nothing here.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use ds4_engine::{
    backend::{self, BackendError, SavedFrontier, StageResult, own_frontier},
    layout::{
        CompressorInputs, Frontier, LayerFrontier, LayerLayout, Plane, PlaneLayout, StateLayout,
        WINDOW_SLOTS, window_positions,
    },
};

use crate::{
    device::{Buffer, Device},
    kernel::Pointer,
};

/// Rows that a plane has capacity for at first.
const FIRST_ROWS: usize = 256;
/// A plane grows by this share of its capacity, at least by [`FIRST_ROWS`].
const GROWTH_SHARE: usize = 8;
/// The driver hands out memory in pieces of this size; smaller buffers share one.
const ALLOCATION: usize = 2 << 20;
/// Alignment of a buffer that shares a piece.
const ALIGNMENT: usize = 512;

/// KV state of one session.
pub struct Cache {
    device: Device,
    layers: Vec<Layer>,
    rings: Rings,
    pointers: Vec<LayerPointers>,
}

/// State that later tokens overwrite, of all layers.
struct Rings {
    /// Window rows, each layer `[WINDOW_SLOTS, row bytes]`.
    windows: Buffer<u8>,
    /// Compressor inputs.
    inputs: Buffer<f32>,
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
    /// Start of its ring in the buffer of windows.
    window: usize,
    row_bytes: usize,
    rows: Option<PlaneState>,
    index_keys: Option<PlaneState>,
}

/// A plane, and the place of its compressor's rings.
struct PlaneState {
    layout: PlaneLayout,
    /// Start of the ring of values in the buffer of inputs; the ring of scores follows it.
    values: usize,
    rows: Buffer<u8>,
}

/// Rows of a plane to allocate when `rows` are needed. It follows from `rows` alone, so that the
/// memory of a session can be told from its length.
fn capacity(rows: usize) -> usize {
    let mut capacity = FIRST_ROWS;
    while capacity < rows {
        capacity += (capacity / GROWTH_SHARE).next_multiple_of(FIRST_ROWS).max(FIRST_ROWS);
    }
    capacity
}

/// Bytes of device memory that a buffer takes.
fn allocated(bytes: usize) -> u64 {
    let unit = if bytes < ALLOCATION / 2 { ALIGNMENT } else { ALLOCATION };
    bytes.next_multiple_of(unit) as u64
}

/// Bytes of device memory of a cache with capacity for `tokens` tokens.
pub(crate) fn bytes_at(layout: &StateLayout, tokens: usize) -> u64 {
    let planes = || layout.layers().iter().flat_map(LayerLayout::planes).map(|(_, p)| p);
    let windows: usize = layout.layers().iter().map(|l| WINDOW_SLOTS * l.row_bytes).sum();
    let inputs: usize = planes().map(|p| ring_elements(&p) * size_of::<f32>()).sum();
    let rows = planes().map(|p| allocated(capacity(p.rows(tokens)) * p.row_bytes));
    allocated(windows) + allocated(inputs) + rows.sum::<u64>()
}

/// Elements of a compressor's two rings.
fn ring_elements(layout: &PlaneLayout) -> usize {
    2 * layout.ring_slots() * layout.input_width
}

impl Cache {
    /// An empty cache with capacity for `tokens` tokens.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if the device has no room for it.
    pub fn new(device: &Device, layout: &StateLayout, tokens: usize) -> StageResult<Cache> {
        let (mut windows, mut inputs) = (0, 0);
        let layers = layout.layers().iter().map(|layer| {
            let window = windows;
            windows += WINDOW_SLOTS * layer.row_bytes;
            let mut plane = |layout: Option<PlaneLayout>| {
                layout.map(|p| PlaneState::new(device, p, &mut inputs, tokens)).transpose()
            };
            Ok(Layer {
                window,
                row_bytes: layer.row_bytes,
                rows: plane(layer.rows)?,
                index_keys: plane(layer.index_keys)?,
            })
        });
        let layers: Vec<Layer> = layers.collect::<StageResult<_>>()?;
        let rings =
            Rings { windows: device.alloc_zeroed(windows)?, inputs: device.alloc_zeroed(inputs)? };
        let mut cache = Cache { device: device.clone(), layers, rings, pointers: Vec::new() };
        cache.update_pointers();
        Ok(cache)
    }

    /// Addresses of every layer's state. They change when the cache grows.
    pub fn pointers(&self) -> &[LayerPointers] {
        &self.pointers
    }

    fn planes(&self) -> impl Iterator<Item = &PlaneState> {
        self.layers.iter().flat_map(Layer::planes)
    }

    fn plane(&self, layer: usize, plane: Plane) -> Option<&PlaneState> {
        let layer = &self.layers[layer];
        match plane {
            Plane::Rows => layer.rows.as_ref(),
            Plane::IndexKeys => layer.index_keys.as_ref(),
        }
    }

    fn update_pointers(&mut self) {
        let pointers = |layer: &Layer| {
            let part = |plane: &Option<PlaneState>| match plane {
                Some(p) => [
                    self.rings.inputs.at(p.values),
                    self.rings.inputs.at(p.values + ring_elements(&p.layout) / 2),
                    p.rows.pointer(),
                ],
                None => [Pointer::NULL; 3],
            };
            let [values, scores, rows] = part(&layer.rows);
            let [index_values, index_scores, index_keys] = part(&layer.index_keys);
            let window = self.rings.windows.at(layer.window);
            LayerPointers { window, values, scores, rows, index_values, index_scores, index_keys }
        };
        self.pointers = self.layers.iter().map(pointers).collect();
    }
}

impl backend::Cache for Cache {
    fn bytes(&self) -> u64 {
        self.rings.bytes() + self.planes().map(|p| allocated(p.rows.len())).sum::<u64>()
    }

    fn reserve(&mut self, tokens: usize) -> StageResult {
        let mut result = Ok(());
        for plane in self.layers.iter_mut().flat_map(Layer::planes_mut) {
            result = plane.reserve(&self.device, plane.layout.rows(tokens));
            if result.is_err() {
                break;
            }
        }
        // Planes that did grow have moved, also if a later one could not.
        self.update_pointers();
        result
    }

    fn rewind(&mut self, _position: usize) {}

    fn fork(&self, position: usize) -> StageResult<Box<dyn backend::Cache>> {
        let device = &self.device;
        let plane = |plane: &Option<PlaneState>| {
            plane.as_ref().map(|p| p.fork(device, position)).transpose()
        };
        let layers = self.layers.iter().map(|layer| {
            let (rows, index_keys) = (plane(&layer.rows)?, plane(&layer.index_keys)?);
            Ok(Layer { rows, index_keys, ..*layer })
        });
        let mut fork = Cache {
            device: device.clone(),
            layers: layers.collect::<StageResult<_>>()?,
            rings: self.rings.copy(device)?,
            pointers: Vec::new(),
        };
        fork.update_pointers();
        Ok(Box::new(fork))
    }

    fn save_frontier(&self, _position: usize) -> StageResult<Box<dyn SavedFrontier>> {
        Ok(Box::new(self.rings.copy(&self.device)?))
    }

    fn restore_frontier(&mut self, saved: &dyn SavedFrontier) -> StageResult {
        let saved: &Rings = own_frontier(saved)?;
        self.rings.set(&self.device, saved)
    }

    fn read_frontier(&self, position: usize) -> StageResult<Frontier> {
        let windows = self.device.download(&self.rings.windows, 0..self.rings.windows.len())?;
        let inputs = self.device.download(&self.rings.inputs, 0..self.rings.inputs.len())?;
        let layer = |layer: &Layer| {
            let tail = |p: &Option<PlaneState>| p.as_ref().map(|p| p.tail(&inputs, position));
            LayerFrontier {
                window: window_positions(position)
                    .flat_map(|p| &windows[layer.window_slot(p)])
                    .copied()
                    .collect(),
                compressor: tail(&layer.rows).unwrap_or_default(),
                indexer: tail(&layer.index_keys).unwrap_or_default(),
            }
        };
        Ok(Frontier { position, layers: self.layers.iter().map(layer).collect() })
    }

    /// Slots of positions outside the frontier are cleared: a session never goes back beyond a
    /// restored position.
    fn write_frontier(&mut self, frontier: &Frontier) -> StageResult {
        let mut windows = vec![0; self.rings.windows.len()];
        let mut inputs = vec![0.0; self.rings.inputs.len()];
        for (layer, saved) in self.layers.iter().zip(&frontier.layers) {
            let rows = saved.window.chunks_exact(layer.row_bytes);
            for (p, row) in window_positions(frontier.position).zip(rows) {
                windows[layer.window_slot(p)].copy_from_slice(row);
            }
            for (plane, saved) in
                [(&layer.rows, &saved.compressor), (&layer.index_keys, &saved.indexer)]
            {
                if let Some(plane) = plane {
                    plane.set_tail(&mut inputs, frontier.position, saved);
                }
            }
        }
        self.device.upload(&mut self.rings.windows, 0, &windows)?;
        self.device.upload(&mut self.rings.inputs, 0, &inputs)
    }

    fn read_rows(&self, layer: usize, plane: Plane, rows: Range<usize>) -> StageResult<Vec<u8>> {
        let Some(plane) = self.plane(layer, plane) else { return Ok(Vec::new()) };
        let bytes = rows.start * plane.layout.row_bytes..rows.end * plane.layout.row_bytes;
        self.device.download(&plane.rows, bytes)
    }

    fn write_rows(
        &mut self,
        layer: usize,
        plane: Plane,
        first: usize,
        bytes: &[u8],
    ) -> StageResult {
        let layer = &mut self.layers[layer];
        let plane = match plane {
            Plane::Rows => &mut layer.rows,
            Plane::IndexKeys => &mut layer.index_keys,
        };
        if let Some(plane) = plane {
            let row_bytes = plane.layout.row_bytes;
            plane.reserve(&self.device, first + bytes.len() / row_bytes)?;
            self.device.upload(&mut plane.rows, first * row_bytes, bytes)?;
        }
        self.update_pointers();
        Ok(())
    }
}

impl Rings {
    fn copy(&self, device: &Device) -> StageResult<Rings> {
        let mut copy = Rings {
            windows: device.alloc(self.windows.len())?,
            inputs: device.alloc(self.inputs.len())?,
        };
        copy.set(device, self)?;
        Ok(copy)
    }

    fn set(&mut self, device: &Device, from: &Rings) -> StageResult {
        let lengths = |rings: &Rings| (rings.windows.len(), rings.inputs.len());
        if lengths(self) != lengths(from) {
            return Err(BackendError::OtherBackend);
        }
        device.copy(&from.windows, 0..from.windows.len(), &mut self.windows, 0)?;
        device.copy(&from.inputs, 0..from.inputs.len(), &mut self.inputs, 0)
    }
}

impl SavedFrontier for Rings {
    fn bytes(&self) -> u64 {
        allocated(self.windows.len()) + allocated(size_of::<f32>() * self.inputs.len())
    }
}

impl Layer {
    fn planes(&self) -> impl Iterator<Item = &PlaneState> {
        self.rows.iter().chain(&self.index_keys)
    }

    fn planes_mut(&mut self) -> impl Iterator<Item = &mut PlaneState> {
        self.rows.iter_mut().chain(&mut self.index_keys)
    }

    /// Bytes of a position's row in the buffer of windows.
    fn window_slot(&self, position: usize) -> Range<usize> {
        let start = self.window + position % WINDOW_SLOTS * self.row_bytes;
        start..start + self.row_bytes
    }
}

impl PlaneState {
    /// A plane whose rings start at `inputs`, which is moved behind them.
    fn new(
        device: &Device,
        layout: PlaneLayout,
        inputs: &mut usize,
        tokens: usize,
    ) -> StageResult<Self> {
        let values = *inputs;
        *inputs += ring_elements(&layout);
        let rows = device.alloc_zeroed(capacity(layout.rows(tokens)) * layout.row_bytes)?;
        Ok(PlaneState { layout, values, rows })
    }

    /// The rows that are complete after `position` tokens, in a plane of their own.
    fn fork(&self, device: &Device, position: usize) -> StageResult<Self> {
        let used = self.layout.rows(position);
        let mut rows = device.alloc_zeroed(capacity(used) * self.layout.row_bytes)?;
        device.copy(&self.rows, 0..used * self.layout.row_bytes, &mut rows, 0)?;
        Ok(PlaneState { rows, ..*self })
    }

    /// Ensures capacity for `rows` rows.
    fn reserve(&mut self, device: &Device, rows: usize) -> StageResult {
        if rows * self.layout.row_bytes <= self.rows.len() {
            return Ok(());
        }
        let mut larger = device.alloc_zeroed(capacity(rows) * self.layout.row_bytes)?;
        device.copy(&self.rows, 0..self.rows.len(), &mut larger, 0)?;
        self.rows = larger;
        Ok(())
    }

    /// Elements of a position's value in the buffer of inputs.
    fn input_slot(&self, position: usize) -> Range<usize> {
        let width = self.layout.input_width;
        let start = self.values + position % self.layout.ring_slots() * width;
        start..start + width
    }

    fn score_slot(&self, position: usize) -> Range<usize> {
        let Range { start, end } = self.input_slot(position);
        let offset = ring_elements(&self.layout) / 2;
        start + offset..end + offset
    }

    fn tail(&self, inputs: &[f32], position: usize) -> CompressorInputs {
        let positions = self.layout.tail(position);
        let values = positions.clone().flat_map(|p| &inputs[self.input_slot(p)]);
        let scores = positions.clone().flat_map(|p| &inputs[self.score_slot(p)]);
        CompressorInputs { values: values.copied().collect(), scores: scores.copied().collect() }
    }

    fn set_tail(&self, inputs: &mut [f32], position: usize, saved: &CompressorInputs) {
        let width = self.layout.input_width;
        let rows = saved.values.chunks_exact(width).zip(saved.scores.chunks_exact(width));
        for (p, (values, scores)) in self.layout.tail(position).zip(rows) {
            inputs[self.input_slot(p)].copy_from_slice(values);
            inputs[self.score_slot(p)].copy_from_slice(scores);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{FIRST_ROWS, capacity};

    #[test]
    fn a_plane_grows_by_an_eighth_and_by_a_first_size_at_least() {
        for (rows, expected) in [(0, 256), (256, 256), (257, 512), (2049, 2304), (2305, 2816)] {
            assert_eq!(capacity(rows), expected, "{rows} rows");
        }
        for rows in [5_000, 32_769, 262_144] {
            let capacity = capacity(rows);
            assert!((rows..=rows + rows / 8 + FIRST_ROWS).contains(&capacity), "{capacity}");
        }
    }
}
