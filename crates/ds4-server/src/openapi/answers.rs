//! Schemas of what is answered: whole answers, the data of events, and errors.
//!
//! Objects are closed: a field that is not named here is never sent.

use serde_json::{Map, Value, json};

/// All schemas by name, for `#/components/schemas`.
pub(super) fn schemas() -> Value {
    let mut all = Map::new();
    for part in [shared(), chat(), completions(), responses(), messages()] {
        if let Value::Object(part) = part {
            all.extend(part);
        }
    }
    Value::Object(all)
}

/// A reference to one of them.
pub(super) fn named(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

/// An object of these fields, all of which are there but those whose names end in `?`.
fn object(fields: Value) -> Value {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for (name, schema) in fields.as_object().into_iter().flatten() {
        match name.strip_suffix('?') {
            Some(optional) => properties.insert(optional.to_owned(), schema.clone()),
            None => {
                required.push(name.clone());
                properties.insert(name.clone(), schema.clone())
            }
        };
    }
    json!({ "type": "object", "properties": properties, "required": required,
        "additionalProperties": false })
}

fn list(items: Value) -> Value {
    json!({ "type": "array", "items": items })
}

fn nullable(schema: Value) -> Value {
    json!({ "anyOf": [schema, { "type": "null" }] })
}

fn text() -> Value {
    json!({ "type": "string" })
}

fn count() -> Value {
    json!({ "type": "integer", "minimum": 0 })
}

fn always(value: Value) -> Value {
    json!({ "const": value })
}

fn shared() -> Value {
    let model = object(json!({
        "id": text(), "object": always(json!("model")), "created": count(), "owned_by": text(),
        "name": text(), "context_length": count(),
        "top_provider": object(json!({ "context_length": count(), "max_completion_tokens": count(),
            "is_moderated": { "type": "boolean" } })),
        "supported_parameters": list(text()),
    }));
    let anthropic_model = object(json!({
        "type": always(json!("model")), "id": text(), "display_name": text(), "created_at": text(),
    }));
    let error = object(json!({
        "message": text(), "type": text(), "param": nullable(text()), "code": nullable(text()),
        "n_prompt_tokens?": count(), "n_ctx?": count(),
    }));
    let anthropic_error = object(json!({
        "type": text(), "message": text(), "n_prompt_tokens?": count(), "n_ctx?": count(),
    }));
    json!({
        "Model": { "anyOf": [model, anthropic_model],
            "description": "The second form for requests with a header anthropic-version" },
        "Models": { "anyOf": [
            object(json!({ "object": always(json!("list")), "data": list(named("Model")) })),
            object(json!({ "data": list(named("Model")), "has_more": { "type": "boolean" },
                "first_id": text(), "last_id": text() })),
        ] },
        "TokenCount": object(json!({ "input_tokens": count() })),
        "Health": object(json!({
            "status": { "enum": ["ok", "shutting down", "failed"] },
            "reason?": { "type": "string", "description": "Why nothing can be computed any more" },
        })),
        "Error": object(json!({ "error": error })),
        "MessagesError": object(json!({ "type": always(json!("error")), "error": anthropic_error })),
        "Usage": object(json!({
            "prompt_tokens": count(), "completion_tokens": count(), "total_tokens": count(),
            "prompt_tokens_details": object(json!({ "cached_tokens": count() })),
            "completion_tokens_details?": object(json!({ "reasoning_tokens": count() })),
            "prompt_cache_hit_tokens?": count(), "prompt_cache_miss_tokens?": count(),
        })),
    })
}

fn chat() -> Value {
    let likely = json!({ "token": text(), "logprob": { "type": "number" },
        "bytes": nullable(list(count())) });
    let mut token = likely.clone();
    token["top_logprobs"] = list(object(likely));
    let tokens = nullable(list(object(token)));
    let logprobs = nullable(object(json!({ "content?": tokens, "reasoning_content?": tokens })));
    let finish = json!({ "enum": ["stop", "length", "tool_calls"] });
    let function = json!({ "name": text(), "arguments": text() });
    let call = json!({ "index?": count(), "id": text(), "type": always(json!("function")),
        "function": object(function) });
    let message = object(json!({
        "role": always(json!("assistant")), "content": nullable(text()),
        "reasoning_content?": nullable(text()), "tool_calls?": list(object(call)),
    }));
    let part = object(json!({
        "index": count(), "id?": text(), "type?": always(json!("function")),
        "function": object(json!({ "name?": text(), "arguments": text() })),
    }));
    let delta = object(json!({
        "role?": always(json!("assistant")), "content?": nullable(text()),
        "reasoning_content?": nullable(text()), "tool_calls?": list(part),
    }));
    json!({
        "ChatCompletion": object(json!({
            "id": text(), "object": always(json!("chat.completion")), "created": count(),
            "model": text(), "system_fingerprint": nullable(text()), "usage": named("Usage"),
            "choices": list(object(json!({ "index": count(), "message": message,
                "logprobs": logprobs, "finish_reason": finish }))),
        })),
        "ChatCompletionChunk": object(json!({
            "id": text(), "object": always(json!("chat.completion.chunk")), "created": count(),
            "model": text(), "system_fingerprint": nullable(text()),
            "usage?": nullable(named("Usage")),
            "choices": list(object(json!({ "index": count(), "delta": delta,
                "logprobs": logprobs, "finish_reason": nullable(finish) }))),
        })),
    })
}

fn completions() -> Value {
    let logprobs = nullable(object(json!({
        "tokens": list(text()), "token_logprobs": list(nullable(json!({ "type": "number" }))),
        "top_logprobs": nullable(list(nullable(json!({ "type": "object",
            "additionalProperties": { "type": "number" } })))),
    })));
    let completion = |finish: Value| {
        object(json!({
            "id": text(), "object": always(json!("text_completion")), "created": count(),
            "model": text(), "usage?": nullable(named("Usage")),
            "choices": list(object(json!({ "index": count(), "text": text(),
                "logprobs": logprobs, "finish_reason": finish }))),
        }))
    };
    let finish = json!({ "enum": ["stop", "length"] });
    json!({
        "Completion": completion(finish.clone()),
        "CompletionChunk": completion(nullable(finish)),
    })
}

fn responses() -> Value {
    let status = json!({ "enum": ["in_progress", "completed", "incomplete", "failed"] });
    let output_text = object(json!({ "type": always(json!("output_text")), "text": text(),
        "annotations": list(json!({})), "logprobs?": list(json!({ "type": "object" })) }));
    let reasoning_text = object(json!({ "type": always(json!("reasoning_text")), "text": text() }));
    let summary_text = object(json!({ "type": always(json!("summary_text")), "text": text() }));
    let item = |kind: &str, mut fields: Value| {
        fields["type"] = always(json!(kind));
        fields["id"] = text();
        fields["status"] = status.clone();
        object(fields)
    };
    let call = |kind: &str, given: &str| {
        let mut fields =
            json!({ "call_id": text(), "name": text(), "namespace?": nullable(text()) });
        fields[given] = text();
        item(kind, fields)
    };
    let items = [
        item(
            "reasoning",
            json!({ "content": list(reasoning_text.clone()),
            "summary": list(summary_text.clone()), "encrypted_content": nullable(text()) }),
        ),
        item(
            "message",
            json!({ "role": always(json!("assistant")), "phase?": nullable(text()),
            "content": list(output_text.clone()) }),
        ),
        call("function_call", "arguments"),
        call("custom_tool_call", "input"),
    ];
    let event = object(json!({
        "type": text(), "sequence_number": count(), "response?": named("Response"),
        "item?": named("OutputItem"), "item_id?": text(), "output_index?": count(),
        "content_index?": count(), "summary_index?": count(),
        "part?": { "anyOf": [output_text, reasoning_text, summary_text] },
        "delta?": text(), "text?": text(), "arguments?": text(), "input?": text(), "name?": text(),
        "logprobs?": list(json!({ "type": "object" })),
    }));
    json!({
        "OutputItem": { "anyOf": items },
        "Response": response(&status),
        "ResponseEvent": event,
    })
}

fn response(status: &Value) -> Value {
    let number = json!({ "type": "number" });
    let any_object = json!({ "type": "object" });
    let nothing = json!({ "type": "null" });
    let usage = object(json!({
        "input_tokens": count(), "output_tokens": count(), "total_tokens": count(),
        "input_tokens_details": object(json!({ "cached_tokens": count() })),
        "output_tokens_details": object(json!({ "reasoning_tokens": count() })),
    }));
    let error = object(json!({ "code": text(), "message": text() }));
    object(json!({
        "id": text(), "object": always(json!("response")), "created_at": count(),
        "status": status, "background": { "type": "boolean" }, "completed_at": nullable(count()),
        "content_filters": nothing, "error": nullable(error), "frequency_penalty": number,
        "incomplete_details": nullable(object(json!({ "reason": text() }))),
        "instructions": nullable(text()), "max_output_tokens": nullable(count()),
        "max_tool_calls": nullable(count()), "metadata": any_object, "model": text(),
        "moderation": nothing, "output": list(named("OutputItem")),
        "parallel_tool_calls": { "type": "boolean" }, "presence_penalty": number,
        "previous_response_id": nothing, "prompt_cache_key": nullable(text()),
        "prompt_cache_retention": nullable(text()),
        "reasoning": nullable(object(json!({ "effort": nullable(text()),
            "summary": nullable(text()) }))),
        "safety_identifier": nullable(text()), "service_tier": text(),
        "store": { "type": "boolean" }, "temperature": nullable(number.clone()),
        "text": any_object, "tool_choice": { "type": ["string", "object"] },
        "tools": list(any_object), "top_logprobs": nullable(count()),
        "top_p": nullable(number), "truncation": text(), "usage": nullable(usage),
        "user": nullable(text()),
    }))
}

fn messages() -> Value {
    let kind = |name: &str, mut fields: Value| {
        fields["type"] = always(json!(name));
        object(fields)
    };
    let block = json!({ "anyOf": [
        kind("thinking", json!({ "thinking": text(), "signature": text() })),
        kind("text", json!({ "text": text() })),
        kind("tool_use", json!({ "id": text(), "name": text(), "input": { "type": "object" } })),
    ] });
    let stop = nullable(json!({ "enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"] }));
    let usage = object(json!({
        "input_tokens": count(), "cache_creation_input_tokens": count(),
        "cache_read_input_tokens": count(), "output_tokens": count(), "service_tier?": text(),
    }));
    let stopped = json!({ "stop_reason": stop, "stop_sequence": nullable(text()) });
    let mut message = json!({ "id": text(), "role": always(json!("assistant")), "model": text(),
        "content": list(block.clone()), "usage": usage.clone() });
    message["stop_reason"] = stop.clone();
    message["stop_sequence"] = nullable(text());
    let delta = json!({ "anyOf": [
        kind("thinking_delta", json!({ "thinking": text() })),
        kind("signature_delta", json!({ "signature": text() })),
        kind("text_delta", json!({ "text": text() })),
        kind("input_json_delta", json!({ "partial_json": text() })),
    ] });
    json!({
        "Message": kind("message", message),
        "MessageEvent": { "anyOf": [
            kind("message_start", json!({ "message": named("Message") })),
            kind("ping", json!({})),
            kind("content_block_start", json!({ "index": count(), "content_block": block })),
            kind("content_block_delta", json!({ "index": count(), "delta": delta })),
            kind("content_block_stop", json!({ "index": count() })),
            kind("message_delta", json!({ "delta": object(stopped), "usage": usage })),
            kind("message_stop", json!({})),
            named("MessagesError"),
        ] },
    })
}
