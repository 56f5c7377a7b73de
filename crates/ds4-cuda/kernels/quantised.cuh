// Activations as integers, for products with weights that are small integers: sums are exact, and
// weights need no conversion to halves.
//
// The columns of a unit (256) share a scale: column = scale · (256·high + low), with signed bytes
// high and low. That is 15 bits, less rounding than halves but for columns 8 to 16 times smaller
// than the unit's largest, and smaller ones.
#pragma once

#include "common.cuh"

// The largest integer: sums of a unit's products with weights and their scales stay below 2^31.
#define LARGEST_INTEGER 16383.0f

// Rows of activations as integers.
struct Quantised {
    // [n, units, step, part (high, low), 32]; of each eight columns the even ones come
    // first.
    u8* parts;
    // [n, units].
    float* scales;
    // Of a row.
    int units;
};
SAME_IN_RUST(Quantised);

// A warp's 256 columns, eight in each lane, as integers; returns their scale.
__device__ inline float quantise(const float (&x)[8], int (&v)[8]) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x[i]));
    largest = warp_max(largest);
    float inverse = largest > 1e-30f ? LARGEST_INTEGER / largest : 0.0f;
    // Adding 1.5 · 2^23 leaves the nearest integer in the low bits.
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        v[i] = __float_as_int(x[i] * inverse + 12582912.0f) - 0x4b400000;
    }
    return largest * (1.0f / LARGEST_INTEGER);
}

// What is left for the high part, whose low part is the low byte as it is.
__device__ inline int high_part(int v) { return (v + 128) >> 8; }

// The low bytes of four integers.
__device__ inline u32 low_bytes(int a, int b, int c, int d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

__device__ inline void unpack8(uint4 halves, float (&x)[8]) {
    u32 pairs[4] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 f = unpack_half2(pairs[i]);
        x[2 * i] = f.x;
        x[2 * i + 1] = f.y;
    }
}

// One warp: a unit of a row `x + low` [256·units].
__device__ inline void quantise_unit(
    const Quantised& to, const u16* x, const u16* low, int row, int unit
) {
    int lane = threadIdx.x % WARP;
    size_t at = (size_t)row * to.units + unit, from = at * INTEGER_COLUMNS + 8 * lane;
    float high[8], rest[8];
    unpack8(*(const uint4*)(x + from), high);
    unpack8(*(const uint4*)(low + from), rest);
    int v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) high[i] += rest[i];
    float scale = quantise(high, v);
    uint2* parts = (uint2*)(to.parts + 2 * at * INTEGER_COLUMNS) + lane / 4 * 8 + lane % 4;
    parts[4] =
        make_uint2(low_bytes(v[0], v[2], v[4], v[6]), low_bytes(v[1], v[3], v[5], v[7]));
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = high_part(v[i]);
    parts[0] = make_uint2(low_bytes(v[0], v[2], v[4], v[6]), low_bytes(v[1], v[3], v[5], v[7]));
    if (lane == 0) to.scales[at] = scale;
}
