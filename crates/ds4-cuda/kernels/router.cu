// Which experts each row uses, how much of each, and the rows of each expert.

#include "common.cuh"

// Scores that a lane holds: up to 512 experts.
#define LANE_SCORES 16
// Floor under the sum of chosen scores, as in other engines; real weights never come near it.
#define SMALLEST_SUM 6.1035156e-5f

__device__ inline float sqrt_softplus(float x) {
    return sqrtf(x > 20.0f ? x : log1pf(expf(x)));
}

// One warp per row: `logits [n, experts]` to `ids` and `weights` [n, used], ids ascending.
// `table [vocab, used]` names the experts where they depend on the token; else `bias [experts]`
// is added to the scores for the choice alone.
extern "C" __global__ void __launch_bounds__(256) route(
    const float* logits, const u32* tokens, int n, int experts, int used, const float* bias,
    const u32* table, float routed_scale, u32* ids, float* weights
) {
    launch_dependents();
    wait_for_dependencies();
    int lane = threadIdx.x % WARP, row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= n) return;
    const float* own = logits + (size_t)row * experts;
    u32* chosen = ids + (size_t)row * used;
    if (table) {
        if (lane < used) chosen[lane] = table[(size_t)tokens[row] * used + lane];
    } else {
        float biased[LANE_SCORES];
#pragma unroll
        for (int i = 0; i < LANE_SCORES; ++i) {
            int e = 32 * i + lane;
            biased[i] = e < experts ? sqrt_softplus(own[e]) + bias[e] : -INFINITY;
        }
        u32 taken = 0;
        for (int j = 0; j < used; ++j) {
            // The largest that is not taken yet; of equal ones the lower index.
            float best = -INFINITY;
            int at = experts;
#pragma unroll
            for (int i = 0; i < LANE_SCORES; ++i) {
                int e = 32 * i + lane;
                if (!(taken >> i & 1) && e < experts && (biased[i] > best || at == experts)) {
                    best = biased[i];
                    at = e;
                }
            }
            for (int d = 16; d > 0; d /= 2) {
                float other = __shfl_xor_sync(FULL_WARP, best, d);
                int other_at = __shfl_xor_sync(FULL_WARP, at, d);
                if (other_at < experts &&
                    (at == experts || other > best || (other == best && other_at < at))) {
                    best = other;
                    at = other_at;
                }
            }
            if (at % 32 == lane) taken |= 1u << (at / 32);
        }
        // The taken ones in ascending order.
        int before = 0;
#pragma unroll
        for (int i = 0; i < LANE_SCORES; ++i) {
            u32 votes = __ballot_sync(FULL_WARP, taken >> i & 1);
            if (taken >> i & 1) {
                chosen[before + __popc(votes & ((1u << lane) - 1))] = 32 * i + lane;
            }
            before += __popc(votes);
        }
    }
    __syncwarp();
    float score = 0.0f;
    if (lane < used) score = sqrt_softplus(own[chosen[lane]]);
    float sum = warp_sum(score);
    if (lane < used) weights[(size_t)row * used + lane] = routed_scale * score / fmaxf(sum, SMALLEST_SUM);
}

// Threads of a block that groups pairs, one for each expert.
#define GROUP_THREADS 512
#define GROUP_WARPS (GROUP_THREADS / WARP)

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
__device__ inline ExpertCounts counts_before(
    const ExpertCounts& own, ExpertCounts (&warp_counts)[GROUP_WARPS], ExpertCounts& all
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
    for (int w = 0; w < GROUP_WARPS; ++w) {
        if (w == warp) sum.add(all);
        all.add(warp_counts[w]);
    }
    return {sum.pairs - own.pairs, sum.active - own.active, sum.tiles - own.tiles};
}

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
