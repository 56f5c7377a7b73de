//! What can be wrong with a request.

use deepseek_recipe::request::ConversionError;

use crate::tokenizer::TokenizerError;

/// Why a request cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// It is no JSON.
    #[error("the request body is no JSON: {0}")]
    Json(String),
    /// A field has a value that cannot be used.
    #[error("{field}: {problem}")]
    Field {
        /// The field, such as `messages[0].role`.
        field: String,
        /// What is wrong.
        problem: String,
    },
    /// Something is wrong that is no single field's fault.
    #[error("{0}")]
    Refused(String),
    /// The conversion failed at something that is not the request's fault.
    #[error("{0}")]
    Internal(String),
    /// The prompt cannot be tokenized.
    #[error(transparent)]
    Prompt(#[from] TokenizerError),
}

impl RequestError {
    pub(super) fn field(field: &str, problem: impl AsRef<str>) -> Self {
        RequestError::Field { field: one_line(field), problem: one_line(problem.as_ref()) }
    }

    pub(super) fn refused(problem: impl AsRef<str>) -> Self {
        RequestError::Refused(one_line(problem.as_ref()))
    }
}

/// A message, which may quote the request, on one line and of bounded length.
fn one_line(message: &str) -> String {
    const LIMIT: usize = 500;
    let mut line = String::with_capacity(message.len().min(LIMIT));
    for character in message.chars().take(LIMIT) {
        if character.is_control() {
            line.extend(character.escape_debug());
        } else {
            line.push(character);
        }
    }
    if message.chars().nth(LIMIT).is_some() {
        line.push('…');
    }
    line
}

impl From<ConversionError> for RequestError {
    fn from(error: ConversionError) -> Self {
        match error {
            ConversionError::BadRequest { detail } => RequestError::refused(detail),
            ConversionError::Internal { detail } => RequestError::Internal(detail),
        }
    }
}
