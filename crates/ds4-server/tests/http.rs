//! What every request passes: routes, access, limits, clients that go away, and the end.

mod support;

use std::{
    io::{Read, Write},
    net::Shutdown,
    time::Duration,
};

use serde_json::{Value, json};
use support::{
    Running, ask,
    client::{connect, get, post, post_text, read_reply, send},
    config,
    scripted::Timing,
    wait_until,
};

const CHAT: &str = "/v1/chat/completions";

#[test]
fn routes() {
    let running = Running::scripted(config());
    let at = running.address;
    for path in [
        "/health",
        "/healthz",
        "/v1/models",
        "/models",
        "/v1/models/gpt-4",
        "/metrics",
        "/",
        "/openapi.json",
    ] {
        assert_eq!(get(at, path).status, 200, "{path}");
    }
    assert_eq!(get(at, "/health").json(), json!({ "status": "ok" }));
    for (path, status) in
        [("/nothing", 404), ("/v1/nothing", 404), (CHAT, 405), ("/v1/messages", 405)]
    {
        let reply = get(at, path);
        assert_eq!(reply.status, status, "{path}");
        assert!(reply.json()["error"]["message"].is_string(), "{path}");
    }
    assert_eq!(get(at, "/v1/messages").json()["type"], "error");
    let head = send(at, &format!("HEAD / HTTP/1.1\r\nhost: {at}\r\nconnection: close\r\n\r\n"));
    assert_eq!(head.status, 200);
    let list = format!(
        "GET /v1/models HTTP/1.1\r\nhost: {at}\r\nanthropic-version: 1\r\nconnection: close\r\n\r\n"
    );
    assert_eq!(send(at, &list).json()["has_more"], json!(false));
    assert_eq!(get(at, "/v1/models").json()["data"][0]["object"], "model");
}

#[test]
fn logits_are_not_asked_for_where_a_token_is_enough() {
    let (running, work) = Running::watched(config(), Timing::default(), support::tokenizer());
    let answer = |more: Value| {
        let mut asked = ask("json", 100);
        asked.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        work.take();
        let body = post(running.address, CHAT, &asked).json();
        assert_eq!(body["choices"][0]["message"]["content"], r#"{"a": [1, 2]}"#, "{asked}");
        let tokens = body["usage"]["completion_tokens"].as_u64().unwrap() as usize;
        (work.take().unwrap().chosen, tokens)
    };
    let (chosen, tokens) = answer(json!({ "temperature": 0 }));
    assert!(chosen >= tokens, "{chosen} of {tokens} tokens");
    for more in [
        json!({ "temperature": 1 }),
        json!({ "temperature": 0, "logprobs": true }),
        json!({ "temperature": 0, "response_format": { "type": "json_object" } }),
    ] {
        assert_eq!(answer(more.clone()).0, 0, "{more}");
    }
}

#[test]
fn tokens_are_asked_for() {
    let mut config = config();
    config.tokens = vec!["secret".to_owned()];
    let running = Running::scripted(config);
    let at = running.address;
    assert_eq!(get(at, "/health").status, 200);
    assert_eq!(get(at, "/v1/models").status, 401);
    let body = ask("text", 100).to_string();
    assert_eq!(post_text(at, CHAT, &body, "").status, 401);
    assert_eq!(post_text(at, CHAT, &body, "authorization: Bearer secre\r\n").status, 401);
    assert_eq!(post_text(at, CHAT, &body, "authorization: Bearer secret\r\n").status, 200);
    assert_eq!(post_text(at, CHAT, &body, "x-api-key: secret\r\n").status, 200);
    let refused = post_text(at, "/v1/messages", &body, "").json();
    assert_eq!(refused["error"]["type"], "authentication_error");
    assert_eq!(refused["type"], "error");
}

#[test]
fn foreign_pages_and_names_are_refused() {
    let running = Running::scripted(config());
    let at = running.address;
    let body = ask("text", 100).to_string();
    assert_eq!(post_text(at, CHAT, &body, "origin: https://example.com\r\n").status, 403);
    let rebound = "GET /v1/models HTTP/1.1\r\nhost: example.com\r\nconnection: close\r\n\r\n";
    assert_eq!(send(at, rebound).status, 403);

    let mut config = config();
    config.cors = true;
    let open = Running::scripted(config);
    let reply = post_text(open.address, CHAT, &body, "origin: https://example.com\r\n");
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("access-control-allow-origin"), Some("*"));
    let preflight = format!(
        "OPTIONS {CHAT} HTTP/1.1\r\nhost: {}\r\norigin: https://example.com\r\n\
         access-control-request-method: POST\r\nconnection: close\r\n\r\n",
        open.address
    );
    assert_eq!(send(open.address, &preflight).status, 200);
}

#[test]
fn an_open_address_needs_a_token_or_a_word() {
    use ds4_engine::Engine;
    use ds4_text::{profile::Profile, prompt::PromptEncoder};
    let bind = |config| {
        let tokenizer = support::tokenizer();
        let backend = support::scripted::Scripted::new(
            &support::model(),
            tokenizer.clone(),
            Timing::default(),
        );
        let encoder = PromptEncoder::new(tokenizer, Profile::Preview);
        let address = "0.0.0.0:0".parse().unwrap();
        ds4_server::Server::bind(address, Engine::new(backend), encoder, config).map(drop)
    };
    let error = bind(config()).unwrap_err().to_string();
    assert!(error.contains("--insecure"), "{error}");
    let mut insecure = config();
    insecure.insecure = true;
    bind(insecure).unwrap();
    let mut with_token = config();
    with_token.tokens = vec!["secret".to_owned()];
    bind(with_token).unwrap();
}

#[test]
fn sizes_are_bounded() {
    let mut config = config();
    config.http.body_bytes = 1000;
    let running = Running::scripted(config);
    let at = running.address;
    let body = format!("{{\"messages\": \"{}\"}}", "x".repeat(2000));
    assert_eq!(post_text(at, CHAT, &body, "").status, 413);
    let headers = format!("x-long: {}\r\n", "x".repeat(100_000));
    assert_eq!(post_text(at, CHAT, "{}", &headers).status, 431);
    assert_eq!(post(at, CHAT, &ask("text", 10)).status, 200);
}

#[test]
fn slow_senders_are_not_waited_for() {
    let mut config = config();
    config.http.read_timeout = Duration::from_millis(200);
    let running = Running::scripted(config);
    let mut stream = connect(running.address);
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: {}\r\ncontent-length: 100\r\n\r\n{{",
        running.address
    );
    stream.write_all(head.as_bytes()).unwrap();
    let reply = read_reply(&mut stream);
    assert_eq!(reply.status, 408);
    let mut stream = connect(running.address);
    stream.write_all(b"POST /v1").unwrap();
    stream.read_to_end(&mut Vec::new()).expect("the server ends the connection");
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let mut config = config();
    (config.scheduler.running, config.scheduler.waiting) = (1, 1);
    let timing = Timing { step: Duration::from_millis(2), ..Timing::default() };
    let running = Running::timed(config, timing);
    let at = running.address;
    let long = || std::thread::spawn(move || post(at, CHAT, &ask("long", 200)));
    let first = long();
    wait_until("the first request", || running.monitor.status().running == 1);
    let second = long();
    wait_until("the second request", || running.monitor.status().waiting == 1);
    let refused = post(at, CHAT, &ask("text", 10));
    assert_eq!(refused.status, 429);
    assert!(refused.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(refused.json()["error"]["code"], "rate_limit_exceeded");
    assert_eq!(first.join().unwrap().status, 200);
    assert_eq!(second.join().unwrap().status, 200);
}

/// 6000 tokens at 1 ms: a chunk of 512 takes half a second, all of it 6 seconds.
#[test]
fn a_client_that_leaves_during_prefill_frees_the_engine_before_its_end() {
    const WORDS: usize = 7000;
    let timing = Timing { prompt_token: Duration::from_millis(1), ..Timing::default() };
    let (running, work) = Running::watched(config(), timing, support::tokenizer());
    let prompt = "word ".repeat(WORDS);
    for stream in [false, true] {
        let asked = json!({ "messages": [{ "role": "user", "content": prompt }], "stream": stream,
            "max_tokens": 100, "seed": 1 });
        let body = asked.to_string();
        let mut connection = connect(running.address);
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n",
            running.address,
            body.len()
        );
        connection.write_all((head + &body).as_bytes()).unwrap();
        wait_until("the beginning", || running.monitor.status().running == 1);
        drop(connection);
        wait_until("the end", || running.monitor.status().running == 0);
        let computed = work.take().map_or(0, |done| done.prompt_tokens);
        assert!(computed < WORDS, "{computed} tokens were computed for nobody");
    }
}

#[test]
fn a_client_that_reads_nothing_ends_alone() {
    let mut config = config();
    config.scheduler.stall = Duration::from_millis(300);
    let running = Running::scripted(config);
    let mut asked = ask("long", 100_000);
    asked["stream"] = json!(true);
    let body = asked.to_string();
    let mut connection = connect(running.address);
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n",
        running.address,
        body.len()
    );
    connection.write_all((head + &body).as_bytes()).unwrap();
    let mut some = [0; 100];
    connection.read_exact(&mut some).unwrap();
    // The others go on meanwhile.
    assert_eq!(post(running.address, CHAT, &ask("text", 10)).status, 200);
    wait_until("the end", || running.monitor.status().running == 0);
}

#[test]
fn running_answers_end_before_the_server_does() {
    let timing = Timing { step: Duration::from_millis(2), ..Timing::default() };
    let mut running = Running::timed(config(), timing);
    let at = running.address;
    let answer = std::thread::spawn(move || post(at, CHAT, &ask("long", 200)));
    wait_until("the beginning", || running.monitor.status().running == 1);
    running.stop();
    let answer = answer.join().unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json()["usage"]["completion_tokens"], 200);
}

#[test]
fn answers_that_take_too_long_are_ended_with_the_server() {
    let mut config = config();
    config.shutdown_grace = Duration::from_millis(200);
    let timing = Timing { step: Duration::from_millis(2), ..Timing::default() };
    let mut running = Running::timed(config, timing);
    let at = running.address;
    let answer = std::thread::spawn(move || post(at, CHAT, &ask("long", 5000)));
    wait_until("the beginning", || running.monitor.status().running == 1);
    running.stop();
    assert_eq!(answer.join().unwrap().status, 503);
}

#[test]
fn requests_have_a_deadline_if_asked_for() {
    let mut config = config();
    config.request_timeout = Duration::from_millis(200);
    let timing = Timing { step: Duration::from_millis(2), ..Timing::default() };
    let running = Running::timed(config, timing);
    assert_eq!(post(running.address, CHAT, &ask("long", 5000)).status, 504);
    assert_eq!(post(running.address, CHAT, &ask("text", 5000)).status, 200);
}

/// Every step that computes a part of the new request's prompt gives the stream its next token, too.
#[test]
fn a_new_request_does_not_stall_running_streams() {
    let timing =
        Timing { step: Duration::from_millis(3), prompt_token: Duration::from_micros(100) };
    let (running, work) = Running::watched(config(), timing, support::tokenizer());
    let at = running.address;
    let mut asked = ask("long", 5000);
    asked["stream"] = json!(true);
    let body = asked.to_string();
    let mut stream = connect(at);
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: {at}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    wait_until("the stream", || work.look(|done| done.steps > done.prompt_steps + 10));
    work.take();
    let reading = std::thread::spawn({
        let mut stream = stream.try_clone().unwrap();
        move || std::io::copy(&mut stream, &mut std::io::sink())
    });
    let new_request = post(
        at,
        CHAT,
        &json!({
            "messages": [{ "role": "user", "content": "word ".repeat(2000) + "[text]" }],
            "thinking": false, "max_tokens": 10,
        }),
    );
    assert_eq!(new_request.status, 200, "{}", new_request.body);
    let done = work.take().unwrap();
    stream.shutdown(Shutdown::Both).unwrap();
    let _ = reading.join().unwrap();
    assert!(done.prompt_steps >= 3, "the prompt came in {} steps", done.prompt_steps);
    assert_eq!(done.shared_steps, done.prompt_steps, "the stream waited");
}

#[test]
fn the_trace_has_a_line_for_each_request() {
    let path = std::env::temp_dir().join(format!("ds4-trace-{}", std::process::id()));
    let mut config = config();
    config.trace = Some(path.clone());
    let running = Running::scripted(config);
    post(running.address, CHAT, &ask("text", 10));
    drop(running);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 1);
    assert!(lines[0]["prompt"].as_str().unwrap().contains("[text]"));
    assert_eq!(lines[0]["answer"], "Hello there!");
    assert!(lines[0]["seconds"]["ended"].as_f64().unwrap() > 0.0);
}
