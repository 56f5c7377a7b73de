// Matrix products of many rows, on the tensor cores at full tilt: dense ones, and the routed
// experts'.
//
// Formulas are as in decode_products.cu and experts.cu.
// Inputs: activations f16 [n, stride], with what rounding left over where products are exact;
// matrices of any type.
// Outputs: f32 or f16 [n, stride]; of experts, hidden f16 [n · used, width] and out f32
// [n, used + 1, hidden].
// Grid of prefill_products: (n / 128, blocks of all products). A block has 128 weight rows, or 64
// of each matrix of a SwiGLU pair.
// Grid of prefill_gate_up: (width / 128, tiles of the work list).
// Grid of prefill_down: (hidden / 256, tiles of the work list). Block: 128 threads.
// Plain Rust: `matmul` in crates/ds4-cpu/src/reference/products.rs, `experts` in experts.rs.
//
// A block multiplies some weight rows with 8·TOKENS activation rows. Activations go through shared
// memory in stages of 64 columns. Weights go from memory to registers in the order that the tensor
// cores want, and become halves there, scale and all, so that each is unpacked once for all of the
// block's activation rows. Sums are f32 throughout.

#include "permutation.cuh"
#include "products.cuh"

#define WARPS (PREFILL_THREADS / WARP)
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

// Shared memory: PREFILL_STAGES × two steps × TOKENS·8 rows × 64 bytes.
template <int TOKENS>
__device__ inline void stage_activations(
    uint4* shared, const Batch& b, int columns, int stage, int stages
) {
    int pass = stage * STAGE_COLUMNS / columns, column = stage * STAGE_COLUMNS % columns;
    const u16* x = pass == 1 ? b.x_low : b.x;
    uint4* to = shared + stage % PREFILL_STAGES * (16 * TOKENS * 4);
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
    BlockSums<PARTS, TOKENS>& sums, const PackedMatrix (&w)[PARTS], const int (&tile)[PARTS],
    int columns, const Batch& b, int passes, uint4* shared,
    const uint4* grid
) {
    constexpr int STEPS = unit_steps(TYPE);
    int lane = threadIdx.x % WARP, active = (b.count + 7) / 8;
    int units = columns / (32 * STEPS), stages = passes * (columns / STAGE_COLUMNS);
    for (int s = 0; s < PREFILL_STAGES - 1; ++s) {
        stage_activations<TOKENS>(shared, b, columns, s, stages);
    }
    int stage = 0;
    for (int pass = 0; pass < passes; ++pass) {
        for (int u = 0; u < units; ++u) {
            Unit<TYPE> unit[PARTS];
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                PackedMatrix from = w[p];
                if (TYPE == F32 && pass == 2) from.codes = (const uint4*)from.scales;
                unit[p].load(from, units, tile[p], u, lane);
            }
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                if (s % 2 == 0) {
                    copy_async_wait<PREFILL_STAGES - 2>();
                    __syncthreads();
                    int next = stage + PREFILL_STAGES - 1;
                    stage_activations<TOKENS>(shared, b, columns, next, stages);
                }
                Operands o[PARTS];
#pragma unroll
                for (int p = 0; p < PARTS; ++p) o[p] = unit[p].scaled(s, grid, lane);
                const uint4* x = shared + stage % PREFILL_STAGES * (16 * TOKENS * 4);
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
    int type, BlockSums<PARTS, TOKENS>& sums, const PackedMatrix (&w)[PARTS],
    const int (&tile)[PARTS], int columns, const Batch& b, int passes, uint4* shared,
    const uint4* grid
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
#define DENSE_TOKENS (PREFILL_ROWS / 8)

struct PrefillProductsParams {
    const Product* products;
    const uint4* iq2_grid;
    int count;
    int first_row;
    int end_row;
};
SAME_IN_RUST(PrefillProductsParams);

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
__device__ inline void dense(const PrefillProductsParams& a) {
    __shared__ u32 rows[8 * DENSE_TOKENS];
    __shared__ uint4 grids[GRID_ENTRIES * GRID_COPIES];
    const uint4* grid = own_grid(grids);
    launch_dependents();
    if (TYPES & TYPE_BIT(IQ2_XXS)) load_grid(grids, a.iq2_grid);
    int which = 0, warp = threadIdx.x / WARP;
    while (which + 1 < a.count && a.products[which + 1].first_block <= blockIdx.y) ++which;
    const Product& p = a.products[which];
    int first = a.first_row + blockIdx.x * 8 * DENSE_TOKENS;
    int tokens = min(8 * DENSE_TOKENS, a.end_row - first);
    rows[threadIdx.x] = first + min((int)threadIdx.x, tokens - 1);
    bool pair = p.up.codes != nullptr;
    int tiles = (p.rows + 15) / 16, block = blockIdx.y - p.first_block;
    int tile[DENSE_PARTS];
    PackedMatrix w[DENSE_PARTS];
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

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 2) prefill_products(
    __grid_constant__ const PrefillProductsParams a
) {
    dense<DENSE_TYPES>(a);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 2) prefill_products_any(
    __grid_constant__ const PrefillProductsParams a
) {
    dense<ANY_TYPE>(a);
}

// ---- Routed experts ----------------------------------------------------------------------------

#define EXPERT_PARTS 4
#define EXPERT_TOKENS (TILE_PAIRS / 8)

struct PrefillGateUpParams {
    ExpertMatrix gate;
    ExpertMatrix up;
    Permutation permutation;
    // The work list: tiles of at most TILE_PAIRS pairs of an expert, as (expert, first pair), and
    // how many.
    const uint2* tiles;
    const u32* tile_count;
    // [n·used].
    const float* pair_weights;
    // [n, columns], halves.
    const u16* x;
    // [n·used, rows], halves.
    u16* hidden;
    const uint4* iq2_grid;
    int used;
    float limit;
};
SAME_IN_RUST(PrefillGateUpParams);

// Grid: (blocks of rows, as many entries as the work list can have).
template <int TYPES>
__device__ inline void prefill_gate_up(const PrefillGateUpParams& a) {
    __shared__ u32 rows[8 * EXPERT_TOKENS];
    __shared__ uint4 grids[GRID_ENTRIES * GRID_COPIES];
    const uint4* grid = own_grid(grids);
    launch_dependents();
    if (TYPES & TYPE_BIT(IQ2_XXS)) load_grid(grids, a.iq2_grid);
    const Permutation& permutation = a.permutation;
    wait_for_dependencies();
    if (blockIdx.y >= *a.tile_count) return;
    int expert = a.tiles[blockIdx.y].x, first = a.tiles[blockIdx.y].y;
    int count = min(8 * EXPERT_TOKENS, (int)permutation.offsets[expert + 1] - first);
    if (threadIdx.x < 8 * EXPERT_TOKENS) {
        rows[threadIdx.x] = permutation.pairs[first + min((int)threadIdx.x, count - 1)] / a.used;
    }
    __syncthreads();
    const ExpertMatrix &gate = a.gate, &up = a.up;
    int tiles_per_expert = gate.rows / 16, tile[EXPERT_PARTS];
    PackedMatrix w[EXPERT_PARTS];
#pragma unroll
    for (int i = 0; i < EXPERT_PARTS / 2; ++i) {
        int own_tile = (blockIdx.x * WARPS + threadIdx.x / WARP) * (EXPERT_PARTS / 2) + i;
        int at = expert * tiles_per_expert + min(own_tile, tiles_per_expert - 1);
        tile[i] = tile[i + EXPERT_PARTS / 2] = at;
        w[i] = gate.weights;
        w[i + EXPERT_PARTS / 2] = up.weights;
    }
    BlockSums<EXPERT_PARTS, EXPERT_TOKENS> sums;
    Batch b = {rows, a.x, nullptr, gate.columns, count};
    multiply_block_of<TYPES, EXPERT_PARTS, EXPERT_TOKENS>(
        gate.type, sums, w, tile, gate.columns, b, 1, dynamic_shared, grid);
    constexpr int TILES = EXPERT_PARTS / 2;
    auto value = [&](int part, int n, int i) {
        return swiglu(sums.at[part][n][i], sums.at[part + TILES][n][i], a.limit);
    };
    auto put = [&](int token, int r, float4 y) {
        int row = blockIdx.x * (16 * TILES * WARPS) + r;
        if (row >= gate.rows) return;
        u32 pair = permutation.pairs[first + token];
        float weight = a.pair_weights[pair];
        y = make_float4(weight * y.x, weight * y.y, weight * y.z, weight * y.w);
        *(uint2*)(a.hidden + (size_t)pair * gate.rows + row) = to_halves(y);
    };
    write_results<TILES, EXPERT_TOKENS>(dynamic_shared, count, value, put);
}

struct PrefillDownParams {
    ExpertMatrix down;
    Permutation permutation;
    // As above.
    const uint2* tiles;
    const u32* tile_count;
    // [n·used, columns], halves.
    const u16* hidden;
    // [n, used + 1, rows].
    float* out;
    const uint4* iq2_grid;
    int used;
};
SAME_IN_RUST(PrefillDownParams);

// Grid: (blocks of rows, as many entries as the work list can have).
template <int TYPES>
__device__ inline void prefill_down(const PrefillDownParams& a) {
    __shared__ u32 rows[8 * EXPERT_TOKENS];
    __shared__ uint4 grids[GRID_ENTRIES * GRID_COPIES];
    const uint4* grid = own_grid(grids);
    launch_dependents();
    if (TYPES & TYPE_BIT(IQ2_XXS)) load_grid(grids, a.iq2_grid);
    const Permutation& permutation = a.permutation;
    wait_for_dependencies();
    if (blockIdx.y >= *a.tile_count) return;
    int expert = a.tiles[blockIdx.y].x, first = a.tiles[blockIdx.y].y;
    int count = min(8 * EXPERT_TOKENS, (int)permutation.offsets[expert + 1] - first);
    if (threadIdx.x < 8 * EXPERT_TOKENS) {
        rows[threadIdx.x] = permutation.pairs[first + min((int)threadIdx.x, count - 1)];
    }
    __syncthreads();
    const ExpertMatrix& w = a.down;
    int tiles_per_expert = w.rows / 16, tile[EXPERT_PARTS];
    PackedMatrix matrices[EXPERT_PARTS];
#pragma unroll
    for (int i = 0; i < EXPERT_PARTS; ++i) {
        int own_tile = (blockIdx.x * WARPS + threadIdx.x / WARP) * EXPERT_PARTS + i;
        tile[i] = expert * tiles_per_expert + min(own_tile, tiles_per_expert - 1);
        matrices[i] = w.weights;
    }
    BlockSums<EXPERT_PARTS, EXPERT_TOKENS> sums;
    Batch b = {rows, a.hidden, nullptr, w.columns, count};
    multiply_block_of<TYPES, EXPERT_PARTS, EXPERT_TOKENS>(
        w.type, sums, matrices, tile, w.columns, b, 1, dynamic_shared, grid);
    // Half of each warp's tiles at a time: that is what fits.
    constexpr int TILES = EXPERT_PARTS / 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        auto value = [&](int part, int n, int i) { return sums.at[half * TILES + part][n][i]; };
        auto put = [&](int token, int r, float4 y) {
            int warp = r / (16 * TILES), row = blockIdx.x * (16 * EXPERT_PARTS * WARPS);
            row += (2 * warp + half) * 16 * TILES + r % (16 * TILES);
            if (row >= w.rows) return;
            u32 pair = permutation.pairs[first + token];
            size_t slot = (size_t)(pair / a.used) * (a.used + 1) + pair % a.used;
            *(float4*)(a.out + slot * w.rows + row) = y;
        };
        write_results<TILES, EXPERT_TOKENS>(dynamic_shared, count, value, put);
    }
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 2) prefill_gate_up_q2(
    __grid_constant__ const PrefillGateUpParams a
) {
    prefill_gate_up<TYPE_BIT(IQ2_XXS)>(a);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 2) prefill_gate_up_any(
    __grid_constant__ const PrefillGateUpParams a
) {
    prefill_gate_up<ANY_TYPE>(a);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 2) prefill_down_q2(
    __grid_constant__ const PrefillDownParams a
) {
    prefill_down<TYPE_BIT(Q2_K)>(a);
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 2) prefill_down_any(
    __grid_constant__ const PrefillDownParams a
) {
    prefill_down<ANY_TYPE>(a);
}
