//! What the model samples, split into reasoning and answer.

use std::{mem, sync::Arc};

use ds4_model::TokenId;

use super::Utf8Decoder;
use crate::tokenizer::Tokenizer;

/// What a piece of output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Channel {
    /// Reasoning, before `</think>`.
    Reasoning,
    /// The answer.
    Answer,
}

/// What a token adds to the output. One that ends the reasoning may complete both.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OutputDelta {
    /// Reasoning.
    pub reasoning: String,
    /// Answer. Tool calls are part of it, as text.
    pub answer: String,
}

/// Splits sampled tokens into reasoning and answer, by the marker between
/// them: text that spells `</think>` is text. Line ends at the start of
/// either and at the end of reasoning are dropped, as DeepSeek's parser does.
pub struct OutputSplitter {
    tokenizer: Arc<Tokenizer>,
    utf8: Utf8Decoder,
    channel: Channel,
    /// Nothing but line ends has come yet.
    at_start: bool,
    /// Line ends of the reasoning which are dropped if it ends here.
    held_line_ends: usize,
}

impl OutputSplitter {
    /// Splits what is sampled after `prompt`. Where the prompt ends in the
    /// middle of reasoning or answer, these are continued.
    pub fn after_prompt(tokenizer: Arc<Tokenizer>, prompt: &[TokenId]) -> Self {
        let special = tokenizer.special();
        let (start, end) = (special.think_start, special.think_end);
        let marker = prompt.iter().rposition(|&id| id == start || id == end);
        let is_open = marker.is_some_and(|position| prompt[position] == start);
        OutputSplitter {
            utf8: Utf8Decoder::default(),
            channel: if is_open { Channel::Reasoning } else { Channel::Answer },
            at_start: marker.is_some_and(|position| position + 1 == prompt.len()),
            held_line_ends: 0,
            tokenizer,
        }
    }

    /// What comes next, unless the next token is `</think>`.
    pub fn channel(&self) -> Channel {
        self.channel
    }

    /// The text that `id` completes.
    pub fn push(&mut self, id: TokenId) -> OutputDelta {
        let mut delta = OutputDelta::default();
        let bytes = self.tokenizer.bytes_of(id).unwrap_or_default();
        if !self.tokenizer.is_marker(id) {
            let text = self.utf8.push(bytes);
            self.add(&text, &mut delta);
            return delta;
        }
        let special = self.tokenizer.special();
        let (is_end, is_shown) =
            (id == special.think_end, id == special.think_start || id == special.dsml);
        let text =
            if is_shown { String::from_utf8_lossy(bytes).into_owned() } else { String::new() };
        let incomplete = self.utf8.finish();
        self.add(incomplete, &mut delta);
        self.add(&text, &mut delta);
        if is_end {
            self.at_start = self.channel == Channel::Reasoning;
            self.channel = Channel::Answer;
            self.held_line_ends = 0;
        }
        delta
    }

    /// Ends the output: what was held back of it.
    pub fn finish(mut self) -> OutputDelta {
        let mut delta = OutputDelta::default();
        let incomplete = self.utf8.finish();
        self.add(incomplete, &mut delta);
        delta.reasoning.extend((0..self.held_line_ends).map(|_| '\n'));
        delta
    }

    /// Adds `text` to the channel's side of `delta`.
    fn add(&mut self, text: &str, delta: &mut OutputDelta) {
        let text = if self.at_start { text.trim_start_matches('\n') } else { text };
        if text.is_empty() {
            return;
        }
        self.at_start = false;
        if self.channel == Channel::Answer {
            delta.answer.push_str(text);
            return;
        }
        let kept = text.trim_end_matches('\n');
        if !kept.is_empty() {
            let held = mem::take(&mut self.held_line_ends);
            delta.reasoning.extend((0..held).map(|_| '\n'));
            delta.reasoning.push_str(kept);
        }
        self.held_line_ends += text.len() - kept.len();
    }
}
