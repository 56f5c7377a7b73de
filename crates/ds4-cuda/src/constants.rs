//! Numbers that Rust and the kernels share. Each exists once: kernels get them as
//! `constants.cuh`, a header that is written for them when they are compiled.

use ds4_engine::{MAX_REWIND as ENGINE_MAX_REWIND, rope::PAIRS as ROPE_PAIRS, rows::RowCodec};
use ds4_model::{
    config::{self, LayerKind},
    synth::generator::CHOICES,
};
use gguf::TensorType;

use crate::formats::{self, WeightType};

macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
        $($(#[$doc])* pub(crate) const $name: usize = $value;)*

        /// Names and values of all.
        pub(crate) const ALL: &[(&str, usize)] = &[$((stringify!($name), $name)),*];
    };
}

constants! {
    /// Elements of a query head, and of a key/value row.
    HEAD_DIM = config::HEAD_DIM;
    /// Rotated elements, the last ones of a row.
    ROPE_DIM = config::ROPE_DIM;
    /// Elements that are not rotated.
    NOPE_DIM = config::NOPE_DIM;
    /// Pairs of rotated elements.
    PAIRS = ROPE_PAIRS;
    /// Tokens of the sliding window.
    WINDOW = config::WINDOW;
    /// Residual streams.
    STREAMS = config::STREAMS;
    /// Outputs of a mixing function.
    HC_MIX = config::HC_MIX;
    /// Elements of an index key.
    INDEX_DIM = config::INDEX_DIM;
    /// Tokens of a compressed row in CSA layers.
    CSA_RATIO = LayerKind::Csa.ratio();
    /// Tokens that a session can go back: rings have so many slots more than they need.
    MAX_REWIND = ENGINE_MAX_REWIND;
    /// Bytes of a stored key/value row with rounding.
    KV_ROW = RowCodec::Fp8Kv.row_bytes();
    /// Bytes of a stored index key with rounding.
    INDEX_ROW = RowCodec::Fp4Index.row_bytes();

    /// Threads of a warp.
    WARP = 32;

    /// Threads of a block of `argmax`.
    ARGMAX_THREADS = 256;
    /// Logits that each of them reads.
    ARGMAX_THREAD_LOGITS = 16;
    /// What stands for the token of a row with a NaN or without a largest finite number.
    UNUSABLE_TOKEN = u32::MAX as usize;

    /// Threads of a block of attention.
    ATTEND_THREADS = 256;
    /// Query heads of a tile.
    TILE_HEADS = 16;
    /// Rows of a chunk in decoding, and in prefill where shared memory is small.
    SHORT_CHUNK = 32;
    /// Rows of a chunk in prefill.
    LONG_CHUNK = 64;
    /// Parts of a query's rows in decoding, at most. The 640 rows of a CSA layer then make one
    /// chunk each: a second one took as long as the first.
    MAX_SPLITS = 20;

    /// Bytes of shared memory of a block of attention with a tile of heads and short chunks.
    ATTEND_SHARED_16X32 = attend_shared(1, SHORT_CHUNK);
    /// With four tiles.
    ATTEND_SHARED_64X32 = attend_shared(4, SHORT_CHUNK);
    /// With four tiles and long chunks.
    ATTEND_SHARED_64X64 = attend_shared(4, LONG_CHUNK);

    /// Threads of a block of `finish_inputs`.
    FINISH_THREADS = 512;
    /// Parts of its work, by bit.
    PART_COMPRESSOR = 0;
    /// The indexer's compressor.
    PART_INDEX = 1;
    /// The key/value rows.
    PART_KEY_VALUES = 2;
    /// The query latent.
    PART_LATENT = 3;

    /// Threads of a block of `select_rows`, at most.
    SELECT_THREADS = 512;
    /// Index keys that a warp scores at a time.
    KEY_TILE = 32;
    /// Warps that share a tile of keys, each with a part of the heads, where there are few keys.
    HEAD_PARTS = 4;

    /// Columns of a slice of the streams.
    SLICE = 64;
    /// Dot products kept of a slice, and after them the sum of squares, padded to a warp.
    SLICE_SUMS = 32;
    /// Threads that mix streams and collapse them: one for each stream's column of a slice.
    MIX_THREADS = STREAMS * SLICE;
    /// Rows of a block of `mix_slices`.
    SLICE_ROWS = 4;
    /// Rows of a block of `read_by_rows`: as many as an instruction of the tensor cores takes.
    BLOCK_ROWS = 8;

    /// Rows of a tile of weights.
    TILE = formats::TILE;
    /// Number that stands for BF16 in a file; kernels have its weights as F16.
    BF16_SOURCE = WeightType::ALL.len();
    /// Warps of a block of `repack`, a unit each.
    REPACK_WARPS = 4;
    /// Warps of a block that decodes.
    DECODE_WARPS = 8;
    /// Products of a launch that decodes.
    MOST_PRODUCTS = 12;
    /// Units whose activations are on their way or in use, where a block decodes more than 8 rows.
    BATCH_STAGES = 4;
    /// Bytes of such a unit for eight rows.
    BATCH_STAGE_BYTES = 2048;
    /// Threads of a block of prefill.
    PREFILL_THREADS = 128;
    /// Activation rows of a block of `prefill_products`, and its weight rows.
    PREFILL_ROWS = 128;
    /// Stages of 64 columns of activations that such a block has in shared memory.
    PREFILL_STAGES = 4;

    /// Experts that there can be.
    MOST_EXPERTS = 512;
    /// Rows that are routed right after the router's product, at most.
    MOST_FEW_ROWS = 64;
    /// Pairs of rows and experts that are routed right after the router's product, at most.
    MOST_FEW_PAIRS = 1024;
    /// Warps of a block of `route`, a row each.
    ROUTE_WARPS = 8;
    /// Threads of a block of `permute_pairs`, one for each expert.
    PERMUTE_THREADS = 512;
    /// Pairs of an expert that make a tile in prefill.
    TILE_PAIRS = 64;
    /// Columns that share a scale as integers.
    INTEGER_COLUMNS = 256;
    /// Activation rows that a block multiplies as integers at a time.
    INTEGER_ROWS = 2;
    /// Bytes that the warps of a block of `experts_gate_up_q2` share (`GateUpShared`).
    GATE_UP_SHARED = 44160;
    /// Bytes of a row's unit there (`InputUnit`).
    INPUT_UNIT = 528;
    /// Bytes that the warps of a block of `experts_down_q2` share (`DownShared`).
    DOWN_SHARED = 48256;
    /// Bytes of a row's unit there (`HiddenUnit`).
    HIDDEN_UNIT = 1104;

    /// Threads of a block of `embed`.
    EMBED_THREADS = 256;
    /// Threads of a block that generates weights.
    GENERATE_THREADS = 256;
    /// Choices of a scale in generated weights.
    SCALE_CHOICES = CHOICES;
    /// Number of F32 in files.
    FILE_F32 = TensorType::F32.id() as usize;
    /// Number of F16 in files.
    FILE_F16 = TensorType::F16.id() as usize;
    /// Number of BF16 in files.
    FILE_BF16 = TensorType::BF16.id() as usize;
}

/// Shared memory of a block of attention: queries and rows, scores, weights and stored rows; the
/// kernels compare it with theirs.
const fn attend_shared(tiles: usize, chunk: usize) -> usize {
    let heads = TILE_HEADS * tiles;
    let (head_tiles, score_rows) = if tiles == 1 { (1, 16) } else { (2, 32) };
    let parts = ATTEND_THREADS / WARP / (tiles / head_tiles * (chunk / score_rows));
    let halves = (heads + chunk) * (HEAD_DIM + 8) + heads * (chunk + 8);
    let floats = parts * heads * (chunk + 4) + 3 * heads;
    2 * halves + 4 * floats + chunk * KV_ROW
}
