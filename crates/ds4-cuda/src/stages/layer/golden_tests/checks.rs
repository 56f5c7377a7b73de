//! The stages of one step: each is given what the plain one is given, and compared.

use ds4_cpu::{
    CpuStep,
    reference::{attention::index_scores, products::matmul, rms_norm},
};
use ds4_engine::{
    backend::{Batch, Cache as _, Span, Step as _, Sublayer},
    layout::Plane,
    rope::{PAIRS, Rotation},
    rows::CacheRounding,
};
use ds4_model::config::{HEAD_DIM, INDEX_DIM, LayerKind, STREAMS};

use super::{
    closeness::{
        MOST_DEVIATIONS, Rows, check_choice, halves, pair_products, pair_values, pairs, singles,
        split, values,
    },
    on_device::OnDevice,
};
use crate::{
    device::Buffer,
    scratch::{Scratch, key_capacity},
    stages::{
        attention_tests::reference::{check_attention, decode, top_k},
        layer::{CudaStep, Shape},
    },
};

/// One step on both sides.
pub struct Step<'a> {
    both: &'a mut OnDevice,
    plain: CpuStep<'a>,
    batch: &'a Batch,
    shape: Shape,
    rows: Rows,
    /// The sublayer whose output the plain path has not spread over the streams yet.
    pending: Option<Sublayer>,
}

impl<'a> Step<'a> {
    pub fn new(both: &'a mut OnDevice, plain: CpuStep<'a>, batch: &'a Batch) -> Self {
        let shape = Shape::of(batch);
        let rows = Rows { decoded: shape.decode_rows, all: shape.rows };
        Step { both, plain, batch, shape, rows, pending: None }
    }

    /// Embeddings are copied or multiplied once: the same bits. Angles are the same f32, whose
    /// cosine and sine are off by a few of its roundings.
    pub fn embed(&mut self) {
        self.step().embed().unwrap();
        self.plain.embed().unwrap();
        let streams = self.floats(|s| &s.streams, self.plain.x.streams.len());
        assert!(streams == self.plain.x.streams, "embeddings of {:?}", self.batch.spans);
        let rotations = self.plain.x.plain_rotations.iter().chain(&self.plain.x.yarn_rotations);
        let pair = |r: &Rotation, i: usize| [r.cos[i], r.sin[i]];
        let expected: Vec<f32> =
            rotations.flat_map(|r| (0..PAIRS).flat_map(|i| pair(r, i))).collect();
        let found = self.floats(|s| &s.rotations, expected.len());
        let (plain, yarn) = (expected.len() / 2, expected.len());
        for set in [0..plain, plain..yarn] {
            let (pair, bounds) = ((&found[set.clone()], &expected[set]), [singles(4); 2]);
            self.both.closeness.compare("rotations", "all layers", pair, self.rows, bounds);
        }
    }

    /// Spreads what is pending over the streams, and reads them. All of it is f32, and what is read
    /// goes on as pairs of halves; 4 · hidden terms make the mixing weights and the norm.
    pub fn read_streams(&mut self, layer: usize, sublayer: Sublayer) {
        self.upload_streams();
        self.step().hc_pre(layer, sublayer).unwrap();
        self.spread(layer);
        self.plain.hc_pre(layer, sublayer).unwrap();

        let place = format!("{sublayer:?} of layer {layer}");
        let terms = STREAMS * self.hidden();
        let streams = self.floats(|s| &s.streams, self.plain.x.streams.len());
        let post = self.floats(|s| &s.post, self.plain.x.post.len());
        let comb = self.floats(|s| &s.comb, self.plain.x.comb.len());
        let len = self.plain.x.x.len();
        let x = pair_values(&self.halves(|s| &s.x, len), &self.halves(|s| &s.x_low, len));
        for (what, found, expected, bound) in [
            ("streams", &streams, &self.plain.x.streams, singles(8)),
            ("weights of outputs", &post, &self.plain.x.post, singles(terms)),
            ("mixing of streams", &comb, &self.plain.x.comb, singles(terms)),
            ("inputs", &x, &self.plain.x.x, pairs() + singles(terms)),
        ] {
            let closeness = &mut self.both.closeness;
            closeness.compare(what, &place, (found, expected), self.rows, [bound; 2]);
        }
    }

    /// Query latents, queries and key/value rows are made from halves: of the input, in chunks of
    /// the weights, and (queries) of the latent and the result. What compressors make of pairs of
    /// halves is close to f32.
    pub fn project(&mut self, layer: usize) {
        self.upload_input();
        self.step().project_and_compress(layer).unwrap();
        self.plain.project_and_compress(layer).unwrap();

        let place = format!("layer {layer}");
        let len = self.plain.x.q_latent.len();
        let latent =
            pair_values(&self.halves(|s| &s.latent, len), &self.halves(|s| &s.latent_low, len));
        let queries = self.queries(layer);
        let (closeness, rows) = (&mut self.both.closeness, self.rows);
        let bounds = [halves(1), halves(2)];
        closeness.compare("latents", &place, (&latent, &self.plain.x.q_latent), rows, bounds);
        let bounds = [halves(3), halves(5)];
        closeness.compare("queries", &place, (&queries, &self.plain.x.heads), rows, bounds);
        self.check_key_values(&place);
        self.check_compressed(layer);
        self.upload_rows(layer);
    }

    /// Chosen rows, and the scores that they were chosen by.
    pub fn select_rows(&mut self, layer: usize) {
        self.upload_latent();
        let mut step = self.step();
        step.products(&self.both.scratch.layers[layer].queries).unwrap();
        step.select_rows(layer).unwrap();
        self.plain.select_rows(layer).unwrap();
        if self.plain.x.selected.iter().any(Option::is_some) {
            self.check_selection(layer);
        }
    }

    /// The attention of queries, key/value rows and weights in halves, and the stored rows.
    pub fn attend(&mut self, layer: usize) {
        self.upload_attention(layer);
        self.step().attend(layer).unwrap();
        self.plain.attend(layer).unwrap();
        let width = self.plain.x.heads.len() / self.shape.rows;
        let attended = self.halves(|s| &s.attended, self.plain.x.heads.len());
        for (r, (found, expected)) in
            attended.chunks_exact(width).zip(self.plain.x.heads.chunks_exact(width)).enumerate()
        {
            check_attention(&format!("attention of row {r} in layer {layer}"), found, expected);
        }
    }

    /// Attention and what the first product makes of it are halves, and in chunks both weights.
    pub fn project_output(&mut self, layer: usize) {
        let (heads, _) = split(&self.plain.x.heads);
        self.both.device.upload(&mut self.both.scratch.attended, 0, &heads).unwrap();
        self.step().project_output(layer).unwrap();
        self.plain.project_output(layer).unwrap();
        let y = self.floats(|s| &s.y, self.plain.x.y.len());
        let bounds = [halves(2), halves(4)];
        let place = format!("layer {layer}");
        let closeness = &mut self.both.closeness;
        closeness.compare("attention's output", &place, (&y, &self.plain.x.y), self.rows, bounds);
        self.pending = Some(Sublayer::Attention);
    }

    /// The router sees pairs of halves. Gaps between scores of golden sequences are far larger than
    /// its errors: the same experts, and nearly the same weights.
    pub fn route(&mut self, layer: usize) {
        self.upload_input();
        self.step().route(layer).unwrap();
        self.plain.route(layer).unwrap();
        let scratch = &self.both.scratch.experts;
        let ids =
            self.both.device.download(&scratch.ids, 0..self.plain.x.expert_ids.len()).unwrap();
        assert_eq!(ids, self.plain.x.expert_ids, "experts of layer {layer}");
        let weights = self.floats(|s| &s.experts.weights, self.plain.x.expert_weights.len());
        let bounds = [pair_products(self.hidden()); 2];
        let (place, pair) =
            (format!("layer {layer}"), (&weights[..], &self.plain.x.expert_weights[..]));
        self.both.closeness.compare("weights of experts", &place, pair, self.rows, bounds);
    }

    /// Gate and up each see the input in halves or in integers of 15 bits, down the hidden layer in
    /// halves, and when decoding as such integers, too; in chunks weights of all three are halves,
    /// those of Q2_K put together from rounded parts.
    pub fn run_experts(&mut self, layer: usize) {
        let weights = &self.plain.x.expert_weights;
        self.both.device.upload(&mut self.both.scratch.experts.weights, 0, weights).unwrap();
        self.step().run_experts(layer).unwrap();
        self.plain.run_experts(layer).unwrap();
        let (hidden, slots) = (self.hidden(), self.both.model.config.experts_used + 1);
        let parts = self.floats(|s| &s.y, self.plain.x.y.len() * slots);
        let rows = parts.chunks_exact(slots * hidden);
        let sum = |row: &[f32], i: usize| (0..slots).map(|s| row[s * hidden + i]).sum::<f32>();
        let y: Vec<f32> = rows.flat_map(|row| (0..hidden).map(move |i| sum(row, i))).collect();
        let bounds = [halves(5), halves(8)];
        let place = format!("layer {layer}");
        let closeness = &mut self.both.closeness;
        closeness.compare("experts' output", &place, (&y, &self.plain.x.y), self.rows, bounds);
        self.pending = Some(Sublayer::Experts);
    }

    /// The head sees pairs of halves, and in chunks weights in halves.
    pub fn head(mut self) {
        self.upload_streams();
        self.step().head().unwrap();
        self.spread(self.both.model.config.layers.len() - 1);
        self.check_kept();
        let Step { both, mut plain, shape, .. } = self;
        plain.head().unwrap();
        let expected = plain.into_output().logits;
        let logits = both.floats(|s| &s.head.logits, expected.len());
        let bounds = [pair_products(both.model.config.hidden), halves(1)];
        let rows = Rows { decoded: shape.decode_logits, all: shape.logits };
        both.closeness.compare("logits", "the head", (&logits, &expected), rows, bounds);
    }
}

/// What stages are given.
impl Step<'_> {
    /// The streams, and what is pending: in the device's first part of an output, of those that it
    /// adds up.
    fn upload_streams(&mut self) {
        let slots = match self.pending {
            Some(Sublayer::Experts) => self.both.model.config.experts_used + 1,
            _ => 1,
        };
        let hidden = self.hidden();
        let mut y = vec![0.0; slots * self.plain.x.y.len()];
        let parts = y.chunks_exact_mut(slots * hidden).zip(self.plain.x.y.chunks_exact(hidden));
        parts.for_each(|(part, y)| part[..hidden].copy_from_slice(y));
        let (device, scratch, x) = (&self.both.device, &mut self.both.scratch, &self.plain.x);
        device.upload(&mut scratch.streams, 0, &x.streams).unwrap();
        device.upload(&mut scratch.post, 0, &x.post).unwrap();
        device.upload(&mut scratch.comb, 0, &x.comb).unwrap();
        device.upload(&mut scratch.y, 0, &y).unwrap();
    }

    fn upload_input(&mut self) {
        let (high, low) = split(&self.plain.x.x);
        self.both.device.upload(&mut self.both.scratch.x, 0, &high).unwrap();
        self.both.device.upload(&mut self.both.scratch.x_low, 0, &low).unwrap();
    }

    fn upload_latent(&mut self) {
        let (high, low) = split(&self.plain.x.q_latent);
        self.both.device.upload(&mut self.both.scratch.latent, 0, &high).unwrap();
        self.both.device.upload(&mut self.both.scratch.latent_low, 0, &low).unwrap();
    }

    /// Queries without their rotation: it is applied to them again, and their norm is one already.
    fn upload_attention(&mut self, layer: usize) {
        let rotations = self.rotations(layer);
        let mut queries = self.plain.x.heads.clone();
        let width = queries.len() / self.shape.rows;
        for (row, rotation) in queries.chunks_exact_mut(width).zip(rotations) {
            row.chunks_exact_mut(HEAD_DIM).for_each(|q| rotation.inverse().apply(q));
        }
        let codec = self.both.layout.rounding().kv_codec();
        let mut rows = vec![0; self.shape.rows * codec.row_bytes()];
        let stored = rows.chunks_exact_mut(codec.row_bytes());
        stored
            .zip(self.plain.x.kv.chunks_exact(HEAD_DIM))
            .for_each(|(to, row)| codec.encode(row, to));
        let top_k = self.both.model.config.index_top_k;
        let (device, scratch) = (&self.both.device, &mut self.both.scratch);
        device.upload(&mut scratch.queries, 0, &split(&queries).0).unwrap();
        device.upload(&mut scratch.kv_rows, 0, &rows).unwrap();
        for (r, chosen) in self.plain.x.selected.iter().enumerate() {
            if let Some(chosen) = chosen {
                device.upload(&mut scratch.selected, r * top_k, chosen).unwrap();
            }
        }
    }

    /// Compressed rows and index keys, those of the step among them.
    fn upload_rows(&mut self, layer: usize) {
        for span in &self.batch.spans {
            let end = span.start + span.rows.len();
            self.both.copy_rows(layer, span.session, self.plain.caches[span.session], end);
        }
    }

    /// Spreads the plain path's pending output over its streams.
    fn spread(&mut self, layer: usize) {
        if let Some(sublayer) = self.pending.take() {
            self.plain.hc_post(layer, sublayer).unwrap();
        }
    }
}

/// What stages gave.
impl Step<'_> {
    /// The device's queries, normalised and rotated here, as attention does there.
    fn queries(&self, layer: usize) -> Vec<f32> {
        let mut queries = values(&self.halves(|s| &s.queries, self.plain.x.heads.len()));
        let width = queries.len() / self.shape.rows;
        let epsilon = self.both.model.config.rms_epsilon;
        for (row, rotation) in queries.chunks_exact_mut(width).zip(self.rotations(layer)) {
            for q in row.chunks_exact_mut(HEAD_DIM) {
                rms_norm(q, None, epsilon);
                rotation.apply(q);
            }
        }
        queries
    }

    fn check_key_values(&mut self, place: &str) {
        let codec = self.both.layout.rounding().kv_codec();
        let len = self.shape.rows * codec.row_bytes();
        let found = self.both.device.download(&self.both.scratch.kv_rows, 0..len).unwrap();
        let mut expected = vec![0; len];
        let rows = expected.chunks_exact_mut(codec.row_bytes());
        rows.zip(self.plain.x.kv.chunks_exact(HEAD_DIM))
            .for_each(|(to, row)| codec.encode(row, to));
        let (closeness, bounds) = (&mut self.both.closeness, [halves(1), halves(2)]);
        let what = ["key/value rows", "key/value rows, rotated part"];
        closeness.compare_stored(what, place, codec, (&found, &expected), self.rows, bounds);
    }

    /// Rows and index keys that became complete.
    fn check_compressed(&mut self, layer: usize) {
        let place = format!("layer {layer}");
        let bounds = [pair_products(self.hidden()); 2];
        for span in &self.batch.spans {
            let end = span.start + span.rows.len();
            let decoded = self.is_decoded(span);
            let planes = self.both.layer(layer).planes();
            for (plane, layout) in planes {
                let new = layout.rows(span.start)..layout.rows(end);
                let all = new.len();
                let ours = &self.both.caches[span.session];
                let found = ours.read_rows(layer, plane, new.clone()).unwrap();
                let plain = &self.plain.caches[span.session];
                let expected = plain.read_rows(layer, plane, new).unwrap();
                let rows = Rows { decoded: if decoded { all } else { 0 }, all };
                let (what, codec) = match plane {
                    Plane::Rows => (
                        ["compressed rows", "compressed rows, rotated part"],
                        self.both.layout.rounding().kv_codec(),
                    ),
                    Plane::IndexKeys => {
                        (["index keys", ""], self.both.layout.rounding().index_codec())
                    }
                };
                let closeness = &mut self.both.closeness;
                closeness.compare_stored(what, &place, codec, (&found, &expected), rows, bounds);
            }
        }
    }

    /// Choices, and the scores that they were made by.
    fn check_selection(&mut self, layer: usize) {
        let (queries, weights) = self.index_queries(layer);
        let config = &self.both.model.config;
        let (heads, k) = (config.index_heads, config.index_top_k);
        let selected = &self.both.scratch.selected;
        let selected = self.both.device.download(selected, 0..self.shape.rows * k).unwrap();
        let (mut all, mut off) = (0, 0);
        for span in &self.batch.spans {
            let keys = self.index_keys(layer, span);
            for (i, r) in span.rows.clone().enumerate() {
                let Some(expected) = &self.plain.x.selected[r] else { continue };
                let visible = (span.start + i + 1) / LayerKind::Csa.ratio();
                let keys = &keys[..visible * INDEX_DIM];
                let query = Query {
                    heads: &queries[r * heads * INDEX_DIM..][..heads * INDEX_DIM],
                    weights: &weights[r * heads..][..heads],
                };
                let place = format!("rows of position {} in layer {layer}", span.start + i);
                let mut scores = vec![0.0; visible];
                index_scores(query.heads, keys, query.weights, &mut scores);
                assert_eq!(&top_k(&scores, k), expected, "{place}");
                let errors = query.errors(self.both.layout.rounding(), keys);
                if let Some(found) = self.scores(r, visible) {
                    off += usize::from(!check_scores(&place, &found, &scores, &errors));
                    all += 1;
                }
                check_choice(&place, &selected[r * k..][..k], expected, &scores, &errors);
            }
        }
        if self.both.layout.rounding() == CacheRounding::On {
            assert!(off <= 1 + all / 20, "{off} queries of {all} in layer {layer} are off");
        }
    }

    /// The plain path's index queries `[n, heads, 128]` and the weights of their heads.
    fn index_queries(&self, layer: usize) -> (Vec<f32>, Vec<f32>) {
        let indexer = &self.both.model.weights.layers[layer].indexer;
        let indexer = indexer.as_ref().expect("a layer with an indexer");
        let heads = self.both.model.config.index_heads;
        let mut queries = vec![0.0; self.shape.rows * heads * INDEX_DIM];
        matmul(indexer.q_b.view(), &self.plain.x.q_latent, &mut queries);
        let codec = self.both.layout.rounding().index_codec();
        let rows = queries.chunks_exact_mut(heads * INDEX_DIM);
        for (row, rotation) in rows.zip(&self.plain.x.yarn_rotations) {
            for q in row.chunks_exact_mut(INDEX_DIM) {
                rotation.apply(q);
                codec.round_trip(q);
            }
        }
        let mut weights = vec![0.0; self.shape.rows * heads];
        matmul(indexer.head_weights.view(), &self.plain.x.x, &mut weights);
        let scale = ((INDEX_DIM * heads) as f32).sqrt().recip();
        weights.iter_mut().for_each(|w| *w *= scale);
        (queries, weights)
    }

    fn index_keys(&self, layer: usize, span: &Span) -> Vec<f32> {
        let codec = self.both.layout.rounding().index_codec();
        let keys = (span.start + span.rows.len()) / LayerKind::Csa.ratio();
        let plain = &self.plain.caches[span.session];
        let stored = plain.read_rows(layer, Plane::IndexKeys, 0..keys).unwrap();
        decode(codec, &stored.chunks_exact(codec.row_bytes()).collect::<Vec<_>>())
    }

    /// The device's scores of a row, unless those of other rows have taken their place: chunks are
    /// scored last.
    fn scores(&self, row: usize, visible: usize) -> Option<Vec<f32>> {
        let Shape { decode_rows, rows, .. } = self.shape;
        let config = &self.both.model.config;
        let chunks = rows > decode_rows && self.shape.visible > config.index_top_k;
        let (first, capacity) =
            if chunks { (decode_rows, self.shape.visible) } else { (0, key_capacity(config)) };
        let start = row.checked_sub(first)? * capacity;
        let scores = &self.both.scratch.key_scores;
        Some(self.both.device.download(scores, start..start + visible).unwrap())
    }

    /// What sessions keep: windows as they were given, and inputs of compressors, which are made
    /// from pairs of halves.
    fn check_kept(&mut self) {
        let codec = self.both.layout.rounding().kv_codec();
        let bounds = [pair_products(self.hidden()); 2];
        for span in &self.batch.spans {
            let end = span.start + span.rows.len();
            let found = self.both.caches[span.session].read_frontier(end).unwrap();
            let expected = self.plain.caches[span.session].read_frontier(end).unwrap();
            let layers = found.layers.iter().zip(&expected.layers).enumerate();
            for (l, (found, expected)) in layers {
                let place = format!("layer {l}");
                let rows = |bytes: &[u8]| {
                    decode(codec, &bytes.chunks_exact(codec.row_bytes()).collect::<Vec<_>>())
                };
                assert!(rows(&found.window) == rows(&expected.window), "window of {place}");
                let width = self.kind(l).compressor_width();
                for (found, expected, width) in [
                    (&found.compressor, &expected.compressor, width),
                    (&found.indexer, &expected.indexer, 2 * INDEX_DIM),
                ] {
                    let all = expected.values.len() / width.max(1);
                    let rows = Rows { decoded: if self.is_decoded(span) { all } else { 0 }, all };
                    let closeness = &mut self.both.closeness;
                    let pair = (&found.values[..], &expected.values[..]);
                    closeness.compare("inputs of compressors", &place, pair, rows, bounds);
                    let pair = (&found.scores[..], &expected.scores[..]);
                    closeness.compare("their scores", &place, pair, rows, bounds);
                }
            }
        }
    }

    fn is_decoded(&self, span: &Span) -> bool {
        span.rows.start < self.rows.decoded
    }

    fn kind(&self, layer: usize) -> LayerKind {
        self.both.model.config.layers[layer].kind
    }

    fn hidden(&self) -> usize {
        self.both.model.config.hidden
    }

    fn rotations(&self, layer: usize) -> &[Rotation] {
        match self.kind(layer) {
            LayerKind::Swa => &self.plain.x.plain_rotations,
            LayerKind::Csa | LayerKind::Hca => &self.plain.x.yarn_rotations,
        }
    }

    fn step(&self) -> CudaStep<'_> {
        self.both.begin_step(self.shape, self.pending)
    }

    fn floats(&self, pick: impl Fn(&Scratch) -> &Buffer<f32>, len: usize) -> Vec<f32> {
        self.both.floats(pick, len)
    }

    fn halves(&self, pick: impl Fn(&Scratch) -> &Buffer<u16>, len: usize) -> Vec<u16> {
        self.both.device.download(pick(&self.both.scratch), 0..len).unwrap()
    }
}

/// An index query.
struct Query<'a> {
    /// Rotated and rounded `[heads, 128]`.
    heads: &'a [f32],
    weights: &'a [f32],
}

impl Query<'_> {
    /// How far the score of each key may be off. What halves of queries and keys do to it follows
    /// from its terms. With rounded caches terms are exact, but an element of a few queries falls
    /// to the code beside its own, up to a third of the largest.
    fn errors(&self, rounding: CacheRounding, keys: &[f32]) -> Vec<f32> {
        let largest = |x: &[f32]| x.iter().fold(0f32, |m, x| m.max(x.abs()));
        let heads = || self.heads.chunks_exact(INDEX_DIM).zip(self.weights);
        let error = |key: &[f32]| match rounding {
            CacheRounding::Off => {
                let terms =
                    heads().flat_map(|(q, w)| q.iter().zip(key).map(move |(q, k)| w * q * k));
                let norm = terms.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
                (MOST_DEVIATIONS * halves(2) * norm) as f32
            }
            CacheRounding::On => {
                let steps = heads().map(|(q, w)| w.abs() * largest(q) / 3.0);
                steps.fold(0.0, f32::max) * largest(key)
            }
        };
        keys.chunks_exact(INDEX_DIM).map(error).collect()
    }
}

/// Compares scores; whether they are also as close as sums of exact terms are.
fn check_scores(place: &str, found: &[f32], expected: &[f32], errors: &[f32]) -> bool {
    let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
    let mut close = true;
    for (c, (x, y)) in found.iter().zip(expected).enumerate() {
        let off = (x - y).abs();
        assert!(off <= errors[c], "{place}: score {c} is {x}, expected {y}");
        close &= off <= 1e-5 * largest;
    }
    close
}
