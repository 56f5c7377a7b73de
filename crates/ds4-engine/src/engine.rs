//! Steps: many sessions advance at once.

use std::{
    ops::{Deref, Range},
    sync::Arc,
};

use ds4_model::config::Config;

use crate::{
    Session, TokenId,
    backend::{Backend, BackendError, Batch, HeadOutput, PREFILL_MIN, Span},
    forward::forward,
    sampling::{UnusableLogits, argmax},
};

/// Runs a model on a backend.
pub struct Engine<B> {
    backend: B,
}

/// Tokens that one session adds in a step.
pub struct Work<'a, B: Backend> {
    /// The session, which ends up longer by `tokens`.
    pub session: &'a mut Session<B>,
    /// At least one: a prefill chunk, a decoded token, or drafted tokens to verify.
    pub tokens: &'a [TokenId],
    /// Which of them to return logits for.
    pub logits: LogitsWanted,
}

/// Which logits a [`Work`] returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsWanted {
    /// None: a prefill chunk that is not the last.
    None,
    /// Of those after the last token only where the largest is: some devices find it faster than
    /// they hand out half a megabyte.
    Best,
    /// Those after the last token.
    Last,
    /// Those after every token.
    All,
}

impl LogitsWanted {
    fn count(self, tokens: usize) -> usize {
        match self {
            LogitsWanted::None => 0,
            LogitsWanted::Best | LogitsWanted::Last => 1,
            LogitsWanted::All => tokens,
        }
    }
}

/// Logits of some rows, `[rows, vocab]`, or the likeliest token of one.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Logits {
    /// Columns.
    pub vocab: usize,
    /// Row-major.
    pub data: LogitRows,
    /// With [`LogitsWanted::Best`], which has no data.
    best: Option<Result<TokenId, UnusableLogits>>,
}

/// A part of a step's logits, which its works share: a row of the real model has half a megabyte.
#[derive(Debug, Clone, Default)]
pub struct LogitRows {
    step: Arc<Vec<f32>>,
    own: Range<usize>,
}

impl LogitRows {
    /// A vector of its own.
    pub fn into_vec(self) -> Vec<f32> {
        if self.own == (0..self.step.len()) {
            return Arc::unwrap_or_clone(self.step);
        }
        self.to_vec()
    }
}

impl Deref for LogitRows {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.step[self.own.clone()]
    }
}

impl PartialEq for LogitRows {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Logits {
    /// Row `i`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.vocab..(i + 1) * self.vocab]
    }

    /// The last row, if any was wanted.
    pub fn last(&self) -> Option<&[f32]> {
        (!self.data.is_empty()).then(|| &self.data[self.data.len() - self.vocab..])
    }

    /// The likeliest token after the last row (see [`argmax`]), if anything was wanted.
    pub fn best(&self) -> Option<Result<TokenId, UnusableLogits>> {
        self.best.or_else(|| self.last().map(argmax))
    }

    /// Whether nothing was wanted.
    pub fn is_empty(&self) -> bool {
        self.best.is_none() && self.data.is_empty()
    }
}

/// Why a step was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A work without tokens.
    #[error("a step needs at least one token for every session")]
    NoTokens,
    /// A token outside the vocabulary.
    #[error("token {token}: the model has {vocab} tokens")]
    UnknownToken {
        /// The offending id.
        token: TokenId,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The session would grow beyond what the model was made for.
    #[error("context full: {found} tokens, the model takes {limit}")]
    ContextFull {
        /// Tokens after the step.
        found: usize,
        /// The model's limit.
        limit: usize,
    },
    /// There is no memory for what a session would hold.
    #[error("no room for one of the sessions: {reason}")]
    NoRoom {
        /// Which of the works needs it.
        work: usize,
        /// What the device says.
        reason: String,
    },
    /// The session was in a step that failed, and its cache is incomplete.
    #[error("an earlier step of this session failed; start a new session or restore a snapshot")]
    SessionFailed,
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl StepError {
    /// Whether no further step can succeed, of any session.
    pub fn is_fatal(&self) -> bool {
        matches!(self, StepError::Backend(error) if error.is_fatal())
    }
}

impl<B: Backend> Engine<B> {
    /// An engine on `backend`.
    pub fn new(backend: B) -> Self {
        Engine { backend }
    }

    /// Shape of the model.
    pub fn config(&self) -> &Config {
        self.backend.config()
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// An empty session.
    pub fn new_session(&self) -> Result<Session<B>, BackendError> {
        Ok(Session::new(self.backend.new_cache()?))
    }

    /// Bytes of KV state a session holds now.
    pub fn cache_bytes(&self, session: &Session<B>) -> usize {
        self.backend.cache_bytes(&session.cache)
    }

    /// Advances every session by its tokens; returns their logits in the order of `work`.
    ///
    /// A session's logits do not depend on what else is in the batch.
    ///
    /// # Errors
    /// A refused step (all errors but the last) changes nothing. After [`StepError::Backend`] the
    /// sessions of this step are unusable.
    pub fn step(&self, work: &mut [Work<'_, B>]) -> Result<Vec<Logits>, StepError> {
        let config = self.config();
        for w in work.iter() {
            check(config, w)?;
        }
        self.make_room(work)?;
        let (batch, order) = plan(work);
        let mut caches: Vec<_> = work.iter_mut().map(|w| &mut w.session.cache).collect();
        let result = self.backend.run_step(|| forward(&self.backend, &batch, &mut caches));
        for w in work.iter_mut() {
            match &result {
                Ok(_) => w.session.extend(w.tokens),
                Err(_) => w.session.failed = true,
            }
        }
        Ok(distribute(result?, config.vocab, work, &order))
    }

    fn make_room(&self, work: &mut [Work<'_, B>]) -> Result<(), StepError> {
        for (index, w) in work.iter_mut().enumerate() {
            let tokens = w.session.len() + w.tokens.len();
            match self.backend.reserve(&mut w.session.cache, tokens) {
                Err(BackendError::OutOfMemory(reason)) => {
                    return Err(StepError::NoRoom { work: index, reason });
                }
                result => result?,
            }
        }
        Ok(())
    }
}

fn check<B: Backend>(config: &Config, w: &Work<'_, B>) -> Result<(), StepError> {
    if w.session.failed {
        return Err(StepError::SessionFailed);
    }
    if w.tokens.is_empty() {
        return Err(StepError::NoTokens);
    }
    if let Some(&token) = w.tokens.iter().find(|t| **t as usize >= config.vocab) {
        return Err(StepError::UnknownToken { token, vocab: config.vocab });
    }
    let (found, limit) = (w.session.len() + w.tokens.len(), config.context_length);
    if found > limit {
        return Err(StepError::ContextFull { found, limit });
    }
    Ok(())
}

/// The batch, and the order in which the works' logits come out of it.
fn plan<B: Backend>(work: &[Work<'_, B>]) -> (Batch, Vec<usize>) {
    let mut by_span: Vec<usize> = (0..work.len()).collect();
    by_span.sort_by_key(|&i| work[i].tokens.len() >= PREFILL_MIN);
    let mut batch = Batch::default();
    let mut last_row = vec![0; work.len()];
    for &i in &by_span {
        let (w, start) = (&work[i], batch.tokens.len());
        batch.tokens.extend_from_slice(w.tokens);
        let rows = start..batch.tokens.len();
        if rows.len() < PREFILL_MIN {
            batch.decode_rows = rows.end;
        }
        last_row[i] = rows.end;
        batch.spans.push(Span { session: i, start: w.session.len(), rows });
    }
    let wanted = |i: usize| work[i].logits.count(work[i].tokens.len());
    let mut by_logits = by_span;
    let is_best = |i: usize| work[i].logits == LogitsWanted::Best;
    by_logits.sort_by_key(|&i| (wanted(i) >= PREFILL_MIN, !is_best(i)));
    for &i in &by_logits {
        batch.logit_rows.extend(last_row[i] - wanted(i)..last_row[i]);
        if is_best(i) {
            batch.best_rows = batch.logit_rows.len();
        }
        if wanted(i) < PREFILL_MIN {
            batch.decode_logits = batch.logit_rows.len();
        }
    }
    (batch, by_logits)
}

fn distribute<B: Backend>(
    output: HeadOutput,
    vocab: usize,
    work: &[Work<'_, B>],
    order: &[usize],
) -> Vec<Logits> {
    let none = LogitRows { step: Arc::new(output.logits), own: 0..0 };
    let mut out = vec![Logits { vocab, data: none, best: None }; work.len()];
    let (mut best, mut start) = (output.best.into_iter(), 0);
    for &i in order {
        if work[i].logits == LogitsWanted::Best {
            out[i].best = best.next();
            continue;
        }
        let end = start + work[i].logits.count(work[i].tokens.len()) * vocab;
        out[i].data.own = start..end;
        start = end;
    }
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use ds4_model::config::{Config, LayerConfig, LayerKind, Yarn};

    /// A configuration for tests that need one and no weights.
    pub(crate) fn config() -> Config {
        let layer = |kind| LayerConfig {
            kind,
            hash_routed: false,
            swiglu_limit: 10.0,
            shared_swiglu_limit: 10.0,
        };
        Config {
            layers: [LayerKind::Swa, LayerKind::Csa, LayerKind::Hca].map(layer).into(),
            vocab: 300,
            context_length: 1000,
            hidden: 64,
            heads: 2,
            q_rank: 32,
            output_groups: 1,
            output_rank: 32,
            experts: 8,
            experts_used: 2,
            expert_width: 32,
            index_heads: 4,
            index_top_k: 8,
            sinkhorn_iterations: 20,
            hc_epsilon: 1e-6,
            rms_epsilon: 1e-6,
            routed_scale: 1.5,
            rope_base: 10000.0,
            compress_rope_base: 160000.0,
            yarn: Yarn { factor: 16.0, original_context: 65536, beta_fast: 32.0, beta_slow: 1.0 },
        }
    }
}
