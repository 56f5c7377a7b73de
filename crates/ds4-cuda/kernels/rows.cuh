// Stored rows: encoding, decoding and rotation. The device's twin of ds4-engine's rows.rs, bit for
// bit, and of its rope.rs.
//
// With rounding a key/value row is 448 E4M3 codes, 64 f32, 7 scales and a byte of padding, and an
// index key 64 bytes of paired E2M1 codes and 4 scales; without, rows are f32.
#pragma once

#include "common.cuh"

#define KV_SCALES (NOPE_DIM + 4 * ROPE_DIM)
// Threads that hold a key/value row, and an index key, four elements each.
#define KV_THREADS (HEAD_DIM / 4)
#define INDEX_THREADS (INDEX_DIM / 4)

__device__ inline u32 kv_row_bytes(int rounding) {
    return rounding ? KV_ROW : HEAD_DIM * sizeof(float);
}

__device__ inline u32 index_row_bytes(int rounding) {
    return rounding ? INDEX_ROW : INDEX_DIM * sizeof(float);
}

// Cosine and sine of a pair's angle: the f32 product, reduced exactly.
__device__ inline float2 rotation_at(u32 position, float frequency) {
    float angle = (float)position * frequency;
    return make_float2(cosf(angle), sinf(angle));
}

__device__ inline void rotate(float& a, float& b, float2 rotation) {
    float x = a, y = b;
    a = x * rotation.x - y * rotation.y;
    b = x * rotation.y + y * rotation.x;
}

__device__ inline void rotate_back(float& a, float& b, float2 rotation) {
    rotate(a, b, make_float2(rotation.x, -rotation.y));
}

// Biased exponent of the smallest power of two S with largest <= S / inverse_range.
__device__ inline u32 scale_exponent(float largest, float inverse_range) {
    u32 bits = __float_as_uint(largest * inverse_range);
    u32 exponent = ((bits >> 23) & 0xff) + ((bits & 0x7fffff) != 0);
    return min(max(exponent, 1u), 253u);
}

// 2^(exponent - 127) for exponents 1 to 254.
__device__ inline float power_of_two(u32 exponent) { return __uint_as_float(exponent << 23); }

// Nearest E4M3 code, ties to even, saturating at ±448.
__device__ inline u32 e4m3(float x) {
    u32 sign = (__float_as_uint(x) >> 24) & 0x80;
    x = fminf(fabsf(x), 448.0f);
    // Below the smallest normal number: multiples of 2^-9.
    if (x < 1.0f / 64.0f) return sign | (u32)rintf(x * 512.0f);
    u32 bits = __float_as_uint(x);
    return sign | (((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3));
}

// Nearest E2M1 code, ties to the even code, saturating at ±6.
__device__ inline u32 e2m1(float x) {
    float a = fabsf(x);
    u32 code = a <= 0.25f   ? 0
               : a < 0.75f  ? 1
               : a <= 1.25f ? 2
               : a < 1.75f  ? 3
               : a <= 2.5f  ? 4
               : a < 3.5f   ? 5
               : a <= 5.0f  ? 6
                            : 7;
    return code | (x < 0.0f ? 8 : 0);
}

__device__ inline float e2m1_value(u32 code) {
    float m = (float)(code & 7);
    m = m < 4.0f ? 0.5f * m : m < 6.0f ? m - 2.0f : 2.0f * m - 8.0f;
    return code & 8 ? -m : m;
}

__device__ inline float largest_of(const float (&x)[4]) {
    return fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
}

// Maximum over groups of `LANES` neighbouring lanes, in each of them.
template <int LANES>
__device__ inline float lanes_max(float x) {
    for (int d = 1; d < LANES; d *= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, d));
    return x;
}

// Stores a key/value row that KV_THREADS threads (whole warps) hold four elements each.
__device__ inline void encode_kv(const float (&x)[4], u32 thread, int rounding, u8* out) {
    if (!rounding) {
        ((float4*)out)[thread] = make_float4(x[0], x[1], x[2], x[3]);
        return;
    }
    // The 16 threads of half a warp hold the 64 elements of one scale.
    float largest = lanes_max<16>(fmaxf(largest_of(x), 1e-4f));
    u32 element = 4 * thread;
    if (element >= NOPE_DIM) {
        float2* rotary = (float2*)(out + NOPE_DIM + 4 * (element - NOPE_DIM));
        rotary[0] = make_float2(x[0], x[1]);
        rotary[1] = make_float2(x[2], x[3]);
        if (thread == KV_THREADS - 1) out[KV_ROW - 1] = 0;
        return;
    }
    u32 exponent = scale_exponent(largest, 1.0f / 448.0f);
    float inverse = power_of_two(254 - exponent);
    u32 codes = 0;
    for (int i = 0; i < 4; ++i) codes |= e4m3(x[i] * inverse) << (8 * i);
    *(u32*)(out + element) = codes;
    if (thread % 16 == 0) out[KV_SCALES + thread / 16] = (u8)exponent;
}

// Orthonormal Walsh–Hadamard transform, Sylvester order, of 128 elements that a warp holds four
// each.
__device__ inline void hadamard(float (&x)[4], u32 lane) {
    float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
    for (u32 stride = 1; stride < WARP; stride *= 2) {
        bool upper = lane & stride;
        for (int i = 0; i < 4; ++i) {
            float other = __shfl_xor_sync(FULL_WARP, x[i], stride);
            x[i] = upper ? other - x[i] : x[i] + other;
        }
    }
    float norm = 1.0f / sqrtf((float)INDEX_DIM);
    for (int i = 0; i < 4; ++i) x[i] *= norm;
}

// Exponent of the FP4 scale of a lane's elements; eight lanes share it.
__device__ inline u32 fp4_exponent(const float (&x)[4]) {
    float largest = lanes_max<8>(fmaxf(largest_of(x), 6.0f * 1.17549435e-38f));
    return scale_exponent(largest, 1.0f / 6.0f);
}

// Stores an index key that a warp holds four elements a lane, after its rotation.
__device__ inline void encode_index_key(float (&x)[4], u32 lane, int rounding, u8* out) {
    if (!rounding) {
        ((float4*)out)[lane] = make_float4(x[0], x[1], x[2], x[3]);
        return;
    }
    hadamard(x, lane);
    u32 exponent = fp4_exponent(x), codes = 0;
    float scale = power_of_two(exponent);
    for (int i = 0; i < 4; ++i) codes |= e2m1(x[i] / scale) << (4 * i);
    *(u16*)(out + 2 * lane) = (u16)codes;
    if (lane % 8 == 0) out[INDEX_DIM / 2 + lane / 8] = (u8)exponent;
}

// Replaces a lane's elements of an index query by what storing it as a key would leave.
__device__ inline void round_index_query(float (&x)[4], u32 lane) {
    hadamard(x, lane);
    float scale = power_of_two(fp4_exponent(x));
    for (int i = 0; i < 4; ++i) x[i] = e2m1_value(e2m1(x[i] / scale)) * scale;
}

// Factor, as a pair of halves, that turns E4M3 codes placed in halves by `e4m3_halves` into values.
//
// Scales from 2^-22, the smallest that is written, to 2^7 are exact; the others are clamped, so
// that no stored byte decodes to an infinity.
__device__ inline u32 e4m3_factor(u32 exponent) {
    u32 half_exponent = min(max(exponent, 105u), 134u) - 104;
    return half_exponent * (0x400 * 0x10001u);
}

// Bits of four codes as halves, 2^-8 of their values.
__device__ inline uint2 e4m3_halves(u32 codes) {
    u32 low = __byte_perm(codes, 0, 0x1404), high = __byte_perm(codes, 0, 0x3424);
    return make_uint2((low & 0x80008000) | ((low >> 1) & 0x3f803f80),
                      (high & 0x80008000) | ((high >> 1) & 0x3f803f80));
}

// Decodes eight codes to eight halves.
__device__ inline uint4 decode_e4m3(uint2 codes, u32 factor) {
    uint2 a = e4m3_halves(codes.x), b = e4m3_halves(codes.y);
    return make_uint4(half2_mul(a.x, factor), half2_mul(a.y, factor), half2_mul(b.x, factor),
                      half2_mul(b.y, factor));
}
