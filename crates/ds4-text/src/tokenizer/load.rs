//! Builds the tokenizer from a file's metadata, and checks all of it first.

use std::collections::HashMap;

use aho_corasick::{AhoCorasick, MatchKind};
use ds4_model::{TokenId, shown};
use gguf::GgufFile;
use tokenizers::{
    SplitDelimiterBehavior,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{
        PreTokenizerWrapper, byte_level::ByteLevel, sequence::Sequence, split::Split,
        split::SplitPattern,
    },
};

use super::{
    SpecialTokens, Tokenizer, TokenizerError,
    bytes::{TokenBytes, char_of},
};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// Values of [`PRE`] that stand for [`PATTERNS`].
const KNOWN_PRE: [&str; 2] = ["joyai-llm", "deepseek-v3"];

/// What the pre-tokenizer isolates, pass after pass: groups of up to three
/// digits; runs of Chinese characters and kana; words with the one character
/// before them, punctuation with line ends after it, line ends, other whitespace.
const PATTERNS: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
];

/// Token types (`tokenizer.ggml.token_type`) of markers; the others, 1 to 6, are text.
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;

impl Tokenizer {
    /// Builds the tokenizer that `file` holds. Its number of tokens must be
    /// `vocab`, the columns of the model's logits.
    ///
    /// # Errors
    /// If a key is missing or of the wrong type, or tokens, merges, types and
    /// ids don't fit together.
    pub fn from_gguf(file: &GgufFile, vocab: usize) -> Result<Tokenizer, TokenizerError> {
        Source { file, vocab }.build()
    }
}

/// What cuts text into the pieces that BPE works on, and spells their bytes.
pub(super) fn pre_tokenizer() -> tokenizers::Result<Sequence> {
    let mut passes: Vec<PreTokenizerWrapper> = Vec::with_capacity(PATTERNS.len() + 1);
    for pattern in PATTERNS {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        passes.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into());
    }
    passes.push(ByteLevel::new(false, false, false).into());
    Ok(Sequence::new(passes))
}

/// A file to build a tokenizer from.
struct Source<'a> {
    file: &'a GgufFile,
    vocab: usize,
}

impl Source<'_> {
    fn build(&self) -> Result<Tokenizer, TokenizerError> {
        let metadata = self.file.metadata();
        let model = metadata.str(MODEL)?;
        if model != "gpt2" {
            return Err(self.value(MODEL, shown(model), "gpt2 (byte-level BPE)"));
        }
        let tokens = metadata.strings(TOKENS)?;
        let ids = self.token_ids(tokens)?;
        self.check_ids()?;
        let special = SpecialTokens::find(self.file.name(), &ids)?;
        let is_marker = self.markers(tokens, &special)?;

        let text_tokens: Vocab = ids
            .iter()
            .filter(|&(_, &id)| !is_marker[id as usize])
            .map(|(&token, &id)| (token.to_owned(), id))
            .collect();
        self.check_bytes(&text_tokens)?;
        let bpe = self.bpe(text_tokens)?;

        let marker_ids: Vec<TokenId> =
            (0..).zip(&is_marker).filter_map(|(id, &is_marker)| is_marker.then_some(id)).collect();
        let marker_finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(marker_ids.iter().map(|&id| &tokens[id as usize]))
            .map_err(|error| self.value(TOKENS, error.to_string(), "markers to search for"))?;
        Ok(Tokenizer {
            bpe,
            bytes: TokenBytes::new(tokens, &is_marker),
            is_marker,
            marker_finder,
            marker_ids,
            special,
            warnings: self.warnings()?,
        })
    }

    /// Every token's id by its spelling.
    fn token_ids<'t>(
        &self,
        tokens: &'t [String],
    ) -> Result<HashMap<&'t str, TokenId>, TokenizerError> {
        if tokens.len() != self.vocab || TokenId::try_from(tokens.len()).is_err() {
            let found = format!("{} entries", tokens.len());
            return Err(self.value(TOKENS, found, &self.vocab.to_string()));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in (0..).zip(tokens) {
            if token.is_empty() {
                return Err(self.value(&format!("{TOKENS}[{id}]"), "an empty token", "text"));
            }
            if let Some(before) = ids.insert(token.as_str(), id) {
                let found = format!("{}, which is token {before} too", shown(token));
                return Err(self.value(&format!("{TOKENS}[{id}]"), found, "tokens that differ"));
            }
        }
        Ok(ids)
    }

    /// Checks the ids that the file names, although markers are looked up by their spelling.
    fn check_ids(&self) -> Result<(), TokenizerError> {
        for key in ["tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"] {
            if let Some(id) = self.file.metadata().optional::<u64>(key)?
                && id >= self.vocab as u64
            {
                return Err(self.value(key, id.to_string(), &format!("less than {}", self.vocab)));
            }
        }
        Ok(())
    }

    /// Which tokens are markers: those that the file says are, and those that
    /// are needed as such.
    fn markers(
        &self,
        tokens: &[String],
        special: &SpecialTokens,
    ) -> Result<Vec<bool>, TokenizerError> {
        let types = self.file.metadata().u32_array(TYPES)?;
        if types.len() != tokens.len() {
            let found = format!("{} entries", types.len());
            return Err(self.value(TYPES, found, &tokens.len().to_string()));
        }
        if let Some(id) = types.iter().position(|ty| !(1..=6).contains(ty)) {
            return Err(self.value(&format!("{TYPES}[{id}]"), types[id].to_string(), "1 to 6"));
        }
        let mut is_marker: Vec<bool> =
            types.iter().map(|&ty| ty == CONTROL || ty == USER_DEFINED).collect();
        for id in special.ids() {
            is_marker[id as usize] = true;
        }
        Ok(is_marker)
    }

    /// Checks that text of any bytes has tokens.
    fn check_bytes(&self, text_tokens: &Vocab) -> Result<(), TokenizerError> {
        let has_token =
            |byte: &u8| text_tokens.contains_key(char_of(*byte).encode_utf8(&mut [0; 4]));
        match (0..=255).find(|byte| !has_token(byte)) {
            Some(byte) => {
                Err(TokenizerError::MissingByte { file: self.file.name().to_owned(), byte })
            }
            None => Ok(()),
        }
    }

    /// The BPE model with its pre-tokenizer.
    fn bpe(&self, text_tokens: Vocab) -> Result<tokenizers::Tokenizer, TokenizerError> {
        let merges = self.merges(&text_tokens)?;
        let refused = |error: tokenizers::Error| TokenizerError::Build {
            file: self.file.name().to_owned(),
            reason: error.to_string(),
        };
        let bpe = BPE::builder().vocab_and_merges(text_tokens, merges).build().map_err(refused)?;
        let mut tokenizer = tokenizers::Tokenizer::new(bpe);
        tokenizer.with_pre_tokenizer(Some(pre_tokenizer().map_err(refused)?));
        Ok(tokenizer)
    }

    /// The merges as pairs. Both parts and the result must be tokens of text:
    /// the BPE builder relies on that.
    fn merges(&self, text_tokens: &Vocab) -> Result<Vec<(String, String)>, TokenizerError> {
        let merges = self.file.metadata().strings(MERGES)?;
        let mut pairs = Vec::with_capacity(merges.len());
        let mut joined = String::new();
        for (index, merge) in merges.iter().enumerate() {
            let wrong = |found: String, expected: &str| {
                self.value(&format!("{MERGES}[{index}]"), found, expected)
            };
            let Some((left, right)) = merge.split_once(' ') else {
                return Err(wrong(shown(merge), "two tokens with a space between"));
            };
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            for part in [left, right, &joined] {
                if !text_tokens.contains_key(part) {
                    let found = format!("{} in {}", shown(part), shown(merge));
                    return Err(wrong(found, "a known token"));
                }
            }
            pairs.push((left.to_owned(), right.to_owned()));
        }
        Ok(pairs)
    }

    fn warnings(&self) -> Result<Vec<String>, TokenizerError> {
        let pre = self.file.metadata().optional::<&str>(PRE)?;
        if pre.is_some_and(|pre| KNOWN_PRE.contains(&pre)) {
            return Ok(Vec::new());
        }
        let found = pre.map_or("nothing".to_owned(), shown);
        let [known, other] = KNOWN_PRE;
        Ok(vec![format!(
            "{}: {PRE}: found {found}, expected {known} or {other}: text is split as these say",
            self.file.name()
        )])
    }

    fn value(&self, key: &str, found: impl Into<String>, expected: &str) -> TokenizerError {
        TokenizerError::Value {
            file: self.file.name().to_owned(),
            key: key.to_owned(),
            found: found.into(),
            expected: expected.to_owned(),
        }
    }
}
