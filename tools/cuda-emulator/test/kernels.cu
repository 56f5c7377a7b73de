// Kernels that test.cpp runs; each uses one part of what the emulator provides.
#include "ptx.cuh"
#include "tables.cuh"

#define FULL 0xffffffffu

extern __shared__ uint4 dynamic_shared[];

// out[block] = sum of the block's part of x, by a tree in static shared memory.
extern "C" __global__ void __launch_bounds__(256) block_sums(const float* x, float* out) {
    __shared__ float part[256];
    part[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    for (int step = blockDim.x / 2; step > 0; step /= 2) {
        if (threadIdx.x < step) part[threadIdx.x] += part[threadIdx.x + step];
        __syncthreads();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

// Reverses each block's part through dynamic shared memory.
extern "C" __global__ void reverse(const u32* x, u32* out) {
    u32* shared = (u32*)dynamic_shared;
    u32 first = blockIdx.x * blockDim.x;
    shared[threadIdx.x] = x[first + threadIdx.x];
    __syncthreads();
    out[first + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// What a block finds in shared memory that it has not written.
template <int N>
__device__ u32 unwritten() {
    __shared__ u32 fresh[N];
    u32 found = fresh[threadIdx.x];
    fresh[threadIdx.x] = 7;
    return found;
}

extern "C" __global__ void fresh_memory(u32* out) {
    out[(blockIdx.x * blockDim.x + threadIdx.x) * 2] = unwritten<64>();
    u32* shared = (u32*)dynamic_shared;
    out[(blockIdx.x * blockDim.x + threadIdx.x) * 2 + 1] = shared[threadIdx.x];
    shared[threadIdx.x] = 7;
}

struct WarpResults {
    int rotated, up, down, within8;
    u32 ballot, sum, largest, equal;
    float butterfly;
    double wide;
};

extern "C" __global__ void warp_operations(WarpResults* out) {
    int lane = threadIdx.x % 32;
    WarpResults r;
    r.rotated = __shfl_sync(FULL, lane * 10, (lane + 1) % 32);
    r.up = __shfl_up_sync(FULL, lane, 3);
    r.down = __shfl_down_sync(FULL, lane, 3);
    r.within8 = __shfl_sync(FULL, lane, 2, 8);
    r.ballot = __ballot_sync(FULL, lane % 3 == 0);
    r.sum = __reduce_add_sync(FULL, (u32)lane);
    r.largest = __reduce_max_sync(FULL, -lane);
    r.equal = __match_any_sync(FULL, lane / 4);
    r.butterfly = lane + 0.5f;
    for (int d = 16; d > 0; d /= 2) r.butterfly += __shfl_xor_sync(FULL, r.butterfly, d);
    r.wide = __shfl_sync(FULL, 1e100 * lane, 31);
    out[threadIdx.x] = r;
}

// The two halves of a warp sum on their own, one of them twice.
extern "C" __global__ void half_warps(int* out) {
    int lane = threadIdx.x, value = lane;
    if (lane < 16) {
        value = __reduce_add_sync(0xffffu, value);
        value = __reduce_add_sync(0xffffu, value);
    } else {
        value = __reduce_add_sync(0xffff0000u, value);
    }
    __syncwarp();
    out[lane] = value;
}

extern "C" __global__ void barriers(int* out) {
    out[threadIdx.x * 3] = __syncthreads_count(threadIdx.x % 5 == 0);
    out[threadIdx.x * 3 + 1] = __syncthreads_or(threadIdx.x == 77);
    out[threadIdx.x * 3 + 2] = __syncthreads_and(threadIdx.x != 77);
}

// Rotates the values of the first two warps twice, while the third goes on.
extern "C" __global__ void partial_barriers(int* out) {
    __shared__ int values[2][64];
    if (threadIdx.x < 64) {
        int value = threadIdx.x;
        for (int round = 0; round < 2; ++round) {
            values[round][threadIdx.x] = value;
            sync_threads(1, 64);
            value = values[round][(threadIdx.x + 33) % 64];
        }
        out[threadIdx.x] = value;
    }
    __syncthreads();
    if (threadIdx.x >= 64) out[threadIdx.x] = values[1][threadIdx.x - 64];
}

// Threads from `count` on leave; the others still meet at barriers and in warp operations.
extern "C" __global__ void early_exit(int* out, int count) {
    __shared__ int total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    if (threadIdx.x >= count) return;
    int sum = __reduce_add_sync(__activemask(), 1);
    if (threadIdx.x % 32 == 0) atomicAdd(&total, sum);
    __syncthreads();
    out[threadIdx.x] = total;
}

// Dimensions of a launch, and that every block and thread has its own index.
extern "C" __global__ void indices(u32* hits) {
    u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    u32 thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    atomicAdd(&hits[block * blockDim.x * blockDim.y * blockDim.z + thread], 1u);
}

struct Atomics {
    int sum, smallest, largest;
    u32 bits, ticket;
    float total;
    u64 wide;
};

extern "C" __global__ void atomics(Atomics* a) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&a->sum, i);
    atomicMin(&a->smallest, -i);
    atomicMax(&a->largest, i);
    atomicOr(&a->bits, 1u << i % 20);
    atomicInc(&a->ticket, 9);
    atomicAdd(&a->total, 0.5f);
    atomicAdd(&a->wide, 1ull << 33);
}

// One warp: out = a·b + out for a [16, 16] by rows, b [16, 8] by columns; operands through
// shared memory.
extern "C" __global__ void multiply(const u16* a, const u16* b, float* out) {
    u16* shared = (u16*)dynamic_shared;
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 256; i += 32) shared[i] = a[i];
    for (int i = lane; i < 128; i += 32) shared[256 + i] = b[i];
    __syncwarp();
    // Matrices of A in the order of its fragments: rows 0, rows 8, then columns from 8.
    u32 fragment[4], columns[4];
    load_matrix4(fragment, shared + (lane % 16) * 16 + lane / 16 * 8);
    // The two halves of B's columns, twice.
    load_matrix4(columns, shared + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
    float d[4] = {out[g * 8 + 2 * t], out[g * 8 + 2 * t + 1], out[g * 8 + 64 + 2 * t],
                  out[g * 8 + 64 + 2 * t + 1]};
    mma(d, fragment, columns[0], columns[1]);
    out[g * 8 + 2 * t] = d[0], out[g * 8 + 2 * t + 1] = d[1];
    out[g * 8 + 64 + 2 * t] = d[2], out[g * 8 + 64 + 2 * t + 1] = d[3];
}

// One warp: out = a·b + out for a [16, 8] by rows, b [8, 8] by columns, of tf32.
extern "C" __global__ void multiply_tf32(const u32* a, const u32* b, float* out) {
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    u32 fragment[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
    float* low = out + g * 8 + 2 * t;
    float d[4] = {low[0], low[1], low[64], low[65]};
    mma_tf32(d, fragment, b[g * 8 + t], b[g * 8 + t + 4]);
    low[0] = d[0], low[1] = d[1], low[64] = d[2], low[65] = d[3];
}

// One warp: out = a·b + out for a [16, 32] by rows, b [32, 8] by columns, of bytes.
extern "C" __global__ void multiply_bytes(const u32* a, const u32* b, int* out, bool a_is_signed) {
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    u32 fragment[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
    int* low = out + g * 8 + 2 * t;
    int d[4] = {low[0], low[1], low[64], low[65]};
    if (a_is_signed) {
        mma_signed(d, fragment, b[g * 8 + t], b[g * 8 + t + 4]);
    } else {
        mma_unsigned(d, fragment, b[g * 8 + t], b[g * 8 + t + 4]);
    }
    low[0] = d[0], low[1] = d[1], low[64] = d[2], low[65] = d[3];
}

// Four 8×8 matrices of halves as ldmatrix.trans gives them.
extern "C" __global__ void transposed(const u16* x, u32* out) {
    u16* shared = (u16*)dynamic_shared;
    for (int i = threadIdx.x; i < 256; i += 32) shared[i] = x[i];
    __syncwarp();
    u32 r[4];
    load_matrix4_transposed(r, shared + threadIdx.x * 8);
    for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = r[i];
}

// Two groups of asynchronous copies; reads after the first, after the second, and a zero fill.
extern "C" __global__ void async_copies(const uint4* x, u32* out) {
    dynamic_shared[threadIdx.x + 64] = make_uint4(5, 5, 5, 5);
    copy_async16(&dynamic_shared[threadIdx.x], x + threadIdx.x);
    copy_async_commit();
    copy_async16(&dynamic_shared[threadIdx.x + 32], x + threadIdx.x + 32);
    copy_async16(&dynamic_shared[threadIdx.x + 64], x, false);
    copy_async_commit();
    out[threadIdx.x] = dynamic_shared[threadIdx.x].x;
    copy_async_wait<1>();
    out[32 + threadIdx.x] = dynamic_shared[threadIdx.x].x;
    out[64 + threadIdx.x] = dynamic_shared[threadIdx.x + 32].x;
    copy_async_wait<0>();
    out[96 + threadIdx.x] = dynamic_shared[threadIdx.x + 32].x;
    out[128 + threadIdx.x] = dynamic_shared[threadIdx.x + 64].w;
}

// All 65536 halves to float and back, and products with one rounding.
extern "C" __global__ void halves(float* wide, u16* back, u32* fused, const float* x) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    wide[i] = half_to_float((u16)i);
    back[i] = float_to_half(x[i]);
    fused[i] = half2_fma(i | i << 16, 0x3c013c01u, 0x00010001u);
}

extern "C" __global__ void intrinsics(u32* out) {
    out[0] = __byte_perm(0x44332211u, 0x88776655u, 0x7160u);
    out[1] = (u32)__dp4a((int)0xff02fd04u, 0x01010101, 10);
    out[2] = __popc(0xf0f0u) | __clz(1) << 8 | __ffs(8) << 16;
    out[3] = __brev(0x80000001u);
    out[4] = __funnelshift_r(0x11112222u, 0x33334444u, 8);
    out[5] = __float_as_uint(__saturatef(1.5f) + __fdividef(1.0f, 4.0f));
    out[6] = (u32)__float2int_rn(2.5f) | (u32)__float2int_rz(-0.5f) << 8;
    out[7] = (u32)max(-1, 3) | (u32)min(5u, 9u) << 8;
}

__device__ u32 counter = 3;
__constant__ u32 settings[4];

extern "C" __global__ void globals(u32* out) {
    if (threadIdx.x == 0) atomicAdd(&counter, settings[blockIdx.x % 4]);
    if (blockIdx.x == 0) out[threadIdx.x] = squares[threadIdx.x];
}

struct Triple {
    float x, y, z;
};

extern "C" __global__ void add(float* x, float value, Triple triple, const float4 vector) {
    x[threadIdx.x] += value + triple.z + vector.w;
}

// Wrong on purpose.
extern "C" __global__ void divergent_barriers() {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

extern "C" __global__ void missing_lane(u32* out) {
    if (threadIdx.x != 5) out[threadIdx.x] = __shfl_sync(FULL, 1u, 0);
    __syncthreads();
}

extern "C" __global__ void out_of_bounds(u32* out) { out[threadIdx.x * 4096] = 1; }

extern "C" __global__ void misaligned(u32* x) { ((u64*)(x + 1))[threadIdx.x] = 1; }

extern "C" __global__ void outside_of_array(u32* x) {
    __shared__ u32 part[32];
    part[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void wide_shift(u32* x) { x[0] = 1u << x[0]; }

// Right only if thread 0 runs before the others.
extern "C" __global__ void missing_barrier(u32* out) {
    __shared__ u32 first;
    if (threadIdx.x == 0) first = 1;
    out[blockIdx.x * blockDim.x + threadIdx.x] = first;
}

extern "C" __global__ void outside_of_shared() { ((u32*)dynamic_shared)[threadIdx.x] = 1; }
