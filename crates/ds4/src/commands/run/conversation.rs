//! A dialogue and the session that follows it.

use std::{mem, sync::Arc};

use anyhow::{Result, ensure};
use ds4_engine::{Logits, LogitsWanted, TokenId, sampling::Sampler};
use ds4_text::{
    detokenize::{Channel, OutputDelta, OutputSplitter},
    dialogue::Dialogue,
    profile::Thinking,
    prompt::PromptEncoder,
    tokenizer::{SpecialTokens, Tokenizer},
};

use crate::{
    compute::Engine,
    generation::{self, Drawn, Finish, Limits, Speed},
    live_session::LiveSession,
    terminal::{self, Unit},
};

/// Tokens of a prompt from which a progress bar is worth it.
const LONG_PROMPT: usize = 128;

/// What was said so far, and the means to answer.
pub struct Conversation {
    engine: Engine,
    encoder: PromptEncoder,
    dialogue: Dialogue,
    /// Answers of the dialogue as they were sampled, without reasoning.
    answers: Vec<Vec<TokenId>>,
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
        let answers = Vec::new();
        Ok(Conversation {
            engine,
            encoder,
            dialogue,
            answers,
            live,
            sampler,
            context,
            answer_tokens,
        })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        self.encoder.tokenizer()
    }

    /// Forgets all turns.
    pub fn restart(&mut self, dialogue: Dialogue) {
        self.dialogue = dialogue;
        self.answers.clear();
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

    /// Answers what the user says; gives every piece of text to `each` as it comes.
    ///
    /// Both join the dialogue, also if the answer is interrupted. After an error the dialogue is
    /// what it was before.
    pub fn reply(
        &mut self,
        question: String,
        top_logprobs: Option<usize>,
        each: impl FnMut(&OutputDelta) -> Result<()>,
    ) -> Result<Turn> {
        let mut dialogue = self.dialogue.clone();
        dialogue.ask(question);
        let prompt = self.prompt(&dialogue)?;
        let answer = self.answer(&prompt, top_logprobs, each);
        let (turn, answer) = match answer {
            Ok(answer) => answer,
            Err(error) => {
                // The step that failed may have left the session incomplete.
                self.live = LiveSession::new(&self.engine)?;
                return Err(error);
            }
        };
        dialogue.answer(&turn.output.reasoning, &turn.output.answer);
        self.dialogue = dialogue;
        self.answers.push(answer);
        Ok(turn)
    }

    fn prompt(&self, dialogue: &Dialogue) -> Result<Vec<TokenId>> {
        let prompt = self.encoder.encode(dialogue.conversation())?.ids;
        let special = self.encoder.tokenizer().special();
        let prompt = with_sampled_answers(&prompt, &self.answers, special);
        ensure!(
            prompt.len() < self.context,
            "the conversation has {} tokens, the context takes {}: raise --ctx (or /ctx), or start \
             anew (/new)",
            prompt.len(),
            self.context
        );
        Ok(prompt)
    }

    /// The turn after `prompt`, and the tokens of its answer without reasoning.
    fn answer(
        &mut self,
        prompt: &[TokenId],
        top_logprobs: Option<usize>,
        mut each: impl FnMut(&OutputDelta) -> Result<()>,
    ) -> Result<(Turn, Vec<TokenId>)> {
        let mut turn = Turn::new(prompt.len());
        let mut answer = Vec::new();
        let tokenizer: Arc<Tokenizer> = self.encoder.tokenizer().clone();
        let limits = Limits {
            context: self.context,
            answer: self.answer_tokens,
            stops: &tokenizer.special().turn_ends(),
            top_logprobs,
        };
        let wanted = limits.wanted(&self.sampler);
        let Some(logits) = self.read(prompt, wanted, &mut turn)? else {
            return Ok((turn, answer));
        };
        let mut splitter = OutputSplitter::after_prompt(tokenizer.clone(), prompt);
        let mut decode = mem::take(&mut turn.decode);
        turn.finish = generation::decode(
            &self.engine,
            &mut self.live.session,
            logits,
            &mut self.sampler,
            &limits,
            &mut decode,
            |drawn| {
                if splitter.channel() == Channel::Answer {
                    answer.push(drawn.token);
                }
                let delta = splitter.push(drawn.token);
                turn.tokens.push(drawn);
                turn.add(&delta);
                each(&delta)
            },
        )?;
        turn.decode = decode;
        let delta = splitter.finish();
        turn.add(&delta);
        each(&delta)?;
        Ok((turn, answer))
    }

    /// Computes what the session doesn't hold of `prompt`; what is wanted after it, unless Ctrl-C was
    /// pressed.
    ///
    /// The next prompt repeats this one except for its last token (reasoning is not repeated), so
    /// that is a place to come back to.
    fn read(
        &mut self,
        prompt: &[TokenId],
        wanted: LogitsWanted,
        turn: &mut Turn,
    ) -> Result<Option<Logits>> {
        self.live.keep_prefix_of(&self.engine, prompt)?;
        turn.kept = self.live.session.len();
        let new = &prompt[turn.kept..];
        let bar = (new.len() >= LONG_PROMPT)
            .then(|| terminal::progress_bar(new.len() as u64, "reading", Unit::Tokens));
        let (most, last) = new.split_at(new.len() - 1);
        let session = &mut self.live.session;
        let speed = &mut turn.prefill;
        let read = generation::prefill(
            &self.engine,
            session,
            most,
            LogitsWanted::None,
            bar.as_ref(),
            speed,
        )?;
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        if read.is_none() {
            return Ok(None);
        }
        self.live.mark(&self.engine);
        let session = &mut self.live.session;
        generation::step(&self.engine, session, last, wanted, speed).map(Some)
    }

    /// A line about a turn's speed and the context.
    pub fn statistics(&self, turn: &Turn) -> String {
        let kept = match turn.kept {
            0 => String::new(),
            n => format!(" ({n} more were known)"),
        };
        let end = match turn.finish {
            Finish::Stop => "",
            Finish::Interrupted => "; stopped",
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

impl Turn {
    fn new(prompt: usize) -> Self {
        Turn {
            prompt,
            kept: 0,
            tokens: Vec::new(),
            output: OutputDelta::default(),
            finish: Finish::Interrupted,
            prefill: Speed::default(),
            decode: Speed::default(),
        }
    }

    fn add(&mut self, delta: &OutputDelta) {
        self.output.reasoning.push_str(&delta.reasoning);
        self.output.answer.push_str(&delta.answer);
    }
}

/// `prompt` with each earlier answer as it was sampled: its text may have other tokens, and then
/// what the session holds of it would be lost, or no text at all, if it was cut inside a character.
///
/// Text never has markers' ids, so an answer lies between `<｜Assistant｜></think>` and the end of
/// its turn.
fn with_sampled_answers(
    prompt: &[TokenId],
    answers: &[Vec<TokenId>],
    special: &SpecialTokens,
) -> Vec<TokenId> {
    let (mut result, mut rest) = (Vec::with_capacity(prompt.len()), prompt);
    for answer in answers {
        let header = [special.assistant, special.think_end];
        let Some(start) = rest.windows(2).position(|pair| pair == header) else { break };
        let (before, after) = rest.split_at(start + 2);
        let Some(end) = after.iter().position(|id| *id == special.eos) else { break };
        result.extend_from_slice(before);
        result.extend_from_slice(answer);
        rest = &after[end..];
    }
    result.extend_from_slice(rest);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_stay_as_they_were_sampled() {
        const USER: TokenId = 93;
        let special = SpecialTokens {
            bos: 90,
            eos: 91,
            user: USER,
            assistant: 94,
            think_start: 95,
            think_end: 96,
            dsml: 97,
            latest_reminder: None,
        };
        let replaced = |prompt: &[TokenId], answers: &[&[TokenId]]| {
            let answers: Vec<_> = answers.iter().map(|answer| answer.to_vec()).collect();
            with_sampled_answers(prompt, &answers, &special)
        };
        let first = [90, USER, 1, 94, 96];
        assert_eq!(replaced(&first, &[]), first);
        let third = [90, USER, 1, 94, 96, 2, 3, 91, USER, 4, 94, 96, 5, 91, USER, 6, 94, 95];
        assert_eq!(
            replaced(&third, &[&[7], &[]]),
            [90, USER, 1, 94, 96, 7, 91, USER, 4, 94, 96, 91, USER, 6, 94, 95]
        );
    }
}
