// Products that keep the sums of a unit's groups of columns separate.
//
// IQ2_XXS and Q2_K have a scale for every 32 or 16 columns. Scaling the sums of each group as it
// is done would cost more than the products themselves. With one activation row, seven of the
// eight columns of a product instruction have nothing to do: so every group gets one. The
// operand of activations is zero in all columns but the group's own, and after the whole unit a
// lane finds sums of two groups in two columns, and scales each once. Weights and activations
// stay exact; sums are f32.
#pragma once

#include "products.cuh"

// A lane's part of a unit of 256 columns of one tile.
template <int TYPE>
struct SeparateUnit;

// A lane's part of one activation row's 256 columns.
template <int TYPE>
struct SeparateInput;

// A pair of ones for the steps whose activations the lane holds, of zeros for the others.
template <int STEPS>
struct OwnSteps {
    u32 at[STEPS];

    __device__ inline explicit OwnSteps(int own) {
#pragma unroll
        for (int s = 0; s < STEPS; ++s) at[s] = s == own ? 0x3c003c00 : 0;
    }

    // `x` in the lanes of this step, zero elsewhere.
    __device__ inline uint4 select(uint4 x, int step) const {
        u32 keep = at[step];
        return make_uint4(half2_mul(x.x, keep), half2_mul(x.y, keep), half2_mul(x.z, keep),
                          half2_mul(x.w, keep));
    }
};

// ---- IQ2_XXS: eight groups of 32 columns --------------------------------------------------------

template <>
struct SeparateInput<IQ2_XXS> {
    // Columns of step lane / 4.
    uint4 x;

    __device__ inline void load(const u16* row, int unit, int lane) {
        x = *(const uint4*)(row + 256 * unit + 8 * lane);
    }
};

template <>
struct SeparateUnit<IQ2_XXS> {
    static constexpr int OWN_STEPS = 8;
    uint4 weights[2];
    // Of the steps 2t and 2t + 1, for both rows.
    u16 scale_codes;
    u32 scales;

    __device__ inline void load(const Planes& p, int units, int tile, int unit, int lane) {
        size_t block = (size_t)tile * units + unit;
        weights[0] = load_once16(p.weights + block * 64 + lane);
        weights[1] = load_once16(p.weights + block * 64 + 32 + lane);
        scale_codes = ((const u16*)p.scales)[block * 32 + lane];
        scales = ((const u32*)p.more_scales)[block * 8 + lane / 4];
    }

    __device__ static inline int own_step(int lane) { return lane / 4; }

    // Adds the lane's share of the products with each of ROWS rows.
    template <int ROWS>
    __device__ __forceinline__ void multiply(
        RowPair (&sums)[ROWS], const SeparateInput<IQ2_XXS> (&in)[ROWS],
        const OwnSteps<OWN_STEPS>& own, const uint4* grid, int
    ) const {
        float d[ROWS][4] = {};
#pragma unroll
        for (int s = 0; s < 8; ++s) {
            const uint4& c = weights[s / 4];
            u32 code = s % 4 == 0 ? c.x : s % 4 == 1 ? c.y : s % 4 == 2 ? c.z : c.w;
            Operands o;
            Unit<IQ2_XXS>::put(o, 0, code, grid);
            Unit<IQ2_XXS>::put(o, 1, code, grid);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) multiply_step(d[r], o, own.select(in[r].x, s));
        }
        RowPair f = unpack_rows(scales);
        f = {0.125f * f.low, 0.125f * f.high};
        float factors[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            factors[i] = (i < 2 ? f.low : f.high) * Unit<IQ2_XXS>::odd(scale_codes, 4 * i);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            sums[r].low = factors[0] * d[r][0] + factors[1] * d[r][1];
            sums[r].high = factors[2] * d[r][2] + factors[3] * d[r][3];
        }
    }
};

// ---- Q2_K: sixteen groups of 16 columns, with minima --------------------------------------------

template <>
struct SeparateInput<Q2_K> {
    // Columns of steps g / 2 and 4 + g / 2, if the lane's are in that half of them that is group
    // g of the eight in four steps; else zero.
    uint4 x[2];
    // Sums of 16 columns each (see `group_sum_at`).
    uint2 group_sums;

    __device__ inline void load(const u16* row, const u16* row_sums, int unit, int lane) {
        int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            x[i] = make_uint4(0, 0, 0, 0);
            int column = 256 * unit + 128 * i + 32 * (g / 2) + 8 * t;
            if (g % 2 == t / 2) x[i] = *(const uint4*)(row + column);
        }
        group_sums = *(const uint2*)(row_sums + 16 * unit + 4 * t);
    }
};

template <>
struct SeparateUnit<Q2_K> {
    static constexpr int OWN_STEPS = 4;
    uint4 weights[2];
    // Of even and of odd groups.
    uint4 groups[2];
    uint2 scales;

    __device__ inline void load(const Planes& p, int units, int tile, int at, int lane) {
        size_t block = (size_t)tile * units + at;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            weights[i] = load_once16(p.weights + (block * 2 + i) * 32 + lane);
            groups[i] = ((const uint4*)p.scales)[(block * 8 + lane / 4) * 2 + i];
        }
        scales = ((const uint2*)p.more_scales)[block * 8 + lane / 4];
    }

    // The same as others have it, with one half of the groups for each lane.
    __device__ inline Unit<Q2_K> unit(int lane) const {
        Unit<Q2_K> u;
        u.weights[0] = weights[0];
        u.weights[1] = weights[1];
        bool odd = lane % 4 / 2;
        u.groups[0] = make_uint4(odd ? groups[1].x : groups[0].x, odd ? groups[1].y : groups[0].y,
                                 odd ? groups[1].z : groups[0].z, odd ? groups[1].w : groups[0].w);
        u.scales = scales;
        return u;
    }

    __device__ static inline int own_step(int lane) { return lane / 8; }

    // The scale in byte t of `word`.
    __device__ static inline float scale(u32 word, int t) {
        return __uint_as_float((word >> 8 * t & 0xf) | 0x4b000000) - 8388608.0f;
    }

    template <int ROWS>
    __device__ __forceinline__ void multiply(
        RowPair (&sums)[ROWS], const SeparateInput<Q2_K> (&in)[ROWS],
        const OwnSteps<OWN_STEPS>& own, const uint4*, int lane
    ) const {
        Unit<Q2_K> whole = unit(lane);
        RowPair f_min = whole.minimum_factor();
        u32 minima[4];
        whole.all_minima(lane, minima);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float m[4];
            mma_from_zero(m, minima, in[r].group_sums.x, in[r].group_sums.y);
            // All columns are alike: the first lane's share counts.
            bool first = lane % 4 == 0;
            sums[r] = {first ? -f_min.low * m[0] : 0.0f, first ? -f_min.high * m[2] : 0.0f};
        }
        add_half<0>(sums, in, own, lane);
        add_half<1>(sums, in, own, lane);
    }

    // Adds four steps, of which eight groups are each other's columns.
    template <int HALF, int ROWS>
    __device__ __forceinline__ void add_half(
        RowPair (&sums)[ROWS], const SeparateInput<Q2_K> (&in)[ROWS],
        const OwnSteps<OWN_STEPS>& own, int lane
    ) const {
        float d[ROWS][4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int s = 4 * HALF + i;
            Operands o;
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                uint4 w = weights[row];
                // q·4^place·2^-24: subnormal halves, which the instruction takes as they are.
                put_row(o, row, Unit<Q2_K>::quant_pair(w.x, s), Unit<Q2_K>::quant_pair(w.y, s),
                        Unit<Q2_K>::quant_pair(w.z, s), Unit<Q2_K>::quant_pair(w.w, s));
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) multiply_step(d[r], o, own.select(in[r].x[HALF], i));
        }
        // The lane has both groups of step 4·HALF + t: 2^24 / 4^place of it.
        int t = lane % 4, place = HALF && t > 0 ? t - 1 : t + 4 * HALF;
        float factor = __uint_as_float((127 + 24 - 2 * place) << 23);
        RowPair f = {half_to_float((u16)scales.x), half_to_float((u16)scales.y)};
        f = {factor * f.low, factor * f.high};
        u32 even = HALF ? groups[0].y : groups[0].x, even8 = HALF ? groups[0].w : groups[0].z;
        u32 odd = HALF ? groups[1].y : groups[1].x, odd8 = HALF ? groups[1].w : groups[1].z;
        float factors[4] = {f.low * scale(even, t), f.low * scale(odd, t),
                            f.high * scale(even8, t), f.high * scale(odd8, t)};
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            sums[r].low += factors[0] * d[r][0] + factors[1] * d[r][1];
            sums[r].high += factors[2] * d[r][2] + factors[3] * d[r][3];
        }
    }
};
