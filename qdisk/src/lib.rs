//! The quorum disk: nodes that share a LUN watch each other through it, and agree on who may count its votes.
//!
//! Each node owns one 4096-byte block (its *E-block*) in the extension area and writes nothing else there, every
//! cycle `i`. Everything is said by writing one's own block and reading all: liveness, the election of a master
//! (Disk Paxos, one number per term), the master's lease of the device votes for one named view, and kill entries
//! against nodes that must stop. The 16 classic status blocks are kept truthful beside it for old tools; nothing of
//! ours depends on them.
//!
//! ```text
//!   ondisk ── bytes of label, status blocks, E-blocks, seal          mkqdisk, mkqdisk_cli ── the tool
//!   core   ── step(now, event, &mut actions): cycle, election,       heuristic ── programs that give the score
//!             lease, eviction, self-stop; no I/O                     driver    ── threads, LUN handle, clock
//! ```
//!
//! Not done: the message box of the E-block (offset 704) is kept zero; `master_wins`, `tko_up`, `upgrade_wait` and
//! `master_wait` of the historic configuration have no effect of their own; the historic blocks are written, not read.
//!
//! Invariants: a slot of the extension area is written by its owner only (I11); at most one master per term, terms
//! rise; the device votes are counted in at most one component at a time; a node that is evicted for silence has
//! withdrawn its permit before the eviction is written.

#![deny(unsafe_code)]

pub mod core;
pub mod driver;
pub mod event;
mod heuristic;
pub mod mkqdisk;
pub mod mkqdisk_cli;
pub mod ondisk;
pub mod realtime;

pub use event::{
    DiskState, KillReason, LogLevel, PillFailure, PillProof, QdiskCommand, QdiskConfig, QdiskEvent, RingView,
    StopWhy, ViewName, VotesWhy,
};

/// Node ids on a quorum disk are 1…16.
pub const MAX_NODES: usize = 16;
