//! The form of activations that quantised weights are multiplied with: i8 in
//! groups of 32 with an f32 scale ("Q8"), q = round(x / d), d = max|x| / 127.
//!
//! Rows are kept twice: row-major for decoding ([`Q8Rows`]), and for prefill
//! interleaved in panels of a few tokens ([`Panel`]).

use rayon::prelude::*;

use super::vector::Vector;

/// Elements of a superblock.
pub(super) const SUPERBLOCK: usize = 256;
/// Elements that share an activation scale.
pub(super) const GROUP: usize = 32;
/// Groups of a superblock.
pub(super) const GROUPS: usize = SUPERBLOCK / GROUP;

/// 256 activations.
#[repr(C, align(64))]
#[derive(Clone)]
pub(super) struct Q8Block {
    /// In −127..=127.
    pub quants: [i8; SUPERBLOCK],
    /// The same: the first eight of every group, then the second eight, …
    pub octets: [[[i8; 8]; GROUPS]; 4],
    /// d of each group.
    pub scales: [f32; GROUPS],
    /// −d·Σq of each group, for formats with a min or bias per group.
    pub sums: [f32; GROUPS],
    /// −d·Σq of the first and of the second half of each group.
    pub half_sums: [[f32; GROUPS]; 2],
    /// Σq of each group.
    pub integer_sums: [i32; GROUPS],
}

impl Q8Block {
    const ZERO: Q8Block = Q8Block {
        quants: [0; SUPERBLOCK],
        octets: [[[0; 8]; GROUPS]; 4],
        scales: [0.0; GROUPS],
        sums: [0.0; GROUPS],
        half_sums: [[0.0; GROUPS]; 2],
        integer_sums: [0; GROUPS],
    };
}

/// Rows of activations, each filled up with zeros to whole superblocks.
pub(super) struct Q8Rows {
    blocks: Vec<Q8Block>,
    blocks_per_row: usize,
}

impl Q8Rows {
    /// Quantises `x`, rows of `cols`, each by `quantize`.
    pub fn new(x: &[f32], cols: usize, quantize: impl Fn(&[f32], &mut [Q8Block]) + Sync) -> Self {
        let blocks_per_row = cols.div_ceil(SUPERBLOCK);
        let mut blocks = vec![Q8Block::ZERO; x.len() / cols * blocks_per_row];
        let rows = blocks.par_chunks_mut(blocks_per_row).zip(x.par_chunks(cols));
        rows.for_each(|(blocks, x)| quantize(x, blocks));
        Q8Rows { blocks, blocks_per_row }
    }

    /// Row `r`.
    pub fn row(&self, r: usize) -> &[Q8Block] {
        &self.blocks[r * self.blocks_per_row..][..self.blocks_per_row]
    }
}

/// Quantises one row.
///
/// # Safety
/// Needs the instruction set of `V`.
#[inline(always)]
pub(super) unsafe fn quantize<V: Vector>(x: &[f32], blocks: &mut [Q8Block]) {
    for (x, block) in x.chunks(SUPERBLOCK).zip(blocks) {
        // SAFETY: the caller has the instruction set; both ends of the second
        // call hold 256 numbers.
        unsafe {
            if x.len() == SUPERBLOCK {
                quantize_block::<V>(x.as_ptr(), block);
            } else {
                let mut padded = [0.0; SUPERBLOCK];
                padded[..x.len()].copy_from_slice(x);
                quantize_block::<V>(padded.as_ptr(), block);
            }
        }
    }
}

/// Below this the reciprocal of d could overflow; such a group becomes zero.
const SMALLEST: f32 = 1e-30;

#[inline(always)]
unsafe fn quantize_block<V: Vector>(x: *const f32, block: &mut Q8Block) {
    // SAFETY: the caller has the instruction set, and 256 numbers at `x`.
    unsafe {
        for g in 0..GROUPS {
            let x = x.add(g * GROUP);
            let mut largest = V::splat(0.0);
            for i in (0..GROUP).step_by(V::LANES) {
                largest = V::max(largest, V::abs(V::load(x.add(i))));
            }
            let largest = V::largest(largest);
            let d = if largest < SMALLEST { 0.0 } else { largest / 127.0 };
            let inverse = V::splat(if d == 0.0 { 0.0 } else { 1.0 / d });
            let mut halves = [0; 2];
            for (half, sum) in halves.iter_mut().enumerate() {
                let mut total = V::splat_int(0);
                for i in (0..GROUP / 2).step_by(V::LANES) {
                    let i = half * (GROUP / 2) + i;
                    let q = V::round(V::mul(V::load(x.add(i)), inverse));
                    V::store_narrow(block.quants.as_mut_ptr().add(g * GROUP + i), q);
                    total = V::add_int(total, q);
                }
                *sum = V::sum_int(total);
            }
            block.scales[g] = d;
            block.integer_sums[g] = halves[0] + halves[1];
            block.sums[g] = -d * block.integer_sums[g] as f32;
            block.half_sums[0][g] = -d * halves[0] as f32;
            block.half_sums[1][g] = -d * halves[1] as f32;
        }
        for (i, &octet) in block.quants.as_chunks().0.iter().enumerate() {
            block.octets[i % 4][i / 4] = octet;
        }
    }
}

/// A few tokens' activations, interleaved for the tile kernel: one stream of
/// 32-bit words, group after group. With n tokens a group is
///
/// | words | what, token by token |
/// |---|---|
/// | 8·n | quants, four of each token at a time |
/// | n | −Σq, i32 |
/// | n | scale |
/// | n | −d·Σq |
/// | 2·n | −d·Σq of the first half, then of the second |
pub(super) struct Panel {
    pub tokens: usize,
    pub words: Vec<u32>,
}

/// Offsets of a panel group's parts, in units of `tokens` words.
pub(super) mod panel {
    pub const INTEGER_SUMS: usize = 8;
    pub const SCALES: usize = 9;
    pub const SUMS: usize = 10;
    pub const HALF_SUMS: [usize; 2] = [11, 12];
    pub const STRIDE: usize = 13;
}

impl Panel {
    /// Splits `rows` into panels of at most `most` tokens, as even as possible.
    pub fn split(rows: &[&[Q8Block]], most: usize) -> Vec<Panel> {
        let count = rows.len().div_ceil(most);
        (0..count)
            .map(|i| {
                let range = rows.len() * i / count..rows.len() * (i + 1) / count;
                Panel::new(&rows[range])
            })
            .collect()
    }

    fn new(rows: &[&[Q8Block]]) -> Panel {
        let tokens = rows.len();
        let groups = rows[0].len() * GROUPS;
        let mut words = vec![0; groups * tokens * panel::STRIDE];
        for (t, row) in rows.iter().enumerate() {
            for (g, words) in words.chunks_exact_mut(tokens * panel::STRIDE).enumerate() {
                let (block, g) = (&row[g / GROUPS], g % GROUPS);
                for (i, q) in
                    block.quants[g * GROUP..][..GROUP].as_chunks::<4>().0.iter().enumerate()
                {
                    words[i * tokens + t] = u32::from_ne_bytes(q.map(|q| q as u8));
                }
                let mut set = |part: usize, bits| words[part * tokens + t] = bits;
                set(panel::INTEGER_SUMS, (-block.integer_sums[g]) as u32);
                set(panel::SCALES, block.scales[g].to_bits());
                set(panel::SUMS, block.sums[g].to_bits());
                set(panel::HALF_SUMS[0], block.half_sums[0][g].to_bits());
                set(panel::HALF_SUMS[1], block.half_sums[1][g].to_bits());
            }
        }
        Panel { tokens, words }
    }
}
