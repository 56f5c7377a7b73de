//! Real clients against a server of scripted answers. They have to be installed first:
//! `tests/clients/run.sh` does that, and then runs these.

mod support;

use std::{env, path::PathBuf, process::Command};

use support::{Running, config, scripted::Timing};

fn installed() -> PathBuf {
    env::var_os("DS4_CLIENTS").expect("run tests/clients/run.sh").into()
}

/// Runs a script with the server's address, and expects success.
fn run(program: PathBuf, script: PathBuf) {
    let timing = Timing { step: std::time::Duration::from_millis(2), ..Timing::default() };
    let running = Running::timed(config(), timing);
    let address = format!("http://{}", running.address);
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
