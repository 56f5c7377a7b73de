//! Requests of all dialects.

use std::fs;

use ds4_text::{
    prompt::InputMessage,
    request::{self, Request, RequestError, chat, completions, messages, responses},
};
use serde_json::{Value, json};

use crate::support::read;

type Read = fn(Value) -> Result<Request, RequestError>;

const DIALECTS: [(&str, Read); 4] = [
    ("chat_request", chat::read),
    ("messages_request", messages::read),
    ("responses_request", responses::read),
    ("completions_request", completions::read),
];

/// Fuzzing begins with these: one that is refused leads nowhere.
#[test]
fn seeds_of_the_fuzz_targets_are_read() {
    for (target, read_request) in DIALECTS {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds");
        let mut seeds = 0;
        for seed in fs::read_dir(format!("{folder}/{target}")).unwrap() {
            let path = seed.unwrap().path();
            let request = request::parse(&read(&path)).and_then(read_request);
            assert!(request.is_ok(), "{}: {}", path.display(), request.unwrap_err());
            seeds += 1;
        }
        assert!(seeds >= 2, "{target}");
    }
}

#[test]
fn a_result_without_a_call_may_follow_a_call_without_a_result() {
    let request = json!({ "input": [
        { "role": "user", "content": "Hi" },
        { "type": "function_call", "call_id": "1", "name": "f", "arguments": "{}" },
        { "type": "function_call_output", "call_id": "2", "output": "r" },
    ] });
    let request = responses::read(request).unwrap();
    assert_eq!(request.options.warnings.len(), 2);
    let text = |message: &InputMessage| match message {
        InputMessage::User { content, .. } => content.as_str().to_owned(),
        _ => String::new(),
    };
    let messages = &request.converted.conversation.messages;
    let texts: Vec<_> = messages.iter().map(text).collect();
    assert_eq!(texts, ["Hi", "", "<tool_result>r</tool_result>"]);
}

/// What is not an object with messages, input or a prompt is refused by every dialect.
#[test]
fn values_that_are_no_requests_are_refused() {
    let values = ["null", "5", "\"x\"", "[]", "[{}]", "{}", r#"{"messages": {}, "prompt": {}}"#];
    for (dialect, read_request) in DIALECTS {
        for value in values {
            let request = request::parse(value.as_bytes()).and_then(read_request);
            assert!(request.is_err(), "{dialect}: {value}");
        }
    }
}
