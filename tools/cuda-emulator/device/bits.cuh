// Integer intrinsics, reinterpretations and conversions.
#pragma once

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

inline unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}

inline unsigned long long __brevll(unsigned long long x) {
    return (unsigned long long)__brev((unsigned)x) << 32 | __brev((unsigned)(x >> 32));
}

// Bytes of y:x chosen by the nibbles of `selector`; bit 3 of a nibble spreads the byte's sign.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned nibble = selector >> 4 * i & 15;
        unsigned byte = (unsigned)(bytes >> 8 * (nibble & 7)) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
    return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
    return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}

inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)((unsigned long long)a * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) {
        c = (int)((unsigned)c + (unsigned)((signed char)(a >> 8 * i) * (signed char)(b >> 8 * i)));
    }
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    return c;
}

#define EMULATOR_PER_BYTE(name, expression)                        \
    inline unsigned name(unsigned a, unsigned b) {                 \
        unsigned result = 0;                                       \
        for (int i = 0; i < 4; ++i) {                              \
            unsigned x = a >> 8 * i & 255, y = b >> 8 * i & 255;   \
            result |= ((unsigned)(expression) & 255) << 8 * i;     \
        }                                                          \
        return result;                                             \
    }
EMULATOR_PER_BYTE(__vadd4, x + y)
EMULATOR_PER_BYTE(__vsub4, x - y)
EMULATOR_PER_BYTE(__vcmpeq4, x == y ? 255 : 0)
EMULATOR_PER_BYTE(__vcmpne4, x != y ? 255 : 0)
EMULATOR_PER_BYTE(__vminu4, x < y ? x : y)
EMULATOR_PER_BYTE(__vmaxu4, x > y ? x : y)
#undef EMULATOR_PER_BYTE

inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }

inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }

namespace emulator {

// Conversions saturate, and turn NaN into zero.
inline int to_int(float x) {
    if (x >= 2147483648.0f) return 0x7fffffff;
    if (x <= -2147483648.0f) return -0x7fffffff - 1;
    return x == x ? (int)x : 0;
}
inline unsigned to_uint(float x) {
    if (x >= 4294967296.0f) return 0xffffffffu;
    return x > 0 ? (unsigned)x : 0;
}

}  // namespace emulator

inline int __float2int_rn(float x) { return emulator::to_int(__builtin_rintf(x)); }
inline int __float2int_rz(float x) { return emulator::to_int(x); }
inline int __float2int_rd(float x) { return emulator::to_int(__builtin_floorf(x)); }
inline int __float2int_ru(float x) { return emulator::to_int(__builtin_ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return emulator::to_uint(__builtin_rintf(x)); }
inline unsigned __float2uint_rz(float x) { return emulator::to_uint(x); }
inline unsigned __float2uint_rd(float x) { return emulator::to_uint(__builtin_floorf(x)); }
inline unsigned __float2uint_ru(float x) { return emulator::to_uint(__builtin_ceilf(x)); }
