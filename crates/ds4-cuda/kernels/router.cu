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

// One block per expert: lists its pairs from `first_pair` on (see `Groups` in products.cuh), and tiles of at most
// `tile_tokens` of them: `tiles[i]` is (expert, first pair).
extern "C" __global__ void __launch_bounds__(256) group_pairs(
    const u32* ids, int first_pair, int end_pair, int experts, int tile_tokens, u32* grouped, u32* starts,
    u32* active, u32* active_count, uint2* tiles, u32* tile_count
) {
    // Of each expert: its pairs.
    u32* counts = (u32*)dynamic_shared;
    __shared__ u32 warp_counts[8];
    launch_dependents();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[e] = 0;
    __syncthreads();
    wait_for_dependencies();
    for (int i = first_pair + threadIdx.x; i < end_pair; i += blockDim.x) atomicAdd(&counts[ids[i]], 1);
    __syncthreads();
    u32 expert = blockIdx.x, start = 0, rank = 0, all_active = 0, tile = 0, all_tiles = 0;
    for (u32 e = 0; e < experts; ++e) {
        u32 count = counts[e], own_tiles = (count + tile_tokens - 1) / tile_tokens;
        if (e < expert) {
            start += count;
            rank += count > 0;
            tile += own_tiles;
        }
        all_active += count > 0;
        all_tiles += own_tiles;
    }
    u32 count = counts[expert];
    if (threadIdx.x == 0) {
        starts[expert] = start;
        if (expert + 1 == experts) starts[experts] = start + count;
        if (count > 0) active[rank] = expert;
        if (expert == 0) {
            *active_count = all_active;
            *tile_count = all_tiles;
        }
    }
    for (u32 i = threadIdx.x; i * tile_tokens < count; i += blockDim.x) {
        tiles[tile + i] = make_uint2(expert, start + i * tile_tokens);
    }
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 next = start;
    for (int base = first_pair; base < end_pair && next < start + count; base += blockDim.x) {
        int i = base + threadIdx.x;
        bool hit = i < end_pair && ids[i] == expert;
        u32 votes = __ballot_sync(FULL_WARP, hit);
        if (lane == 0) warp_counts[warp] = __popc(votes);
        __syncthreads();
        u32 at = next;
        for (int w = 0; w < 8; ++w) {
            if (w < warp) at += warp_counts[w];
            next += warp_counts[w];
        }
        if (hit) grouped[at + __popc(votes & ((1u << lane) - 1))] = i;
        __syncthreads();
    }
}
