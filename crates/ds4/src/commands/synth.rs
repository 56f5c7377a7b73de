//! `ds4 synth`: a model of real shape with random weights, to try a machine before a download.

use std::{
    fs,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use ds4_model::synth::{self, Recipe};

use crate::terminal::{self, Unit};

/// Options of `ds4 synth`.
#[derive(Args)]
#[command(after_help = "\
The same shape, recipe and seed give the same file. Text from such a model is noise.
Four layers of flash in q2 take 8.9 GiB, all 43 take 81 GiB.")]
pub struct SynthArgs {
    /// Widths of the model: the real ones, or a few megabytes
    #[arg(long, value_enum, default_value = "flash")]
    shape: Shape,
    /// Layers, of flash's 43
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=43))]
    layers: u8,
    /// Storage types: f32, f16, q8, q2, q4 or mxfp4
    #[arg(long, default_value = "q2")]
    recipe: Recipe,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
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
pub fn run(args: &SynthArgs) -> Result<()> {
    let name = args.output.display();
    if args.output.exists() && !args.force {
        bail!("{name}: exists already: choose another name, or --force to replace it");
    }
    let config = match args.shape {
        Shape::Flash => synth::flash(args.layers.into()),
        Shape::Tiny => synth::tiny(),
    };
    let total = synth::file_bytes(&config, args.recipe)?;
    let folder = args.output.parent().filter(|p| !p.as_os_str().is_empty());
    let file = tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))
        .with_context(|| name.to_string())?;
    let bar = terminal::progress_bar(total, "writing", Unit::Bytes);
    let out = BufWriter::new(file);
    let mut out = synth::write(&config, args.recipe, args.seed, out, |bytes| bar.inc(bytes))?;
    out.flush().with_context(|| name.to_string())?;
    let file = out.into_inner().map_err(|e| e.into_error()).with_context(|| name.to_string())?;
    bar.finish_and_clear();
    make_readable(file.path())?;
    file.persist(&args.output).with_context(|| name.to_string())?;
    terminal::note(format_args!("{name}: {}", terminal::bytes(total)));
    Ok(())
}

/// Temporary files are for their owner alone; a model is like any other file.
fn make_readable(path: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o644))?;
    }
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}
