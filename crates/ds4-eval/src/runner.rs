//! Answers many cases at once.
//!
//! A fixed number of requests is kept before a runtime. Tokens are the likeliest ones, and a
//! request's tokens don't depend on what else runs, so answers don't depend on how many cases run
//! at once.

use std::{
    collections::HashMap,
    ops::ControlFlow,
    sync::{Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};

use ds4_engine::{Engine, TokenId, sampling::SamplingParams};
use ds4_runtime::{ClientId, Event, Finish, Limits, Request, Runtime};
use ds4_text::{
    detokenize::{OutputDelta, OutputSplitter},
    prompt::PromptEncoder,
};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, suite::Case};

/// KV memory for so many times what the cases need that are answered at once: checkpoints, and
/// what the scheduler reserves.
const KV_SLACK: u64 = 2;

/// How to answer.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Cases that are answered at once.
    pub at_once: usize,
    /// Tokens that an answer may have, where the case doesn't say.
    pub max_tokens: usize,
}

/// Whether an answer is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is.
    Right,
    /// It is not.
    Wrong,
}

/// A graded answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Id of the case.
    pub id: String,
    /// Its task.
    pub task: String,
    /// The verdict.
    pub verdict: Verdict,
    /// Whether the answer reached its limit of tokens before it ended.
    pub cut: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer, the end not counted.
    pub answer_tokens: usize,
    /// Its reasoning.
    pub reasoning: String,
    /// What was graded.
    pub answer: String,
    /// Hash of the case, in hexadecimal.
    pub case: String,
}

/// How far a run is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Status {
    /// Cases that were answered.
    pub answered: usize,
    /// Tokens that were computed.
    pub tokens: usize,
}

impl Answer {
    /// Grades the answer again; `None` if it is an answer to another case.
    pub fn regraded(mut self, case: &Case) -> Option<Answer> {
        if self.case != hex(&case.hash) {
            return None;
        }
        self.verdict = verdict(case, &self.answer);
        self.task = case.task.clone();
        Some(self)
    }
}

/// Of `earlier` answers those to `cases`, graded again, and the cases without one.
pub fn resume(cases: &[Case], earlier: Vec<Answer>) -> (Vec<Answer>, Vec<&Case>) {
    let mut by_id: HashMap<String, Answer> =
        earlier.into_iter().map(|answer| (answer.id.clone(), answer)).collect();
    let (mut answers, mut rest) = (Vec::new(), Vec::new());
    for case in cases {
        match by_id.remove(&case.id).and_then(|answer| answer.regraded(case)) {
            Some(answer) => answers.push(answer),
            None => rest.push(case),
        }
    }
    (answers, rest)
}

/// Answers `cases` and gives each answer to `answered` as soon as it is complete. `progress`
/// hears of everything that was computed and stops the run by breaking.
///
/// # Errors
/// [`Error::Stopped`] if it was stopped, or if a case is too long, or the engine or `answered`
/// fails.
pub fn run(
    engine: Engine,
    encoder: &PromptEncoder,
    cases: &[&Case],
    settings: Settings,
    mut answered: impl FnMut(Answer) -> Result<()>,
    mut progress: impl FnMut(Status) -> ControlFlow<()>,
) -> Result<()> {
    let context = engine.config().context_length;
    let asked = cases.iter().map(|case| Asked::new(encoder, case, settings, context));
    let asked = asked.collect::<Result<Vec<_>>>()?;
    let longest = asked.iter().map(|asked| asked.prompt.len() + asked.limit).max().unwrap_or(0);
    let at_once = settings.at_once.clamp(1, asked.len().max(1));
    let session = engine.backend().session_bytes(longest);
    let limits = Limits {
        context,
        running: at_once,
        waiting: at_once,
        prefill_chunk: engine.backend().prefill_chunk(),
        kv_bytes: KV_SLACK * at_once as u64 * session,
        stall: Duration::MAX,
        reuse_answers: false,
    };
    let tokenizer = encoder.tokenizer().clone();
    let runtime = Runtime::start(engine, tokenizer, limits, Box::new(()));
    let runtime = runtime.map_err(Error::Threads)?;
    let queue = Mutex::new(asked.into_iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let (news, messages) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..at_once {
            let (news, next, runtime) = (news.clone(), &next, &runtime);
            let ask = move || {
                // Nobody hears of it once the run has ended.
                while let Some(asked) = next()
                    && asked.answer(runtime, encoder, &news).is_ok()
                {}
            };
            thread::Builder::new().spawn_scoped(scope, ask).map_err(Error::Threads)?;
        }
        drop(news);
        collect(messages, &mut answered, &mut progress)
    })
}

/// Hands out what the threads send until all have ended.
fn collect(
    messages: mpsc::Receiver<Message>,
    answered: &mut impl FnMut(Answer) -> Result<()>,
    progress: &mut impl FnMut(Status) -> ControlFlow<()>,
) -> Result<()> {
    let mut status = Status::default();
    for message in messages {
        match message {
            Message::Computed(tokens) => status.tokens += tokens,
            Message::Answered(answer) => {
                answered(*answer)?;
                status.answered += 1;
            }
            Message::Failed(error) => return Err(error),
        }
        if progress(status).is_break() {
            return Err(Error::Stopped);
        }
    }
    Ok(())
}

/// What a thread that waits for an answer tells.
enum Message {
    /// So many tokens more.
    Computed(usize),
    Answered(Box<Answer>),
    Failed(Error),
}

/// A case with its prompt.
struct Asked<'c> {
    case: &'c Case,
    prompt: Vec<TokenId>,
    /// Tokens that the answer may have.
    limit: usize,
}

impl<'c> Asked<'c> {
    fn new(
        encoder: &PromptEncoder,
        case: &'c Case,
        settings: Settings,
        context: usize,
    ) -> Result<Self> {
        let failed = |source| Error::Prompt { case: case.id.clone(), source: Box::new(source) };
        let prompt = encoder.encode(&case.conversation).map_err(failed)?.ids;
        let limit = case.max_tokens.unwrap_or(settings.max_tokens).max(1);
        let found = prompt.len() + limit;
        if found > context {
            return Err(Error::LongCase { case: case.id.clone(), found, limit: context });
        }
        Ok(Asked { case, prompt, limit })
    }

    /// Waits for the answer. An error says that nobody listens any more.
    fn answer(
        self,
        runtime: &Runtime,
        encoder: &PromptEncoder,
        news: &mpsc::Sender<Message>,
    ) -> std::result::Result<(), mpsc::SendError<Message>> {
        let request = Request {
            client: ClientId::default(),
            prompt: self.prompt.clone(),
            max_tokens: self.limit,
            sampling: SamplingParams::greedy(),
            seed: 0,
            top_logprobs: None,
            grammar: None,
            deadline: None,
        };
        let mut events = match runtime.submit(request) {
            Ok(events) => events,
            Err(refused) => return news.send(Message::Failed(refused.into())),
        };
        let tokenizer = encoder.tokenizer().clone();
        let mut splitter = OutputSplitter::after_prompt(tokenizer, &self.prompt);
        let (mut output, mut answer_tokens) = (OutputDelta::default(), 0);
        let mut left = self.prompt.len();
        let finish = loop {
            match events.next_blocking() {
                Some(Event::Started { cached }) => left -= cached.min(left),
                Some(Event::Prefill { left: now }) => {
                    news.send(Message::Computed(left.saturating_sub(now)))?;
                    left = now;
                }
                Some(Event::Token(token)) => {
                    answer_tokens += 1;
                    add(&mut output, &splitter.push(token.token));
                    news.send(Message::Computed(1))?;
                }
                Some(Event::Finished(finish)) => break finish,
                Some(Event::Failed(failure)) => return news.send(Message::Failed(failure.into())),
                None => return Ok(()),
            }
        };
        add(&mut output, &splitter.finish());
        news.send(Message::Answered(Box::new(Answer {
            id: self.case.id.clone(),
            task: self.case.task.clone(),
            verdict: verdict(self.case, &output.answer),
            cut: finish == Finish::Length,
            prompt_tokens: self.prompt.len(),
            answer_tokens,
            reasoning: output.reasoning,
            answer: output.answer,
            case: hex(&self.case.hash),
        })))
    }
}

fn add(output: &mut OutputDelta, delta: &OutputDelta) {
    output.reasoning.push_str(&delta.reasoning);
    output.answer.push_str(&delta.answer);
}

fn verdict(case: &Case, answer: &str) -> Verdict {
    if case.grader.is_right(answer) { Verdict::Right } else { Verdict::Wrong }
}

fn hex(hash: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*hash).to_hex()[..16].to_owned()
}
