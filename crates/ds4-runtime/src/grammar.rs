//! Which tokens an answer may have next.
//!
//! `compiler` turns JSON schemas and expressions into grammars over the vocabulary. `tool_set` turns
//! the tools of a request into rules, which `tool_block` follows through a block of tool calls, with
//! `template` for the fixed text between values. `answer` follows a whole answer and gives the
//! token mask of every step.

mod answer;
mod compiler;
mod mask;
mod template;
mod tool_block;
mod tool_set;

pub use answer::{AnswerGrammar, Rules};
pub use compiler::{Grammar, GrammarError, Grammars};
pub use mask::Next;
pub use tool_set::{ToolSet, strictly};
