//! The table of an instruction set's kernels, through which everything that
//! doesn't depend on the set calls them.

use ds4_model::weights::MatrixView;

use super::{
    attention::{Context, IndexQuery},
    float::FloatRows,
    q8::{Panel, Q8Block, Q8Rows},
    tile::Tile,
};
use gguf::TensorType;

/// Kernels of one instruction set.
///
/// Calling any of them needs the set at run time, and what the generic function
/// behind it asks for (`define_kernels` names it).
pub(super) struct Kernels {
    /// Rows of a tile.
    pub lanes: usize,
    /// Most tokens of a panel.
    pub panel: usize,
    pub quantize: unsafe fn(&[f32], &mut [Q8Block]),
    pub decode: unsafe fn(MatrixView, &[&[Q8Block]], *mut f32, usize),
    pub unpack_tile: unsafe fn(MatrixView, &mut Tile),
    pub multiply_tile: unsafe fn(TensorType, &Tile, &Panel, *mut f32, usize),
    pub multiply_floats: unsafe fn(TensorType, FloatRows, &[*const f32], *mut f32, usize),
    pub attend: unsafe fn(&mut [f32], Context, &mut [f32]),
    pub index_scores: unsafe fn(&IndexQuery, &[f32], &mut [f32]),
    pub swiglu: unsafe fn(&[f32], &[f32], f32, f32, &mut [f32]),
    pub sum_of_squares: unsafe fn(&[f32]) -> f32,
}

impl Kernels {
    /// Quantises `x`, rows of `cols`.
    pub fn quantized(&self, x: &[f32], cols: usize) -> Q8Rows {
        // SAFETY: kernels are handed out only for an instruction set that was found.
        Q8Rows::new(x, cols, |x, blocks| unsafe { (self.quantize)(x, blocks) })
    }
}

/// Evaluates `$call` with `$format` standing for the quantised format `$ty`.
macro_rules! with_format {
    ($ty:expr, $format:ident => $call:expr) => {
        match $ty {
            TensorType::Q8_0 => {
                type $format = Q8_0;
                $call
            }
            TensorType::Q2_K => {
                type $format = Q2K;
                $call
            }
            TensorType::Q4_K => {
                type $format = Q4K;
                $call
            }
            TensorType::IQ2_XXS => {
                type $format = Iq2Xxs;
                $call
            }
            TensorType::MXFP4 => {
                type $format = Mxfp4;
                $call
            }
            ty => unreachable!("{ty} is not a quantised type of the kernels"),
        }
    };
}
pub(super) use with_format;

/// Defines `KERNELS` for the vectors `$vector`: the generic kernels, compiled
/// for the features, with the sizes of register blocks that suit the set; and
/// `is_available`, which tells whether this machine has them.
macro_rules! define_kernels {
    (
        vector: $vector:ident,
        features: $detected:ident[$($feature:tt)*],
        panel: [$($tokens:literal)*],
        float_block: [$rows:literal, $float_tokens:literal],
        score_block: [$heads:literal, $score_rows:literal],
        value_columns: $columns:literal,
        index_block: [$index_heads:literal, $keys:literal],
    ) => {
        use ds4_model::weights::MatrixView;
        use gguf::TensorType;

        use crate::simd::{
            attention::{self, Context, IndexQuery},
            decode, float,
            float::FloatRows,
            formats::{Bf16, F16, F32, FloatFormat, Format, Iq2Xxs, Mxfp4, Q2K, Q4K, Q8_0},
            kernels::{Kernels, with_format},
            math, prefill,
            q8::{self, Panel, Q8Block},
            tile::Tile,
            vector::Vector,
        };

        pub(in crate::simd) static KERNELS: Kernels = Kernels {
            lanes: $vector::LANES,
            panel: [$($tokens),*].len(),
            quantize,
            decode,
            unpack_tile,
            multiply_tile,
            multiply_floats,
            attend,
            index_scores,
            swiglu,
            sum_of_squares,
        };

        pub(in crate::simd) fn is_available() -> bool {
            $(std::arch::$detected!($feature))&&*
        }

        #[target_feature($(enable = $feature),*)]
        unsafe fn quantize(x: &[f32], blocks: &mut [Q8Block]) {
            // SAFETY: this function's own terms.
            unsafe { q8::quantize::<$vector>(x, blocks) }
        }

        unsafe fn decode(w: MatrixView, tokens: &[&[Q8Block]], out: *mut f32, stride: usize) {
            // SAFETY: this function's own terms.
            unsafe { with_format!(w.ty, F => decode_format::<F>(w, tokens, out, stride)) }
        }

        #[target_feature($(enable = $feature),*)]
        unsafe fn decode_format<F: Format<$vector>>(
            w: MatrixView,
            tokens: &[&[Q8Block]],
            out: *mut f32,
            stride: usize,
        ) {
            // SAFETY: this function's own terms.
            unsafe { decode::multiply::<$vector, F>(w, tokens, out, stride) }
        }

        unsafe fn unpack_tile(w: MatrixView, tile: &mut Tile) {
            // SAFETY: this function's own terms.
            unsafe { with_format!(w.ty, F => unpack_format::<F>(w, tile)) }
        }

        #[target_feature($(enable = $feature),*)]
        unsafe fn unpack_format<F: Format<$vector>>(w: MatrixView, tile: &mut Tile) {
            // SAFETY: this function's own terms.
            unsafe { prefill::unpack::<$vector, F>(w, tile) }
        }

        unsafe fn multiply_tile(
            ty: TensorType,
            tile: &Tile,
            panel: &Panel,
            out: *mut f32,
            stride: usize,
        ) {
            // SAFETY: this function's own terms.
            unsafe { with_format!(ty, F => multiply_format::<F>(tile, panel, out, stride)) }
        }

        unsafe fn multiply_format<F: Format<$vector>>(
            tile: &Tile,
            panel: &Panel,
            out: *mut f32,
            stride: usize,
        ) {
            // SAFETY: this function's own terms.
            unsafe {
                match panel.tokens {
                    $($tokens => multiply_format_by::<F, $tokens>(tile, panel, out, stride),)*
                    n => unreachable!("no panel has {n} tokens"),
                }
            }
        }

        #[target_feature($(enable = $feature),*)]
        unsafe fn multiply_format_by<F: Format<$vector>, const T: usize>(
            tile: &Tile,
            panel: &Panel,
            out: *mut f32,
            stride: usize,
        ) {
            // SAFETY: this function's own terms.
            unsafe { prefill::multiply::<$vector, F, T>(tile, panel, out, stride) }
        }

        unsafe fn multiply_floats(
            ty: TensorType,
            w: FloatRows,
            tokens: &[*const f32],
            out: *mut f32,
            stride: usize,
        ) {
            // SAFETY: this function's own terms.
            unsafe {
                match ty {
                    TensorType::F32 => multiply_float_format::<F32>(w, tokens, out, stride),
                    TensorType::F16 => multiply_float_format::<F16>(w, tokens, out, stride),
                    TensorType::BF16 => multiply_float_format::<Bf16>(w, tokens, out, stride),
                    ty => unreachable!("{ty} is not a float type of the kernels"),
                }
            }
        }

        #[target_feature($(enable = $feature),*)]
        unsafe fn multiply_float_format<F: FloatFormat<$vector>>(
            w: FloatRows,
            tokens: &[*const f32],
            out: *mut f32,
            stride: usize,
        ) {
            // SAFETY: this function's own terms.
            unsafe { float::multiply::<$vector, F, $rows, $float_tokens>(w, tokens, out, stride) }
        }

        #[target_feature($(enable = $feature),*)]
        unsafe fn attend(heads: &mut [f32], context: Context, scratch: &mut [f32]) {
            // SAFETY: this function's own terms.
            unsafe {
                attention::attend::<$vector, $heads, $score_rows, $columns>(
                    heads, context, scratch,
                )
            }
        }

        #[target_feature($(enable = $feature),*)]
        unsafe fn index_scores(query: &IndexQuery, keys: &[f32], out: &mut [f32]) {
            // SAFETY: this function's own terms.
            unsafe { attention::index_scores::<$vector, $index_heads, $keys>(query, keys, out) }
        }

        #[target_feature($(enable = $feature),*)]
        unsafe fn swiglu(gate: &[f32], up: &[f32], limit: f32, factor: f32, out: &mut [f32]) {
            // SAFETY: this function's own terms.
            unsafe { math::swiglu::<$vector>(gate, up, limit, factor, out) }
        }

        #[target_feature($(enable = $feature),*)]
        unsafe fn sum_of_squares(x: &[f32]) -> f32 {
            // SAFETY: this function's own terms.
            unsafe { math::sum_of_squares::<$vector>(x) }
        }
    };
}
pub(super) use define_kernels;
