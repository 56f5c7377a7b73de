//! A session as bytes, in the canonical layout that every backend reads and writes.
//!
//! After a fixed header everything has a size that follows from the model's shape, the rounding
//! and the number of tokens, so there are no lengths inside to trust: the total is checked once.
//!
//! ```text
//! magic "DS4KV\0\0\1" | model identity [32] | rounding u32 | tokens n u32 | token ids u32[n]
//! per layer: window rows | compressed rows | compressor values, scores f32
//!            | index keys | indexer compressor values, scores f32
//! ```
//! All little-endian. Rows are in the storage format of the rounding ([`crate::rows`]).

use crate::{
    Engine, Session, SessionError, TokenId,
    backend::BackendError,
    layout::{
        CompressorInputs, Frontier, LayerFrontier, LayerLayout, Plane, PlaneLayout, StateLayout,
    },
    rows::CacheRounding,
};

const MAGIC: &[u8; 8] = b"DS4KV\0\0\x01";
const HEADER: usize = 8 + 32 + 4 + 4;

/// Why a snapshot was refused.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Not a snapshot, or one of another version.
    #[error("not a session snapshot: found {found} at its start, expected {expected}")]
    Magic {
        /// First bytes, escaped.
        found: String,
        /// What they should be.
        expected: String,
    },
    /// Made with another model.
    #[error("the snapshot was made with another model: prefill again")]
    OtherModel,
    /// Made with the other cache rounding.
    #[error("the snapshot was made with cache rounding {found}, this engine has it {expected}")]
    OtherRounding {
        /// In the snapshot.
        found: &'static str,
        /// In the engine.
        expected: &'static str,
    },
    /// The number of bytes does not fit the number of tokens.
    #[error("snapshot of {tokens} tokens: found {found} bytes, expected {expected} (truncated?)")]
    Length {
        /// Tokens it claims.
        tokens: usize,
        /// Bytes it has.
        found: usize,
        /// Bytes it should have.
        expected: usize,
    },
    /// A token outside the vocabulary or more tokens than the model takes.
    #[error("snapshot: found {found}, the model allows {limit}")]
    Tokens {
        /// What was found.
        found: String,
        /// The limit.
        limit: usize,
    },
    /// The device failed or has no room.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl Engine {
    /// The session as bytes. Costs one copy of what its cache holds.
    ///
    /// # Errors
    /// If a step of the session failed, or the device fails.
    pub fn snapshot(&self, session: &Session) -> Result<Vec<u8>, SessionError> {
        self.check_whole(session)?;
        let (layout, tokens) = (self.layout(), session.len());
        let mut out = Vec::with_capacity(snapshot_bytes(layout, tokens));
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&self.backend().model_identity());
        out.extend_from_slice(&rounding_code(layout.rounding()).to_le_bytes());
        out.extend_from_slice(&(tokens as u32).to_le_bytes());
        for token in session.tokens() {
            out.extend_from_slice(&token.to_le_bytes());
        }
        let frontier = session.cache.read_frontier(tokens)?;
        for (l, (layer, saved)) in layout.layers().iter().zip(&frontier.layers).enumerate() {
            let rows = |plane, layout: PlaneLayout| {
                session.cache.read_rows(l, plane, 0..layout.rows(tokens))
            };
            out.extend_from_slice(&saved.window);
            if let Some(p) = layer.rows {
                out.extend_from_slice(&rows(Plane::Rows, p)?);
            }
            write_inputs(&mut out, &saved.compressor);
            if let Some(p) = layer.index_keys {
                out.extend_from_slice(&rows(Plane::IndexKeys, p)?);
            }
            write_inputs(&mut out, &saved.indexer);
        }
        Ok(out)
    }

    /// A session from the bytes of [`snapshot`](Self::snapshot), continuing with equal logits.
    ///
    /// # Errors
    /// If the bytes are not a snapshot of this model with this cache rounding. Any bytes are
    /// safe to pass.
    pub fn restore(&self, bytes: &[u8]) -> Result<Session, SnapshotError> {
        let (tokens, mut rest) = self.read_header(bytes)?;
        let n = tokens.len();
        let mut frontier = Frontier { position: n, layers: Vec::new() };
        let mut cache = self.backend().new_cache()?;
        cache.reserve(n)?;
        for (l, layer) in self.layout().layers().iter().enumerate() {
            let mut saved = LayerFrontier {
                window: take(&mut rest, layer.window_bytes(n)).to_vec(),
                ..Default::default()
            };
            if let Some(p) = layer.rows {
                cache.write_rows(l, Plane::Rows, 0, take(&mut rest, p.rows(n) * p.row_bytes))?;
                saved.compressor = read_inputs(&mut rest, p.tail_bytes(n));
            }
            if let Some(p) = layer.index_keys {
                cache.write_rows(
                    l,
                    Plane::IndexKeys,
                    0,
                    take(&mut rest, p.rows(n) * p.row_bytes),
                )?;
                saved.indexer = read_inputs(&mut rest, p.tail_bytes(n));
            }
            frontier.layers.push(saved);
        }
        cache.write_frontier(&frontier)?;
        Ok(Session::restored(self.id(), tokens, cache))
    }

    /// Checks everything there is to check; the rest then has exactly the expected length.
    fn read_header<'a>(&self, bytes: &'a [u8]) -> Result<(Vec<TokenId>, &'a [u8]), SnapshotError> {
        let config = self.config();
        let Some((header, rest)) =
            bytes.split_at_checked(HEADER).filter(|_| bytes.starts_with(MAGIC))
        else {
            return Err(SnapshotError::Magic {
                found: bytes[..bytes.len().min(8)].escape_ascii().to_string(),
                expected: MAGIC.escape_ascii().to_string(),
            });
        };
        if header[8..40] != self.backend().model_identity() {
            return Err(SnapshotError::OtherModel);
        }
        let (found, expected) = (le_u32(&header[40..]), rounding_code(self.layout().rounding()));
        if found != expected {
            let name = |code| if code == 1 { "on" } else { "off" };
            return Err(SnapshotError::OtherRounding {
                found: name(found),
                expected: name(expected),
            });
        }
        let n = le_u32(&header[44..]) as usize;
        if n > config.context_length {
            let found = format!("{n} tokens");
            return Err(SnapshotError::Tokens { found, limit: config.context_length });
        }
        let expected = snapshot_bytes(self.layout(), n);
        if bytes.len() != expected {
            return Err(SnapshotError::Length { tokens: n, found: bytes.len(), expected });
        }
        let (ids, rest) = rest.split_at(4 * n);
        let tokens: Vec<TokenId> = ids.chunks_exact(4).map(le_u32).collect();
        if let Some(token) = tokens.iter().find(|t| **t as usize >= config.vocab) {
            let found = format!("token {token}");
            return Err(SnapshotError::Tokens { found, limit: config.vocab });
        }
        Ok((tokens, rest))
    }
}

/// Bytes of a snapshot of `tokens` tokens. Bounded by the model's context length, so that no sum
/// overflows.
fn snapshot_bytes(layout: &StateLayout, tokens: usize) -> usize {
    let plane = |p: PlaneLayout| p.rows(tokens) * p.row_bytes + p.tail_bytes(tokens);
    let layer =
        |l: &LayerLayout| l.window_bytes(tokens) + l.planes().map(|(_, p)| plane(p)).sum::<usize>();
    HEADER + 4 * tokens + layout.layers().iter().map(layer).sum::<usize>()
}

fn rounding_code(rounding: CacheRounding) -> u32 {
    match rounding {
        CacheRounding::Off => 0,
        CacheRounding::On => 1,
    }
}

fn write_inputs(out: &mut Vec<u8>, inputs: &CompressorInputs) {
    for x in inputs.values.iter().chain(&inputs.scores) {
        out.extend_from_slice(&x.to_le_bytes());
    }
}

fn read_inputs(rest: &mut &[u8], bytes: usize) -> CompressorInputs {
    let mut values: Vec<f32> =
        take(rest, bytes).chunks_exact(4).map(|b| f32::from_bits(le_u32(b))).collect();
    let scores = values.split_off(values.len() / 2);
    CompressorInputs { values, scores }
}

/// The next `n` bytes; the total length was checked.
fn take<'a>(rest: &mut &'a [u8], n: usize) -> &'a [u8] {
    let (head, tail) = rest.split_at(n);
    *rest = tail;
    head
}

fn le_u32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}
