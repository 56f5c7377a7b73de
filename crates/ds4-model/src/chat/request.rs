//! The shape of a request. `null` is as good as an absent field everywhere,
//! and unknown fields are ignored.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{ChatError, MAX_REQUEST_BYTES};
use crate::error::shown;

/// The fields of a Chat Completions request that decide the prompt.
#[derive(Debug, Deserialize)]
pub struct ChatRequest {
    pub(super) model: Option<String>,
    pub(super) messages: Vec<Message>,
    pub(super) tools: Option<Vec<Tool>>,
    pub(super) tool_choice: Option<RequestedTool>,
    pub(super) response_format: Option<Format>,
    pub(super) reasoning_effort: Option<String>,
    pub(super) thinking: Option<Switch>,
    pub(super) think: Option<bool>,
}

impl ChatRequest {
    /// Reads a request. Objects and arrays in it may be nested about 120 deep.
    ///
    /// # Errors
    /// If it is larger than [`MAX_REQUEST_BYTES`], no JSON, or a field has another type.
    pub fn from_json(json: &[u8]) -> Result<ChatRequest, ChatError> {
        if json.len() > MAX_REQUEST_BYTES {
            return Err(ChatError::TooLarge { found: json.len() });
        }
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        let request = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
            let path = match error.path().to_string() {
                path if path == "." => String::new(),
                path => shown(&path),
            };
            ChatError::Json { path, problem: shown(&error.into_inner().to_string()) }
        })?;
        let ended = deserializer.end();
        ended
            .map_err(|error| ChatError::Json { path: String::new(), problem: error.to_string() })?;
        Ok(request)
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Message {
    pub role: String,
    pub content: Option<Content>,
    pub reasoning_content: Option<String>,
    /// Another name for `reasoning_content`.
    pub reasoning: Option<String>,
    pub tool_calls: Option<Vec<Call>>,
    pub tool_call_id: Option<String>,
    pub prefix: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of parts, each with a type")]
pub(super) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
pub(super) struct Part {
    #[serde(rename = "type")]
    pub kind: String,
    pub text: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Call {
    pub id: Option<String>,
    pub function: CalledFunction,
}

#[derive(Debug, Deserialize)]
pub(super) struct CalledFunction {
    pub name: String,
    pub arguments: Option<Arguments>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string with JSON, or an object")]
pub(super) enum Arguments {
    Text(String),
    Object(Map<String, Value>),
}

#[derive(Debug, Deserialize)]
pub(super) struct Tool {
    #[serde(rename = "type")]
    pub kind: String,
    pub function: Option<DeclaredFunction>,
}

#[derive(Debug, Deserialize)]
pub(super) struct DeclaredFunction {
    pub name: String,
    pub description: Option<String>,
    pub parameters: Option<Value>,
    pub strict: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected none, auto, required or an object with a function's name")]
pub(super) enum RequestedTool {
    Word(String),
    Named { function: NamedFunction },
}

#[derive(Debug, Deserialize)]
pub(super) struct NamedFunction {
    pub name: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Format {
    #[serde(rename = "type")]
    pub kind: String,
    pub json_schema: Option<Schema>,
    pub regex: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Schema {
    pub schema: Value,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected true, false or an object with a type")]
pub(super) enum Switch {
    Bool(bool),
    Type {
        #[serde(rename = "type")]
        kind: String,
    },
}
