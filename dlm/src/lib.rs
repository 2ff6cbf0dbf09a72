//! The distributed lock manager: VMS/Linux lock semantics over resource trees, one master per tree, and recovery that
//! stops nothing but what a dead member may have held.
//!
//! ```text
//!   core        state machine of one member: holder, master, directory, recovery; no I/O
//!   resource    grant rules, queues, value block, ghosts, masks of one resource
//!   plock       byte-range locks of one file
//!   directory   which member owns which slice of the names
//!   msg wire    messages and their bytes
//!   driver      authenticated TCP links, threads, callbacks: `Node`
//! ```
//!
//! Not done, on purpose or yet: moving a living master (trees follow use only when they are dropped or rebuilt),
//! orphan locks of user processes, enforcement of parent locks (children are named by path only), deadlock search
//! among ordinary locks across resources (conversion deadlocks and byte-range circles are found), a value written by a
//! release that was on its way to a dying or leaving master is flagged not valid, not re-presented.

mod core;
mod directory;
mod driver;
mod msg;
mod mutant;
mod name;
mod plock;
mod resource;
mod types;
mod wire;

#[cfg(test)]
mod oracle;
#[cfg(test)]
mod sim;

pub use crate::core::{
    Action, Completion, Config, Core, CoreView, DumpDir, DumpLock, DumpResource, DumpState, Event,
    RebuildReport,
};
pub use driver::{Callbacks, Node, NodeConfig, NodeError, View};
pub use msg::{Claim, Msg, PlockAnswer, Probe, Record, TreeOp};
pub use name::ResName;
pub use plock::{PlockKey, PlockRange, PlockTest};
pub use resource::LvbCopy;
pub use types::{
    Flags, LVB_LEN, LockError, LockId, Lvb, LvbMove, Mode, ModeSet, SbFlags, Status, Term, lvb_move,
};
