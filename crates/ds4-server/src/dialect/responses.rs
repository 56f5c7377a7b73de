//! OpenAI's Responses. Nothing is stored: clients send the whole history, and reasoning travels
//! with it, readable or in `encrypted_content`.

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
use ds4_text::request::responses;
use serde_json::{Value, json};

use super::{Chunk, Frame, PromptTokens, Reply, Understood, new_id, unix_time};
use crate::http::error::ApiError;

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
        let summary = takes_summary(&body);
        let request = responses::read(body)?;
        let reply = ResponsesReply {
            id: new_id("resp_"),
            model: request.options.model.clone(),
            sequence: 0,
            summary,
            begun: Value::Null,
            whole: None,
        };
        Ok(Understood { request, reply })
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
fn takes_summary(body: &Value) -> bool {
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
        let text = text.to_owned();
        item["encrypted_content"] = json!(responses::wrap_reasoning(&text));
        if summary && !text.is_empty() {
            item["summary"] = json!([{ "type": "summary_text", "text": text }]);
        }
    }
}
