// Dense products of a few rows: the weights are read once, at the memory's pace.
//
//   out[n][row] = Σ_c weights[row][c] · x[n][c], or SwiGLU of two such products
//
// Inputs: activations x f16 [n, x_stride], with x_low where products are exact; matrices of any
// type.
// Outputs: f32 or f16 [n, out_stride].
// Grid of decode_products_8 and _any: (blocks of all products, n / 8).
// Grid of _16, _32 and _64: (blocks of all products), a launch for so many rows. Block: 256
// threads. More blocks make integers of the experts' input; the last one to arrive at the router's
// product routes.
// Plain Rust: `matmul` in crates/ds4-cpu/src/reference/products.rs.
//
// A warp multiplies a tile of 16 weight rows. If the matrix has few tiles, warps share a tile, each
// with a part of the columns (split-K). The split depends on the matrix alone, so a row's results
// do not depend on the rows beside it.

#include "batch_products.cuh"
#include "products.cuh"
#include "quantised.cuh"
#include "router.cuh"

// What a launch does for the experts beside its products.
struct Preparation {
    // As soon as the first product is done, if it is the router's. Without `logits`: nothing.
    Routing routing;
    Permutation permutation;
    u32* arrivals;
    // Rows x + x_low as integers, in blocks after the products'. Without `parts`: nothing.
    Quantised quantised;
    const u16* x;
    const u16* x_low;
};
SAME_IN_RUST(Preparation);

struct DecodeProductsParams {
    // Part of the parameters: reading them from memory would delay every block.
    Product products[MOST_PRODUCTS];
    Preparation preparation;
    // With more than 8 rows a block.
    Workspace workspace;
    const uint4* iq2_grid;
    int count;
    // Of all products.
    int blocks;
    // With more than 8 rows a block: its first one.
    int first;
    int rows;
};
SAME_IN_RUST(DecodeProductsParams);

// Rows `first` … below `end`: a unit for each warp of the blocks.
__device__ inline void quantise_rows(const Preparation& to_do, int block, int first, int end) {
    int i = block * DECODE_WARPS + threadIdx.x / WARP, units = to_do.quantised.units;
    int row = first + i / units;
    wait_for_dependencies();
    if (row < end) quantise_unit(to_do.quantised, to_do.x, to_do.x_low, row, i % units);
}

// The product that the block belongs to.
__device__ inline int own_product(const DecodeProductsParams& a) {
    int which = 0;
    while (which + 1 < a.count && a.products[which + 1].first_block <= blockIdx.x) ++which;
    return which;
}

// Whether nobody needs a product's results.
__device__ inline bool is_idle(const Product& p) {
    if (!p.needed) return false;
    wait_for_dependencies();
    return *p.needed == 0;
}

// Up to eight rows a block.
template <int TYPES>
__device__ inline void run_products(const DecodeProductsParams& a) {
    __shared__ uint4 grids[GRID_ENTRIES * GRID_COPIES];
    launch_dependents();
    const Preparation& to_do = a.preparation;
    int first = blockIdx.y * 8, n = a.rows, blocks = a.blocks;
    if ((int)blockIdx.x >= blocks) {
        quantise_rows(to_do, blockIdx.x - blocks, first, min(first + 8, n));
        return;
    }
    int which = own_product(a);
    const Product& p = a.products[which];
    if (is_idle(p)) return;
    if ((TYPES & TYPE_BIT(IQ2_XXS)) && p.type == IQ2_XXS) {
        load_grid(grids, a.iq2_grid);
        __syncthreads();
    }
    run_product<TYPES>(
        p, blockIdx.x - p.first_block, first, n, own_grid(grids), (float*)dynamic_shared);
    if (to_do.routing.logits && which == 0) {
        int own_blocks = a.count > 1 ? a.products[1].first_block : blocks;
        if (last_to_arrive(to_do.arrivals, own_blocks * gridDim.y)) {
            route_few<DECODE_WARPS>(to_do.routing, n, to_do.permutation, (float*)dynamic_shared);
        }
    }
}

// Up to 8·TOKENS rows, from `first` on.
template <int TOKENS>
__device__ inline void run_batch(const DecodeProductsParams& a) {
    launch_dependents();
    const Preparation& to_do = a.preparation;
    int first = a.first, n = a.rows, blocks = a.blocks;
    if ((int)blockIdx.x >= blocks) {
        quantise_rows(to_do, blockIdx.x - blocks, first, min(first + 8 * TOKENS, n));
        return;
    }
    int which = own_product(a);
    const Product& p = a.products[which];
    if (is_idle(p)) return;
    if (!run_batch_product<TOKENS>(p, blockIdx.x - p.first_block, first, n, a.workspace)) return;
    if (to_do.routing.logits && which == 0) {
        int own_blocks = a.count > 1 ? a.products[1].first_block : blocks;
        int launches = (n + 8 * TOKENS - 1) / (8 * TOKENS);
        if (last_to_arrive(to_do.arrivals, own_blocks / p.split * launches)) {
            route_few<DECODE_WARPS>(to_do.routing, n, to_do.permutation, (float*)dynamic_shared);
        }
    }
}

extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP, 2) decode_products_8(
    __grid_constant__ const DecodeProductsParams a
) {
    run_products<DENSE_TYPES>(a);
}

extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP, 1) decode_products_any(
    __grid_constant__ const DecodeProductsParams a
) {
    run_products<ANY_TYPE>(a);
}

extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP, 2) decode_products_16(
    __grid_constant__ const DecodeProductsParams a
) {
    run_batch<2>(a);
}

extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP, 2) decode_products_32(
    __grid_constant__ const DecodeProductsParams a
) {
    run_batch<4>(a);
}

extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP, 1) decode_products_64(
    __grid_constant__ const DecodeProductsParams a
) {
    run_batch<8>(a);
}
