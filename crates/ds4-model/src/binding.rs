//! The table of the model's tensors: names, which layers have them, shapes and
//! allowed types.
//!
//! Everything that needs to know a tensor walks this one table: loading binds
//! and validates with it, and making, listing or quantising a model iterates
//! [`expected_tensors`].

use gguf::TensorType;

use crate::config::{Config, HC_MIX, HEAD_DIM, INDEX_DIM, LayerConfig, LayerKind, STREAMS};

/// What a tensor is for. Tensors of one role are stored with the same type,
/// and memory is reported by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Token embedding.
    Embedding,
    /// Output head.
    Output,
    /// Attention projections.
    Attention,
    /// Gate and up matrices of the routed experts.
    ExpertGateUp,
    /// Down matrices of the routed experts.
    ExpertDown,
    /// Shared expert.
    SharedExpert,
    /// Router.
    Router,
    /// Mixing functions of the hyper-connections.
    HyperConnection,
    /// Compressor projections, the indexer's included.
    Compressor,
    /// Query and head-weight projections of the indexer.
    Indexer,
    /// Compressor offsets by position.
    PositionBias,
    /// Norms, sinks, biases, bases and scales.
    Vector,
    /// Experts by token id.
    Table,
}

impl Role {
    /// Every role, in the order in which they are reported.
    pub const ALL: &[Role] = &[
        Role::Embedding,
        Role::Output,
        Role::Attention,
        Role::ExpertGateUp,
        Role::ExpertDown,
        Role::SharedExpert,
        Role::Router,
        Role::HyperConnection,
        Role::Compressor,
        Role::Indexer,
        Role::PositionBias,
        Role::Vector,
        Role::Table,
    ];

    /// A name for people, such as `routed experts (down)`.
    pub fn name(self) -> &'static str {
        match self {
            Role::Embedding => "embedding",
            Role::Output => "output head",
            Role::Attention => "attention",
            Role::ExpertGateUp => "routed experts (gate, up)",
            Role::ExpertDown => "routed experts (down)",
            Role::SharedExpert => "shared experts",
            Role::Router => "routers",
            Role::HyperConnection => "hyper-connections",
            Role::Compressor => "compressors",
            Role::Indexer => "indexers",
            Role::PositionBias => "position biases",
            Role::Vector => "vectors",
            Role::Table => "expert tables",
        }
    }

    /// The types in which such tensors may be stored.
    pub fn types(self) -> &'static [TensorType] {
        use TensorType::*;
        match self {
            Role::Table => &[I32],
            Role::Vector => &[F32, F16, BF16],
            _ => &[F32, F16, BF16, Q8_0, Q4_K, Q2_K, IQ2_XXS, MXFP4],
        }
    }
}

/// Where a tensor goes: one variant for each row of the table, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // The fields of `weights` that they name are documented there.
pub enum Slot {
    TokenEmbedding,
    OutputHcFunction,
    OutputHcBase,
    OutputHcScale,
    OutputNorm,
    Output,
    AttnHcFunction,
    AttnHcBase,
    AttnHcScale,
    AttnNorm,
    QA,
    QANorm,
    QB,
    Kv,
    KvNorm,
    Sinks,
    OutputA,
    OutputB,
    CompressorKv,
    CompressorGate,
    CompressorPositionBias,
    CompressorNorm,
    IndexerQB,
    IndexerHeadWeights,
    IndexerKv,
    IndexerGate,
    IndexerPositionBias,
    IndexerNorm,
    FfnHcFunction,
    FfnHcBase,
    FfnHcScale,
    FfnNorm,
    Router,
    RouterBias,
    RouterTable,
    ExpertGate,
    ExpertUp,
    ExpertDown,
    SharedGate,
    SharedUp,
    SharedDown,
}

/// Which layers have a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// The model has it once, outside of the layers.
    Model,
    /// Every layer.
    Layers,
    /// Layers with compressed rows.
    Compressed,
    /// Layers with an indexer.
    Csa,
    /// Layers that choose experts by token id.
    HashRouted,
    /// Layers that choose experts by score.
    ScoreRouted,
}

impl Presence {
    fn covers(self, layer: &LayerConfig) -> bool {
        match self {
            Presence::Model => false,
            Presence::Layers => true,
            Presence::Compressed => layer.kind != LayerKind::Swa,
            Presence::Csa => layer.kind == LayerKind::Csa,
            Presence::HashRouted => layer.hash_routed,
            Presence::ScoreRouted => !layer.hash_routed,
        }
    }
}

/// One row of the table.
#[derive(Debug)]
pub struct Binding {
    /// Where the tensor goes.
    pub slot: Slot,
    /// Its name in a file; that of a layer's tensor follows `blk.N.`.
    pub name: &'static str,
    /// Which layers have it.
    pub presence: Presence,
    /// What it is for.
    pub role: Role,
    /// Its dimensions, the fastest first, in a layer of a kind.
    dims: fn(&Config, LayerKind) -> Vec<usize>,
}

/// A tensor that a model of a certain configuration has.
#[derive(Debug, Clone)]
pub struct ExpectedTensor {
    /// Its row of the table.
    pub binding: &'static Binding,
    /// Its layer, if it belongs to one.
    pub layer: Option<usize>,
    /// Its full name.
    pub name: String,
    /// Its dimensions, the fastest first.
    pub dims: Vec<u64>,
}

impl Binding {
    /// The row of `slot`.
    pub fn of(slot: Slot) -> &'static Binding {
        &TABLE[slot as usize]
    }

    /// The tensor of this row in `layer` (`None` for one outside of the layers).
    ///
    /// # Panics
    /// If `config` has no such layer.
    pub fn expected(&'static self, config: &Config, layer: Option<usize>) -> ExpectedTensor {
        let name = match layer {
            Some(index) => format!("blk.{index}.{}", self.name),
            None => self.name.to_owned(),
        };
        // Tensors outside of the layers have a shape that no kind changes.
        let kind = layer.map_or(LayerKind::Swa, |index| config.layers[index].kind);
        let dims = (self.dims)(config, kind).into_iter().map(|dim| dim as u64).collect();
        ExpectedTensor { binding: self, layer, name, dims }
    }
}

impl ExpectedTensor {
    /// Whether `dims` hold this tensor's elements in this tensor's order.
    ///
    /// Writers differ in two harmless ways: some drop dimensions of 1 at the
    /// end, and some keep the groups of the first output projection apart.
    pub fn accepts_dims(&self, dims: &[u64], config: &Config) -> bool {
        let (found, expected) = (without_trailing_ones(dims), without_trailing_ones(&self.dims));
        let grouped = [self.dims[0], config.output_rank as u64, config.output_groups as u64];
        found == expected
            || self.binding.slot == Slot::OutputA && found == without_trailing_ones(&grouped)
    }
}

/// All tensors of a model of this configuration, in the order in which they are written.
pub fn expected_tensors(config: &Config) -> impl Iterator<Item = ExpectedTensor> {
    let root = TABLE.iter().filter(|row| row.presence == Presence::Model);
    let root = root.map(|row| row.expected(config, None));
    let layers = config.layers.iter().enumerate().flat_map(move |(index, layer)| {
        let rows = TABLE.iter().filter(|row| row.presence.covers(layer));
        rows.map(move |row| row.expected(config, Some(index)))
    });
    root.chain(layers)
}

fn without_trailing_ones(dims: &[u64]) -> &[u64] {
    let kept = dims.iter().rposition(|&dim| dim != 1).map_or(1, |last| last + 1);
    &dims[..kept.min(dims.len())]
}

const fn row(
    slot: Slot,
    name: &'static str,
    presence: Presence,
    role: Role,
    dims: fn(&Config, LayerKind) -> Vec<usize>,
) -> Binding {
    Binding { slot, name, presence, role, dims }
}

// A position bias has one row for each position inside a window.
#[rustfmt::skip]
static TABLE: &[Binding] = {
    use Presence::*;
    use Role::*;
    use Slot as S;
    &[
        row(S::TokenEmbedding, "token_embd.weight", Model, Embedding, |c, _| vec![c.hidden, c.vocab]),
        row(S::OutputHcFunction, "output_hc_fn.weight", Model, HyperConnection, |c, _| vec![STREAMS * c.hidden, STREAMS]),
        row(S::OutputHcBase, "output_hc_base.weight", Model, Vector, |_, _| vec![STREAMS]),
        row(S::OutputHcScale, "output_hc_scale.weight", Model, Vector, |_, _| vec![1]),
        row(S::OutputNorm, "output_norm.weight", Model, Vector, |c, _| vec![c.hidden]),
        row(S::Output, "output.weight", Model, Output, |c, _| vec![c.hidden, c.vocab]),

        row(S::AttnHcFunction, "hc_attn_fn.weight", Layers, HyperConnection, |c, _| vec![STREAMS * c.hidden, HC_MIX]),
        row(S::AttnHcBase, "hc_attn_base.weight", Layers, Vector, |_, _| vec![HC_MIX]),
        row(S::AttnHcScale, "hc_attn_scale.weight", Layers, Vector, |_, _| vec![3]),
        row(S::AttnNorm, "attn_norm.weight", Layers, Vector, |c, _| vec![c.hidden]),
        row(S::QA, "attn_q_a.weight", Layers, Attention, |c, _| vec![c.hidden, c.q_rank]),
        row(S::QANorm, "attn_q_a_norm.weight", Layers, Vector, |c, _| vec![c.q_rank]),
        row(S::QB, "attn_q_b.weight", Layers, Attention, |c, _| vec![c.q_rank, c.heads * HEAD_DIM]),
        row(S::Kv, "attn_kv.weight", Layers, Attention, |c, _| vec![c.hidden, HEAD_DIM]),
        row(S::KvNorm, "attn_kv_a_norm.weight", Layers, Vector, |_, _| vec![HEAD_DIM]),
        row(S::Sinks, "attn_sinks.weight", Layers, Vector, |c, _| vec![c.heads]),
        row(S::OutputA, "attn_output_a.weight", Layers, Attention, |c, _| vec![c.heads_per_group() * HEAD_DIM, c.output_groups * c.output_rank]),
        row(S::OutputB, "attn_output_b.weight", Layers, Attention, |c, _| vec![c.output_groups * c.output_rank, c.hidden]),

        row(S::CompressorKv, "attn_compressor_kv.weight", Compressed, Compressor, |c, kind| vec![c.hidden, kind.compressor_width()]),
        row(S::CompressorGate, "attn_compressor_gate.weight", Compressed, Compressor, |c, kind| vec![c.hidden, kind.compressor_width()]),
        row(S::CompressorPositionBias, "attn_compressor_ape.weight", Compressed, PositionBias, |_, kind| vec![kind.compressor_width(), kind.ratio()]),
        row(S::CompressorNorm, "attn_compressor_norm.weight", Compressed, Vector, |_, _| vec![HEAD_DIM]),

        row(S::IndexerQB, "indexer.attn_q_b.weight", Csa, Indexer, |c, _| vec![c.q_rank, c.index_heads * INDEX_DIM]),
        row(S::IndexerHeadWeights, "indexer.proj.weight", Csa, Indexer, |c, _| vec![c.hidden, c.index_heads]),
        row(S::IndexerKv, "indexer_compressor_kv.weight", Csa, Compressor, |c, _| vec![c.hidden, 2 * INDEX_DIM]),
        row(S::IndexerGate, "indexer_compressor_gate.weight", Csa, Compressor, |c, _| vec![c.hidden, 2 * INDEX_DIM]),
        row(S::IndexerPositionBias, "indexer_compressor_ape.weight", Csa, PositionBias, |_, kind| vec![2 * INDEX_DIM, kind.ratio()]),
        row(S::IndexerNorm, "indexer_compressor_norm.weight", Csa, Vector, |_, _| vec![INDEX_DIM]),

        row(S::FfnHcFunction, "hc_ffn_fn.weight", Layers, HyperConnection, |c, _| vec![STREAMS * c.hidden, HC_MIX]),
        row(S::FfnHcBase, "hc_ffn_base.weight", Layers, Vector, |_, _| vec![HC_MIX]),
        row(S::FfnHcScale, "hc_ffn_scale.weight", Layers, Vector, |_, _| vec![3]),
        row(S::FfnNorm, "ffn_norm.weight", Layers, Vector, |c, _| vec![c.hidden]),
        row(S::Router, "ffn_gate_inp.weight", Layers, Router, |c, _| vec![c.hidden, c.experts]),
        row(S::RouterBias, "exp_probs_b.bias", ScoreRouted, Vector, |c, _| vec![c.experts]),
        row(S::RouterTable, "ffn_gate_tid2eid.weight", HashRouted, Table, |c, _| vec![c.experts_used, c.vocab]),
        row(S::ExpertGate, "ffn_gate_exps.weight", Layers, ExpertGateUp, |c, _| vec![c.hidden, c.expert_width, c.experts]),
        row(S::ExpertUp, "ffn_up_exps.weight", Layers, ExpertGateUp, |c, _| vec![c.hidden, c.expert_width, c.experts]),
        row(S::ExpertDown, "ffn_down_exps.weight", Layers, ExpertDown, |c, _| vec![c.expert_width, c.hidden, c.experts]),
        row(S::SharedGate, "ffn_gate_shexp.weight", Layers, SharedExpert, |c, _| vec![c.hidden, c.expert_width]),
        row(S::SharedUp, "ffn_up_shexp.weight", Layers, SharedExpert, |c, _| vec![c.hidden, c.expert_width]),
        row(S::SharedDown, "ffn_down_shexp.weight", Layers, SharedExpert, |c, _| vec![c.expert_width, c.hidden]),
    ]
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_has_its_own_row() {
        for (index, row) in TABLE.iter().enumerate() {
            assert_eq!(row.slot as usize, index, "{}", row.name);
            assert!(std::ptr::eq(Binding::of(row.slot), row));
        }
        assert_eq!(TABLE.len(), Slot::SharedDown as usize + 1);
    }

    #[test]
    fn ones_at_the_end_do_not_matter() {
        assert_eq!(without_trailing_ones(&[1024, 1]), [1024]);
        assert_eq!(without_trailing_ones(&[1, 4, 1]), [1, 4]);
        assert_eq!(without_trailing_ones(&[1, 1]), [1]);
    }
}
