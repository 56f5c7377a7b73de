// Instructions that CUDA C++ has no plain expression for. Everything else in this folder is
// ordinary C++, so that an emulator only needs its own version of this file.
//
// Half-precision values travel as their bits: u16 for one, u32 for a pair (first in the low half).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;

__device__ inline float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

// Rounds to nearest even.
__device__ inline u16 float_to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

__device__ inline u32 pack_half2(float low, float high) {
    u32 h;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(high), "f"(low));
    return h;
}

__device__ inline float2 unpack_half2(u32 h) {
    return make_float2(half_to_float((u16)h), half_to_float((u16)(h >> 16)));
}

__device__ inline u32 half2_mul(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ inline u32 half2_sub(u32 a, u32 b) {
    u32 d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// a·b + c with one rounding.
__device__ inline u32 half2_fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// The upper half's bits times 1 (`one`, given at run time so that no compiler does it away), in the
// lower half: a shift by the path for products. For bits of finite numbers.
__device__ inline u32 upper_half(u32 x, u32 one) {
    u32 d;
    asm("{.reg .f16 low, high, f; mov.b32 {low, high}, %1; mov.b32 {f, low}, %2;\n"
        "mul.rn.f16 high, high, f; mov.b32 %0, {high, high};}" : "=r"(d) : "r"(x), "r"(one));
    return d;
}

// d += A·B for A [16, 16] and B [16, 8], f16 with f32 sums. With g = lane / 4, t = lane % 4:
// a[0] = A[g][2t, 2t+1], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..], a[3] = A[g+8][2t+8..];
// b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g];
// d[0..1] = D[g][2t, 2t+1], d[2..3] = D[g+8][2t, 2t+1].
__device__ inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Bits of a tf32 number near `x`: 11 bits of significand. Products ignore the bits below.
__device__ inline u32 float_to_tf32(float x) { return (__float_as_uint(x) + 0x1000) & 0xffffe000; }

// d += A·B for A [16, 8] and B [8, 8], tf32 with f32 sums:
// a[0] = A[g][t], a[1] = A[g+8][t], a[2] = A[g][t+4], a[3] = A[g+8][t+4]; b0 = B[t][g],
// b1 = B[t+4][g]; d as above.
__device__ inline void mma_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The reciprocal, to one unit in the last place.
__device__ inline float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The square root, to one unit in the last place; 0 of subnormal numbers.
__device__ inline float fast_sqrt(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// d = A·B.
__device__ inline void mma_from_zero(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%10,%10,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// d += A·B for A [16, 32] and B [32, 8], signed bytes with exact sums: a[0] = A[g][4t … 4t+3],
// a[1] = A[g+8][4t…], a[2] = A[g][4t+16…], a[3] = A[g+8][4t+16…]; b0 = B[4t … 4t+3][g],
// b1 = B[4t+16…][g]; d as above.
__device__ inline void mma_signed(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for unsigned bytes in A.
__device__ inline void mma_unsigned(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += A·B for A [16, 16] of unsigned bytes and B [16, 8] of signed ones: a[0] = A[g][4t … 4t+3],
// a[1] = A[g+8][4t…]; b = B[4t … 4t+3][g]; d as above.
__device__ inline void mma_unsigned_half(int (&d)[4], const u32 (&a)[2], u32 b) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Four bytes out of the eight of `low` and `high`: the low nibbles of `selector`, all below 8, say
// which.
__device__ inline u32 select_bytes(u32 low, u32 high, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
    return d;
}

// The sum of the products of four pairs of bytes, and c.
__device__ inline u32 dot_bytes(u32 a, u32 b, u32 c) {
    u32 d;
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ inline u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Four 8×8 matrices of halves; lane i gives the address of row i % 8 of matrix i / 8, and gets
// elements 2t, 2t+1 of row g of each.
__device__ inline void load_matrix4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}

// The same, each matrix transposed: lane gets elements g of rows 2t and 2t+1.
__device__ inline void load_matrix4_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}

// Starts a copy of 16 bytes to shared memory; zeros where `valid` is false.
__device__ inline void copy_async16(void* to, const void* from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)),
                    "r"(valid ? 16 : 0)
                 : "memory");
}

// The same for 8 bytes.
__device__ inline void copy_async8(void* to, const void* from, bool valid = true) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                 :: "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(valid ? 8 : 0)
                 : "memory");
}

__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `N` of this thread's groups are still under way.
template <int N>
__device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// 16 bytes that are read once: kept out of L1.
__device__ inline uint4 load_once16(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Brings the 128 bytes around `p` to the L2 cache, if they are not there.
__device__ inline void prefetch(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(__cvta_generic_to_global(p)));
}

// The counter before it goes up by one, or from `most` to 0. What the block's threads wrote before
// their last barrier is visible to those who count later, and what others wrote so to this block
// after its next.
__device__ inline u32 atomic_arrive(u32* counter, u32 most) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before) : "l"(__cvta_generic_to_global(counter)), "r"(most) : "memory");
    return before;
}

// A barrier of `threads` threads, whole warps, beside that of the block, which is number 0.
__device__ inline void sync_threads(u32 barrier, u32 threads) {
    asm volatile("barrier.sync %0, %1;" :: "r"(barrier), "r"(threads) : "memory");
}

// Programmatic dependent launch (compute capability 9.0): waits until the kernels this one
// depends on are complete and their writes visible.
__device__ inline void wait_for_dependencies() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets dependent kernels be scheduled as soon as every block has said so or ended.
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
