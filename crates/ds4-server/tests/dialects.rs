//! Each dialect with exact answers: text, thinking, tools, ends and errors, whole and streamed.

mod support;

use std::time::Duration;

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

/// A server whose engine is going to break, and which does not linger then.
fn breaking() -> Running {
    let mut config = config();
    config.shutdown_grace = Duration::from_millis(200);
    Running::scripted(config)
}

fn assert_broken(running: Running) {
    let reason = running.ended().unwrap_err().to_string();
    assert!(reason.contains("a cable came loose"), "{reason}");
}

#[test]
fn transcripts_of_an_engine_that_breaks() {
    for route in ROUTES {
        let asked = request(route, "broken", false, false, 100);
        let running = breaking();
        let streamed = stream(&running, route, asked.clone());
        assert_eq!(streamed.status, 200, "the error comes after some text");
        let name = format!("{}, broken, streamed", &route[4..]).replace('/', " ");
        insta::assert_snapshot!(name, settled(&streamed.body));
        assert_broken(running);
        let running = breaking();
        let whole = post(running.address, route, &asked);
        assert_eq!(whole.status, 500);
        insta::assert_snapshot!(format!("{}, broken", &route[4..]).replace('/', " "), whole.body);
        assert_broken(running);
    }
}

/// A prompt that is continued as it is has neither thinking nor tools.
#[test]
fn transcripts_of_completions() {
    const ROUTE: &str = "/v1/completions";
    let running = Running::scripted(config());
    let user = |script: &str| format!("<｜User｜>[{script}]<｜Assistant｜></think>");
    let tokens = |script: &str| tokenizer().encode_with_markers(&user(script)).unwrap();
    for (case, script, most) in [("text", "text", 100), ("length", "text", 2)] {
        let asked = json!({ "model": "any", "prompt": tokens(script), "max_tokens": most });
        let streamed = stream(&running, ROUTE, asked.clone());
        assert_eq!(streamed.status, 200, "{case}: {}", streamed.body);
        insta::assert_snapshot!(format!("completions, {case}, streamed"), settled(&streamed.body));
        let whole = post(running.address, ROUTE, &asked);
        insta::assert_snapshot!(format!("completions, {case}"), settled(&whole.body));
    }
    let wrong = post(running.address, ROUTE, &json!({ "prompt": 5 }));
    assert_eq!(wrong.status, 400);
    insta::assert_snapshot!("completions, error", wrong.body);
    let running = breaking();
    let broken = json!({ "model": "any", "prompt": tokens("broken"), "stream": true });
    let broken = post(running.address, ROUTE, &broken);
    insta::assert_snapshot!("completions, broken, streamed", settled(&broken.body));
    assert_broken(running);
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
    let message = &first["choices"][0]["message"];
    let mut second = asked.clone();
    second["messages"] = json!([
        asked["messages"][0],
        message,
        { "role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "cold" },
        { "role": "user", "content": "[text]" },
    ]);
    let second = post(running.address, ROUTES[0], &second).json();
    // The first prompt but for its last token. An answer is computed again, as part of a prompt.
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(cached, prompt - 1);
}

/// The assistant turn of a call, as a client might spell it anew: keys in another order, a whole
/// number with a point, and no reasoning.
fn sent_back(route: &str, first: &Value, city: &str) -> Vec<Value> {
    let input = json!({ "city": city, "days": 2.0 });
    let (text, name) = ("Let me look.", "get_weather");
    match route {
        "/v1/messages" => {
            let call = first["content"].as_array().unwrap().last().unwrap();
            let id = &call["id"];
            vec![
                json!({ "role": "assistant", "content": [{ "type": "text", "text": text },
                    { "type": "tool_use", "id": id, "name": name, "input": input }] }),
                json!({ "role": "user", "content": [{ "type": "tool_result", "tool_use_id": id,
                    "content": "cold" }, { "type": "text", "text": "[text]" }] }),
            ]
        }
        "/v1/responses" => {
            let id = &first["output"].as_array().unwrap().last().unwrap()["call_id"];
            vec![
                json!({ "role": "assistant", "content": text }),
                json!({ "type": "function_call", "call_id": id, "name": name,
                    "arguments": input.to_string() }),
                json!({ "type": "function_call_output", "call_id": id, "output": "cold" }),
                json!({ "role": "user", "content": "[text]" }),
            ]
        }
        _ => {
            let id = &first["choices"][0]["message"]["tool_calls"][0]["id"];
            let function = json!({ "name": name, "arguments": input.to_string() });
            vec![
                json!({ "role": "assistant", "content": text,
                    "tool_calls": [{ "id": id, "type": "function", "function": function }] }),
                json!({ "role": "tool", "tool_call_id": id, "content": "cold" }),
                json!({ "role": "user", "content": "[text]" }),
            ]
        }
    }
}

/// Tokens of a prompt that were there already, of all of them, and of the answer.
fn usage(body: &Value) -> (u64, u64, u64) {
    let usage = &body["usage"];
    let number = |path: &str| usage.pointer(path).and_then(Value::as_u64);
    let first = |paths: [&str; 3]| paths.into_iter().find_map(number).unwrap_or(0);
    let cached = first([
        "/prompt_tokens_details/cached_tokens",
        "/input_tokens_details/cached_tokens",
        "/cache_read_input_tokens",
    ]);
    let separate = number("/cache_read_input_tokens").unwrap_or(0)
        + number("/cache_creation_input_tokens").unwrap_or(0);
    let prompt = first(["/prompt_tokens", "/input_tokens", "/none"]) + separate;
    (cached, prompt, first(["/completion_tokens", "/output_tokens", "/none"]))
}

#[test]
fn a_call_sent_back_in_other_words_is_still_the_sampled_one() {
    for route in ROUTES {
        let running = Running::scripted(config());
        let asked = request(route, "swapped", true, true, 200);
        let first = post(running.address, route, &asked).json();
        let (_, prompt, _) = usage(&first);
        let list = if route == "/v1/responses" { "input" } else { "messages" };
        let question = json!({ "role": "user", "content": "[swapped]" });
        let second = |city| {
            let mut second = asked.clone();
            second[list] = [vec![question.clone()], sent_back(route, &first, city)].concat().into();
            usage(&post(running.address, route, &second).json())
        };
        let (cached, sampled, _) = second("Oslo");
        assert_eq!(cached, prompt - 1, "{route}");
        // The model and the client spell the call in different numbers of tokens, and a call that
        // the client changed is spelled as the client has it.
        let (_, changed, _) = second("Rome");
        assert_ne!(sampled, changed, "{route}: tokens of the prompt");
    }
}

#[test]
fn calls_that_are_none_are_counted() {
    let running = Running::scripted(config());
    let at = running.address;
    let counted = |kind: &str| {
        let metrics = support::client::get(at, "/metrics").body;
        let line = format!("ds4_malformed_tool_calls_total{{kind=\"{kind}\"}} 1");
        metrics.lines().any(|l| l == line)
    };
    let body = post(at, ROUTES[0], &request(ROUTES[0], "spelled", false, true, 200)).json();
    let text = body["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(text.starts_with("<tool_calls>"), "it is text: {text}");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert!(counted("SpelledOut") && !counted("Cut"));
    let body = post(at, ROUTES[0], &request(ROUTES[0], "tools", false, true, 20)).json();
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert!(counted("Cut"));
}

#[test]
fn every_token_has_its_probability_even_if_it_was_certain() {
    let running = Running::scripted(config());
    let schema = json!({ "type": "object", "properties": { "name": { "enum": ["only one"] } },
        "required": ["name"], "additionalProperties": false });
    let mut asked = request(ROUTES[0], "text", false, false, 200);
    asked["logprobs"] = json!(true);
    asked["top_logprobs"] = json!(2);
    asked["response_format"] =
        json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema } });
    let body = post(running.address, ROUTES[0], &asked).json();
    let tokens = body["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len() as u64, body["usage"]["completion_tokens"].as_u64().unwrap());
    let text: String = tokens.iter().map(|t| t["token"].as_str().unwrap()).collect();
    assert_eq!(text, r#"{"name": "only one"}"#);
    for token in tokens {
        assert!(token["logprob"].as_f64().unwrap() < 0.0, "{token}");
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2, "{token}");
    }
}

#[test]
fn reasoning_is_its_own_summary_for_those_who_ask() {
    let running = Running::scripted(config());
    let mut asked = request(ROUTES[2], "thinking", true, false, 100);
    asked["reasoning"]["summary"] = json!("auto");
    let whole = post(running.address, ROUTES[2], &asked).json();
    let summary = json!([{ "type": "summary_text", "text": "I am thinking." }]);
    assert_eq!(whole["output"][0]["summary"], summary);
    let streamed = stream(&running, ROUTES[2], asked);
    let events = streamed.data();
    let numbers: Vec<_> = events.iter().map(|e| e["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let of = |kind: &str| events.iter().filter(|e| e["type"] == kind).collect::<Vec<_>>();
    let deltas = of("response.reasoning_summary_text.delta");
    let text: String = deltas.iter().map(|e| e["delta"].as_str().unwrap()).collect();
    assert_eq!(text, "I am thinking.");
    assert_eq!(of("response.reasoning_summary_part.added").len(), 1);
    assert_eq!(of("response.reasoning_summary_text.done")[0]["text"], "I am thinking.");
    assert_eq!(of("response.reasoning_summary_part.done")[0]["part"], summary[0]);
    assert_eq!(of("response.output_item.done")[0]["item"]["summary"], summary);
    insta::assert_snapshot!("responses, summary, streamed", settled(&streamed.body));
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
