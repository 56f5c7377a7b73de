//! How matrices are stored on the device (kernels/formats.cuh).

use gguf::TensorType;

/// Rows of a tile.
pub(crate) const TILE: usize = 16;

/// How a matrix is stored on the device; kernels know the types by these numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum WeightType {
    /// 32 columns share a scale.
    Q8_0,
    /// Half precision; BF16 files too.
    F16,
    /// Two halves a weight.
    F32,
    /// 2-bit, from a grid.
    Iq2Xxs,
    /// 2-bit, with minima.
    Q2K,
    /// 4-bit, with minima.
    Q4K,
    /// 4-bit floats.
    Mxfp4,
}

/// A unit: the columns of a tile that a warp loads at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unit {
    pub columns: usize,
    /// Bytes of its codes, its scales and its further scales.
    pub bytes: [usize; 3],
}

impl WeightType {
    /// All types, by number.
    pub(crate) const ALL: [WeightType; 7] = [
        WeightType::Q8_0,
        WeightType::F16,
        WeightType::F32,
        WeightType::Iq2Xxs,
        WeightType::Q2K,
        WeightType::Q4K,
        WeightType::Mxfp4,
    ];

    /// How the device stores a file's type, if it does.
    pub(crate) fn of(ty: TensorType) -> Option<WeightType> {
        Some(match ty {
            TensorType::Q8_0 => WeightType::Q8_0,
            TensorType::F16 | TensorType::BF16 => WeightType::F16,
            TensorType::F32 => WeightType::F32,
            TensorType::IQ2_XXS => WeightType::Iq2Xxs,
            TensorType::Q2_K => WeightType::Q2K,
            TensorType::Q4_K => WeightType::Q4K,
            TensorType::MXFP4 => WeightType::Mxfp4,
            _ => return None,
        })
    }

    /// Its name in kernels.
    pub(crate) fn name(self) -> &'static str {
        match self {
            WeightType::Q8_0 => "Q8_0",
            WeightType::F16 => "F16",
            WeightType::F32 => "F32",
            WeightType::Iq2Xxs => "IQ2_XXS",
            WeightType::Q2K => "Q2_K",
            WeightType::Q4K => "Q4_K",
            WeightType::Mxfp4 => "MXFP4",
        }
    }

    pub(crate) fn unit(self) -> Unit {
        let (columns, bytes) = match self {
            WeightType::Q8_0 => (128, [2048, 128, 0]),
            WeightType::F16 => (64, [2048, 0, 0]),
            WeightType::F32 => (64, [2048, 2048, 0]),
            WeightType::Iq2Xxs => (256, [1024, 64, 32]),
            WeightType::Q2K => (256, [1024, 256, 64]),
            WeightType::Q4K => (256, [2048, 256, 64]),
            WeightType::Mxfp4 => (128, [1024, 64, 0]),
        };
        Unit { columns, bytes }
    }
}
