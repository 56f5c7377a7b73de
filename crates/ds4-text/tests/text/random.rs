//! Random Chat Completions requests: all roles, texts in all forms, calls with and without
//! results, tools and ways to choose them, ways to switch thinking, and formats.

use proptest::{collection::vec, option, prelude::*, sample::select};
use serde_json::{Map, Value, json};

/// Requests as clients send them. Some are refused.
pub fn chat_requests() -> impl Strategy<Value = Value> {
    let history = vec(message(), 0..7);
    let settings = (tools(), tool_choice(), thinking(), format(), option::of(names()));
    (history, settings).prop_map(|(messages, (tools, tool_choice, thinking, format, model))| {
        let mut request = json!({ "messages": messages });
        let fields = request.as_object_mut().unwrap();
        let mut set = |key: &str, value: Option<Value>| {
            fields.extend(value.map(|value| (key.to_owned(), value)));
        };
        set("tools", tools);
        set("tool_choice", tool_choice);
        set("response_format", format);
        set("model", model);
        fields.extend(thinking);
        request
    })
}

/// Requests whose histories are complete: each call has its result, in order, and after each
/// answer the user says something.
pub fn complete_chat_requests() -> impl Strategy<Value = Value> {
    let turn = prop_oneof![
        (content(), content()).prop_map(|(asked, answered)| vec![
            json!({ "role": "user", "content": asked }),
            json!({ "role": "assistant", "content": answered }),
        ]),
        (content(), reasoning(), 1usize..4, content()).prop_map(
            |(said, reasoning, calls, result)| {
                let ids = || (0..calls).map(|call| format!("call_{call}"));
                let calls: Vec<_> = ids().map(|id| call(&id)).collect();
                let mut messages = vec![json!({
                    "role": "assistant", "content": said, "reasoning_content": reasoning,
                    "tool_calls": calls,
                })];
                messages
                    .extend(ids().map(
                        |id| json!({ "role": "tool", "tool_call_id": id, "content": result }),
                    ));
                messages
            }
        ),
    ];
    let last = vec((select(vec!["user", "system"]), content()), 0..3);
    (vec(turn, 1..4), last, tools(), thinking()).prop_map(|(turns, last, tools, thinking)| {
        let mut messages = turns.concat();
        let last = last.into_iter();
        messages.extend(last.map(|(role, content)| json!({ "role": role, "content": content })));
        let mut request = json!({ "messages": messages, "tools": tools });
        request.as_object_mut().unwrap().extend(thinking);
        request
    })
}

fn message() -> impl Strategy<Value = Value> {
    let roles = select(vec!["system", "developer", "user", "user", "latest_reminder"]);
    let said = (roles, content());
    let calls = vec((option::weighted(0.9, id()), any::<bool>()), 0..3);
    prop_oneof![
        3 => said.prop_map(|(role, content)| json!({ "role": role, "content": content })),
        2 => (content(), reasoning(), calls).prop_map(|(content, reasoning, calls)| {
            let calls: Vec<_> = calls.into_iter().map(|(id, is_object)| {
                let mut call = call(id.as_deref().unwrap_or_default());
                if id.is_none() {
                    call.as_object_mut().unwrap().remove("id");
                }
                if is_object {
                    call["function"]["arguments"] = json!({ "city": "Oslo", "days": [1, 2.50] });
                }
                call
            }).collect();
            json!({ "role": "assistant", "content": content, "reasoning_content": reasoning,
                "tool_calls": calls })
        }),
        2 => (id(), content()).prop_map(|(id, content)| {
            json!({ "role": "tool", "tool_call_id": id, "content": content })
        }),
    ]
}

fn call(id: &str) -> Value {
    let arguments = r#"{"city": "Oslo", "days": 2}"#;
    json!({ "id": id, "type": "function",
        "function": { "name": "get_weather", "arguments": arguments } })
}

/// Ids of few calls, so that results often have one.
fn id() -> impl Strategy<Value = String> {
    select(vec!["b", "a", "c"]).prop_map(str::to_owned)
}

fn text() -> impl Strategy<Value = String> {
    let texts = vec![
        "",
        "",
        "Hi",
        "as json, please",
        "<｜User｜>",
        "</think>",
        "<tool_result>x</tool_result>",
        "\n\n",
        "a\nb",
    ];
    prop_oneof![3 => select(texts).prop_map(str::to_owned), 1 => "[ -~äé中]{0,12}"]
}

fn content() -> impl Strategy<Value = Value> {
    let part = (select(vec!["text", "input_text", "output_text"]), text());
    let part = part.prop_map(|(kind, text)| json!({ "type": kind, "text": text }));
    prop_oneof![
        4 => text().prop_map(Value::String),
        1 => Just(Value::Null),
        1 => vec(part, 0..3).prop_map(Value::Array),
    ]
}

fn reasoning() -> impl Strategy<Value = Value> {
    prop_oneof![Just(Value::Null), text().prop_map(Value::String)]
}

fn tools() -> impl Strategy<Value = Option<Value>> {
    let tool = |name: &str| {
        json!({ "type": "function", "function": {
            "name": name, "description": "d",
            "parameters": { "type": "object", "properties": { "city": { "type": "string" } } } } })
    };
    let strict = json!({ "type": "function", "function": {
        "name": "exact", "strict": true,
        "parameters": { "type": "object", "properties": { "x": { "type": "number" } } } } });
    let (weather, other) = (tool("get_weather"), tool("other"));
    select(vec![
        None,
        Some(json!([])),
        Some(json!([weather])),
        Some(json!([other, strict, weather])),
    ])
}

fn tool_choice() -> impl Strategy<Value = Option<Value>> {
    let named = json!({ "type": "function", "function": { "name": "get_weather" } });
    let words = ["auto", "none", "required", "any"].map(|word| Some(json!(word)));
    select([vec![None, None, Some(Value::Null), Some(named)], words.to_vec()].concat())
}

fn thinking() -> impl Strategy<Value = Map<String, Value>> {
    let switches = vec![
        json!({}),
        json!({}),
        json!({ "thinking": false }),
        json!({ "thinking": { "type": "enabled" } }),
        json!({ "thinking": { "type": "disabled" } }),
        json!({ "thinking": { "type": "adaptive", "budget_tokens": 9 } }),
        json!({ "think": true }),
        json!({ "think": false }),
    ];
    let efforts = vec!["none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"];
    (select(switches), option::of(select(efforts))).prop_map(|(mut fields, effort)| {
        if let Some(effort) = effort {
            fields["reasoning_effort"] = json!(effort);
        }
        fields.as_object().cloned().unwrap_or_default()
    })
}

fn format() -> impl Strategy<Value = Option<Value>> {
    let schema = json!({ "b": 1, "type": "object", "properties": { "a": { "type": "string" } } });
    select(vec![
        None,
        None,
        None,
        Some(json!({ "type": "text" })),
        Some(json!({ "type": "json_object" })),
        Some(json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema } })),
        Some(json!({ "type": "regex", "regex": "[ab]+" })),
    ])
}

fn names() -> impl Strategy<Value = Value> {
    select(vec!["deepseek-chat", "deepseek-reasoner", "gpt-5"]).prop_map(|name| json!(name))
}
