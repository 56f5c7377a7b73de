//! Brings a conversation into the one form that renders as it should.
//!
//! The crate that renders leaves to its caller what becomes of reasoning in
//! earlier turns. And it expects one result for each call, both with ids that
//! sort in the order of the calls: it sorts the calls of a turn by id, and then
//! as many messages after it. DeepSeek's own ids begin with a running number;
//! other clients have random ones, and histories that were cut short lack
//! results, which would then be taken from later turns.

use std::{collections::HashMap, mem};

use deepseek_recipe_core::{
    conversation::Conversation,
    messages::{InputMessage, ToolCall},
    prompt,
};

use crate::profile::{Profile, Thinking};

/// `conversation` as the crate that renders needs it, for a model of this profile.
pub(super) fn canonical(conversation: &Conversation, profile: Profile) -> Conversation {
    let mut conversation = conversation.clone();
    let effort = profile.effort(Thinking::of(&conversation));
    conversation.reasoning_effort = Some(effort);
    order_tool_results(&mut conversation.messages);
    make_user_text(&mut conversation.messages);
    let last = conversation.messages.len().saturating_sub(1);
    for (index, message) in conversation.messages.iter_mut().enumerate() {
        if let InputMessage::Assistant { reasoning_content, tool_calls, prefix, .. } = message {
            // A turn without reasoning renders `<think></think>` where others
            // render theirs; without thinking, no turn renders any.
            *reasoning_content =
                conversation.thinking_mode.then(|| reasoning_content.take().unwrap_or_default());
            *prefix &= index == last;
            *tool_calls = tool_calls.take().filter(|calls| !calls.is_empty());
            tool_calls.iter_mut().flatten().for_each(name_empty_arguments);
        }
    }
    conversation
}

/// Puts tool results in the order of their calls, before other messages of
/// the same user turn, and numbers the calls, so that sorting changes nothing.
fn order_tool_results(messages: &mut [InputMessage]) {
    let is_assistant = |message: &InputMessage| matches!(message, InputMessage::Assistant { .. });
    let mut rest = messages;
    while let Some(start) = rest.iter().position(is_assistant) {
        let (assistant, after) = rest[start..].split_at_mut(1);
        let end = after.iter().position(is_assistant).unwrap_or(after.len());
        let (turn, next) = after.split_at_mut(end);
        if let InputMessage::Assistant { tool_calls: Some(calls), .. } = &mut assistant[0] {
            let call_index: HashMap<&str, usize> =
                calls.iter().enumerate().map(|(index, call)| (call.id.as_str(), index)).collect();
            turn.sort_by_cached_key(|message| turn_order(message, &call_index));
            for (index, call) in calls.iter_mut().enumerate() {
                call.id = format!("{index:010}");
            }
        }
        rest = next;
    }
}

/// Where a message of a user turn belongs: results in the order of the calls
/// they answer, then results of unknown calls, then everything else.
fn turn_order(message: &InputMessage, call_index: &HashMap<&str, usize>) -> (bool, usize) {
    match message {
        InputMessage::Tool { tool_call_id, .. } => {
            let index = tool_call_id.as_deref().and_then(|id| call_index.get(id));
            (false, index.copied().unwrap_or(usize::MAX))
        }
        _ => (true, 0),
    }
}

/// Makes of tool results the user text that they render as, so that none is sorted or taken for
/// the result of another turn's call. The crate ends a result with an empty line if the user says
/// something after it, even if that is empty, but between two texts of a user, it doesn't.
fn make_user_text(messages: &mut [InputMessage]) {
    // What the user says after the current message, before anybody else does.
    let (mut text_follows, mut empty_text_follows) = (false, false);
    for message in messages.iter_mut().rev() {
        match message {
            // The crate moves these to the beginning.
            InputMessage::System { .. } => {}
            InputMessage::User { content, .. } if content.is_empty() => empty_text_follows = true,
            InputMessage::User { .. } => text_follows = true,
            InputMessage::Tool { content, image_sources, .. } => {
                let mut text = prompt!("<tool_result>{}</tool_result>", &*content);
                if empty_text_follows && !text_follows {
                    text.push_plain("\n\n");
                }
                let image_sources = mem::take(image_sources);
                *message = InputMessage::User { content: text, image_sources };
                text_follows = true;
            }
            _ => (text_follows, empty_text_follows) = (false, false),
        }
    }
}

/// Some clients send no text for a call without arguments.
fn name_empty_arguments(call: &mut ToolCall) {
    if call.arguments.trim().is_empty() {
        call.arguments = "{}".to_owned();
    }
}
