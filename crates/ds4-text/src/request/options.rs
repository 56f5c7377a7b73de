//! What requests ask for beyond the conversation: sampling as the client wants it, in thinking
//! mode too, and what is odd about the request but can be lived with.

use std::collections::HashMap;

use ds4_model::TokenId;
use serde_json::{Map, Value, json};

use super::{RequestError, convert::RECIPE_MODEL};

/// Messages or input items of a request.
const MOST_MESSAGES: usize = 20_000;

/// Tools of a request.
const MOST_TOOLS: usize = 1024;

/// Fields that are objects where they are no words. Deserializing would take lists for them, too.
const OBJECTS: [&str; 7] = [
    "output_config",
    "reasoning",
    "response_format",
    "stream_options",
    "text",
    "thinking",
    "tool_choice",
];

/// Options of a request.
#[derive(Debug, Default)]
pub struct Options {
    /// The model's name as asked for, to be given back in answers.
    pub model: String,
    /// The answer is wanted as a stream of events.
    pub stream: bool,
    /// How far from the likeliest token to go, 0 to 2.
    pub temperature: Option<f32>,
    /// Probability of the tokens to choose from, 0 to 1.
    pub top_p: Option<f32>,
    /// Least probability of a token, as a share of the likeliest one's.
    pub min_p: Option<f32>,
    /// Number of tokens to choose from.
    pub top_k: Option<usize>,
    /// Start of the random numbers.
    pub seed: Option<u64>,
    /// The only tool that may be called.
    pub named_tool: Option<String>,
    /// At most one tool may be called at once.
    pub single_call: bool,
    /// Schemas of strict tools as they were sent, by name.
    pub strict_schemas: HashMap<String, Value>,
    /// A prompt that needs no rendering.
    pub raw_prompt: Option<RawPrompt>,
    /// The prompt is wanted back before the answer.
    pub echo: bool,
    /// What is odd about the request but can be lived with, a line each.
    pub warnings: Vec<String>,
}

/// A prompt as text or tokens, to be continued as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RawPrompt {
    /// Text, in which spellings of markers are text like any other.
    Text(String),
    /// Tokens.
    Tokens(Vec<TokenId>),
}

/// The object that every request is.
pub(super) fn object(body: Value) -> Result<Map<String, Value>, RequestError> {
    match body {
        Value::Object(object) => Ok(object),
        _ => Err(RequestError::refused("the request body must be a JSON object")),
    }
}

impl Options {
    /// Takes the options that all dialects have out of a request, and sets what DeepSeek's
    /// conversion needs to see.
    pub(super) fn take(body: &mut Map<String, Value>) -> Result<Options, RequestError> {
        body.retain(|_, value| !value.is_null());
        let model = match body.get("model") {
            Some(Value::String(name)) => name.clone(),
            None => String::new(),
            Some(_) => return Err(RequestError::field("model", "expected a string")),
        };
        body.insert("model".to_owned(), json!(RECIPE_MODEL));
        for (key, most) in
            [("messages", MOST_MESSAGES), ("input", MOST_MESSAGES), ("tools", MOST_TOOLS)]
        {
            let found = body.get(key).and_then(Value::as_array).map_or(0, Vec::len);
            if found > most {
                return Err(RequestError::field(
                    key,
                    format!("found {found} entries, expected at most {most}"),
                ));
            }
        }
        for key in OBJECTS {
            if body.get(key).is_some_and(Value::is_array) {
                return Err(RequestError::field(key, "expected an object"));
            }
        }
        let single_call = flag(body, "parallel_tool_calls")? == Some(false);
        body.remove("parallel_tool_calls");
        let options = Options {
            stream: flag(body, "stream")?.unwrap_or(false),
            temperature: number(body, "temperature", 0.0, 2.0)?,
            top_p: number(body, "top_p", 0.0, 1.0)?,
            min_p: number(body, "min_p", 0.0, 1.0)?,
            top_k: whole(body, "top_k", u64::from(u32::MAX))?.map(|k| k as usize),
            seed: seed(body)?,
            strict_schemas: strict_schemas(body),
            single_call,
            model,
            ..Options::default()
        };
        Ok(options)
    }

    /// Notes something odd.
    pub(super) fn warn(&mut self, text: impl Into<String>) {
        let text = text.into();
        if !self.warnings.contains(&text) {
            self.warnings.push(text);
        }
    }
}

/// Tools are functions, or have one inside.
fn strict_schemas(body: &Map<String, Value>) -> HashMap<String, Value> {
    let tools = body.get("tools").and_then(Value::as_array).into_iter().flatten();
    let strict = tools.filter_map(|tool| {
        let function = tool.get("function").unwrap_or(tool);
        let name = function.get("name")?.as_str()?.to_owned();
        let is_strict = function.get("strict") == Some(&Value::Bool(true));
        is_strict.then(|| function.get("parameters").map(|schema| (name, schema.clone())))?
    });
    strict.collect()
}

/// Makes of the many ways to switch thinking on and off the one that DeepSeek's conversion knows.
pub(super) fn normalize_thinking(body: &mut Map<String, Value>, model: &str) {
    let switch = |on: bool| json!({ "type": if on { "enabled" } else { "disabled" } });
    let think = body.remove("think").and_then(|value| value.as_bool());
    match body.get("thinking") {
        Some(Value::Bool(on)) => {
            let on = *on;
            body.insert("thinking".to_owned(), switch(on));
        }
        Some(_) => {}
        None => {
            if let Some(on) = think {
                body.insert("thinking".to_owned(), switch(on));
            } else if model == "deepseek-chat" && !body.contains_key("reasoning_effort") {
                body.insert("thinking".to_owned(), switch(false));
            }
        }
    }
}

/// Switches thinking off.
pub(super) fn disable_thinking(body: &mut Map<String, Value>) {
    body.insert("thinking".to_owned(), json!({ "type": "disabled" }));
}

pub(super) const NO_THINKING_WITH_TOOL_CHOICE: &str =
    "thinking is off for this answer, because tool_choice asks for a tool call";

pub(super) fn flag(body: &Map<String, Value>, key: &str) -> Result<Option<bool>, RequestError> {
    match body.get(key) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(_) => Err(RequestError::field(key, "expected true or false")),
    }
}

pub(super) fn number(
    body: &Map<String, Value>,
    key: &str,
    least: f64,
    most: f64,
) -> Result<Option<f32>, RequestError> {
    let Some(value) = body.get(key) else { return Ok(None) };
    match value.as_f64() {
        Some(value) if (least..=most).contains(&value) => Ok(Some(value as f32)),
        _ => Err(RequestError::field(key, format!("expected a number from {least} to {most}"))),
    }
}

pub(super) fn whole(
    body: &Map<String, Value>,
    key: &str,
    most: u64,
) -> Result<Option<u64>, RequestError> {
    let Some(value) = body.get(key) else { return Ok(None) };
    match value.as_u64() {
        Some(value) if value <= most => Ok(Some(value)),
        _ => Err(RequestError::field(key, format!("expected a whole number from 0 to {most}"))),
    }
}

/// Any whole number is a seed; DeepSeek's conversion takes those that fit into 63 bits.
fn seed(body: &mut Map<String, Value>) -> Result<Option<u64>, RequestError> {
    let Some(value) = body.remove("seed") else { return Ok(None) };
    let seed = value.as_u64().or_else(|| value.as_i64().map(|seed| seed as u64));
    seed.map(Some).ok_or_else(|| RequestError::field("seed", "expected a whole number"))
}
