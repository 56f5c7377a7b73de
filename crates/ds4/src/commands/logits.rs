//! `ds4 logits`: logits of given tokens as raw numbers, for comparison with other programs.
//!
//! Output: little-endian f32 `[positions, vocab]`, and beside it a JSON file
//! `{"vocab": …, "tokens": […], "positions": […]}`.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Read, Write},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use ds4_engine::{Engine, Phase, TokenId, Wanted, Work};
use serde::Serialize;

use crate::{
    compute::ComputeArgs,
    model::ModelArgs,
    terminal::{self, Unit},
};

/// Logits that are held at once unless `--chunk` says otherwise, in numbers.
const MAX_LOGITS: usize = 16 << 20;

/// Options of `ds4 logits`.
#[derive(Args)]
#[command(after_help = "\
Rows are raw little-endian f32, one per position. OUT.f32.json says what they are:
{\"vocab\": 4096, \"tokens\": [0, 17, …], \"positions\": [0, 1, …]}")]
pub struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// File with token ids, separated by white space (`-`: standard input)
    #[arg(long, value_name = "FILE")]
    token_ids: PathBuf,
    /// Positions to write: `all`, `last`, or a list such as `0,5,10-20`
    #[arg(long, default_value = "all")]
    positions: Positions,
    /// Tokens to compute together [default: the backend's, less if the logits would take too much
    /// memory]
    #[arg(long, value_name = "N")]
    chunk: Option<NonZeroUsize>,
    /// Output file; a description goes to the same name with `.json` appended
    #[arg(short, long, value_name = "OUT.f32")]
    output: PathBuf,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Positions whose logits are wanted.
#[derive(Debug, Clone, PartialEq)]
enum Positions {
    All,
    Last,
    /// First and last position of each range.
    Ranges(Vec<(usize, usize)>),
}

#[derive(Serialize)]
struct Description<'a> {
    vocab: usize,
    tokens: &'a [TokenId],
    positions: Vec<usize>,
}

/// Computes and writes the logits.
pub fn run(args: &LogitsArgs) -> Result<()> {
    let model = args.model.open()?;
    let (vocab, limit) = (model.config.vocab, model.config.context_length);
    let tokens = read_token_ids(&args.token_ids, vocab)?;
    ensure!(
        tokens.len() <= limit,
        "{}: found {} tokens, expected at most {limit}, the model's longest context",
        args.token_ids.display(),
        tokens.len(),
    );
    let wanted = args.positions.flags(tokens.len())?;
    let engine = args.compute.engine(model, tokens.len())?;
    let description_path = description_path(&args.output);
    // One that is left from an earlier run must not stand beside rows that it doesn't describe.
    remove_if_there(&description_path)?;
    let file = File::create(&args.output).with_context(|| args.output.display().to_string())?;
    let chunk = args.chunk.map(NonZeroUsize::get);
    write_rows(&engine, &tokens, &wanted, chunk, BufWriter::new(file))
        .with_context(|| args.output.display().to_string())?;
    let positions = (0..tokens.len()).filter(|p| wanted[*p]).collect();
    let description = Description { vocab, tokens: &tokens, positions };
    fs::write(&description_path, serde_json::to_vec(&description)?)
        .with_context(|| description_path.display().to_string())
}

fn read_token_ids(path: &Path, vocab: usize) -> Result<Vec<TokenId>> {
    let name = path.display();
    let mut text = String::new();
    if path == Path::new("-") {
        io::stdin().read_to_string(&mut text).context("standard input")?;
    } else {
        text = fs::read_to_string(path).with_context(|| name.to_string())?;
    }
    let mut tokens = Vec::new();
    for (i, word) in text.split_ascii_whitespace().enumerate() {
        match word.parse::<TokenId>() {
            Ok(token) if (token as usize) < vocab => tokens.push(token),
            _ => bail!(
                "{name}: word {}: found {:?}, expected a token id below {vocab}",
                i + 1,
                word.chars().take(20).collect::<String>(),
            ),
        }
    }
    ensure!(!tokens.is_empty(), "{name}: found no token ids, expected at least one");
    Ok(tokens)
}

/// Writes the logits of the `wanted` positions, holding those of one chunk at a time.
fn write_rows(
    engine: &Engine,
    tokens: &[TokenId],
    wanted: &[bool],
    chunk: Option<usize>,
    mut out: impl Write,
) -> Result<()> {
    let default = engine.backend().prefill_chunk();
    let all_rows = default.min(MAX_LOGITS / engine.config().vocab).max(1);
    let mut session = engine.new_session()?;
    let bar = terminal::progress_bar(tokens.len() as u64, "computing", Unit::Tokens);
    while session.len() < tokens.len() {
        let start = session.len();
        let rest = tokens.len() - start;
        let mut n = chunk.unwrap_or(default).min(rest);
        let mut rows = rows_wanted(&wanted[start..start + n]);
        if rows > 1 && chunk.is_none() {
            n = all_rows.min(rest);
            rows = rows_wanted(&wanted[start..start + n]);
        }
        let end = start + n;
        let work = Work {
            session: &mut session,
            tokens: &tokens[start..end],
            phase: Phase::Prefill,
            wanted: &vec![Wanted::Logits; rows],
        };
        let output = engine.step(&mut [work])?.remove(0);
        for (position, row) in (end - rows..end).zip(output.logits()) {
            if wanted[position] {
                let bytes: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
                out.write_all(&bytes)?;
            }
        }
        bar.set_position(end as u64);
    }
    bar.finish_and_clear();
    Ok(out.flush()?)
}

/// Last rows of a chunk among which all `wanted` ones are. All rows of a chunk are computed alike,
/// whichever are wanted: one, or as many as there are.
fn rows_wanted(wanted: &[bool]) -> usize {
    match wanted.iter().position(|w| *w) {
        None => 0,
        Some(first) if first + 1 == wanted.len() => 1,
        Some(_) => wanted.len(),
    }
}

impl Positions {
    /// For each of `n` positions whether it is wanted.
    fn flags(&self, n: usize) -> Result<Vec<bool>> {
        let mut flags = vec![*self == Positions::All; n];
        match self {
            Positions::All => {}
            Positions::Last => flags[n - 1] = true,
            Positions::Ranges(ranges) => {
                for &(first, last) in ranges {
                    ensure!(
                        last < n,
                        "--positions: found {last}, expected less than {n}, the number of tokens"
                    );
                    flags[first..=last].fill(true);
                }
            }
        }
        Ok(flags)
    }
}

impl FromStr for Positions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => return Ok(Positions::All),
            "last" => return Ok(Positions::Last),
            _ => {}
        }
        let range = |item: &str| {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let parse = |number: &str| number.trim().parse::<usize>().ok();
            let (first, last) = (parse(first)?, parse(last)?);
            (first <= last).then_some((first, last))
        };
        let wrong = || "expected `all`, `last`, or a list such as `0,5,10-20`".to_owned();
        let ranges: Option<_> = text.split(',').map(range).collect();
        ranges.map(Positions::Ranges).ok_or_else(wrong)
    }
}

fn description_path(output: &Path) -> PathBuf {
    let mut path = output.as_os_str().to_owned();
    path.push(".json");
    path.into()
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| path.display().to_string())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_parsed() {
        assert_eq!("all".parse(), Ok(Positions::All));
        assert_eq!("last".parse(), Ok(Positions::Last));
        assert_eq!("0,5,10-12".parse(), Ok(Positions::Ranges(vec![(0, 0), (5, 5), (10, 12)])));
        for wrong in ["", "first", "1,,2", "-1", "5-3", "1-", "0x3"] {
            assert!(wrong.parse::<Positions>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn positions_become_flags() {
        let flags = |text: &str| text.parse::<Positions>().unwrap().flags(4);
        assert_eq!(flags("all").unwrap(), [true; 4]);
        assert_eq!(flags("last").unwrap(), [false, false, false, true]);
        assert_eq!(flags("2,0-1,1").unwrap(), [true, true, true, false]);
        assert!(flags("4").is_err());
    }

    #[test]
    fn only_needed_logits_are_asked_for() {
        assert_eq!(rows_wanted(&[false, false]), 0);
        assert_eq!(rows_wanted(&[false, true]), 1);
        assert_eq!(rows_wanted(&[true, false]), 2);
        assert_eq!(rows_wanted(&[true]), 1);
    }
}
