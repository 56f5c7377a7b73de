//! Weight formats as kernels see them: how to unpack one superblock (256
//! elements of a row), or one register of plain floats.
//!
//! The unpacking itself differs by instruction set and lies with it
//! (`avx2/formats.rs` and so on); here are the traits, and what the sets share.

use std::mem::MaybeUninit;

use gguf::IQ2_SIGNS;

use super::{
    q8::{GROUPS, Q8Block, SUPERBLOCK},
    tile::{WORDS, prefetch, registers},
    vector::{Rows, Vector},
};

/// A quantised weight format on one instruction set.
///
/// A weight is `scale · (quant − BIAS) − min`, one scale per group; with
/// `MINS == 1` there is one min per group, with 2 one per half group.
pub(super) trait Format<V: Vector> {
    /// Bytes of 256 elements.
    const BYTES: usize;
    /// What makes signed quants unsigned, where [`Vector::dot`] wants that. As
    /// small as possible: the more it adds, the more f32 sums in decoding lose.
    const BIAS: i32;
    /// Quants take all eight bits (see [`Vector::dot`]).
    const WIDE: bool;
    /// Mins per group.
    const MINS: usize;

    /// Unpacks the superblock at `p`.
    ///
    /// # Safety
    /// Needs the instruction set, and `BYTES` readable bytes.
    unsafe fn unpack(p: *const u8) -> Unpacked<V>;

    /// Unpacks the superblocks of the first [`Vector::LANES`] rows to the eight
    /// groups of a tile at `tile`. The tile that is likely to follow lies `ahead`
    /// bytes behind this one.
    ///
    /// # Safety
    /// Needs the instruction set, `BYTES` readable bytes at each of the rows, and
    /// room in the tile.
    #[inline(always)]
    unsafe fn unpack_tile(rows: &Rows, ahead: usize, tile: *mut u32) {
        // SAFETY: as the caller promises.
        unsafe { unpack_by_rows::<V, Self>(rows, ahead, tile) }
    }

    /// Which four elements of the superblock, counted in fours, 32-bit word `i`
    /// of [`Unpacked::quants`] has.
    #[inline(always)]
    fn place(i: usize) -> usize {
        i
    }

    /// Adds to `sums` the products of `quants` and `x`, scaled with the product
    /// of the weights' and of `x`'s scales.
    ///
    /// # Safety
    /// Needs the instruction set.
    #[inline(always)]
    unsafe fn add_dots(
        quants: &V::Block,
        x: &Q8Block,
        scales: V::Groups,
        mut sums: V::Float,
    ) -> V::Float {
        // SAFETY: the caller has the instruction set; registers of quants are
        // as many as the 256 activations fill.
        unsafe {
            for (i, &quants) in quants.as_ref().iter().enumerate() {
                let x = V::load_bytes(x.quants.as_ptr().cast::<u8>().add(i * 4 * V::LANES));
                let dots = V::to_float(V::dot(Self::WIDE, V::splat_int(0), quants, x));
                sums = V::fma(dots, V::expand(scales, i), sums);
            }
            sums
        }
    }
}

/// One superblock of a row.
pub(super) struct Unpacked<V: Vector> {
    /// In the order of [`Format::place`], mostly that of the row.
    pub quants: V::Block,
    /// One per group.
    pub scales: V::Groups,
    /// The first `MINS` count: of each group, or of each group's two halves.
    pub mins: [V::Groups; 2],
}

/// Unpacks one superblock of each row to `tile`: row by row to a scratch, which
/// is then transposed.
///
/// # Safety
/// Needs the instruction set of `V`; rows have [`Format::BYTES`] readable bytes,
/// the tile room for eight groups.
#[inline(always)]
unsafe fn unpack_by_rows<V: Vector, F: Format<V> + ?Sized>(
    rows: &Rows,
    ahead: usize,
    tile: *mut u32,
) {
    let stride = registers(F::MINS) * V::LANES;
    // Left as they are, for zeroing takes as long as a third of the rest; what
    // is read has been written.
    let mut scratch = MaybeUninit::<Scratch>::uninit();
    // SAFETY: as the caller promises; `LANES` rows of the scratch are written
    // and read.
    unsafe {
        let quants = (&raw mut (*scratch.as_mut_ptr()).quants).cast::<[u8; SUPERBLOCK]>();
        let factors = (&raw mut (*scratch.as_mut_ptr()).factors).cast::<[f32; FACTORS]>();
        for lane in 0..V::LANES {
            prefetch::<V>(rows[lane], ahead, F::BYTES);
            let block = F::unpack(rows[lane]);
            for (i, &word) in block.quants.as_ref().iter().enumerate() {
                V::store_bytes(quants.add(lane).cast::<u8>().add(i * 4 * V::LANES), word);
            }
            // Scales and mins, and something to fill the last register.
            let parts = [block.scales, block.mins[0], block.mins[1], block.scales];
            for (i, part) in parts.into_iter().take(2 + F::MINS).enumerate() {
                V::store_groups(factors.add(lane).cast::<f32>().add(i * GROUPS), part);
            }
        }

        let mut targets = [tile; GROUPS * WORDS];
        for (i, target) in targets.iter_mut().enumerate() {
            let i = F::place(i);
            *target = tile.add(i / WORDS * stride + i % WORDS * V::LANES);
        }
        let rows = rows_of(quants.cast(), SUPERBLOCK);
        for (i, targets) in targets.chunks_exact(V::LANES).enumerate() {
            V::transpose(&rows, i * 4 * V::LANES, targets);
        }
        let used = GROUPS * (1 + F::MINS);
        let unused = (&raw mut (*scratch.as_mut_ptr()).unused).cast::<u32>();
        let mut targets = [unused; FACTORS];
        for (i, target) in targets[..used].iter_mut().enumerate() {
            *target = tile.add(i % GROUPS * stride + (WORDS + i / GROUPS) * V::LANES);
        }
        let rows = rows_of(factors.cast(), FACTORS * 4);
        for (i, targets) in targets.chunks_exact(V::LANES).enumerate() {
            if i * V::LANES < used {
                V::transpose(&rows, i * 4 * V::LANES, targets);
            }
        }
    }
}

/// Room for a superblock's scales and mins, in whole registers.
const FACTORS: usize = 4 * GROUPS;

/// Rows of `size` bytes from `start` on.
#[inline(always)]
fn rows_of(start: *const u8, size: usize) -> Rows {
    let mut rows = [start; 16];
    for (i, row) in rows.iter_mut().enumerate() {
        *row = start.wrapping_add(i * size);
    }
    rows
}

/// Where rows meet on their way to a tile.
#[repr(C, align(64))]
struct Scratch {
    quants: [[u8; SUPERBLOCK]; 16],
    factors: [[f32; FACTORS]; 16],
    /// For columns of no use.
    unused: [u32; 16],
}

/// A float weight format on one instruction set.
pub(super) trait FloatFormat<V: Vector> {
    /// Bytes of one element.
    const BYTES: usize;

    /// Widens [`Vector::LANES`] elements.
    ///
    /// # Safety
    /// Needs the instruction set, and that many elements at `p`.
    unsafe fn load(p: *const u8) -> V::Float;
}

/// `F32` tensors.
pub(super) struct F32;
/// `F16` tensors.
pub(super) struct F16;
/// `BF16` tensors.
pub(super) struct Bf16;

macro_rules! float_format {
    ($name:ident, $bytes:literal, $p:ident => $load:expr) => {
        impl<V: Vector> FloatFormat<V> for $name {
            const BYTES: usize = $bytes;

            #[inline(always)]
            unsafe fn load($p: *const u8) -> V::Float {
                // SAFETY: as the caller promises.
                unsafe { $load }
            }
        }
    };
}

float_format!(F32, 4, p => V::load(p.cast()));
float_format!(F16, 2, p => V::load_f16(p));
float_format!(Bf16, 2, p => V::load_bf16(p));

/// `Q8_0` tensors.
pub(super) struct Q8_0;
/// `Q2_K` tensors.
pub(super) struct Q2K;
/// `Q4_K` tensors.
pub(super) struct Q4K;
/// `IQ2_XXS` tensors.
pub(super) struct Iq2Xxs;
/// `MXFP4` tensors.
pub(super) struct Mxfp4;

/// The eight 6-bit scales and the eight 6-bit mins of a `Q4_K` block, one per
/// byte, from its twelve bytes at `p`.
///
/// # Safety
/// Twelve bytes must be readable.
#[inline(always)]
pub(super) unsafe fn q4_k_scales_and_mins(p: *const u8) -> (u64, u64) {
    // SAFETY: as the caller promises.
    let [s0, s1, s2] = unsafe { p.cast::<[u32; 3]>().read_unaligned() }.map(u32::from_le);
    let scales_low = s0 & 0x3f3f_3f3f;
    let mins_low = s1 & 0x3f3f_3f3f;
    let scales_high = (s2 & 0x0f0f_0f0f) | (s0 >> 6 & 0x0303_0303) << 4;
    let mins_high = (s2 >> 4 & 0x0f0f_0f0f) | (s1 >> 6 & 0x0303_0303) << 4;
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    (join(scales_low, scales_high), join(mins_low, mins_high))
}

/// Half of the value of an E8M0 exponent, that is 2^(x−128): `MXFP4` quants are
/// doubled to be integers.
#[inline(always)]
pub(super) fn half_exponent(x: u8) -> f32 {
    let x = u32::from(x);
    f32::from_bits(if x < 2 { 0x0020_0000 << x } else { (x - 1) << 23 })
}

/// Signs of eight `IQ2_XXS` elements by code, one byte of 1 or −1 for each.
pub(super) static IQ2_SIGN_BYTES: [u64; 128] = {
    let mut signs = [0; 128];
    let mut code = 0;
    while code < 128 {
        let mut element = 0;
        while element < 8 {
            let byte = if IQ2_SIGNS[code] >> element & 1 == 0 { 0x01 } else { 0xff };
            signs[code] |= byte << (8 * element);
            element += 1;
        }
        code += 1;
    }
    signs
};

/// `MXFP4` quants by nibble.
pub(super) const MXFP4_QUANTS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
