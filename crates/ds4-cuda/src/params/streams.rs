//! Of the residual streams and of the head: hyper_connection.cu, embed.cu and argmax.cu.

use super::{attention::Step, weights::PackedMatrix};
use crate::kernel::{Pointer, kernels, params};

params! {
    /// Where a mixing function's weights are.
    MixFunction {
        weights: Pointer,
        halves: i32,
        outputs: i32,
    }

    /// What makes weights of dot products.
    MixConstants {
        base: Pointer,
        scale: Pointer,
        hc_epsilon: f32,
        rms_epsilon: f32,
        sinkhorn_iterations: i32,
    }

    ReadStreamsParams {
        streams: Pointer,
        y: Pointer,
        post: Pointer,
        comb: Pointer,
        function: MixFunction,
        constants: MixConstants,
        norm: Pointer,
        sums: Pointer,
        arrivals: Pointer,
        x: Pointer,
        x_low: Pointer,
        wanted: Pointer,
        slots: i32,
        hidden: i32,
        first_row: i32,
        end_row: i32,
    }

    EmbedParams {
        step: Step,
        table: PackedMatrix,
        streams: Pointer,
        iq2_grid: Pointer,
        ty: i32,
        hidden: i32,
    }

    ArgmaxParams {
        logits: Pointer,
        parts: Pointer,
        arrivals: Pointer,
        tokens: Pointer,
        vocab: u32,
    }
}

kernels! {
    READ_BY_SLICES: ReadStreamsParams = "read_by_slices";
    MIX_SLICES: ReadStreamsParams = "mix_slices";
    COLLAPSE_ROWS: ReadStreamsParams = "collapse_rows";
    READ_BY_ROWS: ReadStreamsParams = "read_by_rows";
    EMBED: EmbedParams = "embed";
    ARGMAX: ArgmaxParams = "argmax";
}
