//! OpenAI's Chat Completions.

use deepseek_recipe::{
    openai::{ChatCompletionRequest, chat_completion::response::*},
    request::{ConversationRequest, ProtocolRequest},
    response::{Accumulate, ProtocolResponse},
};
use ds4_text::request::chat;
use serde_json::{Value, json};

use super::{Chunk, Frame, PromptTokens, Reply, Understood, json_text, new_id, unix_time};
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
        let request = chat::read(body)?;
        let reply = ChatReply {
            id: new_id("chatcmpl-"),
            model: request.options.model.clone(),
            include_usage: request.converted.response_options.include_usage,
            whole: None,
        };
        Ok(Understood { request, reply })
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
