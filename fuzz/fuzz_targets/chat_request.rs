//! Reads arbitrary bytes as a Chat Completions request, as the server does.
#![no_main]

use ds4_text::request::{self, chat};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = request::parse(bytes).and_then(chat::read);
});
