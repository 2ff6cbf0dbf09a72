//! Real mounts in this process.

mod lifetimes;
mod rig;
mod smoke;
mod stress;

use super::coherence::Part;
use std::sync::atomic::{AtomicU32, Ordering};

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
