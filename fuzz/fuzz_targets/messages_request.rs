#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ds4_fuzz::run("messages_request", bytes));
