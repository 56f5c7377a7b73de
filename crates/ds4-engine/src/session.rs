//! A session: the tokens processed so far and the KV state they left.

use crate::{
    Engine, MAX_REWIND, TokenId,
    backend::{Backend, BackendError, CompressorInputs, Frontier, LayerFrontier},
};

/// One sequence of tokens with its KV state.
pub struct Session<B: Backend> {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) cache: B::Cache,
    /// The highest position written since the cache was made or restored.
    high: usize,
    /// Nothing before this position can be rewound to (0, or where the cache was restored).
    floor: usize,
    /// A step failed half-way.
    pub(crate) failed: bool,
}

/// The state of a session at one position, small because compressed rows are append-only:
/// only what later tokens overwrite is copied.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    pub(crate) frontier: Frontier,
    prefix: blake3::Hash,
}

impl Checkpoint {
    /// Tokens processed at the checkpoint.
    pub fn position(&self) -> usize {
        self.frontier.position
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> usize {
        let inputs = |i: &CompressorInputs| size_of_val(&i.values[..]) + size_of_val(&i.scores[..]);
        let layer = |l: &LayerFrontier| l.window.len() + inputs(&l.compressor) + inputs(&l.indexer);
        self.frontier.layers.iter().map(layer).sum()
    }
}

/// Why a session can't go back.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RewindError {
    /// The position is ahead.
    #[error("cannot rewind to {to}: the session has {len} tokens")]
    Ahead {
        /// Asked for.
        to: usize,
        /// Length of the session.
        len: usize,
    },
    /// The state there has been overwritten.
    #[error(
        "cannot rewind to {to}: state is kept from {oldest}; use a checkpoint or prefill again"
    )]
    Overwritten {
        /// Asked for.
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
    /// The device failed.
    #[error("{0}")]
    Backend(String),
}

impl<B: Backend> Session<B> {
    pub(crate) fn new(cache: B::Cache) -> Self {
        Session { tokens: Vec::new(), cache, high: 0, floor: 0, failed: false }
    }

    /// A session whose cache was just set to stand after `tokens`.
    pub(crate) fn restored(tokens: Vec<TokenId>, cache: B::Cache) -> Self {
        let position = tokens.len();
        Session { tokens, cache, high: position, floor: position, failed: false }
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
}

impl<B: Backend> Engine<B> {
    /// Drops the tokens from `position` on, without computing anything.
    ///
    /// # Errors
    /// If `position` is ahead or before [`Session::rewindable_from`]; the session is unchanged.
    pub fn rewind(&self, session: &mut Session<B>, position: usize) -> Result<(), RewindError> {
        let (len, oldest) = (session.len(), session.rewindable_from());
        if position > len {
            return Err(RewindError::Ahead { to: position, len });
        }
        if position < oldest {
            return Err(RewindError::Overwritten { to: position, oldest });
        }
        self.backend().rewind(&mut session.cache, position);
        session.tokens.truncate(position);
        Ok(())
    }

    /// Saves the session's present position, to come back to from any later one.
    ///
    /// # Errors
    /// If the device fails.
    pub fn checkpoint(&self, session: &Session<B>) -> Result<Checkpoint, BackendError> {
        Ok(Checkpoint {
            frontier: self.backend().frontier(&session.cache, session.len())?,
            prefix: session.prefix_hash(session.len()),
        })
    }

    /// Goes back to a checkpoint of this session, or of one with the same tokens up to there.
    ///
    /// # Errors
    /// If the session is shorter or its tokens differ; then it is unchanged.
    pub fn truncate(
        &self,
        session: &mut Session<B>,
        checkpoint: &Checkpoint,
    ) -> Result<(), RewindError> {
        let (position, len) = (checkpoint.position(), session.len());
        if position > len {
            return Err(RewindError::Ahead { to: position, len });
        }
        if session.prefix_hash(position) != checkpoint.prefix {
            return Err(RewindError::OtherTokens { position });
        }
        self.backend()
            .set_frontier(&mut session.cache, &checkpoint.frontier)
            .map_err(|e: BackendError| RewindError::Backend(e.to_string()))?;
        session.tokens.truncate(position);
        (session.high, session.floor) = (position, position);
        Ok(())
    }
}
