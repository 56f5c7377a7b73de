//! `ds4 imatrix`: which columns of the experts matter, measured while the model reads a text.

use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use ds4_convert::Collector;
use ds4_engine::{Engine, Phase, TokenId, Work};
use ds4_text::tokenizer::Tokenizer;

use crate::{
    compute::ComputeArgs,
    interrupt::{self, Again},
    model::ModelArgs,
    terminal::{self, Unit},
    text,
};

/// Options of `ds4 imatrix`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  ds4 imatrix -m flash-mxfp4.gguf --text calibration.txt -o flash.dat
  ds4 quantize DeepSeek-V4-Flash/ flash-q2.gguf --recipe q2 --imatrix flash.dat

The text is read in pieces of --ctx tokens, each by itself. In it the markers of the chat format
(<｜User｜>, <think> and so on) are markers, so that it can hold whole conversations.")]
pub struct ImatrixArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to read
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// File to write [default: the text's name with .dat]
    #[arg(short, long, value_name = "FILE.dat")]
    output: Option<PathBuf>,
    /// Tokens of a piece
    #[arg(long, value_name = "N", default_value = "512")]
    ctx: NonZeroUsize,
    /// Read at most this many pieces
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Reads and writes what was measured. Ctrl-C ends the reading early.
pub fn run(args: &ImatrixArgs) -> Result<ExitCode> {
    let output = args.output.clone().unwrap_or_else(|| args.text.with_extension("dat"));
    if output.exists() && !args.force {
        bail!("{}: exists already: choose another name, or --force", output.display());
    }
    let model = args.model.open()?;
    let collector = Arc::new(Collector::new(&model.config));
    // Before anything else that computes in parallel, such as reading the text.
    let engine = args.compute.observed_engine(model.clone(), collector.clone())?;
    let tokenizer = text::tokenizer(&model)?;
    let tokens = tokens(&args.text, &tokenizer)?;
    let bos = tokenizer.special().bos;
    let pieces: Vec<Vec<TokenId>> = tokens
        .chunks(args.ctx.get())
        .take(args.chunks.unwrap_or(usize::MAX))
        .map(|piece| [&[bos], piece].concat())
        .collect();
    interrupt::catch(Again::Exit)?;
    let read = read(&engine, &pieces)?;
    ensure!(read > 0, "stopped before the first piece was read");

    let dataset = args.text.file_name().unwrap_or_default().to_string_lossy();
    let matrix = collector.matrix(&dataset, read as u64);
    fs::write(&output, matrix.to_dat()).with_context(|| output.display().to_string())?;
    let rows: Vec<u64> = collector.rows().concat();
    let (unused, least) = (rows.iter().filter(|n| **n == 0).count(), rows.iter().min());
    terminal::note(format_args!(
        "{}: {read} of {} pieces; tokens seen by an expert: at least {}; experts that saw none: \
         {unused} of {}",
        output.display(),
        pieces.len(),
        least.unwrap_or(&0),
        rows.len(),
    ));
    Ok(ExitCode::SUCCESS)
}

fn tokens(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<TokenId>> {
    let name = path.display();
    let text = fs::read_to_string(path).with_context(|| name.to_string())?;
    let tokens = tokenizer.encode_with_markers(&text).with_context(|| name.to_string())?;
    ensure!(!tokens.is_empty(), "{name}: an empty text");
    Ok(tokens)
}

/// Reads pieces, several at once if they are short; returns how many.
fn read(engine: &Engine, pieces: &[Vec<TokenId>]) -> Result<usize> {
    let longest = pieces.iter().map(Vec::len).max().unwrap_or(1);
    let chunk = engine.backend().prefill_chunk();
    let at_once = (chunk.max(longest) / longest).max(1);
    let bar = terminal::progress_bar(pieces.len() as u64, "reading", Unit::Steps);
    let mut read = 0;
    for pieces in pieces.chunks(at_once) {
        if interrupt::pressed() {
            break;
        }
        let mut sessions = Vec::with_capacity(pieces.len());
        for _ in pieces {
            sessions.push(engine.new_session()?);
        }
        for start in (0..longest).step_by(chunk) {
            let mut work: Vec<Work<'_>> = sessions
                .iter_mut()
                .zip(pieces)
                .filter(|(_, piece)| piece.len() > start)
                .map(|(session, piece)| {
                    let tokens = &piece[start..piece.len().min(start + chunk)];
                    Work { session, tokens, phase: Phase::Prefill, wanted: &[] }
                })
                .collect();
            engine.step(&mut work)?;
        }
        read += pieces.len();
        bar.set_position(read as u64);
    }
    bar.finish_and_clear();
    Ok(read)
}
