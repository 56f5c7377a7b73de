//! The real program, from the outside.

mod answers;
mod convert;
mod dummy;
mod logits;
mod measure;
mod models;
mod nano;
mod process;
#[cfg(unix)]
mod terminal;
mod tokens;
mod usage;
