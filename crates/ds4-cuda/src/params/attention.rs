//! Of attention, its inputs and the indexer: attention_decode.cu, attention_prefill.cu,
//! compressor.cu, indexer.cu and key_value.cu.

use crate::kernel::{Pointer, kernels, params};

params! {
    /// The rows of a step.
    Step {
        token: Pointer,
        position: Pointer,
        session: Pointer,
        span_position: Pointer,
        span_row: Pointer,
    }

    /// Some rows of a step in one layer.
    StepLayer {
        step: Step,
        caches: Pointer,
        first_row: u32,
        layer: u32,
        layers: u32,
        ratio: u32,
        rounding: i32,
        epsilon: f32,
    }

    AttentionParams {
        at: StepLayer,
        queries: Pointer,
        kv_rows: Pointer,
        selected: Pointer,
        rotations: Pointer,
        sinks: Pointer,
        partial_sums: Pointer,
        partial_totals: Pointer,
        out: Pointer,
        heads: u32,
        top_k: u32,
        scale: f32,
    }

    RotationsParams {
        step: Step,
        frequencies: Pointer,
        rotations: Pointer,
        rows: u32,
    }

    StoreWindowParams {
        at: StepLayer,
        kv_rows: Pointer,
    }

    /// A compressor's products and weights.
    CompressorSource {
        values: Pointer,
        scores: Pointer,
        bias: Pointer,
        norm: Pointer,
        stride: u32,
    }

    FinishInputsParams {
        at: StepLayer,
        compressor: CompressorSource,
        index: CompressorSource,
        frequencies: Pointer,
        rotations: Pointer,
        raw_kv: Pointer,
        kv_norm: Pointer,
        kv_rows: Pointer,
        raw_latent: Pointer,
        latent_norm: Pointer,
        latent: Pointer,
        latent_low: Pointer,
        parts: u32,
        store: i32,
        kv_stride: u32,
        latent_stride: u32,
        latent_width: u32,
    }

    StoreInputsParams {
        at: StepLayer,
        compressor: CompressorSource,
        index: CompressorSource,
    }

    SelectRowsParams {
        at: StepLayer,
        queries: Pointer,
        head_weights: Pointer,
        rotations: Pointer,
        scores: Pointer,
        arrivals: Pointer,
        selected: Pointer,
        heads: u32,
        top_k: u32,
        query_stride: u32,
        weight_stride: u32,
        parts: u32,
        capacity: u32,
    }
}

kernels! {
    FLASH_DECODE_16: AttentionParams = "flash_decode_16";
    FLASH_DECODE_64: AttentionParams = "flash_decode_64";
    COMBINE_SPLITS: AttentionParams = "combine_splits";
    ATTEND_PREFILL_64X64: AttentionParams = "attend_prefill_64x64";
    ATTEND_PREFILL_64X32: AttentionParams = "attend_prefill_64x32";
    ATTEND_PREFILL_16X32: AttentionParams = "attend_prefill_16x32";
    ROTATIONS: RotationsParams = "rotations";
    STORE_WINDOW: StoreWindowParams = "store_window";
    FINISH_INPUTS: FinishInputsParams = "finish_inputs";
    STORE_INPUTS: StoreInputsParams = "store_inputs";
    SELECT_ROWS: SelectRowsParams = "select_rows";
}

impl CompressorSource {
    /// No compressor.
    pub const NONE: CompressorSource = CompressorSource {
        values: Pointer::NULL,
        scores: Pointer::NULL,
        bias: Pointer::NULL,
        norm: Pointer::NULL,
        stride: 0,
    };
}
