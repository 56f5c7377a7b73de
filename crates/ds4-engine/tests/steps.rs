//! Steps on a toy backend: the order of stages, and who gets which results.

use ds4_conformance::toy::{Call, Ran, Record, Toy};
use ds4_engine::{
    Engine, MAX_REWIND, Phase, RowOutput, Session, SessionError, StepError, StepOutput, TokenId,
    Wanted, Work, backend::Sublayer,
};
use ds4_model::config::LayerKind;
use proptest::prelude::*;

const VOCAB: usize = 50;

fn toy() -> (Engine, Record) {
    let record = Record::default();
    (Engine::new(Toy::new(VOCAB, record.clone())), record)
}

fn decode(engine: &Engine, session: &mut Session, token: TokenId) -> StepOutput {
    let work = Work { session, tokens: &[token], phase: Phase::Decode, wanted: &[Wanted::Argmax] };
    engine.step(&mut [work]).unwrap().remove(0)
}

/// The stages of a step in the order of docs/model.md.
fn expected_calls(engine: &Engine) -> Vec<Call> {
    let mut calls = vec![Call::Embed];
    for (l, layer) in engine.config().layers.iter().enumerate() {
        calls.extend([Call::HcPre(l, Sublayer::Attention), Call::ProjectAndCompress(l)]);
        calls.extend((layer.kind == LayerKind::Csa).then_some(Call::SelectRows(l)));
        calls.extend([
            Call::Attend(l),
            Call::ProjectOutput(l),
            Call::HcPost(l, Sublayer::Attention),
            Call::HcPre(l, Sublayer::Experts),
            Call::Route(l),
            Call::RunExperts(l),
            Call::HcPost(l, Sublayer::Experts),
        ]);
    }
    calls.push(Call::Head);
    calls
}

#[test]
fn every_stage_is_called_once_in_order_eager_and_captured() {
    let (eager, record) = toy();
    let captured_record = Record::default();
    let captured = Engine::new(Toy::new(VOCAB, captured_record.clone()).with_graphs());
    for (engine, record, replayed) in
        [(eager, record, [false; 3]), (captured, captured_record, [false, true, true])]
    {
        let mut session = engine.new_session().unwrap();
        (0..3).for_each(|token| drop(decode(&engine, &mut session, token)));
        let ran: Vec<Ran> = record.take();
        assert_eq!(ran.iter().map(|ran| ran.replayed).collect::<Vec<_>>(), replayed);
        for ran in &ran {
            assert_eq!(ran.calls, expected_calls(&engine));
        }
    }
}

#[test]
fn a_refused_step_changes_nothing() {
    let (engine, record) = toy();
    let mut session = engine.new_session().unwrap();
    let too_long = vec![1; engine.config().context_length + 1];
    let mut refused = |tokens: &[TokenId], phase, wanted: &[Wanted]| {
        let work = Work { session: &mut session, tokens, phase, wanted };
        engine.step(&mut [work]).unwrap_err()
    };
    let prefill = Phase::Prefill;
    assert!(matches!(refused(&[], prefill, &[]), StepError::NoTokens));
    assert!(matches!(refused(&[VOCAB as u32], prefill, &[]), StepError::UnknownToken { .. }));
    assert!(matches!(refused(&too_long, prefill, &[]), StepError::ContextFull { .. }));
    assert!(matches!(
        refused(&[1], prefill, &[Wanted::Argmax; 2]),
        StepError::TooManyWanted { wanted: 2, tokens: 1 }
    ));
    assert!(matches!(
        refused(&[1; MAX_REWIND + 1], Phase::Decode, &[]),
        StepError::TooManyDecoded { .. }
    ));
    assert!(session.is_empty() && record.take().is_empty());
}

#[test]
fn state_of_another_engine_is_refused() {
    let ((ours, _), (theirs, _)) = (toy(), toy());
    let mut session = theirs.new_session().unwrap();
    let work = Work { session: &mut session, tokens: &[1], phase: Phase::Decode, wanted: &[] };
    assert!(matches!(ours.step(&mut [work]), Err(StepError::Backend(_))));
    assert!(matches!(ours.snapshot(&session), Err(SessionError::Backend(_))));
    decode(&theirs, &mut session, 1);
}

/// A work of a step: tokens, whether they are decoded, and the results it wants.
type Part = (Vec<TokenId>, bool, Vec<bool>);

fn part() -> impl Strategy<Value = Part> {
    let tokens = prop::collection::vec(0..VOCAB as TokenId, 1..MAX_REWIND);
    let wanted = prop::collection::vec(any::<bool>(), 0..12);
    (tokens, any::<bool>(), wanted).prop_map(|(tokens, decoded, mut wanted)| {
        wanted.truncate(tokens.len());
        (tokens, decoded, wanted)
    })
}

proptest! {
    /// Everyone gets the results of its own last tokens, in order, of the kind that it wants.
    #[test]
    fn results_go_to_those_who_want_them(parts in prop::collection::vec(part(), 1..9)) {
        let (engine, record) = toy();
        let mut sessions: Vec<Session> =
            parts.iter().map(|_| engine.new_session().unwrap()).collect();
        let wanted: Vec<Vec<Wanted>> = parts
            .iter()
            .map(|(.., kinds)| {
                let kind = |argmax: &bool| if *argmax { Wanted::Argmax } else { Wanted::Logits };
                kinds.iter().map(kind).collect()
            })
            .collect();
        let mut work: Vec<Work<'_>> = sessions
            .iter_mut()
            .zip(&parts)
            .zip(&wanted)
            .map(|((session, (tokens, decoded, _)), wanted)| {
                let phase = if *decoded { Phase::Decode } else { Phase::Prefill };
                Work { session, tokens, phase, wanted }
            })
            .collect();
        let outputs = engine.step(&mut work).unwrap();
        drop(work);
        prop_assert_eq!(outputs.len(), parts.len());
        for ((tokens, _, kinds), output) in parts.iter().zip(&outputs) {
            prop_assert_eq!(output.rows.len(), kinds.len());
            let first = tokens.len() - kinds.len();
            for (i, (argmax, row)) in kinds.iter().zip(&output.rows).enumerate() {
                let sum: TokenId = tokens[..=first + i].iter().sum();
                prop_assert_eq!(row.argmax(), Ok(sum % VOCAB as TokenId));
                prop_assert_eq!(matches!(row, RowOutput::Argmax(_)), *argmax);
                prop_assert!(*argmax || row.logits().unwrap().len() == VOCAB);
            }
        }
        check_batch(&record.take().remove(0), &parts);
    }
}

/// The batch holds every token once; decoded rows and rows of the head come first where backends
/// expect them.
fn check_batch(ran: &Ran, parts: &[Part]) {
    let batch = &ran.batch;
    let decoded = |session: usize| parts[session].1;
    let mut end = 0;
    for span in &batch.spans {
        assert_eq!(span.rows.start, end);
        assert_eq!(batch.tokens[span.rows.clone()], parts[span.session].0);
        assert_eq!(span.rows.end <= batch.decode_rows, decoded(span.session));
        end = span.rows.end;
    }
    assert_eq!((end, batch.spans.len()), (batch.tokens.len(), parts.len()));
    let wanted: usize = parts.iter().map(|(.., wanted)| wanted.len()).sum();
    assert_eq!(batch.logit_rows.len(), wanted);
    assert!(batch.argmax_rows <= batch.decode_logits && batch.decode_logits <= wanted);
    let by_row = |row: usize| {
        let session = batch.spans.iter().find(|s| s.rows.contains(&row)).unwrap().session;
        decoded(session) || parts[session].2.len() < 8
    };
    for (i, row) in batch.logit_rows.iter().enumerate() {
        assert_eq!(i < batch.decode_logits, by_row(*row), "entry {i}");
    }
}
