//! `ds4 perplexity`: how well a model predicts a text, and how far it is from another model.

use std::{
    fs,
    io::{self, Write},
    num::NonZeroUsize,
    ops::ControlFlow,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use ds4_eval::{
    Error,
    divergence::{Divergence, DivergenceSummary},
    logits_file::{Header, LogitsReader, LogitsWriter},
    perplexity::{Perplexity, Reading, Text, log_probability, read},
};
use serde::Serialize;

use crate::{
    compute::ComputeArgs,
    interrupt::{self, Again},
    model::ModelArgs,
    terminal::{self, Unit},
    text,
};

/// Options of `ds4 perplexity`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  ds4 perplexity -m flash-q2.gguf novel.txt
  ds4 perplexity -m nano-f16.gguf text.txt --save-logits f16.logits
  ds4 perplexity -m nano-q2.gguf text.txt --kl-from f16.logits     how far q2 is from f16

The text is read as it is: no chat format, and markers in it are text but for --markers. Each window of --ctx tokens
is read from an empty context, after the marker that begins every text (see --no-bos); its first
32 tokens are not scored.")]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to predict
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Tokens of a window
    #[arg(short, long, value_name = "N", default_value = "4096")]
    ctx: NonZeroUsize,
    /// Use only this many tokens of the text
    #[arg(short = 'n', long, value_name = "N")]
    tokens: Option<usize>,
    /// Do not put the begin-of-sentence marker before each window
    #[arg(long)]
    no_bos: bool,
    /// Take markers of the chat format that the text spells out for markers
    #[arg(long)]
    markers: bool,
    /// Read token by token, as answers are generated, instead of in chunks
    #[arg(long)]
    decode: bool,
    /// Save all predictions, 2 bytes for each token of the vocabulary and scored position
    #[arg(long, value_name = "FILE")]
    save_logits: Option<PathBuf>,
    /// Compare with predictions that another model saved
    #[arg(long, value_name = "FILE", conflicts_with = "save_logits")]
    kl_from: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// What is printed.
#[derive(Serialize)]
struct Report {
    tokens: usize,
    scored: usize,
    nll: f64,
    avg_nll: f64,
    standard_error: f64,
    ppl: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    divergence: Option<DivergenceSummary>,
}

/// Measures and prints.
pub fn run(args: &PerplexityArgs) -> Result<ExitCode> {
    let model = args.model.open()?;
    // Before anything else that computes in parallel, such as reading the text.
    let engine = args.compute.engine(model.clone(), args.ctx.get())?;
    let name = args.file.display();
    let content = fs::read_to_string(&args.file).with_context(|| name.to_string())?;
    let tokenizer = text::tokenizer(&model)?;
    let tokens = if args.markers {
        tokenizer.encode_with_markers(&content)
    } else {
        tokenizer.encode(&content)
    };
    let mut tokens = tokens.with_context(|| name.to_string())?;
    tokens.truncate(args.tokens.unwrap_or(usize::MAX));
    let limit = model.config.context_length;
    let ctx = args.ctx.get();
    ensure!(ctx < limit, "--ctx: found {ctx}, expected less than {limit}, the longest context");
    let bos = (!args.no_bos).then_some(tokenizer.special().bos);
    let text = Text::new(&tokens, bos, ctx).with_context(|| name.to_string())?;

    let vocab = engine.config().vocab;
    let mut reference = args.kl_from.as_deref().map(LogitsReader::open).transpose()?;
    if let Some(reference) = &reference {
        reference.check(vocab, &text.hash())?;
    }
    let header = Header {
        vocab,
        rows: text.scored(),
        text: text.hash(),
        model: engine.backend().model_identity(),
    };
    let create = |path: &PathBuf| LogitsWriter::create(path, &header);
    let mut writer = args.save_logits.as_ref().map(create).transpose()?;

    interrupt::catch(Again::Exit)?;
    let bar = terminal::progress_bar(text.computed() as u64, "reading", Unit::Tokens);
    let (mut perplexity, mut divergence) = (Perplexity::default(), Divergence::default());
    let reading = if args.decode { Reading::Decode } else { Reading::Prefill };
    let score = |token, logits: &[f32]| {
        perplexity.add(-log_probability(logits, token)?);
        if let Some(writer) = &mut writer {
            writer.add(logits)?;
        }
        match &mut reference {
            Some(reference) => divergence.add(reference.next_row()?, logits),
            None => Ok(()),
        }
    };
    let progress = |computed| {
        bar.set_position(computed as u64);
        if interrupt::pressed() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let result = read(&engine, &text, reading, score, progress);
    bar.finish_and_clear();
    if let Err(Error::Stopped) = result {
        return Ok(ExitCode::from(interrupt::EXIT_CODE));
    }
    result?;
    if let Some(writer) = writer {
        writer.finish()?;
    }
    let report = Report {
        tokens: tokens.len(),
        scored: perplexity.scored,
        nll: perplexity.nll,
        avg_nll: perplexity.mean(),
        standard_error: perplexity.standard_error(),
        ppl: perplexity.perplexity(),
        divergence: divergence.summary(),
    };
    report.print(args.json)?;
    Ok(ExitCode::SUCCESS)
}

impl Report {
    fn print(&self, json: bool) -> Result<()> {
        let mut out = io::stdout().lock();
        if json {
            writeln!(out, "{}", serde_json::to_string(self)?)?;
            return Ok(());
        }
        let Report { tokens, scored, nll, avg_nll, ppl, standard_error, .. } = self;
        writeln!(
            out,
            "tokens={tokens} scored={scored} nll={nll:.9} avg_nll={avg_nll:.9} \
             stderr={standard_error:.9} ppl={ppl:.9}"
        )?;
        if let Some(d) = &self.divergence {
            writeln!(
                out,
                "kl mean={:.9} median={:.9} p99={:.9} max={:.9} top1={:.6}",
                d.mean, d.median, d.p99, d.max, d.top1
            )?;
        }
        Ok(())
    }
}
