//! The HTTP server: OpenAI and Anthropic dialects of the runtime.
//!
//! From the outside in: `http` holds the routes and what every request passes; `dialect` turns
//! requests into conversations and model output into responses, by DeepSeek's own conversion.
//! [`ds4_runtime`] runs them on the engine, many at a time.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

mod dialect;
mod http;
mod metrics;
mod openapi;

use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use ds4_engine::Engine;
use ds4_runtime::{Limits, Runtime, grammar::Grammars, replay::Replay};
use ds4_text::prompt::PromptEncoder;

pub use http::{app::HttpLimits, listen::TlsFiles};

use http::{access::Access, state::App, trace::TraceFile};
use metrics::Metrics;

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// The model's name in lists; requests may use any.
    pub model_name: String,
    /// Tokens of which clients must send one; none are needed if there are none.
    pub tokens: Vec<String>,
    /// Whether an address that other machines reach may be used without tokens.
    pub insecure: bool,
    /// Whether web pages from anywhere may ask.
    pub cors: bool,
    /// Files for TLS; without them connections are plain.
    pub tls: Option<TlsFiles>,
    /// Bounds of requests as such.
    pub http: HttpLimits,
    /// Bounds of what runs.
    pub scheduler: Limits,
    /// Time for a request in all; zero is without end.
    pub request_timeout: Duration,
    /// Time that running answers have to end when the server does.
    pub shutdown_grace: Duration,
    /// File to write requests to, with everything that was said.
    pub trace: Option<PathBuf>,
}

/// Why a server could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Everyone on the network could use it.
    #[error(
        "{0} can be reached from other machines: set a token that clients must send, or say \
         --insecure to let everyone in"
    )]
    Open(SocketAddr),
    /// A token that nobody can send.
    #[error("a token is empty: leave it out to serve without tokens")]
    EmptyToken,
    /// The vocabulary is unfit for grammars.
    #[error("the model's vocabulary: {0}")]
    Vocabulary(String),
    /// The trace cannot be written.
    #[error("trace {}: {error}", path.display())]
    Trace {
        /// Its path.
        path: PathBuf,
        /// What went wrong.
        error: io::Error,
    },
    /// Nothing can be computed any more.
    #[error("{0}: running requests were answered with this error; start the server anew")]
    Fatal(String),
    /// A socket or a thread.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Requests that are prepared at the same time, which is parsing, tokenizing and compiling
/// grammars. More would wait for cores, each with a stack of its own.
const PREPARED_TOGETHER: usize = 8;

/// Time for which a server that cannot compute any more still says so, to requests that are under
/// way and to whoever looks after it; less if there is less grace for running answers.
const FAREWELL: Duration = Duration::from_secs(2);

/// Threads to serve on.
///
/// # Errors
/// If the system has no more.
pub fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(PREPARED_TOGETHER)
        .build()
}

/// A server, ready to serve.
pub struct Server {
    app: Arc<App>,
    listener: TcpListener,
}

/// Figures of a running server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Status {
    /// Requests whose turn it is.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Tokens of prompts since the start.
    pub prompt_tokens: u64,
    /// Tokens of answers since the start, without those still running.
    pub answer_tokens: u64,
}

/// Looks at a running server.
#[derive(Clone)]
pub struct Monitor(Arc<App>);

impl Monitor {
    /// How it is doing.
    pub fn status(&self) -> Status {
        let load = self.0.runtime.load();
        let (prompt_tokens, answer_tokens) = self.0.metrics.tokens();
        Status { running: load.running(), waiting: load.waiting(), prompt_tokens, answer_tokens }
    }
}

impl Server {
    /// Binds to `address` and starts the scheduler.
    ///
    /// # Errors
    /// If the address cannot be used, or would be open to everyone without anybody having said so.
    pub fn bind(
        address: SocketAddr,
        engine: Engine,
        encoder: PromptEncoder,
        config: ServerConfig,
    ) -> Result<Server, ServeError> {
        if config.tokens.iter().any(String::is_empty) {
            return Err(ServeError::EmptyToken);
        }
        if !address.ip().is_loopback() && config.tokens.is_empty() && !config.insecure {
            return Err(ServeError::Open(address));
        }
        let open = |path: &PathBuf| {
            TraceFile::open(path).map_err(|error| ServeError::Trace { path: path.clone(), error })
        };
        let trace = config.trace.as_ref().map(open).transpose()?;
        let listener = TcpListener::bind(address)?;
        let tokenizer = encoder.tokenizer().clone();
        let grammars = Grammars::new(tokenizer.clone())
            .map_err(|error| ServeError::Vocabulary(error.to_string()))?;
        let metrics = Metrics::new();
        let observer = Box::new(metrics.clone());
        let runtime = Runtime::start(engine, tokenizer, config.scheduler, observer)?;
        let access = Access::new(config.tokens.clone(), config.cors, address);
        let app = App {
            access,
            encoder,
            grammars: Arc::new(grammars),
            runtime,
            metrics,
            replay: Replay::default(),
            trace,
            started: dialect::unix_time(),
            config,
        };
        Ok(Server { app: Arc::new(app), listener })
    }

    /// The address, with the port that was chosen if none was asked for.
    ///
    /// # Errors
    /// If the system does not know it.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// A look at the server, for while it runs.
    pub fn monitor(&self) -> Monitor {
        Monitor(self.app.clone())
    }

    /// Serves until `stop` is there; then no more requests are taken, and running answers have
    /// until the end of the grace time.
    ///
    /// # Errors
    /// If the socket fails, a file for TLS cannot be used, or nothing can be computed any more.
    pub async fn run(
        self,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), ServeError> {
        let handle = axum_server::Handle::new();
        let (app, stopping) = (self.app.clone(), handle.clone());
        let grace = self.app.config.shutdown_grace;
        let stopper = tokio::spawn(async move {
            tokio::select! {
                () = stop => {
                    app.runtime.close(Instant::now() + grace);
                    // A little more for the last events to reach their clients.
                    stopping.graceful_shutdown(Some(grace + Duration::from_secs(1)));
                }
                () = app.runtime.load().until_fatal() => {
                    tokio::time::sleep(FAREWELL.min(grace)).await;
                    stopping.shutdown();
                }
            }
        });
        let config = &self.app.config;
        let router = http::app::router(self.app.clone());
        let served =
            http::listen::serve(self.listener, config.tls.as_ref(), config.http, router, handle)
                .await;
        stopper.abort();
        self.app.runtime.close(Instant::now());
        let app = self.app.clone();
        // What becomes of the thread is in the runtime's load.
        let _ = tokio::task::spawn_blocking(move || app.runtime.join()).await;
        match self.app.runtime.load().fatal() {
            Some(reason) => Err(ServeError::Fatal(reason.to_owned())),
            None => Ok(served?),
        }
    }
}
