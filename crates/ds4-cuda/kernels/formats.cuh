// Weight formats on the device, and how their values become operands of the tensor cores.
//
// A matrix is cut into tiles of 16 rows, and each tile into steps of 32 columns: two products
// of 16×16 weights. Inside a step, lane (g = lane / 4, t = lane % 4) of a warp holds columns
// 8t … 8t+7 of rows g and g + 8. That permutes the sum over columns against the order the
// instruction was made for, which matters to nobody as long as the activations are permuted
// alike: each lane reads eight consecutive ones. `repack.cu` brings every format into the order in
// which lanes read it, 16 bytes at a time; several steps make a unit, which is loaded at once.
#pragma once

#include "common.cuh"

// A matrix in device memory.
struct PackedMatrix {
    // Codes of the weights, 16 bytes for each lane in turn.
    const uint4* codes;
    // Scales, and what else belongs to groups of weights.
    const u8* scales;
    const u8* more_scales;
};
SAME_IN_RUST(PackedMatrix);

// Steps of a unit.
__host__ __device__ constexpr int unit_steps(int type) {
    return type == Q8_0 || type == MXFP4 ? 4 : type == F16 || type == F32 ? 2 : 8;
}

#define UNIT_IN_RUST(TYPE) \
    static_assert(32 * unit_steps(TYPE) == TYPE##_COLUMNS, "not as in src/formats.rs")
UNIT_IN_RUST(Q8_0);
UNIT_IN_RUST(F16);
UNIT_IN_RUST(F32);
UNIT_IN_RUST(IQ2_XXS);
UNIT_IN_RUST(Q2_K);
UNIT_IN_RUST(Q4_K);
UNIT_IN_RUST(MXFP4);

// What a lane holds of one unit of one tile.
template <int TYPE>
struct Unit;

// The factors of rows g and g + 8.
struct RowPair {
    float low, high;
};

__device__ inline RowPair unpack_rows(u32 halves) {
    float2 f = unpack_half2(halves);
    return {f.x, f.y};
}

// A step's weights as operands of two products.
struct Operands {
    u32 a[2][4];
};

// Bytes 0 … 3 as halves 1024 + byte, in two pairs.
__device__ inline void bytes_to_halves(u32 bytes, u32& low, u32& high) {
    low = __byte_perm(bytes, 0x64646464, 0x4140);
    high = __byte_perm(bytes, 0x64646464, 0x4342);
}

// Weights with their scale become halves times this, so that small ones stay clear of the subnormal
// range; sums are divided by it.
#define WEIGHT_UNIT 64.0f

// Weights of any type but F16, whose values are halves already.
__host__ __device__ constexpr float weight_unit(int type) {
    return type == F16 || type == F32 ? 1.0f : WEIGHT_UNIT;
}

// Both rows' operands times their factor, in half precision.
__device__ inline void scale_rows(Operands& o, RowPair f) {
    u32 low = pack_half2(f.low, f.low), high = pack_half2(f.high, f.high);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        o.a[i][0] = half2_mul(o.a[i][0], low);
        o.a[i][1] = half2_mul(o.a[i][1], high);
        o.a[i][2] = half2_mul(o.a[i][2], low);
        o.a[i][3] = half2_mul(o.a[i][3], high);
    }
}

// Eight columns of row g + 8·`row`, as four pairs in order.
__device__ inline void put_row(Operands& o, int row, u32 p0, u32 p1, u32 p2, u32 p3) {
    o.a[0][row] = p0;
    o.a[0][row + 2] = p1;
    o.a[1][row] = p2;
    o.a[1][row + 2] = p3;
}

__device__ inline u32 same_halves(float x) { return pack_half2(x, x); }

// ---- Q8_0: one scale for 32 columns -----------------------------------------------------------

template <>
struct Unit<Q8_0> {
    uint4 weights[4];
    uint4 scales;

    __device__ inline void load(const PackedMatrix& p, int units, int tile, int unit, int lane) {
        const uint4* from = p.codes + ((size_t)tile * units + unit) * 128 + lane;
#pragma unroll
        for (int s = 0; s < 4; ++s) weights[s] = load_once16(from + 32 * s);
        scales = ((const uint4*)p.scales)[((size_t)tile * units + unit) * 8 + lane / 4];
    }

    __device__ inline u32 step_scales(int step) const {
        return step == 0 ? scales.x : step == 1 ? scales.y : step == 2 ? scales.z : scales.w;
    }

    // Bytes are weights + 128.
    __device__ static inline void convert(u32 bytes, u32& low, u32& high) {
        bytes_to_halves(bytes, low, high);
        low = half2_sub(low, 0x64806480);
        high = half2_sub(high, 0x64806480);
    }

    // Weights without their scale.
    __device__ inline Operands operands(int step, const uint4*, int) const {
        Operands o;
        uint4 w = weights[step];
        u32 p[4];
        convert(w.x, p[0], p[1]);
        convert(w.y, p[2], p[3]);
        put_row(o, 0, p[0], p[1], p[2], p[3]);
        convert(w.z, p[0], p[1]);
        convert(w.w, p[2], p[3]);
        put_row(o, 1, p[0], p[1], p[2], p[3]);
        return o;
    }

    __device__ inline RowPair factor(int step) const { return unpack_rows(step_scales(step)); }

    // Weights with their scale times WEIGHT_UNIT, rounded to half precision.
    __device__ inline Operands scaled(int step, const uint4* grid, int lane) const {
        Operands o = operands(step, grid, lane);
        RowPair f = factor(step);
        scale_rows(o, {WEIGHT_UNIT * f.low, WEIGHT_UNIT * f.high});
        return o;
    }
};

// ---- F16, and F32 as the sum of two halves ------------------------------------------------------

template <>
struct Unit<F16> {
    uint4 weights[2][2];

    __device__ inline void load_from(const uint4* codes, int units, int tile, int unit, int lane) {
        const uint4* from = codes + ((size_t)tile * units + unit) * 128 + lane;
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[i / 2][i % 2] = load_once16(from + 32 * i);
    }

    __device__ inline void load(const PackedMatrix& p, int units, int tile, int unit, int lane) {
        load_from(p.codes, units, tile, unit, lane);
    }

    __device__ inline Operands operands(int step, const uint4*, int) const {
        Operands o;
        uint4 low = weights[step][0], high = weights[step][1];
        put_row(o, 0, low.x, low.y, low.z, low.w);
        put_row(o, 1, high.x, high.y, high.z, high.w);
        return o;
    }

    __device__ inline RowPair factor(int) const { return {1.0f, 1.0f}; }

    __device__ inline Operands scaled(int step, const uint4* grid, int lane) const {
        return operands(step, grid, lane);
    }
};

// The larger halves; the smaller ones are another matrix, at `scales`.
template <>
struct Unit<F32> : Unit<F16> {};

// The grid of IQ2_XXS in shared memory: eight halves an entry, each entry once for each of eight
// neighbouring lanes, so that whatever they look up, they use different banks.
#define GRID_ENTRIES 256
#define GRID_COPIES 8

// ---- IQ2_XXS: eight columns from a grid, with signs ---------------------------------------------

template <>
struct Unit<IQ2_XXS> {
    uint4 weights[2];
    // Four bits a step for each row.
    uint2 scale_codes;
    u32 scales;

    __device__ inline void load(const PackedMatrix& p, int units, int tile, int unit, int lane) {
        size_t block = (size_t)tile * units + unit;
        const uint4* from = p.codes + block * 64 + lane;
        weights[0] = load_once16(from);
        weights[1] = load_once16(from + 32);
        scale_codes = ((const uint2*)p.scales)[block * 8 + lane / 4];
        scales = ((const u32*)p.more_scales)[block * 8 + lane / 4];
    }

    // Two steps have a word of indices and one of signs. Entry 2·(step % 2) + row has its index of
    // the grid in that byte; in each nibble of the signs it has the bit of its number, for columns
    // 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble on.
    __device__ inline u32 indices(int step) const {
        uint4 c = weights[step / 4];
        return step % 4 / 2 ? c.z : c.x;
    }

    __device__ inline u32 signs(int step) const {
        uint4 c = weights[step / 4];
        return step % 4 / 2 ? c.w : c.y;
    }

    // An entry's index times 128, the bytes of its copies in shared memory.
    __device__ static inline u32 grid_offset(u32 indices, int entry) {
        return (entry == 0 ? indices << 7 : indices >> (8 * entry - 7)) & 0x7f80;
    }

    __device__ static inline u32 signed_pair(u32 pair, u32 signs, int entry, int i) {
        return pair ^ (signs << (15 - 4 * i - entry) & 0x80008000);
    }

    __device__ inline void put(Operands& o, int step, int row, const uint4* grid) const {
        int entry = step % 2 * 2 + row;
        uint4 v = *(const uint4*)((const u8*)grid + grid_offset(indices(step), entry));
        u32 s = signs(step);
        put_row(o, row, signed_pair(v.x, s, entry, 0), signed_pair(v.y, s, entry, 1),
                signed_pair(v.z, s, entry, 2), signed_pair(v.w, s, entry, 3));
    }

    // 2·(four bits of the step) + 1, without a conversion, which is slow.
    __device__ static inline float odd(u32 codes, int step) {
        u32 twice = step == 0 ? codes << 1 : codes >> (4 * step - 1);
        return __uint_as_float((twice & 0x1e) | 0x4b000001) - 8388608.0f;
    }

    __device__ inline Operands operands(int step, const uint4* grid, int) const {
        Operands o;
        put(o, step, 0, grid);
        put(o, step, 1, grid);
        return o;
    }

    __device__ inline RowPair factor(int step) const {
        RowPair d = unpack_rows(scales);
        return {0.125f * d.low * odd(scale_codes.x, step),
                0.125f * d.high * odd(scale_codes.y, step)};
    }

    __device__ inline Operands scaled(int step, const uint4* grid, int lane) const {
        Operands o = operands(step, grid, lane);
        RowPair f = factor(step);
        scale_rows(o, {WEIGHT_UNIT * f.low, WEIGHT_UNIT * f.high});
        return o;
    }
};

// ---- Q2_K and Q4_K: small integers times a group's scale, less its minimum ----------------------

template <int TYPE>
struct UnitK {
    static constexpr int FRAGMENTS = TYPE == Q2_K ? 2 : 4;
    uint4 weights[FRAGMENTS];
    uint4 groups[TYPE == Q2_K ? 1 : 2];
    uint2 scales;

    __device__ inline void load(const PackedMatrix& p, int units, int tile, int unit, int lane) {
        size_t block = (size_t)tile * units + unit;
#pragma unroll
        for (int i = 0; i < FRAGMENTS; ++i) {
            weights[i] = load_once16(p.codes + (block * FRAGMENTS + i) * 32 + lane);
        }
        const uint4* from = (const uint4*)p.scales + (block * 8 + lane / 4) * 2;
        if (TYPE == Q2_K) {
            groups[0] = from[lane % 4 / 2];
        } else {
            groups[0] = from[0];
            groups[1] = from[1];
        }
        scales = ((const uint2*)p.more_scales)[block * 8 + lane / 4];
    }

    // Scales or minima of the groups of four steps in row g + 8·`row`, as bytes.
    __device__ inline u32 group_bytes(int step, int row, bool minima) const {
        if (TYPE == Q2_K) {
            u32 b = row ? (step < 4 ? groups[0].z : groups[0].w)
                        : (step < 4 ? groups[0].x : groups[0].y);
            return (minima ? b >> 4 : b) & 0x0f0f0f0f;
        }
        const uint4& g = groups[TYPE == Q2_K ? 0 : row];
        return minima ? (step < 4 ? g.z : g.w) : (step < 4 ? g.x : g.y);
    }

    // The step's scale or minimum, twice in halves; exact.
    __device__ inline u32 group(int step, int row, bool minima) const {
        u32 low, high;
        bytes_to_halves(group_bytes(step, row, minima), low, high);
        u32 pair = half2_sub(step % 4 < 2 ? low : high, 0x64006400);
        return __byte_perm(pair, 0, step % 2 ? 0x3232 : 0x1010);
    }

    // Eight columns as halves 1024 + q·place, and 1 / place, twice in halves.
    __device__ inline u32 quants(int step, int row, u32 (&p)[4]) const {
        u32 inverse;
        if constexpr (TYPE == Q2_K) {
            u32 w[] = {weights[row].x, weights[row].y, weights[row].z, weights[row].w};
#pragma unroll
            for (int i = 0; i < 4; ++i) p[i] = quant_pair(w[i], step) | 0x64006400;
            inverse = 0x3c00 - 0x0800 * quant_place(step);
        } else {
            uint4 w = weights[step / 2];
            u32 mask = 0x0f0f0f0fu << 4 * (step % 2);
            bytes_to_halves((row ? w.z : w.x) & mask, p[0], p[1]);
            bytes_to_halves((row ? w.w : w.y) & mask, p[2], p[3]);
            inverse = 0x3c00 - 0x1000 * (step % 2);
        }
        return inverse | inverse << 16;
    }

    // Q2_K: a word has two columns' quants of every step, in the bits from 2·step on of each half.
    // They become q·4^place by masking alone, but for the last steps, which would reach a half's
    // exponent.
    __device__ static constexpr int quant_place(int step) { return step < 5 ? step : step - 5; }

    __device__ static inline u32 quant_pair(u32 word, int step) {
        return (step < 5 ? word : word >> 10) & 0x00030003u << 2 * quant_place(step);
    }

    // q times the group's scale; exact.
    __device__ inline Operands operands(int step, const uint4*, int) const {
        Operands o;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            u32 p[4];
            u32 scale = half2_mul(group(step, row, false), quants(step, row, p));
            u32 offset = half2_mul(scale, 0xe400e400);
#pragma unroll
            for (int i = 0; i < 4; ++i) p[i] = half2_fma(p[i], scale, offset);
            put_row(o, row, p[0], p[1], p[2], p[3]);
        }
        return o;
    }

    // The minima as operands: the same in all columns of a group.
    __device__ inline Operands minima(int step) const {
        Operands o;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            u32 m = group(step, row, true);
            put_row(o, row, m, m, m, m);
        }
        return o;
    }

    __device__ inline RowPair factor(int) const {
        return {half_to_float((u16)scales.x), half_to_float((u16)scales.y)};
    }

    __device__ inline RowPair minimum_factor() const {
        return {half_to_float((u16)(scales.x >> 16)), half_to_float((u16)(scales.y >> 16))};
    }

    __device__ inline Operands scaled(int step, const uint4*, int) const {
        Operands o;
        RowPair d = factor(step), d_min = minimum_factor();
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            u32 p[4];
            u32 a = half2_mul(group(step, row, false), quants(step, row, p));
            a = half2_mul(a, same_halves(WEIGHT_UNIT * (row ? d.high : d.low)));
            u32 b = half2_mul(group(step, row, true),
                              same_halves(-WEIGHT_UNIT * (row ? d_min.high : d_min.low)));
#pragma unroll
            for (int i = 0; i < 4; ++i) p[i] = half2_fma(half2_sub(p[i], 0x64006400), a, b);
            put_row(o, row, p[0], p[1], p[2], p[3]);
        }
        return o;
    }
};

template <>
struct Unit<Q2_K> : UnitK<Q2_K> {};
template <>
struct Unit<Q4_K> : UnitK<Q4_K> {};

// ---- MXFP4: four-bit floats with a power of two for 32 columns ----------------------------------

template <>
struct Unit<MXFP4> {
    uint4 weights[2];
    uint2 scales;

    __device__ inline void load(const PackedMatrix& p, int units, int tile, int unit, int lane) {
        const uint4* from = p.codes + ((size_t)tile * units + unit) * 64 + lane;
        weights[0] = load_once16(from);
        weights[1] = load_once16(from + 32);
        scales = ((const uint2*)p.scales)[((size_t)tile * units + unit) * 8 + lane / 4];
    }

    // Eight codes, the first in the lowest nibble: halves that are the values times 2^-14.
    __device__ static inline void expand(u32 codes, u32 (&p)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 pair = codes >> 8 * i;
            u32 both = (pair & 0xf) | (pair & 0xf0) << 12;
            p[i] = (both & 0x00080008) << 12 | (both & 0x00070007) << 9;
        }
    }

    __device__ inline u32 codes(int step, int row) const {
        uint4 w = weights[step / 2];
        return step % 2 == 0 ? (row ? w.y : w.x) : (row ? w.w : w.z);
    }

    __device__ inline Operands operands(int step, const uint4*, int) const {
        Operands o;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            u32 p[4];
            expand(codes(step, row), p);
            // Exact, and out of the range of subnormal halves: times 2^10.
#pragma unroll
            for (int i = 0; i < 4; ++i) p[i] = half2_mul(p[i], 0x64006400);
            put_row(o, row, p[0], p[1], p[2], p[3]);
        }
        return o;
    }

    // 2^(x - 127) · 2^4 for a stored exponent x.
    __device__ static inline float power(u32 x) {
        return __uint_as_float((x > 250 ? 254 : x + 4) << 23);
    }

    __device__ inline RowPair factor(int step) const {
        u32 pair = (step < 2 ? scales.x : scales.y) >> 16 * (step % 2);
        return {power(pair & 0xff), power(pair >> 8 & 0xff)};
    }

    __device__ inline Operands scaled(int step, const uint4* grid, int lane) const {
        Operands o = operands(step, grid, lane);
        RowPair f = factor(step);
        scale_rows(o, {WEIGHT_UNIT * f.low, WEIGHT_UNIT * f.high});
        return o;
    }
};

// Every thread of the block copies its part of the IQ2 grid to shared memory.
__device__ inline void load_grid(uint4* to, const uint4* grid) {
    for (int i = threadIdx.x; i < GRID_ENTRIES * GRID_COPIES; i += blockDim.x) {
        to[i] = grid[i / GRID_COPIES];
    }
}

// The copy of the grid that is this lane's own.
__device__ inline const uint4* own_grid(const uint4* grid) {
    return grid + threadIdx.x % GRID_COPIES;
}
