//! `ds4 serve`.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, ChildStderr, Command, Stdio},
};

use serde_json::{Value, json};

use crate::process::{ds4, error, run, text};

/// A server on a free port, where it says it listens, and the rest of what it says.
pub fn serve(args: &[&str]) -> (Child, String, BufReader<ChildStderr>) {
    let args = [&["serve", "--port", "0", "-c", "4096"], args].concat();
    served(ds4(&args).stderr(Stdio::piped()))
}

/// The same for a command that is complete.
pub fn served(command: &mut Command) -> (Child, String, BufReader<ChildStderr>) {
    let mut child = command.spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("Serving on http://") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended before it served");
    }
    (child, line.trim_end().trim_start_matches("Serving on http://").to_owned(), stderr)
}

pub fn post(address: &str, body: &Value, headers: &str) -> (String, String) {
    ask(address, "POST /v1/chat/completions", &body.to_string(), headers)
}

/// Sends a request; its reply's status and body.
pub fn ask(address: &str, what: &str, body: &str, headers: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!(
        "{what} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n{headers}\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    (head[9..12].to_owned(), body.to_owned())
}

pub fn greedy() -> Value {
    json!({ "messages": [{ "role": "user", "content": "Hello" }], "thinking": false,
        "temperature": 0, "max_tokens": 12 })
}

#[cfg(unix)]
#[test]
fn it_answers_like_run_and_ends_when_asked_to() {
    let (mut child, address, mut stderr) = serve(&[]);
    let (status, body) = post(&address, &greedy(), "");
    assert_eq!(status, "200", "{body}");
    let body: Value = serde_json::from_str(&body).unwrap();
    let expected = run(&["run", "-p", "Hello", "--nothink", "-n", "12", "--temp", "0"]).stdout;
    let answer = body["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(answer.trim(), text(&expected).trim());
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    assert!(child.wait().unwrap().success());
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("Anthropic clients") && rest.contains(&address), "{rest}");
    assert!(rest.contains("Waiting for running answers"), "{rest}");
}

#[test]
fn tokens_come_from_a_file_and_traces_go_to_one() {
    let folder = tempfile::tempdir().unwrap();
    let (tokens, trace) = (folder.path().join("tokens"), folder.path().join("trace"));
    std::fs::write(&tokens, "first\n\n second \n").unwrap();
    let (tokens, trace) = (tokens.to_str().unwrap(), trace.to_str().unwrap());
    let (mut child, address, _stderr) = serve(&["--token-file", tokens, "--trace", trace]);
    assert_eq!(post(&address, &greedy(), "").0, "401");
    assert_eq!(post(&address, &greedy(), "authorization: Bearer second\r\n").0, "200");
    child.kill().unwrap();
    child.wait().unwrap();
    let line: Value = serde_json::from_str(&std::fs::read_to_string(trace).unwrap()).unwrap();
    assert_eq!(line["answer_tokens"], 12);
}

#[test]
fn what_cannot_be_served_is_refused_in_a_line() {
    for (args, expected) in [
        (&["serve", "--host", "0.0.0.0", "--port", "0"][..], "--insecure"),
        (&["serve", "--ctx", "1"], "--ctx: found 1"),
        (&["serve", "--parallel", "0"], "--parallel: found 0"),
        (&["serve", "--token-file", "/nonexistent"], "/nonexistent"),
        (&["serve", "--port", "0", "--token", ""], "a token is empty"),
    ] {
        let line = error(args);
        assert!(line.contains(expected), "{line}");
    }
}
