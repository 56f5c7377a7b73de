//! Runtimes for tests, over a backend that says what a script says.

#![allow(dead_code, reason = "each test program uses a part")]

pub mod scripted;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use ds4_engine::{Engine, TokenId, sampling::SamplingParams};
use ds4_model::Model;
use ds4_runtime::{ClientId, Event, Events, Limits, Observer, Request, Runtime};
use ds4_text::tokenizer::Tokenizer;
use gguf::GgufFile;
use scripted::{Capacity, Scripted, Timing};

static TINY: &[u8] = include_bytes!("../../../../models/tiny/tiny-b-q2.gguf");

/// The tiny model, for its shape and vocabulary.
fn model() -> Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    let load = || Model::from_gguf(GgufFile::from_static("tiny", TINY).unwrap()).unwrap();
    MODEL.get_or_init(|| Arc::new(load())).clone()
}

pub fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let load = || Tokenizer::from_gguf(&model().files()[0], model().config.vocab).unwrap();
    TOKENIZER.get_or_init(|| Arc::new(load())).clone()
}

pub fn limits() -> Limits {
    Limits {
        context: 8192,
        running: 8,
        waiting: 8,
        prefill_chunk: 512,
        kv_bytes: 1 << 30,
        stall: Duration::from_secs(60),
        reuse_answers: false,
    }
}

/// Counts what an operator would hear of.
#[derive(Clone, Default)]
pub struct Counts(Arc<Counters>);

#[derive(Default)]
struct Counters {
    evicted: AtomicUsize,
    preempted: AtomicUsize,
    cancelled: AtomicUsize,
}

impl Counts {
    pub fn evicted(&self) -> usize {
        self.0.evicted.load(Ordering::Relaxed)
    }

    pub fn preempted(&self) -> usize {
        self.0.preempted.load(Ordering::Relaxed)
    }

    pub fn cancelled(&self) -> usize {
        self.0.cancelled.load(Ordering::Relaxed)
    }
}

impl Observer for Counts {
    fn evicted(&self) {
        self.0.evicted.fetch_add(1, Ordering::Relaxed);
    }

    fn preempted(&self) {
        self.0.preempted.fetch_add(1, Ordering::Relaxed);
    }

    fn cancelled(&self) {
        self.0.cancelled.fetch_add(1, Ordering::Relaxed);
    }
}

/// A runtime and what it counts.
pub struct Running {
    pub runtime: Runtime,
    pub counts: Counts,
}

impl Running {
    /// On a device with memory for everything.
    pub fn new(limits: Limits) -> Running {
        Running::on(limits, Scripted::new(&model(), tokenizer(), Timing::default()))
    }

    /// On a device that takes so long for each step.
    pub fn slow(limits: Limits, step: Duration) -> Running {
        let timing = Timing { step, ..Timing::default() };
        Running::on(limits, Scripted::new(&model(), tokenizer(), timing))
    }

    /// On a device that has memory for little.
    pub fn on_a_device_of(limits: Limits, capacity: Capacity) -> Running {
        let backend = Scripted::new(&model(), tokenizer(), Timing::default());
        Running::on(limits, backend.on_a_device_of(capacity))
    }

    fn on(limits: Limits, backend: Scripted) -> Running {
        let counts = Counts::default();
        let observer = Box::new(counts.clone());
        let engine = Engine::new(backend);
        let runtime = Runtime::start(engine, tokenizer(), limits, observer).unwrap();
        Running { runtime, counts }
    }

    pub fn submit(&self, request: Request) -> Events {
        self.runtime.submit(request).unwrap()
    }
}

/// A request for a script, after so many words.
pub fn ask(script: &str, words: usize, max_tokens: usize) -> Request {
    Request {
        client: ClientId::default(),
        prompt: prompt(&format!("{}[{script}]", "word ".repeat(words))),
        max_tokens,
        sampling: SamplingParams::greedy(),
        seed: 0,
        top_logprobs: None,
        grammar: None,
        deadline: None,
    }
}

/// A user's turn and the beginning of an answer without reasoning.
pub fn prompt(text: &str) -> Vec<TokenId> {
    let (tokenizer, text) = (tokenizer(), tokenizer().encode(text).unwrap());
    let special = tokenizer.special();
    [&[special.bos, special.user], &text[..], &[special.assistant, special.think_end]].concat()
}

/// All events until the last one.
pub fn all(mut events: Events) -> Vec<Event> {
    std::iter::from_fn(|| events.next_blocking()).collect()
}

/// The same on a thread of its own: a client that takes no events pauses its request.
pub fn taken(events: Events) -> JoinHandle<Vec<Event>> {
    std::thread::spawn(|| all(events))
}

/// The text of an answer.
pub fn text(events: &[Event]) -> String {
    let token = |event: &Event| match event {
        Event::Token(token) => Some(token.token),
        _ => None,
    };
    tokenizer().decode(&events.iter().filter_map(token).collect::<Vec<_>>())
}

/// Waits until something holds.
pub fn wait_until(what: &str, test: impl Fn() -> bool) {
    let begun = Instant::now();
    while !test() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}: does not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}
