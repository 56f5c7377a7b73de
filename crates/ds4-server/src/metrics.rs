//! Figures for operators, in Prometheus' text format.

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use ds4_runtime::{Event, Failure, Finish, Observer, ReuseSource};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

type Seconds = Counter<f64, AtomicU64>;

/// Counters and gauges; clones share them.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: Arc<Registry>,
    prompt_tokens: Counter,
    cached_tokens: Family<Source, Counter>,
    answer_tokens: Counter,
    prefill_seconds: Seconds,
    decode_seconds: Seconds,
    queue_seconds: Histogram,
    token_seconds: Histogram,
    reuse: Family<Source, Counter>,
    requests: Family<Ending, Counter>,
    cancelled: Counter,
    evicted: Counter,
    preempted: Counter,
    malformed_calls: Family<Malformed, Counter>,
    responses: Family<Response, Counter>,
    request_seconds: Histogram,
    running: Gauge,
    waiting: Gauge,
    idle_sessions: Gauge,
    idle_bytes: Gauge,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Source {
    source: SourceName,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelValue)]
enum SourceName {
    None,
    Continuation,
    Rewind,
    Checkpoint,
    Fork,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Ending {
    ending: EndingName,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelValue)]
enum EndingName {
    Stop,
    Length,
    Engine,
    Memory,
    Deadline,
    Stalled,
    Shutdown,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Malformed {
    kind: MalformedCall,
}

/// What is wrong with a tool call, so that it was none.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelValue)]
pub(crate) enum MalformedCall {
    /// The answer ended before the block of calls did.
    Cut,
    /// Its tags were plain text instead of markers.
    SpelledOut,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Response {
    route: String,
    status: u16,
}

impl Metrics {
    /// All at zero.
    pub(crate) fn new() -> Self {
        let seconds = || Histogram::new(exponential_buckets(0.001, 2.0, 16));
        let mut metrics = Metrics {
            registry: Arc::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Family::default(),
            answer_tokens: Counter::default(),
            prefill_seconds: Seconds::default(),
            decode_seconds: Seconds::default(),
            queue_seconds: seconds(),
            token_seconds: seconds(),
            reuse: Family::default(),
            requests: Family::default(),
            cancelled: Counter::default(),
            evicted: Counter::default(),
            preempted: Counter::default(),
            malformed_calls: Family::default(),
            responses: Family::default(),
            request_seconds: Histogram::new(exponential_buckets(0.01, 2.0, 18)),
            running: Gauge::default(),
            waiting: Gauge::default(),
            idle_sessions: Gauge::default(),
            idle_bytes: Gauge::default(),
        };
        metrics.registry = Arc::new(metrics.registered());
        metrics
    }

    fn registered(&self) -> Registry {
        let mut r = Registry::with_prefix("ds4");
        r.register("prompt_tokens", "Tokens of prompts", self.prompt_tokens.clone());
        let text = "Tokens of prompts that were not computed again";
        r.register("cached_tokens", text, self.cached_tokens.clone());
        r.register("answer_tokens", "Tokens of answers", self.answer_tokens.clone());
        let (text, time) = ("Time of steps with prompts alone", self.prefill_seconds.clone());
        r.register_with_unit("prefill", text, Unit::Seconds, time);
        let (text, time) = ("Time of steps with answers", self.decode_seconds.clone());
        r.register_with_unit("decode", text, Unit::Seconds, time);
        let (text, time) = ("Time in the queue", self.queue_seconds.clone());
        r.register_with_unit("queue", text, Unit::Seconds, time);
        let (text, time) = ("Time between two tokens of an answer", self.token_seconds.clone());
        r.register_with_unit("token", text, Unit::Seconds, time);
        r.register("sessions_reused", "Prompts by what they began with", self.reuse.clone());
        r.register("requests", "Requests by how they ended", self.requests.clone());
        let text = "Requests whose clients went away";
        r.register("requests_cancelled", text, self.cancelled.clone());
        r.register("sessions_evicted", "Idle sessions dropped", self.evicted.clone());
        let text = "Running requests that gave their memory to older ones for a while";
        r.register("requests_preempted", text, self.preempted.clone());
        let text = "Answers with tool calls that are cut off, or spelled out in plain text";
        r.register("malformed_tool_calls", text, self.malformed_calls.clone());
        r.register("http_responses", "HTTP responses", self.responses.clone());
        let (text, time) = ("Time of a request, queue included", self.request_seconds.clone());
        r.register_with_unit("request", text, Unit::Seconds, time);
        r.register("requests_running", "Requests whose turn it is", self.running.clone());
        r.register("requests_waiting", "Requests that wait", self.waiting.clone());
        r.register("sessions_idle", "Sessions kept for later", self.idle_sessions.clone());
        let (text, bytes) = ("KV state kept for later", self.idle_bytes.clone());
        r.register_with_unit("sessions_idle", text, Unit::Bytes, bytes);
        r
    }

    /// All of them as text.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    /// Tokens of answers.
    pub(crate) fn answered(&self, tokens: usize) {
        self.answer_tokens.inc_by(tokens as u64);
    }

    /// An answer has a tool call that is none.
    pub(crate) fn malformed_call(&self, kind: MalformedCall) {
        self.malformed_calls.get_or_create(&Malformed { kind }).inc();
    }

    /// A response was begun.
    pub(crate) fn response(&self, route: &str, status: u16) {
        self.responses.get_or_create(&Response { route: route.to_owned(), status }).inc();
    }

    /// Tokens of prompts and of answers so far.
    pub(crate) fn tokens(&self) -> (u64, u64) {
        (self.prompt_tokens.get(), self.answer_tokens.get())
    }
}

impl Observer for Metrics {
    fn queued(&self, time: Duration) {
        self.queue_seconds.observe(time.as_secs_f64());
    }

    fn prompt(&self, tokens: usize, cached: usize, source: ReuseSource) {
        let source = Source {
            source: match source {
                ReuseSource::None => SourceName::None,
                ReuseSource::Continuation => SourceName::Continuation,
                ReuseSource::Rewind => SourceName::Rewind,
                ReuseSource::Checkpoint => SourceName::Checkpoint,
                ReuseSource::Fork => SourceName::Fork,
            },
        };
        self.prompt_tokens.inc_by(tokens as u64);
        self.cached_tokens.get_or_create(&source).inc_by(cached as u64);
        self.reuse.get_or_create(&source).inc();
    }

    fn step(&self, answers: usize, prompt_tokens: usize, time: Duration) {
        let time = time.as_secs_f64();
        if answers == 0 && prompt_tokens > 0 {
            self.prefill_seconds.inc_by(time);
        } else {
            self.decode_seconds.inc_by(time);
            self.token_seconds.observe(time);
        }
    }

    fn ended(&self, event: &Event, time: Duration) {
        let ending = match event {
            Event::Finished(Finish::Stop) => EndingName::Stop,
            Event::Finished(Finish::Length) => EndingName::Length,
            Event::Failed(Failure::Memory(_)) => EndingName::Memory,
            Event::Failed(Failure::Deadline) => EndingName::Deadline,
            Event::Failed(Failure::Stalled) => EndingName::Stalled,
            Event::Failed(Failure::ShuttingDown) => EndingName::Shutdown,
            _ => EndingName::Engine,
        };
        self.requests.get_or_create(&Ending { ending }).inc();
        self.request_seconds.observe(time.as_secs_f64());
    }

    fn sessions(&self, running: usize, idle: usize, waiting: usize, idle_bytes: u64) {
        self.running.set(running as i64);
        self.idle_sessions.set(idle as i64);
        self.waiting.set(waiting as i64);
        self.idle_bytes.set(idle_bytes as i64);
    }

    fn cancelled(&self) {
        self.cancelled.inc();
    }

    fn evicted(&self) {
        self.evicted.inc();
    }

    fn preempted(&self) {
        self.preempted.inc();
    }
}
