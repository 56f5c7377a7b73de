//! Runs many requests at a time on one engine.
//!
//! A [`Runtime`] takes each [`Request`] in terms of tokens and says what becomes of it as
//! [`Events`]; `scheduler` is the thread behind it. [`grammar`] says which tokens an answer may
//! have next, and [`replay`] keeps tool calls as the model wrote them. Nothing here knows HTTP, a
//! dialect or a terminal.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used))]

mod events;
pub mod grammar;
mod limits;
mod load;
mod observer;
pub mod replay;
mod request;
mod runtime;
mod scheduler;

pub use events::Events;
pub use limits::Limits;
pub use load::Load;
pub use observer::Observer;
pub use request::{AnswerToken, ClientId, Event, Failure, Finish, Refused, Request};
pub use runtime::Runtime;
pub use scheduler::prefix_cache::ReuseSource;
