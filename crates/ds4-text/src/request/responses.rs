//! OpenAI's Responses. Nothing is stored: clients send the whole history, and reasoning travels
//! with it, readable or in `encrypted_content`.

use std::collections::HashSet;

use base64::{Engine, prelude::BASE64_STANDARD};
use deepseek_recipe::openai::ResponsesRequest;
use serde_json::{Map, Value, json};

use super::{
    Options, Request, RequestError,
    convert::convert,
    history::{FilledIn, MISSING_CALL, MISSING_RESULT, result_text},
    options::{self, NO_THINKING_WITH_TOOL_CHOICE},
};

/// Begins `encrypted_content`: the format, and that it is only wrapped up.
const WRAPPED: &str = "ds4.1:";

/// Reads a request.
///
/// # Errors
/// If a field has a value that cannot be used, or stored responses are asked for.
pub fn read(body: Value) -> Result<Request, RequestError> {
    let mut body = options::object(body)?;
    let mut options = Options::take(&mut body)?;
    for key in ["previous_response_id", "conversation"] {
        if body.contains_key(key) {
            let problem = "responses are not stored here: send the whole history as input";
            return Err(RequestError::field(key, problem));
        }
    }
    if options.model == "deepseek-chat" && !body.contains_key("reasoning") {
        body.insert("reasoning".to_owned(), json!({ "effort": "none" }));
    }
    choose_tool(&mut body, &mut options);
    let custom = expose_custom_tools(&mut body);
    let filled_in = repair_input(&mut body, &mut options);
    let mut converted = convert::<ResponsesRequest>(body)?;
    converted.response_options.custom_tool_names.extend(custom);
    filled_in.leave_out(&mut converted.conversation);
    Ok(Request { converted, options })
}

/// The `encrypted_content` of reasoning, for clients that send back only what they cannot read.
pub fn wrap_reasoning(text: &str) -> String {
    format!("{WRAPPED}{}", BASE64_STANDARD.encode(text))
}

/// The text of reasoning that was wrapped here.
fn unwrap_reasoning(content: &str) -> Option<String> {
    let bytes = BASE64_STANDARD.decode(content.strip_prefix(WRAPPED)?).ok()?;
    String::from_utf8(bytes).ok()
}

/// A tool that must be called is enforced by the grammar, with all tools in the prompt.
fn choose_tool(body: &mut Map<String, Value>, options: &mut Options) {
    let has_tools = body.get("tools").and_then(Value::as_array).is_some_and(|t| !t.is_empty());
    match body.get("tool_choice") {
        Some(Value::String(word)) if word == "required" && has_tools => {}
        Some(Value::Object(choice)) if has_tools => {
            let Some(name) = choice.get("name").and_then(Value::as_str) else { return };
            options.named_tool = Some(name.to_owned());
            body.insert("tool_choice".to_owned(), json!("required"));
        }
        _ => return,
    }
    let reasoning = body.entry("reasoning").or_insert_with(|| json!({}));
    if let Some(reasoning) = reasoning.as_object_mut() {
        reasoning.insert("effort".to_owned(), json!("none"));
    }
    options.warn(NO_THINKING_WITH_TOOL_CHOICE);
}

/// Custom tools take one text: the model sees functions with one parameter, `input`.
fn expose_custom_tools(body: &mut Map<String, Value>) -> HashSet<String> {
    let mut names = HashSet::new();
    let Some(Value::Array(tools)) = body.get_mut("tools") else { return names };
    for tool in tools {
        let is_custom = tool.get("type") == Some(&json!("custom"));
        let name = tool.get("name").and_then(Value::as_str).map(str::to_owned);
        let (true, Some(name)) = (is_custom, name.filter(|name| name != "apply_patch")) else {
            continue;
        };
        let description = tool.get("description").and_then(Value::as_str).unwrap_or_default();
        let grammar = tool.pointer("/format/definition").and_then(Value::as_str);
        let description = match grammar {
            Some(grammar) => format!("{description}\n\nThe input follows this grammar:\n{grammar}"),
            None => description.to_owned(),
        };
        *tool = json!({
            "type": "function",
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": { "input": { "type": "string" } },
                "required": ["input"],
            },
        });
        names.insert(name);
    }
    names
}

/// Brings input into the form that DeepSeek's conversion takes.
fn repair_input(body: &mut Map<String, Value>, options: &mut Options) -> FilledIn {
    let mut filled_in = FilledIn::default();
    let Some(Value::Array(items)) = body.get_mut("input") else { return filled_in };
    let mut repaired: Vec<Value> = Vec::with_capacity(items.len());
    let mut open: Vec<(String, &'static str)> = Vec::new();
    let mut leading = true;
    for mut item in std::mem::take(items) {
        let Some(fields) = item.as_object_mut() else {
            repaired.push(item);
            continue;
        };
        fields.retain(|_, value| !value.is_null());
        let kind = fields.get("type").and_then(Value::as_str).unwrap_or("message").to_owned();
        let call = fields.get("call_id").and_then(Value::as_str).map(str::to_owned);
        match (kind.as_str(), call) {
            ("function_call", Some(call)) => open.push((call, "function_call_output")),
            ("custom_tool_call", Some(call)) => open.push((call, "custom_tool_call_output")),
            ("function_call_output" | "custom_tool_call_output", Some(call)) => {
                repair_parts(fields, "output");
                match open.iter().position(|(id, _)| *id == call) {
                    Some(index) => {
                        open.remove(index);
                    }
                    None => {
                        options.warn(MISSING_CALL);
                        let text = result_text(fields.get("output"));
                        item = json!({ "role": "user", "content": text });
                        close_calls(&mut repaired, &mut open, &mut filled_in, options);
                    }
                }
            }
            ("tool_search_call" | "tool_search_output", _) => {}
            _ => {
                repair_other(&kind, fields, &mut leading);
                close_calls(&mut repaired, &mut open, &mut filled_in, options);
            }
        }
        repaired.push(item);
    }
    close_calls(&mut repaired, &mut open, &mut filled_in, options);
    *items = repaired;
    filled_in
}

fn repair_other(kind: &str, fields: &mut Map<String, Value>, leading: &mut bool) {
    match kind {
        "message" => {
            let role = fields.get("role").and_then(Value::as_str).unwrap_or_default().to_owned();
            *leading &= matches!(role.as_str(), "system" | "developer");
            if *leading {
                fields.insert("role".to_owned(), json!("system"));
            }
            fields.entry("content").or_insert_with(|| json!(""));
            repair_parts(fields, "content");
        }
        "reasoning" => {
            let readable = |fields: &Map<String, Value>, key: &str| {
                let parts = fields.get(key).and_then(Value::as_array);
                parts.is_some_and(|parts| !parts.is_empty())
            };
            let content =
                fields.get("encrypted_content").and_then(Value::as_str).and_then(unwrap_reasoning);
            if readable(fields, "content") {
            } else if let Some(text) = content {
                fields.insert("content".to_owned(), json!([{ "text": text }]));
            } else if readable(fields, "summary") {
                let summary = fields.get("summary").cloned().unwrap_or_default();
                fields.insert("content".to_owned(), summary);
            }
        }
        _ => {}
    }
}

/// Parts of content that DeepSeek's conversion has other names for.
fn repair_parts(fields: &mut Map<String, Value>, key: &str) {
    let Some(Value::Array(parts)) = fields.get_mut(key) else { return };
    for part in parts {
        let kind = part.get("type").and_then(Value::as_str);
        if matches!(kind, Some("text" | "output_text" | "refusal")) {
            let text = part.get("text").or_else(|| part.get("refusal"));
            let text = text.and_then(Value::as_str).unwrap_or_default();
            *part = json!({ "type": "input_text", "text": text });
        }
    }
}

fn close_calls(
    items: &mut Vec<Value>,
    open: &mut Vec<(String, &'static str)>,
    filled_in: &mut FilledIn,
    options: &mut Options,
) {
    for (call, kind) in open.drain(..) {
        options.warn(MISSING_RESULT);
        filled_in.add(&call);
        items.push(json!({ "type": kind, "call_id": call, "output": "" }));
    }
}
