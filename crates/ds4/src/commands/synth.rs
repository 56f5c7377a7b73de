//! `ds4 synth`: a model of real shape with random weights, to try a machine before a download.

use std::{
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use ds4_model::{
    config::Config,
    synth::{self, Recipe},
};
use tempfile::NamedTempFile;

use crate::{
    interrupt::{self, Again},
    terminal::{self, Unit},
};

/// Options of `ds4 synth`.
#[derive(Args)]
#[command(after_help = "\
The same shape, recipe and seed give the same file. Text from such a model is noise.
Four layers of flash in q2 take 8.9 GiB, all 43 take 81 GiB.")]
pub struct SynthArgs {
    /// Widths of the model: the real ones, or a few megabytes
    #[arg(long, value_enum, default_value = "flash")]
    shape: Shape,
    /// Layers, of flash's 43 [default: 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=43))]
    layers: Option<u8>,
    /// Storage types: f32, f16, q8, q4, mxfp4 or q2
    #[arg(long, default_value = "q2")]
    recipe: Recipe,
    /// Seed of the weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
    /// File to write
    #[arg(value_name = "OUT.gguf")]
    output: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Shape {
    Flash,
    Tiny,
}

/// Makes the file; it appears under its name when it is complete.
pub fn run(args: &SynthArgs) -> Result<ExitCode> {
    let name = args.output.display();
    if args.output.exists() {
        ensure!(args.output.is_file(), "{name}: not a file that could be replaced");
        if !args.force {
            bail!("{name}: exists already: choose another name, or --force to replace it");
        }
    }
    let config = args.config()?;
    interrupt::catch(Again::Exit)?;
    match write(args, &config) {
        Err(_) if interrupt::pressed() => {
            terminal::note("Stopped; nothing was written.");
            Ok(ExitCode::from(interrupt::EXIT_CODE))
        }
        Err(error) => Err(error.context(name.to_string())),
        Ok(bytes) => {
            terminal::note(format_args!("{name}: {}", terminal::bytes(bytes)));
            Ok(ExitCode::SUCCESS)
        }
    }
}

impl SynthArgs {
    fn config(&self) -> Result<Config> {
        match (self.shape, self.layers) {
            (Shape::Flash, layers) => Ok(synth::flash(layers.unwrap_or(4).into())),
            (Shape::Tiny, None) => Ok(synth::tiny()),
            (Shape::Tiny, Some(_)) => bail!("--layers: the tiny shape has its own, use flash"),
        }
    }
}

/// Returns the size of the file.
fn write(args: &SynthArgs, config: &Config) -> Result<u64> {
    let bytes = synth::file_bytes(config, args.recipe)?;
    let bar = terminal::progress_bar(bytes, "writing", Unit::Bytes);
    let out = BufWriter::new(Stoppable(new_file_beside(&args.output)?));
    let out = synth::write(config, args.recipe, args.seed, out, |bytes| bar.inc(bytes))?;
    let Stoppable(file) = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.persist(&args.output)?;
    bar.finish_and_clear();
    Ok(bytes)
}

/// A file that vanishes unless it is kept, in the folder of `path`.
fn new_file_beside(path: &Path) -> Result<NamedTempFile> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut builder = tempfile::Builder::new();
    builder.prefix(".ds4-");
    // Temporary files are for their owner alone; a model is like any other file.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder.unwrap_or(Path::new("."))).context("cannot write into its folder")
}

/// Fails once Ctrl-C was pressed.
struct Stoppable(NamedTempFile);

impl Write for Stoppable {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match interrupt::pressed() {
            true => Err(io::Error::other("stopped")),
            false => self.0.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
