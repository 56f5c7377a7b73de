//! Reads arbitrary bytes as a text completion request, as the server does.
#![no_main]

use ds4_text::request::{self, completions};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = request::parse(bytes).and_then(completions::read);
});
