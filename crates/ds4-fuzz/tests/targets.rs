//! Runs every target on its seeds and on mutations of them: a thousand of each target in
//! `cargo test`, or as many as there is time for with
//! `cargo test --release --test targets -- --seconds 20 [TARGET]`.
//!
//! Mutations follow from their number, so a failure comes again. Its bytes are left in
//! `target/tmp/fuzz`. libFuzzer, which sees the code that inputs reach, is in `tools/fuzz.sh`.

use std::{
    env, fs,
    panic::catch_unwind,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use ds4_fuzz::{
    TARGETS, Target,
    seeds::{self, Seed},
};

/// How long to go on.
#[derive(Clone, Copy)]
enum Until {
    Rounds(u64),
    Time(Duration),
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (until, only) = match &arguments[..] {
        [option, seconds, only @ ..] if option == "--seconds" => {
            let seconds = seconds.parse().expect("a number of seconds");
            (Until::Time(Duration::from_secs(seconds)), only.first())
        }
        // Whatever else is meant for tests of the usual kind.
        _ => (Until::Rounds(1000), None),
    };
    let seeds = seeds::all();
    let chosen = TARGETS.iter().filter(|target| only.is_none_or(|name| name == target.name));
    let failed: Vec<_> = chosen.filter(|target| !survives(target, &seeds, until)).collect();
    match failed.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn survives(target: &Target, seeds: &[Seed], until: Until) -> bool {
    let seeds: Vec<_> = seeds.iter().filter(|seed| seed.target == target.name).collect();
    assert!(!seeds.is_empty(), "{} has no seeds", target.name);
    for seed in &seeds {
        match passes(target, seed.name, &seed.bytes) {
            Some(right) => assert!(right, "{}: the seed {} is refused", target.name, seed.name),
            None => return false,
        }
    }
    let begun = Instant::now();
    let goes_on = |round| match until {
        Until::Rounds(rounds) => round < rounds,
        Until::Time(time) => begun.elapsed() < time,
    };
    let mut round = 0;
    while goes_on(round) {
        let bytes = mutated(&seeds, round);
        if passes(target, &format!("{round}"), &bytes).is_none() {
            return false;
        }
        round += 1;
    }
    println!("{}: {} seeds and {round} mutations", target.name, seeds.len());
    true
}

/// Whether the target finds the bytes right; nothing if it panics.
fn passes(target: &Target, name: &str, bytes: &[u8]) -> Option<bool> {
    let run = target.run;
    let right = catch_unwind(|| run(bytes)).ok();
    if right.is_none() {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
        let path = folder.join(format!("{}-{name}", target.name));
        fs::create_dir_all(&folder).and_then(|()| fs::write(&path, bytes)).expect("a file");
        eprintln!("{}: fails on {}", target.name, path.display());
    }
    right
}

/// Numbers at which code may go wrong.
const EDGES: [u64; 12] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
];

/// Input number `round`: a seed with a few changes.
fn mutated(seeds: &[&Seed], round: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(round);
    let mut bytes = seeds[rng.usize(..seeds.len())].bytes.clone();
    for _ in 0..1 << rng.u32(..4) {
        if bytes.is_empty() {
            break;
        }
        // Headers decide most, and lie in front.
        let reach = if rng.bool() { bytes.len().min(512) } else { bytes.len() };
        let at = rng.usize(..reach);
        let rest = bytes.len() - at;
        match rng.u32(..8) {
            0 => bytes[at] ^= 1 << rng.u32(..8),
            1 => bytes[at] = rng.u8(..),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..at + rng.usize(..rest.min(64)))),
            4 => {
                let copied = bytes[at..at + rng.usize(..rest.min(64))].to_vec();
                let to = rng.usize(..bytes.len());
                bytes.splice(to..to, copied);
            }
            5 => {
                let other = &seeds[rng.usize(..seeds.len())].bytes;
                let from = rng.usize(..other.len());
                let to = from + rng.usize(..(other.len() - from).min(64));
                bytes.splice(at..at, other[from..to].iter().copied());
            }
            6 => {
                let digits = EDGES[rng.usize(..EDGES.len())].to_string();
                let end = at + rng.usize(..rest.min(4));
                bytes.splice(at..end, digits.bytes());
            }
            _ => {
                let edge = EDGES[rng.usize(..EDGES.len())].wrapping_add(rng.u64(..3)).to_le_bytes();
                let size = [1, 2, 4, 8][rng.usize(..4)].min(rest);
                bytes[at..at + size].copy_from_slice(&edge[..size]);
            }
        }
    }
    bytes
}
