//! Runs many requests at a time on one engine.
//!
//! [`Runtime`] is the scheduler: it takes requests in terms of tokens and says what becomes of
//! them as events. [`grammar`] says which tokens an answer may have next, and [`replay`] keeps
//! tool calls as the model wrote them. Nothing here knows HTTP, a dialect or a terminal.

pub mod grammar;
mod observer;
pub mod replay;
mod scheduler;

pub use observer::Observer;
pub use scheduler::{
    AnswerToken, ClientId, Event, Failure, Finish, Job, Load, Refused, ReuseSource, Runtime,
    SchedulerLimits, SessionBytes,
};
