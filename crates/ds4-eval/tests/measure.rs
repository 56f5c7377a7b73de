//! Measurements of a whole model, of random weights: what must hold for any.

use std::{collections::HashSet, ops::ControlFlow, path::Path, sync::Arc};

use ds4_cpu::{CpuBackend, Kernels};
use ds4_engine::{Engine, rows::CacheRounding};
use ds4_eval::{
    Error,
    divergence::Divergence,
    grade::Grader,
    logits_file::{Header, LogitsReader, LogitsWriter},
    nano,
    perplexity::{Perplexity, Reading, Text, log_probability, read},
    runner::{self, Answer, Settings},
    suite::Case,
    summary,
};
use ds4_model::Model;
use ds4_text::{profile::Profile, prompt::PromptEncoder, tokenizer::Tokenizer};
use serde_json::json;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny/tiny-b-q2.gguf");
const GO_ON: ControlFlow<()> = ControlFlow::Continue(());

struct Setup {
    model: Arc<Model>,
    kernels: Kernels,
    engine: Engine,
    tokenizer: Arc<Tokenizer>,
}

fn engine(model: Arc<Model>, kernels: Kernels) -> Engine {
    Engine::new(CpuBackend::new(model, kernels, CacheRounding::Off))
}

impl Setup {
    fn new(kernels: Kernels) -> Self {
        let model = Arc::new(Model::open(Path::new(TINY)).unwrap());
        let tokenizer = Tokenizer::from_gguf(&model.files()[0], model.config.vocab).unwrap();
        let engine = engine(model.clone(), kernels);
        Setup { model, kernels, engine, tokenizer: Arc::new(tokenizer) }
    }

    fn encoder(&self) -> PromptEncoder {
        PromptEncoder::new(self.tokenizer.clone(), Profile::Preview)
    }

    fn text(&self) -> Text {
        let words = include_str!("../../../README.md").repeat(2);
        let tokens = self.tokenizer.encode(&words).unwrap();
        let bos = Some(self.tokenizer.special().bos);
        Text::new(&tokens[..350], bos, 200).unwrap()
    }

    fn perplexity(&self, reading: Reading) -> Perplexity {
        let mut perplexity = Perplexity::default();
        let mut computed = 0;
        let score = |token, logits: &[f32]| {
            perplexity.add(-log_probability(logits, token)?);
            Ok(())
        };
        let progress = |tokens| {
            computed = tokens;
            GO_ON
        };
        read(&self.engine, &self.text(), reading, score, progress).unwrap();
        assert_eq!(computed, self.text().computed());
        perplexity
    }

    fn run(
        &self,
        cases: &[&Case],
        settings: Settings,
        answered: impl FnMut(Answer) -> ds4_eval::Result<()>,
    ) -> ds4_eval::Result<()> {
        let engine = engine(self.model.clone(), self.kernels);
        runner::run(engine, &self.encoder(), cases, settings, answered, |_| GO_ON)
    }

    fn answers(&self, cases: &[Case], at_once: usize) -> Vec<Answer> {
        let mut answers = Vec::new();
        let settings = Settings { at_once, max_tokens: 12 };
        let cases: Vec<&Case> = cases.iter().collect();
        let answered = |answer| {
            answers.push(answer);
            Ok(())
        };
        self.run(&cases, settings, answered).unwrap();
        answers.sort_by(|a, b| a.id.cmp(&b.id));
        answers
    }
}

#[test]
fn prefill_and_decode_have_the_same_perplexity() {
    let setup = Setup::new(Kernels::Reference);
    let (prefill, decode) = (setup.perplexity(Reading::Prefill), setup.perplexity(Reading::Decode));
    assert_eq!(prefill.scored, setup.text().scored());
    assert_eq!(prefill.scored, decode.scored);
    assert!((prefill.nll - decode.nll).abs() < 1e-9 * prefill.nll, "{prefill:?} {decode:?}");
    // Random weights know nothing, and say so or are confidently wrong.
    assert!(prefill.mean() > (setup.engine.config().vocab as f64).ln(), "{}", prefill.mean());
}

#[test]
fn a_model_does_not_diverge_from_its_own_saved_predictions() {
    let setup = Setup::new(Kernels::Reference);
    let text = setup.text();
    let file = tempfile::NamedTempFile::new().unwrap();
    let header = Header {
        vocab: setup.engine.config().vocab,
        rows: text.scored(),
        text: text.hash(),
        model: setup.engine.backend().model_identity(),
    };
    let mut writer = LogitsWriter::create(file.path(), &header).unwrap();
    let save = |_, logits: &[f32]| writer.add(logits);
    read(&setup.engine, &text, Reading::Prefill, save, |_| GO_ON).unwrap();
    writer.finish().unwrap();

    let summary = |setup: &Setup| {
        let mut reader = LogitsReader::open(file.path()).unwrap();
        reader.check(setup.engine.config().vocab, &text.hash()).unwrap();
        let mut divergence = Divergence::default();
        let compare = |_, logits: &[f32]| divergence.add(reader.next_row()?, logits);
        read(&setup.engine, &text, Reading::Prefill, compare, |_| GO_ON).unwrap();
        divergence.summary().unwrap()
    };
    let same = summary(&setup);
    assert_eq!((same.positions, same.top1), (text.scored(), 1.0));
    assert!(same.max < 1e-6 && same.mean >= 0.0, "{same:?}");
    if let Some(other) = Kernels::available().last().filter(|_| Kernels::available().len() > 1) {
        let other = summary(&Setup::new(*other));
        assert!(other.mean > same.mean && other.top1 > 0.7, "{other:?}");
        assert!(other.median <= other.p99 && other.p99 <= other.max);
    }
}

#[test]
fn reading_stops_when_told() {
    let setup = Setup::new(Kernels::detect());
    let stop = |_| ControlFlow::Break(());
    let result = read(&setup.engine, &setup.text(), Reading::Decode, |_, _| Ok(()), stop);
    assert!(matches!(result, Err(Error::Stopped)));
}

fn some_cases() -> Vec<Case> {
    let case = |i: usize| {
        let value = json!({
            "id": format!("case {i:02}"), "task": if i.is_multiple_of(2) { "even" } else { "odd" },
            "prompt": "a b c ".repeat(1 + 40 * (i % 4)), "thinking": i.is_multiple_of(3),
            "max_tokens": 3 + i, "grade": { "type": "regex", "pattern": "^" },
        });
        Case::from_json(value, i).unwrap()
    };
    (0..9).map(case).collect()
}

#[test]
fn answers_do_not_depend_on_how_many_run_at_once() {
    let setup = Setup::new(Kernels::Reference);
    let cases = some_cases();
    let alone = setup.answers(&cases, 1);
    assert_eq!(alone.len(), cases.len());
    assert_eq!(setup.answers(&cases, 4), alone);
    assert_eq!(setup.answers(&cases, 100), alone);
    for (i, answer) in alone.iter().enumerate() {
        assert!(answer.answer_tokens <= 3 + i);
        assert_eq!(answer.cut, answer.answer_tokens == 3 + i, "{answer:?}");
    }
    let summaries = summary::by_task(&alone);
    let counts: Vec<_> = summaries.iter().map(|s| (s.task.as_str(), s.cases, s.right)).collect();
    assert_eq!(counts, [("even", 5, 5), ("odd", 4, 4), ("all", 9, 9)]);
}

#[test]
fn earlier_answers_are_graded_again_if_the_case_is_the_same() {
    let setup = Setup::new(Kernels::Reference);
    let mut cases = some_cases();
    let answers = setup.answers(&cases[..5], 3);
    let stored: Vec<Answer> = answers
        .iter()
        .map(|answer| serde_json::from_str(&serde_json::to_string(answer).unwrap()).unwrap())
        .collect();
    assert_eq!(stored, answers);
    let (kept, rest) = runner::resume(&cases, stored.clone());
    assert_eq!((&kept, rest.len()), (&answers, 4));

    // A stricter grader for one case, and another prompt (so another hash) for the next.
    cases[0].grader = Grader::Regex { pattern: "$.".to_owned() };
    cases[1].hash = [0; 32];
    let (kept, rest) = runner::resume(&cases, stored);
    assert_eq!((kept.len(), rest.len()), (4, 5));
    assert_eq!(kept[0].verdict, runner::Verdict::Wrong);
}

#[test]
fn a_run_stops_when_told_and_keeps_what_was_answered() {
    let setup = Setup::new(Kernels::detect());
    let cases = some_cases();
    let cases: Vec<&Case> = cases.iter().collect();
    let mut answers = Vec::new();
    let answered = |answer: Answer| {
        answers.push(answer.id);
        Ok(())
    };
    let stop = |status: runner::Status| match status.answered {
        2 => ControlFlow::Break(()),
        _ => GO_ON,
    };
    let settings = Settings { at_once: 3, max_tokens: 12 };
    let engine = engine(setup.model.clone(), setup.kernels);
    let result = runner::run(engine, &setup.encoder(), &cases, settings, answered, stop);
    assert!(matches!(result, Err(Error::Stopped)));
    assert_eq!(answers.len(), 2);
}

#[test]
fn cases_that_are_too_long_are_refused() {
    let setup = Setup::new(Kernels::detect());
    let value = json!({ "id": "x", "prompt": "a", "max_tokens": 10_000_000,
        "grade": { "type": "exact", "answer": "a" } });
    let case = Case::from_json(value, 0).unwrap();
    let settings = Settings { at_once: 1, max_tokens: 1 };
    let run = setup.run(&[&case], settings, |_| Ok(()));
    assert!(run.unwrap_err().to_string().starts_with("case x: 100000"));
}

#[test]
fn built_in_cases_follow_from_their_seed_and_have_their_length() {
    let setup = Setup::new(Kernels::detect());
    let cases = nano::cases(&setup.tokenizer, 1, 3);
    // One each of the four with long texts.
    assert_eq!(cases.len(), 3 * (nano::tasks().count() - 4) + 4);
    let hashes = |cases: &[Case]| cases.iter().map(|case| case.hash).collect::<Vec<_>>();
    assert_eq!(hashes(&nano::cases(&setup.tokenizer, 1, 3)), hashes(&cases));
    let others = hashes(&nano::cases(&setup.tokenizer, 2, 3));
    let all: HashSet<_> = hashes(&cases).into_iter().chain(others).collect();
    assert_eq!(all.len(), 2 * cases.len(), "every case is new");
    assert_eq!(hashes(&nano::cases(&setup.tokenizer, 1, 1))[0], cases[0].hash);

    let encoder = setup.encoder();
    for case in &cases {
        let encoded = encoder.encode(&case.conversation).unwrap();
        for (task, length) in [("needle 500", 500), ("needle 4k", 4000), ("needle 16k", 15_600)] {
            if case.task.starts_with(task) {
                let n = encoded.ids.len() as i64;
                assert!((n - length).abs() < 120 + length / 20, "{}: {n} tokens", case.id);
            }
        }
        if let Grader::Contains { answer: ds4_eval::grade::Texts::One(answer), not } = &case.grader
        {
            if !case.task.starts_with("tool") {
                assert!(encoded.text.contains(answer.as_str()), "{}", case.id);
                assert!(not.iter().all(|text| encoded.text.contains(text.as_str())));
            }
            assert!(case.grader.is_right(&format!("It is {answer}.")), "{}", case.id);
            for other in not {
                assert!(!case.grader.is_right(&format!("It is {other}.")), "{}", case.id);
            }
        }
    }
}
