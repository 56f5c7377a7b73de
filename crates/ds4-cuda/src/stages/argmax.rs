//! The likeliest tokens of rows of logits, by the kernel in kernels/argmax.cu.

#![allow(unsafe_code, reason = "launches kernels")]

use ds4_engine::{TokenId, backend::StageResult, sampling::UnusableLogits};

use crate::{
    constants::{ARGMAX_THREAD_LOGITS, ARGMAX_THREADS, UNUSABLE_TOKEN},
    device::{Buffer, Device, Grid, Pinned},
    params::{ARGMAX, ArgmaxParams},
};

/// The likeliest tokens of a step's rows, on both sides.
pub struct BestTokens {
    vocab: usize,
    /// What each block of a row found `[rows, blocks]`.
    parts: Buffer<u64>,
    device: Buffer<TokenId>,
    host: Pinned<TokenId>,
}

impl BestTokens {
    /// Room for the tokens of `rows` rows.
    pub fn new(device: &Device, rows: usize, vocab: usize) -> StageResult<Self> {
        Ok(BestTokens {
            vocab,
            parts: device.alloc(rows * blocks(vocab))?,
            device: device.alloc(rows)?,
            host: device.pinned(rows)?,
        })
    }

    /// Finds the tokens of the first `rows` rows of `logits`. `arrivals` has a counter for each,
    /// zero before and after.
    ///
    /// # Panics
    /// If there are fewer, or no room.
    pub fn find(
        &self,
        device: &Device,
        rows: usize,
        logits: &Buffer<f32>,
        arrivals: &Buffer<u32>,
    ) -> StageResult {
        let blocks = blocks(self.vocab);
        let params = ArgmaxParams {
            logits: logits.first(rows * self.vocab),
            parts: self.parts.first(rows * blocks),
            arrivals: arrivals.first(rows),
            tokens: self.device.first(rows),
            vocab: self.vocab as u32,
        };
        let grid = Grid { blocks: [blocks, rows, 1], threads: ARGMAX_THREADS, shared: 0 };
        // SAFETY: the buffers have so many rows.
        unsafe { device.launch(ARGMAX, grid, &params) }
    }

    /// Those that were found last, after all earlier work.
    pub fn read(
        &mut self,
        device: &Device,
        rows: usize,
    ) -> StageResult<Vec<Result<TokenId, UnusableLogits>>> {
        let tokens = device.download_pinned(&self.device, 0..rows, &mut self.host)?;
        let usable =
            |&token| if token as usize == UNUSABLE_TOKEN { Err(UnusableLogits) } else { Ok(token) };
        Ok(tokens.iter().map(usable).collect())
    }
}

fn blocks(vocab: usize) -> usize {
    vocab.div_ceil(ARGMAX_THREADS * ARGMAX_THREAD_LOGITS)
}

#[cfg(test)]
mod tests {
    use ds4_engine::sampling::argmax;

    use super::*;
    use crate::stages::attention_tests::harness::device;

    /// Rows that end before, at and behind the end of a block, and the full model's.
    const VOCABS: [usize; 7] = [1, 31, 300, 4095, 4096, 4097, 129_280];

    /// What the device finds in each row, twice: the counters must be ready again.
    fn found(
        device: &Device,
        logits: &[f32],
        vocab: usize,
    ) -> Vec<Result<TokenId, UnusableLogits>> {
        let rows = logits.len() / vocab;
        let (logits, arrivals) =
            (device.buffer(logits).unwrap(), device.alloc_zeroed(rows).unwrap());
        let mut best = BestTokens::new(device, rows, vocab).unwrap();
        let mut find = || {
            best.find(device, rows, &logits, &arrivals).unwrap();
            best.read(device, rows).unwrap()
        };
        let first = find();
        assert_eq!(find(), first);
        first
    }

    fn expected(logits: &[f32], vocab: usize) -> Vec<Result<TokenId, UnusableLogits>> {
        logits.chunks_exact(vocab).map(argmax).collect()
    }

    /// Rows of few different values tie within a thread, between threads and between blocks.
    #[test]
    #[ignore = "needs a CUDA device or the emulator"]
    fn the_first_of_the_largest_is_found() {
        let device = device();
        let mut random = fastrand::Rng::with_seed(3);
        for vocab in VOCABS {
            for values in [2, 50, 1 << 24] {
                let mut value = || random.u32(0..values) as f32 / values as f32 * 40.0 - 30.0;
                let logits: Vec<f32> = (0..5 * vocab).map(|_| value()).collect();
                let what = format!("{vocab} logits of {values} values");
                assert_eq!(found(&device, &logits, vocab), expected(&logits, vocab), "{what}");
            }
        }
    }

    /// At every kind of place: its row's neighbours are lower, and so are those of the next row.
    #[test]
    #[ignore = "needs a CUDA device or the emulator"]
    fn the_largest_is_found_wherever_it_is() {
        let device = device();
        let vocab = 2 * ARGMAX_THREADS * ARGMAX_THREAD_LOGITS + 77;
        let places = [0, 1, 31, 32, 255, 256, 4095, 4096, 8191, 8192, vocab - 2, vocab - 1];
        let mut logits = vec![-7.5; places.len() * vocab];
        for (row, place) in places.iter().enumerate() {
            logits[row * vocab + place] = -7.25;
        }
        let tokens = found(&device, &logits, vocab);
        assert_eq!(tokens, places.map(|place| Ok(place as TokenId)));
    }

    #[test]
    #[ignore = "needs a CUDA device or the emulator"]
    fn zeros_are_equal_whatever_their_sign() {
        let device = device();
        let logits = [-1.0, -0.0, 0.0, -2.0, -1.0, 0.0, -0.0, -2.0];
        assert_eq!(found(&device, &logits, 4), [Ok(1), Ok(1)]);
    }

    #[test]
    #[ignore = "needs a CUDA device or the emulator"]
    fn unusable_logits_are_found_as_on_the_host() {
        let device = device();
        let (vocab, below) = (4500, f32::NEG_INFINITY);
        let row = |others: f32, at: usize, value: f32| {
            let mut row = vec![others; vocab];
            row[at] = value;
            row
        };
        let rows = [
            row(1.0, 0, f32::NAN),
            row(1.0, 4400, -f32::NAN),
            row(f32::INFINITY, 7, f32::NAN),
            row(below, 300, f32::NAN),
            row(1.0, 4097, f32::INFINITY),
            row(below, 0, below),
            row(below, 4321, f32::MIN),
            row(below, 99, f32::MIN_POSITIVE / 4.0),
            row(1.0, 4499, f32::MAX),
            row(1.0, 250, below),
        ];
        let err = Err(UnusableLogits);
        let tokens = [err, err, err, err, err, err, Ok(4321), Ok(99), Ok(4499), Ok(0)];
        assert_eq!(found(&device, &rows.concat(), vocab), tokens);
        assert_eq!(expected(&rows.concat(), vocab), tokens);
    }
}
