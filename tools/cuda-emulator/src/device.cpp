// The device and its context: one imaginary GPU of compute capability 9.0.

#include <cstdio>
#include <cstring>

#include "driver.h"

namespace emulator {

std::recursive_mutex driver_mutex;
bool initialised;
thread_local void* current_context;

namespace {

constexpr char device_name[] = "CUDA emulator";
constexpr int driver_version = 13000;

// The only context; its address is the handle.
struct Context {
    unsigned retained = 0;
    unsigned flags = 0;
} primary_context;

// Values by number of the attribute in `CUdevice_attribute`; 0 where none is listed.
struct Attribute {
    int number, value;
};
constexpr Attribute attributes[] = {
    {1, 1024},           // threads per block
    {2, 1024},           // block dimensions
    {3, 1024},
    {4, 64},
    {5, 2147483647},     // grid dimensions
    {6, 65535},
    {7, 65535},
    {8, 48 << 10},       // shared memory per block
    {9, 64 << 10},       // constant memory
    {10, 32},            // warp
    {11, 2147483647},    // pitch
    {12, 65536},         // registers per block
    {13, 1980000},       // clock, kHz
    {14, 512},           // texture alignment
    {15, 1},             // copies overlap kernels
    {16, 132},           // multiprocessors
    {19, 1},             // maps host memory
    {31, 1},             // concurrent kernels
    {32, 1},             // ECC
    {36, 2619000},       // memory clock, kHz
    {37, 5120},          // memory bus, bits
    {38, 50 << 20},      // L2 cache
    {39, 2048},          // threads per multiprocessor
    {40, 3},             // copy engines
    {41, 1},             // unified addressing
    {75, 9},             // compute capability
    {76, 0},
    {78, 1},             // stream priorities
    {79, 1},             // caches global loads in L1
    {80, 1},             // caches local loads in L1
    {81, 228 << 10},     // shared memory per multiprocessor
    {82, 65536},         // registers per multiprocessor
    {90, 1},             // compute preemption
    {95, 0},             // cooperative launch
    {97, max_dynamic_shared},
    {106, 32},           // blocks per multiprocessor
    {111, 1024},         // shared memory reserved per block
    {115, 1},            // memory pools
};

struct ErrorText {
    CUresult error;
    const char *name, *text;
};
constexpr ErrorText error_texts[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {CUDA_ERROR_OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM",
     "OS call failed or operation not supported on this OS"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE",
     "the operation cannot be performed in the present state"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS",
     "an illegal memory access was encountered"},
    {CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
     "too many resources requested for launch"},
    {CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
     "capture was not ended in the same stream as it began"},
    {CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {CUDA_ERROR_CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE, "CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE",
     "the graph update was not performed because it included changes which violated constraints"},
};

const ErrorText* find_error(CUresult error) {
    for (const ErrorText& text : error_texts) {
        if (text.error == error) return &text;
    }
    return nullptr;
}

template <class Body>
CUresult with_device(CUdevice device, Body body) {
    std::lock_guard lock(driver_mutex);
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    return body();
}

}  // namespace

CUresult refuse(CUresult error, const std::string& why) {
    const ErrorText* text = find_error(error);
    fprintf(stderr, "cuda-emulator: %s: %s\n", text ? text->name : "error", why.c_str());
    return error;
}

}  // namespace emulator

using namespace emulator;

EMULATOR_API cuInit(unsigned) {
    std::lock_guard lock(driver_mutex);
    initialised = true;
    return CUDA_SUCCESS;
}

EMULATOR_API cuDriverGetVersion(int* version) {
    *version = driver_version;
    return CUDA_SUCCESS;
}

EMULATOR_API cuGetErrorName(CUresult error, const char** name) {
    const ErrorText* text = find_error(error);
    *name = text ? text->name : nullptr;
    return text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EMULATOR_API cuGetErrorString(CUresult error, const char** string) {
    const ErrorText* text = find_error(error);
    *string = text ? text->text : nullptr;
    return text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EMULATOR_API cuDeviceGetCount(int* count) {
    *count = 1;
    return initialised ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

EMULATOR_API cuDeviceGet(CUdevice* device, int ordinal) {
    return with_device(ordinal, [&] {
        *device = 0;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuDeviceGetName(char* name, int length, CUdevice device) {
    return with_device(device, [&] {
        if (length <= 0) return CUDA_ERROR_INVALID_VALUE;
        snprintf(name, (size_t)length, "%s", device_name);
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuDeviceGetUuid_v2(char* uuid, CUdevice device) {
    return with_device(device, [&] {
        memcpy(uuid, "cuda-emulator-00", 16);
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuDeviceGetUuid(char* uuid, CUdevice device) {
    return cuDeviceGetUuid_v2(uuid, device);
}

EMULATOR_API cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    return with_device(device, [&] {
        *bytes = total_memory();
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuDeviceGetAttribute(int* value, int number, CUdevice device) {
    return with_device(device, [&] {
        *value = 0;
        for (const Attribute& attribute : attributes) {
            if (attribute.number == number) *value = attribute.value;
        }
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuDeviceGetPCIBusId(char* id, int length, CUdevice device) {
    return with_device(device, [&] {
        snprintf(id, (size_t)length, "0000:00:00.0");
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuDevicePrimaryCtxRetain(void** context, CUdevice device) {
    return with_device(device, [&] {
        ++primary_context.retained;
        *context = &primary_context;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    return with_device(device, [&] {
        if (primary_context.retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
        --primary_context.retained;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned flags) {
    return with_device(device, [&] {
        primary_context.flags = flags;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    return with_device(device, [&] {
        *flags = primary_context.flags;
        *active = primary_context.retained > 0;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuCtxSetCurrent(void* context) {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (context && context != &primary_context) return CUDA_ERROR_INVALID_CONTEXT;
    current_context = context;
    return CUDA_SUCCESS;
}

EMULATOR_API cuCtxGetCurrent(void** context) {
    *context = current_context;
    return initialised ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

EMULATOR_API cuCtxPushCurrent_v2(void* context) { return cuCtxSetCurrent(context); }

EMULATOR_API cuCtxPopCurrent_v2(void** context) {
    if (context) *context = current_context;
    return cuCtxSetCurrent(nullptr);
}

EMULATOR_API cuCtxGetDevice(CUdevice* device) {
    return in_context([&] {
        *device = 0;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuCtxSetFlags(unsigned) {
    return in_context([] { return CUDA_SUCCESS; });
}

// Sizes of stacks, heaps and fetches: nothing here depends on them.
EMULATOR_API cuCtxSetLimit(int, size_t) {
    return in_context([] { return CUDA_SUCCESS; });
}

EMULATOR_API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    return in_context([&] {
        if (least) *least = 0;
        if (greatest) *greatest = -5;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuProfilerStart() {
    return in_context([] { return CUDA_SUCCESS; });
}

EMULATOR_API cuProfilerStop() {
    return in_context([] { return CUDA_SUCCESS; });
}
