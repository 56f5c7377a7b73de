//! Devices without enough memory: requests wait, are preempted, or fail alone.

mod support;

use ds4_runtime::{Event, Failure, Finish, Limits};
use support::{Running, all, ask, limits, scripted::Capacity, taken, text, wait_until};

/// Two answers of 3000 tokens, and memory for 5000: one is preempted, and neither is hurt.
fn two_answers_take_turns(running: &Running) {
    let answer = || taken(running.submit(ask("long", 1, 3000)));
    for events in [answer(), answer()] {
        let events = events.join().unwrap();
        assert_eq!(events.last(), Some(&Event::Finished(Finish::Length)));
        let tokens = events.iter().filter(|event| matches!(event, Event::Token(_))).count();
        assert_eq!(tokens, 3000);
        let text = text(&events);
        assert!(text.trim_end().split(' ').all(|word| "word".starts_with(word)), "{text}");
    }
    assert!(running.counts.preempted() >= 1);
}

#[test]
fn two_answers_that_outgrow_the_limit_take_turns() {
    two_answers_take_turns(&Running::new(Limits { kv_bytes: 4096 * 5000, ..limits() }));
}

#[test]
fn two_answers_that_outgrow_the_device_take_turns() {
    let capacity = Capacity { tokens: 5000, step: usize::MAX };
    two_answers_take_turns(&Running::on_a_device_of(limits(), capacity));
}

#[test]
fn who_needs_more_than_there_is_fails_alone() {
    let capacity = Capacity { tokens: 3000, step: usize::MAX };
    let running = Running::on_a_device_of(limits(), capacity);
    let other = taken(running.submit(ask("long", 1, 1000)));
    wait_until("the first", || running.runtime.load().running() == 1);
    let refused = all(running.submit(ask("text", 3500, 100)));
    assert!(matches!(refused.last(), Some(Event::Failed(Failure::Memory(_)))), "{refused:?}");
    assert_eq!(other.join().unwrap().last(), Some(&Event::Finished(Finish::Length)));
    let later = all(running.submit(ask("text", 1, 10)));
    assert_eq!(text(&later), "Hello there!", "and the runtime goes on");
}

#[test]
fn the_prefix_cache_goes_before_anyone_fails() {
    let capacity = Capacity { tokens: 3000, step: usize::MAX };
    let running = Running::on_a_device_of(limits(), capacity);
    for words in [1000, 1100, 1200, 1300] {
        // Another beginning each time, so that nothing can be reused.
        let mut request = ask("text", words, 10);
        request.prompt.splice(2..2, support::tokenizer().encode(&words.to_string()).unwrap());
        assert_eq!(text(&all(running.submit(request))), "Hello there!");
    }
    assert!(running.counts.evicted() >= 1);
}

/// Running out in the middle of a step leaves its sessions incomplete: they are computed again,
/// in smaller chunks.
#[test]
fn a_step_too_large_for_the_device_is_made_smaller() {
    let capacity = Capacity { tokens: usize::MAX, step: 100 };
    let running = Running::on_a_device_of(limits(), capacity);
    // Alone, its prompt comes in chunks of 512 tokens.
    let first = all(running.submit(ask("text", 800, 10)));
    assert_eq!(text(&first), "Hello there!");
    assert!(running.counts.preempted() >= 1);
    let other = taken(running.submit(ask("long", 1, 500)));
    let mut second = ask("text", 800, 10);
    second.prompt.insert(2, support::tokenizer().encode("Oslo").unwrap()[0]);
    assert_eq!(text(&all(running.submit(second))), "Hello there!");
    assert_eq!(other.join().unwrap().last(), Some(&Event::Finished(Finish::Length)));
}
