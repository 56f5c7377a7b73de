//! Tests of everything between text and token ids: tokenizer, prompts, chat
//! requests and detokenisation, on DeepSeek V4's own tokenizer and on that of
//! the tiny model.

mod chat;
mod detokenize;
mod files;
mod prompt;
mod support;
mod tokenizer;
