//! The attention kernels against plain Rust, stage by stage, on random inputs.
//!
//! Every stage is compared on the device's own earlier results, so that one rounding that fell the
//! other way can neither hide an error nor fake one. Without a device the tests say so and pass.

pub mod harness;
pub mod reference;

use ds4_engine::backend::Cache as _;
use ds4_engine::{
    MAX_REWIND,
    backend::BackendError,
    rows::{CacheRounding, RowCodec},
};
use ds4_model::config::{HEAD_DIM, INDEX_DIM, LayerKind};

use crate::{device::Device, kernel::Pointer};
use harness::{Harness, Session, Shape, device};

const KINDS: [LayerKind; 3] = [LayerKind::Swa, LayerKind::Csa, LayerKind::Hca];
const ROUNDINGS: [CacheRounding; 2] = [CacheRounding::On, CacheRounding::Off];

fn small(kind: LayerKind, rounding: CacheRounding) -> Shape {
    Shape { kind, rounding, heads: 4, index_heads: 4, top_k: 16, keys: 128 }
}

/// Every kind of layer with both kinds of rows.
fn each(device: &Device, mut test: impl FnMut(&mut Harness)) {
    for kind in KINDS {
        for rounding in ROUNDINGS {
            test(&mut Harness::new(device, small(kind, rounding), 7));
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn prefill_chunks_of_any_length() {
    let device = device();
    each(&device, |h| {
        let mut sessions = [h.session(), h.session()];
        // The second is longer than every ring; then chunks that start inside windows.
        h.step(&mut sessions, &[(0, 37), (1, 190)]);
        h.step(&mut sessions, &[(1, 8), (0, 131)]);
    });
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn decoding_across_every_boundary() {
    let device = device();
    each(&device, |h| {
        let mut sessions = [h.session(), h.session()];
        h.step(&mut sessions, &[(0, 1), (1, 7)]);
        h.step(&mut sessions, &[(0, 2), (1, 118)]);
        // Positions 125 to 131 and 3 to 9 of the two.
        for _ in 0..3 {
            h.step(&mut sessions, &[(1, 1), (0, 2)]);
        }
        h.step(&mut sessions, &[(1, 4), (0, 1)]);
    });
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn decodes_and_prefill_chunks_in_one_step() {
    let device = device();
    each(&device, |h| {
        let mut sessions = [h.session(), h.session(), h.session()];
        h.step(&mut sessions, &[(0, 100), (1, 20)]);
        h.step(&mut sessions, &[(1, 3), (0, 33), (2, 9)]);
    });
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn rewinding_repeats_nothing_and_loses_nothing() {
    let device = device();
    each(&device, |h| {
        let mut sessions = [h.session()];
        // As far back as a session goes.
        h.step(&mut sessions, &[(0, 150)]);
        sessions[0].rewind(150 - MAX_REWIND);
        for (draft, kept) in [(7, 2), (5, 1), (6, 6), (7, 3)] {
            let position = sessions[0].position();
            h.step(&mut sessions, &[(0, draft)]);
            sessions[0].rewind(position + kept);
        }
    });
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn a_restored_cache_goes_on_alike() {
    let device = device();
    each(&device, |h| {
        let mut sessions = [h.session(), h.session()];
        h.step(&mut sessions, &[(0, 150)]);
        let (frontier, rows) = sessions[0].save();
        let [source, copy] = &mut sessions;
        copy.restore(source, &frontier, &rows);
        assert!(copy.save() == (frontier, rows));
        h.step(&mut sessions, &[(1, 3), (0, 2)]);
    });
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn captured_graphs_hold_for_later_positions() {
    let device = device();
    each(&device, |h| {
        let mut sessions = [h.session(), h.session()];
        h.step(&mut sessions, &[(0, 1), (1, 60)]);
        h.launch_again(&mut sessions, &[(0, 1), (1, 2)], &[0, 140]);
    });
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn heads_of_the_full_model() {
    let device = device();
    for kind in KINDS {
        let shape = Shape {
            kind,
            rounding: CacheRounding::On,
            heads: 64,
            index_heads: 64,
            top_k: 512,
            keys: 1024,
        };
        let mut h = Harness::new(&device, shape, 11);
        let mut sessions = [h.session(), h.session()];
        // 700 and 301 rows in CSA layers: more and fewer than are chosen.
        h.fill(&mut sessions[0], 2801);
        h.fill(&mut sessions[1], 1206);
        h.step(&mut sessions, &[(0, 2), (1, 8)]);
        h.step(&mut sessions, &[(1, 1), (0, 8)]);
        h.step(&mut sessions, &[(0, 7), (1, 7)]);
    }
}

/// Many rows have a kernel of their own, and blocks that share a query's rows differently.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn attention_has_the_same_bits_however_many_rows_there_are() {
    let device = device();
    for rounding in ROUNDINGS {
        // Few groups of heads and many, and a last one that is not full.
        for heads in [20, 84] {
            let shape = Shape { heads, top_k: 200, ..small(LayerKind::Csa, rounding) };
            let mut h = Harness::new(&device, Shape { keys: 512, ..shape }, 13);
            let mut sessions = [h.session(), h.session(), h.session()];
            h.fill(&mut sessions[0], 1150);
            h.fill(&mut sessions[1], 603);
            h.step(&mut sessions, &[(0, 7), (1, 7), (2, 3)]);
            let all = h.attend_again(17);
            for at_once in [1, 5, 12] {
                assert!(h.attend_again(at_once) == all, "{rounding:?}, {at_once} of {heads} heads");
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn heads_that_fill_no_tile() {
    let device = device();
    for (heads, index_heads) in [(8, 12), (20, 16), (2, 3)] {
        let shape = Shape { heads, index_heads, ..small(LayerKind::Csa, CacheRounding::On) };
        let mut h = Harness::new(&device, shape, 3);
        let mut sessions = [h.session(), h.session()];
        h.step(&mut sessions, &[(0, 90)]);
        h.step(&mut sessions, &[(0, 2), (1, 9)]);
    }
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn a_long_session() {
    let device = device();
    for rounding in ROUNDINGS {
        // More keys than a block sees at once or shared memory holds, and 1100 rows of HCA.
        let shape = Shape { keys: 40_000, ..small(LayerKind::Csa, rounding) };
        long_step(&device, shape, 140_801);
    }
    long_step(&device, small(LayerKind::Hca, CacheRounding::On), 140_801);
}

fn long_step(device: &Device, shape: Shape, position: usize) {
    let mut h = Harness::new(device, shape, 5);
    let mut sessions = [h.session()];
    h.fill(&mut sessions[0], position);
    h.step(&mut sessions, &[(0, 2)]);
    h.step(&mut sessions, &[(0, 8)]);
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn scores_in_several_passes_choose_the_same() {
    let device = device();
    let shape = small(LayerKind::Csa, CacheRounding::On);
    let mut h = Harness::new(&device, shape, 9);
    let mut sessions = [h.session()];
    h.step(&mut sessions, &[(0, 90)]);
    h.step(&mut sessions, &[(0, 12)]);
    assert_eq!(h.select_again(5), h.select_again(12));
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn equal_scores_go_to_the_lower_row() {
    let device = device();
    // One head: half of the scores are exactly zero, and above all others where its weight is
    // negative.
    let shape = Shape { index_heads: 1, ..small(LayerKind::Csa, CacheRounding::On) };
    let shape = Shape { keys: 1100, ..shape };
    // Few enough equal ones to compare them all, and more.
    for position in [400, 4200] {
        let mut h = Harness::new(&device, shape, 1);
        let mut sessions = [h.session()];
        h.fill(&mut sessions[0], position);
        h.step(&mut sessions, &[(0, 7)]);
        assert!(h.ties() > 0);
    }
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn a_score_beyond_all_others_hides_no_differences() {
    let device = device();
    let shape = Shape { keys: 1100, ..small(LayerKind::Csa, CacheRounding::Off) };
    let mut h = Harness::new(&device, shape, 2);
    let mut sessions = [h.session()];
    h.fill(&mut sessions[0], 4200);
    sessions[0].enlarge_key(700, 4000.0);
    h.step(&mut sessions, &[(0, 7)]);
    h.step(&mut sessions, &[(0, 12)]);
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn rows_are_stored_bit_for_bit_as_the_engine_stores_them() {
    let device = device();
    for rounding in ROUNDINGS {
        let mut h = Harness::new(&device, small(LayerKind::Csa, rounding), 13);
        let rows = hostile_rows(HEAD_DIM);
        same_rows(rounding.kv_codec(), &h.store_rows(&rows), &rows);
        let keys = hostile_rows(INDEX_DIM);
        same_rows(rounding.index_codec(), &h.store_keys(&keys), &keys);
    }
}

/// Rows of magnitudes from 2^-26 to 2^7, with zeros, subnormals and values halfway between codes.
fn hostile_rows(width: usize) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(17);
    let mut rows: Vec<f32> = (0..34 * width)
        .map(|i| {
            let magnitude = 2f32.powi((i / width) as i32 - 26);
            (random.f32() - 0.5) * magnitude
        })
        .collect();
    rows.extend((0..width).map(|i| i as f32 / 16.0 - 4.0));
    rows.extend((0..width).map(|i| if i % 3 == 0 { 0.0 } else { -(i as f32) * 1e-40 }));
    rows.extend((0..width).map(|_| 0.0));
    rows
}

fn same_rows(codec: RowCodec, stored: &[u8], rows: &[f32]) {
    assert_eq!(stored.len() / codec.row_bytes(), rows.len() / codec.width());
    let pairs = stored.chunks_exact(codec.row_bytes()).zip(rows.chunks_exact(codec.width()));
    for (i, (stored, row)) in pairs.enumerate() {
        let mut expected = vec![0; codec.row_bytes()];
        codec.encode(row, &mut expected);
        let different = stored.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(different, None, "{codec:?}, row {i}: first byte that differs");
    }
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn no_room_to_grow_leaves_the_session_alive() {
    let device = device();
    let mut h = Harness::new(&device, small(LayerKind::Csa, CacheRounding::On), 7);
    let mut sessions = [h.session()];
    h.step(&mut sessions, &[(0, 20)]);
    let before = sessions[0].save();
    // 2^42 tokens need some petabytes.
    let result = sessions[0].cache.reserve(1 << 42);
    assert!(matches!(result, Err(BackendError::OutOfMemory(_))), "{result:?}");
    assert!(sessions[0].save() == before);
    h.step(&mut sessions, &[(0, 3)]);
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn growing_keeps_rows_and_counts_bytes() {
    let device = device();
    let mut h = Harness::new(&device, small(LayerKind::Csa, CacheRounding::On), 7);
    let mut session: Session = h.session();
    h.fill(&mut session, 1000);
    let (before, bytes) = (session.save(), session.cache.bytes());
    let pointers = session.cache.pointers()[1];
    session.cache.reserve(1025 * 4).expect("room for 1025 rows");
    assert_ne!(session.cache.pointers()[1].rows, pointers.rows);
    assert_eq!(session.cache.pointers()[1].window, pointers.window);
    assert_eq!(session.cache.pointers()[0].rows, Pointer::NULL);
    session.rewind(1000);
    assert!(session.save() == before);
    // Room for 2048 rows of 712 bytes and keys of 68 instead of 256.
    assert_eq!(session.cache.bytes() - bytes, (1280 - 256) * (712 + 68));
}
