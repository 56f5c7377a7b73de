//! One look at all logits, which notes the largest of each block. Whatever comes after it reads
//! only the blocks that matter: a row of the real model has half a megabyte, most of it hopeless.

use super::UnusableLogits;
use crate::TokenId;

/// Tokens of a word of a mask.
const WORD: usize = u32::BITS as usize;

/// Words of a block. Finding the largest of few logits takes longer for each.
const WORDS: usize = 4;

/// Logits of a block.
const BLOCK: usize = WORDS * WORD;

/// Logits that the processor compares at once, in any instruction set.
const LANES: usize = 16;

/// What there is to choose from.
#[derive(Clone, Copy)]
pub(super) struct Choices<'a> {
    pub(super) logits: &'a [f32],
    /// A bit for each token that may be chosen; all may without it, none beyond its end.
    pub(super) allowed: Option<&'a [u32]>,
}

impl Choices<'_> {
    /// The words of a block of the mask.
    fn words(&self, block: usize) -> [u32; WORDS] {
        let Some(allowed) = self.allowed else { return [u32::MAX; WORDS] };
        std::array::from_fn(|word| allowed.get(block * WORDS + word).copied().unwrap_or(0))
    }
}

/// The largest logit of each block, as of the last look.
#[derive(Debug, Default)]
pub(super) struct Scan {
    blocks: Vec<f32>,
    largest: f32,
}

impl Scan {
    /// Looks at all that can be chosen.
    pub(super) fn look(&mut self, choices: Choices<'_>) -> Result<(), UnusableLogits> {
        let (blocks, rest) = choices.logits.as_chunks::<BLOCK>();
        self.blocks.clear();
        self.largest = f32::NEG_INFINITY;
        let mut nan = false;
        for (index, block) in blocks.iter().enumerate() {
            nan |= self.take_in(block, choices.words(index));
        }
        if !rest.is_empty() {
            let mut block = [f32::NEG_INFINITY; BLOCK];
            block[..rest.len()].copy_from_slice(rest);
            nan |= self.take_in(&block, choices.words(blocks.len()));
        }
        if nan || !self.largest.is_finite() { Err(UnusableLogits) } else { Ok(()) }
    }

    /// Notes the largest logit of the next block; true if there is a NaN.
    fn take_in(&mut self, block: &[f32; BLOCK], words: [u32; WORDS]) -> bool {
        // Masks are mostly nothing or mostly everything.
        let (largest, nan) = match words {
            [0, 0, 0, 0] => (f32::NEG_INFINITY, false),
            [u32::MAX, u32::MAX, u32::MAX, u32::MAX] => largest(block),
            words => largest(&std::array::from_fn(|place| {
                if is_set(&words, place) { block[place] } else { f32::NEG_INFINITY }
            })),
        };
        self.blocks.push(largest);
        self.largest = self.largest.max(largest);
        nan
    }

    /// The largest logit.
    pub(super) fn largest(&self) -> f32 {
        self.largest
    }

    /// The lowest token among the likeliest.
    pub(super) fn argmax(&self, choices: Choices<'_>) -> Result<TokenId, UnusableLogits> {
        let mut first = None;
        self.at_least(choices, self.largest, |token, _| first = first.or(Some(token)));
        first.ok_or(UnusableLogits)
    }

    /// Calls `each` with every token whose logit is at least `floor`, in their order.
    pub(super) fn at_least(
        &self,
        choices: Choices<'_>,
        floor: f32,
        mut each: impl FnMut(TokenId, f32),
    ) {
        for (index, logits) in choices.logits.chunks(BLOCK).enumerate() {
            if self.blocks[index] < floor {
                continue;
            }
            let words = choices.words(index);
            for (place, logit) in logits.iter().enumerate() {
                if *logit >= floor && is_set(&words, place) {
                    each((index * BLOCK + place) as TokenId, *logit);
                }
            }
        }
    }

    /// A floor that at least `n` logits reach, and few more where that is possible.
    pub(super) fn floor_of(&self, n: usize) -> f32 {
        if n == 0 || n > self.blocks.len() {
            return f32::NEG_INFINITY;
        }
        let mut blocks = self.blocks.clone();
        *blocks.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1
    }
}

fn is_set(words: &[u32; WORDS], place: usize) -> bool {
    words[place / WORD] >> (place % WORD) & 1 == 1
}

/// The largest logit of a block, and whether there is a NaN.
fn largest(block: &[f32; BLOCK]) -> (f32, bool) {
    let (mut best, mut nans) = ([f32::NEG_INFINITY; LANES], [0u32; LANES]);
    for logits in block.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            let x = logits[lane];
            best[lane] = if x > best[lane] { x } else { best[lane] };
            nans[lane] |= u32::from(x.is_nan());
        }
    }
    let largest = best.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
    (largest, nans.iter().any(|nan| *nan != 0))
}
