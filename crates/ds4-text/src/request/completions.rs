//! OpenAI's text completions: a prompt is continued as it is, without the chat format.

use deepseek_recipe::{
    request::{ConversationRequest, InferenceOptions, ModelVersion},
    stream::{ParsingOptions, ThinkingInitialStage},
};
use deepseek_recipe_core::conversation::Conversation;
use serde_json::{Map, Value, json};

use super::{Options, RawPrompt, Request, RequestError, options};

/// Tokens of an answer unless asked for others.
const USUAL_TOKENS: u32 = 2048;

/// Reads a request. Its prompt is in [`Options::raw_prompt`], and the conversation is empty.
///
/// # Errors
/// If a field has a value that cannot be used.
pub fn read(body: Value) -> Result<Request, RequestError> {
    let mut body = options::object(body)?;
    let mut options = Options::take(&mut body)?;
    options.raw_prompt = Some(prompt(&mut body)?);
    for key in ["suffix", "best_of"] {
        if body.get(key).is_some_and(|value| value != &json!(1) && value != &json!("")) {
            return Err(RequestError::field(key, "not supported by this model"));
        }
    }
    if options::whole(&body, "n", u64::MAX)?.is_some_and(|n| n != 1) {
        return Err(RequestError::field("n", "only one completion at a time"));
    }
    let most = u64::from(u32::MAX);
    let max_tokens = options::whole(&body, "max_tokens", most)?.map(|n| n as u32);
    if max_tokens == Some(0) {
        return Err(RequestError::field("max_tokens", "expected at least 1"));
    }
    let logprobs = options::whole(&body, "logprobs", 20)?.map(|n| n as u8);
    options.echo = options::flag(&body, "echo")?.unwrap_or(false);
    let include_usage = body.get("stream_options").and_then(|o| o.get("include_usage"));
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
    converted.response_options.include_usage = include_usage == Some(&json!(true));
    converted.stream = options.stream;
    Ok(Request { converted, options })
}

fn prompt(body: &mut Map<String, Value>) -> Result<RawPrompt, RequestError> {
    const EXPECTED: &str = "expected a text, or a list of tokens";
    let wrong = || RequestError::field("prompt", EXPECTED);
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

fn stops(body: &Map<String, Value>) -> Result<Vec<String>, RequestError> {
    const MOST: usize = 16;
    let wrong = || {
        RequestError::field("stop", format!("expected a text, or at most {MOST} texts, none empty"))
    };
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
