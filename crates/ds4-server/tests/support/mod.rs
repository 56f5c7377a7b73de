//! Servers for tests, and a client that shows what goes over the wire.

#![allow(dead_code, reason = "each test program uses a part")]

pub mod client;
#[path = "../../../ds4-runtime/tests/support/scripted.rs"]
pub mod scripted;

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use ds4_cpu::{CpuBackend, Kernels};
use ds4_engine::{Engine, rows::CacheRounding};
use ds4_model::Model;
use ds4_runtime::Limits;
use ds4_server::{HttpLimits, Monitor, ServeError, Server, ServerConfig};
use ds4_text::{profile::Profile, prompt::PromptEncoder, tokenizer::Tokenizer};
use gguf::GgufFile;
use scripted::{Capacity, Scripted, Timing, Work};
use serde_json::{Value, json};
use tokio::sync::oneshot;

static TINY: &[u8] = include_bytes!("../../../../models/tiny/tiny-b-q2.gguf");
static NANO: &[u8] = include_bytes!("../../../../models/nano/nano.gguf");

/// The tiny model, whose weights are random.
pub fn model() -> Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    MODEL.get_or_init(|| load("tiny", TINY)).clone()
}

fn load(name: &str, bytes: &'static [u8]) -> Arc<Model> {
    Arc::new(Model::from_gguf(GgufFile::from_static(name, bytes).unwrap()).unwrap())
}

pub fn tokenizer() -> Arc<Tokenizer> {
    tokenizer_of(&model())
}

fn tokenizer_of(model: &Model) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_gguf(&model.files()[0], model.config.vocab).unwrap())
}

/// Settings for tests: any free port, little patience.
pub fn config() -> ServerConfig {
    ServerConfig {
        model_name: "deepseek-v4-flash".to_owned(),
        tokens: Vec::new(),
        insecure: false,
        cors: false,
        tls: None,
        http: HttpLimits { read_timeout: Duration::from_secs(2), ..HttpLimits::default() },
        scheduler: Limits {
            context: 8192,
            running: 64,
            waiting: 64,
            prefill_chunk: 512,
            kv_bytes: 1 << 30,
            stall: Duration::from_secs(2),
            reuse_answers: false,
        },
        request_timeout: Duration::ZERO,
        shutdown_grace: Duration::from_secs(5),
        trace: None,
    }
}

/// A running server; dropping it ends it.
pub struct Running {
    pub address: SocketAddr,
    pub monitor: Monitor,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Running {
    /// Serves answers of the tiny model, which are noise.
    pub fn tiny(config: ServerConfig) -> Running {
        Running::computed(config, model())
    }

    /// Serves answers of the model that is built into `ds4`.
    pub fn nano(config: ServerConfig) -> Running {
        Running::computed(config, load("nano", NANO))
    }

    fn computed(config: ServerConfig, model: Arc<Model>) -> Running {
        let tokenizer = tokenizer_of(&model);
        let backend = CpuBackend::new(model, Kernels::detect(), CacheRounding::On);
        Running::start_with(Engine::new(backend), tokenizer, config)
    }

    /// Serves the answers of [`scripted::SCRIPTS`].
    pub fn scripted(config: ServerConfig) -> Running {
        Running::timed(config, Timing::default())
    }

    /// The same with a backend that takes its time.
    pub fn timed(config: ServerConfig, timing: Timing) -> Running {
        Running::start(Engine::new(Scripted::new(&model(), tokenizer(), timing)), config)
    }

    /// The same with a device that has memory for little.
    pub fn on_a_device_of(config: ServerConfig, capacity: Capacity) -> Running {
        let backend = Scripted::new(&model(), tokenizer(), Timing::default());
        Running::start(Engine::new(backend.on_a_device_of(capacity)), config)
    }

    /// The same with another tokenizer, and a view of what the backend does.
    pub fn watched(
        config: ServerConfig,
        timing: Timing,
        tokenizer: Arc<Tokenizer>,
    ) -> (Running, Work) {
        let work = Work::default();
        let backend = Scripted::new(&model(), tokenizer.clone(), timing).watched(work.clone());
        (Running::start_with(Engine::new(backend), tokenizer, config), work)
    }

    fn start(engine: Engine, config: ServerConfig) -> Running {
        Running::start_with(engine, tokenizer(), config)
    }

    fn start_with(engine: Engine, tokenizer: Arc<Tokenizer>, config: ServerConfig) -> Running {
        let server = bind(engine, tokenizer, config);
        let (address, monitor) = (server.address().unwrap(), server.monitor());
        let (stop, stopped) = oneshot::channel();
        let serve = move || {
            let runtime = ds4_server::runtime().unwrap();
            let stopped = async move {
                let _ = stopped.await;
            };
            runtime.block_on(server.run(stopped))
        };
        let thread = Some(std::thread::spawn(serve));
        Running { address, monitor, stop: Some(stop), thread }
    }

    /// What becomes of a server that is to end at once.
    pub fn briefly(config: ServerConfig) -> Result<(), ServeError> {
        let engine = Engine::new(Scripted::new(&model(), tokenizer(), Timing::default()));
        let server = bind(engine, tokenizer(), config);
        ds4_server::runtime().unwrap().block_on(server.run(std::future::ready(())))
    }

    /// Waits for a server that ends by itself, and says why it did.
    pub fn ended(mut self) -> Result<(), ServeError> {
        wait_until("the end", || self.thread.as_ref().is_none_or(JoinHandle::is_finished));
        self.thread.take().unwrap().join().expect("the server panicked")
    }

    /// Tells the server to end.
    pub fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }
}

/// A chat request for a script.
pub fn ask(script: &str, tokens: usize) -> Value {
    json!({ "messages": [{ "role": "user", "content": format!("[{script}]") }], "thinking": false,
        "max_tokens": tokens })
}

/// Waits until something holds; it never will after so long.
pub fn wait_until(what: &str, test: impl Fn() -> bool) {
    let begun = Instant::now();
    while !test() {
        assert!(begun.elapsed() < Duration::from_secs(120), "{what} takes too long");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn bind(engine: Engine, tokenizer: Arc<Tokenizer>, config: ServerConfig) -> Server {
    let encoder = PromptEncoder::new(tokenizer, Profile::Preview);
    let address = "127.0.0.1:0".parse().unwrap();
    Server::bind(address, engine, encoder, config).unwrap()
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            let well = matches!(ended, Ok(Ok(())));
            assert!(well || std::thread::panicking(), "the server ended badly: {ended:?}");
        }
    }
}
