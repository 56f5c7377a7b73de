// Weights times activations, for the files that build kernels from it.
//
// Decoding: a warp multiplies one tile of 16 weight rows with up to eight activation rows, over
// some of the tile's units; scales are applied in f32 after each step, so weights are exact and
// activations are rounded to half precision, or not even that (`Rows::low`).
#pragma once

#include "formats.cuh"

// Eight activation rows: every lane's own one, in halves, from where its columns of the first step
// are.
struct Rows {
    const u16* high;
    // What rounding to halves left over, or null.
    const u16* low;
};

// Results of a tile for eight activation rows of each of TOKENS groups.
template <int TOKENS>
struct Sums {
    // As the product instruction leaves them: rows g, g + 8 of the tile, tokens 2t, 2t + 1.
    float at[TOKENS][4];

    __device__ inline void clear() {
#pragma unroll
        for (int n = 0; n < TOKENS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) at[n][i] = 0.0f;
        }
    }
};

// A lane's activations of one row for the steps of a unit; AT_ONCE nobody waits for them one by
// one.
template <int STEPS, bool AT_ONCE = true>
struct StepInputs {
    const uint4* from;
    uint4 loaded[AT_ONCE ? STEPS : 1];

    __device__ inline StepInputs(const u16* x, int column) : from((const uint4*)(x + column)) {
        if constexpr (AT_ONCE) {
#pragma unroll
            for (int s = 0; s < STEPS; ++s) loaded[s] = from[4 * s];
        }
    }

    __device__ inline uint4 at(int step) const {
        if constexpr (AT_ONCE) return loaded[step];
        return from[4 * step];
    }
};

__device__ inline void multiply_step(float (&d)[4], const Operands& o, uint4 x) {
    mma(d, o.a[0], x.x, x.y);
    mma(d, o.a[1], x.z, x.w);
}

__device__ inline void begin_step(float (&d)[4], const Operands& o, uint4 x) {
    mma_from_zero(d, o.a[0], x.x, x.y);
    mma(d, o.a[1], x.z, x.w);
}

template <int TOKENS>
__device__ inline void add_scaled(Sums<TOKENS>& sums, int n, const float (&d)[4], RowPair f) {
    sums.at[n][0] += f.low * d[0];
    sums.at[n][1] += f.low * d[1];
    sums.at[n][2] += f.high * d[2];
    sums.at[n][3] += f.high * d[3];
}

// Formats whose groups have a minimum: integers times group scales first, the block's factors last.
template <int TYPE>
__device__ inline void multiply_unit_k(
    Sums<1>& sums, const Unit<TYPE>& w, const Rows& x, int column, int lane, bool exact
) {
    constexpr int STEPS = unit_steps(TYPE);
    RowPair f = w.factor(0), f_min = w.minimum_factor();
    f_min = {-f_min.low, -f_min.high};
    StepInputs<STEPS> in(x.high, column);
    StepInputs<STEPS, false> rest(x.low, column);
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f}, m[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        Operands o = w.operands(s, nullptr, lane);
        multiply_step(d, o, in.at(s));
        if (exact) multiply_step(d, o, rest.at(s));
        Operands minima = w.minima(s);
        multiply_step(m, minima, in.at(s));
        if (exact) multiply_step(m, minima, rest.at(s));
    }
    add_scaled(sums, 0, d, f);
    add_scaled(sums, 0, m, f_min);
}

template <int TYPE>
__device__ inline void multiply_unit(
    Sums<1>& sums, const Unit<TYPE>& w, const Rows& x, int column, const uint4* grid, int lane,
    bool exact
) {
    if constexpr (TYPE == Q2_K || TYPE == Q4_K) {
        multiply_unit_k<TYPE>(sums, w, x, column, lane, exact);
    } else {
        constexpr int STEPS = unit_steps(TYPE);
        StepInputs<STEPS> in(x.high, column);
        // What is exact is mostly F16; more steps would take too many registers.
        StepInputs<STEPS, STEPS == 2> rest(exact ? x.low : x.high, column);
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            Operands o = w.operands(s, grid, lane);
            RowPair f = w.factor(s);
            float d[4];
            begin_step(d, o, in.at(s));
            if (exact) multiply_step(d, o, rest.at(s));
            add_scaled(sums, 0, d, f);
        }
    }
}

// Adds the products of units `first`, `first + stride`, … of a tile. Two units are on their way
// at any time, the first two before `ready` is called, which waits for the activations.
template <int TYPE, typename Ready>
__device__ inline void multiply_tile(
    Sums<1>& sums, const PackedMatrix& w, int units, int tile, int first, int stride,
    const Rows& x, const uint4* grid, int lane, bool exact, Ready ready
) {
    constexpr int COLUMNS = unit_steps(TYPE) * 32;
    Unit<TYPE> even, odd;
    if (first < units) even.load(w, units, tile, first, lane);
    if (first + stride < units) odd.load(w, units, tile, first + stride, lane);
    ready();
    for (int u = first; u < units; u += 2 * stride) {
        multiply_unit<TYPE>(sums, even, x, u * COLUMNS, grid, lane, exact);
        if (u + 2 * stride < units) even.load(w, units, tile, u + 2 * stride, lane);
        if (u + stride >= units) break;
        multiply_unit<TYPE>(sums, odd, x, (u + stride) * COLUMNS, grid, lane, exact);
        if (u + 3 * stride < units) odd.load(w, units, tile, u + 3 * stride, lane);
    }
}

// The same for F32 weights: both halves of the weights with both of the activations.
template <typename Ready>
__device__ inline void multiply_tile_f32(
    Sums<1>& sums, const PackedMatrix& w, int units, int tile, int first, int stride,
    const Rows& x, const uint4* grid, int lane, bool exact, Ready ready
) {
    PackedMatrix rest = {(const uint4*)w.scales, nullptr, nullptr};
    multiply_tile<F16>(
        sums, w, units, tile, first, stride, x, grid, lane, exact, ready);
    multiply_tile<F16>(
        sums, rest, units, tile, first, stride, x, grid, lane, false, [] {});
}

// Sets of weight types that a kernel is built for: the fewer, the fewer registers it needs.
#define TYPE_BIT(TYPE) (1 << (TYPE))
#define ANY_TYPE ((1 << WEIGHT_TYPES) - 1)
// What attention and other dense matrices are stored in.
#define DENSE_TYPES (TYPE_BIT(Q8_0) | TYPE_BIT(F16))

// Dispatches on the type of the weights; all threads of a block take the same way.
template <int TYPES, typename Ready>
__device__ inline void multiply_tile_of(
    int type, Sums<1>& sums, const PackedMatrix& w, int columns, int tile, int first, int stride,
    const Rows& x, const uint4* grid, int lane, bool exact, Ready ready
) {
    int steps = columns / 32;
#define CASE(TYPE)                                                                           \
    if constexpr ((TYPES & TYPE_BIT(TYPE)) != 0) {                                           \
        if (type == TYPE) {                                                                  \
            multiply_tile<TYPE>(                                                             \
                sums, w, steps / unit_steps(TYPE), tile, first, stride, x, grid, lane, exact, \
                ready);                                                                      \
        }                                                                                    \
    }
    CASE(Q8_0)
    CASE(F16)
    CASE(IQ2_XXS)
    CASE(Q2_K)
    CASE(Q4_K)
    CASE(MXFP4)
#undef CASE
    if constexpr ((TYPES & TYPE_BIT(F32)) != 0) {
        if (type == F32) {
            multiply_tile_f32(
                sums, w, steps / unit_steps(F32), tile, first, stride, x, grid, lane, exact,
                ready);
        }
    }
}

// Sums of all warps of the block, for (row, token) pairs of the tile: pair i is row i % 16 of
// token i / 16. `scratch` holds 128 floats per warp.
__device__ inline void gather_sums(const Sums<1>& sums, float* scratch, int warp, int lane) {
    float* own = scratch + warp * 128;
    int g = lane / 4, t = lane % 4;
    own[2 * t * 16 + g] = sums.at[0][0];
    own[(2 * t + 1) * 16 + g] = sums.at[0][1];
    own[2 * t * 16 + g + 8] = sums.at[0][2];
    own[(2 * t + 1) * 16 + g + 8] = sums.at[0][3];
}

__device__ inline float total(const float* scratch, int warps, int pair) {
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += scratch[w * 128 + pair];
    return sum;
}

// SwiGLU of an expert's hidden layer, with its inputs clamped.
__device__ inline float swiglu(float gate, float up, float limit) {
    gate = fminf(gate, limit);
    up = fminf(fmaxf(up, -limit), limit);
    return gate * sigmoid(gate) * up;
}

// One matrix of all experts, theirs one below the other.
struct ExpertMatrix {
    PackedMatrix weights;
    int type;
    // Of one expert.
    int rows;
    int columns;
};
SAME_IN_RUST(ExpertMatrix);

// A matrix and what it is multiplied with.
struct Product {
    PackedMatrix weights;
    // Second matrix of a SwiGLU pair; same type and shape.
    PackedMatrix up;
    // Activations [n, x_stride] in halves, and what rounding left over (or null: not wanted).
    const u16* x;
    const u16* x_low;
    // Results [n, out_stride], either of them or both.
    float* out;
    u16* out_half;
    // If not null and 0, nobody needs the results of this step.
    const u32* needed;
    int type;
    int rows;
    int columns;
    // Blocks of a launch before this product's.
    int first_block;
    int x_stride;
    int out_stride;
    // Tile of the matrix that the product's first row is in.
    int first_tile;
    // Split-K in decoding: warps that share a tile, each with a part of the columns, a power of two
    // up to 8.
    int split;
    // Of the SwiGLU pair, if there is an `up`.
    float limit;
};
SAME_IN_RUST(Product);

// Blocks that all tiles of a product take.
__device__ inline int product_blocks(const Product& p) {
    int block_rows = DECODE_WARPS / p.split * 16;
    return (p.rows + block_rows - 1) / block_rows;
}

// Tiles of a product for rows `first` … of `n`, as many as the block's warps have: `block` counts
// these blocks. `scratch` holds 128 floats per warp, twice as many for a pair.
template <int TYPES>
__device__ inline void run_product(
    const Product& p, int block, int first, int n, const uint4* grid, float* scratch
) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int split = p.split, block_tiles = DECODE_WARPS / split, tiles = (p.rows + 15) / 16;
    int tile = min(block * block_tiles + warp / split, tiles - 1) + p.first_tile;
    bool exact = p.x_low != nullptr;
    size_t own = (size_t)min(first + lane / 4, n - 1) * p.x_stride + 8 * (lane % 4);
    Rows x = {p.x + own, exact ? p.x_low + own : nullptr};
    Sums<1> sums;
    sums.clear();
    auto ready = [] { wait_for_dependencies(); };
    multiply_tile_of<TYPES>(
        p.type, sums, p.weights, p.columns, tile, warp % split, split, x, grid, lane, exact, ready);
    gather_sums(sums, scratch, warp, lane);
    float* scratch_up = scratch + DECODE_WARPS * 128;
    if (p.up.codes) {
        sums.clear();
        multiply_tile_of<TYPES>(
            p.type, sums, p.up, p.columns, tile, warp % split, split, x, grid, lane, exact, [] {});
        gather_sums(sums, scratch_up, warp, lane);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < block_tiles * 128; i += DECODE_WARPS * WARP) {
        int local = i / 128, pair = i % 128;
        int token = first + pair / 16, row = (block * block_tiles + local) * 16 + pair % 16;
        if (token >= n || row >= p.rows) continue;
        size_t from = local * split * 128;
        float y = total(scratch + from, split, pair);
        if (p.up.codes) y = swiglu(y, total(scratch_up + from, split, pair), p.limit);
        size_t at = (size_t)token * p.out_stride + row;
        if (p.out) p.out[at] = y;
        if (p.out_half) p.out_half[at] = float_to_half(y);
    }
}
