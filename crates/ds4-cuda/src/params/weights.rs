//! Of weights on their way to the device: repack.cu and generate.cu.

use bytemuck::{Pod, Zeroable};

use crate::kernel::{Pointer, kernels, params};

params! {
    /// A matrix in device memory: codes in the order in which lanes read them, and their scales.
    #[derive(Debug, PartialEq, Eq, Pod, Zeroable)]
    PackedMatrix {
        codes: Pointer,
        scales: Pointer,
        more_scales: Pointer,
    }

    RepackParams {
        source: Pointer,
        to: PackedMatrix,
        row_bytes: u64,
        source_type: i32,
        rows: i32,
        columns: i32,
        first_tile: i32,
    }

    GenerateBlocksParams {
        out: Pointer,
        choices: Pointer,
        first: u64,
        bytes: u64,
        key: u64,
        block_bytes: u32,
        scale_at: u32,
        scale_bytes: u32,
    }

    GenerateFloatsParams {
        out: Pointer,
        first: u64,
        count: u64,
        key: u64,
        ty: u32,
        middle: f32,
        half_step: f32,
    }
}

kernels! {
    REPACK: RepackParams = "repack";
    GENERATE_BLOCKS: GenerateBlocksParams = "generate_blocks";
    GENERATE_FLOATS: GenerateFloatsParams = "generate_floats";
}

impl PackedMatrix {
    /// No matrix.
    pub const NONE: PackedMatrix =
        PackedMatrix { codes: Pointer::NULL, scales: Pointer::NULL, more_scales: Pointer::NULL };
}
