//! Chat requests and dialogues.

use ds4_model::{
    chat::{ChatRequest, Dialogue, MAX_REQUEST_BYTES},
    profile::{Profile, Thinking},
    prompt::{EncodedPrompt, PromptEncoder, shared_prefix},
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::support::full;

const BOS: &str = "<｜begin▁of▁sentence｜>";
const EOS: &str = "<｜end▁of▁sentence｜>";

fn read(request: &Value) -> Result<(EncodedPrompt, Vec<String>), String> {
    let converted = ChatRequest::from_json(request.to_string().as_bytes())
        .and_then(ChatRequest::convert)
        .map_err(|error| error.to_string())?;
    let encoder = PromptEncoder::new(full(), Profile::V0731);
    Ok((encoder.encode(&converted.conversation).unwrap(), converted.warnings))
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
        "thinking": null, "temperature": 3, "stream": true,
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
fn tool_choice_selects_what_is_shown() {
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
    let named = render(request(json!({"type": "function", "function": {"name": "other"}})));
    assert!(named.ends_with("<｜DSML｜tool_calls>\n") && !named.contains("get_weather"));
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
    let (_, warnings) = read(&request).unwrap();
    assert_eq!(
        warnings,
        [
            "tool result lost has no call before it",
            "tool result  has no call before it",
            "tool call one has no result",
            "tool call  has no result",
        ]
    );
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
        (json!([]), "request: invalid length 0, expected struct ChatRequest with 8 elements"),
        (json!({}), "request: missing field `messages` at line 1 column 2"),
        (
            json!({"messages": []}),
            "request, messages: found an empty list, expected at least one message",
        ),
        (
            json!({"messages": [{"role": "user", "content": 5}]}),
            "request, messages[0].content: expected a string or a list of parts, each with a type",
        ),
        (json!({"messages": [{"content": "Hi"}]}), "request, messages[0]: missing field `role`"),
        (
            json!({"messages": [{"role": "function", "content": "Hi"}]}),
            "request, messages[0].role: found function, expected system, developer, user, assistant, tool or latest_reminder",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            "request, messages[0].content[0].type: found image_url, expected text: this model reads only text",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
            "request, messages[0].content[0].text: found nothing, expected a string",
        ),
        (
            json!({"messages": [{"role": "assistant", "prefix": true}, {"role": "user"}]}),
            "request, messages[0].prefix: found true in message 0, of role assistant, expected it only in the last message, of role assistant",
        ),
        (
            json!({"messages": [{"role": "user", "prefix": true}]}),
            "request, messages[0].prefix: found true in message 0, of role user, expected it only in the last message, of role assistant",
        ),
        (with(json!({"model": 5})), "request, model: invalid type: integer `5`, expected a string"),
        (
            with(json!({"reasoning_effort": "huge"})),
            "request, reasoning_effort: found huge, expected none, minimal, low, medium, high, xhigh, ultra or max",
        ),
        (
            with(json!({"thinking": {"type": "on"}})),
            "request, thinking.type: found on, expected enabled, adaptive or disabled",
        ),
        (
            with(json!({"thinking": "on"})),
            "request, thinking: expected true, false or an object with a type",
        ),
        (
            with(json!({"tool_choice": "any"})),
            "request, tool_choice: found any, expected none, auto, required or a function",
        ),
        (
            with(json!({"tool_choice": "required", "think": false})),
            "request, tool_choice: found required, expected a tool of the request",
        ),
        (
            with(json!({"tools": [weather_tool()], "tool_choice": "required"})),
            "request, tool_choice: found required, expected it only with thinking disabled",
        ),
        (
            with(json!({"tools": [weather_tool()], "think": false,
                "tool_choice": {"type": "function", "function": {"name": "other"}}})),
            "request, tool_choice.function.name: found other, expected a tool of the request",
        ),
        (
            with(json!({"tools": [{"type": "web_search"}]})),
            "request, tools[0].type: found web_search, expected function",
        ),
        (
            with(json!({"tools": [{"type": "function"}]})),
            "request, tools[0].function: found nothing, expected an object with a name",
        ),
        (
            function(json!({"name": "a b"})),
            "request, tools[0].function.name: found a b, expected 1 to 128 letters, digits, _ or -",
        ),
        (
            function(json!({"name": ""})),
            "request, tools[0].function.name: found , expected 1 to 128 letters, digits, _ or -",
        ),
        (
            function(json!({"name": "f", "parameters": [1]})),
            "request, tools[0].function.parameters: found [1], expected an object",
        ),
        (
            with(json!({"tools": [weather_tool(), weather_tool()]})),
            "request, tools[1].function.name: found get_weather, expected names that differ",
        ),
        (
            with(json!({"response_format": {"type": "xml"}})),
            "request, response_format.type: found xml, expected text, json_object, json_schema or regex",
        ),
        (
            with(json!({"response_format": {"type": "json_schema"}})),
            "request, response_format.json_schema: found nothing, expected a value",
        ),
    ];
    for (request, expected) in cases {
        let found = refusal(request.clone());
        assert!(found.starts_with(expected), "{request}\n found: {found}\n expected: {expected}");
        assert!(!found.contains('\n') && found.len() < 300);
    }
}

#[test]
fn json_that_is_none_or_too_much_is_refused() {
    let refused = |json: &[u8]| ChatRequest::from_json(json).map(|_| ()).unwrap_err().to_string();
    assert!(refused(b"").starts_with("request: EOF while parsing"));
    assert!(refused(b"{\"messages\": [\xFF]}").starts_with("request, messages[0]: "));
    assert!(refused(br#"{"messages": []} x"#).starts_with("request: trailing characters"));
    assert!(refused(br#"{"messages": [], "messages": []}"#).contains("duplicate field `messages`"));
    let surrogate = br#"{"messages": [{"role": "user", "content": "\ud800"}]}"#;
    assert!(refused(surrogate).starts_with("request, messages[0].content: "));
    let deep = format!(
        r#"{{"messages": [], "tools": [{{"type": "function", "function": {{"name": "f", "parameters": {}1{}}}}}]}}"#,
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    assert!(refused(deep.as_bytes()).contains("recursion limit exceeded"));
    let large = vec![b' '; MAX_REQUEST_BYTES + 1];
    assert_eq!(refused(&large), "request: found 67108865 bytes, expected at most 67108864");
}

#[test]
fn a_dialogue_grows_by_turns() {
    let encoder = PromptEncoder::new(full(), Profile::V0731);
    let encode = |dialogue: &Dialogue| encoder.encode(dialogue.conversation()).unwrap();

    let mut dialogue = Dialogue::new(Some("Be brief.".to_owned()), Thinking::Off);
    dialogue.ask("2+2?");
    let first = encode(&dialogue);
    assert_eq!(first.text, format!("{BOS}Be brief.<｜User｜>2+2?<｜Assistant｜></think>"));

    // Without thinking, the next prompt continues what the session holds.
    let mut session = first.ids.clone();
    session.extend(full().encode("4").unwrap());
    dialogue.answer("", "4");
    dialogue.ask("3+3?");
    let second = encode(&dialogue);
    assert_eq!(shared_prefix(&session, &second.ids), session.len());
    assert_eq!(
        full().decode(&second.ids[session.len()..]),
        format!("{EOS}<｜User｜>3+3?<｜Assistant｜></think>")
    );

    // With thinking, the answer before is rendered without its reasoning.
    dialogue.set_thinking(Thinking::Low);
    let mut session = encode(&dialogue).ids;
    let header = session.len() - 1;
    session.extend(full().encode_with_markers("easy</think>6").unwrap());
    dialogue.answer("easy", "6");
    dialogue.ask("4+4?");
    let third = encode(&dialogue);
    assert_eq!(shared_prefix(&session, &third.ids), header);
    assert_eq!(
        full().decode(&third.ids[header..]),
        format!("</think>6{EOS}<｜User｜>4+4?<｜Assistant｜><think>")
    );
}

proptest! {
    #[test]
    fn no_bytes_make_reading_a_request_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        let _ = ChatRequest::from_json(&bytes).and_then(ChatRequest::convert);
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
