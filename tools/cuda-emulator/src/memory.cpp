// Device memory as mappings of the process, fenced so that a kernel that leaves its arrays faults.
//
// New memory holds 0xff in every byte: a float that nobody wrote is a NaN.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "driver.h"

namespace emulator {

namespace {

constexpr size_t alignment = 256;
constexpr uint8_t poison = 0xff;
// Address space before and behind an allocation that nothing may touch.
constexpr size_t fence = 1 << 20;
// Larger allocations share poisoned pages until they are written.
constexpr size_t poison_file_size = 16 << 20;

struct Allocation {
    size_t size;
    // The mapping with its fences; null for memory that was the caller's.
    char* map;
    size_t map_size;
    enum Kind { device, host, registered } kind;
};

std::map<uintptr_t, Allocation> allocations;
size_t used;

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

int poison_file() {
    static int file = [] {
        int created = memfd_create("poison", MFD_CLOEXEC);
        std::vector<char> page(1 << 20, (char)poison);
        for (size_t written = 0; created >= 0 && written < poison_file_size;) {
            ssize_t count = write(created, page.data(), page.size());
            if (count <= 0) return -1;
            written += (size_t)count;
        }
        return created;
    }();
    return file;
}

bool map_poisoned(char* start, size_t size) {
    if (size <= poison_file_size || poison_file() < 0) {
        if (mprotect(start, size, PROT_READ | PROT_WRITE) != 0) return false;
        memset(start, poison, size);
        return true;
    }
    for (size_t done = 0; done < size; done += poison_file_size) {
        size_t part = size - done < poison_file_size ? size - done : poison_file_size;
        void* map = mmap(start + done, part, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, poison_file(), 0);
        if (map == MAP_FAILED) return false;
    }
    return true;
}

// Ends at a fence, so that the first byte behind it (rounded up to the alignment) faults.
char* map_fenced(size_t size, Allocation& allocation) {
    size_t body = round_up(round_up(size, alignment), page_size);
    allocation.map_size = body + 2 * fence;
    void* map = mmap(nullptr, allocation.map_size, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return nullptr;
    allocation.map = (char*)map;
    if (!map_poisoned(allocation.map + fence, body)) {
        munmap(map, allocation.map_size);
        return nullptr;
    }
    return allocation.map + fence + body - round_up(size, alignment);
}

void check_slack(uintptr_t address, const Allocation& allocation) {
    const char* first = allocation.map + fence;
    const char* last = allocation.map + allocation.map_size - fence;
    const char* end = (const char*)address + allocation.size;
    auto check = [&](const char* from, const char* to) {
        for (const char* p = from; p < to; ++p) {
            if ((uint8_t)*p == poison) continue;
            fprintf(stderr,
                    "cuda-emulator: something wrote at byte %td of an allocation of %zu bytes\n",
                    p - (const char*)address, allocation.size);
            abort();
        }
    };
    check(first, (const char*)address);
    check(end, last);
}

CUresult allocate(size_t size, Allocation::Kind kind, uintptr_t& address) {
    if (size == 0) return CUDA_ERROR_INVALID_VALUE;
    if (kind == Allocation::device &&
        (size > total_memory() || round_up(size, alignment) > free_memory())) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    Allocation allocation = {size, nullptr, 0, kind};
    char* start = map_fenced(size, allocation);
    if (!start) return CUDA_ERROR_OUT_OF_MEMORY;
    if (kind == Allocation::device) used += round_up(size, alignment);
    address = (uintptr_t)start;
    allocations.emplace(address, allocation);
    return CUDA_SUCCESS;
}

CUresult release(uintptr_t address, Allocation::Kind kind) {
    auto found = allocations.find(address);
    if (found == allocations.end() || found->second.kind != kind) {
        return refuse(CUDA_ERROR_INVALID_VALUE, "freed an address that was not allocated");
    }
    const Allocation& allocation = found->second;
    if (allocation.map) {
        check_slack(address, allocation);
        munmap(allocation.map, allocation.map_size);
    }
    if (kind == Allocation::device) used -= round_up(allocation.size, alignment);
    allocations.erase(found);
    return CUDA_SUCCESS;
}

const std::pair<const uintptr_t, Allocation>* containing(uintptr_t address, size_t bytes) {
    auto after = allocations.upper_bound(address);
    if (after == allocations.begin()) return nullptr;
    auto found = std::prev(after);
    size_t offset = address - found->first;
    if (offset > found->second.size || bytes > found->second.size - offset) return nullptr;
    return &*found;
}

CUresult check_range(CUdeviceptr p, size_t bytes, const char* what) {
    if (bytes == 0 || device_can_access(p, bytes)) return CUDA_SUCCESS;
    return refuse(CUDA_ERROR_INVALID_VALUE, std::string(what) + " of " + std::to_string(bytes) +
                                                " bytes is not within one allocation");
}

CUresult copy(void* stream, CUdeviceptr to, CUdeviceptr from, size_t bytes, bool to_device,
              bool from_device) {
    if (to_device) {
        if (CUresult error = check_range(to, bytes, "copy to")) return error;
    }
    if (from_device) {
        if (CUresult error = check_range(from, bytes, "copy from")) return error;
    }
    return submit(stream, {Operation::copy, [=] {
                               memmove((void*)to, (const void*)from, bytes);
                               return CUDA_SUCCESS;
                           }});
}

CUresult copy_now(CUdeviceptr to, CUdeviceptr from, size_t bytes, bool to_device,
                  bool from_device) {
    return in_context([&] {
        if (CUresult error = check_capture_allows()) return error;
        return copy(nullptr, to, from, bytes, to_device, from_device);
    });
}

CUresult copy_later(void* stream, CUdeviceptr to, CUdeviceptr from, size_t bytes, bool to_device,
                    bool from_device) {
    return in_context([&] { return copy(stream, to, from, bytes, to_device, from_device); });
}

template <class T>
CUresult fill(void* stream, CUdeviceptr to, T value, size_t count) {
    if (to % sizeof(T) != 0) return CUDA_ERROR_INVALID_VALUE;
    if (count > SIZE_MAX / sizeof(T)) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult error = check_range(to, count * sizeof(T), "fill")) return error;
    return submit(stream, {Operation::fill, [=] {
                               auto first = (T*)to;
                               for (size_t i = 0; i < count; ++i) first[i] = value;
                               return CUDA_SUCCESS;
                           }});
}

template <class T>
CUresult fill_now(CUdeviceptr to, T value, size_t count) {
    return in_context([&] {
        if (CUresult error = check_capture_allows()) return error;
        return fill(nullptr, to, value, count);
    });
}

template <class T>
CUresult fill_later(void* stream, CUdeviceptr to, T value, size_t count) {
    return in_context([&] { return fill(stream, to, value, count); });
}

CUresult allocate_now(size_t size, Allocation::Kind kind, uintptr_t* address) {
    return in_context([&] {
        if (!address) return CUDA_ERROR_INVALID_VALUE;
        if (CUresult error = check_capture_allows()) return error;
        return allocate(size, kind, *address);
    });
}

CUresult release_now(uintptr_t address, Allocation::Kind kind) {
    return in_context([&] {
        if (address == 0) return CUDA_SUCCESS;
        if (CUresult error = check_capture_allows()) return error;
        return release(address, kind);
    });
}

}  // namespace

size_t total_memory() {
    static size_t total = [] {
        const char* text = getenv("CUDA_EMULATOR_MEMORY_MIB");
        size_t mebibytes = text ? strtoull(text, nullptr, 10) : 0;
        return (mebibytes ? mebibytes : 8192) << 20;
    }();
    return total;
}

size_t free_memory() { return total_memory() - used; }

bool device_can_access(CUdeviceptr p, size_t bytes) {
    return containing(p, bytes) || in_module(p, bytes);
}

std::string place_of(const void* p) {
    uintptr_t address = (uintptr_t)p;
    auto after = allocations.upper_bound(address);
    if (after == allocations.begin()) return "";
    auto [start, allocation] = *std::prev(after);
    return ", " + std::to_string(address - start) + " bytes from the start of an allocation of " +
           std::to_string(allocation.size);
}

}  // namespace emulator

using namespace emulator;

EMULATOR_API cuMemGetInfo_v2(size_t* free, size_t* total) {
    return in_context([&] {
        if (free) *free = free_memory();
        if (total) *total = total_memory();
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuMemAlloc_v2(CUdeviceptr* p, size_t size) {
    return allocate_now(size, Allocation::device, (uintptr_t*)p);
}

EMULATOR_API cuMemFree_v2(CUdeviceptr p) { return release_now(p, Allocation::device); }

// Allocation nodes of graphs are not emulated.
EMULATOR_API cuMemAllocAsync(CUdeviceptr* p, size_t size, void*) {
    return allocate_now(size, Allocation::device, (uintptr_t*)p);
}

EMULATOR_API cuMemFreeAsync(CUdeviceptr p, void*) { return release_now(p, Allocation::device); }

EMULATOR_API cuMemHostAlloc(void** p, size_t size, unsigned) {
    return allocate_now(size, Allocation::host, (uintptr_t*)p);
}

EMULATOR_API cuMemAllocHost_v2(void** p, size_t size) {
    return allocate_now(size, Allocation::host, (uintptr_t*)p);
}

EMULATOR_API cuMemFreeHost(void* p) { return release_now((uintptr_t)p, Allocation::host); }

EMULATOR_API cuMemHostRegister_v2(void* p, size_t size, unsigned) {
    return in_context([&] {
        if (!p || size == 0) return CUDA_ERROR_INVALID_VALUE;
        auto after = allocations.lower_bound((uintptr_t)p + size);
        if (after != allocations.begin()) {
            auto before = std::prev(after);
            if (before->first + before->second.size > (uintptr_t)p) {
                return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
            }
        }
        allocations.emplace((uintptr_t)p, Allocation{size, nullptr, 0, Allocation::registered});
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuMemHostUnregister(void* p) {
    return in_context([&] {
        auto found = allocations.find((uintptr_t)p);
        if (found == allocations.end() || found->second.kind != Allocation::registered) {
            return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
        }
        allocations.erase(found);
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuMemHostGetDevicePointer_v2(CUdeviceptr* out, void* p, unsigned) {
    return in_context([&] {
        if (!out || !containing((uintptr_t)p, 0)) return CUDA_ERROR_INVALID_VALUE;
        *out = (CUdeviceptr)p;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* size, CUdeviceptr p) {
    return in_context([&] {
        auto found = containing(p, 1);
        if (!found) return CUDA_ERROR_NOT_FOUND;
        if (base) *base = found->first;
        if (size) *size = found->second.size;
        return CUDA_SUCCESS;
    });
}

EMULATOR_API cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    return copy_now(to, (CUdeviceptr)from, bytes, true, false);
}

EMULATOR_API cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    return copy_now((CUdeviceptr)to, from, bytes, false, true);
}

EMULATOR_API cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return copy_now(to, from, bytes, true, true);
}

EMULATOR_API cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return copy_now(to, from, bytes, false, false);
}

EMULATOR_API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, void* stream) {
    return copy_later(stream, to, (CUdeviceptr)from, bytes, true, false);
}

EMULATOR_API cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, void* stream) {
    return copy_later(stream, (CUdeviceptr)to, from, bytes, false, true);
}

EMULATOR_API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, void* stream) {
    return copy_later(stream, to, from, bytes, true, true);
}

EMULATOR_API cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, void* stream) {
    return copy_later(stream, to, from, bytes, false, false);
}

EMULATOR_API cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) {
    return fill_now(to, value, count);
}

EMULATOR_API cuMemsetD16_v2(CUdeviceptr to, unsigned short value, size_t count) {
    return fill_now(to, value, count);
}

EMULATOR_API cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) {
    return fill_now(to, value, count);
}

EMULATOR_API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, void* stream) {
    return fill_later(stream, to, value, count);
}

EMULATOR_API cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, void* stream) {
    return fill_later(stream, to, value, count);
}

EMULATOR_API cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, void* stream) {
    return fill_later(stream, to, value, count);
}
