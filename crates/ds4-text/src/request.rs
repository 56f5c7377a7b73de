//! Requests in the forms of OpenAI and Anthropic, read by DeepSeek's own conversion.
//!
//! Each dialect has a module with a `read`: JSON in, a [`Request`] out. Clients send much that the
//! conversion refuses (developer messages, histories that were cut short, other names for a
//! field), so a request is repaired first, and what was odd about it is noted. [`Request::encode`]
//! makes the prompt's tokens. Whoever shows, answers or grades a request goes this way, so that
//! all of them mean the same prompt.

pub mod chat;
pub mod completions;
mod constraint;
mod convert;
mod error;
mod history;
pub mod messages;
mod options;
pub mod responses;

use deepseek_recipe::request::ConversationRequest;
use serde_json::Value;

pub use constraint::Constraint;
pub use error::RequestError;
pub use options::{Options, RawPrompt};

use crate::prompt::{EncodedPrompt, PromptEncoder};

/// A request, understood.
#[derive(Debug)]
pub struct Request {
    /// What DeepSeek's conversion made of it: the conversation, and how to parse the answer.
    pub converted: ConversationRequest,
    /// What it asks for beyond that.
    pub options: Options,
}

/// The JSON of a request. Objects and lists in it may be nested about 120 deep; of a key that an
/// object has twice, the last value counts.
///
/// # Errors
/// If the bytes are no JSON.
pub fn parse(json: &[u8]) -> Result<Value, RequestError> {
    serde_json::from_slice(json).map_err(|error| RequestError::Json(error.to_string()))
}

impl Request {
    /// The prompt that the model answers. `pause` is called now and then, as in
    /// [`PromptEncoder::encode_pausing`].
    ///
    /// # Errors
    /// If a text in it is refused by the tokenizer, or it is a list of tokens and the model has
    /// no such token.
    pub fn encode(
        &self,
        encoder: &PromptEncoder,
        pause: &mut dyn FnMut(),
    ) -> Result<EncodedPrompt, RequestError> {
        let tokenizer = encoder.tokenizer();
        let (text, tokens) = match &self.options.raw_prompt {
            None => return Ok(encoder.encode_pausing(&self.converted.conversation, pause)?),
            Some(RawPrompt::Text(text)) => (text.clone(), tokenizer.encode_pausing(text, pause)?),
            Some(RawPrompt::Tokens(tokens)) => {
                let unknown = tokens.iter().find(|token| tokenizer.bytes_of(**token).is_none());
                if let Some(token) = unknown {
                    let problem =
                        format!("there is no token {token}: the model has {}", tokenizer.len());
                    return Err(RequestError::field("prompt", problem));
                }
                (tokenizer.decode(tokens), tokens.clone())
            }
        };
        let ids = [vec![tokenizer.special().bos], tokens].concat();
        Ok(EncodedPrompt { text, ids })
    }
}
