// Routed experts of a few rows, of any type: each chosen expert's weights are read once. See
// experts_q2.cu for the types that the model comes in.
//
//   hidden[pair] = weight[pair] · SwiGLU(gate·x, up·x), out[row][slot] = down·hidden[pair]
//
// Inputs: x f16 [n, hidden]; the MoE permutation of the pairs of rows and experts; gate and up
// [experts · width, hidden], down [experts · hidden, width].
// Between the kernels: hidden f16 [n · used, width].
// Output: out f32 [n, used + 1, hidden], whose last slot is the shared expert's.
// Grid: (blocks that share the work list). Block: 256 threads.
// Plain Rust: `experts` in crates/ds4-cpu/src/reference/experts.rs.
//
// A block does some tiles of an expert at a time, and goes on until all are done. Blocks for the
// shared expert's last product come first: its input was ready long ago.

#include "permutation.cuh"
#include "products.cuh"

// Warps that share a tile, and tiles that a block does at a time: many of one expert, so that
// finding its rows and adding up are a small part of the work.
#define GATE_UP_SPLIT 2
#define GATE_UP_TILES (DECODE_WARPS / GATE_UP_SPLIT)
#define DOWN_TILES DECODE_WARPS

// The expert's activation rows `first` … up to `end`, by number of pair: row pair / `slots` of `x`.
__device__ inline Rows expert_rows(
    const Permutation& permutation, const u16* x, int columns, int slots, int first, int end
) {
    u32 pair = permutation.pairs[min(first + (int)threadIdx.x % WARP / 4, end - 1)];
    return {x + (size_t)(pair / slots) * columns + 8 * (threadIdx.x % 4), nullptr};
}

struct GateUpAnyParams {
    ExpertMatrix gate;
    ExpertMatrix up;
    Permutation permutation;
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
SAME_IN_RUST(GateUpAnyParams);

// hidden[pair] = weight · SwiGLU(gate·x, up·x) for each expert's pairs.
extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP, 1) experts_gate_up_any(
    __grid_constant__ const GateUpAnyParams p
) {
    __shared__ uint4 grids[GRID_ENTRIES * GRID_COPIES];
    __shared__ float scratch[DECODE_WARPS * 128], scratch_up[DECODE_WARPS * 128];
    load_grid(grids, p.iq2_grid);
    const ExpertMatrix &gate = p.gate, &up = p.up;
    const Permutation& permutation = p.permutation;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int tiles = gate.rows / 16, part = warp % GATE_UP_SPLIT;
    int expert_work = (tiles + GATE_UP_TILES - 1) / GATE_UP_TILES;
    wait_for_dependencies();
    // Only now: `experts_down_q2` reads the permutation before it waits for this kernel.
    launch_dependents();
    __syncthreads();
    int work_tiles = *permutation.active_count * expert_work;
    for (int work_tile = blockIdx.x; work_tile < work_tiles; work_tile += gridDim.x) {
        int expert = permutation.active[work_tile / expert_work];
        int first_tile = work_tile % expert_work * GATE_UP_TILES;
        int tile = expert * tiles + min(first_tile + warp / GATE_UP_SPLIT, tiles - 1);
        int start = permutation.offsets[expert], end = permutation.offsets[expert + 1];
        for (int first = start; first < end; first += 8) {
            Rows rows = expert_rows(permutation, p.x, gate.columns, p.used, first, end);
            Sums<1> g_sums, u_sums;
            g_sums.clear();
            u_sums.clear();
            multiply_tile_of<ANY_TYPE>(
                gate.type, g_sums, gate.weights, gate.columns, tile, part, GATE_UP_SPLIT, rows,
                own_grid(grids), lane, false, [] {});
            multiply_tile_of<ANY_TYPE>(
                up.type, u_sums, up.weights, up.columns, tile, part, GATE_UP_SPLIT, rows,
                own_grid(grids), lane, false, [] {});
            gather_sums(g_sums, scratch, warp, lane);
            gather_sums(u_sums, scratch_up, warp, lane);
            __syncthreads();
            for (int i = threadIdx.x; i < GATE_UP_TILES * 128; i += DECODE_WARPS * WARP) {
                int local = i / 128, pair_at = first + i % 128 / 16, to = first_tile + local;
                if (pair_at >= end || to >= tiles) continue;
                u32 pair = permutation.pairs[pair_at];
                int from = local * GATE_UP_SPLIT * 128;
                float g = total(scratch + from, GATE_UP_SPLIT, i % 128);
                float u = total(scratch_up + from, GATE_UP_SPLIT, i % 128);
                p.hidden[(size_t)pair * gate.rows + 16 * to + i % 16] =
                    float_to_half(p.pair_weights[pair] * swiglu(g, u, p.limit));
            }
            __syncthreads();
        }
    }
}

struct DownAnyParams {
    ExpertMatrix down;
    Permutation permutation;
    // [n·used, columns], halves.
    const u16* hidden;
    // [n, used + 1, rows].
    float* out;
    const uint4* iq2_grid;
    // The shared expert's last product.
    Product shared;
    int used;
    int rows;
};
SAME_IN_RUST(DownAnyParams);

// out[token][slot] = down·hidden for the pairs of each expert; the shared expert's results go to
// the slot after the routed ones.
extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP, 1) experts_down_any(
    __grid_constant__ const DownAnyParams p
) {
    __shared__ uint4 grids[GRID_ENTRIES * GRID_COPIES];
    __shared__ float scratch[DECODE_WARPS * 128];
    launch_dependents();
    load_grid(grids, p.iq2_grid);
    __syncthreads();
    const ExpertMatrix& w = p.down;
    const Product& shared = p.shared;
    const Permutation& permutation = p.permutation;
    int used = p.used, n = p.rows;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int tiles = w.rows / 16, expert_work = (tiles + DOWN_TILES - 1) / DOWN_TILES;
    int shared_blocks = product_blocks(shared), shared_work = shared_blocks * ((n + 7) / 8);
    if ((int)blockIdx.x < shared_work) {
        int first = blockIdx.x / shared_blocks * 8;
        run_product<ANY_TYPE>(
            shared, blockIdx.x % shared_blocks, first, n, own_grid(grids), scratch);
        return;
    }
    wait_for_dependencies();
    int work_tiles = *permutation.active_count * expert_work;
    int own = blockIdx.x - shared_work, blocks = gridDim.x - shared_work;
    for (int work_tile = own; work_tile < work_tiles; work_tile += blocks) {
        int expert = permutation.active[work_tile / expert_work];
        int first_tile = work_tile % expert_work * DOWN_TILES;
        int tile = expert * tiles + min(first_tile + warp, tiles - 1);
        int start = permutation.offsets[expert], end = permutation.offsets[expert + 1];
        for (int first = start; first < end; first += 8) {
            Rows rows = expert_rows(permutation, p.hidden, w.columns, 1, first, end);
            Sums<1> sums;
            sums.clear();
            multiply_tile_of<ANY_TYPE>(
                w.type, sums, w.weights, w.columns, tile, 0, 1, rows, own_grid(grids), lane, false,
                [] {});
            gather_sums(sums, scratch, warp, lane);
            __syncthreads();
            for (int i = threadIdx.x; i < DOWN_TILES * 128; i += DECODE_WARPS * WARP) {
                int local = i / 128, pair_at = first + i % 128 / 16;
                if (pair_at >= end || first_tile + local >= tiles) continue;
                u32 pair = permutation.pairs[pair_at];
                size_t slot = (size_t)(pair / used) * (used + 1) + pair % used;
                p.out[slot * w.rows + 16 * (first_tile + local) + i % 16] =
                    total(scratch + local * 128, 1, i % 128);
            }
            __syncthreads();
        }
    }
}
