//! Requests under load: a greedy request has the same answer alone, beside other requests, after
//! preemption and with a reused prefix.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use ds4_engine::{Engine, TokenId, sampling::SamplingParams};
use ds4_runtime::{Event, Events, Limits, Observer, Request, ReuseSource, Runtime};
use ds4_text::tokenizer::Tokenizer;

const CONTEXT: usize = 1024;
/// Prompts of some conversations begin alike.
const CONVERSATIONS: u64 = 6;

/// Counts of a runtime's events; clones share them.
#[derive(Clone, Default)]
struct Counts(Arc<[AtomicUsize; 4]>);

impl Counts {
    fn add(&self, which: usize, n: usize) {
        self.0[which].fetch_add(n, Ordering::Relaxed);
    }

    /// Preempted requests, reused tokens, steps of answers and prompts together, and refusals of
    /// memory.
    fn get(&self) -> [usize; 4] {
        [0, 1, 2, 3].map(|i| self.0[i].load(Ordering::Relaxed))
    }
}

impl Observer for Counts {
    fn preempted(&self) {
        self.add(0, 1);
    }

    fn prompt(&self, _tokens: usize, cached: usize, _source: ReuseSource) {
        self.add(1, cached);
    }

    fn out_of_memory(&self) {
        self.add(3, 1);
    }

    fn step(&self, answers: usize, prompt_tokens: usize, _time: Duration) {
        self.add(2, usize::from(answers > 0 && prompt_tokens > 0));
    }
}

fn random_tokens(random: &mut fastrand::Rng, len: usize, vocab: usize) -> Vec<TokenId> {
    // Past the markers, which end turns.
    (0..len).map(|_| random.u32(300..vocab as u32 - 100)).collect()
}

/// A prompt and the length of its answer.
fn request(i: usize, vocab: usize) -> (Vec<TokenId>, usize) {
    let mut random = fastrand::Rng::with_seed(i as u64);
    let conversation = random.u64(0..2 * CONVERSATIONS);
    let mut prompt = Vec::new();
    if conversation < CONVERSATIONS {
        let mut shared = fastrand::Rng::with_seed(10_000 + conversation);
        let len = shared.usize(64..160);
        prompt = random_tokens(&mut shared, len, vocab);
    }
    let len = if random.bool() { random.usize(1..12) } else { random.usize(12..90) };
    prompt.extend(random_tokens(&mut random, len, vocab));
    (prompt, random.usize(1..14))
}

/// Requests to compare, and the engine to run them on.
pub struct Load<'a> {
    /// Makes an engine; each run has its own.
    pub engine: &'a dyn Fn() -> Engine,
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Number of requests.
    pub requests: usize,
}

impl Load<'_> {
    /// Compares the answers of all requests alone, with reused prefixes, 32 at a time, and with
    /// preemption.
    ///
    /// # Panics
    /// If an answer differs, or a run was not what it should be.
    pub fn check(&self) {
        // No memory is left for a prefix cache.
        let (alone, [_, reused, ..]) = self.run(1, 0);
        assert_eq!(reused, 0);
        let n = self.requests;
        assert!(alone.iter().map(Vec::len).sum::<usize>() > 5 * n, "answers are too short");
        let check = |what: &str, answers: &[Vec<TokenId>]| {
            let differ: Vec<_> = (0..n).filter(|i| answers[*i] != alone[*i]).collect();
            assert!(differ.is_empty(), "{what}: {} answers differ: {differ:?}", differ.len());
        };
        let (one_by_one, [_, reused, ..]) = self.run(1, 1 << 30);
        assert!(reused > 10 * n, "{reused} tokens were reused");
        check("with reused prefixes", &one_by_one);

        let (together, [_, _, mixed, _]) = self.run(32, 1 << 30);
        assert!(mixed > n / 10, "{mixed} steps had answers and prompts");
        check("32 at a time", &together);

        let session = (self.engine)().backend().session_bytes(200);
        let (crowded, [preempted, ..]) = self.run(32, 3 * session);
        println!("{n} requests, {preempted} preempted");
        assert!(preempted > n / 20, "{preempted} requests were preempted");
        check("with preemption", &crowded);
    }

    /// Runs all requests, 32 at a time, in the memory that the device has left.
    ///
    /// # Panics
    /// If nothing was preempted, or the device refused memory that admission had counted on.
    pub fn check_admission(&self) {
        let (answers, [preempted, _, _, refused]) = self.run(32, u64::MAX);
        println!("{} requests, {preempted} preempted, {refused} refusals", answers.len());
        assert!(preempted > 0, "there was memory for everything");
        assert_eq!(refused, 0, "the device refused memory");
    }

    /// Runs all requests, `running` at a time; returns their answers and counts.
    fn run(&self, running: usize, kv_bytes: u64) -> (Vec<Vec<TokenId>>, [usize; 4]) {
        let (engine, counts) = ((self.engine)(), Counts::default());
        let vocab = engine.config().vocab;
        let limits = Limits {
            context: CONTEXT,
            running,
            waiting: self.requests,
            prefill_chunk: 128,
            kv_bytes,
            stall: Duration::from_secs(600),
            reuse_answers: false,
        };
        let observer = Box::new(counts.clone());
        let runtime =
            Runtime::start(engine, self.tokenizer.clone(), limits, observer).expect("a thread");
        let submit = |i| {
            let (prompt, max_tokens) = request(i, vocab);
            let request = Request {
                client: Default::default(),
                prompt,
                max_tokens,
                sampling: SamplingParams::greedy(),
                seed: 0,
                top_logprobs: None,
                grammar: None,
                deadline: None,
            };
            runtime.submit(request).expect("a place in the queue")
        };
        let events: Vec<_> = (0..self.requests).map(submit).collect();
        (events.into_iter().map(answer).collect(), counts.get())
    }
}

fn answer(mut events: Events) -> Vec<TokenId> {
    let mut tokens = Vec::new();
    while let Some(event) = events.next_blocking() {
        match event {
            Event::Token(token) => tokens.push(token.token),
            Event::Failed(failure) => panic!("{failure}"),
            _ => {}
        }
    }
    tokens
}
