//! A backend that says what a script says, to test protocols with exact answers.
//!
//! The last user turn names its script as `[name]`. What is said so far selects the rest of the
//! script, however it was split into tokens; after the script, or off it, the turn ends.

use std::{sync::Arc, time::Duration};

use ds4_engine::{
    Backend, TokenId,
    backend::{Batch, Frontier, LayerFrontier, LayerRows, StageResult, Sublayer},
    rows::CacheRounding,
};
use ds4_model::{Model, config::Config, tokenizer::Tokenizer};

const BLOCK: &str = "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"get_weather\">\n\
    <｜DSML｜parameter name=\"city\" string=\"true\">Oslo</｜DSML｜parameter>\n\
    <｜DSML｜parameter name=\"days\" string=\"false\">2</｜DSML｜parameter>\n\
    </｜DSML｜invoke>\n</｜DSML｜tool_calls>";

/// What a coding agent is told to do by the scripts named after it.
fn shell(parameters: &[(&str, &str)]) -> String {
    let parameter = |(name, value): &(&str, &str)| {
        format!("<｜DSML｜parameter name=\"{name}\" string=\"true\">{value}</｜DSML｜parameter>\n")
    };
    let parameters: String = parameters.iter().map(parameter).collect();
    format!(
        "I will make it.</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"bash\">\n{parameters}\
         </｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
}

const COMMAND: (&str, &str) = ("command", "echo made by a tool > made.txt");

const NAMES: [&str; 11] = [
    "text",
    "thinking",
    "tools",
    "thinking tools",
    "unclosed",
    "forced",
    "json",
    "markup",
    "long",
    "pi",
    "opencode",
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
        "pi" => shell(&[COMMAND]),
        "opencode" => shell(&[COMMAND, ("description", "Make the file")]),
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

pub struct Scripted {
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    timing: Timing,
}

impl Scripted {
    pub fn new(model: Arc<Model>, tokenizer: Arc<Tokenizer>, timing: Timing) -> Self {
        Scripted { model, tokenizer, timing }
    }

    fn next(&self, history: &[TokenId]) -> TokenId {
        let special = self.tokenizer.special();
        let Some(header) = history.iter().rposition(|t| *t == special.assistant) else {
            return special.eos;
        };
        let user = history[..header].iter().rposition(|t| *t == special.user).unwrap_or(0);
        let asked = self.tokenizer.decode(&history[user..header]);
        let script = script(name_in(&asked));
        let said = self.tokenizer.decode(history.get(header + 2..).unwrap_or_default());
        match script.strip_prefix(&said).filter(|rest| !rest.is_empty()) {
            // Scripts are long; only the next token is asked for.
            Some(rest) => {
                let end = rest.char_indices().nth(200).map_or(rest.len(), |(at, _)| at);
                self.tokenizer.encode_with_markers(&rest[..end]).unwrap()[0]
            }
            None => special.eos,
        }
    }
}

pub struct Rows {
    tokens: Vec<TokenId>,
    next: Vec<Option<TokenId>>,
}

impl Backend for Scripted {
    type Activations = Rows;
    type Cache = Vec<TokenId>;

    fn config(&self) -> &Config {
        &self.model.config
    }

    fn cache_rounding(&self) -> CacheRounding {
        CacheRounding::On
    }

    fn model_identity(&self) -> [u8; 32] {
        [0; 32]
    }

    fn new_cache(&self) -> StageResult<Self::Cache> {
        Ok(Vec::new())
    }

    fn cache_bytes(&self, cache: &Self::Cache) -> usize {
        cache.len() * 4096
    }

    fn embed(&self, batch: &Batch) -> StageResult<Rows> {
        let prompt_tokens = batch.tokens.len() - batch.decode_rows;
        std::thread::sleep(self.timing.step + self.timing.prompt_token * prompt_tokens as u32);
        Ok(Rows { tokens: batch.tokens.clone(), next: vec![None; batch.tokens.len()] })
    }

    fn hc_pre(&self, _: usize, _: Sublayer, _: &Batch, _: &mut Rows) -> StageResult {
        Ok(())
    }

    fn project_qkv(&self, _: usize, _: &Batch, _: &mut Rows) -> StageResult {
        Ok(())
    }

    fn compress(
        &self,
        _: usize,
        _: &Batch,
        _: &mut Rows,
        _: &mut [&mut Vec<TokenId>],
    ) -> StageResult {
        Ok(())
    }

    fn select_rows(
        &self,
        _: usize,
        _: &Batch,
        _: &mut Rows,
        _: &mut [&mut Vec<TokenId>],
    ) -> StageResult {
        Ok(())
    }

    fn attend(
        &self,
        layer: usize,
        batch: &Batch,
        x: &mut Rows,
        caches: &mut [&mut Vec<TokenId>],
    ) -> StageResult {
        for span in batch.spans.iter().filter(|_| layer == 0) {
            let cache = &mut *caches[span.session];
            assert_eq!(cache.len(), span.start, "the cache is not where the session stands");
            for row in span.rows.clone() {
                cache.push(x.tokens[row]);
                if batch.logit_rows.contains(&row) {
                    x.next[row] = Some(self.next(cache));
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

    fn head(&self, batch: &Batch, x: Rows) -> StageResult<Vec<f32>> {
        let vocab = self.model.config.vocab;
        let mut logits = vec![0.0; batch.logit_rows.len() * vocab];
        for (row, logits) in batch.logit_rows.iter().zip(logits.chunks_mut(vocab)) {
            if let Some(next) = x.next[*row] {
                logits[next as usize] = 30.0;
            }
        }
        Ok(logits)
    }

    fn rewind(&self, cache: &mut Vec<TokenId>, position: usize) {
        cache.truncate(position);
    }

    /// The tokens travel in the window of the first layer.
    fn frontier(&self, cache: &Vec<TokenId>, position: usize) -> Frontier {
        let window = cache[..position].iter().flat_map(|token| token.to_le_bytes()).collect();
        let layer = || LayerFrontier {
            window: Vec::new(),
            compressor: Default::default(),
            indexer: Default::default(),
        };
        let mut layers: Vec<_> = self.model.config.layers.iter().map(|_| layer()).collect();
        layers[0].window = window;
        Frontier { position, layers }
    }

    fn set_frontier(&self, cache: &mut Vec<TokenId>, frontier: &Frontier) -> StageResult {
        let tokens = frontier.layers[0].window.chunks_exact(4);
        *cache = tokens.map(|b| TokenId::from_le_bytes(b.try_into().unwrap())).collect();
        cache.truncate(frontier.position);
        Ok(())
    }

    fn layer_rows(&self, _: &Vec<TokenId>, _: usize) -> LayerRows {
        LayerRows::default()
    }

    fn set_layer_rows(&self, _: &mut Vec<TokenId>, _: usize, _: &LayerRows) -> StageResult {
        Ok(())
    }
}
