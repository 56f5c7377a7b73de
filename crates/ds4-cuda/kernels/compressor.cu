// What follows the projections of an attention input: the query latent is normalised, the key/value
// row finished, and the compressors take their inputs and emit the rows that become complete. None
// of these needs another, so that one launch does them all. Weights, and what a step has from its
// beginning, are read before the products are waited for.
//
//   latent = norm(raw latent), key/value row = store(rotate(norm(raw row)))
//   compressed row = store(rotate(norm(Σ_i softmax_i(score[i] + bias[i]) · value[i])))
//
// The sum is over the tokens of a row's window, element by element.
// Inputs: products f32 [n, stride] of the latent, the key/value rows and the compressors' values
// and scores.
// Outputs: the latent as two halves [n, width]; stored key/value rows [n, row bytes]; compressed
// rows and index keys in the caches.
// Grid of finish_inputs: (rows, parts). Block: 512 threads.
// Grid of store_inputs: (rows, compressors). Block: 128 threads.
// Plain Rust: `rms_norm` in crates/ds4-cpu/src/reference/mod.rs, `CompressStage` in
// crates/ds4-cpu/src/compressor.rs, `RowCodec` in crates/ds4-engine/src/rows.rs.

#include "rows.cuh"

// Threads of a block: so many groups of a row's threads share the slots of a pool.
#define POOL_GROUPS (FINISH_THREADS / KV_THREADS)

// Inputs of one compressor for the rows of a step, and where they go.
struct CompressorInputs {
    // Products [n, stride], the scores without position bias.
    const float* values;
    const float* scores;
    u32 stride;
    // Rings of earlier inputs [slots, width], bias included.
    float* ring_values;
    float* ring_scores;
    // Position bias [ratio, width].
    const float* bias;
    u32 width;
    int ratio;
    // Position and row of the first token of the row's span.
    u32 span_position;
    u32 span_row;
};

// Values of four elements of the pool, with the running softmax of their scores.
struct Pool {
    float largest[4];
    float total[4];
    float sum[4];
};

__device__ inline float4 add4(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Value and score (bias included) of four elements at `position`: of this step, or from the ring.
__device__ inline void read_input(const CompressorInputs& in, u32 position, u32 element,
                                  float4& value, float4& score) {
    if (position >= in.span_position) {
        u64 at = (u64)(in.span_row + position - in.span_position) * in.stride + element;
        float4 bias = *(const float4*)(in.bias + position % in.ratio * in.width + element);
        value = *(const float4*)(in.values + at);
        score = add4(*(const float4*)(in.scores + at), bias);
    } else {
        u32 at = position % input_slots(in.ratio) * in.width + element;
        value = *(const float4*)(in.ring_values + at);
        score = *(const float4*)(in.ring_scores + at);
    }
}

__device__ inline void pool_add(Pool& pool, float4 value, float4 score) {
    float values[4] = {value.x, value.y, value.z, value.w};
    float scores[4] = {score.x, score.y, score.z, score.w};
    for (int i = 0; i < 4; ++i) {
        float largest = fmaxf(pool.largest[i], scores[i]);
        float keep = expf(pool.largest[i] - largest), weight = expf(scores[i] - largest);
        pool.total[i] = pool.total[i] * keep + weight;
        pool.sum[i] = pool.sum[i] * keep + weight * values[i];
        pool.largest[i] = largest;
    }
}

// Pools the window of the row that position first + ratio - 1 completes, four elements a thread
// of the first `threads`; all FINISH_THREADS threads take part.
//
// At ratio 4 windows overlap: inputs are twice as wide as rows, their first half is for the window
// after their own.
__device__ inline void pool_window(const CompressorInputs& in, u32 first, u32 threads,
                                   float (&x)[4]) {
    __shared__ Pool pools[POOL_GROUPS][KV_THREADS];
    u32 group = threadIdx.x / threads, element = threadIdx.x % threads * 4;
    bool overlapping = in.ratio == CSA_RATIO;
    u32 previous = overlapping && first > 0 ? in.ratio : 0;
    if (group < POOL_GROUPS) {
        Pool pool;
        for (int i = 0; i < 4; ++i) pool.largest[i] = -INFINITY, pool.total[i] = pool.sum[i] = 0;
#pragma unroll 4
        for (u32 slot = group; slot < previous + in.ratio; slot += POOL_GROUPS) {
            u32 part = overlapping && slot >= previous ? in.width / 2 : 0;
            float4 value, score;
            read_input(in, first - previous + slot, part + element, value, score);
            pool_add(pool, value, score);
        }
        pools[group][threadIdx.x % threads] = pool;
    }
    __syncthreads();
    for (int i = 0; i < 4; ++i) x[i] = 0;
    if (threadIdx.x >= threads) return;
    for (int i = 0; i < 4; ++i) {
        float largest = -INFINITY, total = 0;
        for (int g = 0; g < POOL_GROUPS; ++g) {
            largest = fmaxf(largest, pools[g][threadIdx.x].largest[i]);
        }
        for (int g = 0; g < POOL_GROUPS; ++g) {
            const Pool& pool = pools[g][threadIdx.x];
            float keep = expf(pool.largest[i] - largest);
            total += pool.total[i] * keep;
            x[i] += pool.sum[i] * keep;
        }
        x[i] /= total;
    }
}

// A thread's four weights of the norm of a row of 4·threads elements.
__device__ inline float4 row_norm(const float* weights, u32 threads) {
    return threadIdx.x < threads ? ((const float4*)weights)[threadIdx.x] : float4{};
}

// RMS norm of a row of 4·threads elements held by the block's first threads; all take part.
__device__ inline void norm_row(float (&x)[4], u32 threads, float4 weights, float epsilon) {
    __shared__ float scratch[FINISH_THREADS / WARP];
    float square = x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3];
    float scale = 1.0f / sqrtf(block_sum(square, scratch) / (4 * threads) + epsilon);
    x[0] *= scale * weights.x, x[1] *= scale * weights.y;
    x[2] *= scale * weights.z, x[3] *= scale * weights.w;
}

// The rotations of a thread's two pairs of a row of 4·threads elements; the last ROPE_DIM
// are rotated. `rotation` gives a pair's.
struct RowRotation {
    bool rotates;
    float2 first, second;

    template <class Rotation>
    __device__ inline RowRotation(u32 threads, Rotation rotation) {
        u32 before = threads - ROPE_DIM / 4;
        rotates = threadIdx.x >= before && threadIdx.x < threads;
        if (!rotates) return;
        first = rotation(2 * (threadIdx.x - before));
        second = rotation(2 * (threadIdx.x - before) + 1);
    }

    __device__ inline void apply(float (&x)[4]) const {
        if (!rotates) return;
        rotate(x[0], x[1], first);
        rotate(x[2], x[3], second);
    }
};

__device__ inline void store_input(const CompressorInputs& in, u32 row, u32 position) {
    u64 from = (u64)row * in.stride;
    u32 to = position % input_slots(in.ratio) * in.width, bias = position % in.ratio * in.width;
    for (u32 i = 4 * threadIdx.x; i < in.width; i += 4 * blockDim.x) {
        *(float4*)(in.ring_values + to + i) = *(const float4*)(in.values + from + i);
        *(float4*)(in.ring_scores + to + i) = add4(*(const float4*)(in.scores + from + i),
                                                   *(const float4*)(in.bias + bias + i));
    }
}

// Emits the row that `row` completes, if it does, and keeps the row's input if `store`.
template <bool INDEX>
__device__ inline void compress_row(const CompressorInputs& in, u32 row, u32 position, u8* rows,
                                    const float* norm, const float* frequencies, float epsilon,
                                    int rounding, bool store) {
    if ((position + 1) % in.ratio != 0) {
        wait_for_dependencies();
        if (store) store_input(in, row, position);
        return;
    }
    u32 threads = INDEX ? INDEX_THREADS : KV_THREADS, first = position + 1 - in.ratio;
    float4 weights = row_norm(norm, threads);
    RowRotation rotation(threads, [&](u32 pair) { return rotation_at(first, frequencies[pair]); });
    wait_for_dependencies();
    if (store) store_input(in, row, position);
    float x[4];
    pool_window(in, first, threads, x);
    norm_row(x, threads, weights, epsilon);
    rotation.apply(x);
    if (threadIdx.x >= threads) return;
    u64 c = position / in.ratio;
    if (INDEX) encode_index_key(x, threadIdx.x, rounding, rows + c * index_row_bytes(rounding));
    else encode_kv(x, threadIdx.x, rounding, rows + c * kv_row_bytes(rounding));
}

// Finishes the raw key/value row: norm, rotation, storage format.
__device__ inline void finish_key_value(const float* raw, u32 stride, const float* norm,
                                        const float2* rotations, u32 row, float epsilon,
                                        int rounding, u8* kv_rows) {
    float4 weights = row_norm(norm, KV_THREADS);
    wait_for_dependencies();
    float x[4] = {0, 0, 0, 0};
    if (threadIdx.x < KV_THREADS) {
        float4 v = *(const float4*)(raw + (u64)row * stride + 4 * threadIdx.x);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    }
    RowRotation rotation(KV_THREADS, [&](u32 pair) { return rotations[row * PAIRS + pair]; });
    norm_row(x, KV_THREADS, weights, epsilon);
    rotation.apply(x);
    if (threadIdx.x >= KV_THREADS) return;
    encode_kv(x, threadIdx.x, rounding, kv_rows + (u64)row * kv_row_bytes(rounding));
}

// Four elements of a latent [width] from `i` on; zeros beyond its end.
__device__ inline float4 latent_fragment(const float* latent, u32 i, u32 width) {
    return i < width ? *(const float4*)(latent + i) : float4{};
}

// Normalises a query latent, to halves and what they leave over.
__device__ inline void finish_latent(const float* raw, u32 stride, u32 width, const float* norm,
                                     u32 row, float epsilon, u16* latent, u16* latent_low) {
    __shared__ float scratch[FINISH_THREADS / WARP];
    // Latents are seldom wider than this first fragment of all threads.
    u32 first = 4 * threadIdx.x, step = 4 * blockDim.x;
    float4 weights = latent_fragment(norm, first, width);
    wait_for_dependencies();
    const float* own = raw + (u64)row * stride;
    float4 fragment = latent_fragment(own, first, width);
    float squares = 0;
    for (u32 i = first; i < width; i += step) {
        float4 v = i == first ? fragment : latent_fragment(own, i, width);
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / width + epsilon);
    for (u32 i = first; i < width; i += step) {
        float4 v = i == first ? fragment : latent_fragment(own, i, width);
        float4 w = i == first ? weights : latent_fragment(norm, i, width);
        v = make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
        uint2 high = make_uint2(pack_half2(v.x, v.y), pack_half2(v.z, v.w));
        float2 a = unpack_half2(high.x), b = unpack_half2(high.y);
        *(uint2*)(latent + (u64)row * width + i) = high;
        *(uint2*)(latent_low + (u64)row * width + i) =
            make_uint2(pack_half2(v.x - a.x, v.y - a.y), pack_half2(v.z - b.x, v.w - b.y));
    }
}

// A compressor's products and weights.
struct CompressorSource {
    // Products [n, stride], the scores without position bias.
    const float* values;
    const float* scores;
    // Position bias [ratio, width].
    const float* bias;
    // Weights of the row's norm.
    const float* norm;
    u32 stride;
};
SAME_IN_RUST(CompressorSource);

// What a compressor takes in for a row: `cache` has the rings for the row's session.
__device__ inline CompressorInputs compressor_inputs(const LayerCache& cache, const StepLayer& at,
                                                     u32 row, const CompressorSource& from) {
    int ratio = at.ratio;
    u32 width = ratio == CSA_RATIO ? 2 * HEAD_DIM : HEAD_DIM;
    return {from.values, from.scores, from.stride, cache.values, cache.scores, from.bias, width,
            ratio, at.step.span_position[row], at.step.span_row[row]};
}

__device__ inline CompressorInputs index_inputs(const LayerCache& cache, const StepLayer& at,
                                                u32 row, const CompressorSource& from) {
    return {from.values, from.scores, from.stride, cache.index_values, cache.index_scores,
            from.bias, 2 * INDEX_DIM, CSA_RATIO, at.step.span_position[row],
            at.step.span_row[row]};
}

// The part of this block: the blockIdx.y-th in the set.
__device__ inline u32 own_part(u32 parts) {
    u32 part = 0;
    for (u32 before = blockIdx.y; !(parts >> part & 1) || before-- > 0;) ++part;
    return part;
}

struct FinishInputsParams {
    StepLayer at;
    CompressorSource compressor;
    // The indexer's.
    CompressorSource index;
    // Of the rotation of both compressors' rows [32].
    const float* frequencies;
    // Cosines and sines of the step's rows [n, 32].
    const float2* rotations;
    // Key/value rows: products [n, kv_stride], weights of their norm, and where they are stored
    // [n, row bytes].
    const float* raw_kv;
    const float* kv_norm;
    u8* kv_rows;
    // The query latent: products [n, latent_stride], weights of its norm [latent_width], and the
    // result in halves with what they leave over [n, latent_width].
    const float* raw_latent;
    const float* latent_norm;
    u16* latent;
    u16* latent_low;
    // The set of parts, a bit for each PART_….
    u32 parts;
    // Whether compressors keep their inputs.
    int store;
    u32 kv_stride;
    u32 latent_stride;
    u32 latent_width;
};
SAME_IN_RUST(FinishInputsParams);

// Some parts of what follows the projections, for the rows from `first_row`: grid [rows, parts].
//
// `store` keeps the compressors' inputs as well. That is safe for spans of at most MAX_REWIND rows:
// no slot is overwritten that another row of the span still reads. Longer ones leave it to
// `store_inputs`.
extern "C" __global__ void __launch_bounds__(FINISH_THREADS) finish_inputs(
    __grid_constant__ const FinishInputsParams p
) {
    launch_dependents();
    u32 row = p.at.first_row + blockIdx.x, part = own_part(p.parts);
    float epsilon = p.at.epsilon;
    int rounding = p.at.rounding;
    if (part == PART_LATENT) {
        finish_latent(p.raw_latent, p.latent_stride, p.latent_width, p.latent_norm, row, epsilon,
                      p.latent, p.latent_low);
    } else if (part == PART_KEY_VALUES) {
        finish_key_value(p.raw_kv, p.kv_stride, p.kv_norm, p.rotations, row, epsilon, rounding,
                         p.kv_rows);
    } else {
        const LayerCache& cache = p.at.cache(row);
        u32 position = p.at.step.position[row];
        if (part == PART_COMPRESSOR) {
            CompressorInputs in = compressor_inputs(cache, p.at, row, p.compressor);
            compress_row<false>(in, row, position, cache.rows, p.compressor.norm, p.frequencies,
                                epsilon, rounding, p.store);
        } else {
            CompressorInputs in = index_inputs(cache, p.at, row, p.index);
            compress_row<true>(in, row, position, cache.index_keys, p.index.norm, p.frequencies,
                               epsilon, rounding, p.store);
        }
    }
}

struct StoreInputsParams {
    StepLayer at;
    CompressorSource compressor;
    // The indexer's.
    CompressorSource index;
};
SAME_IN_RUST(StoreInputsParams);

// Keeps the last inputs of the rows [first_row, first_row + gridDim.x), whole spans: as many as
// the rings hold.
extern "C" __global__ void store_inputs(__grid_constant__ const StoreInputsParams p) {
    wait_for_dependencies();
    launch_dependents();
    const Step& step = p.at.step;
    u32 row = p.at.first_row + blockIdx.x, end = p.at.first_row + gridDim.x;
    u32 successor = row + input_slots(p.at.ratio);
    if (successor < end && step.span_row[successor] == step.span_row[row]) return;
    const LayerCache& cache = p.at.cache(row);
    CompressorInputs in = blockIdx.y == 0 ? compressor_inputs(cache, p.at, row, p.compressor)
                                          : index_inputs(cache, p.at, row, p.index);
    store_input(in, row, step.position[row]);
}
