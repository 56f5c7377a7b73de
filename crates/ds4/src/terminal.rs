//! What goes to a person: colours, progress, and text made safe for a terminal.
//!
//! The one invariant: a stream that isn't a terminal never gets an escape code.

use std::{
    borrow::Cow,
    env,
    fmt::{Display, Write},
    io::{self, IsTerminal, Write as _},
    time::Duration,
};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

/// A style, as escape codes around a text.
#[derive(Clone, Copy)]
pub struct Style {
    start: &'static str,
    end: &'static str,
}

impl Style {
    /// Less visible than the rest.
    pub const DIM: Style = Style { start: "\x1b[2m", end: "\x1b[0m" };
    /// For the word `error`.
    const ERROR: Style = Style { start: "\x1b[1;31m", end: "\x1b[0m" };
    const PLAIN: Style = Style { start: "", end: "" };

    /// This style on a stream with colours, nothing elsewhere.
    pub fn on(self, stream: &impl IsTerminal) -> Style {
        if has_colours(stream) { self } else { Style::PLAIN }
    }

    /// Whether it changes nothing.
    pub fn is_plain(self) -> bool {
        self.start.is_empty()
    }

    /// Escape code that starts it.
    pub fn start(self) -> &'static str {
        self.start
    }

    /// Escape code that ends it.
    pub fn end(self) -> &'static str {
        self.end
    }
}

/// Whether `stream` is a terminal whose user wants colours (<https://no-color.org>).
fn has_colours(stream: &impl IsTerminal) -> bool {
    let refused = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = env::var_os("TERM").is_some_and(|term| term == "dumb");
    stream.is_terminal() && !refused && !dumb
}

/// Prints the line for an error that ends the program.
pub fn print_error(error: &anyhow::Error) {
    let style = Style::ERROR.on(&io::stderr());
    let (start, end) = (style.start(), style.end());
    // Nothing can be done where even stderr is closed.
    let _ = writeln!(io::stderr(), "{start}error:{end} {error:#}");
}

/// Prints a remark to stderr.
pub fn note(text: impl Display) {
    let style = Style::DIM.on(&io::stderr());
    let _ = writeln!(io::stderr(), "{}{text}{}", style.start(), style.end());
}

/// Text of unknown origin without the control characters that a terminal would obey.
pub fn printable(text: &str) -> Cow<'_, str> {
    let obeyed = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !text.contains(obeyed) {
        return Cow::Borrowed(text);
    }
    text.chars().map(|c| if obeyed(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// A progress bar on stderr, invisible where that is no terminal.
pub fn progress_bar(length: u64, what: &str, unit: Unit) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr());
    let template = match unit {
        Unit::Tokens => "{msg} [{bar:30}] {pos}/{len} tokens{rate}{left}",
        Unit::Bytes => {
            "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}{left}"
        }
        Unit::Steps => "{msg} [{bar:30}] {pos}/{len}{left}",
    };
    let style = ProgressStyle::with_template(template).unwrap_or(ProgressStyle::default_bar());
    // There is nothing to go by before the first step.
    let rate = |state: &ProgressState, out: &mut dyn Write| {
        if state.pos() > 0 {
            let _ = write!(out, ", {:.1}/s", state.per_sec());
        }
    };
    let left = |state: &ProgressState, out: &mut dyn Write| {
        if state.pos() > 0 {
            let _ = write!(out, ", {:#} left", HumanDuration(state.eta()));
        }
    };
    bar.set_style(style.progress_chars("=> ").with_key("rate", rate).with_key("left", left));
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A sign on stderr that something is going on, invisible where that is no terminal.
pub fn spinner(what: &'static str) -> ProgressBar {
    let spinner = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    spinner.set_message(what);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// What a progress bar counts.
pub enum Unit {
    /// Tokens.
    Tokens,
    /// Bytes.
    Bytes,
    /// Anything else.
    Steps,
}

/// A number of bytes for reading, such as `8.9 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (n.max(1).ilog2() / 10).min(UNITS.len() as u32 - 1);
    match unit {
        0 => format!("{n} B"),
        _ => {
            let scaled = n as f64 / (1u64 << (10 * unit)) as f64;
            let digits = if scaled < 10.0 { 2 } else { 1 };
            format!("{scaled:.digits$} {}", UNITS[unit as usize])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_readable() {
        let shown = [0, 1023, 1024, 1536, 8 << 30, 81 << 30, u64::MAX].map(bytes);
        assert_eq!(
            shown,
            ["0 B", "1023 B", "1.00 KiB", "1.50 KiB", "8.00 GiB", "81.0 GiB", "16777216.0 TiB"]
        );
    }

    #[test]
    fn a_model_cannot_control_the_terminal() {
        assert_eq!(printable("a\tb\nü\u{1b}[2J\r\u{9b}x"), "a\tb\nü\u{fffd}[2J\u{fffd}\u{fffd}x");
        assert!(matches!(printable("plain"), Cow::Borrowed(_)));
    }
}
