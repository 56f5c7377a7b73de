// Launches: checks what the real driver checks, and spreads the blocks over processors.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <thread>

#include "driver.h"

namespace emulator {

namespace {

// Waking the helpers pays for launches that take longer than this.
constexpr std::chrono::microseconds worth_helping(200);
constexpr unsigned max_workers = 8;

// Blocks of one launch, taken one at a time by whoever is free.
struct Job {
    const Launch* launch;
    uint64_t blocks;
    std::atomic<uint64_t> next{0};

    void work(Machine& machine) {
        for (;;) {
            uint64_t block = next.fetch_add(1);
            if (block >= blocks) return;
            machine.run_block(block);
        }
    }
};

// Helper threads live as long as the process; each has a machine of its own.
class Helpers {
  public:
    explicit Helpers(unsigned count) {
        for (unsigned i = 0; i < count; ++i) std::thread([this, i] { serve(i); }).detach();
        programs.resize(count);
    }

    void start(Job& next_job, Function& function) {
        std::lock_guard lock(mutex);
        job = &next_job;
        busy = 0;
        for (size_t i = 0; i < programs.size(); ++i) {
            programs[i] = program_for(function, i + 1);
            busy += programs[i] != nullptr;
        }
        ++round;
        started.notify_all();
    }

    void wait() {
        std::unique_lock lock(mutex);
        finished.wait(lock, [this] { return busy == 0; });
    }

  private:
    std::mutex mutex;
    std::condition_variable started, finished;
    Job* job = nullptr;
    std::vector<const ProgramCopy*> programs;
    size_t busy = 0;
    uint64_t round = 0;

    void serve(unsigned number) {
        install_fault_handler();
        Machine machine;
        uint64_t seen = 0;
        for (;;) {
            std::unique_lock lock(mutex);
            started.wait(lock, [&] { return round != seen; });
            seen = round;
            const ProgramCopy* program = programs[number];
            if (!program) continue;
            Job& mine = *job;
            lock.unlock();
            machine.prepare(*mine.launch, *program);
            mine.work(machine);
            lock.lock();
            if (--busy == 0) finished.notify_all();
        }
    }
};

// Never destroyed: the helpers use it until the process ends.
Helpers* helpers() {
    static Helpers* all = [] {
        unsigned workers = std::min(std::thread::hardware_concurrency(), max_workers);
        return workers > 1 ? new Helpers(workers - 1) : nullptr;
    }();
    return all;
}

Machine& own_machine() {
    static Machine* machine = new Machine;
    return *machine;
}

uint64_t launches;

// Launches that succeed before one kills the context.
uint64_t launches_until_loss() {
    static uint64_t count = [] {
        const char* text = getenv("CUDA_EMULATOR_FAIL_AFTER");
        return text ? strtoull(text, nullptr, 10) : UINT64_MAX;
    }();
    return count;
}

struct LaunchShape {
    uint3 blocks, threads;
    unsigned shared_bytes;
    bool overlaps = false;
};

CUresult check_shape(const Function& function, const LaunchShape& shape) {
    std::string name = function.kernel->name;
    const uint3 &blocks = shape.blocks, &threads = shape.threads;
    if (!blocks.x || !blocks.y || !blocks.z || !threads.x || !threads.y || !threads.z) {
        return refuse(CUDA_ERROR_INVALID_VALUE, name + ": a dimension of the launch is 0");
    }
    if (blocks.x > 0x7fffffff || blocks.y > 65535 || blocks.z > 65535 || threads.x > 1024 ||
        threads.y > 1024 || threads.z > 64) {
        return refuse(CUDA_ERROR_INVALID_VALUE, name + ": a dimension of the launch is too large");
    }
    uint64_t count = (uint64_t)threads.x * threads.y * threads.z;
    if (count > max_threads_per_block) {
        return refuse(CUDA_ERROR_INVALID_VALUE,
                      name + ": " + std::to_string(count) + " threads per block, at most 1024");
    }
    if (count > function.kernel->max_threads) {
        return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
                      name + ": " + std::to_string(count) + " threads per block, __launch_bounds__ " +
                          "allows " + std::to_string(function.kernel->max_threads));
    }
    if (shape.shared_bytes > function.dynamic_shared_limit) {
        return refuse(CUDA_ERROR_INVALID_VALUE,
                      name + ": " + std::to_string(shape.shared_bytes) +
                          " bytes of dynamic shared memory, the function's limit is " +
                          std::to_string(function.dynamic_shared_limit));
    }
    return CUDA_SUCCESS;
}

// A launch that keeps its parameters, so that a graph can repeat it.
struct KernelCall {
    Function* function;
    LaunchShape shape;
    std::vector<uint64_t> values;
    std::vector<size_t> offsets;

    KernelCall(Function& function, const LaunchShape& shape, void* const* parameters)
        : function(&function), shape(shape) {
        const Kernel& kernel = *function.kernel;
        for (unsigned i = 0; i < kernel.parameter_count; ++i) {
            size_t size = kernel.parameter_sizes[i];
            // Parameters keep an alignment of 16 bytes, as vectors need.
            offsets.push_back(values.size());
            values.resize(values.size() + (size + 15) / 16 * 2);
            memcpy(&values[offsets.back()], parameters[i], size);
        }
    }

    CUresult run() {
        std::vector<uint64_t> aligned(values.size() + 1);
        uint64_t* first = aligned.data() + ((uintptr_t)aligned.data() % 16 != 0);
        memcpy(first, values.data(), values.size() * sizeof *first);
        std::vector<void*> parameters;
        for (size_t offset : offsets) parameters.push_back(first + offset);
        Launch launch = {function->kernel->name, shape.blocks, shape.threads, shape.shared_bytes,
                         parameters.data(), launches++, shape.overlaps};
        if (context_is_lost()) return CUDA_ERROR_ILLEGAL_ADDRESS;
        return run_kernel(*function, launch);
    }
};

CUresult launch_kernel(void* handle, const LaunchShape& shape, void* stream,
                       void* const* parameters, void* const* extra) {
    return in_context([&] {
        Function* function = find_function(handle);
        if (!function) return refuse(CUDA_ERROR_INVALID_HANDLE, "no such function");
        if (extra) return refuse(CUDA_ERROR_NOT_SUPPORTED, "parameters passed through `extra`");
        if (function->kernel->parameter_count > 0 && !parameters) return CUDA_ERROR_INVALID_VALUE;
        if (CUresult error = check_shape(*function, shape)) return error;
        return submit(stream, {Operation::kernel, [call = KernelCall(*function, shape, parameters)]()
                                                      mutable { return call.run(); }});
    });
}

}  // namespace

bool context_is_lost() { return launches > launches_until_loss(); }

CUresult run_kernel(Function& function, const Launch& launch) {
    const ProgramCopy* program = program_for(function, 0);
    if (!program) return CUDA_ERROR_OPERATING_SYSTEM;
    install_fault_handler();
    const uint3& grid = launch.blocks;
    Job job;
    job.launch = &launch;
    job.blocks = (uint64_t)grid.x * grid.y * grid.z;
    Machine& machine = own_machine();
    machine.prepare(launch, *program);
    auto start = std::chrono::steady_clock::now();
    machine.run_block(job.next.fetch_add(1));
    auto one_block = std::chrono::steady_clock::now() - start;
    // Blocks that share variables of the program must run in the one copy that has them.
    bool help = function.module->variables.empty() && job.blocks > 2 &&
                one_block * (job.blocks - 1) > worth_helping && helpers();
    if (help) helpers()->start(job, function);
    job.work(machine);
    if (help) helpers()->wait();
    return CUDA_SUCCESS;
}

}  // namespace emulator

using namespace emulator;

// CUlaunchAttribute.
struct LaunchAttribute {
    unsigned id;
    alignas(8) int value;
    char more[60];
};

// CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: the launch may start before the kernel
// before it has ended.
constexpr unsigned overlap_attribute = 6;

// CUlaunchConfig.
struct LaunchConfig {
    unsigned blocks_x, blocks_y, blocks_z, threads_x, threads_y, threads_z, shared_bytes;
    void* stream;
    const LaunchAttribute* attributes;
    unsigned attribute_count;
};

EMULATOR_API cuLaunchKernel(void* function, unsigned blocks_x, unsigned blocks_y, unsigned blocks_z,
                            unsigned threads_x, unsigned threads_y, unsigned threads_z,
                            unsigned shared_bytes, void* stream, void** parameters, void** extra) {
    LaunchShape shape = {{blocks_x, blocks_y, blocks_z}, {threads_x, threads_y, threads_z},
                         shared_bytes};
    return launch_kernel(function, shape, stream, parameters, extra);
}

EMULATOR_API cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters,
                              void** extra) {
    if (!config) return CUDA_ERROR_INVALID_VALUE;
    LaunchShape shape = {{config->blocks_x, config->blocks_y, config->blocks_z},
                         {config->threads_x, config->threads_y, config->threads_z},
                         config->shared_bytes};
    for (unsigned i = 0; i < config->attribute_count; ++i) {
        const LaunchAttribute& attribute = config->attributes[i];
        shape.overlaps |= attribute.id == overlap_attribute && attribute.value;
    }
    return launch_kernel(function, shape, config->stream, parameters, extra);
}
