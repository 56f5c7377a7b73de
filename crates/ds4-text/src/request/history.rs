//! Histories that clients have cut short: DeepSeek's conversion wants a result for every call and
//! a call for every result. Missing results are filled in to get past it and left out again
//! before rendering; results without a call become the user text that they render as.

use std::collections::HashSet;

use deepseek_recipe_core::{conversation::Conversation, messages::InputMessage};
use serde_json::Value;

/// Ids of calls for which results were filled in.
#[derive(Debug, Default)]
pub(super) struct FilledIn(HashSet<String>);

impl FilledIn {
    /// Notes that the result of a call was filled in.
    pub(super) fn add(&mut self, call: &str) {
        self.0.insert(call.to_owned());
    }

    /// Leaves the results out again.
    pub(super) fn leave_out(&self, conversation: &mut Conversation) {
        conversation.messages.retain(|message| match message {
            InputMessage::Tool { tool_call_id: Some(id), .. } => !self.0.contains(id),
            _ => true,
        });
    }
}

/// The user text that a tool result with this content, in whatever form, renders as.
pub(super) fn result_text(content: Option<&Value>) -> String {
    let text = match content {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().filter_map(|part| part.get("text")?.as_str());
            texts.collect::<Vec<_>>().join("\n\n")
        }
        _ => String::new(),
    };
    format!("<tool_result>{text}</tool_result>")
}

pub(super) const MISSING_RESULT: &str = "a tool call in the history has no result";
pub(super) const MISSING_CALL: &str = "a tool result in the history has no call";
