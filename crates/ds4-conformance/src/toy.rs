//! A toy backend: no weights, no arithmetic, and a record of every stage that is called.
//!
//! The next token is the sum of the tokens so far, modulo the vocabulary; its logit is 1, all
//! others are 0. With [`Toy::with_graphs`] a step that only decodes is captured at first sight and
//! replayed from then on, as a device with CUDA graphs does.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use ds4_engine::{
    Backend, TokenId,
    backend::{
        Batch, Cache, Forward, HeadOutput, MemoryReport, SavedFrontier, StageResult, Step,
        Sublayer, own_cache, own_frontier,
    },
    layout::{Frontier, LayerFrontier, Plane, StateLayout},
    rows::CacheRounding,
};
use ds4_model::{config::Config, synth};

/// A stage that was called, with its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// [`Step::embed`].
    Embed,
    /// [`Step::hc_pre`].
    HcPre(usize, Sublayer),
    /// [`Step::project_and_compress`].
    ProjectAndCompress(usize),
    /// [`Step::select_rows`].
    SelectRows(usize),
    /// [`Step::attend`].
    Attend(usize),
    /// [`Step::project_output`].
    ProjectOutput(usize),
    /// [`Step::route`].
    Route(usize),
    /// [`Step::run_experts`].
    RunExperts(usize),
    /// [`Step::hc_post`].
    HcPost(usize, Sublayer),
    /// [`Step::head`].
    Head,
}

/// A step of the toy, as it ran.
#[derive(Debug, Clone, PartialEq)]
pub struct Ran {
    /// The batch.
    pub batch: Batch,
    /// The stages in order.
    pub calls: Vec<Call>,
    /// Whether the stages were captured earlier, and `forward` was not called.
    pub replayed: bool,
}

/// The record of a toy's steps; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Record(Arc<Mutex<Vec<Ran>>>);

impl Record {
    /// The steps since the last call.
    pub fn take(&self) -> Vec<Ran> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The toy backend.
pub struct Toy {
    config: Config,
    layout: StateLayout,
    record: Record,
    /// Captured stages by number of rows; none if nothing is captured.
    graphs: Option<Mutex<HashMap<usize, Vec<Call>>>>,
}

impl Toy {
    /// A toy with a layer of every kind and a vocabulary of `vocab` tokens.
    pub fn new(vocab: usize, record: Record) -> Toy {
        let config = Config { vocab, ..synth::tiny() };
        let layout = StateLayout::new(&config, CacheRounding::On);
        Toy { config, layout, record, graphs: None }
    }

    /// The same, with captured steps.
    pub fn with_graphs(self) -> Toy {
        Toy { graphs: Some(Mutex::default()), ..self }
    }

    /// The stages of a step, and whether they were captured earlier.
    fn calls(&self, batch: &Batch, forward: Forward<'_>) -> StageResult<(Vec<Call>, bool)> {
        let mut step = ToyStep::default();
        let rows = batch.tokens.len();
        let Some(graphs) = self.graphs.as_ref().filter(|_| batch.decode_rows == rows) else {
            forward(&mut step)?;
            return Ok((step.calls, false));
        };
        let mut graphs = graphs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(calls) = graphs.get(&rows) {
            return Ok((calls.clone(), true));
        }
        forward(&mut step)?;
        graphs.insert(rows, step.calls.clone());
        Ok((step.calls, false))
    }
}

/// Notes the stages that are called.
#[derive(Default)]
struct ToyStep {
    calls: Vec<Call>,
}

impl ToyStep {
    fn note(&mut self, call: Call) -> StageResult {
        self.calls.push(call);
        Ok(())
    }
}

impl Step for ToyStep {
    fn embed(&mut self) -> StageResult {
        self.note(Call::Embed)
    }

    fn hc_pre(&mut self, layer: usize, sublayer: Sublayer) -> StageResult {
        self.note(Call::HcPre(layer, sublayer))
    }

    fn project_and_compress(&mut self, layer: usize) -> StageResult {
        self.note(Call::ProjectAndCompress(layer))
    }

    fn select_rows(&mut self, layer: usize) -> StageResult {
        self.note(Call::SelectRows(layer))
    }

    fn attend(&mut self, layer: usize) -> StageResult {
        self.note(Call::Attend(layer))
    }

    fn project_output(&mut self, layer: usize) -> StageResult {
        self.note(Call::ProjectOutput(layer))
    }

    fn route(&mut self, layer: usize) -> StageResult {
        self.note(Call::Route(layer))
    }

    fn run_experts(&mut self, layer: usize) -> StageResult {
        self.note(Call::RunExperts(layer))
    }

    fn hc_post(&mut self, layer: usize, sublayer: Sublayer) -> StageResult {
        self.note(Call::HcPost(layer, sublayer))
    }

    fn head(&mut self) -> StageResult {
        self.note(Call::Head)
    }
}

/// The cache of a toy session: its tokens.
#[derive(Clone, Default)]
struct Tokens(Vec<TokenId>);

impl SavedFrontier for Tokens {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }
}

impl Cache for Tokens {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn reserve(&mut self, _tokens: usize) -> StageResult {
        Ok(())
    }

    fn rewind(&mut self, position: usize) {
        self.0.truncate(position);
    }

    fn fork(&self, position: usize) -> StageResult<Box<dyn Cache>> {
        Ok(Box::new(Tokens(self.0[..position].to_vec())))
    }

    fn save_frontier(&self, position: usize) -> StageResult<Box<dyn SavedFrontier>> {
        Ok(Box::new(Tokens(self.0[..position].to_vec())))
    }

    fn restore_frontier(&mut self, saved: &dyn SavedFrontier) -> StageResult {
        *self = own_frontier::<Tokens>(saved)?.clone();
        Ok(())
    }

    /// The tokens travel in the window of the first layer.
    fn read_frontier(&self, position: usize) -> StageResult<Frontier> {
        let window = self.0[..position].iter().flat_map(|token| token.to_le_bytes()).collect();
        let first = LayerFrontier { window, ..LayerFrontier::default() };
        Ok(Frontier { position, layers: vec![first] })
    }

    fn write_frontier(&mut self, frontier: &Frontier) -> StageResult {
        let tokens = frontier.layers[0].window.chunks_exact(4);
        self.0 = tokens.map(|b| TokenId::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Ok(())
    }

    fn read_rows(&self, _: usize, _: Plane, _: Range<usize>) -> StageResult<Vec<u8>> {
        Ok(Vec::new())
    }

    fn write_rows(&mut self, _: usize, _: Plane, _: usize, _: &[u8]) -> StageResult {
        Ok(())
    }
}

impl Backend for Toy {
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
        "toy"
    }

    fn device(&self) -> String {
        "a toy".to_owned()
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

    fn new_cache(&self) -> StageResult<Box<dyn Cache>> {
        Ok(Box::new(Tokens::default()))
    }

    fn step(
        &self,
        batch: &Batch,
        caches: &mut [&mut dyn Cache],
        forward: Forward<'_>,
    ) -> StageResult<HeadOutput> {
        let (calls, replayed) = self.calls(batch, forward)?;
        let vocab = self.config.vocab;
        let mut next = vec![0; batch.tokens.len()];
        for span in &batch.spans {
            let Tokens(tokens) = own_cache(&mut *caches[span.session])?;
            assert_eq!(tokens.len(), span.start, "the cache is not where the session stands");
            for row in span.rows.clone() {
                tokens.push(batch.tokens[row]);
                next[row] = tokens.iter().sum::<TokenId>() as usize % vocab;
            }
        }
        let mut logits = vec![0.0; batch.logit_rows.len() * vocab];
        for (row, logits) in batch.logit_rows.iter().zip(logits.chunks_exact_mut(vocab)) {
            logits[next[*row]] = 1.0;
        }
        let ran = Ran { batch: batch.clone(), calls, replayed };
        self.record.0.lock().unwrap_or_else(PoisonError::into_inner).push(ran);
        Ok(HeadOutput::from_logits(batch, vocab, logits))
    }
}
