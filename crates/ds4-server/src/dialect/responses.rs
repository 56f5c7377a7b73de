//! OpenAI's Responses. Nothing is stored: clients send the whole history, and reasoning travels
//! with it, readable or in `encrypted_content`.

use std::collections::HashSet;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use deepseek_recipe::{
    openai::{
        ResponsesRequest,
        responses::response::{
            ResponsesChunkGenerator, ResponsesOutputItem, ResponsesResponse, ResponsesStreamEvent,
        },
    },
    request::{ConversationRequest, ProtocolRequest},
    response::{Accumulate, ProtocolResponse},
};
use serde_json::{Map, Value, json};

use super::{
    Chunk, Frame, PromptTokens, Reply, Understood,
    chat::{conversion_options, typed},
    history::{FilledIn, MISSING_CALL, MISSING_RESULT, result_text},
    new_id,
    options::{self, NO_THINKING_WITH_TOOL_CHOICE, Options},
    unix_time,
};
use crate::http::error::ApiError;

/// Begins `encrypted_content`: the format, and that it is only wrapped up.
const WRAPPED: &str = "ds4.1:";

/// Answers in the form of Responses.
pub(crate) struct ResponsesReply {
    id: String,
    model: String,
    /// Number of the next event.
    sequence: usize,
    /// Reasoning is wanted as a summary as well.
    summary: bool,
    /// The response as it was at the beginning.
    begun: Value,
    whole: Option<ResponsesResponse>,
}

impl Reply for ResponsesReply {
    type Generator = ResponsesChunkGenerator;

    fn understand(body: Value) -> Result<Understood<Self>, ApiError> {
        let mut body = options::object(body)?;
        let mut options = Options::take(&mut body)?;
        for key in ["previous_response_id", "conversation"] {
            if body.contains_key(key) {
                let message = "responses are not stored here: send the whole history as input";
                return Err(ApiError::field(key, message));
            }
        }
        if options.model == "deepseek-chat" && !body.contains_key("reasoning") {
            body.insert("reasoning".to_owned(), json!({ "effort": "none" }));
        }
        let summary = takes_summary(&body);
        choose_tool(&mut body, &mut options);
        let custom = expose_custom_tools(&mut body);
        let filled_in = repair_input(&mut body, &mut options);
        let request: ResponsesRequest = typed(Value::Object(body))?;
        let mut converted = request.convert(conversion_options())?;
        converted.response_options.custom_tool_names.extend(custom);
        filled_in.leave_out(&mut converted.conversation);
        let reply = ResponsesReply {
            id: new_id("resp_"),
            model: options.model.clone(),
            sequence: 0,
            summary,
            begun: Value::Null,
            whole: None,
        };
        Ok(Understood { converted, options, reply })
    }

    fn generator(&self, request: &ConversationRequest) -> Self::Generator {
        ResponsesRequest::chunk_generator(request, self.id.clone(), self.model.clone())
    }

    fn stream(&mut self, chunk: Chunk<Self>, frames: &mut Vec<Frame>) {
        let mut event = json!(chunk);
        wrap_reasoning(&mut event, self.summary);
        if self.begun.is_null() {
            self.begun = event.get("response").cloned().unwrap_or_default();
        }
        let summary = self.summary.then(|| summary_event(&event)).flatten();
        self.push(event, frames);
        if let Some(summary) = summary {
            self.push(summary, frames);
        }
    }

    fn call_id(chunk: &Chunk<Self>) -> Option<&str> {
        match chunk {
            ResponsesStreamEvent::OutputItemAdded {
                item:
                    ResponsesOutputItem::FunctionCall { call_id, .. }
                    | ResponsesOutputItem::CustomToolCall { call_id, .. }
                    | ResponsesOutputItem::ToolSearchCall { call_id, .. },
                ..
            } => Some(call_id),
            _ => None,
        }
    }

    /// Some clients count only real events, but take none before the first.
    fn keep_alive(&mut self, frames: &mut Vec<Frame>) {
        if self.begun.is_null() {
            frames.push(Frame::Comment("waiting"));
        } else {
            let response = self.begun.clone();
            self.push(json!({ "type": "response.in_progress", "response": response }), frames);
        }
    }

    fn fail(&mut self, error: &ApiError, frames: &mut Vec<Frame>) {
        if self.begun.is_null() {
            let (id, model) = (self.id.clone(), self.model.clone());
            self.begun = json!(ResponsesResponse::new(id, model, unix_time(), 0, 0));
        }
        let mut response = self.begun.clone();
        response["status"] = json!("failed");
        response["error"] = json!({ "code": error.openai_code(), "message": error.message });
        self.push(json!({ "type": "response.failed", "response": response }), frames);
    }

    fn collect(&mut self, chunk: Chunk<Self>, prompt: PromptTokens) {
        let whole = self.whole.get_or_insert_with(|| {
            let (id, model) = (self.id.clone(), self.model.clone());
            ResponsesResponse::new(id, model, unix_time(), prompt.all, prompt.cached)
        });
        whole.accumulate(chunk);
    }

    fn into_body(self) -> Value {
        let mut body = self.whole.map_or(Value::Null, |whole| json!(whole));
        wrap_items(&mut body, self.summary);
        body
    }
}

impl ResponsesReply {
    /// Adds an event under the next number; repeated events shift those of the generator.
    fn push(&mut self, mut event: Value, frames: &mut Vec<Frame>) {
        event["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        let name = event.get("type").and_then(Value::as_str).map(str::to_owned);
        frames.push(Frame::Event(name, event.to_string()));
    }
}

/// Whether a request asks for summaries of the reasoning, under the new name or the old one.
fn takes_summary(body: &Map<String, Value>) -> bool {
    let word = |key: &str| body.get("reasoning").and_then(|r| r.get(key)?.as_str());
    let word = word("summary").or_else(|| word("generate_summary"));
    matches!(word, Some("auto" | "concise" | "detailed"))
}

/// What follows an event so that the reasoning is its own summary, part by part.
fn summary_event(event: &Value) -> Option<Value> {
    let is_reasoning = || event.pointer("/part/type") == Some(&json!("reasoning_text"));
    let part = |text: &Value| json!({ "type": "summary_text", "text": text });
    let (kind, key, value) = match event.get("type")?.as_str()? {
        "response.content_part.added" if is_reasoning() => {
            ("reasoning_summary_part.added", "part", part(&json!("")))
        }
        "response.reasoning_text.delta" => {
            ("reasoning_summary_text.delta", "delta", event.get("delta")?.clone())
        }
        "response.reasoning_text.done" => {
            ("reasoning_summary_text.done", "text", event.get("text")?.clone())
        }
        "response.content_part.done" if is_reasoning() => {
            ("reasoning_summary_part.done", "part", part(event.pointer("/part/text")?))
        }
        _ => return None,
    };
    let mut summary = json!({ "type": format!("response.{kind}"), "summary_index": 0 });
    for shared in ["item_id", "output_index"] {
        summary[shared] = event.get(shared)?.clone();
    }
    summary[key] = value;
    Some(summary)
}

/// Puts reasoning where clients keep it that send back only what they cannot read, and where
/// those look that show summaries.
fn wrap_reasoning(event: &mut Value, summary: bool) {
    if let Some(item) = event.get_mut("item") {
        wrap_item(item, summary);
    }
    if let Some(response) = event.get_mut("response") {
        wrap_items(response, summary);
    }
}

fn wrap_items(response: &mut Value, summary: bool) {
    if let Some(Value::Array(items)) = response.get_mut("output") {
        items.iter_mut().for_each(|item| wrap_item(item, summary));
    }
}

fn wrap_item(item: &mut Value, summary: bool) {
    if item.get("type") == Some(&json!("reasoning")) {
        let text = item.pointer("/content/0/text").and_then(Value::as_str).unwrap_or_default();
        let (text, wrapped) = (text.to_owned(), BASE64_STANDARD.encode(text));
        item["encrypted_content"] = json!(format!("{WRAPPED}{wrapped}"));
        if summary && !text.is_empty() {
            item["summary"] = json!([{ "type": "summary_text", "text": text }]);
        }
    }
}

fn unwrap(content: &str) -> Option<String> {
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
                        let text = result_text(&plain_text(fields.get("output")));
                        item = json!({ "role": "user", "content": text });
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
            let content = fields.get("encrypted_content").and_then(Value::as_str).and_then(unwrap);
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

fn plain_text(content: Option<&Value>) -> String {
    match content {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().filter_map(|part| part.get("text")?.as_str());
            texts.collect::<Vec<_>>().join("\n\n")
        }
        _ => String::new(),
    }
}
