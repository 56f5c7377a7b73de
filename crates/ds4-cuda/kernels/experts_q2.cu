// Routed experts of a few rows in IQ2_XXS (gate and up) and Q2_K (down): the chosen experts' weights
// are read once, and multiplied as integers with integers.
//
// A product instruction has room for eight columns of activations. One row's take all of them: its
// columns of different groups of weights are kept in columns of their own, high and low parts too,
// with zeros in the place of the other groups. So an instruction adds up what has the same scale,
// and its sums go on to the next.
//
// A block does some tiles of an expert at a time, and goes on until all are done.

#include "products.cuh"
#include "quantised.cuh"

// Activation rows that are multiplied at a time.
#define MOST_ROWS 2

// An expert's rows of activations: pairs `first` … below `end`.
struct PairRange {
    const u32* pairs;
    int first, end;

    // Repeats the last one.
    __device__ inline u32 pair(int r) const { return pairs[min(first + r, end - 1)]; }
};

// high · 256 + low of columns 2t and 2t + 1, in rows g and g + 8.
__device__ inline int whole_low(const int (&d)[4]) { return d[0] * 256 + d[1]; }
__device__ inline int whole_high(const int (&d)[4]) { return d[2] * 256 + d[3]; }

// The sum over the four lanes that have the same rows of weights.
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

// ---- Gate and up ---------------------------------------------------------------------------------

// A warp has a tile of one of the two matrices, or shares it with others; a block does some tiles of
// both at a time.
#define GATE_UP_SPLIT 2
#define GATE_UP_TILES (DECODE_WARPS / GATE_UP_SPLIT / 2)
#define GATE_UP_VALUES (GATE_UP_TILES * 16)

// The grid as selectors of bytes: a nibble of 0, 1 or 2 for 8, 25 or 43, in the order of the signs,
// each entry once for every lane, so that whatever they look up, they use different banks.
#define GRID_WORDS (GRID_ENTRIES * WARP)
#define POSITIVE_BYTES 0x002b1908
#define NEGATIVE_BYTES 0x00d5e7f8

__device__ inline void load_selectors(u32* to, const u32* selectors) {
    static_assert(GRID_ENTRIES == DECODE_WARPS * WARP, "a thread has an entry");
    u32 own = selectors[threadIdx.x];
    int lane = threadIdx.x % WARP, first = threadIdx.x - lane;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        u32 s = __shfl_sync(FULL_WARP, own, 4 * i + lane / 8);
        ((uint4*)to)[(first + 4 * i) * 8 + lane] = make_uint4(s, s, s, s);
    }
}

// A step's weights as an operand.
__device__ inline void byte_operand(const Unit<IQ2_XXS>& w, int step, const u32* grid, u32 (&a)[4]) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        int entry = step % 2 * 2 + row;
        u32 own = w.grid_offset(w.indices(step), entry) | lane * (u32)sizeof(u32);
        u32 magnitudes = *(const u32*)((const u8*)grid + own);
        u32 signs = w.signs(step);
        u32 s = magnitudes | ((entry < 2 ? signs << (2 - entry) : signs >> (entry - 2)) & 0x44444444);
        a[row] = select_bytes(POSITIVE_BYTES, NEGATIVE_BYTES, s);
        a[row + 2] = select_bytes(POSITIVE_BYTES, NEGATIVE_BYTES, s >> 16);
    }
}

// What a lane needs for a unit of a tile and of ROWS activation rows: its columns of the steps whose
// sums are in column g.
template <int ROWS>
struct GridUnit {
    Unit<IQ2_XXS> w;
    uint2 x[ROWS][2];
    float scale[ROWS];

    // sums[row][half of the tile] += products, times 8.
    __device__ inline void multiply(float (&sums)[ROWS][2], const u32* grid, int lane) const {
        int own_step = lane / 8, t = lane % 4, totals[ROWS][2];
        // 2·(four bits) + 1 of steps t and t + 4.
        u32 odd_low = (w.scale_codes.x >> 4 * t & 0x000f000f) * 2 + 0x00010001;
        u32 odd_high = (w.scale_codes.y >> 4 * t & 0x000f000f) * 2 + 0x00010001;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int d[ROWS][4];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) d[r][0] = d[r][1] = d[r][2] = d[r][3] = 0;
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                u32 a[4];
                byte_operand(w, 4 * half + s, grid, a);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    bool own = own_step == s;
                    mma_signed(d[r], a, own ? x[r][half].x : 0, own ? x[r][half].y : 0);
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                int low = whole_low(d[r]), high = whole_high(d[r]);
                totals[r][0] = half ? (int)(odd_low >> 16) * low + totals[r][0]
                                    : (int)(odd_low & 0xffff) * low;
                totals[r][1] = half ? (int)(odd_high >> 16) * high + totals[r][1]
                                    : (int)(odd_high & 0xffff) * high;
            }
        }
        RowPair f = unpack_rows(w.scales);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            sums[r][0] += f.low * scale[r] * (float)totals[r][0];
            sums[r][1] += f.high * scale[r] * (float)totals[r][1];
        }
    }
};

// Where a lane reads the units of a tile and of ROWS rows of activations, from one to the next.
template <int ROWS>
struct GridUnits {
    const uint4* weights;
    const uint2* scale_codes;
    const u32* scales;
    const u8* parts[ROWS];
    const float* part_scales[ROWS];

    __device__ inline GridUnits(const Planes& w, int units, int tile, int unit, int lane) {
        size_t block = (size_t)tile * units + unit;
        weights = w.weights + block * 64 + lane;
        scale_codes = (const uint2*)w.scales + block * 8 + lane / 4;
        scales = (const u32*)w.more_scales + block * 8 + lane / 4;
    }

    __device__ inline void find_rows(
        const Quantised& x, const PairRange& range, int used, int unit, int lane
    ) {
        int part = lane / 4 % 2, step = lane / 8, t = lane % 4;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            size_t at = (size_t)(range.pair(r) / used) * x.units + unit;
            parts[r] = x.parts + (2 * at + part) * UNIT_COLUMNS + 32 * step + 8 * t;
            part_scales[r] = x.scales + at;
        }
    }

    __device__ inline void load_weights(GridUnit<ROWS>& to) {
        to.w.weights[0] = load_once16(weights);
        to.w.weights[1] = load_once16(weights + 32);
        to.w.scale_codes = *scale_codes;
        to.w.scales = *scales;
        weights += GATE_UP_SPLIT * 64;
        scale_codes += GATE_UP_SPLIT * 8;
        scales += GATE_UP_SPLIT * 8;
    }

    __device__ inline void load_rows(GridUnit<ROWS>& to) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            to.x[r][0] = *(const uint2*)parts[r];
            to.x[r][1] = *(const uint2*)(parts[r] + 128);
            to.scale[r] = *part_scales[r];
            parts[r] += GATE_UP_SPLIT * 2 * UNIT_COLUMNS;
            part_scales[r] += GATE_UP_SPLIT;
        }
    }
};

// Results of a warp's rows: [warp][row][16].
typedef float GateUpScratch[DECODE_WARPS][MOST_ROWS][16];

// Units `part`, `part + GATE_UP_SPLIT`, … of a tile, for ROWS rows, to `scratch`.
template <int ROWS>
__device__ inline void multiply_tile_rows(
    const Planes& w, const Quantised& x, int tile, int part, const PairRange& range, int used,
    const u32* grid, GateUpScratch& scratch
) {
    int lane = threadIdx.x % WARP, units = x.units;
    int left = (units - part + GATE_UP_SPLIT - 1) / GATE_UP_SPLIT;
    GridUnits<ROWS> from(w, units, tile, part, lane);
    GridUnit<ROWS> even, odd;
    // The weights are on their way before it is known which rows they are for.
    if (left > 0) from.load_weights(even);
    if (left > 1) from.load_weights(odd);
    from.find_rows(x, range, used, part, lane);
    if (left > 0) from.load_rows(even);
    if (left > 1) from.load_rows(odd);
    float sums[ROWS][2];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = 0.0f;
    for (; left > 0; left -= 2) {
        even.multiply(sums, grid, lane);
        if (left > 2) {
            from.load_weights(even);
            from.load_rows(even);
        }
        if (left == 1) break;
        odd.multiply(sums, grid, lane);
        if (left > 3) {
            from.load_weights(odd);
            from.load_rows(odd);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float low = quad_sum(sums[r][0]), high = quad_sum(sums[r][1]);
        if (lane % 4 < 2) {
            scratch[threadIdx.x / WARP][r][lane / 4 + lane % 4 * 8] =
                0.125f * (lane % 4 ? high : low);
        }
    }
}

// hidden[pair] = weight · SwiGLU(gate·x, up·x) for each expert's pairs.
extern "C" __global__ void __launch_bounds__(256, 2) experts_gate_up_q2(
    Stack gate, Stack up, Groups groups, const float* pair_weights, Quantised x, u16* hidden,
    int used, float limit, const u32* selectors
) {
    __shared__ alignas(16) u32 grids[GRID_WORDS];
    __shared__ GateUpScratch scratch;
    load_selectors(grids, selectors);
    int warp = threadIdx.x / WARP;
    int tiles = gate.rows / 16, expert_items = (tiles + GATE_UP_TILES - 1) / GATE_UP_TILES;
    bool is_gate = warp < DECODE_WARPS / 2;
    Planes w = {is_gate ? gate.weights.weights : up.weights.weights,
                is_gate ? gate.weights.scales : up.weights.scales,
                is_gate ? gate.weights.more_scales : up.weights.more_scales};
    wait_for_dependencies();
    // Only now: `experts_down_q2` reads the groups before it waits for this kernel.
    launch_dependents();
    __syncthreads();
    int items = *groups.active_count * expert_items;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        int expert = groups.active[item / expert_items];
        int first_tile = item % expert_items * GATE_UP_TILES;
        int local = warp / GATE_UP_SPLIT % GATE_UP_TILES, part = warp % GATE_UP_SPLIT;
        int tile = expert * tiles + min(first_tile + local, tiles - 1);
        PairRange range = {groups.pairs, (int)groups.starts[expert], (int)groups.starts[expert + 1]};
        for (; range.first < range.end; range.first += MOST_ROWS) {
            int rows = min(range.end - range.first, MOST_ROWS);
            if (rows == 1) {
                multiply_tile_rows<1>(w, x, tile, part, range, used, grids, scratch);
            } else {
                multiply_tile_rows<MOST_ROWS>(w, x, tile, part, range, used, grids, scratch);
            }
            __syncthreads();
            for (int i = threadIdx.x; i < rows * GATE_UP_VALUES; i += blockDim.x) {
                int r = i / GATE_UP_VALUES, local = i % GATE_UP_VALUES / 16;
                if (first_tile + local >= tiles) continue;
                float g = 0.0f, u = 0.0f;
#pragma unroll
                for (int s = 0; s < GATE_UP_SPLIT; ++s) {
                    g += scratch[local * GATE_UP_SPLIT + s][r][i % 16];
                    u += scratch[DECODE_WARPS / 2 + local * GATE_UP_SPLIT + s][r][i % 16];
                }
                u32 pair = range.pair(r);
                hidden[(size_t)pair * gate.rows + 16 * (first_tile + local) + i % 16] =
                    float_to_half(pair_weights[pair] * swiglu(g, u, limit));
            }
            __syncthreads();
        }
    }
}

// ---- Down ----------------------------------------------------------------------------------------

// Tiles that a block does at a time: one for each warp.
#define DOWN_TILES DECODE_WARPS

// A hidden layer's unit as integers, in the order of Q2_K's words (see formats.cuh): word i of step k
// has columns 2i and 2i + 1 of steps k and k + 4. Lanes with the same t read the same columns.
struct HiddenUnit {
    // [part][step k][t], words 0 … 3.
    uint4 parts[2][4][4];
    // Sums of the integers of 16 columns: [quarter], steps 0 … 3. See `DownUnit` for quarters.
    int4 sums[4];
    float scale;
    float padding[3];
};

// One warp: 256 columns of a row.
__device__ inline void quantise_hidden(HiddenUnit& to, const u16* hidden) {
    int lane = threadIdx.x % WARP, step = lane / 4, t = lane % 4, k = step % 4, later = step / 4;
    float x[8];
    int v[8], sum = 0;
    unpack8(*(const uint4*)(hidden + 8 * lane), x);
    float scale = quantise(x, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += v[i];
    sum += __shfl_xor_sync(FULL_WARP, sum, 1);
    if (t % 2 == 0) ((int*)&to.sums[2 * later + t / 2])[k] = sum;
    if (lane == 0) to.scale = scale;
    // Lanes of steps k and k + 4 share a word's bytes: the one makes high parts, the other low ones.
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int a = v[2 * i], b = v[2 * i + 1];
        u32 high = low_bytes(high_part(a), 0, high_part(b), 0), low = low_bytes(a, 0, b, 0);
        u32 other = __shfl_xor_sync(FULL_WARP, later ? high : low, 16);
        words[i] = later ? other | low << 8 : high | other << 8;
    }
    to.parts[later][k][t] = make_uint4(words[0], words[1], words[2], words[3]);
}

// A lane's share of a unit of 16 rows. The lane's quarter, t, is the groups of 16 columns whose sums
// end up with it: those of columns 16·(t % 2) … in steps 0 … 3, or in steps 4 … 7 if t > 1.
struct DownUnit {
    uint4 weights[2];
    // Scales and minima of the quarter's groups, a byte each, in rows g and g + 8.
    u32 groups[2];
    uint2 scales;

    __device__ inline void load(const Planes& p, int units, int tile, int unit, int lane) {
        size_t block = (size_t)tile * units + unit;
        const uint4* from = p.weights + block * 64 + lane;
        weights[0] = load_once16(from);
        weights[1] = load_once16(from + 32);
        const u32* own = (const u32*)p.scales + (block * 8 + lane / 4) * 8 + lane % 2 * 4 + lane % 4 / 2;
        groups[0] = own[0];
        groups[1] = own[2];
        scales = ((const uint2*)p.more_scales)[block * 8 + lane / 4];
    }

    // A step's and the fourth after it: two columns' weights in each byte pair, times 4^k.
    __device__ inline void operand(int k, int half, u32 (&a)[4]) const {
        u32 mask = 0x03030303u << 2 * k;
        a[0] = (half ? weights[0].z : weights[0].x) & mask;
        a[1] = (half ? weights[1].z : weights[1].x) & mask;
        a[2] = (half ? weights[0].w : weights[0].y) & mask;
        a[3] = (half ? weights[1].w : weights[1].y) & mask;
    }

    // 4 · the scale for even k, 1 · for odd ones: what 4^k, of which 4^(k - k % 2) is taken away,
    // leaves over.
    __device__ inline int scale(int row, int k) const {
        u32 b = groups[row];
        return k == 0   ? b << 2 & 0x3c
               : k == 1 ? b >> 8 & 0xf
               : k == 2 ? b >> 14 & 0x3c
                        : b >> 24 & 0xf;
    }

    __device__ inline int minimum(int row, int k) const { return groups[row] >> (8 * k + 4) & 0xf; }

    // sums[row][half of the tile] += products.
    template <int ROWS>
    __device__ inline void multiply(
        float (&sums)[ROWS][2], const HiddenUnit* const (&x)[ROWS], int unit, int lane
    ) const {
        // Column g is for quarter g / 2, and has the high or the low part.
        int g = lane / 4, t = lane % 4, quarter = g / 2;
        u32 own = t / 2 != quarter % 2 ? 0 : quarter / 2 ? 0xff00ff00 : 0x00ff00ff;
        int totals[ROWS][2], minima[ROWS][2];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) totals[r][0] = totals[r][1] = minima[r][0] = minima[r][1] = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            u32 a[2][4];
            operand(k, 0, a[0]);
            operand(k, 1, a[1]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                uint4 b = x[r][unit].parts[g % 2][k][t];
                int d[4] = {0, 0, 0, 0};
                mma_unsigned(d, a[0], b.x & own, b.y & own);
                mma_unsigned(d, a[1], b.z & own, b.w & own);
                int low = whole_low(d), high = whole_high(d);
                // Multiples of 16.
                totals[r][0] += scale(0, k) * (k < 2 ? low : low >> 4);
                totals[r][1] += scale(1, k) * (k < 2 ? high : high >> 4);
                int sum = ((const int*)&x[r][unit].sums[t])[k];
                minima[r][0] += minimum(0, k) * sum;
                minima[r][1] += minimum(1, k) * sum;
            }
        }
        float2 low = unpack_half2(scales.x), high = unpack_half2(scales.y);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float f = x[r][unit].scale;
            sums[r][0] += f * (0.25f * low.x * (float)totals[r][0] - low.y * (float)minima[r][0]);
            sums[r][1] += f * (0.25f * high.x * (float)totals[r][1] - high.y * (float)minima[r][1]);
        }
    }
};

// A tile's products with the rows at `shared`, which `ready` brings there.
template <int ROWS, typename Ready>
__device__ inline void multiply_down(
    const Stack& w, int tile, const HiddenUnit* shared, float (&sums)[ROWS][2], Ready ready
) {
    int lane = threadIdx.x % WARP, units = w.columns / UNIT_COLUMNS;
    DownUnit even, odd;
    even.load(w.weights, units, tile, 0, lane);
    if (1 < units) odd.load(w.weights, units, tile, 1, lane);
    ready();
    const HiddenUnit* rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        rows[r] = shared + r * units;
        sums[r][0] = sums[r][1] = 0.0f;
    }
    for (int u = 0; u < units; u += 2) {
        even.multiply(sums, rows, u, lane);
        if (u + 2 < units) even.load(w.weights, units, tile, u + 2, lane);
        if (u + 1 >= units) break;
        odd.multiply(sums, rows, u + 1, lane);
        if (u + 3 < units) odd.load(w.weights, units, tile, u + 3, lane);
    }
}

// A block's tiles of one expert, from `first_tile` on, for ROWS of its pairs.
template <int ROWS>
__device__ inline void down_rows(
    const Stack& w, int expert, int first_tile, const PairRange& range, const u16* hidden,
    float* out, int used
) {
    HiddenUnit* shared = (HiddenUnit*)dynamic_shared;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, own = first_tile + warp;
    int tiles = w.rows / 16, units = w.columns / UNIT_COLUMNS;
    float sums[ROWS][2];
    multiply_down(w, expert * tiles + min(own, tiles - 1), shared, sums, [&] {
        wait_for_dependencies();
        for (int i = warp; i < ROWS * units; i += DECODE_WARPS) {
            size_t row = (size_t)range.pair(i / units) * w.columns;
            quantise_hidden(shared[i], hidden + row + i % units * UNIT_COLUMNS);
        }
        __syncthreads();
    });
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float low = quad_sum(sums[r][0]), high = quad_sum(sums[r][1]);
        u32 pair = range.pair(r);
        size_t slot = (size_t)(pair / used) * (used + 1) + pair % used;
        if (lane % 4 < 2 && own < tiles) {
            out[slot * w.rows + 16 * own + lane / 4 + lane % 4 * 8] = lane % 4 ? high : low;
        }
    }
    // Before the next rows come.
    __syncthreads();
}

// out[token][slot] = down·hidden for the pairs of each expert; the shared expert's results go to
// the slot after the routed ones. Blocks for those come first: their input was ready long ago.
// Shared memory: MOST_ROWS rows of HiddenUnit.
extern "C" __global__ void __launch_bounds__(256, 2) experts_down_q2(
    Stack w, Groups groups, const u16* hidden, float* out, int used, int n,
    __grid_constant__ const Product shared
) {
    __shared__ float scratch[DECODE_WARPS * 128];
    launch_dependents();
    int tiles = w.rows / 16, expert_items = (tiles + DOWN_TILES - 1) / DOWN_TILES;
    int shared_blocks = product_blocks(shared), shared_items = shared_blocks * ((n + 7) / 8);
    if ((int)blockIdx.x < shared_items) {
        int first = blockIdx.x / shared_blocks * 8;
        run_product<TYPE_BIT(Q8_0), 1>(
            shared, blockIdx.x % shared_blocks, first, n, nullptr, scratch);
        return;
    }
    int items = *groups.active_count * expert_items;
    for (int item = blockIdx.x - shared_items; item < items; item += gridDim.x - shared_items) {
        int expert = groups.active[item / expert_items];
        int first_tile = item % expert_items * DOWN_TILES;
        PairRange range = {groups.pairs, (int)groups.starts[expert], (int)groups.starts[expert + 1]};
        for (; range.first < range.end; range.first += MOST_ROWS) {
            if (range.end - range.first == 1) {
                down_rows<1>(w, expert, first_tile, range, hidden, out, used);
            } else {
                down_rows<MOST_ROWS>(w, expert, first_tile, range, hidden, out, used);
            }
        }
    }
}
