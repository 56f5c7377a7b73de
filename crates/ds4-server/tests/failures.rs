//! Devices that fail for good, and devices without enough memory, as HTTP clients see them.

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
