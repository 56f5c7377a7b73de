//! `ds4 run`: one answer, or a conversation at the terminal.

mod conversation;
mod printer;
mod repl;
mod report;
mod turn;

use std::{
    fs,
    io::{self, IsTerminal, Read},
    num::NonZeroUsize,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use ds4_engine::{Engine, sampling::SamplingParams};
use ds4_runtime::{Limits, Runtime};
use ds4_text::{dialogue::Dialogue, profile::Thinking, tokenizer::Tokenizer};

use crate::{
    compute::ComputeArgs,
    interrupt::{self, Again},
    model::{ModelArgs, Source},
    terminal,
    text::{self, ProfileArgs},
};
use conversation::{Conversation, Settings};
use printer::Printer;
use turn::Finish;

/// Tokens of an answer of random weights unless -n says otherwise: noise has no end.
const NOISE_TOKENS: usize = 100;

/// Options of `ds4 run`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  ds4 run                                      Chat
  ds4 run -p 'Why is the sky blue?' -n 500     One answer of at most 500 tokens
  ds4 run --nothink --temp 0 < question.txt    The likeliest answer, at once
  ds4 run -p Hi --json | jq -r .text           For programs

Without -p and --prompt-file the prompt comes from standard input; if that is a terminal, a
conversation begins (/help there says more).

The answer goes to standard output. Reasoning is shown dimmed before it on a terminal, and goes to
standard error otherwise; so do statistics.

--json prints {\"text\", \"reasoning\", \"finish\": \"stop\" | \"length\" | \"context_full\" |
\"interrupted\", \"seed\", \"token_ids\", \"prompt_tokens\", \"answer_tokens\", \"prefill\" and
\"decode\": {\"tokens\", \"seconds\", \"tokens_per_second\"}, \"logprobs\": one
{\"id\", \"text\", \"bytes\", \"logprob\", \"top\"} per token}.")]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Prompt to answer
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// File with the prompt
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// System message
    #[arg(short, long, value_name = "TEXT")]
    system: Option<String>,
    /// Think before answering (the default)
    #[arg(long, overrides_with_all = ["nothink", "think_max"])]
    think: bool,
    /// Answer at once
    #[arg(long, overrides_with_all = ["think", "think_max"])]
    nothink: bool,
    /// Think as much as the model can
    #[arg(long, overrides_with_all = ["think", "nothink"])]
    think_max: bool,
    #[command(flatten)]
    profile: ProfileArgs,
    /// Context: tokens that prompt and answer may have together
    #[arg(short, long, value_name = "N", default_value_t = 32768)]
    ctx: usize,
    /// Tokens that an answer may have, reasoning included [default: as many as the context takes]
    #[arg(short = 'n', long = "tokens", value_name = "N")]
    answer_tokens: Option<NonZeroUsize>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// With --json, log-probabilities of each token and the N likeliest ones
    #[arg(long, value_name = "N", requires = "json")]
    logprobs: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// How to choose tokens.
#[derive(Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// Temperature; 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    temp: f32,
    /// Keep the likeliest tokens up to this share; 1 keeps all
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Keep this many of the likeliest tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Drop tokens less likely than this share of the likeliest; 0 keeps all
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    min_p: f32,
    /// Seed of the draws [default: another one each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

/// Answers, or holds a conversation.
pub fn run(args: &RunArgs) -> Result<ExitCode> {
    args.sampling.check()?;
    let prompt = args.prompt()?;
    ensure!(prompt.is_some() || !args.json, "--json answers one prompt: give it with -p");
    let model = args.model.open()?;
    let encoder = args.profile.encoder(&model)?;
    let longest = model.config.context_length;
    ensure!(
        (1..=longest).contains(&args.ctx),
        "--ctx: found {}, expected 1 to {longest}, the model's longest context",
        args.ctx
    );
    let engine = args.compute.engine(model, args.ctx)?;
    let longest_answer = match args.model.source()? {
        Source::Dummy(_) => NOISE_TOKENS,
        Source::BuiltIn | Source::File(_) => usize::MAX,
    };
    let seed = args.sampling.seed.unwrap_or_else(|| fastrand::u64(..));
    let settings = Settings {
        sampling: args.sampling.params(),
        seed,
        context: args.ctx,
        answer_tokens: args.answer_tokens.map_or(longest_answer, NonZeroUsize::get),
    };
    let runtime = runtime(engine, encoder.tokenizer().clone(), args.ctx)?;
    let dialogue = Dialogue::new(args.system.clone(), args.thinking());
    let mut conversation = Conversation::new(runtime, encoder, dialogue, settings, longest);
    match prompt {
        Some(prompt) => answer_once(args, &mut conversation, prompt, seed),
        None => repl::run(conversation, args.system.clone(), args.thinking()),
    }
}

/// A runtime for one conversation of `context` tokens, which may grow.
fn runtime(engine: Engine, tokenizer: Arc<Tokenizer>, context: usize) -> Result<Runtime> {
    engine.warm_up(1)?;
    let limits = Limits {
        context: engine.config().context_length,
        running: 1,
        waiting: 1,
        prefill_chunk: engine.backend().prefill_chunk(),
        // Beside the conversation there are its checkpoints, and what was said before /new.
        kv_bytes: 2 * engine.backend().session_bytes(context),
        // A terminal may stand still as long as it likes.
        stall: Duration::MAX,
        // Nobody else's requests can change the conversation.
        reuse_answers: true,
    };
    Runtime::start(engine, tokenizer, limits, Box::new(())).context("cannot start threads")
}

fn answer_once(
    args: &RunArgs,
    conversation: &mut Conversation,
    prompt: String,
    seed: u64,
) -> Result<ExitCode> {
    interrupt::catch(Again::Exit)?;
    let finish = if args.json {
        let turn = conversation.reply(prompt, args.logprobs, |_| Ok(()))?;
        report::print(conversation.tokenizer(), &turn, seed)?;
        turn.finish
    } else {
        let mut printer = Printer::new();
        let turn = conversation.reply(prompt, None, |delta| printer.print(delta))?;
        printer.end()?;
        terminal::note(conversation.statistics(&turn));
        turn.finish
    };
    Ok(if finish == Finish::Interrupted {
        ExitCode::from(interrupt::EXIT_CODE)
    } else {
        ExitCode::SUCCESS
    })
}

impl RunArgs {
    /// The prompt, or `None` for a conversation.
    fn prompt(&self) -> Result<Option<String>> {
        if let Some(prompt) = &self.prompt {
            return Ok(Some(prompt.clone()));
        }
        if let Some(path) = &self.prompt_file {
            let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
            return Ok(Some(text::of_file(&text).to_owned()));
        }
        if io::stdin().is_terminal() {
            return Ok(None);
        }
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).context("standard input")?;
        ensure!(!text.trim().is_empty(), "standard input is empty: give a prompt with -p");
        Ok(Some(text::of_file(&text).to_owned()))
    }

    fn thinking(&self) -> Thinking {
        match (self.nothink, self.think_max) {
            (true, _) => Thinking::Off,
            (_, true) => Thinking::Max,
            _ => Thinking::High,
        }
    }
}

impl SamplingArgs {
    fn check(&self) -> Result<()> {
        let share = 0.0..=1.0;
        ensure!(self.temp >= 0.0, "--temp: found {}, expected 0 or more", self.temp);
        ensure!(share.contains(&self.top_p), "--top-p: found {}, expected 0 to 1", self.top_p);
        ensure!(share.contains(&self.min_p), "--min-p: found {}, expected 0 to 1", self.min_p);
        Ok(())
    }

    fn params(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
        }
    }
}
