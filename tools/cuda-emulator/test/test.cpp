// Drives the emulated driver through its C API and checks what the kernels of kernels.cu do.

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "api.h"

namespace {

using std::string;
using std::vector;

int failures;
Handle program, stream;

#define CHECK(condition)                                                     \
    do {                                                                     \
        if (!(condition)) {                                                  \
            printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);   \
            ++failures;                                                      \
            return;                                                          \
        }                                                                    \
    } while (0)

#define OK(call)                                                             \
    do {                                                                     \
        if (int error = (call)) {                                            \
            printf("%s:%d: error %d: %s\n", __FILE__, __LINE__, error, #call); \
            exit(1);                                                         \
        }                                                                    \
    } while (0)

template <class T>
struct Device {
    CUdeviceptr address = 0;
    size_t count;

    explicit Device(size_t count) : count(count) { OK(cuMemAlloc_v2(&address, count * sizeof(T))); }
    explicit Device(const vector<T>& values) : Device(values.size()) {
        OK(cuMemcpyHtoD_v2(address, values.data(), count * sizeof(T)));
    }
    Device(const Device&) = delete;
    ~Device() { OK(cuMemFree_v2(address)); }

    vector<T> read() const {
        vector<T> values(count);
        OK(cuMemcpyDtoH_v2(values.data(), address, count * sizeof(T)));
        return values;
    }
};

struct Size {
    unsigned x, y = 1, z = 1;
};

Handle function(const char* name) {
    Handle found;
    OK(cuModuleGetFunction(&found, program, name));
    return found;
}

template <class... Parameters>
int try_launch(const char* name, Size blocks, Size threads, unsigned shared,
               Parameters... parameters) {
    void* pointers[] = {&parameters..., nullptr};
    return cuLaunchKernel(function(name), blocks.x, blocks.y, blocks.z, threads.x, threads.y,
                          threads.z, shared, stream, pointers, nullptr);
}

template <class... Parameters>
void launch(const char* name, Size blocks, Size threads, unsigned shared,
            Parameters... parameters) {
    OK(try_launch(name, blocks, threads, shared, parameters...));
}

void test_barriers_and_static_shared() {
    const unsigned blocks = 500;
    vector<float> x(blocks * 256);
    for (size_t i = 0; i < x.size(); ++i) x[i] = (float)(i % 1000);
    Device<float> in(x), out(blocks);
    launch("block_sums", {blocks}, {256}, 0, in.address, out.address);
    auto sums = out.read();
    for (unsigned b = 0; b < blocks; ++b) {
        float expected = 0;
        for (unsigned i = 0; i < 256; ++i) expected += x[b * 256 + i];
        CHECK(sums[b] == expected);
    }

    Device<int> results(160 * 3);
    launch("barriers", {1}, {160}, 0, results.address);
    auto r = results.read();
    for (int i = 0; i < 160; ++i) CHECK(r[i * 3] == 32 && r[i * 3 + 1] == 1 && r[i * 3 + 2] == 0);

    // Threads run in another order the second time.
    for (int time = 0; time < 2; ++time) {
        Device<int> rotated(96);
        launch("partial_barriers", {1}, {96}, 0, rotated.address);
        auto all = rotated.read();
        for (int i = 0; i < 64; ++i) CHECK(all[i] == (i + 66) % 64);
        for (int i = 64; i < 96; ++i) CHECK(all[i] == (i - 64 + 33) % 64);
    }
}

void test_dynamic_shared() {
    const unsigned threads = 1024, blocks = 300;
    vector<uint32_t> x(threads * blocks);
    for (size_t i = 0; i < x.size(); ++i) x[i] = (uint32_t)i;
    Device<uint32_t> in(x), out(x.size());
    launch("reverse", {blocks}, {threads}, threads * 4, in.address, out.address);
    auto result = out.read();
    for (size_t i = 0; i < x.size(); ++i) {
        CHECK(result[i] == i / threads * threads + threads - 1 - i % threads);
    }
    // Above 48 KiB only for a function that asked for it, and never above 227 KiB.
    CHECK(try_launch("reverse", {1}, {1}, 48 << 10, in.address, out.address) == 0);
    CHECK(try_launch("reverse", {1}, {1}, (48 << 10) + 16, in.address, out.address) == 1);
    CHECK(cuFuncSetAttribute(function("reverse"), 8, 227 << 10) == 0);
    CHECK(try_launch("reverse", {1}, {1}, 227 << 10, in.address, out.address) == 0);
    CHECK(cuFuncSetAttribute(function("reverse"), 8, (227 << 10) + 1) == 1);
    int blocks_per_multiprocessor;
    OK(cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_multiprocessor, function("reverse"),
                                                   256, 100 << 10));
    CHECK(blocks_per_multiprocessor == 2);
}

void test_fresh_memory() {
    Device<uint32_t> out(3 * 64 * 2);
    for (uint32_t word : out.read()) CHECK(word == ~0u);
    launch("fresh_memory", {3}, {64}, 256, out.address);
    for (uint32_t word : out.read()) CHECK(word == ~0u);
}

void test_order_of_threads() {
    Device<uint32_t> out(4 * 64);
    launch("missing_barrier", {4}, {64}, 0, out.address);
    auto results = out.read();
    int unwritten = 0;
    for (uint32_t word : results) unwritten += word == ~0u;
    CHECK(unwritten == 2 * 63);
}

struct WarpResults {
    int rotated, up, down, within8;
    uint32_t ballot, sum, largest, equal;
    float butterfly;
    double wide;
};

void test_warp_operations() {
    Device<WarpResults> out(64);
    launch("warp_operations", {1}, {64}, 0, out.address);
    auto results = out.read();
    for (int i = 0; i < 64; ++i) {
        int lane = i % 32;
        const WarpResults& r = results[(size_t)i];
        CHECK(r.rotated == (lane + 1) % 32 * 10);
        CHECK(r.up == (lane < 3 ? lane : lane - 3));
        CHECK(r.down == (lane > 28 ? lane : lane + 3));
        CHECK(r.within8 == lane / 8 * 8 + 2);
        CHECK(r.ballot == 0x49249249u && r.sum == 496 && r.largest == 0);
        CHECK(r.equal == 15u << lane / 4 * 4);
        CHECK(r.butterfly == 512 && r.wide == 31e100);
    }
    Device<int> halves(32);
    launch("half_warps", {1}, {32}, 0, halves.address);
    auto sums = halves.read();
    for (int i = 0; i < 32; ++i) CHECK(sums[(size_t)i] == (i < 16 ? 1920 : 376));
}

void test_early_exit() {
    for (int count : {1, 31, 33, 100, 256}) {
        Device<int> out(256);
        launch("early_exit", {1}, {256}, 0, out.address, count);
        auto totals = out.read();
        for (int i = 0; i < 256; ++i) CHECK(totals[(size_t)i] == (i < count ? count : -1));
    }
}

void test_indices() {
    Device<uint32_t> hits(3 * 4 * 5 * 7 * 3 * 2);
    OK(cuMemsetD32_v2(hits.address, 0, hits.count));
    launch("indices", {3, 4, 5}, {7, 3, 2}, 0, hits.address);
    for (uint32_t hit : hits.read()) CHECK(hit == 1);
    CHECK(try_launch("indices", {1, 65536}, {32}, 0, hits.address) == 1);
    CHECK(try_launch("indices", {0}, {32}, 0, hits.address) == 1);
    CHECK(try_launch("block_sums", {1}, {512}, 0, hits.address, hits.address) == 701);
}

struct Atomics {
    int sum, smallest, largest;
    uint32_t bits, ticket;
    float total;
    uint64_t wide;
};

void test_atomics() {
    Device<Atomics> device(vector<Atomics>{Atomics{}});
    launch("atomics", {64}, {128}, 0, device.address);
    Atomics a = device.read()[0];
    const int n = 64 * 128;
    CHECK(a.sum == n * (n - 1) / 2 && a.smallest == 1 - n && a.largest == n - 1);
    CHECK(a.bits == 0xfffff && a.ticket == n % 10 && a.total == n * 0.5f);
    CHECK(a.wide == (uint64_t)n << 33);
}

uint16_t half_bits(float x) { return __builtin_bit_cast(uint16_t, (_Float16)x); }

void test_matrices() {
    vector<uint16_t> a(256), b(128);
    vector<float> c(128), expected(128);
    auto value = [](size_t i) { return (float)((int)(i * 37 % 101) - 50) / 64; };
    for (size_t i = 0; i < 256; ++i) a[i] = half_bits(value(i));
    for (size_t i = 0; i < 128; ++i) b[i] = half_bits(value(i + 5));
    for (size_t i = 0; i < 128; ++i) c[i] = value(i * 3);
    for (size_t m = 0; m < 16; ++m) {
        for (size_t n = 0; n < 8; ++n) {
            float sum = c[m * 8 + n];
            for (size_t k = 0; k < 16; ++k) sum += value(m * 16 + k) * value(n * 16 + k + 5);
            expected[m * 8 + n] = sum;
        }
    }
    Device<uint16_t> da(a), db(b);
    Device<float> dc(c);
    launch("multiply", {1}, {32}, 768, da.address, db.address, dc.address);
    // All products and sums are exact: multiples of 2^-12 below 2^12.
    CHECK(dc.read() == expected);

    // The bits below a tf32 number change nothing.
    vector<uint32_t> wide_a(128), wide_b(64);
    auto bits = [&](size_t i) { return __builtin_bit_cast(uint32_t, value(i)) | 0x1fff; };
    for (size_t i = 0; i < 128; ++i) wide_a[i] = bits(i);
    for (size_t i = 0; i < 64; ++i) wide_b[i] = bits(i + 5);
    for (size_t m = 0; m < 16; ++m) {
        for (size_t n = 0; n < 8; ++n) {
            float sum = c[m * 8 + n];
            for (size_t k = 0; k < 8; ++k) sum += value(m * 8 + k) * value(n * 8 + k + 5);
            expected[m * 8 + n] = sum;
        }
    }
    Device<uint32_t> dwa(wide_a), dwb(wide_b);
    Device<float> dwc(c);
    launch("multiply_tf32", {1}, {32}, 0, dwa.address, dwb.address, dwc.address);
    CHECK(dwc.read() == expected);

    vector<uint8_t> bytes_a(512), bytes_b(256);
    for (size_t i = 0; i < 512; ++i) bytes_a[i] = (uint8_t)(i * 37);
    for (size_t i = 0; i < 256; ++i) bytes_b[i] = (uint8_t)(i * 91 + 5);
    for (bool a_is_signed : {true, false}) {
        vector<int> sums(128);
        for (size_t i = 0; i < 128; ++i) sums[i] = (int)i - 64;
        Device<uint8_t> dba(bytes_a), dbb(bytes_b);
        Device<int> dbc(sums);
        for (size_t m = 0; m < 16; ++m) {
            for (size_t n = 0; n < 8; ++n) {
                for (size_t k = 0; k < 32; ++k) {
                    uint8_t byte = bytes_a[m * 32 + k];
                    int factor = a_is_signed ? (int8_t)byte : byte;
                    sums[m * 8 + n] += factor * (int8_t)bytes_b[n * 32 + k];
                }
            }
        }
        launch("multiply_bytes", {1}, {32}, 0, dba.address, dbb.address, dbc.address, a_is_signed);
        CHECK(dbc.read() == sums);
    }

    vector<uint16_t> x(256);
    for (size_t i = 0; i < 256; ++i) x[i] = (uint16_t)i;
    Device<uint16_t> dx(x);
    Device<uint32_t> out(128);
    launch("transposed", {1}, {32}, 512, dx.address, out.address);
    auto result = out.read();
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
        for (uint32_t lane = 0; lane < 32; ++lane) {
            uint32_t g = lane / 4, t = lane % 4;
            uint32_t low = matrix * 64 + 2 * t * 8 + g, high = low + 8;
            CHECK(result[matrix * 32 + lane] == (low | high << 16));
        }
    }
}

void test_async_copies() {
    vector<uint32_t> x(256);
    for (size_t i = 0; i < 256; ++i) x[i] = (uint32_t)i + 1000;
    Device<uint32_t> in(x), out(160);
    launch("async_copies", {1}, {32}, 96 * 16, in.address, out.address);
    auto result = out.read();
    for (uint32_t i = 0; i < 32; ++i) {
        CHECK(result[i] == ~0u);
        CHECK(result[32 + i] == 1000 + 4 * i);
        CHECK(result[64 + i] == ~0u);
        CHECK(result[96 + i] == 1128 + 4 * i);
        CHECK(result[128 + i] == 0);
    }
}

void test_halves() {
    vector<float> x(65536);
    // Values around the middle between halves, and beyond the range.
    for (uint32_t i = 0; i < 65536; ++i) {
        uint32_t bits = i << 16 | (i % 3 == 0 ? 0x1000 : i % 3 == 1 ? 0x0fff : 0x1001);
        x[i] = __builtin_bit_cast(float, bits);
    }
    Device<float> dx(x), wide(65536);
    Device<uint16_t> back(65536);
    Device<uint32_t> fused(65536);
    launch("halves", {256}, {256}, 0, wide.address, back.address, fused.address, dx.address);
    auto w = wide.read();
    auto b = back.read();
    auto f = fused.read();
    for (uint32_t i = 0; i < 65536; ++i) {
        _Float16 half = __builtin_bit_cast(_Float16, (uint16_t)i);
        bool nan = w[i] != w[i];
        CHECK(nan ? half != half : w[i] == (float)half);
        _Float16 rounded = __builtin_bit_cast(_Float16, b[i]);
        CHECK(x[i] == x[i] ? rounded == (_Float16)x[i] : rounded != rounded);
        // In 64 bits of mantissa the product and the sum are exact.
        long double exact = (long double)(float)half * (1 + 1 / 1024.0L) + 0x1p-24L;
        _Float16 expected = (_Float16)exact;
        _Float16 got = __builtin_bit_cast(_Float16, (uint16_t)f[i]);
        CHECK(nan ? got != got : got == expected);
        CHECK(f[i] >> 16 == (f[i] & 0xffff));
    }
}

void test_intrinsics() {
    Device<uint32_t> out(8);
    launch("intrinsics", {1}, {1}, 0, out.address);
    vector<uint32_t> expected = {0x88227711, 12, 8 | 31 << 8 | 4 << 16, 0x80000001, 0x44111122,
                                 0x3fa00000, 2, 3 | 5 << 8};
    CHECK(out.read() == expected);
}

void test_globals() {
    CUdeviceptr counter, settings;
    size_t size;
    OK(cuModuleGetGlobal_v2(&settings, &size, program, "settings"));
    CHECK(size == 16);
    OK(cuModuleGetGlobal_v2(&counter, &size, program, "counter"));
    uint32_t values[4] = {1, 10, 100, 1000}, count;
    OK(cuMemcpyHtoD_v2(settings, values, sizeof values));
    Device<uint32_t> out(8);
    launch("globals", {100}, {8}, 0, out.address);
    OK(cuMemcpyDtoH_v2(&count, counter, 4));
    CHECK(count == 3 + 25 * 1111);
    CHECK(out.read() == (vector<uint32_t>{0, 1, 4, 9, 16, 25, 36, 49}));
}

struct Triple {
    float x, y, z;
};
struct alignas(16) Vector {
    float x, y, z, w;
};

void add(Device<float>& x, float value) {
    launch("add", {1}, {(unsigned)x.count}, 0, x.address, value, Triple{0, 0, 0.25f},
           Vector{0, 0, 0, 0.5f});
}

void test_parameters() {
    const size_t offsets[] = {0, 8, 12, 32}, sizes[] = {8, 4, 12, 16};
    Handle kernel = function("add");
    size_t offset, size;
    for (size_t i = 0; i < 4; ++i) {
        OK(cuFuncGetParamInfo(kernel, i, &offset, &size));
        CHECK(offset == offsets[i] && size == sizes[i]);
    }
    CHECK(cuFuncGetParamInfo(kernel, 4, &offset, &size) == 1);
}

void test_graphs() {
    Device<float> x(vector<float>(8, 0));
    Handle side, fork, join, graph, executable;
    OK(cuStreamCreate(&side, 1));
    OK(cuEventCreate(&fork, 0));
    OK(cuEventCreate(&join, 0));
    OK(cuStreamBeginCapture_v2(stream, 0));
    int capturing;
    OK(cuStreamIsCapturing(stream, &capturing));
    CHECK(capturing == 1);
    add(x, 1);
    // A second stream takes part by waiting for an event of the first.
    OK(cuEventRecord(fork, stream));
    OK(cuStreamWaitEvent(side, fork, 0));
    OK(cuStreamIsCapturing(side, &capturing));
    CHECK(capturing == 1);
    uint32_t two = 0x40000000;
    OK(cuMemcpyHtoDAsync_v2(x.address, &two, 4, side));
    OK(cuEventRecord(join, side));
    OK(cuStreamWaitEvent(stream, join, 0));
    OK(cuMemsetD32Async(x.address + 4, two, 1, stream));
    add(x, 10);
    OK(cuStreamEndCapture(stream, &graph));
    OK(cuStreamIsCapturing(side, &capturing));
    CHECK(capturing == 0);
    size_t nodes;
    OK(cuGraphGetNodes(graph, nullptr, &nodes));
    CHECK(nodes == 4);
    CHECK(x.read() == vector<float>(8, 0));
    OK(cuGraphInstantiateWithFlags(&executable, graph, 0));
    for (int i = 0; i < 2; ++i) OK(cuGraphLaunch(executable, stream));
    float twice = 2 * (1 + 0.75f + 10 + 0.75f);
    CHECK(x.read() == (vector<float>{12.75f, 12.75f, twice, twice, twice, twice, twice, twice}));

    // The executable takes over another graph of the same shape, and refuses a different one.
    Handle other, different;
    OK(cuStreamBeginCapture_v2(stream, 0));
    add(x, 100);
    OK(cuMemcpyHtoDAsync_v2(x.address, &two, 4, stream));
    OK(cuMemsetD32Async(x.address + 4, 0, 1, stream));
    add(x, 0);
    OK(cuStreamEndCapture(stream, &other));
    char info[32];
    OK(cuGraphExecUpdate_v2(executable, other, info));
    OK(cuGraphLaunch(executable, stream));
    CHECK(x.read()[0] == 2.75f && x.read()[1] == 0.75f && x.read()[2] == twice + 101.5f);
    OK(cuStreamBeginCapture_v2(stream, 0));
    add(x, 100);
    OK(cuStreamEndCapture(stream, &different));
    CHECK(cuGraphExecUpdate_v2(executable, different, info) == 910);
    for (Handle g : {graph, other, different}) OK(cuGraphDestroy(g));
    OK(cuGraphExecDestroy(executable));
}

void test_capture_refuses() {
    Handle graph;
    CUdeviceptr p;
    OK(cuStreamBeginCapture_v2(stream, 0));
    CHECK(cuMemAlloc_v2(&p, 16) == 900);
    CHECK(cuStreamEndCapture(stream, &graph) == 901);
    OK(cuStreamBeginCapture_v2(stream, 0));
    CHECK(cuStreamSynchronize(stream) == 900);
    CHECK(cuStreamEndCapture(stream, &graph) == 901);
    OK(cuStreamBeginCapture_v2(stream, 2));
    CHECK(cuMemAlloc_v2(&p, 16) == 0);
    OK(cuStreamEndCapture(stream, &graph));
    OK(cuGraphDestroy(graph));
    OK(cuMemFree_v2(p));
}

void test_memory_limits() {
    size_t free, total, later;
    CUdeviceptr p, q;
    OK(cuMemGetInfo_v2(&free, &total));
    CHECK(total == 512 << 20);
    CHECK(cuMemAlloc_v2(&p, total + 1) == 2);
    CHECK(cuMemAlloc_v2(&p, SIZE_MAX) == 2);
    CHECK(cuMemAlloc_v2(&p, 0) == 1);
    OK(cuMemAlloc_v2(&p, free - (1 << 20)));
    CHECK(cuMemAlloc_v2(&q, 2 << 20) == 2);
    uint32_t word;
    OK(cuMemcpyDtoH_v2(&word, p + (200 << 20), 4));
    CHECK(word == ~0u);
    CHECK(cuMemcpyDtoH_v2(&word, p + free - (1 << 20) - 2, 4) == 1);
    OK(cuMemFree_v2(p));
    CHECK(cuMemFree_v2(p) == 1);
    OK(cuMemGetInfo_v2(&later, &total));
    CHECK(later == free);
    vector<char> host(100);
    OK(cuMemHostRegister_v2(host.data(), 100, 0));
    CHECK(cuMemHostRegister_v2(host.data() + 50, 100, 0) == 712);
    OK(cuMemHostUnregister(host.data()));
    CHECK(cuMemHostUnregister(host.data()) == 713);
}

void test_contexts_are_per_thread() {
    int without = 0;
    std::thread([&] {
        size_t free, total;
        without = cuMemGetInfo_v2(&free, &total);
    }).join();
    CHECK(without == 201);
}

void test_events() {
    Handle first, last;
    OK(cuEventCreate(&first, 0));
    OK(cuEventCreate(&last, 0));
    OK(cuEventRecord(first, stream));
    usleep(2000);
    OK(cuEventRecord(last, stream));
    float milliseconds;
    OK(cuEventElapsedTime_v2(&milliseconds, first, last));
    CHECK(milliseconds >= 2 && milliseconds < 1000);
}

// Runs the body in a child, which must abort with a message that has `expected` in it.
template <class Body>
void check_aborts(const string& expected, Body body) {
    int ends[2];
    CHECK(pipe(ends) == 0);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        body();
        _exit(0);
    }
    close(ends[1]);
    string message;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) message.append(buffer, (size_t)n);
    close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    bool aborted = WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
    if (!aborted || message.find(expected) == string::npos) {
        printf("expected a message with \"%s\", got \"%s\"\n", expected.c_str(), message.c_str());
    }
    CHECK(aborted);
    CHECK(message.find(expected) != string::npos);
}

void test_mistakes_are_found() {
    check_aborts("threads wait at different block barriers", [] {
        launch("divergent_barriers", {1}, {64}, 0);
    });
    Device<uint32_t> out(64);
    check_aborts("no thread can run", [&] { launch("missing_lane", {1}, {32}, 0, out.address); });
    check_aborts("kernel out_of_bounds, block (0, 0, 0), thread (1, 0, 0): illegal address",
                 [&] { launch("out_of_bounds", {1}, {32}, 0, out.address); });
    check_aborts("address is not aligned", [&] { launch("misaligned", {1}, {1}, 0, out.address); });
    check_aborts("shift is as wide", [&] { launch("wide_shift", {1}, {1}, 0, out.address); });
    check_aborts("index is outside of the array", [&] {
        launch("outside_of_array", {1}, {64}, 0, out.address);
    });
    check_aborts("wrote at byte 64 of dynamic shared memory", [] {
        launch("outside_of_shared", {1}, {32}, 64);
    });
    check_aborts("illegal address", [] { launch("outside_of_shared", {1}, {32}, 0); });
    check_aborts("something wrote at byte 20 of an allocation", [] {
        Device<uint32_t> five(5);
        launch("globals", {1}, {8}, 0, five.address);
    });
}

void test_compile_errors() {
    Handle broken;
    OK(nvrtcCreateProgram(&broken, "extern \"C\" __global__ void f() { undefined_name; }",
                          "broken.cu", 0, nullptr, nullptr));
    CHECK(nvrtcCompileProgram(broken, 0, nullptr) == 6);
    size_t size;
    OK(nvrtcGetProgramLogSize(broken, &size));
    string log(size, 0);
    OK(nvrtcGetProgramLog(broken, log.data()));
    CHECK(log.find("broken.cu:1") != string::npos && log.find("undefined_name") != string::npos);
    OK(nvrtcDestroyProgram(&broken));
    Handle module;
    CHECK(cuModuleLoadData(&module, string(100, 'x').data()) == 209);
}

string read_file(const string& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
}

vector<char> compile(const string& folder) {
    string source = read_file(folder + "/kernels.cu"), table = read_file(folder + "/tables.cuh");
    const char* headers[] = {"#error the emulator has its own", table.c_str()};
    const char* names[] = {"ptx.cuh", "tables.cuh"};
    const char* options[] = {"--gpu-architecture=sm_90"};
    Handle handle;
    OK(nvrtcCreateProgram(&handle, source.c_str(), "kernels.cu", 2, headers, names));
    int result = nvrtcCompileProgram(handle, 1, options);
    size_t size;
    OK(nvrtcGetProgramLogSize(handle, &size));
    string log(size, 0);
    OK(nvrtcGetProgramLog(handle, log.data()));
    if (result != 0) {
        printf("%s\n", log.c_str());
        exit(1);
    }
    OK(nvrtcGetCUBINSize(handle, &size));
    vector<char> image(size);
    OK(nvrtcGetCUBIN(handle, image.data()));
    OK(nvrtcDestroyProgram(&handle));
    return image;
}

}  // namespace

int main(int, char** arguments) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    CUdeviceptr p;
    if (cuMemAlloc_v2(&p, 16) != 3) printf("a call before cuInit must fail\n"), ++failures;
    int device, capability;
    Handle context;
    OK(cuInit(0));
    OK(cuDeviceGet(&device, 0));
    OK(cuDeviceGetAttribute(&capability, 75, device));
    if (capability != 9) printf("compute capability %d\n", capability), ++failures;
    OK(cuDevicePrimaryCtxRetain(&context, device));
    OK(cuCtxSetCurrent(context));
    OK(cuStreamCreate(&stream, 1));
    vector<char> image = compile(arguments[1]);
    OK(cuModuleLoadData(&program, image.data()));

    // The children of these must not inherit helper threads, which a fork does not copy.
    test_mistakes_are_found();
    test_barriers_and_static_shared();
    test_dynamic_shared();
    test_fresh_memory();
    test_order_of_threads();
    test_warp_operations();
    test_early_exit();
    test_indices();
    test_atomics();
    test_matrices();
    test_async_copies();
    test_halves();
    test_intrinsics();
    test_globals();
    test_parameters();
    test_graphs();
    test_capture_refuses();
    test_memory_limits();
    test_contexts_are_per_thread();
    test_events();
    test_compile_errors();
    OK(cuCtxSynchronize());
    OK(cuModuleUnload(program));
    printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
    return failures != 0;
}
