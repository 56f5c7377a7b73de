//! Text to ids and back.

use std::{
    sync::{Arc, Barrier, mpsc},
    time::Duration,
};

use proptest::prelude::*;

use crate::support::{FULL_VOCAB, Sample, data, full, read, tiny};

/// Texts that need the real pre-tokenizer: a splitter that knows only ASCII
/// gives other ids.
const DIFFICULT: [(&str, &[u32]); 16] = [
    ("    int", &[361, 688]),
    ("x = 10;\n\n", &[90, 438, 223, 553, 1048]),
    ("don't", &[20385, 1664]),
    ("1234567", &[6895, 18009, 25]),
    ("日本語テスト12345", &[88768, 109288, 6895, 1883]),
    ("a\n\n\nb", &[67, 6328, 68]),
    ("\r\nwin\r\n", &[204, 201, 11510, 204, 201]),
    ("e\u{301}te\u{301}", &[71, 17793, 592, 17793]),
    ("«ciao»", &[12389, 6539, 81, 3807]),
    ("x²+1", &[90, 1628, 13, 19]),
    ("中文，标点。", &[21134, 303, 1701, 985, 320]),
    ("🙂!", &[80300, 227, 3]),
    ("a\u{200B}b", &[67, 35020, 68]),
    ("٣٤٥", &[127056, 152, 100, 152, 101]),
    ("a \n b", &[67, 539, 291]),
    ("mixed中文abc", &[122545, 21134, 32372]),
];

#[test]
fn difficult_texts_have_the_right_ids() {
    for (text, ids) in DIFFICULT {
        assert_eq!(full().encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(full().decode(ids), text);
    }
}

/// A model's steps share their work among the threads of this pool, and a long prompt must not
/// hold them up, nor wait for them.
#[test]
fn long_texts_are_encoded_without_the_thread_pool() {
    let barrier = Arc::new(Barrier::new(rayon::current_num_threads() + 1));
    let busy = barrier.clone();
    rayon::spawn_broadcast(move |_| {
        busy.wait();
    });
    let (done, encoded) = mpsc::channel();
    std::thread::spawn(move || done.send(tiny().encode(&"some words ".repeat(20_000))));
    let encoded = encoded.recv_timeout(Duration::from_secs(60));
    barrier.wait();
    assert!(encoded.expect("no thread of the pool is free").unwrap().len() >= 40_000);
}

#[test]
fn sampled_texts_have_the_ids_of_the_reference_library() {
    let samples: Vec<Sample> =
        serde_json::from_slice(&read(&data("tokenizer-samples.json"))).unwrap();
    assert_eq!(samples.len(), 200);
    for Sample { text, ids } in samples {
        assert_eq!(full().encode(&text).unwrap(), ids, "{text:?}");
        assert_eq!(full().decode(&ids), text);
    }
}

#[test]
fn the_tiny_tokenizer_agrees_with_its_vectors() {
    #[derive(serde::Deserialize)]
    struct Vectors {
        rows: Vec<Sample>,
    }
    let vectors: Vectors =
        serde_json::from_slice(&read(&data("tiny-tokenizer-vectors.json"))).unwrap();
    assert!(vectors.rows.len() >= 30);
    for Sample { text, ids } in vectors.rows {
        assert_eq!(tiny().encode_with_markers(&text).unwrap(), ids, "{text:?}");
        assert_eq!(tiny().decode(&ids), text);
    }
}

#[test]
fn special_tokens_have_the_documented_ids() {
    let special = full().special().clone();
    assert_eq!((special.bos, special.eos), (0, 1));
    assert_eq!((special.user, special.assistant), (128_803, 128_804));
    assert_eq!((special.think_start, special.think_end), (128_821, 128_822));
    assert_eq!(special.dsml, 128_825);
    assert_eq!(special.latest_reminder, Some(128_828));
    for id in [0, 1, 128_803, 128_804] {
        assert!(special.ends_turn(id));
    }
    for id in [2, 128_821, 128_822, 128_825, 128_828, 5] {
        assert!(!special.ends_turn(id));
    }
    assert_eq!(tiny().special().think_end, 4080);
}

#[test]
fn markers_are_ids_only_where_asked_for() {
    let text = "<｜User｜>Hi<｜Assistant｜></think>";
    let marked = full().encode_with_markers(text).unwrap();
    assert_eq!(marked, [128_803, 23166, 128_804, 128_822]);
    let plain = full().encode(text).unwrap();
    assert!(plain.iter().all(|&id| !full().is_marker(id)), "{plain:?}");
    assert_eq!(full().decode(&plain), text);

    let longest = "<｜place▁holder▁no▁17｜>";
    assert_eq!(full().encode_with_markers(longest).unwrap(), [128_017]);
    assert_eq!(full().decode(&[128_017]), longest);
}

#[test]
fn every_marker_and_no_other_token_is_a_marker() {
    let markers: Vec<u32> = (0..FULL_VOCAB as u32).filter(|&id| full().is_marker(id)).collect();
    let expected: Vec<u32> = (0..3).chain(128_000..129_280).collect();
    assert_eq!(markers, expected);
    assert!(!full().is_marker(129_280) && !full().is_marker(u32::MAX));
}

#[test]
fn a_tool_call_block_has_the_reference_ids() {
    let block = "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n\
        <｜DSML｜parameter name=\"a\" string=\"true\">x</｜DSML｜parameter>\n\
        </｜DSML｜invoke>\n</｜DSML｜tool_calls>";
    let expected = [
        271, 30, 128825, 72461, 4941, 12548, 1018, 30, 128825, 40148, 5406, 2329, 1281, 72, 3816,
        30, 128825, 41523, 2329, 1281, 67, 4, 3418, 1281, 11476, 3320, 90, 1718, 128825, 41523,
        1018, 1718, 128825, 40148, 5406, 1018, 1718, 128825, 72461, 4941, 12548, 32,
    ];
    assert_eq!(full().encode_with_markers(block).unwrap(), expected);
}

#[test]
fn pieces_are_one_line_each() {
    let ids = full().encode("a\t\r\n é🙂\u{200B}\\").unwrap();
    for &id in &ids {
        assert!(!full().piece(id).chars().any(char::is_control));
    }
    assert_eq!(full().piece(201), "\\n");
    assert_eq!(full().piece(223), " ");
    assert_eq!(full().piece(0), "<｜begin▁of▁sentence｜>");
    // Half of a character: the first three bytes of 🙂, then the last.
    assert_eq!(full().encode("🙂").unwrap(), [80300, 227]);
    assert_eq!(full().piece(80300), "\\xF0\\x9F\\x99");
    assert_eq!(full().piece(227), "\\x82");
    assert_eq!(full().piece(129_280), "[no token 129280]");
}

#[test]
fn ids_without_a_token_have_no_bytes() {
    assert_eq!(full().len(), FULL_VOCAB);
    assert_eq!(full().bytes_of(80300), Some(&[0xF0, 0x9F, 0x99][..]));
    assert_eq!(full().bytes_of(129_280), None);
    assert_eq!(full().decode(&[67, 129_280, 68]), "ab");
}

#[test]
fn long_texts_have_the_ids_of_their_paragraphs() {
    // Each begins with a letter and ends with a line end, between which no
    // token lies; together they are long enough for several segments.
    let samples: Vec<Sample> =
        serde_json::from_slice(&read(&data("tokenizer-samples.json"))).unwrap();
    let paragraphs: Vec<String> =
        samples.iter().cycle().take(3000).map(|sample| format!("A{}.\n", sample.text)).collect();
    let ids: Vec<u32> = paragraphs.iter().flat_map(|text| full().encode(text).unwrap()).collect();
    let text = paragraphs.concat();
    assert!(text.len() > 300_000);
    assert_eq!(full().encode(&text).unwrap(), ids);
    assert_eq!(full().decode(&ids), text);
    let mut pauses = 0;
    assert_eq!(full().encode_pausing(&text, &mut || pauses += 1).unwrap(), ids);
    assert!(pauses > text.len() / 2048, "{pauses} pauses");
}

#[test]
fn a_text_without_words_is_refused_before_it_costs_memory() {
    let text = " ".repeat(20_000_000);
    let error = full().encode(&text).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the text has 20000000 bytes without the end of a word from byte 0 on, expected at most 1048576"
    );
}

proptest! {
    #[test]
    fn any_text_survives(text in any::<String>()) {
        let ids = full().encode(&text).unwrap();
        prop_assert!(ids.iter().all(|&id| !full().is_marker(id)));
        prop_assert_eq!(full().decode(&ids), text);
    }
}
