// Attention over the sliding window and the compressed rows, on tensor cores.
//
// A row is both key and value: it is decoded once to halves in shared memory and feeds both
// products. Softmax runs online over chunks of rows. A block works on one query: with TILES = 4 on
// 64 of its heads and all its rows (prefill), with TILES = 1 on 16 heads, and in decoding on one of
// several splits of the rows, which `merge_attention` joins.

#include "rows.cuh"

#define ATTEND_THREADS 256
#define ATTEND_WARPS (ATTEND_THREADS / WARP)
#define TILE_HEADS 16
// Splits of a query's rows in decoding, at most; mirrors MAX_SPLITS in src/stages/attention.rs.
// The 640 rows of a CSA layer then make one chunk each: a second one took as long as the first.
#define MAX_SPLITS 20
#define SPLIT_CHUNK 32
// Columns of the result that a warp sums.
#define WARP_COLUMNS (HEAD_DIM / ATTEND_WARPS)
// Halves between rows of a shared tile: 16 bytes more than the row, so that the eight rows of a
// matrix load lie in different banks.
#define ROW_STRIDE (HEAD_DIM + 8)
#define LOG2_E 1.4426950408889634f

// What a block reads.
struct Attention {
    // Queries [n, heads, 512], halves, neither normalised nor rotated.
    const u16* queries;
    // Stored rows of the step [n, row bytes].
    const u8* kv_rows;
    // Chosen compressed rows [n, top_k].
    const u32* selected;
    // Cosines and sines [n, 32].
    const float2* rotations;
    // Logits of the sinks [heads].
    const float* sinks;
    u32 heads;
    u32 top_k;
    // Tokens of a compressed row; 0 for none.
    u32 ratio;
    int rounding;
    float epsilon;
    // Of scores, log2(e) included.
    float scale;
};

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
    return min(position + 1, (u32)WINDOW) + (ratio == 4 ? min(compressed, top_k) : compressed);
}

__device__ inline VisibleRows visible_rows(const Attention& a, const Step& step,
                                           const LayerCache& cache, u32 row) {
    u32 position = step.position[row], compressed = a.ratio ? (position + 1) / a.ratio : 0;
    bool chosen = a.ratio == 4 && compressed > a.top_k;
    VisibleRows rows;
    rows.bytes = kv_row_bytes(a.rounding);
    rows.window = cache.window;
    rows.step_rows = a.kv_rows + (u64)step.span_row[row] * rows.bytes;
    rows.compressed = cache.rows;
    rows.selected = chosen ? a.selected + (u64)row * a.top_k : nullptr;
    rows.window_rows = min(position + 1, (u32)WINDOW);
    rows.oldest = position + 1 - rows.window_rows;
    rows.span_position = step.span_position[row];
    rows.total = visible_count(position, a.ratio, a.top_k);
    return rows;
}

// Rows of one split in decoding. It follows from the query's own rows alone, whatever else is in
// the step, and is whole chunks.
__device__ inline u32 rows_per_split(u32 total) {
    u32 share = (total + MAX_SPLITS - 1) / MAX_SPLITS;
    return (share + SPLIT_CHUNK - 1) / SPLIT_CHUNK * SPLIT_CHUNK;
}

// Shared memory of a block: `bytes` in all, as src/stages/attention.rs computes it.
template <int TILES, int CHUNK>
struct Shared {
    static constexpr int HEADS = TILES * TILE_HEADS;
    // Warps that share the same scores, each with a part of the 512 elements to sum.
    static constexpr int HEAD_TILES = TILES == 1 ? 1 : 2;
    static constexpr int PARTS = ATTEND_WARPS / ((TILES / HEAD_TILES) * (CHUNK / 32));
    static constexpr int SCORE_STRIDE = CHUNK + 4;
    static constexpr int WEIGHT_STRIDE = CHUNK + 8;

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

// One head of a query, by a warp: two runs of eight elements a lane, the second `rotated` or not.
__device__ inline void store_query(const uint4 (&raw)[2], const float2 (&rotations)[4], bool rotated,
                                   float epsilon, u16* to, u32 lane) {
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
__device__ inline void load_queries(const S& shared, const Attention& a, u32 row, u32 first_head) {
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
            store_query(raw[h], rotations, second >= NOPE_DIM, a.epsilon, to, lane);
        }
    }
}

// Addresses of the rows of a chunk: lane i of a warp has that of the warp's row i, which is row
// warp + i · ATTEND_WARPS of the chunk. Beyond `end` it is the last row's.
template <int CHUNK>
__device__ inline const u8* row_address(const VisibleRows& rows, u32 begin, u32 end) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 i = begin + warp + lane % (CHUNK / ATTEND_WARPS) * ATTEND_WARPS;
    return rows[min(i, end - 1)];
}

// Brings the rows of a chunk nearer, a row's 128 bytes a lane, but for those whose numbers may not be
// known yet.
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
        for (u32 piece = lane; piece < KV_ROW / 8; piece += WARP) {
            copy_async8(to + 8 * piece, from + 8 * piece, row < valid);
        }
    }
    copy_async_commit();
}

// Decodes one stored row, by a warp.
__device__ inline void decode_row(const u8* stored, u32 lane, u16* out) {
    const uint2* codes = (const uint2*)stored;
    const u8* scales = stored + KV_SCALES;
#pragma unroll
    for (u32 piece = lane; piece < NOPE_DIM / 8; piece += WARP) {
        ((uint4*)out)[piece] = decode_e4m3(codes[piece], e4m3_factor(scales[piece / 8]));
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

// Partial scores of the chunk: each warp multiplies HEAD_TILES tiles of heads with 32 rows over
// its part of the elements.
template <int TILES, int CHUNK, class S>
__device__ inline void multiply_keys(const S& shared) {
    const int M = S::HEAD_TILES, PART = HEAD_DIM / S::PARTS;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 head = warp % (TILES / M) * M * TILE_HEADS, rest = warp / (TILES / M);
    u32 first_row = rest % (CHUNK / 32) * 32, part = rest / (CHUNK / 32);
    const u16* q = shared.queries + (head + lane % 16) * ROW_STRIDE + part * PART + lane / 16 * 8;
    const u16* k = shared.rows + (first_row + lane % 8 + lane / 16 * 8) * ROW_STRIDE + part * PART +
                   lane / 8 % 2 * 8;
    float d[M][4][4] = {};
#pragma unroll 4
    for (int e = 0; e < PART; e += 16) {
        u32 a[M][4], b[2][4];
#pragma unroll
        for (int m = 0; m < M; ++m) load_matrix4(a[m], q + m * TILE_HEADS * ROW_STRIDE + e);
#pragma unroll
        for (int n = 0; n < 2; ++n) load_matrix4(b[n], k + n * 16 * ROW_STRIDE + e);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                mma(d[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
            }
        }
    }
    float* out = shared.scores + (part * S::HEADS + head + lane / 4) * S::SCORE_STRIDE + first_row +
                 lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            float* at = out + m * TILE_HEADS * S::SCORE_STRIDE + n * 8;
            *(float2*)at = make_float2(d[m][n][0], d[m][n][1]);
            *(float2*)(at + 8 * S::SCORE_STRIDE) = make_float2(d[m][n][2], d[m][n][3]);
        }
    }
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
    float sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        // The sum takes the weight as the product with the values will.
        u16 weight = float_to_half(exp2f(x[i] - largest));
        shared.weights[head * S::WEIGHT_STRIDE + i * LANES + lane] = weight;
        sum += half_to_float(weight);
    }
#pragma unroll
    for (int d = 1; d < LANES; d *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, d);
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

// Attention of the block's heads over rows [begin, end): unnormalised sums in registers, their
// largest scores and totals in shared memory.
template <int TILES, int CHUNK, class S>
__device__ inline void attend_rows(const S& shared, const Attention& a, const VisibleRows& rows,
                                   u32 row, u32 first_head, u32 begin, u32 end,
                                   float (&sums)[TILES][WARP_COLUMNS / 8][4]) {
    if (a.rounding) fetch_rows<CHUNK>(shared, row_address<CHUNK>(rows, begin, end), end - begin);
    load_queries(shared, a, row, first_head);
    if (threadIdx.x < S::HEADS) {
        shared.largest[threadIdx.x] = -INFINITY;
        shared.total[threadIdx.x] = 0;
    }
    for (u32 chunk = begin; chunk < end; chunk += CHUNK) {
        copy_async_wait<0>();
        __syncthreads();
        // Read before it is needed: the chosen rows' numbers come from memory, too.
        const u8* next = row_address<CHUNK>(rows, chunk + CHUNK, end);
        decode_rows<CHUNK>(shared, rows, chunk, end, a.rounding);
        __syncthreads();
        if (a.rounding && chunk + CHUNK < end) {
            fetch_rows<CHUNK>(shared, next, end - chunk - CHUNK);
        }
        multiply_keys<TILES, CHUNK>(shared);
        __syncthreads();
        weigh<CHUNK>(shared, end - chunk, a.scale);
        __syncthreads();
        multiply_values<TILES, CHUNK>(shared, sums);
    }
}

// All rows of one query for TILES tiles of its heads: grid [rows, head groups].
template <int TILES, int CHUNK>
__device__ inline void attend_query(const Attention& a, const Step& step, u32 first_row,
                                    const LayerCache* caches, u32 layer, u32 layers, u16* out) {
    Shared<TILES, CHUNK> shared;
    u32 row = first_row + blockIdx.x, first_head = blockIdx.y * shared.HEADS;
    const LayerCache& cache = layer_cache(caches, step.session[row], layer, layers);
    VisibleRows rows = visible_rows(a, step, cache, row);
    float sums[TILES][WARP_COLUMNS / 8][4] = {};
    attend_rows<TILES, CHUNK>(shared, a, rows, row, first_head, 0, rows.total, sums);

    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
        u32 h = i * 8 + lane / 4, head = first_head + h;
        if (head >= a.heads) continue;
        float sink = a.sinks[head] * LOG2_E, largest = fmaxf(shared.largest[h], sink);
        float factor = exp2f(shared.largest[h] - largest);
        factor /= shared.total[h] * factor + exp2f(sink - largest);
        u16* to = out + ((u64)row * a.heads + head) * HEAD_DIM;
#pragma unroll
        for (int n = 0; n < WARP_COLUMNS / 8; ++n) {
            u32 column = warp * WARP_COLUMNS + n * 8 + lane % 4 * 2;
            float x = sums[i / 2][n][i % 2 * 2] * factor;
            float y = sums[i / 2][n][i % 2 * 2 + 1] * factor;
            if (column >= NOPE_DIM) {
                rotate_back(x, y, a.rotations[row * PAIRS + (column - NOPE_DIM) / 2]);
            }
            *(u32*)(to + column) = pack_half2(x, y);
        }
    }
}

// The prefill kernels differ in heads a block and rows a chunk, thus in their shared memory.
#define ATTEND_PREFILL(NAME, TILES, CHUNK, BLOCKS)                                                 \
    extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, BLOCKS) NAME(                     \
        Step step, u32 first_row, const LayerCache* caches, u32 layer, u32 layers, u32 ratio,      \
        u32 heads, const u16* queries, const u8* kv_rows, const u32* selected, u32 top_k,          \
        const float2* rotations, const float* sinks, int rounding, float epsilon, float scale,     \
        u16* out) {                                                                                \
        wait_for_dependencies();                                                                   \
        launch_dependents();                                                                       \
        Attention a = {queries, kv_rows, selected, rotations, sinks, heads,                        \
                       top_k,   ratio,   rounding, epsilon,   scale * LOG2_E};                     \
        attend_query<TILES, CHUNK>(a, step, first_row, caches, layer, layers, out);                \
    }

ATTEND_PREFILL(attend_prefill_64x64, 4, 64, 1)
ATTEND_PREFILL(attend_prefill_64x32, 4, 32, 1)
ATTEND_PREFILL(attend_prefill_16x32, 1, SPLIT_CHUNK, 2)

// Stores the row's key/value row in its window. The slot's old row is out of sight of all queries
// of a span of at most MAX_REWIND rows, and the row itself is read from the step.
__device__ inline void keep_row(const u8* kv_rows, u32 row, u32 bytes, u8* slot) {
    const uint2* from = (const uint2*)(kv_rows + (u64)row * bytes);
    for (u32 i = threadIdx.x; i < bytes / sizeof(uint2); i += ATTEND_THREADS) {
        ((uint2*)slot)[i] = from[i];
    }
}

// One split of the rows of each query, for 16 of its heads, and one block that stores the row in
// its window: grid [MAX_SPLITS + 1, head groups, rows], for spans of at most MAX_REWIND rows.
//
// Normalised sums go to `partial` [rows, MAX_SPLITS, heads, 512], halves as the result will be;
// (largest, total) to `partial_sums` [rows, MAX_SPLITS, heads].
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) attend_splits(
    Step step, u32 first_row, const LayerCache* caches, u32 layer, u32 layers, u32 ratio, u32 heads,
    const u16* queries, const u8* kv_rows, const u32* selected, u32 top_k, const float2* rotations,
    int rounding, float epsilon, float scale, u16* partial, float2* partial_sums) {
    launch_dependents();
    Attention a = {queries, kv_rows, selected, rotations, nullptr, heads,
                   top_k,   ratio,   rounding, epsilon,   scale * LOG2_E};
    Shared<1, SPLIT_CHUNK> shared;
    u32 row = first_row + blockIdx.z, first_head = blockIdx.y * shared.HEADS;
    // What a step has from its beginning needs no waiting for.
    const LayerCache& cache = layer_cache(caches, step.session[row], layer, layers);
    VisibleRows rows = visible_rows(a, step, cache, row);
    u8* slot = cache.window + step.position[row] % WINDOW_SLOTS * rows.bytes;
    u32 share = rows_per_split(rows.total), begin = blockIdx.x * share;
    u32 end = min(begin + share, rows.total);
    prefetch_rows<SPLIT_CHUNK>(rows, begin, end);
    wait_for_dependencies();
    if (blockIdx.x == MAX_SPLITS) {
        if (blockIdx.y == 0) keep_row(kv_rows, row, rows.bytes, slot);
        return;
    }
    if (begin >= rows.total) return;
    float sums[1][WARP_COLUMNS / 8][4] = {};
    attend_rows<1, SPLIT_CHUNK>(shared, a, rows, row, first_head, begin, end, sums);

    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u64 first = ((u64)blockIdx.z * MAX_SPLITS + blockIdx.x) * heads + first_head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u32 h = i * 8 + lane / 4;
        if (first_head + h >= heads) continue;
        float factor = 1.0f / shared.total[h];
        u16* to = partial + (first + h) * HEAD_DIM + warp * WARP_COLUMNS + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < WARP_COLUMNS / 8; ++n) {
            float x = sums[0][n][2 * i] * factor, y = sums[0][n][2 * i + 1] * factor;
            *(u32*)(to + n * 8) = pack_half2(x, y);
        }
    }
    u32 h = threadIdx.x;
    if (h < shared.HEADS && first_head + h < heads) {
        partial_sums[first + h] = make_float2(shared.largest[h], shared.total[h]);
    }
}

// Joins the splits, adds the sink and rotates back: grid [heads, rows], four elements a thread.
//
// A launch of its own: the partial results of 16 heads are up to 320 KB, which a block that went on
// after the splits would read no faster than 64 bytes a cycle.
extern "C" __global__ void __launch_bounds__(KV_THREADS) merge_attention(
    Step step, u32 first_row, u32 ratio, u32 heads, u32 top_k, const float2* rotations,
    const float* sinks, const u16* partial, const float2* partial_sums, u16* out) {
    static_assert(MAX_SPLITS <= WARP, "a lane weighs a split");
    launch_dependents();
    u32 row = first_row + blockIdx.y, head = blockIdx.x, lane = threadIdx.x % WARP;
    u32 total_rows = visible_count(step.position[row], ratio, top_k);
    u32 share = rows_per_split(total_rows), splits = (total_rows + share - 1) / share;
    float sink = sinks[head] * LOG2_E;
    wait_for_dependencies();
    u64 first = (u64)blockIdx.y * MAX_SPLITS * heads + head;
    float2 sums = make_float2(-INFINITY, 0);
    if (lane < splits) sums = partial_sums[first + lane * heads];
    uint2 parts[MAX_SPLITS];
#pragma unroll
    for (u32 s = 0; s < MAX_SPLITS; ++s) {
        if (s >= splits) continue;
        parts[s] = ((const uint2*)(partial + (first + s * heads) * HEAD_DIM))[threadIdx.x];
    }
    bool rotated = threadIdx.x >= NOPE_DIM / 4;
    float2 rotation[2] = {};
    if (rotated) {
        const float2* own = rotations + row * PAIRS + 2 * (threadIdx.x - NOPE_DIM / 4);
        rotation[0] = own[0], rotation[1] = own[1];
    }

    float largest = fmaxf(warp_max(sums.x), sink);
    float weight = sums.y * exp2f(sums.x - largest);
    weight /= warp_sum(weight) + exp2f(sink - largest);
    float x[4] = {0, 0, 0, 0};
#pragma unroll
    for (u32 s = 0; s < MAX_SPLITS; ++s) {
        float own = __shfl_sync(FULL_WARP, weight, s);
        if (s >= splits) continue;
        float2 low = unpack_half2(parts[s].x), high = unpack_half2(parts[s].y);
        x[0] += own * low.x, x[1] += own * low.y;
        x[2] += own * high.x, x[3] += own * high.y;
    }
    if (rotated) {
        rotate_back(x[0], x[1], rotation[0]);
        rotate_back(x[2], x[3], rotation[1]);
    }
    uint2* to = (uint2*)(out + ((u64)row * heads + head) * HEAD_DIM);
    to[threadIdx.x] = make_uint2(pack_half2(x[0], x[1]), pack_half2(x[2], x[3]));
}
