// What a compiled kernel and the emulated driver agree on. Included by both.
#pragma once

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

struct Block {
    uint3 index;
    dim3 threads;
    dim3 blocks;
    // Whether a thread has waited for the kernel before.
    bool has_waited;
};

// The part of a thread that kernels read; the scheduler's thread extends it.
struct ThreadView {
    uint3 index;
    unsigned lane;
    Block* block;
};

// One entry of the table `emulator_kernels` that every compiled program exports; the last entry
// has no name.
struct Kernel {
    const char* name;
    void (*run)(void* const* parameters);
    const unsigned* parameter_sizes;
    const unsigned* parameter_alignments;
    unsigned parameter_count;
    unsigned max_threads;
};

constexpr unsigned max_dynamic_shared = 232448;  // 227 KiB
constexpr unsigned page_size = 4096;
// Room for the dynamic shared memory of a block, and at least one page to fence it off.
constexpr unsigned dynamic_shared_room =
    (max_dynamic_shared + page_size - 1) / page_size * page_size + page_size;

// How a block barrier combines the predicates of its threads.
enum BarrierResult : int { barrier_count, barrier_any, barrier_all };

enum VoteKind : int { vote_ballot, vote_any, vote_all };

enum ReduceKind : int {
    reduce_add, reduce_min_signed, reduce_max_signed, reduce_min_unsigned, reduce_max_unsigned,
    reduce_and, reduce_or, reduce_xor
};

}  // namespace emulator

#pragma GCC visibility push(default)
extern "C" {

// The thread that runs on this core; null outside of kernels.
extern __thread emulator::ThreadView* emulator_thread __attribute__((tls_model("initial-exec")));

unsigned emulator_barrier(int result, bool predicate, const char* file, int line);

void emulator_warp_barrier(unsigned mask);
// The value of lane `source`, all ones where that lane does not take part.
unsigned long long emulator_shuffle(unsigned mask, unsigned long long value, unsigned source);
unsigned emulator_vote(int kind, unsigned mask, bool predicate);
unsigned emulator_reduce(int kind, unsigned mask, unsigned value);
// The lanes that brought the same value.
unsigned emulator_match(unsigned mask, unsigned long long value);
// Lanes of this warp that have not exited.
unsigned emulator_active_lanes();

void emulator_mma(float* d, const unsigned* a, unsigned b0, unsigned b1);
void emulator_mma_tf32(float* d, const unsigned* a, unsigned b0, unsigned b1);
void emulator_mma_bytes(int* d, const unsigned* a, unsigned b0, unsigned b1, bool a_is_signed);
void emulator_load_matrix4(unsigned* r, const void* row, bool transposed);

// Copies of 4, 8 or 16 bytes that happen no earlier than the wait for them.
void emulator_copy_async(void* to, const void* from, unsigned bytes, bool valid);
void emulator_copy_async_commit();
void emulator_copy_async_wait(unsigned groups_left);

// Lets other threads of the block run.
void emulator_yield();
[[noreturn]] void emulator_trap(const char* what, const char* file, int line);

}
#pragma GCC visibility pop
