// The indexer: scores of all visible index keys for a query, and the best rows.
//
//   score[c] = Σ_h weight[h] · max(0, q[h]·key[c]), selected = the top_k largest, ascending
//
// Inputs: raw queries f32 [n, heads, 128] and head weights f32 [n, heads]; index keys in the
// caches.
// Output: selected u32 [n, top_k].
// Between the two parts: scores f32 [rows, capacity].
// Grid: (blocks that share a query's keys, rows). Block: 512 threads for few rows, or 256.
// Plain Rust: `index_scores` in crates/ds4-cpu/src/reference/attention.rs, `top_k` in
// crates/ds4-cpu/src/indexer.rs.
//
// Blocks share a query's keys, and the last of them to arrive chooses. Queries with at most top_k
// visible rows attend to all of them and need neither.

#include "rows.cuh"

#define MOST_WARPS (SELECT_THREADS / WARP)
// Query heads that a warp loads before it prepares the first, to wait for memory once.
#define HEADS_AHEAD 4
// Keys up to which HEAD_PARTS warps share a tile of them: then most warps had nothing to do. With
// more, decoding the keys several times takes longer.
#define FEW_KEYS 4096
// Elements of a query or key that one lane of a quad multiplies: they share an FP4 scale.
#define QUAD_PART (INDEX_DIM / 4)
// FP4 keys are decoded to 2^-8 of their values: a half then holds every scale from 2^-20 to 2^9,
// and an RMS-normed key needs no other.
#define KEY_SHIFT 8

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
// lane t of a quad has elements 32t to 32t + 31, in pairs (e, e + 4). `rotations` are those of the
// lane's two pairs: none for lanes before the rotary part.
__device__ inline void prepare_query(float4 v, const float2 (&rotations)[2], int rounding, u32 head,
                                     bool stored, u32 lane, uint4* fragments) {
    float x[4] = {v.x, v.y, v.z, v.w};
    rotate(x[0], x[1], rotations[0]);
    rotate(x[2], x[3], rotations[1]);
    if (rounding) round_index_query(x, lane);
    float y[4];
    for (int i = 0; i < 4; ++i) y[i] = __shfl_xor_sync(FULL_WARP, x[i], 1);
    bool odd = lane & 1;
    uint2 pairs = odd ? make_uint2(pack_half2(y[2], x[2]), pack_half2(y[3], x[3]))
                      : make_uint2(pack_half2(x[0], y[0]), pack_half2(x[1], y[1]));
    u32 quad_lane = lane / 8, pair = lane % 8 / 2;
    uint4* to = fragments + (head / 8 * 4 + pair) * WARP + head % 8 * 4 + quad_lane;
    if (stored) ((uint2*)to)[odd] = pairs;
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

// A query's heads as halves, and their weights, in shared memory: 256 bytes a head and 4 for its
// weight, heads padded to a multiple of 8.
struct Query {
    uint4* fragments;
    float* weights;
    u32 head_tiles;

    __device__ Query(u32 heads) {
        head_tiles = (heads + 7) / 8;
        fragments = dynamic_shared;
        weights = (float*)(fragments + head_tiles * 4 * WARP);
    }
};

// Prepares a query from its raw products; for all threads of the block.
__device__ inline void prepare_heads(const Query& query, const float* raw, const float* weights,
                                     const float2* rotations, u32 heads, int rounding) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    u32 rotary = (INDEX_DIM - ROPE_DIM) / 4;
    float2 own[2] = {make_float2(1, 0), make_float2(1, 0)};
    if (lane >= rotary) {
        own[0] = rotations[2 * (lane - rotary)], own[1] = rotations[2 * (lane - rotary) + 1];
    }
    float unit = 1.0f / sqrtf((float)(INDEX_DIM * heads)) * (rounding ? 1 << KEY_SHIFT : 1);
    for (u32 head = threadIdx.x; head < query.head_tiles * 8; head += blockDim.x) {
        query.weights[head] = head < heads ? unit * weights[head] : 0;
    }
    for (u32 first = warp; first < query.head_tiles * 8; first += HEADS_AHEAD * warps) {
        float4 v[HEADS_AHEAD];
#pragma unroll
        for (u32 i = 0; i < HEADS_AHEAD; ++i) {
            v[i] = load_query(raw, first + i * warps, heads, lane);
        }
#pragma unroll
        for (u32 i = 0; i < HEADS_AHEAD; ++i) {
            u32 head = first + i * warps;
            bool stored = head < query.head_tiles * 8;
            prepare_query(v[i], own, rounding, head, stored, lane, query.fragments);
        }
    }
    __syncthreads();
}

// Sum over some tiles of heads of weight · max(0, q·k) for the lane's keys: g and g + 8 of each
// half tile.
__device__ inline void score_keys(const u32 (&keys)[4][16], const Query& query, u32 first_tile,
                                  u32 end_tile, u32 lane, float (&sums)[4]) {
    for (int i = 0; i < 4; ++i) sums[i] = 0;
    for (u32 j = first_tile; j < end_tile; ++j) {
        float d[2][4] = {};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            uint4 q = query.fragments[(j * 4 + w) * WARP + lane];
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
        float2 weight = *(const float2*)(query.weights + j * 8 + lane % 4 * 2);
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

// The index keys that a row sees.
struct VisibleKeys {
    const u8* rows;
    u32 bytes;
    u32 count;

    __device__ const u8* operator[](u32 i) const {
        return i < count ? rows + (u64)i * bytes : nullptr;
    }
};

// Scores of the block's share of the keys: tile by tile, `parts` warps to each.
__device__ inline void score_tiles(const Query& query, const VisibleKeys& keys, u32 parts,
                                   int rounding, float* scores) {
    __shared__ float sums_of_parts[MOST_WARPS][KEY_TILE];
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    u32 part = warp % parts, tiles = warps / parts;
    u32 share = (query.head_tiles + parts - 1) / parts, first_tile = part * share;
    u32 end_tile = min(first_tile + share, query.head_tiles);
    for (u32 base = blockIdx.x * tiles * KEY_TILE; base < keys.count;
         base += gridDim.x * tiles * KEY_TILE) {
        u32 tile = base + warp / parts * KEY_TILE;
        u32 decoded[4][16];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            load_key(keys[tile + i * 8 + lane / 4], lane % 4, rounding, decoded[i]);
        }
        float sums[4];
        score_keys(decoded, query, first_tile, end_tile, lane, sums);
        // Lane 4·g + i writes the score of key g of the i-th eight.
        float score = lane % 4 == 0 ? sums[0] : lane % 4 == 1 ? sums[1]
                      : lane % 4 == 2 ? sums[2] : sums[3];
        u32 own = lane % 4 * 8 + lane / 4;
        if (parts > 1) {
            sums_of_parts[warp][own] = score;
            __syncthreads();
            score = 0;
            for (u32 p = 0; p < parts; ++p) score += sums_of_parts[warp + p - part][own];
            __syncthreads();
        }
        if (part == 0 && tile + own < keys.count) scores[tile + own] = score;
    }
}

// ---- Choosing -----------------------------------------------------------------------------------

#define RADIX_BITS 11
#define RADIX_BINS (1 << RADIX_BITS)
// Scores that are compared with each other instead of counted.
#define FEW_SCORES 256
// Scores that a thread reads before it looks at the first.
#define SCORES_AHEAD 8

// Bits of a score in the order of scores; the two zeros are equal.
__device__ inline u32 ordered(float score) {
    u32 bits = __float_as_uint(score + 0.0f);
    return bits ^ (bits & 0x80000000 ? 0xffffffff : 0x80000000);
}

__device__ inline float score_of(u32 ordered) {
    return __uint_as_float(ordered ^ (ordered & 0x80000000 ? 0x80000000 : 0xffffffff));
}

// The scores of one query, and keys of 43 bits that are in the same order: 11 for the place between
// the lowest and the highest score, so that counting the first digit spreads over all bins, then
// the score's own.
struct Scores {
    const float* at;
    u32 count;
    float low, per_unit;

    __device__ u64 key(float score) const {
        // What is not a number goes to the lowest bin.
        float bin = fminf(fmaxf((score - low) * per_unit, 0.0f), RADIX_BINS - 1.0f);
        return (u64)(u32)bin << 32 | ordered(score);
    }
};

// Calls use(i, whether i is below `end`, its score) for i = begin + own and every step from there,
// until whole batches from `begin` have passed `end`: as often in all threads that begin alike.
// The reads of a batch are under way before the first is used.
template <class Use>
__device__ inline void each_score(const float* scores, u32 begin, u32 own, u32 end, u32 step,
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
            use(i, i < end, batch[j]);
        }
    }
}

// What the threads of a block share while they choose.
struct Choosing {
    u32 histogram[RADIX_BINS];
    u32 warp_counts[2][MOST_WARPS];
    u64 few[FEW_SCORES];
    u32 few_rows[FEW_SCORES];
    u32 few_count;
};

// Finds the range of the scores, and clears the histogram.
__device__ inline Scores survey(const float* scores, u32 count, Choosing& shared) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    u32 low = 0xffffffff, high = 0;
    each_score(scores, 0, threadIdx.x, count, blockDim.x, [&](u32, bool valid, float score) {
        u32 own = ordered(score);
        low = valid ? min(low, own) : low;
        high = valid ? max(high, own) : high;
    });
    for (u32 b = threadIdx.x; b < RADIX_BINS; b += blockDim.x) shared.histogram[b] = 0;
    low = __reduce_min_sync(FULL_WARP, low), high = __reduce_max_sync(FULL_WARP, high);
    if (lane == 0) shared.warp_counts[0][warp] = low, shared.warp_counts[1][warp] = high;
    __syncthreads();
    u32 other = min(lane, warps - 1);
    low = __reduce_min_sync(FULL_WARP, shared.warp_counts[0][other]);
    high = __reduce_max_sync(FULL_WARP, shared.warp_counts[1][other]);
    float range = score_of(high) - score_of(low);
    return {scores, count, score_of(low), range > 0 ? (RADIX_BINS - 1) / range : 0};
}

// Sum of what the warps before this one have in `counts`.
__device__ inline u32 warps_before(const u32 (&counts)[MOST_WARPS]) {
    u32 lane = threadIdx.x % WARP;
    return __reduce_add_sync(FULL_WARP, lane < threadIdx.x / WARP ? counts[lane] : 0);
}

// The prefix (bits from `shift` up) of the k-th largest key, and how many keys with that prefix are
// among the k largest: `needed` of `found`.
struct Threshold {
    u64 prefix;
    u32 shift;
    u32 needed;
    u32 found;
};

// Narrows a threshold by the next `bits` bits. The histogram is clear before and after.
__device__ inline void narrow(const Scores& scores, u32 bits, Threshold& threshold,
                              Choosing& shared) {
    __shared__ Threshold next;
    u32 lane = threadIdx.x % WARP, shift = threshold.shift - bits, mask = (1u << bits) - 1;
    each_score(scores.at, 0, threadIdx.x, scores.count, blockDim.x,
               [&](u32, bool valid, float score) {
        u64 key = scores.key(score);
        if (valid && key >> threshold.shift == threshold.prefix) {
            atomicAdd(&shared.histogram[(u32)(key >> shift) & mask], 1u);
        }
    });
    __syncthreads();
    // Some bins in a row for each thread, from the highest down.
    u32 each = RADIX_BINS / blockDim.x, high = RADIX_BINS - 1 - each * threadIdx.x, own = 0;
    for (u32 i = 0; i < each; ++i) own += shared.histogram[high - i];
    u32 above = own;
    for (u32 d = 1; d < WARP; d *= 2) {
        u32 other = __shfl_up_sync(FULL_WARP, above, d);
        if (lane >= d) above += other;
    }
    if (lane == WARP - 1) shared.warp_counts[0][threadIdx.x / WARP] = above;
    __syncthreads();
    above += warps_before(shared.warp_counts[0]) - own;
    for (u32 i = 0; i < each; ++i) {
        u32 count = shared.histogram[high - i];
        shared.histogram[high - i] = 0;
        if (above < threshold.needed && threshold.needed <= above + count) {
            u64 prefix = threshold.prefix << bits | (high - i);
            next = {prefix, shift, threshold.needed - above, count};
        }
        above += count;
    }
    __syncthreads();
    threshold = next;
}

// Narrows a threshold with at most FEW_SCORES keys to the last bit, by comparing them all.
__device__ inline void rank_few(const Scores& scores, Threshold& threshold, Choosing& shared) {
    __shared__ Threshold next;
    if (threadIdx.x == 0) shared.few_count = 0;
    __syncthreads();
    each_score(scores.at, 0, threadIdx.x, scores.count, blockDim.x,
               [&](u32 i, bool valid, float score) {
        u64 key = scores.key(score);
        if (valid && key >> threshold.shift == threshold.prefix) {
            u32 to = atomicAdd(&shared.few_count, 1u);
            shared.few[to] = key, shared.few_rows[to] = i;
        }
    });
    __syncthreads();
    if (threadIdx.x < threshold.found) {
        u64 own = shared.few[threadIdx.x];
        u32 row = shared.few_rows[threadIdx.x], larger = 0, equal_before = 0, equal = 0;
        for (u32 i = 0; i < threshold.found; ++i) {
            u64 other = shared.few[i];
            larger += other > own;
            equal += other == own;
            equal_before += other == own && shared.few_rows[i] < row;
        }
        if (larger + equal_before + 1 == threshold.needed) {
            next = {own, 0, threshold.needed - larger, equal};
        }
    }
    __syncthreads();
    threshold = next;
}

// Writes the indices of the selected scores, ascending; of equal ones at the threshold the first.
__device__ inline void write_selected(const Scores& scores, const Threshold& threshold,
                                      Choosing& shared, u32* selected) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 segment = (scores.count + blockDim.x - 1) / blockDim.x * WARP;
    u32 begin = warp * segment, end = min(begin + segment, scores.count);
    u32 larger = 0, equal = 0;
    each_score(scores.at, begin, lane, end, WARP, [&](u32, bool valid, float score) {
        u64 prefix = scores.key(score) >> threshold.shift;
        larger += valid && prefix > threshold.prefix;
        equal += valid && prefix == threshold.prefix;
    });
    larger = __reduce_add_sync(FULL_WARP, larger), equal = __reduce_add_sync(FULL_WARP, equal);
    if (lane == 0) shared.warp_counts[0][warp] = larger, shared.warp_counts[1][warp] = equal;
    __syncthreads();
    larger = warps_before(shared.warp_counts[0]), equal = warps_before(shared.warp_counts[1]);
    each_score(scores.at, begin, lane, end, WARP, [&](u32 i, bool valid, float score) {
        u64 prefix = scores.key(score) >> threshold.shift;
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

// Chooses the top_k best of more scores, for all threads of the block.
__device__ inline void choose(const float* scores, u32 count, u32 top_k, u32* selected) {
    __shared__ Choosing shared;
    Scores all = survey(scores, count, shared);
    Threshold threshold = {0, 32 + RADIX_BITS, top_k, count};
    do {
        narrow(all, min(threshold.shift, (u32)RADIX_BITS), threshold, shared);
    } while (threshold.shift > 0 && threshold.found > max(threshold.needed, (u32)FEW_SCORES));
    if (threshold.shift > 0 && threshold.found > threshold.needed) rank_few(all, threshold, shared);
    write_selected(all, threshold, shared, selected);
}

struct SelectRowsParams {
    StepLayer at;
    // Raw products [n, query_stride] and [n, weight_stride].
    const float* queries;
    const float* head_weights;
    // Cosines and sines [n, 32].
    const float2* rotations;
    // Room for [rows, capacity], and a counter of each row, zero before and after.
    float* scores;
    u32* arrivals;
    // [n, top_k], ascending.
    u32* selected;
    u32 heads;
    u32 top_k;
    u32 query_stride;
    u32 weight_stride;
    // HEAD_PARTS if warps may share the heads of a tile where queries see few keys, or 1.
    u32 parts;
    // No row sees more keys.
    u32 capacity;
};
SAME_IN_RUST(SelectRowsParams);

// The top_k best rows of each row from `first_row`. Grid: (blocks that share a query's keys, rows).
extern "C" __global__ void __launch_bounds__(SELECT_THREADS, 1) select_rows(
    __grid_constant__ const SelectRowsParams p
) {
    launch_dependents();
    u32 row = p.at.first_row + blockIdx.y;
    // What a step has from its beginning needs no waiting for.
    VisibleKeys keys = {p.at.cache(row).index_keys, index_row_bytes(p.at.rounding),
                        visible_index_rows(p.at.step, row)};
    u32 parts = keys.count > FEW_KEYS ? 1 : p.parts;
    u32 tiles = blockDim.x / WARP / parts, first = blockIdx.x * tiles * KEY_TILE;
    bool needed = keys.count > p.top_k && first < keys.count;
    // Nor do the keys for coming nearer, since all but the last are old.
    u32 own_key = first + threadIdx.x;
    if (needed && own_key < min(first + tiles * KEY_TILE, keys.count)) {
        prefetch(keys[own_key]);
    }
    wait_for_dependencies();
    if (!needed) return;

    Query query(p.heads);
    prepare_heads(query, p.queries + (u64)row * p.query_stride,
                  p.head_weights + (u64)row * p.weight_stride, p.rotations + row * PAIRS, p.heads,
                  p.at.rounding);
    float* own_scores = p.scores + (u64)blockIdx.y * p.capacity;
    score_tiles(query, keys, parts, p.at.rounding, own_scores);
    u32 blocks = min(gridDim.x, (keys.count + tiles * KEY_TILE - 1) / (tiles * KEY_TILE));
    if (!last_to_arrive(p.arrivals + blockIdx.y, blocks)) return;
    choose(own_scores, keys.count, p.top_k, p.selected + (u64)row * p.top_k);
}
