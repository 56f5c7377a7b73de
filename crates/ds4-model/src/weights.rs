//! The model's tensors, bound by role.
//!
//! Matrices stay in their file format, borrowed from the mapping; vectors and
//! the few small tables that kernels read as f32 are converted once.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use gguf::{GgufFile, TensorType};

use crate::synth::Generator;

/// Bytes of one tensor.
#[derive(Clone)]
pub struct TensorData(Source);

#[derive(Clone)]
enum Source {
    /// Inside a mapped file, kept alive by it.
    File(Arc<GgufFile>, Range<usize>),
    /// Made when they are first asked for.
    Generated(Arc<Generated>),
}

struct Generated {
    generator: Generator,
    bytes: OnceLock<Vec<u8>>,
}

impl TensorData {
    /// `range` of the data of `file`; it must lie inside the file's mapping.
    pub(crate) fn in_file(file: Arc<GgufFile>, range: Range<usize>) -> Self {
        TensorData(Source::File(file, range))
    }

    /// What `generator` makes.
    pub(crate) fn generated(generator: Generator) -> Self {
        TensorData(Source::Generated(Arc::new(Generated { generator, bytes: OnceLock::new() })))
    }

    /// The tensor's bytes. Those of a generated one are made by the first call, and kept.
    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            Source::File(file, range) => &file.bytes()[range.clone()],
            Source::Generated(tensor) => tensor.bytes.get_or_init(|| tensor.generator.generate()),
        }
    }

    /// How many they are; none is made.
    pub fn byte_count(&self) -> usize {
        match &self.0 {
            Source::File(_, range) => range.len(),
            Source::Generated(tensor) => tensor.generator.bytes(),
        }
    }

    /// What makes the bytes, if they are generated: a device can do the same in its own memory.
    pub fn generator(&self) -> Option<&Generator> {
        match &self.0 {
            Source::File(..) => None,
            Source::Generated(tensor) => Some(&tensor.generator),
        }
    }
}

/// A matrix `[rows, cols]` in its file format, row-major: y = W·x.
#[derive(Clone)]
pub struct Matrix {
    /// Element type.
    pub ty: TensorType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// `rows` times `ty.row_bytes(cols)` bytes.
    pub data: TensorData,
}

impl Matrix {
    /// A borrowed view for kernels.
    pub fn view(&self) -> MatrixView<'_> {
        MatrixView { ty: self.ty, rows: self.rows, cols: self.cols, bytes: self.data.bytes() }
    }
}

/// A stack of equally shaped expert matrices `[experts, rows, cols]`.
#[derive(Clone)]
pub struct ExpertStack {
    /// Element type.
    pub ty: TensorType,
    /// Matrices in the stack.
    pub experts: usize,
    /// Outputs of each.
    pub rows: usize,
    /// Inputs of each.
    pub cols: usize,
    /// Expert after expert.
    pub data: TensorData,
}

impl ExpertStack {
    /// All experts as one matrix `[experts·rows, cols]`.
    pub fn stacked(&self) -> MatrixView<'_> {
        let rows = self.experts * self.rows;
        MatrixView { ty: self.ty, rows, cols: self.cols, bytes: self.data.bytes() }
    }

    /// The matrix of expert `e`.
    ///
    /// # Panics
    /// If `e` is not below `experts`.
    pub fn expert(&self, e: usize) -> MatrixView<'_> {
        let bytes = self.data.bytes();
        let size = bytes.len() / self.experts;
        MatrixView {
            ty: self.ty,
            rows: self.rows,
            cols: self.cols,
            bytes: &bytes[e * size..(e + 1) * size],
        }
    }
}

/// A borrowed matrix `[rows, cols]` in its file format.
#[derive(Clone, Copy)]
pub struct MatrixView<'a> {
    /// Element type.
    pub ty: TensorType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// `rows` times `ty.row_bytes(cols)` bytes.
    pub bytes: &'a [u8],
}

impl<'a> MatrixView<'a> {
    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.bytes.len() / self.rows
    }

    /// Bytes of row `r`.
    pub fn row(&self, r: usize) -> &'a [u8] {
        let n = self.row_bytes();
        &self.bytes[r * n..(r + 1) * n]
    }

    /// Rows `range` as a matrix of their own.
    pub fn slice_rows(&self, range: Range<usize>) -> MatrixView<'a> {
        let n = self.row_bytes();
        MatrixView {
            rows: range.len(),
            bytes: &self.bytes[range.start * n..range.end * n],
            ..*self
        }
    }
}

/// Parameters of one hyper-connection (docs/model.md, "Hyper-connections").
pub struct HyperConnection {
    /// `[24, 4·hidden]` (`[4, 4·hidden]` at the head), input stream-major.
    pub function: Matrix,
    /// One offset per output.
    pub base: Vec<f32>,
    /// Factors for pre, post and comb (pre alone at the head).
    pub scale: Vec<f32>,
}

/// Attention projections of one layer.
pub struct Attention {
    /// `[hidden]`.
    pub norm: Vec<f32>,
    /// `[q_rank, hidden]`.
    pub q_a: Matrix,
    /// `[q_rank]`.
    pub q_a_norm: Vec<f32>,
    /// `[heads·512, q_rank]`.
    pub q_b: Matrix,
    /// `[512, hidden]`.
    pub kv: Matrix,
    /// `[512]`.
    pub kv_norm: Vec<f32>,
    /// One logit per head.
    pub sinks: Vec<f32>,
    /// `[groups·output_rank, heads/groups·512]`, group after group.
    pub output_a: Matrix,
    /// `[hidden, groups·output_rank]`.
    pub output_b: Matrix,
}

/// A compressor: of a layer's rows, or of the indexer's keys.
pub struct Compressor {
    /// `[width, hidden]`.
    pub kv: Matrix,
    /// `[width, hidden]`.
    pub gate: Matrix,
    /// `[ratio, width]`: the gate's offset by position inside the window.
    pub position_bias: Vec<f32>,
    /// `[width of one row]`.
    pub norm: Vec<f32>,
}

/// The indexer of a CSA layer.
pub struct Indexer {
    /// `[index_heads·128, q_rank]`.
    pub q_b: Matrix,
    /// `[index_heads, hidden]`: the weight of each head's score.
    pub head_weights: Matrix,
    /// Makes the index keys.
    pub compressor: Compressor,
}

/// How a layer chooses its experts.
pub enum Routing {
    /// By score plus this bias, one per expert.
    Bias(Vec<f32>),
    /// By token id: `experts_used` ids per token, `[vocab, experts_used]`.
    Hash(Vec<u32>),
}

/// Router and experts of one layer.
pub struct Experts {
    /// `[hidden]`.
    pub norm: Vec<f32>,
    /// `[experts, hidden]`.
    pub router: Matrix,
    /// How experts are chosen.
    pub routing: Routing,
    /// `[experts, width, hidden]`.
    pub gate: ExpertStack,
    /// `[experts, width, hidden]`, of the same type as `gate`.
    pub up: ExpertStack,
    /// `[experts, hidden, width]`.
    pub down: ExpertStack,
    /// `[width, hidden]`.
    pub shared_gate: Matrix,
    /// `[width, hidden]`.
    pub shared_up: Matrix,
    /// `[hidden, width]`.
    pub shared_down: Matrix,
}

/// One layer.
pub struct LayerWeights {
    /// Hyper-connection around attention.
    pub attn_hc: HyperConnection,
    /// Attention projections.
    pub attn: Attention,
    /// Compressor, in CSA and HCA layers.
    pub compressor: Option<Compressor>,
    /// Indexer, in CSA layers.
    pub indexer: Option<Indexer>,
    /// Hyper-connection around the experts.
    pub ffn_hc: HyperConnection,
    /// Router and experts.
    pub ffn: Experts,
}

/// All tensors of the model.
pub struct Weights {
    /// `[vocab, hidden]`.
    pub token_embedding: Matrix,
    /// One entry per layer.
    pub layers: Vec<LayerWeights>,
    /// Collapses the four streams before the head.
    pub output_hc: HyperConnection,
    /// `[hidden]`.
    pub output_norm: Vec<f32>,
    /// `[vocab, hidden]`.
    pub output: Matrix,
}
