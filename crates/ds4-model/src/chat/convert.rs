//! Requests to conversations.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value};

use super::{
    ChatError, ChatRequest,
    request::{Arguments, Call, Content, Format, Message, RequestedTool, Switch, Tool},
};
use crate::{
    error::shown,
    profile::Thinking,
    prompt::{
        Conversation, InputMessage, Prompt, ResponseFormat, ToolCall, ToolChoice, ToolDefinition,
    },
};

/// Longest name of a tool, in bytes.
const MAX_TOOL_NAME: usize = 128;

/// A request, ready to render.
#[derive(Debug, Clone)]
pub struct ConvertedRequest {
    /// What to render.
    pub conversation: Conversation,
    /// What is odd about the request but can be lived with, a line each.
    pub warnings: Vec<String>,
}

impl ChatRequest {
    /// Checks the request and makes a conversation of it.
    ///
    /// # Errors
    /// If a field has a value that cannot be used.
    pub fn convert(self) -> Result<ConvertedRequest, ChatError> {
        let thinking = self.thinking()?;
        let tools = tools(self.tools.unwrap_or_default())?;
        let (tools, tool_choice) = choose_tools(tools, self.tool_choice, thinking)?;
        let mut conversation = Conversation {
            messages: messages(self.messages)?,
            tools,
            tool_choice,
            response_format: response_format(self.response_format)?,
            ..Conversation::default()
        };
        thinking.set_in(&mut conversation);
        let warnings = unmatched_calls(&conversation.messages);
        Ok(ConvertedRequest { conversation, warnings })
    }

    /// How much to think. A switch decides whether, then an effort, then the
    /// names of models that the official service has for it.
    fn thinking(&self) -> Result<Thinking, ChatError> {
        let effort = match &self.reasoning_effort {
            Some(word) => Some(
                word.parse::<Thinking>()
                    .map_err(|error| field("reasoning_effort", &error.found, error.expected))?,
            ),
            None => None,
        };
        let switch = match &self.thinking {
            Some(Switch::Bool(on)) => Some(*on),
            Some(Switch::Type { kind }) => match kind.as_str() {
                "enabled" | "adaptive" => Some(true),
                "disabled" => Some(false),
                _ => return Err(field("thinking.type", kind, "enabled, adaptive or disabled")),
            },
            None => self.think,
        };
        Ok(match (switch, effort) {
            (Some(false), _) => Thinking::Off,
            (Some(true), effort) => effort.filter(|&e| e != Thinking::Off).unwrap_or_default(),
            (None, Some(effort)) => effort,
            (None, None) if self.model.as_deref() == Some("deepseek-chat") => Thinking::Off,
            (None, None) => Thinking::default(),
        })
    }
}

fn messages(messages: Vec<Message>) -> Result<Vec<InputMessage>, ChatError> {
    if messages.is_empty() {
        return Err(field("messages", "an empty list", "at least one message"));
    }
    let last = messages.len() - 1;
    let mut converted = Vec::with_capacity(messages.len());
    // Developer messages before anything else are system messages. Moving
    // later ones up would change the prompt's beginning, so they stay in place.
    let mut at_top = true;
    for (index, message) in messages.into_iter().enumerate() {
        let path = format!("messages[{index}]");
        if message.prefix == Some(true) && (index != last || message.role != "assistant") {
            let found = format!("true in message {index}, of role {}", shown(&message.role));
            return Err(ChatError::Field {
                path: format!("{path}.prefix"),
                found,
                expected: "it only in the last message, of role assistant".to_owned(),
            });
        }
        at_top &= matches!(message.role.as_str(), "system" | "developer");
        converted.push(convert_message(message, &path, at_top)?);
    }
    Ok(converted)
}

fn convert_message(message: Message, path: &str, at_top: bool) -> Result<InputMessage, ChatError> {
    let content = text(message.content, path)?;
    let image_sources = Vec::new();
    let plain = Prompt::plain;
    Ok(match message.role.as_str() {
        "developer" if !at_top => InputMessage::User { content: plain(content), image_sources },
        "system" | "developer" => {
            InputMessage::System { content: plain(content), image_sources, tools: None }
        }
        "user" => InputMessage::User { content: plain(content), image_sources },
        "assistant" => InputMessage::Assistant {
            content,
            reasoning_content: message.reasoning_content.or(message.reasoning),
            tool_calls: message.tool_calls.map(|calls| calls.into_iter().map(call).collect()),
            prefix: message.prefix == Some(true),
        },
        "tool" => InputMessage::Tool {
            content: plain(content),
            image_sources,
            tool_call_id: message.tool_call_id,
        },
        "latest_reminder" => InputMessage::LatestReminder { content },
        role => {
            let expected = "system, developer, user, assistant, tool or latest_reminder";
            return Err(field(&format!("{path}.role"), role, expected));
        }
    })
}

/// The text of a message's content: parts are joined by empty lines.
fn text(content: Option<Content>, path: &str) -> Result<String, ChatError> {
    let parts = match content {
        None => return Ok(String::new()),
        Some(Content::Text(text)) => return Ok(text),
        Some(Content::Parts(parts)) => parts,
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.into_iter().enumerate() {
        let path = format!("{path}.content[{index}]");
        if !matches!(part.kind.as_str(), "text" | "input_text" | "output_text") {
            return Err(field(
                &format!("{path}.type"),
                &part.kind,
                "text: this model reads only text",
            ));
        }
        let missing = || field(&format!("{path}.text"), "nothing", "a string");
        texts.push(part.text.ok_or_else(missing)?);
    }
    Ok(texts.join("\n\n"))
}

fn call(call: Call) -> ToolCall {
    let arguments = match call.function.arguments {
        None => String::new(),
        Some(Arguments::Text(text)) => text,
        Some(Arguments::Object(object)) => Value::Object(object).to_string(),
    };
    ToolCall { id: call.id.unwrap_or_default(), name: call.function.name, arguments }
}

fn tools(tools: Vec<Tool>) -> Result<Vec<ToolDefinition>, ChatError> {
    let mut names = HashSet::new();
    let mut definitions = Vec::with_capacity(tools.len());
    for (index, tool) in tools.into_iter().enumerate() {
        let path = format!("tools[{index}]");
        if tool.kind != "function" {
            return Err(field(&format!("{path}.type"), &tool.kind, "function"));
        }
        let path = format!("{path}.function");
        let missing = || field(&path, "nothing", "an object with a name");
        let function = tool.function.ok_or_else(missing)?;
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if !(1..=MAX_TOOL_NAME).contains(&function.name.len())
            || !function.name.bytes().all(is_name)
        {
            let expected = format!("1 to {MAX_TOOL_NAME} letters, digits, _ or -");
            return Err(field(&format!("{path}.name"), &function.name, &expected));
        }
        if !names.insert(function.name.clone()) {
            return Err(field(&format!("{path}.name"), &function.name, "names that differ"));
        }
        let parameters = function.parameters.unwrap_or_else(|| Value::Object(Map::new()));
        if !parameters.is_object() {
            let found = parameters.to_string();
            return Err(field(&format!("{path}.parameters"), &found, "an object"));
        }
        definitions.push(ToolDefinition {
            name: function.name,
            description: function.description,
            parameters,
            strict: function.strict,
            defer_loading: false,
        });
    }
    Ok(definitions)
}

/// The tools to show and whether one must be called. To force a call, the
/// prompt begins it, which leaves no room for reasoning.
fn choose_tools(
    mut tools: Vec<ToolDefinition>,
    choice: Option<RequestedTool>,
    thinking: Thinking,
) -> Result<(Vec<ToolDefinition>, ToolChoice), ChatError> {
    let (path, found) = match choice {
        None => return Ok((tools, ToolChoice::Auto)),
        Some(RequestedTool::Word(word)) => match word.as_str() {
            "auto" => return Ok((tools, ToolChoice::Auto)),
            "none" => return Ok((Vec::new(), ToolChoice::None)),
            "required" => ("tool_choice", word),
            _ => return Err(field("tool_choice", &word, "none, auto, required or a function")),
        },
        Some(RequestedTool::Named { function }) => {
            tools.retain(|tool| tool.name == function.name);
            ("tool_choice.function.name", function.name)
        }
    };
    if tools.is_empty() {
        return Err(field(path, &found, "a tool of the request"));
    }
    if thinking != Thinking::Off {
        return Err(field(path, &found, "it only with thinking disabled"));
    }
    Ok((tools, ToolChoice::Required))
}

fn response_format(format: Option<Format>) -> Result<ResponseFormat, ChatError> {
    let Some(format) = format else {
        return Ok(ResponseFormat::Text);
    };
    let missing = |name: &str| field(&format!("response_format.{name}"), "nothing", "a value");
    match format.kind.as_str() {
        "text" => Ok(ResponseFormat::Text),
        "json_object" => Ok(ResponseFormat::JsonObject),
        "json_schema" => {
            let schema = format.json_schema.ok_or_else(|| missing("json_schema"))?;
            Ok(ResponseFormat::JsonSchema(schema.schema))
        }
        "regex" => Ok(ResponseFormat::Regex(format.regex.ok_or_else(|| missing("regex"))?)),
        kind => Err(field("response_format.type", kind, "text, json_object, json_schema or regex")),
    }
}

/// Warns of calls without a result and results without a call. The official
/// service refuses them; clients that shorten a history make them.
fn unmatched_calls(messages: &[InputMessage]) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut calls: &[ToolCall] = &[];
    let mut answered: HashMap<&str, bool> = HashMap::new();
    for message in messages {
        match message {
            InputMessage::Assistant { tool_calls, .. } => {
                warnings.extend(unanswered(calls, &answered));
                calls = tool_calls.as_deref().unwrap_or_default();
                answered = calls.iter().map(|call| (call.id.as_str(), false)).collect();
            }
            InputMessage::Tool { tool_call_id, .. } => {
                let id = tool_call_id.as_deref().unwrap_or_default();
                match answered.get_mut(id) {
                    Some(is_answered) => *is_answered = true,
                    None => {
                        warnings.push(format!("tool result {} has no call before it", shown(id)));
                    }
                }
            }
            _ => {}
        }
    }
    warnings.extend(unanswered(calls, &answered));
    warnings
}

fn unanswered(calls: &[ToolCall], answered: &HashMap<&str, bool>) -> impl Iterator<Item = String> {
    let is_open = |call: &&ToolCall| answered.get(call.id.as_str()) == Some(&false);
    calls.iter().filter(is_open).map(|call| format!("tool call {} has no result", shown(&call.id)))
}

fn field(path: &str, found: &str, expected: &str) -> ChatError {
    ChatError::Field { path: path.to_owned(), found: shown(found), expected: expected.to_owned() }
}
