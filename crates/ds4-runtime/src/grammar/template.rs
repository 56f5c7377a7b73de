//! Fixed text with alternatives: the parts of a block of tool calls that are not values.

use ds4_engine::TokenId;
use llguidance::toktrie::SimpleVob;

use super::compiler::Grammars;

/// A stretch of fixed text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    Text(String),
    /// The marker in the middle of every tag.
    Dsml,
}

/// One of several texts, and what it stands for.
#[derive(Debug, Clone)]
pub(super) struct Choice<M> {
    pub(super) pieces: Vec<Piece>,
    pub(super) meaning: M,
}

/// A place within one of several texts.
#[derive(Debug)]
pub(super) struct Template<M> {
    /// Texts that begin like what is there.
    alive: Vec<Progress<M>>,
}

#[derive(Debug)]
struct Progress<M> {
    choice: Choice<M>,
    /// Pieces that are complete.
    piece: usize,
    /// Bytes of the next piece that are there.
    offset: usize,
}

impl<M: Clone> Template<M> {
    /// At the beginning of `choices`, none of which is empty or begins another.
    pub(super) fn new(choices: Vec<Choice<M>>) -> Self {
        let start = |choice| Progress { choice, piece: 0, offset: 0 };
        Template { alive: choices.into_iter().map(start).collect() }
    }

    /// The tokens that must come next.
    pub(super) fn forced(&self, grammars: &Grammars) -> Vec<TokenId> {
        let certain = self.certain(grammars);
        if !certain.is_empty() {
            return certain;
        }
        let mask = self.mask(grammars);
        if mask.num_set() == 1 { mask.to_list() } else { Vec::new() }
    }

    /// The tokens that may come next.
    pub(super) fn mask(&self, grammars: &Grammars) -> SimpleVob {
        let mut mask = grammars.nothing();
        for progress in &self.alive {
            match progress.rest() {
                Rest::Dsml => mask.allow_token(grammars.special().dsml),
                Rest::Text(text) => grammars.allow_prefixes(&mut mask, text),
            }
        }
        mask
    }

    /// Takes in a token that [`mask`](Self::mask) allows; the meaning of a text that is complete.
    pub(super) fn accept(&mut self, grammars: &Grammars, token: TokenId) -> Option<M> {
        self.alive.retain_mut(|progress| progress.accept(grammars, token));
        let complete = |progress: &&Progress<M>| progress.piece == progress.choice.pieces.len();
        self.alive.iter().find(complete).map(|progress| progress.choice.meaning.clone())
    }

    /// The tokens of the pieces that all choices have in common from here on.
    fn certain(&self, grammars: &Grammars) -> Vec<TokenId> {
        let mut tokens = Vec::new();
        let Some((first, others)) = self.alive.split_first() else { return tokens };
        if others.iter().any(|other| (other.piece, other.offset) != (first.piece, first.offset)) {
            return tokens;
        }
        let mut offset = first.offset;
        for (index, piece) in first.choice.pieces.iter().enumerate().skip(first.piece) {
            if others.iter().any(|other| other.choice.pieces.get(index) != Some(piece)) {
                break;
            }
            match piece {
                Piece::Dsml => tokens.push(grammars.special().dsml),
                Piece::Text(text) => match grammars.encode(&text.as_bytes()[offset..]) {
                    Some(encoded) => tokens.extend(encoded),
                    None => break,
                },
            }
            offset = 0;
        }
        tokens
    }
}

/// What is left of a piece.
enum Rest<'a> {
    Text(&'a [u8]),
    Dsml,
}

impl<M> Progress<M> {
    fn rest(&self) -> Rest<'_> {
        match self.choice.pieces.get(self.piece) {
            Some(Piece::Text(text)) => Rest::Text(&text.as_bytes()[self.offset..]),
            _ => Rest::Dsml,
        }
    }

    /// Goes on by a token; whether the text goes on like that.
    fn accept(&mut self, grammars: &Grammars, token: TokenId) -> bool {
        let bytes = grammars.bytes_of(token);
        let is_dsml = token == grammars.special().dsml;
        let fits = match self.rest() {
            Rest::Dsml => is_dsml,
            Rest::Text(text) => !is_dsml && text.starts_with(bytes),
        };
        let left = match self.rest() {
            Rest::Text(text) => text.len().saturating_sub(bytes.len()),
            Rest::Dsml => 0,
        };
        if left == 0 {
            (self.piece, self.offset) = (self.piece + 1, 0);
        } else {
            self.offset += bytes.len();
        }
        fits
    }
}

/// Pieces of `text`, in which `｜` stands for the marker.
pub(super) fn pieces(text: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (index, part) in text.split('｜').enumerate() {
        if index > 0 {
            pieces.push(Piece::Dsml);
        }
        if !part.is_empty() {
            pieces.push(Piece::Text(part.to_owned()));
        }
    }
    pieces
}
