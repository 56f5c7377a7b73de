// The indexer: scores of all visible index keys for a query, and the best rows.
//
// Queries with at most top_k visible rows attend to all of them and need neither.

#include "rows.cuh"

#define CSA_RATIO 4
// Threads of a scoring block, at most.
#define SCORE_THREADS 512
// Query heads that a warp loads before it prepares the first, to wait for memory once.
#define HEADS_AHEAD 4
// Keys that a warp scores at a time.
#define KEY_TILE 32
// Elements of a query or key that one lane of a quad multiplies: those of one FP4 scale.
#define QUAD_PART (INDEX_DIM / 4)
// FP4 keys are decoded to 2^-8 of their values: a half then holds every scale from 2^-20 to 2^9,
// and an RMS-normed key needs no other.
#define KEY_SHIFT 8
#define SELECT_THREADS 1024
#define RADIX_BITS 11
#define RADIX_BINS (1 << RADIX_BITS)

__device__ inline u32 visible_index_rows(const Step& step, u32 row) {
    return (step.position[row] + 1) / CSA_RATIO;
}

// Four elements a lane of a query head; zeros for a head that pads.
__device__ inline float4 load_query(const float* queries, u32 head, u32 heads, u32 lane) {
    if (head >= heads) return make_float4(0, 0, 0, 0);
    return ((const float4*)(queries + head * INDEX_DIM))[lane];
}

// One query head, prepared by a warp: rotated, rounded as keys are, and laid out as the B operand.
//
// Both operands permute the 128 elements alike, so that a lane's share of a key is contiguous:
// lane t of a quad has elements 32t to 32t + 31, in pairs (e, e + 4).
__device__ inline void prepare_query(float4 v, const float2* rotations, int rounding, u32 head,
                                     u32 lane, uint4* fragments) {
    float x[4] = {v.x, v.y, v.z, v.w};
    u32 rotary = (INDEX_DIM - ROPE_DIM) / 4;
    if (lane >= rotary) {
        rotate(x[0], x[1], rotations[2 * (lane - rotary)]);
        rotate(x[2], x[3], rotations[2 * (lane - rotary) + 1]);
    }
    if (rounding) round_index_query(x, lane);
    float y[4];
    for (int i = 0; i < 4; ++i) y[i] = __shfl_xor_sync(FULL_WARP, x[i], 1);
    bool odd = lane & 1;
    uint2 pairs = odd ? make_uint2(pack_half2(y[2], x[2]), pack_half2(y[3], x[3]))
                      : make_uint2(pack_half2(x[0], y[0]), pack_half2(x[1], y[1]));
    u32 quad_lane = lane / 8, pair = lane % 8 / 2;
    uint4* to = fragments + (head / 8 * 4 + pair) * WARP + head % 8 * 4 + quad_lane;
    ((uint2*)to)[odd] = pairs;
}

// A lane's QUAD_PART elements of a key as halves, in pairs (e, e + 4); zeros for no key.
__device__ inline void load_key(const u8* key, u32 quad_lane, int rounding, u32 (&pairs)[16]) {
    if (!key) {
        for (int i = 0; i < 16; ++i) pairs[i] = 0;
        return;
    }
    if (!rounding) {
        const float4* part = (const float4*)key + quad_lane * QUAD_PART / 4;
        for (int w = 0; w < 4; ++w) {
            float4 a = part[2 * w], b = part[2 * w + 1];
            pairs[4 * w] = pack_half2(a.x, b.x);
            pairs[4 * w + 1] = pack_half2(a.y, b.y);
            pairs[4 * w + 2] = pack_half2(a.z, b.z);
            pairs[4 * w + 3] = pack_half2(a.w, b.w);
        }
        return;
    }
    const u32* codes = (const u32*)key + quad_lane * 4;
    u32 exponent = key[INDEX_DIM / 2 + quad_lane];
    // A code's bits placed in a half give 2^-14 of its value.
    u32 half_exponent = min(max((int)exponent + 14 - 127 + 15 - KEY_SHIFT, 0), 30);
    u32 factor = half_exponent * (0x400 * 0x10001u);
    for (int w = 0; w < 4; ++w) {
        u32 word = codes[w];
        u32 signs[4] = {word << 12, word << 8, word << 4, word};
        u32 magnitudes[4] = {word << 9, word << 5, word << 1, word >> 3};
        for (int i = 0; i < 4; ++i) {
            u32 half = (signs[i] & 0x80008000) | (magnitudes[i] & 0x0e000e00);
            pairs[4 * w + i] = half2_mul(half, factor);
        }
    }
}

// Sum over the heads of weight · max(0, q·k) for the lane's keys: g and g + 8 of each half tile.
__device__ inline void score_keys(const u32 (&keys)[4][16], const uint4* fragments,
                                  const float* weights, u32 head_tiles, u32 lane,
                                  float (&sums)[4]) {
    for (int i = 0; i < 4; ++i) sums[i] = 0;
    for (u32 j = 0; j < head_tiles; ++j) {
        float d[2][4] = {};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            uint4 q = fragments[(j * 4 + w) * WARP + lane];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const u32(&low)[16] = keys[2 * m];
                const u32(&high)[16] = keys[2 * m + 1];
                u32 first[4] = {low[4 * w], high[4 * w], low[4 * w + 1], high[4 * w + 1]};
                u32 second[4] = {low[4 * w + 2], high[4 * w + 2], low[4 * w + 3], high[4 * w + 3]};
                mma(d[m], first, q.x, q.y);
                mma(d[m], second, q.z, q.w);
            }
        }
        float2 weight = *(const float2*)(weights + j * 8 + lane % 4 * 2);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            sums[2 * m] += weight.x * fmaxf(d[m][0], 0) + weight.y * fmaxf(d[m][1], 0);
            sums[2 * m + 1] += weight.x * fmaxf(d[m][2], 0) + weight.y * fmaxf(d[m][3], 0);
        }
    }
    for (int i = 0; i < 4; ++i) {
        sums[i] += __shfl_xor_sync(FULL_WARP, sums[i], 1);
        sums[i] += __shfl_xor_sync(FULL_WARP, sums[i], 2);
    }
}

// scores [gridDim.y, stride] of the visible keys of the rows from `first_row`.
//
// `queries` are raw products [n, query_stride], `head_weights` [n, weight_stride] likewise. Shared
// memory: 256 bytes a head and 4 for its weight, heads padded to a multiple of 8.
extern "C" __global__ void __launch_bounds__(SCORE_THREADS, 1) index_scores(
    Step step, u32 first_row, const LayerCache* caches, u32 layer, u32 layers, u32 heads,
    u32 top_k, const float* queries, u32 query_stride, const float* head_weights, u32 weight_stride,
    const float2* rotations, int rounding, float* scores, u32 stride) {
    wait_for_dependencies();
    launch_dependents();
    u32 row = first_row + blockIdx.y, visible = visible_index_rows(step, row);
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    u32 first = blockIdx.x * warps * KEY_TILE;
    if (visible <= top_k || first >= visible) return;

    u32 head_tiles = (heads + 7) / 8;
    uint4* fragments = dynamic_shared;
    float* weights = (float*)(fragments + head_tiles * 4 * WARP);
    const float* query = queries + (u64)row * query_stride;
    for (u32 first_head = warp; first_head < head_tiles * 8; first_head += HEADS_AHEAD * warps) {
        float4 raw[HEADS_AHEAD];
#pragma unroll
        for (u32 i = 0; i < HEADS_AHEAD; ++i) {
            raw[i] = load_query(query, first_head + i * warps, heads, lane);
        }
#pragma unroll
        for (u32 i = 0; i < HEADS_AHEAD; ++i) {
            u32 head = first_head + i * warps;
            if (head >= head_tiles * 8) break;
            prepare_query(raw[i], rotations + row * PAIRS, rounding, head, lane, fragments);
        }
    }
    float unit = 1.0f / sqrtf((float)(INDEX_DIM * heads)) * (rounding ? 1 << KEY_SHIFT : 1);
    for (u32 head = threadIdx.x; head < head_tiles * 8; head += blockDim.x) {
        weights[head] = head < heads ? unit * head_weights[(u64)row * weight_stride + head] : 0;
    }
    __syncthreads();

    const u8* rows = layer_cache(caches, step.session[row], layer, layers).index_keys;
    u32 bytes = index_row_bytes(rounding);
    float* out = scores + (u64)blockIdx.y * stride;
    for (u32 tile = first + warp * KEY_TILE; tile < visible;
         tile += gridDim.x * warps * KEY_TILE) {
        u32 keys[4][16];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            u32 key = tile + i * 8 + lane / 4;
            const u8* stored = key < visible ? rows + (u64)key * bytes : nullptr;
            load_key(stored, lane % 4, rounding, keys[i]);
        }
        float sums[4];
        score_keys(keys, fragments, weights, head_tiles, lane, sums);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            u32 key = tile + i * 8 + lane / 4;
            if (lane % 4 == 0 && key < visible) out[key] = sums[i];
        }
    }
}

// Bits of a score in the order of scores; the two zeros are equal.
__device__ inline u32 ordered(float score) {
    u32 bits = __float_as_uint(score + 0.0f);
    return bits ^ (bits & 0x80000000 ? 0xffffffff : 0x80000000);
}

// Scores that a thread reads before it looks at the first.
#define SCORES_AHEAD 8

// The scores of one query, the first `cached` of them in shared memory.
struct Scores {
    const float* scores;
    const float* cache;
    u32 cached;

    __device__ float operator[](u32 i) const { return i < cached ? cache[i] : scores[i]; }
};

// Calls use(i, whether i is below `end`, its ordered score) for i = begin + own and every step
// from there, until whole batches from `begin` have passed `end`: as often in all threads that
// begin alike.
// The reads of a batch are under way before the first is used.
template <class Use>
__device__ inline void each_score(const Scores& scores, u32 begin, u32 own, u32 end, u32 step,
                                  Use use) {
    for (u32 first = begin; first < end; first += SCORES_AHEAD * step) {
        float batch[SCORES_AHEAD];
#pragma unroll
        for (u32 j = 0; j < SCORES_AHEAD; ++j) {
            u32 i = first + own + j * step;
            batch[j] = i < end ? scores[i] : 0;
        }
#pragma unroll
        for (u32 j = 0; j < SCORES_AHEAD; ++j) {
            u32 i = first + own + j * step;
            use(i, i < end, ordered(batch[j]));
        }
    }
}

// Sum over the threads before this one; `total` is that over all. SELECT_THREADS take part.
__device__ inline u32 exclusive_sum(u32 x, u32* scratch, u32& total) {
    u32 lane = threadIdx.x % WARP, sum = x;
    for (u32 d = 1; d < WARP; d *= 2) {
        u32 other = __shfl_up_sync(FULL_WARP, sum, d);
        if (lane >= d) sum += other;
    }
    __syncthreads();
    if (lane == WARP - 1) scratch[threadIdx.x / WARP] = sum;
    __syncthreads();
    u32 before = 0;
    total = 0;
    for (u32 w = 0; w < SELECT_THREADS / WARP; ++w) {
        if (w < threadIdx.x / WARP) before += scratch[w];
        total += scratch[w];
    }
    return before + sum - x;
}

// The prefix (bits from `shift` up) of the k-th largest score, and how many scores with that
// prefix are among the k largest: `needed` of `found`.
struct Threshold {
    u32 prefix;
    u32 shift;
    u32 needed;
    u32 found;
};

// Narrows a threshold by the next `bits` bits.
__device__ inline void narrow(const Scores& scores, u32 n, u32 bits, Threshold& threshold,
                              u32* histogram, u32* scratch) {
    __shared__ Threshold next;
    u32 bins = 1u << bits, shift = threshold.shift - bits;
    for (u32 b = threadIdx.x; b < RADIX_BINS; b += SELECT_THREADS) histogram[b] = 0;
    __syncthreads();
    each_score(scores, 0, threadIdx.x, n, SELECT_THREADS, [&](u32, bool valid, u32 score) {
        // All bits are still open at first, and a shift by 32 would leave them.
        bool open = threshold.shift == 32 || score >> threshold.shift == threshold.prefix;
        if (valid && open) atomicAdd(&histogram[score >> shift & (bins - 1)], 1u);
    });
    __syncthreads();
    // Two bins a thread, from the highest down.
    u32 high = RADIX_BINS - 1 - 2 * threadIdx.x, total;
    u32 count[2] = {histogram[high], histogram[high - 1]};
    u32 above = exclusive_sum(count[0] + count[1], scratch, total);
    for (u32 i = 0; i < 2; ++i) {
        if (above < threshold.needed && threshold.needed <= above + count[i]) {
            u32 prefix = threshold.shift == 32 ? 0 : threshold.prefix << bits;
            next = {prefix | (high - i), shift, threshold.needed - above, count[i]};
        }
        above += count[i];
    }
    __syncthreads();
    threshold = next;
}

// Writes the indices of the selected scores, ascending; of equal ones at the threshold the first.
__device__ inline void write_selected(const Scores& scores, u32 n, const Threshold& threshold,
                                      u32* scratch, u32* selected) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 segment = (n + SELECT_THREADS - 1) / SELECT_THREADS * WARP;
    u32 begin = warp * segment, end = min(begin + segment, n);
    u32 larger = 0, equal = 0, total;
    each_score(scores, begin, lane, end, WARP, [&](u32, bool valid, u32 score) {
        u32 prefix = score >> threshold.shift;
        larger += valid && prefix > threshold.prefix;
        equal += valid && prefix == threshold.prefix;
    });
    larger = exclusive_sum(larger, scratch, total);
    equal = exclusive_sum(equal, scratch, total);
    // Those of the warp's first lane: counts before its segment.
    larger = __shfl_sync(FULL_WARP, larger, 0);
    equal = __shfl_sync(FULL_WARP, equal, 0);
    each_score(scores, begin, lane, end, WARP, [&](u32 i, bool valid, u32 score) {
        u32 prefix = score >> threshold.shift;
        u32 larger_lanes = __ballot_sync(FULL_WARP, valid && prefix > threshold.prefix);
        u32 equal_lanes = __ballot_sync(FULL_WARP, valid && prefix == threshold.prefix);
        u32 below = (1u << lane) - 1;
        u32 larger_before = larger + __popc(larger_lanes & below);
        u32 equal_before = equal + __popc(equal_lanes & below);
        bool chosen = larger_lanes >> lane & 1;
        chosen |= (equal_lanes >> lane & 1) && equal_before < threshold.needed;
        if (chosen) selected[larger_before + min(equal_before, threshold.needed)] = i;
        larger += __popc(larger_lanes);
        equal += __popc(equal_lanes);
    });
}

// The top_k best rows of each row's `scores` [gridDim.x, stride], ascending, to selected
// [n, top_k]. Shared memory: 4 bytes for each of `cached` scores.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS, 1) select_rows(
    Step step, u32 first_row, u32 top_k, const float* scores, u32 stride, u32 cached,
    u32* selected) {
    __shared__ u32 histogram[RADIX_BINS];
    __shared__ u32 scratch[SELECT_THREADS / WARP];
    wait_for_dependencies();
    launch_dependents();
    u32 row = first_row + blockIdx.x, n = visible_index_rows(step, row);
    if (n <= top_k) return;
    float* cache = (float*)dynamic_shared;
    const float* own = scores + (u64)blockIdx.x * stride;
    Scores all = {own, cache, min(cached, n)};
#pragma unroll 8
    for (u32 i = threadIdx.x; i < all.cached; i += SELECT_THREADS) cache[i] = own[i];
    __syncthreads();
    Threshold threshold = {0, 32, top_k, n};
    while (threshold.shift > 0 && threshold.needed < threshold.found) {
        narrow(all, n, min(threshold.shift, (u32)RADIX_BITS), threshold, histogram, scratch);
    }
    write_selected(all, n, threshold, scratch, selected + (u64)row * top_k);
}
