//! A backend that says what a script says, to test protocols with exact answers.
//!
//! The last user turn names its script as `[name]`. What is said so far selects the rest of the
//! script, however it was split into tokens; after the script, or off it, the turn ends.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use ds4_engine::{
    Backend, BackendError, TokenId,
    backend::{
        self, Batch, Forward, HeadOutput, MemoryReport, SavedFrontier, StageResult, own_cache,
        own_frontier,
    },
    layout::{Frontier, Plane, StateLayout},
    rows::CacheRounding,
};
use ds4_model::{Model, config::Config};
use ds4_text::tokenizer::Tokenizer;

const BLOCK: &str = "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"get_weather\">\n\
    <｜DSML｜parameter name=\"city\" string=\"true\">Oslo</｜DSML｜parameter>\n\
    <｜DSML｜parameter name=\"days\" string=\"false\">2</｜DSML｜parameter>\n\
    </｜DSML｜invoke>\n</｜DSML｜tool_calls>";

/// The same call with its parameters the other way round.
const SWAPPED: &str = "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"get_weather\">\n\
    <｜DSML｜parameter name=\"days\" string=\"false\">2</｜DSML｜parameter>\n\
    <｜DSML｜parameter name=\"city\" string=\"true\">Oslo</｜DSML｜parameter>\n\
    </｜DSML｜invoke>\n</｜DSML｜tool_calls>";

/// What the broken script says before the engine breaks.
const BEFORE_BREAKING: &str = "Hello";

/// What a coding agent is told to do by the scripts named after it.
fn call(tool: &str, parameters: &[(&str, &str)]) -> String {
    let parameter = |(name, value): &(&str, &str)| {
        format!("<｜DSML｜parameter name=\"{name}\" string=\"true\">{value}</｜DSML｜parameter>\n")
    };
    let parameters: String = parameters.iter().map(parameter).collect();
    format!(
        "I will make it.</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"{tool}\">\n{parameters}\
         </｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
}

const COMMAND: (&str, &str) = ("command", "echo made by a tool > made.txt");

const NAMES: [&str; 17] = [
    "text",
    "thinking",
    "tools",
    "thinking tools",
    "unclosed",
    "forced",
    "json",
    "markup",
    "long",
    "numbers",
    "spelled",
    "swapped",
    "broken",
    "pi",
    "opencode",
    "codex",
    "claude",
];

/// Scripts by name. Markers are markers.
pub fn script(name: &str) -> String {
    match name {
        "text" => "Hello there!".to_owned(),
        "thinking" => "\nI am thinking.\n</think>\n\nHello there!".to_owned(),
        "tools" => format!("Let me look.{BLOCK}"),
        "thinking tools" => format!("need a tool</think>Let me look.{BLOCK}"),
        "unclosed" => format!("I should call it{BLOCK}"),
        "forced" => BLOCK.to_owned(),
        "json" => r#"{"a": [1, 2]}"#.to_owned(),
        "markup" => "<script>alert(1)</script> and **bold**".to_owned(),
        "long" => "word ".repeat(100_000),
        "numbers" => format!("[{}0]", "1, 2, ".repeat(10_000)),
        "spelled" => "<tool_calls><invoke name=\"get_weather\"></invoke></tool_calls>".to_owned(),
        "swapped" => format!("need a tool</think>Let me look.{SWAPPED}"),
        "broken" => format!("{BEFORE_BREAKING} there!"),
        "pi" => call("write", &[("path", "made.txt"), ("content", "made by a tool\n")]),
        "opencode" => call("bash", &[COMMAND, ("description", "Make the file")]),
        "codex" => call("exec_command", &[("cmd", COMMAND.1)]),
        "claude" => call("Bash", &[COMMAND, ("description", "Make the file")]),
        "after a tool" => "</think>It is there.".to_owned(),
        _ => String::new(),
    }
}

/// The script that a user turn names last.
fn name_in(turn: &str) -> &'static str {
    let place = |name: &&&str| turn.rfind(&format!("[{name}]"));
    let named = NAMES.iter().filter(|name| place(name).is_some()).max_by_key(place);
    match named {
        Some(name) => name,
        None if turn.contains("</tool_result>") => "after a tool",
        None => "",
    }
}

/// How long steps take.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timing {
    pub step: Duration,
    pub prompt_token: Duration,
}

/// What the backend has memory for.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// Tokens of all caches together.
    pub tokens: usize,
    /// Tokens of a step.
    pub step: usize,
}

/// The cache of a session: its tokens, and how many there is room for.
struct Cache {
    tokens: Vec<TokenId>,
    room: usize,
    device: Device,
}

/// The memory of all caches together, in tokens.
#[derive(Clone)]
struct Device {
    taken: Arc<AtomicUsize>,
    most: usize,
}

/// Tokens that a cache gets room for at once.
const ROOM: usize = 64;
/// Bytes of a token.
const TOKEN_BYTES: u64 = 4096;

impl Cache {
    fn new(device: &Device, tokens: Vec<TokenId>) -> StageResult<Cache> {
        let mut cache = Cache { tokens: Vec::new(), room: 0, device: device.clone() };
        backend::Cache::reserve(&mut cache, tokens.len().max(ROOM))?;
        cache.tokens = tokens;
        Ok(cache)
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.device.taken.fetch_sub(self.room, Ordering::Relaxed);
    }
}

/// A checkpoint: the tokens up to there.
struct Saved(Vec<TokenId>);

impl SavedFrontier for Saved {
    fn bytes(&self) -> u64 {
        0
    }
}

impl backend::Cache for Cache {
    fn bytes(&self) -> u64 {
        self.tokens.len() as u64 * TOKEN_BYTES
    }

    fn reserve(&mut self, tokens: usize) -> StageResult {
        let more = tokens.next_multiple_of(ROOM).saturating_sub(self.room);
        if self.device.taken.load(Ordering::Relaxed).saturating_add(more) > self.device.most {
            return Err(BackendError::OutOfMemory(format!("no room for {tokens} tokens")));
        }
        self.device.taken.fetch_add(more, Ordering::Relaxed);
        self.room += more;
        Ok(())
    }

    fn rewind(&mut self, position: usize) {
        self.tokens.truncate(position);
    }

    fn fork(&self, position: usize) -> StageResult<Box<dyn backend::Cache>> {
        Ok(Box::new(Cache::new(&self.device, self.tokens[..position].to_vec())?))
    }

    fn save_frontier(&self, position: usize) -> StageResult<Box<dyn SavedFrontier>> {
        Ok(Box::new(Saved(self.tokens[..position].to_vec())))
    }

    fn restore_frontier(&mut self, saved: &dyn SavedFrontier) -> StageResult {
        let Saved(tokens) = own_frontier(saved)?;
        self.reserve(tokens.len())?;
        self.tokens.clone_from(tokens);
        Ok(())
    }

    fn read_frontier(&self, _: usize) -> StageResult<Frontier> {
        unreachable!("the server saves no snapshots")
    }

    fn write_frontier(&mut self, _: &Frontier) -> StageResult {
        unreachable!("the server restores no snapshots")
    }

    fn read_rows(&self, _: usize, _: Plane, _: Range<usize>) -> StageResult<Vec<u8>> {
        unreachable!("the server saves no snapshots")
    }

    fn write_rows(&mut self, _: usize, _: Plane, _: usize, _: &[u8]) -> StageResult {
        unreachable!("the server restores no snapshots")
    }
}

/// What the backend has done; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Work(Arc<Mutex<Option<Done>>>);

#[derive(Debug, Clone)]
pub struct Done {
    pub steps: usize,
    /// Tokens that were chosen without showing logits.
    pub chosen: usize,
    /// Time between each step and the next.
    pub gaps: Vec<Duration>,
    /// Time on a processor in them.
    pub between: Duration,
    /// Tokens of prompts but for the last part of each, and the steps that had some.
    pub prompt_tokens: usize,
    pub prompt_steps: usize,
    /// The ones among them that continued an answer, too.
    pub shared_steps: usize,
    ended: Instant,
    ended_on_processor: Duration,
}

impl Done {
    /// The median of the times between steps.
    pub fn usual_gap(&self) -> Duration {
        let mut gaps = self.gaps.clone();
        gaps.sort_unstable();
        gaps.get(gaps.len() / 2).copied().unwrap_or_default()
    }
}

impl Work {
    /// Forgets it, and says what it was.
    pub fn take(&self) -> Option<Done> {
        self.0.lock().unwrap().take()
    }

    /// What measuring itself takes between steps, of the clock and on a processor.
    pub fn own_time() -> (Duration, Duration) {
        let (work, steps) = (Work::default(), 200);
        for _ in 0..steps {
            work.begin(Duration::from_micros(200), 0, false);
            work.end(0);
        }
        work.take().map_or_else(Default::default, |done| {
            (done.usual_gap(), done.between / done.steps as u32)
        })
    }

    /// What one can say of it so far; false if it has done nothing.
    pub fn look(&self, test: impl FnOnce(&Done) -> bool) -> bool {
        self.0.lock().unwrap().as_ref().is_some_and(test)
    }

    /// A step begins, with a pause of so long, so many tokens of prompts, and answers beside them.
    fn begin(&self, pause: Duration, prompt_tokens: usize, answers: bool) {
        let now = Instant::now();
        std::thread::sleep(pause);
        let mut done = self.0.lock().unwrap();
        if let Some(done) = &mut *done {
            done.gaps.push(now - done.ended);
            done.between += on_processor().saturating_sub(done.ended_on_processor);
        }
        let done = done.get_or_insert(Done {
            steps: 0,
            chosen: 0,
            gaps: Vec::new(),
            between: Duration::ZERO,
            prompt_tokens: 0,
            prompt_steps: 0,
            shared_steps: 0,
            ended: now,
            ended_on_processor: Duration::ZERO,
        });
        if prompt_tokens > 0 {
            done.prompt_tokens += prompt_tokens;
            done.prompt_steps += 1;
            done.shared_steps += usize::from(answers);
        }
    }

    fn end(&self, chosen: usize) {
        if let Some(done) = &mut *self.0.lock().unwrap() {
            done.ended_on_processor = on_processor();
            done.steps += 1;
            done.chosen += chosen;
            done.ended = Instant::now();
        }
    }
}

/// This thread's time on a processor, as of when it last paused.
fn on_processor() -> Duration {
    std::thread::sleep(Duration::from_micros(1));
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = stat.split(' ').next().and_then(|nanos| nanos.parse().ok());
    Duration::from_nanos(nanos.unwrap_or_default())
}

pub struct Scripted {
    config: Config,
    layout: StateLayout,
    tokenizer: Arc<Tokenizer>,
    timing: Timing,
    /// Tokens of a step.
    step: usize,
    device: Device,
    work: Option<Work>,
}

impl Scripted {
    pub fn new(model: &Model, tokenizer: Arc<Tokenizer>, timing: Timing) -> Self {
        let config = Config { vocab: tokenizer.len(), ..model.config.clone() };
        let layout = StateLayout::new(&config, CacheRounding::On);
        let device = Device { taken: Arc::default(), most: usize::MAX };
        Scripted { config, layout, tokenizer, timing, step: usize::MAX, device, work: None }
    }

    /// The same on a smaller device.
    pub fn on_a_device_of(self, capacity: Capacity) -> Self {
        let device = Device { taken: Arc::default(), most: capacity.tokens };
        Scripted { device, step: capacity.step, ..self }
    }

    /// The same, and it notes what it does.
    pub fn watched(self, work: Work) -> Self {
        Scripted { work: Some(work), ..self }
    }

    fn next(&self, history: &[TokenId]) -> StageResult<TokenId> {
        let special = self.tokenizer.special();
        let Some(header) = history.iter().rposition(|t| *t == special.assistant) else {
            return Ok(special.eos);
        };
        let user = history[..header].iter().rposition(|t| *t == special.user).unwrap_or(0);
        let asked = self.tokenizer.decode(&history[user..header]);
        let name = name_in(&asked);
        let script = script(name);
        let said = self.tokenizer.decode(history.get(header + 2..).unwrap_or_default());
        if name == "broken" && said == BEFORE_BREAKING {
            return Err(BackendError::Device("a cable came loose".to_owned()));
        }
        Ok(match script.strip_prefix(&said).filter(|rest| !rest.is_empty()) {
            // Scripts are long; only the next token is asked for.
            Some(rest) => {
                let end = rest.char_indices().nth(200).map_or(rest.len(), |(at, _)| at);
                self.tokenizer.encode_with_markers(&rest[..end]).unwrap()[0]
            }
            None => special.eos,
        })
    }
}

/// Tokens of prompts that go on after this step: no logits are wanted of them.
fn unanswered(batch: &Batch) -> usize {
    let spans = batch.spans.iter().map(|span| span.rows.clone());
    let goes_on = |rows: &Range<usize>| !batch.logit_rows.iter().any(|row| rows.contains(row));
    spans.filter(goes_on).map(|rows| rows.len()).sum()
}

impl Backend for Scripted {
    fn config(&self) -> &Config {
        &self.config
    }

    fn model_identity(&self) -> [u8; 32] {
        [0; 32]
    }

    fn layout(&self) -> &StateLayout {
        &self.layout
    }

    fn name(&self) -> &'static str {
        "scripted"
    }

    fn device(&self) -> String {
        "a script".to_owned()
    }

    fn prefill_chunk(&self) -> usize {
        512
    }

    fn memory(&self, context: usize) -> StageResult<MemoryReport> {
        let session = self.session_bytes(context);
        let device = self.device();
        Ok(MemoryReport { device, weights: 0, activations: 0, left: None, context, session })
    }

    fn bandwidth(&self) -> StageResult<f64> {
        Ok(1.0)
    }

    fn new_cache(&self) -> StageResult<Box<dyn backend::Cache>> {
        Ok(Box::new(Cache::new(&self.device, Vec::new())?))
    }

    fn session_bytes(&self, tokens: usize) -> u64 {
        tokens as u64 * TOKEN_BYTES
    }

    fn step(
        &self,
        batch: &Batch,
        caches: &mut [&mut dyn backend::Cache],
        _: Forward<'_>,
    ) -> StageResult<HeadOutput> {
        if batch.tokens.len() > self.step {
            return Err(BackendError::OutOfMemory("no room for activations".to_owned()));
        }
        let prompt_tokens = batch.tokens.len() - batch.decode_rows;
        let pause = self.timing.step + self.timing.prompt_token * prompt_tokens as u32;
        match &self.work {
            Some(work) => work.begin(pause, unanswered(batch), !batch.logit_rows.is_empty()),
            None => std::thread::sleep(pause),
        }
        let mut next = vec![None; batch.tokens.len()];
        for span in &batch.spans {
            let cache: &mut Cache = own_cache(&mut *caches[span.session])?;
            assert!(cache.room >= span.start + span.rows.len(), "no room was made");
            assert_eq!(cache.tokens.len(), span.start, "the cache is not where the session is");
            for row in span.rows.clone() {
                cache.tokens.push(batch.tokens[row]);
                if batch.logit_rows.contains(&row) {
                    next[row] = Some(self.next(&cache.tokens)?);
                }
            }
        }
        let vocab = self.config.vocab;
        // Not zero, which would be memory that nobody has touched yet.
        let mut logits = vec![-1.0; batch.logit_rows.len() * vocab];
        for (row, logits) in batch.logit_rows.iter().zip(logits.chunks_mut(vocab)) {
            if let Some(next) = next[*row] {
                logits[next as usize] = 30.0;
            }
        }
        if let Some(work) = &self.work {
            work.end(batch.argmax_rows);
        }
        Ok(HeadOutput::from_logits(batch, vocab, logits))
    }
}
