//! The real program, from the outside.

mod answers;
mod convert;
mod dummy;
mod logits;
mod measure;
mod models;
mod nano;
mod process;
mod serve;
#[cfg(unix)]
mod terminal;
mod tokens;
mod usage;
