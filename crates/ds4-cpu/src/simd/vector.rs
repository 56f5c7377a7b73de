//! The vector operations that kernels are written in, one implementation per
//! instruction set.
//!
//! Kernels are generic over [`Vector`] and inlined into functions compiled for
//! the instruction set (`kernels.rs`), so that each is written once. Only what
//! depends on the set stays outside: the operations here and the unpacking of
//! blocks ([`super::formats::Format`]).

/// A pointer for each lane; [`Vector::LANES`] is at most 16.
pub(super) type Rows = [*const u8; 16];

/// One instruction set's registers and operations.
///
/// # Safety
/// Every function needs the instruction set at run time, and pointers valid
/// for what its name says: [`Vector::LANES`] numbers unless noted.
pub(super) trait Vector: Sized + 'static {
    /// [`Vector::LANES`] f32.
    type Float: Copy;
    /// [`Vector::LANES`] i32, or four times as many bytes.
    type Int: Copy;
    /// Eight f32, one per group of 32 of a superblock.
    type Groups: Copy;
    /// The 256 bytes of a superblock, in order.
    type Block: Copy + AsRef<[Self::Int]>;

    /// f32 in a register.
    const LANES: usize;

    unsafe fn splat(x: f32) -> Self::Float;
    unsafe fn load(p: *const f32) -> Self::Float;
    unsafe fn store(p: *mut f32, v: Self::Float);
    /// Widens IEEE halves.
    unsafe fn load_f16(p: *const u8) -> Self::Float;
    /// Widens bfloat16.
    unsafe fn load_bf16(p: *const u8) -> Self::Float;
    unsafe fn add(a: Self::Float, b: Self::Float) -> Self::Float;
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    unsafe fn div(a: Self::Float, b: Self::Float) -> Self::Float;
    /// The smaller; NaN if `b` is.
    unsafe fn min(a: Self::Float, b: Self::Float) -> Self::Float;
    /// The larger; NaN if `b` is.
    unsafe fn max(a: Self::Float, b: Self::Float) -> Self::Float;
    unsafe fn abs(a: Self::Float) -> Self::Float;
    /// a·b + c, rounded once.
    unsafe fn fma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// Sum of the lanes, in an order that does not vary.
    unsafe fn sum(v: Self::Float) -> f32;
    /// Largest lane.
    unsafe fn largest(v: Self::Float) -> f32;
    /// Nearest integers, ties to even.
    unsafe fn round(v: Self::Float) -> Self::Int;
    unsafe fn to_float(v: Self::Int) -> Self::Float;
    /// v·2ⁿ for results in the normal range.
    unsafe fn scale_by_power(v: Self::Float, n: Self::Int) -> Self::Float;

    unsafe fn splat_int(x: i32) -> Self::Int;
    unsafe fn add_int(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn mul_int(a: Self::Int, b: Self::Int) -> Self::Int;
    /// Sum of the lanes.
    unsafe fn sum_int(v: Self::Int) -> i32;
    /// As many bytes as the register has.
    unsafe fn load_bytes(p: *const u8) -> Self::Int;
    unsafe fn store_bytes(p: *mut u8, v: Self::Int);
    /// The four bytes at `p` in every lane.
    unsafe fn splat_bytes(p: *const u32) -> Self::Int;
    /// Stores lanes in −128..=127 as bytes.
    unsafe fn store_narrow(p: *mut i8, v: Self::Int);
    /// Adds to each lane of `sums` the dot product of its four bytes of
    /// `weights` and of `activations` (signed, at least −127). Weights that are
    /// not `wide` are so small that two products fit in 16 bits.
    unsafe fn dot(
        wide: bool,
        sums: Self::Int,
        weights: Self::Int,
        activations: Self::Int,
    ) -> Self::Int;
    /// Transposes [`Vector::LANES`] rows of as many 32-bit words: word `j` at
    /// `offset` bytes behind `rows[i]` becomes word `i` of the register at
    /// `targets[j]`.
    unsafe fn transpose(rows: &Rows, offset: usize, targets: &[*mut u32]);

    unsafe fn load_groups(p: *const f32) -> Self::Groups;
    unsafe fn store_groups(p: *mut f32, v: Self::Groups);
    unsafe fn mul_groups(a: Self::Groups, b: Self::Groups) -> Self::Groups;
    unsafe fn fma_groups(a: Self::Groups, b: Self::Groups, c: Self::Groups) -> Self::Groups;
    unsafe fn sum_groups(v: Self::Groups) -> f32;
    /// Each group's value in the lanes that hold the group's bytes in register
    /// `index` of a [`Vector::Block`].
    unsafe fn expand(groups: Self::Groups, index: usize) -> Self::Float;

    /// Hints that the cache line at `p`, which may be any address, is read soon.
    unsafe fn prefetch(p: *const u8);
}

/// Defines functions of [`Vector`] that are one expression of intrinsics.
macro_rules! operations {
    ($($vis:vis fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:expr;)*) => {
        $(
            #[inline(always)]
            $vis unsafe fn $name($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the caller has the instruction set and valid pointers.
                unsafe { $body }
            }
        )*
    };
}
pub(super) use operations;
