//! Conversations to prompts, by DeepSeek's own rendering.
//!
//! `deepseek-recipe-encoding` writes the text of a prompt and says which
//! ranges of it are markers; here these become ids, and all text between two
//! markers is tokenized as plain text, whatever it spells. What this module
//! adds is the model's [`Profile`], and a few rules for conversations that the
//! crate leaves to its caller (see `canonical.rs`).

mod canonical;

use std::sync::Arc;

use deepseek_recipe_core::special_tokens::SpecialToken;
use deepseek_recipe_encoding::{PromptEncoding, dsv4::DeepseekV4Encoding};
use ds4_model::TokenId;

pub use deepseek_recipe_core::{
    conversation::{Conversation, ResponseFormat},
    messages::{InputMessage, ToolCall},
    prompt::Prompt,
    tools::{ToolChoice, ToolDefinition},
};

use crate::{
    profile::Profile,
    tokenizer::{Tokenizer, TokenizerError},
};
use canonical::canonical;

/// The markers of the text format. What else rendering marks (references to
/// places in images, found in assistant text) belongs to vision models.
const MARKERS: [SpecialToken; 8] = [
    SpecialToken::Bos,
    SpecialToken::Eos,
    SpecialToken::User,
    SpecialToken::Assistant,
    SpecialToken::ThinkingStart,
    SpecialToken::ThinkingEnd,
    SpecialToken::Dsml,
    SpecialToken::LatestReminder,
];

/// Renders conversations for one model.
pub struct PromptEncoder {
    tokenizer: Arc<Tokenizer>,
    profile: Profile,
    encoding: DeepseekV4Encoding,
}

/// A conversation as the model reads it, up to where its answer begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedPrompt {
    /// The prompt as text. Markers and text that spells them look alike here.
    pub text: String,
    /// The prompt as tokens.
    pub ids: Vec<TokenId>,
}

impl PromptEncoder {
    /// Renders for a model with this tokenizer and profile.
    pub fn new(tokenizer: Arc<Tokenizer>, profile: Profile) -> Self {
        PromptEncoder { tokenizer, profile, encoding: DeepseekV4Encoding::new() }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The model's profile.
    pub fn profile(&self) -> Profile {
        self.profile
    }

    /// The prompt of `conversation`.
    ///
    /// # Errors
    /// If a text in it is refused by [`Tokenizer::encode`], or it has a
    /// reminder and the vocabulary no marker for one.
    pub fn encode(&self, conversation: &Conversation) -> Result<EncodedPrompt, TokenizerError> {
        self.encode_pausing(conversation, &mut || ())
    }

    /// Like [`PromptEncoder::encode`], with pauses as in [`Tokenizer::encode_pausing`].
    ///
    /// # Errors
    /// As [`PromptEncoder::encode`].
    pub fn encode_pausing(
        &self,
        conversation: &Conversation,
        pause: &mut dyn FnMut(),
    ) -> Result<EncodedPrompt, TokenizerError> {
        let rendered = self.encoding.render_conversation(&canonical(conversation, self.profile));
        let text = rendered.prompt;
        let is_marker = |spelling: &str| MARKERS.iter().any(|m| m.default_str() == spelling);
        let markers =
            rendered.special_ranges.into_iter().filter(|range| is_marker(&text[range.clone()]));
        let ids = self.tokenizer.encode_marked(&text, markers, pause)?;
        Ok(EncodedPrompt { text, ids })
    }
}

/// How many tokens of `processed` can stay when `prompt` is next: those that both begin with, but
/// at least the prompt's last is left to compute.
pub fn shared_prefix(processed: &[TokenId], prompt: &[TokenId]) -> usize {
    let common = prompt.iter().zip(processed).take_while(|(a, b)| a == b).count();
    common.min(prompt.len().saturating_sub(1))
}
