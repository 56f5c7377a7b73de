//! Sessions, batches and CUDA graphs on the device.

mod support;

use std::slice;

use ds4_conformance::{prefill, suite};
use ds4_engine::{Engine, Session, StepOutput, rows::CacheRounding, sampling};
use ds4_model::synth::Recipe;
use support::{
    Difference, Wants, cpu, cuda, feed, is_real, random_tokens, session_after, small_model,
    small_model_of, step, step_with,
};

fn engine(rounding: CacheRounding) -> Engine {
    cuda(&small_model(Recipe::Q2), rounding)
}

/// Lengths at which sessions of a batch stand: before, at and behind ends of windows and of
/// compressed rows, and where the indexer chooses.
const LENGTHS: [usize; 9] = [0, 1, 3, 4, 63, 64, 65, 127, 140];

/// Snapshots of a session at these lengths.
fn starts(engine: &Engine) -> Vec<Vec<u8>> {
    let (tokens, mut session) = (random_tokens(0, 140), engine.new_session().unwrap());
    let at = |len: usize| {
        if len > session.len() {
            let next = &tokens[session.len()..len];
            feed(engine, &mut session, next, len);
        }
        engine.snapshot(&session).unwrap()
    };
    LENGTHS.map(at).into()
}

/// `n` sessions of ragged lengths.
fn sessions(engine: &Engine, starts: &[Vec<u8>], n: usize) -> Vec<Session> {
    starts.iter().cycle().take(n).map(|bytes| engine.restore(bytes).unwrap()).collect()
}

/// Tokens of every session's next step, `len(i)` for the i-th.
fn next_tokens(n: usize, round: u64, len: impl Fn(usize) -> usize) -> Vec<Vec<u32>> {
    (0..n).map(|i| random_tokens(1000 * (round + 1) + i as u64, len(i))).collect()
}

fn slices(tokens: &[Vec<u32>]) -> Vec<&[u32]> {
    tokens.iter().map(Vec::as_slice).collect()
}

/// The results of each session when it is the only one in a step.
fn alone(
    engine: &Engine,
    sessions: &mut [Session],
    tokens: &[Vec<u32>],
    wants: Wants,
) -> Vec<StepOutput> {
    let each = sessions.iter_mut().zip(tokens);
    each.flat_map(|(session, tokens)| step(engine, slice::from_mut(session), &[tokens], wants))
        .collect()
}

fn assert_same_bits(what: &str, found: &[StepOutput], expected: &[StepOutput]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.argmax(), expected.argmax(), "{what}: argmax of session {i}");
        assert_eq!(found.rows.len(), expected.rows.len(), "{what}: session {i}");
        let bits = |output: &StepOutput| -> Vec<u32> {
            output.logits().flatten().map(|x| x.to_bits()).collect()
        };
        assert!(bits(found) == bits(expected), "{what}: logits of session {i} differ");
    }
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn the_device_passes_the_suite() {
    let (engine, other) = (engine(CacheRounding::On), engine(CacheRounding::On));
    suite::prompts_have_the_same_bits_however_they_are_cut(&engine);
    suite::decoded_spans_have_the_same_bits_as_single_tokens(&engine);
    suite::batches_have_the_bits_of_each_session_alone(&engine);
    suite::saved_states_continue_with_the_same_bits(&engine);
    suite::foreign_state_is_refused(&engine, &other);
    suite::sessions_take_the_bytes_that_are_announced(&engine);
}

/// Two steps each, so that the second of a shape launches a captured graph.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn decoded_tokens_have_the_same_bits_in_any_batch() {
    for (rounding, counts) in
        [(CacheRounding::On, &[1, 2, 9, 17, 33, 64][..]), (CacheRounding::Off, &[3, 20])]
    {
        let engine = engine(rounding);
        // An emulated device takes seconds for dozens of sessions.
        let counts = if is_real(&engine) { counts } else { &counts[1..counts.len().min(5)] };
        let (starts, most) = (starts(&engine), *counts.last().unwrap());
        let rounds = [next_tokens(most, 0, |_| 1), next_tokens(most, 1, |_| 1)];
        let mut single = sessions(&engine, &starts, most);
        let expected: Vec<_> =
            rounds.iter().map(|t| alone(&engine, &mut single, t, Wants::LastLogits)).collect();
        for &n in counts {
            let mut together = sessions(&engine, &starts, n);
            for (tokens, expected) in rounds.iter().zip(&expected) {
                let tokens = slices(&tokens[..n]);
                let found = step(&engine, &mut together, &tokens, Wants::LastLogits);
                assert_same_bits(&format!("{rounding:?}, {n} sessions"), &found, &expected[..n]);
            }
        }
    }
}

/// Decodes, drafts and prefill chunks of ragged lengths in one step.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn mixed_steps_have_the_same_bits_as_each_session_alone() {
    const SPANS: [usize; 9] = [1, 40, 3, 8, 7, 1, 67, 9, 1];
    for (rounding, rounds) in [(CacheRounding::On, 2), (CacheRounding::Off, 1)] {
        let engine = engine(rounding);
        let starts = starts(&engine);
        let (mut single, mut together) =
            (sessions(&engine, &starts, 9), sessions(&engine, &starts, 9));
        for round in 0..rounds {
            let tokens = next_tokens(9, round, |i| SPANS[(i + round as usize) % 9]);
            let expected = alone(&engine, &mut single, &tokens, Wants::AllLogits);
            let found = step(&engine, &mut together, &slices(&tokens), Wants::AllLogits);
            assert_same_bits(&format!("{rounding:?}, step {round}"), &found, &expected);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn only_the_logits_asked_for_come_back() {
    let engine = engine(CacheRounding::On);
    let starts = starts(&engine);
    let tokens = next_tokens(8, 0, |i| [1, 5, 20, 1, 5, 20, 1, 20][i]);
    let kinds = [Wants::None, Wants::Argmax, Wants::LastLogits, Wants::AllLogits];
    let expected =
        kinds.map(|kind| alone(&engine, &mut sessions(&engine, &starts, 8), &tokens, kind));
    for i in 0..8 {
        let [none, best, last, all] = expected.each_ref().map(|logits| &logits[i]);
        assert!(none.is_empty() && none.argmax().is_none());
        assert!(best.last_logits().is_none() && !best.is_empty());
        assert_eq!(best.argmax(), Some(sampling::argmax(last.last_logits().unwrap())));
        // Few logits of a prompt are computed like those of decoded tokens.
        let row = |output: &StepOutput| [output.last_logits().unwrap().to_vec()];
        let d = Difference::of(&row(last), &row(all));
        assert!(last.rows.len() == 1 && d.max_abs <= 0.05, "{d:?}");
    }
    for shift in 0..4 {
        let kind = |i: usize| (i + i / 4 + shift) % 4;
        let mut sessions = sessions(&engine, &starts, 8);
        let tokens = slices(&tokens);
        let found = step_with(&engine, &mut sessions, &tokens, |i| kinds[kind(i)]);
        for (i, found) in found.iter().enumerate() {
            let what = format!("session {i} wants {:?}", kinds[kind(i)]);
            assert_same_bits(&what, slice::from_ref(found), &expected[kind(i)][i..i + 1]);
        }
    }
}

/// Steps of as many rows, and so one CUDA graph, with any of them content with a token.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn tokens_chosen_on_the_device_are_those_of_the_logits() {
    let engine = engine(CacheRounding::On);
    let starts = starts(&engine);
    let mut single = sessions(&engine, &starts, 5);
    let mut together = sessions(&engine, &starts, 5);
    let mut tokens = next_tokens(5, 0, |_| 1);
    for greedy in [0b00000, 0b11111, 0b10010, 0b00000, 0b01101, 0b11111_u32] {
        let expected = alone(&engine, &mut single, &tokens, Wants::LastLogits);
        let found = step_with(&engine, &mut together, &slices(&tokens), |i| {
            if greedy >> i & 1 == 1 { Wants::Argmax } else { Wants::LastLogits }
        });
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let what = format!("greedy: {greedy:05b}, session {i}");
            assert_eq!(found.argmax(), expected.argmax(), "{what}");
            let wanted = if greedy >> i & 1 == 1 { None } else { expected.last_logits() };
            assert!(found.last_logits() == wanted, "{what}");
        }
        tokens = expected.iter().map(|logits| vec![logits.argmax().unwrap().unwrap()]).collect();
    }
}

/// CUDA graphs of many shapes, in an order that comes back to each.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn graphs_of_several_shapes_do_not_mix() {
    let engine = engine(CacheRounding::On);
    let starts = starts(&engine);
    let mut single = sessions(&engine, &starts, 5);
    let mut together = sessions(&engine, &starts, 5);
    for (round, (n, len)) in
        [(1, 1), (5, 1), (2, 3), (5, 1), (1, 7), (3, 2), (2, 3), (1, 1), (5, 1)]
            .into_iter()
            .enumerate()
    {
        let wants = if round % 2 == 0 { Wants::AllLogits } else { Wants::LastLogits };
        let tokens = next_tokens(n, round as u64, |_| len);
        let expected = alone(&engine, &mut single[..n], &tokens, wants);
        let found = step(&engine, &mut together[..n], &slices(&tokens), wants);
        assert_same_bits(&format!("step {round}, {n} sessions"), &found, &expected);
    }
}

/// Captured at the start of a session, and still right where caches have grown and the indexer
/// chooses among many rows: as right as a step that is launched for the first time.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn graphs_hold_far_beyond_the_length_they_were_captured_at() {
    for (rounding, stops) in
        [(CacheRounding::On, &[70, 300, 1100][..]), (CacheRounding::Off, &[300])]
    {
        let model = small_model_of(1..3, Recipe::Q2);
        let old = cuda(&model, rounding);
        let tokens = random_tokens(1, 1101);
        let mut session = old.new_session().unwrap();
        feed(&old, &mut session, &tokens[..5], 1);
        for &stop in stops {
            for tokens in tokens[session.len()..stop].chunks(300) {
                prefill(&old, &mut session, tokens, &[]);
            }
            // An engine without captured graphs.
            let new = cuda(&model, rounding);
            let mut other = new.restore(&old.snapshot(&session).unwrap()).unwrap();
            let next = &tokens[stop..stop + 1];
            let fresh = feed(&new, &mut other, next, 1);
            assert!(feed(&old, &mut session, next, 1) == fresh, "{rounding:?} at {stop}");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn the_same_input_gives_the_same_bits() {
    let answer = |engine: &Engine| {
        let mut session = session_after(engine, &random_tokens(5, 70));
        let (mut token, mut all) = (1, Vec::new());
        for _ in 0..8 {
            let row = feed(engine, &mut session, &[token], 1).remove(0);
            token = sampling::argmax(&row).unwrap();
            all.push(row);
        }
        (session.tokens().to_vec(), all, engine.snapshot(&session).unwrap())
    };
    let (one, other) = (engine(CacheRounding::On), engine(CacheRounding::On));
    let first = answer(&one);
    assert!(answer(&one) == first, "the second time on the same engine");
    assert!(answer(&other) == first, "on another engine");
}

/// Prefill and decode are other kernels: with rounded caches a value beside a boundary goes the
/// other way, as in the reference against itself.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn prefill_and_decode_hardly_differ() {
    for (rounding, limit) in [(CacheRounding::Off, 1e-3), (CacheRounding::On, 2e-2)] {
        let engine = engine(rounding);
        let tokens = random_tokens(2, 136);
        let run = |chunk| feed(&engine, &mut engine.new_session().unwrap(), &tokens, chunk);
        let whole = run(136);
        let short = run(7);
        let d = Difference::of(&short, &whole);
        println!("{rounding:?}: {d:?}");
        assert!(d.kl <= limit && d.top1 >= 0.9, "{rounding:?}, decoded: {d:?}");
    }
}

/// Snapshots have one layout on all backends.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn a_session_goes_on_on_another_backend() {
    let model = small_model(Recipe::Q2);
    for (rounding, limit) in [(CacheRounding::Off, 1e-3), (CacheRounding::On, 2e-2)] {
        let engine = cuda(&model, rounding);
        let cpu = cpu(&model, rounding);
        let tokens = random_tokens(4, 162);
        let close = |what: &str, rows: &[Vec<f32>], expected: &[Vec<f32>]| {
            let d = Difference::of(rows, expected);
            println!("{rounding:?}, {what}: {d:?}");
            assert!(d.kl <= limit && d.top1 >= 0.9, "{rounding:?}, {what}: {d:?}");
        };

        let mut theirs = session_after(&cpu, &tokens[..139]);
        let bytes = cpu.snapshot(&theirs).unwrap();
        let mut ours = engine.restore(&bytes).unwrap();
        assert!(engine.snapshot(&ours).unwrap() == bytes, "{rounding:?}: from the CPU");
        let expected = feed(&cpu, &mut theirs, &tokens[139..150], 1);
        close("to the device", &feed(&engine, &mut ours, &tokens[139..150], 1), &expected);

        let bytes = engine.snapshot(&ours).unwrap();
        let mut back = cpu.restore(&bytes).unwrap();
        assert!(cpu.snapshot(&back).unwrap() == bytes, "{rounding:?}: from the device");
        let expected = feed(&engine, &mut ours, &tokens[150..], 1);
        close("back to the CPU", &feed(&cpu, &mut back, &tokens[150..], 1), &expected);
    }
}

/// Steps outgrow their buffers in rows, in logits and in sessions, and come back to shapes that
/// were captured before.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn steps_of_any_size() {
    let engine = engine(CacheRounding::On);
    let starts = starts(&engine);
    let (more, most) = if is_real(&engine) { (70, 100) } else { (9, 66) };
    let mut all = sessions(&engine, &starts, most);
    let mut single = sessions(&engine, &starts, most);
    for (round, (n, len)) in
        [(1, 40), (1, 130), (more, 1), (most, 1), (more, 1), (1, 1)].into_iter().enumerate()
    {
        let tokens = next_tokens(n, round as u64, |_| len);
        let wants = if n == 1 { Wants::AllLogits } else { Wants::LastLogits };
        let found = step(&engine, &mut all[..n], &slices(&tokens), wants);
        let expected = alone(&engine, &mut single[..n], &tokens, wants);
        assert_same_bits(&format!("step {round}"), &found, &expected);
    }
}
