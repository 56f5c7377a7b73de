//! DeepSeek's own conversion, and how it is told to treat requests here.

use deepseek_recipe::request::{
    ConversationRequest, ConversionOptions, ModelVersion, ProtocolRequest, WebSearchBehavior,
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::RequestError;

/// The name under which the conversion knows this model's prompt format.
pub(super) const RECIPE_MODEL: &str = "DeepSeek-V4-Pro";

/// Reads what is left of a request once it is repaired.
pub(super) fn convert<R: ProtocolRequest + DeserializeOwned>(
    body: Map<String, Value>,
) -> Result<ConversationRequest, RequestError> {
    let request: R = serde_path_to_error::deserialize(Value::Object(body)).map_err(|error| {
        let path = error.path().to_string();
        let problem = error.into_inner().to_string();
        if path == "." {
            RequestError::refused(problem)
        } else {
            RequestError::field(&path, problem)
        }
    })?;
    Ok(request.convert(options())?)
}

/// Any length of answer is taken: it is clipped later.
fn options() -> ConversionOptions {
    ConversionOptions::new()
        .with_model_alias(RECIPE_MODEL, ModelVersion::DeepseekV4Pro)
        .with_thinking_max_tokens_upper_bound(u32::MAX)
        .with_non_thinking_max_tokens_upper_bound(u32::MAX)
        .with_messages_web_search(WebSearchBehavior::Drop)
}
