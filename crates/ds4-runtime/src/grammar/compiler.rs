//! Grammars over the model's vocabulary: JSON schemas and regular expressions, compiled once and
//! shared between requests.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use ds4_engine::TokenId;
use ds4_text::tokenizer::{SpecialTokens, Tokenizer};
use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenizerEnv},
};
use serde_json::{Value, json};

/// Compiled grammars kept for later requests; agents send the same schemas again and again.
const KEPT: usize = 512;

/// Bytes of a schema or expression.
const LONGEST: usize = 256 * 1024;

/// A grammar that cannot be enforced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(pub String);

/// A compiled grammar.
#[derive(Clone)]
pub struct Grammar(Arc<Mutex<Matcher>>);

impl Grammar {
    /// A matcher at the beginning.
    pub(super) fn matcher(&self) -> Matcher {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).deep_clone()
    }
}

/// Compiles grammars for one tokenizer.
pub struct Grammars {
    factory: ParserFactory,
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
    /// Tokens that are text.
    text: SimpleVob,
    /// Tokens that don't end a turn.
    unending: SimpleVob,
    /// Text that can be part of a quoted name as it is.
    name: SimpleVob,
    /// The token `</`, which every vocabulary cut from the model's has.
    closer: SimpleVob,
    compiled: Mutex<HashMap<String, Grammar>>,
}

impl Grammars {
    /// Prepares for grammars over the tokens of `tokenizer`.
    ///
    /// # Errors
    /// If the vocabulary is unfit, which no model's is.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Result<Self, GrammarError> {
        let trie = token_trie(&tokenizer);
        let env: TokEnv =
            Arc::new(Environment { trie: trie.clone(), tokenizer: tokenizer.clone() });
        let capabilities = InferenceCapabilities { ff_tokens: true, ..Default::default() };
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, capabilities, &slices).map_err(told)?;
        factory.quiet();
        let of = |test: &dyn Fn(TokenId) -> bool| {
            let mut set = trie.alloc_token_set();
            let tokens = (0..tokenizer.len() as TokenId).filter(|token| test(*token));
            tokens.for_each(|token| set.allow_token(token));
            set
        };
        let is_text = |token| {
            !tokenizer.is_marker(token) && tokenizer.bytes_of(token).is_some_and(|b| !b.is_empty())
        };
        let text = of(&is_text);
        let unending = of(&|token| !tokenizer.special().ends_turn(token));
        let fits_name = |bytes: &[u8]| bytes.iter().all(|b| *b > b' ' && !b"\"\\<>".contains(b));
        let name = of(&|t| is_text(t) && tokenizer.bytes_of(t).is_some_and(fits_name));
        let closer = of(&|token| tokenizer.bytes_of(token) == Some(b"</"));
        let compiled = Mutex::default();
        Ok(Grammars { factory, tokenizer, trie, text, unending, name, closer, compiled })
    }

    /// JSON of a schema, written as `json.dumps` would, so that rendering it again gives the same
    /// bytes.
    ///
    /// # Errors
    /// If the schema is invalid, too large, or has parts that cannot be enforced.
    pub fn json_schema(&self, schema: &Value) -> Result<Grammar, GrammarError> {
        let mut schema = match schema {
            Value::Bool(true) => json!({}),
            schema => schema.clone(),
        };
        let Some(object) = schema.as_object_mut() else {
            return Err(GrammarError(format!("a JSON schema is an object, not {schema}")));
        };
        object.insert(
            "x-guidance".to_owned(),
            json!({ "whitespace_flexible": false,
            "item_separator": ", ", "key_separator": ": " }),
        );
        let key = schema.to_string();
        self.compile(key, || TopLevelGrammar::from_json_schema(schema))
    }

    /// Text that matches an expression as a whole.
    ///
    /// # Errors
    /// If the expression is invalid or too large.
    pub fn regex(&self, expression: &str) -> Result<Grammar, GrammarError> {
        self.compile(format!("/{expression}"), || TopLevelGrammar::from_regex(expression))
    }

    fn compile(
        &self,
        key: String,
        grammar: impl FnOnce() -> TopLevelGrammar,
    ) -> Result<Grammar, GrammarError> {
        if key.len() > LONGEST {
            let found = key.len();
            return Err(GrammarError(format!("{found} bytes are too many: at most {LONGEST}")));
        }
        let kept = || self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = kept().get(&key) {
            return Ok(known.clone());
        }
        let mut matcher = Matcher::new(self.factory.create_parser(grammar()));
        // Unsatisfiable and oversized grammars show up when the first mask is computed.
        matcher.compute_mask().map_err(told)?;
        let compiled = Grammar(Arc::new(Mutex::new(matcher)));
        let mut kept = kept();
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(key, compiled.clone());
        Ok(compiled)
    }

    /// Markers of the chat format.
    pub(super) fn special(&self) -> &SpecialTokens {
        self.tokenizer.special()
    }

    /// Bytes of a token; none for one that does not exist.
    pub(super) fn bytes_of(&self, token: TokenId) -> &[u8] {
        self.tokenizer.bytes_of(token).unwrap_or_default()
    }

    /// The tokenizer's own split of a text.
    pub(super) fn encode(&self, text: &[u8]) -> Option<Vec<TokenId>> {
        self.tokenizer.encode(std::str::from_utf8(text).ok()?).ok()
    }

    /// Tokens that are text.
    pub(super) fn text(&self) -> &SimpleVob {
        &self.text
    }

    /// Tokens that don't end a turn.
    pub(super) fn unending(&self) -> &SimpleVob {
        &self.unending
    }

    /// Text that can be part of a quoted name.
    pub(super) fn name(&self) -> &SimpleVob {
        &self.name
    }

    /// `</`, with which values end.
    pub(super) fn closer(&self) -> &SimpleVob {
        &self.closer
    }

    /// The empty set of tokens.
    pub(super) fn nothing(&self) -> SimpleVob {
        self.trie.alloc_token_set()
    }

    /// Adds the tokens with which `bytes` can begin.
    pub(super) fn allow_prefixes(&self, mask: &mut SimpleVob, bytes: &[u8]) {
        self.trie.all_prefixes(bytes).into_iter().for_each(|token| mask.allow_token(token));
    }
}

/// The tokens that must come next; none if there is a choice.
pub(super) fn forced(matcher: &mut Matcher) -> Vec<TokenId> {
    matcher.compute_ff_tokens()
}

/// The tokens that a matcher allows next; one that ends the turn among them where the text may end.
pub(super) fn mask(matcher: &mut Matcher) -> Result<SimpleVob, String> {
    matcher.compute_mask().map_err(|error| told(error).0)
}

/// Takes in a token; true if nothing can follow.
pub(super) fn consume(matcher: &mut Matcher, token: TokenId) -> Result<bool, String> {
    matcher.consume_token(token).map_err(|error| told(error).0)?;
    Ok(matcher.is_stopped())
}

fn told(error: impl std::fmt::Display) -> GrammarError {
    GrammarError(error.to_string().lines().next().unwrap_or_default().to_owned())
}

/// All tokens by their bytes; markers apart, so that no text can match them.
fn token_trie(tokenizer: &Tokenizer) -> TokTrie {
    let word = |token: TokenId| {
        let bytes = tokenizer.bytes_of(token).unwrap_or_default();
        if tokenizer.is_marker(token) {
            [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
        } else {
            bytes.to_vec()
        }
    };
    let words: Vec<_> = (0..tokenizer.len() as TokenId).map(word).collect();
    TokTrie::from(&TokRxInfo::new(tokenizer.len() as u32, tokenizer.special().eos), &words)
}

struct Environment {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let encode = |text: &str| self.tokenizer.encode(text).unwrap_or_default();
        self.trie.tokenize_with_greedy_fallback(bytes, encode)
    }
}
