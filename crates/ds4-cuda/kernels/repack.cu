// From a file's layout to the order in which lanes read weights (see formats.cuh): codes, scales
// and further scales of each unit. Values stay as they are, but F32 becomes the sum of two halves,
// and BF16 one half.
//
// Input: rows of a matrix as in a file [rows, row_bytes].
// Output: the same rows, packed in tiles of 16.
// Grid: (units of all tiles / 4). Block: 128 threads, a warp for each unit.
// Plain Rust: `dequantize_row` in crates/gguf reads the same values from the file's layout.

#include "formats.cuh"

__device__ inline u32 read16(const u8* p) { return p[0] | p[1] << 8; }
__device__ inline u32 read32(const u8* p) { return read16(p) | read16(p + 2) << 16; }

// The rows of a tile in the source. Rows beyond the matrix read as null.
struct TileRows {
    const u8* first;
    size_t stride;
    int rows;

    __device__ inline const u8* row(int r) const { return r < rows ? first + r * stride : nullptr; }
};

__device__ inline uint2 eight_bytes(const u8* row, size_t at) {
    return row ? make_uint2(read32(row + at), read32(row + at + 4)) : make_uint2(0, 0);
}

__device__ inline uint4 both_rows(uint2 low, uint2 high) {
    return make_uint4(low.x, low.y, high.x, high.y);
}

__device__ inline void repack_q8_0(
    const TileRows& from, const PackedMatrix& to, size_t unit, int at, int lane
) {
    int g = lane / 4, t = lane % 4;
    u32 scales[4];
    for (int s = 0; s < 4; ++s) {
        size_t block = (size_t)(4 * at + s) * 34;
        uint4 w = both_rows(eight_bytes(from.row(g), block + 2 + 8 * t),
                            eight_bytes(from.row(g + 8), block + 2 + 8 * t));
        // Weights + 128.
        ((uint4*)to.codes)[unit * 128 + 32 * s + lane] = make_uint4(
            w.x ^ 0x80808080, w.y ^ 0x80808080, w.z ^ 0x80808080, w.w ^ 0x80808080);
        const u8 *a = from.row(g), *b = from.row(g + 8);
        scales[s] = (a ? read16(a + block) : 0) | (b ? read16(b + block) : 0) << 16;
    }
    if (t == 0) {
        ((uint4*)to.scales)[unit * 8 + g] = make_uint4(scales[0], scales[1], scales[2], scales[3]);
    }
}

// F16, BF16 or F32; of F32 what halves leave over goes to the scales.
__device__ inline void repack_floats(
    const TileRows& from, const PackedMatrix& to, size_t unit, int at, int lane, int source
) {
    int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const u8* row = from.row(g + i % 2 * 8);
        u16 high[8], low[8];
        for (int k = 0; k < 8; ++k) {
            size_t column = 64 * at + i / 2 * 32 + 8 * t + k;
            high[k] = low[k] = 0;
            if (!row) continue;
            if (source == F16) {
                high[k] = read16(row + 2 * column);
                continue;
            }
            float x = __uint_as_float(
                source == F32 ? read32(row + 4 * column) : read16(row + 2 * column) << 16);
            high[k] = float_to_half(x);
            low[k] = float_to_half(x - half_to_float(high[k]));
        }
        auto pack = [](const u16* h) {
            return make_uint4(h[0] | h[1] << 16, h[2] | h[3] << 16, h[4] | h[5] << 16,
                              h[6] | h[7] << 16);
        };
        size_t to_at = unit * 128 + 32 * i + lane;
        ((uint4*)to.codes)[to_at] = pack(high);
        if (source == F32) ((uint4*)to.scales)[to_at] = pack(low);
    }
}

__device__ inline void repack_iq2_xxs(
    const TileRows& from, const PackedMatrix& to, size_t unit, int at, int lane
) {
    int g = lane / 4, t = lane % 4;
    u32 indices[4] = {0, 0, 0, 0}, all_signs[4] = {0, 0, 0, 0}, scales[2] = {0, 0}, d = 0;
    for (int r = 0; r < 2; ++r) {
        const u8* row = from.row(g + 8 * r);
        if (!row) continue;
        const u8* block = row + (size_t)at * 66;
        d |= read16(block) << 16 * r;
        for (int s = 0; s < 8; ++s) {
            u32 grid = read32(block + 2 + 8 * s), rest = read32(block + 6 + 8 * s);
            u32 signs = rest >> 7 * t & 127;
            signs |= (__popc(signs) & 1) << 7;
            int entry = s % 2 * 2 + r;
            indices[s / 2] |= (grid >> 8 * t & 0xff) << 8 * entry;
            for (int i = 0; i < 8; ++i) {
                all_signs[s / 2] |= (signs >> i & 1) << (i % 2 * 16 + i / 2 * 4 + entry);
            }
            scales[r] |= (rest >> 28) << 4 * s;
        }
    }
    uint4* weights = (uint4*)to.codes + unit * 64 + lane;
    weights[0] = make_uint4(indices[0], all_signs[0], indices[1], all_signs[1]);
    weights[32] = make_uint4(indices[2], all_signs[2], indices[3], all_signs[3]);
    if (t == 0) {
        ((uint2*)to.scales)[unit * 8 + g] = make_uint2(scales[0], scales[1]);
        ((u32*)to.more_scales)[unit * 8 + g] = d;
    }
}

__device__ inline void repack_q2_k(
    const TileRows& from, const PackedMatrix& to, size_t unit, int at, int lane
) {
    int g = lane / 4, t = lane % 4;
    const u8 *low = from.row(g), *high = from.row(g + 8);
    size_t block = (size_t)at * 84;
    for (int r = 0; r < 2; ++r) {
        const u8* row = r ? high : low;
        u32 words[4] = {0, 0, 0, 0};
        for (int k = 0; row && k < 8; ++k) {
            for (int s = 0; s < 8; ++s) {
                u32 q = row[block + 16 + s / 4 * 32 + 8 * t + k] >> 2 * (s % 4) & 3;
                words[k / 2] |= q << (k % 2 * 16 + 2 * s);
            }
        }
        ((uint4*)to.codes)[(unit * 2 + r) * 32 + lane] =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (t < 2) {
        // Groups 2·step + t.
        auto groups = [&](const u8* row) {
            u32 words[2] = {0, 0};
            for (int s = 0; row && s < 8; ++s) {
                words[s / 4] |= row[block + 2 * s + t] << 8 * (s % 4);
            }
            return make_uint2(words[0], words[1]);
        };
        ((uint4*)to.scales)[(unit * 8 + g) * 2 + t] = both_rows(groups(low), groups(high));
    }
    if (t == 0) {
        ((uint2*)to.more_scales)[unit * 8 + g] = make_uint2(
            low ? read32(low + block + 80) : 0, high ? read32(high + block + 80) : 0);
    }
}

__device__ inline void repack_q4_k(
    const TileRows& from, const PackedMatrix& to, size_t unit, int at, int lane
) {
    int g = lane / 4, t = lane % 4;
    const u8 *low = from.row(g), *high = from.row(g + 8);
    size_t block = (size_t)at * 144;
    for (int i = 0; i < 4; ++i) {
        size_t from_at = block + 16 + 32 * i + 8 * t;
        ((uint4*)to.codes)[(unit * 4 + i) * 32 + lane] =
            both_rows(eight_bytes(low, from_at), eight_bytes(high, from_at));
    }
    if (t < 2) {
        const u8* row = t ? high : low;
        u32 scale[2] = {0, 0}, minimum[2] = {0, 0};
        for (int j = 0; row && j < 8; ++j) {
            const u8* s = row + block + 4;
            u32 a = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
            u32 m = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
            scale[j / 4] |= a << 8 * (j % 4);
            minimum[j / 4] |= m << 8 * (j % 4);
        }
        ((uint4*)to.scales)[(unit * 8 + g) * 2 + t] =
            make_uint4(scale[0], scale[1], minimum[0], minimum[1]);
    }
    if (t == 0) {
        ((uint2*)to.more_scales)[unit * 8 + g] =
            make_uint2(low ? read32(low + block) : 0, high ? read32(high + block) : 0);
    }
}

__device__ inline void repack_mxfp4(
    const TileRows& from, const PackedMatrix& to, size_t unit, int at, int lane
) {
    int g = lane / 4, t = lane % 4;
    // Columns 8t … 8t+7 are the low nibbles of eight bytes, or the high ones.
    auto nibbles = [&](const u8* row, int step) {
        u32 out = 0;
        for (int k = 0; row && k < 8; ++k) {
            u32 b = row[(size_t)(4 * at + step) * 17 + 1 + t % 2 * 8 + k];
            out |= (t < 2 ? b & 15 : b >> 4) << 4 * k;
        }
        return out;
    };
    const u8 *low = from.row(g), *high = from.row(g + 8);
    u32 exponents[2] = {0, 0};
    for (int s = 0; s < 4; ++s) {
        size_t block = (size_t)(4 * at + s) * 17;
        u32 a = low ? low[block] : 0, b = high ? high[block] : 0;
        exponents[s / 2] |= (a | b << 8) << 16 * (s % 2);
    }
    for (int i = 0; i < 2; ++i) {
        ((uint4*)to.codes)[unit * 64 + 32 * i + lane] = make_uint4(
            nibbles(low, 2 * i), nibbles(high, 2 * i), nibbles(low, 2 * i + 1),
            nibbles(high, 2 * i + 1));
    }
    if (t == 0) ((uint2*)to.scales)[unit * 8 + g] = make_uint2(exponents[0], exponents[1]);
}

struct RepackParams {
    // [rows, row_bytes]: the matrix from row 16·first_tile on, as in a file.
    const u8* source;
    PackedMatrix to;
    u64 row_bytes;
    // A type of weights, or BF16_SOURCE for BF16, which is F16 on the device.
    int source_type;
    int rows;
    int columns;
    int first_tile;
};
SAME_IN_RUST(RepackParams);

// One warp per unit of a tile.
extern "C" __global__ void __launch_bounds__(REPACK_WARPS * WARP) repack(
    __grid_constant__ const RepackParams p
) {
    int source_type = p.source_type, rows = p.rows, columns = p.columns;
    const PackedMatrix& to = p.to;
    int steps = source_type == BF16_SOURCE ? unit_steps(F16) : unit_steps(source_type);
    int units = columns / (32 * steps), lane = threadIdx.x % WARP;
    size_t i = (size_t)blockIdx.x * REPACK_WARPS + threadIdx.x / WARP;
    int tile = i / units, at = i % units;
    // Weights without a file are made by a kernel right before this one.
    wait_for_dependencies();
    if (16 * tile >= rows) return;
    TileRows from = {p.source + (size_t)tile * 16 * p.row_bytes, p.row_bytes, rows - 16 * tile};
    size_t unit = (size_t)(p.first_tile + tile) * units + at;
    switch (source_type) {
        case Q8_0: repack_q8_0(from, to, unit, at, lane); break;
        case IQ2_XXS: repack_iq2_xxs(from, to, unit, at, lane); break;
        case Q2_K: repack_q2_k(from, to, unit, at, lane); break;
        case Q4_K: repack_q4_k(from, to, unit, at, lane); break;
        case MXFP4: repack_mxfp4(from, to, unit, at, lane); break;
        default: repack_floats(from, to, unit, at, lane, source_type);
    }
}
