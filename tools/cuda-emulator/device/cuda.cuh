// CUDA C++ on top of g++: included before the text of every program.
//
// `__global__` and `__shared__` are missing here on purpose: nvrtc.cpp finds them in the
// preprocessed text and defines them for the second pass.
#pragma once

#include "runtime.cuh"

#define __host__
#define __device__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
// The attribute may stand where CUDA code puts `alignas`: between `__shared__` and the type.
#define alignas(n) __attribute__((aligned(n)))

#define threadIdx (emulator_thread->index)
#define blockIdx (emulator_thread->block->index)
#define blockDim (emulator_thread->block->threads)
#define gridDim (emulator_thread->block->blocks)

typedef decltype(sizeof 0) size_t;
typedef decltype((char*)0 - (char*)0) ptrdiff_t;

constexpr int warpSize = 32;

#define EMULATOR_VECTORS(name, type, align2, align4)                                    \
    struct name##1 { type x; };                                                         \
    struct __align__(align2) name##2 { type x, y; };                                    \
    struct name##3 { type x, y, z; };                                                   \
    struct __align__(align4) name##4 { type x, y, z, w; };                              \
    inline name##1 make_##name##1(type x) { return {x}; }                               \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                    \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }         \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

EMULATOR_VECTORS(char, signed char, 2, 4)
EMULATOR_VECTORS(uchar, unsigned char, 2, 4)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(ushort, unsigned short, 4, 8)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)
EMULATOR_VECTORS(longlong, long long, 16, 16)
EMULATOR_VECTORS(ulonglong, unsigned long long, 16, 16)
#undef EMULATOR_VECTORS

struct uint1 { unsigned x; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
inline uint1 make_uint1(unsigned x) { return {x}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern "C" int printf(const char* format, ...);

#define __trap() emulator_trap("__trap()", __FILE__, __LINE__)
#define assert(condition) \
    ((condition) ? (void)0 : emulator_trap("assertion failed: " #condition, __FILE__, __LINE__))

inline size_t __cvta_generic_to_shared(const void* p) { return (size_t)p; }
inline size_t __cvta_generic_to_global(const void* p) { return (size_t)p; }

inline long long clock64() { return (long long)__builtin_ia32_rdtsc(); }
inline long clock() { return (long)clock64(); }
inline void __nanosleep(unsigned) { emulator_yield(); }

#include "bits.cuh"
#include "math.cuh"
#include "threads.cuh"

namespace emulator {

// Calls a kernel with parameters behind pointers, as a launch has them.
template <auto kernel>
struct Entry;

template <class... Parameters, void (*kernel)(Parameters...)>
struct Entry<kernel> {
    template <size_t... i>
    struct Indices {
        static void run(void* const* parameters) { kernel(*(Parameters*)parameters[i]...); }
    };
    template <size_t count, size_t... i>
    struct Count : Count<count - 1, count - 1, i...> {};
    template <size_t... i>
    struct Count<0, i...> : Indices<i...> {};

    static constexpr unsigned sizes[sizeof...(Parameters) + 1] = {sizeof(Parameters)...};
    static constexpr unsigned alignments[sizeof...(Parameters) + 1] = {alignof(Parameters)...};
};

template <auto kernel>
constexpr Kernel entry(const char* name, unsigned max_threads) {
    return [&]<class... Parameters>(void (*)(Parameters...)) {
        return Kernel{name, &Entry<kernel>::template Count<sizeof...(Parameters)>::run,
                      Entry<kernel>::sizes, Entry<kernel>::alignments, sizeof...(Parameters),
                      max_threads};
    }(kernel);
}

constexpr unsigned launch_bounds(unsigned max_threads, unsigned = 0, unsigned = 0) {
    return max_threads;
}
constexpr unsigned launch_bounds() { return 1024; }

}  // namespace emulator
