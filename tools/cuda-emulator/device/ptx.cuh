// The emulator's version of crates/ds4-cuda/kernels/ptx.cuh: the same functions without PTX.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;

namespace emulator {

inline _Float16 half_from_bits(u32 bits) { return __builtin_bit_cast(_Float16, (u16)bits); }
inline u32 bits_of(_Float16 h) { return __builtin_bit_cast(u16, h); }

template <class Operation>
inline u32 per_half(u32 a, u32 b, Operation operation) {
    u32 low = bits_of(operation(half_from_bits(a), half_from_bits(b)));
    return low | bits_of(operation(half_from_bits(a >> 16), half_from_bits(b >> 16))) << 16;
}

// a·b + c rounded once. The sum is exact in double wherever it lies near the middle between two
// halves; rounding to odd on the way through float keeps the last rounding right.
inline _Float16 half_fma(_Float16 a, _Float16 b, _Float16 c) {
    double exact = (double)(float)a * (double)(float)b + (double)(float)c;
    float rounded = (float)exact;
    if ((double)rounded != exact && exact == exact) {
        u32 bits = __builtin_bit_cast(u32, rounded);
        if (__builtin_fabs((double)rounded) > __builtin_fabs(exact)) bits -= 1;
        rounded = __builtin_bit_cast(float, bits | 1);
    }
    return (_Float16)rounded;
}

}  // namespace emulator

inline float half_to_float(u16 h) { return (float)emulator::half_from_bits(h); }
inline u16 float_to_half(float f) { return (u16)emulator::bits_of((_Float16)f); }

inline u32 pack_half2(float low, float high) {
    return float_to_half(low) | (u32)float_to_half(high) << 16;
}

inline float2 unpack_half2(u32 h) {
    return make_float2(half_to_float((u16)h), half_to_float((u16)(h >> 16)));
}

inline u32 half2_mul(u32 a, u32 b) {
    return emulator::per_half(a, b, [](_Float16 x, _Float16 y) { return (_Float16)(x * y); });
}

inline u32 half2_sub(u32 a, u32 b) {
    return emulator::per_half(a, b, [](_Float16 x, _Float16 y) { return (_Float16)(x - y); });
}

inline u32 half2_fma(u32 a, u32 b, u32 c) {
    using emulator::half_fma, emulator::half_from_bits, emulator::bits_of;
    u32 low = bits_of(half_fma(half_from_bits(a), half_from_bits(b), half_from_bits(c)));
    u32 high = bits_of(half_fma(half_from_bits(a >> 16), half_from_bits(b >> 16),
                                half_from_bits(c >> 16)));
    return low | high << 16;
}

inline u32 upper_half(u32 x, u32 one) {
    u32 high = half2_mul(x >> 16, one & 0xffff);
    return high & 0xffff;
}

inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulator_mma(d, a, b0, b1); }

inline void mma_from_zero(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    for (float& x : d) x = 0;
    emulator_mma(d, a, b0, b1);
}

inline u32 float_to_tf32(float x) { return (__float_as_uint(x) + 0x1000) & 0xffffe000; }

inline void mma_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator_mma_tf32(d, a, b0, b1);
}

inline void mma_signed(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator_mma_bytes(d, a, b0, b1, true);
}

inline void mma_unsigned(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator_mma_bytes(d, a, b0, b1, false);
}

// Columns of A beyond 16 are zeros.
inline void mma_unsigned_half(int (&d)[4], const u32 (&a)[2], u32 b) {
    u32 padded[4] = {a[0], a[1], 0, 0};
    emulator_mma_bytes(d, padded, b, 0, false);
}

inline u32 dot_bytes(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 0xff) * (b >> i & 0xff);
    return c;
}

inline u32 select_bytes(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }

inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float fast_sqrt(float x) { return sqrtf(x); }

inline void load_matrix4(u32 (&r)[4], const void* row) { emulator_load_matrix4(r, row, false); }

inline void load_matrix4_transposed(u32 (&r)[4], const void* row) {
    emulator_load_matrix4(r, row, true);
}

inline void copy_async16(void* to, const void* from, bool valid = true) {
    emulator_copy_async(to, from, 16, valid);
}

inline void copy_async8(void* to, const void* from, bool valid = true) {
    emulator_copy_async(to, from, 8, valid);
}

inline void copy_async_commit() { emulator_copy_async_commit(); }

template <int N>
inline void copy_async_wait() {
    emulator_copy_async_wait(N);
}

inline uint4 load_once16(const void* p) { return *(const uint4*)p; }

inline void prefetch(const void*) {}

inline u32 atomic_arrive(u32* counter, u32 most) { return atomicInc(counter, most); }

// Barriers beside the block's own: threads that are still missing, and how often all were there.
inline void sync_threads(u32 barrier, u32 threads) {
    // As all shared memory, both begin with every bit set.
    __shared__ u32 missing[16], rounds[16];
    u32 round = rounds[barrier];
    if (missing[barrier] > threads) missing[barrier] = threads;
    if (--missing[barrier] == 0) {
        missing[barrier] = threads;
        ++rounds[barrier];
    }
    while (rounds[barrier] == round) emulator_yield();
}

inline void wait_for_dependencies() { emulator_thread->block->has_waited = true; }

inline void launch_dependents() {}
