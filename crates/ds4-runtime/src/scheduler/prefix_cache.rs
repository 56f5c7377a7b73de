//! The prefix cache: sessions that no request uses, kept because a later prompt may begin like
//! them.
//!
//! Tokens are matched by their ids. Decoded tokens were computed with other arithmetic
//! ([`Phase::Decode`](ds4_engine::Phase)): a prompt that reused them would differ in its last bits
//! from the same prompt without a cache. So they are matched only with
//! [`reuse_answers`](crate::Limits::reuse_answers).

use std::time::Instant;

use ds4_engine::{BackendError, Checkpoint, Engine, Session, SessionError, TokenId};

/// Checkpoints kept besides the first; each is a few megabytes at the full model's shape.
const CHECKPOINTS: usize = 8;

/// A prompt must share so many tokens with a session before the session is forked for it.
const WORTH_A_FORK: usize = 64;

/// So many tokens are soon computed again, so a session is rather taken over than forked.
const SMALL_LOSS: usize = 256;

/// A session and the positions it can go back to.
pub(super) struct LiveSession {
    pub(super) session: Session,
    /// Leading tokens that were prefilled.
    prefilled: usize,
    checkpoints: Vec<Checkpoint>,
    checkpoint_bytes: u64,
}

/// The origin of the computed beginning of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReuseSource {
    /// Nothing was there.
    None,
    /// A session that ended where the prompt goes on.
    Continuation,
    /// A session that was rewound by a few tokens.
    Rewind,
    /// A session that was taken back to a checkpoint.
    Checkpoint,
    /// A fork of a session that went on differently.
    Fork,
}

/// A session that begins a prompt: the tokens that it holds are the prompt's first.
pub(super) struct Start {
    pub(super) live: LiveSession,
    pub(super) source: ReuseSource,
}

/// The longest beginning of a prompt that a session can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PrefixMatch {
    /// Tokens of the session to keep.
    kept: usize,
    by: ReuseSource,
}

/// Idle sessions.
pub(super) struct PrefixCache {
    /// Whether tokens of answers are matched too.
    reuse_answers: bool,
    idle: Vec<Idle>,
    /// Bytes of all together.
    bytes: u64,
}

struct Idle {
    live: LiveSession,
    since: Instant,
    bytes: u64,
}

impl PrefixCache {
    /// An empty one.
    pub(super) fn new(reuse_answers: bool) -> Self {
        PrefixCache { reuse_answers, idle: Vec::new(), bytes: 0 }
    }

    /// A session for `prompt`: the idle one that saves most, or a fork of it or of a running one
    /// if that saves more than taking it over and there is `room` for one more, or an empty one.
    ///
    /// # Errors
    /// If the device fails or has no room.
    pub(super) fn start(
        &mut self,
        engine: &Engine,
        prompt: &[TokenId],
        running: &[&LiveSession],
        room: bool,
    ) -> Result<Start, BackendError> {
        let idle = self.idle.iter().map(|idle| &idle.live);
        let matches = idle.chain(running.iter().copied());
        let matches = matches.map(|live| live.prefix_match(prompt, self.reuse_answers)).enumerate();
        let best = matches.max_by_key(|(_, found)| found.kept);
        let Some((index, found)) = best.filter(|(_, found)| found.kept > 0) else {
            return Start::empty(engine);
        };
        if let Some(Idle { live, .. }) = self.idle.get(index)
            && live.session.len() - found.kept <= found.kept.max(SMALL_LOSS)
        {
            let mut live = self.remove(index);
            live.go_back(engine, found)?;
            return Ok(Start { live, source: found.by });
        }
        let live =
            self.idle.get(index).map_or_else(|| running[index - self.idle.len()], |i| &i.live);
        match live.checkpoint_at(found.kept) {
            Some(checkpoint) if room && found.kept >= WORTH_A_FORK => {
                let live = live.fork_at(engine, checkpoint)?;
                Ok(Start { live, source: ReuseSource::Fork })
            }
            _ => Start::empty(engine),
        }
    }

    /// Keeps a session for later.
    pub(super) fn keep(&mut self, live: LiveSession) {
        let bytes = live.bytes();
        self.bytes += bytes;
        self.idle.push(Idle { live, since: Instant::now(), bytes });
    }

    /// Drops the least recently used session.
    pub(super) fn evict(&mut self) -> bool {
        let oldest = (0..self.idle.len()).min_by_key(|index| self.idle[*index].since);
        oldest.map(|index| self.remove(index)).is_some()
    }

    fn remove(&mut self, index: usize) -> LiveSession {
        let idle = self.idle.remove(index);
        self.bytes -= idle.bytes;
        idle.live
    }

    /// Bytes of all idle sessions.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many are idle.
    pub(super) fn len(&self) -> usize {
        self.idle.len()
    }
}

impl Start {
    fn empty(engine: &Engine) -> Result<Self, BackendError> {
        Ok(Start { live: LiveSession::empty(engine)?, source: ReuseSource::None })
    }
}

impl LiveSession {
    /// One that has computed nothing.
    ///
    /// # Errors
    /// If the device fails or has no room.
    pub(super) fn empty(engine: &Engine) -> Result<Self, BackendError> {
        Ok(Self::new(engine.new_session()?, Vec::new()))
    }

    /// A session that holds prefilled tokens and no others.
    fn new(session: Session, checkpoints: Vec<Checkpoint>) -> Self {
        let prefilled = session.len();
        let mut live = LiveSession { session, prefilled, checkpoints, checkpoint_bytes: 0 };
        live.count_checkpoints();
        live
    }

    fn count_checkpoints(&mut self) {
        self.checkpoint_bytes = self.checkpoints.iter().map(Checkpoint::bytes).sum();
    }

    /// Bytes of KV state.
    pub(super) fn bytes(&self) -> u64 {
        self.session.bytes() + self.checkpoint_bytes
    }

    /// Bytes of checkpoints, which no estimate by length counts.
    pub(super) fn checkpoint_bytes(&self) -> u64 {
        self.checkpoint_bytes
    }

    /// All tokens so far were prefilled.
    pub(super) fn note_prefilled(&mut self) {
        self.prefilled = self.session.len();
    }

    /// Makes the present position one to come back to.
    pub(super) fn checkpoint(&mut self, engine: &Engine) {
        let position = self.session.len();
        if self.checkpoints.last().is_some_and(|last| last.position() >= position) {
            return;
        }
        match engine.checkpoint(&self.session) {
            Ok(checkpoint) => self.checkpoints.push(checkpoint),
            // A device that failed says so again at the next step.
            Err(error) => return tracing::warn!(%error, position, "no checkpoint"),
        }
        if self.checkpoints.len() > 1 + CHECKPOINTS {
            self.checkpoints.remove(1);
        }
        self.count_checkpoints();
    }

    fn checkpoint_at(&self, position: usize) -> Option<&Checkpoint> {
        self.checkpoints.iter().find(|checkpoint| checkpoint.position() == position)
    }

    /// The longest beginning of `prompt` that this session can give; at least one token is left
    /// to compute.
    fn prefix_match(&self, prompt: &[TokenId], reuse_answers: bool) -> PrefixMatch {
        let tokens = self.session.tokens();
        let usable = if reuse_answers { tokens } else { &tokens[..self.prefilled] };
        let common = usable.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let kept = common.min(prompt.len().saturating_sub(1));
        if kept == self.session.len() {
            return PrefixMatch { kept, by: ReuseSource::Continuation };
        }
        if kept >= self.session.rewindable_from() {
            return PrefixMatch { kept, by: ReuseSource::Rewind };
        }
        let positions = self.checkpoints.iter().map(Checkpoint::position);
        let kept = positions.filter(|position| *position <= kept).max().unwrap_or(0);
        PrefixMatch { kept, by: ReuseSource::Checkpoint }
    }

    /// Goes back as far as a match says.
    fn go_back(&mut self, engine: &Engine, found: PrefixMatch) -> Result<(), BackendError> {
        let gone = match (found.by, self.checkpoint_at(found.kept).cloned()) {
            (ReuseSource::Rewind, _) => engine.rewind(&mut self.session, found.kept),
            (ReuseSource::Checkpoint, Some(checkpoint)) => {
                engine.truncate(&mut self.session, &checkpoint)
            }
            _ => Ok(()),
        };
        gone.map_err(device_error)?;
        self.checkpoints.retain(|checkpoint| checkpoint.position() <= found.kept);
        self.count_checkpoints();
        self.prefilled = found.kept;
        Ok(())
    }

    /// A fork that ends at a checkpoint of this session.
    fn fork_at(&self, engine: &Engine, checkpoint: &Checkpoint) -> Result<Self, BackendError> {
        let session = engine.fork_at(&self.session, checkpoint).map_err(device_error)?;
        let end = checkpoint.position();
        let kept = self.checkpoints.iter().filter(|c| c.position() <= end);
        Ok(LiveSession::new(session, kept.cloned().collect()))
    }
}

/// The device's part of an error. Other errors would be a bug: positions come from the session.
fn device_error(error: SessionError) -> BackendError {
    match error {
        SessionError::Backend(error) => error,
        error => BackendError::Device(format!("the prefix cache is inconsistent: {error}")),
    }
}
