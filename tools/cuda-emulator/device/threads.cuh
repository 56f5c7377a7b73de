// What threads do with each other: barriers, warp operations, atomics, cached loads.
#pragma once

#define __syncthreads() \
    ((void)emulator_barrier(emulator::barrier_count, false, __FILE__, __LINE__))
#define __syncthreads_count(p) \
    ((int)emulator_barrier(emulator::barrier_count, (p) != 0, __FILE__, __LINE__))
#define __syncthreads_or(p) \
    ((int)emulator_barrier(emulator::barrier_any, (p) != 0, __FILE__, __LINE__))
#define __syncthreads_and(p) \
    ((int)emulator_barrier(emulator::barrier_all, (p) != 0, __FILE__, __LINE__))

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator_warp_barrier(mask); }

namespace emulator {

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    if constexpr (sizeof(T) == 4) {
        unsigned bits = __builtin_bit_cast(unsigned, value);
        return __builtin_bit_cast(T, (unsigned)emulator_shuffle(mask, bits, source));
    } else {
        unsigned long long bits = __builtin_bit_cast(unsigned long long, value);
        return __builtin_bit_cast(T, emulator_shuffle(mask, bits, source));
    }
}

}  // namespace emulator

// The warp is cut into segments of `width` lanes; a source outside of the segment is oneself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    unsigned first = emulator_thread->lane & ~(unsigned)(width - 1);
    return emulator::shuffle(mask, value, first + ((unsigned)source & (unsigned)(width - 1)));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    unsigned lane = emulator_thread->lane, source = lane ^ (unsigned)lanes;
    unsigned end = (lane & ~(unsigned)(width - 1)) + (unsigned)width;
    return emulator::shuffle(mask, value, source < end ? source : lane);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
    unsigned lane = emulator_thread->lane, first = lane & ~(unsigned)(width - 1);
    return emulator::shuffle(mask, value, lane >= first + lanes ? lane - lanes : lane);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
    unsigned lane = emulator_thread->lane, end = (lane & ~(unsigned)(width - 1)) + (unsigned)width;
    return emulator::shuffle(mask, value, lane + lanes < end ? lane + lanes : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return emulator_vote(emulator::vote_ballot, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
    return (int)emulator_vote(emulator::vote_any, mask, predicate != 0);
}
inline int __all_sync(unsigned mask, int predicate) {
    return (int)emulator_vote(emulator::vote_all, mask, predicate != 0);
}
inline unsigned __activemask() { return emulator_active_lanes(); }

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    if constexpr (sizeof(T) == 4) {
        return emulator_match(mask, __builtin_bit_cast(unsigned, value));
    } else {
        return emulator_match(mask, __builtin_bit_cast(unsigned long long, value));
    }
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
    return emulator_reduce(emulator::reduce_add, mask, value);
}
inline int __reduce_add_sync(unsigned mask, int value) {
    return (int)emulator_reduce(emulator::reduce_add, mask, (unsigned)value);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    return emulator_reduce(emulator::reduce_min_unsigned, mask, value);
}
inline int __reduce_min_sync(unsigned mask, int value) {
    return (int)emulator_reduce(emulator::reduce_min_signed, mask, (unsigned)value);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    return emulator_reduce(emulator::reduce_max_unsigned, mask, value);
}
inline int __reduce_max_sync(unsigned mask, int value) {
    return (int)emulator_reduce(emulator::reduce_max_signed, mask, (unsigned)value);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
    return emulator_reduce(emulator::reduce_and, mask, value);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    return emulator_reduce(emulator::reduce_or, mask, value);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
    return emulator_reduce(emulator::reduce_xor, mask, value);
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

namespace emulator {

// Replaces *p by next(*p) in one piece; the value before.
template <class T, class Next>
T atomic_update(T* p, Next next) {
    T before, after;
    __atomic_load(p, &before, __ATOMIC_SEQ_CST);
    do {
        after = next(before);
    } while (!__atomic_compare_exchange(p, &before, &after, true, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST));
    return before;
}

}  // namespace emulator

#define EMULATOR_ATOMIC(name, type, expression)                                  \
    inline type name(type* p, type y) {                                          \
        return emulator::atomic_update(p, [y](type x) -> type { return expression; }); \
    }
#define EMULATOR_ATOMIC_INTEGER(type)                        \
    EMULATOR_ATOMIC(atomicAdd, type, x + y)                  \
    EMULATOR_ATOMIC(atomicSub, type, x - y)                  \
    EMULATOR_ATOMIC(atomicMin, type, x < y ? x : y)          \
    EMULATOR_ATOMIC(atomicMax, type, x > y ? x : y)          \
    EMULATOR_ATOMIC(atomicAnd, type, x & y)                  \
    EMULATOR_ATOMIC(atomicOr, type, x | y)                   \
    EMULATOR_ATOMIC(atomicXor, type, x ^ y)                  \
    EMULATOR_ATOMIC(atomicExch, type, y)
EMULATOR_ATOMIC_INTEGER(int)
EMULATOR_ATOMIC_INTEGER(unsigned)
EMULATOR_ATOMIC_INTEGER(long long)
EMULATOR_ATOMIC_INTEGER(unsigned long long)
EMULATOR_ATOMIC(atomicAdd, float, x + y)
EMULATOR_ATOMIC(atomicAdd, double, x + y)
EMULATOR_ATOMIC(atomicExch, float, y)
EMULATOR_ATOMIC(atomicInc, unsigned, x >= y ? 0 : x + 1)
EMULATOR_ATOMIC(atomicDec, unsigned, x == 0 || x > y ? y : x - 1)
#undef EMULATOR_ATOMIC_INTEGER
#undef EMULATOR_ATOMIC

#define EMULATOR_ATOMIC_CAS(type)                                                        \
    inline type atomicCAS(type* p, type expected, type desired) {                        \
        __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_SEQ_CST,      \
                                    __ATOMIC_SEQ_CST);                                   \
        return expected;                                                                 \
    }
EMULATOR_ATOMIC_CAS(int)
EMULATOR_ATOMIC_CAS(unsigned)
EMULATOR_ATOMIC_CAS(unsigned long long)
EMULATOR_ATOMIC_CAS(unsigned short)
#undef EMULATOR_ATOMIC_CAS

#define EMULATOR_LOAD(name) \
    template <class T>      \
    inline T name(const T* p) { return *p; }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldlu)
EMULATOR_LOAD(__ldcv)
#undef EMULATOR_LOAD

#define EMULATOR_STORE(name) \
    template <class T>       \
    inline void name(T* p, T value) { *p = value; }
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stwt)
#undef EMULATOR_STORE
