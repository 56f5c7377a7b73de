//! The description at `/openapi.json` against what the server does.

mod support;

use std::{collections::BTreeSet, time::Duration};

use serde_json::{Value, json};
use support::{
    Running,
    client::{Reply, get, post, send},
    config,
};

/// Everything that is served under a name of its own, but for the page.
const ROUTES: [&str; 10] = [
    "/health",
    "/metrics",
    "/openapi.json",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/v1/models/{id}",
    "/v1/responses",
];

/// A request that is right.
fn sample(path: &str) -> Value {
    match path {
        "/v1/responses" => json!({ "input": "[text]", "max_output_tokens": 4 }),
        "/v1/completions" => json!({ "prompt": "a", "max_tokens": 4 }),
        _ => json!({ "messages": [{ "role": "user", "content": "[text]" }], "max_tokens": 4 }),
    }
}

/// Values of every kind.
fn values() -> Vec<Value> {
    let mut values = vec![
        json!(null),
        json!(true),
        json!(false),
        json!("x"),
        json!(""),
        json!([]),
        json!({}),
        json!([null]),
        json!(["x"]),
        json!([""]),
        json!([5]),
        json!([{}]),
        json!([[]]),
        json!({ "type": "x" }),
        json!({ "type": 5 }),
        json!({ "type": null }),
        json!({ "effort": "x" }),
        json!({ "effort": 5 }),
        json!(vec!["x"; 17]),
    ];
    let numbers = [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 20.0, 21.0, 4_294_967_296.0, 1e300];
    values.extend(
        numbers.map(|n: f64| if n.fract() == 0.0 && n < 1e15 { json!(n as i64) } else { json!(n) }),
    );
    values
}

/// The description, and what it says of answers.
struct Description(Value);

impl Description {
    fn of(running: &Running) -> Description {
        Description(get(running.address, "/openapi.json").json())
    }

    /// That a reply has one of the described statuses, and its body the form described for it.
    fn covers(&self, operation: &Value, path: &str, reply: &Reply) {
        let status = reply.status.to_string();
        let described = operation["responses"].get(&status);
        let described = described.unwrap_or_else(|| panic!("{path} answers {status}: {reply:?}"));
        let kind = reply.header("content-type").unwrap().split(';').next().unwrap();
        let content = described["content"].get(kind);
        let content = content.unwrap_or_else(|| panic!("{path} answers {kind} with {status}"));
        if kind == "text/event-stream" {
            let data = &content["schema"]["properties"]["data"]["anyOf"];
            let ends = reply.events().iter().any(|(_, data)| data == "[DONE]");
            assert!(!ends || data[1]["const"] == "[DONE]", "{path} ends in a word");
            for event in reply.data() {
                assert!(self.is_valid(&data[0]["contentSchema"], &event), "{path}: {event}");
            }
        } else if let Some(schema) = content.get("schema") {
            assert!(self.is_valid(schema, &reply.json()), "{path}, {status}: {}", reply.body);
        }
    }

    fn is_valid(&self, schema: &Value, value: &Value) -> bool {
        let mut schema = schema.clone();
        schema["components"] = self.0["components"].clone();
        jsonschema::validator_for(&schema).unwrap().is_valid(value)
    }
}

/// Requests that are answered in every way there is: by script, thinking, tools, and more.
fn answered(path: &str) -> Vec<Value> {
    let parameters = json!({ "type": "object", "properties": { "city": { "type": "string" },
        "days": { "type": "integer" } }, "required": ["city"] });
    let name = "get_weather";
    let mut requests = Vec::new();
    for (script, thinking, tools, more) in [
        ("text", false, false, json!({})),
        ("thinking", true, false, json!({})),
        ("tools", false, true, json!({})),
        ("thinking tools", true, true, json!({})),
        ("text", false, false, json!({ "max_tokens": 2, "max_output_tokens": 2 })),
        ("text", true, false, json!({ "logprobs": true, "top_logprobs": 2 })),
        ("thinking", true, false, json!({ "stream_options": { "include_usage": true } })),
        ("text", false, false, json!({ "stop": ["there"], "stop_sequences": ["there"] })),
        ("", false, false, json!({})),
    ] {
        let text = format!("[{script}]");
        let mut body = json!({ "model": "any", "max_tokens": 300, "max_output_tokens": 300 });
        match path {
            "/v1/responses" => {
                let effort = if thinking { "low" } else { "none" };
                body["input"] = json!(text);
                body["reasoning"] = json!({ "effort": effort, "summary": "auto" });
                body["tools"] = json!([
                    { "type": "function", "name": name, "parameters": parameters },
                    { "type": "custom", "name": "patch" },
                ]);
            }
            "/v1/completions" => {
                body["prompt"] = json!(text);
                body["logprobs"] = more.get("top_logprobs").cloned().unwrap_or_default();
                body["echo"] = json!(thinking);
            }
            _ => {
                body["messages"] = json!([{ "role": "user", "content": text }]);
                body["thinking"] = json!(thinking);
                body["tools"] = match path {
                    "/v1/messages" => json!([{ "name": name, "input_schema": parameters }]),
                    _ => json!([{ "type": "function",
                        "function": { "name": name, "parameters": parameters } }]),
                };
            }
        }
        if !tools {
            body.as_object_mut().unwrap().remove("tools");
        }
        for (key, value) in more.as_object().unwrap() {
            if !(path == "/v1/completions" && key.ends_with("logprobs")) {
                body[key] = value.clone();
            }
        }
        requests.push(body);
    }
    if path == "/v1/responses" {
        requests.push(json!({ "input": "Do it.", "tools": [{ "type": "custom", "name": "patch" }],
            "tool_choice": { "type": "custom", "name": "patch" }, "max_output_tokens": 20 }));
    }
    requests
}

#[test]
fn answers_have_the_form_described() {
    let running = Running::scripted(config());
    let description = Description::of(&running);
    let mut seen = 0;
    for (path, methods) in description.0["paths"].as_object().unwrap() {
        let operation = &methods["post"];
        if !operation.is_object() || path.ends_with("count_tokens") {
            continue;
        }
        for mut body in answered(path) {
            let is_for_streams = body.get("stream_options").is_some();
            for stream in [false, true].into_iter().filter(|stream| *stream || !is_for_streams) {
                body["stream"] = json!(stream);
                let reply = post(running.address, path, &body);
                assert_eq!(reply.status, 200, "{path}: {body}: {}", reply.body);
                description.covers(operation, path, &reply);
                seen += 1;
            }
        }
    }
    let models = "GET /v1/models HTTP/1.1\r\nanthropic-version: 1\r\nconnection: close\r\n";
    for path in ["", "/any"] {
        let request = models.replace("models", &format!("models{path}"));
        let reply = send(running.address, &format!("{request}host: {}\r\n\r\n", running.address));
        let path = if path.is_empty() { "/v1/models" } else { "/v1/models/{id}" };
        description.covers(&description.0["paths"][path]["get"], path, &reply);
    }
    println!("{seen} answers");
    assert!(seen > 60);
}

/// A closed description would notice a field too many, a missing one, and another type.
#[test]
fn a_wrong_answer_would_be_noticed() {
    let running = Running::scripted(config());
    let description = Description::of(&running);
    for path in ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"] {
        let answers = &description.0["paths"][path]["post"]["responses"]["200"]["content"];
        let schema = &answers["application/json"]["schema"];
        let body = post(running.address, path, &answered(path)[0]).json();
        assert!(description.is_valid(schema, &body), "{path}");
        for name in body.as_object().unwrap().keys() {
            let mut wrong = body.clone();
            wrong[name] = json!([[5]]);
            assert!(!description.is_valid(schema, &wrong), "{path}: {name} may be anything");
        }
        let mut wrong = body.clone();
        wrong["another"] = json!(1);
        assert!(!description.is_valid(schema, &wrong), "{path}");
        wrong = body;
        wrong.as_object_mut().unwrap().remove("id");
        assert!(!description.is_valid(schema, &wrong), "{path}");
    }
}

#[test]
fn a_lost_device_is_described() {
    let mut config = config();
    config.shutdown_grace = Duration::from_secs(1);
    let running = Running::scripted(config);
    let description = Description::of(&running);
    let paths = &description.0["paths"];
    let chat = "/v1/chat/completions";
    let mut body = answered(chat)[0].clone();
    body["messages"][0]["content"] = json!("[broken]");
    body["stream"] = json!(true);
    description.covers(&paths[chat]["post"], chat, &post(running.address, chat, &body));
    let health = get(running.address, "/health");
    assert_eq!(health.status, 503);
    description.covers(&paths["/health"]["get"], "/health", &health);
    running.ended().unwrap_err();
}

#[test]
fn what_is_described_is_served_and_nothing_else() {
    let running = Running::scripted(config());
    let description = Description::of(&running);
    let paths = description.0["paths"].as_object().unwrap();
    let described: BTreeSet<_> = paths.keys().map(String::as_str).collect();
    assert_eq!(described, BTreeSet::from(ROUTES));
    for (path, methods) in paths {
        for (method, operation) in methods.as_object().unwrap() {
            let reply = match method.as_str() {
                "get" => get(running.address, &path.replace("{id}", "any")),
                _ => post(running.address, path, &sample(path)),
            };
            assert_eq!(reply.status, 200, "{method} {path}: {}", reply.body);
            description.covers(operation, path, &reply);
            let other = if method == "get" {
                post(running.address, &path.replace("{id}", "any"), &json!({}))
            } else {
                get(running.address, path)
            };
            assert_eq!(other.status, 405, "{path} takes another method");
            description.covers(operation, path, &other);
        }
    }
}

/// Each field with values of every kind: what the schema does not take is refused, what is missing
/// by another name is fine, and every answer is one of those described.
#[test]
fn schemas_say_what_is_refused() {
    let running = Running::scripted(config());
    let description = Description::of(&running);
    let mut refused = 0;
    for (path, methods) in description.0["paths"].as_object().unwrap() {
        let operation = &methods["post"];
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let Some(properties) = schema["properties"].as_object() else { continue };
        let validator = jsonschema::validator_for(schema).unwrap();
        assert!(validator.is_valid(&sample(path)), "{path}");
        for name in properties.keys() {
            for value in values() {
                let mut body = sample(path);
                body[name] = value;
                let reply = post(running.address, path, &body);
                description.covers(operation, path, &reply);
                if !validator.is_valid(&body) {
                    assert_eq!(reply.status, 400, "{path} takes {body:.300}");
                    refused += 1;
                } else if body[name].is_null() {
                    assert_eq!(reply.status, 200, "{path} refuses {body:.300}: {}", reply.body);
                }
            }
        }
        for name in schema["required"].as_array().unwrap() {
            let mut body = sample(path);
            body.as_object_mut().unwrap().remove(name.as_str().unwrap());
            assert_eq!(post(running.address, path, &body).status, 400, "{path} without {name}");
        }
    }
    println!("{refused} requests refused");
    assert!(refused > 500);
}
