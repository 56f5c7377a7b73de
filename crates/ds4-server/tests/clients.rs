//! Real clients, against a server of scripted answers, and the official SDKs against `ds4 serve` with
//! nano, too. They have to be installed first: `tests/clients/run.sh` does that, and then runs
//! these.

mod support;

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::json;
use support::{Running, config, scripted::Timing};

fn installed() -> PathBuf {
    env::var_os("DS4_CLIENTS").expect("run tests/clients/run.sh").into()
}

/// Runs a script against scripted answers.
fn run(program: PathBuf, script: PathBuf) {
    let timing = Timing { step: Duration::from_millis(2), ..Timing::default() };
    let running = Running::timed(config(), timing);
    run_against(&format!("http://{}", running.address), program, script);
}

/// Runs a script with a server's address, and expects success.
fn run_against(address: &str, program: PathBuf, script: PathBuf) {
    let output = Command::new(program).arg(&script).arg(address).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}{complained}", script.display());
    print!("{said}");
}

fn python(script: &str) {
    let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    run(installed().join("py/bin/python"), scripts.join(script));
}

#[test]
#[ignore = "needs installed clients: tests/clients/run.sh"]
fn openai_for_python() {
    python("openai_sdk.py");
}

#[test]
#[ignore = "needs installed clients: tests/clients/run.sh"]
fn anthropic_for_python() {
    python("anthropic_sdk.py");
}

#[test]
#[ignore = "needs installed clients: tests/clients/run.sh"]
fn both_for_typescript() {
    run("node".into(), installed().join("sdks.mjs"));
}

#[test]
#[ignore = "needs installed clients: tests/clients/run.sh"]
fn the_page_in_a_browser() {
    run("node".into(), installed().join("page.mjs"));
}

/// `ds4 serve` with its built-in model; dropping it ends it.
struct Nano {
    child: Child,
    address: String,
}

impl Nano {
    fn start() -> Nano {
        let program = env::var_os("DS4_PROGRAM").expect("run tests/clients/run.sh");
        let mut command = Command::new(program);
        command.args(["serve", "--port", "0", "-c", "8192", "--backend", "cpu"]);
        command.args(["--token", "secret"]).env_remove("DS4_MODEL").stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let serves = |line: String| Some(line.strip_prefix("Serving on ")?.to_owned());
        let address = lines.map_while(Result::ok).find_map(serves).expect("it does not serve");
        Nano { child, address }
    }
}

impl Drop for Nano {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "needs installed clients: tests/clients/run.sh"]
fn nano_answers_every_official_sdk() {
    let (nano, clients) = (Nano::start(), installed());
    let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    let python = clients.join("py/bin/python");
    run_against(&nano.address, python.clone(), scripts.join("openai_nano.py"));
    run_against(&nano.address, python, scripts.join("anthropic_nano.py"));
    run_against(&nano.address, "node".into(), clients.join("nano.mjs"));
}

/// A coding agent is asked to make a file, with nothing of its own but a new home.
fn agent(name: &str, arguments: &[&str], settings: impl Fn(&str) -> (&'static str, String)) {
    let mut config = config();
    config.scheduler.context = 1 << 16;
    let running = Running::scripted(config);
    let home = env::temp_dir().join(format!("ds4-agent-{name}-{}", std::process::id()));
    let work = home.join("work");
    fs::create_dir_all(&work).unwrap();
    let (path, settings) = settings(&format!("http://{}/v1", running.address));
    let path = home.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, settings).unwrap();
    let mut command = at_home(&home, name);
    let output = command.args(arguments).current_dir(&work).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    let made = fs::read_to_string(work.join("made.txt"));
    fs::remove_dir_all(&home).unwrap();
    assert_eq!(made.ok().as_deref(), Some("made by a tool\n"), "{name}: {said}{complained}");
    assert!(said.contains("It is there."), "{name}: {said}{complained}");
    println!("{name}: as expected");
}

/// A program with an environment that leads nowhere else.
fn at_home(home: &Path, program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.arg("90").arg(installed().join("node_modules/.bin").join(program));
    command.env_clear().env("PATH", env::var_os("PATH").unwrap()).env("HOME", home);
    command.env("PI_OFFLINE", "1").env("OPENCODE_DISABLE_AUTOUPDATE", "1");
    // Whatever is not on this machine is out of reach.
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
        command.env(name, "http://127.0.0.1:9");
    }
    command.env("NO_PROXY", "127.0.0.1").env("no_proxy", "127.0.0.1");
    command
}

#[test]
#[ignore = "needs installed clients: tests/clients/run.sh"]
fn pi_writes_a_file() {
    let arguments =
        ["-p", "[pi] Make the file.", "--provider", "ds4", "--model", "deepseek-v4-flash"];
    agent("pi", &arguments, |base| {
        let model = json!({ "id": "deepseek-v4-flash", "name": "DeepSeek V4 Flash", "reasoning": true,
            "input": ["text"], "contextWindow": 65536, "maxTokens": 8192,
            "cost": { "input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0 } });
        let provider = json!({ "baseUrl": base, "api": "openai-completions", "apiKey": "none",
            "models": [model] });
        (".pi/agent/models.json", json!({ "providers": { "ds4": provider } }).to_string())
    });
}

#[test]
#[ignore = "needs installed clients: tests/clients/run.sh"]
fn opencode_runs_a_command() {
    let arguments = ["run", "-m", "ds4/deepseek-v4-flash", "[opencode] Make the file."];
    agent("opencode", &arguments, |base| {
        let models =
            json!({ "deepseek-v4-flash": { "limit": { "context": 65536, "output": 8192 } } });
        let provider = json!({ "npm": "@ai-sdk/openai-compatible", "models": models,
            "options": { "baseURL": base, "apiKey": "none" } });
        (
            ".config/opencode/opencode.json",
            json!({ "provider": { "ds4": provider }, "model": "ds4/deepseek-v4-flash" })
                .to_string(),
        )
    });
}

#[test]
#[ignore = "needs installed clients: tests/clients/run.sh"]
fn codex_runs_a_command() {
    let arguments = [
        "exec",
        "--skip-git-repo-check",
        "--dangerously-bypass-approvals-and-sandbox",
        "[codex] Make the file.",
    ];
    agent("codex", &arguments, |base| {
        let settings = format!(
            "model = \"deepseek-v4-flash\"\nmodel_provider = \"ds4\"\n\n[model_providers.ds4]\n\
             name = \"ds4\"\nbase_url = \"{base}\"\nwire_api = \"responses\"\n"
        );
        (".codex/config.toml", settings)
    });
}

#[test]
#[ignore = "needs installed clients: tests/clients/run.sh"]
fn claude_code_runs_a_command() {
    let arguments = ["-p", "[claude] Make the file.", "--allowedTools", "Bash"];
    agent("claude", &arguments, |base| {
        let environment = json!({
            "ANTHROPIC_BASE_URL": base.trim_end_matches("/v1"),
            "ANTHROPIC_AUTH_TOKEN": "none",
            "ANTHROPIC_MODEL": "deepseek-v4-flash",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        });
        (".claude/settings.json", json!({ "env": environment }).to_string())
    });
}
