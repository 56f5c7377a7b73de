//! Sessions, batches and recorded steps on the device.

mod support;

use std::slice;

use ds4_engine::{Logits, LogitsWanted, MAX_REWIND, Work, rows::CacheRounding, sampling};
use ds4_model::synth::Recipe;
use support::{
    CudaEngine, CudaSession, Difference, cpu, cuda, feed, is_real, random_tokens, session_after,
    small_model, small_model_of, step,
};

fn engine(rounding: CacheRounding) -> CudaEngine {
    cuda(&small_model(Recipe::Q2), rounding)
}

/// Lengths at which sessions of a batch stand: before, at and behind ends of windows and of
/// compressed rows, and where the indexer chooses.
const LENGTHS: [usize; 9] = [0, 1, 3, 4, 63, 64, 65, 127, 140];

/// Snapshots of a session at these lengths.
fn starts(engine: &CudaEngine) -> Vec<Vec<u8>> {
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
fn sessions(engine: &CudaEngine, starts: &[Vec<u8>], n: usize) -> Vec<CudaSession> {
    starts.iter().cycle().take(n).map(|bytes| engine.restore(bytes).unwrap()).collect()
}

/// Tokens of every session's next step, `len(i)` for the i-th.
fn next_tokens(n: usize, round: u64, len: impl Fn(usize) -> usize) -> Vec<Vec<u32>> {
    (0..n).map(|i| random_tokens(1000 * (round + 1) + i as u64, len(i))).collect()
}

fn slices(tokens: &[Vec<u32>]) -> Vec<&[u32]> {
    tokens.iter().map(Vec::as_slice).collect()
}

/// What each session answers when it is the only one.
fn alone(
    engine: &CudaEngine,
    sessions: &mut [CudaSession],
    tokens: &[Vec<u32>],
    wanted: LogitsWanted,
) -> Vec<Logits> {
    let each = sessions.iter_mut().zip(tokens);
    each.flat_map(|(session, tokens)| {
        engine.step(&mut [Work { session, tokens, logits: wanted }]).unwrap()
    })
    .collect()
}

fn assert_same_bits(what: &str, found: &[Logits], expected: &[Logits]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.best(), expected.best(), "{what}: likeliest token of session {i}");
        assert_eq!(found.data.len(), expected.data.len(), "{what}: session {i}");
        let differ =
            found.data.iter().zip(&expected.data[..]).filter(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differ.count(), 0, "{what}: logits of session {i} differ");
    }
}

/// Two steps each, so that the second of a shape is a recorded one.
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
            rounds.iter().map(|t| alone(&engine, &mut single, t, LogitsWanted::Last)).collect();
        for &n in counts {
            let mut together = sessions(&engine, &starts, n);
            for (tokens, expected) in rounds.iter().zip(&expected) {
                let tokens = slices(&tokens[..n]);
                let found = step(&engine, &mut together, &tokens, LogitsWanted::Last);
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
            let expected = alone(&engine, &mut single, &tokens, LogitsWanted::All);
            let found = step(&engine, &mut together, &slices(&tokens), LogitsWanted::All);
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
    let kinds = [LogitsWanted::None, LogitsWanted::Best, LogitsWanted::Last, LogitsWanted::All];
    let expected =
        kinds.map(|kind| alone(&engine, &mut sessions(&engine, &starts, 8), &tokens, kind));
    for i in 0..8 {
        let [none, best, last, all] = expected.each_ref().map(|logits| &logits[i]);
        assert!(none.is_empty() && none.best().is_none());
        assert!(best.data.is_empty() && !best.is_empty());
        assert_eq!(best.best(), Some(sampling::argmax(last.last().unwrap())));
        // Few logits of a prompt are computed like those of decoded tokens.
        let row = |logits: &Logits| [logits.last().unwrap().to_vec()];
        let d = Difference::of(&row(last), &row(all));
        assert!(last.data.len() == last.vocab && d.max_abs <= 0.05, "{d:?}");
    }
    for shift in 0..4 {
        let kind = |i: usize| (i + i / 4 + shift) % 4;
        let mut sessions = sessions(&engine, &starts, 8);
        let work = sessions.iter_mut().zip(&tokens).enumerate();
        let mut work: Vec<_> = work
            .map(|(i, (session, tokens))| Work { session, tokens, logits: kinds[kind(i)] })
            .collect();
        let found = engine.step(&mut work).unwrap();
        for (i, found) in found.iter().enumerate() {
            let what = format!("session {i} wants {:?}", kinds[kind(i)]);
            assert_same_bits(&what, slice::from_ref(found), &expected[kind(i)][i..i + 1]);
        }
    }
}

/// Steps of as many rows, and so one recorded step, with any of them content with a token.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn tokens_chosen_on_the_device_are_those_of_the_logits() {
    let engine = engine(CacheRounding::On);
    let starts = starts(&engine);
    let mut single = sessions(&engine, &starts, 5);
    let mut together = sessions(&engine, &starts, 5);
    let mut tokens = next_tokens(5, 0, |_| 1);
    for greedy in [0b00000, 0b11111, 0b10010, 0b00000, 0b01101, 0b11111_u32] {
        let expected = alone(&engine, &mut single, &tokens, LogitsWanted::Last);
        let work = together.iter_mut().zip(&tokens).enumerate();
        let mut work: Vec<_> = work
            .map(|(i, (session, tokens))| {
                let is_greedy = greedy >> i & 1 == 1;
                let logits = if is_greedy { LogitsWanted::Best } else { LogitsWanted::Last };
                Work { session, tokens, logits }
            })
            .collect();
        let found = engine.step(&mut work).unwrap();
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let what = format!("greedy: {greedy:05b}, session {i}");
            assert_eq!(found.best(), expected.best(), "{what}");
            let wanted = if greedy >> i & 1 == 1 { None } else { expected.last() };
            assert!(found.last() == wanted, "{what}");
        }
        tokens = expected.iter().map(|logits| vec![logits.best().unwrap().unwrap()]).collect();
    }
}

/// Recorded steps of many shapes, in an order that comes back to each.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn recorded_steps_of_several_shapes_do_not_mix() {
    let engine = engine(CacheRounding::On);
    let starts = starts(&engine);
    let mut single = sessions(&engine, &starts, 5);
    let mut together = sessions(&engine, &starts, 5);
    for (round, (n, len)) in
        [(1, 1), (5, 1), (2, 3), (5, 1), (1, 7), (3, 2), (2, 3), (1, 1), (5, 1)]
            .into_iter()
            .enumerate()
    {
        let wanted = if round % 2 == 0 { LogitsWanted::All } else { LogitsWanted::Last };
        let tokens = next_tokens(n, round as u64, |_| len);
        let expected = alone(&engine, &mut single[..n], &tokens, wanted);
        let found = step(&engine, &mut together[..n], &slices(&tokens), wanted);
        assert_same_bits(&format!("step {round}, {n} sessions"), &found, &expected);
    }
}

/// Recorded at the start of a session, and still right where caches have grown and the indexer
/// chooses among many rows: as right as a step that is launched for the first time.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn recorded_steps_hold_far_beyond_the_length_they_were_recorded_at() {
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
                let logits = LogitsWanted::None;
                old.step(&mut [Work { session: &mut session, tokens, logits }]).unwrap();
            }
            // An engine without recorded steps.
            let new = cuda(&model, rounding);
            let mut other = new.restore(&old.snapshot(&session).unwrap()).unwrap();
            let next = &tokens[stop..stop + 1];
            let launched = feed(&new, &mut other, next, 1);
            assert!(feed(&old, &mut session, next, 1) == launched, "{rounding:?} at {stop}");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn the_same_input_gives_the_same_bits() {
    let answer = |engine: &CudaEngine| {
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

/// Chunks of 8 tokens and more have the same bits whatever their length, and so have shorter ones.
/// Between the two are other kernels; with rounded caches a value beside a boundary then goes the
/// other way, as in the reference against itself.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn chunks_hardly_change_logits() {
    for (rounding, limit) in [(CacheRounding::Off, 1e-3), (CacheRounding::On, 2e-2)] {
        let engine = engine(rounding);
        let tokens = random_tokens(2, 136);
        let run = |chunk| feed(&engine, &mut engine.new_session().unwrap(), &tokens, chunk);
        let whole = run(136);
        for chunk in [70, 40] {
            assert!(run(chunk) == whole, "{rounding:?}: logits differ in chunks of {chunk}");
        }
        let short = run(7);
        let d = Difference::of(&short, &whole);
        println!("{rounding:?}: {d:?}");
        assert!(d.kl <= limit && d.top1 >= 0.9, "{rounding:?}, chunks of 7: {d:?}");
        if rounding == CacheRounding::On {
            assert!(run(1) == short, "logits differ in chunks of 1 and 7");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn going_back_leaves_no_trace() {
    let engine = engine(CacheRounding::On);
    let tokens = random_tokens(3, 190);
    let mut session = session_after(&engine, &tokens[..141]);
    let checkpoint = engine.checkpoint(&session).unwrap();
    let bytes = engine.snapshot(&session).unwrap();
    let go_on = |session: &mut CudaSession| {
        let mut rows = feed(&engine, session, &tokens[141..150], 1);
        rows.extend(feed(&engine, session, &tokens[150..], 40));
        rows
    };
    let expected = go_on(&mut session);

    let mut restored = engine.restore(&bytes).unwrap();
    assert!(engine.snapshot(&restored).unwrap() == bytes);
    assert!(go_on(&mut restored) == expected, "restored");

    // Truncated from far ahead, then drafts that are all rejected.
    engine.truncate(&mut session, &checkpoint).unwrap();
    assert!(engine.snapshot(&session).unwrap() == bytes);
    for drafts in [1, 2, 3, 7, 8, MAX_REWIND] {
        feed(&engine, &mut session, &random_tokens(drafts as u64, drafts), drafts);
        engine.rewind(&mut session, 141).unwrap();
    }
    assert!(go_on(&mut session) == expected, "after rejected drafts");
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
/// were recorded before.
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
        let wanted = if n == 1 { LogitsWanted::All } else { LogitsWanted::Last };
        let found = step(&engine, &mut all[..n], &slices(&tokens), wanted);
        let expected = alone(&engine, &mut single[..n], &tokens, wanted);
        assert_same_bits(&format!("step {round}"), &found, &expected);
    }
}
