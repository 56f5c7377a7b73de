//! OpenAI's text completions: a prompt is continued as it is, without the chat format.

use deepseek_recipe::{
    request::ConversationRequest,
    stream::{ChunkGenerator, FinishReason, OutputChunk, PromptUsage, TokenLogprob},
};
use ds4_text::request::{RawPrompt, completions};
use serde_json::{Value, json};

use super::{Frame, PromptTokens, Reply, Understood, json_text, new_id, unix_time};
use crate::http::error::{ApiError, Dialect};

/// Answers in the form of text completions.
pub(crate) struct CompletionReply {
    id: String,
    model: String,
    created: u64,
    include_usage: bool,
    echo: Option<String>,
    text: String,
    logprobs: Option<Vec<TokenLogprob>>,
    end: Option<(&'static str, Value)>,
}

/// A piece of a completion.
pub(crate) enum Piece {
    Text(String, Vec<TokenLogprob>),
    End(&'static str, Value),
}

/// Turns parsed output into pieces.
pub(crate) struct Pieces(PromptUsage);

impl ChunkGenerator for Pieces {
    type Chunk = Piece;

    async fn generate(&mut self, chunk: OutputChunk) -> Vec<Piece> {
        match chunk {
            OutputChunk::Start { prompt_usage, .. } => {
                self.0 = prompt_usage;
                Vec::new()
            }
            OutputChunk::Content { content, logprobs } => {
                let logprobs = logprobs.map(|logprobs| logprobs.to_vec()).unwrap_or_default();
                vec![Piece::Text(content, logprobs)]
            }
            OutputChunk::Finish { finish_reason, completion_usage, .. } => {
                let (prompt, answer) = (self.0, completion_usage.completion_tokens);
                let usage = json!({
                    "prompt_tokens": prompt.prompt_tokens,
                    "completion_tokens": answer,
                    "total_tokens": prompt.prompt_tokens + answer,
                    "prompt_tokens_details": { "cached_tokens": prompt.prompt_cache_hit_tokens },
                });
                let length = finish_reason == FinishReason::Length;
                vec![Piece::End(if length { "length" } else { "stop" }, usage)]
            }
            _ => Vec::new(),
        }
    }
}

impl Reply for CompletionReply {
    type Generator = Pieces;

    fn understand(body: Value) -> Result<Understood<Self>, ApiError> {
        let request = completions::read(body)?;
        let (converted, options) = (&request.converted, &request.options);
        let reply = CompletionReply {
            id: new_id("cmpl-"),
            model: options.model.clone(),
            created: unix_time(),
            include_usage: converted.response_options.include_usage,
            echo: match &options.raw_prompt {
                Some(RawPrompt::Text(text)) if options.echo => Some(text.clone()),
                _ => None,
            },
            text: String::new(),
            logprobs: converted.inference_options.logprobs.then(Vec::new),
            end: None,
        };
        Ok(Understood { request, reply })
    }

    fn generator(&self, _: &ConversationRequest) -> Pieces {
        Pieces(PromptUsage::default())
    }

    fn stream(&mut self, piece: Piece, frames: &mut Vec<Frame>) {
        if let Some(echo) = self.echo.take() {
            frames.push(Frame::Event(None, json_text(&self.object(&echo, &[], None))));
        }
        match piece {
            Piece::Text(text, logprobs) => {
                frames.push(Frame::Event(None, json_text(&self.object(&text, &logprobs, None))));
            }
            Piece::End(reason, usage) => {
                let mut last = self.object("", &[], Some(reason));
                if self.include_usage {
                    frames.push(Frame::Event(None, json_text(&last)));
                    last["choices"] = json!([]);
                }
                last["usage"] = usage;
                frames.push(Frame::Event(None, json_text(&last)));
                frames.push(Frame::Event(None, "[DONE]".to_owned()));
            }
        }
    }

    fn call_id(_: &Piece) -> Option<&str> {
        None
    }

    fn keep_alive(&mut self, frames: &mut Vec<Frame>) {
        frames.push(Frame::Comment("prefill"));
    }

    fn fail(&mut self, error: &ApiError, frames: &mut Vec<Frame>) {
        frames.push(Frame::Event(None, error.body(Dialect::OpenAi).to_string()));
    }

    fn collect(&mut self, piece: Piece, _: PromptTokens) {
        match piece {
            Piece::Text(text, logprobs) => {
                self.text.push_str(&text);
                if let Some(all) = &mut self.logprobs {
                    all.extend(logprobs);
                }
            }
            Piece::End(reason, usage) => self.end = Some((reason, usage)),
        }
    }

    fn into_body(self) -> Value {
        let text = self.echo.clone().unwrap_or_default() + &self.text;
        let (reason, usage) = self.end.clone().unwrap_or(("stop", Value::Null));
        let logprobs = self.logprobs.clone().unwrap_or_default();
        let mut body = self.object(&text, &logprobs, Some(reason));
        body["usage"] = usage;
        body
    }
}

impl CompletionReply {
    fn object(&self, text: &str, logprobs: &[TokenLogprob], reason: Option<&str>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [{
                "index": 0,
                "text": text,
                "logprobs": self.logprobs.as_ref().map(|_| logprobs_object(logprobs)),
                "finish_reason": reason,
            }],
        })
    }
}

fn logprobs_object(logprobs: &[TokenLogprob]) -> Value {
    let top = |one: &TokenLogprob| -> Value {
        let pairs = one.top_logprobs.iter().map(|top| (top.token.clone(), json!(top.logprob)));
        Value::Object(pairs.collect())
    };
    json!({
        "tokens": logprobs.iter().map(|one| &one.token).collect::<Vec<_>>(),
        "token_logprobs": logprobs.iter().map(|one| one.logprob).collect::<Vec<_>>(),
        "top_logprobs": logprobs.iter().map(top).collect::<Vec<_>>(),
    })
}
