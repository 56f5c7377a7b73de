//! What a new request with a long prompt does to a running stream: `cargo bench -p ds4-server --bench
//! new_request`.
//!
//! nano answers on the processor, and its stream is watched over HTTP: the gaps between its tokens
//! alone, and while the prompt of another request is computed in the same steps.

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use support::{
    Running,
    client::{connect, post},
    config,
};

const CHAT: &str = "/v1/chat/completions";

/// Words of the new request's prompt, each a token or a little more.
const WORDS: usize = 30_000;

/// How long the stream is watched alone, and how long beside the new request, which then goes.
const ALONE: Duration = Duration::from_secs(5);
const BESIDE: Duration = Duration::from_secs(40);

fn main() {
    let mut config = config();
    config.scheduler.context = 65_536;
    let running = Running::nano(config);
    let at = running.address;
    // Whatever is done once is done before anything is measured.
    post(at, CHAT, &body("Hello", 20));
    let stop = Arc::new(AtomicBool::new(false));
    let stream = std::thread::spawn({
        let stop = stop.clone();
        move || watch(at, &stop)
    });
    std::thread::sleep(ALONE);
    // The client's own work is done before.
    let request = body(&prompt(), 1).to_string();
    let come = Instant::now();
    let new_request = ask(at, &request);
    std::thread::sleep(BESIDE);
    let gone = Instant::now();
    drop(new_request);
    std::thread::sleep(ALONE);
    stop.store(true, Ordering::Relaxed);
    let arrivals = stream.join().expect("the stream failed");
    println!("a prompt of {WORDS} words beside a stream");
    let gaps = |from: Instant, to: Instant| {
        // The gap in which the new request comes counts as well.
        let pairs = arrivals.windows(2).filter(|pair| from < pair[1] && pair[1] <= to);
        let mut gaps: Vec<Duration> = pairs.map(|pair| pair[1] - pair[0]).collect();
        gaps.sort_unstable();
        gaps
    };
    // A shared machine is not equally fast for a minute.
    let (before, after) = (gaps(come - ALONE / 2, come), gaps(gone + ALONE / 2, gone + ALONE));
    let mut alone = [&before[..], &after].concat();
    alone.sort_unstable();
    show("alone before", &before, &alone);
    show("beside the new request", &gaps(come, gone), &alone);
    show("alone after", &after, &alone);
    show_longest(&arrivals, come, gone);
}

fn body(text: &str, tokens: usize) -> Value {
    json!({ "messages": [{ "role": "user", "content": text }], "thinking": false,
        "max_tokens": tokens, "temperature": 1, "min_p": 0 })
}

fn prompt() -> String {
    let mut rng = fastrand::Rng::with_seed(3);
    let words = ["the", "of", "red", "blue", "one", "two", "box", "room", "line", "tree"];
    (0..WORDS).map(|_| format!(" {}", words[rng.usize(..words.len())])).collect()
}

/// Sends a request, whose answer is still to come.
fn ask(at: SocketAddr, body: &str) -> TcpStream {
    let mut connection = connect(at);
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: {at}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    connection.write_all((head + body).as_bytes()).expect("the server takes requests");
    connection
}

/// When the tokens of a stream come that ends when told to.
fn watch(at: SocketAddr, stop: &AtomicBool) -> Vec<Instant> {
    // A grammar without an end keeps nano talking.
    let mut body = body("Hello", 60_000);
    body["stream"] = json!(true);
    body["response_format"] = json!({ "type": "regex", "regex": "[a-z ]{100000}" });
    let mut connection = ask(at, &body.to_string());
    let (mut arrivals, mut piece) = (Vec::new(), [0; 4096]);
    while !stop.load(Ordering::Relaxed) && connection.read(&mut piece).expect("a stream") > 0 {
        arrivals.push(Instant::now());
    }
    arrivals
}

/// When the longest gaps beside the new request began, for who looks for their reason.
fn show_longest(arrivals: &[Instant], come: Instant, gone: Instant) {
    let beside = arrivals.windows(2).filter(|pair| come < pair[1] && pair[1] <= gone);
    let mut gaps: Vec<_> = beside.map(|pair| (pair[1] - pair[0], pair[0])).collect();
    gaps.sort_unstable_by(|a, b| b.cmp(a));
    let longest = gaps.iter().take(5).map(|(gap, at)| {
        let after = at.saturating_duration_since(come).as_secs_f64();
        format!("{:.1} ms after {after:.3} s", gap.as_secs_f64() * 1e3)
    });
    println!("the longest: {}", longest.collect::<Vec<_>>().join(", "));
}

fn show(when: &str, gaps: &[Duration], alone: &[Duration]) {
    let at = |of: &[Duration], share: f64| {
        let place = (of.len() as f64 * share) as usize;
        of.get(place.min(of.len().saturating_sub(1))).copied().unwrap_or_default().as_secs_f64()
            * 1e3
    };
    let usual = at(alone, 0.5);
    let long = gaps.iter().filter(|gap| gap.as_secs_f64() * 1e3 > 3.0 * usual).count();
    println!(
        "{when:20} {:6} gaps, {long} above 3 × the usual: median {:6.1} ms, p99 {:6.1} ms, worst {:6.1} ms ({:.1} ×)",
        gaps.len(),
        at(gaps, 0.5),
        at(gaps, 0.99),
        at(gaps, 1.0),
        at(gaps, 1.0) / usual
    );
}
