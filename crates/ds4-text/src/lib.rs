//! The text side of DeepSeek V4: what people and programs say becomes tokens, and tokens text.
//!
//! [`request`] is the only reader of requests in the forms of OpenAI and Anthropic, by DeepSeek's
//! own conversion; [`prompt`] renders conversations to tokens; [`detokenize`] makes text of
//! sampled tokens.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

pub mod detokenize;
pub mod dialogue;
pub mod profile;
pub mod prompt;
pub mod request;
pub mod tokenizer;
