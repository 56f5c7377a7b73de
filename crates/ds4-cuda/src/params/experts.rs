//! Of the routed experts: experts.cu, experts_q2.cu and prefill_products.cu.

use super::{
    products::Product,
    routing::{Permutation, Quantised},
    weights::PackedMatrix,
};
use crate::kernel::{Pointer, kernels, params};

params! {
    /// One matrix of all experts.
    ExpertMatrix {
        weights: PackedMatrix,
        ty: i32,
        rows: i32,
        columns: i32,
    }

    GateUpAnyParams {
        gate: ExpertMatrix,
        up: ExpertMatrix,
        permutation: Permutation,
        pair_weights: Pointer,
        x: Pointer,
        hidden: Pointer,
        iq2_grid: Pointer,
        used: i32,
        limit: f32,
    }

    DownAnyParams {
        down: ExpertMatrix,
        permutation: Permutation,
        hidden: Pointer,
        out: Pointer,
        iq2_grid: Pointer,
        shared: Product,
        used: i32,
        rows: i32,
    }

    GateUpQ2Params {
        gate: ExpertMatrix,
        up: ExpertMatrix,
        permutation: Permutation,
        pair_weights: Pointer,
        x: Quantised,
        hidden: Pointer,
        selectors: Pointer,
        shared: Product,
        experts: i32,
        used: i32,
        limit: f32,
        one: u32,
        rows: i32,
    }

    DownQ2Params {
        down: ExpertMatrix,
        permutation: Permutation,
        hidden: Pointer,
        out: Pointer,
        experts: i32,
        used: i32,
    }

    PrefillGateUpParams {
        gate: ExpertMatrix,
        up: ExpertMatrix,
        permutation: Permutation,
        tiles: Pointer,
        tile_count: Pointer,
        pair_weights: Pointer,
        x: Pointer,
        hidden: Pointer,
        iq2_grid: Pointer,
        used: i32,
        limit: f32,
    }

    PrefillDownParams {
        down: ExpertMatrix,
        permutation: Permutation,
        tiles: Pointer,
        tile_count: Pointer,
        hidden: Pointer,
        out: Pointer,
        iq2_grid: Pointer,
        used: i32,
    }
}

kernels! {
    EXPERTS_GATE_UP_ANY: GateUpAnyParams = "experts_gate_up_any";
    EXPERTS_DOWN_ANY: DownAnyParams = "experts_down_any";
    EXPERTS_GATE_UP_Q2: GateUpQ2Params = "experts_gate_up_q2";
    EXPERTS_DOWN_Q2: DownQ2Params = "experts_down_q2";
    PREFILL_GATE_UP_Q2: PrefillGateUpParams = "prefill_gate_up_q2";
    PREFILL_GATE_UP_ANY: PrefillGateUpParams = "prefill_gate_up_any";
    PREFILL_DOWN_Q2: PrefillDownParams = "prefill_down_q2";
    PREFILL_DOWN_ANY: PrefillDownParams = "prefill_down_any";
}
