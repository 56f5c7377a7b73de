//! A session: the tokens processed so far and the KV state they left.

use std::sync::Arc;

use crate::{
    Engine, MAX_REWIND, TokenId,
    backend::{BackendError, Cache, SavedFrontier},
    engine::EngineId,
};

/// One sequence of tokens with its KV state.
pub struct Session {
    pub(crate) engine: EngineId,
    tokens: Vec<TokenId>,
    pub(crate) cache: Box<dyn Cache>,
    /// The highest position written since the cache was made or restored.
    high: usize,
    /// Nothing before this position can be rewound to (0, or where the cache was restored).
    floor: usize,
    /// A step failed half-way.
    pub(crate) failed: bool,
}

/// The state of a session at one position. It is small, because compressed rows are append-only:
/// only the part that later tokens overwrite is copied, and the copy stays on the device.
#[derive(Clone)]
pub struct Checkpoint {
    engine: EngineId,
    position: usize,
    frontier: Arc<dyn SavedFrontier>,
    prefix: blake3::Hash,
}

impl Checkpoint {
    /// Tokens processed at the checkpoint.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> u64 {
        self.frontier.bytes()
    }
}

/// Why a session can't be saved, copied or taken back.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SessionError {
    /// The position is ahead.
    #[error("cannot rewind to {to}: the session has {len} tokens")]
    Ahead {
        /// Position asked for.
        to: usize,
        /// Length of the session.
        len: usize,
    },
    /// The state there has been overwritten.
    #[error(
        "cannot rewind to {to}: state is kept from {oldest}; use a checkpoint or prefill again"
    )]
    Overwritten {
        /// Position asked for.
        to: usize,
        /// The earliest position that works.
        oldest: usize,
    },
    /// The checkpoint belongs to other tokens.
    #[error("the checkpoint at {position} belongs to another conversation")]
    OtherTokens {
        /// Position of the checkpoint.
        position: usize,
    },
    /// The session was in a step that failed, and its cache is incomplete.
    #[error("an earlier step of this session failed; start a new session or restore a snapshot")]
    Failed,
    /// The device failed or has no room.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl SessionError {
    /// Whether nothing can be computed any more.
    pub fn is_fatal(&self) -> bool {
        matches!(self, SessionError::Backend(error) if error.is_fatal())
    }
}

impl Session {
    pub(crate) fn new(engine: EngineId, cache: Box<dyn Cache>) -> Self {
        Self::restored(engine, Vec::new(), cache)
    }

    /// A session whose cache was just set to stand after `tokens`.
    pub(crate) fn restored(engine: EngineId, tokens: Vec<TokenId>, cache: Box<dyn Cache>) -> Self {
        let position = tokens.len();
        Session { engine, tokens, cache, high: position, floor: position, failed: false }
    }

    /// The tokens processed so far.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing was processed yet.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Bytes of KV state that it takes now.
    pub fn bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// The earliest position that [`Engine::rewind`] can go to.
    ///
    /// Rings hold the last [`MAX_REWIND`] positions beyond what attention and the compressors
    /// need, and slots below the highest position written minus their length are gone.
    pub fn rewindable_from(&self) -> usize {
        self.high.saturating_sub(MAX_REWIND).max(self.floor)
    }

    pub(crate) fn extend(&mut self, tokens: &[TokenId]) {
        self.tokens.extend_from_slice(tokens);
        self.high = self.high.max(self.tokens.len());
    }

    fn prefix_hash(&self, len: usize) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for token in &self.tokens[..len] {
            hasher.update(&token.to_le_bytes());
        }
        hasher.finalize()
    }

    /// Checks that `checkpoint` is a position of this session.
    fn check_prefix(&self, checkpoint: &Checkpoint) -> Result<(), SessionError> {
        if checkpoint.engine != self.engine {
            return Err(BackendError::OtherBackend.into());
        }
        let (position, len) = (checkpoint.position, self.len());
        if position > len {
            return Err(SessionError::Ahead { to: position, len });
        }
        if self.prefix_hash(position) != checkpoint.prefix {
            return Err(SessionError::OtherTokens { position });
        }
        Ok(())
    }
}

impl Engine {
    /// Drops the tokens from `position` on, without computing anything.
    ///
    /// # Errors
    /// If `position` is ahead or before [`Session::rewindable_from`]; the session is unchanged.
    pub fn rewind(&self, session: &mut Session, position: usize) -> Result<(), SessionError> {
        self.check_whole(session)?;
        let (len, oldest) = (session.len(), session.rewindable_from());
        if position > len {
            return Err(SessionError::Ahead { to: position, len });
        }
        if position < oldest {
            return Err(SessionError::Overwritten { to: position, oldest });
        }
        session.cache.rewind(position);
        session.tokens.truncate(position);
        Ok(())
    }

    /// Saves the session's present position, to come back to from any later one.
    ///
    /// # Errors
    /// If a step of the session failed, or the device fails or has no room.
    pub fn checkpoint(&self, session: &Session) -> Result<Checkpoint, SessionError> {
        self.check_whole(session)?;
        let position = session.len();
        let frontier = session.cache.save_frontier(position)?.into();
        let engine = session.engine;
        Ok(Checkpoint { engine, position, frontier, prefix: session.prefix_hash(position) })
    }

    /// Goes back to a checkpoint of this session, or of one with the same tokens up to there.
    ///
    /// # Errors
    /// If the session is shorter or its tokens differ; then it is unchanged.
    pub fn truncate(
        &self,
        session: &mut Session,
        checkpoint: &Checkpoint,
    ) -> Result<(), SessionError> {
        self.check_whole(session)?;
        session.check_prefix(checkpoint)?;
        session.cache.restore_frontier(&*checkpoint.frontier)?;
        let position = checkpoint.position;
        session.tokens.truncate(position);
        (session.high, session.floor) = (position, position);
        Ok(())
    }

    /// A copy of a session, made on the device.
    ///
    /// # Errors
    /// If a step of the session failed, or the device fails or has no room.
    pub fn fork(&self, session: &Session) -> Result<Session, SessionError> {
        self.check_whole(session)?;
        Ok(Session {
            engine: session.engine,
            tokens: session.tokens.clone(),
            cache: session.cache.fork(session.len())?,
            high: session.high,
            floor: session.floor,
            failed: false,
        })
    }

    /// A copy of a session as it was at a checkpoint, made on the device. Later rows are not
    /// copied.
    ///
    /// # Errors
    /// As for [`fork`](Self::fork) and [`truncate`](Self::truncate).
    pub fn fork_at(
        &self,
        session: &Session,
        checkpoint: &Checkpoint,
    ) -> Result<Session, SessionError> {
        self.check_whole(session)?;
        session.check_prefix(checkpoint)?;
        let position = checkpoint.position;
        let mut cache = session.cache.fork(position)?;
        cache.restore_frontier(&*checkpoint.frontier)?;
        let tokens = session.tokens[..position].to_vec();
        Ok(Session::restored(session.engine, tokens, cache))
    }

    /// Checks that a session is this engine's and that none of its steps failed.
    pub(crate) fn check_whole(&self, session: &Session) -> Result<(), SessionError> {
        self.check_owner(session)?;
        if session.failed { Err(SessionError::Failed) } else { Ok(()) }
    }
}
