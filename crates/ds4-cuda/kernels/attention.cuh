// Attention over the sliding window and the compressed rows, on tensor cores, for the files that
// build kernels from it.
//
// A row is both key and value: it is decoded once to halves in shared memory and feeds both
// products. Softmax runs online over chunks of rows. A block works on one query, for TILES tiles of
// 16 heads.
#pragma once

#include "rows.cuh"

#define ATTEND_WARPS (ATTEND_THREADS / WARP)
// Columns of the result that a warp sums.
#define WARP_COLUMNS (HEAD_DIM / ATTEND_WARPS)
// Halves between rows of a shared tile: 16 bytes more than the row, so that the eight rows of a
// matrix load lie in different banks.
#define ROW_STRIDE (HEAD_DIM + 8)
#define LOG2_E 1.4426950408889634f

struct AttentionParams {
    StepLayer at;
    // Queries [n, heads, 512], halves, neither normalised nor rotated.
    const u16* queries;
    // Stored rows of the step [n, row bytes].
    const u8* kv_rows;
    // Chosen compressed rows [n, top_k], read in CSA layers where more are visible.
    const u32* selected;
    // Cosines and sines [n, 32].
    const float2* rotations;
    // Logits of the sinks [heads].
    const float* sinks;
    // Flash-decoding: normalised sums [rows, MAX_SPLITS, heads, 512] in halves, and (largest score,
    // total) [rows, MAX_SPLITS, heads] of each split.
    u16* partial_sums;
    float2* partial_totals;
    // [n, heads, 512], halves, rotated back.
    u16* out;
    u32 heads;
    u32 top_k;
    // Of scores, log2(e) included.
    float scale;
};
SAME_IN_RUST(AttentionParams);

// The rows that one query sees: first the window's, then the compressed ones.
struct VisibleRows {
    const u8* window;
    const u8* step_rows;
    const u8* compressed;
    const u32* selected;
    u32 bytes;
    // Position of the oldest window row, and of the span's first row.
    u32 oldest;
    u32 span_position;
    u32 window_rows;
    u32 total;

    __device__ const u8* operator[](u32 i) const {
        if (i >= window_rows) {
            u32 c = i - window_rows;
            return compressed + (u64)(selected ? selected[c] : c) * bytes;
        }
        u32 position = oldest + i;
        if (position >= span_position) return step_rows + (u64)(position - span_position) * bytes;
        return window + position % WINDOW_SLOTS * bytes;
    }
};

__device__ inline u32 visible_count(u32 position, u32 ratio, u32 top_k) {
    u32 compressed = ratio ? (position + 1) / ratio : 0;
    if (ratio == CSA_RATIO) compressed = min(compressed, top_k);
    return min(position + 1, (u32)WINDOW) + compressed;
}

__device__ inline VisibleRows visible_rows(const AttentionParams& a, const LayerCache& cache,
                                           u32 row) {
    const Step& step = a.at.step;
    u32 position = step.position[row], ratio = a.at.ratio;
    u32 compressed = ratio ? (position + 1) / ratio : 0;
    bool chosen = ratio == CSA_RATIO && compressed > a.top_k;
    VisibleRows rows;
    rows.bytes = kv_row_bytes(a.at.rounding);
    rows.window = cache.window;
    rows.step_rows = a.kv_rows + (u64)step.span_row[row] * rows.bytes;
    rows.compressed = cache.rows;
    rows.selected = chosen ? a.selected + (u64)row * a.top_k : nullptr;
    rows.window_rows = min(position + 1, (u32)WINDOW);
    rows.oldest = position + 1 - rows.window_rows;
    rows.span_position = step.span_position[row];
    rows.total = visible_count(position, ratio, a.top_k);
    return rows;
}

// Shared memory of a block: `BYTES` in all, as the launch has it.
template <int TILES, int CHUNK>
struct Shared {
    static constexpr int HEADS = TILES * TILE_HEADS;
    // Tiles of heads and rows that a warp makes scores of, and how many warps share the same
    // scores, each with a part of the 512 elements to sum. With CHUNK = 32 parts are the same for 1
    // and 4 TILES, and so are bits.
    static constexpr int HEAD_TILES = TILES == 1 ? 1 : 2, SCORE_ROWS = TILES == 1 ? 16 : 32;
    static constexpr int PARTS = ATTEND_WARPS / ((TILES / HEAD_TILES) * (CHUNK / SCORE_ROWS));
    static constexpr int SCORE_STRIDE = CHUNK + 4;
    static constexpr int WEIGHT_STRIDE = CHUNK + 8;
    static constexpr int BYTES =
        sizeof(u16) * ((HEADS + CHUNK) * ROW_STRIDE + HEADS * WEIGHT_STRIDE) +
        sizeof(float) * (PARTS * HEADS * SCORE_STRIDE + 3 * HEADS) + CHUNK * KV_ROW;

    u16* queries;
    u16* rows;
    float* scores;
    u16* weights;
    float* largest;
    float* total;
    float* keep;
    u8* stored;

    __device__ Shared() {
        queries = (u16*)dynamic_shared;
        rows = queries + HEADS * ROW_STRIDE;
        scores = (float*)(rows + CHUNK * ROW_STRIDE);
        weights = (u16*)(scores + PARTS * HEADS * SCORE_STRIDE);
        largest = (float*)(weights + HEADS * WEIGHT_STRIDE);
        total = largest + HEADS;
        keep = total + HEADS;
        stored = (u8*)(keep + HEADS);
    }
};

static_assert(Shared<1, SHORT_CHUNK>::BYTES == ATTEND_SHARED_16X32, "not as in src/constants.rs");
static_assert(Shared<4, SHORT_CHUNK>::BYTES == ATTEND_SHARED_64X32, "not as in src/constants.rs");
static_assert(Shared<4, LONG_CHUNK>::BYTES == ATTEND_SHARED_64X64, "not as in src/constants.rs");

// One head of a query, by a warp: two runs of eight elements a lane, the second `rotated` or not.
__device__ inline void store_query(const uint4 (&raw)[2], const float2 (&rotations)[4],
                                   bool rotated, float epsilon, u16* to, u32 lane) {
    float2 x[8];
    float square = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u32 words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            x[4 * i + j] = unpack_half2(words[j]);
            square += x[4 * i + j].x * x[4 * i + j].x + x[4 * i + j].y * x[4 * i + j].y;
        }
    }
    float scale = 1.0f / sqrtf(warp_sum(square) / HEAD_DIM + epsilon);
    u32 words[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float first = x[i].x * scale, second = x[i].y * scale;
        if (i >= 4 && rotated) rotate(first, second, rotations[i - 4]);
        words[i] = pack_half2(first, second);
    }
    *(uint4*)(to + 8 * lane) = make_uint4(words[0], words[1], words[2], words[3]);
    *(uint4*)(to + HEAD_DIM / 2 + 8 * lane) = make_uint4(words[4], words[5], words[6], words[7]);
}

// Heads of a warp that are loaded at once.
#define HEADS_AHEAD 2

// Normalises and rotates the block's queries from `first_head` into shared memory.
template <class S>
__device__ inline void load_queries(const S& shared, const AttentionParams& a, u32 row,
                                    u32 first_head) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    // Two runs of eight elements a lane; only the second can be in the rotary part.
    u32 second = HEAD_DIM / 2 + 8 * lane;
    float2 rotations[4] = {};
    if (second >= NOPE_DIM) {
        const float4* own = (const float4*)(a.rotations + row * PAIRS + (second - NOPE_DIM) / 2);
        float4 low = own[0], high = own[1];
        rotations[0] = make_float2(low.x, low.y), rotations[1] = make_float2(low.z, low.w);
        rotations[2] = make_float2(high.x, high.y), rotations[3] = make_float2(high.z, high.w);
    }
    for (u32 first = warp; first < S::HEADS; first += HEADS_AHEAD * ATTEND_WARPS) {
        uint4 raw[HEADS_AHEAD][2] = {};
#pragma unroll
        for (u32 h = 0; h < HEADS_AHEAD; ++h) {
            u32 head = first_head + first + h * ATTEND_WARPS;
            if (head >= a.heads) continue;
            const uint4* q = (const uint4*)(a.queries + ((u64)row * a.heads + head) * HEAD_DIM);
            raw[h][0] = q[lane], raw[h][1] = q[WARP + lane];
        }
#pragma unroll
        for (u32 h = 0; h < HEADS_AHEAD; ++h) {
            u16* to = shared.queries + (first + h * ATTEND_WARPS) * ROW_STRIDE;
            store_query(raw[h], rotations, second >= NOPE_DIM, a.at.epsilon, to, lane);
        }
    }
}

// Some of the rows that a query sees.
struct RowRange {
    u32 begin, end;

    __device__ inline bool is_empty() const { return begin >= end; }
};

// Addresses of the rows of a chunk, the first of a range: lane i of a warp has that of the warp's
// row i, which is row warp + i · ATTEND_WARPS of the chunk. Beyond the range it is the last row's.
template <int CHUNK>
__device__ inline const u8* row_address(const VisibleRows& rows, const RowRange& range) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 i = range.begin + warp + lane % (CHUNK / ATTEND_WARPS) * ATTEND_WARPS;
    return rows[min(i, range.end - 1)];
}

// Brings the rows of a chunk nearer, a row's 128 bytes a lane, but for those whose numbers may not
// be known yet.
template <int CHUNK>
__device__ inline void prefetch_rows(const VisibleRows& rows, u32 begin, u32 end) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    static_assert(CHUNK == ATTEND_THREADS / 8, "eight lanes for each row");
    u32 i = begin + warp * 4 + lane / 8, from = lane % 8 * 128;
    bool known = i < end && (i < rows.window_rows || !rows.selected);
    if (known && from < rows.bytes) prefetch(rows[i] + from);
}

__device__ inline const u8* address_of_lane(const u8* address, u32 lane) {
    u32 low = __shfl_sync(FULL_WARP, (u32)(u64)address, lane);
    u32 high = __shfl_sync(FULL_WARP, (u32)((u64)address >> 32), lane);
    return (const u8*)((u64)high << 32 | low);
}

// Starts the copy of a chunk's stored rows to shared memory, zeros beyond the first `valid`.
template <int CHUNK, class S>
__device__ inline void fetch_rows(const S& shared, const u8* address, u32 valid) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 i = 0; i < CHUNK / ATTEND_WARPS; ++i) {
        const u8* from = address_of_lane(address, i);
        u32 row = warp + i * ATTEND_WARPS;
        u8* to = shared.stored + row * KV_ROW;
#pragma unroll
        for (u32 fragment = lane; fragment < KV_ROW / 8; fragment += WARP) {
            copy_async8(to + 8 * fragment, from + 8 * fragment, row < valid);
        }
    }
    copy_async_commit();
}

// Decodes one stored row, by a warp.
__device__ inline void decode_row(const u8* stored, u32 lane, u16* out) {
    const uint2* codes = (const uint2*)stored;
    const u8* scales = stored + KV_SCALES;
#pragma unroll
    for (u32 fragment = lane; fragment < NOPE_DIM / 8; fragment += WARP) {
        ((uint4*)out)[fragment] = decode_e4m3(codes[fragment], e4m3_factor(scales[fragment / 8]));
    }
    float2 rotary = ((const float2*)(stored + NOPE_DIM))[lane];
    ((u32*)(out + NOPE_DIM))[lane] = pack_half2(rotary.x, rotary.y);
}

// The same for a row of f32; zeros for no row.
__device__ inline void convert_row(const u8* stored, u32 lane, u16* out) {
    for (u32 i = lane; i < HEAD_DIM / 4; i += WARP) {
        float4 v = stored ? ((const float4*)stored)[i] : make_float4(0, 0, 0, 0);
        ((uint2*)out)[i] = make_uint2(pack_half2(v.x, v.y), pack_half2(v.z, v.w));
    }
}

// Decodes rows [begin, begin + CHUNK) into the tile of halves.
template <int CHUNK, class S>
__device__ inline void decode_rows(const S& shared, const VisibleRows& rows, u32 begin, u32 end,
                                   int rounding) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll 2
    for (u32 i = warp; i < CHUNK; i += ATTEND_WARPS) {
        u16* out = shared.rows + i * ROW_STRIDE;
        if (rounding) decode_row(shared.stored + i * KV_ROW, lane, out);
        else convert_row(begin + i < end ? rows[begin + i] : nullptr, lane, out);
    }
}

// Partial scores of the chunk: each warp multiplies HEAD_TILES tiles of heads with SCORE_ROWS rows
// over its part of the elements.
template <int TILES, int CHUNK, class S>
__device__ inline void multiply_keys(const S& shared) {
    const int M = S::HEAD_TILES, N = S::SCORE_ROWS / 16, PART = HEAD_DIM / S::PARTS;
    const int ROW_GROUPS = CHUNK / S::SCORE_ROWS;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 head = warp % (TILES / M) * M * TILE_HEADS, rest = warp / (TILES / M);
    u32 first_row = rest % ROW_GROUPS * S::SCORE_ROWS, part = rest / ROW_GROUPS;
    const u16* q = shared.queries + (head + lane % 16) * ROW_STRIDE + part * PART + lane / 16 * 8;
    const u16* k = shared.rows + (first_row + lane % 8 + lane / 16 * 8) * ROW_STRIDE + part * PART +
                   lane / 8 % 2 * 8;
    float d[M][2 * N][4] = {};
#pragma unroll 4
    for (int e = 0; e < PART; e += 16) {
        u32 a[M][4], b[N][4];
#pragma unroll
        for (int m = 0; m < M; ++m) load_matrix4(a[m], q + m * TILE_HEADS * ROW_STRIDE + e);
#pragma unroll
        for (int n = 0; n < N; ++n) load_matrix4(b[n], k + n * 16 * ROW_STRIDE + e);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < 2 * N; ++n) {
                mma(d[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
            }
        }
    }
    float* out = shared.scores + (part * S::HEADS + head + lane / 4) * S::SCORE_STRIDE + first_row +
                 lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < 2 * N; ++n) {
            float* at = out + m * TILE_HEADS * S::SCORE_STRIDE + n * 8;
            *(float2*)at = make_float2(d[m][n][0], d[m][n][1]);
            *(float2*)(at + 8 * S::SCORE_STRIDE) = make_float2(d[m][n][2], d[m][n][3]);
        }
    }
}

// The sum of x over rows i · LANES + lane of a chunk, in all LANES lanes: halves of the chunk are
// added, and then what is 1, 2, 4 … rows apart, whatever LANES is.
template <int LANES, int EACH>
__device__ inline float sum_rows(float (&x)[EACH]) {
    static_assert(EACH % 2 == 0, "both halves of the chunk are in each lane");
#pragma unroll
    for (int i = 0; i < EACH / 2; ++i) {
        x[i] += x[i + EACH / 2];
#pragma unroll
        for (int d = 1; d < LANES; d *= 2) x[i] += __shfl_xor_sync(FULL_WARP, x[i], d);
    }
#pragma unroll
    for (int d = 1; d < EACH / 2; d *= 2) {
#pragma unroll
        for (int i = 0; i + d < EACH / 2; i += 2 * d) x[i] += x[i + d];
    }
    return x[0];
}

// Turns the chunk's scores into weights e^(score - largest so far), and keeps the running sums.
// `valid` rows of the chunk count.
template <int CHUNK, class S>
__device__ inline void weigh(const S& shared, u32 valid, float scale) {
    const int LANES = ATTEND_THREADS / S::HEADS, EACH = CHUNK / LANES;
    u32 head = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float x[EACH];
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        u32 row = i * LANES + lane;
        float score = 0;
        for (int part = 0; part < S::PARTS; ++part) {
            score += shared.scores[(part * S::HEADS + head) * S::SCORE_STRIDE + row];
        }
        x[i] = row < valid ? score * scale : -INFINITY;
        largest = fmaxf(largest, x[i]);
    }
    largest = lanes_max<LANES>(largest);
    float before = shared.largest[head];
    largest = fmaxf(largest, before);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        // The sum takes the weight as the product with the values will.
        u16 weight = float_to_half(exp2f(x[i] - largest));
        shared.weights[head * S::WEIGHT_STRIDE + i * LANES + lane] = weight;
        x[i] = half_to_float(weight);
    }
    float sum = sum_rows<LANES>(x);
    // The head's other lanes have read what is overwritten here.
    __syncwarp();
    if (lane == 0) {
        float keep = exp2f(before - largest);
        shared.keep[head] = keep;
        shared.largest[head] = largest;
        shared.total[head] = shared.total[head] * keep + sum;
    }
}

// Adds the weighted values of the chunk to the warp's columns of the result, for all heads.
template <int TILES, int CHUNK, class S>
__device__ inline void multiply_values(const S& shared, float (&sums)[TILES][WARP_COLUMNS / 8][4]) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
        float low = shared.keep[m * TILE_HEADS + lane / 4];
        float high = shared.keep[m * TILE_HEADS + lane / 4 + 8];
        if (__all_sync(FULL_WARP, low == 1.0f && high == 1.0f)) continue;
#pragma unroll
        for (int n = 0; n < WARP_COLUMNS / 8; ++n) {
            sums[m][n][0] *= low, sums[m][n][1] *= low;
            sums[m][n][2] *= high, sums[m][n][3] *= high;
        }
    }
    const u16* w = shared.weights + lane % 16 * S::WEIGHT_STRIDE + lane / 16 * 8;
    const u16* v = shared.rows + lane % 16 * ROW_STRIDE + warp * WARP_COLUMNS + lane / 16 * 8;
#pragma unroll
    for (int r = 0; r < CHUNK; r += 16) {
        u32 a[TILES][4];
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
            load_matrix4(a[m], w + m * TILE_HEADS * S::WEIGHT_STRIDE + r);
        }
#pragma unroll
        for (int n = 0; n < WARP_COLUMNS / 16; ++n) {
            u32 b[4];
            load_matrix4_transposed(b, v + r * ROW_STRIDE + n * 16);
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
                mma(sums[m][2 * n], a[m], b[0], b[1]);
                mma(sums[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Starts the copy of a range's first chunk, if rows are stored packed.
template <int CHUNK, class S>
__device__ inline void begin_rows(const S& shared, const AttentionParams& a,
                                  const VisibleRows& rows, const RowRange& range) {
    if (!a.at.rounding) return;
    fetch_rows<CHUNK>(shared, row_address<CHUNK>(rows, range), range.end - range.begin);
}

// Attention of the block's heads over a range of rows, begun with `begin_rows`: unnormalised sums
// in registers, their largest scores and totals in shared memory. Begins the range `next`, if it is
// not empty.
template <int TILES, int CHUNK, class S>
__device__ inline void attend_rows(const S& shared, const AttentionParams& a,
                                   const VisibleRows& rows, const RowRange& range,
                                   const RowRange& next,
                                   float (&sums)[TILES][WARP_COLUMNS / 8][4]) {
    for (u32 chunk = range.begin; chunk < range.end; chunk += CHUNK) {
        copy_async_wait<0>();
        __syncthreads();
        if (chunk == range.begin && threadIdx.x < S::HEADS) {
            shared.largest[threadIdx.x] = -INFINITY;
            shared.total[threadIdx.x] = 0;
        }
        bool last = chunk + CHUNK >= range.end;
        RowRange following = last ? next : RowRange{chunk + CHUNK, range.end};
        bool fetches = a.at.rounding && !following.is_empty();
        // Read before it is needed: the chosen rows' numbers come from memory, too.
        const u8* address = fetches ? row_address<CHUNK>(rows, following) : nullptr;
        decode_rows<CHUNK>(shared, rows, chunk, range.end, a.at.rounding);
        __syncthreads();
        if (fetches) fetch_rows<CHUNK>(shared, address, following.end - following.begin);
        multiply_keys<TILES, CHUNK>(shared);
        __syncthreads();
        weigh<CHUNK>(shared, range.end - chunk, a.scale);
        __syncthreads();
        multiply_values<TILES, CHUNK>(shared, sums);
    }
}
