//! Cases for small models: everything that the built-in model was trained to do.
//!
//! Cases follow from a seed, with another generator of random numbers than training has, and
//! lists, codes, passages and tool calls of random content; so they are new to the model except
//! by chance. Two-digit sums are too few for that: most of them were seen in training.
//! Lengths of texts are in tokens of the model that is measured.

mod exchanges;
mod needles;
mod tools;
mod words;

use ds4_text::tokenizer::Tokenizer;
use fastrand::Rng;
use serde_json::{Value, json};

use crate::suite::Case;

/// A kind of cases.
struct Task {
    name: &'static str,
    /// Only one of so many cases is made: long texts take long to read.
    one_of: usize,
    make: fn(&mut Rng, &Tokenizer) -> Value,
}

const TASKS: &[Task] = &[
    task("needle 500, 1 name", 1, |rng, tokenizer| needles::needle(rng, tokenizer, 500, 1)),
    task("needle 500, 4 names", 1, |rng, tokenizer| needles::needle(rng, tokenizer, 500, 4)),
    task("needle 4k, 1 name", 4, |rng, tokenizer| needles::needle(rng, tokenizer, 4000, 1)),
    task("needle 4k, 4 names", 4, |rng, tokenizer| needles::needle(rng, tokenizer, 4000, 4)),
    task("needle 16k, 1 name", 10, |rng, tokenizer| needles::needle(rng, tokenizer, 15_600, 1)),
    task("needle 16k, 4 names", 10, |rng, tokenizer| needles::needle(rng, tokenizer, 15_600, 4)),
    task("look-up", 1, |rng, _| needles::lookup(rng)),
    task("tool call", 1, |rng, _| tools::call(rng)),
    task("tool result", 1, |rng, _| tools::result(rng)),
    task("copy", 1, |rng, _| exchanges::copy(rng)),
    task("reverse", 1, |rng, _| exchanges::reverse(rng)),
    task("sort", 1, |rng, _| exchanges::sort(rng)),
    task("add", 1, |rng, _| exchanges::add(rng)),
    task("subtract", 1, |rng, _| exchanges::subtract(rng)),
    task("multiply", 1, |rng, _| exchanges::multiply(rng)),
    task("passage", 1, |rng, _| exchanges::passage(rng)),
];

const fn task(name: &'static str, one_of: usize, make: fn(&mut Rng, &Tokenizer) -> Value) -> Task {
    Task { name, one_of, make }
}

/// Longest answer that any of the tasks needs, with room for going astray.
const MAX_TOKENS: usize = 160;

/// Names of the tasks.
pub fn tasks() -> impl Iterator<Item = &'static str> {
    TASKS.iter().map(|task| task.name)
}

/// `count` cases of each task, a quarter of them at 4,000 tokens and a tenth at 15,600. The first
/// ones of a longer suite are those of a shorter one.
pub fn cases(tokenizer: &Tokenizer, seed: u64, count: usize) -> Vec<Case> {
    let mut cases = Vec::with_capacity(TASKS.len() * count);
    for task in TASKS {
        for number in 0..count.div_ceil(task.one_of) {
            let id = format!("{}/{seed}/{number}", task.name);
            let hash = blake3::hash(id.as_bytes());
            let bytes = hash.as_bytes();
            let seed = u64::from_le_bytes(std::array::from_fn(|i| bytes[i]));
            let mut value = (task.make)(&mut Rng::with_seed(seed), tokenizer);
            value["id"] = json!(id);
            value["task"] = json!(task.name);
            value["max_tokens"] = json!(MAX_TOKENS);
            let case = Case::from_json(value, 0);
            cases
                .push(case.unwrap_or_else(|problem| unreachable!("built-in case {id}: {problem}")));
        }
    }
    cases
}

/// One of several.
fn pick<T: Copy>(rng: &mut Rng, items: &[T]) -> T {
    items[rng.usize(..items.len())]
}

/// `count` different ones of several, in random order.
fn sample<T: Copy>(rng: &mut Rng, items: &[T], count: usize) -> Vec<T> {
    let mut items = items.to_vec();
    rng.shuffle(&mut items);
    items.truncate(count);
    items
}

/// A text with its first letter as a capital.
fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

/// A case of one message.
fn single(prompt: &str, thinking: bool, grade: Value) -> Value {
    json!({ "prompt": prompt, "thinking": thinking, "grade": grade })
}
