// The MoE permutation: pairs of rows and experts in ascending order of expert, so that the rows of
// an expert stand together.
#pragma once

#include "common.cuh"

struct Permutation {
    // Pairs (row · used + slot) in ascending order of expert, then of pair [n·used].
    u32* pairs;
    // Where each expert's pairs start, and where the last one's end [experts + 1].
    u32* offsets;
    // Experts that have pairs, ascending [experts], and how many.
    u32* active;
    u32* active_count;
};
SAME_IN_RUST(Permutation);
