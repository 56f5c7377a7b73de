//! Anthropic's Messages.

use deepseek_recipe::{
    anthropic::messages::{
        request::MessagesRequest,
        response::{
            MessagesChunkGenerator, MessagesResponse, MessagesResponseContentBlock,
            MessagesStreamEvent,
        },
    },
    request::{ConversationRequest, ProtocolRequest},
    response::{Accumulate, ProtocolResponse},
};
use ds4_text::request::messages;
use serde_json::{Value, json};

use super::{Chunk, Frame, PromptTokens, Reply, Understood, json_text, new_id, unix_time};
use crate::http::error::{ApiError, Dialect};

/// Answers in the form of Messages.
pub(crate) struct MessagesReply {
    id: String,
    model: String,
    started: bool,
    whole: Option<MessagesResponse>,
}

impl Reply for MessagesReply {
    type Generator = MessagesChunkGenerator;

    fn understand(body: Value) -> Result<Understood<Self>, ApiError> {
        let request = messages::read(body)?;
        let reply = MessagesReply {
            id: new_id("msg_"),
            model: request.options.model.clone(),
            started: false,
            whole: None,
        };
        Ok(Understood { request, reply })
    }

    fn generator(&self, request: &ConversationRequest) -> Self::Generator {
        MessagesRequest::chunk_generator(request, self.id.clone(), self.model.clone())
    }

    fn stream(&mut self, chunk: Chunk<Self>, frames: &mut Vec<Frame>) {
        self.started = true;
        let name = MessagesResponse::sse_event_name(&chunk).map(str::to_owned);
        frames.push(Frame::Event(name, json_text(&chunk)));
    }

    fn call_id(chunk: &Chunk<Self>) -> Option<&str> {
        match chunk {
            MessagesStreamEvent::ContentBlockStart {
                content_block: MessagesResponseContentBlock::ToolUse { id, .. },
                ..
            } => Some(id),
            _ => None,
        }
    }

    /// Some clients count only real events, but take none before the first.
    fn keep_alive(&mut self, frames: &mut Vec<Frame>) {
        if self.started {
            let ping = MessagesStreamEvent::Ping;
            frames.push(Frame::Event(Some("ping".to_owned()), json_text(&ping)));
        } else {
            frames.push(Frame::Comment("waiting"));
        }
    }

    fn fail(&mut self, error: &ApiError, frames: &mut Vec<Frame>) {
        let body = error.body(Dialect::Anthropic).to_string();
        frames.push(Frame::Event(Some("error".to_owned()), body));
    }

    fn collect(&mut self, chunk: Chunk<Self>, prompt: PromptTokens) {
        let whole = self.whole.get_or_insert_with(|| {
            let (id, model) = (self.id.clone(), self.model.clone());
            MessagesResponse::new(id, model, unix_time(), prompt.all, prompt.cached)
        });
        whole.accumulate(chunk);
    }

    fn into_body(self) -> Value {
        self.whole.map_or(Value::Null, |whole| json!(whole))
    }
}
