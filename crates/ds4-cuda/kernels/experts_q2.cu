// Routed experts of a few rows in IQ2_XXS (gate and up) and Q2_K (down): the chosen experts'
// weights are read once, and multiplied as integers with integers.
//
// Formula, inputs and outputs are as in experts.cu, but x comes as integers (quantised.cuh). The
// shared expert's last product is part of the first kernel.
// Grid: (blocks that share the work list). Block: 256 threads.
// Plain Rust: `experts` in crates/ds4-cpu/src/reference/experts.rs.
//
// An instruction of the tensor cores has room for eight columns of activations. One row's take all
// of them: its columns of different groups of weights are kept in columns of their own, high and
// low parts too, with zeros in the place of the other groups. So an instruction adds up what has
// the same scale, and its sums go on to the next.
//
// A block has a range of the work list: tiles of the chosen experts, one after the other. Copies of
// the next weights are always under way (see expert_tiles.cuh).

#include "expert_tiles.cuh"
#include "products.cuh"
#include "quantised.cuh"

// high · 256 + low of columns 2t and 2t + 1, in rows g and g + 8.
__device__ inline int whole_low(const int (&d)[4]) { return d[0] * 256 + d[1]; }
__device__ inline int whole_high(const int (&d)[4]) { return d[2] * 256 + d[3]; }

// The sum over the four lanes that have the same rows of weights.
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

// ---- Gate and up --------------------------------------------------------------------------------

// Tiles that a block does at a time: half of its warps have one of gate each, the others the same
// of up.
#define GATE_UP_TILES (DECODE_WARPS / 2)

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

// Numbers that a compiler should not know. `one` is that twice in halves; `positive` is
// POSITIVE_BYTES, with bits that no selector has: so it stays in a register of each lane, rather
// than being fetched for every selection.
struct Opaque {
    u32 one, positive;

    __device__ inline Opaque(u32 one, u32 selector)
        : one(one), positive(POSITIVE_BYTES | (selector & 0x88888888)) {}
};

// A step's weights as an operand.
//
// Shifts, selections and logic share a path that is half as wide as the one for products: so as
// much as possible is done with these.
__device__ inline void byte_operand(
    const Unit<IQ2_XXS>& w, int step, const u32* grid, const Opaque& k, u32 (&a)[4]
) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        int entry = step % 2 * 2 + row;
        u32 at = dot_bytes(w.indices(step), WARP * sizeof(u32) << 8 * entry, lane * sizeof(u32));
        u32 signs = w.signs(step);
        u32 s = *(const u32*)((const u8*)grid + at);
        s |= (entry < 2 ? signs << (2 - entry) : signs >> (entry - 2)) & 0x44444444;
        a[row] = select_bytes(k.positive, NEGATIVE_BYTES, s);
        a[row + 2] = select_bytes(k.positive, NEGATIVE_BYTES, upper_half(s, k.one));
    }
}

// A row's unit in shared memory.
struct InputUnit {
    // [step][part], as `Quantised` has them: what a step's eight lanes read is in different banks.
    u8 parts[INTEGER_COLUMNS / 32][2][32];
    float scale;
    float padding[3];
};

// Columns of four steps as operands: a lane has the step's whose sums are in its column g,
// and zeros for the others, forever.
template <int ROWS>
struct OwnColumns {
    uint2 at[ROWS][4];

    __device__ inline void clear() {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int s = 0; s < 4; ++s) at[r][s] = make_uint2(0, 0);
        }
    }
};

// sums[row][half of the tile] += a unit's products, times 8.
template <int ROWS>
__device__ inline void multiply_grid(
    float (&sums)[ROWS][2], const Unit<IQ2_XXS>& w, const InputUnit* const (&x)[ROWS],
    OwnColumns<ROWS>& b, const u32* grid, const Opaque& opaque
) {
    int lane = threadIdx.x % WARP, own_step = lane / 8, part = lane / 4 % 2, t = lane % 4;
    int totals[ROWS][2];
    // Four bits of steps t and t + 4.
    u32 low_codes = w.scale_codes.x >> 4 * t & 0x000f000f;
    u32 high_codes = w.scale_codes.y >> 4 * t & 0x000f000f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int d[ROWS][4];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) d[r][0] = d[r][1] = d[r][2] = d[r][3] = 0;
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            u32 a[4];
            byte_operand(w, 4 * half + s, grid, opaque, a);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const u8* own = x[r]->parts[4 * half + s][part] + 8 * t;
                if (own_step == s) b.at[r][s] = *(const uint2*)own;
                mma_signed(d[r], a, b.at[r][s].x, b.at[r][s].y);
            }
        }
        // 2·(four bits) + 1.
        int odd_low = dot_bytes(low_codes, half ? 0x020000 : 2, 1);
        int odd_high = dot_bytes(high_codes, half ? 0x020000 : 2, 1);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            int low = whole_low(d[r]), high = whole_high(d[r]);
            totals[r][0] = half ? odd_low * low + totals[r][0] : odd_low * low;
            totals[r][1] = half ? odd_high * high + totals[r][1] : odd_high * high;
        }
    }
    RowPair f = unpack_rows(w.scales);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        sums[r][0] += f.low * x[r]->scale * (float)totals[r][0];
        sums[r][1] += f.high * x[r]->scale * (float)totals[r][1];
    }
}

// What the warps of a block share.
struct GateUpShared {
    Fetch<IQ2_XXS>::Chunk rings[DECODE_WARPS][RING];
    // Results of an work_tile, [row][16] of each warp, and of the one before.
    float results[2][DECODE_WARPS][INTEGER_ROWS][16];
    alignas(16) WorkList work;
};
static_assert(sizeof(GateUpShared) == GATE_UP_SHARED, "not as in src/constants.rs");
static_assert(sizeof(InputUnit) == INPUT_UNIT, "not as in src/constants.rs");

// A warp's tile of an work_tile for ROWS rows at `x`, to `results`.
template <int ROWS>
__device__ inline void multiply_gate_up(
    Fetch<IQ2_XXS>& fetch, const InputUnit* x, const u32* grid, const Opaque& opaque,
    float (&results)[INTEGER_ROWS][16]
) {
    int lane = threadIdx.x % WARP, units = fetch.schedule.units;
    float sums[ROWS][2];
    OwnColumns<ROWS> columns;
    columns.clear();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = 0.0f;
    for (int u = 0; u < units; u += CHUNK) {
        const Fetch<IQ2_XXS>::Chunk& chunk = fetch.wait();
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            if (u + i >= units) break;
            Unit<IQ2_XXS> w;
            w.weights[0] = ((const uint4*)chunk.codes[i])[lane];
            w.weights[1] = ((const uint4*)chunk.codes[i])[lane + WARP];
            w.scale_codes = ((const uint2*)chunk.scales[i])[lane / 4];
            w.scales = ((const u32*)chunk.more_scales[i])[lane / 4];
            const InputUnit* rows[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) rows[r] = x + r * units + u + i;
            multiply_grid<ROWS>(sums, w, rows, columns, grid, opaque);
        }
        fetch.done();
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float low = quad_sum(sums[r][0]), high = quad_sum(sums[r][1]);
        if (lane % 4 < 2) results[r][lane / 4 + lane % 4 * 8] = 0.125f * (lane % 4 ? high : low);
    }
}

// The whole block brings rows of a range to shared memory.
__device__ inline void load_inputs(
    InputUnit* to, const Quantised& x, const PairRange& range, int used
) {
    constexpr int FRAGMENTS = 2 * INTEGER_COLUMNS / 16;
    for (int i = threadIdx.x; i < range.rows() * x.units * FRAGMENTS; i += blockDim.x) {
        int unit = i / FRAGMENTS, fragment = i % FRAGMENTS;
        size_t at = (size_t)(range.pair(unit / x.units) / used) * x.units + unit % x.units;
        ((uint4*)to[unit].parts)[fragment] = ((const uint4*)x.parts)[at * FRAGMENTS + fragment];
        if (fragment == 0) to[unit].scale = x.scales[at];
    }
    __syncthreads();
}

struct GateUpQ2Params {
    ExpertMatrix gate;
    ExpertMatrix up;
    Permutation permutation;
    // [n·used].
    const float* pair_weights;
    // [n].
    Quantised x;
    // [n·used, rows], halves.
    u16* hidden;
    // The grid of IQ2_XXS as selectors [256].
    const u32* selectors;
    // The shared expert's last product, whose input is there already.
    Product shared;
    int experts;
    int used;
    float limit;
    // 1 twice in halves.
    u32 one;
    int rows;
};
SAME_IN_RUST(GateUpQ2Params);

// hidden[pair] = weight · SwiGLU(gate·x, up·x) for each expert's pairs, and the shared expert's
// last product. Shared memory: GateUpShared, and INTEGER_ROWS rows of InputUnit.
extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP, 2) experts_gate_up_q2(
    __grid_constant__ const GateUpQ2Params p
) {
    __shared__ alignas(128) u32 grids[GRID_WORDS];
    GateUpShared& shared = *(GateUpShared*)dynamic_shared;
    InputUnit* inputs = (InputUnit*)(&shared + 1);
    load_selectors(grids, p.selectors);
    const ExpertMatrix &gate = p.gate, &up = p.up;
    const Permutation& permutation = p.permutation;
    const Quantised& x = p.x;
    const Product& shared_down = p.shared;
    int n = p.rows;
    // First, since its weights can be on their way before anything else is there.
    int shared_blocks = product_blocks(shared_down);
    int shared_work = shared_blocks * ((n + 7) / 8);
    for (int i = blockIdx.x; i < shared_work; i += gridDim.x) {
        int first = i / shared_blocks * 8;
        run_product<TYPE_BIT(Q8_0)>(
            shared_down, i % shared_blocks, first, n, nullptr, (float*)dynamic_shared);
        __syncthreads();
    }
    Opaque opaque(p.one, p.selectors[threadIdx.x]);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int tiles = gate.rows / 16, work_tiles = (tiles + GATE_UP_TILES - 1) / GATE_UP_TILES;
    bool is_gate = warp < GATE_UP_TILES;
    PackedMatrix w = {is_gate ? gate.weights.codes : up.weights.codes,
                      is_gate ? gate.weights.scales : up.weights.scales,
                      is_gate ? gate.weights.more_scales : up.weights.more_scales};
    Schedule schedule = {
        shared.work, work_tiles, tiles, GATE_UP_TILES, warp % GATE_UP_TILES, x.units};
    wait_for_dependencies();
    // Only now: `experts_down_q2` reads the permutation before it waits for this kernel.
    launch_dependents();
    shared.work.load(permutation, p.experts, work_tiles);
    WorkTile work_tile = schedule.bound(blockIdx.x, gridDim.x);
    WorkTile end = schedule.bound(blockIdx.x + 1, gridDim.x);
    Fetch<IQ2_XXS> fetch(schedule, work_tile, end, w, shared.rings[warp]);
    int parity = 0, loaded = -1;
    for (; work_tile.before(end); schedule.next(work_tile)) {
        PairRange range = schedule.pairs(permutation, work_tile);
        int rows = range.rows();
        if (loaded != range.first) load_inputs(inputs, x, range, p.used);
        loaded = range.first;
        float(&results)[DECODE_WARPS][INTEGER_ROWS][16] = shared.results[parity];
        if (rows == 1) {
            multiply_gate_up<1>(fetch, inputs, grids, opaque, results[warp]);
        } else {
            multiply_gate_up<INTEGER_ROWS>(fetch, inputs, grids, opaque, results[warp]);
        }
        __syncthreads();
        parity ^= 1;
        // A warp for each tile, half of it for each row.
        int r = lane / 16, tile = work_tile.number * GATE_UP_TILES + warp;
        if (warp >= GATE_UP_TILES || r >= rows || tile >= tiles) continue;
        float g = results[warp][r][lane % 16], u = results[GATE_UP_TILES + warp][r][lane % 16];
        u32 pair = range.pair(r);
        p.hidden[(size_t)pair * gate.rows + 16 * tile + lane % 16] =
            float_to_half(p.pair_weights[pair] * swiglu(g, u, p.limit));
    }
    copy_async_wait<0>();
}

// ---- Down ---------------------------------------------------------------------------------------

// Tiles that a block does at a time: one for each warp.
#define DOWN_TILES DECODE_WARPS

// A hidden layer's unit as integers, in the order of Q2_K's words (see formats.cuh): word i of step
// k has columns 2i and 2i + 1 of step k or k + 4, in the bytes where the weights have them, and
// zeros in the place of the other's. Lanes with the same t read the same columns.
struct HiddenUnit {
    // [k][step k or k + 4][part][t], words 0 … 3: lanes read them at once from different banks.
    uint4 parts[4][2][2][4];
    // Sums of the integers of 16 columns, as three signed bytes, and a zero: [byte][quarter], a
    // byte for each of the steps 0 … 3. See `DownUnit` for quarters.
    u32 sums[4][4];
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
    u32 high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int a = v[2 * i], b = v[2 * i + 1];
        sum += a + b;
        high[i] = low_bytes(high_part(a), 0, high_part(b), 0) << 8 * later;
        low[i] = low_bytes(a, 0, b, 0) << 8 * later;
    }
    to.parts[k][later][0][t] = make_uint4(high[0], high[1], high[2], high[3]);
    to.parts[k][later][1][t] = make_uint4(low[0], low[1], low[2], low[3]);
    sum += __shfl_xor_sync(FULL_WARP, sum, 1);
    u8* sums = (u8*)&to.sums[0][2 * later + t / 2] + k;
    constexpr int BYTE = sizeof(to.sums[0]);
    if (t % 2 == 0) {
        sums[0] = (u8)sum;
        sums[BYTE] = (u8)high_part(sum);
        sums[2 * BYTE] = (u8)high_part(high_part(sum));
        sums[3 * BYTE] = 0;
    }
    if (lane == 0) to.scale = scale;
}

// Columns of a step and the fourth after it as operands: lanes of columns that others multiply have
// zeros, forever. A step's stay while the next one's are loaded.
template <int ROWS>
struct OwnParts {
    uint4 at[ROWS][2];
    bool own;

    __device__ inline OwnParts() {
        // Column g is for quarter g / 2, and has the high or the low part.
        int lane = threadIdx.x % WARP;
        own = lane % 4 / 2 == lane / 8 % 2;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) at[r][0] = at[r][1] = make_uint4(0, 0, 0, 0);
    }

    __device__ inline const uint4& load(int r, const HiddenUnit& x, int k) {
        int lane = threadIdx.x % WARP;
        if (own) at[r][k % 2] = x.parts[k][lane / 16][lane / 4 % 2][lane % 4];
        return at[r][k % 2];
    }
};

// Results of a tile's row pair g and g + 8, over units.
template <int ROWS>
struct DownSums {
    // Four times a row's products.
    float products[ROWS][2];
    // What is taken away: lanes with t < 2 have the first row's, the others the second one's.
    float minima[2];

    __device__ inline DownSums() {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) products[r][0] = products[r][1] = 0.0f;
        minima[0] = minima[1] = 0.0f;
    }

    // The result of row g + 8·`half`, in all four lanes that have it.
    __device__ inline float result(int r, int half) const {
        float m = minima[half];
        m += __shfl_xor_sync(FULL_WARP, m, 1);
        float other = __shfl_xor_sync(FULL_WARP, m, 2);
        if (threadIdx.x % 4 / 2 != r) m = other;
        return 0.25f * quad_sum(products[r][half]) - m;
    }
};

// A lane's share of a unit of 16 rows. The lane's quarter, t, is the groups of 16 columns whose
// sums end up with it: columns 16·(t % 2) … in steps 0 … 3, or in steps 4 … 7 if t > 1.
struct DownUnit {
    uint4 weights[2];
    // Scales and minima of the quarter's groups, a byte each, in rows g and g + 8.
    u32 groups[2];
    uint2 scales;

    __device__ inline void load(const u8* bulk, const u8* codes, const u8* factors, int lane) {
        weights[0] = ((const uint4*)bulk)[lane];
        weights[1] = ((const uint4*)bulk)[lane + WARP];
        const u32* own = (const u32*)codes + lane / 4 * 8 + lane % 2 * 4 + lane % 4 / 2;
        groups[0] = own[0];
        groups[1] = own[2];
        scales = ((const uint2*)factors)[lane / 4];
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
    // leaves over. `codes` are a row's groups without their minima.
    __device__ static inline int scale(u32 codes, int k) {
        return dot_bytes(codes, (k % 2 ? 1u : 4u) << 8 * k, 0);
    }

    // Unit `x`, and of the second row the one that is so many units on.
    template <int ROWS>
    __device__ inline void multiply(
        DownSums<ROWS>& sums, const HiddenUnit* x, int units, OwnParts<ROWS>& parts
    ) const {
        u32 codes[2] = {groups[0] & 0x0f0f0f0f, groups[1] & 0x0f0f0f0f};
        // Sums of steps 0 and 1, and 16 times the sums of steps 2 and 3.
        int totals[ROWS][2][2] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            u32 a[2][4];
            operand(k, 0, a[0]);
            operand(k, 1, a[1]);
            int low_scale = scale(codes[0], k), high_scale = scale(codes[1], k);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const uint4& b = parts.load(r, x[r * units], k);
                int d[4] = {0, 0, 0, 0};
                mma_unsigned(d, a[0], b.x, b.y);
                mma_unsigned(d, a[1], b.z, b.w);
                totals[r][k / 2][0] += low_scale * whole_low(d);
                totals[r][k / 2][1] += high_scale * whole_high(d);
            }
        }
        float2 low = unpack_half2(scales.x), high = unpack_half2(scales.y);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float f = x[r * units].scale;
            int low_total = totals[r][0][0] + (totals[r][1][0] >> 4);
            int high_total = totals[r][0][1] + (totals[r][1][1] >> 4);
            sums.products[r][0] += f * low.x * (float)low_total;
            sums.products[r][1] += f * high.x * (float)high_total;
        }
        subtract_minima(sums, x, units, low.y, high.y);
    }

    // One instruction for both rows: columns 0 … 2 are the bytes of the first one's sums, 4 … 6 of
    // the second one's.
    template <int ROWS>
    __device__ inline void subtract_minima(
        DownSums<ROWS>& sums, const HiddenUnit* x, int units, float low, float high
    ) const {
        int lane = threadIdx.x % WARP, t = lane % 4;
        u32 a[2] = {groups[0] >> 4 & 0x0f0f0f0f, groups[1] >> 4 & 0x0f0f0f0f};
        int d[4] = {0, 0, 0, 0};
        mma_unsigned_half(d, a, x[lane / 16 % ROWS * units].sums[lane / 4 % 4][t]);
        float f = x[t / 2 % ROWS * units].scale;
        int place = t % 2 ? 65536 : 1;
        sums.minima[0] += f * low * (float)(d[1] * 256 + d[0] * place);
        sums.minima[1] += f * high * (float)(d[3] * 256 + d[2] * place);
    }
};

// What the warps of a block share.
struct DownShared {
    Fetch<Q2_K>::Chunk rings[DECODE_WARPS][RING];
    alignas(16) WorkList work;
};
static_assert(sizeof(DownShared) == DOWN_SHARED, "not as in src/constants.rs");
static_assert(sizeof(HiddenUnit) == HIDDEN_UNIT, "not as in src/constants.rs");

// A warp's tile of an work_tile for ROWS rows at `x`, to `out` of each row.
template <int ROWS>
__device__ inline void multiply_down(
    Fetch<Q2_K>& fetch, const HiddenUnit* x, int tile, float* const (&out)[INTEGER_ROWS]
) {
    int lane = threadIdx.x % WARP, units = fetch.schedule.units, tiles = fetch.schedule.tiles;
    DownSums<ROWS> sums;
    OwnParts<ROWS> parts;
    for (int u = 0; u < units; u += CHUNK) {
        const Fetch<Q2_K>::Chunk& chunk = fetch.wait();
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            if (u + i >= units) break;
            DownUnit w;
            w.load(chunk.codes[i], chunk.scales[i], chunk.more_scales[i], lane);
            w.multiply(sums, x + u + i, units, parts);
        }
        fetch.done();
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float low = sums.result(r, 0), high = sums.result(r, 1);
        if (lane % 4 < 2 && tile < tiles) {
            out[r][16 * tile + lane / 4 + lane % 4 * 8] = lane % 4 ? high : low;
        }
    }
}

// The whole block makes integers of rows of a range, as soon as it is done with the range before.
__device__ inline void load_hidden(
    HiddenUnit* to, const u16* hidden, const PairRange& range, int units
) {
    __syncthreads();
    for (int i = threadIdx.x / WARP; i < range.rows() * units; i += DECODE_WARPS) {
        size_t at = (size_t)range.pair(i / units) * units + i % units;
        quantise_hidden(to[i], hidden + at * INTEGER_COLUMNS);
    }
    __syncthreads();
}

struct DownQ2Params {
    ExpertMatrix down;
    Permutation permutation;
    // [n·used, columns], halves.
    const u16* hidden;
    // [n, used + 1, rows].
    float* out;
    int experts;
    int used;
};
SAME_IN_RUST(DownQ2Params);

// out[token][slot] = down·hidden for the pairs of each expert; the slot after theirs has the shared
// expert's results. Shared memory: DownShared, and INTEGER_ROWS rows of HiddenUnit.
extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP, 2) experts_down_q2(
    __grid_constant__ const DownQ2Params p
) {
    launch_dependents();
    const ExpertMatrix& w = p.down;
    const Permutation& permutation = p.permutation;
    DownShared& shared = *(DownShared*)dynamic_shared;
    HiddenUnit* inputs = (HiddenUnit*)(&shared + 1);
    int warp = threadIdx.x / WARP, units = w.columns / INTEGER_COLUMNS;
    int tiles = w.rows / 16, work_tiles = (tiles + DOWN_TILES - 1) / DOWN_TILES;
    Schedule schedule = {shared.work, work_tiles, tiles, DOWN_TILES, warp, units};
    shared.work.load(permutation, p.experts, work_tiles);
    WorkTile work_tile = schedule.bound(blockIdx.x, gridDim.x);
    WorkTile end = schedule.bound(blockIdx.x + 1, gridDim.x);
    // The weights are on their way before the hidden layers are there.
    Fetch<Q2_K> fetch(schedule, work_tile, end, w.weights, shared.rings[warp]);
    wait_for_dependencies();
    int loaded = -1;
    // The range's results.
    float* rows[INTEGER_ROWS];
    for (; work_tile.before(end); schedule.next(work_tile)) {
        PairRange range = schedule.pairs(permutation, work_tile);
        int tile = work_tile.number * DOWN_TILES + warp;
        if (loaded != range.first) {
            load_hidden(inputs, p.hidden, range, units);
#pragma unroll
            for (int r = 0; r < INTEGER_ROWS; ++r) {
                u32 pair = range.pair(r);
                rows[r] = p.out + (size_t)(pair + pair / p.used) * w.rows;
            }
            loaded = range.first;
        }
        if (range.rows() == 1) {
            multiply_down<1>(fetch, inputs, tile, rows);
        } else {
            multiply_down<INTEGER_ROWS>(fetch, inputs, tile, rows);
        }
    }
    copy_async_wait<0>();
}
