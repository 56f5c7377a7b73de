// Says which thread of which kernel a memory fault belongs to.

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "driver.h"
#include "scheduler.h"

namespace emulator {

namespace {

struct sigaction earlier_segv, earlier_bus, earlier_fpe;

void handle(int signal, siginfo_t* info, void*) {
    auto thread = static_cast<Thread*>(emulator_thread);
    if (!thread) {
        // Not a kernel's: whoever handled the signal before sees it when the instruction repeats.
        sigaction(SIGSEGV, &earlier_segv, nullptr);
        sigaction(SIGBUS, &earlier_bus, nullptr);
        sigaction(SIGFPE, &earlier_fpe, nullptr);
        return;
    }
    const Machine& machine = *thread->machine;
    const uint3 &block = machine.block.index, &index = thread->index;
    char text[512];
    int length = snprintf(text, sizeof text,
                          "cuda-emulator: kernel %s, block (%u, %u, %u), thread (%u, %u, %u): %s "
                          "%p%s\n",
                          machine.launch->name, block.x, block.y, block.z, index.x, index.y,
                          index.z, signal == SIGFPE ? "integer division at" : "illegal address",
                          info->si_addr, place_of(info->si_addr).c_str());
    ssize_t written = write(STDERR_FILENO, text, (size_t)length);
    (void)written;
    abort();
}

}  // namespace

void install_fault_handler() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = handle;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &earlier_segv);
        sigaction(SIGBUS, &action, &earlier_bus);
        sigaction(SIGFPE, &action, &earlier_fpe);
    });
    stack_t present;
    if (sigaltstack(nullptr, &present) == 0 && present.ss_flags & SS_DISABLE) {
        constexpr size_t size = 64 << 10;
        void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return;
        stack_t stack = {};
        stack.ss_sp = memory;
        stack.ss_size = size;
        sigaltstack(&stack, nullptr);
    }
}

}  // namespace emulator
