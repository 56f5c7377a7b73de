//! The routes.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::Response,
    routing::{get, post},
};
use ds4_runtime::ClientId;
use ds4_text::request;
use futures_util::StreamExt;
use serde_json::json;
use tower_http::cors::{Any, CorsLayer};

use super::{
    answer::{self, json_response},
    error::{ApiError, Dialect},
    job, models,
    preparing::prepared,
    state::App,
};
use crate::dialect::{
    Reply, chat::ChatReply, completions::CompletionReply, messages::MessagesReply,
    responses::ResponsesReply,
};

/// The page at `/`.
const PAGE: &str = include_str!("../page.html");

/// What the page may do: run its own script, and ask this server.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
     connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// All routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    let api = Router::new()
        .route("/models", get(list_models))
        .route("/models/{*id}", get(one_model))
        .route("/chat/completions", post(chat))
        .route("/completions", post(completions))
        .route("/responses", post(responses))
        .route("/messages", post(messages))
        .route("/messages/count_tokens", post(count_tokens));
    let mut router = Router::new()
        .nest("/v1", api.clone())
        .nest("/anthropic/v1", api.clone())
        .merge(api)
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi))
        .route("/health", get(health))
        .route("/healthz", get(health))
        .route("/", get(page))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(app.clone(), check));
    if app.config.cors {
        let methods = [Method::GET, Method::POST, Method::OPTIONS];
        let cors = CorsLayer::new().allow_origin(Any).allow_methods(methods).allow_headers(Any);
        router = router.layer(cors);
    }
    router.with_state(app)
}

/// What every request passes.
async fn check(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let dialect = Dialect::of(&path);
    let is_open = matches!(path.as_str(), "/" | "/health" | "/healthz");
    let headers = request.headers();
    let checked = app
        .access
        .check_origin(request.uri(), headers)
        .and_then(|()| if is_open { Ok(0) } else { app.access.check_token(headers) });
    let response = match checked {
        Ok(token) => {
            let client = client_id(&request, token);
            request.extensions_mut().insert(client);
            next.run(request).await
        }
        Err(error) => error.response(dialect),
    };
    app.metrics.response(known_route(&path), response.status().as_u16());
    response
}

/// Clients are told apart by token, or else by address.
fn client_id(request: &Request, token: usize) -> ClientId {
    use std::hash::{DefaultHasher, Hash, Hasher};
    if token > 0 {
        return ClientId(token as u64);
    }
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
    let mut hasher = DefaultHasher::new();
    peer.map(|ConnectInfo(address)| address.ip()).hash(&mut hasher);
    ClientId(hasher.finish())
}

/// The route of a path, for metrics, which should not grow with what clients make up.
fn known_route(path: &str) -> &'static str {
    const ROUTES: [&str; 10] = [
        "/chat/completions",
        "/messages/count_tokens",
        "/completions",
        "/responses",
        "/messages",
        "/models",
        "/metrics",
        "/openapi.json",
        "/healthz",
        "/health",
    ];
    match path {
        "/" => "/",
        path => ROUTES.into_iter().find(|route| path.ends_with(route)).unwrap_or("other"),
    }
}

async fn chat(app: State<Arc<App>>, request: Request) -> Response {
    generate::<ChatReply>(app, request).await
}

async fn completions(app: State<Arc<App>>, request: Request) -> Response {
    generate::<CompletionReply>(app, request).await
}

async fn responses(app: State<Arc<App>>, request: Request) -> Response {
    generate::<ResponsesReply>(app, request).await
}

async fn messages(app: State<Arc<App>>, request: Request) -> Response {
    generate::<MessagesReply>(app, request).await
}

async fn generate<R: Reply>(State(app): State<Arc<App>>, request: Request) -> Response {
    let dialect = Dialect::of(request.uri().path());
    let client = request.extensions().get::<ClientId>().copied().unwrap_or(ClientId(0));
    let answered = match read_body(&app, request.into_body()).await {
        Ok(body) => answer::answer::<R>(app, client, body).await,
        Err(error) => Err(error),
    };
    answered.unwrap_or_else(|error| error.response(dialect))
}

/// The tokens of a prompt, without an answer.
async fn count_tokens(State(app): State<Arc<App>>, request: Request) -> Response {
    let counted = async {
        let body = read_body(&app, request.into_body()).await?;
        let counted = prepared(move || {
            let mut request = request::messages::read(request::parse(&body)?)?;
            app.replay.restore_reasoning(&mut request.converted.conversation);
            job::prompt(&app, &request).map(|prompt| prompt.ids.len())
        });
        counted.await
    };
    match counted.await {
        Ok(tokens) => json_response(&json!({ "input_tokens": tokens })),
        Err(error) => error.response(Dialect::Anthropic),
    }
}

/// Reads a body, of bounded size and in bounded time.
async fn read_body(app: &App, body: Body) -> Result<Bytes, ApiError> {
    let most = app.config.http.body_bytes;
    let too_large = || {
        let message = format!("the request body is too large: at most {most} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let reading = async {
        let mut parts = body.into_data_stream();
        let mut bytes = Vec::new();
        while let Some(part) = parts.next().await {
            let part = part.map_err(|_| ApiError::bad_request("the request body ended early"))?;
            if bytes.len() + part.len() > most {
                return Err(too_large());
            }
            bytes.extend_from_slice(&part);
        }
        Ok(Bytes::from(bytes))
    };
    tokio::time::timeout(app.config.http.read_timeout, reading).await.unwrap_or_else(|_| {
        let message = "the request body took too long to arrive";
        Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
    })
}

async fn list_models(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    json_response(&models::list(&app, &headers))
}

/// Any name is the model's: requests may name any, too.
async fn one_model(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    json_response(&models::one(&app, &headers))
}

async fn health(State(app): State<Arc<App>>) -> Response {
    let load = app.runtime.load();
    let status = match load.fatal() {
        Some(reason) => json!({ "status": "failed", "reason": reason }),
        None if load.is_closed() => json!({ "status": "shutting down" }),
        None => return json_response(&json!({ "status": "ok" })),
    };
    let mut response = json_response(&status);
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let mut response = Response::new(Body::from(app.metrics.text()));
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

async fn openapi() -> Response {
    json_response(&crate::openapi::description())
}

async fn page() -> Response {
    let mut response = Response::new(Body::from(PAGE));
    let headers = response.headers_mut();
    let html = HeaderValue::from_static("text/html; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, html);
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

async fn unknown_route(request: Request) -> Response {
    let path = request.uri().path();
    let message = format!("there is no {path:.200} here: see /openapi.json for what there is");
    ApiError::new(StatusCode::NOT_FOUND, message).response(Dialect::of(path))
}

async fn wrong_method(request: Request) -> Response {
    let (method, path) = (request.method(), request.uri().path());
    let message = format!("{path:.200} does not take {method:.20}");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).response(Dialect::of(path))
}

/// Bounds of requests as such.
#[derive(Debug, Clone, Copy)]
pub struct HttpLimits {
    /// Bytes of a request's line and headers together.
    pub header_bytes: usize,
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Time for a request's headers, and again for its body.
    pub read_timeout: Duration,
    /// Time for which a client may take nothing of what is sent to it.
    pub write_timeout: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        HttpLimits {
            header_bytes: 64 * 1024,
            body_bytes: 64 * 1024 * 1024,
            read_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(30),
        }
    }
}
