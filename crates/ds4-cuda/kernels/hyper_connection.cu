// Hyper-connections: how sublayers read and write the four residual streams.
//
//   streams[i] = post[i] · Σ_slots y + Σ_j comb[j][i] · streams[j]       (the sublayer before)
//   logit = scale · (weights · streams / rms(streams)) + base           (24 of them)
//   pre = sigmoid(logit) + epsilon, post = 2 · sigmoid(logit), comb = Sinkhorn(logit)
//   x = norm(Σ_j pre[j] · streams[j])
//
// Inputs: streams f32 [n, 4, hidden]; the pending output y f32 [n, slots, hidden]; post [n, 4] and
// comb [n, 4, 4].
// Outputs: streams, post and comb anew; x as two halves [n, hidden].
// Plain Rust: `pre`, `post` and `head` in crates/ds4-cpu/src/hyper_connection.rs.
//
// Decoding: blocks share a row's columns, as in split-K.
//
// `read_by_slices` is for few rows: the last block to arrive goes on alone.
// Grid: (blocks that share a row's slices, rows). Block: 288 threads.
//
// `mix_slices` has several rows a block, so that weights are read less often.
// Grid: (blocks that share the slices, rows / 4). Block: 256 threads.
//
// `collapse_rows` goes on after it.
// Grid: (rows). Block: 288 threads.
//
// Prefill: `read_by_rows` has a block for eight rows.
// Grid: (rows / 8). Block: 256 threads.

#include "mixing.cuh"

// ---- Decoding: blocks share a row ---------------------------------------------------------------

// A row's streams [4, hidden], the pending output's parts [slots, hidden] if there is one, and the
// weights with which that is spread.
struct MixedRow {
    float* streams;
    const float* y;
    int slots;
    const float* post;
    const float* comb;

    // Where a thread's column of a slice is in its stream.
    __device__ inline float* own(int slice, int hidden) const {
        size_t stream = threadIdx.x / SLICE;
        return streams + stream * hidden + slice * SLICE + threadIdx.x % SLICE;
    }
};

// Streams of a slice, on their way from threads that mix to warps that multiply.
struct SliceStreams {
    float old[STREAMS][SLICE], output[STREAMS][SLICE];
    // Read in pairs.
    alignas(8) float mixed[STREAMS][SLICE];
};

// A thread's share of a slice: its column of its stream, and every fourth part of the output.
// Nothing waits for what is loaded before it is used.
struct SliceInputs {
    float x, first, second, others;

    __device__ inline void load(const MixedRow& row, int slice, int hidden) {
        int stream = threadIdx.x / SLICE, next = stream + STREAMS;
        x = *row.own(slice, hidden);
        first = second = others = 0.0f;
        if (!row.y) return;
        const float* parts = row.y + slice * SLICE + threadIdx.x % SLICE;
        if (stream < row.slots) first = parts[(size_t)stream * hidden];
        if (next < row.slots) second = parts[(size_t)next * hidden];
        if (row.slots <= 2 * STREAMS) return;
#pragma unroll 1
        for (int s = next + STREAMS; s < row.slots; s += STREAMS) {
            others += parts[(size_t)s * hidden];
        }
    }

    __device__ inline float output() const { return first + second + others; }
};

// The weights of the streams in a thread's stream, and of the output.
struct MixWeights {
    float post, comb[STREAMS];

    __device__ inline void load(const MixedRow& row) {
        int stream = threadIdx.x / SLICE;
        post = row.post[stream];
#pragma unroll
        for (int j = 0; j < STREAMS; ++j) comb[j] = row.comb[STREAMS * j + stream];
    }

    // The thread's column.
    __device__ inline float mix(const SliceStreams& shared) const {
        int c = threadIdx.x % SLICE;
        const float(&parts)[STREAMS][SLICE] = shared.output;
        float x = post * (parts[0][c] + parts[1][c] + parts[2][c] + parts[3][c]);
#pragma unroll
        for (int j = 0; j < STREAMS; ++j) x += comb[j] * shared.old[j][c];
        return x;
    }
};

// A lane's weights of a slice: two columns of each stream, for the outputs of its warp.
struct SliceWeights {
    float2 at[WARP_OUTPUTS][STREAMS];

    __device__ inline void load(const MixFunction& function, int slice, int hidden) {
        int first = threadIdx.x / WARP * WARP_OUTPUTS, c = slice * SLICE + threadIdx.x % WARP * 2;
        if (function.halves) {
            // All on their way before the first is needed.
            u32 halves[WARP_OUTPUTS][STREAMS];
            load_pairs((const u16*)function.weights + c, function.outputs, first, hidden, halves);
#pragma unroll
            for (int i = 0; i < WARP_OUTPUTS; ++i) {
#pragma unroll
                for (int j = 0; j < STREAMS; ++j) at[i][j] = unpack_half2(halves[i][j]);
            }
        } else {
            load_pairs((const float*)function.weights + c, function.outputs, first, hidden, at);
        }
    }

    // Two columns of outputs from `first` on; zeros beyond the last.
    template <class Number, class Pair>
    __device__ static inline void load_pairs(
        const Number* weights, int outputs, int first, int hidden,
        Pair (&to)[WARP_OUTPUTS][STREAMS]
    ) {
#pragma unroll
        for (int i = 0; i < WARP_OUTPUTS; ++i) {
#pragma unroll
            for (int j = 0; j < STREAMS; ++j) {
                const Number* from = weights + (size_t)((first + i) * STREAMS + j) * hidden;
                to[i][j] = first + i < outputs ? *(const Pair*)from : Pair{};
            }
        }
    }
};

// Leaves the sum of the warp's v[i] in each lane whose number is i modulo 4.
__device__ inline float scatter_sums(const float (&v)[4]) {
    bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
    float a = upper ? v[2] : v[0], b = upper ? v[3] : v[1];
    a += __shfl_xor_sync(FULL_WARP, upper ? v[0] : v[2], 2);
    b += __shfl_xor_sync(FULL_WARP, upper ? v[1] : v[3], 2);
    float sum = odd ? b : a;
    sum += __shfl_xor_sync(FULL_WARP, odd ? a : b, 1);
#pragma unroll
    for (int d = 4; d < WARP; d *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, d);
    return sum;
}

// The warp's dot products of a slice, and the last warp's sum of squares, to `sums` [32].
__device__ inline void multiply_slice(
    const SliceWeights& w, const SliceStreams& shared, float* sums
) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    static_assert(WARP_OUTPUTS == 3, "the fourth sum is that of squares");
    float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < STREAMS; ++j) {
        float2 x = *(const float2*)(shared.mixed[j] + 2 * lane);
#pragma unroll
        for (int i = 0; i < WARP_OUTPUTS; ++i) v[i] += w.at[i][j].x * x.x + w.at[i][j].y * x.y;
        v[3] += x.x * x.x + x.y * x.y;
    }
    float sum = scatter_sums(v);
    if (lane < WARP_OUTPUTS || (lane == 3 && warp == MIX_WARPS - 1)) {
        sums[warp * WARP_OUTPUTS + lane] = sum;
    }
}

// What blocks that share rows need of one.
struct SlicedRow {
    MixedRow mixed;
    // Of its slices [slices, 32].
    float* sums;
};

// Mixes a block's slices of ROWS rows and multiplies them: slice blockIdx.x, whose weights are
// loaded, and every gridDim.x-th after it. The streams become post·y + comb·streams. Of the rows
// `count` are real. The first MIX_THREADS threads have one stream's column each; there may be
// others.
template <int ROWS>
__device__ inline void mix_and_multiply(
    const SlicedRow (&rows)[ROWS], int count, const MixFunction& function, SliceWeights& weights,
    int hidden, SliceStreams (&shared)[ROWS]
) {
    int slices = hidden / SLICE, stream = threadIdx.x / SLICE, c = threadIdx.x % SLICE;
    bool mixes = threadIdx.x < MIX_THREADS, pending = rows[0].mixed.y;
    SliceInputs inputs[ROWS];
    MixWeights mix_weights[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (mixes) inputs[r].load(rows[r].mixed, blockIdx.x, hidden);
        if (mixes && pending) mix_weights[r].load(rows[r].mixed);
    }
    for (int slice = blockIdx.x; slice < slices; slice += gridDim.x) {
        // What the next slice needs is on its way during this one.
        int next = slice + gridDim.x;
        float x[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            x[r] = inputs[r].x;
            if (pending && mixes) {
                shared[r].old[stream][c] = x[r];
                shared[r].output[stream][c] = inputs[r].output();
            }
            if (next < slices && mixes) inputs[r].load(rows[r].mixed, next, hidden);
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (pending && mixes) {
                x[r] = mix_weights[r].mix(shared[r]);
                if (r < count) *rows[r].mixed.own(slice, hidden) = x[r];
            }
            if (mixes) shared[r].mixed[stream][c] = x[r];
        }
        __syncthreads();
        if (!mixes) continue;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (r < count) multiply_slice(weights, shared[r], rows[r].sums + slice * SLICE_SUMS);
        }
        if (next < slices) weights.load(function, next, hidden);
    }
}

// Slices whose sums a warp reads at once.
#define SLICES_AHEAD 8

// A lane's dot product over the warp's share of the slices, from their sums [slices, 32].
struct SliceSums {
    float ahead[SLICES_AHEAD];

    __device__ inline float at(const float* sums, int slices, int i) const {
        int lane = threadIdx.x % WARP, slice = threadIdx.x / WARP + i * MIX_WARPS;
        return lane <= HC_MIX && slice < slices ? sums[slice * SLICE_SUMS + lane] : 0.0f;
    }

    __device__ inline void load(const float* sums, int slices) {
#pragma unroll
        for (int i = 0; i < SLICES_AHEAD; ++i) ahead[i] = at(sums, slices, i);
    }

    __device__ inline float total(const float* sums, int slices) const {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < SLICES_AHEAD; ++i) dot += ahead[i];
#pragma unroll 1
        for (int i = SLICES_AHEAD; i * MIX_WARPS < slices; ++i) dot += at(sums, slices, i);
        return dot;
    }
};

struct ReadStreamsParams {
    // [n, 4, hidden], and the pending output's parts [n, slots, hidden] if there is one.
    float* streams;
    const float* y;
    // Weights with which that is spread; they become those for when the next sublayer is done (the
    // head's function has only the first four outputs, and needs none).
    float* post;
    float* comb;
    MixFunction function;
    MixConstants constants;
    const float* norm;
    // By slices: room for [n, slices, 32], and a counter of each row, zero before and after.
    float* sums;
    u32* arrivals;
    // Results [n, hidden], halves and what they leave over.
    u16* x;
    u16* x_low;
    // By slices: if given, the rows of the streams; results are dense.
    const u32* wanted;
    int slots;
    int hidden;
    // By rows, from here.
    int first_row;
    int end_row;

    __device__ inline int row(int to) const { return wanted ? wanted[to] : to; }

    __device__ inline SlicedRow sliced(int to) const {
        size_t own = row(to);
        MixedRow mixed = {streams + own * STREAMS * hidden, y ? y + own * slots * hidden : nullptr,
                          slots, post + own * STREAMS, comb + own * STREAMS * STREAMS};
        return {mixed, sums + (size_t)to * (hidden / SLICE) * SLICE_SUMS};
    }
};
SAME_IN_RUST(ReadStreamsParams);

// From the sums of a row's slices to what is read of it, and to the weights for when that is done:
// by MIX_THREADS threads and a warp. Shared memory: a row.
__device__ inline void collapse_row(const ReadStreamsParams& r, const LaneOutput& output, int to) {
    __shared__ float warp_dots[MIX_WARPS][WARP], scratch[MIX_WARPS];
    int slices = r.hidden / SLICE, lane = threadIdx.x % WARP, row = r.row(to);
    bool mixes = threadIdx.x < MIX_THREADS;
    const float* streams = r.streams + (size_t)row * STREAMS * r.hidden;
    const float* sums = r.sums + (size_t)to * slices * SLICE_SUMS;
    // All that the block waits for is on its way at once.
    SliceSums slice_sums;
    Fragments fragments;
    if (mixes) {
        slice_sums.load(sums, slices);
        fragments.load(streams, 0, r.hidden);
        warp_dots[threadIdx.x / WARP][lane] = slice_sums.total(sums, slices);
    }
    __syncthreads();
    float dot = 0.0f;
#pragma unroll
    for (int w = 0; w < MIX_WARPS; ++w) dot += warp_dots[w][lane];
    const MixConstants& k = r.constants;
    float logit = output.logit(dot, r.hidden, k);
    if (mixes) {
        float pre[STREAMS];
        input_weights(logit, k, pre);
        size_t at = (size_t)to * r.hidden;
        collapse(fragments, streams, pre, r.norm, k.rms_epsilon, (float*)dynamic_shared, scratch,
                 {r.x + at, r.x_low + at}, r.hidden);
    } else if (r.function.outputs == HC_MIX) {
        output_weights(logit, k, r.post + row * STREAMS, r.comb + row * STREAMS * STREAMS);
    }
}

// Finishes the sublayer before, and reads the streams for the next one. Grid: (blocks that share
// the slices of a row, rows).
extern "C" __global__ void __launch_bounds__(MIX_THREADS + WARP, 2) read_by_slices(
    __grid_constant__ const ReadStreamsParams r
) {
    __shared__ SliceStreams shared[1];
    launch_dependents();
    LaneOutput output(r.constants, r.function.outputs);
    SliceWeights weights;
    if (threadIdx.x < MIX_THREADS) weights.load(r.function, blockIdx.x, r.hidden);
    wait_for_dependencies();
    int to = blockIdx.y;
    mix_and_multiply<1>({r.sliced(to)}, 1, r.function, weights, r.hidden, shared);
    if (last_to_arrive(r.arrivals + to, gridDim.x)) collapse_row(r, output, to);
}

// The first part of the same, for SLICE_ROWS rows a block. Grid: (blocks that share the slices
// of these rows, rows / SLICE_ROWS).
extern "C" __global__ void __launch_bounds__(MIX_THREADS, 2) mix_slices(
    __grid_constant__ const ReadStreamsParams r
) {
    __shared__ SliceStreams shared[SLICE_ROWS];
    launch_dependents();
    SliceWeights weights;
    weights.load(r.function, blockIdx.x, r.hidden);
    wait_for_dependencies();
    int first = blockIdx.y * SLICE_ROWS, n = r.end_row;
    SlicedRow rows[SLICE_ROWS];
    // The last one may be there several times.
#pragma unroll
    for (int i = 0; i < SLICE_ROWS; ++i) rows[i] = r.sliced(min(first + i, n - 1));
    mix_and_multiply<SLICE_ROWS>(rows, n - first, r.function, weights, r.hidden, shared);
}

// The second part, a row a block.
extern "C" __global__ void __launch_bounds__(MIX_THREADS + WARP) collapse_rows(
    __grid_constant__ const ReadStreamsParams r
) {
    launch_dependents();
    LaneOutput output(r.constants, r.function.outputs);
    wait_for_dependencies();
    collapse_row(r, output, blockIdx.x);
}

// ---- Many rows: a block does all of eight -------------------------------------------------------

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

// Finishes the sublayer before for a warp's share of the columns of eight rows, and leaves its
// share of their dot products and squares in `dots`.
template <bool HALVES>
__device__ inline void mix_columns(
    const ReadStreamsParams& r, int row, bool valid, float (&dots)[BLOCK_ROWS][SLICE_SUMS]
) {
    const float* y = r.y;
    int slots = r.slots, hidden = r.hidden;
    const void* weights = r.function.weights;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    float own_post[STREAMS], own_comb[STREAMS * STREAMS], squares = 0.0f;
    float low_sums[4] = {0.0f, 0.0f, 0.0f, 0.0f}, high_sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (y) {
#pragma unroll
        for (int i = 0; i < STREAMS; ++i) own_post[i] = r.post[row * STREAMS + i];
#pragma unroll
        for (int i = 0; i < STREAMS * STREAMS; ++i) {
            own_comb[i] = r.comb[row * STREAMS * STREAMS + i];
        }
    }
    float* own = r.streams + (size_t)row * STREAMS * hidden;
    const float* outputs = y + (size_t)row * slots * hidden;
    for (int c = 16 * warp + 4 * t; c < hidden; c += 16 * MIX_WARPS) {
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
        // Sums of a few columns, added up outside of the tensor cores, which don't round.
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

// What is read by slices in decoding, with all 24 outputs, for rows `first_row` to `end_row`: a
// block has BLOCK_ROWS of them from end to end. A row's results do not depend on the rows beside
// it.
extern "C" __global__ void __launch_bounds__(MIX_THREADS, 2) read_by_rows(
    __grid_constant__ const ReadStreamsParams a
) {
    __shared__ float warp_dots[MIX_WARPS][BLOCK_ROWS][SLICE_SUMS], scratch[2][MIX_WARPS];
    __shared__ float logits[BLOCK_ROWS][WARP];
    launch_dependents();
    const MixConstants& k = a.constants;
    int hidden = a.hidden;
    LaneOutput output(k, HC_MIX);
    wait_for_dependencies();
    int first = a.first_row + blockIdx.x * BLOCK_ROWS;
    int count = min((int)BLOCK_ROWS, a.end_row - first);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // Lanes without a row repeat the last one and write nothing.
    int row = first + min(lane / 4, count - 1);
    bool valid = lane / 4 < count;
    if (a.function.halves) {
        mix_columns<true>(a, row, valid, warp_dots[warp]);
    } else {
        mix_columns<false>(a, row, valid, warp_dots[warp]);
    }
    __syncthreads();
    static_assert(MIX_WARPS == BLOCK_ROWS, "a warp makes the weights of a row");
    float dot = 0.0f;
    if (lane <= HC_MIX) {
        for (int w = 0; w < MIX_WARPS; ++w) dot += warp_dots[w][warp][lane];
    }
    float logit = output.logit(dot, hidden, k);
    logits[warp][lane] = logit;
    __syncthreads();
    for (int r = 0; r < count; ++r) {
        size_t at = (size_t)(first + r) * hidden;
        Fragments fragments;
        fragments.load(a.streams + STREAMS * at, 0, hidden);
        float pre[STREAMS];
        input_weights(logits[r][lane], k, pre);
        collapse(fragments, a.streams + STREAMS * at, pre, a.norm, k.rms_epsilon,
                 (float*)dynamic_shared, scratch[r % 2], {a.x + at, a.x_low + at}, hidden);
    }
    if (warp < count) {
        int own = first + warp;
        output_weights(logit, k, a.post + own * STREAMS, a.comb + own * STREAMS * STREAMS);
    }
}
