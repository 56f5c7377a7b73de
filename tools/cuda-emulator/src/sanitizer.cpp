// What the code that g++ adds to kernels calls when it finds a mistake: accesses that a GPU would
// refuse, indices beyond an array, shifts that mean something else on a GPU.

#include <cstdint>

#include "scheduler.h"

namespace {

// How every record of the checks begins.
struct Place {
    const char* file;
    uint32_t line, column;
};

[[noreturn]] void found(const void* record, const char* what) {
    auto place = (const Place*)record;
    emulator_trap(what, place->file, (int)place->line);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void __ubsan_handle_type_mismatch_v1(void* record, uintptr_t) {
    found(record, "the address is not aligned for its type");
}

void __ubsan_handle_out_of_bounds(void* record, uintptr_t) {
    found(record, "the index is outside of the array");
}

void __ubsan_handle_shift_out_of_bounds(void* record, uintptr_t, uintptr_t) {
    found(record, "the shift is as wide as the type or wider");
}

void __ubsan_handle_divrem_overflow(void* record, uintptr_t, uintptr_t) {
    found(record, "division of integers by zero");
}

void __ubsan_handle_builtin_unreachable(void* record) {
    found(record, "a place that the program calls unreachable");
}

}
#pragma GCC visibility pop
