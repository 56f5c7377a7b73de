// Key/value rows of the sliding window, and the rotations of a step's rows.

#include "rows.cuh"

// Cosines and sines of all rows: `rotations` [2, n, 32] for `frequencies` [2, 32].
extern "C" __global__ void rotations(Step step, u32 rows, const float* frequencies,
                                     float2* rotations) {
    wait_for_dependencies();
    launch_dependents();
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= 2 * rows * PAIRS) return;
    u32 pair = i % PAIRS, row = i / PAIRS % rows, set = i / PAIRS / rows;
    rotations[i] = rotation_at(step.position[row], frequencies[set * PAIRS + pair]);
}

// Copies the rows [first_row, first_row + gridDim.x), whole spans, to their windows.
//
// Only the last rows of a span that fit are copied: earlier ones would share their slots. For
// spans of at most MAX_REWIND rows the attention kernel does this itself.
extern "C" __global__ void store_window(Step step, u32 first_row, const LayerCache* caches,
                                        u32 layer, u32 layers, int rounding, const u8* kv_rows) {
    wait_for_dependencies();
    launch_dependents();
    u32 row = first_row + blockIdx.x, end = first_row + gridDim.x;
    u32 successor = row + WINDOW_SLOTS;
    if (successor < end && step.span_row[successor] == step.span_row[row]) return;
    u32 bytes = kv_row_bytes(rounding);
    u8* window = layer_cache(caches, step.session[row], layer, layers).window;
    uint2* to = (uint2*)(window + step.position[row] % WINDOW_SLOTS * bytes);
    const uint2* from = (const uint2*)(kv_rows + (u64)row * bytes);
    for (u32 i = threadIdx.x; i < bytes / sizeof(uint2); i += blockDim.x) to[i] = from[i];
}
