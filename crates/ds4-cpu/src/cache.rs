//! Cached state of one session: rings for what later tokens overwrite, pages for what they don't.
//!
//! Rings are addressed by position modulo a capacity that exceeds the need by [`MAX_REWIND`], so
//! that a short rewind is nothing but truncated row counts: a slot is always written again before
//! it is read. Everything grows with use.

use std::ops::Range;

use ds4_engine::{
    MAX_REWIND,
    backend::{CompressorInputs, Frontier, LayerFrontier, LayerRows, compressor_tail},
    rows::{CacheRounding, RowCodec},
};
use ds4_model::config::{Config, INDEX_DIM, LayerKind, WINDOW};

/// KV state of one session.
pub struct Cache {
    pub(crate) layers: Vec<LayerCache>,
}

/// KV state of one layer.
pub(crate) struct LayerCache {
    /// Key/value rows of the sliding window.
    pub window: RowRing,
    /// Compressed rows, in CSA and HCA layers.
    pub compressed: Option<Compressed>,
    /// Index keys, in CSA layers.
    pub index: Option<Compressed>,
}

/// Rows made by a compressor, and the inputs of those to come.
pub(crate) struct Compressed {
    pub ratio: usize,
    pub inputs: InputRing,
    pub rows: RowStore,
}

impl Cache {
    pub(crate) fn new(config: &Config, rounding: CacheRounding) -> Self {
        let layer = |kind: LayerKind| LayerCache {
            window: RowRing::new(rounding.kv_codec()),
            compressed: (kind != LayerKind::Swa)
                .then(|| Compressed::new(kind, kind.compressor_width(), rounding.kv_codec())),
            index: (kind == LayerKind::Csa)
                .then(|| Compressed::new(kind, 2 * INDEX_DIM, rounding.index_codec())),
        };
        Cache { layers: config.layers.iter().map(|l| layer(l.kind)).collect() }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
    }

    pub(crate) fn rewind(&mut self, position: usize) {
        for c in self.layers.iter_mut().flat_map(LayerCache::compressors_mut) {
            c.rows.truncate(position / c.ratio);
        }
    }

    pub(crate) fn frontier(&self, position: usize) -> Frontier {
        let layers = self.layers.iter().map(|l| l.frontier(position)).collect();
        Frontier { position, layers }
    }

    pub(crate) fn set_frontier(&mut self, frontier: &Frontier) {
        self.rewind(frontier.position);
        for (layer, saved) in self.layers.iter_mut().zip(&frontier.layers) {
            layer.set_frontier(frontier.position, saved);
        }
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

    pub(crate) fn rows(&self) -> LayerRows {
        let bytes = |c: &Option<Compressed>| c.as_ref().map(|c| c.rows.to_bytes());
        LayerRows {
            rows: bytes(&self.compressed).unwrap_or_default(),
            index_keys: bytes(&self.index).unwrap_or_default(),
        }
    }

    pub(crate) fn set_rows(&mut self, saved: &LayerRows) {
        for (c, bytes) in [&mut self.compressed, &mut self.index]
            .into_iter()
            .zip([&saved.rows, &saved.index_keys])
        {
            if let Some(c) = c {
                c.rows.set_bytes(bytes);
            }
        }
    }
}

/// The window's positions after `position` tokens.
fn window_positions(position: usize) -> Range<usize> {
    position.saturating_sub(WINDOW)..position
}

impl Compressed {
    fn new(kind: LayerKind, width: usize, codec: RowCodec) -> Self {
        // Inputs of the window being filled, and at ratio 4 of the one before it.
        let needed = if kind == LayerKind::Csa { 2 * kind.ratio() } else { kind.ratio() };
        Compressed {
            ratio: kind.ratio(),
            inputs: InputRing::new(width, needed + MAX_REWIND),
            rows: RowStore::new(codec),
        }
    }

    fn bytes(&self) -> usize {
        let inputs = &self.inputs;
        self.rows.bytes() + 4 * (inputs.values.len() + inputs.scores.len())
    }

    fn tail(&self, position: usize) -> CompressorInputs {
        let positions = compressor_tail(self.ratio, position);
        let collect = |get: fn(&InputRing, usize) -> &[f32]| {
            positions.clone().flat_map(|p| get(&self.inputs, p)).copied().collect()
        };
        CompressorInputs { values: collect(InputRing::values), scores: collect(InputRing::scores) }
    }

    fn set_tail(&mut self, position: usize, saved: &CompressorInputs) {
        let width = self.inputs.width;
        let inputs = saved.values.chunks_exact(width).zip(saved.scores.chunks_exact(width));
        for (p, (values, scores)) in compressor_tail(self.ratio, position).zip(inputs) {
            self.inputs.set(p, values, scores);
        }
    }
}

/// Stored rows of the most recent positions.
pub(crate) struct RowRing {
    pub codec: RowCodec,
    bytes: Vec<u8>,
}

impl RowRing {
    const CAPACITY: usize = WINDOW + MAX_REWIND;

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
        let skip = (rows.len() / width).saturating_sub(Self::CAPACITY);
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
        let (slot, size) = (position % Self::CAPACITY, self.codec.row_bytes());
        slot * size..(slot + 1) * size
    }
}

/// Compressor inputs of the most recent positions.
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
pub(crate) struct RowStore {
    codec: RowCodec,
    pages: Vec<Vec<u8>>,
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
            self.pages.push(vec![0; Self::PAGE * size]);
        }
        let (page, start) = (self.len / Self::PAGE, self.len % Self::PAGE * size);
        self.len += 1;
        &mut self.pages[page][start..start + size]
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.pages.concat();
        bytes.truncate(self.len * self.codec.row_bytes());
        bytes
    }

    fn set_bytes(&mut self, bytes: &[u8]) {
        self.truncate(0);
        for row in bytes.chunks_exact(self.codec.row_bytes()) {
            self.push_slot().copy_from_slice(row);
        }
    }
}
