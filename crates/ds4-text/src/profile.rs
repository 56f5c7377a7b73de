//! How much the model is told to think, and how its checkpoints differ in that.
//!
//! The April 2026 checkpoints and those since 31 July 2026 have one
//! architecture and one prompt format. They were trained with different texts
//! for the levels of reasoning effort, so the same word of a request has to be
//! rendered differently for each.

use std::{fmt, str::FromStr};

use deepseek_recipe_core::{
    conversation::{Conversation, ReasoningEffort},
    special_tokens::SpecialToken,
};
use ds4_model::{Error, Result, shown};
use gguf::GgufFile;

const COMPRESS_RATIOS: &str = "deepseek4.attention.compress_ratios";
const BLOCK_COUNT: &str = "deepseek4.block_count";

/// The generation of a checkpoint: a property of the model, never of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Profile {
    /// April 2026: only the highest effort has a text, which later became that of `high`.
    Preview,
    /// 31 July 2026 and later: low has no text, high and max have one each.
    V0731,
}

/// How much to think before the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Thinking {
    /// Not at all.
    Off,
    /// A little.
    Low,
    /// As the official service does unless told otherwise.
    #[default]
    High,
    /// As much as the model can.
    Max,
}

impl Profile {
    /// The profile that a model's metadata tells of. Both kinds list the
    /// compress ratios of their draft blocks after those of the layers: one in
    /// the preview, three since. A name can tell too, and decides if it does.
    ///
    /// # Errors
    /// For models of generation 4.1, whose prompts are another dialect, and if
    /// a key has the wrong type.
    pub fn of(file: &GgufFile) -> Result<Profile> {
        refuse_v41(file)?;
        for key in ["general.name", "general.basename"] {
            if let Some(name) = file.metadata().optional::<&str>(key)?
                && let Some(profile) = Profile::from_name(name)
            {
                return Ok(profile);
            }
        }
        let ratios: Vec<usize> = file.metadata().optional(COMPRESS_RATIOS)?.unwrap_or_default();
        let layers = file.metadata().optional(BLOCK_COUNT)?.unwrap_or(ratios.len());
        let drafts = ratios.len().saturating_sub(layers);
        Ok(if drafts >= 3 { Profile::V0731 } else { Profile::Preview })
    }

    /// What a level of thinking is called in the prompt encoding, whose texts
    /// are those of [`Profile::V0731`].
    pub(crate) fn effort(self, thinking: Thinking) -> ReasoningEffort {
        match (self, thinking) {
            (Profile::V0731, Thinking::Max) => ReasoningEffort::Max,
            (Profile::V0731, Thinking::High) | (Profile::Preview, Thinking::Max) => {
                ReasoningEffort::High
            }
            _ => ReasoningEffort::Low,
        }
    }

    /// The profile that a model's name tells of, if any.
    fn from_name(name: &str) -> Option<Profile> {
        let name = name.to_lowercase().replace(' ', "-");
        let has = |marks: &[&str]| marks.iter().any(|mark| name.contains(mark));
        if has(&["0731", "0813", "vision-exp"]) {
            Some(Profile::V0731)
        } else if has(&["preview"]) {
            Some(Profile::Preview)
        } else {
            None
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Profile::Preview => "preview",
            Profile::V0731 => "0731",
        })
    }
}

/// A word that names nothing here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("found {}, expected {expected}", shown(found))]
pub struct UnknownWord {
    /// The word.
    pub found: String,
    /// What it could have been.
    pub expected: &'static str,
}

impl FromStr for Profile {
    type Err = UnknownWord;

    fn from_str(word: &str) -> std::result::Result<Self, UnknownWord> {
        [Profile::Preview, Profile::V0731]
            .into_iter()
            .find(|p| p.to_string() == word)
            .ok_or_else(|| UnknownWord { found: word.to_owned(), expected: "preview or 0731" })
    }
}

impl FromStr for Thinking {
    type Err = UnknownWord;

    /// Reads the words that APIs have for reasoning effort.
    fn from_str(word: &str) -> std::result::Result<Self, UnknownWord> {
        match word {
            "none" => Ok(Thinking::Off),
            "minimal" | "low" => Ok(Thinking::Low),
            "medium" | "high" | "xhigh" | "ultra" => Ok(Thinking::High),
            "max" => Ok(Thinking::Max),
            _ => Err(UnknownWord {
                found: word.to_owned(),
                expected: "none, minimal, low, medium, high, xhigh, ultra or max",
            }),
        }
    }
}

impl Thinking {
    /// What `conversation` asks for.
    pub fn of(conversation: &Conversation) -> Thinking {
        match conversation.reasoning_effort {
            _ if !conversation.thinking_mode => Thinking::Off,
            Some(ReasoningEffort::Low) => Thinking::Low,
            None | Some(ReasoningEffort::High | ReasoningEffort::Xhigh) => Thinking::High,
            Some(ReasoningEffort::Max) => Thinking::Max,
        }
    }

    /// Makes `conversation` ask for this.
    pub fn set_in(self, conversation: &mut Conversation) {
        conversation.thinking_mode = self != Thinking::Off;
        conversation.reasoning_effort = match self {
            Thinking::Off => None,
            Thinking::Low => Some(ReasoningEffort::Low),
            Thinking::High => Some(ReasoningEffort::High),
            Thinking::Max => Some(ReasoningEffort::Max),
        };
    }
}

/// Refuses models of generation 4.1, which have a marker for system messages.
fn refuse_v41(file: &GgufFile) -> Result<()> {
    const TOKENS: &str = "tokenizer.ggml.tokens";
    let system = SpecialToken::System.default_str();
    let tokens: &[String] = file.metadata().optional(TOKENS)?.unwrap_or_default();
    if !tokens.iter().any(|token| token == system) {
        return Ok(());
    }
    Err(Error::Value {
        file: file.name().to_owned(),
        key: TOKENS.to_owned(),
        found: format!("{system}, a marker of DeepSeek V4.1"),
        expected: "the markers of DeepSeek V4: V4.1 prompts are another dialect".to_owned(),
    })
}
