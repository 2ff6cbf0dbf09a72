//! Transactions: what one operation changes, all or nothing.
//!
//! `Log::begin` reserves the worst-case log space and holds off snapshots until the transaction ends. Every
//! metadata block is changed through [`Trans::modify`], which puts it into the set of the next flush. A transaction is atomic
//! because a flush is, and every flush contains whole transactions only. There is no undo: an operation takes all
//! locks and blocks and does all checks that can fail before it changes the first byte.
//!
//! Rules for callers: no glock is waited for inside (asserted); one transaction per thread at a time (asserted); no mutex that
//! another thread might need *inside its* transaction, or that [`OrderedData::write_out`] takes, is held across `begin`.

use crate::cache::{Buf, BufMut, MetaCache};
use crate::glock::{Glock, TransactionScope, transaction_scope};
use crate::journal::log::Log;
use crate::ondisk::header::{MetaHeader, MetaType};
use crate::{BlockNo, Result};
use std::cell::Cell;
use std::sync::Arc;

/// Worst case of a transaction, in blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TransSize {
    /// Metadata and journaled-data blocks that it may change.
    pub blocks: u32,
    /// Logged blocks that it may free.
    pub revokes: u32,
}

impl TransSize {
    pub const fn new(blocks: u32, revokes: u32) -> Self {
        Self { blocks, revokes }
    }
}

/// File data that must be in place before the metadata that points to it is committed.
pub trait OrderedData: Send + Sync {
    /// Writes all dirty data of the file to its place and waits for it; no device flush, no transaction, no glock. Runs on
    /// any thread, while other transactions go on. An error withdraws the mount: the flush cannot be completed.
    fn write_out(&self) -> Result<()>;
}

thread_local! {
    static OPEN: Cell<bool> = const { Cell::new(false) };
}

/// Has this thread a transaction open?
pub fn in_transaction() -> bool {
    OPEN.get()
}

/// An open transaction. Ends (commits in memory) when dropped.
pub struct Trans {
    log: Arc<Log>,
    size: TransSize,
    reserved: u32,
    pins: Cell<u32>,
    revokes: Cell<u32>,
    _scope: TransactionScope,
}

impl Trans {
    pub(crate) fn open(log: Arc<Log>, size: TransSize, reserved: u32) -> Self {
        OPEN.set(true);
        Self { log, size, reserved, pins: Cell::new(0), revokes: Cell::new(0), _scope: transaction_scope() }
    }

    /// The block's bytes for change; the block is part of this transaction from now on.
    pub fn modify<'b>(&self, buf: &'b Buf) -> BufMut<'b> {
        if self.log.pin(buf) {
            self.pins.set(self.pins.get() + 1);
            self.over_reservation("blocks", self.pins.get(), self.size.blocks);
        }
        buf.write()
    }

    /// A new metadata block: zero but for its header, part of this transaction.
    pub fn create(&self, cache: &MetaCache, gl: &Arc<Glock>, block: BlockNo, ty: MetaType) -> Result<Buf> {
        let buf = cache.new_block(gl, block)?;
        MetaHeader::new(ty).encode(&mut self.modify(&buf));
        Ok(buf)
    }

    /// `block` has been freed in this transaction: takes it out of the cache and of the next flush, and makes sure that no
    /// older copy of it is ever replayed. For blocks that were never logged it does nothing. (`free_blocks` of a
    /// reservation calls it for every block that it frees.)
    pub fn revoke(&self, block: BlockNo) {
        if self.log.revoke(block) {
            self.revokes.set(self.revokes.get() + 1);
            self.over_reservation("revokes", self.revokes.get(), self.size.revokes);
        }
    }

    /// The flush that commits this transaction first writes this file's dirty data.
    pub fn ordered(&self, data: Arc<dyn OrderedData>) {
        self.log.add_ordered(data);
    }

    /// Waits until no running flush is in its ordered-data phase. To be called before cached pages are thrown away unwritten
    /// (truncate): a flush that is under way may be about to commit the blocks they belong to.
    pub fn wait_ordered(&self) {
        self.log.wait_ordered();
    }

    /// `f` runs when the flush that contains this transaction is durable (never, when the mount withdraws before).
    pub fn on_durable(&self, f: Box<dyn FnOnce() + Send>) {
        self.log.on_durable(f);
    }

    /// Adds to this node's statfs deltas, in the same transaction as the bitmap change that causes them.
    pub fn statfs(&self, free: i64, dinodes: i64) {
        self.log.statfs(self, 0, free, dinodes);
    }

    /// As [`Self::statfs`], for a volume that has grown.
    pub fn statfs_grown(&self, total: i64, free: i64) {
        self.log.statfs(self, total, free, 0);
    }

    pub fn commit(self) {
        drop(self);
    }

    /// A caller that changes more than it announced: a bug that a test must see, and that the flush survives as long as the
    /// log has room (it checks, and withdraws rather than overwrite its own tail).
    fn over_reservation(&self, what: &str, used: u32, reserved: u32) {
        if used > reserved {
            debug_assert!(false, "transaction of {:?} uses {used} {what}", self.size);
            if used == reserved + 1 {
                tracing::error!(fs = %self.log.disk().name(), "transaction of {:?} uses more {what}", self.size);
            }
        }
    }
}

impl Drop for Trans {
    fn drop(&mut self) {
        OPEN.set(false);
        if std::thread::panicking() && self.pins.get() + self.revokes.get() > 0 {
            self.log.disk().withdraw("a thread died in the middle of a transaction");
        }
        self.log.end(self.reserved);
    }
}
