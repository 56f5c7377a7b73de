//! Steps: many sessions advance at once.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use ds4_model::config::Config;

use crate::{
    MAX_REWIND, Session, StepOutput, TokenId, Wanted,
    backend::{Backend, BackendError, Cache, Phase},
    forward::forward,
    layout::StateLayout,
    plan::Plan,
};

/// Runs a model on a backend. Clones are the same engine.
#[derive(Clone)]
pub struct Engine {
    backend: Arc<dyn Backend>,
    id: EngineId,
}

/// Tells the sessions of one engine from those of another in the same process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EngineId(u64);

/// Tokens that one session adds in a step.
pub struct Work<'a> {
    /// The session, which ends up longer by `tokens`.
    pub session: &'a mut Session,
    /// At least one: a prefill chunk, a decoded token, or drafted tokens to verify.
    pub tokens: &'a [TokenId],
    /// The arithmetic to compute them with. At most [`MAX_REWIND`] tokens can be decoded at once.
    pub phase: Phase,
    /// Results to return, for the last tokens of `tokens`.
    pub wanted: &'a [Wanted],
}

/// Why a step was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A work without tokens.
    #[error("a step needs at least one token for every session")]
    NoTokens,
    /// More results than tokens.
    #[error("a step of {tokens} tokens can't return {wanted} results")]
    TooManyWanted {
        /// Results asked for.
        wanted: usize,
        /// Tokens of the work.
        tokens: usize,
    },
    /// More tokens to decode than a step takes.
    #[error("{found} tokens of a session to decode in one step, at most {MAX_REWIND} can be")]
    TooManyDecoded {
        /// Tokens of the work.
        found: usize,
    },
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
        /// Index of the work that needs it.
        work: usize,
        /// The device's reason.
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

impl Engine {
    /// An engine on `backend`.
    pub fn new(backend: impl Backend + 'static) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = EngineId(NEXT.fetch_add(1, Ordering::Relaxed));
        Engine { backend: Arc::new(backend), id }
    }

    /// Shape of the model.
    pub fn config(&self) -> &Config {
        self.backend.config()
    }

    /// Layout of a session's KV state.
    pub fn layout(&self) -> &StateLayout {
        self.backend.layout()
    }

    /// The backend.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    pub(crate) fn id(&self) -> EngineId {
        self.id
    }

    /// An empty session.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is no room for another session.
    pub fn new_session(&self) -> Result<Session, BackendError> {
        Ok(Session::new(self.id, self.backend.new_cache()?))
    }

    /// Does ahead of time the work that the first steps of up to `sessions` sessions would wait
    /// for, such as capturing CUDA graphs.
    ///
    /// # Errors
    /// If the device fails or has no room.
    pub fn warm_up(&self, sessions: usize) -> Result<(), BackendError> {
        let config = self.config();
        self.backend.warm_up(sessions, &|step| forward(step, config))
    }

    /// Ensures capacity for `tokens` tokens in a session.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if there is no room; the session is unchanged.
    pub fn reserve(&self, session: &mut Session, tokens: usize) -> Result<(), BackendError> {
        self.check_owner(session)?;
        let limit = self.config().context_length;
        if tokens > limit {
            let reason = format!("{tokens} tokens are more than {limit}, the model's context");
            return Err(BackendError::OutOfMemory(reason));
        }
        session.cache.reserve(tokens)
    }

    /// Advances every session by its tokens; returns their results in the order of `work`.
    ///
    /// A session's results do not depend on the rest of the batch.
    ///
    /// # Errors
    /// A refused step (all errors but the last) changes nothing. After [`StepError::Backend`] the
    /// sessions of this step are unusable.
    pub fn step(&self, work: &mut [Work<'_>]) -> Result<Vec<StepOutput>, StepError> {
        for w in work.iter() {
            self.check(w)?;
        }
        self.make_room(work)?;
        let plan = Plan::new(work);
        let config = self.config();
        let mut caches: Vec<&mut dyn Cache> =
            work.iter_mut().map(|w| &mut *w.session.cache).collect();
        let result = self.backend.step(&plan.batch, &mut caches, &|step| forward(step, config));
        for w in work.iter_mut() {
            match &result {
                Ok(_) => w.session.extend(w.tokens),
                Err(_) => w.session.failed = true,
            }
        }
        Ok(plan.distribute(result?, config.vocab))
    }

    fn check(&self, w: &Work<'_>) -> Result<(), StepError> {
        let config = self.config();
        self.check_owner(w.session)?;
        if w.session.failed {
            return Err(StepError::SessionFailed);
        }
        let tokens = w.tokens.len();
        if tokens == 0 {
            return Err(StepError::NoTokens);
        }
        if w.wanted.len() > tokens {
            return Err(StepError::TooManyWanted { wanted: w.wanted.len(), tokens });
        }
        if w.phase == Phase::Decode && tokens > MAX_REWIND {
            return Err(StepError::TooManyDecoded { found: tokens });
        }
        if let Some(&token) = w.tokens.iter().find(|t| **t as usize >= config.vocab) {
            return Err(StepError::UnknownToken { token, vocab: config.vocab });
        }
        let (found, limit) = (w.session.len() + tokens, config.context_length);
        if found > limit {
            return Err(StepError::ContextFull { found, limit });
        }
        Ok(())
    }

    pub(crate) fn check_owner(&self, session: &Session) -> Result<(), BackendError> {
        if session.engine == self.id { Ok(()) } else { Err(BackendError::OtherBackend) }
    }

    fn make_room(&self, work: &mut [Work<'_>]) -> Result<(), StepError> {
        for (index, w) in work.iter_mut().enumerate() {
            let tokens = w.session.len() + w.tokens.len();
            match w.session.cache.reserve(tokens) {
                Err(BackendError::OutOfMemory(reason)) => {
                    return Err(StepError::NoRoom { work: index, reason });
                }
                result => result?,
            }
        }
        Ok(())
    }
}
