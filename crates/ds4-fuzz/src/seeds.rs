//! Right inputs of every target, from which mutations start.

use std::{collections::BTreeMap, fs};

use ds4_convert::{Error, ModelMetadata, Options, Plan, Recipe, Source};
use ds4_engine::{Phase, Work};
use gguf::{Array, FileLayout, GgufFile, TensorSpec, TensorType, Value, Writer};
use serde_json::{Map, json};

use crate::models;

/// A right input.
pub struct Seed {
    /// The target that it is meant for.
    pub target: &'static str,
    /// Its name, different from the others of the target.
    pub name: &'static str,
    /// What it is.
    pub bytes: Vec<u8>,
}

/// All seeds; the same ones every time.
///
/// # Panics
/// If a seed cannot be made, which only a change of the crates under test can bring about.
pub fn all() -> Vec<Seed> {
    let mut seeds = Vec::new();
    let mut add = |target, name, bytes| seeds.push(Seed { target, name, bytes });
    let model = models::file(&models::smallest()).expect("the smallest model");
    add("read_gguf", "everything", container());
    add("read_gguf", "empty", file(&[], &[]));
    add("load_model", "model", model.clone());
    add("safetensors", "checkpoint", checkpoint(&model));
    add("imatrix", "dat", importance_dat());
    add("imatrix", "gguf", importance_gguf());
    add("snapshot", "short", snapshot(3));
    add("snapshot", "long", snapshot(150));
    for (target, name, text) in REQUESTS {
        add(target, name, text.into());
    }
    for (name, text) in SCHEMAS {
        add("json_schema", name, text.into());
    }
    seeds
}

/// Requests of each dialect: target, name, body.
const REQUESTS: [(&str, &str, &str); 10] = [
    (
        "chat_request",
        "plain",
        r#"{"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": "max"}"#,
    ),
    (
        "chat_request",
        "tools",
        r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "t"}]},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "r"}],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
        "tool_choice": "auto"}"#,
    ),
    (
        "chat_request",
        "format",
        r#"{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "{", "prefix": true}],
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
    ("completions_request", "one", r#"{"prompt": ["Once"], "temperature": 0.5, "top_k": 3}"#),
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
];

const SCHEMAS: [(&str, &str); 5] = [
    (
        "object",
        r#"{"type": "object", "properties": {"a": {"type": "integer", "minimum": -3, "maximum": 70},
        "b": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 4}},
        "required": ["a"], "additionalProperties": false}"#,
    ),
    ("text", r#"{"type": "string", "pattern": "^(red|gr[ae]y)+[0-9]{2,5}$", "maxLength": 20}"#),
    ("choices", r#"{"anyOf": [{"enum": [1, "a", null]}, {"const": {"x": [true]}}]}"#),
    (
        "references",
        r##"{"$defs": {"t": {"type": "object", "properties": {"next": {"$ref": "#/$defs/t"}}}}, "$ref": "#/$defs/t"}"##,
    ),
    ("format", r#"{"allOf": [{"type": "string", "format": "date-time"}, {"minLength": 3}]}"#),
];

/// One metadata entry of each type and one tensor of each readable type.
fn container() -> Vec<u8> {
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

fn file(metadata: &[(String, Value)], tensors: &[TensorSpec]) -> Vec<u8> {
    let layout = FileLayout::new("seed", metadata, tensors).expect("a layout");
    let mut writer = Writer::new(Vec::new(), layout.clone()).expect("a header");
    for (i, tensor) in tensors.iter().enumerate() {
        let range = layout.tensor_range(i);
        let bytes: Vec<u8> = (0..range.end - range.start).map(|b| (b * 73 + 41) as u8).collect();
        writer.write_tensor(&tensor.name, &bytes).expect("a tensor");
    }
    writer.finish().expect("a file")
}

/// Sums and counts of one tensor, all of them the float of bytes 0x3f.
fn importance_gguf() -> Vec<u8> {
    let spec = |name: &str, dims| TensorSpec { name: name.into(), dims, ty: TensorType::F32 };
    let tensors = [
        spec("blk.0.ffn_gate_exps.weight.in_sum2", vec![32, 2]),
        spec("blk.0.ffn_gate_exps.weight.counts", vec![1, 2]),
    ];
    let metadata = [
        ("imatrix.chunk_count".to_owned(), Value::U32(7)),
        ("imatrix.datasets".to_owned(), Value::Array(Array::String(vec!["text".into()]))),
    ];
    let layout = FileLayout::new("seed", &metadata, &tensors).expect("a layout");
    let mut writer = Writer::new(Vec::new(), layout).expect("a header");
    for (tensor, values) in tensors.iter().zip([64, 2]) {
        writer.write_tensor(&tensor.name, &vec![0x3f; 4 * values]).expect("a tensor");
    }
    writer.finish().expect("a file")
}

fn importance_dat() -> Vec<u8> {
    let mut out = 1i32.to_le_bytes().to_vec();
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as i32).to_le_bytes());
        out.extend(text.as_bytes());
    };
    text(&mut out, "blk.0.ffn_gate_exps.weight");
    out.extend([2i32, 4].iter().flat_map(|count| count.to_le_bytes()));
    out.extend([1f32, 2.0, 3.0, 4.0].iter().flat_map(|value| value.to_le_bytes()));
    out.extend(7i32.to_le_bytes());
    text(&mut out, "text.txt");
    out
}

/// A session after `tokens` tokens.
fn snapshot(tokens: usize) -> Vec<u8> {
    let engine = models::engine();
    let tokens: Vec<u32> = (0..tokens as u32).map(|i| i * 7 % 256).collect();
    let mut session = engine.new_session().expect("a session");
    let phase = Phase::Prefill;
    let work = Work { session: &mut session, tokens: &tokens, phase, wanted: &[] };
    engine.step(&mut [work]).expect("a step");
    engine.snapshot(&session).expect("a snapshot")
}

/// The model in `template` as a checkpoint of zeros, with matrices of every kind of storage. What
/// it has to hold is asked of the reader, one complaint after the other.
fn checkpoint(template: &[u8]) -> Vec<u8> {
    let template = GgufFile::from_vec("template", template.to_vec()).expect("the template");
    let metadata = ModelMetadata::from_gguf(&template).expect("its metadata");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.safetensors");
    let mut tensors: BTreeMap<String, (&str, Vec<usize>)> = BTreeMap::new();
    loop {
        let bytes = safetensors(&tensors);
        fs::write(&path, &bytes).expect("a temporary file");
        let source = Source::open(std::slice::from_ref(&path)).expect("a checkpoint");
        let options = Options { recipe: Recipe::Q8, overrides: Vec::new(), importance: None };
        match Plan::new("seed", &source, &metadata, options) {
            Ok(_) => return bytes,
            Err(Error::MissingTensor { tensor, .. }) => {
                let storage = storage(&tensor);
                assert!(tensors.insert(tensor, (storage, vec![2, 2])).is_none());
            }
            Err(Error::TensorShape { tensor, expected, .. }) => {
                tensors.get_mut(&tensor).expect("a known tensor").1 = expected;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn storage(tensor: &str) -> &'static str {
    let is = |end: &str| tensor.ends_with(end);
    match () {
        () if is("tid2eid") => "I64",
        () if is(".scale") => "U8",
        () if is("wq_b.weight") => "F8_E4M3",
        () if tensor.contains(".experts.") => "I8",
        () if is("norm.weight") => "F32",
        () => "BF16",
    }
}

fn safetensors(tensors: &BTreeMap<String, (&str, Vec<usize>)>) -> Vec<u8> {
    let (mut header, mut end) = (Map::new(), 0);
    for (name, (storage, shape)) in tensors {
        let size = match *storage {
            "I64" => 8,
            "F32" => 4,
            "BF16" => 2,
            _ => 1,
        };
        let start = end;
        end += size * shape.iter().product::<usize>();
        let info = json!({ "dtype": storage, "shape": shape, "data_offsets": [start, end] });
        header.insert(name.clone(), info);
    }
    let header = serde_json::Value::Object(header).to_string();
    let length = (header.len() as u64).to_le_bytes();
    [length.as_slice(), header.as_bytes(), &vec![0; end]].concat()
}
