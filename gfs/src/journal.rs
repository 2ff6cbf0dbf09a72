//! The journal: writing it ([`log`]), reading it after a death ([`replay`]).

mod ail;
mod flush;
pub mod log;
pub mod replay;
#[cfg(test)]
mod tests;
