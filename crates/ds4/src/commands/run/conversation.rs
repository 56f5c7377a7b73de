//! A dialogue and its way through the runtime.

use std::sync::Arc;

use anyhow::{Result, ensure};
use ds4_engine::{TokenId, sampling::SamplingParams};
use ds4_runtime::{self as runtime, AnswerToken, ClientId, Event, Request, Runtime};
use ds4_text::{
    detokenize::{Channel, OutputDelta, OutputSplitter},
    dialogue::Dialogue,
    profile::Thinking,
    prompt::PromptEncoder,
    tokenizer::{SpecialTokens, Tokenizer},
};
use indicatif::ProgressBar;

use super::turn::{Finish, Turn};
use crate::{
    interrupt,
    terminal::{self, Unit},
};

/// Tokens of a prompt from which a progress bar is worth it.
const LONG_PROMPT: usize = 128;

/// How to answer.
pub struct Settings {
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Seed of the first answer's draws; later answers count on from it.
    pub seed: u64,
    /// Tokens that prompt and answer may have together.
    pub context: usize,
    /// Tokens that an answer may have.
    pub answer_tokens: usize,
}

/// What was said so far, and the means to answer.
pub struct Conversation {
    runtime: Runtime,
    encoder: PromptEncoder,
    dialogue: Dialogue,
    /// Answers of the dialogue as they were sampled, without reasoning.
    answers: Vec<Vec<TokenId>>,
    settings: Settings,
    /// The model's longest context.
    longest: usize,
}

impl Conversation {
    /// A conversation that begins with `dialogue`, with a model that takes `longest` tokens.
    pub fn new(
        runtime: Runtime,
        encoder: PromptEncoder,
        dialogue: Dialogue,
        settings: Settings,
        longest: usize,
    ) -> Self {
        Conversation { runtime, encoder, dialogue, answers: Vec::new(), settings, longest }
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
        let longest = self.longest;
        ensure!((1..=longest).contains(&context), "found {context}, expected 1 to {longest}");
        self.settings.context = context;
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
        let mut reply = Reply::new(self.encoder.tokenizer().clone(), &prompt, each);
        reply.turn.finish = self.answer(prompt, top_logprobs, &mut reply)?;
        let (turn, answer) = reply.finish()?;
        dialogue.answer(&turn.output.reasoning, &turn.output.answer);
        self.dialogue = dialogue;
        self.answers.push(answer);
        self.settings.seed = self.settings.seed.wrapping_add(1);
        Ok(turn)
    }

    fn prompt(&self, dialogue: &Dialogue) -> Result<Vec<TokenId>> {
        let context = self.settings.context;
        let prompt = self.encoder.encode(dialogue.conversation())?.ids;
        let special = self.encoder.tokenizer().special();
        let prompt = with_sampled_answers(&prompt, &self.answers, special);
        ensure!(
            prompt.len() < context,
            "the conversation has {} tokens, the context takes {context}: raise --ctx (or /ctx), \
             or start anew (/new)",
            prompt.len(),
        );
        Ok(prompt)
    }

    /// Submits the prompt and hands its events to `reply`, until the last one or Ctrl-C, which
    /// drops the events and so cancels the request.
    fn answer(
        &self,
        prompt: Vec<TokenId>,
        top_logprobs: Option<usize>,
        reply: &mut Reply<impl FnMut(&OutputDelta) -> Result<()>>,
    ) -> Result<Finish> {
        let Settings { sampling, seed, context, answer_tokens } = self.settings;
        // The last token is drawn, and has no place any more.
        let most = context - prompt.len() + 1;
        let mut events = self.runtime.submit(Request {
            client: ClientId::default(),
            prompt,
            max_tokens: answer_tokens.min(most),
            sampling,
            seed,
            top_logprobs,
            grammar: None,
            deadline: None,
        })?;
        while !interrupt::pressed() {
            match events.next_blocking() {
                Some(Event::Started { cached }) => reply.started(cached),
                Some(Event::Prefill { left }) => reply.read(left),
                Some(Event::Token(token)) => reply.token(token)?,
                Some(Event::Finished(finish)) => {
                    let full = reply.turn.tokens.len() < answer_tokens;
                    return Ok(match finish {
                        runtime::Finish::Stop => Finish::Stop,
                        runtime::Finish::Length if full => Finish::ContextFull,
                        runtime::Finish::Length => Finish::Length,
                    });
                }
                Some(Event::Failed(failure)) => return Err(failure.into()),
                None => break,
            }
        }
        Ok(Finish::Interrupted)
    }

    /// A line about a turn's speed and the context.
    pub fn statistics(&self, turn: &Turn) -> String {
        let kept = match turn.cached {
            0 => String::new(),
            n => format!(" ({n} more were known)"),
        };
        let end = match turn.finish {
            Finish::Stop => "",
            Finish::Interrupted => "; stopped",
            Finish::Length => "; ended by -n",
            Finish::ContextFull => "; context full: raise --ctx (or /ctx)",
        };
        let (prefill, decode) = (turn.prefill(), turn.decode());
        format!(
            "read {} tokens at {:.1} t/s{kept}, wrote {} at {:.1} t/s, context {} of {}{end}",
            prefill.tokens,
            prefill.per_second(),
            turn.tokens.len(),
            decode.per_second(),
            turn.context(),
            self.settings.context,
        )
    }
}

/// A turn as it comes.
struct Reply<E> {
    turn: Turn,
    /// Tokens of the answer without reasoning.
    answer: Vec<TokenId>,
    splitter: OutputSplitter,
    bar: Option<ProgressBar>,
    each: E,
}

impl<E: FnMut(&OutputDelta) -> Result<()>> Reply<E> {
    fn new(tokenizer: Arc<Tokenizer>, prompt: &[TokenId], each: E) -> Self {
        let splitter = OutputSplitter::after_prompt(tokenizer, prompt);
        Reply { turn: Turn::new(prompt.len()), answer: Vec::new(), splitter, bar: None, each }
    }

    fn started(&mut self, cached: usize) {
        self.turn.started(cached);
        let new = self.turn.left;
        let bar = || terminal::progress_bar(new as u64, "reading", Unit::Tokens);
        self.bar = (new >= LONG_PROMPT).then(bar);
    }

    fn read(&mut self, left: usize) {
        self.turn.read(left);
        if let Some(bar) = &self.bar {
            bar.set_position((self.turn.prompt - self.turn.cached - left) as u64);
        }
        if left == 0 {
            self.end_bar();
        }
    }

    fn token(&mut self, token: AnswerToken) -> Result<()> {
        if self.splitter.channel() == Channel::Answer {
            self.answer.push(token.token);
        }
        let delta = self.splitter.push(token.token);
        self.turn.add(&delta);
        self.turn.token(token);
        (self.each)(&delta)
    }

    fn end_bar(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn finish(mut self) -> Result<(Turn, Vec<TokenId>)> {
        self.end_bar();
        self.turn.end();
        let delta = self.splitter.finish();
        self.turn.add(&delta);
        (self.each)(&delta)?;
        Ok((self.turn, self.answer))
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
