//! The markers of the chat format, by name.

use std::collections::HashMap;

use deepseek_recipe_core::special_tokens::SpecialToken;
use ds4_model::TokenId;

use super::TokenizerError;

/// Ids of the markers that prompts, stop conditions and output parsing need.
/// They are looked up by their spelling, since smaller vocabularies give them other ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Starts every prompt.
    pub bos: TokenId,
    /// Ends an assistant turn.
    pub eos: TokenId,
    /// Starts a user turn.
    pub user: TokenId,
    /// Starts an assistant turn.
    pub assistant: TokenId,
    /// `<think>`: reasoning begins.
    pub think_start: TokenId,
    /// `</think>`: reasoning ends, or is left out.
    pub think_end: TokenId,
    /// `｜DSML｜`: the middle of every tag of a tool call.
    pub dsml: TokenId,
    /// Starts a reminder turn, in vocabularies that have it.
    pub latest_reminder: Option<TokenId>,
}

impl SpecialTokens {
    /// The tokens that end an answer when they are sampled. Officially only
    /// `eos` does; the markers that start a prompt or a turn have no place in one either.
    pub fn turn_ends(&self) -> [TokenId; 4] {
        [self.eos, self.bos, self.user, self.assistant]
    }

    /// Whether sampling this token ends the answer.
    pub fn ends_turn(&self, id: TokenId) -> bool {
        self.turn_ends().contains(&id)
    }

    /// Finds the markers among `ids`, which holds the id of every token of `file` by its spelling.
    pub(super) fn find(file: &str, ids: &HashMap<&str, TokenId>) -> Result<Self, TokenizerError> {
        let optional = |token: SpecialToken| ids.get(token.default_str()).copied();
        let required = |token: SpecialToken| {
            optional(token).ok_or_else(|| TokenizerError::MissingMarker {
                file: file.to_owned(),
                marker: token.default_str(),
            })
        };
        Ok(SpecialTokens {
            bos: required(SpecialToken::Bos)?,
            eos: required(SpecialToken::Eos)?,
            user: required(SpecialToken::User)?,
            assistant: required(SpecialToken::Assistant)?,
            think_start: required(SpecialToken::ThinkingStart)?,
            think_end: required(SpecialToken::ThinkingEnd)?,
            dsml: required(SpecialToken::Dsml)?,
            latest_reminder: optional(SpecialToken::LatestReminder),
        })
    }

    /// All of them.
    pub(super) fn ids(&self) -> impl Iterator<Item = TokenId> {
        let SpecialTokens {
            bos,
            eos,
            user,
            assistant,
            think_start,
            think_end,
            dsml,
            latest_reminder,
        } = *self;
        [bos, eos, user, assistant, think_start, think_end, dsml].into_iter().chain(latest_reminder)
    }
}
