//! One mounted volume: what ties disk, glocks, cache, log and resource groups together.
//!
//! ```text
//!   mount:   superblock → mount lock → first? → journals → own journal EX → recovery → tables → log → live
//!   release: a glock goes down → log flushed, blocks in place and durable, revoked → buffers dropped   (module `release`)
//!   a death: recover_journal(jid) under the dead node's journal glock                                  (module `recover`)
//! ```
//!
//! Invariants: nothing is written before the journals that may hold newer content are replayed; a journal is written by
//! whoever holds its glock EX and by nobody else; after [`Volume::withdraw`] nothing is written and no mode is given up.
//!
//! Formal inode numbers come from [`crate::rgrp::Reservation::alloc_dinode`] (the generation); the `inum` files stay untouched,
//! as with every kernel since 2006.

mod mount;
mod recover;
mod release;
mod statfs;
pub(crate) mod system;
#[cfg(test)]
mod tests;

pub use mount::MountOptions;
pub use recover::Recovered;
pub use release::{Attached, GlockObject};
pub use statfs::Totals;

use crate::cache::MetaCache;
use crate::disk::Disk;
use crate::geometry::Geometry;
use crate::glock::{Glock, Glocks, Holder};
use crate::journal::log::{FlushReason, Log};
use crate::lockspace::{GlockName, GlockType};
use crate::ondisk::sb::Superblock;
use crate::rgrp::Rgrps;
use crate::trans::{Trans, TransSize};
use crate::{BlockNo, Error, InodeNo, JournalId, Result};
use parking_lot::Mutex;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use system::SystemInodes;

/// A mounted volume.
pub struct Volume {
    disk: Arc<Disk>,
    superblock: Superblock,
    glocks: Arc<Glocks>,
    cache: Arc<MetaCache>,
    /// `None` on a spectator mount.
    writer: Option<Writer>,
    options: MountOptions,
    system: SystemInodes,
    /// Held as long as the mount lives: live lock, own journal, own statfs_change, …
    held: Mutex<Vec<Holder>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    statfs: statfs::Sync,
    /// What the layer above does when a dead node's journal was replayed.
    on_recovered: Mutex<Option<Box<dyn Fn() + Send + Sync>>>,
    /// What it does when another node wants an iopen glock EX.
    on_iopen_wanted: OnceLock<Box<dyn Fn(BlockNo) + Send + Sync>>,
}

/// What only a mount with a journal has.
struct Writer {
    log: Arc<Log>,
    rgrps: Rgrps,
}

/// Name of the glock of an inode.
pub fn inode_glock(addr: BlockNo) -> GlockName {
    GlockName { ty: GlockType::Inode, number: addr.0 }
}

/// Name of the lock that says "in use" of an inode.
pub fn iopen_glock(addr: BlockNo) -> GlockName {
    GlockName { ty: GlockType::Iopen, number: addr.0 }
}

impl Volume {
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    pub fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// File system name: the part of the lock table behind the colon.
    pub fn name(&self) -> &str {
        self.disk.name()
    }

    pub fn root(&self) -> InodeNo {
        self.superblock.root
    }

    pub fn master(&self) -> InodeNo {
        self.superblock.master
    }

    pub fn options(&self) -> &MountOptions {
        &self.options
    }

    pub fn glocks(&self) -> &Arc<Glocks> {
        &self.glocks
    }

    pub fn cache(&self) -> &Arc<MetaCache> {
        &self.cache
    }

    /// Our journal; `None` on a spectator mount.
    pub fn journal(&self) -> Option<JournalId> {
        self.writer.as_ref().map(|w| w.log.jid())
    }

    /// Number of journals of the volume.
    pub fn journals(&self) -> u32 {
        self.system.journals.len() as u32
    }

    pub fn is_read_only(&self) -> bool {
        self.options.read_only || self.writer.is_none()
    }

    fn writer(&self) -> Result<&Writer> {
        self.writer.as_ref().ok_or(Error::Errno(libc::EROFS))
    }

    /// `hook` runs after each replay of a dead node's journal, before its locks may be granted again. It must not wait.
    pub fn on_recovered(&self, hook: Box<dyn Fn() + Send + Sync>) {
        *self.on_recovered.lock() = Some(hook);
    }

    /// `hook` runs when another node wants to free the inode of this address and cannot, because its iopen glock is here. Set once.
    pub fn on_iopen_wanted(&self, hook: Box<dyn Fn(BlockNo) + Send + Sync>) {
        assert!(self.on_iopen_wanted.set(hook).is_ok(), "the hook of iopen glocks is set once");
    }

    /// Errors: `EROFS` on a spectator mount.
    pub fn log(&self) -> Result<&Arc<Log>> {
        Ok(&self.writer()?.log)
    }

    /// Resource groups. Errors: `EROFS` on a spectator mount.
    pub fn rgrps(&self) -> Result<&Rgrps> {
        let rgrps = &self.writer()?.rgrps;
        if rgrps.is_stale() {
            self.reload_rindex(rgrps)?;
        }
        Ok(rgrps)
    }

    /// Opens a transaction; see [`Log::begin`].
    pub fn begin(&self, size: TransSize) -> Result<Trans> {
        self.writer()?.log.begin(size)
    }

    /// Makes everything durable that was committed before the call. Without anything to commit it returns at once; file data
    /// that needed no metadata change is the caller's to flush with [`Disk::flush`].
    pub fn log_flush(&self, reason: FlushReason) -> Result<()> {
        match &self.writer {
            Some(w) => w.log.flush(reason),
            None => self.disk.check(),
        }
    }

    /// Metadata of the whole mount durable. Dirty file data is written by its owners before.
    pub fn sync(&self) -> Result<()> {
        self.log_flush(FlushReason::Sync)
    }

    /// See [`Log::sync_glock`].
    pub fn sync_glock(&self, glock: &Glock) -> Result<()> {
        match &self.writer {
            Some(w) => w.log.sync_glock(glock),
            None => self.disk.check(),
        }
    }

    /// Drops the cached blocks of a glock that is synced and given up.
    pub fn invalidate_glock(&self, glock: &Glock) {
        self.cache.drop_glock(glock.name());
    }

    /// Stops this mount: nothing is written any more, every call answers EIO, no mode of a lock is given up.
    pub fn withdraw(&self, why: &str) -> Error {
        self.disk.withdraw(why)
    }

    /// `Err(Withdrawn)` when the mount has stopped itself.
    pub fn check(&self) -> Result<()> {
        self.disk.check()
    }
}
