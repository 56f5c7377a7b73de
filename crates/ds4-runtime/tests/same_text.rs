//! A greedy request has the same answer alone, beside other requests, after preemption and with a
//! reused prefix.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use ds4_cpu::{CpuBackend, Kernels};
use ds4_engine::{Engine, TokenId, rows::CacheRounding, sampling::SamplingParams};
use ds4_model::Model;
use ds4_runtime::{Event, Limits, Observer, Request, ReuseSource, Runtime};
use ds4_text::tokenizer::Tokenizer;

const REQUESTS: usize = 1000;
const CONTEXT: usize = 1024;
/// Prompts of some conversations begin alike.
const CONVERSATIONS: u64 = 6;

/// Counts of a runtime's events; clones share them.
#[derive(Clone, Default)]
struct Counts(Arc<[AtomicUsize; 3]>);

impl Counts {
    fn add(&self, which: usize, n: usize) {
        self.0[which].fetch_add(n, Ordering::Relaxed);
    }

    /// Preempted requests, reused tokens, and steps of answers and prompts together.
    fn get(&self) -> [usize; 3] {
        [0, 1, 2].map(|i| self.0[i].load(Ordering::Relaxed))
    }
}

impl Observer for Counts {
    fn preempted(&self) {
        self.add(0, 1);
    }

    fn prompt(&self, _tokens: usize, cached: usize, _source: ReuseSource) {
        self.add(1, cached);
    }

    fn step(&self, answers: usize, prompt_tokens: usize, _time: Duration) {
        self.add(2, usize::from(answers > 0 && prompt_tokens > 0));
    }
}

fn engine(model: &Arc<Model>) -> Engine {
    Engine::new(CpuBackend::new(model.clone(), Kernels::detect(), CacheRounding::On))
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

/// Runs all requests, `running` at a time; returns their answers.
fn answers(
    engine: Engine,
    tokenizer: &Arc<Tokenizer>,
    running: usize,
    kv_bytes: u64,
    counts: &Counts,
) -> Vec<Vec<TokenId>> {
    let vocab = engine.config().vocab;
    let limits = Limits {
        context: CONTEXT,
        running,
        waiting: REQUESTS,
        prefill_chunk: 128,
        kv_bytes,
        stall: Duration::from_secs(600),
    };
    let runtime =
        Runtime::start(engine, tokenizer.clone(), limits, Box::new(counts.clone())).unwrap();
    let events: Vec<_> = (0..REQUESTS)
        .map(|i| {
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
            runtime.submit(request).unwrap()
        })
        .collect();
    let answer = |mut events: ds4_runtime::Events| {
        let mut tokens = Vec::new();
        while let Some(event) = events.next_blocking() {
            match event {
                Event::Token(token) => tokens.push(token.token),
                Event::Failed(failure) => panic!("{failure}"),
                _ => {}
            }
        }
        tokens
    };
    events.into_iter().map(answer).collect()
}

#[test]
fn a_greedy_request_has_the_same_answer_under_any_load() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny/tiny-b-q2.gguf");
    let model = Arc::new(Model::open(Path::new(path)).unwrap());
    let vocab = model.config.vocab;
    let tokenizer = Arc::new(Tokenizer::from_gguf(&model.files()[0], vocab).unwrap());
    let run = |running, kv_bytes| {
        let counts = Counts::default();
        let answers = answers(engine(&model), &tokenizer, running, kv_bytes, &counts);
        (answers, counts.get())
    };
    // No memory is left for a prefix cache.
    let (alone, [_, reused, _]) = run(1, 0);
    assert_eq!(reused, 0);
    assert!(alone.iter().map(Vec::len).sum::<usize>() > 5 * REQUESTS, "answers are too short");

    let check = |what: &str, answers: &[Vec<TokenId>]| {
        let differ: Vec<_> = (0..REQUESTS).filter(|i| answers[*i] != alone[*i]).collect();
        assert!(differ.is_empty(), "{what}: {} answers differ: {differ:?}", differ.len());
    };
    let (one_by_one, [_, reused, _]) = run(1, 1 << 30);
    assert!(reused > 20 * REQUESTS, "{reused} tokens were reused");
    check("with reused prefixes", &one_by_one);

    let (together, [_, reused, mixed]) = run(32, 1 << 30);
    assert!(reused > 10 * REQUESTS, "{reused} tokens were reused");
    assert!(mixed > 100, "{mixed} steps had answers and prompts");
    check("32 at a time", &together);

    let session = engine(&model).backend().session_bytes(200);
    let (crowded, [preempted, ..]) = run(32, 6 * session);
    assert!(preempted > 20, "{preempted} requests were preempted");
    check("with preemption", &crowded);
}
