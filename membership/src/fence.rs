//! Fencing: who must be proved dead, who proves it, and how.
//!
//! `domain` decides (replicated, sans-I/O); `agent` acts (the built-in `fence_local`, outside agents by the stdin protocol).

pub mod agent;
pub mod domain;
