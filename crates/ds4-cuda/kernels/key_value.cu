// Key/value rows of the sliding window, and the rotations of a step's rows.
//
//   rotations[set][row][pair] = (cos, sin)(position[row] · frequencies[set][pair])
//   window[position % slots] = kv_rows[row]
//
// Inputs: positions u32 [n], frequencies f32 [2, 32]; stored rows [n, row bytes].
// Outputs: rotations f32 pairs [2, n, 32]; windows in the caches.
// Grid of rotations: (2 · n · 32 / 256). Block: 256 threads, a pair each.
// Grid of store_window: (rows). Block: 128 threads.
// Plain Rust: `rotation` in crates/ds4-engine/src/rope.rs.

#include "rows.cuh"

struct RotationsParams {
    Step step;
    // [2, 32].
    const float* frequencies;
    // Cosines and sines of all rows [2, rows, 32].
    float2* rotations;
    u32 rows;
};
SAME_IN_RUST(RotationsParams);

extern "C" __global__ void rotations(__grid_constant__ const RotationsParams p) {
    wait_for_dependencies();
    launch_dependents();
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= 2 * p.rows * PAIRS) return;
    u32 pair = i % PAIRS, row = i / PAIRS % p.rows, set = i / PAIRS / p.rows;
    p.rotations[i] = rotation_at(p.step.position[row], p.frequencies[set * PAIRS + pair]);
}

struct StoreWindowParams {
    StepLayer at;
    // [n, row bytes].
    const u8* kv_rows;
};
SAME_IN_RUST(StoreWindowParams);

// Copies the rows [first_row, first_row + gridDim.x), whole spans, to their windows.
//
// Only the last rows of a span that fit are copied: earlier ones would share their slots. For
// spans of at most MAX_REWIND rows the attention kernel does this itself.
extern "C" __global__ void store_window(__grid_constant__ const StoreWindowParams p) {
    wait_for_dependencies();
    launch_dependents();
    const Step& step = p.at.step;
    u32 row = p.at.first_row + blockIdx.x, end = p.at.first_row + gridDim.x;
    u32 successor = row + WINDOW_SLOTS;
    if (successor < end && step.span_row[successor] == step.span_row[row]) return;
    u32 bytes = kv_row_bytes(p.at.rounding);
    u8* window = p.at.cache(row).window;
    uint2* to = (uint2*)(window + step.position[row] % WINDOW_SLOTS * bytes);
    const uint2* from = (const uint2*)(p.kv_rows + (u64)row * bytes);
    for (u32 i = threadIdx.x; i < bytes / sizeof(uint2); i += blockDim.x) to[i] = from[i];
}
