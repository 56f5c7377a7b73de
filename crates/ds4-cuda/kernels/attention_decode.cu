// Attention of few rows: flash-decoding with a combine. Blocks share the splits of what a query
// sees, and `combine_splits` joins their results.
//
//   q = rotate(norm(query)), score[r] = scale · q·row[r], sink = sinks[head]
//   out = rotate back (Σ_r e^score[r] · row[r] / (Σ_r e^score[r] + e^sink))
//
// Inputs: queries f16 [n, heads, 512]; stored rows of the window, the step and the compressor.
// Output: out f16 [n, heads, 512].
// Between the kernels: partial sums f16 [rows, MAX_SPLITS, heads, 512], and their largest scores
// and totals.
// Grid of flash_decode: (blocks that share the splits + 1, groups of 16 or 64 heads, rows). Block:
// 256 threads. The last block stores the row in its window.
// Grid of combine_splits: (heads, rows). Block: 128 threads, four elements each.
// Plain Rust: `attend` in crates/ds4-cpu/src/reference/attention.rs.

#include "attention.cuh"

// Rows of one split in decoding. It follows from the query's own rows alone, whatever else is in
// the step, and is whole chunks.
__device__ inline u32 rows_per_split(u32 total) {
    u32 each = (total + MAX_SPLITS - 1) / MAX_SPLITS;
    return (each + SHORT_CHUNK - 1) / SHORT_CHUNK * SHORT_CHUNK;
}

// Stores the row's key/value row in its window. The slot's old row is out of sight of all queries
// of a span of at most MAX_REWIND rows, and the row itself is read from the step.
__device__ inline void keep_row(const u8* kv_rows, u32 row, u32 bytes, u8* slot) {
    const uint2* from = (const uint2*)(kv_rows + (u64)row * bytes);
    for (u32 i = threadIdx.x; i < bytes / sizeof(uint2); i += ATTEND_THREADS) {
        ((uint2*)slot)[i] = from[i];
    }
}

// A split's results for the block's first `heads` heads: normalised sums to `partial_sums`, halves
// as the whole result will be, and (largest, total) to `partial_totals`, both from the split's own
// head on.
template <int TILES, class S>
__device__ inline void store_split(const S& shared, const float (&sums)[TILES][WARP_COLUMNS / 8][4],
                                   u32 heads, u16* partial_sums, float2* partial_totals) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
        u32 h = i * 8 + lane / 4;
        if (h >= heads) continue;
        float factor = 1.0f / shared.total[h];
        u16* to = partial_sums + h * HEAD_DIM + warp * WARP_COLUMNS + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < WARP_COLUMNS / 8; ++n) {
            const float(&sum)[4] = sums[i / 2][n];
            float x = sum[i % 2 * 2] * factor, y = sum[i % 2 * 2 + 1] * factor;
            *(u32*)(to + n * 8) = pack_half2(x, y);
        }
    }
    u32 h = threadIdx.x;
    if (h < S::HEADS && h < heads) {
        partial_totals[h] = make_float2(shared.largest[h], shared.total[h]);
    }
}

// The block's splits of a query's rows, for TILES tiles of its heads; or storing the row in its
// window. A block of several splits loads its queries once, and copies the next split's rows while
// it works on one.
template <int TILES>
__device__ inline void attend_some_splits(const AttentionParams& a) {
    Shared<TILES, SHORT_CHUNK> shared;
    u32 row = a.at.first_row + blockIdx.z, first_head = blockIdx.y * shared.HEADS;
    // What a step has from its beginning needs no waiting for.
    const LayerCache& cache = a.at.cache(row);
    VisibleRows rows = visible_rows(a, cache, row);
    u8* slot = cache.window + a.at.step.position[row] % WINDOW_SLOTS * rows.bytes;
    u32 blocks = gridDim.x - 1, each = rows_per_split(rows.total);
    auto range_of = [&](u32 split) {
        return RowRange{split * each, min((split + 1) * each, rows.total)};
    };
    RowRange range = range_of(blockIdx.x);
    prefetch_rows<SHORT_CHUNK>(rows, range.begin, range.end);
    wait_for_dependencies();
    if (blockIdx.x == blocks) {
        if (blockIdx.y == 0) keep_row(a.kv_rows, row, rows.bytes, slot);
        return;
    }
    if (range.is_empty()) return;
    begin_rows<SHORT_CHUNK>(shared, a, rows, range);
    load_queries(shared, a, row, first_head);
    u64 split = (u64)blockIdx.z * MAX_SPLITS + blockIdx.x;
    for (u32 s = blockIdx.x; !range.is_empty(); s += blocks, split += blocks) {
        RowRange next = range_of(s + blocks);
        float sums[TILES][WARP_COLUMNS / 8][4] = {};
        attend_rows<TILES, SHORT_CHUNK>(shared, a, rows, range, next, sums);
        u64 first = split * a.heads + first_head;
        store_split<TILES>(shared, sums, a.heads - first_head, a.partial_sums + first * HEAD_DIM,
                           a.partial_totals + first);
        range = next;
    }
}

// For spans of at most MAX_REWIND rows. With many rows, a block has 64 heads, for which it decodes
// rows once. Results don't depend on the kernel, nor on the number of blocks.
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, 2) flash_decode_16(
    __grid_constant__ const AttentionParams a
) {
    launch_dependents();
    attend_some_splits<1>(a);
}

extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, 1) flash_decode_64(
    __grid_constant__ const AttentionParams a
) {
    launch_dependents();
    attend_some_splits<4>(a);
}

// Combines the splits, adds the sink and rotates back. A launch of its own: the partial results of
// 16 heads are up to 320 KB, which a block that went on after the splits would read no faster than
// 64 bytes a cycle.
extern "C" __global__ void __launch_bounds__(KV_THREADS) combine_splits(
    __grid_constant__ const AttentionParams a
) {
    static_assert(MAX_SPLITS <= WARP, "a lane weighs a split");
    launch_dependents();
    u32 row = a.at.first_row + blockIdx.y, head = blockIdx.x, lane = threadIdx.x % WARP;
    u32 heads = a.heads, total_rows = visible_count(a.at.step.position[row], a.at.ratio, a.top_k);
    u32 each = rows_per_split(total_rows), splits = (total_rows + each - 1) / each;
    float sink = a.sinks[head] * LOG2_E;
    wait_for_dependencies();
    u64 first = (u64)blockIdx.y * MAX_SPLITS * heads + head;
    float2 sums = make_float2(-INFINITY, 0);
    if (lane < splits) sums = a.partial_totals[first + lane * heads];
    uint2 parts[MAX_SPLITS];
#pragma unroll
    for (u32 s = 0; s < MAX_SPLITS; ++s) {
        if (s >= splits) continue;
        parts[s] = ((const uint2*)(a.partial_sums + (first + s * heads) * HEAD_DIM))[threadIdx.x];
    }
    bool rotated = threadIdx.x >= NOPE_DIM / 4;
    float2 rotation[2] = {};
    if (rotated) {
        const float2* own = a.rotations + row * PAIRS + 2 * (threadIdx.x - NOPE_DIM / 4);
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
    uint2* to = (uint2*)(a.out + ((u64)row * heads + head) * HEAD_DIM);
    to[threadIdx.x] = make_uint2(pack_half2(x[0], x[1]), pack_half2(x[2], x[3]));
}
