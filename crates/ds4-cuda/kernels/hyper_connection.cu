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

// Lane 4·i + j holds the logit of row i, column j; gets the entry of the nearly doubly stochastic
// matrix: softmax of the rows, then alternating column and row normalisation, columns last.
__device__ inline float sinkhorn(float x, const MixConstants& k) {
    auto row_sum = [](float v) {
        v += __shfl_xor_sync(FULL_WARP, v, 1);
        return v + __shfl_xor_sync(FULL_WARP, v, 2);
    };
    auto column_sum = [](float v) {
        v += __shfl_xor_sync(FULL_WARP, v, 4);
        return v + __shfl_xor_sync(FULL_WARP, v, 8);
    };
    float largest = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
    largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 2));
    x = expf(x - largest);
    x = x / row_sum(x) + k.hc_epsilon;
    x /= column_sum(x) + k.hc_epsilon;
    for (int i = 1; i < k.sinkhorn_iterations; ++i) {
        x /= row_sum(x) + k.hc_epsilon;
        x /= column_sum(x) + k.hc_epsilon;
    }
    return x;
}

// One block per row: the input of the next sublayer, RMS-normalised with `norm`, as halves `x`
// and what they leave over, `x_low` [n, hidden]; `post` and `comb` for when it is done (left alone
// where the function has only the first four outputs, before the head). `rows`, if given, are
// those to read; results are dense.
extern "C" __global__ void __launch_bounds__(1024) read_streams(
    const float* streams, const float* sums, int slices, int outputs, MixConstants k,
    const float* norm, float* post, float* comb, u16* x, u16* x_low, int hidden, int first_row,
    const u32* rows
) {
    __shared__ float dots[SUMS], pre[STREAMS], scratch[32];
    launch_dependents();
    wait_for_dependencies();
    int to = first_row + blockIdx.x, row = rows ? rows[to] : to;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    // Lane i of each warp adds up dot product i over some of the slices.
    __shared__ float warp_dots[32][SUMS];
    float part = 0.0f;
    for (int s = warp; s < slices; s += warps) part += sums[((size_t)row * slices + s) * SUMS + lane];
    warp_dots[warp][lane] = part;
    __syncthreads();
    if (warp == 0) {
        float dot = 0.0f;
        for (int w = 0; w < warps; ++w) dot += warp_dots[w][lane];
        float squares = __shfl_sync(FULL_WARP, dot, HC_MIX);
        dots[lane] = dot * (1.0f / sqrtf(squares / (STREAMS * hidden) + k.rms_epsilon));
        __syncwarp();
        if (lane < STREAMS) {
            pre[lane] = sigmoid(dots[lane] * k.scale[0] + k.base[lane]) + k.hc_epsilon;
            if (outputs == HC_MIX) {
                float logit = dots[STREAMS + lane] * k.scale[1] + k.base[STREAMS + lane];
                post[row * STREAMS + lane] = 2.0f * sigmoid(logit);
            }
        }
        if (outputs == HC_MIX) {
            int i = lane % 16, at = 2 * STREAMS + i;
            float entry = sinkhorn(dots[at] * k.scale[2] + k.base[at], k);
            if (lane < 16) comb[row * STREAMS * STREAMS + i] = entry;
        }
    }
    __syncthreads();
    const float* own = streams + (size_t)row * STREAMS * hidden;
    float* h = (float*)dynamic_shared;
    float squares = 0.0f;
    for (int c = threadIdx.x; c < hidden; c += blockDim.x) {
        float v = 0.0f;
        for (int j = 0; j < STREAMS; ++j) v += pre[j] * own[j * hidden + c];
        h[c] = v;
        squares += v * v;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / hidden + k.rms_epsilon);
    for (int c = threadIdx.x; c < hidden; c += blockDim.x) {
        float v = h[c] * scale * norm[c];
        u16 high = float_to_half(v);
        x[(size_t)to * hidden + c] = high;
        x_low[(size_t)to * hidden + c] = float_to_half(v - half_to_float(high));
    }
}
