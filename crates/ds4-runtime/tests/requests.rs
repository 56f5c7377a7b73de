//! Requests and their events, as a client of the runtime sees them.

mod support;

use std::time::{Duration, Instant};

use ds4_runtime::{Event, Failure, Finish, Limits, Refused};
use support::{Running, all, ask, limits, text, wait_until};

#[test]
fn events_come_in_order_and_end() {
    let running = Running::new(limits());
    let mut request = ask("text", 1000, 100);
    let prompt = request.prompt.len();
    request.top_logprobs = Some(2);
    let mut events = running.submit(request);
    let mut seen = Vec::new();
    while let Some(event) = events.next_blocking() {
        seen.push(event);
    }
    assert_eq!(events.next_blocking(), None, "and nothing after the last");
    assert_eq!(seen[0], Event::Started { cached: 0 });
    assert_eq!(seen.last(), Some(&Event::Finished(Finish::Stop)));
    let left: Vec<_> = seen
        .iter()
        .filter_map(|event| if let Event::Prefill { left } = event { Some(*left) } else { None })
        .collect();
    assert!(left.len() >= 2 && left.is_sorted_by(|a, b| a > b), "{left:?}");
    assert!(left[0] < prompt && left.last() == Some(&0), "{left:?}");
    let kind = |event: &Event| match event {
        Event::Started { .. } => 0,
        Event::Prefill { .. } => 1,
        Event::Token(token) => {
            assert_eq!(token.logprobs.as_ref().map(|(_, top)| top.len()), Some(2));
            2
        }
        Event::Finished(_) | Event::Failed(_) => 3,
    };
    assert!(seen.iter().map(kind).is_sorted());
    assert_eq!(text(&seen), "Hello there!");
}

#[test]
fn tasks_can_wait_for_events_too() {
    let running = Running::new(limits());
    let mut events = running.submit(ask("text", 1, 2));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let last = runtime.block_on(async {
        let mut last = None;
        while let Some(event) = events.next().await {
            last = Some(event);
        }
        last
    });
    assert_eq!(last, Some(Event::Finished(Finish::Length)));
}

#[test]
fn dropping_the_events_cancels() {
    let mut limits = limits();
    limits.running = 1;
    let running = Running::slow(limits, Duration::from_millis(1));
    let mut events = running.submit(ask("long", 1, 8000));
    assert!(matches!(events.next_blocking(), Some(Event::Started { .. })));
    let waiting = running.submit(ask("text", 1, 100));
    drop(events);
    assert_eq!(text(&all(waiting)), "Hello there!", "there is a place again");
    assert_eq!(running.counts.cancelled(), 1);
}

#[test]
fn a_cancelled_request_need_not_have_begun() {
    let mut limits = limits();
    limits.running = 1;
    let running = Running::slow(limits, Duration::from_millis(1));
    let first = running.submit(ask("long", 1, 300));
    drop(running.submit(ask("text", 1, 100)));
    wait_until("the queue is empty", || running.runtime.load().waiting() == 0);
    assert_eq!(all(first).last(), Some(&Event::Finished(Finish::Length)));
}

#[test]
fn what_cannot_be_computed_is_refused() {
    let mut limits = limits();
    limits.context = 64;
    let running = Running::new(limits);
    let refusal = |change: &dyn Fn(&mut ds4_runtime::Request)| {
        let mut request = ask("text", 1, 10);
        change(&mut request);
        match running.runtime.submit(request) {
            Err(Refused::Invalid(reason)) => reason,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it was taken"),
        }
    };
    assert!(refusal(&|request| request.prompt.clear()).contains("a token of prompt"));
    assert!(refusal(&|request| request.max_tokens = 0).contains("one of answer"));
    assert!(refusal(&|request| request.prompt = vec![1; 64]).contains("the context takes 64"));
    assert!(refusal(&|request| request.prompt[2] = u32::MAX).contains("no token 4294967295"));
}

/// A second turn repeats the first one's prompt and answer.
#[test]
fn answers_are_reused_where_that_is_wanted() {
    for reuse_answers in [false, true] {
        let running = Running::new(Limits { reuse_answers, ..limits() });
        let (first, mut second) = (ask("text", 100, 100), ask("text", 100, 100));
        let events = all(running.submit(first));
        let tokens = |event: &Event| match event {
            Event::Token(token) => Some(token.token),
            _ => None,
        };
        let answer: Vec<_> = events.iter().filter_map(tokens).collect();
        let prompt = second.prompt.len();
        second.prompt.extend(&answer);
        let events = all(running.submit(second));
        // The answer's last token was drawn and never computed; the prompt's last was decoded.
        let cached = if reuse_answers { prompt + answer.len() - 1 } else { prompt - 1 };
        assert_eq!(events[0], Event::Started { cached }, "{reuse_answers}");
    }
}

#[test]
fn the_context_ends_an_answer() {
    let mut limits = limits();
    limits.context = 32;
    let running = Running::new(limits);
    let request = ask("long", 1, 100);
    let prompt = request.prompt.len();
    let events = all(running.submit(request));
    assert_eq!(events.last(), Some(&Event::Finished(Finish::Length)));
    let tokens = events.iter().filter(|event| matches!(event, Event::Token(_))).count();
    assert_eq!(prompt + tokens, 32);
}

#[test]
fn a_full_queue_refuses() {
    let mut limits = limits();
    (limits.running, limits.waiting) = (1, 1);
    let running = Running::slow(limits, Duration::from_millis(1));
    let mut first = running.submit(ask("long", 1, 8000));
    assert!(matches!(first.next_blocking(), Some(Event::Started { .. })));
    let _second = running.submit(ask("text", 1, 100));
    let refused = running.runtime.submit(ask("text", 1, 100)).err();
    assert!(matches!(refused, Some(Refused::QueueFull { .. })), "{refused:?}");
}

#[test]
fn closing_ends_what_runs_and_takes_no_more() {
    let mut limits = limits();
    limits.running = 1;
    let running = Running::slow(limits, Duration::from_millis(1));
    let (first, second) = (ask("long", 1, 8000), ask("text", 1, 100));
    let (first, second) = (running.submit(first), running.submit(second));
    running.runtime.close(Instant::now());
    let failed = Event::Failed(Failure::ShuttingDown);
    assert_eq!(all(second).last(), Some(&failed));
    assert_eq!(all(first).last(), Some(&failed));
    let refused = running.runtime.submit(ask("text", 1, 100)).err();
    assert_eq!(refused, Some(Refused::ShuttingDown));
    running.runtime.join();
}

#[test]
fn a_lost_device_fails_everyone_and_is_known() {
    let running = Running::slow(limits(), Duration::from_millis(5));
    let long = running.submit(ask("long", 1, 8000));
    let broken = all(running.submit(ask("broken", 1, 100)));
    let is_fatal = |event: Option<&Event>| match event {
        Some(Event::Failed(Failure::Fatal(reason))) => reason.contains("a cable came loose"),
        _ => false,
    };
    assert!(is_fatal(broken.last()), "{:?}", broken.last());
    assert!(is_fatal(all(long).last()));
    assert!(running.runtime.load().fatal().unwrap().contains("a cable came loose"));
    let late = running.runtime.submit(ask("text", 1, 100)).err();
    assert!(matches!(late, Some(Refused::Fatal(_))), "{late:?}");
}
