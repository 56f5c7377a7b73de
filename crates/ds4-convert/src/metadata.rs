//! Metadata of the output: taken from a GGUF file, or made from a checkpoint's `config.json` and
//! `tokenizer.json`.

mod hyperparameters;
mod tokenizer;

use std::{fs, path::Path};

use ds4_model::config::Config;
use gguf::{FileLayout, GgufFile, Value};
use serde::de::DeserializeOwned;

use crate::error::{Error, Result, io_error};

use hyperparameters::Hyperparameters;
use tokenizer::TokenizerFile;

/// What the output says about itself, and the shape of the model that follows from it.
pub struct ModelMetadata {
    pub(crate) entries: Vec<(String, Value)>,
    pub(crate) config: Config,
}

impl ModelMetadata {
    /// Everything that `file` says, but for what a conversion changes.
    ///
    /// # Errors
    /// If that describes no model that this program can run.
    pub fn from_gguf(file: &GgufFile) -> Result<ModelMetadata> {
        let config = Config::from_metadata(file)?;
        let kept = |key: &str| {
            !key.starts_with("split.")
                && !key.starts_with("quantize.imatrix.")
                && !["general.file_type", "general.quantization_version", "general.alignment"]
                    .contains(&key)
        };
        let entries = file.metadata().iter().filter(|(key, _)| kept(key));
        let entries = entries.map(|(key, value)| (key.to_owned(), value.clone())).collect();
        Ok(ModelMetadata { entries, config })
    }

    /// What an official checkpoint's configuration and tokenizer say.
    ///
    /// # Errors
    /// If a file cannot be read, lacks something, or describes no model that this program can run.
    pub fn from_checkpoint(config: &Path, tokenizer: &Path) -> Result<ModelMetadata> {
        let name = config.display().to_string();
        let hyperparameters: Hyperparameters = read_json(config)?;
        let mut entries = hyperparameters.entries(&name)?;
        let tokenizer_file: TokenizerFile = read_json(tokenizer)?;
        entries.extend(tokenizer_file.entries(&tokenizer.display().to_string())?);
        entries.extend(hyperparameters.token_ids());
        // Read back as from a finished file, so that every check is made once and by one reader.
        let header = FileLayout::new(name.clone(), &entries, &[])?.header().to_vec();
        let file = GgufFile::from_vec(name, header)?;
        let config = Config::from_metadata(&file)?;
        Ok(ModelMetadata { entries, config })
    }

    /// Shape of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).map_err(io_error(path))?;
    let file = path.display().to_string();
    serde_json::from_str(&text).map_err(|source| Error::Json { file, source })
}
