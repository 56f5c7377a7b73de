//! Tensor element types: their ids in the file, names, and block sizes.
//!
//! Whether a type can also be dequantised is [`TensorType::is_readable`]; the
//! layouts themselves are in `dequantize.rs` and docs/gguf.md.

use std::fmt;

/// Declares the enum and its table from one list, so that they can't disagree.
macro_rules! tensor_types {
    ($($name:ident = $id:literal, $block_len:literal elements in $block_bytes:literal bytes;)*) => {
        /// Element type of a tensor.
        ///
        /// Every type that a GGUF v3 file may name is here, so that a file with an
        /// unsupported one can be refused by name. [`TensorType::is_readable`] tells
        /// which of them this crate can dequantise.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs, non_camel_case_types)]
        pub enum TensorType {
            $($name,)*
        }

        impl TensorType {
            /// Every type, by ascending id.
            pub const ALL: &[TensorType] = &[$(TensorType::$name),*];

            /// The type's number in a GGUF file.
            pub const fn id(self) -> u32 {
                match self {
                    $(TensorType::$name => $id,)*
                }
            }

            /// The type's name, such as `IQ2_XXS`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(TensorType::$name => stringify!($name),)*
                }
            }

            /// Elements of one block. A row is a whole number of blocks.
            pub const fn block_len(self) -> usize {
                match self {
                    $(TensorType::$name => $block_len,)*
                }
            }

            /// Bytes of one block.
            pub const fn block_bytes(self) -> usize {
                match self {
                    $(TensorType::$name => $block_bytes,)*
                }
            }
        }
    };
}

tensor_types! {
    F32 = 0, 1 elements in 4 bytes;
    F16 = 1, 1 elements in 2 bytes;
    Q4_0 = 2, 32 elements in 18 bytes;
    Q4_1 = 3, 32 elements in 20 bytes;
    Q5_0 = 6, 32 elements in 22 bytes;
    Q5_1 = 7, 32 elements in 24 bytes;
    Q8_0 = 8, 32 elements in 34 bytes;
    Q8_1 = 9, 32 elements in 36 bytes;
    Q2_K = 10, 256 elements in 84 bytes;
    Q3_K = 11, 256 elements in 110 bytes;
    Q4_K = 12, 256 elements in 144 bytes;
    Q5_K = 13, 256 elements in 176 bytes;
    Q6_K = 14, 256 elements in 210 bytes;
    Q8_K = 15, 256 elements in 292 bytes;
    IQ2_XXS = 16, 256 elements in 66 bytes;
    IQ2_XS = 17, 256 elements in 74 bytes;
    IQ3_XXS = 18, 256 elements in 98 bytes;
    IQ1_S = 19, 256 elements in 50 bytes;
    IQ4_NL = 20, 32 elements in 18 bytes;
    IQ3_S = 21, 256 elements in 110 bytes;
    IQ2_S = 22, 256 elements in 82 bytes;
    IQ4_XS = 23, 256 elements in 136 bytes;
    I8 = 24, 1 elements in 1 bytes;
    I16 = 25, 1 elements in 2 bytes;
    I32 = 26, 1 elements in 4 bytes;
    I64 = 27, 1 elements in 8 bytes;
    F64 = 28, 1 elements in 8 bytes;
    IQ1_M = 29, 256 elements in 56 bytes;
    BF16 = 30, 1 elements in 2 bytes;
    TQ1_0 = 34, 256 elements in 54 bytes;
    TQ2_0 = 35, 256 elements in 66 bytes;
    MXFP4 = 39, 32 elements in 17 bytes;
    NVFP4 = 40, 64 elements in 36 bytes;
    Q1_0 = 41, 128 elements in 18 bytes;
}

impl TensorType {
    /// The type with number `id` in a file, if there is one.
    pub fn from_id(id: u32) -> Option<TensorType> {
        TensorType::ALL.iter().copied().find(|ty| ty.id() == id)
    }

    /// The type called `name`, spelled as [`TensorType::name`] does.
    pub fn from_name(name: &str) -> Option<TensorType> {
        TensorType::ALL.iter().copied().find(|ty| ty.name() == name)
    }

    /// Bytes of a row of `cols` elements: `None` if `cols` is not a multiple of
    /// [`TensorType::block_len`] or the size does not fit.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Whether [`dequantize_row`](crate::dequantize_row) can read the type.
    pub const fn is_readable(self) -> bool {
        use TensorType::*;
        matches!(self, F32 | F16 | BF16 | Q8_0 | Q2_K | Q4_K | IQ2_XXS | MXFP4)
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
