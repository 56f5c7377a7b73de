//! What a model needs: bytes of memory at a context, and bytes read for a token.

use anyhow::{Result, ensure};
use ds4_engine::rows::CacheRounding;
use ds4_model::{
    Model,
    binding::Role,
    config::{Config, LayerKind, WINDOW},
};
use sysinfo::{MemoryRefreshKind, System};

use crate::terminal;

/// Checks that generated weights of `needed` bytes fit into memory.
pub fn check_room(needed: u64) -> Result<()> {
    // Where the system can't be asked, there is nothing to go by.
    let Ok(mut system) = System::new() else { return Ok(()) };
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    let free = system.available_memory();
    let free = system.cgroup_limits().map_or(free, |limits| limits.free_memory.min(free));
    ensure!(
        needed <= free,
        "the dummy's weights take {}, found {} of memory free: choose fewer layers, such as \
         flash-q2:4",
        terminal::bytes(needed),
        terminal::bytes(free),
    );
    Ok(())
}

/// Bytes of weights that are read when each of `sessions` decodes a token, on average: each reads
/// a row of the embedding, and together they read every expert that one of them chose.
pub fn weight_bytes_per_step(model: &Model, sessions: usize) -> u64 {
    let config = &model.config;
    let experts = distinct_experts(config, sessions) / config.experts as f64;
    let read = |(role, bytes): (Role, u64)| match role {
        Role::Embedding | Role::Table => bytes / config.vocab as u64 * sessions as u64,
        Role::ExpertGateUp | Role::ExpertDown => (bytes as f64 * experts).round() as u64,
        _ => bytes,
    };
    model.weight_bytes().into_iter().map(read).sum()
}

/// How many of a layer's experts `tokens` tokens choose together, if they choose evenly.
fn distinct_experts(config: &Config, tokens: usize) -> f64 {
    let experts = config.experts as f64;
    let left_out = 1.0 - config.experts_used as f64 / experts;
    experts * (1.0 - left_out.powf(tokens as f64))
}

/// Bytes of KV state that a token decoded after `tokens` tokens reads.
pub fn cache_bytes_per_token(config: &Config, rounding: CacheRounding, tokens: usize) -> u64 {
    let (row, key) = (rounding.kv_codec().row_bytes(), rounding.index_codec().row_bytes());
    let layer = |kind: LayerKind| {
        let rows = tokens.checked_div(kind.ratio()).unwrap_or(0);
        let compressed = match kind {
            LayerKind::Csa if rows > config.index_top_k => config.index_top_k * row + rows * key,
            _ => rows * row,
        };
        (tokens.min(WINDOW) * row + compressed) as u64
    };
    config.layers.iter().map(|l| layer(l.kind)).sum()
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use ds4_model::synth;

    use super::*;

    fn tiny() -> Arc<Model> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny/tiny-b-q2.gguf");
        Arc::new(Model::open(Path::new(path)).unwrap())
    }

    #[test]
    fn what_no_machine_can_hold_is_refused() {
        assert!(check_room(1 << 20).is_ok());
        let message = check_room(1 << 50).unwrap_err().to_string();
        assert!(message.starts_with("the dummy's weights take 1024.0 TiB, found "), "{message}");
    }

    #[test]
    fn a_token_reads_its_experts_and_no_others() {
        let model = tiny();
        let all: u64 = model.weight_bytes().iter().map(|(_, bytes)| bytes).sum();
        let read = weight_bytes_per_step(&model, 1);
        let of = |role: Role| {
            let weights = model.weight_bytes();
            weights.iter().find(|(other, _)| *other == role).map_or(0, |(_, bytes)| *bytes)
        };
        // 6 of 8 experts, 1 of 4096 rows.
        let unread = (of(Role::ExpertGateUp) + of(Role::ExpertDown)) / 4
            + (of(Role::Embedding) + of(Role::Table)) / 4096 * 4095;
        assert_eq!(all - read, unread);
    }

    #[test]
    fn sessions_share_experts() {
        let config = synth::flash(1);
        let distinct = [1, 2, 16, 32].map(|n| distinct_experts(&config, n));
        let expected = [6.0, 11.86, 80.8, 136.15];
        for (found, expected) in distinct.into_iter().zip(expected) {
            assert!((found - expected).abs() < 0.05, "{found}, expected {expected}");
        }
        let model = tiny();
        let read = |sessions| weight_bytes_per_step(&model, sessions);
        let all: u64 = model.weight_bytes().iter().map(|(_, bytes)| bytes).sum();
        assert!(read(1) < read(2) && read(2) < 2 * read(1));
        // With 64 sessions, all experts are read, and of the embedding 64 rows.
        assert!(read(64) < all && read(64) > all / 2);
    }

    #[test]
    fn the_cache_read_is_bounded_by_what_the_indexer_picks() {
        let config = &tiny().config;
        let read = |tokens| cache_bytes_per_token(config, CacheRounding::On, tokens);
        let (row, key) = (712, 68);
        assert_eq!(CacheRounding::On.kv_codec().row_bytes(), row);
        // Beyond the window: 16 picked rows and all keys in two layers, all rows in one.
        let expected = 4 * 128 * row + 2 * (16 * row + 1000 * key) + 31 * row;
        assert_eq!(read(4000), expected as u64);
    }
}
