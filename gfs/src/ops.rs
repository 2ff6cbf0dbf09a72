//! Every operation of the file system, without a word of FUSE.
//!
//! Each operation returns [`Held`]: its value together with the glock holders that must live until the reply has been written, because the
//! kernel may cache what the reply says for exactly as long as this node holds the lock.
//!
//! What an operation does, always in this order:
//!
//! 1. take the glocks of all inodes ([`Glocks::acquire_all`](crate::glock::Glocks::acquire_all) when they are several), find out again what
//!    the names lead to when a lock had to be dropped in between;
//! 2. check everything that can be wrong, and reserve the blocks that will be needed (resource group glocks);
//! 3. begin one transaction, change things, end it.
//!
//! So an operation that answers an error, `WouldBlock` included, has changed nothing, and a crash leaves it done or not done.
//! Permission checks are the kernel's (`default_permissions`); what POSIX says about modes on create, chown and write is done here.
//!
//! Inodes are named by address and formal number: a request for one that was deleted must not reach the next one in its block. [`Fs::remember`] and [`Fs::forget`] count the kernel's references, so that an
//! unlinked inode lives as long as this node's kernel knows it; [`Fs::open`] and [`Fs::release`] count handles, which the whole cluster respects.

mod attr;
mod create;
mod data;
mod list;
mod remove;
mod rename;
mod xattr;

pub use crate::dir::DirEntry;
pub use crate::ondisk::dinode::Time;
pub(crate) use attr::without_privileges;
pub use attr::{SetAttr, SetTime, StatFs};
pub use create::{Existing, NewNode};
pub use data::{Fallocate, Seek, SyncKind, WriteMode, Written};
pub use rename::RenameMode;

use crate::geometry::Geometry;
use crate::glock::{GlockType, Holder};
use crate::inode::Inodes;
use crate::orphan::Orphans;
use crate::pages::Budget;
use crate::rgrp::Rgrps;
use crate::trans::Trans;
use crate::volume::{Attached, Volume};
use crate::{Error, InodeNo, Result};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

/// A result and the glocks under which it is true.
#[derive(Debug)]
#[must_use = "dropping it lets the glocks go"]
pub struct Held<T> {
    pub value: T,
    pub holders: Vec<Holder>,
}

impl<T> Held<T> {
    pub(crate) fn new(value: T, holders: Vec<Holder>) -> Self {
        Self { value, holders }
    }

    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> Held<U> {
        Held { value: f(self.value), holders: self.holders }
    }
}

/// Who asks: decides owner and group of what is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
}

/// What stat(2) shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attr {
    pub ino: InodeNo,
    /// Type and permission bits.
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    /// Device files: major and minor number.
    pub rdev: (u32, u32),
    pub size: u64,
    /// In units of 512 bytes.
    pub blocks: u64,
    pub atime: Time,
    pub mtime: Time,
    pub ctime: Time,
    pub block_size: u32,
}

/// When reading changes the access time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Atime {
    /// Never. For volumes that several nodes read: an update needs the inode's glock in EX.
    Never,
    /// When it is not newer than the last change, or a day old.
    #[default]
    Relative,
}

/// How a mount behaves.
#[derive(Clone, Copy, Debug)]
pub struct FsOptions {
    pub atime: Atime,
    /// Bytes of file data kept in memory at most, dirty data included.
    pub data_cache: usize,
    /// Every change is durable before it is answered.
    pub sync: bool,
}

impl Default for FsOptions {
    fn default() -> Self {
        Self { atime: Atime::default(), data_cache: 256 << 20, sync: false }
    }
}

/// One mounted file system, as its users see it.
pub struct Fs {
    vol: Arc<Volume>,
    pub(crate) options: FsOptions,
    pub(crate) inodes: Inodes,
    pub(crate) budget: Arc<Budget>,
    pub(crate) orphans: Orphans,
    /// `None` on a spectator mount.
    pub(crate) rgrps: Option<Rgrps>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Dirty data stays in memory for so long at most (and in the log's set until its own timer).
const MAX_DIRTY_AGE: Duration = Duration::from_secs(5);
/// Inodes in memory beyond which those that nobody uses go.
const MAX_IDLE_INODES: usize = 50_000;
const TICK: Duration = Duration::from_secs(1);

impl Fs {
    /// The operations of a mounted volume. Starts the threads that write old data out and free unlinked inodes.
    pub fn new(vol: Arc<Volume>, options: FsOptions) -> Arc<Self> {
        let rgrps = vol.rgrps().ok().cloned();
        let fs = Arc::new(Self {
            vol,
            options,
            inodes: Inodes::default(),
            budget: Budget::new(options.data_cache),
            orphans: Orphans::default(),
            rgrps,
            threads: Mutex::default(),
        });
        fs.inodes.obtain(&fs, fs.root());
        if !fs.vol.is_read_only() {
            // Not woken by orphans: it looks at every inode each time.
            fs.spawn("gfs-writeback", Orphans::pause, |fs| fs.tick());
            fs.spawn("gfs-reclaim", Orphans::wait, Self::reclaim_or_sweep);
            fs.sweep_soon();
            let weak = Arc::downgrade(&fs);
            fs.vol.on_recovered(Box::new(move || {
                if let Some(fs) = weak.upgrade() {
                    fs.sweep_after_replay();
                }
            }));
            let weak = Arc::downgrade(&fs);
            fs.vol.on_iopen_wanted(Box::new(move |ino| {
                if let Some(fs) = weak.upgrade() {
                    fs.iopen_wanted(ino);
                }
            }));
        }
        fs
    }

    /// A thread that does `work` after each `wait`, a tick at most, until [`Fs::stop`].
    fn spawn(
        self: &Arc<Self>,
        name: &str,
        wait: fn(&Orphans, Duration) -> bool,
        work: impl Fn(&Self) + Send + 'static,
    ) {
        let weak = Arc::downgrade(self);
        let run = move || {
            while let Some(fs) = weak.upgrade() {
                if !wait(&fs.orphans, TICK) {
                    break;
                }
                work(&fs);
            }
        };
        match std::thread::Builder::new().name(name.to_owned()).spawn(run) {
            Ok(thread) => self.threads.lock().push(thread),
            Err(error) => tracing::error!(fs = %self.vol.name(), %error, "cannot start {name}"),
        }
    }

    fn tick(&self) {
        for inode in self.inodes.all() {
            if inode.pages.dirty_age().is_some_and(|age| age >= MAX_DIRTY_AGE)
                || self.budget.is_mostly_dirty()
            {
                // A failure stays with the file for fsync to report, and the log withdraws when it needs the data in place.
                let _ = inode.pages.write_out_all();
            }
        }
        self.relieve();
        if self.inodes.len() > MAX_IDLE_INODES {
            let root = self.root();
            self.inodes.prune(|inode| inode.no != root);
            self.vol
                .glocks()
                .shrink(|glock| glock.name().ty == GlockType::Inode && glock.object::<Attached>().is_none());
        }
    }

    /// Ends the operations: frees what is unlinked, writes all data out, forgets all inodes. Handles are closed and the kernel has
    /// forgotten everything; the volume is to be unmounted next.
    pub fn stop(&self) -> Result<()> {
        self.orphans.stop();
        for thread in std::mem::take(&mut *self.threads.lock()) {
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
        let mut result = Ok(());
        if !self.vol.is_read_only() {
            for inode in self.inodes.all() {
                let mut uses = inode.uses.lock();
                (uses.lookups, uses.opens, uses.iopen) = (0, 0, None);
            }
            self.reclaim();
            result = self.sweep_orphans().map(|_| ());
            for inode in self.inodes.all() {
                result = result.and(inode.pages.write_out_all());
            }
        }
        self.inodes.clear();
        result
    }

    pub fn volume(&self) -> &Arc<Volume> {
        &self.vol
    }

    pub fn root(&self) -> InodeNo {
        self.vol.root()
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.vol.geometry()
    }

    pub(crate) fn now() -> Time {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Time { sec: now.as_secs().cast_signed(), nsec: now.subsec_nanos() }
    }

    /// The kernel is about to hear of this inode so many times more. To be called while the holders of the operation that found it are there.
    pub fn remember(&self, ino: InodeNo, times: u64) {
        if let Ok(inode) = self.inode(ino) {
            inode.uses.lock().lookups += times;
        }
    }

    /// The kernel has forgotten an inode so many times. It may be one that was deleted, and whose block has another by now.
    pub fn forget(&self, ino: InodeNo, times: u64) {
        let Ok(inode) = self.inode(ino) else { return };
        let unused = {
            let mut uses = inode.uses.lock();
            uses.lookups = uses.lookups.saturating_sub(times);
            uses.lookups == 0 && uses.opens == 0
        };
        if unused && (inode.unlinked_here.load(Ordering::Relaxed) || inode.known_links() == Some(false)) {
            self.note_unlinked(&inode);
        }
    }

    /// Runs the changing half of an operation. Everything that can go wrong has been checked before, so an error in here means that memory
    /// and disk no longer agree about something: the mount stops before any of it can reach the disk.
    pub(crate) fn atomically<T>(&self, trans: &Trans, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let _ = trans;
        change().map_err(|error| match error {
            Error::Withdrawn(_) => error,
            other => {
                self.vol.withdraw(&format!("an operation failed in the middle of a transaction: {other}"));
                other
            }
        })
    }
}
