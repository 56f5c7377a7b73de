//! The dialects: what each asks for beyond DeepSeek's own conversion, and how its answers look.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod messages;
pub(crate) mod responses;

use deepseek_recipe::{request::ConversationRequest, stream::ChunkGenerator};
use ds4_text::request::Request;
use serde_json::Value;

use crate::http::error::ApiError;

/// A request that was read, and what will write its answer.
pub(crate) struct Understood<R> {
    pub(crate) request: Request,
    pub(crate) reply: R,
}

/// How a dialect writes what was generated.
pub(crate) trait Reply: Send + Sized + 'static {
    /// Makes the dialect's chunks of parsed output.
    type Generator: ChunkGenerator<Chunk: Send>;

    /// Reads a request.
    fn understand(body: Value) -> Result<Understood<Self>, ApiError>;

    /// A generator for the answer to `request`.
    fn generator(&self, request: &ConversationRequest) -> Self::Generator;

    /// Adds a chunk to a stream.
    fn stream(&mut self, chunk: Chunk<Self>, frames: &mut Vec<Frame>);

    /// The id of a tool call that begins in a chunk.
    fn call_id(chunk: &Chunk<Self>) -> Option<&str>;

    /// What to send while there is nothing to say, so that neither end gives up.
    fn keep_alive(&mut self, frames: &mut Vec<Frame>);

    /// Ends a stream that failed.
    fn fail(&mut self, error: &ApiError, frames: &mut Vec<Frame>);

    /// Adds a chunk to a whole answer, for a prompt of so many tokens.
    fn collect(&mut self, chunk: Chunk<Self>, prompt: PromptTokens);

    /// The whole answer.
    fn into_body(self) -> Value;
}

/// A dialect's chunk.
pub(crate) type Chunk<R> = <<R as Reply>::Generator as ChunkGenerator>::Chunk;

/// Tokens of a prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PromptTokens {
    pub(crate) all: usize,
    /// Those that need not be computed.
    pub(crate) cached: usize,
}

/// A piece of an event stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Data with the event's name, where the dialect has names.
    Event(Option<String>, String),
    /// What clients ignore.
    Comment(&'static str),
}

impl Frame {
    /// Appends the frame as bytes.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        match self {
            Frame::Event(name, data) => {
                if let Some(name) = name {
                    out.extend_from_slice(b"event: ");
                    out.extend_from_slice(name.as_bytes());
                    out.push(b'\n');
                }
                out.extend_from_slice(b"data: ");
                out.extend_from_slice(data.as_bytes());
            }
            Frame::Comment(text) => {
                out.extend_from_slice(b": ");
                out.extend_from_slice(text.as_bytes());
            }
        }
        out.extend_from_slice(b"\n\n");
    }
}

/// Data as JSON. Responses consist of strings, numbers and maps with string keys, which always
/// have a form in JSON.
pub(crate) fn json_text(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// A new id for a response.
pub(crate) fn new_id(prefix: &str) -> String {
    format!("{prefix}{:032x}", fastrand::u128(..))
}

/// Seconds since 1970.
pub(crate) fn unix_time() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |time| time.as_secs())
}
