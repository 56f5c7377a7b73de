//! The byte strings behind tokens.
//!
//! Files spell a token's bytes in an alphabet of 256 printable characters,
//! GPT-2's: printable Latin-1 stands for itself, and the remaining bytes
//! follow from U+0100 on in ascending order. Markers are spelled as they are.

use ds4_model::TokenId;

/// The bytes of every token, one after the other.
pub(super) struct TokenBytes {
    bytes: Vec<u8>,
    /// Where each token ends.
    ends: Vec<usize>,
}

impl TokenBytes {
    /// The bytes of `tokens`; `is_marker` tells which are spelled as they are.
    pub(super) fn new(tokens: &[String], is_marker: &[bool]) -> Self {
        let mut bytes = Vec::with_capacity(tokens.iter().map(String::len).sum());
        let mut ends = Vec::with_capacity(tokens.len());
        for (token, &is_marker) in tokens.iter().zip(is_marker) {
            match token.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
                Some(decoded) if !is_marker => bytes.extend(decoded),
                // A token outside the alphabet stands for its own spelling.
                _ => bytes.extend(token.as_bytes()),
            }
            ends.push(bytes.len());
        }
        TokenBytes { bytes, ends }
    }

    /// The bytes of one token, if it exists.
    pub(super) fn get(&self, id: TokenId) -> Option<&[u8]> {
        let id = usize::try_from(id).ok()?;
        let end = *self.ends.get(id)?;
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        Some(&self.bytes[start..end])
    }
}

/// The character that spells `byte`.
pub(super) fn char_of(byte: u8) -> char {
    if stands_for_itself(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&other| !stands_for_itself(other)).count() as u32;
    // At most 255 above U+0100, where no surrogates are.
    char::from_u32(0x100 + rank).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The byte that `character` spells, if it is in the alphabet.
fn byte_of(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ 0x00..=0xFF => Some(code as u8).filter(|&byte| stands_for_itself(byte)),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121) as u8 + 0x7F),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// Whether a byte, as Latin-1, is a printable character other than a space.
fn stands_for_itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character() {
        for byte in 0..=255 {
            assert_eq!(byte_of(char_of(byte)), Some(byte));
        }
        assert_eq!(char_of(b' '), 'Ġ');
        assert_eq!(char_of(b'\n'), 'Ċ');
        assert_eq!(char_of(0xE4), 'ä');
        assert_eq!(char_of(0xAD), 'Ń');
    }

    #[test]
    fn other_characters_spell_no_byte() {
        for character in [' ', '\n', '\u{7F}', '\u{AD}', '\u{144}', '｜', '中'] {
            assert_eq!(byte_of(character), None, "{character:?}");
        }
    }

    #[test]
    fn tokens_outside_the_alphabet_and_markers_keep_their_spelling() {
        let tokens = ["Ġa", "Ġ｜", "Ġa!", ""].map(str::to_owned);
        let bytes = TokenBytes::new(&tokens, &[false, false, true, false]);
        assert_eq!(bytes.get(0), Some(&b" a"[..]));
        assert_eq!(bytes.get(1), Some("Ġ｜".as_bytes()));
        assert_eq!(bytes.get(2), Some("Ġa!".as_bytes()));
        assert_eq!(bytes.get(3), Some(&b""[..]));
        assert_eq!(bytes.get(4), None);
    }
}
