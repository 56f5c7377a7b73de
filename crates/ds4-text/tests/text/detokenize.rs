//! Tokens to text, as they come.

use ds4_text::detokenize::{Channel, Detokenizer, OutputDelta, OutputSplitter, Utf8Decoder};
use proptest::prelude::*;

use crate::support::{full, tiny};

const EOS: u32 = 1;
const THINK: u32 = 128_821;
const END_THINK: u32 = 128_822;
const DSML: u32 = 128_825;

/// Splits the output for a prompt that ends in `opening`.
fn split(opening: &[u32], output: &[u32]) -> OutputDelta {
    let mut splitter = OutputSplitter::after_prompt(full(), opening);
    let mut whole = OutputDelta::default();
    let mut add = |delta: OutputDelta| {
        whole.reasoning.push_str(&delta.reasoning);
        whole.answer.push_str(&delta.answer);
    };
    output.iter().for_each(|&id| add(splitter.push(id)));
    add(splitter.finish());
    whole
}

/// The ids of text with markers in it.
fn ids(text: &str) -> Vec<u32> {
    full().encode_with_markers(text).unwrap()
}

fn delta(reasoning: &str, answer: &str) -> OutputDelta {
    OutputDelta { reasoning: reasoning.to_owned(), answer: answer.to_owned() }
}

#[test]
fn text_never_ends_inside_a_character() {
    let mut detokenizer = Detokenizer::new(full());
    let [first, last] = full().encode("🙂").unwrap()[..] else { panic!("two tokens") };
    assert_eq!(detokenizer.push(first), "");
    assert_eq!(detokenizer.push(last), "🙂");
    // A character that is never completed is replaced, and what follows is kept.
    assert_eq!(detokenizer.push(first), "");
    assert_eq!(detokenizer.push(67), "\u{FFFD}a");
    assert_eq!(detokenizer.push(first), "");
    assert_eq!(detokenizer.finish(), "\u{FFFD}");
    assert_eq!(Detokenizer::new(full()).finish(), "");
}

#[test]
fn markers_have_no_text_and_end_characters() {
    let mut detokenizer = Detokenizer::new(full());
    let [first, last] = full().encode("🙂").unwrap()[..] else { panic!("two tokens") };
    for id in [0, EOS, 2, 128_803, THINK, END_THINK, DSML, 129_279, 129_280, u32::MAX] {
        assert_eq!(detokenizer.push(id), "");
    }
    assert_eq!(detokenizer.push(first), "");
    assert_eq!(detokenizer.push(EOS), "\u{FFFD}");
    assert_eq!(detokenizer.push(last), "\u{FFFD}");
}

#[test]
fn invalid_bytes_cost_no_valid_text() {
    let mut decoder = Utf8Decoder::default();
    assert_eq!(decoder.push(b"a\xFFb\xE4\xBD"), "a\u{FFFD}b");
    assert_eq!(decoder.push(b"\xA0\xC3"), "\u{4F60}");
    assert_eq!(decoder.push(b"("), "\u{FFFD}(");
    assert_eq!(decoder.push(b"\xF0\x9F"), "");
    assert_eq!(decoder.finish(), "\u{FFFD}");
    assert_eq!(decoder.finish(), "");
    // Too long an encoding, a surrogate, and beyond the last character.
    assert_eq!(
        decoder.push(b"\xC0\x80\xED\xA0\x80\xF4\x90x"),
        format!("{}x", "\u{FFFD}".repeat(7))
    );
}

#[test]
fn output_is_split_at_the_marker() {
    let output = ids("\n\nhm, so\n</think>\n\nFour.\n\n");
    assert_eq!(split(&[128_804, THINK], &output), delta("hm, so", "Four.\n\n"));
    // Line ends inside either stay, and so do those of reasoning that is cut short.
    let output = ids("a\n\nb</think>c\n\n\nd");
    assert_eq!(split(&[THINK], &output), delta("a\n\nb", "c\n\n\nd"));
    assert_eq!(split(&[THINK], &ids("a\n\n")), delta("a\n\n", ""));
    assert_eq!(split(&[THINK], &ids("\n\n")), delta("", ""));
    assert_eq!(split(&[THINK], &[END_THINK]), delta("", ""));
}

#[test]
fn an_answer_without_thinking_begins_at_once() {
    assert_eq!(split(&[128_804, END_THINK], &ids("\n\nHi\n")), delta("", "Hi\n"));
    assert_eq!(split(&[], &ids("Hi")), delta("", "Hi"));
}

#[test]
fn markers_out_of_place_are_not_shown() {
    // A second end of reasoning is dropped, but what is after it is no beginning.
    assert_eq!(split(&[END_THINK], &ids("a</think>\nb")), delta("", "a\nb"));
    assert_eq!(split(&[END_THINK], &ids("a<think>b")), delta("", "a<think>b"));
    assert_eq!(split(&[END_THINK], &[67, EOS, 68, 2]), delta("", "ab"));
    assert_eq!(split(&[END_THINK], &[67, 129_280, 68]), delta("", "ab"));
}

#[test]
fn text_that_spells_a_marker_is_text() {
    let spelled = full().encode("a</think>b").unwrap();
    assert_eq!(split(&[THINK], &spelled), delta("a</think>b", ""));
}

#[test]
fn tool_calls_are_shown_as_they_are_written() {
    let call = "Wait.\n\n<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>";
    assert_eq!(split(&[END_THINK], &ids(call)), delta("", call));
    assert_eq!(split(&[THINK], &ids(call)), delta(call, ""));
}

#[test]
fn a_continued_answer_keeps_its_line_ends() {
    let splitter = OutputSplitter::after_prompt(full(), &[THINK, 67, END_THINK, 68]);
    assert_eq!(splitter.channel(), Channel::Answer);
    assert_eq!(split(&[THINK, 67, END_THINK, 68], &ids("\n\nc")), delta("", "\n\nc"));
    assert_eq!(split(&[THINK, 67], &ids("\n\nc")), delta("\n\nc", ""));
}

#[test]
fn reasoning_that_ends_inside_a_character_is_completed_before_the_answer() {
    let first = full().encode("🙂").unwrap()[0];
    let mut splitter = OutputSplitter::after_prompt(full(), &[THINK]);
    assert_eq!(splitter.push(first), delta("", ""));
    assert_eq!(splitter.push(END_THINK), delta("\u{FFFD}", ""));
    assert_eq!(splitter.channel(), Channel::Answer);
    assert_eq!(splitter.push(first), delta("", ""));
    assert_eq!(splitter.finish(), delta("", "\u{FFFD}"));
}

#[test]
fn other_vocabularies_have_other_markers() {
    let special = tiny().special().clone();
    let mut splitter = OutputSplitter::after_prompt(tiny(), &[special.think_start]);
    assert_eq!(splitter.push(67), delta("a", ""));
    assert_eq!(splitter.push(special.think_end), delta("", ""));
    assert_eq!(splitter.push(67), delta("", "a"));
}

proptest! {
    #[test]
    fn however_bytes_are_cut_the_text_is_the_same(
        bytes in proptest::collection::vec(interesting_byte(), 0..40),
        cuts in proptest::collection::vec(0usize..40, 0..12),
    ) {
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let mut decoder = Utf8Decoder::default();
        let mut text: String =
            cuts.windows(2).map(|cut| decoder.push(&bytes[cut[0]..cut[1]])).collect();
        text.push_str(decoder.finish());
        prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn any_tokens_give_the_text_of_their_bytes(ids in proptest::collection::vec(3u32..128_000, 0..30)) {
        let mut detokenizer = Detokenizer::new(full());
        let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        text.push_str(detokenizer.finish());
        prop_assert_eq!(&text, &full().decode(&ids));
        let whole = split(&[END_THINK, 67], &ids);
        prop_assert_eq!(whole, delta("", &text));
    }

    #[test]
    fn any_text_is_split_at_its_first_marker(reasoning in ".{0,30}\\PC", answer in "\\PC.{0,30}") {
        let mut output = full().encode(&reasoning).unwrap();
        output.push(END_THINK);
        output.extend(full().encode(&answer).unwrap());
        prop_assert_eq!(split(&[THINK], &output), delta(&reasoning, &answer));
    }
}

/// Bytes that begin, continue and break sequences, more often than chance would have them.
fn interesting_byte() -> impl Strategy<Value = u8> {
    prop_oneof![
        proptest::sample::select(vec![
            b'a', 0x80, 0x9F, 0xA0, 0xBF, 0xC2, 0xE0, 0xE4, 0xED, 0xEF, 0xF0, 0xF4, 0xFF
        ]),
        any::<u8>(),
    ]
}
