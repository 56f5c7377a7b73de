//! Sessions that no request uses, kept because a later prompt may begin like them.

use std::time::Instant;

use ds4_engine::{Backend, BackendError, Checkpoint, Engine, Session, TokenId};
use ds4_text::tokenizer::Tokenizer;

use super::overlap::Overlap;

/// Checkpoints kept besides the first; each is a few megabytes at the full model's shape.
const CHECKPOINTS: usize = 8;

/// A prompt must share so many tokens with a session before the session is copied for it.
const WORTH_A_COPY: usize = 64;

/// So many tokens are soon computed again, so a session is rather taken over than copied.
const SMALL_LOSS: usize = 256;

/// A copy costs about as much as computing one token in so many of the session's.
const COPY_SHARE: usize = 32;

/// A session and the positions it can go back to.
pub(super) struct LiveSession<B: Backend> {
    pub(super) session: Session<B>,
    checkpoints: Vec<Checkpoint>,
    checkpoint_bytes: usize,
}

/// Where the computed beginning of a prompt came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum ReuseSource {
    /// Nothing was there.
    None,
    /// A session that ended where the prompt goes on.
    Continuation,
    /// A session that was taken back a few tokens.
    Rewind,
    /// A session that was taken back to a checkpoint.
    Checkpoint,
    /// A copy of a session that went on differently.
    Copy,
}

/// A session that begins a prompt.
pub(super) struct Start<B: Backend> {
    pub(super) live: LiveSession<B>,
    /// Tokens of the prompt that the session stands for.
    pub(super) covered: usize,
    pub(super) source: ReuseSource,
}

/// How a session can begin a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reach {
    /// Tokens of the session to keep.
    kept: usize,
    /// Tokens of the prompt that they stand for.
    covered: usize,
    by: ReuseSource,
}

/// Idle sessions, the longest unused first.
pub(super) struct Pool<B: Backend> {
    idle: Vec<Idle<B>>,
    /// Of all together.
    bytes: usize,
}

struct Idle<B: Backend> {
    live: LiveSession<B>,
    since: Instant,
    bytes: usize,
}

impl<B: Backend> Pool<B> {
    /// An empty one.
    pub(super) fn new() -> Self {
        Pool { idle: Vec::new(), bytes: 0 }
    }

    /// A session for `prompt`: the idle one that saves most, or a copy of it or of a running one
    /// if that saves more than taking it over and there is `room` for one more, or an empty one.
    pub(super) fn start(
        &mut self,
        engine: &Engine<B>,
        tokenizer: &Tokenizer,
        prompt: &[TokenId],
        running: &[&LiveSession<B>],
        room: bool,
    ) -> Result<Start<B>, BackendError> {
        let idle = self.idle.iter().map(|idle| &idle.live);
        let reaches = idle.chain(running.iter().copied());
        let reaches = reaches.map(|live| live.reach(tokenizer, prompt)).enumerate();
        let best = reaches.max_by_key(|(_, reach)| reach.covered);
        let Some((index, reach)) = best.filter(|(_, reach)| reach.covered > 0) else {
            return Start::empty(engine);
        };
        if let Some(Idle { live, .. }) = self.idle.get(index)
            && live.session.len() - reach.kept <= reach.kept.max(SMALL_LOSS)
        {
            let mut live = self.remove(index);
            if live.go(engine, reach) {
                return Ok(Start { live, covered: reach.covered, source: reach.by });
            }
            return Start::empty(engine);
        }
        let live =
            self.idle.get(index).map_or_else(|| running[index - self.idle.len()], |i| &i.live);
        let worth = reach.covered >= WORTH_A_COPY.max(live.session.len() / COPY_SHARE);
        match (worth && room).then(|| live.copy(engine, reach)).flatten() {
            Some(live) => Ok(Start { live, covered: reach.covered, source: ReuseSource::Copy }),
            None => Start::empty(engine),
        }
    }

    /// Keeps a session for later.
    pub(super) fn keep(&mut self, engine: &Engine<B>, live: LiveSession<B>) {
        let bytes = live.bytes(engine);
        self.bytes += bytes;
        self.idle.push(Idle { live, since: Instant::now(), bytes });
    }

    /// Drops the longest unused session.
    pub(super) fn evict(&mut self) -> bool {
        let oldest = (0..self.idle.len()).min_by_key(|index| self.idle[*index].since);
        oldest.map(|index| self.remove(index)).is_some()
    }

    fn remove(&mut self, index: usize) -> LiveSession<B> {
        let idle = self.idle.remove(index);
        self.bytes -= idle.bytes;
        idle.live
    }

    /// Bytes of all idle sessions.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many are idle.
    pub(super) fn len(&self) -> usize {
        self.idle.len()
    }
}

impl<B: Backend> Start<B> {
    fn empty(engine: &Engine<B>) -> Result<Self, BackendError> {
        let live = LiveSession::empty(engine)?;
        Ok(Start { live, covered: 0, source: ReuseSource::None })
    }
}

impl<B: Backend> LiveSession<B> {
    /// One that has computed nothing.
    pub(super) fn empty(engine: &Engine<B>) -> Result<Self, BackendError> {
        Ok(Self::new(engine.new_session()?, Vec::new()))
    }

    fn new(session: Session<B>, checkpoints: Vec<Checkpoint>) -> Self {
        let mut live = LiveSession { session, checkpoints, checkpoint_bytes: 0 };
        live.count_checkpoints();
        live
    }

    fn count_checkpoints(&mut self) {
        self.checkpoint_bytes = self.checkpoints.iter().map(Checkpoint::bytes).sum();
    }

    /// Bytes of KV state.
    pub(super) fn bytes(&self, engine: &Engine<B>) -> usize {
        engine.cache_bytes(&self.session) + self.checkpoint_bytes
    }

    /// Bytes of checkpoints, which no estimate by length counts.
    pub(super) fn checkpoint_bytes(&self) -> usize {
        self.checkpoint_bytes
    }

    /// Makes the present position one to come back to.
    pub(super) fn mark(&mut self, engine: &Engine<B>) {
        let position = self.session.len();
        if self.checkpoints.last().is_some_and(|last| last.position() >= position) {
            return;
        }
        // A device that fails here says so at the next step.
        let Ok(checkpoint) = engine.checkpoint(&self.session) else { return };
        self.checkpoints.push(checkpoint);
        if self.checkpoints.len() > 1 + CHECKPOINTS {
            self.checkpoints.remove(1);
        }
        self.count_checkpoints();
    }

    /// The most of `prompt` that this session can begin.
    fn reach(&self, tokenizer: &Tokenizer, prompt: &[TokenId]) -> Reach {
        let overlap = Overlap::new(tokenizer, self.session.tokens(), prompt);
        let (kept, covered) = overlap.furthest(prompt.len());
        if kept == self.session.len() {
            return Reach { kept, covered, by: ReuseSource::Continuation };
        }
        if kept >= self.session.rewindable_from() {
            return Reach { kept, covered, by: ReuseSource::Rewind };
        }
        let reachable = self.checkpoints.iter().rev().filter_map(|checkpoint| {
            let kept = checkpoint.position();
            let covered = overlap.covered_by(kept).filter(|covered| *covered < prompt.len())?;
            Some(Reach { kept, covered, by: ReuseSource::Checkpoint })
        });
        let nothing = Reach { kept: 0, covered: 0, by: ReuseSource::None };
        reachable.max_by_key(|reach| reach.covered).unwrap_or(nothing)
    }

    /// Goes back as far as `reach` says; whether it could.
    fn go(&mut self, engine: &Engine<B>, reach: Reach) -> bool {
        let gone = match reach.by {
            ReuseSource::Rewind => engine.rewind(&mut self.session, reach.kept),
            ReuseSource::Checkpoint => {
                let found = self.checkpoints.iter().find(|c| c.position() == reach.kept);
                found.map_or(Ok(()), |checkpoint| engine.truncate(&mut self.session, checkpoint))
            }
            _ => Ok(()),
        };
        if let Err(error) = gone {
            tracing::error!(%error, "a session could not go back");
        }
        self.checkpoints.retain(|checkpoint| checkpoint.position() <= reach.kept);
        self.count_checkpoints();
        self.session.len() == reach.kept
    }

    /// A copy that begins a prompt as `reach` says. Only checkpoints outlive copying.
    fn copy(&self, engine: &Engine<B>, reach: Reach) -> Option<Self> {
        let kept = self.checkpoints.iter().filter(|c| c.position() <= reach.kept);
        let checkpoints: Vec<_> = kept.cloned().collect();
        checkpoints.iter().find(|c| c.position() == reach.kept)?;
        let session = engine.restore(&engine.snapshot(&self.session).ok()?).ok()?;
        let mut copy = LiveSession::new(session, checkpoints);
        copy.go(engine, Reach { by: ReuseSource::Checkpoint, ..reach }).then_some(copy)
    }
}
