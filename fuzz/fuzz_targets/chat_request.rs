//! Reads arbitrary bytes as a chat request.
#![no_main]

use ds4_model::chat::ChatRequest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(request) = ChatRequest::from_json(bytes) {
        let _ = request.convert();
    }
});
