//! Tool calls as the model wrote them, by the ids under which clients know them.
//!
//! Clients send calls back as JSON, often with other spacing, key order or spelling of numbers,
//! and some leave the reasoning before a call out. Rendered as sent, such a history would differ
//! from what the session holds, and everything after the difference would be computed again. So
//! where ids, names and arguments are still those of a remembered block, the block's own tokens
//! stand in for it, and its reasoning is filled in. What a client has changed counts as it is.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use deepseek_recipe_core::{conversation::Conversation, messages::InputMessage};
use ds4_engine::TokenId;
use ds4_text::{prompt::ToolCall, tokenizer::SpecialTokens};
use serde_json::Value;

/// Bytes of remembered blocks together, about.
const MOST_BYTES: usize = 64 << 20;

/// A call as its client got it.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// Its id.
    pub id: String,
    /// The tool.
    pub name: String,
    /// An object.
    pub arguments: Value,
}

/// A block of calls as it was sampled.
#[derive(Debug)]
pub struct Block {
    /// The calls in it.
    pub calls: Vec<Call>,
    /// From the marker of the opening tag to the end of the closing one.
    pub tokens: Vec<TokenId>,
    /// What was thought before.
    pub reasoning: String,
}

/// Remembered blocks.
#[derive(Default)]
pub struct Replay(Mutex<Blocks>);

#[derive(Default)]
struct Blocks {
    by_call: HashMap<String, Arc<Block>>,
    /// The oldest first.
    order: VecDeque<Arc<Block>>,
    bytes: usize,
}

impl Replay {
    /// Remembers a block, and forgets the oldest ones if there are too many.
    pub fn remember(&self, block: Block) {
        let block = Arc::new(block);
        let mut blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.bytes += block.bytes();
        for call in &block.calls {
            blocks.by_call.insert(call.id.clone(), block.clone());
        }
        blocks.order.push_back(block);
        while blocks.bytes > MOST_BYTES
            && let Some(oldest) = blocks.order.pop_front()
        {
            blocks.bytes -= oldest.bytes();
            oldest.calls.iter().for_each(|call| drop(blocks.by_call.remove(&call.id)));
        }
    }

    /// Fills in the reasoning before remembered calls where a client left it out.
    pub fn restore_reasoning(&self, conversation: &mut Conversation) {
        for message in &mut conversation.messages {
            if let InputMessage::Assistant {
                reasoning_content: Some(reasoning),
                tool_calls: Some(calls),
                ..
            } = message
                && reasoning.is_empty()
                && let Some(block) = self.find(calls)
            {
                reasoning.clone_from(&block.reasoning);
            }
        }
    }

    /// Puts remembered blocks in the place of their renderings in a prompt.
    pub fn restore_blocks(
        &self,
        conversation: &Conversation,
        special: &SpecialTokens,
        prompt: Vec<TokenId>,
    ) -> Vec<TokenId> {
        let calls: Vec<_> = conversation.messages.iter().filter_map(finished_calls).collect();
        let blocks: Vec<_> = calls.into_iter().map(|calls| self.find(calls)).collect();
        if blocks.iter().all(Option::is_none) {
            return prompt;
        }
        let places = block_places(&prompt, special);
        if places.len() != blocks.len() {
            return prompt;
        }
        let (mut restored, mut done) = (Vec::with_capacity(prompt.len()), 0);
        for (place, block) in places.into_iter().zip(blocks) {
            if let Some(block) = block {
                restored.extend_from_slice(&prompt[done..place.start]);
                restored.extend_from_slice(&block.tokens);
                done = place.end;
            }
        }
        restored.extend_from_slice(&prompt[done..]);
        restored
    }

    /// The block that consists of these calls.
    fn find(&self, calls: &[ToolCall]) -> Option<Arc<Block>> {
        let id = &calls.first()?.id;
        let block = self.0.lock().unwrap_or_else(PoisonError::into_inner).by_call.get(id)?.clone();
        let same = |(known, sent): (&Call, &ToolCall)| {
            known.id == sent.id
                && known.name == sent.name
                && serde_json::from_str(&sent.arguments)
                    .is_ok_and(|arguments| is_same(&known.arguments, &arguments))
        };
        let all = block.calls.len() == calls.len() && block.calls.iter().zip(calls).all(same);
        all.then_some(block)
    }
}

impl Block {
    fn bytes(&self) -> usize {
        let call = |call: &Call| 4 * call.id.len() + call.name.len() + 256;
        // Arguments and reasoning are as long as their tokens, about, and the tokens have 4 bytes.
        self.tokens.len() * 12
            + self.reasoning.len()
            + self.calls.iter().map(call).sum::<usize>()
            + size_of::<Block>()
    }
}

/// Whether two values mean the same: clients may write 1.0 as 1, and order keys anew.
fn is_same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_same(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            let found = |(key, a)| b.get(key).is_some_and(|b| is_same(a, b));
            a.len() == b.len() && a.iter().all(found)
        }
        (a, b) => a == b,
    }
}

/// The calls of a complete assistant message, which renders them as a block.
fn finished_calls(message: &InputMessage) -> Option<&[ToolCall]> {
    match message {
        InputMessage::Assistant { tool_calls: Some(calls), prefix: false, .. } => Some(calls),
        _ => None,
    }
}

/// Where the blocks of complete assistant turns are, without the `<` before the first marker and
/// without the end of the turn.
fn block_places(prompt: &[TokenId], special: &SpecialTokens) -> Vec<Range<usize>> {
    let mut places = Vec::new();
    let (mut in_turn, mut begun) = (false, None);
    for (at, token) in prompt.iter().enumerate() {
        if *token == special.assistant {
            (in_turn, begun) = (true, None);
        } else if *token == special.eos {
            places.extend(begun.take().map(|start| start..at));
            in_turn = false;
        } else if *token == special.dsml && in_turn && begun.is_none() {
            begun = Some(at);
        }
    }
    places
}
