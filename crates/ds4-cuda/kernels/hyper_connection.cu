// Hyper-connections: how sublayers read and write the four residual streams.
//
// `mix_streams` finishes the sublayer before (its output is spread over the streams) and starts
// the next one: the mixing weights' dot products, in slices of columns. `read_streams` adds the
// slices up, makes the weights, and collapses the streams to the sublayer's normalised input.

#include "common.cuh"

// Columns of a slice; a block has one thread for each stream's column.
#define SLICE 64
// Dot products of a slice, and the sum of squares, padded to a warp.
#define SUMS 32

template <int D>
__device__ inline void halve_sums(float (&v)[SUMS]) {
    bool upper = threadIdx.x & D;
#pragma unroll
    for (int i = 0; i < D; ++i) {
        float keep = upper ? v[i + D] : v[i], give = upper ? v[i] : v[i + D];
        v[i] = keep + __shfl_xor_sync(FULL_WARP, give, D);
    }
}

// The sum of the warp's v[i] in lane i.
__device__ inline float scatter_sums(float (&v)[SUMS]) {
    halve_sums<16>(v);
    halve_sums<8>(v);
    halve_sums<4>(v);
    halve_sums<2>(v);
    halve_sums<1>(v);
    return v[0];
}

// Where the next function's weights are. Mirrors `MixFunction` in src/stages/hyper_connection.rs.
struct MixFunction {
    // [outputs, 4·hidden], halves or floats.
    const void* weights;
    int halves;
    int outputs;
};

// `streams [n, 4, hidden]` become post·y + comb·streams where `y` [n, slots, hidden] (summed over
// slots) is given; `sums [n, slices, 32]` get the dot products with `function` if there is one.
// Grid: (slices, rows in groups of `group`).
extern "C" __global__ void __launch_bounds__(STREAMS * SLICE) mix_streams(
    float* streams, const float* y, int slots, const float* post, const float* comb,
    MixFunction function, float* sums, int hidden, int first_row, int end_row, int group
) {
    __shared__ float old[STREAMS][SLICE], output[STREAMS][SLICE];
    __shared__ float warp_sums[STREAMS * SLICE / WARP][SUMS];
    int stream = threadIdx.x / SLICE, c = threadIdx.x % SLICE;
    int column = blockIdx.x * SLICE + c, width = STREAMS * hidden;
    launch_dependents();
    float w[HC_MIX];
#pragma unroll
    for (int o = 0; o < HC_MIX; ++o) {
        size_t at = (size_t)o * width + stream * hidden + column;
        w[o] = o >= function.outputs ? 0.0f
               : function.halves     ? half_to_float(((const u16*)function.weights)[at])
                                     : ((const float*)function.weights)[at];
    }
    wait_for_dependencies();
    int first = first_row + blockIdx.y * group;
    for (int row = first; row < min(first + group, end_row); ++row) {
        float* own = streams + (size_t)row * width + stream * hidden + column;
        float x = *own;
        if (y) {
            const float* outputs = y + (size_t)row * slots * hidden + column;
            float part = 0.0f;
            for (int s = stream; s < slots; s += STREAMS) part += outputs[(size_t)s * hidden];
            old[stream][c] = x;
            output[stream][c] = part;
            __syncthreads();
            float sum = output[0][c] + output[1][c] + output[2][c] + output[3][c];
            x = post[row * STREAMS + stream] * sum;
            for (int j = 0; j < STREAMS; ++j) {
                x += comb[row * STREAMS * STREAMS + STREAMS * j + stream] * old[j][c];
            }
            *own = x;
        }
        if (function.outputs) {
            float v[SUMS];
#pragma unroll
            for (int o = 0; o < SUMS; ++o) v[o] = o < HC_MIX ? w[o] * x : 0.0f;
            v[HC_MIX] = x * x;
            warp_sums[threadIdx.x / WARP][threadIdx.x % WARP] = scatter_sums(v);
            __syncthreads();
            if (threadIdx.x < SUMS) {
                float sum = 0.0f;
                for (int i = 0; i < STREAMS * SLICE / WARP; ++i) sum += warp_sums[i][threadIdx.x];
                sums[((size_t)row * gridDim.x + blockIdx.x) * SUMS + threadIdx.x] = sum;
            }
        }
        __syncthreads();
    }
}

// What makes weights of dot products. Mirrors `MixConstants` in src/stages/hyper_connection.rs.
struct MixConstants {
    const float* base;
    const float* scale;
    float hc_epsilon;
    float rms_epsilon;
    int sinkhorn_iterations;
};

// One thread: entries 4·i + j of row i and column j, from logits to the nearly doubly stochastic
// matrix: softmax of the rows, then alternating column and row normalisation, columns last.
__device__ inline void sinkhorn(float (&x)[STREAMS * STREAMS], const MixConstants& k) {
    auto normalise = [&](int step, int stride, float epsilon) {
#pragma unroll
        for (int i = 0; i < STREAMS; ++i) {
            float* v = x + i * stride;
            float sum = (v[0] + v[step]) + (v[2 * step] + v[3 * step]);
            float factor = fast_reciprocal(sum + epsilon);
#pragma unroll
            for (int j = 0; j < STREAMS; ++j) v[j * step] *= factor;
        }
    };
#pragma unroll
    for (int i = 0; i < STREAMS; ++i) {
        float* v = x + STREAMS * i;
        float largest = fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3]));
#pragma unroll
        for (int j = 0; j < STREAMS; ++j) v[j] = expf(v[j] - largest);
    }
    normalise(1, STREAMS, 0.0f);
#pragma unroll
    for (int i = 0; i < STREAMS * STREAMS; ++i) x[i] += k.hc_epsilon;
    normalise(STREAMS, 1, k.hc_epsilon);
    for (int i = 1; i < k.sinkhorn_iterations; ++i) {
        normalise(1, STREAMS, k.hc_epsilon);
        normalise(STREAMS, 1, k.hc_epsilon);
    }
}

// What a row's dot products (and, after them, its sum of squares) are multiplied with.
__device__ inline float dots_scale(const float* dots, int hidden, const MixConstants& k) {
    return 1.0f / sqrtf(dots[HC_MIX] / (STREAMS * hidden) + k.rms_epsilon);
}

// The weight of stream `i` in the sublayer's input.
__device__ inline float input_weight(const float* dots, int i, float scale, const MixConstants& k) {
    return sigmoid(dots[i] * scale * k.scale[0] + k.base[i]) + k.hc_epsilon;
}

// One thread: a row's weights for when the sublayer is done.
__device__ inline void output_weights(
    const float* dots, float scale, const MixConstants& k, float* post, float* comb
) {
    for (int i = 0; i < STREAMS; ++i) {
        float logit = dots[STREAMS + i] * scale * k.scale[1] + k.base[STREAMS + i];
        post[i] = 2.0f * sigmoid(logit);
    }
    float x[STREAMS * STREAMS];
#pragma unroll
    for (int i = 0; i < STREAMS * STREAMS; ++i) {
        x[i] = dots[2 * STREAMS + i] * scale * k.scale[2] + k.base[2 * STREAMS + i];
    }
    sinkhorn(x, k);
#pragma unroll
    for (int i = 0; i < STREAMS * STREAMS; ++i) comb[i] = x[i];
}

// The block's row of streams [4, hidden], weighted with `pre`, RMS-normalised with `norm`, as halves
// and what they leave over. `h` has room for a row.
__device__ inline void collapse(
    const float* streams, const float* pre, const float* norm, float epsilon, float* h,
    float* scratch, u16* x, u16* x_low, int hidden
) {
    float squares = 0.0f;
    for (int c = 4 * threadIdx.x; c < hidden; c += 4 * blockDim.x) {
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int j = 0; j < STREAMS; ++j) {
            float4 s = *(const float4*)(streams + (size_t)j * hidden + c);
            v.x += pre[j] * s.x;
            v.y += pre[j] * s.y;
            v.z += pre[j] * s.z;
            v.w += pre[j] * s.w;
        }
        *(float4*)(h + c) = v;
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / hidden + epsilon);
    for (int c = 4 * threadIdx.x; c < hidden; c += 4 * blockDim.x) {
        float4 v = *(const float4*)(h + c), w = *(const float4*)(norm + c);
        v = make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
        uint2 high = make_uint2(pack_half2(v.x, v.y), pack_half2(v.z, v.w));
        float2 a = unpack_half2(high.x), b = unpack_half2(high.y);
        *(uint2*)(x + c) = high;
        *(uint2*)(x_low + c) =
            make_uint2(pack_half2(v.x - a.x, v.y - a.y), pack_half2(v.z - b.x, v.w - b.y));
    }
}

// A row's sublayer input `x` and `x_low` [n, hidden] by the blocks with y = 0; `post` and `comb` for
// when it is done by those with y = 1 (there are none where the function has only the first four
// outputs, before the head). `rows`, if given, are those to read; results are dense.
extern "C" __global__ void __launch_bounds__(512) read_streams(
    const float* streams, const float* sums, int slices, MixConstants k, const float* norm,
    float* post, float* comb, u16* x, u16* x_low, int hidden, int first_row, const u32* rows
) {
    __shared__ float warp_dots[16][SUMS], dots[SUMS], scratch[16];
    launch_dependents();
    wait_for_dependencies();
    int to = first_row + blockIdx.x, row = rows ? rows[to] : to;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    // Lane i of each warp adds up dot product i over some of the slices.
    float part = 0.0f;
    for (int s = warp; s < slices; s += warps) part += sums[((size_t)row * slices + s) * SUMS + lane];
    warp_dots[warp][lane] = part;
    __syncthreads();
    if (warp == 0) {
        float dot = 0.0f;
        for (int w = 0; w < warps; ++w) dot += warp_dots[w][lane];
        dots[lane] = dot;
    }
    __syncthreads();
    float scale = dots_scale(dots, hidden, k);
    if (blockIdx.y == 1) {
        if (threadIdx.x > 0) return;
        output_weights(dots, scale, k, post + row * STREAMS, comb + row * STREAMS * STREAMS);
        return;
    }
    float pre[STREAMS];
#pragma unroll
    for (int j = 0; j < STREAMS; ++j) pre[j] = input_weight(dots, j, scale, k);
    size_t at = (size_t)to * hidden;
    collapse(streams + (size_t)row * STREAMS * hidden, pre, norm, k.rms_epsilon,
             (float*)dynamic_shared, scratch, x + at, x_low + at, hidden);
}

// ---- Many rows: both in one ---------------------------------------------------------------------

#define MANY_WARPS 8
// Rows of a block: those of a product instruction.
#define MANY_ROWS 8

// Four weights as tf32; what F32 ones have beyond that is in `low`.
template <bool HALVES>
struct FunctionWeights {
    u32 high[4], low[4];

    __device__ inline void load(const void* weights, size_t at) {
        if (HALVES) {
            uint2 h = *(const uint2*)((const u16*)weights + at);
            float2 a = unpack_half2(h.x), b = unpack_half2(h.y);
            high[0] = __float_as_uint(a.x);
            high[1] = __float_as_uint(a.y);
            high[2] = __float_as_uint(b.x);
            high[3] = __float_as_uint(b.y);
        } else {
            float4 f = *(const float4*)((const float*)weights + at);
            float v[] = {f.x, f.y, f.z, f.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                high[i] = float_to_tf32(v[i]);
                low[i] = float_to_tf32(v[i] - __uint_as_float(high[i]));
            }
        }
    }
};

// Four columns' part of the dot products of eight rows; lane (g, t) holds columns 4t … of row g.
template <bool HALVES>
__device__ inline void add_dots(
    float (&low_outputs)[4], float (&high_outputs)[4], const void* weights, size_t at, size_t width,
    const float (&x)[4]
) {
    int g = threadIdx.x % WARP / 4;
    FunctionWeights<HALVES> w[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) w[i].load(weights, (8 * i + g) * width + at);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 h0 = float_to_tf32(x[i]), h1 = float_to_tf32(x[i + 1]);
        u32 l0 = float_to_tf32(x[i] - __uint_as_float(h0));
        u32 l1 = float_to_tf32(x[i + 1] - __uint_as_float(h1));
        u32 a[4] = {w[0].high[i], w[1].high[i], w[0].high[i + 1], w[1].high[i + 1]};
        u32 b[4] = {w[2].high[i], 0, w[2].high[i + 1], 0};
        mma_tf32(low_outputs, a, l0, l1);
        mma_tf32(high_outputs, b, l0, l1);
        mma_tf32(low_outputs, a, h0, h1);
        mma_tf32(high_outputs, b, h0, h1);
        if (!HALVES) {
            u32 c[4] = {w[0].low[i], w[1].low[i], w[0].low[i + 1], w[1].low[i + 1]};
            u32 d[4] = {w[2].low[i], 0, w[2].low[i + 1], 0};
            mma_tf32(low_outputs, c, h0, h1);
            mma_tf32(high_outputs, d, h0, h1);
        }
    }
}

__device__ inline void add4(float4& sum, float factor, float4 v) {
    sum.x += factor * v.x;
    sum.y += factor * v.y;
    sum.z += factor * v.z;
    sum.w += factor * v.w;
}

// Finishes the sublayer before for a warp's share of the columns of eight rows, and leaves its share
// of their dot products and squares in `dots`.
template <bool HALVES>
__device__ inline void mix_columns(
    float* streams, const float* y, int slots, const float* post, const float* comb,
    const void* weights, int hidden, int row, bool valid, float (&dots)[MANY_ROWS][SUMS]
) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    float own_post[STREAMS], own_comb[STREAMS * STREAMS], squares = 0.0f;
    float low_sums[4] = {0.0f, 0.0f, 0.0f, 0.0f}, high_sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (y) {
#pragma unroll
        for (int i = 0; i < STREAMS; ++i) own_post[i] = post[row * STREAMS + i];
#pragma unroll
        for (int i = 0; i < STREAMS * STREAMS; ++i) {
            own_comb[i] = comb[row * STREAMS * STREAMS + i];
        }
    }
    float* own = streams + (size_t)row * STREAMS * hidden;
    const float* outputs = y + (size_t)row * slots * hidden;
    for (int c = 16 * warp + 4 * t; c < hidden; c += 16 * MANY_WARPS) {
        float4 x[STREAMS];
#pragma unroll
        for (int j = 0; j < STREAMS; ++j) x[j] = *(const float4*)(own + (size_t)j * hidden + c);
        if (y) {
            float4 output = make_float4(0.0f, 0.0f, 0.0f, 0.0f), old[STREAMS];
#pragma unroll 7
            for (int s = 0; s < slots; ++s) {
                add4(output, 1.0f, *(const float4*)(outputs + (size_t)s * hidden + c));
            }
#pragma unroll
            for (int j = 0; j < STREAMS; ++j) old[j] = x[j];
#pragma unroll
            for (int i = 0; i < STREAMS; ++i) {
                x[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                add4(x[i], own_post[i], output);
#pragma unroll
                for (int j = 0; j < STREAMS; ++j) add4(x[i], own_comb[STREAMS * j + i], old[j]);
                if (valid) *(float4*)(own + (size_t)i * hidden + c) = x[i];
            }
        }
        // Sums of a few columns, added up outside of the matrix units, which don't round.
        float low[4] = {0.0f, 0.0f, 0.0f, 0.0f}, high[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < STREAMS; ++i) {
            float v[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
            squares += v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
            size_t at = (size_t)i * hidden + c;
            add_dots<HALVES>(low, high, weights, at, (size_t)STREAMS * hidden, v);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            low_sums[i] += low[i];
            high_sums[i] += high[i];
        }
    }
    squares += __shfl_xor_sync(FULL_WARP, squares, 1);
    squares += __shfl_xor_sync(FULL_WARP, squares, 2);
    if (t == 0) dots[g][HC_MIX] = squares;
#pragma unroll
    for (int i = 0; i < 4; ++i) dots[2 * t + i % 2][g + i / 2 * 8] = low_sums[i];
    dots[2 * t][g + 16] = high_sums[0];
    dots[2 * t + 1][g + 16] = high_sums[1];
}

// What `mix_streams` and `read_streams` do, with all 24 outputs, for rows `first_row` to `end_row`:
// a block has eight of them from end to end. A row's results do not depend on the rows beside it.
extern "C" __global__ void __launch_bounds__(MANY_WARPS * WARP, 2) mix_and_read(
    float* streams, const float* y, int slots, float* post, float* comb, MixFunction function,
    MixConstants k, const float* norm, u16* x, u16* x_low, int hidden, int first_row, int end_row
) {
    __shared__ float warp_dots[MANY_WARPS][MANY_ROWS][SUMS], dots[MANY_ROWS][SUMS];
    __shared__ float scratch[MANY_WARPS];
    launch_dependents();
    wait_for_dependencies();
    int first = first_row + blockIdx.x * MANY_ROWS, count = min(MANY_ROWS, end_row - first);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // Lanes without a row repeat the last one and write nothing.
    int row = first + min(lane / 4, count - 1);
    bool valid = lane / 4 < count;
    const void* weights = function.weights;
    if (function.halves) {
        mix_columns<true>(
            streams, y, slots, post, comb, weights, hidden, row, valid, warp_dots[warp]);
    } else {
        mix_columns<false>(
            streams, y, slots, post, comb, weights, hidden, row, valid, warp_dots[warp]);
    }
    __syncthreads();
    if (lane <= HC_MIX) {
        float dot = 0.0f;
        for (int w = 0; w < MANY_WARPS; ++w) dot += warp_dots[w][warp][lane];
        dots[warp][lane] = dot;
    }
    __syncthreads();
    for (int r = 0; r < count; ++r) {
        float scale = dots_scale(dots[r], hidden, k), pre[STREAMS];
#pragma unroll
        for (int j = 0; j < STREAMS; ++j) pre[j] = input_weight(dots[r], j, scale, k);
        size_t at = (size_t)(first + r) * hidden;
        collapse(streams + STREAMS * at, pre, norm, k.rms_epsilon, (float*)dynamic_shared, scratch,
                 x + at, x_low + at, hidden);
    }
    if ((int)threadIdx.x < count) {
        int r = threadIdx.x, own = first + r;
        float scale = dots_scale(dots[r], hidden, k);
        output_weights(dots[r], scale, k, post + own * STREAMS, comb + own * STREAMS * STREAMS);
    }
}
