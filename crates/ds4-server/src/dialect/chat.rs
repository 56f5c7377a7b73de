//! OpenAI's Chat Completions.

use std::collections::VecDeque;

use deepseek_recipe::{
    openai::{ChatCompletionRequest, chat_completion::response::*},
    request::{ConversationRequest, ConversionOptions, ModelVersion, ProtocolRequest},
    response::{Accumulate, ProtocolResponse},
};
use serde_json::{Map, Value, json};

use super::{
    Chunk, Frame, PromptTokens, RECIPE_MODEL, Reply, Understood,
    history::{FilledIn, MISSING_CALL, MISSING_RESULT, result_text},
    json_text, new_id,
    options::{self, NO_THINKING_WITH_TOOL_CHOICE, Options},
    unix_time,
};
use crate::http::error::ApiError;

/// Answers in the form of Chat Completions.
pub(crate) struct ChatReply {
    id: String,
    model: String,
    include_usage: bool,
    whole: Option<ChatCompletionResponse>,
}

impl Reply for ChatReply {
    type Generator = ChatCompletionChunkGenerator;

    fn understand(body: Value) -> Result<Understood<Self>, ApiError> {
        let mut body = options::object(body)?;
        let mut options = Options::take(&mut body)?;
        options::normalize_thinking(&mut body, &options.model);
        if options::whole(&body, "max_completion_tokens", u64::from(u32::MAX))? == Some(0) {
            return Err(ApiError::field("max_completion_tokens", "expected at least 1"));
        }
        if let Some(tokens) = body.remove("max_completion_tokens") {
            body.entry("max_tokens").or_insert(tokens);
        }
        choose_tool(&mut body, &mut options);
        let filled_in = repair_messages(&mut body, &mut options)?;
        let request: ChatCompletionRequest = typed(Value::Object(body))?;
        let mut converted = request.convert(conversion_options())?;
        filled_in.leave_out(&mut converted.conversation);
        let reply = ChatReply {
            id: new_id("chatcmpl-"),
            model: options.model.clone(),
            include_usage: converted.response_options.include_usage,
            whole: None,
        };
        Ok(Understood { converted, options, reply })
    }

    fn generator(&self, request: &ConversationRequest) -> Self::Generator {
        ChatCompletionRequest::chunk_generator(request, self.id.clone(), self.model.clone())
    }

    fn stream(&mut self, mut chunk: Chunk<Self>, frames: &mut Vec<Frame>) {
        let ends = chunk.choices.iter().any(|choice| choice.finish_reason.is_some());
        let usage = match (&chunk.usage, self.include_usage && ends) {
            (Some(Some(_)), true) => chunk.usage.replace(None).flatten(),
            _ => None,
        };
        frames.push(Frame::Event(None, json_text(&chunk)));
        if let Some(usage) = usage {
            let last =
                ChatCompletionChunk { choices: Vec::new(), usage: Some(Some(usage)), ..chunk };
            frames.push(Frame::Event(None, json_text(&last)));
        }
        if ends {
            frames.push(Frame::Event(None, "[DONE]".to_owned()));
        }
    }

    fn call_id(chunk: &Chunk<Self>) -> Option<&str> {
        let calls = chunk.choices.first()?.delta.tool_calls.as_ref()?;
        calls.iter().find_map(|call| match call {
            ChatCompletionToolCallDelta::Start { call, .. } => Some(&*call.id),
            ChatCompletionToolCallDelta::Arguments { .. } => None,
        })
    }

    fn keep_alive(&mut self, frames: &mut Vec<Frame>) {
        frames.push(Frame::Comment("prefill"));
    }

    fn fail(&mut self, error: &ApiError, frames: &mut Vec<Frame>) {
        let body = error.body(crate::http::error::Dialect::OpenAi);
        frames.push(Frame::Event(None, body.to_string()));
    }

    fn collect(&mut self, chunk: Chunk<Self>, prompt: PromptTokens) {
        let whole = self.whole.get_or_insert_with(|| {
            let (id, model) = (self.id.clone(), self.model.clone());
            ChatCompletionResponse::new(id, model, unix_time(), prompt.all, prompt.cached)
        });
        whole.accumulate(chunk);
    }

    fn into_body(self) -> Value {
        self.whole.map_or(Value::Null, |whole| json!(whole))
    }
}

/// Reads what is left of a request as DeepSeek's conversion has it.
pub(super) fn typed<T: serde::de::DeserializeOwned>(body: Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(body).map_err(|error| {
        let path = error.path().to_string();
        let problem = error.into_inner().to_string();
        if path == "." { ApiError::bad_request(problem) } else { ApiError::field(&path, problem) }
    })
}

/// How DeepSeek's conversion treats requests here: any length of answer is clipped later.
pub(super) fn conversion_options() -> ConversionOptions {
    ConversionOptions::new()
        .with_model_alias(RECIPE_MODEL, ModelVersion::DeepseekV4Pro)
        .with_thinking_max_tokens_upper_bound(u32::MAX)
        .with_non_thinking_max_tokens_upper_bound(u32::MAX)
        .with_messages_web_search(deepseek_recipe::request::WebSearchBehavior::Drop)
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
) -> Result<FilledIn, ApiError> {
    let mut filled_in = FilledIn::default();
    let Some(Value::Array(messages)) = body.get_mut("messages") else { return Ok(filled_in) };
    let mut left: VecDeque<Value> = std::mem::take(messages).into();
    let mut leading = true;
    while let Some(mut message) = left.pop_front() {
        let Some(fields) = message.as_object_mut() else {
            return Err(ApiError::field("messages", "expected objects"));
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
                let text = result_text(&plain_text(fields.get("content")));
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

fn repair_assistant(fields: &mut Map<String, Value>) -> Result<(), ApiError> {
    if let Some(reasoning) = fields.remove("reasoning").filter(Value::is_string) {
        fields.entry("reasoning_content").or_insert(reasoning);
    }
    let Some(Value::Array(calls)) = fields.get_mut("tool_calls") else { return Ok(()) };
    if calls.is_empty() {
        fields.remove("tool_calls");
        return Ok(());
    }
    for call in calls {
        let Some(call) = call.as_object_mut() else {
            return Err(ApiError::field("messages[].tool_calls", "expected objects"));
        };
        call.entry("type").or_insert_with(|| json!("function"));
        call.entry("id").or_insert_with(|| json!(new_id("call_")));
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

/// The text of content in any form.
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
