//! A conversation at a terminal, turn by turn.

use crate::{
    profile::Thinking,
    prompt::{Conversation, InputMessage, Prompt},
};

/// A system text and the turns so far. Its [`Dialogue::conversation`] renders
/// to the whole prompt for the next answer; since earlier reasoning is left out
/// of later prompts, that differs from what the session holds from the last
/// turn's beginning on (see [`crate::prompt::shared_prefix`]).
#[derive(Debug, Clone, Default)]
pub struct Dialogue {
    conversation: Conversation,
}

impl Dialogue {
    /// A dialogue without turns.
    pub fn new(system: Option<String>, thinking: Thinking) -> Self {
        let mut dialogue = Dialogue::default();
        dialogue.set_thinking(thinking);
        dialogue.conversation.messages.extend(system.map(|text| InputMessage::System {
            content: Prompt::plain(text),
            image_sources: Vec::new(),
            tools: None,
        }));
        dialogue
    }

    /// Changes how much to think before the next answer.
    pub fn set_thinking(&mut self, thinking: Thinking) {
        thinking.set_in(&mut self.conversation);
    }

    /// Adds what the user says.
    pub fn ask(&mut self, text: impl Into<String>) {
        self.conversation
            .messages
            .push(InputMessage::User { content: Prompt::plain(text), image_sources: Vec::new() });
    }

    /// Adds what the model answered, even if only a part of it was waited for.
    pub fn answer(&mut self, reasoning: impl Into<String>, answer: impl Into<String>) {
        self.conversation.messages.push(InputMessage::Assistant {
            content: answer.into(),
            reasoning_content: Some(reasoning.into()),
            tool_calls: None,
            prefix: false,
        });
    }

    /// The conversation to render.
    pub fn conversation(&self) -> &Conversation {
        &self.conversation
    }
}
