//! Of dense matrix products: decode_products.cu and prefill_products.cu.

use bytemuck::{Pod, Zeroable};

use super::{
    routing::{Permutation, Quantised, Routing},
    weights::PackedMatrix,
};
use crate::{
    constants::MOST_PRODUCTS,
    kernel::{Pointer, kernels, params},
};

params! {
    /// A matrix, what it is multiplied with and where results go.
    #[derive(Pod, Zeroable)]
    Product {
        weights: PackedMatrix,
        up: PackedMatrix,
        x: Pointer,
        x_low: Pointer,
        out: Pointer,
        out_half: Pointer,
        needed: Pointer,
        ty: i32,
        rows: i32,
        columns: i32,
        first_block: i32,
        x_stride: i32,
        out_stride: i32,
        first_tile: i32,
        split: i32,
        limit: f32,
        padding: i32,
    }

    /// Where the blocks of a split-K product meet.
    Workspace {
        sums: Pointer,
        arrivals: Pointer,
    }

    /// What the launch of the router's product does beside it.
    Preparation {
        routing: Routing,
        permutation: Permutation,
        arrivals: Pointer,
        quantised: Quantised,
        x: Pointer,
        x_low: Pointer,
    }

    DecodeProductsParams {
        products: [Product; MOST_PRODUCTS],
        preparation: Preparation,
        workspace: Workspace,
        iq2_grid: Pointer,
        count: i32,
        blocks: i32,
        first: i32,
        rows: i32,
    }

    PrefillProductsParams {
        products: Pointer,
        iq2_grid: Pointer,
        count: i32,
        first_row: i32,
        end_row: i32,
    }
}

kernels! {
    DECODE_PRODUCTS_8: DecodeProductsParams = "decode_products_8";
    DECODE_PRODUCTS_ANY: DecodeProductsParams = "decode_products_any";
    DECODE_PRODUCTS_16: DecodeProductsParams = "decode_products_16";
    DECODE_PRODUCTS_32: DecodeProductsParams = "decode_products_32";
    DECODE_PRODUCTS_64: DecodeProductsParams = "decode_products_64";
    PREFILL_PRODUCTS: PrefillProductsParams = "prefill_products";
    PREFILL_PRODUCTS_ANY: PrefillProductsParams = "prefill_products_any";
}

impl Workspace {
    pub const NONE: Workspace = Workspace { sums: Pointer::NULL, arrivals: Pointer::NULL };
}

impl Preparation {
    /// Nothing to do.
    pub const NONE: Preparation = Preparation {
        routing: Routing::NONE,
        permutation: Permutation::NONE,
        arrivals: Pointer::NULL,
        quantised: Quantised::NONE,
        x: Pointer::NULL,
        x_low: Pointer::NULL,
    };
}
