//! Of choosing experts, and of their input: router.cu, router.cuh and quantised.cuh.

use crate::kernel::{Pointer, kernels, params};

params! {
    /// Pairs of rows and experts in ascending order of expert.
    Permutation {
        pairs: Pointer,
        offsets: Pointer,
        active: Pointer,
        active_count: Pointer,
    }

    /// What turns router products into chosen experts.
    Routing {
        logits: Pointer,
        bias: Pointer,
        table: Pointer,
        tokens: Pointer,
        ids: Pointer,
        weights: Pointer,
        experts: i32,
        used: i32,
        scale: f32,
    }

    /// Rows of activations as integers.
    Quantised {
        parts: Pointer,
        scales: Pointer,
        units: i32,
    }

    RouteParams {
        routing: Routing,
        first_row: i32,
        end_row: i32,
    }

    PermutePairsParams {
        ids: Pointer,
        permutation: Permutation,
        tiles: Pointer,
        tile_count: Pointer,
        first_pair: i32,
        end_pair: i32,
        experts: i32,
    }
}

kernels! {
    ROUTE: RouteParams = "route";
    PERMUTE_PAIRS: PermutePairsParams = "permute_pairs";
}

impl Permutation {
    pub const NONE: Permutation = Permutation {
        pairs: Pointer::NULL,
        offsets: Pointer::NULL,
        active: Pointer::NULL,
        active_count: Pointer::NULL,
    };
}

impl Routing {
    /// Nothing is routed.
    pub const NONE: Routing = Routing {
        logits: Pointer::NULL,
        bias: Pointer::NULL,
        table: Pointer::NULL,
        tokens: Pointer::NULL,
        ids: Pointer::NULL,
        weights: Pointer::NULL,
        experts: 0,
        used: 0,
        scale: 0.0,
    };
}

impl Quantised {
    pub const NONE: Quantised = Quantised { parts: Pointer::NULL, scales: Pointer::NULL, units: 0 };
}
