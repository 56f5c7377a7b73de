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

use ds4_model::config::{Config, INDEX_DIM, LayerKind, WINDOW};

use crate::{
    Engine, Session, TokenId,
    backend::{
        Backend, BackendError, CompressorInputs, Frontier, LayerFrontier, LayerRows,
        compressor_tail,
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
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl<B: Backend> Engine<B> {
    /// The session as bytes. Costs one copy of what its cache holds.
    ///
    /// # Errors
    /// If the device fails.
    pub fn snapshot(&self, session: &Session<B>) -> Result<Vec<u8>, BackendError> {
        let b = self.backend();
        let sizes = Sizes::new(b.config(), b.cache_rounding(), session.len());
        let mut out = Vec::with_capacity(sizes.total());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&b.model_identity());
        out.extend_from_slice(&rounding_code(b.cache_rounding()).to_le_bytes());
        out.extend_from_slice(&(session.len() as u32).to_le_bytes());
        for token in session.tokens() {
            out.extend_from_slice(&token.to_le_bytes());
        }
        let frontier = b.frontier(&session.cache, session.len())?;
        for (l, layer) in frontier.layers.iter().enumerate() {
            let rows = b.layer_rows(&session.cache, l)?;
            out.extend_from_slice(&layer.window);
            out.extend_from_slice(&rows.rows);
            write_inputs(&mut out, &layer.compressor);
            out.extend_from_slice(&rows.index_keys);
            write_inputs(&mut out, &layer.indexer);
        }
        Ok(out)
    }

    /// A session from the bytes of [`snapshot`](Self::snapshot), continuing with equal logits.
    ///
    /// # Errors
    /// If the bytes are not a snapshot of this model with this cache rounding. Any bytes are
    /// safe to pass.
    pub fn restore(&self, bytes: &[u8]) -> Result<Session<B>, SnapshotError> {
        let b = self.backend();
        let (tokens, mut rest) = self.read_header(bytes)?;
        let mut frontier = Frontier { position: tokens.len(), layers: Vec::new() };
        let mut cache = b.new_cache()?;
        for (l, size) in
            Sizes::new(b.config(), b.cache_rounding(), tokens.len()).layers.iter().enumerate()
        {
            let window = take(&mut rest, size.window).to_vec();
            let rows = take(&mut rest, size.rows).to_vec();
            let compressor = read_inputs(&mut rest, size.compressor);
            let index_keys = take(&mut rest, size.index_keys).to_vec();
            let indexer = read_inputs(&mut rest, size.indexer);
            b.set_layer_rows(&mut cache, l, &LayerRows { rows, index_keys })?;
            frontier.layers.push(LayerFrontier { window, compressor, indexer });
        }
        b.set_frontier(&mut cache, &frontier)?;
        Ok(Session::restored(tokens, cache))
    }

    /// Checks everything there is to check; the rest then has exactly the expected length.
    fn read_header<'a>(&self, bytes: &'a [u8]) -> Result<(Vec<TokenId>, &'a [u8]), SnapshotError> {
        let b = self.backend();
        let config = b.config();
        let Some((header, rest)) =
            bytes.split_at_checked(HEADER).filter(|_| bytes.starts_with(MAGIC))
        else {
            return Err(SnapshotError::Magic {
                found: bytes[..bytes.len().min(8)].escape_ascii().to_string(),
                expected: MAGIC.escape_ascii().to_string(),
            });
        };
        if header[8..40] != b.model_identity() {
            return Err(SnapshotError::OtherModel);
        }
        let (found, expected) = (le_u32(&header[40..]), rounding_code(b.cache_rounding()));
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
        let expected = Sizes::new(config, b.cache_rounding(), n).total();
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

/// Bytes of every section of a snapshot. Bounded by the model's context length, so that no sum
/// overflows.
struct Sizes {
    tokens: usize,
    layers: Vec<LayerSizes>,
}

struct LayerSizes {
    window: usize,
    rows: usize,
    /// Of values and scores together.
    compressor: usize,
    index_keys: usize,
    indexer: usize,
}

impl Sizes {
    fn new(config: &Config, rounding: CacheRounding, tokens: usize) -> Self {
        let layer = |kind: LayerKind| {
            let ratio = kind.ratio();
            let rows = tokens.checked_div(ratio).unwrap_or(0);
            let tail = compressor_tail(ratio, tokens).len();
            let indexed = usize::from(kind == LayerKind::Csa);
            LayerSizes {
                window: tokens.min(WINDOW) * rounding.kv_codec().row_bytes(),
                rows: rows * rounding.kv_codec().row_bytes(),
                compressor: 8 * tail * kind.compressor_width(),
                index_keys: indexed * rows * rounding.index_codec().row_bytes(),
                indexer: indexed * 8 * tail * 2 * INDEX_DIM,
            }
        };
        Sizes { tokens, layers: config.layers.iter().map(|l| layer(l.kind)).collect() }
    }

    fn total(&self) -> usize {
        let layers = self.layers.iter();
        HEADER
            + 4 * self.tokens
            + layers
                .map(|l| l.window + l.rows + l.compressor + l.index_keys + l.indexer)
                .sum::<usize>()
    }
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
