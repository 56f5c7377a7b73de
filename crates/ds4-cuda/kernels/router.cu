// Which experts each row uses, how much of each, and the rows of each expert.

#include "router.cuh"

// Warps of a block that routes.
#define ROUTE_WARPS 8

extern "C" __global__ void __launch_bounds__(ROUTE_WARPS * WARP) route(
    __grid_constant__ const Routing routing, int first_row, int end_row
) {
    __shared__ float scores[ROUTE_WARPS][MOST_EXPERTS];
    launch_dependents();
    wait_for_dependencies();
    int warp = threadIdx.x / WARP, row = first_row + blockIdx.x * ROUTE_WARPS + warp;
    // One row a warp.
    route_rows(routing, row, end_row, end_row, scores[warp], [](int, u32) {});
}

// Threads of a block that groups pairs, one for each expert.
#define GROUP_THREADS 512
#define GROUP_WARPS (GROUP_THREADS / WARP)

// Pairs that a thread reads at once, so that it waits for memory once.
#define READ_AHEAD 8

// Counts the pairs of each expert.
__device__ inline void count_pairs(u32* counts, const u32* ids, int first_pair, int end_pair) {
    for (int base = first_pair; base < end_pair; base += READ_AHEAD * GROUP_THREADS) {
        u32 expert[READ_AHEAD];
#pragma unroll
        for (int k = 0; k < READ_AHEAD; ++k) {
            int i = base + k * GROUP_THREADS + threadIdx.x;
            if (i < end_pair) expert[k] = ids[i];
        }
#pragma unroll
        for (int k = 0; k < READ_AHEAD; ++k) {
            if (base + k * GROUP_THREADS + (int)threadIdx.x < end_pair) {
                atomicAdd(&counts[expert[k]], 1);
            }
        }
    }
}

// Writes an expert's pairs in ascending order to `grouped`. Each warp searches 32·32 in a row at
// a time, and lane i keeps which of the i-th 32 are hits.
__device__ inline void list_pairs(
    u32 expert, const u32* ids, int first_pair, int end_pair, u32* grouped,
    u32 (&warp_hits)[GROUP_WARPS]
) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int base = first_pair; base < end_pair; base += WARP * GROUP_THREADS) {
        int first = base + warp * WARP * WARP;
        u32 hits = 0;
        for (int i = 0; i < WARP && first + i * WARP < end_pair; i += READ_AHEAD) {
            bool hit[READ_AHEAD];
#pragma unroll
            for (int k = 0; k < READ_AHEAD; ++k) {
                int at = first + (i + k) * WARP + lane;
                hit[k] = at < end_pair && ids[at] == expert;
            }
#pragma unroll
            for (int k = 0; k < READ_AHEAD; ++k) {
                u32 votes = __ballot_sync(FULL_WARP, hit[k]);
                if (lane == i + k) hits = votes;
            }
        }
        u32 upto = __popc(hits);
#pragma unroll
        for (int d = 1; d < WARP; d *= 2) {
            u32 below = __shfl_up_sync(FULL_WARP, upto, d);
            if (lane >= d) upto += below;
        }
        if (lane == WARP - 1) warp_hits[warp] = upto;
        __syncthreads();
        u32* to = grouped + upto - __popc(hits);
#pragma unroll
        for (int w = 0; w < GROUP_WARPS; ++w) {
            if (w < warp) to += warp_hits[w];
            grouped += warp_hits[w];
        }
        for (; hits; hits &= hits - 1) *to++ = first + lane * WARP + __ffs(hits) - 1;
        __syncthreads();
    }
}

// Lists the pairs of each expert from `first_pair` on (see `Groups` in products.cuh), and tiles of
// at most `tile_tokens` of them: `tiles[i]` is (expert, first pair). The blocks share the experts
// that have pairs; how many there are changes nothing else.
extern "C" __global__ void __launch_bounds__(GROUP_THREADS) group_pairs(
    const u32* ids, int first_pair, int end_pair, int experts, int tile_tokens, u32* grouped,
    u32* starts, u32* active, u32* active_count, uint2* tiles, u32* tile_count
) {
    __shared__ u32 counts[GROUP_THREADS], active_experts[GROUP_THREADS], active_starts[GROUP_THREADS];
    __shared__ ExpertCounts warp_counts[GROUP_WARPS];
    __shared__ u32 warp_hits[GROUP_WARPS];
    launch_dependents();
    int expert = threadIdx.x;
    counts[expert] = 0;
    __syncthreads();
    wait_for_dependencies();
    count_pairs(counts, ids, first_pair, end_pair);
    __syncthreads();
    u32 count = counts[expert], own_tiles = (count + tile_tokens - 1) / tile_tokens;
    ExpertCounts all, before = counts_before({count, count > 0, own_tiles}, warp_counts, all);
    if (count > 0) {
        active_experts[before.active] = expert;
        active_starts[before.active] = before.pairs;
    }
    if (blockIdx.x == 0) {
        if (expert < experts) starts[expert] = before.pairs;
        if (count > 0) active[before.active] = expert;
        for (u32 i = 0; i < own_tiles; ++i) {
            tiles[before.tiles + i] = make_uint2(expert, before.pairs + i * tile_tokens);
        }
        if (expert == 0) {
            starts[experts] = all.pairs;
            *active_count = all.active;
            *tile_count = all.tiles;
        }
    }
    __syncthreads();
    for (u32 i = blockIdx.x; i < all.active; i += gridDim.x) {
        list_pairs(active_experts[i], ids, first_pair, end_pair, grouped + active_starts[i], warp_hits);
    }
}
