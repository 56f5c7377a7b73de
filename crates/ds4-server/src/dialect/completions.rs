//! OpenAI's text completions: a prompt is continued as it is, without the chat format.

use deepseek_recipe::{
    request::{ConversationRequest, InferenceOptions, ModelVersion},
    stream::{
        ChunkGenerator, FinishReason, OutputChunk, ParsingOptions, PromptUsage,
        ThinkingInitialStage, TokenLogprob,
    },
};
use deepseek_recipe_core::conversation::Conversation;
use serde_json::{Map, Value, json};

use super::{
    Frame, PromptTokens, Reply, Understood, json_text, new_id,
    options::{self, Options, RawPrompt},
    unix_time,
};
use crate::http::error::{ApiError, Dialect};

/// Tokens of an answer unless asked for others.
const USUAL_TOKENS: u32 = 2048;

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
        let mut body = options::object(body)?;
        let mut options = Options::take(&mut body)?;
        let prompt = prompt(&mut body)?;
        for key in ["suffix", "best_of"] {
            if body.get(key).is_some_and(|value| value != &json!(1) && value != &json!("")) {
                return Err(ApiError::field(key, "not supported by this model"));
            }
        }
        if options::whole(&body, "n", u64::MAX)?.is_some_and(|n| n != 1) {
            return Err(ApiError::field("n", "only one completion at a time"));
        }
        let most = u64::from(u32::MAX);
        let max_tokens = options::whole(&body, "max_tokens", most)?.map(|n| n as u32);
        if max_tokens == Some(0) {
            return Err(ApiError::field("max_tokens", "expected at least 1"));
        }
        let logprobs = options::whole(&body, "logprobs", 20)?.map(|n| n as u8);
        let echo = options::flag(&body, "echo")?.unwrap_or(false);
        let include_usage = body.get("stream_options").and_then(|o| o.get("include_usage"));
        let reply = CompletionReply {
            id: new_id("cmpl-"),
            model: options.model.clone(),
            created: unix_time(),
            include_usage: include_usage == Some(&json!(true)),
            echo: match &prompt {
                RawPrompt::Text(text) if echo => Some(text.clone()),
                _ => None,
            },
            text: String::new(),
            logprobs: logprobs.map(|_| Vec::new()),
            end: None,
        };
        let conversation = Conversation { thinking_mode: false, ..Conversation::default() };
        let mut converted = ConversationRequest::new(conversation, ModelVersion::DeepseekV4Pro);
        converted.inference_options = InferenceOptions {
            max_tokens: max_tokens.or(Some(USUAL_TOKENS)),
            logprobs: logprobs.is_some(),
            top_logprobs: logprobs,
            ..InferenceOptions::default()
        };
        converted.parsing_options = ParsingOptions {
            parse_tool_calls: false,
            thinking_initial_stage: Some(ThinkingInitialStage::ContentContinuation),
            stop_sequences: stops(&body)?,
            ..ParsingOptions::default()
        };
        converted.stream = options.stream;
        options.raw_prompt = Some(prompt);
        Ok(Understood { converted, options, reply })
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

fn prompt(body: &mut Map<String, Value>) -> Result<RawPrompt, ApiError> {
    const EXPECTED: &str = "expected a text, or a list of tokens";
    let wrong = || ApiError::field("prompt", EXPECTED);
    match body.remove("prompt").ok_or_else(wrong)? {
        Value::String(text) => Ok(RawPrompt::Text(text)),
        Value::Array(mut list) => match list.first() {
            Some(Value::String(_)) if list.len() == 1 => list
                .pop()
                .and_then(|v| v.as_str().map(|t| RawPrompt::Text(t.to_owned())))
                .ok_or_else(wrong),
            Some(Value::Array(inner)) if list.len() == 1 => tokens(inner).ok_or_else(wrong),
            Some(_) => tokens(&list).ok_or_else(wrong),
            None => Err(wrong()),
        },
        _ => Err(wrong()),
    }
}

fn tokens(list: &[Value]) -> Option<RawPrompt> {
    let ids = list.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
    ids.collect::<Option<Vec<_>>>().filter(|ids| !ids.is_empty()).map(RawPrompt::Tokens)
}

fn stops(body: &Map<String, Value>) -> Result<Vec<String>, ApiError> {
    const MOST: usize = 16;
    let wrong =
        || ApiError::field("stop", format!("expected a text, or at most {MOST} texts, none empty"));
    let stops = match body.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(stops)) if stops.len() <= MOST => {
            let texts = stops.iter().map(|stop| stop.as_str().map(str::to_owned));
            texts.collect::<Option<_>>().ok_or_else(wrong)?
        }
        Some(_) => return Err(wrong()),
    };
    if stops.iter().any(String::is_empty) { Err(wrong()) } else { Ok(stops) }
}
