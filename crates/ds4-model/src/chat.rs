//! Chat: requests in the JSON of OpenAI's Chat Completions interface, and
//! conversations at a terminal, as conversations to render.
//!
//! Only what decides the prompt is read; sampling parameters and the like are
//! left to whoever runs the request. DeepSeek's own conversion refuses much
//! that local clients send (developer messages, calls whose results were
//! truncated away, other names for a field), so this one is written for them.

mod convert;
mod dialogue;
mod request;

pub use convert::ConvertedRequest;
pub use dialogue::Dialogue;
pub use request::ChatRequest;

/// Bytes that a request may have.
pub const MAX_REQUEST_BYTES: usize = 64 * 1024 * 1024;

/// Why a request cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// It is too large.
    #[error("request: found {found} bytes, expected at most {MAX_REQUEST_BYTES}")]
    TooLarge {
        /// Its size in bytes.
        found: usize,
    },
    /// It is no JSON, or a field has another type than expected.
    #[error("request{}: {problem}", at(path))]
    Json {
        /// The field, such as `messages[0].role`; empty for the whole.
        path: String,
        /// What is wrong.
        problem: String,
    },
    /// A field has a value that cannot be used.
    #[error("request, {path}: found {found}, expected {expected}")]
    Field {
        /// The field, such as `messages[0].role`.
        path: String,
        /// What it holds.
        found: String,
        /// What would be right.
        expected: String,
    },
}

fn at(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!(", {path}") }
}
