//! An answer as JSON, for programs.

use std::io::{self, Write};

use anyhow::Result;
use ds4_engine::{TokenId, sampling::TokenLogprob};
use ds4_runtime::AnswerToken;
use ds4_text::tokenizer::Tokenizer;
use serde::Serialize;

use super::turn::{Finish, Speed, Turn};

#[derive(Serialize)]
struct Report<'a> {
    text: &'a str,
    reasoning: &'a str,
    finish: Finish,
    seed: u64,
    token_ids: Vec<TokenId>,
    prompt_tokens: usize,
    answer_tokens: usize,
    prefill: Rate,
    decode: Rate,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Vec<Logprobs>>,
}

#[derive(Serialize)]
struct Rate {
    tokens: usize,
    seconds: f64,
    tokens_per_second: f64,
}

#[derive(Serialize)]
struct Logprobs {
    #[serde(flatten)]
    token: Logprob,
    top: Vec<Logprob>,
}

#[derive(Serialize)]
struct Logprob {
    id: TokenId,
    text: String,
    bytes: Vec<u8>,
    logprob: f32,
}

/// Prints the turn to stdout.
pub fn print(tokenizer: &Tokenizer, turn: &Turn, seed: u64) -> Result<()> {
    let logprob = |t: TokenLogprob| {
        let bytes = tokenizer.bytes_of(t.token).unwrap_or_default().to_vec();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Logprob { id: t.token, text, bytes, logprob: t.logprob }
    };
    let logprobs = |drawn: &AnswerToken| {
        let (own, top) = drawn.logprobs.as_ref()?;
        let own = TokenLogprob { token: drawn.token, logprob: *own };
        Some(Logprobs { token: logprob(own), top: top.iter().copied().map(logprob).collect() })
    };
    let report = Report {
        text: &turn.output.answer,
        reasoning: &turn.output.reasoning,
        finish: turn.finish,
        seed,
        token_ids: turn.tokens.iter().map(|drawn| drawn.token).collect(),
        prompt_tokens: turn.prompt,
        answer_tokens: turn.tokens.len(),
        prefill: rate(turn.prefill()),
        decode: rate(turn.decode()),
        logprobs: turn.tokens.iter().map(logprobs).collect(),
    };
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, &report)?;
    writeln!(out)?;
    Ok(())
}

fn rate(speed: Speed) -> Rate {
    Rate {
        tokens: speed.tokens,
        seconds: speed.time.as_secs_f64(),
        tokens_per_second: speed.per_second(),
    }
}
