//! Which model to use, and opening it.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use anyhow::{Context, Result, bail};
use clap::Args;
use directories::{BaseDirs, ProjectDirs};
use ds4_model::Model;
use gguf::GgufFile;

use crate::{dummy::DummySpec, terminal};

/// The model for those who have none yet: nano, of the real architecture and 21 million parameters.
static BUILT_IN: &[u8] = include_bytes!("../../../models/nano/nano.gguf");

/// The option that names a model.
#[derive(Args)]
pub struct ModelArgs {
    /// GGUF file, any part of a split one, or a directory that holds one model
    #[arg(short, long, value_name = "MODEL", env = "DS4_MODEL", hide_env_values = true)]
    model: Option<OsString>,
    /// Instead, a model of real shape with random weights that needs no file: flash-q2 (81 GiB),
    /// flash-q4, flash-mxfp4 or flash-q8; flash-q2:4 for 4 layers; tiny-q2
    #[arg(long, value_name = "SPEC")]
    dummy: Option<DummySpec>,
}

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file.
    File(PathBuf),
    /// The program.
    BuiltIn,
    /// Nowhere: its weights are generated.
    Dummy(DummySpec),
}

impl ModelArgs {
    /// Opens the chosen model and says on stderr what a user should know about it.
    pub fn open(&self) -> Result<Arc<Model>> {
        let source = self.source()?;
        let spinner = terminal::spinner("loading the model");
        let model = match &source {
            Source::File(path) => open_file(path)?,
            Source::BuiltIn => Model::from_gguf(GgufFile::from_static("built-in", BUILT_IN)?)?,
            Source::Dummy(spec) => spec.model()?,
        };
        spinner.finish_and_clear();
        if source == Source::BuiltIn {
            terminal::note(
                "No model given: this is nano, the built-in one, which is very small and knows very \
                 little. Name a model with -m or $DS4_MODEL.",
            );
        }
        for warning in &model.warnings {
            terminal::note(format_args!("warning: {warning}"));
        }
        Ok(Arc::new(model))
    }

    /// The model that the option, the environment and the models directory ask for.
    pub fn source(&self) -> Result<Source> {
        if let Some(spec) = self.dummy {
            return Ok(Source::Dummy(spec));
        }
        let named = self.model.as_deref().filter(|name| !name.is_empty()).map(Path::new);
        match named {
            Some(path) if path.is_dir() => only_model(path).map(Source::File),
            Some(path) => Ok(Source::File(path.to_owned())),
            None => Ok(newest_model().map_or(Source::BuiltIn, Source::File)),
        }
    }
}

/// Where models are looked for if none is named.
pub fn models_directory() -> Option<PathBuf> {
    Some(ProjectDirs::from("", "", "ds4")?.data_dir().join("models"))
}

/// The same for people: `~` is their home.
pub fn models_directory_name() -> Option<String> {
    let directory = models_directory()?;
    let home = BaseDirs::new()?;
    Some(match directory.strip_prefix(home.home_dir()) {
        Ok(path) => format!("~/{}", path.display()),
        Err(_) => directory.display().to_string(),
    })
}

fn open_file(path: &Path) -> Result<Model> {
    if !path.exists() {
        let place = models_directory_name().map(|name| format!(", or put one into {name}"));
        bail!(
            "{}: no such file: name a GGUF file with -m{}",
            path.display(),
            place.unwrap_or_default()
        );
    }
    Ok(Model::open(path)?)
}

fn only_model(directory: &Path) -> Result<PathBuf> {
    let name = directory.display();
    let mut models = models_in(directory).with_context(|| name.to_string())?;
    match models.len() {
        1 => Ok(models.remove(0)),
        0 => bail!("{name}: a directory without .gguf files: name a GGUF file with -m"),
        n => {
            let names = models.iter().filter_map(|path| path.file_name());
            let names: Vec<_> = names.map(|name| name.to_string_lossy()).collect();
            bail!("{name}: a directory with {n} models: name one with -m: {}", names.join(", "))
        }
    }
}

fn newest_model() -> Option<PathBuf> {
    let changed = |path: &PathBuf| {
        fs::metadata(path).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
    };
    models_in(&models_directory()?).ok()?.into_iter().max_by_key(changed)
}

/// Model files in a directory by name; of split models the first part. Folders and links to nowhere
/// are no models, whatever their names.
fn models_in(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut models = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let is_gguf = path.extension().is_some_and(|extension| extension == "gguf");
        if is_gguf && path.is_file() && !is_later_part(&path) {
            models.push(path);
        }
    }
    models.sort();
    Ok(models)
}

/// Whether a name ends in `-0000K-of-0000N` with K > 1.
fn is_later_part(path: &Path) -> bool {
    let number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let mut end = stem.rsplitn(4, '-');
    let (Some(parts), Some("of"), Some(part)) = (end.next(), end.next(), end.next()) else {
        return false;
    };
    number(parts) && number(part) && part != "00001"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(path: &Path) -> Result<Source> {
        ModelArgs { model: Some(path.into()), dummy: None }.source()
    }

    #[test]
    fn parts_of_split_models_are_one_model() {
        assert!(is_later_part(Path::new("x/v4-00002-of-00003.gguf")));
        for first in ["v4-00001-of-00003.gguf", "v4.gguf", "v4-2-of-3.gguf", "-of-00003.gguf"] {
            assert!(!is_later_part(Path::new(first)), "{first}");
        }
    }

    #[test]
    fn a_directory_stands_for_its_only_model() {
        let dir = tempfile::tempdir().unwrap();
        let add = |name: &str| fs::write(dir.path().join(name), "").unwrap();
        let message = |dir: &Path| named(dir).unwrap_err().to_string();
        add("README.md");
        fs::create_dir(dir.path().join("folder.gguf")).unwrap();
        assert!(message(dir.path()).contains("without .gguf files"));
        add("v4-00001-of-00002.gguf");
        add("v4-00002-of-00002.gguf");
        let first = dir.path().join("v4-00001-of-00002.gguf");
        assert_eq!(named(dir.path()).unwrap(), Source::File(first));
        add("other.gguf");
        assert!(
            message(dir.path())
                .ends_with("2 models: name one with -m: other.gguf, v4-00001-of-00002.gguf")
        );
    }
}
