//! Constrained answers: whatever a model draws, a finished answer is valid. The tiny model draws
//! nearly anything that a grammar allows; nano has habits, and would rather say something else.

mod support;

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::{Map, Value, json};
use support::{
    Running,
    client::{Reply, post},
    config,
};

const CHAT: &str = "/v1/chat/completions";

/// A random schema of values that end soon.
fn schema(rng: &mut fastrand::Rng, depth: usize) -> Value {
    match rng.usize(if depth == 0 { ..8 } else { ..11 }) {
        0 => json!({ "type": "boolean" }),
        1 => {
            let least = rng.i32(-50..50);
            json!({ "type": "integer", "minimum": least, "maximum": least + rng.i32(0..100) })
        }
        2 => json!({ "type": "number", "minimum": -1.5, "maximum": rng.i32(0..9) }),
        3 => json!({ "type": "string", "maxLength": rng.usize(1..12) }),
        4 => {
            let patterns = ["^[a-z]{2,5}$", "^\\d{3}-\\d{4}$", "^(red|green)?$", "^[A-F0-9]{4}$"];
            json!({ "type": "string", "pattern": patterns[rng.usize(..patterns.len())] })
        }
        5 => json!({ "enum": ["a", 1, null, true, "ü\"\\"] }),
        6 => json!({ "const": { "k": [1, "x"] } }),
        7 => json!({ "$ref": "#/$defs/shared" }),
        8 => {
            let least = rng.usize(..2);
            json!({ "type": "array", "items": schema(rng, depth - 1), "minItems": least,
                "maxItems": least + rng.usize(..3) })
        }
        9 => json!({ "anyOf": [schema(rng, depth - 1), { "type": "null" }] }),
        _ => object(rng, depth - 1),
    }
}

fn object(rng: &mut fastrand::Rng, depth: usize) -> Value {
    let names = ["id", "name_of_it", "größe", "tags", "x"];
    let mut properties = Map::new();
    for name in &names[..rng.usize(1..=names.len())] {
        properties.insert((*name).to_owned(), schema(rng, depth));
    }
    let required: Vec<_> = properties.keys().filter(|_| rng.bool()).cloned().collect();
    json!({ "type": "object", "properties": properties, "required": required,
        "additionalProperties": false })
}

/// Answers to all requests, in their order, of which several are under way at a time.
fn answers(running: &Running, bodies: &[Value]) -> Vec<Reply> {
    const TOGETHER: usize = 32;
    let (next, answers) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..TOGETHER.min(bodies.len()) {
            scope.spawn(|| {
                while let Some((index, body)) = Some(next.fetch_add(1, Ordering::Relaxed))
                    .and_then(|i| Some((i, bodies.get(i)?)))
                {
                    let reply = post(running.address, CHAT, body);
                    answers.lock().unwrap().insert(index, reply);
                }
            });
        }
    });
    answers.into_inner().unwrap().into_values().collect()
}

fn assert_valid(schema: &Value, text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let validator = jsonschema::validator_for(schema).unwrap();
    assert!(validator.is_valid(&value), "{schema}\n{value}");
}

#[test]
fn every_finished_answer_of_nano_fits_its_schema() {
    every_finished_answer_fits_its_schema("nano", &Running::nano(config()));
}

#[test]
fn every_finished_answer_of_noise_fits_its_schema() {
    every_finished_answer_fits_its_schema("tiny", &Running::tiny(config()));
}

fn every_finished_answer_fits_its_schema(name: &str, running: &Running) {
    let mut rng = fastrand::Rng::with_seed(1);
    let schema = |_| {
        let mut schema = object(&mut rng, 2);
        schema["$defs"] = json!({ "shared": { "type": "string", "maxLength": 4 } });
        schema
    };
    let schemas: Vec<Value> = (0..200).map(schema).collect();
    let body = |(seed, schema): (usize, &Value)| {
        json!({
            "messages": [{ "role": "user", "content": "Answer in JSON." }],
            "thinking": false, "temperature": 1, "seed": seed, "max_tokens": 200,
            "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } },
        })
    };
    let bodies: Vec<Value> = schemas.iter().enumerate().map(body).collect();
    let (mut finished, mut tokens) = (0, 0);
    for (schema, reply) in schemas.iter().zip(answers(running, &bodies)) {
        assert_eq!(reply.status, 200, "{schema}: {}", reply.body);
        let body = reply.json();
        tokens += body["usage"]["completion_tokens"].as_u64().unwrap();
        let choice = &body["choices"][0];
        if choice["finish_reason"] == "stop" {
            finished += 1;
            assert_valid(schema, choice["message"]["content"].as_str().unwrap());
        }
    }
    println!("{name}: {finished} of 200 finished, {tokens} tokens");
    assert!(finished >= 180, "{finished} of 200 finished");
}

#[test]
fn every_finished_call_of_nano_fits_its_tool() {
    every_finished_call_fits_its_tool("nano", &Running::nano(config()));
}

#[test]
fn every_finished_call_of_noise_fits_its_tool() {
    every_finished_call_fits_its_tool("tiny", &Running::tiny(config()));
}

fn every_finished_call_fits_its_tool(name: &str, running: &Running) {
    let mut rng = fastrand::Rng::with_seed(2);
    let parameters = |_| {
        let mut parameters = object(&mut rng, 1);
        parameters["$defs"] = json!({ "shared": { "type": "string", "enum": ["p", "q"] } });
        parameters
    };
    let all: Vec<Value> = (0..100).map(parameters).collect();
    let body = |(seed, parameters): (usize, &Value)| {
        json!({
            "messages": [{ "role": "user", "content": "Call it." }], "seed": seed,
            "thinking": false, "temperature": 1, "max_tokens": 200, "tool_choice": "required",
            "parallel_tool_calls": false,
            "tools": [{ "type": "function", "function": { "name": "it", "parameters": parameters, "strict": true } }],
        })
    };
    let bodies: Vec<Value> = all.iter().enumerate().map(body).collect();
    let (mut accepted, mut finished) = (0, 0);
    for (parameters, reply) in all.iter().zip(answers(running, &bodies)) {
        // Strict tools want an object with every property at every level.
        if reply.status == 400 {
            continue;
        }
        accepted += 1;
        assert_eq!(reply.status, 200, "{parameters}: {}", reply.body);
        let body = reply.json();
        let choice = &body["choices"][0];
        if choice["finish_reason"] == "tool_calls" {
            finished += 1;
            let call = &choice["message"]["tool_calls"][0]["function"];
            assert_valid(parameters, call["arguments"].as_str().unwrap());
        }
    }
    println!("{name}: {finished} of {accepted} calls finished");
    assert!(
        accepted >= 10 && finished * 10 >= accepted * 9,
        "{finished} of {accepted} calls finished"
    );
}

#[test]
fn what_cannot_be_enforced_is_refused() {
    let running = Running::tiny(config());
    for (schema, why) in [
        (
            json!({ "type": "object", "properties": { "a": { "$ref": "https://example.com/s" } } }),
            "a foreign reference",
        ),
        (json!({ "type": "object", "minProperties": 3, "maxProperties": 2 }), "nothing fits"),
        (json!({ "not": { "type": "string" } }), "a negation"),
    ] {
        let reply = post(
            running.address,
            CHAT,
            &json!({
                "messages": [{ "role": "user", "content": "json" }],
                "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } },
            }),
        );
        assert_eq!(reply.status, 400, "{why}: {}", reply.body);
        assert_eq!(reply.json()["error"]["type"], "invalid_request_error");
    }
    let parameters =
        json!({ "type": "object", "properties": { "two words": { "type": "string" } } });
    let reply = post(
        running.address,
        CHAT,
        &json!({
            "messages": [{ "role": "user", "content": "Call it." }],
            "tools": [{ "type": "function", "function": { "name": "it", "parameters": parameters, "strict": true } }],
        }),
    );
    assert_eq!(reply.status, 400, "{}", reply.body);
    assert!(reply.body.contains("two words"), "{}", reply.body);
}
