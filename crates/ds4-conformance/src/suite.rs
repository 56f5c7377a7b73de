//! Checks that every backend passes.
//!
//! They take an engine on the small model ([`crate::small_model`]) and compare bits, so they hold
//! for exact and for fast kernels alike.

use ds4_engine::{
    BackendError, Engine, MAX_REWIND, Phase, Session, SessionError, StepError, TokenId, Wanted,
    Work,
};

use crate::{feed, phase_of, prefill, random_tokens, session_after};

/// Where a prompt is cut changes no bit of its logits or of the state that it leaves.
pub fn prompts_have_the_same_bits_however_they_are_cut(engine: &Engine) {
    let tokens = random_tokens(21, 300);
    let run = |cuts: &[usize]| {
        let mut session = engine.new_session().expect("a session");
        let (mut start, mut last) = (0, None);
        for &end in cuts.iter().chain(&[tokens.len()]) {
            let output = prefill(engine, &mut session, &tokens[start..end], &[Wanted::Logits]);
            (start, last) = (end, output.last_logits().map(<[f32]>::to_vec));
        }
        (last.expect("logits"), engine.snapshot(&session).expect("a snapshot"))
    };
    let whole = run(&[]);
    for cuts in [
        &[1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233][..],
        &[7],
        &[64, 128, 192, 256],
        &[127, 128, 129],
        &[130, 299],
    ] {
        assert!(run(cuts) == whole, "a prompt of {} tokens cut at {cuts:?}", tokens.len());
    }
}

/// Decoded tokens have the same bits one by one and several at a time, the longest span included.
pub fn decoded_spans_have_the_same_bits_as_single_tokens(engine: &Engine) {
    let prompt = random_tokens(22, 121);
    let tokens = random_tokens(23, 3 * MAX_REWIND);
    let run = |len: usize| {
        let mut session = session_after(engine, &prompt);
        let mut rows = Vec::new();
        for tokens in tokens.chunks(len) {
            let wanted = vec![Wanted::Logits; tokens.len()];
            let work =
                Work { session: &mut session, tokens, phase: Phase::Decode, wanted: &wanted };
            let output = engine.step(&mut [work]).expect("a step").remove(0);
            rows.extend(output.logits().map(<[f32]>::to_vec));
        }
        (rows, engine.snapshot(&session).expect("a snapshot"))
    };
    let single = run(1);
    for len in [2, 7, MAX_REWIND] {
        assert!(run(len) == single, "{len} tokens at a time");
    }
}

/// Prompts and decoded spans of many lengths in one step have the bits that each has alone,
/// whichever results are wanted.
pub fn batches_have_the_bits_of_each_session_alone(engine: &Engine) {
    let spans: [(usize, usize, Phase); 9] = [
        (0, 40, Phase::Prefill),
        (65, 1, Phase::Decode),
        (127, 3, Phase::Prefill),
        (140, 16, Phase::Decode),
        (3, 1, Phase::Prefill),
        (64, 7, Phase::Decode),
        (1, 67, Phase::Prefill),
        (4, 9, Phase::Prefill),
        (63, 1, Phase::Decode),
    ];
    let past = random_tokens(24, 140);
    let kinds: [&[Wanted]; 5] = [
        &[Wanted::Logits],
        &[],
        &[Wanted::Argmax],
        &[Wanted::Argmax; 8],
        &[Wanted::Argmax, Wanted::Logits, Wanted::Argmax],
    ];
    let tokens: Vec<Vec<TokenId>> =
        spans.iter().map(|(start, len, _)| random_tokens(100 + *start as u64, *len)).collect();
    let wanted: Vec<&[Wanted]> = (0..spans.len())
        .map(|i| {
            let kind = kinds[i % kinds.len()];
            &kind[..kind.len().min(spans[i].1)]
        })
        .collect();
    let sessions = || -> Vec<Session> {
        spans.iter().map(|(start, ..)| session_after(engine, &past[..*start])).collect()
    };
    let (mut single, mut together) = (sessions(), sessions());
    let alone: Vec<_> = single
        .iter_mut()
        .enumerate()
        .map(|(i, session)| {
            let work = Work { session, tokens: &tokens[i], phase: spans[i].2, wanted: wanted[i] };
            engine.step(&mut [work]).expect("a step").remove(0)
        })
        .collect();
    let mut all: Vec<_> = together
        .iter_mut()
        .enumerate()
        .map(|(i, session)| Work {
            session,
            tokens: &tokens[i],
            phase: spans[i].2,
            wanted: wanted[i],
        })
        .collect();
    let found = engine.step(&mut all).expect("a step");
    drop(all);
    for (i, (found, alone)) in found.iter().zip(&alone).enumerate() {
        assert!(found == alone, "results of span {i}: {:?}", spans[i]);
        let state = |session: &Session| engine.snapshot(session).expect("a snapshot");
        assert!(state(&together[i]) == state(&single[i]), "state of span {i}: {:?}", spans[i]);
    }
}

/// Snapshots, checkpoints, forks and rewinds lead to the same bits as going straight on.
pub fn saved_states_continue_with_the_same_bits(engine: &Engine) {
    let tokens = random_tokens(25, 190);
    let at = 141;
    let mut session = session_after(engine, &tokens[..at]);
    let checkpoint = engine.checkpoint(&session).expect("a checkpoint");
    assert!(checkpoint.bytes() > 0 && checkpoint.position() == at);
    let bytes = engine.snapshot(&session).expect("a snapshot");
    let mut early = engine.fork(&session).expect("a fork");
    let go_on = |session: &mut Session| {
        let mut rows = feed(engine, session, &tokens[at..150], 1);
        rows.extend(feed(engine, session, &tokens[150..], 40));
        rows
    };
    let expected = go_on(&mut session);
    let whole = engine.snapshot(&session).expect("a snapshot");

    assert!(go_on(&mut early) == expected, "forked before the session went on");
    let mut late = engine.fork_at(&session, &checkpoint).expect("a fork");
    assert_eq!(late.tokens(), &tokens[..at]);
    assert!(engine.snapshot(&late).expect("a snapshot") == bytes, "forked at a checkpoint");
    assert!(go_on(&mut late) == expected, "forked at a checkpoint");
    let mut restored = engine.restore(&bytes).expect("a session");
    assert!(engine.snapshot(&restored).expect("a snapshot") == bytes);
    assert!(go_on(&mut restored) == expected, "restored");
    // Forks went on without the original.
    assert!(engine.snapshot(&session).expect("a snapshot") == whole, "the original");

    // Truncated from far ahead, then drafts that are all rejected.
    engine.truncate(&mut session, &checkpoint).expect("to go back");
    assert!(engine.snapshot(&session).expect("a snapshot") == bytes, "truncated");
    for drafts in [1, 2, 3, 7, 8, MAX_REWIND] {
        let tokens = random_tokens(drafts as u64, drafts);
        feed(engine, &mut session, &tokens, drafts);
        engine.rewind(&mut session, at).expect("to go back");
    }
    assert!(go_on(&mut session) == expected, "after rejected drafts");
}

/// A session of another engine, and a session whose step failed, are refused with an error.
pub fn foreign_state_is_refused(engine: &Engine, other: &Engine) {
    let tokens = random_tokens(26, 20);
    let mut theirs = session_after(other, &tokens);
    let checkpoint = other.checkpoint(&theirs).expect("a checkpoint");
    let foreign = SessionError::Backend(BackendError::OtherBackend);
    let work =
        Work { session: &mut theirs, tokens: &[1], phase: phase_of(1), wanted: &[Wanted::Argmax] };
    let refused = engine.step(&mut [work]).expect_err("a foreign session");
    assert!(matches!(refused, StepError::Backend(BackendError::OtherBackend)), "{refused}");
    assert_eq!(engine.snapshot(&theirs).expect_err("a foreign session"), foreign);
    assert_eq!(engine.fork(&theirs).err(), Some(foreign));
    let mut ours = session_after(engine, &tokens);
    let refused = engine.truncate(&mut ours, &checkpoint).expect_err("a foreign checkpoint");
    assert_eq!(refused, SessionError::Backend(BackendError::OtherBackend));
    // Neither was harmed.
    feed(other, &mut theirs, &[1], 1);
    feed(engine, &mut ours, &[1], 1);
}

/// An engine reports the bytes that sessions of any length really take.
pub fn sessions_take_the_bytes_that_are_announced(engine: &Engine) {
    let tokens = random_tokens(27, 1300);
    let mut session = engine.new_session().expect("a session");
    for len in [3, 130, 700, 1300] {
        let next = &tokens[session.len()..len];
        prefill(engine, &mut session, next, &[]);
        assert_eq!(session.bytes(), engine.backend().session_bytes(len), "{len} tokens");
    }
    let fork = engine.fork(&session).expect("a fork");
    assert_eq!(fork.bytes(), session.bytes());
}
