// Matrix products of many rows, on the matrix units at full tilt.
//
// A block multiplies some weight rows with 8·TOKENS activation rows. Activations go through shared
// memory in stages of 64 columns; weights go from memory to registers in the order that the
// matrix units want, and become halves there, scale and all, so that each is unpacked once for
// all of the block's activation rows. Sums are f32 throughout.

#include "products.cuh"

#define WARPS 4
#define STAGES 4
// Columns of a stage.
#define STAGE_COLUMNS 64

// The activation rows of a block.
struct Batch {
    // Rows of `x` and `x_low` in shared memory; entries from `count` on repeat a valid one.
    const u32* rows;
    const u16* x;
    const u16* x_low;
    int stride;
    int count;
};

// Shared memory: STAGES × two steps × TOKENS·8 rows × 64 bytes.
template <int TOKENS>
__device__ inline void stage_activations(
    uint4* shared, const Batch& b, int columns, int stage, int stages
) {
    int pass = stage * STAGE_COLUMNS / columns, column = stage * STAGE_COLUMNS % columns;
    const u16* x = pass == 1 ? b.x_low : b.x;
    uint4* to = shared + stage % STAGES * (16 * TOKENS * 4);
    if (stage < stages) {
#pragma unroll
        for (int i = 0; i < (TOKENS + 1) / 2; ++i) {
            int chunk = threadIdx.x + i * WARPS * WARP, token = chunk / 8, part = chunk % 8;
            if (token < 8 * TOKENS) {
                copy_async16(to + (part / 4 * 8 * TOKENS + token) * 4 + part % 4,
                             x + (size_t)b.rows[token] * b.stride + column + 8 * part);
            }
        }
    }
    copy_async_commit();
}

template <int PARTS, int TOKENS>
struct BlockSums {
    float at[PARTS][TOKENS][4];
};

// sums += the product of PARTS tiles a warp, in as many passes as exactness asks for: activations
// only; and their rest; and, for F32, the rest of the weights.
template <int TYPE, int PARTS, int TOKENS>
__device__ inline void multiply_block(
    BlockSums<PARTS, TOKENS>& sums, const Planes (&w)[PARTS], const int (&tile)[PARTS], int columns,
    const Batch& b, int passes, uint4* shared, const uint4* grid
) {
    constexpr int STEPS = unit_steps(TYPE);
    int lane = threadIdx.x % WARP, active = (b.count + 7) / 8;
    int units = columns / (32 * STEPS), stages = passes * (columns / STAGE_COLUMNS);
    for (int s = 0; s < STAGES - 1; ++s) {
        stage_activations<TOKENS>(shared, b, columns, s, stages);
    }
    int stage = 0;
    for (int pass = 0; pass < passes; ++pass) {
        for (int u = 0; u < units; ++u) {
            Unit<TYPE> unit[PARTS];
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                Planes from = w[p];
                if (TYPE == F32 && pass == 2) from.weights = (const uint4*)from.scales;
                unit[p].load(from, units, tile[p], u, lane);
            }
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                if (s % 2 == 0) {
                    copy_async_wait<STAGES - 2>();
                    __syncthreads();
                    stage_activations<TOKENS>(shared, b, columns, stage + STAGES - 1, stages);
                }
                Operands o[PARTS];
#pragma unroll
                for (int p = 0; p < PARTS; ++p) o[p] = unit[p].scaled(s, grid, lane);
                const uint4* x = shared + stage % STAGES * (16 * TOKENS * 4);
                x += s % 2 * 8 * TOKENS * 4 + lane;
#pragma unroll
                for (int n = 0; n < TOKENS; ++n) {
                    if (n >= active) continue;
                    uint4 v = x[32 * n];
#pragma unroll
                    for (int p = 0; p < PARTS; ++p) mma(sums.at[p][n], o[p].a[0], v.x, v.y);
#pragma unroll
                    for (int p = 0; p < PARTS; ++p) mma(sums.at[p][n], o[p].a[1], v.z, v.w);
                }
                if (s % 2 == 1) ++stage;
            }
        }
    }
    copy_async_wait<0>();
    __syncthreads();
    if (weight_unit(TYPE) == 1.0f) return;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
#pragma unroll
        for (int n = 0; n < TOKENS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums.at[p][n][i] *= 1.0f / weight_unit(TYPE);
        }
    }
}

template <int TYPES, int PARTS, int TOKENS>
__device__ inline void multiply_block_of(
    int type, BlockSums<PARTS, TOKENS>& sums, const Planes (&w)[PARTS], const int (&tile)[PARTS],
    int columns, const Batch& b, int passes, uint4* shared, const uint4* grid
) {
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
#pragma unroll
        for (int n = 0; n < TOKENS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums.at[p][n][i] = 0.0f;
        }
    }
#define CASE(TYPE, PASSES)                                                    \
    if constexpr ((TYPES & TYPE_BIT(TYPE)) != 0) {                            \
        if (type == TYPE) {                                                   \
            multiply_block<TYPE, PARTS, TOKENS>(                              \
                sums, w, tile, columns, b, PASSES, shared, grid);             \
        }                                                                     \
    }
    CASE(Q8_0, passes)
    CASE(F16, passes)
    CASE(F32, passes == 2 ? 3 : 1)
    CASE(IQ2_XXS, passes)
    CASE(Q2_K, passes)
    CASE(Q4_K, passes)
    CASE(MXFP4, passes)
#undef CASE
}

// Brings results into the order of memory. Each warp has TILES tiles of 16 rows, one after the
// other in `staged` [8·TOKENS, ROWS]; value(tile, n, i) is what sums at[…][n][i] come to. Then
// put(token, row, four of its results) is called for every fourth of the ROWS rows of each token.
template <int TILES, int TOKENS, typename Value, typename Put>
__device__ inline void write_results(uint4* shared, int count, Value value, Put put) {
    constexpr int ROWS = 16 * TILES * WARPS;
    float* staged = (float*)shared;
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int first = threadIdx.x / WARP * 16 * TILES + g;
    // Tokens are a multiple of all banks apart: every second one is shifted by eight rows.
#pragma unroll
    for (int p = 0; p < TILES; ++p) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float* to = staged + 2 * t * ROWS + (first + 16 * p + 8 * half ^ 8 * t);
#pragma unroll
            for (int n = 0; n < TOKENS; ++n) {
                to[8 * n * ROWS] = value(p, n, 2 * half);
                to[(8 * n + 1) * ROWS] = value(p, n, 2 * half + 1);
            }
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < count * (ROWS / 4); i += WARPS * WARP) {
        int token = i / (ROWS / 4), row = i % (ROWS / 4) * 4;
        put(token, row, *(const float4*)(staged + token * ROWS + (row ^ token / 2 % 4 * 8)));
    }
    __syncthreads();
}

__device__ inline uint2 to_halves(float4 v) {
    return make_uint2(pack_half2(v.x, v.y), pack_half2(v.z, v.w));
}

// ---- Dense products --------------------------------------------------------------------------

// Tiles of a warp, activation rows of a block (in eights).
#define DENSE_PARTS 2
#define DENSE_TOKENS 16

// Four results of a token, as far as the matrix has rows.
__device__ inline void put_results(const Product& p, int token, int row, float4 y) {
    size_t at = (size_t)token * p.out_stride + row;
    bool whole = row + 4 <= p.rows;
    if (p.out) {
        float* out = p.out + at;
        if (whole && (size_t)out % sizeof(float4) == 0) {
            *(float4*)out = y;
        } else {
            float v[] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (row + k < p.rows) out[k] = v[k];
            }
        }
    }
    if (p.out_half) {
        u16* out = p.out_half + at;
        uint2 halves = to_halves(y);
        if (whole && (size_t)out % sizeof(uint2) == 0) {
            *(uint2*)out = halves;
        } else {
            u32 v[] = {halves.x, halves.x >> 16, halves.y, halves.y >> 16};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (row + k < p.rows) out[k] = (u16)v[k];
            }
        }
    }
}

// Grid: (blocks of 128 activation rows, blocks of 128 weight rows over all products; 64 rows for
// a pair). Rows of the step from `first_row` to `end_row`.
template <int TYPES>
__device__ inline void dense(
    const Product* products, int count, int first_row, int end_row, const uint4* iq2_grid
) {
    __shared__ u32 rows[8 * DENSE_TOKENS];
    __shared__ uint4 grids[GRID_ENTRIES * GRID_COPIES];
    const uint4* grid = own_grid(grids);
    launch_dependents();
    if (TYPES & TYPE_BIT(IQ2_XXS)) load_grid(grids, iq2_grid);
    int which = 0, warp = threadIdx.x / WARP;
    while (which + 1 < count && products[which + 1].first_block <= blockIdx.y) ++which;
    const Product& p = products[which];
    int first = first_row + blockIdx.x * 8 * DENSE_TOKENS;
    int tokens = min(8 * DENSE_TOKENS, end_row - first);
    rows[threadIdx.x] = first + min((int)threadIdx.x, tokens - 1);
    bool pair = p.up.weights != nullptr;
    int tiles = (p.rows + 15) / 16, block = blockIdx.y - p.first_block;
    int tile[DENSE_PARTS];
    Planes w[DENSE_PARTS];
#pragma unroll
    for (int i = 0; i < DENSE_PARTS; ++i) {
        int own_tile = pair ? block * WARPS + warp : (block * WARPS + warp) * DENSE_PARTS + i;
        tile[i] = p.first_tile + min(own_tile, tiles - 1);
        w[i] = pair && i ? p.up : p.weights;
    }
    wait_for_dependencies();
    if (p.needed && *p.needed == 0) return;
    __syncthreads();
    BlockSums<DENSE_PARTS, DENSE_TOKENS> sums;
    Batch b = {rows, p.x, p.x_low, p.x_stride, tokens};
    multiply_block_of<TYPES, DENSE_PARTS, DENSE_TOKENS>(
        p.type, sums, w, tile, p.columns, b, p.x_low ? 2 : 1, dynamic_shared, grid);
    auto put = [&](int token, int r, float4 y) {
        int row = (int)block * (pair ? 64 : 128) + r;
        put_results(p, first + token, row, y);
    };
    if (pair) {
        auto value = [&](int, int n, int i) {
            return swiglu(sums.at[0][n][i], sums.at[1][n][i], p.limit);
        };
        write_results<1, DENSE_TOKENS>(dynamic_shared, tokens, value, put);
    } else {
        auto value = [&](int part, int n, int i) { return sums.at[part][n][i]; };
        write_results<DENSE_PARTS, DENSE_TOKENS>(dynamic_shared, tokens, value, put);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 2) prefill_products(
    const Product* products, int count, int first_row, int end_row, const uint4* iq2_grid
) {
    dense<DENSE_TYPES>(products, count, first_row, end_row, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 2) prefill_products_any(
    const Product* products, int count, int first_row, int end_row, const uint4* iq2_grid
) {
    dense<ANY_TYPE>(products, count, first_row, end_row, iq2_grid);
}

// ---- Routed experts ----------------------------------------------------------------------------

#define EXPERT_PARTS 4
#define EXPERT_TOKENS 8

// Grid: (blocks of rows, entries of `tiles`, of which there are `tile_count`). An entry is an
// expert and the first of at most 64 of its pairs.
template <int TYPES>
__device__ inline void prefill_gate_up(
    const Stack& gate, const Stack& up, const Groups& groups, const uint2* tiles,
    const u32* tile_count, const float* pair_weights, const u16* x, u16* hidden, int used,
    float limit, const uint4* iq2_grid
) {
    __shared__ u32 rows[8 * EXPERT_TOKENS];
    __shared__ uint4 grids[GRID_ENTRIES * GRID_COPIES];
    const uint4* grid = own_grid(grids);
    launch_dependents();
    if (TYPES & TYPE_BIT(IQ2_XXS)) load_grid(grids, iq2_grid);
    wait_for_dependencies();
    if (blockIdx.y >= *tile_count) return;
    int expert = tiles[blockIdx.y].x, first = tiles[blockIdx.y].y;
    int count = min(8 * EXPERT_TOKENS, (int)groups.starts[expert + 1] - first);
    if (threadIdx.x < 8 * EXPERT_TOKENS) {
        rows[threadIdx.x] = groups.pairs[first + min((int)threadIdx.x, count - 1)] / used;
    }
    __syncthreads();
    int tiles_per_expert = gate.rows / 16, tile[EXPERT_PARTS];
    Planes w[EXPERT_PARTS];
#pragma unroll
    for (int i = 0; i < EXPERT_PARTS / 2; ++i) {
        int own_tile = (blockIdx.x * WARPS + threadIdx.x / WARP) * (EXPERT_PARTS / 2) + i;
        int at = expert * tiles_per_expert + min(own_tile, tiles_per_expert - 1);
        tile[i] = tile[i + EXPERT_PARTS / 2] = at;
        w[i] = gate.weights;
        w[i + EXPERT_PARTS / 2] = up.weights;
    }
    BlockSums<EXPERT_PARTS, EXPERT_TOKENS> sums;
    Batch b = {rows, x, nullptr, gate.columns, count};
    multiply_block_of<TYPES, EXPERT_PARTS, EXPERT_TOKENS>(
        gate.type, sums, w, tile, gate.columns, b, 1, dynamic_shared, grid);
    constexpr int TILES = EXPERT_PARTS / 2;
    auto value = [&](int part, int n, int i) {
        return swiglu(sums.at[part][n][i], sums.at[part + TILES][n][i], limit);
    };
    auto put = [&](int token, int r, float4 y) {
        int row = blockIdx.x * (16 * TILES * WARPS) + r;
        if (row >= gate.rows) return;
        u32 pair = groups.pairs[first + token];
        float weight = pair_weights[pair];
        y = make_float4(weight * y.x, weight * y.y, weight * y.z, weight * y.w);
        *(uint2*)(hidden + (size_t)pair * gate.rows + row) = to_halves(y);
    };
    write_results<TILES, EXPERT_TOKENS>(dynamic_shared, count, value, put);
}

template <int TYPES>
__device__ inline void prefill_down(
    const Stack& w, const Groups& groups, const uint2* tiles, const u32* tile_count,
    const u16* hidden, float* out, int used, const uint4* iq2_grid
) {
    __shared__ u32 rows[8 * EXPERT_TOKENS];
    __shared__ uint4 grids[GRID_ENTRIES * GRID_COPIES];
    const uint4* grid = own_grid(grids);
    launch_dependents();
    if (TYPES & TYPE_BIT(IQ2_XXS)) load_grid(grids, iq2_grid);
    wait_for_dependencies();
    if (blockIdx.y >= *tile_count) return;
    int expert = tiles[blockIdx.y].x, first = tiles[blockIdx.y].y;
    int count = min(8 * EXPERT_TOKENS, (int)groups.starts[expert + 1] - first);
    if (threadIdx.x < 8 * EXPERT_TOKENS) {
        rows[threadIdx.x] = groups.pairs[first + min((int)threadIdx.x, count - 1)];
    }
    __syncthreads();
    int tiles_per_expert = w.rows / 16, tile[EXPERT_PARTS];
    Planes planes[EXPERT_PARTS];
#pragma unroll
    for (int i = 0; i < EXPERT_PARTS; ++i) {
        int own_tile = (blockIdx.x * WARPS + threadIdx.x / WARP) * EXPERT_PARTS + i;
        tile[i] = expert * tiles_per_expert + min(own_tile, tiles_per_expert - 1);
        planes[i] = w.weights;
    }
    BlockSums<EXPERT_PARTS, EXPERT_TOKENS> sums;
    Batch b = {rows, hidden, nullptr, w.columns, count};
    multiply_block_of<TYPES, EXPERT_PARTS, EXPERT_TOKENS>(
        w.type, sums, planes, tile, w.columns, b, 1, dynamic_shared, grid);
    // Half of each warp's tiles at a time: that is what fits.
    constexpr int TILES = EXPERT_PARTS / 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        auto value = [&](int part, int n, int i) { return sums.at[half * TILES + part][n][i]; };
        auto put = [&](int token, int r, float4 y) {
            int warp = r / (16 * TILES), row = blockIdx.x * (16 * EXPERT_PARTS * WARPS);
            row += (2 * warp + half) * 16 * TILES + r % (16 * TILES);
            if (row >= w.rows) return;
            u32 pair = groups.pairs[first + token];
            size_t slot = (size_t)(pair / used) * (used + 1) + pair % used;
            *(float4*)(out + slot * w.rows + row) = y;
        };
        write_results<TILES, EXPERT_TOKENS>(dynamic_shared, count, value, put);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 2) prefill_gate_up_q2(
    Stack gate, Stack up, Groups groups, const uint2* tiles, const u32* tile_count,
    const float* pair_weights, const u16* x, u16* hidden, int used, float limit,
    const uint4* iq2_grid
) {
    prefill_gate_up<TYPE_BIT(IQ2_XXS)>(
        gate, up, groups, tiles, tile_count, pair_weights, x, hidden, used, limit, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 2) prefill_gate_up_any(
    Stack gate, Stack up, Groups groups, const uint2* tiles, const u32* tile_count,
    const float* pair_weights, const u16* x, u16* hidden, int used, float limit,
    const uint4* iq2_grid
) {
    prefill_gate_up<ANY_TYPE>(
        gate, up, groups, tiles, tile_count, pair_weights, x, hidden, used, limit, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 2) prefill_down_q2(
    Stack w, Groups groups, const uint2* tiles, const u32* tile_count, const u16* hidden,
    float* out, int used, const uint4* iq2_grid
) {
    prefill_down<TYPE_BIT(Q2_K)>(w, groups, tiles, tile_count, hidden, out, used, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 2) prefill_down_any(
    Stack w, Groups groups, const uint2* tiles, const u32* tile_count, const u16* hidden,
    float* out, int used, const uint4* iq2_grid
) {
    prefill_down<ANY_TYPE>(w, groups, tiles, tile_count, hidden, out, used, iq2_grid);
}
