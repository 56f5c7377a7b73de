//! The model's tokens as DeepSeek's output parser wants them.

use std::sync::Arc;

use deepseek_recipe::stream::StreamTokenizer;
use ds4_text::tokenizer::Tokenizer;

/// A tokenizer for the output parser.
pub(crate) struct TokenText(pub(crate) Arc<Tokenizer>);

impl StreamTokenizer for TokenText {
    fn decode_ids(&self, ids: &[u32], _skip_special_tokens: bool) -> Result<String, String> {
        Ok(self.0.decode(ids))
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.bytes_of(id).map(byte_level)
    }

    fn count_tokens(&self, text: &str) -> Option<usize> {
        self.0.encode(text).ok().map(|tokens| tokens.len())
    }

    fn is_special_token(&self, id: u32) -> bool {
        self.0.is_marker(id)
    }
}

/// Bytes in the alphabet of byte-level vocabularies: printable characters of Latin-1 stand for
/// themselves, the others for the characters from U+0100 on.
fn byte_level(bytes: &[u8]) -> String {
    let mut shifted = 0;
    let alphabet: Vec<char> = (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                shifted += 1;
                char::from_u32(255 + shifted).unwrap_or_default()
            }
        })
        .collect();
    bytes.iter().map(|byte| alphabet[usize::from(*byte)]).collect()
}
