// Routed experts of a few rows: each chosen expert's weights are read once.
//
// A block does a tile of gate and up or two of down at a time, and goes on until all are done. Blocks
// for the shared expert's last product come first: its input was ready long ago.

#include "products.cuh"

#define SPLIT (DECODE_WARPS / 2)

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
    int tiles = gate.rows / 16, steps = gate.columns / 32;
    wait_for_dependencies();
    __syncthreads();
    int items = *groups.active_count * tiles;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        int expert = groups.active[item / tiles], tile = item % tiles;
        int start = groups.starts[expert], end = groups.starts[expert + 1];
        for (int first = start; first < end; first += 8) {
            u32 mine;
            Rows<1> rows =
                expert_rows(groups, x, gate.columns, used, nullptr, first, end, mine);
            Sums<1> g_sums, u_sums;
            g_sums.clear();
            u_sums.clear();
            if constexpr (TYPES == TYPE_BIT(IQ2_XXS)) {
                int units = steps / unit_steps(IQ2_XXS);
                multiply_pair<IQ2_XXS, false>(
                    g_sums, u_sums, gate.weights, up.weights, units, expert * tiles + tile, warp,
                    DECODE_WARPS, rows, own_grid(grids), lane);
                int next = item + gridDim.x;
                if (first + 8 >= end && next < items) {
                    int at = groups.active[next / tiles] * tiles + next % tiles;
                    prefetch_tile<IQ2_XXS>(gate.weights, units, at, warp, DECODE_WARPS, lane);
                    prefetch_tile<IQ2_XXS>(up.weights, units, at, warp, DECODE_WARPS, lane);
                }
            } else {
                multiply_tile_of<TYPES, 1>(
                    gate.type, g_sums, gate.weights, gate.columns, expert * tiles + tile, warp,
                    DECODE_WARPS, rows, own_grid(grids), lane, false, [] {});
                multiply_tile_of<TYPES, 1>(
                    up.type, u_sums, up.weights, up.columns, expert * tiles + tile, warp,
                    DECODE_WARPS, rows, own_grid(grids), lane, false, [] {});
            }
            gather_sums(g_sums, scratch, warp, lane);
            gather_sums(u_sums, scratch_up, warp, lane);
            __syncthreads();
            if (threadIdx.x < 128 && first + (int)(threadIdx.x - lane) / 16 < end) {
                int at = min(first + (int)threadIdx.x / 16, end - 1);
                u32 pair = groups.pairs[at];
                float g = total<1>(scratch, DECODE_WARPS, threadIdx.x);
                float u = total<1>(scratch_up, DECODE_WARPS, threadIdx.x);
                u16 y = float_to_half(pair_weights[pair] * swiglu(g, u, limit));
                float sum = half_to_float(y);
                for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, d);
                size_t row = (size_t)pair * gate.rows;
                if (first + (int)threadIdx.x / 16 < end) {
                    hidden[row + 16 * tile + threadIdx.x % 16] = y;
                    if (lane % 16 == 0) group_sums[row / 16 + group_sum_at(tile)] = float_to_half(sum);
                }
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
    int tiles = w.rows / 16, block_tiles = DECODE_WARPS / SPLIT;
    int expert_items = (tiles + block_tiles - 1) / block_tiles;
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
        int tile = item % expert_items * block_tiles + warp / SPLIT;
        int start = groups.starts[expert], end = groups.starts[expert + 1];
        for (int first = start; first < end; first += 8) {
            u32 mine;
            Rows<1> rows =
                expert_rows(groups, hidden, w.columns, 1, group_sums, first, end, mine);
            Sums<1> sums;
            sums.clear();
            multiply_tile_of<TYPES, 1>(
                w.type, sums, w.weights, w.columns, expert * tiles + min(tile, tiles - 1),
                warp % SPLIT, SPLIT, rows, own_grid(grids), lane, false, [] {});
            int next = item + gridDim.x - shared_items;
            if ((TYPES & GROUP_SUMS) && first + 8 >= end && next < items) {
                int at = groups.active[next / expert_items] * tiles;
                at += min(next % expert_items * block_tiles + warp / SPLIT, tiles - 1);
                prefetch_tile<Q2_K>(
                    w.weights, w.columns / 256, at, warp % SPLIT, SPLIT, lane);
            }
            gather_sums(sums, scratch, warp, lane);
            __syncthreads();
            int i = threadIdx.x % 128, half = threadIdx.x / 128;
            int row = 16 * (tile - warp / SPLIT + half) + i % 16;
            if (first + i / 16 < end && row < w.rows) {
                u32 pair = groups.pairs[first + i / 16];
                size_t slot = (size_t)(pair / used) * (used + 1) + pair % used;
                out[slot * w.rows + row] = total<1>(scratch + half * SPLIT * 128, SPLIT, i);
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
