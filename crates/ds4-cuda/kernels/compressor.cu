// What follows the projections of an attention input: the query latent is normalised, the
// key/value row finished, and the compressors take their inputs and emit the rows that become
// complete. None of these needs another, so that one launch does them all. Weights, and what a step
// has from its beginning, are read before the products are waited for.

#include "rows.cuh"

// Threads of a block: so many groups of a row's threads share the slots of a pool.
#define POOL_GROUPS 4
#define POOL_THREADS (POOL_GROUPS * KV_THREADS)

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
// of the first `threads`; all POOL_THREADS threads take part.
//
// At ratio 4 windows overlap: inputs are twice as wide as rows, their first half is for the window
// after their own.
__device__ inline void pool_window(const CompressorInputs& in, u32 first, u32 threads,
                                   float (&x)[4]) {
    __shared__ Pool pools[POOL_GROUPS][KV_THREADS];
    u32 group = threadIdx.x / threads, element = threadIdx.x % threads * 4;
    bool overlapping = in.ratio == 4;
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
    __shared__ float scratch[POOL_THREADS / WARP];
    float square = x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3];
    float scale = 1.0f / sqrtf(block_sum(square, scratch) / (4 * threads) + epsilon);
    x[0] *= scale * weights.x, x[1] *= scale * weights.y;
    x[2] *= scale * weights.z, x[3] *= scale * weights.w;
}

// The rotations of a thread's two pairs of a row of 4·threads elements, of which the last ROPE_DIM
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
__device__ inline float4 latent_piece(const float* latent, u32 i, u32 width) {
    return i < width ? *(const float4*)(latent + i) : float4{};
}

// Normalises a query latent, to halves and what they leave over.
__device__ inline void finish_latent(const float* raw, u32 stride, u32 width, const float* norm,
                                     u32 row, float epsilon, u16* latent, u16* latent_low) {
    __shared__ float scratch[POOL_THREADS / WARP];
    // Latents are seldom wider than this first piece of all threads.
    u32 first = 4 * threadIdx.x, step = 4 * blockDim.x;
    float4 weights = latent_piece(norm, first, width);
    wait_for_dependencies();
    const float* own = raw + (u64)row * stride;
    float4 piece = latent_piece(own, first, width);
    float squares = 0;
    for (u32 i = first; i < width; i += step) {
        float4 v = i == first ? piece : latent_piece(own, i, width);
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, scratch) / width + epsilon);
    for (u32 i = first; i < width; i += step) {
        float4 v = i == first ? piece : latent_piece(own, i, width);
        float4 w = i == first ? weights : latent_piece(norm, i, width);
        v = make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
        uint2 high = make_uint2(pack_half2(v.x, v.y), pack_half2(v.z, v.w));
        float2 a = unpack_half2(high.x), b = unpack_half2(high.y);
        *(uint2*)(latent + (u64)row * width + i) = high;
        *(uint2*)(latent_low + (u64)row * width + i) =
            make_uint2(pack_half2(v.x - a.x, v.y - a.y), pack_half2(v.z - b.x, v.w - b.y));
    }
}

// What a compressor takes in for a row: `cache` has the rings for the row's session.
__device__ inline CompressorInputs compressor_inputs(const LayerCache& cache, const Step& step,
                                                     u32 row, const float* values,
                                                     const float* scores, u32 stride,
                                                     const float* bias, int ratio) {
    u32 width = ratio == 4 ? 2 * HEAD_DIM : HEAD_DIM;
    return {values, scores, stride, cache.values,            cache.scores,
            bias,   width,  ratio,  step.span_position[row], step.span_row[row]};
}

__device__ inline CompressorInputs index_inputs(const LayerCache& cache, const Step& step, u32 row,
                                                const float* values, const float* scores,
                                                u32 stride, const float* bias) {
    return {values, scores,        stride, cache.index_values,      cache.index_scores,
            bias,   2 * INDEX_DIM, 4,      step.span_position[row], step.span_row[row]};
}

// Parts of `finish_inputs`; mirrored in src/stages/compressor.rs.
enum Part { COMPRESSOR, INDEX_COMPRESSOR, KEY_VALUES, LATENT };

// The part of this block: the blockIdx.y-th of those in the set.
__device__ inline u32 own_part(u32 parts) {
    u32 part = 0;
    for (u32 before = blockIdx.y; !(parts >> part & 1) || before-- > 0;) ++part;
    return part;
}

// Some parts of what follows the projections, for the rows from `first_row`: grid [rows, parts].
//
// `store` keeps the compressors' inputs as well. That is safe for spans of at most MAX_REWIND rows:
// no slot is overwritten that another row of the span still reads. Longer ones leave it to
// `store_inputs`.
extern "C" __global__ void __launch_bounds__(POOL_THREADS) finish_inputs(
    Step step, u32 first_row, const LayerCache* caches, u32 layer, u32 layers, int ratio,
    u32 parts, const float* values, const float* scores, u32 stride, const float* bias,
    const float* norm, const float* index_values, const float* index_scores, u32 index_stride,
    const float* index_bias, const float* index_norm, const float* frequencies, float epsilon,
    int rounding, int store, const float* raw_kv, u32 kv_stride, const float* kv_norm,
    const float2* rotations, u8* kv_rows, const float* raw_latent, u32 latent_stride,
    u32 latent_width, const float* latent_norm, u16* latent, u16* latent_low) {
    launch_dependents();
    u32 row = first_row + blockIdx.x, part = own_part(parts);
    if (part == LATENT) {
        finish_latent(raw_latent, latent_stride, latent_width, latent_norm, row, epsilon, latent,
                      latent_low);
    } else if (part == KEY_VALUES) {
        finish_key_value(raw_kv, kv_stride, kv_norm, rotations, row, epsilon, rounding, kv_rows);
    } else {
        const LayerCache& cache = layer_cache(caches, step.session[row], layer, layers);
        u32 position = step.position[row];
        if (part == COMPRESSOR) {
            CompressorInputs in =
                compressor_inputs(cache, step, row, values, scores, stride, bias, ratio);
            compress_row<false>(in, row, position, cache.rows, norm, frequencies, epsilon, rounding,
                                store);
        } else {
            CompressorInputs in = index_inputs(
                cache, step, row, index_values, index_scores, index_stride, index_bias);
            compress_row<true>(in, row, position, cache.index_keys, index_norm, frequencies,
                               epsilon, rounding, store);
        }
    }
}

// Keeps the last inputs of the rows [first_row, first_row + gridDim.x), whole spans: as many as
// the rings hold.
extern "C" __global__ void store_inputs(Step step, u32 first_row, const LayerCache* caches,
                                        u32 layer, u32 layers, int ratio, const float* values,
                                        const float* scores, u32 stride, const float* bias,
                                        const float* index_values, const float* index_scores,
                                        u32 index_stride, const float* index_bias) {
    wait_for_dependencies();
    launch_dependents();
    u32 row = first_row + blockIdx.x, end = first_row + gridDim.x;
    u32 successor = row + input_slots(ratio);
    if (successor < end && step.span_row[successor] == step.span_row[row]) return;
    const LayerCache& cache = layer_cache(caches, step.session[row], layer, layers);
    CompressorInputs in =
        blockIdx.y == 0
            ? compressor_inputs(cache, step, row, values, scores, stride, bias, ratio)
            : index_inputs(cache, step, row, index_values, index_scores, index_stride, index_bias);
    store_input(in, row, step.position[row]);
}
