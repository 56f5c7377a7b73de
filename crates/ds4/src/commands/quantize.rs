//! `ds4 quantize`: a checkpoint or another model to a GGUF model in a recipe of types.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    num::NonZeroUsize,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use ds4_convert::{
    Error, ImportanceMatrix, ModelMetadata, Options, Override, Plan, Recipe, Source, convert,
};
use gguf::GgufFile;

use crate::{
    interrupt::{self, Again},
    terminal::{self, Unit},
};

/// Options of `ds4 quantize`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  ds4 quantize DeepSeek-V4-Flash/ flash-q2.gguf --recipe q2 --imatrix flash.dat
  ds4 quantize DeepSeek-V4-Flash/ flash.gguf --recipe mxfp4      the released experts, unchanged
  ds4 quantize flash.gguf flash-q4.gguf --recipe q4
  ds4 quantize flash.gguf mixed.gguf --recipe q2 --tensor 'blk.42.*_exps.*=Q4_K'

Recipes: f32, f16, q8 (8.5 bits a weight), q4 (4.5), mxfp4 (4.25), q2 (2.25); norms and other
vectors are always F32. A stopped conversion goes on when the same command is given again.")]
pub struct QuantizeArgs {
    /// Checkpoint: a directory, its index, or its .safetensors files; or a GGUF model
    #[arg(value_name = "IN", required = true)]
    inputs: Vec<PathBuf>,
    /// File to write
    #[arg(value_name = "OUT.gguf", required = true)]
    output: PathBuf,
    /// Types by what tensors are for: f32, f16, q8, q4, mxfp4 or q2
    #[arg(long)]
    recipe: Recipe,
    /// Type of all tensors whose names match, `*` standing for any text; the last match counts
    #[arg(long = "tensor", value_name = "PATTERN=TYPE")]
    tensors: Vec<Override>,
    /// Importance matrix, from `ds4 imatrix` or another program
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// GGUF file to take metadata and tokenizer from [default: the input, if it is one]
    #[arg(long, value_name = "GGUF", conflicts_with_all = ["config", "tokenizer"])]
    template: Option<PathBuf>,
    /// Configuration of the checkpoint [default: config.json beside it]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Tokenizer of the checkpoint [default: tokenizer.json beside it]
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Threads to convert with [default: one per processor]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Show what would be written and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
}

/// Plans and converts.
pub fn run(args: &QuantizeArgs) -> Result<ExitCode> {
    let name = args.output.display();
    if args.output.exists() && !args.force && !args.dry_run {
        bail!("{name}: exists already: choose another name, or --force to replace it");
    }
    let threads = args.threads.map_or(0, NonZeroUsize::get);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    pool.context("cannot start threads")?;
    let plan = args.plan()?;
    for remark in &plan.remarks {
        terminal::note(format_args!("note: {remark}"));
    }
    if args.dry_run {
        print_plan(&plan, io::stdout().lock())?;
        return Ok(ExitCode::SUCCESS);
    }
    interrupt::catch(Again::Exit)?;
    let total: u64 = plan.tensors.iter().map(|tensor| tensor.bytes).sum();
    let bar = terminal::progress_bar(total, "converting", Unit::Bytes);
    let start = Instant::now();
    let outcome = convert(&plan, &args.output, |progress| {
        bar.set_position(progress.bytes);
        if interrupt::pressed() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let outcome = match outcome {
        Err(error @ Error::Stopped { .. }) => {
            terminal::note(error);
            return Ok(ExitCode::from(interrupt::EXIT_CODE));
        }
        outcome => outcome?,
    };
    let seconds = start.elapsed().as_secs_f64();
    let rate = outcome.elements as f64 / seconds / rayon::current_num_threads() as f64 / 1e6;
    terminal::note(format_args!(
        "{name}: {}, {} tensors in {seconds:.1} s, {rate:.1} million weights/s per thread",
        terminal::bytes(plan.file_bytes()),
        plan.tensors.len() - outcome.resumed,
    ));
    Ok(ExitCode::SUCCESS)
}

impl QuantizeArgs {
    fn plan(&self) -> Result<Plan> {
        let source = Source::open(&self.inputs)?;
        let metadata = self.metadata(&source)?;
        let importance = self.imatrix.as_deref().map(ImportanceMatrix::read).transpose()?;
        let overrides = self.tensors.clone();
        let options = Options { recipe: self.recipe, overrides, importance };
        Ok(Plan::new(&self.output.display().to_string(), &source, &metadata, options)?)
    }

    fn metadata(&self, source: &Source) -> Result<ModelMetadata> {
        if let Some(template) = &self.template {
            return Ok(ModelMetadata::from_gguf(&GgufFile::open(template)?)?);
        }
        let given = self.config.is_some() || self.tokenizer.is_some();
        match (source.gguf(), source.directory()) {
            (Some(file), _) if !given => Ok(ModelMetadata::from_gguf(file)?),
            (_, Some(directory)) => {
                let file = |option: &Option<PathBuf>, name: &str| -> Result<PathBuf> {
                    let path = option.clone().unwrap_or_else(|| directory.join(name));
                    let option = Path::new(name).file_stem().unwrap_or_default().display();
                    ensure!(
                        path.exists(),
                        "{}: no such file: name it with --{option}, or a GGUF with --template",
                        path.display(),
                    );
                    Ok(path)
                };
                let config = file(&self.config, "config.json")?;
                let tokenizer = file(&self.tokenizer, "tokenizer.json")?;
                Ok(ModelMetadata::from_checkpoint(&config, &tokenizer)?)
            }
            _ => bail!("--config and --tokenizer: a GGUF input has its own; use --template"),
        }
    }
}

/// Prints a line for all tensors of one purpose that are converted in one way.
fn print_plan(plan: &Plan, mut out: impl Write) -> Result<()> {
    let mut lines: BTreeMap<_, (usize, u64, u64)> = BTreeMap::new();
    for tensor in &plan.tensors {
        let key = (tensor.role, tensor.from, tensor.ty.name());
        let line = lines.entry(key).or_default();
        *line = (line.0 + 1, line.1 + tensor.elements(), line.2 + tensor.bytes);
    }
    writeln!(out, "{:<28} {:>7} {:>15}  conversion", "", "tensors", "weights")?;
    for ((role, from, to), (tensors, elements, bytes)) in lines {
        let size = terminal::bytes(bytes);
        let (role, change) = (role.name(), format!("{from} to {to}"));
        writeln!(out, "{role:<28} {tensors:>7} {elements:>15}  {change:<18} {size:>10}")?;
    }
    let (tensors, elements) = (plan.tensors.len(), plan.elements());
    let size = terminal::bytes(plan.file_bytes());
    writeln!(out, "{:<28} {tensors:>7} {elements:>15}  {:<18} {size:>10}", "whole file", "")?;
    Ok(())
}
