// Matrix products of a few rows: the weights are read once, at the memory's pace.
//
// A block has one tile of 16 weight rows, and its warps share the tile's columns. How they share
// them depends on the matrix alone, so a row's results do not depend on the rows beside it.

#include "products.cuh"

template <int TYPES, int TOKENS>
__device__ inline void run_products(
    const Product* products, int count, int n, const uint2* iq2_grid
) {
    __shared__ uint2 grid[256];
    launch_dependents();
    int which = 0;
    while (which + 1 < count && products[which + 1].first_block <= blockIdx.x) ++which;
    const Product& p = products[which];
    if ((TYPES & TYPE_BIT(IQ2_XXS)) && p.type == IQ2_XXS) {
        load_grid(grid, iq2_grid);
        __syncthreads();
    }
    if (p.needed) {
        wait_for_dependencies();
        if (*p.needed == 0) return;
    }
    int first = blockIdx.y * 8 * TOKENS;
    float* scratch = (float*)dynamic_shared;
    run_product<TYPES, TOKENS>(p, blockIdx.x - p.first_block, first, n, grid, scratch);
}

extern "C" __global__ void __launch_bounds__(256, 3)
decode_products_8(const Product* products, int count, int n, const uint2* iq2_grid) {
    run_products<DENSE_TYPES, 1>(products, count, n, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(256, 2)
decode_products_16(const Product* products, int count, int n, const uint2* iq2_grid) {
    run_products<DENSE_TYPES, 2>(products, count, n, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(256, 2)
decode_products_32(const Product* products, int count, int n, const uint2* iq2_grid) {
    run_products<DENSE_TYPES, 4>(products, count, n, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(256, 1)
decode_products_64(const Product* products, int count, int n, const uint2* iq2_grid) {
    run_products<DENSE_TYPES, 8>(products, count, n, iq2_grid);
}

extern "C" __global__ void __launch_bounds__(256, 1)
decode_products_any(const Product* products, int count, int n, const uint2* iq2_grid) {
    run_products<ANY_TYPE, 1>(products, count, n, iq2_grid);
}
