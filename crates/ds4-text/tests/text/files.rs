//! Tokenizers in files that are wrong in one place, and what is said about them.

use ds4_text::{
    profile::{Profile, Thinking},
    tokenizer::Tokenizer,
};
use gguf::{FileLayout, GgufFile, Value};

use crate::support::full_gguf;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";

/// The markers of the smallest vocabulary that works, which come first in it.
const MARKERS: [&str; 7] = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
];
/// Its tokens: the markers, the bytes, and `ab` and `abc`.
const VOCAB: usize = MARKERS.len() + 256 + 2;

/// The metadata of a small tokenizer, to be changed and written.
struct Small(Vec<(String, Value)>);

impl Small {
    fn new() -> Self {
        // In the alphabet of files, printable Latin-1 spells itself.
        let bytes = (0..=255).map(|byte: u8| match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte).to_string(),
            _ => char::from_u32(0x100 + unprintable_before(byte)).unwrap().to_string(),
        });
        let tokens: Vec<String> = MARKERS
            .map(str::to_owned)
            .into_iter()
            .chain(bytes)
            .chain(["ab", "abc"].map(str::to_owned))
            .collect();
        let merges = vec!["a b".to_owned(), "ab c".to_owned()];
        Small(vec![
            (MODEL.to_owned(), "gpt2".into()),
            (PRE.to_owned(), "joyai-llm".into()),
            (TOKENS.to_owned(), tokens.into()),
            (TYPES.to_owned(), right_types().into()),
            (MERGES.to_owned(), merges.into()),
            (BOS.to_owned(), 0u32.into()),
            (EOS.to_owned(), 1u32.into()),
        ])
    }

    fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self = self.without(key);
        self.0.push((key.to_owned(), value.into()));
        self
    }

    fn without(mut self, key: &str) -> Self {
        self.0.retain(|(other, _)| other != key);
        self
    }

    /// The tokens with number `id` replaced.
    fn with_token(self, id: usize, token: &str) -> Self {
        let mut tokens = self.tokens();
        tokens[id] = token.to_owned();
        self.with(TOKENS, tokens)
    }

    fn with_merges(self, merges: &[&str]) -> Self {
        self.with(MERGES, merges.iter().map(|&merge| merge.to_owned()).collect::<Vec<_>>())
    }

    fn with_type(self, id: usize, ty: i32) -> Self {
        let mut types = right_types();
        types[id] = ty;
        self.with(TYPES, types)
    }

    fn tokens(&self) -> Vec<String> {
        self.file().metadata().strings(TOKENS).unwrap().to_vec()
    }

    fn file(&self) -> GgufFile {
        let layout = FileLayout::new("small.gguf", &self.0, &[]).unwrap();
        GgufFile::from_vec("small.gguf", layout.header().to_vec()).unwrap()
    }

    fn load(&self) -> Result<Tokenizer, String> {
        Tokenizer::from_gguf(&self.file(), VOCAB).map_err(|error| error.to_string())
    }
}

/// Control for the markers, normal for the rest.
fn right_types() -> Vec<i32> {
    (0..VOCAB).map(|id| if id < MARKERS.len() { 3 } else { 1 }).collect()
}

fn unprintable_before(byte: u8) -> u32 {
    (0..byte).filter(|&b| !matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)).count() as u32
}

#[test]
fn the_small_tokenizer_works() {
    let tokenizer = Small::new().load().unwrap();
    assert_eq!(tokenizer.len(), VOCAB);
    assert!(tokenizer.warnings().is_empty());
    let ids = tokenizer.encode("abcab\0é").unwrap();
    assert_eq!(ids[..2], [VOCAB as u32 - 1, VOCAB as u32 - 2]);
    assert_eq!(tokenizer.decode(&ids), "abcab\0é");
    assert_eq!(tokenizer.special().latest_reminder, None);
}

#[test]
fn damaged_tokenizers_are_refused_with_a_reason() {
    let a = MARKERS.len() + usize::from(b'a');
    let cases = [
        (Small::new().without(MODEL), "missing key tokenizer.ggml.model"),
        (Small::new().with(MODEL, 5u32), "key tokenizer.ggml.model: found u32 5, expected string"),
        (
            Small::new().with(MODEL, "llama"),
            "tokenizer.ggml.model: found llama, expected gpt2 (byte-level BPE)",
        ),
        (Small::new().without(TOKENS), "missing key tokenizer.ggml.tokens"),
        (
            Small::new().with(TOKENS, vec!["a".to_owned()]),
            "tokenizer.ggml.tokens: found 1 entries, expected 265",
        ),
        (
            Small::new().with_token(a, "b"),
            "tokenizer.ggml.tokens[105]: found b, which is token 104 too, expected tokens that differ",
        ),
        (
            Small::new().with_token(VOCAB - 1, ""),
            "tokenizer.ggml.tokens[264]: found an empty token, expected text",
        ),
        (
            Small::new().with_token(a, "aa"),
            "tokenizer.ggml.tokens: no token for byte 0x61, expected all 256",
        ),
        (
            Small::new().with_type(a, 3),
            "tokenizer.ggml.tokens: no token for byte 0x61, expected all 256",
        ),
        (
            Small::new().with_token(5, "<end>"),
            "tokenizer.ggml.tokens: no token </think>, which prompts of this model need",
        ),
        (Small::new().without(TYPES), "missing key tokenizer.ggml.token_type"),
        (
            Small::new().with(TYPES, vec![1i32]),
            "tokenizer.ggml.token_type: found 1 entries, expected 265",
        ),
        (Small::new().with_type(9, 0), "tokenizer.ggml.token_type[9]: found 0, expected 1 to 6"),
        (Small::new().with_type(9, 7), "tokenizer.ggml.token_type[9]: found 7, expected 1 to 6"),
        (
            Small::new().with_type(9, -1),
            "key tokenizer.ggml.token_type: found array of i32, expected array of non-negative 32-bit integers",
        ),
        (Small::new().without(MERGES), "missing key tokenizer.ggml.merges"),
        (
            Small::new().with_merges(&["a b", "abc"]),
            "tokenizer.ggml.merges[1]: found abc, expected two tokens with a space between",
        ),
        (
            Small::new().with_merges(&["a z"]),
            "tokenizer.ggml.merges[0]: found az in a z, expected a known token",
        ),
        (
            Small::new().with_merges(&["a bb"]),
            "tokenizer.ggml.merges[0]: found bb in a bb, expected a known token",
        ),
        (
            Small::new().with_merges(&["a b c"]),
            "tokenizer.ggml.merges[0]: found b c in a b c, expected a known token",
        ),
        (
            Small::new().with_merges(&[" ab"]),
            "tokenizer.ggml.merges[0]: found  in  ab, expected a known token",
        ),
        (
            // Markers are not made of text.
            Small::new().with_merges(&["<think> a"]),
            "tokenizer.ggml.merges[0]: found <think> in <think> a, expected a known token",
        ),
        (
            Small::new().with(BOS, 265u32),
            "tokenizer.ggml.bos_token_id: found 265, expected less than 265",
        ),
        (
            Small::new().with(EOS, u64::MAX),
            "tokenizer.ggml.eos_token_id: found 18446744073709551615, expected less than 265",
        ),
        (
            Small::new().with(EOS, -1i32),
            "key tokenizer.ggml.eos_token_id: found i32 -1, expected non-negative integer",
        ),
    ];
    for (small, expected) in cases {
        let error = small.load().map(|_| ()).unwrap_err();
        assert_eq!(error, format!("small.gguf: {expected}"));
    }
}

#[test]
fn long_and_binary_names_are_escaped_and_cut_in_messages() {
    let name = format!("\u{1b}[31m{}", "x".repeat(5000));
    let error = Small::new().with(MODEL, name.as_str()).load().map(|_| ()).unwrap_err();
    assert!(error.starts_with("small.gguf: tokenizer.ggml.model: found \\u{1b}[31mxxx"), "{error}");
    assert!(error.len() < 250 && !error.contains('\u{1b}'));
}

#[test]
fn a_marker_is_one_even_if_the_file_calls_it_text() {
    let user = 2;
    let tokenizer = Small::new().with_type(user, 1).load().unwrap();
    assert!(tokenizer.is_marker(user as u32));
    assert_eq!(tokenizer.encode_with_markers("<｜User｜>").unwrap(), [2]);
    assert!(!tokenizer.encode("<｜User｜>").unwrap().contains(&2));
}

#[test]
fn an_unknown_pre_tokenizer_is_only_warned_of() {
    assert!(Small::new().with(PRE, "deepseek-v3").load().unwrap().warnings().is_empty());
    let tokenizer = Small::new().with(PRE, "other").load().unwrap();
    assert_eq!(
        tokenizer.warnings(),
        [
            "small.gguf: tokenizer.ggml.pre: found other, expected joyai-llm or deepseek-v3: text is split as these say"
        ]
    );
    assert_eq!(Small::new().without(PRE).load().unwrap().warnings().len(), 1);
}

#[test]
fn the_profile_is_told_by_the_length_of_a_table_or_by_a_name() {
    let with_ratios = |layers: u32, ratios: usize| {
        Small::new()
            .with("deepseek4.block_count", layers)
            .with("deepseek4.attention.compress_ratios", vec![0u32; ratios])
    };
    let profile = |small: Small| Profile::of(&small.file()).unwrap();
    assert_eq!(profile(with_ratios(43, 44)), Profile::Preview);
    assert_eq!(profile(with_ratios(43, 46)), Profile::V0731);
    assert_eq!(profile(with_ratios(43, 43)), Profile::Preview);
    assert_eq!(profile(Small::new()), Profile::Preview);
    let named = |key: &str, name: &str| profile(with_ratios(43, 44).with(key, name));
    assert_eq!(named("general.name", "DeepSeek V4 Flash"), Profile::Preview);
    assert_eq!(named("general.name", "DeepSeek-V4-Flash-0731"), Profile::V0731);
    assert_eq!(named("general.basename", "DeepSeek V4 Vision Exp"), Profile::V0731);
    let preview = with_ratios(43, 46).with("general.name", "DeepSeek V4 Flash Preview");
    assert_eq!(profile(preview), Profile::Preview);
    assert_eq!(Profile::of(&full_gguf()).unwrap(), Profile::Preview);
}

#[test]
fn models_of_the_next_generation_are_refused() {
    let small = Small::new().with_token(VOCAB - 1, "<｜System｜>");
    assert_eq!(
        Profile::of(&small.file()).unwrap_err().to_string(),
        "small.gguf: tokenizer.ggml.tokens: found <｜System｜>, a marker of DeepSeek V4.1, \
         expected the markers of DeepSeek V4: V4.1 prompts are another dialect"
    );
}

#[test]
fn profiles_and_efforts_have_words() {
    for profile in [Profile::Preview, Profile::V0731] {
        assert_eq!(profile.to_string().parse(), Ok(profile));
    }
    assert_eq!(
        "v4.1".parse::<Profile>().unwrap_err().to_string(),
        "found v4.1, expected preview or 0731"
    );
    let words = [
        ("none", Thinking::Off),
        ("minimal", Thinking::Low),
        ("low", Thinking::Low),
        ("medium", Thinking::High),
        ("high", Thinking::High),
        ("xhigh", Thinking::High),
        ("ultra", Thinking::High),
        ("max", Thinking::Max),
    ];
    for (word, thinking) in words {
        assert_eq!(word.parse(), Ok(thinking));
    }
    assert!("High".parse::<Thinking>().is_err());
}
