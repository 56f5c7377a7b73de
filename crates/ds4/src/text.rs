//! The text side of a model: its tokenizer and prompt format.

use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use ds4_model::Model;
use ds4_text::{profile::Profile, prompt::PromptEncoder, tokenizer::Tokenizer};

use crate::terminal;

/// The option for how prompts are written.
#[derive(Args)]
pub struct ProfileArgs {
    /// Prompt texts of this generation of checkpoints, preview or 0731 [default: the model's]
    #[arg(long, value_name = "PROFILE")]
    profile: Option<Profile>,
}

/// The text of a prompt's file: editors put a byte order mark before it, and a line end after it.
pub fn of_file(text: &str) -> &str {
    text.trim_start_matches('\u{feff}').trim_end_matches(['\r', '\n'])
}

/// The tokenizer of a model; says on stderr what is odd about it.
pub fn tokenizer(model: &Model) -> Result<Arc<Tokenizer>> {
    let tokenizer = Tokenizer::from_gguf(&model.files()[0], model.config.vocab)?;
    for warning in tokenizer.warnings() {
        terminal::note(format_args!("warning: {warning}"));
    }
    Ok(Arc::new(tokenizer))
}

impl ProfileArgs {
    /// Renders prompts for `model`.
    pub fn encoder(&self, model: &Model) -> Result<PromptEncoder> {
        let profile = match self.profile {
            Some(profile) => profile,
            None => Profile::of(&model.files()[0])?,
        };
        Ok(PromptEncoder::new(tokenizer(model)?, profile))
    }
}
