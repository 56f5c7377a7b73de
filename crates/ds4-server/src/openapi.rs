//! The description of the interface, served at `/openapi.json`.
//!
//! It says what this server looks at; further fields of requests are ignored, as clients send many.
//! What it answers is said in full.

mod answers;

use answers::named;
use serde_json::{Map, Value, json};

/// The description in OpenAPI 3.1.
pub(crate) fn description() -> Value {
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "ds4",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "DeepSeek V4 Flash on this machine, in the dialects of OpenAI and Anthropic.",
        },
        "security": [{}, { "bearer": [] }, { "key": [] }],
        "paths": {
            "/v1/models": { "get": read("List the model", "Models") },
            "/v1/models/{id}": { "get": one_model() },
            "/v1/chat/completions": {
                "post": generate("Chat Completions", chat(), ["ChatCompletion", "ChatCompletionChunk", "Error"]),
            },
            "/v1/completions": {
                "post": generate("Continue a text", completions(), ["Completion", "CompletionChunk", "Error"]),
            },
            "/v1/responses": {
                "post": generate("Responses", responses(), ["Response", "ResponseEvent", "Error"]),
            },
            "/v1/messages": {
                "post": generate("Messages", messages(), ["Message", "MessageEvent", "MessagesError"]),
            },
            "/v1/messages/count_tokens": { "post": count(messages()) },
            "/health": { "get": health() },
            "/metrics": { "get": read_text("Figures for Prometheus", "application/openmetrics-text") },
            "/openapi.json": { "get": read_text("This description", "application/json") },
        },
        "components": {
            "schemas": answers::schemas(),
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "key": { "type": "apiKey", "in": "header", "name": "x-api-key" },
            },
        },
    })
}

fn json_of(description: &str, name: &str) -> Value {
    json!({ "description": description,
        "content": { "application/json": { "schema": named(name) } } })
}

fn read(summary: &str, name: &str) -> Value {
    json!({ "summary": summary, "responses": errors(json_of("OK", name), "Error") })
}

fn read_text(summary: &str, kind: &str) -> Value {
    let content = Map::from_iter([(kind.to_owned(), json!({}))]);
    let ok = json!({ "description": "OK", "content": content });
    json!({ "summary": summary, "responses": errors(ok, "Error") })
}

fn one_model() -> Value {
    let mut operation = read("The model, under any name", "Model");
    operation["parameters"] = json!([{ "name": "id", "in": "path", "required": true, "schema": { "type": "string", "minLength": 1 } }]);
    operation
}

fn health() -> Value {
    let mut operation = read("Whether the server takes requests", "Health");
    operation["responses"]["503"] = json_of("The server is ending", "Health");
    operation
}

/// An operation by the names of its whole answer, of its events' data, and of its errors.
fn generate(summary: &str, schema: Value, [whole, event, error]: [&str; 3]) -> Value {
    // Each event of a stream; those of chunks end in a word that is no JSON.
    let mut data = vec![json!({
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": { "anyOf": [named(event), named(error)] },
    })];
    if event.ends_with("Chunk") {
        data.push(json!({ "const": "[DONE]" }));
    }
    let event = json!({
        "type": "object",
        "required": ["data"],
        "properties": { "event": { "type": "string" }, "data": { "anyOf": data } },
    });
    let answer = json!({
        "description": "The answer; a stream of events if the request asks for one",
        "content": {
            "application/json": { "schema": named(whole) },
            "text/event-stream": { "schema": event },
        },
    });
    json!({
        "summary": summary,
        "requestBody": { "required": true, "content": { "application/json": { "schema": schema } } },
        "responses": errors(answer, error),
    })
}

fn count(schema: Value) -> Value {
    json!({
        "summary": "Count a prompt's tokens",
        "requestBody": { "required": true, "content": { "application/json": { "schema": schema } } },
        "responses": errors(json_of("The number of tokens", "TokenCount"), "MessagesError"),
    })
}

/// Every route may answer so.
fn errors(ok: Value, error: &str) -> Value {
    let mut responses = json!({ "200": ok });
    for (status, description) in [
        ("400", "The request is wrong, or its prompt too long"),
        ("401", "A token is missing or unknown"),
        ("403", "A page or a name that may not ask"),
        ("404", "There is no such route"),
        ("405", "The route takes another method"),
        ("408", "The request took too long to arrive"),
        ("413", "The request is too large"),
        ("429", "Too many requests wait; Retry-After says when to try again"),
        ("500", "The engine failed"),
        ("503", "The server is ending, or has no memory for this request"),
        ("504", "The answer took too long"),
    ] {
        responses[status] = json_of(description, error);
    }
    // The headers are refused before anything is known of the request.
    responses["431"] = json!({ "description": "The headers are too large" });
    responses
}

fn number(least: f64, most: f64) -> Value {
    json!({ "type": ["number", "null"], "minimum": least, "maximum": most })
}

/// A request's schema: the fields that all dialects have, and those of one.
fn request(required: &[&str], own: Value) -> Value {
    let mut properties = json!({
        "model": { "type": ["string", "null"], "description": "Any name; given back in the answer" },
        "stream": { "type": ["boolean", "null"] },
        "temperature": number(0.0, 2.0),
        "top_p": number(0.0, 1.0),
        "min_p": number(0.0, 1.0),
        "top_k": { "type": ["integer", "null"], "minimum": 0, "maximum": u32::MAX },
        "seed": { "type": ["integer", "null"] },
        "parallel_tool_calls": { "type": ["boolean", "null"], "description": "At most one call at a time if false" },
    });
    if let (Some(all), Value::Object(own)) = (properties.as_object_mut(), own) {
        all.extend(own);
    }
    json!({ "type": "object", "required": required, "properties": properties })
}

fn tokens() -> Value {
    json!({ "type": ["integer", "null"], "minimum": 1, "maximum": u32::MAX })
}

fn content() -> Value {
    json!({ "type": ["string", "array", "null"], "items": { "type": "object", "required": ["type"] } })
}

fn message(roles: &[&str]) -> Value {
    json!({
        "type": "object",
        "required": ["role"],
        "properties": { "role": { "enum": roles }, "content": content() },
    })
}

fn thinking() -> Value {
    let kinds = ["enabled", "adaptive", "disabled"];
    json!({ "type": ["object", "boolean", "null"], "required": ["type"],
        "properties": { "type": { "enum": kinds } } })
}

fn effort() -> Value {
    json!({ "enum": ["none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max", null] })
}

fn chat() -> Value {
    let roles = ["system", "developer", "user", "assistant", "tool", "latest_reminder"];
    request(
        &["messages"],
        json!({
            "messages": { "type": "array", "minItems": 1, "items": message(&roles) },
            "max_tokens": tokens(),
            "max_completion_tokens": tokens(),
            "stop": { "type": ["string", "array", "null"], "items": { "type": "string", "minLength": 1 }, "maxItems": 16 },
            "stream_options": { "type": ["object", "null"] },
            "tools": { "type": ["array", "null"], "items": { "type": "object" } },
            "tool_choice": { "type": ["string", "object", "null"] },
            "response_format": { "type": ["object", "null"], "required": ["type"],
                "properties": { "type": { "enum": ["text", "json_object", "json_schema", "regex"] } } },
            "logprobs": { "type": ["boolean", "null"] },
            "top_logprobs": { "type": ["integer", "null"], "minimum": 0, "maximum": 20 },
            "n": { "enum": [1, null] },
            "thinking": thinking(),
            "reasoning_effort": effort(),
        }),
    )
}

fn completions() -> Value {
    request(
        &["prompt"],
        json!({
            "prompt": { "type": ["string", "array"], "description": "A text, or tokens" },
            "max_tokens": tokens(),
            "stop": { "type": ["string", "array", "null"], "items": { "type": "string", "minLength": 1 }, "maxItems": 16 },
            "echo": { "type": ["boolean", "null"] },
            "logprobs": { "type": ["integer", "null"], "minimum": 0, "maximum": 20 },
            "n": { "enum": [1, null] },
        }),
    )
}

fn responses() -> Value {
    request(
        &["input"],
        json!({
            "input": { "type": ["string", "array"], "items": { "type": "object" } },
            "instructions": { "type": ["string", "null"] },
            "max_output_tokens": tokens(),
            "tools": { "type": ["array", "null"], "items": { "type": "object", "required": ["type"] } },
            "tool_choice": { "type": ["string", "object", "null"] },
            "reasoning": { "type": ["object", "null"],
                "properties": { "effort": effort(), "summary": { "enum": ["auto", "concise", "detailed", null] } } },
            "text": { "type": ["object", "null"] },
            "top_logprobs": { "type": ["integer", "null"], "minimum": 0, "maximum": 20 },
        }),
    )
}

fn messages() -> Value {
    request(
        &["messages"],
        json!({
            "messages": { "type": "array", "minItems": 1, "items": message(&["user", "assistant", "system"]) },
            "system": content(),
            "max_tokens": tokens(),
            "stop_sequences": { "type": ["array", "null"], "items": { "type": "string", "minLength": 1 }, "maxItems": 16 },
            "tools": { "type": ["array", "null"], "items": { "type": "object" } },
            "tool_choice": { "type": ["object", "null"], "required": ["type"],
                "properties": { "type": { "enum": ["auto", "any", "tool", "none"] } } },
            "thinking": thinking(),
            "output_config": { "type": ["object", "null"], "properties": { "effort": effort() } },
        }),
    )
}
