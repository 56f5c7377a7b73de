// The work list of the experts that some rows chose, the part of it that a block has, and how
// weights get to shared memory, for the kernels in experts_q2.cu.
#pragma once

#include "permutation.cuh"
#include "products.cuh"

// One or two of an expert's pairs: `first` … below `end`.
struct PairRange {
    const u32* pairs;
    int first, end;

    __device__ inline int rows() const { return end - first; }

    // Repeats the last one.
    __device__ inline u32 pair(int r) const { return pairs[min(first + r, end - 1)]; }
};

// ---- The work list ------------------------------------------------------------------------------

// What a tile takes with so many rows: two take little more than one.
__device__ inline int tile_cost(int rows) { return rows / 2 * 5 + rows % 2 * 4; }

// Chosen experts, in shared memory.
struct WorkList {
    int count;
    // Their numbers, where their pairs start, and what the work tiles of the experts before take.
    u16 experts[MOST_EXPERTS];
    int starts[MOST_EXPERTS + 1], costs[MOST_EXPERTS + 1];
    int warp_counts[DECODE_WARPS], warp_costs[DECODE_WARPS];

    // By the whole block; `work_tiles` is the number of an expert's.
    __device__ inline void load(const Permutation& permutation, int all, int work_tiles) {
        int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, chosen = 0, taken = 0, end = 0;
        for (int first = 0; first < all; first += DECODE_WARPS * WARP) {
            int expert = first + threadIdx.x, start = 0;
            if (expert < all) {
                start = permutation.offsets[expert];
                end = permutation.offsets[expert + 1];
            }
            int cost = expert < all ? tile_cost(end - start) * work_tiles : 0, sum = cost;
            u32 warp_chosen = __ballot_sync(FULL_WARP, cost > 0);
#pragma unroll
            for (int d = 1; d < WARP; d *= 2) {
                int other = __shfl_up_sync(FULL_WARP, sum, d);
                if (lane >= d) sum += other;
            }
            if (lane == WARP - 1) {
                warp_counts[warp] = __popc(warp_chosen);
                warp_costs[warp] = sum;
            }
            __syncthreads();
            int at = chosen + __popc(warp_chosen & ((1u << lane) - 1));
            sum += taken - cost;
#pragma unroll
            for (int w = 0; w < DECODE_WARPS; ++w) {
                if (w < warp) {
                    at += warp_counts[w];
                    sum += warp_costs[w];
                }
                chosen += warp_counts[w];
                taken += warp_costs[w];
            }
            if (cost > 0) {
                experts[at] = (u16)expert;
                starts[at] = start;
                costs[at] = sum;
            }
            // The last one's end is the next one's start.
            if (expert == all - 1) starts[chosen] = end;
            __syncthreads();
        }
        if (threadIdx.x == 0) {
            count = chosen;
            costs[chosen] = taken;
        }
        __syncthreads();
    }

    __device__ inline int rows(int at) const { return starts[at + 1] - starts[at]; }
};

// What a block does at a time: some tiles of an expert for one or two of its rows. An expert of
// many rows is gone through several times, rather than each tile: so its rows seldom change, and no
// work tile is larger than others.
struct WorkTile {
    // Number of the expert among the chosen ones, the first of its rows, and which tiles.
    int at, row, number;

    __device__ inline bool before(const WorkTile& other) const {
        if (at != other.at) return at < other.at;
        return row < other.row || (row == other.row && number < other.number);
    }
};

// Which work tiles a block has, and which tile of each a warp has.
struct Schedule {
    const WorkList& work;
    // Of an expert.
    int work_tiles, tiles;
    // Tiles of a work tile, and the warp's own one.
    int tiles_each, local;
    // Of a tile.
    int units;

    // Where the work tiles of block i of `blocks` begin, and where those of the block before end.
    __device__ inline WorkTile bound(int i, int blocks) const {
        int all = work.costs[work.count], each = all / blocks;
        return tile_at(each * i + (all - each * blocks) * i / blocks);
    }

    // The first work tile before which all together take at least `cost`. For whole warps.
    __device__ inline WorkTile tile_at(int cost) const {
        WorkTile work_tile = {0, 0, 0};
        for (int first = 0; first < work.count; first += WARP) {
            int i = first + threadIdx.x % WARP;
            bool before = i < work.count && work.costs[i + 1] <= cost;
            work_tile.at += __popc(__ballot_sync(FULL_WARP, before));
        }
        if (work_tile.at == work.count) return work_tile;
        int rest = cost - work.costs[work_tile.at], whole = work_tiles * tile_cost(INTEGER_ROWS);
        work_tile.row = rest / whole * INTEGER_ROWS;
        int each = tile_cost(rows(work_tile));
        // The last one that begins before, and then the next.
        work_tile.number = (rest % whole + each - 1) / each - 1;
        next(work_tile);
        return work_tile;
    }

    __device__ inline void next(WorkTile& work_tile) const {
        if (++work_tile.number < work_tiles) return;
        work_tile.number = 0;
        work_tile.row += INTEGER_ROWS;
        if (work_tile.row >= work.rows(work_tile.at)) ++work_tile.at, work_tile.row = 0;
    }

    // Rows that are multiplied at a time.
    __device__ inline int rows(const WorkTile& work_tile) const {
        return min(work.rows(work_tile.at) - work_tile.row, INTEGER_ROWS);
    }

    __device__ inline PairRange pairs(const Permutation& p, const WorkTile& work_tile) const {
        int first = work.starts[work_tile.at] + work_tile.row;
        return {p.pairs, first, first + rows(work_tile)};
    }
};

// ---- Weights on their way -----------------------------------------------------------------------

// Units of a chunk, which is copied at a time, and chunks that a warp has room for in shared
// memory.
#define CHUNK 2
#define RING 2

// Brings a warp's units to its ring, in the order in which they are multiplied.
template <int TYPE>
struct Fetch {
    // Bytes of a tile's unit.
    static constexpr int CODES = TYPE == IQ2_XXS ? IQ2_XXS_CODE_BYTES : Q2_K_CODE_BYTES;
    static constexpr int SCALES = TYPE == IQ2_XXS ? IQ2_XXS_SCALE_BYTES : Q2_K_SCALE_BYTES;
    static constexpr int MORE_SCALES =
        TYPE == IQ2_XXS ? IQ2_XXS_MORE_SCALE_BYTES : Q2_K_MORE_SCALE_BYTES;

    // A chunk of the ring.
    struct alignas(128) Chunk {
        u8 codes[CHUNK][CODES];
        u8 scales[CHUNK][SCALES];
        u8 more_scales[CHUNK][MORE_SCALES];
    };

    const Schedule& schedule;
    WorkTile work_tile, end;
    Chunk* ring;
    int slot;
    // Where the next chunk is; units left of the tile.
    PackedMatrix from;
    const PackedMatrix& matrix;
    int left;

    __device__ inline Fetch(const Schedule& schedule, WorkTile first, WorkTile end,
                            const PackedMatrix& w, Chunk* ring)
        : schedule(schedule), work_tile(first), end(end), ring(ring), slot(0), matrix(w), left(0) {
        if (work_tile.before(end)) find_tile();
#pragma unroll
        for (int i = 0; i < RING; ++i) start(ring[i]);
    }

    // The lane's fragments of the work tile's first chunk.
    __device__ inline void find_tile() {
        int own = work_tile.number * schedule.tiles_each + schedule.local;
        int tile = min(own, schedule.tiles - 1), lane = threadIdx.x % WARP;
        u32 row = schedule.work.experts[work_tile.at] * schedule.tiles + tile;
        size_t unit = row * schedule.units;
        from.codes = matrix.codes + unit * (CODES / 16) + lane;
        from.scales = matrix.scales + unit * SCALES + 16 * lane;
        from.more_scales = matrix.more_scales + unit * MORE_SCALES + 16 * lane;
        left = schedule.units;
    }

    __device__ inline void next_tile() {
        schedule.next(work_tile);
        if (work_tile.before(end)) find_tile();
    }

    // Starts the next copy, if there is one.
    __device__ inline void start(Chunk& to) {
        if (left > 0) {
            int at = 16 * (threadIdx.x % WARP);
#pragma unroll
            for (int i = 0; i < CHUNK * CODES; i += 16 * WARP) {
                if (i < left * CODES) copy_async16(to.codes[0] + i + at, from.codes + i / 16);
            }
            copy_small<SCALES>(to.scales[0], from.scales, at);
            copy_small<MORE_SCALES>(to.more_scales[0], from.more_scales, at);
            from.codes += CHUNK * (CODES / 16);
            from.scales += CHUNK * SCALES;
            from.more_scales += CHUNK * MORE_SCALES;
            left -= CHUNK;
            if (left <= 0) next_tile();
        }
        copy_async_commit();
    }

    template <int BYTES>
    __device__ inline void copy_small(u8* to, const u8* from, int at) const {
        static_assert(CHUNK * BYTES <= 16 * WARP, "16 bytes for each lane");
        if (at < min(left, CHUNK) * BYTES) copy_async16(to + at, from);
    }

    // The oldest chunk, as soon as it is there.
    __device__ inline const Chunk& wait() const {
        copy_async_wait<RING - 1>();
        __syncwarp();
        return ring[slot];
    }

    // It is not needed any more.
    __device__ inline void done() {
        __syncwarp();
        start(ring[slot]);
        slot = slot + 1 == RING ? 0 : slot + 1;
    }
};
