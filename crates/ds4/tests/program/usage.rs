//! Help, completions, and wrong command lines.

use crate::process::{error, run, stdout};

#[test]
fn help_names_every_command() {
    let help = stdout(&["--help"]);
    assert!(help.contains("$DS4_MODEL") && help.contains("ds4/models"), "{help}");
    for command in [
        "run",
        "inspect",
        "tokenize",
        "synth",
        "logits",
        "bench",
        "quantize",
        "imatrix",
        "eval",
        "perplexity",
        "completions",
    ] {
        assert!(help.contains(&format!("\n  {command} ")), "{command} in {help}");
        assert!(stdout(&[command, "--help"]).contains("Usage: ds4 "));
    }
}

#[test]
fn a_wrong_command_line_exits_with_2() {
    for args in [&["run", "--no-such"][..], &["nothing"], &["run", "-p", "a", "--prompt-file", "b"]]
    {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
    assert!(
        error(&["run", "-p", "Hi", "--top-p", "2"]).ends_with("--top-p: found 2, expected 0 to 1")
    );
}

#[test]
fn completions_and_manual_pages_know_the_options() {
    for shell in ["bash", "zsh", "fish"] {
        assert!(stdout(&["completions", shell]).contains("think-max"), "{shell}");
    }
    assert!(stdout(&["man"]).contains("Run DeepSeek V4 Flash locally"));
    assert!(stdout(&["man", "run"]).contains("think\\-max"));
    assert!(error(&["man", "dance"]).ends_with("dance: not a command of ds4: see ds4 --help"));
}
