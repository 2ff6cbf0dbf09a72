//! Inodes without a name: when they are freed, by whom, and how.
//!
//! An inode whose link count is 0 is UNLINKED in its bitmap and lives on until nobody uses it: this node's kernel (lookups), this node's
//! handles, other nodes' handles (each holds the iopen glock shared). Whoever lets the last reference go tries to free it; a node that
//! cannot get the iopen glock leaves it to the one that has it, which learns so by the callback, and tries in its turn when it has no handle
//! of the inode (any more). What a crash leaves behind is found by [`Fs::sweep_orphans`], after a mount and
//! after each recovery of a journal.
//!
//! Freeing takes several transactions. Each leaves an UNLINKED inode that owns less than before, so that a crash in between costs nothing:
//! attributes, leaves of a directory (the hash table then counts as plain data), the tree, and the dinode as the last.

use crate::bmap::Bottom;
use crate::bmap::truncate::runs;
use crate::glock::{AcquireFlags, LockState, is_nowait};
use crate::inode::{Inode, Locked};
use crate::journal::log::FlushReason;
use crate::ondisk::bitmap::BlockState;
use crate::ondisk::dinode::{DIF_EA_INDIRECT, DIF_EXHASH, Dinode, S_IFMT, S_IFREG};
use crate::ondisk::header::MetaType;
use crate::ondisk::lvb::InodeLvb;
use crate::ops::Fs;
use crate::trans::TransSize;
use crate::volume::{inode_glock, iopen_glock};
use crate::{BlockNo, Error, Result};
use parking_lot::{Condvar, Mutex};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Blocks that only one list leads to (attributes, leaves), freed in one transaction at most.
const LIST_BLOCKS: usize = 1024;

/// Locks of a dead node are granted again only some time after the replay of its journal, and a sweep waits for none: so a second one.
const SWEEPS_AFTER_REPLAY: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(60)];

/// Addresses of inodes that may have to be freed.
#[derive(Default)]
pub(crate) struct Orphans {
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Told by [`Orphans::stop`] only.
    ended: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: BTreeSet<BlockNo>,
    running: usize,
    /// When to search the whole volume.
    sweeps: Vec<Instant>,
    stopped: bool,
}

impl Orphans {
    fn push(&self, at: BlockNo) {
        self.queue.lock().waiting.insert(at);
        self.changed.notify_all();
    }

    fn pop(&self) -> Option<BlockNo> {
        let mut queue = self.queue.lock();
        let at = queue.waiting.pop_first()?;
        queue.running += 1;
        Some(at)
    }

    fn done(&self) {
        self.queue.lock().running -= 1;
        self.changed.notify_all();
    }

    /// Waits for something to do. False when the worker is to end.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let mut queue = self.queue.lock();
        if queue.waiting.is_empty() && !queue.stopped {
            self.changed.wait_for(&mut queue, limit);
        }
        !queue.stopped
    }

    /// Waits so long, whatever is queued. False when the worker is to end.
    pub(crate) fn pause(&self, time: Duration) -> bool {
        let mut queue = self.queue.lock();
        if !queue.stopped {
            self.ended.wait_for(&mut queue, time);
        }
        !queue.stopped
    }

    pub(crate) fn is_idle(&self) -> bool {
        let queue = self.queue.lock();
        queue.waiting.is_empty() && queue.running == 0
    }

    /// A look at the queue after this time begins with a sweep of the whole volume.
    fn sweep_after(&self, delay: Duration) {
        self.queue.lock().sweeps.push(Instant::now() + delay);
    }

    /// Is a sweep due? Asking takes it.
    fn take_sweep(&self) -> bool {
        let mut queue = self.queue.lock();
        let before = queue.sweeps.len();
        queue.sweeps.retain(|at| *at > Instant::now());
        queue.sweeps.len() < before
    }

    pub(crate) fn stop(&self) {
        self.queue.lock().stopped = true;
        self.changed.notify_all();
        self.ended.notify_all();
    }
}

/// What became of an attempt to free an inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    Freed,
    /// It has a name, or is gone already.
    NotAnOrphan,
    /// Somebody uses it, here or on another node: that one will free it.
    InUse,
}

impl Fs {
    /// An inode may have lost its last name or its last user.
    pub(crate) fn note_unlinked(&self, inode: &Inode) {
        if !inode.is_used() && !self.volume().is_read_only() {
            self.orphans.push(inode.no.addr);
        }
    }

    /// Another node could not free this inode because its iopen glock is cached or held here.
    pub(crate) fn iopen_wanted(&self, at: BlockNo) {
        // A user here tries when it ends.
        if !self.volume().is_read_only() && !self.inodes.get(at).is_some_and(|inode| inode.is_used()) {
            self.orphans.push(at);
        }
    }

    /// Has the volume swept by the thread for it, as after a mount.
    pub(crate) fn sweep_soon(&self) {
        self.orphans.sweep_after(Duration::ZERO);
    }

    /// Has the volume swept when the locks of a dead node, whose journal was replayed just now, can be had again.
    pub(crate) fn sweep_after_replay(&self) {
        for delay in SWEEPS_AFTER_REPLAY {
            self.orphans.sweep_after(delay);
        }
    }

    /// What the thread does that frees unlinked inodes.
    pub(crate) fn reclaim_or_sweep(&self) {
        if self.orphans.take_sweep() {
            match self.sweep_orphans() {
                Ok(0) => {}
                Ok(n) => {
                    tracing::info!(fs = %self.volume().name(), inodes = n, "freed inodes that a crash had left without a name")
                }
                Err(error) => {
                    tracing::warn!(fs = %self.volume().name(), err = %error, "search for unlinked inodes failed")
                }
            }
        }
        self.reclaim();
    }

    /// Runs an operation that changes something: once more when it found no space while space was about to be freed, and down to the disk
    /// where the mount is synchronous.
    pub(crate) fn change<T>(&self, operation: impl Fn() -> Result<T>) -> Result<T> {
        if self.options.sync && is_nowait() {
            return Err(Error::WouldBlock);
        }
        let done = match operation() {
            Err(Error::Errno(libc::ENOSPC)) if !self.orphans.is_idle() => {
                if is_nowait() {
                    return Err(Error::WouldBlock);
                }
                self.reclaim();
                operation()
            }
            other => other,
        }?;
        if self.options.sync {
            self.volume().log_flush(FlushReason::Fsync)?;
        }
        Ok(done)
    }

    /// Frees what is queued. Waits for glocks; never for another node's users.
    pub fn reclaim(&self) {
        while let Some(at) = self.orphans.pop() {
            match self.free_inode(at, AcquireFlags::NONE) {
                Ok(outcome) => {
                    tracing::debug!(fs = %self.volume().name(), ino = at.0, ?outcome, "unlinked inode")
                }
                Err(error) => {
                    tracing::warn!(fs = %self.volume().name(), ino = at.0, err = %error, "unlinked inode cannot be freed");
                }
            }
            self.orphans.done();
        }
        let mut queue = self.orphans.queue.lock();
        while queue.running > 0 {
            self.orphans.changed.wait(&mut queue);
        }
    }

    /// Looks for UNLINKED dinodes in every resource group whose glock is to be had without waiting, and frees those that nobody uses.
    /// Returns how many were freed.
    pub fn sweep_orphans(&self) -> Result<u64> {
        let mut freed = 0;
        let rgrps = self.volume().rgrps()?;
        for group in rgrps.groups().iter() {
            for at in rgrps.unlinked_in(group)?.unwrap_or_default() {
                match self.free_inode(at, AcquireFlags::TRY | AcquireFlags::SETTLED) {
                    Ok(Outcome::Freed) => freed += 1,
                    Ok(_) | Err(Error::Errno(libc::EAGAIN)) => {}
                    Err(error @ Error::Corrupt { .. }) => {
                        tracing::warn!(fs = %self.volume().name(), ino = at.0, err = %error, "unlinked inode is damaged and stays");
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(freed)
    }

    fn free_inode(&self, at: BlockNo, how: AcquireFlags) -> Result<Outcome> {
        let vol = self.volume();
        let holder = vol.glocks().acquire(inode_glock(at), LockState::Exclusive, how | AcquireFlags::SKIP)?;
        if vol.rgrps()?.block_state(at)? != BlockState::Unlinked {
            return Ok(Outcome::NotAnOrphan);
        }
        let buf = vol.cache().read(holder.glock(), at, MetaType::Dinode)?;
        let d = buf.with(|b| Dinode::decode_at(b, &self.geometry(), at)).map_err(|e| e.at(at))?;
        drop(buf);
        if d.nlink != 0 {
            return Ok(Outcome::NotAnOrphan);
        }
        let inode = self.inodes.obtain(self, d.num);
        if inode.is_used() {
            return Ok(Outcome::InUse);
        }
        let iopen = match vol.glocks().acquire(
            iopen_glock(at),
            LockState::Exclusive,
            AcquireFlags::TRY_1CB | AcquireFlags::SETTLED | AcquireFlags::SKIP,
        ) {
            Err(Error::Errno(libc::EAGAIN)) => return Ok(Outcome::InUse),
            other => other?,
        };
        let locked = self.attach_named(&inode, holder)?;
        locked.deallocate()?;
        drop(iopen);
        self.inodes.remove(&inode);
        Ok(Outcome::Freed)
    }
}

impl Locked<'_> {
    /// Frees everything the inode owns, and itself. Under EX of inode and iopen.
    fn deallocate(mut self) -> Result<()> {
        self.inode.pages.discard(0, u64::MAX);
        if self.d.is_exhash() {
            self.free_leaves()?;
        }
        if self.d.eattr != 0 {
            let blocks = self.ea_blocks()?;
            self.free_list(&blocks, |d| {
                d.eattr = 0;
                d.flags &= !DIF_EA_INDIRECT;
            })?;
        }
        self.free_range(0, u64::MAX, if self.d.is_jdata() { Bottom::HashTable } else { Bottom::Data })?;
        self.free_dinode()
    }

    /// Leaves first, a part of the table at a time, its slots zeroed; in the end the table is nothing but data, and the inode says so.
    fn free_leaves(&mut self) -> Result<()> {
        loop {
            let step = self.dir_free_step(LIST_BLOCKS)?;
            if step.leaves.is_empty() {
                break;
            }
            let vol = self.fs.volume();
            let groups = vol.rgrps()?.lock_for(&step.leaves)?;
            let count = step.leaves.len() as u32;
            let table = (step.slots.len() / self.geo().inptrs()) as u32 + 2;
            let trans = vol.begin(TransSize::new(groups.trans_blocks(0, count) + table + 1, count))?;
            let damage = self.fs.atomically(&trans, || {
                self.dir_clear_slots(&trans, &step)?;
                let mut damage = Ok(());
                for run in runs(&step.leaves) {
                    damage = damage.and(groups.free_blocks(&trans, run));
                }
                self.d.blocks = self.d.blocks.saturating_sub(step.leaves.len() as u64).max(1);
                self.save(&trans);
                Ok(damage)
            })?;
            trans.commit();
            damage?;
        }
        let trans = self.fs.volume().begin(TransSize::new(1, 0))?;
        self.d.mode = (self.d.mode & !S_IFMT) | S_IFREG;
        self.d.flags &= !DIF_EXHASH;
        self.d.depth = 0;
        self.save(&trans);
        trans.commit();
        Ok(())
    }

    /// Frees listed blocks, and changes the dinode in the first of the transactions.
    fn free_list(&mut self, blocks: &[BlockNo], change: impl FnOnce(&mut Dinode)) -> Result<()> {
        let vol = self.fs.volume();
        let mut change = Some(change);
        for some in blocks.chunks(LIST_BLOCKS) {
            let groups = vol.rgrps()?.lock_for(some)?;
            let size = TransSize::new(groups.trans_blocks(0, some.len() as u32) + 1, some.len() as u32);
            let trans = vol.begin(size)?;
            let mut damage = Ok(());
            for run in runs(some) {
                damage = damage.and(groups.free_blocks(&trans, run));
            }
            if let Some(change) = change.take() {
                change(&mut self.d);
            }
            self.d.blocks = self.d.blocks.saturating_sub(some.len() as u64).max(1);
            self.save(&trans);
            trans.commit();
            damage?;
        }
        Ok(())
    }

    fn free_dinode(self) -> Result<()> {
        let vol = self.fs.volume();
        let at = self.inode.no.addr;
        if self.d.blocks != 1 {
            let what = format!(
                "unlinked inode says it owns {} blocks, and none can be found but its own",
                self.d.blocks
            );
            tracing::warn!(fs = %vol.name(), ino = at.0, "{what}");
        }
        let group = vol.rgrps()?.lock_for(&[at])?;
        let trans = vol.begin(TransSize::new(group.trans_blocks(0, 1), 1))?;
        group.free_dinode(&trans, at)?;
        trans.commit();
        self.inode.forget_dinode();
        let generation_deleted = self.inode.no.formal;
        self.into_holder().set_lvb(InodeLvb { generation_deleted }.encode());
        Ok(())
    }
}
