//! Answers: what the scheduler's events become, as a stream or as a whole.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_stream::stream;
use axum::{
    body::{Body, Bytes},
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::Response,
};
use deepseek_recipe::{
    request::ConversationRequest,
    stream::{
        InferenceChunk, InferenceFinishReason, InferenceTokenLogprob, PromptUsage, StreamError,
        StreamProcessor,
    },
};
use ds4_engine::TokenId;
use ds4_runtime::{AnswerToken, ClientId, Event, Events, Failure, Finish};
use ds4_text::request::{self, Request};
use futures_util::{Stream, StreamExt};
use serde_json::Value;

use super::{
    error::ApiError,
    job::{self, Prepared},
    preparing::prepared,
    recorder::Recorder,
    state::App,
    token_text::TokenText,
    trace::TraceRecord,
};
use crate::dialect::{Chunk, PromptTokens, Reply, Understood};

/// How long a stream may be silent.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Says what is odd about a request.
static WARNING: HeaderName = HeaderName::from_static("x-ds4-warning");

/// Answers a request in a dialect.
pub(crate) async fn answer<R: Reply>(
    app: Arc<App>,
    client: ClientId,
    body: Bytes,
) -> Result<Response, ApiError> {
    let preparing = app.clone();
    let prepared = prepared(move || {
        let mut trace = preparing.trace.as_ref().map(|_| TraceRecord::new(&body));
        let Understood { mut request, reply } = R::understand(request::parse(&body)?)?;
        preparing.replay.restore_reasoning(&mut request.converted.conversation);
        let Prepared { job, opening, prompt_text } = job::prepare(&preparing, client, &request)?;
        if let Some(trace) = &mut trace {
            trace.prompt(prompt_text, job.prompt.len());
        }
        Ok((request, reply, job, opening, trace))
    });
    let (Request { converted, options }, reply, job, opening, trace) = prepared.await?;
    let prompt_tokens = job.prompt.len();
    let events = app.runtime.submit(job)?;
    let progress = Arc::new(Progress::new(prompt_tokens, trace));
    let has_tools = converted.parsing_options.parse_tool_calls;
    let dialect = reply.generator(&converted);
    let recorder = Recorder::<R>::new(dialect, app.clone(), progress.clone(), opening, has_tools);
    let chunks = chunks(recorder, &converted, events);
    let mut response = if options.stream {
        stream_response(app, reply, chunks, progress)
    } else {
        whole_response(app, reply, chunks, progress).await?
    };
    for warning in &options.warnings {
        if let Ok(value) = HeaderValue::from_str(warning) {
            response.headers_mut().append(&WARNING, value);
        }
        tracing::warn!("{warning}");
    }
    Ok(response)
}

/// What is known of an answer besides its chunks.
pub(super) struct Progress {
    prompt: usize,
    cached: AtomicUsize,
    answered: Mutex<Vec<TokenId>>,
    failure: Mutex<Option<Failure>>,
    trace: Mutex<Option<TraceRecord>>,
}

impl Progress {
    fn new(prompt: usize, trace: Option<TraceRecord>) -> Self {
        Progress {
            prompt,
            cached: AtomicUsize::new(0),
            answered: Mutex::default(),
            failure: Mutex::default(),
            trace: Mutex::new(trace),
        }
    }

    fn prompt_tokens(&self) -> PromptTokens {
        PromptTokens { all: self.prompt, cached: self.cached.load(Ordering::Relaxed) }
    }

    /// The tokens of the answer so far.
    pub(super) fn tokens(&self) -> MutexGuard<'_, Vec<TokenId>> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failure(&self) -> Option<Failure> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn fail(&self, failure: Failure) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
    }

    fn with_trace(&self, note: impl FnOnce(&mut TraceRecord)) {
        if let Some(trace) = &mut *self.trace.lock().unwrap_or_else(PoisonError::into_inner) {
            note(trace);
        }
    }
}

/// The dialect's chunks. After a failure they end early, and the recorder's progress knows why.
fn chunks<R: Reply>(
    recorder: Recorder<R>,
    request: &ConversationRequest,
    events: Events,
) -> impl Stream<Item = Result<Chunk<R>, StreamError>> + Send + use<R> {
    let tokenizer = recorder.app.encoder.tokenizer().clone();
    let progress = recorder.progress.clone();
    StreamProcessor::new(recorder, request.parsing_options.clone())
        .with_tokenizer(TokenText(tokenizer))
        .into_protocol_stream(inference(events, progress))
}

/// The scheduler's events as the output parser wants them.
fn inference(
    mut events: Events,
    progress: Arc<Progress>,
) -> impl Stream<Item = InferenceChunk> + Send {
    stream! {
        while let Some(event) = events.next().await {
            match event {
                Event::Started { cached } => {
                    progress.cached.store(cached, Ordering::Relaxed);
                    progress.with_trace(|trace| trace.started(cached));
                    let prompt_usage = PromptUsage {
                        prompt_tokens: progress.prompt,
                        prompt_cache_hit_tokens: cached,
                    };
                    yield InferenceChunk::Ready { system_fingerprint: None, prompt_usage };
                }
                Event::Prefill { .. } => {}
                Event::Token(token) => {
                    progress.tokens().push(token.token);
                    progress.with_trace(|trace| trace.token());
                    yield tokens(token);
                }
                Event::Finished(finish) => {
                    let finish_reason = match finish {
                        Finish::Stop => InferenceFinishReason::Stop,
                        Finish::Length => InferenceFinishReason::Length,
                    };
                    yield InferenceChunk::Finish { finish_reason };
                    return;
                }
                Event::Failed(failure) => {
                    progress.fail(failure);
                    return;
                }
            }
        }
    }
}

fn tokens(token: AnswerToken) -> InferenceChunk {
    let logprobs = token.logprobs.map(|(logprob, top)| {
        let top_logprobs = top.iter().map(|one| (one.token, one.logprob)).collect();
        vec![InferenceTokenLogprob { logprob, top_logprobs }]
    });
    InferenceChunk::Tokens { token_ids: vec![token.token], logprobs }
}

fn stream_response<R: Reply>(
    app: Arc<App>,
    mut reply: R,
    chunks: impl Stream<Item = Result<Chunk<R>, StreamError>> + Send + 'static,
    progress: Arc<Progress>,
) -> Response {
    let ended = Ended { app, progress: progress.clone() };
    let body = stream! {
        let _ended = ended;
        let mut chunks = std::pin::pin!(chunks);
        let mut frames = Vec::new();
        loop {
            let next = tokio::time::timeout(KEEP_ALIVE, chunks.next()).await;
            let mut last = false;
            match (next, progress.failure()) {
                (Ok(_), Some(failure)) => {
                    reply.fail(&failure.into(), &mut frames);
                    last = true;
                }
                (Ok(Some(Ok(chunk))), None) => reply.stream(chunk, &mut frames),
                (Ok(Some(Err(error))), None) => {
                    let error = ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string());
                    reply.fail(&error, &mut frames);
                    last = true;
                }
                (Ok(None), None) => return,
                (Err(_), _) => reply.keep_alive(&mut frames),
            }
            let mut bytes = Vec::new();
            frames.drain(..).for_each(|frame| frame.write(&mut bytes));
            if !bytes.is_empty() {
                yield Ok::<_, Infallible>(Bytes::from(bytes));
            }
            if last {
                return;
            }
        }
    };
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

async fn whole_response<R: Reply>(
    app: Arc<App>,
    mut reply: R,
    chunks: impl Stream<Item = Result<Chunk<R>, StreamError>> + Send,
    progress: Arc<Progress>,
) -> Result<Response, ApiError> {
    let _ended = Ended { app, progress: progress.clone() };
    let mut chunks = std::pin::pin!(chunks);
    while let Some(chunk) = chunks.next().await {
        if let Some(failure) = progress.failure() {
            return Err(failure.into());
        }
        let failed = |error: StreamError| {
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
        };
        reply.collect(chunk.map_err(failed)?, progress.prompt_tokens());
    }
    if let Some(failure) = progress.failure() {
        return Err(failure.into());
    }
    Ok(json_response(&reply.into_body()))
}

/// A response of JSON.
pub(crate) fn json_response(body: &Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

/// Notes the end of an answer, whichever way it comes about.
struct Ended {
    app: Arc<App>,
    progress: Arc<Progress>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.app.metrics.answered(self.progress.tokens().len());
        let failure = self.progress.failure();
        self.progress.with_trace(|trace| {
            let tokenizer = self.app.encoder.tokenizer();
            if let Some(file) = &self.app.trace {
                trace.write(file, tokenizer, &self.progress.tokens(), failure.as_ref());
            }
        });
    }
}
