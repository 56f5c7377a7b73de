//! Opens a model: one or several files, their configuration and their weights.
//!
//! Loading maps the files, checks every tensor against the table of
//! `binding.rs`, and converts only vectors and small tables. Matrices stay
//! where they are, and their pages are read when they are first used.

mod bind;

use std::{
    collections::HashSet,
    path::Path,
    sync::{Arc, OnceLock},
};

use gguf::{GgufFile, Metadata};

use crate::{
    binding::{Role, expected_tensors},
    config::Config,
    error::{Error, Result, shown},
    split::Parts,
    synth::{self, Recipe},
    weights::Weights,
};

/// A model, ready to run.
pub struct Model {
    /// Shape and constants.
    pub config: Config,
    /// Tensors by role.
    pub weights: Weights,
    /// What was found in the files and is not used, a line each.
    pub warnings: Vec<String>,
    parts: Parts,
    /// Of the weights, if they are generated.
    seed: Option<u64>,
    identity: OnceLock<[u8; 32]>,
}

impl Model {
    /// Opens the model at `path`. If that is a part of a split model
    /// (`…-00001-of-0000N.gguf`), the others are expected beside it.
    ///
    /// The files must not be changed or shortened while the model is open.
    ///
    /// # Errors
    /// If a file cannot be opened, is damaged, or is not a model that this program can run.
    pub fn open(path: &Path) -> Result<Model> {
        Model::from_parts(Parts::open(path)?, None)
    }

    /// Makes a model of one file that is open already, such as an embedded one.
    ///
    /// # Errors
    /// If it is not a model that this program can run, or only a part of one.
    pub fn from_gguf(file: GgufFile) -> Result<Model> {
        Model::from_parts(Parts::single(file)?, None)
    }

    /// The model that [`synth::write`] would write with this seed, without a file: matrices are
    /// generated where they are used. `name` stands for the file in messages.
    ///
    /// # Errors
    /// If the shape does not suit the recipe.
    pub fn dummy(name: &str, config: &Config, recipe: Recipe, seed: u64) -> Result<Model> {
        let header = GgufFile::from_layout(&synth::layout(name, config, recipe)?)?;
        Model::from_parts(Parts::single(header)?, Some(seed))
    }

    fn from_parts(parts: Parts, seed: Option<u64>) -> Result<Model> {
        if is_draft_only(&parts) {
            return Err(Error::DraftOnly { file: parts.first().name().to_owned() });
        }
        let config = Config::read(parts.first(), |name| Some(parts.tensor(name)?.1))?;
        check_token_count(parts.first(), config.vocab)?;
        let weights = bind::weights(&parts, &config, seed)?;
        let warnings = unused(&parts, &config);
        Ok(Model { config, weights, warnings, parts, seed, identity: OnceLock::new() })
    }

    /// Whether the weights are generated, so that the only file is the header of one.
    pub fn is_dummy(&self) -> bool {
        self.seed.is_some()
    }

    /// The files, in order if there are several.
    pub fn files(&self) -> &[Arc<GgufFile>] {
        self.parts.files()
    }

    /// The metadata, of the first file if there are several.
    pub fn metadata(&self) -> &Metadata {
        self.parts.first().metadata()
    }

    /// Size of all files together.
    pub fn file_bytes(&self) -> u64 {
        self.files().iter().map(|file| file.file_bytes()).sum()
    }

    /// Bytes of the tensors of each role that the model has.
    pub fn weight_bytes(&self) -> Vec<(Role, u64)> {
        let tensors: Vec<(Role, u64)> = expected_tensors(&self.config)
            .filter_map(|expected| {
                let (_, info) = self.parts.tensor(&expected.name)?;
                Some((expected.binding.role, info.range.len() as u64))
            })
            .collect();
        let bytes_of = |role| {
            let of_role = tensors.iter().filter(|(other, _)| *other == role);
            (role, of_role.map(|(_, bytes)| bytes).sum::<u64>())
        };
        Role::ALL.iter().map(|&role| bytes_of(role)).filter(|(_, bytes)| *bytes > 0).collect()
    }

    /// A hash that tells this model from any other: over metadata, tensor
    /// table and the first 4 KiB of every tensor, since checkpoints of one
    /// shape differ in nothing else. It does not depend on names or places of files.
    ///
    /// The first call reads a page of every tensor; later ones are free.
    pub fn identity(&self) -> [u8; 32] {
        *self.identity.get_or_init(|| identity(self.files(), self.seed))
    }
}

fn identity(files: &[Arc<GgufFile>], seed: Option<u64>) -> [u8; 32] {
    const SAMPLE: usize = 4096;
    let mut hasher = blake3::Hasher::new();
    if let Some(seed) = seed {
        // All else about the weights follows from the header.
        hasher.update(&seed.to_le_bytes());
        for header in files {
            hasher.update(header.bytes());
        }
        return *hasher.finalize().as_bytes();
    }
    for file in files {
        let bytes = file.bytes();
        let data_start = file.tensors().iter().map(|tensor| tensor.range.start).min();
        hasher.update(&bytes[..data_start.unwrap_or(bytes.len())]);
        for tensor in file.tensors() {
            let tensor_bytes = file.tensor_bytes(tensor);
            hasher.update(&tensor_bytes[..tensor_bytes.len().min(SAMPLE)]);
        }
    }
    *hasher.finalize().as_bytes()
}

/// Whether this is the separate file of a draft (MTP) block, in either of its two encodings.
fn is_draft_only(parts: &Parts) -> bool {
    let has = |test: fn(&str) -> bool| parts.tensors().any(|tensor| test(&tensor.name));
    has(|name| name.starts_with("mtp.") || name.contains(".nextn."))
        && !has(|name| name.starts_with("blk.0."))
}

/// Checks that the tokenizer, if the file holds one, has a token for every row of the logits.
fn check_token_count(file: &GgufFile, vocab: usize) -> Result<()> {
    const KEY: &str = "tokenizer.ggml.tokens";
    match file.metadata().optional::<&[String]>(KEY)? {
        Some(tokens) if tokens.len() != vocab => Err(Error::Value {
            file: file.name().to_owned(),
            key: KEY.to_owned(),
            found: format!("{} entries", tokens.len()),
            expected: vocab.to_string(),
        }),
        _ => Ok(()),
    }
}

/// A line for each tensor, or kind of tensors, that the model does not use.
fn unused(parts: &Parts, config: &Config) -> Vec<String> {
    const NAMED: usize = 8;
    let used: HashSet<String> = expected_tensors(config).map(|tensor| tensor.name).collect();
    let others = parts.tensors().map(|tensor| tensor.name.as_str());
    // The vision variant's routing bias is known and of no use to text.
    let others = others.filter(|name| !used.contains(*name) && !name.ends_with("_vl.bias"));
    let (draft, unknown): (Vec<_>, Vec<_>) = others.partition(|name| is_draft(name, config));

    let mut lines = Vec::new();
    if !draft.is_empty() {
        lines.push(format!("{} tensors of draft (MTP) blocks are not used", draft.len()));
    }
    let named = unknown.iter().take(NAMED);
    lines.extend(named.map(|name| format!("unknown tensor {} is not used", shown(name))));
    if unknown.len() > NAMED {
        lines.push(format!("{} more unknown tensors are not used", unknown.len() - NAMED));
    }
    lines
}

fn is_draft(name: &str, config: &Config) -> bool {
    let block = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next());
    let block = block.and_then(|number| number.parse::<usize>().ok());
    name.starts_with("mtp.") || block.is_some_and(|block| block >= config.layers.len())
}
