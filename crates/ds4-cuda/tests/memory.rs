//! A device whose memory is full. A file of its own, because other tests would suffer.

mod support;

use ds4_cuda::device::{Buffer, Device};
use ds4_engine::{
    BackendError::OutOfMemory, Engine, Phase, Session, SnapshotError, StepError, Work,
    rows::CacheRounding,
};
use ds4_model::synth::Recipe;
use support::{cuda, feed, random_tokens, session_after, small_model_of};

/// Takes what memory is left, down to pieces that nothing of use fits in.
fn fill(device: &Device) -> Vec<Buffer<u8>> {
    let mut taken = Vec::new();
    let mut size = 1 << 32;
    while size >= 16 << 10 {
        match device.alloc(size) {
            Ok(buffer) => taken.push(buffer),
            Err(OutOfMemory(_)) => size /= 4,
            Err(error) => panic!("{error}"),
        }
    }
    taken
}

fn assert_out_of_memory<T>(what: &str, result: Result<T, StepError>) {
    match result {
        Err(StepError::Backend(OutOfMemory(text)) | StepError::NoRoom { reason: text, .. }) => {
            assert!(text.contains("no room for"), "{what}: {text}");
        }
        Err(error) => panic!("{what}: {error}"),
        Ok(_) => panic!("{what}: there was room"),
    }
}

fn prefill(engine: &Engine, session: &mut Session, len: usize) -> Result<(), StepError> {
    let tokens = random_tokens(9, len);
    engine.step(&mut [Work { session, tokens: &tokens, phase: Phase::Prefill, wanted: &[] }])?;
    Ok(())
}

/// Whoever asks for more is refused, and all others go on as if nothing had happened.
#[test]
#[ignore = "needs a CUDA device or the emulator"]
fn running_out_of_memory_harms_no_other_session() {
    let engine = cuda(&small_model_of(1..2, Recipe::Q2), CacheRounding::On);
    let tokens = random_tokens(1, 120);
    let at_100 = || session_after(&engine, &tokens[..100]);
    let expected = feed(&engine, &mut at_100(), &tokens[100..], 1);
    // One that decodes, one whose cache must grow, and one whose step needs larger buffers.
    let (mut steady, mut large) = (at_100(), at_100());
    let mut growing = session_after(&engine, &random_tokens(2, 1020));
    let saved = engine.snapshot(&growing).unwrap();

    let taken = fill(&Device::open(0).unwrap());
    assert_out_of_memory("a new session", engine.new_session().map_err(StepError::from));
    assert!(matches!(engine.restore(&saved), Err(SnapshotError::Backend(OutOfMemory(_)))));
    assert_out_of_memory("growing", prefill(&engine, &mut growing, 8));
    assert_eq!(growing.len(), 1020);
    assert!(engine.snapshot(&growing).unwrap() == saved, "a refused step changes nothing");
    assert!(feed(&engine, &mut steady, &tokens[100..105], 1) == expected[..5]);
    assert_out_of_memory("a large step", prefill(&engine, &mut large, 600));
    assert!(feed(&engine, &mut steady, &tokens[105..110], 1) == expected[5..10]);
    drop(taken);

    assert!(feed(&engine, &mut steady, &tokens[110..], 1) == expected[10..]);
    let mut restored = engine.restore(&saved).unwrap();
    prefill(&engine, &mut restored, 600).unwrap();
}
