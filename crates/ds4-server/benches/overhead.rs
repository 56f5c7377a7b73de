//! What serving adds to the steps of an engine: `cargo bench -p ds4-server`.
//!
//! Clients stream over HTTP from a backend that takes 3 ms a step, the pace of a real decode step,
//! over the real vocabulary. What lies between two steps, by the clock, is what serving adds to an
//! answer's time: sampling, grammars as far as they take longer than a step, and scheduling. The
//! scheduler's thread is not all the time on a processor then, for other threads help it, and
//! clients and everything else on the machine may hold it up: the median leaves most of that out.

#[path = "../tests/support/mod.rs"]
mod support;

use std::{fs::File, io::Read, sync::Arc, time::Duration};

use ds4_text::tokenizer::Tokenizer;
use flate2::read::GzDecoder;
use gguf::GgufFile;
use serde_json::{Value, json};
use support::{
    Running,
    client::post,
    config,
    scripted::{Timing, Work},
};

/// The tokenizer of the real model.
const TOKENIZER: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../ds4-text/tests/data/deepseek-v4-tokenizer.gguf.gz");

/// Tokens of each answer.
const TOKENS: usize = 400;

/// A decode step of the real model.
const STEP: Duration = Duration::from_millis(3);

fn main() {
    let tokenizer = tokenizer();
    println!("vocabulary of {} tokens, steps of {STEP:?}, {TOKENS} tokens each", tokenizer.len());
    println!("streams  answer       between steps  of 3 ms  a token  its thread on a processor");
    let schema = json!({ "type": "array", "items": { "type": "integer" } });
    let format = json!({ "type": "json_schema",
        "json_schema": { "name": "numbers", "schema": schema } });
    for streams in [1, 32] {
        for (name, options, script) in [
            ("greedy", json!({ "temperature": 0 }), "long"),
            ("sampled", json!({}), "long"),
            ("constrained", json!({ "response_format": format }), "numbers"),
        ] {
            measure(&tokenizer, streams, name, &options, script);
        }
    }
}

fn tokenizer() -> Arc<Tokenizer> {
    let mut bytes = Vec::new();
    let file = File::open(TOKENIZER).expect("the tokenizer is in the repository");
    GzDecoder::new(file).read_to_end(&mut bytes).expect("it is packed");
    let file = GgufFile::from_static("tokenizer", bytes.leak()).expect("it is a GGUF file");
    Arc::new(Tokenizer::from_gguf(&file, 129_280).expect("it has the model's tokens"))
}

fn measure(tokenizer: &Arc<Tokenizer>, streams: usize, name: &str, options: &Value, script: &str) {
    let timing = Timing { step: STEP, ..Timing::default() };
    let (running, work) = Running::watched(config(), timing, tokenizer.clone());
    let running = Arc::new(running);
    let mut body = json!({
        "messages": [{ "role": "user", "content": format!("[{script}]") }],
        "thinking": false, "max_tokens": TOKENS, "stream": true,
    });
    for (key, value) in options.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
    let client = |_| {
        let (running, body) = (running.clone(), body.clone());
        std::thread::spawn(move || {
            let reply = post(running.address, "/v1/chat/completions", &body);
            assert_eq!(reply.status, 200, "{}", reply.body);
        })
    };
    let clients: Vec<_> = (0..streams).map(client).collect();
    clients.into_iter().for_each(|client| client.join().expect("a client failed"));
    let done = work.take().expect("no step was taken");
    let (own_gap, own_between) = Work::own_time();
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let gap = micros(done.usual_gap().saturating_sub(own_gap));
    let share = gap / micros(STEP) * 100.0;
    let between = micros(done.between) / done.steps as f64 - micros(own_between);
    let token = gap * done.steps as f64 / (streams * TOKENS) as f64;
    println!(
        "{streams:7}  {name:11}  {gap:10.0} µs  {share:5.1} %  {token:4.0} µs  {between:10.0} µs"
    );
}
