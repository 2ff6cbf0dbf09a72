//! Real mounts in this process.

mod lifetimes;
mod listing;
mod probes;
mod rig;
mod smoke;
mod stress;

use super::coherence::Part;
use cairn_base::Rng;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

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

/// What tests see of the requests of one mount, and slow down.
#[derive(Default)]
pub(super) struct Probe {
    pub(super) asked: Asked,
    /// Replies, before they are written.
    pub(super) replies: Slow,
    /// Notifications that drop pages, before they are sent.
    pub(super) passes: Arc<Slow>,
    /// All handles for reading are opened as those of a file whose size could not be made right.
    pub(super) reads_direct: AtomicBool,
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

/// Random waits; none until [`Slow::set`].
#[derive(Default)]
pub(super) struct Slow {
    one_in: AtomicU64,
    least_micros: AtomicU64,
    most_micros: AtomicU64,
    draws: AtomicU64,
}

impl Slow {
    /// One of `one_in`, from `least` to `most`.
    fn set(&self, one_in: u64, least: Duration, most: Duration) {
        self.least_micros.store(least.as_micros() as u64, Ordering::Relaxed);
        self.most_micros.store(most.as_micros() as u64, Ordering::Relaxed);
        self.one_in.store(one_in, Ordering::SeqCst);
    }

    fn below(&self, n: u64) -> u64 {
        Rng::new(self.draws.fetch_add(1, Ordering::Relaxed)).below(n)
    }

    pub(super) fn chooses(&self) -> bool {
        let one_in = self.one_in.load(Ordering::Relaxed);
        one_in > 0 && self.below(one_in) == 0
    }

    pub(super) fn pause(&self) {
        if self.one_in.load(Ordering::Relaxed) > 0 {
            let (least, most) =
                (self.least_micros.load(Ordering::Relaxed), self.most_micros.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_micros(least + self.below(most - least + 1)));
        }
    }
}
