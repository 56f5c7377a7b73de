// What every kernel shares: the description of a step, reductions, launch conventions.
//
// A kernel is `extern "C" __global__`, its name is unique in the program, and its rows are those
// of a step. Nothing about a step but its number of rows is known at launch: tokens, positions and
// cache addresses are read from device memory, so that a captured launch stays right for every
// later step of the same shape.
#pragma once

#include "constants.cuh"
#include "ptx.cuh"

// Parameters of kernels, and their parts, are structs that src/params has by the same name. The
// header constants.cuh knows how many bytes they take there.
#define SAME_IN_RUST(NAME) static_assert(sizeof(NAME) == NAME##_BYTES, "not as in src/params")

#define FULL_WARP 0xffffffffu
// The run-time compiler has no <math.h>.
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

extern __shared__ __align__(128) uint4 dynamic_shared[];

// The rows of a step; every array has one entry per row.
struct Step {
    const u32* token;
    const u32* position;
    // Index into the table of caches.
    const u32* session;
    // Position and row of the first token of the row's span.
    const u32* span_position;
    const u32* span_row;
};
SAME_IN_RUST(Step);

// Cached state of one session in one layer: `LayerPointers` in src/cache.rs.
//
// Rings are addressed by position modulo their capacity.
struct LayerCache {
    // Stored key/value rows, ring of WINDOW_SLOTS.
    u8* window;
    // Compressor inputs [slots, width]; the position bias is in the scores.
    float* values;
    float* scores;
    // Compressed rows, append-only.
    u8* rows;
    // The same three for the indexer.
    float* index_values;
    float* index_scores;
    u8* index_keys;
};

// Some rows of a step in one layer.
struct StepLayer {
    Step step;
    // Table [sessions, layers].
    const LayerCache* caches;
    u32 first_row;
    u32 layer;
    u32 layers;
    // Tokens of a compressed row; 0 for none.
    u32 ratio;
    // Whether rows are stored with rounding.
    int rounding;
    // Of RMS norms.
    float epsilon;

    // State of a row's session.
    __device__ inline const LayerCache& cache(u32 row) const {
        return caches[(u64)step.session[row] * layers + layer];
    }
};
SAME_IN_RUST(StepLayer);

#define WINDOW_SLOTS (WINDOW + MAX_REWIND)

// Slots of a compressor's input ring.
__device__ inline int input_slots(int ratio) {
    return (ratio == CSA_RATIO ? 2 * CSA_RATIO : ratio) + MAX_REWIND;
}

__device__ inline float warp_sum(float x) {
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(FULL_WARP, x, d);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int d = WARP / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, d));
    return x;
}

// Sum over the block, in every thread; `scratch` has one float per warp and may be reused after
// the next barrier.
__device__ inline float block_sum(float x, float* scratch) {
    int warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) scratch[warp] = x;
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += scratch[w];
    __syncthreads();
    return sum;
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Whether this block is the last of `blocks` to get here: it then sees what the others wrote
// before, and can go on with it where a launch of its own would take longer. `arrivals` is 0 before
// the first and again after the last. For all threads of a block.
__device__ inline bool last_to_arrive(u32* arrivals, u32 blocks) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) last = atomic_arrive(arrivals, blocks - 1) == blocks - 1;
    __syncthreads();
    return last;
}
