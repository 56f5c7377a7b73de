//! The description at `/openapi.json` against what the server does.

mod support;

use std::collections::BTreeSet;

use serde_json::{Value, json};
use support::{
    Running,
    client::{Reply, get, post},
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

fn is_described(operation: &Value, path: &str, reply: &Reply) {
    let status = reply.status.to_string();
    let described = operation["responses"].get(&status);
    assert!(described.is_some(), "{path} answers {status}: {}", reply.body);
    if reply.status >= 400 {
        assert!(reply.json()["error"]["message"].is_string(), "{path}: {}", reply.body);
    }
}

#[test]
fn what_is_described_is_served_and_nothing_else() {
    let running = Running::scripted(config());
    let description = get(running.address, "/openapi.json").json();
    let paths = description["paths"].as_object().unwrap();
    let described: BTreeSet<_> = paths.keys().map(String::as_str).collect();
    assert_eq!(described, BTreeSet::from(ROUTES));
    for (path, methods) in paths {
        for (method, operation) in methods.as_object().unwrap() {
            let reply = match method.as_str() {
                "get" => get(running.address, &path.replace("{id}", "any")),
                _ => post(running.address, path, &sample(path)),
            };
            assert_eq!(reply.status, 200, "{method} {path}: {}", reply.body);
            let kind = reply.header("content-type").unwrap().split(';').next().unwrap();
            let kinds = &operation["responses"]["200"]["content"];
            assert!(kinds.get(kind).is_some(), "{method} {path} answers {kind}");
            let other = if method == "get" {
                post(running.address, &path.replace("{id}", "any"), &json!({}))
            } else {
                get(running.address, path)
            };
            assert_eq!(other.status, 405, "{path} takes another method");
            is_described(operation, path, &other);
        }
    }
}

/// Each field with values of every kind: what the schema does not take is refused, what is missing
/// by another name is fine, and every answer is one of those described.
#[test]
fn schemas_say_what_is_refused() {
    let running = Running::scripted(config());
    let description = get(running.address, "/openapi.json").json();
    let mut refused = 0;
    for (path, methods) in description["paths"].as_object().unwrap() {
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
                is_described(operation, path, &reply);
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
