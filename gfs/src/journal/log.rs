//! The log of a mounted journal: reservations, the set of the next flush, group commit, space.
//!
//! ```text
//!   begin ──reserve──► transaction ──pin──► current set ──snapshot──► running flush ──header durable──► AIL ──in place──► gone
//!                                            (epoch e)                 (journal/flush)                   (journal/ail)
//! ```
//!
//! A flush closes the gate for as long as it takes to let open transactions end and to take references to the
//! contents; its I/O runs while new transactions change copies. Everybody who needs durability at the same time shares
//! one flush: each caller names the epoch it needs, one of them does the work.
//!
//! Accounting, all in journal blocks: `used` (tail to head) + `in_flight` + open reservations + the exact cost of the
//! current set + [`MARGIN`] never exceeds the journal, because a transaction's reservation covers what it can add to the cost.
//!
//! Source: section "Journals" of docs; the order of barriers is that of Linux 6.1 `fs/gfs2/log.c`.

use super::ail::Ail;
use super::flush::Head;
use crate::cache::{Buf, MetaCache};
use crate::disk::Disk;
use crate::glock::Glock;
use crate::lockspace::GlockName;
use crate::ondisk::log::{
    LHC_AIL_EMPTY_GL, LHC_AIL_FLUSH, LHC_DO_SYNC, LHC_FREEZE, LHC_INODE_GO_SYNC, LHC_INPLACE_RESERVE,
    LHC_KILL_SB, LHC_LOGD_JFLUSH_REQD, LHC_RGRP_GO_SYNC, LHC_SYNC_FS, LHC_WRITE_INODE, LHF_FLUSH_FREEZE,
    LHF_FLUSH_NORMAL, LHF_FLUSH_SHUTDOWN, LHF_FLUSH_SYNC,
};
use crate::ondisk::statfs::StatfsChange;
use crate::trans::{OrderedData, Trans, TransSize, in_transaction};
use crate::{BlockNo, Error, JournalId, Result};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustc_hash::FxHashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Journal blocks that no reservation may take: headers that only move the tail.
pub(super) const MARGIN: u32 = 8;

/// Who wants a flush; decides the informational flags of the header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlushReason {
    Fsync,
    Sync,
    Statfs,
    GlockInode,
    GlockRgrp,
    GlockEmptied,
    LogSpace,
    AllocationRetry,
    Periodic,
    Unmount,
    Shutdown,
    Freeze,
}

impl FlushReason {
    pub(super) fn flags(self) -> u32 {
        match self {
            Self::Fsync => LHF_FLUSH_NORMAL | LHC_WRITE_INODE,
            Self::Sync => LHF_FLUSH_NORMAL | LHC_SYNC_FS,
            Self::Statfs => LHF_FLUSH_NORMAL | LHC_DO_SYNC,
            Self::GlockInode => LHF_FLUSH_NORMAL | LHC_INODE_GO_SYNC,
            Self::GlockRgrp => LHF_FLUSH_NORMAL | LHC_RGRP_GO_SYNC,
            Self::GlockEmptied => LHF_FLUSH_NORMAL | LHC_AIL_EMPTY_GL,
            Self::LogSpace => LHF_FLUSH_NORMAL | LHC_AIL_FLUSH,
            Self::AllocationRetry => LHF_FLUSH_NORMAL | LHC_INPLACE_RESERVE,
            Self::Periodic => LHF_FLUSH_NORMAL | LHC_LOGD_JFLUSH_REQD,
            Self::Unmount => LHF_FLUSH_SYNC | LHC_KILL_SB,
            Self::Shutdown => LHF_FLUSH_SHUTDOWN | LHC_KILL_SB,
            Self::Freeze => LHF_FLUSH_FREEZE | LHC_FREEZE,
        }
    }
}

#[expect(clippy::len_without_is_empty, reason = "a journal has blocks")]
/// Where a journal lies: its ring of blocks, mapped to the device once, at mount.
pub trait JournalMap: Send + Sync {
    /// Blocks of the ring.
    fn len(&self) -> u32;
    /// Device address of journal block `at`, which is below `len`.
    fn block(&self, at: u32) -> BlockNo;
}

/// What the log must know of its journal.
pub struct LogConfig {
    pub jid: JournalId,
    pub map: Box<dyn JournalMap>,
    /// Dinode addresses for the headers; 0 where there is none.
    pub jinode: u64,
    pub statfs_addr: u64,
    pub quota_addr: u64,
    /// Position and number of the next header: the one behind the head that was found.
    pub next: u32,
    pub sequence: u64,
    /// Deltas found in our statfs_change file.
    pub local: StatfsChange,
    /// Oldest age of a committed transaction that is not durable.
    pub commit_interval: Duration,
}

/// What the next flush will contain.
#[derive(Default)]
pub(super) struct Current {
    pub(super) blocks: FxHashMap<u64, Buf>,
    /// Of these, journaled file data.
    data: u32,
    /// Revoked block → flush that last logged it.
    pub(super) revokes: FxHashMap<u64, u64>,
    /// By address of the object, so that a file stands here once.
    pub(super) ordered: FxHashMap<usize, Arc<dyn OrderedData>>,
    pub(super) on_durable: Vec<Box<dyn FnOnce() + Send>>,
    since: Option<Instant>,
}

impl Current {
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.revokes.is_empty() && self.on_durable.is_empty()
    }
}

#[derive(Default)]
pub(super) struct State {
    /// Open transactions, and their reservations.
    pub(super) active: u32,
    open_reserved: u32,
    /// A snapshot waits for the open transactions: no new ones.
    pub(super) closing: bool,
    /// No transaction will ever start again.
    pub(super) ended: bool,
    /// The clean header is written: nothing may come behind it, or the next mounter finds a dirty journal.
    pub(super) closed: bool,
    /// Number of the current set, and of the last one that is durable.
    pub(super) epoch: u64,
    pub(super) durable_epoch: u64,
    pub(super) ordered_phase: bool,
    pub(super) used: u32,
    pub(super) in_flight: u32,
    pub(super) tail_sequence: u64,
    pub(super) current: Current,
    pub(super) local: StatfsChange,
}

pub struct Log {
    pub(super) disk: Arc<Disk>,
    pub(super) cache: Arc<MetaCache>,
    pub(super) config: LogConfig,
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
    /// Held over a whole flush: there is one at a time.
    pub(super) head: Mutex<Head>,
    pub(super) ail: Ail,
    /// One thread at a time makes space.
    space: Mutex<()>,
    /// The buffer of our statfs_change dinode, once the mount has it.
    statfs: OnceLock<Buf>,
    background: Mutex<Background>,
    kick: Condvar,
}

#[derive(Default)]
struct Background {
    stop: bool,
    kicked: bool,
}

impl Log {
    pub fn new(disk: Arc<Disk>, cache: Arc<MetaCache>, config: LogConfig) -> Arc<Self> {
        let head = Head { next: config.next, sequence: config.sequence };
        let state =
            State { epoch: 1, tail_sequence: config.sequence, local: config.local, ..State::default() };
        cache.tail_moved(config.sequence);
        Arc::new(Self {
            disk,
            cache,
            config,
            state: Mutex::new(state),
            changed: Condvar::new(),
            head: Mutex::new(head),
            ail: Ail::default(),
            space: Mutex::new(()),
            statfs: OnceLock::new(),
            background: Mutex::default(),
            kick: Condvar::new(),
        })
    }

    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    pub fn jid(&self) -> JournalId {
        self.config.jid
    }

    /// Blocks of the journal.
    pub fn len(&self) -> u32 {
        self.config.map.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Refuses transactions, or allows them again.
    pub(crate) fn set_read_only(&self, read_only: bool) {
        self.state.lock().ended = read_only;
    }

    /// Most blocks that one transaction may announce; larger work is split.
    pub fn max_transaction_blocks(&self) -> u32 {
        // as kernels: a flush begins when the set reaches 2/5 of the journal
        self.len() * 2 / 5
    }

    fn ldptrs(&self) -> u32 {
        self.disk.geometry().ldptrs() as u32
    }

    fn inptrs(&self) -> u32 {
        self.disk.geometry().inptrs() as u32
    }

    /// Journal blocks of a flush with these numbers of copies and revokes, header included.
    pub(super) fn flush_cost(&self, meta: u32, data: u32, revokes: u32) -> u32 {
        let chunks = |n: u32, per: u32| n + n.div_ceil(per);
        let revoke_blocks = match revokes {
            0 => 0,
            n => 1 + n.saturating_sub(self.ldptrs()).div_ceil(self.inptrs()),
        };
        chunks(meta, self.ldptrs()) + chunks(data, self.ldptrs() / 2) + revoke_blocks + 1
    }

    fn current_cost(&self, c: &Current) -> u32 {
        if c.is_empty() {
            return 0;
        }
        self.flush_cost(c.blocks.len() as u32 - c.data, c.data, c.revokes.len() as u32)
    }

    /// Most journal blocks that a transaction of this size can add to a flush.
    fn reservation(&self, size: TransSize) -> u32 {
        4 + size.blocks + 1 + size.blocks.div_ceil(self.ldptrs() / 2) + size.revokes.div_ceil(self.inptrs())
    }

    fn room(&self, st: &State) -> u32 {
        let taken = st.used + st.in_flight + st.open_reserved + self.current_cost(&st.current) + MARGIN;
        self.len().saturating_sub(taken)
    }

    /// Opens a transaction; waits for log space (it may flush and write back on this thread) and for a snapshot that is
    /// being taken. Errors: `Withdrawn`; `EROFS`; `Journal` when the journal is too small for `size`; `WouldBlock` on a
    /// no-wait thread that would have to make space.
    pub fn begin(self: &Arc<Self>, size: TransSize) -> Result<Trans> {
        assert!(!in_transaction(), "a thread has one transaction at a time");
        let need = self.reservation(size);
        if need + MARGIN > self.len() {
            let what =
                format!("a transaction of {} blocks does not fit into {} blocks", size.blocks, self.len());
            return Err(Error::Journal { jid: self.config.jid, at: 0, what });
        }
        let mut st = self.state.lock();
        loop {
            self.disk.check()?;
            if st.ended || self.disk.is_read_only() {
                return Err(Error::Errno(libc::EROFS));
            }
            if st.closing {
                self.changed.wait(&mut st);
                continue;
            }
            if self.room(&st) >= need {
                break;
            }
            if crate::glock::is_nowait() {
                return Err(Error::WouldBlock);
            }
            MutexGuard::unlocked(&mut st, || self.make_space(need))?;
        }
        st.active += 1;
        st.open_reserved += need;
        drop(st);
        Ok(Trans::open(Arc::clone(self), size, need))
    }

    pub(crate) fn end(&self, reserved: u32) {
        let mut st = self.state.lock();
        st.active -= 1;
        st.open_reserved -= reserved;
        if st.active == 0 && st.closing {
            self.changed.notify_all();
        }
        let (cost, taken) = (self.current_cost(&st.current), self.len() - self.room(&st));
        drop(st);
        if cost > self.len() * 2 / 5 || taken > self.len() * 4 / 5 {
            self.kick();
        }
    }

    /// True when the block was not yet in the current set.
    pub(crate) fn pin(&self, buf: &Buf) -> bool {
        if buf.is_pinned() {
            return false;
        }
        let mut st = self.state.lock();
        assert!(st.active > 0, "block {} changed outside a transaction", buf.block());
        if !buf.pin() {
            return false;
        }
        let c = &mut st.current;
        c.since.get_or_insert_with(Instant::now);
        c.data += u32::from(buf.is_data());
        if let Some(logged) = c.revokes.remove(&buf.block().0) {
            // used again before its revoke was written: the new copy comes after the old ones anyway
            self.cache.note_logged(buf.block(), logged);
        }
        let before = c.blocks.insert(buf.block().0, buf.clone());
        assert!(before.is_none(), "block {} is in the set with another buffer", buf.block());
        true
    }

    /// True when a revoke entry was added.
    pub(crate) fn revoke(&self, block: BlockNo) -> bool {
        let (buf, logged) = self.cache.forget(block);
        if buf.is_none() && logged == 0 {
            return false;
        }
        let mut st = self.state.lock();
        if let Some(buf) = buf
            && buf.is_pinned()
        {
            buf.unpin();
            st.current.blocks.remove(&block.0);
            st.current.data -= u32::from(buf.is_data());
        }
        Self::add_revoke(&mut st, block.0, logged)
    }

    fn add_revoke(st: &mut State, block: u64, logged: u64) -> bool {
        if logged == 0 || logged < st.tail_sequence {
            return false;
        }
        st.current.since.get_or_insert_with(Instant::now);
        st.current.revokes.insert(block, logged).is_none()
    }

    pub(crate) fn add_ordered(&self, data: Arc<dyn OrderedData>) {
        let key = Arc::as_ptr(&data).cast::<()>() as usize;
        self.state.lock().current.ordered.entry(key).or_insert(data);
    }

    pub(crate) fn on_durable(&self, f: Box<dyn FnOnce() + Send>) {
        let mut st = self.state.lock();
        st.current.since.get_or_insert_with(Instant::now);
        st.current.on_durable.push(f);
    }

    pub(crate) fn wait_ordered(&self) {
        let mut st = self.state.lock();
        while st.ordered_phase && !self.disk.is_withdrawn() {
            self.changed.wait(&mut st);
        }
    }

    /// Gives the log the buffer of this node's statfs_change dinode.
    pub(crate) fn set_statfs(&self, buf: Buf) {
        assert!(self.statfs.set(buf).is_ok(), "one statfs_change file for each mount");
    }

    pub(crate) fn statfs(&self, trans: &Trans, total: i64, free: i64, dinodes: i64) {
        let change = StatfsChange { total, free, dinodes };
        if change.is_zero() {
            return;
        }
        let Some(buf) = self.statfs.get() else { return };
        let mut bytes = trans.modify(buf);
        // both under the content lock, so that file and header agree
        let mut st = self.state.lock();
        st.local = st.local.plus(change);
        st.local.encode(&mut bytes[crate::ondisk::dinode::Dinode::SIZE..]);
    }

    /// Zeroes this node's deltas; the caller adds them to the master in the same transaction.
    pub(crate) fn take_statfs(&self, trans: &Trans) -> StatfsChange {
        let Some(buf) = self.statfs.get() else { return StatfsChange::default() };
        let mut bytes = trans.modify(buf);
        let mut st = self.state.lock();
        let taken = std::mem::take(&mut st.local);
        st.local.encode(&mut bytes[crate::ondisk::dinode::Dinode::SIZE..]);
        taken
    }

    /// This node's deltas that are not in the master statfs file.
    pub fn local_statfs(&self) -> StatfsChange {
        self.state.lock().local
    }

    /// Makes every transaction durable that ended before the call. Callers at the same time share one flush.
    pub fn flush(self: &Arc<Self>, reason: FlushReason) -> Result<()> {
        assert!(!in_transaction(), "a flush waits for transactions to end, this thread's too");
        self.disk.check()?;
        let target = {
            let st = self.state.lock();
            if !st.current.is_empty() {
                st.epoch
            } else if st.durable_epoch + 1 < st.epoch {
                st.epoch - 1
            } else {
                return Ok(());
            }
        };
        let mut head = self.head.lock();
        if self.state.lock().durable_epoch >= target {
            return self.disk.check();
        }
        self.flush_locked(&mut head, reason.flags(), false)
    }

    /// Moves the tail as far as possible: everything written in place, everything current flushed.
    pub(crate) fn flush_and_empty(&self, reason: FlushReason) -> Result<()> {
        self.ail.write_back(&self.disk, None)?;
        let mut head = self.head.lock();
        self.flush_locked(&mut head, reason.flags(), true)
    }

    fn make_space(&self, need: u32) -> Result<()> {
        let _one = self.space.lock();
        let st = self.state.lock();
        if self.room(&st) >= need {
            return Ok(());
        }
        drop(st);
        self.flush_and_empty(FlushReason::LogSpace)
    }

    /// What giving up a glock asks of the log, for its metadata: everything changed under it committed, written in place
    /// and durable, and no live copy left in this journal that a replay could put over another node's newer content.
    /// Nobody may change anything under the glock while this runs.
    pub fn sync_glock(self: &Arc<Self>, gl: &Glock) -> Result<()> {
        self.sync_named(gl.name())
    }

    pub(crate) fn sync_named(self: &Arc<Self>, gl: GlockName) -> Result<()> {
        use crate::lockspace::GlockType;
        self.disk.check()?;
        if self.state.lock().closed {
            // Everything is in place and durable, and no copy in this journal is live.
            return Ok(());
        }
        if self.cache.any_pinned(gl) {
            let reason = match gl.ty {
                GlockType::Rgrp => FlushReason::GlockRgrp,
                _ => FlushReason::GlockInode,
            };
            self.flush(reason)?;
        }
        let tail = self.state.lock().tail_sequence;
        let live = self.cache.logged_since(gl, tail);
        if live.is_empty() {
            return Ok(());
        }
        // a copy may be in a flush that still runs
        drop(self.head.lock());
        // The flushes take their time however little is written: whatever is asked for next finds its blocks in place already.
        self.ail.write_back(&self.disk, Some(&self.ail.with_oldest(&live)))?;
        self.disk.flush()?;
        self.ail.reap(&self.disk);
        // the next header moves the tail to the oldest flush that is still needed: older copies need no revoke
        let oldest = self.ail.oldest().map_or(u64::MAX, |(sequence, _)| sequence);
        let revoke: Vec<u64> = self.cache.logged_since(gl, oldest);
        let chunk = (self.max_transaction_blocks() as usize * self.inptrs() as usize / 2).max(1);
        for blocks in revoke.chunks(chunk) {
            let trans = match self.begin(TransSize::new(0, blocks.len() as u32)) {
                Ok(trans) => trans,
                Err(e) => {
                    // The clean end overtook us: once it is through, there is no live copy left to revoke.
                    drop(self.head.lock());
                    return if self.state.lock().closed { Ok(()) } else { Err(e) };
                }
            };
            let mut st = self.state.lock();
            for &b in blocks {
                let logged = st.tail_sequence;
                Self::add_revoke(&mut st, b, logged);
                self.cache.note_revoked(BlockNo(b));
            }
            drop(st);
            drop(trans);
        }
        let mut head = self.head.lock();
        self.flush_locked(&mut head, FlushReason::GlockEmptied.flags(), true)?;
        debug_assert!(self.cache.logged_since(gl, self.state.lock().tail_sequence).is_empty());
        Ok(())
    }

    /// Everything in place and the journal marked clean. No transaction starts afterwards.
    pub fn shutdown(self: &Arc<Self>) -> Result<()> {
        self.flush(FlushReason::Unmount)?;
        self.flush_and_empty(FlushReason::Unmount)?;
        self.ail.write_back(&self.disk, None)?;
        let mut head = self.head.lock();
        // No transaction starts from here on, a glock that is being given up included; those that run are in the last flush.
        self.state.lock().ended = true;
        self.flush_locked(&mut head, FlushReason::Shutdown.flags(), true)?;
        self.ail.write_back(&self.disk, None)?;
        self.write_unmount_header(&mut head)
    }

    pub(super) fn kick(&self) {
        let mut b = self.background.lock();
        if !b.kicked {
            b.kicked = true;
            self.kick.notify_one();
        }
    }

    /// Ends [`Self::run_background`].
    pub fn stop_background(&self) {
        self.background.lock().stop = true;
        self.kick.notify_one();
    }

    /// Body of the log thread: flushes what has become old or large, writes back before space runs short. Errors have
    /// withdrawn the mount already when they arrive here.
    pub fn run_background(self: &Arc<Self>) {
        let tick = (self.config.commit_interval / 4).clamp(Duration::from_millis(50), Duration::from_secs(1));
        loop {
            let mut b = self.background.lock();
            if !b.kicked && !b.stop {
                self.kick.wait_for(&mut b, tick);
            }
            b.kicked = false;
            if b.stop || self.disk.is_withdrawn() {
                return;
            }
            drop(b);
            if let Err(e) = self.background_step() {
                tracing::warn!(fs = %self.disk.name(), err = %e, "log thread ends");
                return;
            }
        }
    }

    fn background_step(self: &Arc<Self>) -> Result<()> {
        let (flush, empty) = {
            let st = self.state.lock();
            let old = st.current.since.is_some_and(|t| t.elapsed() >= self.config.commit_interval);
            let large = self.current_cost(&st.current) > self.len() * 2 / 5;
            (old || large, self.len() - self.room(&st) > self.len() * 4 / 5)
        };
        let empty = empty || self.holds_much();
        if empty {
            let _one = self.space.lock();
            return self.flush_and_empty(FlushReason::LogSpace);
        }
        if flush { self.flush(FlushReason::Periodic) } else { Ok(()) }
    }

    /// Do blocks that wait for their in-place write take more memory than the cache should?
    pub(super) fn holds_much(&self) -> bool {
        self.ail.len() > self.cache.capacity() / 2
    }

    /// For messages and tests: (live journal blocks, blocks waiting for their in-place write).
    pub fn usage(&self) -> (u32, usize) {
        (self.state.lock().used, self.ail.len())
    }
}
