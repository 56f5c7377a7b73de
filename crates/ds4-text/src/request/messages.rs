//! Anthropic's Messages.

use std::collections::HashSet;

use deepseek_recipe::{
    anthropic::messages::request::MessagesRequest,
    request::{ConversationRequest, OutputConstraint},
};
use deepseek_recipe_core::tools::ToolChoice;
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
    drop_billing_lines(&mut body);
    repair_tools(&mut body, &mut options);
    let required = choose_tool(&mut body, &mut options);
    let filled_in = repair_messages(&mut body, &mut options)?;
    let mut converted = convert::<MessagesRequest>(body)?;
    filled_in.leave_out(&mut converted.conversation);
    if required && !converted.conversation.tools.is_empty() {
        require_call(&mut converted);
    }
    Ok(Request { converted, options })
}

/// Makes a call obligatory, which DeepSeek's conversion leaves to the model.
fn require_call(converted: &mut ConversationRequest) {
    converted.conversation.tool_choice = ToolChoice::Required;
    converted.parsing_options.starts_in_tool_calls = true;
    if let Some(OutputConstraint::ToolCalls { required, .. }) =
        &mut converted.inference_options.output_constraint
    {
        *required = true;
    }
}

/// Whether a tool must be called, and which.
fn choose_tool(body: &mut Map<String, Value>, options: &mut Options) -> bool {
    let Some(Value::Object(choice)) = body.get_mut("tool_choice") else { return false };
    options.single_call |= choice.get("disable_parallel_tool_use") == Some(&json!(true));
    match choice.get("type").and_then(Value::as_str) {
        Some("any") => {}
        Some("tool") => {
            options.named_tool = choice.get("name").and_then(Value::as_str).map(str::to_owned);
        }
        _ => return false,
    }
    body.insert("tool_choice".to_owned(), json!({ "type": "auto" }));
    options::disable_thinking(body);
    options.warn(NO_THINKING_WITH_TOOL_CHOICE);
    true
}

/// Some clients put a line that differs from request to request before everything else, which
/// would make every prompt a new one.
fn drop_billing_lines(body: &mut Map<String, Value>) {
    const START: &str = "x-anthropic-";
    match body.get_mut("system") {
        Some(Value::Array(blocks)) => blocks.retain(|block| {
            let text = block.get("text").and_then(Value::as_str).unwrap_or_default();
            !text.starts_with(START)
        }),
        Some(Value::String(text)) if text.starts_with(START) => {
            *text = text.split_once('\n').map(|(_, rest)| rest.to_owned()).unwrap_or_default();
        }
        _ => {}
    }
}

/// Tools that a hosted service would run are left out.
fn repair_tools(body: &mut Map<String, Value>, options: &mut Options) {
    let Some(Value::Array(tools)) = body.get_mut("tools") else { return };
    tools.retain_mut(|tool| {
        let Some(tool) = tool.as_object_mut() else { return true };
        match tool.get("type").and_then(Value::as_str) {
            None => true,
            Some("custom") => {
                tool.remove("type");
                true
            }
            Some(kind) => {
                options.warn(format!("tools of type {kind:.60} are not offered to the model"));
                false
            }
        }
    });
    for tool in tools.iter_mut().filter_map(Value::as_object_mut) {
        if let Some(Value::Object(schema)) = tool.get_mut("input_schema") {
            schema.entry("type").or_insert_with(|| json!("object"));
        }
    }
}

/// Brings messages into the form that DeepSeek's conversion takes.
fn repair_messages(
    body: &mut Map<String, Value>,
    options: &mut Options,
) -> Result<FilledIn, RequestError> {
    let mut filled_in = FilledIn::default();
    let Some(Value::Array(messages)) = body.get_mut("messages") else { return Ok(filled_in) };
    let mut repaired: Vec<Value> = Vec::with_capacity(messages.len());
    let mut open: Vec<String> = Vec::new();
    for mut message in std::mem::take(messages) {
        let role = message.get("role").and_then(Value::as_str).unwrap_or_default().to_owned();
        let Some(fields) = message.as_object_mut() else {
            return Err(RequestError::field("messages", "expected objects"));
        };
        let blocks = match fields.remove("content") {
            Some(Value::Array(blocks)) => blocks,
            Some(Value::String(text)) => vec![json!({ "type": "text", "text": text })],
            None | Some(Value::Null) => Vec::new(),
            Some(_) => {
                return Err(RequestError::field("messages[].content", "expected a text or a list"));
            }
        };
        let blocks = match role.as_str() {
            "user" => repair_user(blocks, std::mem::take(&mut open), &mut filled_in, options),
            _ => {
                close_calls(&mut repaired, std::mem::take(&mut open), &mut filled_in, options);
                repair_assistant(blocks, &mut open)
            }
        };
        fields.insert("content".to_owned(), Value::Array(blocks));
        repaired.push(message);
    }
    close_calls(&mut repaired, open, &mut filled_in, options);
    *messages = repaired;
    Ok(filled_in)
}

/// Results of the calls before first, each once, then everything else.
fn repair_user(
    blocks: Vec<Value>,
    open: Vec<String>,
    filled_in: &mut FilledIn,
    options: &mut Options,
) -> Vec<Value> {
    let mut missing: HashSet<String> = open.iter().cloned().collect();
    let (mut results, mut others) = (Vec::new(), Vec::new());
    for mut block in blocks {
        if block.get("type") != Some(&json!("tool_result")) {
            others.push(block);
            continue;
        }
        let id = block.get("tool_use_id").and_then(Value::as_str).unwrap_or_default();
        if missing.remove(id) {
            if block.get("content") == Some(&Value::Null)
                && let Some(block) = block.as_object_mut()
            {
                block.remove("content");
            }
            results.push(block);
        } else {
            options.warn(MISSING_CALL);
            let text = result_text(block.get("content"));
            others.push(json!({ "type": "text", "text": text }));
        }
    }
    for id in open.iter().filter(|id| missing.contains(*id)) {
        results.push(missing_result(id, filled_in, options));
    }
    results.extend(others);
    if results.is_empty() {
        results.push(json!({ "type": "text", "text": "" }));
    }
    results
}

/// Text before calls, and nothing that only its writer can read.
fn repair_assistant(blocks: Vec<Value>, open: &mut Vec<String>) -> Vec<Value> {
    let kind = |block: &Value, name: &str| block.get("type").is_some_and(|kind| kind == name);
    let readable = blocks.into_iter().filter(|block| !kind(block, "redacted_thinking"));
    let (calls, mut repaired): (Vec<_>, Vec<_>) =
        readable.partition(|block| kind(block, "tool_use"));
    let ids = calls.iter().filter_map(|call| call.get("id")?.as_str().map(str::to_owned));
    open.extend(ids);
    if repaired.is_empty() && calls.is_empty() {
        repaired.push(json!({ "type": "text", "text": "" }));
    }
    repaired.extend(calls);
    repaired
}

/// Fills in results for calls that no user message answers.
fn close_calls(
    messages: &mut Vec<Value>,
    open: Vec<String>,
    filled_in: &mut FilledIn,
    options: &mut Options,
) {
    if open.is_empty() {
        return;
    }
    let results: Vec<_> = open.iter().map(|id| missing_result(id, filled_in, options)).collect();
    messages.push(json!({ "role": "user", "content": results }));
}

fn missing_result(id: &str, filled_in: &mut FilledIn, options: &mut Options) -> Value {
    options.warn(MISSING_RESULT);
    filled_in.add(id);
    json!({ "type": "tool_result", "tool_use_id": id, "content": "" })
}
