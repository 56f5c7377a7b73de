// Weights of a model without a file, generated in place, byte for byte what the CPU makes, in the
// layout of a file.
//
//   word[i] = SplitMix64(key + i), float[i] = (2 · (word[i] >> 48) - 65535) · half_step + middle
//
// Output: bytes of a tensor, from some byte or element on.
// Grid: (up to 4096). Block: 256 threads, which take every so many words or elements.
// Plain Rust: `Generator::fill` in crates/ds4-model/src/synth/generator.rs.

#include "common.cuh"

// Random word `i` of `key`: SplitMix64, whose state is a counter.
__device__ inline u64 random_word(u64 key, u64 i) {
    u64 z = key + (i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

struct GenerateBlocksParams {
    // [bytes], aligned to 8.
    u8* out;
    // [SCALE_CHOICES].
    const u32* choices;
    // A multiple of 8.
    u64 first;
    u64 bytes;
    u64 key;
    u32 block_bytes;
    u32 scale_at;
    u32 scale_bytes;
};
SAME_IN_RUST(GenerateBlocksParams);

// `word` (number `i` of a tensor of blocks) with the bytes that belong to a scale replaced: choice
// number `first byte of the scale % 64`, four bytes each, lowest first; the first
// `scale_bytes` count.
__device__ inline u64 with_scales(u64 word, u64 i, const GenerateBlocksParams& p) {
    u32 block_bytes = p.block_bytes, scale_at = p.scale_at, scale_bytes = p.scale_bytes;
    u64 block = 8 * i / block_bytes;
    int offset = (int)(8 * i - block * block_bytes) - (int)scale_at;
    for (int byte = 0; byte < 8; ++byte) {
        int in_scale = offset + byte;
        // A block is longer than a word, so that only one other can begin inside it.
        bool next = in_scale + (int)scale_at >= (int)block_bytes;
        if (next) in_scale -= (int)block_bytes;
        if (in_scale < 0 || in_scale >= (int)scale_bytes) continue;
        u64 first = (block + next) * block_bytes + scale_at;
        u32 choice = p.choices[(random_word(p.key, first / 8) >> (first % 8 * 8)) % SCALE_CHOICES];
        word &= ~(0xffull << (8 * byte));
        word |= (u64)((choice >> (8 * in_scale)) & 0xff) << (8 * byte);
    }
    return word;
}

// Bytes `first` to `first + bytes` of a tensor of blocks with the key `key`: `Content::Blocks`.
extern "C" __global__ void __launch_bounds__(GENERATE_THREADS) generate_blocks(
    __grid_constant__ const GenerateBlocksParams p
) {
    wait_for_dependencies();
    launch_dependents();
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 n = (u64)blockIdx.x * blockDim.x + threadIdx.x; n < (p.bytes + 7) / 8; n += step) {
        u64 i = p.first / 8 + n;
        u64 word = random_word(p.key, i);
        word = with_scales(word, i, p);
        if (8 * n + 8 <= p.bytes) {
            ((u64*)p.out)[n] = word;
        } else {
            for (u64 b = 8 * n; b < p.bytes; ++b) p.out[b] = (u8)(word >> (b % 8 * 8));
        }
    }
}

// Rounds to nearest even; `f` is finite.
__device__ inline u16 float_to_bfloat(float f) {
    u32 bits = __float_as_uint(f);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct GenerateFloatsParams {
    // [count] of the type.
    u8* out;
    u64 first;
    u64 count;
    u64 key;
    // FILE_F32, FILE_F16 or FILE_BF16.
    u32 type;
    float middle;
    float half_step;
};
SAME_IN_RUST(GenerateFloatsParams);

// Elements `first` to `first + count` of a float tensor with the key `key`: `Content::Floats`,
// equal to it where `middle` is 0, as it is in matrices.
extern "C" __global__ void __launch_bounds__(GENERATE_THREADS) generate_floats(
    __grid_constant__ const GenerateFloatsParams p
) {
    wait_for_dependencies();
    launch_dependents();
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 n = (u64)blockIdx.x * blockDim.x + threadIdx.x; n < p.count; n += step) {
        int place = 2 * (int)(random_word(p.key, p.first + n) >> 48) - 65535;
        float value = (float)place * p.half_step + p.middle;
        if (p.type == FILE_F32) ((float*)p.out)[n] = value;
        if (p.type == FILE_F16) ((u16*)p.out)[n] = float_to_half(value);
        if (p.type == FILE_BF16) ((u16*)p.out)[n] = float_to_bfloat(value);
    }
}
