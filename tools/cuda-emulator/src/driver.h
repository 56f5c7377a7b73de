// The driver's inner interfaces. Names and numbers of the C API are those of CUDA 13.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "scheduler.h"

using CUdevice = int;
using CUdeviceptr = unsigned long long;

enum CUresult : int {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_OPERATING_SYSTEM = 304,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_ILLEGAL_STATE = 401,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701,
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712,
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
    CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
    CUDA_ERROR_CAPTURED_EVENT = 907,
    CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE = 910,
};

// Exported by the emulated library.
#define EMULATOR_API extern "C" __attribute__((visibility("default"))) CUresult

namespace emulator {

constexpr unsigned max_threads_per_block = 1024;
constexpr unsigned default_shared_limit = 48 << 10;

// Held during every call; kernels run under it.
extern std::recursive_mutex driver_mutex;
extern bool initialised;
// Context of the calling thread; null if it has none.
extern thread_local void* current_context;

// Whether the context has died of an error that a kernel made, on request: no call succeeds then.
bool context_is_lost();

// Runs the body of a call that needs a context.
template <class Body>
CUresult in_context(Body body) {
    std::lock_guard lock(driver_mutex);
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    if (context_is_lost()) return CUDA_ERROR_ILLEGAL_ADDRESS;
    return body();
}

// Prints why a call fails, for those errors whose number says too little.
CUresult refuse(CUresult error, const std::string& why);

// memory.cpp
size_t total_memory();
size_t free_memory();
// Whether the bytes lie in one allocation of the device, host memory it knows, or a program.
bool device_can_access(CUdeviceptr p, size_t bytes);
// Where the address is among allocations, for a message.
std::string place_of(const void* p);

// module.cpp
struct Function;

struct Symbol {
    std::string name;
    // In the loaded image.
    size_t offset, size;
};

// A program, loaded once for each worker that has run blocks of it, so that each has its own
// shared memory.
struct Module {
    std::vector<char> image;
    struct Copy {
        void* handle;
        int file;
        char* base;
        size_t size;
    };
    std::vector<Copy> copies;
    std::vector<std::unique_ptr<Function>> functions;
    // Variables at namespace scope that can be written.
    std::vector<Symbol> variables;
    // Static shared memory: variables inside of functions.
    std::vector<Symbol> shared;
};

struct Function {
    Module* module;
    const Kernel* kernel;
    // In the program's table of kernels.
    size_t index;
    // Static shared memory of the kernel itself, without that of device functions it calls.
    size_t static_shared;
    size_t dynamic_shared_limit;
    // Static shared memory that the kernel can reach.
    std::vector<Symbol> shared;
    // One per copy of the program.
    std::vector<std::unique_ptr<ProgramCopy>> programs;
};

// The program for a worker, loaded when first asked for; null if it cannot be.
const ProgramCopy* program_for(Function& function, size_t worker);
// Null for a handle that is none.
Function* find_function(void* handle);
bool in_module(CUdeviceptr p, size_t bytes);

// launch.cpp
// Runs all blocks, on as many processors as it is worth.
CUresult run_kernel(Function& function, const Launch& launch);

// stream.cpp
struct Operation {
    enum Kind { kernel, copy, fill, host } kind;
    std::function<CUresult()> run;
};

// Runs the operation, or adds it to the graph that the stream is captured into.
CUresult submit(void* stream, Operation operation);
// What a call that may not happen during capture returns; spoils the captures it disturbs.
CUresult check_capture_allows();

}  // namespace emulator
