// Routed experts of a few rows: each chosen expert's weights are read once.
//
// A block does a tile of gate and up or two of down at a time, and goes on until all are done. Blocks
// for the shared expert's last product come first: its input was ready long ago.

#include "products.cuh"

// Warps that share a tile, and tiles that a block does at a time: large pieces of one expert, so that
// finding its rows and adding up are a small part of the work.
#define GATE_UP_SPLIT 2
#define GATE_UP_TILES (DECODE_WARPS / GATE_UP_SPLIT)
#define DOWN_SPLIT 1
#define DOWN_TILES (DECODE_WARPS / DOWN_SPLIT)

// The expert's activation rows `first` … up to `end`, by number of pair: row pair / `share` of `x`.
__device__ inline Rows<1> expert_rows(
    const Groups& groups, const u16* x, int columns, int share, const u16* group_sums, int first,
    int end, u32& mine
) {
    mine = groups.pairs[min(first + (int)threadIdx.x % WARP / 4, end - 1)];
    size_t row = (size_t)(mine / share) * columns;
    int t = threadIdx.x % 4;
    return {{x + row + 8 * t}, {nullptr}, {group_sums ? group_sums + row / 16 + 4 * t : nullptr}};
}

// hidden[pair] = weight · SwiGLU(gate·x, up·x), and the sums of each 16 columns.
template <int TYPES>
__device__ inline void gate_up(
    const Stack& gate, const Stack& up, const Groups& groups, const float* pair_weights,
    const u16* x, u16* hidden, u16* group_sums, int used, float limit, const uint4* iq2_grid
) {
    __shared__ uint4 grids[GRID_ENTRIES * GRID_COPIES];
    __shared__ float scratch[DECODE_WARPS * 128], scratch_up[DECODE_WARPS * 128];
    launch_dependents();
    if (TYPES & TYPE_BIT(IQ2_XXS)) load_grid(grids, iq2_grid);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int tiles = gate.rows / 16, part = warp % GATE_UP_SPLIT;
    int expert_items = (tiles + GATE_UP_TILES - 1) / GATE_UP_TILES;
    wait_for_dependencies();
    __syncthreads();
    int items = *groups.active_count * expert_items;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        int expert = groups.active[item / expert_items];
        int first_tile = item % expert_items * GATE_UP_TILES;
        int tile = expert * tiles + min(first_tile + warp / GATE_UP_SPLIT, tiles - 1);
        int start = groups.starts[expert], end = groups.starts[expert + 1];
        for (int first = start; first < end; first += 8) {
            u32 mine;
            Rows<1> rows =
                expert_rows(groups, x, gate.columns, used, nullptr, first, end, mine);
            Sums<1> g_sums, u_sums;
            g_sums.clear();
            u_sums.clear();
            if constexpr (TYPES == TYPE_BIT(IQ2_XXS)) {
                multiply_pair<IQ2_XXS, false>(
                    g_sums, u_sums, gate.weights, up.weights, gate.columns / 256, tile, part,
                    GATE_UP_SPLIT, rows, own_grid(grids), lane);
            } else {
                multiply_tile_of<TYPES, 1>(
                    gate.type, g_sums, gate.weights, gate.columns, tile, part, GATE_UP_SPLIT, rows,
                    own_grid(grids), lane, false, [] {});
                multiply_tile_of<TYPES, 1>(
                    up.type, u_sums, up.weights, up.columns, tile, part, GATE_UP_SPLIT, rows,
                    own_grid(grids), lane, false, [] {});
            }
            gather_sums(g_sums, scratch, warp, lane);
            gather_sums(u_sums, scratch_up, warp, lane);
            __syncthreads();
            for (int i = threadIdx.x; i < GATE_UP_TILES * 128; i += DECODE_WARPS * WARP) {
                // Half a warp has the 16 rows of one pair.
                int local = i / 128, pair_at = first + i % 128 / 16;
                u32 pair = groups.pairs[min(pair_at, end - 1)];
                int from = local * GATE_UP_SPLIT * 128;
                float g = total<1>(scratch + from, GATE_UP_SPLIT, i % 128);
                float u = total<1>(scratch_up + from, GATE_UP_SPLIT, i % 128);
                u16 y = float_to_half(pair_weights[pair] * swiglu(g, u, limit));
                float sum = half_to_float(y);
                for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, d);
                size_t row = (size_t)pair * gate.rows;
                int to = first_tile + local;
                if (pair_at >= end || to >= tiles) continue;
                hidden[row + 16 * to + i % 16] = y;
                if (i % 16 == 0) group_sums[row / 16 + group_sum_at(to)] = float_to_half(sum);
            }
            __syncthreads();
        }
    }
}

// out[token][slot] = down·hidden for the pairs of each expert; the shared expert's results go to
// the slot after the routed ones.
template <int TYPES>
__device__ inline void down(
    const Stack& w, const Groups& groups, const u16* hidden, const u16* group_sums, float* out,
    int used, int n, const Product& shared, const uint4* iq2_grid
) {
    __shared__ uint4 grids[GRID_ENTRIES * GRID_COPIES];
    __shared__ float scratch[DECODE_WARPS * 128];
    launch_dependents();
    if (TYPES & TYPE_BIT(IQ2_XXS)) {
        load_grid(grids, iq2_grid);
        __syncthreads();
    }
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int tiles = w.rows / 16, expert_items = (tiles + DOWN_TILES - 1) / DOWN_TILES;
    int shared_tiles = DECODE_WARPS / shared.split;
    int shared_blocks = (tiles + shared_tiles - 1) / shared_tiles;
    int shared_items = shared_blocks * ((n + 7) / 8);
    if ((int)blockIdx.x < shared_items) {
        int first = blockIdx.x / shared_blocks * 8;
        run_product<TYPES, 1>(
            shared, blockIdx.x % shared_blocks, first, n, own_grid(grids), scratch);
        return;
    }
    wait_for_dependencies();
    int items = *groups.active_count * expert_items;
    for (int item = blockIdx.x - shared_items; item < items; item += gridDim.x - shared_items) {
        int expert = groups.active[item / expert_items];
        int first_tile = item % expert_items * DOWN_TILES;
        int tile = expert * tiles + min(first_tile + warp / DOWN_SPLIT, tiles - 1);
        int start = groups.starts[expert], end = groups.starts[expert + 1];
        for (int first = start; first < end; first += 8) {
            u32 mine;
            Rows<1> rows =
                expert_rows(groups, hidden, w.columns, 1, group_sums, first, end, mine);
            Sums<1> sums;
            sums.clear();
            multiply_tile_of<TYPES, 1>(
                w.type, sums, w.weights, w.columns, tile, warp % DOWN_SPLIT, DOWN_SPLIT, rows,
                own_grid(grids), lane, false, [] {});
            gather_sums(sums, scratch, warp, lane);
            __syncthreads();
            for (int i = threadIdx.x; i < DOWN_TILES * 128; i += DECODE_WARPS * WARP) {
                int local = i / 128, pair_at = first + i % 128 / 16;
                if (pair_at >= end || first_tile + local >= tiles) continue;
                u32 pair = groups.pairs[pair_at];
                size_t slot = (size_t)(pair / used) * (used + 1) + pair % used;
                out[slot * w.rows + 16 * (first_tile + local) + i % 16] =
                    total<1>(scratch + local * DOWN_SPLIT * 128, DOWN_SPLIT, i % 128);
            }
            __syncthreads();
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) experts_gate_up_q2(
    Stack gate, Stack up, Groups groups, const float* pair_weights, const u16* x, u16* hidden,
    u16* group_sums, int used, float limit, const uint4* iq2_grid
) {
    gate_up<TYPE_BIT(IQ2_XXS)>(
        gate, up, groups, pair_weights, x, hidden, group_sums, used, limit, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(256, 1) experts_gate_up_any(
    Stack gate, Stack up, Groups groups, const float* pair_weights, const u16* x, u16* hidden,
    u16* group_sums, int used, float limit, const uint4* iq2_grid
) {
    gate_up<ANY_TYPE>(
        gate, up, groups, pair_weights, x, hidden, group_sums, used, limit, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(256, 2) experts_down_q2(
    Stack w, Groups groups, const u16* hidden, const u16* group_sums, float* out, int used, int n,
    __grid_constant__ const Product shared, const uint4* iq2_grid
) {
    down<TYPE_BIT(Q2_K) | TYPE_BIT(Q8_0) | GROUP_SUMS>(w, groups, hidden, group_sums, out, used, n, shared, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(256, 1) experts_down_any(
    Stack w, Groups groups, const u16* hidden, const u16* group_sums, float* out, int used, int n,
    __grid_constant__ const Product shared, const uint4* iq2_grid
) {
    down<ANY_TYPE>(w, groups, hidden, group_sums, out, used, n, shared, iq2_grid);
}
