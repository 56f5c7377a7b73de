//! Writes the seed corpora: `cargo run --manifest-path fuzz/Cargo.toml --bin make_seeds`.

use std::{error::Error, fs, path::Path};

use ds4_model::{
    config::Config,
    synth::{self, Recipe},
};
use gguf::{Array, FileLayout, TensorSpec, TensorType, Value, Writer};

fn main() -> Result<(), Box<dyn Error>> {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    let write = |target: &str, name: &str, bytes: &[u8]| {
        fs::create_dir_all(seeds.join(target))?;
        fs::write(seeds.join(target).join(name), bytes)
    };
    let container = container()?;
    write("read_gguf", "everything", &container)?;
    write("read_gguf", "empty", &file(&[], &[])?)?;
    write("load_model", "model", &smallest_model()?)?;
    write("load_model", "everything", &container)?;
    for (dialect, name, request) in REQUESTS {
        write(dialect, name, request.as_bytes())?;
    }
    Ok(())
}

/// One layer, as narrow as the kernels allow.
fn smallest_model() -> Result<Vec<u8>, Box<dyn Error>> {
    let mut config = Config {
        vocab: 270,
        hidden: 32,
        heads: 1,
        q_rank: 32,
        output_groups: 1,
        output_rank: 32,
        experts: 1,
        experts_used: 1,
        expert_width: 32,
        ..synth::tiny()
    };
    config.layers.truncate(1);
    Ok(synth::write(&config, Recipe::Q8, 1, Vec::new(), |_| {})?)
}

/// Requests by dialect and name.
const REQUESTS: [(&str, &str, &str); 10] = [
    (
        "chat_request",
        "plain",
        r#"{"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": "max"}"#,
    ),
    (
        "chat_request",
        "tools",
        r#"{"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": [{"type": "input_text", "text": "t"}]},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
            {"function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "r"}, {"role": "tool", "tool_call_id": "2", "content": "r"}],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "strict": true, "parameters": {"type": "object"}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "stop": ["x"], "max_completion_tokens": 5}"#,
    ),
    (
        "chat_request",
        "format",
        r#"{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "{", "prefix": true}], "think": false,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}}"#,
    ),
    (
        "messages_request",
        "plain",
        r#"{"system": "x-anthropic-a\nb", "messages": [{"role": "user", "content": "Hi"}], "thinking": {"type": "enabled", "budget_tokens": 9}}"#,
    ),
    (
        "messages_request",
        "tools",
        r#"{"system": [{"type": "text", "text": "s"}], "messages": [{"role": "user", "content": [{"type": "text", "text": "t"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "h", "signature": "g"}, {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r"}, {"type": "tool_result", "tool_use_id": "2"}]}],
        "tools": [{"name": "f", "description": "d", "input_schema": {}}, {"type": "web_search_1", "name": "w"}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": true}, "stop_sequences": ["x"], "max_tokens": 5}"#,
    ),
    (
        "responses_request",
        "plain",
        r#"{"input": "Hi", "instructions": "s", "reasoning": {"effort": "low"}}"#,
    ),
    (
        "responses_request",
        "tools",
        r#"{"input": [{"role": "developer", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "json"}]},
        {"type": "reasoning", "encrypted_content": "ds4.1:aGk=", "summary": []},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}, {"type": "function_call_output", "call_id": "1", "output": "r"},
        {"type": "custom_tool_call", "call_id": "2", "name": "c", "input": "i"}, {"type": "function_call_output", "call_id": "3", "output": "r"}],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}, {"type": "custom", "name": "c", "format": {"type": "grammar", "definition": "g"}}],
        "tool_choice": {"type": "function", "name": "f"}, "text": {"format": {"type": "json_object"}}}"#,
    ),
    (
        "completions_request",
        "text",
        r#"{"prompt": "Once", "max_tokens": 5, "stop": ["x"], "logprobs": 2, "echo": true, "stream_options": {"include_usage": true}}"#,
    ),
    (
        "completions_request",
        "tokens",
        r#"{"prompt": [[1, 2, 3]], "n": 1, "suffix": "", "seed": -1}"#,
    ),
    ("completions_request", "one", r#"{"prompt": ["Once"], "temperature": 0.5, "top_k": 3}"#),
];

/// One metadata entry of each type and one tensor of each readable type.
fn container() -> Result<Vec<u8>, Box<dyn Error>> {
    let values = [
        Value::U8(1),
        Value::I8(-1),
        Value::U16(2),
        Value::I16(-2),
        Value::U32(3),
        Value::I32(-3),
        Value::F32(0.5),
        Value::Bool(true),
        Value::String("text".into()),
        Value::U64(4),
        Value::I64(-4),
        Value::F64(0.25),
        Value::Array(Array::String(vec!["a".into(), "b".into()])),
        Value::Array(Array::F32(vec![1.0, 2.0])),
    ];
    let metadata: Vec<_> =
        values.into_iter().enumerate().map(|(i, value)| (format!("key{i}"), value)).collect();
    let tensors: Vec<_> = TensorType::ALL
        .iter()
        .filter(|ty| ty.is_readable())
        .map(|ty| TensorSpec { name: ty.name().into(), dims: vec![256, 2], ty: *ty })
        .collect();
    file(&metadata, &tensors)
}

fn file(metadata: &[(String, Value)], tensors: &[TensorSpec]) -> Result<Vec<u8>, Box<dyn Error>> {
    let layout = FileLayout::new("seed", metadata, tensors)?;
    let mut writer = Writer::new(Vec::new(), layout.clone())?;
    for (i, tensor) in tensors.iter().enumerate() {
        let range = layout.tensor_range(i);
        let bytes: Vec<u8> = (0..range.end - range.start).map(|b| (b * 73 + 41) as u8).collect();
        writer.write_tensor(&tensor.name, &bytes)?;
    }
    Ok(writer.finish()?)
}
