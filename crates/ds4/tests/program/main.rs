//! The real program, from the outside.

mod answers;
mod dummy;
mod logits;
mod models;
mod nano;
mod process;
#[cfg(unix)]
mod terminal;
mod tokens;
mod usage;
