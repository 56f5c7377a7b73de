//! The trace: one line of JSON per request, with everything that was said. Off unless asked for,
//! since nothing else writes down what users say.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use ds4_engine::TokenId;
use ds4_runtime::Failure;
use ds4_text::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::dialect::unix_time;

/// The open trace.
pub(crate) struct TraceFile(Mutex<File>);

impl TraceFile {
    /// Opens a trace, which others cannot read, and appends to it.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.create(true).append(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        options.open(path).map(|file| TraceFile(Mutex::new(file)))
    }
}

/// What becomes of one request.
pub(crate) struct TraceRecord {
    time: u64,
    since: Instant,
    body: Value,
    prompt: Option<String>,
    prompt_tokens: usize,
    cached: Option<usize>,
    prepared: f64,
    started: Option<f64>,
    first_token: Option<f64>,
}

impl TraceRecord {
    /// A request with this body.
    pub(crate) fn new(body: &[u8]) -> Self {
        TraceRecord {
            time: unix_time(),
            since: Instant::now(),
            body: serde_json::from_slice(body).unwrap_or_default(),
            prompt: None,
            prompt_tokens: 0,
            cached: None,
            prepared: 0.0,
            started: None,
            first_token: None,
        }
    }

    /// Its prompt.
    pub(crate) fn prompt(&mut self, text: String, tokens: usize) {
        (self.prompt, self.prompt_tokens) = (Some(text), tokens);
        self.prepared = self.since.elapsed().as_secs_f64();
    }

    /// Its turn has come.
    pub(crate) fn started(&mut self, cached: usize) {
        self.cached = Some(cached);
        self.started = Some(self.since.elapsed().as_secs_f64());
    }

    /// A token of its answer.
    pub(crate) fn token(&mut self) {
        self.first_token.get_or_insert_with(|| self.since.elapsed().as_secs_f64());
    }

    /// Writes the line.
    pub(crate) fn write(
        &self,
        file: &TraceFile,
        tokenizer: &Tokenizer,
        answer: &[TokenId],
        failure: Option<&Failure>,
    ) {
        let line = json!({
            "time": self.time,
            "request": self.body,
            "prompt": self.prompt,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached,
            "answer": tokenizer.decode(answer),
            "answer_tokens": answer.len(),
            "failure": failure.map(Failure::to_string),
            "seconds": {
                "prepared": self.prepared,
                "started": self.started,
                "first_token": self.first_token,
                "ended": self.since.elapsed().as_secs_f64(),
            },
        });
        let mut file = file.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = writeln!(file, "{line}") {
            tracing::error!(%error, "the trace could not be written");
        }
    }
}
