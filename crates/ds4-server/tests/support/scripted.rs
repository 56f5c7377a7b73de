//! A backend that says what a script says, to test protocols with exact answers.
//!
//! The last user turn names its script as `[name]`. What is said so far selects the rest of the
//! script, however it was split into tokens; after the script, or off it, the turn ends.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use ds4_engine::{
    Backend, BackendError, TokenId,
    backend::{Batch, Frontier, HeadOutput, LayerFrontier, LayerRows, StageResult, Sublayer},
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
pub struct Cache {
    tokens: Vec<TokenId>,
    room: usize,
    /// Tokens that there is room for in all caches together.
    taken: Arc<AtomicUsize>,
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.room, Ordering::Relaxed);
    }
}

/// Tokens that a cache gets room for at once.
const ROOM: usize = 64;

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
    /// The longest step that answers shared with a prompt, as it would be on an idle machine.
    pub longest_shared: Duration,
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
            work.begin(Duration::from_micros(200), false);
            work.end(0);
        }
        work.take().map_or_else(Default::default, |done| {
            (done.usual_gap(), done.between / done.steps as u32)
        })
    }

    /// A step begins, with a pause of so long; some share it with a prompt.
    fn begin(&self, pause: Duration, shared: bool) {
        let now = Instant::now();
        std::thread::sleep(pause);
        let mut done = self.0.lock().unwrap();
        match &mut *done {
            None => {
                *done = Some(Done {
                    steps: 0,
                    chosen: 0,
                    gaps: Vec::new(),
                    between: Duration::ZERO,
                    longest_shared: Duration::ZERO,
                    ended: now,
                    ended_on_processor: Duration::ZERO,
                });
            }
            Some(done) => {
                done.gaps.push(now - done.ended);
                if shared {
                    done.longest_shared = done.longest_shared.max(pause);
                }
                done.between += on_processor().saturating_sub(done.ended_on_processor);
            }
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
    tokenizer: Arc<Tokenizer>,
    timing: Timing,
    capacity: Capacity,
    taken: Arc<AtomicUsize>,
    work: Option<Work>,
}

impl Scripted {
    pub fn new(model: &Model, tokenizer: Arc<Tokenizer>, timing: Timing) -> Self {
        let config = Config { vocab: tokenizer.len(), ..model.config.clone() };
        let capacity = Capacity { tokens: usize::MAX, step: usize::MAX };
        Scripted { config, tokenizer, timing, capacity, taken: Arc::default(), work: None }
    }

    /// The same on a smaller device.
    pub fn on_a_device_of(self, capacity: Capacity) -> Self {
        Scripted { capacity, ..self }
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

pub struct Rows {
    tokens: Vec<TokenId>,
    next: Vec<Option<TokenId>>,
}

impl Backend for Scripted {
    type Activations = Rows;
    type Cache = Cache;

    fn config(&self) -> &Config {
        &self.config
    }

    fn cache_rounding(&self) -> CacheRounding {
        CacheRounding::On
    }

    fn model_identity(&self) -> [u8; 32] {
        [0; 32]
    }

    fn new_cache(&self) -> StageResult<Cache> {
        let mut cache = Cache { tokens: Vec::new(), room: 0, taken: self.taken.clone() };
        self.reserve(&mut cache, ROOM)?;
        Ok(cache)
    }

    fn cache_bytes(&self, cache: &Cache) -> usize {
        cache.tokens.len() * 4096
    }

    fn reserve(&self, cache: &mut Cache, tokens: usize) -> StageResult {
        let more = tokens.next_multiple_of(ROOM).saturating_sub(cache.room);
        if self.taken.load(Ordering::Relaxed) + more > self.capacity.tokens {
            return Err(BackendError::OutOfMemory(format!("no room for {tokens} tokens")));
        }
        self.taken.fetch_add(more, Ordering::Relaxed);
        cache.room += more;
        Ok(())
    }

    fn embed(&self, batch: &Batch) -> StageResult<Rows> {
        if batch.tokens.len() > self.capacity.step {
            return Err(BackendError::OutOfMemory("no room for activations".to_owned()));
        }
        let prompt_tokens = batch.tokens.len() - batch.decode_rows;
        let pause = self.timing.step + self.timing.prompt_token * prompt_tokens as u32;
        match &self.work {
            Some(work) => work.begin(pause, prompt_tokens > 0 && batch.decode_rows > 0),
            None => std::thread::sleep(pause),
        }
        Ok(Rows { tokens: batch.tokens.clone(), next: vec![None; batch.tokens.len()] })
    }

    fn hc_pre(&self, _: usize, _: Sublayer, _: &Batch, _: &mut Rows) -> StageResult {
        Ok(())
    }

    fn project_qkv(&self, _: usize, _: &Batch, _: &mut Rows) -> StageResult {
        Ok(())
    }

    fn compress(&self, _: usize, _: &Batch, _: &mut Rows, _: &mut [&mut Cache]) -> StageResult {
        Ok(())
    }

    fn select_rows(&self, _: usize, _: &Batch, _: &mut Rows, _: &mut [&mut Cache]) -> StageResult {
        Ok(())
    }

    fn attend(
        &self,
        layer: usize,
        batch: &Batch,
        x: &mut Rows,
        caches: &mut [&mut Cache],
    ) -> StageResult {
        for span in batch.spans.iter().filter(|_| layer == 0) {
            assert!(caches[span.session].room >= span.start + span.rows.len(), "no room was made");
            let cache = &mut caches[span.session].tokens;
            assert_eq!(cache.len(), span.start, "the cache is not where the session stands");
            for row in span.rows.clone() {
                cache.push(x.tokens[row]);
                if batch.logit_rows.contains(&row) {
                    x.next[row] = Some(self.next(cache)?);
                }
            }
        }
        Ok(())
    }

    fn project_output(&self, _: usize, _: &Batch, _: &mut Rows) -> StageResult {
        Ok(())
    }

    fn route(&self, _: usize, _: &Batch, _: &mut Rows) -> StageResult {
        Ok(())
    }

    fn run_experts(&self, _: usize, _: &Batch, _: &mut Rows) -> StageResult {
        Ok(())
    }

    fn hc_post(&self, _: usize, _: Sublayer, _: &Batch, _: &mut Rows) -> StageResult {
        Ok(())
    }

    fn head(&self, batch: &Batch, x: Rows) -> StageResult<HeadOutput> {
        let vocab = self.config.vocab;
        // Not zero, which would be memory that nobody has touched yet.
        let mut logits = vec![-1.0; batch.logit_rows.len() * vocab];
        for (row, logits) in batch.logit_rows.iter().zip(logits.chunks_mut(vocab)) {
            if let Some(next) = x.next[*row] {
                logits[next as usize] = 30.0;
            }
        }
        if let Some(work) = &self.work {
            work.end(batch.best_rows);
        }
        Ok(HeadOutput::from_logits(batch, vocab, logits))
    }

    fn rewind(&self, cache: &mut Cache, position: usize) {
        cache.tokens.truncate(position);
    }

    /// The tokens travel in the window of the first layer.
    fn frontier(&self, cache: &Cache, position: usize) -> StageResult<Frontier> {
        let window =
            cache.tokens[..position].iter().flat_map(|token| token.to_le_bytes()).collect();
        let layer = || LayerFrontier {
            window: Vec::new(),
            compressor: Default::default(),
            indexer: Default::default(),
        };
        let mut layers: Vec<_> = self.config.layers.iter().map(|_| layer()).collect();
        layers[0].window = window;
        Ok(Frontier { position, layers })
    }

    fn set_frontier(&self, cache: &mut Cache, frontier: &Frontier) -> StageResult {
        self.reserve(cache, frontier.position)?;
        let tokens = frontier.layers[0].window.chunks_exact(4);
        cache.tokens = tokens.map(|b| TokenId::from_le_bytes(b.try_into().unwrap())).collect();
        cache.tokens.truncate(frontier.position);
        Ok(())
    }

    fn layer_rows(&self, _: &Cache, _: usize) -> StageResult<LayerRows> {
        Ok(LayerRows::default())
    }

    fn set_layer_rows(&self, _: &mut Cache, _: usize, _: &LayerRows) -> StageResult {
        Ok(())
    }
}
