//! Cached state of one session: rings for the part that later tokens overwrite, pages for the rest.
//!
//! Rings are addressed by position modulo a capacity that exceeds the need by
//! [`MAX_REWIND`](ds4_engine::MAX_REWIND), so that a short rewind only truncates row counts: a slot
//! is always written again before it is read. Everything grows with use. Forks share full pages.

use std::{ops::Range, sync::Arc};

use ds4_engine::{
    backend::{self, SavedFrontier, StageResult, own_frontier},
    layout::{
        CompressorInputs, Frontier, LayerFrontier, LayerLayout, Plane, PlaneLayout, StateLayout,
        WINDOW_SLOTS, window_positions,
    },
    rows::RowCodec,
};

/// KV state of one session.
#[derive(Clone)]
pub struct Cache {
    pub(crate) layers: Vec<LayerCache>,
}

/// KV state of one layer.
#[derive(Clone)]
pub(crate) struct LayerCache {
    /// Key/value rows of the sliding window.
    pub window: RowRing,
    /// Compressed rows, in CSA and HCA layers.
    pub compressed: Option<Compressed>,
    /// Index keys, in CSA layers.
    pub index: Option<Compressed>,
}

/// Rows made by a compressor, and the inputs of those to come.
#[derive(Clone)]
pub(crate) struct Compressed {
    layout: PlaneLayout,
    pub inputs: InputRing,
    pub rows: RowStore,
}

/// A frontier in the memory of the process.
struct Saved(Frontier);

impl SavedFrontier for Saved {
    fn bytes(&self) -> u64 {
        let inputs = |i: &CompressorInputs| size_of_val(&i.values[..]) + size_of_val(&i.scores[..]);
        let layer = |l: &LayerFrontier| l.window.len() + inputs(&l.compressor) + inputs(&l.indexer);
        self.0.layers.iter().map(|l| layer(l) as u64).sum()
    }
}

/// Bytes of a cache that holds `tokens` tokens: compressed rows come in whole pages.
pub(crate) fn bytes_at(layout: &StateLayout, tokens: usize) -> u64 {
    let unused = |p: PlaneLayout| {
        let rows = p.rows(tokens);
        (rows.next_multiple_of(RowStore::PAGE) - rows) * p.row_bytes
    };
    let planes = layout.layers().iter().flat_map(LayerLayout::planes);
    layout.bytes(tokens) + planes.map(|(_, p)| unused(p) as u64).sum::<u64>()
}

impl Cache {
    pub(crate) fn new(layout: &StateLayout) -> Self {
        let rounding = layout.rounding();
        let layer = |l: &LayerLayout| LayerCache {
            window: RowRing::new(rounding.kv_codec()),
            compressed: l.rows.map(|p| Compressed::new(p, rounding.kv_codec())),
            index: l.index_keys.map(|p| Compressed::new(p, rounding.index_codec())),
        };
        Cache { layers: layout.layers().iter().map(layer).collect() }
    }

    fn plane(&self, layer: usize, plane: Plane) -> Option<&Compressed> {
        let layer = &self.layers[layer];
        match plane {
            Plane::Rows => layer.compressed.as_ref(),
            Plane::IndexKeys => layer.index.as_ref(),
        }
    }

    fn truncate_rows(&mut self, position: usize) {
        for c in self.layers.iter_mut().flat_map(LayerCache::compressors_mut) {
            c.rows.truncate(c.layout.rows(position));
        }
    }
}

impl backend::Cache for Cache {
    fn bytes(&self) -> u64 {
        self.layers.iter().map(|l| l.bytes() as u64).sum()
    }

    /// Nothing to do ahead of time: pages come with use.
    fn reserve(&mut self, _tokens: usize) -> StageResult {
        Ok(())
    }

    fn rewind(&mut self, position: usize) {
        self.truncate_rows(position);
    }

    fn fork(&self, position: usize) -> StageResult<Box<dyn backend::Cache>> {
        let mut fork = self.clone();
        fork.truncate_rows(position);
        Ok(Box::new(fork))
    }

    fn save_frontier(&self, position: usize) -> StageResult<Box<dyn SavedFrontier>> {
        Ok(Box::new(Saved(self.read_frontier(position)?)))
    }

    fn restore_frontier(&mut self, saved: &dyn SavedFrontier) -> StageResult {
        let Saved(frontier) = own_frontier(saved)?;
        self.write_frontier(frontier)
    }

    fn read_frontier(&self, position: usize) -> StageResult<Frontier> {
        let layers = self.layers.iter().map(|l| l.frontier(position)).collect();
        Ok(Frontier { position, layers })
    }

    fn write_frontier(&mut self, frontier: &Frontier) -> StageResult {
        self.truncate_rows(frontier.position);
        for (layer, saved) in self.layers.iter_mut().zip(&frontier.layers) {
            layer.set_frontier(frontier.position, saved);
        }
        Ok(())
    }

    fn read_rows(&self, layer: usize, plane: Plane, rows: Range<usize>) -> StageResult<Vec<u8>> {
        Ok(self.plane(layer, plane).map_or_else(Vec::new, |c| c.rows.read(rows)))
    }

    fn write_rows(
        &mut self,
        layer: usize,
        plane: Plane,
        first: usize,
        bytes: &[u8],
    ) -> StageResult {
        let layer = &mut self.layers[layer];
        let compressed = match plane {
            Plane::Rows => &mut layer.compressed,
            Plane::IndexKeys => &mut layer.index,
        };
        if let Some(c) = compressed {
            c.rows.truncate(first);
            c.rows.append(bytes);
        }
        Ok(())
    }
}

impl LayerCache {
    fn bytes(&self) -> usize {
        let compressors = [&self.compressed, &self.index].into_iter().flatten();
        self.window.bytes.len() + compressors.map(Compressed::bytes).sum::<usize>()
    }

    fn compressors_mut(&mut self) -> impl Iterator<Item = &mut Compressed> {
        self.compressed.iter_mut().chain(&mut self.index)
    }

    fn frontier(&self, position: usize) -> LayerFrontier {
        let inputs = |c: &Option<Compressed>| c.as_ref().map(|c| c.tail(position));
        LayerFrontier {
            window: window_positions(position).flat_map(|p| self.window.get(p)).copied().collect(),
            compressor: inputs(&self.compressed).unwrap_or_default(),
            indexer: inputs(&self.index).unwrap_or_default(),
        }
    }

    fn set_frontier(&mut self, position: usize, saved: &LayerFrontier) {
        let rows = saved.window.chunks_exact(self.window.codec.row_bytes());
        for (p, row) in window_positions(position).zip(rows) {
            self.window.slot(p).copy_from_slice(row);
        }
        let inputs = [&saved.compressor, &saved.indexer];
        for (c, inputs) in [&mut self.compressed, &mut self.index].into_iter().zip(inputs) {
            if let Some(c) = c {
                c.set_tail(position, inputs);
            }
        }
    }
}

impl Compressed {
    fn new(layout: PlaneLayout, codec: RowCodec) -> Self {
        let inputs = InputRing::new(layout.input_width, layout.ring_slots());
        Compressed { layout, inputs, rows: RowStore::new(codec) }
    }

    /// Tokens of a row.
    pub fn ratio(&self) -> usize {
        self.layout.ratio
    }

    fn bytes(&self) -> usize {
        let inputs = &self.inputs;
        self.rows.bytes() + 4 * (inputs.values.len() + inputs.scores.len())
    }

    fn tail(&self, position: usize) -> CompressorInputs {
        let positions = self.layout.tail(position);
        let collect = |get: fn(&InputRing, usize) -> &[f32]| {
            positions.clone().flat_map(|p| get(&self.inputs, p)).copied().collect()
        };
        CompressorInputs { values: collect(InputRing::values), scores: collect(InputRing::scores) }
    }

    fn set_tail(&mut self, position: usize, saved: &CompressorInputs) {
        let width = self.inputs.width;
        let inputs = saved.values.chunks_exact(width).zip(saved.scores.chunks_exact(width));
        for (p, (values, scores)) in self.layout.tail(position).zip(inputs) {
            self.inputs.set(p, values, scores);
        }
    }
}

/// Stored rows of the most recent positions.
#[derive(Clone)]
pub(crate) struct RowRing {
    pub codec: RowCodec,
    bytes: Vec<u8>,
}

impl RowRing {
    fn new(codec: RowCodec) -> Self {
        RowRing { codec, bytes: Vec::new() }
    }

    /// The row of a position that was written and not yet overwritten.
    pub fn get(&self, position: usize) -> &[u8] {
        &self.bytes[self.range(position)]
    }

    /// Stores the rows of consecutive positions; only the last ones that fit are kept.
    pub fn extend(&mut self, start: usize, rows: &[f32]) {
        let width = self.codec.width();
        let skip = (rows.len() / width).saturating_sub(WINDOW_SLOTS);
        for (i, row) in rows.chunks_exact(width).enumerate().skip(skip) {
            let codec = self.codec;
            codec.encode(row, self.slot(start + i));
        }
    }

    fn slot(&mut self, position: usize) -> &mut [u8] {
        let range = self.range(position);
        if range.end > self.bytes.len() {
            self.bytes.resize(range.end, 0);
        }
        &mut self.bytes[range]
    }

    fn range(&self, position: usize) -> Range<usize> {
        let (slot, size) = (position % WINDOW_SLOTS, self.codec.row_bytes());
        slot * size..(slot + 1) * size
    }
}

/// Compressor inputs of the most recent positions.
#[derive(Clone)]
pub(crate) struct InputRing {
    width: usize,
    capacity: usize,
    values: Vec<f32>,
    scores: Vec<f32>,
}

impl InputRing {
    fn new(width: usize, capacity: usize) -> Self {
        InputRing { width, capacity, values: Vec::new(), scores: Vec::new() }
    }

    pub fn values(&self, position: usize) -> &[f32] {
        &self.values[self.range(position)]
    }

    pub fn scores(&self, position: usize) -> &[f32] {
        &self.scores[self.range(position)]
    }

    /// Stores the inputs of consecutive positions; only the last ones that fit are kept.
    pub fn extend(&mut self, start: usize, values: &[f32], scores: &[f32]) {
        let skip = (values.len() / self.width).saturating_sub(self.capacity);
        let inputs = values.chunks_exact(self.width).zip(scores.chunks_exact(self.width));
        for (i, (values, scores)) in inputs.enumerate().skip(skip) {
            self.set(start + i, values, scores);
        }
    }

    fn set(&mut self, position: usize, values: &[f32], scores: &[f32]) {
        let range = self.range(position);
        if range.end > self.values.len() {
            self.values.resize(range.end, 0.0);
            self.scores.resize(range.end, 0.0);
        }
        self.values[range.clone()].copy_from_slice(values);
        self.scores[range].copy_from_slice(scores);
    }

    fn range(&self, position: usize) -> Range<usize> {
        let slot = position % self.capacity;
        slot * self.width..(slot + 1) * self.width
    }
}

/// Append-only rows in storage format, in pages so that growing copies nothing.
#[derive(Clone)]
pub(crate) struct RowStore {
    codec: RowCodec,
    /// Forks share pages until one of them appends to a page.
    pages: Vec<Arc<Vec<u8>>>,
    len: usize,
}

impl RowStore {
    /// Rows of a page: 146 KiB of packed key/value rows.
    const PAGE: usize = 256;

    pub fn new(codec: RowCodec) -> Self {
        RowStore { codec, pages: Vec::new(), len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn width(&self) -> usize {
        self.codec.width()
    }

    /// Appends a row.
    pub fn push(&mut self, row: &[f32]) {
        let codec = self.codec;
        codec.encode(row, self.push_slot());
    }

    /// Reads row `i`.
    pub fn decode(&self, i: usize, out: &mut [f32]) {
        let size = self.codec.row_bytes();
        let start = i % Self::PAGE * size;
        self.codec.decode(&self.pages[i / Self::PAGE][start..start + size], out);
    }

    fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.pages.truncate(self.len.div_ceil(Self::PAGE));
    }

    fn bytes(&self) -> usize {
        self.pages.len() * Self::PAGE * self.codec.row_bytes()
    }

    fn push_slot(&mut self) -> &mut [u8] {
        let size = self.codec.row_bytes();
        if self.len == self.pages.len() * Self::PAGE {
            self.pages.push(Arc::new(vec![0; Self::PAGE * size]));
        }
        let (page, start) = (self.len / Self::PAGE, self.len % Self::PAGE * size);
        self.len += 1;
        &mut Arc::make_mut(&mut self.pages[page])[start..start + size]
    }

    fn read(&self, rows: Range<usize>) -> Vec<u8> {
        let size = self.codec.row_bytes();
        let row = |i: usize| &self.pages[i / Self::PAGE][i % Self::PAGE * size..][..size];
        rows.flat_map(row).copied().collect()
    }

    fn append(&mut self, bytes: &[u8]) {
        for row in bytes.chunks_exact(self.codec.row_bytes()) {
            self.push_slot().copy_from_slice(row);
        }
    }
}
