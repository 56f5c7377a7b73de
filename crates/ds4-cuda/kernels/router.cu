// Which experts each row uses, how much of each, and the MoE permutation: the pairs of rows and
// experts in the order of experts.
//
//   score = sqrt(softplus(logit)), ids = the `used` largest of score + bias (or from a table)
//   weight[slot] = scale · score[ids[slot]] / Σ score[ids]
//   pairs = all row · used + slot, sorted by ids; offsets[expert] = pairs of the experts before
//
// Inputs: logits f32 [n, experts], tokens u32 [n].
// Outputs: ids u32 and weights f32 [n, used]; pairs u32 [n · used], offsets u32 [experts + 1],
// active experts, and tiles of at most TILE_PAIRS pairs.
// Grid of route: (n / 8). Block: 256 threads, a warp for each row.
// Grid of permute_pairs: (blocks that share the experts). Block: 512 threads, one for each expert.
// Plain Rust: `route` in crates/ds4-cpu/src/router.rs.

#include "router.cuh"

struct RouteParams {
    Routing routing;
    int first_row;
    int end_row;
};
SAME_IN_RUST(RouteParams);

// The choice of rows `first_row` to `end_row`. Grid: (blocks of ROUTE_WARPS rows).
extern "C" __global__ void __launch_bounds__(ROUTE_WARPS * WARP) route(
    __grid_constant__ const RouteParams p
) {
    __shared__ float scores[ROUTE_WARPS][MOST_EXPERTS];
    launch_dependents();
    wait_for_dependencies();
    int warp = threadIdx.x / WARP, row = p.first_row + blockIdx.x * ROUTE_WARPS + warp;
    // One row a warp.
    route_rows(p.routing, row, p.end_row, p.end_row, scores[warp], [](int, u32) {});
}

#define PERMUTE_WARPS (PERMUTE_THREADS / WARP)

// Pairs that a thread reads at once, so that it waits for memory once.
#define READ_AHEAD 8

// Counts the pairs of each expert.
__device__ inline void count_pairs(u32* counts, const u32* ids, int first_pair, int end_pair) {
    for (int base = first_pair; base < end_pair; base += READ_AHEAD * PERMUTE_THREADS) {
        u32 expert[READ_AHEAD];
#pragma unroll
        for (int k = 0; k < READ_AHEAD; ++k) {
            int i = base + k * PERMUTE_THREADS + threadIdx.x;
            if (i < end_pair) expert[k] = ids[i];
        }
#pragma unroll
        for (int k = 0; k < READ_AHEAD; ++k) {
            if (base + k * PERMUTE_THREADS + (int)threadIdx.x < end_pair) {
                atomicAdd(&counts[expert[k]], 1);
            }
        }
    }
}

// Writes an expert's pairs in ascending order to `grouped`. Each warp searches 32·32 in a row at
// a time, and lane i keeps which of the i-th 32 are hits.
__device__ inline void list_pairs(
    u32 expert, const u32* ids, int first_pair, int end_pair, u32* grouped,
    u32 (&warp_hits)[PERMUTE_WARPS]
) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int base = first_pair; base < end_pair; base += WARP * PERMUTE_THREADS) {
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
        for (int w = 0; w < PERMUTE_WARPS; ++w) {
            if (w < warp) to += warp_hits[w];
            grouped += warp_hits[w];
        }
        for (; hits; hits &= hits - 1) *to++ = first + lane * WARP + __ffs(hits) - 1;
        __syncthreads();
    }
}

struct PermutePairsParams {
    // Chosen experts [n·used].
    const u32* ids;
    Permutation permutation;
    // The work list of prefill: tiles of at most TILE_PAIRS pairs of an expert, as (expert, first
    // pair), and how many.
    uint2* tiles;
    u32* tile_count;
    int first_pair;
    int end_pair;
    int experts;
};
SAME_IN_RUST(PermutePairsParams);

// Permutes the pairs from `first_pair` to `end_pair`. The blocks share the experts that have pairs;
// how many blocks there are changes nothing else.
extern "C" __global__ void __launch_bounds__(PERMUTE_THREADS) permute_pairs(
    __grid_constant__ const PermutePairsParams p
) {
    __shared__ u32 counts[PERMUTE_THREADS], active_experts[PERMUTE_THREADS];
    __shared__ u32 active_offsets[PERMUTE_THREADS];
    __shared__ ExpertCounts warp_counts[PERMUTE_WARPS];
    __shared__ u32 warp_hits[PERMUTE_WARPS];
    launch_dependents();
    const Permutation& to = p.permutation;
    int expert = threadIdx.x;
    counts[expert] = 0;
    __syncthreads();
    wait_for_dependencies();
    count_pairs(counts, p.ids, p.first_pair, p.end_pair);
    __syncthreads();
    u32 count = counts[expert], own_tiles = (count + TILE_PAIRS - 1) / TILE_PAIRS;
    ExpertCounts all, before = counts_before({count, count > 0, own_tiles}, warp_counts, all);
    if (count > 0) {
        active_experts[before.active] = expert;
        active_offsets[before.active] = before.pairs;
    }
    if (blockIdx.x == 0) {
        if (expert < p.experts) to.offsets[expert] = before.pairs;
        if (count > 0) to.active[before.active] = expert;
        for (u32 i = 0; i < own_tiles; ++i) {
            p.tiles[before.tiles + i] = make_uint2(expert, before.pairs + i * TILE_PAIRS);
        }
        if (expert == 0) {
            to.offsets[p.experts] = all.pairs;
            *to.active_count = all.active;
            *p.tile_count = all.tiles;
        }
    }
    __syncthreads();
    for (u32 i = blockIdx.x; i < all.active; i += gridDim.x) {
        list_pairs(active_experts[i], p.ids, p.first_pair, p.end_pair, to.pairs + active_offsets[i],
                   warp_hits);
    }
}
