//! Requests that are wrong in some way, with the status that each must get.

mod support;

use serde_json::{Value, json};
use support::{
    Running,
    client::{get, post_text, send_bytes},
    config,
};

const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";
const COMPLETIONS: &str = "/v1/completions";

/// A request with one field replaced.
fn with(path: &str, key: &str, value: Value) -> (String, String) {
    let mut body = match path {
        RESPONSES => json!({ "input": "[text]" }),
        COMPLETIONS => json!({ "prompt": "a" }),
        _ => json!({ "messages": [{ "role": "user", "content": "[text]" }] }),
    };
    body[key] = value;
    (path.to_owned(), body.to_string())
}

fn wrong_fields() -> Vec<(String, String)> {
    let mut cases = Vec::new();
    let all = [CHAT, MESSAGES, RESPONSES, COMPLETIONS];
    let not_numbers = [json!("1"), json!([]), json!({}), json!(true)];
    for path in all {
        for value in not_numbers.iter().cloned().chain([json!(-1), json!(2.5), json!(1e300)]) {
            cases.push(with(path, "temperature", value));
        }
        for value in not_numbers.iter().cloned().chain([json!(-0.1), json!(1.5)]) {
            cases.push(with(path, "top_p", value.clone()));
            cases.push(with(path, "min_p", value));
        }
        for value in [json!("x"), json!(-1), json!(1.5), json!(1u64 << 40)] {
            cases.push(with(path, "top_k", value));
        }
        for value in [json!("x"), json!(1.5), json!([1])] {
            cases.push(with(path, "seed", value));
        }
        for value in [json!("yes"), json!(1), json!([])] {
            cases.push(with(path, "stream", value));
        }
        for value in [json!(5), json!([]), json!({})] {
            cases.push(with(path, "model", value));
        }
        let limit = if path == RESPONSES { "max_output_tokens" } else { "max_tokens" };
        for value in [json!(0), json!(-5), json!("9"), json!(1.5), json!(1u64 << 40)] {
            cases.push(with(path, limit, value));
        }
    }
    for path in [CHAT, MESSAGES] {
        for value in [
            json!("hi"),
            json!(5),
            json!({}),
            json!([]),
            json!([1]),
            json!(["x"]),
            json!([[]]),
            json!([{}]),
            json!([{ "role": "user", "content": 5 }]),
            json!([{ "role": "wizard", "content": "x" }]),
            json!([{ "role": 7, "content": "x" }]),
            json!([{ "role": "user", "content": [1] }]),
            json!([{ "role": "user", "content": [{ "type": "smell" }] }]),
            json!([{ "role": "user", "content": [{ "text": "untyped" }] }]),
        ] {
            cases.push(with(path, "messages", value));
        }
        for value in [json!("x"), json!([1]), json!([{}]), json!([{ "name": 5 }])] {
            cases.push(with(path, "tools", value));
        }
        cases.push(with(path, "thinking", json!({ "type": "perhaps" })));
        cases.push(with(path, "thinking", json!(5)));
    }
    for value in [
        json!(5),
        json!({}),
        json!([]),
        json!([1]),
        json!([{}]),
        json!([{ "role": "wizard", "content": "" }]),
    ] {
        cases.push(with(RESPONSES, "input", value));
    }
    cases.push(with(RESPONSES, "previous_response_id", json!("resp_1")));
    cases.push(with(RESPONSES, "conversation", json!("conv_1")));
    for value in [
        json!(5),
        json!({}),
        json!([]),
        json!([-1]),
        json!([1.5]),
        json!(["a", "b"]),
        json!([[]]),
        json!([99999]),
    ] {
        cases.push(with(COMPLETIONS, "prompt", value));
    }
    cases.push(with(COMPLETIONS, "suffix", json!("x")));
    cases.push(with(COMPLETIONS, "logprobs", json!(21)));
    for (key, value) in [
        ("n", json!(2)),
        ("n", json!("1")),
        ("stop", json!(5)),
        ("stop", json!("")),
        ("stop", json!([""])),
        ("stop", json!(vec!["x"; 17])),
        ("top_logprobs", json!(3)),
        ("logprobs", json!(3)),
        ("response_format", json!("json")),
        ("response_format", json!({ "type": "xml" })),
        ("response_format", json!({ "type": "json_schema" })),
        ("response_format", json!({ "type": "json_schema", "json_schema": { "schema": 5 } })),
        (
            "response_format",
            json!({ "type": "json_schema", "json_schema": { "schema": { "type": "thing" } } }),
        ),
        ("response_format", json!({ "type": "regex", "regex": "(" })),
        ("response_format", json!({ "type": "regex" })),
        ("response_format", json!({ "type": "json_object" })),
        ("stream_options", json!({})),
        ("reasoning_effort", json!("enormous")),
        ("tool_choice", json!(5)),
        ("tools", json!([{ "type": "function", "function": { "name": "has space" } }])),
        ("tools", json!([{ "type": "function", "function": { "name": "" } }])),
        ("tools", json!([{ "type": "function", "function": { "name": "x".repeat(200) } }])),
        (
            "tools",
            json!([{ "type": "function", "function": { "name": "f", "parameters": { "type": "string" } } }]),
        ),
        (
            "tools",
            json!([{ "type": "function", "function": { "name": "f" } }, { "type": "function", "function": { "name": "f" } }]),
        ),
    ] {
        cases.push(with(CHAT, key, value));
    }
    cases
}

fn wrong_texts() -> Vec<&'static str> {
    vec![
        "",
        " ",
        "null",
        "true",
        "5",
        "\"x\"",
        "[]",
        "{",
        "{}",
        "}",
        "{\"messages\"}",
        "{\"messages\":}",
        "{'messages':[]}",
        "{\"messages\":[]}",
        "{\"a\":1,}",
        "{\"a\":1 \"b\":2}",
        "{\"a\":01}",
        "{\"a\":NaN}",
        "{\"a\":Infinity}",
        "{\"a\":1e999}",
        "{\"a\":\"\\ud800\"}",
        "{\"a\":\"\\x\"}",
        "{\"a\":\"\n\"}",
        "{\"a\":\"unended",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}garbage",
        "\u{feff}{}",
        "{\"messages\":null}",
        "//",
        "{}{}",
    ]
}

#[test]
fn every_wrong_request_gets_its_status() {
    let running = Running::scripted(config());
    let at = running.address;
    let mut cases = 0;
    let mut check = |what: &str, status: u16, expected: u16| {
        assert_eq!(status, expected, "{what:.300}");
        cases += 1;
    };
    for (path, body) in wrong_fields() {
        check(&format!("{path} {body}"), post_text(at, &path, &body, "").status, 400);
    }
    for text in wrong_texts() {
        for path in [CHAT, MESSAGES, RESPONSES, COMPLETIONS] {
            check(&format!("{path} {text}"), post_text(at, path, text, "").status, 400);
        }
    }
    for open in ["[", "{\"a\":", "[{\"a\":["] {
        check(open, post_text(at, CHAT, &open.repeat(10_000), "").status, 400);
    }
    let deep = format!("{{\"messages\":{}{}}}", "[".repeat(200), "]".repeat(200));
    check("deep", post_text(at, CHAT, &deep, "").status, 400);
    let many =
        json!({ "messages": vec![json!({ "role": "user", "content": "" }); 20_001] }).to_string();
    check("many messages", post_text(at, CHAT, &many, "").status, 400);
    let twice = "{\"messages\":5,\"messages\":[{\"role\":\"user\",\"content\":\"[text]\"}],\"max_tokens\":4}";
    check("a key twice: the last counts", post_text(at, CHAT, twice, "").status, 200);
    let host = format!("host: {at}\r\nconnection: close\r\n");
    let mut invalid =
        format!("POST {CHAT} HTTP/1.1\r\n{host}content-length: 2\r\n\r\n").into_bytes();
    invalid.extend([0xff, 0xfe]);
    check("no UTF-8", send_bytes(at, &invalid).status, 400);
    for (what, request, expected) in [
        (
            "both lengths",
            format!(
                "POST {CHAT} HTTP/1.1\r\n{host}content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
            ),
            400,
        ),
        (
            "two lengths",
            format!(
                "POST {CHAT} HTTP/1.1\r\n{host}content-length: 2\r\ncontent-length: 3\r\n\r\n{{}}"
            ),
            400,
        ),
        ("no length", format!("POST {CHAT} HTTP/1.1\r\n{host}content-length: x\r\n\r\n"), 400),
        (
            "negative length",
            format!("POST {CHAT} HTTP/1.1\r\n{host}content-length: -1\r\n\r\n"),
            400,
        ),
        (
            "unknown coding",
            format!("POST {CHAT} HTTP/1.1\r\n{host}transfer-encoding: gzip\r\n\r\n"),
            400,
        ),
        (
            "bad chunk",
            format!("POST {CHAT} HTTP/1.1\r\n{host}transfer-encoding: chunked\r\n\r\nxyz\r\n"),
            400,
        ),
        ("no version", format!("POST {CHAT}\r\n{host}\r\n"), 400),
        ("bad name", format!("GET /health HTTP/1.1\r\n{host}bad header: x\r\n\r\n"), 400),
        ("no host", "GET /v1/models HTTP/1.1\r\nconnection: close\r\n\r\n".to_owned(), 403),
        ("other method", format!("DELETE /v1/models HTTP/1.1\r\n{host}\r\n"), 405),
        ("not HTTP", "\u{1}\u{2}\u{3}\r\n\r\n".to_owned(), 400),
    ] {
        check(what, send_bytes(at, request.as_bytes()).status, expected);
    }
    let cut = format!("POST {CHAT} HTTP/1.1\r\n{host}content-length: 50\r\n\r\n{{");
    check("a body that never comes", send_bytes(at, cut.as_bytes()).status, 408);
    println!("{cases} cases");
    assert!(cases >= 200);
    assert_eq!(get(at, "/health").status, 200);
    assert!(!get(at, "/metrics").body.contains("status=\"500\""));
}
