//! Cuts long text where the pre-tokenizer cuts it anyway, so that the parts
//! can be encoded one by one, with memory that doesn't grow with the text.

use super::TokenizerError;

/// Bytes after which a segment ends at the next good place. Large enough that
/// the overhead per segment vanishes, and small enough to be encoded in a
/// fraction of a millisecond: between segments a thread may stand back.
const TARGET: usize = 1024;

/// Longest segment. Text has a good place to cut every few characters; what
/// has none for this long is a run of one kind of character, for which encoding
/// would take gigabytes, and the regular expression engine panics at ten million.
const LIMIT: usize = 1024 * 1024;

/// Cuts `text` into one or more segments whose ids, one after the other, are
/// the ids of `text`.
pub(super) fn split(text: &str) -> Result<Vec<&str>, TokenizerError> {
    let mut segments = Vec::new();
    let mut start = 0;
    while text.len() - start > TARGET {
        let end = next_cut(text, text.ceil_char_boundary(start + TARGET));
        if end - start > LIMIT {
            let bytes = end - start;
            return Err(TokenizerError::TextTooUniform { offset: start, bytes, limit: LIMIT });
        }
        segments.push(&text[start..end]);
        start = end;
    }
    if start < text.len() || segments.is_empty() {
        segments.push(&text[start..]);
    }
    Ok(segments)
}

/// The first place at or after `from` between two characters that never share
/// a token, or the end.
fn next_cut(text: &str, from: usize) -> usize {
    let mut previous = text[..from].chars().next_back();
    for (offset, character) in text[from..].char_indices() {
        if previous.is_some_and(|previous| is_cut(previous, character)) {
            return from + offset;
        }
        previous = Some(character);
    }
    text.len()
}

/// Whether `a` and `b`, side by side, always fall into different pieces of the
/// pre-tokenizer, and these pieces don't depend on what is on the other side.
/// True only for some of the places where that is so.
fn is_cut(a: char, b: char) -> bool {
    // A space can only begin a piece (or lie within whitespace).
    (b == ' ' && (a.is_alphanumeric() || a.is_ascii_punctuation()))
        // A newline ends the piece that it is in, unless whitespace follows.
        || (a == '\n' && b.is_alphanumeric())
        // Digits are separated from everything before all else…
        || (b.is_ascii_digit() && a.is_ascii() && !a.is_ascii_digit())
        // …and then Chinese characters and kana are.
        || is_han_or_kana(a) != is_han_or_kana(b)
}

/// The class that the pre-tokenizer's second pass isolates.
fn is_han_or_kana(character: char) -> bool {
    matches!(character, '一'..='龥' | '\u{3040}'..='\u{309F}' | '\u{30A0}'..='\u{30FF}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::{super::load::pre_tokenizer, *};

    /// The pieces of `text`, spelled as bytes.
    fn pieces(text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        pre_tokenizer().unwrap().pre_tokenize(&mut pieces).unwrap();
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(piece, ..)| piece.to_owned()).collect()
    }

    /// Characters of every kind that the pre-tokenizer or a cut knows of.
    const KINDS: &str = "aZéДßΩ中龥一龦あゟ゠ヿｱ한ไ 0 9²½Ⅷ٣〇①Ⓐ_-!\"'.…«»￥+=€｜🙂\u{301}\u{200D}\u{200B}\0\u{1}\u{7F}\u{85}\u{A0}\u{2028}\u{3000}\t\r\n  \n\u{180E}\u{FEFF}";

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn cuts_never_change_pieces(kinds in proptest::collection::vec(0..KINDS.chars().count(), 0..24)) {
            let characters: Vec<char> =
                kinds.iter().filter_map(|&kind| KINDS.chars().nth(kind)).collect();
            let text: String = characters.iter().collect();
            let whole = pieces(&text);
            for at in 1..characters.len() {
                if is_cut(characters[at - 1], characters[at]) {
                    let mut cut = pieces(&characters[..at].iter().collect::<String>());
                    cut.extend(pieces(&characters[at..].iter().collect::<String>()));
                    prop_assert_eq!(&cut, &whole, "{:?} cut at {}", text, at);
                }
            }
        }
    }

    #[test]
    fn segments_are_the_text() {
        let text = "word wörd 12 中文, ".repeat(30_000);
        let segments = split(&text).unwrap();
        assert!(segments.len() > 5);
        assert!(segments.iter().all(|segment| segment.len() < TARGET + 64));
        assert_eq!(segments.concat(), text);
    }

    #[test]
    fn short_and_empty_texts_are_one_segment() {
        assert_eq!(split("").unwrap(), [""]);
        assert_eq!(split("a b").unwrap(), ["a b"]);
        let exact = "a ".repeat(TARGET / 2);
        assert_eq!(split(&exact).unwrap(), [&exact]);
    }

    #[test]
    fn a_run_without_a_cut_is_kept_whole_up_to_the_limit() {
        let run = "é".repeat(LIMIT / 2);
        assert_eq!(split(&run).unwrap(), [&run]);
        let error = split(&(run + "é")).unwrap_err();
        assert!(matches!(error, TokenizerError::TextTooUniform { offset: 0, .. }));
    }

    #[test]
    fn the_end_of_a_cut_text_may_be_short() {
        let text = "a".repeat(TARGET) + " b";
        assert_eq!(split(&text).unwrap(), [&text[..TARGET], " b"]);
    }
}
