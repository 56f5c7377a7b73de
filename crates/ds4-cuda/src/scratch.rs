//! Activations of a step: device buffers that are allocated once and reused.

use ds4_engine::{backend::StageResult, rope::PAIRS, rows::CacheRounding};
use ds4_model::config::{Config, HEAD_DIM, INDEX_DIM, LayerKind, STREAMS};

use crate::{
    cache::LayerPointers,
    device::{Buffer, Device, Graph, Pinned},
    products::{Input, Product, Products, Workspace},
    stages::{argmax::BestTokens, attention, experts, hyper_connection},
    step::StepTable,
    weights::{self, Weights},
};

/// Scores of index keys that are kept at once: 256 MiB.
const SCORES: usize = 64 << 20;
/// Decode rows up to which attention's partial results are kept at once.
pub(crate) const PARTIAL_ROWS: usize = 64;
/// Rows up to which a step that only decodes is a CUDA graph.
pub(crate) const GRAPH_ROWS: usize = 64;

/// Buffers for steps of up to `rows` rows, and the products between them. Layouts are row-major.
pub(crate) struct Scratch {
    pub rows: usize,
    pub step: StepTable,
    pub caches: CacheTable,
    /// Residual streams `[n, 4, hidden]`.
    pub streams: Buffer<f32>,
    /// Weights of the sublayer's output `[n, 4]`, and mixing of the streams `[n, 4, 4]`.
    pub post: Buffer<f32>,
    pub comb: Buffer<f32>,
    /// Dot products of the mixing function, by slices of columns `[n, slices, 32]`.
    pub mix_sums: Buffer<f32>,
    /// Blocks of a row that have done their part; zero between launches `[n]`.
    pub arrivals: Buffer<u32>,
    /// The sublayer's input `[n, hidden]`, and what rounding left over.
    pub x: Buffer<u16>,
    pub x_low: Buffer<u16>,
    /// Query latent before and after its norm `[n, q_rank]`.
    pub raw_latent: Buffer<f32>,
    pub latent: Buffer<u16>,
    pub latent_low: Buffer<u16>,
    /// Key/value rows before their norm `[n, 512]`, and stored.
    pub raw_kv: Buffer<f32>,
    pub kv_rows: Buffer<u8>,
    /// Queries, not normalised `[n, heads, 512]`.
    pub queries: Buffer<u16>,
    /// Compressor inputs `[n, width]`.
    pub values: Buffer<f32>,
    pub scores: Buffer<f32>,
    pub index_values: Buffer<f32>,
    pub index_scores: Buffer<f32>,
    /// Index queries `[n, heads, 128]` and weights of their heads `[n, heads]`.
    pub index_queries: Buffer<f32>,
    pub head_weights: Buffer<f32>,
    /// Scores of index keys, as many rows as fit.
    pub key_scores: Buffer<f32>,
    /// Chosen rows `[n, top_k]`.
    pub selected: Buffer<u32>,
    /// Cosines and sines of the rows' positions, plain and YaRN `[2, n, 32, 2]`.
    pub rotations: Buffer<f32>,
    /// Attention of parts of the rows.
    pub partial_sums: Buffer<u16>,
    pub partial_totals: Buffer<f32>,
    /// Attention `[n, heads, 512]`, and after the first output projection `[n, groups·rank]`.
    pub attended: Buffer<u16>,
    pub reduced: Buffer<u16>,
    /// The sublayer's output `[n, slots, hidden]`.
    pub y: Buffer<f32>,
    pub experts: experts::Scratch,
    pub layers: Vec<LayerProducts>,
    pub head: Head,
    /// Of any products.
    pub workspace: Workspace,
    /// CUDA graphs of steps that only decode, by their number of rows less one. They hold addresses
    /// of the buffers above.
    pub graphs: [Option<Graph>; GRAPH_ROWS],
}

/// The products of one layer.
pub(crate) struct LayerProducts {
    /// Everything made from the attention sublayer's input.
    pub attention_input: Products,
    /// Queries, from their latent.
    pub queries: Products,
    pub output_a: Products,
    pub output_b: Products,
    /// Router and the shared expert's hidden layer.
    pub experts_input: Products,
    pub shared_down: Products,
}

/// What the output head works with.
pub(crate) struct Head {
    pub capacity: usize,
    pub rows: WantedRows,
    pub x: Buffer<u16>,
    pub x_low: Buffer<u16>,
    pub logits: Buffer<f32>,
    pub host: Pinned<f32>,
    pub best: BestTokens,
    pub products: Products,
}

/// Numbers of the rows whose logits are wanted, on both sides.
pub(crate) struct WantedRows {
    host: Pinned<u32>,
    device: Buffer<u32>,
}

impl WantedRows {
    fn new(device: &Device, len: usize) -> StageResult<Self> {
        Ok(WantedRows { host: device.pinned(len)?, device: device.alloc(len)? })
    }

    /// On the device.
    pub fn buffer(&self) -> &Buffer<u32> {
        &self.device
    }

    /// Brings the numbers to the device.
    pub fn upload(&mut self, device: &Device, rows: &[usize]) -> StageResult {
        for (to, row) in self.host.as_mut_slice()?.iter_mut().zip(rows) {
            *to = *row as u32;
        }
        device.upload_pinned(&mut self.device, 0, &mut self.host, rows.len())
    }
}

/// Addresses of the sessions' caches `[sessions, layers]`, on both sides. CUDA graphs know where
/// it is, so it has room for as many sessions as a step can have, one for each row.
pub(crate) struct CacheTable {
    host: Pinned<LayerPointers>,
    device: Buffer<LayerPointers>,
}

impl CacheTable {
    fn new(device: &Device, len: usize) -> StageResult<Self> {
        Ok(CacheTable { host: device.pinned(len)?, device: device.alloc(len)? })
    }

    /// On the device.
    pub fn buffer(&self) -> &Buffer<LayerPointers> {
        &self.device
    }

    /// Brings the pointers of all sessions to the device.
    pub fn upload<'a>(
        &mut self,
        device: &Device,
        sessions: impl ExactSizeIterator<Item = &'a [LayerPointers]>,
        layers: usize,
    ) -> StageResult {
        let len = sessions.len() * layers;
        for (to, from) in self.host.as_mut_slice()?.chunks_exact_mut(layers).zip(sessions) {
            to.copy_from_slice(from);
        }
        device.upload_pinned(&mut self.device, 0, &mut self.host, len)
    }
}

impl Scratch {
    /// Scratch for steps of `rows` rows and `logits` rows of logits, or somewhat more.
    pub fn new(
        device: &Device,
        config: &Config,
        rounding: CacheRounding,
        weights: &Weights,
        (rows, logits): (usize, usize),
    ) -> StageResult<Scratch> {
        let n = rows.next_multiple_of(GRAPH_ROWS).max(GRAPH_ROWS);
        let (hidden, heads) = (config.hidden, config.heads * HEAD_DIM);
        let width = config.layers.iter().map(|l| l.kind.compressor_width()).max().unwrap_or(0);
        let partial = attention::partial_len(PARTIAL_ROWS, config.heads);
        let mut scratch = Scratch {
            rows: n,
            step: StepTable::new(device, n)?,
            caches: CacheTable::new(device, n * config.layers.len())?,
            streams: device.alloc(n * STREAMS * hidden)?,
            post: device.alloc(n * STREAMS)?,
            comb: device.alloc(n * STREAMS * STREAMS)?,
            mix_sums: device.alloc(n * hyper_connection::sums_len(hidden))?,
            arrivals: device.alloc_zeroed(n)?,
            x: device.alloc(n * hidden)?,
            x_low: device.alloc(n * hidden)?,
            raw_latent: device.alloc(n * config.q_rank)?,
            latent: device.alloc(n * config.q_rank)?,
            latent_low: device.alloc(n * config.q_rank)?,
            raw_kv: device.alloc(n * HEAD_DIM)?,
            kv_rows: device.alloc(n * rounding.kv_codec().row_bytes())?,
            queries: device.alloc(n * heads)?,
            values: device.alloc(n * width)?,
            scores: device.alloc(n * width)?,
            index_values: device.alloc(n * 2 * INDEX_DIM)?,
            index_scores: device.alloc(n * 2 * INDEX_DIM)?,
            index_queries: device.alloc(n * config.index_heads * INDEX_DIM)?,
            head_weights: device.alloc(n * config.index_heads)?,
            key_scores: device.alloc(key_scores_len(config, n))?,
            selected: device.alloc(n * config.index_top_k)?,
            rotations: device.alloc(2 * n * PAIRS * 2)?,
            partial_sums: device.alloc(partial)?,
            partial_totals: device.alloc(2 * partial / HEAD_DIM)?,
            attended: device.alloc(n * heads)?,
            reduced: device.alloc(n * config.output_groups * config.output_rank)?,
            y: device.alloc(n * (config.experts_used + 1) * hidden)?,
            experts: experts::Scratch::new(device, config, n)?,
            layers: Vec::new(),
            head: Head::new(device, config, weights, logits.max(GRAPH_ROWS))?,
            workspace: Workspace::new(device, 0)?,
            graphs: [const { None }; GRAPH_ROWS],
        };
        let layers = weights.layers.iter().enumerate();
        let layers = layers.map(|(l, w)| scratch.layer_products(device, config, l, w));
        scratch.layers = layers.collect::<StageResult<_>>()?;
        let products = scratch.layers.iter().flat_map(LayerProducts::decoded);
        let blocks = products.chain([&scratch.head.products]).map(Products::most_blocks);
        scratch.workspace = Workspace::new(device, blocks.max().unwrap_or(0))?;
        Ok(scratch)
    }

    /// Bytes of scratch for each row of a step, roughly.
    pub fn bytes_per_row(config: &Config) -> u64 {
        let (hidden, heads) = (config.hidden, config.heads * HEAD_DIM);
        let used = config.experts_used;
        let floats = (STREAMS + used + 1) * hidden
            + hyper_connection::sums_len(hidden)
            + 2 * config.q_rank
            + 6 * HEAD_DIM
            + (config.index_heads + 4) * INDEX_DIM
            + config.experts
            + config.index_top_k;
        // Inputs as pairs of halves, and those of experts as integers.
        let halves = 3 * hidden
            + 2 * heads
            + config.output_groups * config.output_rank
            + (used + 1) * config.expert_width;
        (size_of::<f32>() * floats + size_of::<u16>() * halves) as u64
    }

    fn layer_products(
        &self,
        device: &Device,
        config: &Config,
        layer: usize,
        w: &weights::Layer,
    ) -> StageResult<LayerProducts> {
        let (hidden, q_rank, used) = (config.hidden, config.q_rank, config.experts_used);
        let x = Input::rounded(&self.x, hidden);
        let exact = Input::exact(&self.x, &self.x_low, hidden);
        let latent = Input::rounded(&self.latent, q_rank);
        let exact_latent = Input::exact(&self.latent, &self.latent_low, q_rank);
        let (crowded, at) = self.step.crowded();

        let mut attention_input = vec![
            Product::floats(&w.attn.q_a, x, &self.raw_latent),
            Product::floats(&w.attn.kv, x, &self.raw_kv),
        ];
        let mut queries = vec![Product::halves(&w.attn.q_b, latent, &self.queries)];
        if let Some(c) = &w.compressor {
            attention_input.extend([
                Product::floats(&c.kv, exact, &self.values),
                Product::floats(&c.gate, exact, &self.scores),
            ]);
        }
        if let Some(i) = &w.indexer {
            let c = &i.compressor;
            let head_weights = Product::floats(&i.head_weights, exact, &self.head_weights);
            let index_queries = Product::floats(&i.q_b, exact_latent, &self.index_queries);
            attention_input.extend([
                Product::floats(&c.kv, exact, &self.index_values),
                Product::floats(&c.gate, exact, &self.index_scores),
                head_weights.needed(crowded, at),
            ]);
            queries.push(index_queries.needed(crowded, at));
        }

        let groups = config.output_groups;
        let attended = Input::rounded(&self.attended, config.heads * HEAD_DIM);
        let output_a: Vec<_> = (0..groups)
            .map(|g| Product::group(&w.attn.output_a, attended, g, groups, &self.reduced))
            .collect();
        let reduced = Input::rounded(&self.reduced, groups * config.output_rank);
        let output_b = Product::floats(&w.attn.output_b, reduced, &self.y);

        let f = &w.ffn;
        let limit = config.layers[layer].shared_swiglu_limit;
        let hidden_layer = &self.experts.shared_hidden;
        let experts_input = [
            Product::floats(&f.router, exact, &self.experts.logits),
            Product::swiglu(&f.shared_gate, &f.shared_up, x, limit, hidden_layer),
        ];
        let shared_input = Input::rounded(hidden_layer, f.shared_down.cols);
        let (place, stride) = (used * hidden, (used + 1) * hidden);
        let shared_down = Product::floats_at(&f.shared_down, shared_input, &self.y, place, stride);
        Ok(LayerProducts {
            attention_input: Products::new(device, &attention_input)?,
            queries: Products::new(device, &queries)?,
            output_a: Products::new(device, &output_a)?,
            output_b: Products::new(device, &[output_b])?,
            experts_input: Products::new(device, &experts_input)?,
            shared_down: Products::new(device, &[shared_down])?,
        })
    }
}

impl LayerProducts {
    /// Those that are launched on their own when rows are decoded.
    fn decoded(&self) -> [&Products; 5] {
        [&self.attention_input, &self.queries, &self.output_a, &self.output_b, &self.experts_input]
    }
}

impl Head {
    /// Room for the logits of `rows` rows.
    pub fn new(
        device: &Device,
        config: &Config,
        weights: &Weights,
        rows: usize,
    ) -> StageResult<Head> {
        let x = device.alloc(rows * config.hidden)?;
        let x_low = device.alloc(rows * config.hidden)?;
        let logits = device.alloc(rows * config.vocab)?;
        let input = Input::exact(&x, &x_low, config.hidden);
        let product = Product::floats(&weights.output, input, &logits);
        let products = Products::new(device, &[product])?;
        Ok(Head {
            capacity: rows,
            rows: WantedRows::new(device, rows)?,
            x,
            x_low,
            host: device.pinned(rows * config.vocab)?,
            best: BestTokens::new(device, rows, config.vocab)?,
            products,
            logits,
        })
    }
}

/// Index keys that a row can see.
pub(crate) fn key_capacity(config: &Config) -> usize {
    (config.context_length / LayerKind::Csa.ratio()).max(1)
}

fn key_scores_len(config: &Config, rows: usize) -> usize {
    let capacity = key_capacity(config);
    (rows * capacity).min(SCORES.max(capacity))
}
