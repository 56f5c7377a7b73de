//! Ctrl-C: stops what is going on in an orderly way instead of ending the program.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// Exit code after Ctrl-C: 128 and the number of SIGINT.
pub const EXIT_CODE: u8 = 130;

static PRESSED: AtomicBool = AtomicBool::new(false);

/// What a second Ctrl-C does while the first has not taken effect.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// Ends the program at once.
    Exit,
    /// Nothing: a conversation must not get lost.
    Wait,
}

/// Catches Ctrl-C from here on. Called once.
pub fn catch(again: Again) -> Result<()> {
    let handler = move || {
        if PRESSED.swap(true, Ordering::Relaxed) && again == Again::Exit {
            std::process::exit(EXIT_CODE.into());
        }
    };
    ctrlc::set_handler(handler).context("cannot catch Ctrl-C")
}

/// Whether Ctrl-C was pressed since the start or the last [`reset`].
pub fn pressed() -> bool {
    PRESSED.load(Ordering::Relaxed)
}

/// Forgets an earlier Ctrl-C.
pub fn reset() {
    PRESSED.store(false, Ordering::Relaxed);
}
