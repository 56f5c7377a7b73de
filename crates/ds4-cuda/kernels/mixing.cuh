// From the dot products of hyper-connections to weights, and from the streams to a sublayer's
// input, for the two ways to read streams in hyper_connection.cu.
#pragma once

#include "common.cuh"

#define MIX_WARPS (MIX_THREADS / WARP)
// Dot products that a warp makes of a slice.
#define WARP_OUTPUTS (HC_MIX / MIX_WARPS)

// Where the next function's weights are.
struct MixFunction {
    // [outputs, 4·hidden], halves or floats.
    const void* weights;
    int halves;
    int outputs;
};
SAME_IN_RUST(MixFunction);

// What makes weights of dot products.
struct MixConstants {
    const float* base;
    const float* scale;
    float hc_epsilon;
    float rms_epsilon;
    int sinkhorn_iterations;
};
SAME_IN_RUST(MixConstants);

// ---- From dot products to weights ---------------------------------------------------------------

// What makes a logit of a lane's dot product; nothing beyond the outputs.
struct LaneOutput {
    float base, scale;

    __device__ inline LaneOutput(const MixConstants& k, int outputs) {
        int o = threadIdx.x % WARP;
        base = o < outputs ? k.base[o] : 0.0f;
        scale = o < outputs ? k.scale[min(o / STREAMS, 2)] : 0.0f;
    }

    // Lane HC_MIX has the sum of squares in the place of a dot product.
    __device__ inline float logit(float dot, int hidden, const MixConstants& k) const {
        float squares = __shfl_sync(FULL_WARP, dot, HC_MIX);
        return dot * (1.0f / sqrtf(squares / (STREAMS * hidden) + k.rms_epsilon)) * scale + base;
    }
};

// The streams' weights in the sublayer's input, in every lane.
__device__ inline void input_weights(float logit, const MixConstants& k, float (&pre)[STREAMS]) {
    float weight = sigmoid(logit) + k.hc_epsilon;
#pragma unroll
    for (int j = 0; j < STREAMS; ++j) pre[j] = __shfl_sync(FULL_WARP, weight, j);
}

// Entries 4·i + j of row i and column j, from logits to the nearly doubly stochastic matrix:
// softmax of the rows, then alternating column and row normalisation, columns last.
//
// Rows and columns get factors, and entries are multiplied with them at the end: what counts here
// is how long one step waits for another.
__device__ inline void sinkhorn(float (&x)[STREAMS * STREAMS], const MixConstants& k) {
#pragma unroll
    for (int i = 0; i < STREAMS; ++i) {
        float* v = x + STREAMS * i;
        float largest = fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3]));
#pragma unroll
        for (int j = 0; j < STREAMS; ++j) v[j] = expf(v[j] - largest);
        float factor = fast_reciprocal((v[0] + v[1]) + (v[2] + v[3]));
#pragma unroll
        for (int j = 0; j < STREAMS; ++j) v[j] = v[j] * factor + k.hc_epsilon;
    }
    float rows[STREAMS] = {1.0f, 1.0f, 1.0f, 1.0f}, columns[STREAMS] = {1.0f, 1.0f, 1.0f, 1.0f};
    // `epsilon` is in proportion to how much too large the rows are.
    auto normalise_columns = [&](float epsilon) {
#pragma unroll
        for (int j = 0; j < STREAMS; ++j) {
            float low = x[j] * rows[0] + x[STREAMS + j] * rows[1];
            float high = x[2 * STREAMS + j] * rows[2] + x[3 * STREAMS + j] * rows[3];
            columns[j] *= fast_reciprocal(columns[j] * (low + high) + epsilon);
        }
    };
    normalise_columns(k.hc_epsilon);
#pragma unroll 1
    for (int n = 1; n < k.sinkhorn_iterations; ++n) {
        // Rows times all other rows' sums, instead of over their own: the columns' normalisation
        // takes care of the factor that is common to all, and a division's latency is saved.
        float sums[STREAMS];
#pragma unroll
        for (int i = 0; i < STREAMS; ++i) {
            const float* v = x + STREAMS * i;
            float sum = v[0] * columns[0];
#pragma unroll
            for (int j = 1; j < STREAMS; ++j) sum += v[j] * columns[j];
            sums[i] = rows[i] * sum + k.hc_epsilon;
        }
        float first = sums[0] * sums[1], last = sums[2] * sums[3];
        rows[0] *= sums[1] * last;
        rows[1] *= sums[0] * last;
        rows[2] *= first * sums[3];
        rows[3] *= first * sums[2];
        normalise_columns(first * last * k.hc_epsilon);
    }
#pragma unroll
    for (int i = 0; i < STREAMS * STREAMS; ++i) x[i] *= rows[i / STREAMS] * columns[i % STREAMS];
}

// One warp: a row's weights for when the sublayer is done.
__device__ inline void output_weights(
    float logit, const MixConstants& k, float* post, float* comb
) {
    int o = threadIdx.x % WARP;
    if (o >= STREAMS && o < 2 * STREAMS) post[o - STREAMS] = 2.0f * sigmoid(logit);
    float x[STREAMS * STREAMS];
#pragma unroll
    for (int i = 0; i < STREAMS * STREAMS; ++i) {
        x[i] = __shfl_sync(FULL_WARP, logit, 2 * STREAMS + i);
    }
    sinkhorn(x, k);
    if (o > 0) return;
#pragma unroll
    for (int i = 0; i < STREAMS; ++i) {
        const float* v = x + STREAMS * i;
        ((float4*)comb)[i] = make_float4(v[0], v[1], v[2], v[3]);
    }
}

// ---- From streams to the sublayer's input -------------------------------------------------------

// Fragments of four columns that a thread reads at once, and their columns in all threads.
#define FRAGMENTS 4
#define FRAGMENT_COLUMNS (4 * MIX_THREADS)

__device__ inline void add4(float4& sum, float factor, float4 v) {
    sum.x += factor * v.x;
    sum.y += factor * v.y;
    sum.z += factor * v.z;
    sum.w += factor * v.w;
}

// A thread's share of a row of streams [4, hidden], from some column on.
struct Fragments {
    float4 at[FRAGMENTS][STREAMS];

    __device__ inline void load(const float* streams, int first, int hidden) {
#pragma unroll
        for (int p = 0; p < FRAGMENTS; ++p) {
            int c = first + p * FRAGMENT_COLUMNS + 4 * threadIdx.x;
#pragma unroll
            for (int j = 0; j < STREAMS; ++j) {
                at[p][j] = c < hidden ? *(const float4*)(streams + (size_t)j * hidden + c)
                                      : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
        }
    }
};

// Where a row's collapsed streams go: halves, and what they leave over.
struct RowInput {
    u16* x;
    u16* low;
};

// A thread's share of a norm's weights.
struct NormFragments {
    float4 at[FRAGMENTS];

    __device__ inline void load(const float* norm, int first, int hidden) {
#pragma unroll
        for (int p = 0; p < FRAGMENTS; ++p) {
            int c = first + p * FRAGMENT_COLUMNS + 4 * threadIdx.x;
            if (c < hidden) at[p] = *(const float4*)(norm + c);
        }
    }
};

// The row of streams [4, hidden], weighted with `pre` and RMS-normalised with `norm`. For the first
// MIX_THREADS threads; `fragments` begin at column 0, `h` has room for a row, and `scratch`
// for the warps' sums until the next call but one.
__device__ inline void collapse(
    Fragments& fragments, const float* streams, const float (&pre)[STREAMS], const float* norm,
    float epsilon, float* h, float* scratch, RowInput to, int hidden
) {
    float squares = 0.0f;
#pragma unroll 1
    for (int first = 0; first < hidden; first += FRAGMENTS * FRAGMENT_COLUMNS) {
        if (first > 0) fragments.load(streams, first, hidden);
#pragma unroll
        for (int p = 0; p < FRAGMENTS; ++p) {
            float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int j = 0; j < STREAMS; ++j) add4(v, pre[j], fragments.at[p][j]);
            squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            int c = first + p * FRAGMENT_COLUMNS + 4 * threadIdx.x;
            if (c < hidden) *(float4*)(h + c) = v;
        }
    }
    NormFragments norms;
    norms.load(norm, 0, hidden);
    squares = warp_sum(squares);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = squares;
    sync_threads(1, MIX_THREADS);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < MIX_WARPS; ++w) sum += scratch[w];
    float scale = 1.0f / sqrtf(sum / hidden + epsilon);
#pragma unroll 1
    for (int first = 0; first < hidden; first += FRAGMENTS * FRAGMENT_COLUMNS) {
        if (first > 0) norms.load(norm, first, hidden);
#pragma unroll
        for (int p = 0; p < FRAGMENTS; ++p) {
            int c = first + p * FRAGMENT_COLUMNS + 4 * threadIdx.x;
            if (c >= hidden) break;
            float4 v = *(const float4*)(h + c), w = norms.at[p];
            v = make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z,
                            v.w * scale * w.w);
            uint2 high = make_uint2(pack_half2(v.x, v.y), pack_half2(v.z, v.w));
            float2 a = unpack_half2(high.x), b = unpack_half2(high.y);
            *(uint2*)(to.x + c) = high;
            *(uint2*)(to.low + c) =
                make_uint2(pack_half2(v.x - a.x, v.y - a.y), pack_half2(v.z - b.x, v.w - b.y));
        }
    }
}
