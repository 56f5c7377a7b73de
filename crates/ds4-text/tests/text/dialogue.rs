//! Conversations at a terminal.

use ds4_text::{
    dialogue::Dialogue,
    profile::{Profile, Thinking},
    prompt::{PromptEncoder, shared_prefix},
};

use crate::support::full;

const BOS: &str = "<｜begin▁of▁sentence｜>";
const EOS: &str = "<｜end▁of▁sentence｜>";

#[test]
fn a_dialogue_grows_by_turns() {
    let encoder = PromptEncoder::new(full(), Profile::V0731);
    let encode = |dialogue: &Dialogue| encoder.encode(dialogue.conversation()).unwrap();

    let mut dialogue = Dialogue::new(Some("Be brief.".to_owned()), Thinking::Off);
    dialogue.ask("2+2?");
    let first = encode(&dialogue);
    assert_eq!(first.text, format!("{BOS}Be brief.<｜User｜>2+2?<｜Assistant｜></think>"));

    // Without thinking, the next prompt continues what the session holds.
    let mut session = first.ids.clone();
    session.extend(full().encode("4").unwrap());
    dialogue.answer("", "4");
    dialogue.ask("3+3?");
    let second = encode(&dialogue);
    assert_eq!(shared_prefix(&session, &second.ids), session.len());
    assert_eq!(
        full().decode(&second.ids[session.len()..]),
        format!("{EOS}<｜User｜>3+3?<｜Assistant｜></think>")
    );

    // With thinking, the answer before is rendered without its reasoning.
    dialogue.set_thinking(Thinking::Low);
    let mut session = encode(&dialogue).ids;
    let header = session.len() - 1;
    session.extend(full().encode_with_markers("easy</think>6").unwrap());
    dialogue.answer("easy", "6");
    dialogue.ask("4+4?");
    let third = encode(&dialogue);
    assert_eq!(shared_prefix(&session, &third.ids), header);
    assert_eq!(
        full().decode(&third.ids[header..]),
        format!("</think>6{EOS}<｜User｜>4+4?<｜Assistant｜><think>")
    );
}
