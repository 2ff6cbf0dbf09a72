//! Totals of the volume: the master `statfs` file plus this node's own deltas.
//!
//! Deltas are changed in the same transaction as the bitmaps (see [`crate::trans::Trans::statfs`]) and moved to the master now and
//! then, and at unmount. What other nodes have not moved yet does not show here: `df` may differ between nodes until they do.

use super::{Volume, inode_glock};
use crate::glock::AcquireFlags;
use crate::journal::log::FlushReason;
use crate::lockspace::LockState;
use crate::ondisk::dinode::Dinode;
use crate::ondisk::header::MetaType;
use crate::ondisk::statfs::StatfsChange;
use crate::trans::TransSize;
use crate::{BlockNo, JournalId, Result};
use parking_lot::{Condvar, Mutex};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Numbers for statfs(2), in blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    pub blocks: u64,
    pub free: u64,
    pub dinodes: u64,
}

/// The thread that moves deltas to the master, and what keeps two from doing it at once.
#[derive(Clone)]
pub(super) struct Sync(Arc<State>);

struct State {
    interval: Duration,
    running: Mutex<()>,
    /// Journals replayed by us whose users' deltas are not in the master file yet.
    adopted: Mutex<Vec<JournalId>>,
    stop: Mutex<bool>,
    stopped: Condvar,
}

impl Sync {
    pub(super) fn new(interval: Duration) -> Self {
        Self(Arc::new(State {
            interval,
            running: Mutex::default(),
            adopted: Mutex::default(),
            stop: Mutex::new(false),
            stopped: Condvar::new(),
        }))
    }

    pub(super) fn adopt(&self, jid: JournalId) {
        let mut adopted = self.0.adopted.lock();
        if !adopted.contains(&jid) {
            adopted.push(jid);
        }
    }

    pub(super) fn stop(&self) {
        *self.0.stop.lock() = true;
        self.0.stopped.notify_all();
    }

    /// Body of the thread.
    pub(super) fn run(&self, volume: &Weak<Volume>) {
        loop {
            let mut stop = self.0.stop.lock();
            if !*stop {
                self.0.stopped.wait_for(&mut stop, self.0.interval);
            }
            if *stop {
                return;
            }
            drop(stop);
            let Some(volume) = volume.upgrade() else { return };
            if volume.is_read_only() {
                return;
            }
            if let Err(e) = volume.statfs_sync() {
                tracing::warn!(fs = %volume.name(), err = %e, "totals not synced");
                if volume.disk().is_withdrawn() {
                    return;
                }
            }
        }
    }
}

fn totals(s: StatfsChange) -> Totals {
    let positive = |n: i64| u64::try_from(n).unwrap_or(0);
    Totals { blocks: positive(s.total), free: positive(s.free), dinodes: positive(s.dinodes) }
}

impl Volume {
    /// Takes the statfs inode's glock SH.
    pub fn statfs(&self) -> Result<Totals> {
        let addr = self.system.statfs;
        let holder = self.glocks.acquire(inode_glock(addr), LockState::Shared, AcquireFlags::NONE)?;
        let buf = self.cache.read(holder.glock(), addr, MetaType::Dinode)?;
        let master =
            buf.with(|b| StatfsChange::decode(&b[Dinode::SIZE..])).map_err(|e| e.at(BlockNo(addr.0)))?;
        let local = self.writer.as_ref().map(|w| w.log.local_statfs()).unwrap_or_default();
        Ok(totals(master.plus(local)))
    }

    /// Moves this node's deltas to the master file, and those of dead nodes whose journals it has replayed.
    pub fn statfs_sync(&self) -> Result<()> {
        let log = self.log()?;
        let _one = self.statfs.0.running.lock();
        let adopted = std::mem::take(&mut *self.statfs.0.adopted.lock());
        for jid in adopted {
            if !self.fold_statfs(jid)? {
                self.statfs.adopt(jid);
            }
        }
        if log.local_statfs().is_zero() {
            return log.flush(FlushReason::Statfs);
        }
        let addr = self.system.statfs;
        let holder = self.glocks.acquire(inode_glock(addr), LockState::Exclusive, AcquireFlags::NONE)?;
        let buf = self.cache.read(holder.glock(), addr, MetaType::Dinode)?;
        let trans = log.begin(TransSize::new(2, 0))?;
        let moved = log.take_statfs(&trans);
        let mut bytes = trans.modify(&buf);
        let payload = &mut bytes[Dinode::SIZE..];
        let master = StatfsChange::decode(payload).map_err(|e| e.at(addr))?;
        master.plus(moved).encode(payload);
        drop(bytes);
        drop(trans);
        log.flush(FlushReason::Statfs)
    }
}
