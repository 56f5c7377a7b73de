//! The token mask of a step.

use llguidance::toktrie::SimpleVob;

/// What may come next, where there is a choice.
#[derive(Debug)]
pub enum Next {
    /// Anything.
    Any,
    /// One of the tokens of a mask.
    Among {
        /// The allowed tokens, one bit for each id.
        mask: SimpleVob,
        /// Take the likeliest of them: punctuation is not drawn at random.
        greedy: bool,
    },
}
