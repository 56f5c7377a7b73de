//! One layer on the device, run step by step beside a record of what its caches must hold.

mod check;

use ds4_conformance::phase_of;
use ds4_engine::backend::Cache as _;
use ds4_engine::{
    Phase,
    rope::{self, Frequencies},
    rows::CacheRounding,
};
use ds4_model::config::{Config, HEAD_DIM, INDEX_DIM, LayerConfig, LayerKind, Yarn};
use half::f16;

pub use self::check::Session;
use crate::{
    cache::LayerPointers,
    device::{Buffer, Device},
    stages::{
        attention::{self, Attend, AttentionLayer, Partials, partial_len},
        columns::Columns,
        compressor::{self, Compressor, Inputs, KeyValues, Latent},
        indexer::{self, Select},
    },
    step::StepRows,
};

const EPSILON: f32 = 1e-6;
/// The tested layer and the layers of a cache: another kind of layer comes first.
const LAYER: usize = 1;
const LAYERS: usize = 2;
/// Key/value rows before their norm are columns of a wider product.
const RAW_STRIDE: usize = HEAD_DIM + 64;
const RAW_OFFSET: usize = 64;
/// Width of the query latent.
const LATENT: usize = 96;
/// An epsilon beside which a row's squares vanish, and a norm's weight that undoes it.
const NEUTRAL_EPSILON: f32 = 1.0995116e12;
const NEUTRAL_NORM: f32 = 1048576.0;

/// The first device. Tests that call it are ignored unless they are asked for.
pub fn device() -> Device {
    Device::open(0).unwrap_or_else(|error| panic!("{error}"))
}

/// Shape of a test's layer.
#[derive(Clone, Copy)]
pub struct Shape {
    pub kind: LayerKind,
    pub rounding: CacheRounding,
    pub heads: usize,
    pub index_heads: usize,
    pub top_k: usize,
    /// Index keys that scores have room for.
    pub keys: usize,
}

pub struct Harness {
    device: Device,
    shape: Shape,
    config: Config,
    random: fastrand::Rng,
    weights: Weights,
    last: Option<Work>,
    ties: usize,
}

struct Weights {
    latent_norm: Vector,
    kv_norm: Vector,
    norm: Vector,
    bias: Vector,
    index_norm: Vector,
    index_bias: Vector,
    sinks: Vector,
    plain: Frequencies,
    yarn: Frequencies,
    frequencies: Buffer<f32>,
}

/// Weights on both sides.
struct Vector {
    host: Vec<f32>,
    device: Buffer<f32>,
}

/// Where a row of a step belongs.
struct Row {
    session: usize,
    position: usize,
    span_position: usize,
    span_row: usize,
}

/// The rows of a step, and their random inputs.
struct Given {
    rows: Vec<Row>,
    decode_rows: usize,
    raw_latent: Vec<f32>,
    raw_kv: Vec<f32>,
    /// Values and scores side by side.
    inputs: Vec<f32>,
    index_inputs: Vec<f32>,
    queries: Vec<u16>,
    index_queries: Vec<f32>,
    head_weights: Vec<f32>,
}

/// Buffers of a step.
struct Work {
    rows: usize,
    decode_rows: usize,
    table: Buffer<LayerPointers>,
    step: Buffer<u32>,
    raw_latent: Buffer<f32>,
    latent: Buffer<u16>,
    latent_low: Buffer<u16>,
    raw_kv: Buffer<f32>,
    inputs: Buffer<f32>,
    index_inputs: Buffer<f32>,
    queries: Buffer<u16>,
    index_queries: Buffer<f32>,
    head_weights: Buffer<f32>,
    rotations: Buffer<f32>,
    kv_rows: Buffer<u8>,
    /// Of decoded rows and of others.
    key_scores: [Buffer<f32>; 2],
    selected: Buffer<u32>,
    arrivals: Buffer<u32>,
    partial_sums: Buffer<u16>,
    partial_totals: Buffer<f32>,
    out: Buffer<u16>,
}

impl Harness {
    pub fn new(device: &Device, shape: Shape, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let config = config(shape);
        let (width, ratio) = (shape.kind.compressor_width(), shape.kind.ratio());
        let mut vector = |len: usize, middle: f32| {
            let host: Vec<f32> = (0..len).map(|_| middle + 0.5 * normal(&mut random)).collect();
            let device = device.buffer(&host).expect("memory for weights");
            Vector { host, device }
        };
        let (plain, yarn) = (
            rope::frequencies(&config, LayerKind::Swa),
            rope::frequencies(&config, LayerKind::Csa),
        );
        let frequencies = [plain, yarn].concat();
        let weights = Weights {
            latent_norm: vector(LATENT, 1.0),
            kv_norm: vector(HEAD_DIM, 1.0),
            norm: vector(HEAD_DIM, 1.0),
            bias: vector(ratio * width, 0.0),
            index_norm: vector(INDEX_DIM, 1.0),
            index_bias: vector(ratio * 2 * INDEX_DIM, 0.0),
            sinks: vector(shape.heads, 0.0),
            plain,
            yarn,
            frequencies: device.buffer(&frequencies).expect("memory for frequencies"),
        };
        let device = device.clone();
        Harness { device, shape, config, random, weights, last: None, ties: 0 }
    }

    pub fn session(&self) -> Session {
        Session::new(&self.device, &self.config, self.shape)
    }

    /// Puts a session at `position` with random rows.
    pub fn fill(&mut self, session: &mut Session, position: usize) {
        session.fill(&mut self.random, position);
    }

    /// Runs a step with random inputs, of so many rows for each (session, rows), short ones first,
    /// and checks every stage.
    pub fn step(&mut self, sessions: &mut [Session], spans: &[(usize, usize)]) {
        let inputs = self.inputs(sessions, spans);
        let mut work = self.work(sessions, &inputs);
        self.upload(&mut work, sessions, &inputs);
        self.launch(&work);
        self.check(&work, sessions, &inputs);
        self.last = Some(work);
    }

    /// Captures a step as a graph, and launches that so many tokens later each time.
    pub fn launch_again(
        &mut self,
        sessions: &mut [Session],
        spans: &[(usize, usize)],
        later: &[usize],
    ) {
        let inputs = self.inputs(sessions, spans);
        let mut work = self.work(sessions, &inputs);
        // Once without a graph, so that nothing is set up for the first time meanwhile.
        self.step(sessions, spans);
        let graph = self.device.capture(|| {
            self.launch(&work);
            Ok(())
        });
        let graph = graph.expect("a graph");
        for &tokens in later {
            for session in sessions.iter_mut() {
                let position = session.position() + tokens;
                self.fill(session, position);
            }
            let inputs = self.inputs(sessions, spans);
            self.upload(&mut work, sessions, &inputs);
            #[allow(unsafe_code, reason = "launches kernels")]
            // SAFETY: the buffers of `work` and of the sessions are alive, and the table is new.
            unsafe { graph.launch() }.expect("a launch");
            self.check(&work, sessions, &inputs);
        }
    }

    /// Rows of the last step chosen again, with room for the scores of so many rows at once.
    pub fn select_again(&self, rows: usize) -> Vec<u32> {
        let work = self.last.as_ref().expect("a step");
        let scores = self.device.alloc(rows * self.shape.keys).expect("memory for scores");
        let selected = self.device.alloc_zeroed(work.selected.len()).expect("memory");
        self.select(work, [&scores, &scores], &selected);
        self.device.download(&selected, 0..selected.len()).expect("selected rows")
    }

    /// Attention of the last step's decoded rows again, so many at once.
    pub fn attend_again(&self, at_once: usize) -> Vec<u16> {
        let work = self.last.as_ref().expect("a step");
        let out = self.device.alloc_zeroed(work.out.len()).expect("memory");
        let (layer, attend) = (self.layer(work), self.attend(work, &out));
        let partials = Partials { sums: &work.partial_sums, totals: &work.partial_totals };
        for first in (0..work.decode_rows).step_by(at_once) {
            let rows = first..work.decode_rows.min(first + at_once);
            attention::attend_decode(&layer, rows, &attend, &partials).expect("launches");
        }
        self.device.download(&out, 0..out.len()).expect("attention")
    }

    /// Queries so far whose last chosen row had as good a score as one that was not chosen.
    pub fn ties(&self) -> usize {
        self.ties
    }

    /// Rows stored as they are: a norm and a rotation that change nothing.
    pub fn store_rows(&mut self, rows: &[f32]) -> Vec<u8> {
        let n = rows.len() / HEAD_DIM;
        let work = self.neutral_work(n);
        let raw = self.device.buffer(rows).expect("memory");
        let norm = self.device.buffer(&vec![NEUTRAL_NORM; HEAD_DIM]).expect("memory");
        let layer = AttentionLayer { epsilon: NEUTRAL_EPSILON, ..self.layer(&work) };
        let raw = Columns::all(&raw, HEAD_DIM);
        let key_values = KeyValues { raw, norm: &norm, rows: &work.kv_rows };
        let inputs = Inputs { key_values: Some(key_values), ..Inputs::default() };
        compressor::finish_inputs(&layer, n, 0, &inputs).expect("a launch");
        self.device.download(&work.kv_rows, 0..work.kv_rows.len()).expect("rows")
    }

    /// Index keys stored as they are: each is the only one of its window with a score.
    pub fn store_keys(&mut self, keys: &[f32]) -> Vec<u8> {
        let (n, width) = (keys.len() / INDEX_DIM, 2 * INDEX_DIM);
        let mut out = Vec::new();
        let weights = [vec![NEUTRAL_NORM; INDEX_DIM], vec![0.0; 4 * width]];
        let [norm, bias] = weights.map(|w| self.device.buffer(&w).expect("memory"));
        let mut session = [self.session()];
        for key in keys.chunks_exact(INDEX_DIM) {
            session[0].rewind(0);
            let mut inputs = self.inputs(&session, &[(0, 4)]);
            inputs.index_inputs.fill(0.0);
            for (row, input) in inputs.index_inputs.chunks_exact_mut(2 * width).enumerate() {
                input[INDEX_DIM..width].copy_from_slice(key);
                input[width..].fill(if row == 2 { 0.0 } else { -1e30 });
            }
            let mut work = self.work(&session, &inputs);
            self.upload(&mut work, &mut session, &inputs);
            let layer = AttentionLayer { epsilon: NEUTRAL_EPSILON, ..self.layer(&work) };
            let (compressor, mut index) = self.compressors(&work);
            (index.norm, index.bias) = (&norm, &bias);
            let inputs =
                Inputs { compressor: Some(compressor), index: Some(index), ..Inputs::default() };
            compressor::finish_inputs(&layer, 4, 4, &inputs).expect("a launch");
            out.extend(session[0].layer_rows(LAYER, 4).index_keys);
        }
        assert_eq!(out.len(), n * self.shape.rounding.index_codec().row_bytes());
        out
    }

    /// Work for `n` rows at position 0, where rotations change nothing.
    fn neutral_work(&mut self, n: usize) -> Work {
        let mut sessions = [self.session()];
        let mut inputs = self.inputs(&sessions, &[(0, n)]);
        inputs.rows.iter_mut().for_each(|row| row.position = 0);
        let mut work = self.work(&sessions, &inputs);
        self.upload(&mut work, &mut sessions, &inputs);
        self.rotate(&work);
        work
    }

    fn inputs(&mut self, sessions: &[Session], spans: &[(usize, usize)]) -> Given {
        let mut rows = Vec::new();
        let mut decode_rows = 0;
        for &(session, len) in spans {
            let (start, first) = (sessions[session].position(), rows.len());
            rows.extend((start..start + len).map(|position| Row {
                session,
                position,
                span_position: start,
                span_row: first,
            }));
            if phase_of(len) == Phase::Decode {
                assert_eq!(decode_rows, first, "short spans come first");
                decode_rows = rows.len();
            }
        }
        let (n, shape, random) = (rows.len(), self.shape, &mut self.random);
        let width = shape.kind.compressor_width();
        let queries = normals(random, n * shape.heads * HEAD_DIM);
        Given {
            rows,
            decode_rows,
            raw_latent: normals(random, n * (LATENT + 4)),
            raw_kv: normals(random, n * RAW_STRIDE),
            inputs: normals(random, n * 2 * width),
            index_inputs: normals(random, n * 4 * INDEX_DIM),
            queries: queries.iter().map(|x| f16::from_f32(*x).to_bits()).collect(),
            index_queries: normals(random, n * shape.index_heads * INDEX_DIM),
            head_weights: normals(random, n * head_stride(shape.index_heads)),
        }
    }

    fn work(&self, sessions: &[Session], inputs: &Given) -> Work {
        let (device, shape, n) = (&self.device, self.shape, inputs.rows.len());
        let partial = partial_len(inputs.decode_rows.max(1), shape.heads);
        let row_bytes = shape.rounding.kv_codec().row_bytes();
        let floats = |len: usize| device.alloc::<f32>(len).expect("memory");
        let halves = |len: usize| device.alloc::<u16>(len).expect("memory");
        Work {
            rows: n,
            decode_rows: inputs.decode_rows,
            table: device.alloc(sessions.len() * LAYERS).expect("memory"),
            step: device.alloc(5 * n).expect("memory"),
            raw_latent: floats(inputs.raw_latent.len()),
            latent: halves(n * LATENT),
            latent_low: halves(n * LATENT),
            raw_kv: floats(inputs.raw_kv.len()),
            inputs: floats(inputs.inputs.len()),
            index_inputs: floats(inputs.index_inputs.len()),
            queries: halves(inputs.queries.len()),
            index_queries: floats(inputs.index_queries.len()),
            head_weights: floats(inputs.head_weights.len()),
            rotations: floats(2 * n * 2 * rope::PAIRS),
            kv_rows: device.alloc(n * row_bytes).expect("memory"),
            key_scores: [inputs.decode_rows, n - inputs.decode_rows]
                .map(|rows| floats(rows.max(1) * shape.keys)),
            selected: device.alloc(n * shape.top_k).expect("memory"),
            arrivals: device.alloc_zeroed(n).expect("memory"),
            partial_sums: halves(partial),
            partial_totals: floats(2 * partial / HEAD_DIM),
            out: halves(n * shape.heads * HEAD_DIM),
        }
    }

    fn upload(&self, work: &mut Work, sessions: &mut [Session], inputs: &Given) {
        for (i, session) in sessions.iter_mut().enumerate() {
            let added = inputs.rows.iter().filter(|row| row.session == i).count();
            session.cache.reserve(session.position() + added).expect("memory for rows");
        }
        let table: Vec<LayerPointers> =
            sessions.iter().flat_map(|s| s.cache.pointers()).copied().collect();
        let column = |get: fn(&Row) -> usize| inputs.rows.iter().map(move |row| get(row) as u32);
        let step: Vec<u32> = column(|_| 0)
            .chain(column(|row| row.position))
            .chain(column(|row| row.session))
            .chain(column(|row| row.span_position))
            .chain(column(|row| row.span_row))
            .collect();
        let d = &self.device;
        let done = d
            .upload(&mut work.table, 0, &table)
            .and_then(|()| d.upload(&mut work.step, 0, &step))
            .and_then(|()| d.upload(&mut work.raw_latent, 0, &inputs.raw_latent))
            .and_then(|()| d.upload(&mut work.raw_kv, 0, &inputs.raw_kv))
            .and_then(|()| d.upload(&mut work.inputs, 0, &inputs.inputs))
            .and_then(|()| d.upload(&mut work.index_inputs, 0, &inputs.index_inputs))
            .and_then(|()| d.upload(&mut work.queries, 0, &inputs.queries))
            .and_then(|()| d.upload(&mut work.index_queries, 0, &inputs.index_queries))
            .and_then(|()| d.upload(&mut work.head_weights, 0, &inputs.head_weights));
        done.expect("copies to the device");
    }

    /// Launches all stages.
    fn launch(&self, work: &Work) {
        let (n, decode_rows) = (work.rows, work.decode_rows);
        let layer = self.layer(work);
        self.rotate(work);
        let (compressor, index) = self.compressors(work);
        let inputs = Inputs {
            latent: Some(Latent {
                raw: Columns::all(&work.raw_latent, LATENT + 4),
                width: LATENT,
                norm: &self.weights.latent_norm.device,
                out: &work.latent,
                low: &work.latent_low,
            }),
            key_values: Some(KeyValues {
                raw: Columns { buffer: &work.raw_kv, first: RAW_OFFSET, stride: RAW_STRIDE },
                norm: &self.weights.kv_norm.device,
                rows: &work.kv_rows,
            }),
            compressor: (self.shape.kind != LayerKind::Swa).then_some(compressor),
            index: (self.shape.kind == LayerKind::Csa).then_some(index),
        };
        compressor::finish_inputs(&layer, n, decode_rows, &inputs).expect("launches");
        if self.shape.kind == LayerKind::Csa {
            self.select(work, work.key_scores.each_ref(), &work.selected);
        }
        let attend = self.attend(work, &work.out);
        let partials = Partials { sums: &work.partial_sums, totals: &work.partial_totals };
        attention::attend_decode(&layer, 0..decode_rows, &attend, &partials)
            .and_then(|()| attention::attend_prefill(&layer, decode_rows..n, &attend))
            .and_then(|()| attention::store_window(&layer, decode_rows..n, &work.kv_rows))
            .expect("launches");
    }

    fn attend<'a>(&'a self, work: &'a Work, out: &'a Buffer<u16>) -> Attend<'a> {
        Attend {
            heads: self.shape.heads,
            queries: &work.queries,
            kv_rows: &work.kv_rows,
            selected: &work.selected,
            top_k: self.shape.top_k,
            sinks: &self.weights.sinks.device,
            out,
        }
    }

    fn layer<'a>(&'a self, work: &'a Work) -> AttentionLayer<'a> {
        let yarn = if self.shape.kind == LayerKind::Swa { 0 } else { work.rotations.len() / 2 };
        AttentionLayer {
            device: &self.device,
            step: StepRows { table: &work.step, rows: work.rows },
            caches: &work.table,
            layer: LAYER,
            layers: LAYERS,
            kind: self.shape.kind,
            rounding: self.shape.rounding,
            epsilon: EPSILON,
            rotations: Columns { buffer: &work.rotations, first: yarn, stride: 2 * rope::PAIRS },
        }
    }

    fn rotate(&self, work: &Work) {
        let (frequencies, step) = (&self.weights.frequencies, self.layer(work).step);
        attention::rotations(&self.device, step, work.rows, frequencies, &work.rotations)
            .expect("a launch");
    }

    fn compressors<'a>(&'a self, work: &'a Work) -> (Compressor<'a>, Compressor<'a>) {
        let frequencies = &self.weights.frequencies;
        let compressor =
            |buffer: &'a Buffer<f32>, width: usize, bias: &'a Vector, norm: &'a Vector| {
                let columns = |first| Columns { buffer, first, stride: 2 * width };
                Compressor {
                    values: columns(0),
                    scores: columns(width),
                    bias: &bias.device,
                    norm: &norm.device,
                    frequencies,
                }
            };
        let (w, width) = (&self.weights, self.shape.kind.compressor_width());
        (
            compressor(&work.inputs, width, &w.bias, &w.norm),
            compressor(&work.index_inputs, 2 * INDEX_DIM, &w.index_bias, &w.index_norm),
        )
    }

    fn select(&self, work: &Work, scores: [&Buffer<f32>; 2], selected: &Buffer<u32>) {
        let shape = self.shape;
        let select = |decoded: bool| Select {
            heads: shape.index_heads,
            top_k: shape.top_k,
            queries: Columns::all(&work.index_queries, shape.index_heads * INDEX_DIM),
            head_weights: Columns::all(&work.head_weights, head_stride(shape.index_heads)),
            scores: scores[usize::from(!decoded)],
            capacity: shape.keys,
            arrivals: &work.arrivals,
            decoded,
            selected,
        };
        let layer = self.layer(work);
        indexer::select(&layer, 0..work.decode_rows, &select(true))
            .and_then(|()| indexer::select(&layer, work.decode_rows..work.rows, &select(false)))
            .expect("launches");
    }
}

/// Elements between the head weights of two rows.
fn head_stride(heads: usize) -> usize {
    heads.next_multiple_of(4) + 4
}

/// A layer of a test's shape behind one that only has a window.
fn config(shape: Shape) -> Config {
    let layer = |kind| LayerConfig {
        kind,
        hash_routed: false,
        swiglu_limit: 10.0,
        shared_swiglu_limit: 10.0,
    };
    Config {
        layers: vec![layer(LayerKind::Swa), layer(shape.kind)],
        vocab: 16,
        context_length: 1 << 20,
        hidden: 64,
        heads: shape.heads,
        q_rank: 32,
        output_groups: 1,
        output_rank: 32,
        experts: 8,
        experts_used: 2,
        expert_width: 32,
        index_heads: shape.index_heads,
        index_top_k: shape.top_k,
        sinkhorn_iterations: 20,
        hc_epsilon: EPSILON,
        rms_epsilon: EPSILON,
        routed_scale: 1.5,
        rope_base: 10000.0,
        compress_rope_base: 160000.0,
        yarn: Yarn { factor: 16.0, original_context: 65536, beta_fast: 32.0, beta_slow: 1.0 },
    }
}

/// About normally distributed.
fn normal(random: &mut fastrand::Rng) -> f32 {
    (0..6).map(|_| random.f32() - 0.5).sum::<f32>() * 2f32.sqrt()
}

fn normals(random: &mut fastrand::Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| normal(random)).collect()
}
