//! What an answer may say next.
//!
//! A [`Guide`] follows one answer token by token: through its reasoning, its text, which a
//! response format may constrain, and a block of tool calls, whose structure is always
//! constrained once the model has opened it. Where only one continuation is possible it is given
//! as tokens, and the model is not asked.

mod grammar;
mod template;
mod tool_block;
mod tool_set;

use std::sync::Arc;

use ds4_engine::TokenId;
use llguidance::{Matcher, toktrie::SimpleVob};

pub use grammar::{Grammar, GrammarError, Grammars};
pub(crate) use tool_set::{ToolSet, strictly};

use tool_block::ToolBlock;

/// What may come next, where there is a choice.
#[derive(Debug)]
pub(crate) enum Next {
    /// Anything.
    Any,
    /// One of these; the likeliest one if `greedy`.
    Among {
        /// The tokens, by id.
        mask: SimpleVob,
        /// Punctuation is not drawn at random.
        greedy: bool,
    },
}

/// What an answer must look like.
pub(crate) struct Rules {
    pub(crate) grammars: Arc<Grammars>,
    /// The prompt ends in `<think>`.
    pub(crate) starts_in_reasoning: bool,
    /// Form of the text.
    pub(crate) format: Option<Grammar>,
    /// Tools that may be called.
    pub(crate) tools: Option<Arc<ToolSet>>,
    /// The prompt has opened a block of tool calls.
    pub(crate) starts_in_tool_calls: bool,
}

/// Follows an answer.
pub(crate) struct Guide {
    grammars: Arc<Grammars>,
    stage: Stage,
    format: Option<Matcher>,
    tools: Option<Arc<ToolSet>>,
    /// The newest byte is `<`, with which a tool call would begin.
    after_angle: bool,
}

enum Stage {
    Reasoning,
    /// Before the first token of a constrained text, where tools may be called instead; holds
    /// what there is of the way into a block.
    BeforeText(usize),
    Text,
    ToolCalls(Box<ToolBlock>),
}

/// How the model begins a block of tool calls.
const WAY_IN: &[u8] = b"\n\n<";

impl Guide {
    /// A guide at the beginning of an answer.
    pub(crate) fn new(rules: Rules) -> Self {
        let format = rules.format.map(|grammar| grammar.matcher());
        let stage = match (&rules.tools, rules.starts_in_tool_calls) {
            (Some(tools), true) => Stage::ToolCalls(Box::new(ToolBlock::opened(tools.clone()))),
            _ if rules.starts_in_reasoning => Stage::Reasoning,
            _ => first_of_text(format.is_some(), rules.tools.is_some()),
        };
        Guide { grammars: rules.grammars, stage, format, tools: rules.tools, after_angle: false }
    }

    /// Whether anything but the model says what comes next.
    pub(crate) fn has_rules(&self) -> bool {
        match self.stage {
            Stage::Reasoning | Stage::Text => self.format.is_some(),
            Stage::BeforeText(_) | Stage::ToolCalls(_) => true,
        }
    }

    /// The tokens that must come next; none if there is a choice.
    pub(crate) fn forced(&mut self) -> Vec<TokenId> {
        match &mut self.stage {
            Stage::Reasoning | Stage::BeforeText(_) => Vec::new(),
            Stage::Text => self.format.as_mut().map_or_else(Vec::new, grammar::forced),
            Stage::ToolCalls(block) => block.forced(&self.grammars),
        }
    }

    /// What may come next, if nothing is [`forced`](Self::forced). Takes longer than that: a
    /// grammar looks at the whole vocabulary.
    ///
    /// # Errors
    /// If a grammar gives up, in words for the client.
    pub(crate) fn next(&mut self) -> Result<Next, String> {
        match &mut self.stage {
            Stage::Reasoning if self.format.is_some() => {
                Ok(Next::Among { mask: self.grammars.unending().clone(), greedy: false })
            }
            Stage::Reasoning => Ok(Next::Any),
            Stage::BeforeText(done) => {
                let mut mask = match (&mut self.format, *done) {
                    (Some(format), 0) => grammar::mask(format)?,
                    _ => self.grammars.nothing(),
                };
                self.grammars.allow_prefixes(&mut mask, &WAY_IN[*done..]);
                if *done == WAY_IN.len() {
                    mask.allow_token(self.grammars.special().dsml);
                }
                Ok(Next::Among { mask, greedy: false })
            }
            Stage::Text => match &mut self.format {
                Some(format) => Ok(Next::Among { mask: grammar::mask(format)?, greedy: false }),
                None => Ok(Next::Any),
            },
            Stage::ToolCalls(block) => block.next(&self.grammars),
        }
    }

    /// Takes in the next token; true if the answer is complete with it.
    ///
    /// # Errors
    /// If a grammar gives up, in words for the client.
    pub(crate) fn accept(&mut self, token: TokenId) -> Result<bool, String> {
        let special = self.grammars.special();
        let (think_end, dsml) = (special.think_end, special.dsml);
        if let Stage::ToolCalls(block) = &mut self.stage {
            return block.accept(&self.grammars, token);
        }
        if let Some(tools) = &self.tools
            && token == dsml
            && self.after_angle
        {
            self.stage = Stage::ToolCalls(Box::new(ToolBlock::begun(tools.clone())));
            return Ok(false);
        }
        let bytes = self.grammars.bytes_of(token);
        self.after_angle = bytes.last() == Some(&b'<');
        match &mut self.stage {
            Stage::Reasoning if token == think_end => {
                self.stage = first_of_text(self.format.is_some(), self.tools.is_some());
            }
            Stage::BeforeText(done) if WAY_IN[*done..].starts_with(bytes) => *done += bytes.len(),
            Stage::BeforeText(_) | Stage::Text => {
                self.stage = Stage::Text;
                if let Some(format) = &mut self.format {
                    return grammar::consume(format, token);
                }
            }
            Stage::Reasoning | Stage::ToolCalls(_) => {}
        }
        Ok(false)
    }
}

fn first_of_text(has_format: bool, has_tools: bool) -> Stage {
    if has_format && has_tools { Stage::BeforeText(0) } else { Stage::Text }
}
