//! Many clients at once, good and bad: 10 seconds in `cargo test`, or as long as one likes with
//! `cargo test --release -p ds4-server --test load -- --seconds 300`.
//!
//! The server is a process of its own, so that its memory and files can be told from the clients'.

mod support;

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;
use support::{
    Running,
    client::{connect, get},
    config,
    scripted::Timing,
};

const CHAT: &str = "/v1/chat/completions";
const CLIENTS: usize = 64;

/// How often memory is looked at.
const LOOKS: usize = 12;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve"] => serve(),
        ["--seconds", seconds] => load(Duration::from_secs(seconds.parse().unwrap())),
        // Whatever else is meant for tests of the usual kind.
        _ => load(Duration::from_secs(10)),
    }
}

/// The server's process: serves until its input ends.
fn serve() {
    let mut config = config();
    config.http.body_bytes = 50_000;
    config.scheduler.running = CLIENTS;
    config.scheduler.kv_bytes = 64 << 20;
    let timing = Timing { step: Duration::from_millis(1), ..Timing::default() };
    let running = Running::timed(config, timing);
    println!("{}", running.address);
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

struct Process {
    child: Child,
    address: SocketAddr,
}

impl Process {
    fn start() -> Process {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("serve").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        Process { address: line.trim().parse().unwrap(), child }
    }

    fn resident_kib(&self) -> usize {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    fn metric(&self, name: &str) -> u64 {
        let metrics = get(self.address, "/metrics").body;
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or("0").parse().unwrap()
    }
}

/// What clients have seen.
#[derive(Default)]
struct Seen {
    /// Answers by status; `None` for a client that left first.
    statuses: BTreeMap<Option<u16>, usize>,
    /// Gaps between two pieces of a stream, by milliseconds.
    gaps: BTreeMap<u128, usize>,
}

impl Seen {
    fn gap(&self, share: f64) -> u128 {
        let all: usize = self.gaps.values().sum();
        let mut left = (all as f64 * share) as usize;
        let place = self.gaps.iter().find(|(_, count)| {
            let found = left < **count;
            left = left.saturating_sub(**count);
            found
        });
        place.or(self.gaps.last_key_value()).map_or(0, |(millis, _)| *millis)
    }
}

/// One client's next move.
fn move_of_client(at: SocketAddr, rng: &mut fastrand::Rng, seen: &Mutex<Seen>) {
    let (script, tokens) = [("long", 300), ("text", 50), ("thinking", 50)][rng.usize(..3)];
    let text = format!("{}[{script}]", "word ".repeat(rng.usize(..400)));
    let body = json!({
        "messages": [{ "role": "user", "content": text }],
        "thinking": script == "thinking", "max_tokens": tokens, "stream": rng.bool(),
    });
    let kind = rng.usize(..10);
    let body = match kind {
        2 => "{\"messages\": 5}".to_owned(),
        3 => format!("{{\"messages\": \"{}\"}}", "x".repeat(100_000)),
        _ => body.to_string(),
    };
    let length = body.len();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: {at}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
    );
    let mut stream = connect(at);
    // The server may answer and close before it has read everything.
    let _ = stream.write_all((head + &body).as_bytes());
    if kind == 0 {
        std::thread::sleep(Duration::from_millis(rng.u64(..50)));
        *seen.lock().unwrap().statuses.entry(None).or_default() += 1;
        return;
    }
    let slow = (kind == 1).then(|| Duration::from_millis(rng.u64(..20)));
    let (mut head, mut gaps, mut last) = (Vec::new(), Vec::new(), None);
    let mut piece = [0; 2048];
    // A connection that is reset after the reply has still brought the reply.
    while let Ok(count) = stream.read(&mut piece)
        && count > 0
    {
        let now = Instant::now();
        if head.len() < 16 {
            head.extend_from_slice(&piece[..count]);
        } else if slow.is_none() {
            gaps.extend(last.map(|last| now - last));
            last = Some(now);
        }
        slow.into_iter().for_each(std::thread::sleep);
    }
    let status = head.get(9..12).and_then(|code| std::str::from_utf8(code).ok()?.parse().ok());
    let mut seen = seen.lock().unwrap();
    *seen.statuses.entry(status).or_default() += 1;
    for gap in gaps {
        *seen.gaps.entry(gap.as_millis()).or_default() += 1;
    }
}

fn load(time: Duration) {
    let mut server = Process::start();
    let at = server.address;
    let files_before = server.open_files();
    let stop = Arc::new(AtomicBool::new(false));
    let seen: Arc<Mutex<Seen>> = Arc::default();
    let client = |seed| {
        let (stop, seen) = (stop.clone(), seen.clone());
        std::thread::spawn(move || {
            let mut rng = fastrand::Rng::with_seed(seed);
            while !stop.load(Ordering::Relaxed) {
                move_of_client(at, &mut rng, &seen);
            }
        })
    };
    let clients: Vec<_> = (0..CLIENTS as u64).map(client).collect();
    let look = |_| {
        std::thread::sleep(time / LOOKS as u32);
        server.resident_kib()
    };
    let resident: Vec<usize> = (0..LOOKS).map(look).collect();
    stop.store(true, Ordering::Relaxed);
    clients.into_iter().for_each(|client| client.join().unwrap());
    let begun = Instant::now();
    while server.metric("ds4_requests_running") > 0 || server.open_files() > files_before + 4 {
        assert!(begun.elapsed() < Duration::from_secs(20), "requests or files are left");
        std::thread::sleep(Duration::from_millis(20));
    }
    let seen = seen.lock().unwrap();
    println!("answers by status: {:?}", seen.statuses);
    println!(
        "gaps of streams: median {} ms, p99 {} ms, longest {} ms",
        seen.gap(0.5),
        seen.gap(0.99),
        seen.gap(1.0)
    );
    let files = server.open_files();
    println!("resident KiB: {resident:?}; files: {files_before}, in the end {files}");
    for status in seen.statuses.keys().flatten() {
        assert!([200, 400, 413, 429].contains(status), "{:?}", seen.statuses);
    }
    assert!(seen.statuses[&Some(200)] > 50, "{:?}", seen.statuses);
    // The first third fills the pool of sessions and the allocator's arenas.
    let (early, late) = (resident[LOOKS / 3], resident[LOOKS - 1]);
    assert!(late < early + early / 10 + 4096, "memory grows: {resident:?}");
    assert_eq!(server.metric("ds4_requests_waiting"), 0);
    assert!(server.metric("ds4_sessions_idle_bytes") <= 64 << 20);
    assert!(!get(at, "/metrics").body.contains("status=\"500\""));
    drop(server.child.stdin.take());
    assert!(server.child.wait().unwrap().success(), "the server ends well");
}
