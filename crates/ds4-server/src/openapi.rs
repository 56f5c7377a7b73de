//! The description of the interface, served at `/openapi.json`.

use serde_json::Value;

/// The description in OpenAPI 3.1.
pub(crate) fn description() -> Value {
    Value::Null
}
