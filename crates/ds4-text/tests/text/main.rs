//! Tests of everything between text and token ids: tokenizer, prompts, chat
//! requests and detokenisation, on DeepSeek V4's own tokenizer and on that of
//! the tiny model.

mod chat_requests;
mod detokenize;
mod dialects;
mod dialogue;
mod files;
mod prompt;
mod random;
mod support;
mod tokenizer;
