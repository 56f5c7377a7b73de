// Attention of many rows: a block has all that a query sees.
//
// Formula, inputs and output are as in attention_decode.cu, without partial results.
// Grid: (rows, groups of 16 or 64 heads). Block: 256 threads. Rows are read in chunks of 32 or 64.
// Plain Rust: `attend` in crates/ds4-cpu/src/reference/attention.rs.

#include "attention.cuh"

// All rows of one query for TILES tiles of its heads: grid [rows, head groups].
template <int TILES, int CHUNK>
__device__ inline void attend_query(const AttentionParams& a) {
    Shared<TILES, CHUNK> shared;
    u32 row = a.at.first_row + blockIdx.x, first_head = blockIdx.y * shared.HEADS;
    VisibleRows rows = visible_rows(a, a.at.cache(row), row);
    RowRange all = {0, rows.total};
    begin_rows<CHUNK>(shared, a, rows, all);
    load_queries(shared, a, row, first_head);
    float sums[TILES][WARP_COLUMNS / 8][4] = {};
    attend_rows<TILES, CHUNK>(shared, a, rows, all, {0, 0}, sums);

    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
        u32 h = i * 8 + lane / 4, head = first_head + h;
        if (head >= a.heads) continue;
        float sink = a.sinks[head] * LOG2_E, largest = fmaxf(shared.largest[h], sink);
        float factor = exp2f(shared.largest[h] - largest);
        factor /= shared.total[h] * factor + exp2f(sink - largest);
        u16* to = a.out + ((u64)row * a.heads + head) * HEAD_DIM;
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
        __grid_constant__ const AttentionParams a                                                  \
    ) {                                                                                            \
        wait_for_dependencies();                                                                   \
        launch_dependents();                                                                       \
        attend_query<TILES, CHUNK>(a);                                                             \
    }

ATTEND_PREFILL(attend_prefill_64x64, 4, LONG_CHUNK, 1)
ATTEND_PREFILL(attend_prefill_64x32, 4, SHORT_CHUNK, 1)
ATTEND_PREFILL(attend_prefill_16x32, 1, SHORT_CHUNK, 2)
