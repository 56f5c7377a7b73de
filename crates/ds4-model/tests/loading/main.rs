//! What loads, and what is refused with which words.

mod bad_models;
mod draft;
mod families;
mod splits;
