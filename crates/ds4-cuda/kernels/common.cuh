// What every kernel shares: the description of a step, reductions, launch conventions.
//
// A kernel is `extern "C" __global__`, its name is unique in the program, and its rows are those
// of a step. Nothing about a step but its number of rows is known at launch: tokens, positions and
// cache addresses are read from device memory, so that a captured launch stays right for every
// later step of the same shape.
#pragma once

#include "ptx.cuh"

#define HEAD_DIM 512
#define ROPE_DIM 64
#define NOPE_DIM (HEAD_DIM - ROPE_DIM)
#define WINDOW 128
#define STREAMS 4
#define HC_MIX 24
#define INDEX_DIM 128
// Experts that there can be; mirrors `MOST_EXPERTS` in src/weights.rs.
#define MOST_EXPERTS 512
#define WARP 32
#define FULL_WARP 0xffffffffu
// The run-time compiler has no <math.h>.
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

extern __shared__ __align__(128) uint4 dynamic_shared[];

// The rows of a step; every array has one entry per row. Mirrors `Step` in src/step.rs.
struct Step {
    const u32* token;
    const u32* position;
    // Index into the table of caches.
    const u32* session;
    // Position and row of the first token of the row's span.
    const u32* span_position;
    const u32* span_row;
};

// Cached state of one session in one layer. Mirrors `LayerPointers` in src/cache.rs.
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

#define MAX_REWIND 16
#define WINDOW_SLOTS (WINDOW + MAX_REWIND)

// Slots of a compressor's input ring.
__device__ inline int input_slots(int ratio) { return (ratio == 4 ? 8 : ratio) + MAX_REWIND; }

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

// Whether this block is the last of `blocks` to get here: it then sees what the others wrote before,
// and can go on with it where a launch of its own would take longer. `arrivals` is 0 before the
// first and again after the last. For all threads of a block.
__device__ inline bool last_to_arrive(u32* arrivals, u32 blocks) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) last = atomic_arrive(arrivals, blocks - 1) == blocks - 1;
    __syncthreads();
    return last;
}
