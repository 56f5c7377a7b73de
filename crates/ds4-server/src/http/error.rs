//! Errors, in the dialect of the route they occur on.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use ds4_runtime::{Failure, Refused, grammar::GrammarError};
use ds4_text::request::RequestError;
use serde_json::{Value, json};

/// Whose form errors have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    OpenAi,
    Anthropic,
}

impl Dialect {
    /// The dialect of a path.
    pub(crate) fn of(path: &str) -> Dialect {
        if path.contains("/messages") { Dialect::Anthropic } else { Dialect::OpenAi }
    }
}

/// Why there is no answer.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    /// The field that is wrong.
    pub(crate) param: Option<String>,
    pub(crate) code: Option<&'static str>,
    /// Tokens of the prompt and of the context, where the first are too many.
    pub(crate) counts: Option<(usize, usize)>,
    /// Seconds after which to try again.
    pub(crate) retry_after: Option<u64>,
}

impl ApiError {
    /// An error with nothing but a message.
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let message = message.into();
        ApiError { status, message, param: None, code: None, counts: None, retry_after: None }
    }

    /// The request is wrong.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::BAD_REQUEST, message)
    }

    /// The prompt does not fit.
    pub(crate) fn context(param: &str, prompt: usize, context: usize) -> Self {
        let message = format!(
            "prompt is too long: {prompt} tokens, and the context has {context} for prompt and answer together: \
             shorten or compact the conversation"
        );
        ApiError {
            param: Some(param.to_owned()),
            code: Some("context_length_exceeded"),
            counts: Some((prompt, context)),
            ..ApiError::bad_request(message)
        }
    }

    /// The body in a dialect.
    pub(crate) fn body(&self, dialect: Dialect) -> Value {
        let mut error = match dialect {
            Dialect::OpenAi => json!({
                "message": self.message,
                "type": self.openai_type(),
                "param": self.param,
                "code": self.openai_code(),
            }),
            Dialect::Anthropic => {
                json!({ "type": self.anthropic_type(), "message": self.message })
            }
        };
        if let Some((prompt, context)) = self.counts {
            error["n_prompt_tokens"] = json!(prompt);
            error["n_ctx"] = json!(context);
        }
        match dialect {
            Dialect::OpenAi => json!({ "error": error }),
            Dialect::Anthropic => json!({ "type": "error", "error": error }),
        }
    }

    /// The code that clients of OpenAI's interfaces look at.
    pub(crate) fn openai_code(&self) -> &'static str {
        self.code.unwrap_or_else(|| self.openai_type())
    }

    /// The response in a dialect.
    pub(crate) fn response(&self, dialect: Dialect) -> Response {
        let mut response = Response::new(Body::from(self.body(dialect).to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }

    fn openai_type(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 | 405 => "not_found_error",
            429 => "rate_limit_exceeded",
            503 => "overloaded",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    fn anthropic_type(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 | 405 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let message = error.to_string();
        match error {
            RequestError::Field { field, .. } => {
                ApiError { param: Some(field), ..ApiError::bad_request(message) }
            }
            RequestError::Internal(_) => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message),
            _ => ApiError::bad_request(message),
        }
    }
}

impl From<GrammarError> for ApiError {
    fn from(error: GrammarError) -> Self {
        ApiError::bad_request(format!("this constraint cannot be enforced: {error}"))
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Invalid(reason) => ApiError::bad_request(reason),
            Refused::QueueFull { retry_after } => {
                let seconds = retry_after.as_secs().max(1);
                let message =
                    format!("too many requests are waiting: please try again in {seconds}s");
                ApiError {
                    retry_after: Some(seconds),
                    ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, message)
                }
            }
            Refused::ShuttingDown => Failure::ShuttingDown.into(),
            Refused::Fatal(reason) => ApiError {
                status: StatusCode::SERVICE_UNAVAILABLE,
                ..Failure::Fatal(reason).into()
            },
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let status = match failure {
            Failure::Engine(_) | Failure::Fatal(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Failure::Deadline | Failure::Stalled => StatusCode::GATEWAY_TIMEOUT,
            Failure::Memory(_) | Failure::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
        };
        let message = match failure {
            Failure::Fatal(reason) => format!("{reason}: the server is ending"),
            Failure::Deadline => "the request took longer than this server allows".to_owned(),
            Failure::ShuttingDown => "the server is shutting down".to_owned(),
            failure => failure.to_string(),
        };
        ApiError::new(status, message)
    }
}
