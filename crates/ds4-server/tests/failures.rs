//! Devices that fail for good, and devices without enough memory.

mod support;

use std::{net::SocketAddr, thread::JoinHandle, time::Duration};

use serde_json::{Value, json};
use support::{
    Running, ask,
    client::{Reply, get, post},
    config,
    scripted::{Capacity, Timing},
    wait_until,
};

const CHAT: &str = "/v1/chat/completions";

fn ask_at_length(begin: &str, words: usize) -> Value {
    let text = format!("{begin}{}[text]", "word ".repeat(words));
    json!({ "messages": [{ "role": "user", "content": text }], "thinking": false })
}

fn send(at: SocketAddr, body: Value) -> JoinHandle<Reply> {
    std::thread::spawn(move || post(at, CHAT, &body))
}

fn metric(at: SocketAddr, name: &str) -> u64 {
    let metrics = get(at, "/metrics").body;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name}: {metrics}")).parse().unwrap()
}

/// A whole answer and a stream that run, one that waits, and the one during which it happens.
#[test]
fn a_lost_device_ends_the_server_and_everyone_hears_of_it() {
    let mut config = config();
    config.scheduler.running = 3;
    config.shutdown_grace = Duration::from_secs(1);
    let timing = Timing { step: Duration::from_millis(20), ..Timing::default() };
    let running = Running::timed(config, timing);
    let at = running.address;
    let whole = send(at, ask("long", 5000));
    let mut streamed = ask("long", 5000);
    streamed["stream"] = json!(true);
    let stream = send(at, streamed);
    wait_until("the first two", || running.monitor.status().running == 2);
    let broken = send(at, ask("broken", 100));
    wait_until("the third", || running.monitor.status().running == 3);
    let waiting = send(at, ask("text", 100));

    for (answer, what) in [(whole, "running"), (broken, "broken"), (waiting, "waiting")] {
        let reply = answer.join().unwrap();
        assert_eq!(reply.status, 500, "{what}: {}", reply.body);
        assert_eq!(reply.json()["error"]["type"], "server_error", "{what}");
        assert!(reply.body.contains("a cable came loose"), "{what}: {}", reply.body);
    }
    let events = stream.join().unwrap();
    let last = events.data().pop().unwrap();
    assert!(last["error"]["message"].as_str().unwrap().contains("a cable came loose"), "{last}");
    assert!(!events.body.contains("[DONE]"));

    let health = get(at, "/health");
    assert_eq!(health.status, 503);
    assert_eq!(health.json()["status"], "failed");
    assert!(health.body.contains("a cable came loose"), "{}", health.body);
    let late = post(at, CHAT, &ask("text", 10));
    assert_eq!(late.status, 503);
    assert!(late.body.contains("a cable came loose"), "{}", late.body);
    let reason = running.ended().unwrap_err().to_string();
    assert!(reason.contains("device failed: a cable came loose"), "{reason}");
}

/// Two answers of 3000 tokens, and memory for 5000: one waits in between, and neither is hurt.
fn two_answers_take_turns(running: &Running) {
    let at = running.address;
    for answer in [send(at, ask("long", 3000)), send(at, ask("long", 3000))] {
        let reply = answer.join().unwrap();
        assert_eq!(reply.status, 200, "{}", reply.body);
        let body = reply.json();
        assert_eq!(body["usage"]["completion_tokens"], 3000);
        let text = body["choices"][0]["message"]["content"].as_str().unwrap().trim_end();
        assert!(text.split(' ').all(|word| word == "word" || "word".starts_with(word)));
    }
    assert!(metric(at, "ds4_requests_set_aside_total") >= 1);
}

#[test]
fn two_answers_that_outgrow_the_limit_take_turns() {
    let mut config = config();
    config.scheduler.kv_bytes = 4096 * 5000;
    two_answers_take_turns(&Running::scripted(config));
}

#[test]
fn two_answers_that_outgrow_the_device_take_turns() {
    let capacity = Capacity { tokens: 5000, step: usize::MAX };
    two_answers_take_turns(&Running::on_a_device_of(config(), capacity));
}

#[test]
fn who_needs_more_than_there_is_fails_alone() {
    let capacity = Capacity { tokens: 3000, step: usize::MAX };
    let running = Running::on_a_device_of(config(), capacity);
    let at = running.address;
    let other = send(at, ask("long", 1000));
    wait_until("the first", || running.monitor.status().running == 1);
    let refused = post(at, CHAT, &ask_at_length("", 3500));
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert!(refused.body.contains("no memory for this request"), "{}", refused.body);
    let other = other.join().unwrap();
    assert_eq!(other.status, 200, "{}", other.body);
    assert_eq!(other.json()["usage"]["completion_tokens"], 1000);
    assert_eq!(post(at, CHAT, &ask("text", 10)).status, 200, "and the server goes on");
    assert_eq!(get(at, "/health").status, 200);
}

#[test]
fn conversations_kept_for_later_go_before_anyone_fails() {
    let capacity = Capacity { tokens: 3000, step: usize::MAX };
    let running = Running::on_a_device_of(config(), capacity);
    for name in ["Oslo", "Rome", "Paris", "Bern"] {
        let reply = post(running.address, CHAT, &ask_at_length(name, 1000));
        assert_eq!(reply.status, 200, "{}", reply.body);
    }
    assert!(metric(running.address, "ds4_sessions_evicted_total") >= 1);
}

/// Running out in the middle of a step leaves its sessions incomplete: they are computed again, in
/// smaller pieces.
#[test]
fn a_step_too_large_for_the_device_is_made_smaller() {
    let capacity = Capacity { tokens: usize::MAX, step: 100 };
    let running = Running::on_a_device_of(config(), capacity);
    let at = running.address;
    // Alone, its prompt comes in pieces of 512 tokens.
    let first = post(at, CHAT, &ask_at_length("", 800));
    assert!(metric(at, "ds4_requests_set_aside_total") >= 1);
    let other = send(at, ask("long", 500));
    for reply in [first, post(at, CHAT, &ask_at_length("Oslo", 800))] {
        assert_eq!(reply.status, 200, "{}", reply.body);
        assert_eq!(reply.json()["choices"][0]["message"]["content"], "Hello there!");
    }
    let other = other.join().unwrap();
    assert_eq!(other.json()["usage"]["completion_tokens"], 500, "{}", other.body);
}
