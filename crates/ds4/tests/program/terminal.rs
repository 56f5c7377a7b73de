//! `ds4 run` and long work at a (pseudo) terminal.

use std::{io::Write, process::Command};

use rexpect::{
    process::WaitStatus,
    session::{PtySession, spawn_command},
};

use crate::process::{ds4, str};

/// Long enough for a loaded machine; nothing here waits for it to pass.
const TIMEOUT_MS: u64 = 60_000;

fn start(args: &[&str], variables: &[(&str, &str)]) -> PtySession {
    opened(ds4(args), variables)
}

/// A command at a terminal; its name for that is among the variables, if it is not the usual one.
pub fn opened(mut command: Command, variables: &[(&str, &str)]) -> PtySession {
    command.env("TERM", "xterm").envs(variables.iter().copied());
    // What a terminal does not replace stays inherited.
    command.stdin(std::process::Stdio::inherit());
    spawn_command(command, Some(TIMEOUT_MS)).unwrap()
}

fn chat(args: &[&str]) -> PtySession {
    let mut session = start(&[&["run"], args].concat(), &[]);
    session.exp_string("Ctrl-D leaves.").unwrap();
    session
}

/// Types a line once the program waits for one: it turns bracketed paste on for every line.
pub fn say(session: &mut PtySession, line: &str) {
    session.exp_string("\x1b[?2004h").unwrap();
    session.send_line(line).unwrap();
}

pub fn exit_code(session: &PtySession) -> i32 {
    match session.process().wait().unwrap() {
        WaitStatus::Exited(_, code) => code,
        other => panic!("{other:?}"),
    }
}

#[test]
fn turns_reuse_what_is_known() {
    let mut session = chat(&["--nothink", "-n", "4", "--seed", "1"]);
    say(&mut session, "Hello");
    // BOS, user, 3 of text, assistant, </think>
    session.exp_regex(r"read 7 tokens at [0-9.]+ t/s, wrote 4 at").unwrap();
    say(&mut session, "Again");
    // All of that but the last token drawn, which was never computed.
    session.exp_string("(10 more were known)").unwrap();
    say(&mut session, "/think");
    say(&mut session, "Once more");
    session.exp_regex(r"\(\d\d more were known\)").unwrap();
    say(&mut session, "/new");
    say(&mut session, "Hello");
    // The beginning is the same.
    session.exp_string("(6 more were known)").unwrap();
    say(&mut session, "/quit");
    session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 0);
}

#[test]
fn commands_work_and_unknown_ones_are_refused() {
    let mut session = chat(&["--seed", "1", "-n", "3"]);
    say(&mut session, "/help");
    session.exp_string("/read FILE").unwrap();
    say(&mut session, "/dance");
    session.exp_string("/dance: no such command: /help lists them").unwrap();
    say(&mut session, "/ctx 0");
    session.exp_string("/ctx: found 0, expected 1 to").unwrap();
    say(&mut session, "/ctx 64");
    say(&mut session, "/nothink");
    say(&mut session, "Hi");
    session.exp_regex(r"context \d+ of 64").unwrap();
    say(&mut session, "/read /no/such/file");
    session.exp_string("/read: /no/such/file").unwrap();
    session.exp_string("\x1b[?2004h").unwrap();
    session.send_control('d').unwrap();
    session.exp_eof().unwrap();
}

#[test]
fn a_question_that_does_not_fit_is_forgotten() {
    let mut session = chat(&["--seed", "1", "-n", "3", "--nothink", "--ctx", "24"]);
    say(&mut session, &"Far too long. ".repeat(10));
    session.exp_string("the context takes 24: raise --ctx (or /ctx)").unwrap();
    say(&mut session, "Hello");
    session.exp_regex(r"read 7 tokens at [0-9.]+ t/s, wrote 3 at").unwrap();
    say(&mut session, "/quit");
    session.exp_eof().unwrap();
}

/// An answer of thousands of tokens, at a pace at which it takes half a minute.
const ENDLESS: [&str; 8] =
    ["--nothink", "-n", "900000", "--ctx", "1000000", "--seed", "2", "--reference"];
const QUESTION: &str = "Tell me everything";

#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let mut session = chat(&ENDLESS);
    say(&mut session, QUESTION);
    // Some of the answer is there before it is stopped.
    session.exp_regex(r"everything\S*\r\n.{20}").unwrap();
    session.send_control('c').unwrap();
    session.exp_regex(r"wrote \d+ at .*; stopped").unwrap();
    // Where a line is edited, it clears the line.
    session.exp_string("\x1b[?2004h").unwrap();
    session.send_control('c').unwrap();
    session.exp_string("Ctrl-D leaves.").unwrap();
    say(&mut session, "/quit");
    session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 0);
}

#[test]
fn ctrl_c_ends_a_single_answer_in_order() {
    let mut session = start(&[&["run", "-p", QUESTION], &ENDLESS[..]].concat(), &[]);
    session.exp_regex(r"\S.{20}").unwrap();
    session.send_control('c').unwrap();
    session.exp_regex(r"wrote \d+ at .*; stopped").unwrap();
    session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 130);
}

#[test]
fn ctrl_c_leaves_no_part_of_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    let mut session = start(&["synth", "--layers", "1", str(&file)], &[]);
    session.exp_string("writing").unwrap();
    session.send_control('c').unwrap();
    session.exp_string("Stopped; nothing was written.").unwrap();
    session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 130);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn reasoning_is_dimmed_or_titled() {
    let args = ["run", "-p", "Hello", "-n", "8", "--seed", "7"];
    let shown = |variables: &[(&str, &str)]| start(&args, variables).exp_eof().unwrap();
    let dim = shown(&[]);
    assert!(dim.contains("\x1b[2m") && !dim.contains("Thinking:"), "{dim:?}");
    for variable in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let plain = shown(&[variable]);
        assert!(plain.contains("Thinking:") && !plain.contains("\x1b[2m"), "{plain:?}");
    }
}

/// The answer goes elsewhere, and the reasoning to the terminal: random weights at a temperature of 2
/// draw every control character.
#[test]
fn reasoning_cannot_command_the_terminal() {
    let answer = ["run", "-p", "x", "-n", "2000", "--temp", "2", "--min-p", "0", "--seed", "7"];
    let program = ds4(&[&answer[..], &["--reference"]].concat());
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" > /dev/null"]).arg(program.get_program());
    command.args(program.get_args());
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let shown = opened(command, &[]).exp_eof().unwrap();
    assert!(shown.len() > 1000, "{shown:?}");
    // Bars and dimmed notes are the program's own.
    let own = |rest: &str| {
        let codes = rest.strip_prefix('[').unwrap_or("x");
        codes.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';').starts_with(['m', 'K'])
    };
    let foreign = |(at, c): (usize, char)| match c {
        '\x1b' => !own(&shown[at + 1..]),
        c => c.is_ascii_control() && !matches!(c, '\n' | '\r' | '\t'),
    };
    let found: Vec<_> = shown.char_indices().filter(|&place| foreign(place)).collect();
    assert!(found.is_empty(), "{found:?}");
}

/// A terminal with another encoding sends such bytes.
#[test]
fn a_byte_that_is_not_utf_8_costs_its_line() {
    let mut session = chat(&["--nothink", "-n", "3"]);
    session.exp_string("\x1b[?2004h").unwrap();
    session.process().get_file_handle().unwrap().write_all(b"caf\xe9 x\r").unwrap();
    session.exp_string("The line is not UTF-8").unwrap();
    say(&mut session, "Hello");
    session.exp_regex(r"wrote 3 at").unwrap();
    say(&mut session, "/quit");
    session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 0);
}

#[test]
fn long_prompts_show_progress() {
    let prompt = "one two three four five six seven eight nine ten ".repeat(300);
    let args = ["run", "-p", &prompt, "-n", "3", "--nothink", "--reference"];
    let mut session = start(&args, &[]);
    session.exp_regex(r"reading \[.{30}\] \d+/\d{4} tokens, [0-9.]+/s, ").unwrap();
    session.exp_regex(r"wrote \d at").unwrap();
    session.exp_eof().unwrap();
}
