// Runs the threads of one block as fibers of one thread of the operating system.
//
// A fiber runs until it waits at a barrier or a warp operation; then the next lane of its warp
// that can run does, or else one of the next warp. Nothing runs at the same time within a block.
// Every other block goes through its threads from the last to the first, so that a kernel without
// a barrier that it needs cannot be right in both orders.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../device/runtime.cuh"

namespace emulator {

struct Warp;
struct Machine;

enum class WarpOperation : uint8_t {
    barrier, shuffle, vote, reduce, match, mma, mma_tf32, mma_bytes, load_matrix,
    load_matrix_transposed
};

struct AsyncCopy {
    void* to;
    const void* from;
    unsigned bytes;
    bool valid;
    unsigned group;
};

struct Thread : ThreadView {
    Warp* warp;
    Machine* machine;
    // Null until the thread first runs.
    char* stack;
    void* stack_pointer;
    unsigned copy_group;
    std::vector<AsyncCopy> copies;
};

// Lanes as bits; arrays have one entry per lane. What a warp operation takes lies in `value`,
// `source` or the matrices, what it gives in `result` or the matrices.
struct Warp {
    uint32_t alive, runnable, waiting;
    uint32_t mask[32];
    WarpOperation operation[32];
    // The operation and its kind, to compare in one go.
    uint16_t signature[32];
    uint32_t source[32];
    uint64_t value[32];
    uint64_t result[32];
    // Fragments of `mma`: in this order A's quarters are [8, 8] halves by rows (of `mma_tf32`
    // [8, 4] numbers, of `mma_bytes` [8, 16] bytes), B's are its columns, and D's halves are [8, 8]
    // floats or integers by rows.
    alignas(64) uint32_t a[4][32];
    alignas(64) uint32_t b[2][32];
    alignas(64) float d[2][64];
    alignas(64) uint32_t matrix[4][32];
    Thread threads[32];
};

// A kernel with everything that a launch fixes.
struct Launch {
    const char* name;
    uint3 blocks;
    uint3 threads;
    unsigned shared_bytes;
    void* const* parameters;
    // Counts launches.
    uint64_t number;
    // Whether it may start before the kernel before it has ended.
    bool overlaps;
};

// Where one loaded copy of a program keeps what a block uses.
struct ProgramCopy {
    void (*run)(void* const* parameters);
    char* dynamic_shared;
    // Image of the program, where static shared memory lies.
    char* image_low;
    char* image_high;
    struct Range {
        char* start;
        size_t size;
    };
    // Static shared memory of the kernel and of device functions.
    std::vector<Range> static_shared;
};

struct Machine {
    Block block;
    const Launch* launch;
    const ProgramCopy* program;

    Machine();
    Machine(const Machine&) = delete;

    // Sets up the threads for the blocks of a launch; `launch` and `program` must outlive it.
    void prepare(const Launch& launch, const ProgramCopy& program);
    void run_block(uint64_t index);

    // For the operations of a running thread.
    void switch_away(Thread* from);
    void yield(Thread* from);
    void arrive_at_barrier(Thread* thread, bool predicate, const char* file, int line);
    unsigned barrier_value(int result) const;
    [[noreturn]] void fail(const std::string& message) const;

  private:
    std::vector<Warp> warps;
    unsigned warp_count, alive;
    // Whether the block runs its threads from the last to the first.
    bool descending;
    unsigned arrived, predicates;
    unsigned released_count, released_total;
    const char* barrier_file;
    int barrier_line;
    uint3 barrier_thread;

    std::vector<char*> stacks;
    size_t free_stacks;
    void* main_stack_pointer;

    static void fiber_main();
    void run_thread_to_end(Thread* thread);
    Thread* next(const Thread* after);
    Thread* next_warp(const Warp& warp);
    uint32_t lanes_after(unsigned lane) const;
    Thread* first_of(Warp& warp, uint32_t lanes) const;
    void resume(Thread* thread, void** save);
    char* take_stack();
    void release_barrier();
    void poison_shared_memory();
    void check_shared_fence();
    [[noreturn]] void report_deadlock();
};

// Completes the operation that the lanes of `group` wait for; warp_operations.cpp.
void complete_warp_operation(Warp& warp, uint32_t group, unsigned lane);
// Completes whatever became possible because a lane exited.
void complete_after_exit(Warp& warp);

std::string describe(const ThreadView& thread);
const char* operation_name(WarpOperation operation);

// Makes faults of kernels stop the process with the thread's place. For every thread of the
// operating system that runs kernels, which gets a stack for signals here.
void install_fault_handler();

}  // namespace emulator
