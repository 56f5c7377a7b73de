//! A dialogue and the session that follows it.

use std::sync::Arc;

use anyhow::{Result, ensure};
use ds4_engine::{TokenId, sampling::Sampler};
use ds4_model::{
    chat::Dialogue,
    detokenize::{OutputDelta, OutputSplitter},
    profile::Thinking,
    prompt::PromptEncoder,
    tokenizer::Tokenizer,
};

use crate::{
    compute::Engine,
    generation::{self, Drawn, Finish, Limits, Speed},
    live_session::LiveSession,
    terminal::{self, Unit},
};

/// Tokens of a prompt from which a progress bar is worth it.
const LONG_PROMPT: usize = 512;

/// What was said so far, and the means to answer.
pub struct Conversation {
    engine: Engine,
    encoder: PromptEncoder,
    dialogue: Dialogue,
    live: LiveSession,
    sampler: Sampler,
    context: usize,
    answer_tokens: usize,
}

/// One answer.
pub struct Turn {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// How many of them the session held already.
    pub kept: usize,
    /// Sampled tokens.
    pub tokens: Vec<Drawn>,
    /// Their text.
    pub output: OutputDelta,
    /// Why it ended.
    pub finish: Finish,
    /// Speed of the prompt's new tokens.
    pub prefill: Speed,
    /// Speed of the answer's tokens.
    pub decode: Speed,
}

impl Conversation {
    /// A conversation that begins with `dialogue`, within `context` tokens, with answers of at most
    /// `answer_tokens`.
    pub fn new(
        engine: Engine,
        encoder: PromptEncoder,
        dialogue: Dialogue,
        sampler: Sampler,
        context: usize,
        answer_tokens: usize,
    ) -> Result<Self> {
        let live = LiveSession::new(&engine)?;
        Ok(Conversation { engine, encoder, dialogue, live, sampler, context, answer_tokens })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        self.encoder.tokenizer()
    }

    /// Forgets all turns.
    pub fn restart(&mut self, dialogue: Dialogue) {
        self.dialogue = dialogue;
    }

    /// Changes how much to think.
    pub fn set_thinking(&mut self, thinking: Thinking) {
        self.dialogue.set_thinking(thinking);
    }

    /// Changes how many tokens the context may have.
    ///
    /// # Errors
    /// If the model takes fewer.
    pub fn set_context(&mut self, context: usize) -> Result<()> {
        let longest = self.engine.config().context_length;
        ensure!((1..=longest).contains(&context), "found {context}, expected 1 to {longest}");
        self.context = context;
        Ok(())
    }

    /// Adds what the user says.
    pub fn ask(&mut self, text: String) {
        self.dialogue.ask(text);
    }

    /// Answers; gives every piece of text to `each` as it comes.
    ///
    /// The answer joins the dialogue, also one that was interrupted.
    pub fn answer(
        &mut self,
        top_logprobs: Option<usize>,
        mut each: impl FnMut(&OutputDelta) -> Result<()>,
    ) -> Result<Turn> {
        let prompt = self.encoder.encode(self.dialogue.conversation())?.ids;
        ensure!(
            prompt.len() < self.context,
            "the conversation has {} tokens, the context takes {}: raise --ctx (or /ctx), or start \
             anew (/new)",
            prompt.len(),
            self.context
        );
        let mut turn = Turn {
            prompt: prompt.len(),
            kept: 0,
            tokens: Vec::new(),
            output: OutputDelta::default(),
            finish: Finish::Interrupted,
            prefill: Speed::default(),
            decode: Speed::default(),
        };
        if let Some(logits) = self.read(&prompt, &mut turn)? {
            let tokenizer: Arc<Tokenizer> = self.encoder.tokenizer().clone();
            let stops = tokenizer.special().turn_ends();
            let limits = Limits {
                context: self.context,
                answer: self.answer_tokens,
                stops: &stops,
                top_logprobs,
            };
            let mut splitter = OutputSplitter::after_prompt(tokenizer, &prompt);
            let (session, sampler) = (&mut self.live.session, &mut self.sampler);
            let (tokens, output) = (&mut turn.tokens, &mut turn.output);
            let mut deliver = |delta: OutputDelta| {
                output.reasoning.push_str(&delta.reasoning);
                output.answer.push_str(&delta.answer);
                each(&delta)
            };
            let speed = &mut turn.decode;
            turn.finish = generation::decode(
                &self.engine,
                session,
                logits,
                sampler,
                &limits,
                speed,
                |drawn| {
                    let delta = splitter.push(drawn.token);
                    tokens.push(drawn);
                    deliver(delta)
                },
            )?;
            deliver(splitter.finish())?;
        }
        self.dialogue.answer(&turn.output.reasoning, &turn.output.answer);
        Ok(turn)
    }

    /// Computes what the session doesn't hold of `prompt`; the logits after it, unless Ctrl-C was
    /// pressed.
    ///
    /// The next prompt repeats this one except for its last token (reasoning is not repeated), so
    /// that is a place to come back to.
    fn read(&mut self, prompt: &[TokenId], turn: &mut Turn) -> Result<Option<Vec<f32>>> {
        self.live.keep_prefix_of(&self.engine, prompt)?;
        turn.kept = self.live.session.len();
        let new = &prompt[turn.kept..];
        let bar = (new.len() >= LONG_PROMPT)
            .then(|| terminal::progress_bar(new.len() as u64, "reading", Unit::Tokens));
        let (most, last) = new.split_at(new.len() - 1);
        let session = &mut self.live.session;
        let speed = &mut turn.prefill;
        let read = generation::prefill(&self.engine, session, most, bar.as_ref(), speed)?;
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        if read.is_none() {
            return Ok(None);
        }
        self.live.mark(&self.engine);
        generation::step(&self.engine, &mut self.live.session, last, speed).map(Some)
    }

    /// A line about a turn's speed and the context.
    pub fn statistics(&self, turn: &Turn) -> String {
        let kept = match turn.kept {
            0 => String::new(),
            n => format!(" ({n} more were known)"),
        };
        let end = match turn.finish {
            Finish::Stop | Finish::Interrupted => "",
            Finish::Length => "; ended by -n",
            Finish::ContextFull => "; context full: raise --ctx (or /ctx)",
        };
        format!(
            "read {} tokens at {:.1} t/s{kept}, wrote {} at {:.1} t/s, context {} of {}{end}",
            turn.prefill.tokens,
            turn.prefill.per_second(),
            turn.tokens.len(),
            turn.decode.per_second(),
            self.live.session.len(),
            self.context,
        )
    }
}
