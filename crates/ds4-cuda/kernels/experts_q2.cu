// Routed experts of a few rows in the formats in which the model is smallest: gate and up in
// IQ2_XXS, down in Q2_K.
//
// The tiles of all chosen experts are shared out evenly among the blocks. All warps of a block work
// on the same tile, each on the same columns of it at all times: so activations are loaded once
// for all of an expert's tiles, while the weights of the next tile are on their way. Each weight is
// read once for a pass of up to four of the expert's rows: few experts have more.

#include "separate.cuh"

#define WARPS 16
#define THREADS (WARPS * WARP)
// A multiple of the rows that are multiplied at once.
#define SLOTS 8

// Pieces of an expert, and the one whose weights are wanted after them (if its expert is not negative).
struct Pieces {
    int expert;
    int first, end;
    int next_expert, next_piece;
};

// Pieces that a block does in a row: then all blocks work on few experts at any time, and the
// memory on few of its pages.
#define MOST_IN_A_ROW 8

// Calls stage.run<ROWS>(…) for the block's share of the passes, which have `pieces` each. `ready` is
// called when the first weights have been asked for.
template <typename Stage, typename Ready>
__device__ __forceinline__ void run_share(Stage& stage, const Groups& groups, int pieces, Ready ready) {
    int all = *groups.pass_count * pieces, blocks = gridDim.x;
    int rounds = (all + blocks * MOST_IN_A_ROW - 1) / (blocks * MOST_IN_A_ROW);
    int length = (all + blocks * rounds - 1) / (blocks * rounds);
    int at = blockIdx.x * length, end = min(at + length, all);
    Pass pass;
    if (at < all) {
        pass = groups.passes[at / pieces];
        stage.fetch(0, pass.expert, at % pieces);
        stage.fetch(1, pass.expert, at % pieces);
    }
    ready();
    while (at < all) {
        int before = at / pieces * pieces, last = min(end, before + pieces);
        // What comes after these pieces: others of the share's, or of the next round's.
        int next = last < end ? last : end + (blocks - 1) * length;
        Pass next_pass = groups.passes[next < all ? next / pieces : 0];
        Pieces some = {(int)pass.expert, at - before, last - before,
                       next < all ? (int)next_pass.expert : -1, next % pieces};
        stage.run(some, pass);
        if (next != last) end = min(next + length, all);
        at = next;
        pass = next_pass;
    }
}

// Adds up four lanes' shares of rows g and g + 8: of row g in even lanes, of row g + 8 in odd ones.
__device__ inline float sum_over_columns(RowPair share, int lane) {
    bool odd = lane % 2;
    float keep = odd ? share.high : share.low, give = odd ? share.low : share.high;
    keep += __shfl_xor_sync(FULL_WARP, give, 1);
    return keep + __shfl_xor_sync(FULL_WARP, keep, 2);
}

// Multiplies the pieces' weights with an expert's rows. A warp has two units, each on its way while
// the other one is multiplied; `Kind` says what they are and what becomes of the sums. TEAMS of
// warps work on tiles of their own, with up to ROWS_AT_ONCE rows: as many as registers allow.
//
// Warps leave their sums in slots, one for each piece and row. When those are full, each warp adds
// up what is in one of them, while others go on with the next pieces.
template <typename Kind, int TYPE, int TEAMS, int ROWS_AT_ONCE>
struct ExpertStage {
    static constexpr int TEAM = WARPS / TEAMS, MOST_ROWS = ROWS_AT_ONCE;

    SeparateUnit<TYPE> w[2];
    OwnSteps<SeparateUnit<TYPE>::OWN_STEPS> own;
    int lane, warp, unit, units;
    // Which half of the room for sums is being filled.
    int half;

    __device__ inline explicit ExpertStage(int columns)
        : own(SeparateUnit<TYPE>::own_step(threadIdx.x % WARP)), lane(threadIdx.x % WARP),
          warp(threadIdx.x / WARP), unit(warp % TEAM), units(columns / 256), half(0) {}

    // A float for each warp and lane: t = 2·i is unit i's row g, t = 2·i + 1 its row g + 8.
    __device__ inline float* sums(int slot) const {
        return (float*)dynamic_shared + (half * SLOTS + slot) * THREADS;
    }

    __device__ __forceinline__ void run(const Pieces& some, const Pass& pass) {
        if (pass.count == 1) {
            run_rows<1>(some, pass.pairs, 1);
        } else if (pass.count == 2) {
            run_rows<2>(some, pass.pairs, 2);
        } else if constexpr (MOST_ROWS == PASS_ROWS) {
            run_rows<PASS_ROWS>(some, pass.pairs, pass.count);
        } else {
            Pieces again = {some.expert, some.first, some.end, some.expert, some.first};
            run_rows<2>(again, pass.pairs, 2);
            run_rows<2>(some, pass.pairs + 2, pass.count - 2);
        }
    }

    template <int ROWS>
    __device__ __forceinline__ void run_rows(const Pieces& some, const u32* pairs, int count) {
        Kind& kind = *(Kind*)this;
        SeparateInput<TYPE> in[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (unit < units) kind.load(in[r], pairs[r]);
        }
        int slot = 0;
        for (int piece = some.first; piece < some.end; ++piece) {
            bool last = piece + 1 == some.end;
            int next = last ? some.next_expert : some.expert;
            int next_piece = last ? some.next_piece : piece + 1;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (unit >= units) continue;
                RowPair share[ROWS];
                w[i].multiply(share, in, own, kind.grid, lane);
                if (next >= 0) kind.fetch(i, next, next_piece);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    float sum = sum_over_columns(share[r], lane);
                    if (lane % 4 / 2 == i) sums(slot + r)[threadIdx.x] = sum;
                }
            }
            slot += ROWS;
            if (last || slot == SLOTS) {
                finish<ROWS>(pairs, count, piece + 1 - slot / ROWS, slot);
                slot = 0;
            }
        }
    }

    // Adds up what is in the first `filled` slots: those of pieces from `first_piece` on.
    template <int ROWS>
    __device__ __forceinline__ void finish(
        const u32* pairs, int count, int first_piece, int filled
    ) {
        int slot = warp / TEAMS, team = warp % TEAMS, row = slot % ROWS;
        bool mine = slot < filled && row < count;
        u32 pair = pairs[0];
#pragma unroll
        for (int r = 1; r < ROWS; ++r) pair = row == r ? pairs[r] : pair;
        auto target = ((Kind*)this)->target(pair);
        __syncthreads();
        if (mine) {
            float sum = 0.0f;
            const float* from = sums(slot) + team * TEAM * WARP + lane;
#pragma unroll 4
            for (int i = 0; i < units; ++i) sum += from[i * WARP];
            ((Kind*)this)->put(sum, target, first_piece + slot / ROWS, team);
        }
        half ^= 1;
    }
};

// hidden[pair] = weight · SwiGLU(gate·x, up·x), and the sums of each 16 columns: a piece is a tile
// of both matrices.
struct GateUp : ExpertStage<GateUp, IQ2_XXS, 1, 4> {
    const Stack &gate, &up;
    const uint4* grid;
    const float* pair_weights;
    const u16* x;
    u16 *hidden, *group_sums;
    int used;
    float limit;

    __device__ inline GateUp(const Stack& gate, const Stack& up)
        : ExpertStage(gate.columns), gate(gate), up(up) {}

    __device__ inline void fetch(int i, int expert, int piece) {
        if (unit >= units) return;
        const Planes& from = i ? up.weights : gate.weights;
        w[i].load(from, units, expert * (gate.rows / 16) + piece, unit, lane);
    }

    __device__ inline void load(SeparateInput<IQ2_XXS>& in, u32 pair) const {
        in.load(x + (size_t)(pair / used) * gate.columns, unit, lane);
    }

    struct Target {
        size_t row;
        float weight;
    };

    __device__ inline Target target(u32 pair) const {
        return {(size_t)pair * gate.rows, pair_weights[pair]};
    }

    __device__ inline void put(float sum, const Target& to, int tile, int) const {
        // Lanes with gate's sums get up's.
        int g = lane / 4, t = lane % 4;
        float up = __shfl_xor_sync(FULL_WARP, sum, 2);
        u16 y = float_to_half(to.weight * swiglu(sum, up, limit));
        float group = warp_sum(t < 2 ? half_to_float(y) : 0.0f);
        if (t < 2) hidden[to.row + 16 * tile + 8 * t + g] = y;
        if (lane == 0) group_sums[to.row / 16 + group_sum_at(tile)] = float_to_half(group);
    }
};

// out[token][slot] = down·hidden for the pairs of each expert: a piece is four tiles.
struct Down : ExpertStage<Down, Q2_K, 2, 2> {
    const Stack& stack;
    const u16 *hidden, *group_sums;
    float* out;
    int used;
    static constexpr const uint4* grid = nullptr;

    __device__ inline explicit Down(const Stack& stack) : ExpertStage(stack.columns), stack(stack) {}

    // The piece's tile for unit `i` of a team's warps.
    __device__ static inline int tile(int piece, int team, int i) { return 4 * piece + 2 * team + i; }

    __device__ inline void fetch(int i, int expert, int piece) {
        if (unit >= units) return;
        int tiles = stack.rows / 16, at = min(tile(piece, warp / TEAM, i), tiles - 1);
        w[i].load(stack.weights, units, expert * tiles + at, unit, lane);
    }

    __device__ inline void load(SeparateInput<Q2_K>& in, u32 pair) const {
        size_t row = (size_t)pair * stack.columns;
        in.load(hidden + row, group_sums + row / 16, unit, lane);
    }

    // Where a pair's results go.
    __device__ inline float* target(u32 pair) const {
        return out + ((size_t)(pair / used) * (used + 1) + pair % used) * stack.rows;
    }

    __device__ inline void put(float sum, float* to, int piece, int team) const {
        int row = 16 * tile(piece, team, 0) + 8 * (lane % 4) + lane / 4;
        if (row < stack.rows) to[row] = sum;
    }
};

// Columns up to 4096: one unit a warp.
extern "C" __global__ void __launch_bounds__(THREADS, 1) experts_gate_up_q2(
    __grid_constant__ const Stack gate, __grid_constant__ const Stack up,
    __grid_constant__ const Groups groups, const float* pair_weights, const u16* x, u16* hidden,
    u16* group_sums, int used, float limit, const uint4* iq2_grid
) {
    __shared__ uint4 grids[GRID_ENTRIES * GRID_COPIES];
    load_grid(grids, iq2_grid);
    __syncthreads();
    wait_for_dependencies();
    // Not before: what comes next reads the groups without waiting for this launch.
    launch_dependents();
    GateUp stage(gate, up);
    stage.grid = own_grid(grids);
    stage.pair_weights = pair_weights;
    stage.x = x;
    stage.hidden = hidden;
    stage.group_sums = group_sums;
    stage.used = used;
    stage.limit = limit;
    run_share(stage, groups, gate.rows / 16, [] {});
}

// Columns up to 2048. The shared expert's last product goes first, to the slot after the routed
// ones: its input was ready when the launch before began.
extern "C" __global__ void __launch_bounds__(THREADS, 1) experts_down_q2(
    __grid_constant__ const Stack w, __grid_constant__ const Groups groups, const u16* hidden,
    const u16* group_sums, float* out, int used, int n, __grid_constant__ const Product shared
) {
    launch_dependents();
    int shared_tiles = WARPS / shared.split;
    int shared_blocks = (w.rows / 16 + shared_tiles - 1) / shared_tiles;
    for (int i = blockIdx.x; i < shared_blocks * ((n + 7) / 8); i += gridDim.x) {
        run_product<TYPE_BIT(Q8_0), 1, WARPS>(
            shared, i % shared_blocks, i / shared_blocks * 8, n, nullptr, (float*)dynamic_shared,
            [] {});
        __syncthreads();
    }
    Down stage(w);
    stage.hidden = hidden;
    stage.group_sums = group_sums;
    stage.out = out;
    stage.used = used;
    run_share(stage, groups, (w.rows / 16 + 3) / 4, [] { wait_for_dependencies(); });
}
