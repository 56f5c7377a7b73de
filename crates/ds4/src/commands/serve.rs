//! `ds4 serve`: the HTTP server.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use ds4_runtime::Limits;
use ds4_server::{HttpLimits, Monitor, Server, ServerConfig, Status, TlsFiles};

use crate::{
    compute::ComputeArgs,
    interrupt::{self, Again},
    model::ModelArgs,
    terminal,
    text::ProfileArgs,
};

/// How often to look for Ctrl-C, and to show how the server is doing.
const GLANCE: Duration = Duration::from_millis(200);

/// Options of `ds4 serve`.
#[derive(Args)]
#[command(after_help = "\
Clients speak OpenAI's Chat Completions, Responses and Completions, or Anthropic's Messages, and may
name any model. A page to chat on is at the same address; /metrics and /openapi.json are there too.
Ctrl-C lets running answers end; a second one ends at once.")]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    profile: ProfileArgs,
    /// Context: tokens that prompt and answer may have together
    #[arg(short, long, value_name = "N", default_value_t = 32768)]
    ctx: usize,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    load: LoadArgs,
    /// Append requests, prompts and answers to a file, a line of JSON each
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Where to listen, and to whom.
#[derive(Args)]
#[command(next_help_heading = "Network")]
struct NetworkArgs {
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Port to listen on; 0 takes any that is free
    #[arg(long, value_name = "N", default_value_t = 8000)]
    port: u16,
    /// Token that clients must send; may be given several times
    #[arg(long = "token", value_name = "TOKEN", env = "DS4_TOKEN", hide_env_values = true)]
    tokens: Vec<String>,
    /// File with such tokens, one a line
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Let other machines in without a token
    #[arg(long)]
    insecure: bool,
    /// Let web pages from anywhere ask
    #[arg(long)]
    cors: bool,
    /// Certificates for TLS, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key for TLS, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Megabytes that the body of a request may have
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_body: usize,
}

/// How much to do at once.
#[derive(Args)]
#[command(next_help_heading = "Load")]
struct LoadArgs {
    /// Requests to run at the same time
    #[arg(long, value_name = "N", default_value_t = 32)]
    parallel: usize,
    /// Requests that may wait for their turn
    #[arg(long, value_name = "N", default_value_t = 256)]
    queue: usize,
    /// Megabytes for the KV state of requests, and of conversations kept for later
    #[arg(long, value_name = "N", default_value_t = 8192)]
    kv_memory: u64,
    /// Reuse the state of earlier answers too, not only of prompts: later turns begin sooner, but
    /// their text may depend on whether the state was still there
    #[arg(long)]
    reuse_answers: bool,
    /// Seconds that a request may take in all; 0 for no end
    #[arg(long, value_name = "N", default_value_t = 0)]
    timeout: u64,
    /// Seconds that running answers have after Ctrl-C
    #[arg(long, value_name = "N", default_value_t = 30)]
    grace: u64,
}

/// Serves until Ctrl-C.
pub fn run(args: &ServeArgs) -> Result<()> {
    let model = args.model.open()?;
    let longest = model.config.context_length;
    ensure!(
        (2..=longest).contains(&args.ctx),
        "--ctx: found {}, expected 2 to {longest}, the model's longest context",
        args.ctx
    );
    ensure!(args.load.parallel > 0, "--parallel: found 0, expected at least 1");
    let encoder = args.profile.encoder(&model)?;
    let engine = args.compute.engine(model, args.ctx)?;
    engine.warm_up(args.load.parallel)?;
    let settings = args.config(engine.backend().prefill_chunk())?;
    let address = SocketAddr::new(args.network.host, args.network.port);
    let server = Server::bind(address, engine, encoder, settings)?;
    interrupt::catch(Again::Exit)?;
    announce(args, server.address()?);
    let monitor = server.monitor();
    let runtime = ds4_server::runtime().context("cannot start threads")?;
    runtime.block_on(server.run(watch(monitor)))?;
    Ok(())
}

impl ServeArgs {
    fn config(&self, prefill_chunk: usize) -> Result<ServerConfig> {
        let network = &self.network;
        let mut tokens = network.tokens.clone();
        if let Some(path) = &network.token_file {
            let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            tokens.extend(lines.map(str::to_owned));
        }
        let tls = network.tls_cert.clone().zip(network.tls_key.clone());
        Ok(ServerConfig {
            model_name: "deepseek-v4-flash".to_owned(),
            tokens,
            insecure: network.insecure,
            cors: network.cors,
            tls: tls.map(|(certificates, key)| TlsFiles { certificates, key }),
            http: HttpLimits { body_bytes: network.max_body << 20, ..HttpLimits::default() },
            scheduler: Limits {
                context: self.ctx,
                running: self.load.parallel,
                waiting: self.load.queue,
                prefill_chunk,
                kv_bytes: self.load.kv_memory << 20,
                stall: Duration::from_secs(30),
                reuse_answers: self.load.reuse_answers,
            },
            request_timeout: Duration::from_secs(self.load.timeout),
            shutdown_grace: Duration::from_secs(self.load.grace),
            trace: self.trace.clone(),
        })
    }
}

/// Says where to point clients.
fn announce(args: &ServeArgs, address: SocketAddr) {
    let scheme = if args.network.tls_cert.is_some() { "https" } else { "http" };
    let base = format!("{scheme}://{address}");
    terminal::note(format_args!(
        "Serving on {base}\n\
         \x20 OpenAI clients:      base URL {base}/v1\n\
         \x20 Anthropic clients:   base URL {base}\n\
         \x20 Chat in a browser:   {base}/\n\
         Ctrl-C ends."
    ));
}

/// Shows how the server is doing, until Ctrl-C.
async fn watch(monitor: Monitor) {
    const GLANCES_A_SECOND: u32 = 5;
    let shows = io::stderr().is_terminal();
    let (mut before, mut shown) = (monitor.status(), Status::default());
    let mut glances = 0;
    while !interrupt::pressed() {
        tokio::time::sleep(GLANCE).await;
        glances += 1;
        let now = monitor.status();
        if shows && glances % GLANCES_A_SECOND == 0 {
            if now != shown || now.running > 0 {
                show(now, before);
            }
            (before, shown) = (now, now);
        }
    }
    terminal::note("\nWaiting for running answers to end; Ctrl-C again ends at once.");
}

/// One line, over the last one: what runs, and tokens of the last second.
fn show(now: Status, before: Status) {
    let line = format!(
        "{} running, {} waiting; tokens a second: {} of prompts, {} of answers",
        now.running,
        now.waiting,
        now.prompt_tokens - before.prompt_tokens,
        now.answer_tokens - before.answer_tokens,
    );
    // The line is for people who watch; if it cannot be shown, nobody misses it.
    let _ = write!(io::stderr(), "\r\x1b[K{line}");
}
