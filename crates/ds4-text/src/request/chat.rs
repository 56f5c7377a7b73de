//! OpenAI's Chat Completions.

use std::collections::VecDeque;

use deepseek_recipe::openai::ChatCompletionRequest;
use serde_json::{Map, Value, json};

use super::{
    Options, Request, RequestError,
    convert::convert,
    history::{FilledIn, MISSING_CALL, MISSING_RESULT, result_text},
    options::{self, NO_THINKING_WITH_TOOL_CHOICE},
};

/// Reads a request.
///
/// # Errors
/// If a field has a value that cannot be used.
pub fn read(body: Value) -> Result<Request, RequestError> {
    let mut body = options::object(body)?;
    let mut options = Options::take(&mut body)?;
    options::normalize_thinking(&mut body, &options.model);
    if options::whole(&body, "max_completion_tokens", u64::from(u32::MAX))? == Some(0) {
        return Err(RequestError::field("max_completion_tokens", "expected at least 1"));
    }
    if let Some(tokens) = body.remove("max_completion_tokens") {
        body.entry("max_tokens").or_insert(tokens);
    }
    choose_tool(&mut body, &mut options);
    let filled_in = repair_messages(&mut body, &mut options)?;
    let mut converted = convert::<ChatCompletionRequest>(body)?;
    filled_in.leave_out(&mut converted.conversation);
    Ok(Request { converted, options })
}

/// A tool that must be called is enforced by the grammar, with all tools in the prompt; the
/// official service has this without thinking only.
fn choose_tool(body: &mut Map<String, Value>, options: &mut Options) {
    let name = body.get("tool_choice").and_then(|choice| choice.pointer("/function/name"));
    let has_tools = body.get("tools").and_then(Value::as_array).is_some_and(|t| !t.is_empty());
    let required = body.get("tool_choice") == Some(&json!("required")) && has_tools;
    if let Some(name) = name.and_then(Value::as_str).map(str::to_owned) {
        body.insert("tool_choice".to_owned(), json!("required"));
        options.named_tool = Some(name);
    } else if !required {
        return;
    }
    options::disable_thinking(body);
    options.warn(NO_THINKING_WITH_TOOL_CHOICE);
}

/// Brings messages into the form that DeepSeek's conversion takes.
fn repair_messages(
    body: &mut Map<String, Value>,
    options: &mut Options,
) -> Result<FilledIn, RequestError> {
    let mut filled_in = FilledIn::default();
    let Some(Value::Array(messages)) = body.get_mut("messages") else { return Ok(filled_in) };
    let mut left: VecDeque<Value> = std::mem::take(messages).into();
    let mut leading = true;
    while let Some(mut message) = left.pop_front() {
        let Some(fields) = message.as_object_mut() else {
            return Err(RequestError::field("messages", "expected objects"));
        };
        fields.retain(|_, value| !value.is_null());
        let role = fields.get("role").and_then(Value::as_str).unwrap_or_default().to_owned();
        leading &= matches!(role.as_str(), "system" | "developer");
        match role.as_str() {
            "developer" => {
                fields.insert("role".to_owned(), json!(if leading { "system" } else { "user" }));
            }
            "assistant" => repair_assistant(fields)?,
            "tool" | "function" => {
                options.warn(MISSING_CALL);
                let text = result_text(fields.get("content"));
                messages.push(json!({ "role": "user", "content": text }));
                continue;
            }
            _ => {}
        }
        fields.entry("content").or_insert_with(|| json!(""));
        repair_parts(fields);
        let calls = call_ids(fields);
        messages.push(message);
        for call in calls {
            messages.push(take_result(&mut left, &call).unwrap_or_else(|| {
                options.warn(MISSING_RESULT);
                filled_in.add(&call);
                json!({ "role": "tool", "tool_call_id": call, "content": "" })
            }));
        }
    }
    Ok(filled_in)
}

fn repair_assistant(fields: &mut Map<String, Value>) -> Result<(), RequestError> {
    if let Some(reasoning) = fields.remove("reasoning").filter(Value::is_string) {
        fields.entry("reasoning_content").or_insert(reasoning);
    }
    let Some(Value::Array(calls)) = fields.get_mut("tool_calls") else { return Ok(()) };
    if calls.is_empty() {
        fields.remove("tool_calls");
        return Ok(());
    }
    for (index, call) in calls.iter_mut().enumerate() {
        let Some(call) = call.as_object_mut() else {
            return Err(RequestError::field("messages[].tool_calls", "expected objects"));
        };
        call.entry("type").or_insert_with(|| json!("function"));
        call.entry("id").or_insert_with(|| json!(format!("call {index} without an id")));
        if let Some(Value::Object(function)) = call.get_mut("function") {
            let arguments = function.entry("arguments").or_insert_with(|| json!("{}"));
            if arguments.is_object() {
                *arguments = json!(arguments.to_string());
            }
        }
    }
    Ok(())
}

/// Parts of content by their Responses names, and null where text is missing.
fn repair_parts(fields: &mut Map<String, Value>) {
    let Some(Value::Array(parts)) = fields.get_mut("content") else { return };
    for part in parts {
        let kind = part.get("type").and_then(Value::as_str);
        if matches!(kind, Some("input_text" | "output_text" | "refusal")) {
            let text = part.get("text").or_else(|| part.get("refusal"));
            *part = json!({ "type": "text", "text": text.and_then(Value::as_str).unwrap_or("") });
        }
    }
}

/// Ids of an assistant message's calls, each once.
fn call_ids(fields: &Map<String, Value>) -> Vec<String> {
    let calls = fields.get("tool_calls").and_then(Value::as_array);
    let ids = calls.into_iter().flatten().filter_map(|call| call.get("id")?.as_str());
    let mut ids: Vec<_> = ids.map(str::to_owned).collect();
    ids.dedup();
    ids
}

/// Takes the result of a call out of the messages before the next assistant's.
fn take_result(left: &mut VecDeque<Value>, call: &str) -> Option<Value> {
    let role = |message: &Value, name: &str| message.get("role").is_some_and(|role| role == name);
    let turn = left.iter().take_while(|message| !role(message, "assistant"));
    let mut turn = turn.enumerate();
    let (index, _) = turn.find(|(_, message)| {
        role(message, "tool") && message.get("tool_call_id").is_some_and(|id| id == call)
    })?;
    let mut result = left.remove(index)?;
    let fields = result.as_object_mut()?;
    if fields.get("content").is_none_or(Value::is_null) {
        fields.insert("content".to_owned(), json!(""));
    }
    repair_parts(fields);
    Some(result)
}
