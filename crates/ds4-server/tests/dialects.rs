//! Each dialect with exact answers: text, thinking, tools, ends and errors, whole and streamed.

mod support;

use serde_json::{Value, json};
use support::{
    Running,
    client::{Reply, post},
    config, tokenizer,
};

const ROUTES: [&str; 3] = ["/v1/chat/completions", "/v1/messages", "/v1/responses"];

fn weather() -> Value {
    json!({
        "type": "object",
        "properties": { "city": { "type": "string" }, "days": { "type": "integer" } },
        "required": ["city"],
    })
}

/// A request that asks for a script, in the dialect of a route.
fn request(route: &str, script: &str, thinking: bool, tools: bool, tokens: usize) -> Value {
    let text = format!("[{script}]");
    let mut request = match route {
        "/v1/responses" => json!({ "input": text, "max_output_tokens": tokens }),
        _ => json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": tokens }),
    };
    request["model"] = json!("any");
    match route {
        "/v1/responses" => {
            request["reasoning"] = json!({ "effort": if thinking { "low" } else { "none" } })
        }
        _ => request["thinking"] = json!({ "type": if thinking { "enabled" } else { "disabled" } }),
    }
    if tools {
        let (name, schema) = ("get_weather", weather());
        request["tools"] = match route {
            "/v1/messages" => json!([{ "name": name, "input_schema": schema }]),
            "/v1/responses" => json!([{ "type": "function", "name": name, "parameters": schema }]),
            _ => {
                json!([{ "type": "function", "function": { "name": name, "parameters": schema } }])
            }
        };
    }
    request
}

/// Replaces what differs from run to run.
fn settled(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['"']) {
        out.push_str(&rest[..=at]);
        rest = &rest[at + 1..];
        for prefix in
            ["chatcmpl-", "resp_", "msg_resp_", "rs_resp_", "fc_resp_", "msg_", "call_", "cmpl-"]
        {
            let Some(id) = rest.strip_prefix(prefix) else { continue };
            let end = id.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(id.len());
            if end >= 20 {
                out.push_str(prefix);
                out.push_str("ID");
                rest = &id[end..];
                break;
            }
        }
    }
    out.push_str(rest);
    for key in ["\"created\":", "\"created_at\":", "\"completed_at\":"] {
        let mut parts = out.split(key);
        let mut joined = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let rest = part.trim_start_matches(|c: char| c.is_ascii_digit());
            joined.push_str(key);
            joined.push_str(if rest.len() < part.len() { "TIME" } else { "" });
            joined.push_str(rest);
        }
        out = joined;
    }
    out
}

fn stream(running: &Running, route: &str, mut request: Value) -> Reply {
    request["stream"] = json!(true);
    if route == "/v1/chat/completions" {
        request["stream_options"] = json!({ "include_usage": true });
    }
    post(running.address, route, &request)
}

#[test]
fn transcripts() {
    let running = Running::scripted(config());
    let cases = [
        ("text", false, false, 100),
        ("thinking", true, false, 100),
        ("tools", false, true, 200),
        ("thinking tools", true, true, 200),
        ("length", false, false, 2),
    ];
    for route in ROUTES {
        for (case, thinking, tools, tokens) in cases {
            let script = if case == "length" { "text" } else { case };
            let asked = request(route, script, thinking, tools, tokens);
            let name = format!("{}, {case}", &route[4..]).replace('/', " ");
            let streamed = stream(&running, route, asked.clone());
            assert_eq!(streamed.status, 200, "{name}: {}", streamed.body);
            insta::assert_snapshot!(format!("{name}, streamed"), settled(&streamed.body));
            let whole = post(running.address, route, &asked);
            let whole = serde_json::to_string_pretty(&whole.json()).unwrap().replace("\": ", "\":");
            insta::assert_snapshot!(name, settled(&whole));
        }
        let wrong =
            post(running.address, route, &json!({ "model": "any", "messages": 1, "input": 1 }));
        assert_eq!(wrong.status, 400);
        insta::assert_snapshot!(format!("{}, error", &route[4..]).replace('/', " "), wrong.body);
    }
}

#[test]
fn a_call_in_unclosed_reasoning_is_made() {
    let running = Running::scripted(config());
    let asked = request(ROUTES[0], "unclosed", true, true, 200);
    let body = post(running.address, ROUTES[0], &asked).json();
    let choice = &body["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["reasoning_content"], "I should call it");
    let call = &choice["message"]["tool_calls"][0]["function"];
    assert_eq!(call["name"], "get_weather");
    assert_eq!(call["arguments"], r#"{"city": "Oslo", "days": 2}"#);
}

#[test]
fn a_call_can_be_demanded_in_every_dialect() {
    let running = Running::scripted(config());
    let choices = [json!("required"), json!({ "type": "any" }), json!("required")];
    for (route, choice) in ROUTES.into_iter().zip(choices) {
        // Thinking is on, and the script would answer in plain text.
        let mut asked = request(route, "text", true, true, 200);
        asked["tool_choice"] = choice;
        let reply = post(running.address, route, &asked);
        assert_eq!(reply.status, 200, "{}", reply.body);
        assert!(reply.header("x-ds4-warning").unwrap().contains("thinking is off"));
        assert!(reply.body.contains("\"get_weather\""), "{route}: {}", reply.body);
    }
}

#[test]
fn a_named_tool_is_the_one_called() {
    let running = Running::scripted(config());
    let tool = |name: &str| json!({ "type": "function", "function": { "name": name } });
    let mut asked = request(ROUTES[0], "text", false, false, 200);
    asked["tools"] = json!([tool("first"), tool("second"), tool("third")]);
    asked["tool_choice"] = tool("second");
    let body = post(running.address, ROUTES[0], &asked).json();
    assert_eq!(body["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "second");
}

#[test]
fn formats_are_enforced() {
    let running = Running::scripted(config());
    let schema = json!({ "type": "object", "properties": { "n": { "enum": [1] } }, "required": ["n"],
        "additionalProperties": false });
    let formats = [
        (
            json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema } }),
            r#"{"n": 1}"#,
        ),
        (json!({ "type": "regex", "regex": "yes" }), "yes"),
    ];
    for (format, expected) in formats {
        let mut asked = request(ROUTES[0], "text", false, false, 200);
        asked["response_format"] = format;
        let body = post(running.address, ROUTES[0], &asked).json();
        assert_eq!(body["choices"][0]["message"]["content"], expected);
        assert_eq!(body["choices"][0]["finish_reason"], "stop");
    }
    let mut asked = request(ROUTES[2], "text", false, false, 200);
    asked["text"] = json!({ "format": { "type": "json_schema", "name": "n", "schema": schema } });
    let body = post(running.address, ROUTES[2], &asked).json();
    assert_eq!(body["output"][0]["content"][0]["text"], r#"{"n": 1}"#);
}

#[test]
fn a_second_turn_computes_only_what_is_new() {
    let running = Running::scripted(config());
    let asked = request(ROUTES[0], "thinking tools", true, true, 200);
    let first = post(running.address, ROUTES[0], &asked).json();
    let prompt = first["usage"]["prompt_tokens"].as_u64().unwrap();
    let answer = first["usage"]["completion_tokens"].as_u64().unwrap();
    let message = &first["choices"][0]["message"];
    let mut second = asked.clone();
    second["messages"] = json!([
        asked["messages"][0],
        message,
        { "role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "cold" },
        { "role": "user", "content": "[text]" },
    ]);
    let second = post(running.address, ROUTES[0], &second).json();
    // All but the closing tag after its `</`: it was certain, and has not been computed at all.
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let closing = tokenizer().encode_with_markers("</｜DSML｜tool_calls>").unwrap().len() as u64;
    assert_eq!(cached, prompt + answer - (closing - 1));
}

#[test]
fn without_tools_a_later_turn_leaves_the_reasoning_out() {
    let running = Running::scripted(config());
    let asked = request(ROUTES[0], "thinking", true, false, 200);
    let first = post(running.address, ROUTES[0], &asked).json();
    let prompt = first["usage"]["prompt_tokens"].as_u64().unwrap();
    let mut second = asked.clone();
    let message = &first["choices"][0]["message"];
    second["messages"] =
        json!([asked["messages"][0], message, { "role": "user", "content": "[text]" }]);
    let second = post(running.address, ROUTES[0], &second).json();
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(cached, prompt - 1, "up to the marker that opened the reasoning");
}

#[test]
fn histories_cut_short_are_taken() {
    let running = Running::scripted(config());
    let call =
        json!({ "id": "c1", "type": "function", "function": { "name": "f", "arguments": "{}" } });
    let chat = json!({ "messages": [
        { "role": "tool", "tool_call_id": "lost", "content": "result" },
        { "role": "assistant", "content": null, "tool_calls": [call] },
        { "role": "developer", "content": "be brief" },
        { "role": "user", "content": "[text]" },
    ], "thinking": false });
    let messages = json!({ "messages": [
        { "role": "user", "content": [{ "type": "tool_result", "tool_use_id": "lost", "content": "result" }] },
        { "role": "assistant", "content": [{ "type": "tool_use", "id": "c1", "name": "f", "input": {} }] },
        { "role": "user", "content": "[text]" },
    ], "thinking": { "type": "disabled" } });
    let responses = json!({ "input": [
        { "type": "function_call_output", "call_id": "lost", "output": "result" },
        { "type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}" },
        { "role": "user", "content": "[text]" },
    ], "reasoning": { "effort": "none" } });
    for (route, asked) in ROUTES.into_iter().zip([chat, messages, responses]) {
        let reply = post(running.address, route, &asked);
        assert_eq!(reply.status, 200, "{route}: {}", reply.body);
        assert!(reply.body.contains("Hello there!"), "{route}: {}", reply.body);
        let warnings = reply.headers.iter().filter(|(name, _)| name == "x-ds4-warning").count();
        assert_eq!(warnings, 2, "{route}");
    }
}

#[test]
fn stop_strings_end_the_answer_and_are_left_out() {
    let running = Running::scripted(config());
    let mut asked = request(ROUTES[0], "text", false, false, 100);
    asked["stop"] = json!(["there"]);
    let body = post(running.address, ROUTES[0], &asked).json();
    assert_eq!(body["choices"][0]["message"]["content"], "Hello ");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let mut asked = request(ROUTES[1], "text", false, false, 100);
    asked["stop_sequences"] = json!(["there"]);
    let body = post(running.address, ROUTES[1], &asked).json();
    assert_eq!(body["stop_reason"], "stop_sequence");
    assert_eq!(body["stop_sequence"], "there");
}

#[test]
fn too_long_prompts_are_refused_with_counts() {
    let running = Running::scripted(config());
    for route in ROUTES {
        let script = "word ".repeat(9000);
        let reply = post(running.address, route, &request(route, &script, false, false, 100));
        assert_eq!(reply.status, 400, "{route}");
        let error = &reply.json()["error"];
        assert!(error["message"].as_str().unwrap().contains("prompt is too long"), "{route}");
        assert_eq!(error["n_ctx"], 8192);
        assert!(error["n_prompt_tokens"].as_u64().unwrap() > 8192);
    }
}

#[test]
fn count_tokens_counts_what_messages_computes() {
    let running = Running::scripted(config());
    let asked = request(ROUTES[1], "text", true, true, 100);
    let counted = post(running.address, "/v1/messages/count_tokens?beta=true", &asked).json();
    let usage = post(running.address, "/anthropic/v1/messages", &asked).json()["usage"].clone();
    let sum = |key: &str| usage[key].as_u64().unwrap_or(0);
    let all =
        sum("input_tokens") + sum("cache_read_input_tokens") + sum("cache_creation_input_tokens");
    assert_eq!(counted["input_tokens"].as_u64().unwrap(), all);
}
