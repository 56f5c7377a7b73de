//! Chat Completions requests.

use deepseek_recipe_encoding::{PromptEncoding, dsv4::DeepseekV4Encoding};
use ds4_text::{
    profile::{Profile, Thinking},
    prompt::{EncodedPrompt, PromptEncoder},
    request,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{random, support::full};

const BOS: &str = "<｜begin▁of▁sentence｜>";
const EOS: &str = "<｜end▁of▁sentence｜>";

/// The prompt of a request, and what is odd about it.
fn read(request: &Value) -> Result<(EncodedPrompt, Vec<String>), String> {
    let encoder = PromptEncoder::new(full(), Profile::V0731);
    let read = request::parse(request.to_string().as_bytes()).and_then(request::chat::read);
    let read = read.map_err(|error| error.to_string())?;
    let prompt = read.encode(&encoder, &mut || ()).map_err(|error| error.to_string())?;
    Ok((prompt, read.options.warnings))
}

/// The prompt of a request without thinking.
fn render(mut request: Value) -> String {
    request["think"] = json!(false);
    read(&request).unwrap().0.text
}

/// What is said about a request.
fn refusal(request: Value) -> String {
    read(&request).unwrap_err()
}

fn weather_tool() -> Value {
    json!({"type": "function", "function": {
        "name": "get_weather",
        "description": "Current weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    }})
}

#[test]
fn the_reference_round_trip_can_be_requested() {
    let call = |arguments: Value| {
        json!({
            "model": "deepseek-v4-flash",
            "reasoning_effort": "low",
            "tools": [weather_tool()],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Weather in Oslo?"},
                {"role": "assistant", "content": "Checking.", "reasoning_content": "need tool",
                 "tool_calls": [{"id": "call_1", "type": "function",
                    "function": {"name": "get_weather", "arguments": arguments}}]},
                {"role": "tool", "tool_call_id": "call_1", "content": "cold"},
            ],
        })
    };
    let (text, warnings) = read(&call(json!(r#"{"city": "Oslo", "days": 2}"#))).unwrap();
    assert_eq!(text.ids.len(), 363);
    assert!(warnings.is_empty());
    // Arguments may be an object too.
    let (object, _) = read(&call(json!({"city": "Oslo", "days": 2}))).unwrap();
    assert_eq!(object, text);
}

#[test]
fn null_is_absent_and_unknown_fields_are_ignored() {
    let request = json!({
        "messages": [
            {"role": "user", "content": "Hi", "name": null, "cache_control": {"type": "x"}},
            {"role": "assistant", "content": null, "tool_calls": null, "reasoning_content": null},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        ],
        "tools": null, "tool_choice": null, "response_format": null, "reasoning_effort": null,
        "thinking": null, "no such field": 3, "stream": true,
    });
    let expected = format!(
        "{BOS}<｜User｜>Hi<｜Assistant｜></think>{EOS}<｜User｜>a\n\nb<｜Assistant｜></think>"
    );
    assert_eq!(render(request), expected);
}

#[test]
fn leading_developer_messages_are_system_text_and_later_ones_stay_in_place() {
    let request = json!({"messages": [
        {"role": "developer", "content": "d1"},
        {"role": "system", "content": "s1"},
        {"role": "developer", "content": "d2"},
        {"role": "user", "content": "u1"},
        {"role": "developer", "content": "d3"},
        {"role": "system", "content": "s2"},
    ]});
    let expected = format!("{BOS}d1\n\ns1\n\nd2\n\ns2<｜User｜>u1\n\nd3<｜Assistant｜></think>");
    assert_eq!(render(request), expected);
}

#[test]
fn thinking_follows_switch_then_effort_then_model() {
    let opening = |fields: Value| {
        let mut request = json!({"messages": [{"role": "user", "content": "Hi"}]});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let (prompt, _) = read(&request).unwrap();
        match (prompt.ids.len(), prompt.ids.last()) {
            (5, Some(128_822)) => Thinking::Off,
            (5, Some(128_821)) => Thinking::Low,
            (84, Some(128_821)) => Thinking::High,
            (97, Some(128_821)) => Thinking::Max,
            _ => panic!("{}", prompt.text),
        }
    };
    let cases = [
        (json!({}), Thinking::High),
        (json!({"reasoning_effort": "none"}), Thinking::Off),
        (json!({"reasoning_effort": "minimal"}), Thinking::Low),
        (json!({"reasoning_effort": "xhigh"}), Thinking::High),
        (json!({"reasoning_effort": "max"}), Thinking::Max),
        (json!({"thinking": false}), Thinking::Off),
        (json!({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}), Thinking::Off),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 5}}), Thinking::High),
        (json!({"thinking": {"type": "adaptive"}, "reasoning_effort": "low"}), Thinking::Low),
        (json!({"thinking": true, "reasoning_effort": "none"}), Thinking::High),
        (json!({"think": false}), Thinking::Off),
        (json!({"model": "deepseek-chat"}), Thinking::Off),
        (json!({"model": "deepseek-chat", "think": true}), Thinking::High),
        (json!({"model": "deepseek-reasoner"}), Thinking::High),
        (json!({"model": "gpt-5"}), Thinking::High),
    ];
    for (fields, expected) in cases {
        assert_eq!(opening(fields.clone()), expected, "{fields}");
    }
}

#[test]
fn tool_choice_decides_whether_the_prompt_begins_a_call() {
    let request = |choice: Value| {
        json!({
            "messages": [{"role": "user", "content": "Hi"}],
            "tools": [weather_tool(), {"type": "function", "function": {"name": "other"}}],
            "tool_choice": choice,
        })
    };
    let auto = render(request(json!("auto")));
    assert!(auto.contains("\"get_weather\"") && auto.ends_with("</think>"));
    assert!(auto.contains(r#"{"name": "other", "description": "", "parameters": {}}"#));
    assert_eq!(render(request(json!(null))), auto);
    assert_eq!(render(request(json!("none"))), format!("{BOS}<｜User｜>Hi<｜Assistant｜></think>"));
    let required = render(request(json!("required")));
    assert_eq!(required, format!("{auto}\n\n<｜DSML｜tool_calls>\n"));
    // Which tool is called is left to the grammar: the model sees all of them.
    let named = request(json!({"type": "function", "function": {"name": "other"}}));
    assert_eq!(render(named.clone()), required);
    // A call that must be made leaves no room for thinking.
    let (prompt, warnings) = read(&named).unwrap();
    assert_eq!(prompt.text, required);
    assert_eq!(warnings.len(), 1);
}

#[test]
fn empty_text_after_tool_results_keeps_its_empty_line() {
    let request = |messages: Value| {
        json!({ "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "r"},
            messages,
        ] })
    };
    let end = "<tool_result>r</tool_result>\n\n<｜Assistant｜></think>";
    for content in [json!(""), json!(null), json!([])] {
        let prompt = render(request(json!({"role": "user", "content": content})));
        assert!(prompt.ends_with(end), "{prompt}");
    }
}

#[test]
fn response_formats_are_rendered() {
    let request = |format: Value| json!({"messages": [{"role": "user", "content": "json"}], "response_format": format});
    let plain = render(request(json!(null)));
    assert_eq!(render(request(json!({"type": "text"}))), plain);
    assert_eq!(render(request(json!({"type": "regex", "regex": "a"}))), plain);
    let schema =
        json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"b": 1, "a": 2}}});
    assert!(render(request(schema)).contains("to reply:\n{\"b\": 1, \"a\": 2}<｜User｜>"));
    assert!(
        render(request(json!({"type": "json_object"}))).contains("JSON object ONLY.<｜User｜>")
    );
}

#[test]
fn an_answer_can_be_continued() {
    let request = json!({"messages": [
        {"role": "user", "content": "Count"},
        {"role": "assistant", "content": "1, 2", "reasoning": "up", "prefix": true},
    ], "reasoning_effort": "low"});
    let (prompt, _) = read(&request).unwrap();
    assert!(prompt.text.ends_with("<｜Assistant｜><think>up</think>1, 2"));
}

#[test]
fn histories_cut_short_are_warned_of() {
    let request = json!({"messages": [
        {"role": "tool", "tool_call_id": "lost", "content": "?"},
        {"role": "assistant", "tool_calls": [
            {"id": "one", "type": "function", "function": {"name": "f", "arguments": ""}},
            {"id": "two", "type": "function", "function": {"name": "f"}},
        ]},
        {"role": "tool", "tool_call_id": "two", "content": "done"},
        {"role": "tool", "content": "no id"},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {}}}]},
    ]});
    let (prompt, warnings) = read(&request).unwrap();
    let [no_call, no_result] =
        ["a tool result in the history has no call", "a tool call in the history has no result"];
    assert_eq!(warnings, [no_call, no_result], "once each");
    // Nothing is made up for a missing result, and a result without a call stays.
    assert_eq!(prompt.text.matches("<tool_result>").count(), 3, "{}", prompt.text);
}

#[test]
fn wrong_requests_are_refused_with_a_reason() {
    let user = || json!([{"role": "user", "content": "Hi"}]);
    let with = |fields: Value| {
        let mut request = json!({"messages": user()});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        request
    };
    let function =
        |function: Value| with(json!({"tools": [{"type": "function", "function": function}]}));
    let cases = [
        (json!([]), "the request body must be a JSON object"),
        (json!({}), "missing field `messages`"),
        (json!({"messages": []}), "Empty input messages"),
        (
            json!({"messages": [{"role": "user", "content": 5}]}),
            "messages[0]: content should be a string or a list",
        ),
        (json!({"messages": [{"content": "Hi"}]}), "messages[0]: missing field `role`"),
        (
            json!({"messages": [{"role": "wizard", "content": "Hi"}]}),
            "messages[0].role: unknown variant `wizard`",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
            "messages[0]: missing field `text`",
        ),
        (
            json!({"messages": [{"role": "assistant", "prefix": true}, {"role": "user"}]}),
            "Invalid completion message: prefix set true with message which is not final",
        ),
        (with(json!({"model": 5})), "model: expected a string"),
        (with(json!({"temperature": 3})), "temperature: expected a number from 0 to 2"),
        (with(json!({"reasoning_effort": "huge"})), "reasoning_effort: unknown variant `huge`"),
        (with(json!({"thinking": {"type": "on"}})), "thinking.type: unknown variant `on`"),
        (with(json!({"thinking": "on"})), "thinking: invalid type: string"),
        (with(json!({"tool_choice": "any"})), "tool_choice: expected one of `none`, `auto`"),
        (with(json!({"tools": [{"type": "web_search"}]})), "tools[0].type: unknown variant"),
        (with(json!({"tools": [{"type": "function"}]})), "tools[0]: missing field `function`"),
        (function(json!({"name": "a b"})), "Invalid 'tools[0].function.name'"),
        (function(json!({"name": ""})), "Invalid 'tools[0].function.name'"),
        (function(json!({"name": "f", "parameters": [1]})), "Invalid schema for function 'f'"),
        (function(json!({"name": "f", "parameters": {}})), "Invalid schema for function 'f'"),
        (with(json!({"tools": [weather_tool(), weather_tool()]})), "Tool names must be unique."),
        (with(json!({"response_format": {"type": "xml"}})), "response_format.type: unknown"),
        (with(json!({"response_format": {"type": "json_schema"}})), "response_format: missing"),
        (
            with(json!({"reasoning_effort": format!("a\nb\u{1b}[1m{}", "c".repeat(10_000))})),
            "reasoning_effort: unknown variant `a\\nb\\u{1b}[1mccc",
        ),
    ];
    for (request, expected) in cases {
        let found = refusal(request.clone());
        assert!(found.starts_with(expected), "{request}\n found: {found}\n expected: {expected}");
        assert!(!found.contains(char::is_control) && found.chars().count() < 600);
    }
}

#[test]
fn json_that_is_none_or_too_deep_is_refused() {
    let refused = |json: &[u8]| request::parse(json).unwrap_err().to_string();
    assert!(refused(b"").starts_with("the request body is no JSON: EOF while parsing"));
    assert!(refused(b"{\"messages\": [\xFF]}").starts_with("the request body is no JSON: "));
    assert!(refused(br#"{"messages": []} x"#).contains("trailing characters"));
    assert!(refused(br#""\ud800""#).contains("hex escape"));
    let deep = "[".repeat(100_000);
    assert!(refused(deep.as_bytes()).contains("recursion limit exceeded"));
    let twice = br#"{"a": 1, "a": 2}"#;
    assert_eq!(request::parse(twice).unwrap(), json!({ "a": 2 }), "the last value counts");
}

/// What DeepSeek's library writes for the conversation of a request.
fn by_the_library(request: &Value) -> Result<String, String> {
    let request = request::chat::read(request.clone()).map_err(|error| error.to_string())?;
    let conversation = &request.converted.conversation;
    Ok(DeepseekV4Encoding::new().render_conversation(conversation).prompt)
}

proptest! {
    #[test]
    fn complete_histories_render_as_the_library_has_them(request in random::complete_chat_requests()) {
        let found = read(&request).map(|(prompt, _)| prompt.text);
        prop_assert_eq!(found, by_the_library(&request));
    }

    #[test]
    fn no_request_makes_reading_it_panic(request in random::chat_requests()) {
        if let Ok((prompt, _)) = read(&request) {
            prop_assert_eq!(full().decode(&prompt.ids), prompt.text);
        }
    }

    #[test]
    fn no_bytes_make_reading_a_request_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        let _ = request::parse(&bytes).and_then(request::chat::read);
    }

    #[test]
    fn any_content_stays_between_its_markers(content in any::<String>(), reasoning in any::<String>()) {
        let request = json!({
            "messages": [
                {"role": "system", "content": content},
                {"role": "user", "content": content},
                {"role": "assistant", "content": content, "reasoning_content": reasoning,
                 "tool_calls": [{"id": "1", "function": {"name": content, "arguments": content}}]},
                {"role": "tool", "tool_call_id": "1", "content": content},
            ],
            "tools": [weather_tool()],
        });
        let (prompt, _) = read(&request).unwrap();
        prop_assert_eq!(full().decode(&prompt.ids), prompt.text);
    }
}
