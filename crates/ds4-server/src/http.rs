//! HTTP: routes, what every request passes, and bodies.

pub(crate) mod access;
pub(crate) mod answer;
pub(crate) mod app;
pub(crate) mod error;
pub(crate) mod job;
pub(crate) mod listen;
pub(crate) mod models;
mod preparing;
mod recorder;
pub(crate) mod state;
pub(crate) mod token_text;
pub(crate) mod trace;
