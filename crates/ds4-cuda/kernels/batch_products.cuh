// Weights times 9 to 64 activation rows, for the files that build kernels from it.
//
// The warps of a block have a tile of 16 weight rows each and the same columns, so the activations
// come to shared memory once for all of them: read by every warp on its own, they would take longer
// than the weights. Blocks share tiles as warps do in `run_product`, and add up in the same order,
// so that results have the same bits.
#pragma once

#include "products.cuh"

// Where blocks that share tiles meet.
struct Workspace {
    // Sums of each block's warps [blocks, 8, 32·TOKENS], four a lane.
    float4* sums;
    // A counter for each block, zero before and after.
    u32* arrivals;
};
SAME_IN_RUST(Workspace);

// Columns of a unit of eight rows for each of TOKENS groups, if EXACT with what rounding left over,
// in a ring.
template <int TYPE, int TOKENS, bool EXACT>
struct StagedRows {
    static constexpr int STEPS = unit_steps(TYPE), ROW = 64 * STEPS, PART = 8 * TOKENS * ROW;
    static constexpr int STAGE = EXACT ? 2 * PART : PART;
    static_assert(PART <= TOKENS * BATCH_STAGE_BYTES, "more than the launch has room for");

    u8* ring;
    const Product& p;
    int first, n;

    __device__ inline const u8* stage(int i) const { return ring + i % BATCH_STAGES * STAGE; }

    // Even and odd rows have their steps in turn, so that eight lanes of two rows use all banks.
    __device__ static inline int offset_of(int row, int step, int fragment) {
        return row * ROW + (64 * step ^ 64 * (row % 2)) + 16 * fragment;
    }

    // Starts the copy of a unit's columns, if there is one, by the whole block.
    __device__ inline void fetch(int i, int column) const {
        constexpr int ROW_FRAGMENTS = 4 * STEPS, FRAGMENTS = 8 * TOKENS * ROW_FRAGMENTS;
        u8* to = ring + i % BATCH_STAGES * STAGE;
#pragma unroll
        for (int j = 0; j < FRAGMENTS; j += DECODE_WARPS * WARP) {
            int k = j + threadIdx.x, row = k / ROW_FRAGMENTS, fragment = k % ROW_FRAGMENTS;
            if (k >= FRAGMENTS || column >= p.columns) break;
            size_t from = (size_t)min(first + row, n - 1) * p.x_stride + column + 8 * fragment;
            u8* at = to + offset_of(row, fragment / 4, fragment % 4);
            copy_async16(at, p.x + from);
            if (EXACT) copy_async16(at + PART, p.x_low + from);
        }
        copy_async_commit();
    }

    // Adds a unit's products.
    __device__ inline void multiply(
        Sums<TOKENS>& sums, const Unit<TYPE>& w, const u8* stage
    ) const {
        int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            uint4 x[TOKENS];
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) {
                x[i] = *(const uint4*)(stage + offset_of(8 * i + g, s, t));
            }
            Operands o = w.operands(s, nullptr, lane);
            RowPair f = w.factor(s);
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) {
                float d[4];
                begin_step(d, o, x[i]);
                if (EXACT) {
                    multiply_step(d, o, *(const uint4*)(stage + PART + offset_of(8 * i + g, s, t)));
                }
                add_scaled(sums, i, d, f);
            }
        }
    }
};

// Adds the products of units `first`, `first + stride`, … of the warp's tile. Weights are on their
// way before the activations are there.
template <int TYPE, int TOKENS, bool EXACT>
__device__ inline void multiply_staged(
    Sums<TOKENS>& sums, const PackedMatrix& w, int tile, int first, int stride,
    const StagedRows<TYPE, TOKENS, EXACT>& x
) {
    constexpr int COLUMNS = unit_steps(TYPE) * 32;
    int lane = threadIdx.x % WARP, units = x.p.columns / COLUMNS;
    Unit<TYPE> even, odd;
    if (first < units) even.load(w, units, tile, first, lane);
    if (first + stride < units) odd.load(w, units, tile, first + stride, lane);
    wait_for_dependencies();
    auto column = [&](int i) { return (first + i * stride) * COLUMNS; };
#pragma unroll
    for (int i = 0; i < BATCH_STAGES - 1; ++i) x.fetch(i, column(i));
    // All warps are done with the stage that is fetched next.
    auto next_stage = [&](int i) {
        copy_async_wait<BATCH_STAGES - 2>();
        __syncthreads();
        x.fetch(i + BATCH_STAGES - 1, column(i + BATCH_STAGES - 1));
        return x.stage(i);
    };
    for (int i = 0, u = first; u < units; i += 2, u += 2 * stride) {
        x.multiply(sums, even, next_stage(i));
        if (u + 2 * stride < units) even.load(w, units, tile, u + 2 * stride, lane);
        if (u + stride >= units) break;
        x.multiply(sums, odd, next_stage(i + 1));
        if (u + 3 * stride < units) odd.load(w, units, tile, u + 3 * stride, lane);
    }
    copy_async_wait<0>();
}

// The sums of a tile in the order of the parts: sums of one warp of each of `parts` blocks in a
// row.
template <int TOKENS>
__device__ inline void add_parts(Sums<TOKENS>& sums, const float4* from, int parts) {
    sums.clear();
    for (int part = 0; part < parts; ++part) {
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
            float4 v = from[((size_t)part * DECODE_WARPS * TOKENS + i) * WARP];
            sums.at[i][0] += v.x;
            sums.at[i][1] += v.y;
            sums.at[i][2] += v.z;
            sums.at[i][3] += v.w;
        }
    }
}

// A tile's results for rows `first` … of `n`.
template <int TOKENS>
__device__ inline void store_tile(
    const Product& p, const Sums<TOKENS>& sums, int tile, int first, int n
) {
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int token = first + 8 * i + 2 * t + j % 2, row = 16 * tile + g + j / 2 * 8;
            if (token >= n || row >= p.rows) continue;
            size_t at = (size_t)token * p.out_stride + row;
            if (p.out) p.out[at] = sums.at[i][j];
            if (p.out_half) p.out_half[at] = float_to_half(sums.at[i][j]);
        }
    }
}

// Tiles of a product that a block has; of a SwiGLU pair half of its warps have one of each matrix.
__device__ inline int batch_tiles(const Product& p) {
    return p.up.codes ? DECODE_WARPS / 2 : DECODE_WARPS;
}

// A product's tiles for rows `first` … of `n`: `block` counts the product's blocks, parts of the
// same tiles in a row. Returns whether this block stored the results; if not, another one of those
// that share the tiles will. Shared memory: BATCH_STAGES · 2 · BATCH_STAGE_BYTES·TOKENS bytes.
template <int TOKENS>
__device__ inline bool run_batch_product(
    const Product& p, int block, int first, int n, const Workspace& workspace
) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, all = (p.rows + 15) / 16;
    int block_tiles = batch_tiles(p), part = block % p.split;
    int tile = block / p.split * block_tiles + warp % block_tiles;
    int loaded = min(tile, all - 1) + p.first_tile;
    const PackedMatrix& w = warp < block_tiles ? p.weights : p.up;
    Sums<TOKENS> sums;
    sums.clear();
    u8* ring = (u8*)dynamic_shared;
#define CASE(TYPE, EXACT)                                                                          \
    if (p.type == TYPE && (p.x_low != nullptr) == EXACT) {                                         \
        multiply_staged<TYPE, TOKENS, EXACT>(sums, w, loaded, part, p.split, {ring, p, first, n}); \
    }
    CASE(Q8_0, false)
    CASE(Q8_0, true)
    CASE(F16, false)
    CASE(F16, true)
#undef CASE
    if (p.split > 1 || p.up.codes) {
        int whole = blockIdx.x - part;
        float4* own = workspace.sums + (size_t)(blockIdx.x * DECODE_WARPS + warp) * TOKENS * WARP;
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
            const float(&v)[4] = sums.at[i];
            own[i * WARP + lane] = make_float4(v[0], v[1], v[2], v[3]);
        }
        if (!last_to_arrive(workspace.arrivals + whole, p.split)) return false;
        if (warp >= block_tiles) return true;
        size_t first_part = (size_t)(whole * DECODE_WARPS + warp) * TOKENS * WARP;
        const float4* parts = workspace.sums + first_part;
        add_parts(sums, parts + lane, p.split);
        if (p.up.codes) {
            Sums<TOKENS> up;
            add_parts(up, parts + block_tiles * TOKENS * WARP + lane, p.split);
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sums.at[i][j] = swiglu(sums.at[i][j], up.at[i][j], p.limit);
                }
            }
        }
    }
    if (tile < all) store_tile(p, sums, tile, first, n);
    return true;
}
