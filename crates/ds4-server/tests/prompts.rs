//! A request means the same prompt wherever it is read: what `ds4 tokenize --chat` shows is what
//! the server computes.

mod support;

#[path = "../../ds4-text/tests/text/random.rs"]
mod random;

use std::{
    fs::File,
    io::{BufRead, BufReader},
};

use ds4_text::{
    profile::Profile,
    prompt::{EncodedPrompt, PromptEncoder},
    request::{self, RequestError},
};
use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};
use serde_json::{Value, json};
use support::{Running, client::post, config, tokenizer};

const REQUESTS: usize = 300;

/// The prompt that `ds4 tokenize --chat` shows the tokens of.
fn shown(encoder: &PromptEncoder, body: &Value) -> Result<EncodedPrompt, RequestError> {
    let request = request::chat::read(request::parse(body.to_string().as_bytes())?)?;
    request.encode(encoder, &mut || ())
}

#[test]
fn random_chat_requests_have_the_prompts_that_are_shown() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let mut config = config();
    config.trace = Some(trace.clone());
    let running = Running::scripted(config);
    let mut trace = BufReader::new(File::open(trace).unwrap());
    let encoder = PromptEncoder::new(tokenizer(), Profile::Preview);
    let (requests, complete) = (random::chat_requests(), random::complete_chat_requests());
    let requests = requests.boxed().prop_union(complete.boxed());
    let mut runner = TestRunner::deterministic();
    let mut served = 0;
    for _ in 0..REQUESTS {
        let mut body = requests.new_tree(&mut runner).unwrap().current();
        body["max_tokens"] = json!(1);
        let reply = post(running.address, "/v1/chat/completions", &body);
        match shown(&encoder, &body) {
            Ok(prompt) if reply.status == 200 => {
                let mut line = String::new();
                trace.read_line(&mut line).unwrap();
                let traced: Value = serde_json::from_str(&line).unwrap();
                assert_eq!(traced["prompt"], prompt.text, "{body}");
                assert_eq!(traced["prompt_tokens"], prompt.ids.len(), "{body}");
                assert_eq!(reply.json()["usage"]["prompt_tokens"], prompt.ids.len(), "{body}");
                served += 1;
            }
            Ok(_) => {
                assert_eq!(reply.status, 400, "{body}");
                assert!(reply.body.contains("this constraint cannot be enforced"), "{body}");
            }
            Err(error) => {
                assert_eq!(reply.status, 400, "{body}");
                assert_eq!(reply.json()["error"]["message"], error.to_string(), "{body}");
            }
        }
    }
    println!("{served} of {REQUESTS} requests were served");
    assert!(served > REQUESTS / 2);
}
