// Choosing experts, for the files that build kernels from it.
#pragma once

#include "common.cuh"

// Scores that a lane holds: up to 512 experts.
#define LANE_SCORES 16
// Floor under the sum of chosen scores, as in other engines; real weights never come near it.
#define SMALLEST_SUM 6.1035156e-5f

__device__ inline float sqrt_softplus(float x) {
    return sqrtf(x > 20.0f ? x : log1pf(expf(x)));
}

// What turns router products into chosen experts. Mirrors `Routing` in src/stages/experts.rs.
struct Routing {
    // Router products [n, experts].
    const float* logits;
    // Added to the scores for the choice alone [experts], if `table` is null.
    const float* bias;
    // The experts of each token, where they depend on it alone [vocab, used].
    const u32* table;
    const u32* tokens;
    // The choice, ids ascending [n, used].
    u32* ids;
    float* weights;
    int experts;
    int used;
    float scale;
};

// A number's place among all numbers, above 0.
__device__ inline u32 rank_of(float x) {
    // Zeros are equal, whatever their sign.
    u32 bits = __float_as_uint(x + 0.0f);
    return max(bits & 0x80000000 ? ~bits : bits | 0x80000000, 1u);
}

// One warp: the experts with the largest biased scores of a row, ascending in the first `used` lanes.
__device__ inline u32 choose_experts(const Routing& r, const float* logits) {
    int lane = threadIdx.x % WARP, experts = r.experts, used = r.used;
    // 0: no expert, or taken.
    u32 ranks[LANE_SCORES];
#pragma unroll
    for (int i = 0; i < LANE_SCORES; ++i) {
        int e = 32 * i + lane;
        ranks[i] = e < experts ? rank_of(sqrt_softplus(logits[e]) + r.bias[e]) : 0;
    }
    u32 chosen = 0;
    for (int j = 0; j < used; ++j) {
        u32 best = 0;
        int at = 0;
#pragma unroll
        for (int i = 0; i < LANE_SCORES; ++i) {
            if (32 * i >= experts) break;
            if (ranks[i] > best) {
                best = ranks[i];
                at = 32 * i + lane;
            }
        }
        // Of equal ones the lower index.
        bool largest = best == __reduce_max_sync(FULL_WARP, best);
        u32 first = __reduce_min_sync(FULL_WARP, largest ? (u32)at : ~0u);
        if (lane == j) chosen = first;
#pragma unroll
        for (int i = 0; i < LANE_SCORES; ++i) {
            if (32 * i + lane == first) ranks[i] = 0;
        }
    }
    int before = 0;
    for (int j = 0; j < used; ++j) before += __shfl_sync(FULL_WARP, chosen, j) < chosen;
    u32 own = 0;
    for (int j = 0; j < used; ++j) {
        u32 id = __shfl_sync(FULL_WARP, chosen, j);
        if (__shfl_sync(FULL_WARP, before, j) == lane) own = id;
    }
    return own;
}

// One warp: the choice of row `row`.
__device__ inline void route_row(const Routing& r, int row) {
    int lane = threadIdx.x % WARP, used = r.used;
    const float* logits = r.logits + (size_t)row * r.experts;
    u32 own = 0;
    if (!r.table) {
        own = choose_experts(r, logits);
    } else if (lane < used) {
        own = r.table[(size_t)r.tokens[row] * used + lane];
    }
    float score = lane < used ? sqrt_softplus(logits[own]) : 0.0f;
    float sum = warp_sum(score);
    if (lane < used) {
        size_t at = (size_t)row * used + lane;
        r.ids[at] = own;
        r.weights[at] = r.scale * score / fmaxf(sum, SMALLEST_SUM);
    }
}

// Counts over the experts up to one's own: pairs, experts that have pairs, tiles.
struct ExpertCounts {
    u32 pairs, active, tiles;

    __device__ inline void add(const ExpertCounts& o) {
        pairs += o.pairs;
        active += o.active;
        tiles += o.tiles;
    }
};

// The sum over the threads before this one; `all` becomes that over the block.
template <int WARPS>
__device__ inline ExpertCounts counts_before(
    const ExpertCounts& own, ExpertCounts (&warp_counts)[WARPS], ExpertCounts& all
) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    ExpertCounts sum = own;
#pragma unroll
    for (int d = 1; d < WARP; d *= 2) {
        ExpertCounts below = {
            __shfl_up_sync(FULL_WARP, sum.pairs, d), __shfl_up_sync(FULL_WARP, sum.active, d),
            __shfl_up_sync(FULL_WARP, sum.tiles, d)};
        if (lane >= d) sum.add(below);
    }
    if (lane == WARP - 1) warp_counts[warp] = sum;
    __syncthreads();
    all = {0, 0, 0};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        if (w == warp) sum.add(all);
        all.add(warp_counts[w]);
    }
    return {sum.pairs - own.pairs, sum.active - own.active, sum.tiles - own.tiles};
}

// Pairs and experts that `group_few` takes.
#define MOST_FEW_PAIRS 1024
#define MOST_EXPERTS 512

// Lists the pairs of each expert (see `Groups` in products.cuh), for all threads of a block of
// WARPS warps.
template <int WARPS>
__device__ inline void group_few(
    const u32* ids, int count, int experts, u32* pairs, u32* starts, u32* active, u32* active_count
) {
    constexpr int THREADS = WARPS * WARP, OWN = MOST_EXPERTS / THREADS;
    __shared__ u32 chosen[MOST_FEW_PAIRS], counts[MOST_EXPERTS];
    __shared__ ExpertCounts warp_counts[WARPS];
    for (int e = threadIdx.x; e < MOST_EXPERTS; e += THREADS) counts[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) {
        chosen[i] = ids[i];
        atomicAdd(&counts[chosen[i]], 1);
    }
    __syncthreads();
    ExpertCounts own = {0, 0, 0}, all;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        u32 pairs_of = counts[OWN * threadIdx.x + i];
        own.add({pairs_of, pairs_of > 0, 0});
    }
    ExpertCounts before = counts_before(own, warp_counts, all);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        u32 expert = OWN * threadIdx.x + i, pairs_of = counts[expert];
        if (expert < experts) starts[expert] = before.pairs;
        if (pairs_of > 0) active[before.active] = expert;
        counts[expert] = before.pairs;
        before.add({pairs_of, pairs_of > 0, 0});
    }
    if (threadIdx.x == 0) {
        starts[experts] = all.pairs;
        *active_count = all.active;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) {
        u32 at = counts[chosen[i]];
        for (int j = 0; j < i; ++j) at += chosen[j] == chosen[i];
        pairs[at] = i;
    }
}
