//! `ds4 eval`: graded suites of prompts.

mod journal;

use std::{
    cell::Cell,
    collections::HashMap,
    io::{self, Write},
    num::NonZeroUsize,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Result, ensure};
use clap::Args;
use ds4_eval::{
    Error, nano,
    runner::{self, Answer, Settings, Verdict},
    suite::{self, Case},
    summary::{self, TaskSummary},
};
use ds4_text::tokenizer::Tokenizer;
use serde::Serialize;

use self::journal::Journal;
use crate::{
    compute::ComputeArgs,
    interrupt::{self, Again},
    model::ModelArgs,
    terminal::{self, Unit},
    text::ProfileArgs,
};

/// Cases of each task of a built-in suite: some minutes on two cores.
const CASES: usize = 40;

/// Options of `ds4 eval`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  ds4 eval --suite nano                      what the built-in model can do
  ds4 eval --suite nano --seed 7 --cases 20  other cases, and fewer
  ds4 eval --suite mine.jsonl -m flash.gguf --resume answers.jsonl

A suite has one JSON object a line, such as
{\"task\": \"sums\", \"prompt\": \"What is 2 + 2?\", \"grade\": {\"type\": \"numeric\", \"answer\": 4}}
Tokens are the likeliest ones. The interval is the 95 % confidence interval of the score.")]
pub struct EvalArgs {
    /// Suite: nano, or a file of cases
    #[arg(long, value_name = "nano|FILE.jsonl", default_value = "nano")]
    suite: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    profile: ProfileArgs,
    /// Seed of a built-in suite's cases [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Cases of each task [default: all, or 40 of a built-in suite, which takes a quarter of
    /// them at 4,000 tokens and a tenth at 16,000]
    #[arg(long, value_name = "N")]
    cases: Option<NonZeroUsize>,
    /// Only tasks whose names contain this text
    #[arg(long, value_name = "TEXT")]
    task: Option<String>,
    /// Cases that are answered at once
    #[arg(long, value_name = "N", default_value = "16")]
    parallel: NonZeroUsize,
    /// Tokens that an answer may have, where the case doesn't say
    #[arg(short = 'n', long = "tokens", value_name = "N", default_value = "16000")]
    answer_tokens: NonZeroUsize,
    /// Keep answers in this file, and grade those that are in it instead of answering again
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

#[derive(Serialize)]
struct Report<'a> {
    suite: String,
    seed: Option<u64>,
    complete: bool,
    tasks: &'a [TaskSummary],
    answers: &'a [Answer],
}

/// Answers and reports. Ctrl-C reports what there is.
pub fn run(args: &EvalArgs) -> Result<ExitCode> {
    let model = args.model.open()?;
    // Before anything else that computes in parallel, such as making prompts.
    let context = args.answer_tokens.get().saturating_mul(args.parallel.get());
    let engine = args.compute.engine(model.clone(), context)?;
    let encoder = args.profile.encoder(&model)?;
    let cases = args.cases(encoder.tokenizer())?;
    let (mut journal, earlier) = match args.resume.as_deref().map(Journal::open).transpose()? {
        Some((journal, earlier)) => (Some(journal), earlier),
        None => (None, Vec::new()),
    };
    let (mut answers, waiting) = runner::resume(&cases, earlier);

    interrupt::catch(Again::Exit)?;
    let bar = terminal::progress_bar(cases.len() as u64, "answering", Unit::Steps);
    bar.set_position(answers.len() as u64);
    engine.warm_up(args.parallel.get())?;
    let settings = Settings { at_once: args.parallel.get(), max_tokens: args.answer_tokens.get() };
    let start = Instant::now();
    let is_right = |answer: &Answer| answer.verdict == Verdict::Right;
    let right = Cell::new(answers.iter().filter(|answer| is_right(answer)).count());
    let result = runner::run(
        engine,
        &encoder,
        &waiting,
        settings,
        |answer| {
            right.set(right.get() + usize::from(is_right(&answer)));
            if let Some(journal) = &mut journal {
                journal.add(&answer)?;
            }
            answers.push(answer);
            bar.inc(1);
            Ok(())
        },
        |status| {
            let rate = status.tokens as f64 / start.elapsed().as_secs_f64();
            let answered = bar.position();
            let right = right.get();
            bar.set_message(format!("{right} of {answered} right, {rate:.0} tokens/s"));
            if interrupt::pressed() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        },
    );
    bar.finish_and_clear();
    let complete = !matches!(result, Err(Error::Stopped));
    if complete {
        result?;
    }
    // In the order of the suite, whatever was done first.
    let order: HashMap<&str, usize> =
        cases.iter().enumerate().map(|(i, case)| (case.id.as_str(), i)).collect();
    answers.sort_by_key(|answer| order.get(answer.id.as_str()).copied());
    args.print(&answers, complete)?;
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::from(interrupt::EXIT_CODE) })
}

impl EvalArgs {
    fn is_built_in(&self) -> bool {
        self.suite == Path::new("nano")
    }

    fn cases(&self, tokenizer: &Tokenizer) -> Result<Vec<Case>> {
        let limit = self.cases.map(NonZeroUsize::get);
        let mut cases = if self.is_built_in() {
            nano::cases(tokenizer, self.seed.unwrap_or(0), limit.unwrap_or(CASES))
        } else {
            ensure!(self.seed.is_none(), "--seed: the cases of a file are what they are");
            suite::read(&self.suite)?
        };
        if let Some(task) = &self.task {
            cases.retain(|case| case.task.contains(task));
            ensure!(!cases.is_empty(), "--task {task}: no task of the suite has that in its name");
        }
        let mut of_task: HashMap<String, usize> = HashMap::new();
        cases.retain(|case| {
            let count = of_task.entry(case.task.clone()).or_default();
            *count += 1;
            *count <= limit.unwrap_or(usize::MAX)
        });
        Ok(cases)
    }

    fn print(&self, answers: &[Answer], complete: bool) -> Result<()> {
        let tasks = summary::by_task(answers);
        let mut out = io::stdout().lock();
        if self.json {
            let seed = self.is_built_in().then(|| self.seed.unwrap_or(0));
            let suite = self.suite.display().to_string();
            let report = Report { suite, seed, complete, tasks: &tasks, answers };
            writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
            return Ok(());
        }
        let width = tasks.iter().map(|t| t.task.chars().count()).max().unwrap_or(0).max(4);
        writeln!(out, "{:width$}  cases  right   score  95 % interval   ended", "task")?;
        for task in &tasks {
            let name = terminal::printable(&task.task);
            let (score, low, high) = (100.0 * task.score, 100.0 * task.low, 100.0 * task.high);
            let ended = 100.0 - 100.0 * task.cut as f64 / task.cases.max(1) as f64;
            writeln!(
                out,
                "{name:width$}  {:5}  {:5}  {score:5.1}%  {low:5.1} – {high:5.1}  {ended:5.1}%",
                task.cases, task.right,
            )?;
        }
        Ok(())
    }
}
