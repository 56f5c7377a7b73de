//! The state that all requests share.

use std::sync::Arc;

use ds4_runtime::{Runtime, grammar::Grammars, replay::Replay};
use ds4_text::prompt::PromptEncoder;

use super::{access::Access, trace::TraceFile};
use crate::{ServerConfig, metrics::Metrics};

/// The state that all requests share.
pub(crate) struct App {
    pub(crate) config: ServerConfig,
    pub(crate) access: Access,
    pub(crate) encoder: PromptEncoder,
    pub(crate) grammars: Arc<Grammars>,
    pub(crate) runtime: Runtime,
    pub(crate) metrics: Metrics,
    pub(crate) replay: Replay,
    pub(crate) trace: Option<TraceFile>,
    /// Seconds since 1970.
    pub(crate) started: u64,
}
