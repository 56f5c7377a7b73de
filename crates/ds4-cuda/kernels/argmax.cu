// The likeliest token of rows of logits.
//
//   tokens[row] = the first token with the largest logits[row][token]
//
// Input: logits f32 [n, vocab].
// Output: tokens u32 [n]; UNUSABLE_TOKEN for a row with a NaN or without a largest finite number.
// Grid: (blocks that share a row, n). Block: 256 threads. The last block to arrive compares the
// best of all blocks.
// Plain Rust: `argmax` in crates/ds4-engine/src/sampling.rs.

#include "common.cuh"

#define ARGMAX_WARPS (ARGMAX_THREADS / WARP)

struct ArgmaxParams {
    // [n, vocab].
    const float* logits;
    // The blocks' own best [n, blocks].
    u64* parts;
    // Counters [n], zero before and after.
    u32* arrivals;
    // [n].
    u32* tokens;
    u32 vocab;
};
SAME_IN_RUST(ArgmaxParams);

// Ranks tokens by their logits, and equal ones by their numbers, the lower above: the largest is
// best. Above all numbers is a NaN.
__device__ inline u64 rank(float logit, u32 token) {
    u32 bits = __float_as_uint(logit);
    // The two zeros are equal.
    if (bits == 0x80000000u) bits = 0;
    u32 order = bits >> 31 ? ~bits : bits | 0x80000000u;
    if (logit != logit) order = 0xffffffffu;
    return (u64)order << 32 | (u32)~token;
}

// The largest over the block, in thread 0. Between two calls is a barrier.
__device__ inline u64 block_best(u64 best) {
    __shared__ u64 warp_best[ARGMAX_WARPS];
    for (int d = WARP / 2; d > 0; d /= 2) best = max(best, __shfl_xor_sync(FULL_WARP, best, d));
    if (threadIdx.x % WARP == 0) warp_best[threadIdx.x / WARP] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < ARGMAX_WARPS; ++w) best = max(best, warp_best[w]);
    }
    return best;
}

extern "C" __global__ void __launch_bounds__(ARGMAX_THREADS) argmax(
    __grid_constant__ const ArgmaxParams p
) {
    launch_dependents();
    wait_for_dependencies();
    u32 row = blockIdx.y, first = blockIdx.x * ARGMAX_THREADS * ARGMAX_THREAD_LOGITS;
    first += threadIdx.x;
    const float* own = p.logits + (u64)row * p.vocab;
    float values[ARGMAX_THREAD_LOGITS];
#pragma unroll
    for (u32 i = 0; i < ARGMAX_THREAD_LOGITS; ++i) {
        u32 token = first + i * ARGMAX_THREADS;
        values[i] = token < p.vocab ? own[token] : -INFINITY;
    }
    u64 best = 0;
#pragma unroll
    for (u32 i = 0; i < ARGMAX_THREAD_LOGITS; ++i) {
        // What is beyond the end is best only where no token is usable.
        best = max(best, rank(values[i], first + i * ARGMAX_THREADS));
    }
    best = block_best(best);
    u64* own_parts = p.parts + (u64)row * gridDim.x;
    if (threadIdx.x == 0) own_parts[blockIdx.x] = best;
    if (!last_to_arrive(p.arrivals + row, gridDim.x)) return;

    best = 0;
    for (u32 i = threadIdx.x; i < gridDim.x; i += ARGMAX_THREADS) best = max(best, own_parts[i]);
    best = block_best(best);
    if (threadIdx.x == 0) {
        bool usable = best >> 32 > rank(-INFINITY, 0) >> 32 && best >> 32 < rank(INFINITY, 0) >> 32;
        p.tokens[row] = usable ? ~(u32)best : UNUSABLE_TOKEN;
    }
}
