//! Whole-model checks against golden logits, and of what must not change them.

use std::sync::{Arc, Mutex};

use ds4_conformance::{
    feed,
    golden::{Distance, Golden, golden},
    session_after, small_model, suite, tiny_file,
};
use ds4_cpu::{CpuBackend, CpuExperts, Kernels};
use ds4_engine::{
    BackendError, Engine, MAX_REWIND, Phase, Session, SessionError, SnapshotError, Wanted, Work,
    backend::{Batch, Cache, Span, StageResult},
    experts::{RoutedExperts, RoutedRows},
    rows::CacheRounding,
    sampling::{Sampler, SamplingParams},
};
use ds4_model::{Model, synth::Recipe};

/// Bytes of a snapshot before its tokens.
const HEADER: usize = 48;

fn tiny_backend(kernels: Kernels, rounding: CacheRounding) -> CpuBackend {
    let model = Model::open(&tiny_file("tiny-b-q2.gguf")).unwrap();
    CpuBackend::new(Arc::new(model), kernels, rounding)
}

fn tiny_engine(kernels: Kernels, rounding: CacheRounding) -> Engine {
    Engine::new(tiny_backend(kernels, rounding))
}

fn distance(engine: &Engine, golden: &Golden) -> Distance {
    let mut session = engine.new_session().unwrap();
    golden.distance(&feed(engine, &mut session, &golden.tokens, 512))
}

/// The suite of every backend, on all kernels.
#[test]
fn all_kernels_pass_the_suite() {
    for kernels in Kernels::available() {
        for rounding in [CacheRounding::On, CacheRounding::Off] {
            println!("{kernels}, {rounding:?}");
            let engine =
                || Engine::new(CpuBackend::new(small_model(Recipe::Q2), kernels, rounding));
            let (engine, other) = (engine(), engine());
            suite::prompts_have_the_same_bits_however_they_are_cut(&engine);
            suite::decoded_spans_have_the_same_bits_as_single_tokens(&engine);
            suite::batches_have_the_bits_of_each_session_alone(&engine);
            suite::saved_states_continue_with_the_same_bits(&engine);
            suite::foreign_state_is_refused(&engine, &other);
            suite::sessions_take_the_bytes_that_are_announced(&engine);
        }
    }
}

/// Hands rows and routes on, and counts layers and decoded rows.
struct Elsewhere {
    experts: CpuExperts,
    seen: Mutex<Vec<(usize, usize)>>,
}

impl RoutedExperts for Elsewhere {
    fn run(&self, rows: &RoutedRows<'_>, y: &mut [f32]) -> StageResult {
        assert!(rows.ids.len() == rows.weights.len() && y.len() == rows.x.len());
        self.seen.lock().unwrap().push((rows.layer, rows.decode_rows));
        self.experts.run(rows, y)
    }
}

#[test]
fn routed_experts_can_be_run_by_something_else() {
    let model = small_model(Recipe::Q2);
    let kernels = Kernels::detect();
    let backend = || CpuBackend::new(model.clone(), kernels, CacheRounding::On);
    let experts = CpuExperts::new(model.clone(), kernels);
    let elsewhere = Arc::new(Elsewhere { experts, seen: Mutex::default() });
    let run = |backend: CpuBackend| {
        let engine = Engine::new(backend);
        let mut session = engine.new_session().unwrap();
        let mut rows = feed(&engine, &mut session, &[5; 20], 20);
        rows.extend(feed(&engine, &mut session, &[6], 1));
        rows
    };
    assert!(run(backend().with_experts(elsewhere.clone())) == run(backend()));
    let expected = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)];
    assert_eq!(*elsewhere.seen.lock().unwrap(), expected);
}

/// From another thread every part of a stage would have to be handed over and waited for.
#[test]
fn the_stages_of_a_step_run_on_a_thread_of_the_pool() {
    use ds4_engine::Backend;
    let backend = tiny_backend(Kernels::Reference, CacheRounding::On);
    assert_eq!(rayon::current_thread_index(), None);
    let batch = Batch {
        tokens: vec![1],
        spans: vec![Span { session: 0, start: 0, rows: 0..1 }],
        ..Batch::default()
    };
    let mut cache = backend.empty_cache();
    let mut caches: [&mut dyn Cache; 1] = [&mut cache];
    let result = backend.step(&batch, &mut caches, &|_| {
        assert!(rayon::current_thread_index().is_some());
        Err(BackendError::OutOfMemory("reached".to_owned()))
    });
    assert_eq!(result, Err(BackendError::OutOfMemory("reached".to_owned())));
}

#[test]
fn reference_equals_the_golden_logits() {
    let engine = tiny_engine(Kernels::Reference, CacheRounding::Off);
    for golden in golden("tiny-b-q2.safetensors") {
        let d = distance(&engine, &golden);
        assert!(
            d.max_abs <= 5e-3 && d.kl_mean <= 1e-6 && d.kl_max <= 1e-5 && d.top1 == 1.0,
            "{}: {d:?}",
            golden.name
        );
    }
}

/// On random weights rounding activations flips choices of experts and rows; the bounds are what
/// another engine's Q8 activations cost on this model (mean KL 2e-2, top-1 0.85).
#[test]
fn quantised_activations_cost_no_more_than_elsewhere() {
    for kernels in Kernels::available().into_iter().skip(1) {
        let engine = tiny_engine(kernels, CacheRounding::Off);
        let (mut kl, mut top1, mut rows) = (0.0, 0.0, 0.0);
        for golden in golden("tiny-b-q2.safetensors") {
            let d = distance(&engine, &golden);
            let n = golden.tokens.len() as f64;
            (kl, top1, rows) = (kl + n * d.kl_mean, top1 + n * d.top1, rows + n);
        }
        let (kl, top1) = (kl / rows, top1 / rows);
        assert!(kl <= 2e-2 && top1 >= 0.85, "{kernels}: mean KL {kl:.2e}, top-1 {top1:.4}");
        println!("{kernels}: mean KL {kl:.2e}, top-1 {top1:.4}");
    }
}

/// The golden vectors with rounding are not sharp: a value beside a rounding boundary flips with
/// the last bit of an f32 sum, and the reference differs from itself by a mean KL of 4e-3.
#[test]
fn reference_with_rounded_cache_is_close_to_the_golden_logits() {
    let engine = tiny_engine(Kernels::Reference, CacheRounding::On);
    for golden in golden("tiny-b-q2-qat.safetensors") {
        let d = distance(&engine, &golden);
        assert!(
            d.max_abs <= 5.0 && d.kl_mean <= 1e-2 && d.kl_max <= 1.0 && d.top1 >= 0.95,
            "{}: {d:?}",
            golden.name
        );
    }
}

fn prompt() -> Vec<u32> {
    let mut sequences = golden("tiny-b-q2.safetensors");
    let long = sequences.iter_mut().find(|g| g.name == "n701").unwrap();
    long.tokens[..700].to_vec()
}

fn assert_close(name: &str, a: &[Vec<f32>], b: &[Vec<f32>]) {
    assert_eq!(a.len(), b.len());
    for (p, (a, b)) in a.iter().zip(b).enumerate() {
        let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 1e-4, "{name}: logits differ by {worst} at row {p}");
    }
}

#[test]
fn chunks_snapshots_and_rewinds_do_not_change_logits() {
    let engine = tiny_engine(Kernels::Reference, CacheRounding::Off);
    let tokens = prompt();
    let mut session = engine.new_session().unwrap();
    let whole = feed(&engine, &mut session, &tokens, tokens.len());
    for chunk in [1, 7, 128, 500] {
        let mut session = engine.new_session().unwrap();
        let rows = feed(&engine, &mut session, &tokens, chunk);
        assert_close(&format!("chunks of {chunk}"), &whole, &rows);
    }

    let mut session = engine.new_session().unwrap();
    feed(&engine, &mut session, &tokens[..333], 128);
    let checkpoint = engine.checkpoint(&session).unwrap();
    let bytes = engine.snapshot(&session).unwrap();
    let mut restored = engine.restore(&bytes).unwrap();
    assert_eq!(engine.snapshot(&restored).unwrap(), bytes);
    let rows = feed(&engine, &mut restored, &tokens[333..], 100);
    assert_close("restored at 333", &whole[333..], &rows);

    // Wrong tokens first, then back: by rewinding, and from further ahead by the checkpoint.
    feed(&engine, &mut session, &[5; MAX_REWIND], 3);
    engine.rewind(&mut session, 333).unwrap();
    let rows = feed(&engine, &mut session, &tokens[333..], 61);
    assert_close("rewound to 333", &whole[333..], &rows);
    engine.truncate(&mut session, &checkpoint).unwrap();
    assert_eq!(session.tokens(), &tokens[..333]);
    let rows = feed(&engine, &mut session, &tokens[333..], 367);
    assert_close("truncated to 333", &whole[333..], &rows);
}

/// Drafts are fed and rejected all the time; ring slots must never be read stale.
#[test]
fn rewinding_often_leaves_no_trace() {
    let engine = tiny_engine(Kernels::Reference, CacheRounding::On);
    let tokens = &prompt()[..300];
    let mut plain = engine.new_session().unwrap();
    let expected = feed(&engine, &mut plain, tokens, 1);
    let mut session = engine.new_session().unwrap();
    for (p, token) in tokens.iter().enumerate() {
        let drafts = vec![(p % 4000) as u32; p % (MAX_REWIND + 1)];
        if !drafts.is_empty() {
            feed(&engine, &mut session, &drafts, drafts.len());
            engine.rewind(&mut session, p).unwrap();
        }
        assert_eq!(feed(&engine, &mut session, &[*token], 1)[0], expected[p], "position {p}");
    }
}

#[test]
fn a_batch_equals_each_session_alone() {
    for kernels in Kernels::available() {
        let engine = tiny_engine(kernels, CacheRounding::On);
        let tokens = prompt();
        let parts: [&[u32]; 3] = [&tokens[..40], &tokens[300..301], &tokens[5..8]];
        let start = |n: usize| {
            let mut session = engine.new_session().unwrap();
            feed(&engine, &mut session, &tokens[100..100 + n], 64);
            session
        };
        let alone: Vec<_> = parts
            .iter()
            .zip([90, 200, 127])
            .map(|(tokens, n)| feed(&engine, &mut start(n), tokens, tokens.len()))
            .collect();
        let (mut a, mut b, mut c) = (start(90), start(200), start(127));
        let all = parts.map(|tokens| vec![Wanted::Logits; tokens.len()]);
        let decode = Phase::Decode;
        let together = engine
            .step(&mut [
                Work { session: &mut a, tokens: parts[0], phase: Phase::Prefill, wanted: &all[0] },
                Work { session: &mut b, tokens: parts[1], phase: decode, wanted: &all[1] },
                Work { session: &mut c, tokens: parts[2], phase: decode, wanted: &all[2] },
            ])
            .unwrap();
        for (alone, together) in alone.iter().zip(&together) {
            assert!(together.logits().eq(alone.iter().map(Vec::as_slice)), "{kernels}");
        }
    }
}

/// Greedy samplers get tokens, others logits, and both choose as they would alone.
#[test]
fn samplers_choose_from_what_they_want_of_a_step() {
    for kernels in Kernels::available() {
        let engine = tiny_engine(kernels, CacheRounding::On);
        let tokens = prompt();
        let sampler = |greedy: bool| {
            let params = if greedy { SamplingParams::greedy() } else { SamplingParams::default() };
            Sampler::new(params, 3)
        };
        // Prompts and decoded tokens, some of them greedy.
        let parts =
            [(0..40, false), (40..41, true), (50..70, true), (70..71, false), (80..87, true)];
        let mut sessions = parts.each_ref().map(|_| engine.new_session().unwrap());
        let wants = parts.each_ref().map(|(_, greedy)| [sampler(*greedy).wants()]);
        let phase = |len| ds4_conformance::phase_of(len);
        let mut work: Vec<_> = sessions
            .iter_mut()
            .zip(&parts)
            .zip(&wants)
            .map(|((session, (part, _)), wanted)| Work {
                session,
                tokens: &tokens[part.clone()],
                phase: phase(part.len()),
                wanted,
            })
            .collect();
        let together = engine.step(&mut work).unwrap();
        for ((part, greedy), found) in parts.into_iter().zip(together) {
            let mut session = engine.new_session().unwrap();
            let (session, phase) = (&mut session, phase(part.len()));
            let work = Work { session, tokens: &tokens[part], phase, wanted: &[Wanted::Logits] };
            let alone = engine.step(&mut [work]).unwrap().remove(0);
            let alone = alone.last_logits().unwrap();
            let expected = sampler(greedy).sample(alone);
            assert_eq!(sampler(greedy).sample_after(&found), expected, "{kernels}");
            assert_eq!(found.last_logits(), (!greedy).then_some(alone), "{kernels}");
        }
    }
}

#[test]
fn going_back_too_far_or_to_other_tokens_is_refused() {
    let engine = tiny_engine(Kernels::Reference, CacheRounding::On);
    let tokens = prompt();
    let mut session = engine.new_session().unwrap();
    feed(&engine, &mut session, &tokens[..100], 100);
    let oldest = 100 - MAX_REWIND;
    let refused = engine.rewind(&mut session, oldest - 1);
    assert_eq!(refused, Err(SessionError::Overwritten { to: oldest - 1, oldest }));
    assert_eq!(engine.rewind(&mut session, 101), Err(SessionError::Ahead { to: 101, len: 100 }));
    // Rewinding does not bring back what the first tokens overwrote.
    engine.rewind(&mut session, 90).unwrap();
    assert_eq!(session.rewindable_from(), oldest);

    let mut other = engine.new_session().unwrap();
    feed(&engine, &mut other, &tokens[1..91], 90);
    let checkpoint = engine.checkpoint(&other).unwrap();
    let refused = engine.truncate(&mut session, &checkpoint);
    assert_eq!(refused, Err(SessionError::OtherTokens { position: 90 }));

    let mut restored = engine.restore(&engine.snapshot(&session).unwrap()).unwrap();
    let refused = engine.rewind(&mut restored, 89);
    assert_eq!(refused, Err(SessionError::Overwritten { to: 89, oldest: 90 }));
}

/// models/tiny/tiny-b-q2.snapshot was written by an earlier version of the program: the format,
/// the state of every plane and the model's identity stay. A new version of the format gets a file
/// of its own; [`sample_snapshot`] makes one.
#[test]
fn snapshots_of_earlier_versions_restore() {
    let engine = tiny_engine(Kernels::Reference, CacheRounding::On);
    let saved = std::fs::read(tiny_file("tiny-b-q2.snapshot")).unwrap();
    let (mut session, made) = sample_snapshot(&engine);
    let mut restored = engine.restore(&saved).unwrap();
    assert_eq!(restored.tokens(), session.tokens());
    assert_eq!((saved.len(), &saved[..HEADER]), (made.len(), &made[..HEADER]));
    assert!(engine.snapshot(&restored).unwrap() == saved);
    let next = prompt();
    let whole = feed(&engine, &mut session, &next[..100], 100);
    assert_close("an earlier version's", &whole, &feed(&engine, &mut restored, &next[..100], 100));
}

/// A session of 40 tokens, and its snapshot.
fn sample_snapshot(engine: &Engine) -> (Session, Vec<u8>) {
    let tokens: Vec<u32> = (0..40).map(|i| 300 + 7 * i).collect();
    let session = session_after(engine, &tokens);
    let bytes = engine.snapshot(&session).unwrap();
    (session, bytes)
}

#[test]
fn foreign_and_damaged_snapshots_are_refused() {
    let engine = tiny_engine(Kernels::Reference, CacheRounding::On);
    let mut session = engine.new_session().unwrap();
    feed(&engine, &mut session, &prompt()[..130], 130);
    let good = engine.snapshot(&session).unwrap();
    let refused = |bytes: &[u8]| engine.restore(bytes).err().unwrap();

    for n in [0, 7, 47] {
        assert!(matches!(refused(&good[..n]), SnapshotError::Magic { .. }), "{n} bytes");
    }
    for n in [48, 48 + 4 * 130, good.len() - 1] {
        assert!(matches!(refused(&good[..n]), SnapshotError::Length { .. }), "{n} bytes");
    }
    assert!(matches!(refused(&[&good[..], &[0]].concat()), SnapshotError::Length { .. }));
    let patched = |at: usize, bytes: &[u8]| {
        let mut copy = good.clone();
        copy[at..at + bytes.len()].copy_from_slice(bytes);
        copy
    };
    assert!(matches!(refused(&patched(0, b"X")), SnapshotError::Magic { .. }));
    assert!(matches!(refused(&patched(20, &[!good[20]])), SnapshotError::OtherModel));
    assert!(matches!(refused(&patched(44, &[255; 4])), SnapshotError::Tokens { .. }));
    assert!(matches!(refused(&patched(44, &[131, 0, 0, 0])), SnapshotError::Length { .. }));
    assert!(matches!(refused(&patched(48, &[255; 4])), SnapshotError::Tokens { .. }));
    let other = tiny_engine(Kernels::Reference, CacheRounding::Off);
    assert!(matches!(other.restore(&good).err().unwrap(), SnapshotError::OtherRounding { .. }));
    // Damaged rows can't be told from good ones here, but they are harmless.
    let mut noise = engine.restore(&patched(600, &[255; 5000])).unwrap();
    feed(&engine, &mut noise, &[1, 2, 3], 3);
}
