//! Real mounts in this process.

mod lifetimes;
mod listing;
mod rig;
mod smoke;
mod stress;

use super::coherence::Part;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Parts of the protocol switched off, to see that the checks notice.
#[derive(Default)]
pub(super) struct Sabotage(AtomicU32);

impl Sabotage {
    pub(super) fn skip(&self, part: Part) {
        self.0.fetch_or(1 << part as u32, Ordering::SeqCst);
    }

    pub(super) fn skips(&self, part: Part) -> bool {
        self.0.load(Ordering::Relaxed) & (1 << part as u32) != 0
    }
}

/// What tests see of the requests of one mount.
#[derive(Default)]
pub(super) struct Probe {
    pub(super) asked: Asked,
}

/// Requests that arrived.
#[derive(Default)]
pub(super) struct Asked {
    /// LOOKUP and GETATTR.
    pub(super) single: AtomicU64,
    /// READDIRPLUS.
    pub(super) listings: AtomicU64,
    /// FORGET, when it is done.
    pub(super) forgets: AtomicU64,
}
