// Routed experts of a few rows: each chosen expert's weights are read once.

#include "products.cuh"

template <int TYPES>
__device__ inline void expert_tile(
    const Stack& w, int expert, const Rows<1>& x, const uint2* grid, float* scratch
) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int tile = expert * (w.rows / 16) + blockIdx.x;
    Sums<1> sums;
    sums.clear();
    multiply_tile_of<TYPES, 1>(
        w.type, sums, w.weights, w.columns, tile, warp, warps, x, grid, lane, false, [] {});
    gather_sums(sums, scratch, warp, lane);
}

// hidden[pair] = weight · SwiGLU(gate·x, up·x), for the pairs of the block's expert.
template <int TYPES>
__device__ inline void gate_up(
    const Stack& gate, const Stack& up, const Groups& groups, const float* pair_weights,
    const u16* x, u16* hidden, int used, float limit, const uint2* iq2_grid
) {
    __shared__ uint2 grid[256];
    launch_dependents();
    if (TYPES & TYPE_BIT(IQ2_XXS)) load_grid(grid, iq2_grid);
    wait_for_dependencies();
    if (blockIdx.y >= *groups.active_count) return;
    __syncthreads();
    int expert = groups.active[blockIdx.y], warps = blockDim.x / WARP;
    int start = groups.starts[expert], end = groups.starts[expert + 1];
    float* scratch = (float*)dynamic_shared;
    float* scratch_up = scratch + warps * 128;
    for (int first = start; first < end; first += 8) {
        u32 mine = groups.pairs[min(first + (int)threadIdx.x % WARP / 4, end - 1)];
        Rows<1> rows = {{x + (size_t)(mine / used) * gate.columns}, {nullptr}};
        expert_tile<TYPES>(gate, expert, rows, grid, scratch);
        expert_tile<TYPES>(up, expert, rows, grid, scratch_up);
        __syncthreads();
        if (threadIdx.x < 128 && first + (int)threadIdx.x / 16 < end) {
            u32 pair = groups.pairs[first + threadIdx.x / 16];
            float g = total<1>(scratch, warps, threadIdx.x);
            float u = total<1>(scratch_up, warps, threadIdx.x);
            size_t at = (size_t)pair * gate.rows + 16 * blockIdx.x + threadIdx.x % 16;
            hidden[at] = float_to_half(pair_weights[pair] * swiglu(g, u, limit));
        }
        __syncthreads();
    }
}

// out[token][slot] = down·hidden for the pairs of the block's expert; the last blocks in y do
// `shared`, whose results go to the slot after the routed ones.
template <int TYPES>
__device__ inline void down(
    const Stack& w, const Groups& groups, const u16* hidden, float* out, int used, int n,
    const Product* shared, const uint2* iq2_grid
) {
    __shared__ uint2 grid[256];
    launch_dependents();
    if (TYPES & TYPE_BIT(IQ2_XXS)) load_grid(grid, iq2_grid);
    float* scratch = (float*)dynamic_shared;
    int shared_blocks = (n + 7) / 8, routed = gridDim.y - shared_blocks;
    if ((int)blockIdx.y >= routed) {
        if (TYPES & TYPE_BIT(IQ2_XXS)) __syncthreads();
        run_product<TYPES, 1>(
            *shared, blockIdx.x, 8 * (blockIdx.y - routed), n, grid, scratch);
        return;
    }
    wait_for_dependencies();
    if (blockIdx.y >= *groups.active_count) return;
    __syncthreads();
    int expert = groups.active[blockIdx.y], warps = blockDim.x / WARP;
    int start = groups.starts[expert], end = groups.starts[expert + 1];
    for (int first = start; first < end; first += 8) {
        u32 mine = groups.pairs[min(first + (int)threadIdx.x % WARP / 4, end - 1)];
        Rows<1> rows = {{hidden + (size_t)mine * w.columns}, {nullptr}};
        expert_tile<TYPES>(w, expert, rows, grid, scratch);
        __syncthreads();
        if (threadIdx.x < 128 && first + (int)threadIdx.x / 16 < end) {
            u32 pair = groups.pairs[first + threadIdx.x / 16];
            size_t slot = (size_t)(pair / used) * (used + 1) + pair % used;
            out[slot * w.rows + 16 * blockIdx.x + threadIdx.x % 16] =
                total<1>(scratch, warps, threadIdx.x);
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) experts_gate_up_q2(
    Stack gate, Stack up, Groups groups, const float* pair_weights, const u16* x, u16* hidden,
    int used, float limit, const uint2* iq2_grid
) {
    gate_up<TYPE_BIT(IQ2_XXS)>(gate, up, groups, pair_weights, x, hidden, used, limit, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(256, 1) experts_gate_up_any(
    Stack gate, Stack up, Groups groups, const float* pair_weights, const u16* x, u16* hidden,
    int used, float limit, const uint2* iq2_grid
) {
    gate_up<ANY_TYPE>(gate, up, groups, pair_weights, x, hidden, used, limit, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(256, 2) experts_down_q2(
    Stack w, Groups groups, const u16* hidden, float* out, int used, int n, const Product* shared,
    const uint2* iq2_grid
) {
    down<TYPE_BIT(Q2_K) | TYPE_BIT(Q8_0)>(w, groups, hidden, out, used, n, shared, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(256, 1) experts_down_any(
    Stack w, Groups groups, const u16* hidden, float* out, int used, int n, const Product* shared,
    const uint2* iq2_grid
) {
    down<ANY_TYPE>(w, groups, hidden, out, used, n, shared, iq2_grid);
}
