//! Requests of all dialects.

use ds4_text::{
    prompt::InputMessage,
    request::{self, Request, RequestError, chat, completions, messages, responses},
};
use serde_json::{Value, json};

type Read = fn(Value) -> Result<Request, RequestError>;

const DIALECTS: [(&str, Read); 4] = [
    ("chat_request", chat::read),
    ("messages_request", messages::read),
    ("responses_request", responses::read),
    ("completions_request", completions::read),
];

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
