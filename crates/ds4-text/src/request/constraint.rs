//! The form that an answer, or the input of a custom tool, must have.

use serde_json::Value;

/// A constraint on text, in the client's own words.
#[derive(Debug, Clone, PartialEq)]
pub enum Constraint {
    /// Any JSON object.
    JsonObject,
    /// JSON of a schema, as the client sent it.
    JsonSchema(Value),
    /// Text that matches a regular expression as a whole.
    Regex(String),
    /// Text of a grammar in Lark's notation.
    Lark(String),
    /// Text of a grammar in GBNF, the notation of llama.cpp.
    Gbnf(String),
    /// One of these texts.
    Choice(Vec<String>),
}
