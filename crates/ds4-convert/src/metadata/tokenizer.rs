//! A checkpoint's `tokenizer.json` as GGUF metadata.

use std::collections::HashMap;

use gguf::Value;
use serde::Deserialize;

use crate::error::{Error, Result, shown};

/// Types of tokens in a GGUF file.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

#[derive(Deserialize)]
pub(super) struct TokenizerFile {
    model: Bpe,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct Bpe {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
}

/// Two tokens, with a space between them or as a pair.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Joined(String),
    Pair(String, String),
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

impl TokenizerFile {
    /// The metadata; `file` is the file's name in messages.
    pub(super) fn entries(self, file: &str) -> Result<Vec<(String, Value)>> {
        if let Some(kind) = self.model.kind.filter(|kind| kind != "BPE") {
            return Err(wrong(file, "model.type", shown(&kind), "BPE"));
        }
        let ids = self.model.vocab.values().copied();
        let ids = ids.chain(self.added_tokens.iter().map(|token| token.id));
        let count = ids.max().map_or(0, |id| id as usize + 1);
        let stated = self.model.vocab.len() + self.added_tokens.len();
        if count > stated {
            let found = format!("id {} among {stated} tokens", count - 1);
            return Err(wrong(file, "model.vocab", found, "ids without gaps"));
        }
        let mut tokens: Vec<Option<String>> = vec![None; count];
        let mut types = vec![NORMAL; count];
        for (text, id) in self.model.vocab {
            put(&mut tokens, id, text).map_err(|found| wrong(file, "model.vocab", found, ONE))?;
        }
        for AddedToken { id, content, special } in self.added_tokens {
            types[id as usize] =
                if special || is_bracketed(&content) { CONTROL } else { USER_DEFINED };
            put(&mut tokens, id, content)
                .map_err(|found| wrong(file, "added_tokens", found, ONE))?;
        }
        let tokens: Option<Vec<String>> = tokens.into_iter().collect();
        let tokens =
            tokens.ok_or_else(|| wrong(file, "model.vocab", "gaps".to_owned(), "no gaps"))?;
        let merges = self.model.merges.into_iter().map(|merge| match merge {
            Merge::Joined(text) => text,
            Merge::Pair(left, right) => format!("{left} {right}"),
        });
        let merges: Vec<String> = merges.collect();
        let entry = |key: &str, value: Value| (format!("tokenizer.ggml.{key}"), value);
        Ok(vec![
            entry("model", "gpt2".into()),
            entry("pre", "joyai-llm".into()),
            entry("tokens", tokens.into()),
            entry("token_type", types.into()),
            entry("merges", merges.into()),
            entry("add_bos_token", false.into()),
            entry("add_eos_token", false.into()),
        ])
    }
}

const ONE: &str = "one token";

/// Puts a token to its place, where the same one may be already.
fn put(tokens: &mut [Option<String>], id: u32, text: String) -> std::result::Result<(), String> {
    let place = &mut tokens[id as usize];
    match place {
        Some(other) if *other != text => {
            Err(format!("{} and {} with id {id}", shown(other), shown(&text)))
        }
        _ => {
            *place = Some(text);
            Ok(())
        }
    }
}

/// Whether a token is a marker by its looks: `<｜…｜>` or `<|…|>`.
fn is_bracketed(text: &str) -> bool {
    let bar = |c| c == '|' || c == '｜';
    let inside = text.strip_prefix('<').and_then(|text| text.strip_suffix('>'));
    inside.is_some_and(|inside| {
        inside.chars().count() > 1 && inside.starts_with(bar) && inside.ends_with(bar)
    })
}

fn wrong(file: &str, key: &str, found: String, expected: &str) -> Error {
    let (file, key, expected) = (file.to_owned(), key.to_owned(), expected.to_owned());
    Error::Value { file, key, found, expected }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(json: &str) -> Result<Vec<(String, Value)>> {
        serde_json::from_str::<TokenizerFile>(json).unwrap().entries("t.json")
    }

    #[test]
    fn tokens_are_in_the_order_of_their_ids() {
        let entries = entries(
            r#"{"model": {"type": "BPE", "vocab": {"b": 1, "a": 0, "ab": 2}, "merges": [["a", "b"]]},
                "added_tokens": [{"id": 4, "content": "<think>"}, {"id": 3, "content": "<｜User｜>"}]}"#,
        )
        .unwrap();
        let value = |key: &str| {
            let key = format!("tokenizer.ggml.{key}");
            entries.iter().find(|(k, _)| *k == key).unwrap().1.clone()
        };
        let tokens = ["a", "b", "ab", "<｜User｜>", "<think>"].map(str::to_owned);
        assert_eq!(value("tokens"), tokens.to_vec().into());
        assert_eq!(value("token_type"), vec![1, 1, 1, 3, 4].into());
        assert_eq!(value("merges"), vec!["a b".to_owned()].into());
    }

    #[test]
    fn ids_that_cannot_be_are_refused() {
        let vocab = |vocab: &str, added: &str| {
            let json = format!(
                r#"{{"model": {{"vocab": {{{vocab}}}, "merges": []}}, "added_tokens": [{added}]}}"#
            );
            entries(&json).unwrap_err().to_string()
        };
        assert_eq!(
            vocab(r#""a": 0, "b": 4000000000"#, ""),
            "t.json: model.vocab: found id 4000000000 among 2 tokens, expected ids without gaps"
        );
        assert!(vocab(r#""a": 0, "b": 0"#, "").contains("with id 0, expected one token"));
        assert!(vocab(r#""a": 0"#, r#"{"id": 0, "content": "b"}"#).contains("a and b with id 0"));
        let twice = r#"{"id": 2, "content": "b"}, {"id": 2, "content": "b"}"#;
        assert!(vocab(r#""a": 0"#, twice).ends_with("found gaps, expected no gaps"));
    }
}
