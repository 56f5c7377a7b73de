// Token embeddings, read from the table in its storage format.
//
//   streams[n][s] = table[token[n]] for all four streams s
//
// Inputs: tokens u32 [n]; a matrix [vocab, hidden] of any type.
// Output: streams f32 [n, 4, hidden].
// Grid: (n). Block: 256 threads.
// Plain Rust: `dequantize` in crates/ds4-cpu/src/reference/products.rs.

#include "formats.cuh"

template <int TYPE>
__device__ inline void embed_unit(
    const PackedMatrix& table, int units, int unit, u32 token, float* out, const uint4* grid,
    bool add
) {
    int lane = threadIdx.x % WARP, high = token % 16 / 8;
    Unit<TYPE> w;
    w.load(table, units, token / 16, unit, lane);
    for (int s = 0; s < unit_steps(TYPE); ++s) {
        Operands o = w.operands(s, grid, lane);
        RowPair f = w.factor(s);
        float factor = high ? f.high : f.low;
        if (lane / 4 != token % 8) continue;
        float* to = out + (unit * unit_steps(TYPE) + s) * 32 + 8 * (lane % 4);
        for (int i = 0; i < 4; ++i) {
            float2 pair = unpack_half2(o.a[i / 2][high + 2 * (i % 2)]);
            float2 less = make_float2(0.0f, 0.0f);
            if constexpr (TYPE == Q2_K || TYPE == Q4_K) {
                RowPair d = w.minimum_factor();
                float2 m = unpack_half2(w.minima(s).a[i / 2][high + 2 * (i % 2)]);
                float scale = high ? d.high : d.low;
                less = make_float2(scale * m.x, scale * m.y);
            }
            to[2 * i] = factor * pair.x - less.x + (add ? to[2 * i] : 0.0f);
            to[2 * i + 1] = factor * pair.y - less.y + (add ? to[2 * i + 1] : 0.0f);
        }
    }
}

struct EmbedParams {
    Step step;
    // [vocab, hidden].
    PackedMatrix table;
    // [n, 4, hidden].
    float* streams;
    const uint4* iq2_grid;
    int type;
    int hidden;
};
SAME_IN_RUST(EmbedParams);

// Each token's embedding, copied to the four streams. One block per row.
extern "C" __global__ void __launch_bounds__(EMBED_THREADS) embed(
    __grid_constant__ const EmbedParams p
) {
    __shared__ uint4 grids[GRID_ENTRIES * GRID_COPIES];
    launch_dependents();
    const PackedMatrix& table = p.table;
    int type = p.type, hidden = p.hidden;
    if (type == IQ2_XXS) load_grid(grids, p.iq2_grid);
    const uint4* grid = own_grid(grids);
    wait_for_dependencies();
    __syncthreads();
    u32 token = p.step.token[blockIdx.x];
    float* out = p.streams + (size_t)blockIdx.x * STREAMS * hidden;
    int units = hidden / (32 * unit_steps(type));
    for (int u = threadIdx.x / WARP; u < units; u += blockDim.x / WARP) {
        switch (type) {
            case Q8_0: embed_unit<Q8_0>(table, units, u, token, out, grid, false); break;
            case F16: embed_unit<F16>(table, units, u, token, out, grid, false); break;
            case IQ2_XXS: embed_unit<IQ2_XXS>(table, units, u, token, out, grid, false); break;
            case Q2_K: embed_unit<Q2_K>(table, units, u, token, out, grid, false); break;
            case Q4_K: embed_unit<Q4_K>(table, units, u, token, out, grid, false); break;
            case MXFP4: embed_unit<MXFP4>(table, units, u, token, out, grid, false); break;
            default: {
                PackedMatrix rest = {(const uint4*)table.scales, nullptr, nullptr};
                embed_unit<F16>(table, units, u, token, out, grid, false);
                embed_unit<F16>(rest, units, u, token, out, grid, true);
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) {
        for (int s = 1; s < STREAMS; ++s) out[s * hidden + i] = out[i];
    }
}
