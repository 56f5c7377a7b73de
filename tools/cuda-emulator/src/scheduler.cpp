#include "scheduler.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

__thread emulator::ThreadView* emulator_thread;

// Saves the callee-saved registers and the stack pointer, and continues where `load` was saved.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {

namespace {

constexpr size_t stack_size = 256 << 10;
constexpr unsigned saved_registers = 6;
constexpr uint8_t poison = 0xff;

char* new_stack(size_t number) {
    void* map = mmap(nullptr, stack_size + page_size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) {
        perror("cuda-emulator: no memory for the stack of a thread");
        abort();
    }
    mprotect(map, page_size, PROT_NONE);
    // Different distances from the page's end keep the stacks out of each other's cache lines.
    return (char*)map + page_size + stack_size - number % 56 * 576;
}

}  // namespace

Machine::Machine() : warps(32), free_stacks(0) {}

void Machine::prepare(const Launch& next_launch, const ProgramCopy& next_program) {
    launch = &next_launch;
    program = &next_program;
    const uint3& size = launch->threads;
    block.threads = dim3(size.x, size.y, size.z);
    block.blocks = dim3(launch->blocks.x, launch->blocks.y, launch->blocks.z);
    unsigned count = size.x * size.y * size.z;
    warp_count = (count + 31) / 32;
    for (unsigned i = 0; i < warp_count * 32; ++i) {
        Warp& warp = warps[i / 32];
        Thread& thread = warp.threads[i % 32];
        thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        thread.lane = i % 32;
        thread.block = &block;
        thread.warp = &warp;
        thread.machine = this;
    }
    // Fence off what lies behind the dynamic shared memory that the launch asked for.
    if (program->dynamic_shared) {
        size_t open = (launch->shared_bytes + page_size - 1) / page_size * page_size;
        mprotect(program->dynamic_shared, open, PROT_READ | PROT_WRITE);
        mprotect(program->dynamic_shared + open, dynamic_shared_room - open, PROT_NONE);
    }
}

void Machine::run_block(uint64_t index) {
    const uint3& grid = launch->blocks;
    block.index = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y),
                   unsigned(index / grid.x / grid.y)};
    block.has_waited = false;
    alive = launch->threads.x * launch->threads.y * launch->threads.z;
    arrived = predicates = 0;
    for (unsigned w = 0; w < warp_count; ++w) {
        unsigned lanes = alive - w * 32;
        Warp& warp = warps[w];
        warp.alive = warp.runnable = lanes >= 32 ? ~0u : (1u << lanes) - 1;
        warp.waiting = 0;
        for (Thread& thread : warp.threads) {
            thread.stack = nullptr;
            thread.copy_group = 0;
            thread.copies.clear();
        }
    }
    poison_shared_memory();
    descending = (index + launch->number) % 2;
    Warp& first = warps[descending ? warp_count - 1 : 0];
    resume(first_of(first, first.runnable), &main_stack_pointer);
    emulator_thread = nullptr;
    check_shared_fence();
    if (launch->overlaps && !block.has_waited) fail("did not wait for the kernel before it");
}

void Machine::switch_away(Thread* from) {
    Thread* to = next(from);
    if (!to) report_deadlock();
    resume(to, &from->stack_pointer);
}

// Other warps go first: the thread may wait for something that one of them does.
void Machine::yield(Thread* from) {
    Warp& warp = *from->warp;
    uint32_t later = warp.runnable & lanes_after(from->lane);
    Thread* to = later ? first_of(warp, later) : next_warp(warp);
    if (!to) to = first_of(warp, warp.runnable);
    if (to != from) resume(to, &from->stack_pointer);
}

void Machine::arrive_at_barrier(Thread* thread, bool predicate, const char* file, int line) {
    if (arrived == 0) {
        barrier_file = file;
        barrier_line = line;
        barrier_thread = thread->index;
    } else if (line != barrier_line || (file != barrier_file && strcmp(file, barrier_file) != 0)) {
        ThreadView first = *thread;
        first.index = barrier_thread;
        fail("threads wait at different block barriers: " + describe(first) + " at " +
             barrier_file + ":" + std::to_string(barrier_line) + ", " + describe(*thread) +
             " at " + file + ":" + std::to_string(line));
    }
    ++arrived;
    predicates += predicate;
    if (arrived == alive) {
        release_barrier();
    } else {
        thread->warp->runnable &= ~(1u << thread->lane);
        switch_away(thread);
    }
}

unsigned Machine::barrier_value(int result) const {
    switch (result) {
        case barrier_any: return released_count > 0;
        case barrier_all: return released_count == released_total;
        default: return released_count;
    }
}

void Machine::fail(const std::string& message) const {
    fflush(stdout);
    fprintf(stderr, "cuda-emulator: kernel %s, block (%u, %u, %u): %s\n", launch->name,
            block.index.x, block.index.y, block.index.z, message.c_str());
    abort();
}

// Where a new fiber begins: the thread to run is `emulator_thread`. When it has run to its end,
// a thread that has not begun yet goes on with the same stack.
void Machine::fiber_main() {
    for (;;) {
        Thread* thread = static_cast<Thread*>(emulator_thread);
        Machine* machine = thread->machine;
        machine->run_thread_to_end(thread);
        Thread* to = machine->next(thread);
        if (to && !to->stack) {
            to->stack = thread->stack;
            emulator_thread = to;
            continue;
        }
        if (!to && machine->alive > 0) machine->report_deadlock();
        // Nothing resumes this fiber, so that its stack may be given to another at once: that one
        // starts only after the switch.
        machine->stacks[machine->free_stacks++] = thread->stack;
        void* ended;
        if (!to) emulator_switch(&ended, machine->main_stack_pointer);
        emulator_thread = to;
        emulator_switch(&ended, to->stack_pointer);
    }
}

void Machine::run_thread_to_end(Thread* thread) {
    program->run(launch->parameters);
    Warp& warp = *thread->warp;
    uint32_t bit = 1u << thread->lane;
    warp.alive &= ~bit;
    warp.runnable &= ~bit;
    --alive;
    if (alive > 0 && arrived == alive) release_barrier();
    if (warp.waiting) complete_after_exit(warp);
}

Thread* Machine::next(const Thread* after) {
    Warp& warp = *after->warp;
    uint32_t later = warp.runnable & lanes_after(after->lane);
    if (later) return first_of(warp, later);
    if (warp.runnable) return first_of(warp, warp.runnable);
    return next_warp(warp);
}

Thread* Machine::next_warp(const Warp& warp) {
    unsigned current = unsigned(&warp - warps.data());
    for (unsigned i = 1; i < warp_count; ++i) {
        Warp& other = warps[(current + (descending ? warp_count - i : i)) % warp_count];
        if (other.runnable) return first_of(other, other.runnable);
    }
    return nullptr;
}

uint32_t Machine::lanes_after(unsigned lane) const {
    return descending ? (1u << lane) - 1 : ~((2u << lane) - 1);
}

Thread* Machine::first_of(Warp& warp, uint32_t lanes) const {
    return &warp.threads[descending ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes)];
}

void Machine::resume(Thread* thread, void** save) {
    if (!thread->stack) {
        thread->stack = take_stack();
        // Registers, then the address that the switch returns to. One word more aligns the stack
        // as a call would.
        void** top = (void**)thread->stack - 2;
        top[0] = (void*)&fiber_main;
        top -= saved_registers;
        memset(top, 0, saved_registers * sizeof *top);
        thread->stack_pointer = top;
    }
    emulator_thread = thread;
    emulator_switch(save, thread->stack_pointer);
}

char* Machine::take_stack() {
    if (free_stacks == 0) {
        stacks.push_back(nullptr);
        return new_stack(stacks.size());
    }
    return stacks[--free_stacks];
}

void Machine::release_barrier() {
    released_count = predicates;
    released_total = arrived;
    arrived = predicates = 0;
    for (unsigned w = 0; w < warp_count; ++w) warps[w].runnable = warps[w].alive;
}

void Machine::poison_shared_memory() {
    if (program->dynamic_shared) {
        size_t size = (launch->shared_bytes + page_size - 1) / page_size * page_size;
        memset(program->dynamic_shared, poison, size);
    }
    for (auto& range : program->static_shared) memset(range.start, poison, range.size);
}

void Machine::check_shared_fence() {
    if (!program->dynamic_shared) return;
    size_t end = (launch->shared_bytes + page_size - 1) / page_size * page_size;
    for (size_t i = launch->shared_bytes; i < end; ++i) {
        if ((uint8_t)program->dynamic_shared[i] != poison) {
            fail("wrote at byte " + std::to_string(i) + " of dynamic shared memory, the launch has " +
                 std::to_string(launch->shared_bytes) + " bytes");
        }
    }
}

void Machine::report_deadlock() {
    std::string message = "no thread can run:";
    for (unsigned w = 0; w < warp_count; ++w) {
        const Warp& warp = warps[w];
        message += "\n  warp " + std::to_string(w) + ":";
        for (unsigned lane = 0; lane < 32; ++lane) {
            if (!(warp.alive >> lane & 1)) continue;
            if (warp.waiting >> lane & 1) {
                char text[64];
                snprintf(text, sizeof text, " %u %s(%08x)", lane,
                         operation_name(warp.operation[lane]), warp.mask[lane]);
                message += text;
            } else {
                message += " " + std::to_string(lane) + " barrier";
            }
        }
    }
    if (arrived) {
        message += "\n  the barrier is at " + std::string(barrier_file) + ":" +
                   std::to_string(barrier_line);
    }
    fail(message);
}

std::string describe(const ThreadView& thread) {
    return "thread (" + std::to_string(thread.index.x) + ", " + std::to_string(thread.index.y) +
           ", " + std::to_string(thread.index.z) + ")";
}

}  // namespace emulator

unsigned emulator_barrier(int result, bool predicate, const char* file, int line) {
    auto thread = static_cast<emulator::Thread*>(emulator_thread);
    thread->machine->arrive_at_barrier(thread, predicate, file, line);
    return thread->machine->barrier_value(result);
}

void emulator_yield() {
    auto thread = static_cast<emulator::Thread*>(emulator_thread);
    thread->machine->yield(thread);
}

void emulator_trap(const char* what, const char* file, int line) {
    auto thread = static_cast<emulator::Thread*>(emulator_thread);
    thread->machine->fail(describe(*thread) + ": " + what + " at " + file + ":" +
                          std::to_string(line));
}
