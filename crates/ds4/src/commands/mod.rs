//! One file per command: its options, and what it does.

pub mod bench;
pub mod completions;
pub mod eval;
pub mod imatrix;
pub mod inspect;
pub mod logits;
pub mod perplexity;
pub mod quantize;
pub mod run;
pub mod serve;
pub mod synth;
pub mod tokenize;
