//! Values to be found by their names, in a list or far apart in a long text.

use ds4_text::tokenizer::Tokenizer;
use fastrand::Rng;
use serde_json::{Value, json};

use super::{
    capitalised, pick, sample, single,
    words::{ADJECTIVES, NAMES, NOUNS, VERBS, value},
};

const ATTRIBUTES: &[&str] = &["code", "password", "number", "key", "badge", "label"];

/// Facts about `names` names in about `length` tokens of other text, and a question about one.
pub(super) fn needle(rng: &mut Rng, tokenizer: &Tokenizer, length: usize, names: usize) -> Value {
    let facts = Facts::new(rng, names);
    let mut places: Vec<usize> = (0..names).map(|_| rng.usize(..length)).collect();
    places.sort_unstable();
    let mut text = String::new();
    let mut tokens = 0;
    for (sentence, place) in facts.sentences(rng).into_iter().zip(places) {
        tokens += fill(rng, tokenizer, &mut text, place.saturating_sub(tokens));
        text.push_str(&sentence);
        text.push(' ');
    }
    fill(rng, tokenizer, &mut text, length.saturating_sub(tokens).max(1));
    let opening = pick(rng, &["Read this text.", "Here is a text.", "Use this text to answer."]);
    facts.case(rng, &format!("{opening}\n\nText: {}", text.trim_end()))
}

/// Facts in one message and a question about one.
pub(super) fn lookup(rng: &mut Rng) -> Value {
    let count = rng.usize(2..=16);
    let facts = Facts::new(rng, count);
    let text = facts.sentences(rng).join(" ");
    facts.case(rng, &text)
}

/// Values of one attribute by name.
struct Facts {
    attribute: &'static str,
    table: Vec<(String, String)>,
}

impl Facts {
    fn new(rng: &mut Rng, count: usize) -> Self {
        let pool = if rng.bool() { NAMES } else { NOUNS };
        let names = sample(rng, pool, count);
        let mut table: Vec<(String, String)> = Vec::with_capacity(count);
        for name in names {
            let mut new = value(rng);
            while table.iter().any(|(_, other)| *other == new) {
                new = value(rng);
            }
            table.push((name.to_owned(), new));
        }
        Facts { attribute: pick(rng, ATTRIBUTES), table }
    }

    fn sentences(&self, rng: &mut Rng) -> Vec<String> {
        let a = self.attribute;
        let sentence = |(name, value): &(String, String)| {
            let text = match rng.u32(..3) {
                0 => format!("the {a} for {name} is {value}."),
                1 => format!("the {a} of {name} is {value}."),
                _ => format!("remember that the {a} for {name} is {value}."),
            };
            capitalised(&text)
        };
        self.table.iter().map(sentence).collect()
    }

    /// Asks for one of the values after `text`. The others must not be in the answer.
    fn case(&self, rng: &mut Rng, text: &str) -> Value {
        let asked = rng.usize(..self.table.len());
        let (name, value) = &self.table[asked];
        let others: Vec<&String> =
            self.table.iter().filter(|fact| fact.0 != *name).map(|fact| &fact.1).collect();
        let a = self.attribute;
        let question = match rng.u32(..3) {
            0 => format!("What is the {a} for {name}?"),
            1 => format!("What is the {a} of {name}?"),
            _ => format!("Tell me the {a} for {name}."),
        };
        let grade = json!({ "type": "contains", "answer": value, "not": others });
        single(&format!("{text}\n\n{question}"), false, grade)
    }
}

/// Appends sentences that say nothing of importance, about `tokens` tokens; returns how many.
fn fill(rng: &mut Rng, tokenizer: &Tokenizer, text: &mut String, tokens: usize) -> usize {
    let mut filled = 0;
    while filled < tokens {
        let sentence = filler(rng);
        // Sentences are never so uniform that they have no tokens.
        filled += tokenizer.encode(&sentence).map_or(sentence.len(), |ids| ids.len());
        text.push_str(&sentence);
    }
    filled
}

fn filler(rng: &mut Rng) -> String {
    let (a, b, c) = (pick(rng, NOUNS), pick(rng, NOUNS), pick(rng, NOUNS));
    let (x, y) = (pick(rng, ADJECTIVES), pick(rng, ADJECTIVES));
    let (v, w) = (pick(rng, VERBS), pick(rng, VERBS));
    match rng.u32(..5) {
        0 => format!("The {x} {a} {v} the {b} in many cases. "),
        1 => format!("A {a} that {v} a {b} often {w} the {c} as well. "),
        2 => format!("If the {a} is {x}, it {v} the {y} {b}. "),
        3 => format!("This {a} {v} each {b}, but no {c}. "),
        _ => format!("In general, a {x} {a} {v} one {y} {b} and {w} another {c}. "),
    }
}
