// Operations that the lanes of a warp do together, and asynchronous copies.
//
// Each lane leaves its part in the warp and waits; the last of them computes the result for all.
// A lane's entries are its own, so that it may go on to the next operation before the others have
// read their results of this one.

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "scheduler.h"

namespace emulator {

namespace {

Thread* current() { return static_cast<Thread*>(emulator_thread); }

template <class T>
uint32_t different_lanes(const T (&values)[32], T value) {
    uint32_t different = 0;
    for (unsigned lane = 0; lane < 32; ++lane) different |= uint32_t(values[lane] != value) << lane;
    return different;
}

// The lanes of the group if all of them wait with the mask of `lane`, else 0.
uint32_t complete_group(const Warp& warp, unsigned lane) {
    uint32_t mask = warp.mask[lane], group = mask & warp.alive;
    if ((warp.waiting & group) != group) return 0;
    return different_lanes(warp.mask, mask) & group ? 0 : group;
}

void wait_for_lanes(Thread* thread, uint32_t mask, WarpOperation operation, uint8_t kind = 0) {
    Warp& warp = *thread->warp;
    unsigned lane = thread->lane;
    uint32_t bit = 1u << lane;
    if (!(mask & bit)) {
        thread->machine->fail(describe(*thread) + " calls a warp operation with mask " +
                              std::to_string(mask) + ", which lacks its own lane " +
                              std::to_string(lane));
    }
    warp.mask[lane] = mask;
    warp.operation[lane] = operation;
    warp.signature[lane] = uint16_t((unsigned)operation << 8 | kind);
    warp.waiting |= bit;
    if (uint32_t group = complete_group(warp, lane)) {
        complete_warp_operation(warp, group, lane);
    } else {
        warp.runnable &= ~bit;
        thread->machine->switch_away(thread);
    }
}

template <class Visit>
void for_lanes(uint32_t lanes, Visit visit) {
    for (; lanes; lanes &= lanes - 1) visit((unsigned)__builtin_ctz(lanes));
}

void shuffle(Warp& warp, uint32_t group) {
    for_lanes(group, [&](unsigned lane) {
        unsigned source = warp.source[lane];
        bool taking_part = source < 32 && (group >> source & 1);
        warp.result[lane] = taking_part ? warp.value[source] : ~0ull;
    });
}

void vote(Warp& warp, uint32_t group, uint8_t kind) {
    uint32_t ballot = 0;
    for_lanes(group, [&](unsigned lane) { ballot |= (warp.value[lane] != 0) * (1u << lane); });
    uint32_t result = kind == vote_ballot ? ballot : kind == vote_any ? ballot != 0 : ballot == group;
    for_lanes(group, [&](unsigned lane) { warp.result[lane] = result; });
}

uint32_t combine(uint8_t kind, uint32_t x, uint32_t y) {
    switch (kind) {
        case reduce_add: return x + y;
        case reduce_min_signed: return (int32_t)x < (int32_t)y ? x : y;
        case reduce_max_signed: return (int32_t)x > (int32_t)y ? x : y;
        case reduce_min_unsigned: return x < y ? x : y;
        case reduce_max_unsigned: return x > y ? x : y;
        case reduce_and: return x & y;
        case reduce_or: return x | y;
        default: return x ^ y;
    }
}

void reduce(Warp& warp, uint32_t group, uint8_t kind) {
    uint32_t result = (uint32_t)warp.value[__builtin_ctz(group)];
    for_lanes(group & (group - 1),
              [&](unsigned lane) { result = combine(kind, result, (uint32_t)warp.value[lane]); });
    for_lanes(group, [&](unsigned lane) { warp.result[lane] = result; });
}

void match(Warp& warp, uint32_t group) {
    for_lanes(group, [&](unsigned lane) {
        uint32_t equal = 0;
        for_lanes(group, [&](unsigned other) {
            equal |= (warp.value[other] == warp.value[lane]) * (1u << other);
        });
        warp.result[lane] = equal;
    });
}

// D += A·B in order of the inner index, one fused multiply-add each.
void multiply_matrices(Warp& warp) {
    alignas(64) float columns[8][16], b[16][8], a[16][16];
    for (int half = 0; half < 2; ++half) {
        for (int n = 0; n < 8; ++n) {
            __m128i bits = _mm_load_si128((const __m128i*)&warp.b[half][n * 4]);
            _mm256_store_ps(&columns[n][half * 8], _mm256_cvtph_ps(bits));
        }
    }
    for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) b[k][n] = columns[n][k];
    }
    for (int quarter = 0; quarter < 4; ++quarter) {
        for (int m = 0; m < 8; ++m) {
            __m128i bits = _mm_load_si128((const __m128i*)&warp.a[quarter][m * 4]);
            _mm256_store_ps(&a[m + quarter % 2 * 8][quarter / 2 * 8], _mm256_cvtph_ps(bits));
        }
    }
    for (int half = 0; half < 2; ++half) {
        __m256 sums[8];
        for (int m = 0; m < 8; ++m) sums[m] = _mm256_load_ps(&warp.d[half][m * 8]);
        for (int k = 0; k < 16; ++k) {
            __m256 row = _mm256_load_ps(b[k]);
            for (int m = 0; m < 8; ++m) {
                sums[m] = _mm256_fmadd_ps(_mm256_broadcast_ss(&a[half * 8 + m][k]), row, sums[m]);
            }
        }
        for (int m = 0; m < 8; ++m) _mm256_store_ps(&warp.d[half][m * 8], sums[m]);
    }
}

// The same for A [16, 8] and B [8, 8] of tf32.
void multiply_tf32_matrices(Warp& warp) {
    auto tf32 = [](uint32_t bits) {
        bits &= 0xffffe000;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    };
    for (unsigned m = 0; m < 16; ++m) {
        for (unsigned n = 0; n < 8; ++n) {
            float& sum = warp.d[m / 8][m % 8 * 8 + n];
            for (unsigned k = 0; k < 8; ++k) {
                float a = tf32(warp.a[m / 8 + k / 4 * 2][m % 8 * 4 + k % 4]);
                sum = std::fma(a, tf32(warp.b[k / 4][n * 4 + k % 4]), sum);
            }
        }
    }
}

// The same for A [16, 32] and B [32, 8] of bytes, those of B signed, with integer sums.
void multiply_byte_matrices(Warp& warp, bool a_is_signed) {
    for (unsigned m = 0; m < 16; ++m) {
        for (unsigned n = 0; n < 8; ++n) {
            int sum;
            float& place = warp.d[m / 8][m % 8 * 8 + n];
            memcpy(&sum, &place, 4);
            for (unsigned half = 0; half < 2; ++half) {
                auto a = (const uint8_t*)&warp.a[m / 8 + half * 2][m % 8 * 4];
                auto b = (const int8_t*)&warp.b[half][n * 4];
                for (unsigned k = 0; k < 16; ++k) {
                    sum += (a_is_signed ? (int)(int8_t)a[k] : (int)a[k]) * b[k];
                }
            }
            memcpy(&place, &sum, 4);
        }
    }
}

void load_matrix(Warp& warp) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        memcpy(&warp.matrix[lane / 8][lane % 8 * 4], (const void*)warp.value[lane], 16);
    }
}

void load_matrix_transposed(Warp& warp) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        uint16_t row[8];
        memcpy(row, (const void*)warp.value[lane], 16);
        auto out = (uint16_t*)warp.matrix[lane / 8];
        for (unsigned column = 0; column < 8; ++column) out[column * 8 + lane % 8] = row[column];
    }
}

// Matrix instructions need every lane.
void need_whole_warp(const Thread& thread) {
    if (thread.warp->alive != ~0u) {
        thread.machine->fail(describe(thread) + " calls a matrix operation after lanes exited");
    }
}

void need_alignment(const Thread& thread, const char* what, const void* p, unsigned bytes) {
    if ((uintptr_t)p % bytes != 0) {
        thread.machine->fail(describe(thread) + ": address of " + what + " is not a multiple of " +
                             std::to_string(bytes));
    }
}

void need_shared(const Thread& thread, const char* what, const void* p) {
    const ProgramCopy& program = *thread.machine->program;
    if ((const char*)p < program.image_low || (const char*)p >= program.image_high) {
        thread.machine->fail(describe(thread) + ": address of " + what +
                             " is not in shared memory");
    }
}

}  // namespace

void complete_warp_operation(Warp& warp, uint32_t group, unsigned lane) {
    WarpOperation operation = warp.operation[lane];
    uint8_t kind = (uint8_t)warp.signature[lane];
    if (uint32_t others = different_lanes(warp.signature, warp.signature[lane]) & group) {
        unsigned other = (unsigned)__builtin_ctz(others);
        warp.threads[lane].machine->fail(
            "lanes of one warp wait at different operations: " + describe(warp.threads[lane]) +
            " at " + operation_name(operation) + ", " + describe(warp.threads[other]) + " at " +
            operation_name(warp.operation[other]));
    }
    switch (operation) {
        case WarpOperation::barrier: break;
        case WarpOperation::shuffle: shuffle(warp, group); break;
        case WarpOperation::vote: vote(warp, group, kind); break;
        case WarpOperation::reduce: reduce(warp, group, kind); break;
        case WarpOperation::match: match(warp, group); break;
        case WarpOperation::mma: multiply_matrices(warp); break;
        case WarpOperation::mma_tf32: multiply_tf32_matrices(warp); break;
        case WarpOperation::mma_bytes: multiply_byte_matrices(warp, kind != 0); break;
        case WarpOperation::load_matrix: load_matrix(warp); break;
        case WarpOperation::load_matrix_transposed: load_matrix_transposed(warp); break;
    }
    warp.waiting &= ~group;
    warp.runnable |= group;
}

void complete_after_exit(Warp& warp) {
    for (uint32_t lanes = warp.waiting; lanes; lanes &= warp.waiting & (lanes - 1)) {
        unsigned lane = (unsigned)__builtin_ctz(lanes);
        if (uint32_t group = complete_group(warp, lane)) {
            complete_warp_operation(warp, group, lane);
        }
    }
}

const char* operation_name(WarpOperation operation) {
    switch (operation) {
        case WarpOperation::barrier: return "syncwarp";
        case WarpOperation::shuffle: return "shuffle";
        case WarpOperation::vote: return "vote";
        case WarpOperation::reduce: return "reduce";
        case WarpOperation::match: return "match";
        case WarpOperation::mma: return "mma";
        case WarpOperation::mma_tf32: return "mma.tf32";
        case WarpOperation::mma_bytes: return "mma.bytes";
        case WarpOperation::load_matrix: return "ldmatrix";
        case WarpOperation::load_matrix_transposed: return "ldmatrix.trans";
    }
    return "";
}

}  // namespace emulator

using namespace emulator;

void emulator_warp_barrier(unsigned mask) {
    wait_for_lanes(current(), mask, WarpOperation::barrier);
}

unsigned long long emulator_shuffle(unsigned mask, unsigned long long value, unsigned source) {
    Thread* thread = current();
    Warp& warp = *thread->warp;
    warp.value[thread->lane] = value;
    warp.source[thread->lane] = source;
    wait_for_lanes(thread, mask, WarpOperation::shuffle);
    return warp.result[thread->lane];
}

unsigned emulator_vote(int kind, unsigned mask, bool predicate) {
    Thread* thread = current();
    thread->warp->value[thread->lane] = predicate;
    wait_for_lanes(thread, mask, WarpOperation::vote, (uint8_t)kind);
    return (unsigned)thread->warp->result[thread->lane];
}

unsigned emulator_reduce(int kind, unsigned mask, unsigned value) {
    Thread* thread = current();
    thread->warp->value[thread->lane] = value;
    wait_for_lanes(thread, mask, WarpOperation::reduce, (uint8_t)kind);
    return (unsigned)thread->warp->result[thread->lane];
}

unsigned emulator_match(unsigned mask, unsigned long long value) {
    Thread* thread = current();
    thread->warp->value[thread->lane] = value;
    wait_for_lanes(thread, mask, WarpOperation::match);
    return (unsigned)thread->warp->result[thread->lane];
}

unsigned emulator_active_lanes() { return current()->warp->alive; }

namespace {

template <class T>
void emulate_mma(
    T* d, const unsigned* a, unsigned b0, unsigned b1, WarpOperation operation, uint8_t kind = 0
) {
    Thread* thread = current();
    Warp& warp = *thread->warp;
    unsigned lane = thread->lane;
    need_whole_warp(*thread);
    for (int i = 0; i < 4; ++i) warp.a[i][lane] = a[i];
    warp.b[0][lane] = b0;
    warp.b[1][lane] = b1;
    for (int i = 0; i < 2; ++i) memcpy(&warp.d[i][lane * 2], d + 2 * i, 8);
    wait_for_lanes(thread, ~0u, operation, kind);
    for (int i = 0; i < 2; ++i) memcpy(d + 2 * i, &warp.d[i][lane * 2], 8);
}

}  // namespace

void emulator_mma(float* d, const unsigned* a, unsigned b0, unsigned b1) {
    emulate_mma(d, a, b0, b1, WarpOperation::mma);
}

void emulator_mma_tf32(float* d, const unsigned* a, unsigned b0, unsigned b1) {
    emulate_mma(d, a, b0, b1, WarpOperation::mma_tf32);
}

void emulator_mma_bytes(int* d, const unsigned* a, unsigned b0, unsigned b1, bool a_is_signed) {
    emulate_mma(d, a, b0, b1, WarpOperation::mma_bytes, a_is_signed);
}

void emulator_load_matrix4(unsigned* r, const void* row, bool transposed) {
    Thread* thread = current();
    Warp& warp = *thread->warp;
    need_whole_warp(*thread);
    need_alignment(*thread, "a matrix row", row, 16);
    need_shared(*thread, "a matrix row", row);
    warp.value[thread->lane] = (uintptr_t)row;
    wait_for_lanes(thread, ~0u, transposed ? WarpOperation::load_matrix_transposed
                                           : WarpOperation::load_matrix);
    for (int i = 0; i < 4; ++i) r[i] = warp.matrix[i][thread->lane];
}

void emulator_copy_async(void* to, const void* from, unsigned bytes, bool valid) {
    Thread* thread = current();
    need_alignment(*thread, "an asynchronous copy's target", to, bytes);
    need_shared(*thread, "an asynchronous copy's target", to);
    if (valid) need_alignment(*thread, "an asynchronous copy's source", from, bytes);
    thread->copies.push_back({to, from, bytes, valid, thread->copy_group});
}

void emulator_copy_async_commit() { ++current()->copy_group; }

void emulator_copy_async_wait(unsigned groups_left) {
    Thread* thread = current();
    auto& copies = thread->copies;
    size_t done = 0;
    // Committed groups have numbers below `copy_group`.
    while (done < copies.size() && copies[done].group + groups_left < thread->copy_group) {
        const AsyncCopy& copy = copies[done++];
        if (copy.valid) {
            memcpy(copy.to, copy.from, copy.bytes);
        } else {
            memset(copy.to, 0, copy.bytes);
        }
    }
    copies.erase(copies.begin(), copies.begin() + (ptrdiff_t)done);
}
