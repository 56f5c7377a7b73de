//! What a session's cache must hold, and the comparison of every stage with plain Rust.

use std::{collections::HashMap, ops::Range};

use ds4_cpu::reference::rms_norm;
use ds4_engine::{
    backend::Cache as _,
    layout::{CompressorInputs, Frontier, LayerFrontier, Plane, PlaneLayout, StateLayout},
    rope::{Rotation, rotation},
    rows::{CacheRounding, RowCodec},
};
use ds4_model::config::{Config, HEAD_DIM, INDEX_DIM, LayerKind, WINDOW};
use half::f16;

use super::{EPSILON, Given, Harness, LATENT, LAYER, RAW_OFFSET, RAW_STRIDE, Shape, Vector, Work};
use super::{head_stride, normals};
use crate::{
    cache::Cache,
    device::Device,
    stages::attention_tests::reference::{
        attention, check_attention, check_rows, finish, pool, scores, top_k,
    },
};

/// A session's cache, and what it must hold.
pub struct Session {
    pub cache: Cache,
    layout: StateLayout,
    shape: Shape,
    truth: Truth,
}

/// The append-only part of one layer's cache.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerRows {
    pub rows: Vec<u8>,
    pub index_keys: Vec<u8>,
}

#[derive(Clone, Default)]
struct Truth {
    position: usize,
    /// Stored rows by position.
    kv_rows: HashMap<usize, Vec<u8>>,
    main: Compressed,
    index: Compressed,
}

/// What a compressor took and made.
#[derive(Clone, Default)]
struct Compressed {
    /// Values and scores by position.
    inputs: HashMap<usize, [Vec<f32>; 2]>,
    rows: Vec<Vec<u8>>,
}

impl Session {
    pub fn new(device: &Device, config: &Config, shape: Shape) -> Self {
        let layout = StateLayout::new(config, shape.rounding);
        let cache = Cache::new(device, &layout, 0).expect("memory for a session");
        Session { cache, layout, shape, truth: Truth::default() }
    }

    /// The tested layer's planes.
    fn planes(&self) -> [Option<PlaneLayout>; 2] {
        let layer = &self.layout.layers()[LAYER];
        [layer.rows, layer.index_keys]
    }

    /// Rows of a layer after `tokens` tokens, as the device has them.
    pub fn layer_rows(&self, layer: usize, tokens: usize) -> LayerRows {
        let planes = &self.layout.layers()[layer];
        let read = |plane, layout: Option<PlaneLayout>| {
            let rows = layout.map_or(0, |p| p.rows(tokens));
            self.cache.read_rows(layer, plane, 0..rows).expect("rows")
        };
        LayerRows {
            rows: read(Plane::Rows, planes.rows),
            index_keys: read(Plane::IndexKeys, planes.index_keys),
        }
    }

    pub fn position(&self) -> usize {
        self.truth.position
    }

    pub fn rewind(&mut self, position: usize) {
        self.cache.rewind(position);
        self.truth.position = position;
        let rows = position.checked_div(self.shape.kind.ratio()).unwrap_or(0);
        self.truth.main.rows.truncate(rows);
        self.truth.index.rows.truncate(rows);
    }

    /// Puts the session at `position` with random rows.
    pub fn fill(&mut self, random: &mut fastrand::Rng, position: usize) {
        let (planes, rounding) = (self.planes(), self.shape.rounding);
        let width = self.shape.kind.compressor_width();
        let kv_rows = (position.saturating_sub(WINDOW)..position)
            .map(|p| (p, stored(random, rounding.kv_codec())))
            .collect();
        let mut compressed = |width, codec, plane: Option<PlaneLayout>| Compressed {
            inputs: tail(plane, position)
                .map(|p| (p, [normals(random, width), normals(random, width)]))
                .collect(),
            rows: (0..plane.map_or(0, |p| p.rows(position)))
                .map(|_| stored(random, codec))
                .collect(),
        };
        let [rows, index_keys] = planes;
        let main = compressed(width, rounding.kv_codec(), rows);
        let index = compressed(2 * INDEX_DIM, rounding.index_codec(), index_keys);
        self.truth = Truth { position, kv_rows, main, index };
        let expected = self.expected();
        self.put(&expected.0, &expected.1);
        assert!(self.save() == expected, "state after filling");
    }

    /// Makes an index key, stored as f32, so many times as large.
    pub fn enlarge_key(&mut self, key: usize, factor: f32) {
        let row: &mut [f32] = bytemuck::cast_slice_mut(&mut self.truth.index.rows[key]);
        row.iter_mut().for_each(|x| *x *= factor);
        let expected = self.expected();
        self.put(&expected.0, &expected.1);
    }

    /// All state, as it leaves the device.
    pub fn save(&self) -> (Frontier, Vec<LayerRows>) {
        let frontier = self.cache.read_frontier(self.position()).expect("a frontier");
        let rows = (0..=LAYER).map(|l| self.layer_rows(l, self.position())).collect();
        (frontier, rows)
    }

    /// Takes over the state of another session.
    pub fn restore(&mut self, other: &Session, frontier: &Frontier, rows: &[LayerRows]) {
        self.truth = other.truth.clone();
        self.put(frontier, rows);
    }

    fn put(&mut self, frontier: &Frontier, rows: &[LayerRows]) {
        for (l, rows) in rows.iter().enumerate() {
            for (plane, bytes) in [(Plane::Rows, &rows.rows), (Plane::IndexKeys, &rows.index_keys)]
            {
                self.cache.write_rows(l, plane, 0, bytes).expect("memory for rows");
            }
        }
        self.cache.write_frontier(frontier).expect("a copy to the device");
    }

    /// What [`save`](Self::save) must give; the first layer was never written.
    fn expected(&self) -> (Frontier, Vec<LayerRows>) {
        let (truth, position) = (&self.truth, self.position());
        let row_bytes = self.shape.rounding.kv_codec().row_bytes();
        let untouched = LayerFrontier {
            window: vec![0; position.min(WINDOW) * row_bytes],
            compressor: CompressorInputs::default(),
            indexer: CompressorInputs::default(),
        };
        let inputs_of = |c: &Compressed, plane| {
            let inputs =
                |i: usize| tail(plane, position).flat_map(|p| c.inputs[&p][i].clone()).collect();
            CompressorInputs { values: inputs(0), scores: inputs(1) }
        };
        let [rows, index_keys] = self.planes();
        let layer = LayerFrontier {
            window: (position.saturating_sub(WINDOW)..position)
                .flat_map(|p| truth.kv_rows[&p].clone())
                .collect(),
            compressor: inputs_of(&truth.main, rows),
            indexer: inputs_of(&truth.index, index_keys),
        };
        let rows =
            LayerRows { rows: truth.main.rows.concat(), index_keys: truth.index.rows.concat() };
        (Frontier { position, layers: vec![untouched, layer] }, vec![LayerRows::default(), rows])
    }
}

/// Positions whose inputs a plane's compressor still needs.
fn tail(plane: Option<PlaneLayout>, position: usize) -> Range<usize> {
    plane.map_or(0..0, |plane| plane.tail(position))
}

fn stored(random: &mut fastrand::Rng, codec: RowCodec) -> Vec<u8> {
    let mut bytes = vec![0; codec.row_bytes()];
    codec.encode(&normals(random, codec.width()), &mut bytes);
    bytes
}

impl Harness {
    /// Compares a step's results, stage by stage, and records them.
    pub(super) fn check(&mut self, work: &Work, sessions: &mut [Session], inputs: &Given) {
        self.check_latents(work, inputs);
        self.check_key_values(work, sessions, inputs);
        if self.shape.kind != LayerKind::Swa {
            self.check_compressor(sessions, inputs, false);
        }
        if self.shape.kind == LayerKind::Csa {
            self.check_compressor(sessions, inputs, true);
            self.check_selection(work, sessions, inputs);
        }
        self.check_attention(work, sessions, inputs);
        for (i, session) in sessions.iter_mut().enumerate() {
            let last = inputs.rows.iter().rfind(|row| row.session == i);
            session.truth.position = last.map_or(session.position(), |row| row.position + 1);
            assert!(session.save() == session.expected(), "state of session {i}");
        }
    }

    /// Two halves hold 22 bits of a latent.
    fn check_latents(&self, work: &Work, inputs: &Given) {
        let download = |b| self.device.download(b, 0..b.len()).expect("latents");
        let (high, low) = (download(&work.latent), download(&work.latent_low));
        for (i, raw) in inputs.raw_latent.chunks_exact(LATENT + 4).enumerate() {
            let mut expected = raw[..LATENT].to_vec();
            rms_norm(&mut expected, Some(&self.weights.latent_norm.host), EPSILON);
            let halves = chunk(&high, i, LATENT).iter().zip(chunk(&low, i, LATENT));
            for (x, (high, low)) in expected.iter().zip(halves) {
                let found = f16::from_bits(*high).to_f32() + f16::from_bits(*low).to_f32();
                assert!((x - found).abs() <= 1e-6 * x.abs().max(0.1), "{found}, expected {x}");
            }
        }
    }

    fn check_key_values(&self, work: &Work, sessions: &mut [Session], inputs: &Given) {
        let codec = self.shape.rounding.kv_codec();
        let stored = self.device.download(&work.kv_rows, 0..work.kv_rows.len()).expect("rows");
        let mut expected = Vec::new();
        for (i, row) in inputs.rows.iter().enumerate() {
            let raw = inputs.raw_kv[i * RAW_STRIDE + RAW_OFFSET..][..HEAD_DIM].to_vec();
            let rotation = self.rotation(row.position);
            expected.extend(finish(raw, &self.weights.kv_norm.host, EPSILON, &rotation));
            let bytes = chunk(&stored, i, codec.row_bytes()).to_vec();
            sessions[row.session].truth.kv_rows.insert(row.position, bytes);
        }
        check_rows("key/value rows", codec, &stored, &expected);
    }

    /// The layer's compressor, or the indexer's.
    fn check_compressor(&self, sessions: &mut [Session], inputs: &Given, index: bool) {
        let (w, shape) = (&self.weights, self.shape);
        let (codec, width, given, bias, norm) = if index {
            let codec = shape.rounding.index_codec();
            (codec, 2 * INDEX_DIM, &inputs.index_inputs, &w.index_bias, &w.index_norm)
        } else {
            let width = shape.kind.compressor_width();
            (shape.rounding.kv_codec(), width, &inputs.inputs, &w.bias, &w.norm)
        };
        let ratio = shape.kind.ratio();
        for (i, session) in sessions.iter_mut().enumerate() {
            let end = inputs.rows.iter().rfind(|row| row.session == i);
            let tokens = end.map_or(session.position(), |row| row.position + 1);
            let rows = session.layer_rows(LAYER, tokens);
            let stored = if index { rows.index_keys } else { rows.rows };
            let part = if index { &mut session.truth.index } else { &mut session.truth.main };
            let (first, mut expected) = (part.rows.len(), Vec::new());
            for (r, row) in inputs.rows.iter().enumerate().filter(|(_, row)| row.session == i) {
                let input = chunk(given, r, 2 * width);
                part.take(row.position, input, ratio, bias);
                if (row.position + 1).is_multiple_of(ratio) {
                    let start = row.position + 1 - ratio;
                    let pooled = part.pool(start, ratio, codec.width());
                    let rotation = rotation(&w.yarn, start);
                    expected.extend(finish(pooled, &norm.host, EPSILON, &rotation));
                    let c = row.position / ratio;
                    assert_eq!(part.rows.len(), c, "row {c} of session {i}");
                    part.rows.push(chunk(&stored, c, codec.row_bytes()).to_vec());
                }
            }
            let what = if index { "index keys" } else { "compressed rows" };
            check_rows(what, codec, &stored[first * codec.row_bytes()..], &expected);
        }
    }

    fn check_selection(&mut self, work: &Work, sessions: &[Session], inputs: &Given) {
        let (shape, device) = (self.shape, &self.device);
        let [decoded, others] = &work.key_scores;
        let of_decoded = 0..work.decode_rows * shape.keys;
        let mut found = device.download(decoded, of_decoded).expect("scores");
        found.extend(device.download(others, 0..others.len()).expect("scores"));
        let arrivals = device.download(&work.arrivals, 0..work.rows).expect("counters");
        assert!(arrivals.iter().all(|&count| count == 0), "blocks that arrived: {arrivals:?}");
        let selected = device.download(&work.selected, 0..work.selected.len()).expect("rows");
        let (mut checked, mut off) = (0, 0);
        for (i, row) in inputs.rows.iter().enumerate() {
            let visible = (row.position + 1) / shape.kind.ratio();
            if visible <= shape.top_k {
                continue;
            }
            let keys = &sessions[row.session].truth.index.rows[..visible];
            let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
            let query = chunk(&inputs.index_queries, i, shape.index_heads * INDEX_DIM);
            let weights = chunk(&inputs.head_weights, i, head_stride(shape.index_heads));
            let weights = &weights[..shape.index_heads];
            let rotation = rotation(&self.weights.yarn, row.position);
            let expected = scores(query, weights, &keys, shape.rounding, &rotation);
            let found = &found[i * shape.keys..][..visible];
            checked += 1;
            off += usize::from(!close_scores(shape, found, &expected));
            let chosen = top_k(found, shape.top_k);
            assert_eq!(chunk(&selected, i, shape.top_k), chosen, "rows chosen for row {i}");
            self.ties += usize::from(tied(found, &chosen));
        }
        // A rounded query may fall the other way in one element, which shifts all of its scores.
        assert!(off * 50 <= checked.max(50), "scores of {off} queries of {checked} are off");
    }

    fn check_attention(&self, work: &Work, sessions: &[Session], inputs: &Given) {
        let (shape, codec) = (self.shape, self.shape.rounding.kv_codec());
        let out = self.device.download(&work.out, 0..work.out.len()).expect("attention");
        let selected = self.device.download(&work.selected, 0..work.selected.len());
        let selected = selected.expect("rows");
        let width = shape.heads * HEAD_DIM;
        for (i, row) in inputs.rows.iter().enumerate() {
            let truth = &sessions[row.session].truth;
            let visible = (row.position + 1).checked_div(shape.kind.ratio()).unwrap_or(0);
            let mut rows: Vec<&[u8]> = ((row.position + 1).saturating_sub(WINDOW)..=row.position)
                .map(|p| truth.kv_rows[&p].as_slice())
                .collect();
            if shape.kind == LayerKind::Csa && visible > shape.top_k {
                let chosen = chunk(&selected, i, shape.top_k);
                rows.extend(chosen.iter().map(|c| truth.main.rows[*c as usize].as_slice()));
            } else {
                rows.extend(truth.main.rows[..visible].iter().map(Vec::as_slice));
            }
            let query = chunk(&inputs.queries, i, width);
            let (sinks, rotation) = (&self.weights.sinks.host, self.rotation(row.position));
            let expected = attention(query, &rows, codec, sinks, EPSILON, &rotation);
            let what = format!("attention of row {i} at position {}", row.position);
            check_attention(&what, chunk(&out, i, width), &expected);
        }
    }

    fn rotation(&self, position: usize) -> Rotation {
        match self.shape.kind {
            LayerKind::Swa => rotation(&self.weights.plain, position),
            LayerKind::Csa | LayerKind::Hca => rotation(&self.weights.yarn, position),
        }
    }
}

impl Compressed {
    /// Records a position's values and scores, which lie side by side in `input`.
    fn take(&mut self, position: usize, input: &[f32], ratio: usize, bias: &Vector) {
        let (values, scores) = input.split_at(input.len() / 2);
        let bias = chunk(&bias.host, position % ratio, scores.len());
        let scores = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
        self.inputs.insert(position, [values.to_vec(), scores]);
    }

    /// The row of the window of `ratio` tokens from `start`.
    fn pool(&self, start: usize, ratio: usize, width: usize) -> Vec<f32> {
        let slot = |p: usize, at: usize| {
            let [values, scores] = &self.inputs[&p];
            (&values[at..at + width], &scores[at..at + width])
        };
        let overlapping = ratio == 4;
        let previous = if overlapping { start.saturating_sub(ratio)..start } else { 0..0 };
        let own = if overlapping { width } else { 0 };
        let slots: Vec<_> = previous
            .map(|p| slot(p, 0))
            .chain((start..start + ratio).map(|p| slot(p, own)))
            .collect();
        pool(&slots, width)
    }
}

/// With rounding, products are exact and only sums differ; halves of f32 queries and keys are off
/// by up to 2^-11 each.
fn close_scores(shape: Shape, found: &[f32], expected: &[f32]) -> bool {
    let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
    let bound = match shape.rounding {
        CacheRounding::On => 1e-5,
        CacheRounding::Off => 1.0 / 1024.0,
    };
    found.iter().zip(expected).all(|(x, y)| (x - y).abs() <= bound * largest)
}

/// Whether a row that was not chosen scores as well as one that was.
fn tied(scores: &[f32], chosen: &[u32]) -> bool {
    let worst = chosen.iter().map(|c| scores[*c as usize]).fold(f32::INFINITY, f32::min);
    scores.iter().filter(|s| **s >= worst).count() > chosen.len()
}

fn chunk<T>(x: &[T], i: usize, width: usize) -> &[T] {
    &x[i * width..(i + 1) * width]
}
