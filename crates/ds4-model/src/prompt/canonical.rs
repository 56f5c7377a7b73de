//! Brings a conversation into the one form that renders as it should.
//!
//! The crate that renders expects of its caller: reasoning of earlier turns
//! filled in or dropped, and calls and results with ids in the order in which
//! they are to appear, since it sorts both by id (DeepSeek's own ids begin
//! with a running number, those of other clients are random).

use deepseek_recipe_core::{
    conversation::Conversation,
    messages::{InputMessage, ToolCall},
};

use crate::profile::{Profile, Thinking};

/// `conversation` as the crate that renders needs it, for a model of this profile.
pub(super) fn canonical(conversation: &Conversation, profile: Profile) -> Conversation {
    let mut conversation = conversation.clone();
    let effort = profile.effort(Thinking::of(&conversation));
    conversation.reasoning_effort = Some(effort);
    order_tool_results(&mut conversation.messages);
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
/// the same user turn, and renames calls and results so that they stay so.
fn order_tool_results(messages: &mut [InputMessage]) {
    let mut rest = messages;
    while let Some(start) = rest.iter().position(|m| matches!(m, InputMessage::Assistant { .. })) {
        let (assistant, after) = rest[start..].split_at_mut(1);
        let end = after
            .iter()
            .position(|m| matches!(m, InputMessage::Assistant { .. }))
            .unwrap_or(after.len());
        let (turn, next) = after.split_at_mut(end);
        if let InputMessage::Assistant { tool_calls: Some(calls), .. } = &mut assistant[0] {
            turn.sort_by_cached_key(|message| turn_order(message, calls));
            let results = turn.iter_mut().filter_map(|message| match message {
                InputMessage::Tool { tool_call_id, .. } => Some(tool_call_id),
                _ => None,
            });
            results.enumerate().for_each(|(index, id)| *id = Some(sortable(index)));
            calls.iter_mut().enumerate().for_each(|(index, call)| call.id = sortable(index));
        }
        rest = next;
    }
}

/// Where a message of a user turn belongs: results in the order of the calls
/// they answer, then results of unknown calls, then everything else.
fn turn_order(message: &InputMessage, calls: &[ToolCall]) -> (bool, usize) {
    match message {
        InputMessage::Tool { tool_call_id, .. } => {
            let call = calls.iter().position(|call| Some(&call.id) == tool_call_id.as_ref());
            (false, call.unwrap_or(calls.len()))
        }
        _ => (true, 0),
    }
}

/// An id that sorts by `index`.
fn sortable(index: usize) -> String {
    format!("{index:010}")
}

/// Some clients send no text for a call without arguments.
fn name_empty_arguments(call: &mut ToolCall) {
    if call.arguments.trim().is_empty() {
        call.arguments = "{}".to_owned();
    }
}
