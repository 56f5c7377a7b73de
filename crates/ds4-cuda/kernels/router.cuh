// Choosing experts, for the files that build kernels from it.
#pragma once

#include "permutation.cuh"

// Floor under the sum of chosen scores, as in other engines; real weights never come near it.
#define SMALLEST_SUM 6.1035156e-5f

// The square root of log(1 + e^x), to a few units in the last place.
//
// Short, since there is little time for hundreds of them: with z = e^-|x| and s = z / (2 + z) it is
// log(1 + z) = 2·atanh(s), a series whose first six terms do for s up to 1/3.
__device__ inline float sqrt_softplus(float x) {
    float z = expf(-fabsf(x)), s = z * fast_reciprocal(2.0f + z), t = s * s;
    float series = 1.0f / 9 + t * (1.0f / 11);
    series = 1.0f / 5 + t * (1.0f / 7 + t * series);
    series = 1.0f + t * (1.0f / 3 + t * series);
    return fast_sqrt(fmaxf(x, 0.0f) + 2.0f * s * series);
}

// What turns router products into chosen experts.
struct Routing {
    // Router products [n, experts].
    const float* logits;
    // Added to the scores for the choice alone [experts], if `table` is null.
    const float* bias;
    // The experts of each token, where they depend on it alone [vocab, used].
    const u32* table;
    const u32* tokens;
    // The choice, ids ascending [n, used].
    u32* ids;
    float* weights;
    int experts;
    int used;
    float scale;
};
SAME_IN_RUST(Routing);

// A number's place among all numbers, above 0.
__device__ inline u32 rank_of(float x) {
    // Zeros are equal, whatever their sign.
    u32 bits = __float_as_uint(x + 0.0f);
    return max(bits & 0x80000000 ? ~bits : bits | 0x80000000, 1u);
}

// A warp that routes rows; a lane has every 32nd expert, SCORES of them.
//
// Mostly it waits, for memory and for one step after the other. So what is needed later is loaded
// early, and what can be is a short loop: instructions that run once come from memory, too.
template <int SCORES>
struct RowRouter {
    const Routing& r;
    // Room for MOST_EXPERTS.
    float* scores;
    float bias[SCORES], logits[SCORES];

    __device__ inline RowRouter(const Routing& r, float* scores) : r(r), scores(scores) {
#pragma unroll
        for (int i = 0; i < SCORES; ++i) bias[i] = r.bias && has(i) ? r.bias[expert(i)] : 0.0f;
    }

    __device__ static inline int expert(int i) { return WARP * i + threadIdx.x % WARP; }
    __device__ inline bool has(int i) const { return expert(i) < r.experts; }

    __device__ inline void load(int row) {
        const float* from = r.logits + (size_t)row * r.experts;
#pragma unroll
        for (int i = 0; i < SCORES; ++i) logits[i] = has(i) ? from[expert(i)] : 0.0f;
    }

    // Rows `first`, `first + step`, … below `end`; `chosen` gets each row and its experts,
    // ascending, in the first `used` lanes.
    template <class Chosen>
    __device__ inline void run(int first, int step, int end, Chosen chosen) {
        if (first < end) load(first);
        for (int row = first; row < end; row += step) {
#pragma unroll
            for (int i = 0; i < SCORES; ++i) {
                if (has(i)) scores[expert(i)] = logits[i];
            }
            if (row + step < end) load(row + step);
#pragma unroll 4
            for (int e = threadIdx.x % WARP; e < r.experts; e += WARP) {
                scores[e] = sqrt_softplus(scores[e]);
            }
            __syncwarp();
            u32 own = r.table ? listed(row) : choose();
            store_weights(row, own);
            chosen(row, own);
        }
    }

    __device__ inline u32 listed(int row) const {
        int lane = threadIdx.x % WARP;
        return lane < r.used ? r.table[(size_t)r.tokens[row] * r.used + lane] : 0;
    }

    // The experts with the largest biased scores.
    __device__ inline u32 choose() const {
        int lane = threadIdx.x % WARP, used = r.used;
        // 0: no expert, or taken.
        u32 ranks[SCORES], chosen = 0;
#pragma unroll
        for (int i = 0; i < SCORES; ++i) {
            ranks[i] = has(i) ? rank_of(scores[expert(i)] + bias[i]) : 0;
        }
#pragma unroll 1
        for (int j = 0; j < used; ++j) {
            u32 best = 0;
#pragma unroll
            for (int i = 0; i < SCORES; ++i) best = max(best, ranks[i]);
            best = __reduce_max_sync(FULL_WARP, best);
            // Of equal ones the lower index.
            u32 first = ~0u;
#pragma unroll
            for (int i = SCORES - 1; i >= 0; --i) {
                if (ranks[i] == best) first = expert(i);
            }
            first = __reduce_min_sync(FULL_WARP, first);
            if (lane == j) chosen = first;
#pragma unroll
            for (int i = 0; i < SCORES; ++i) {
                if (expert(i) == first) ranks[i] = 0;
            }
        }
        int place = 0;
        for (int j = 0; j < used; ++j) place += __shfl_sync(FULL_WARP, chosen, j) < chosen;
        u32 own = 0;
        for (int j = 0; j < used; ++j) {
            u32 id = __shfl_sync(FULL_WARP, chosen, j);
            if (__shfl_sync(FULL_WARP, place, j) == lane) own = id;
        }
        return own;
    }

    __device__ inline void store_weights(int row, u32 own) const {
        int lane = threadIdx.x % WARP;
        float score = lane < r.used ? scores[own] : 0.0f, sum = warp_sum(score);
        // The next row's scores may come.
        __syncwarp();
        if (lane >= r.used) return;
        size_t at = (size_t)row * r.used + lane;
        r.ids[at] = own;
        r.weights[at] = r.scale * score / fmaxf(sum, SMALLEST_SUM);
    }
};

// One warp: the choice of rows `first`, `first + step`, … below `end`; see `RowRouter`.
template <class Chosen>
__device__ inline void route_rows(
    const Routing& r, int first, int step, int end, float* scores, Chosen chosen
) {
    constexpr int MOST = MOST_EXPERTS / WARP;
    if (r.experts <= MOST_EXPERTS / 2) {
        RowRouter<MOST / 2>(r, scores).run(first, step, end, chosen);
    } else {
        RowRouter<MOST>(r, scores).run(first, step, end, chosen);
    }
}

// Counts over the experts up to one's own: pairs, experts that have pairs, tiles.
struct ExpertCounts {
    u32 pairs, active, tiles;

    __device__ inline void add(const ExpertCounts& o) {
        pairs += o.pairs;
        active += o.active;
        tiles += o.tiles;
    }
};

// The sum over the threads before this one; `all` becomes that over the block.
template <int WARPS>
__device__ inline ExpertCounts counts_before(
    const ExpertCounts& own, ExpertCounts (&warp_counts)[WARPS], ExpertCounts& all
) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    ExpertCounts sum = own;
#pragma unroll
    for (int d = 1; d < WARP; d *= 2) {
        ExpertCounts below = {
            __shfl_up_sync(FULL_WARP, sum.pairs, d), __shfl_up_sync(FULL_WARP, sum.active, d),
            __shfl_up_sync(FULL_WARP, sum.tiles, d)};
        if (lane >= d) sum.add(below);
    }
    if (lane == WARP - 1) warp_counts[warp] = sum;
    __syncthreads();
    all = {0, 0, 0};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        if (w == warp) sum.add(all);
        all.add(warp_counts[w]);
    }
    return {sum.pairs - own.pairs, sum.active - own.active, sum.tiles - own.tiles};
}

// Which rows chose an expert.
struct RowSets {
    u32 at[MOST_FEW_ROWS / 32][MOST_EXPERTS];

    __device__ inline void clear() {
        for (int e = threadIdx.x; e < MOST_EXPERTS; e += blockDim.x) {
#pragma unroll
            for (int w = 0; w < MOST_FEW_ROWS / 32; ++w) at[w][e] = 0;
        }
    }

    __device__ inline void add(int row, u32 expert) {
        atomicOr(&at[row / 32][expert], 1u << row % 32);
    }

    // Of the first `rows` rows.
    __device__ inline u32 count(int rows, u32 expert) const {
        u32 sum = 0;
#pragma unroll
        for (int w = 0; w < MOST_FEW_ROWS / 32; ++w) {
            int own = min(max(rows - 32 * w, 0), 32);
            sum += __popc(at[w][expert] & (u32)((1ull << own) - 1));
        }
        return sum;
    }
};

// The choice of `rows` rows, and the pairs of each expert, for all threads of a block of WARPS
// warps. `scores` has room for MOST_EXPERTS of each warp.
template <int WARPS>
__device__ inline void route_few(
    const Routing& r, int rows, const Permutation& to, float* scores
) {
    constexpr int THREADS = WARPS * WARP, OWN = MOST_EXPERTS / THREADS;
    __shared__ u32 chosen[MOST_FEW_PAIRS], offsets[MOST_EXPERTS];
    __shared__ RowSets sets;
    __shared__ ExpertCounts warp_counts[WARPS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, used = r.used;
    sets.clear();
    __syncthreads();
    route_rows(r, warp, WARPS, rows, scores + warp * MOST_EXPERTS, [&](int row, u32 own) {
        if (lane >= used) return;
        chosen[row * used + lane] = own;
        sets.add(row, own);
    });
    __syncthreads();
    ExpertCounts own = {0, 0, 0}, all;
    u32 pairs_of[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        pairs_of[i] = sets.count(rows, OWN * threadIdx.x + i);
        own.add({pairs_of[i], pairs_of[i] > 0, 0});
    }
    ExpertCounts before = counts_before(own, warp_counts, all);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        int expert = OWN * threadIdx.x + i;
        if (expert < r.experts) to.offsets[expert] = before.pairs;
        if (pairs_of[i] > 0) to.active[before.active] = expert;
        offsets[expert] = before.pairs;
        before.add({pairs_of[i], pairs_of[i] > 0, 0});
    }
    if (threadIdx.x == 0) {
        to.offsets[r.experts] = all.pairs;
        *to.active_count = all.active;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * used; i += THREADS) {
        u32 expert = chosen[i];
        to.pairs[offsets[expert] + sets.count(i / used, expert)] = i;
    }
}
