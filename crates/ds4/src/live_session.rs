//! A session that follows a conversation: it keeps what the next prompt shares with what it
//! already holds, so that only new tokens are computed.

use anyhow::Result;
use ds4_engine::{Checkpoint, TokenId};
use ds4_text::prompt::shared_prefix;

use crate::compute::{Engine, Session};

/// Checkpoints kept besides the first; each is a few megabytes at the full model's shape.
const CHECKPOINTS: usize = 8;

/// A session and the positions it can go back to.
pub struct LiveSession {
    /// The session.
    pub session: Session,
    checkpoints: Vec<Checkpoint>,
}

impl LiveSession {
    /// An empty one.
    pub fn new(engine: &Engine) -> Result<Self> {
        Ok(LiveSession { session: engine.new_session()?, checkpoints: Vec::new() })
    }

    /// Drops what `prompt` doesn't begin with, and more where that position can't be reached; at
    /// least the prompt's last token is left to compute. What stays is the session's length.
    pub fn keep_prefix_of(&mut self, engine: &Engine, prompt: &[TokenId]) -> Result<()> {
        let position = shared_prefix(self.session.tokens(), prompt);
        self.checkpoints.retain(|c| c.position() <= position);
        if position >= self.session.rewindable_from() {
            engine.rewind(&mut self.session, position)?;
        } else if let Some(checkpoint) = self.checkpoints.last() {
            engine.truncate(&mut self.session, checkpoint)?;
        } else {
            self.session = engine.new_session()?;
        }
        Ok(())
    }

    /// Makes the present position one to come back to.
    pub fn mark(&mut self, engine: &Engine) {
        if self.checkpoints.last().is_some_and(|c| c.position() == self.session.len()) {
            return;
        }
        // A device that fails here says so at the next step.
        let Ok(checkpoint) = engine.checkpoint(&self.session) else { return };
        self.checkpoints.push(checkpoint);
        if self.checkpoints.len() > 1 + CHECKPOINTS {
            self.checkpoints.remove(1);
        }
    }
}
