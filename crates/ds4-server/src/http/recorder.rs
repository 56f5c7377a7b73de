//! Notes what an answer said, on its way from the output parser to the dialect.

use std::sync::Arc;

use deepseek_recipe::stream::{ChunkGenerator, FinishReason, OutputChunk};
use ds4_engine::TokenId;
use ds4_runtime::replay::{Block, Call};
use serde_json::Value;

use super::{answer::Progress, state::App};
use crate::{
    dialect::{Chunk, Reply},
    metrics::MalformedCall,
};

/// Tags of tool calls in plain text, which make no calls.
const SPELLINGS: [&str; 5] =
    ["｜DSML｜", "<tool_calls>", "<tool_call>", "<function_calls>", "<invoke name="];

/// Makes a dialect's chunks, and remembers the calls among them.
pub(super) struct Recorder<R: Reply> {
    dialect: R::Generator,
    pub(super) app: Arc<App>,
    pub(super) progress: Arc<Progress>,
    /// The opening tag from its marker on, if the prompt has it already.
    opening: Vec<TokenId>,
    has_tools: bool,
    reasoning: String,
    content: String,
    ids: Vec<String>,
    names: Vec<String>,
    arguments: Vec<String>,
}

impl<R: Reply> Recorder<R> {
    pub(super) fn new(
        dialect: R::Generator,
        app: Arc<App>,
        progress: Arc<Progress>,
        opening: Vec<TokenId>,
        has_tools: bool,
    ) -> Self {
        Recorder {
            dialect,
            app,
            progress,
            opening,
            has_tools,
            reasoning: String::new(),
            content: String::new(),
            ids: Vec::new(),
            names: Vec::new(),
            arguments: Vec::new(),
        }
    }

    fn note(&mut self, chunk: &OutputChunk) {
        match chunk {
            OutputChunk::Reasoning { content, .. } => self.reasoning.push_str(content),
            OutputChunk::Content { content, .. } => self.content.push_str(content),
            OutputChunk::ToolCallNamed { tool_name } => {
                self.names.push(tool_name.clone());
                self.arguments.push(String::new());
            }
            OutputChunk::ToolCallArgumentsDelta { arguments } => {
                if let Some(last) = self.arguments.last_mut() {
                    last.push_str(arguments);
                }
            }
            _ => {}
        }
    }

    /// At the end of the answer. The client has not heard of it yet, so it cannot be too late.
    fn finish(&mut self, reason: FinishReason) {
        let tokens = self.progress.tokens();
        let dsml = self.app.encoder.tokenizer().special().dsml;
        let marker = tokens.iter().position(|token| *token == dsml);
        let is_cut = reason == FinishReason::Length && (marker.is_some() || self.opened());
        if is_cut {
            self.app.metrics.malformed_call(MalformedCall::Cut);
        } else if SPELLINGS.iter().any(|tag| self.content.contains(tag)) {
            self.app.metrics.malformed_call(MalformedCall::SpelledOut);
        }
        if is_cut || self.ids.len() != self.names.len() || self.ids.is_empty() {
            return;
        }
        let calls = self.ids.iter().zip(&self.names).zip(&self.arguments);
        let calls = calls.map(|((id, name), arguments)| {
            let arguments: Value = serde_json::from_str(arguments).ok()?;
            Some(Call { id: id.clone(), name: name.clone(), arguments })
        });
        let Some(calls) = calls.collect::<Option<Vec<_>>>() else { return };
        let block = match marker {
            _ if self.opened() => [&self.opening[..], &tokens].concat(),
            Some(marker) => tokens[marker..].to_vec(),
            None => return,
        };
        let reasoning = std::mem::take(&mut self.reasoning);
        self.app.replay.remember(Block { calls, tokens: block, reasoning });
    }

    fn opened(&self) -> bool {
        !self.opening.is_empty()
    }
}

impl<R: Reply> ChunkGenerator for Recorder<R> {
    type Chunk = Chunk<R>;

    async fn generate(&mut self, chunk: OutputChunk) -> Vec<Chunk<R>> {
        if !self.has_tools {
            return self.dialect.generate(chunk).await;
        }
        self.note(&chunk);
        if let OutputChunk::Finish { finish_reason, .. } = &chunk {
            self.finish(*finish_reason);
        }
        let chunks = self.dialect.generate(chunk).await;
        self.ids.extend(chunks.iter().filter_map(R::call_id).map(str::to_owned));
        chunks
    }
}
