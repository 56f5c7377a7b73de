//! The list of models, which has one entry.

use axum::http::HeaderMap;
use serde_json::{Value, json};

use super::state::App;

/// Parameters of requests that have an effect.
const PARAMETERS: [&str; 15] = [
    "temperature",
    "top_p",
    "min_p",
    "top_k",
    "seed",
    "stop",
    "max_tokens",
    "tools",
    "tool_choice",
    "response_format",
    "structured_outputs",
    "reasoning",
    "include_reasoning",
    "logprobs",
    "top_logprobs",
];

/// The list, in the form that the client's headers ask for.
pub(crate) fn list(app: &App, headers: &HeaderMap) -> Value {
    let id = &app.config.model_name;
    if headers.contains_key("anthropic-version") {
        return json!({
            "data": [anthropic(app)],
            "has_more": false,
            "first_id": id,
            "last_id": id,
        });
    }
    json!({ "object": "list", "data": [openai(app)] })
}

/// The model, in the form that the client's headers ask for.
pub(crate) fn one(app: &App, headers: &HeaderMap) -> Value {
    if headers.contains_key("anthropic-version") { anthropic(app) } else { openai(app) }
}

fn openai(app: &App) -> Value {
    let context = app.config.scheduler.context;
    json!({
        "id": app.config.model_name,
        "object": "model",
        "created": app.started,
        "owned_by": "ds4",
        "name": app.config.model_name,
        "context_length": context,
        "top_provider": {
            "context_length": context,
            "max_completion_tokens": context,
            "is_moderated": false,
        },
        "supported_parameters": PARAMETERS,
    })
}

fn anthropic(app: &App) -> Value {
    json!({
        "type": "model",
        "id": app.config.model_name,
        "display_name": app.config.model_name,
        "created_at": "2026-07-31T00:00:00Z",
    })
}
