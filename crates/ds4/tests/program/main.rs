//! The real program, from the outside.

mod answers;
mod convert;
mod dummy;
mod logits;
#[cfg(unix)]
mod lost_device;
mod measure;
mod models;
mod nano;
mod process;
mod serve;
#[cfg(unix)]
mod terminal;
mod tokens;
mod usage;
