//! In-memory inodes: one per dinode that this node's kernel knows or that is open, found by address.
//!
//! An [`Inode`] is identity, glock, cached file data, and counts of its users. What stands in the dinode is used through [`Locked`]: an inode
//! whose glock is held, with a copy of the decoded dinode. Changes are made to the copy and to buffers of a transaction, and
//! [`Locked::save`] writes the copy back; an operation that fails before that has changed nothing.
//!
//! The decoded dinode is remembered between operations together with its buffer. Giving up the glock throws the buffer out of the cache, which
//! makes the memory stale, and the next operation reads it again. An inode whose formal number is not the wanted one, or whose block is no
//! dinode any more, was deleted by another node: ESTALE.

use crate::cache::Buf;
use crate::geometry::Geometry;
use crate::glock::{AcquireFlags, Glock, Holder, LockState};
use crate::ondisk::bitmap::BlockState;
use crate::ondisk::dinode::{DIF_EXHASH, DIF_TRUNC_IN_PROG, Dinode, Time};
use crate::ondisk::header::{FORMAT_DIRENT, MetaType};
use crate::ondisk::lvb::InodeLvb;
use crate::ops::{Attr, Fs};
use crate::pages::Pages;
use crate::trans::{Trans, in_transaction};
use crate::volume::{Attached, GlockObject, inode_glock};
use crate::{BlockNo, Error, InodeNo, Result};
use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Who uses an inode on this node.
#[derive(Default)]
pub(crate) struct Uses {
    /// References of the kernel: nodes it has looked up and not yet forgotten.
    pub(crate) lookups: u64,
    /// Open handles.
    pub(crate) opens: u64,
    /// Shared iopen glock: tells the cluster that the inode is open here.
    pub(crate) iopen: Option<Holder>,
}

/// One inode of this mount.
pub(crate) struct Inode {
    pub(crate) no: InodeNo,
    glock: Arc<Glock>,
    cached: Mutex<Option<Cached>>,
    pub(crate) pages: Arc<Pages>,
    pub(crate) uses: Mutex<Uses>,
    /// This node took its last name. Then the kernel's references here keep it (a working directory, a file known by number); references to
    /// what another node removed do not.
    pub(crate) unlinked_here: AtomicBool,
}

struct Cached {
    d: Dinode,
    buf: Buf,
}

impl Inode {
    /// May it not be freed yet, unlinked as it is?
    pub(crate) fn is_used(&self) -> bool {
        let uses = self.uses.lock();
        uses.opens > 0 || uses.lookups > 0 && self.unlinked_here.load(Ordering::Relaxed)
    }

    /// Whether the inode has names; `None` when that is not known here.
    pub(crate) fn known_links(&self) -> Option<bool> {
        self.cached.lock().as_ref().map(|cached| cached.d.nlink > 0)
    }

    /// Forget what was read of the dinode: its block was freed.
    pub(crate) fn forget_dinode(&self) {
        *self.cached.lock() = None;
    }
}

impl GlockObject for Inode {
    fn write_back(&self) -> Result<()> {
        self.pages.write_out_all()
    }

    fn invalidate(&self, keep_metadata: bool) {
        self.pages.clear();
        if !keep_metadata {
            self.forget_dinode();
        }
    }

    /// The dinode is read by the first operation, which also knows what to answer when it is gone.
    fn instantiate(&self, _state: LockState) -> Result<()> {
        Ok(())
    }
}

/// All inodes of a mount.
#[derive(Default)]
pub(crate) struct Inodes {
    table: RwLock<FxHashMap<u64, Arc<Inode>>>,
}

impl Inodes {
    pub(crate) fn get(&self, addr: BlockNo) -> Option<Arc<Inode>> {
        self.table.read().get(&addr.0).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Inode>> {
        let mut all: Vec<_> = self.table.read().values().cloned().collect();
        all.sort_unstable_by_key(|inode| inode.no);
        all
    }

    pub(crate) fn len(&self) -> usize {
        self.table.read().len()
    }

    /// The inode of this number. An earlier one at the same address has been deleted and makes room. When it is the wanted one that has been
    /// deleted (its number was read before, and no lock kept it true), the later one stays where it is with its data, and the result is good
    /// for nothing but to learn so: ESTALE.
    pub(crate) fn obtain(&self, fs: &Fs, no: InodeNo) -> Arc<Inode> {
        if let Some(inode) = self.table.read().get(&no.addr.0)
            && inode.no == no
        {
            return Arc::clone(inode);
        }
        let mut table = self.table.write();
        let deleted = match table.get(&no.addr.0) {
            Some(inode) if inode.no == no => return Arc::clone(inode),
            // The generations of a block only ever rise.
            Some(other) => other.no.formal > no.formal,
            None => false,
        };
        let glock = fs.volume().glocks().get(inode_glock(no.addr));
        let inode = Arc::new(Inode {
            no,
            glock: Arc::clone(&glock),
            cached: Mutex::new(None),
            pages: Arc::new(Pages::new(Arc::clone(fs.volume().disk()), Arc::clone(&fs.budget))),
            uses: Mutex::default(),
            unlinked_here: AtomicBool::new(false),
        });
        if !deleted {
            glock.set_object(Some(Arc::new(Attached(Arc::clone(&inode) as _))));
            table.insert(no.addr.0, Arc::clone(&inode));
        }
        inode
    }

    pub(crate) fn clear(&self) {
        for (_, inode) in self.table.write().drain() {
            inode.glock.set_object(None);
        }
    }

    /// Its dinode is free.
    pub(crate) fn remove(&self, inode: &Arc<Inode>) {
        let mut table = self.table.write();
        if table.get(&inode.no.addr.0).is_some_and(|found| Arc::ptr_eq(found, inode)) {
            table.remove(&inode.no.addr.0);
            inode.glock.set_object(None);
        }
    }

    /// Takes out inodes that nobody uses and that hold no data worth keeping. One whose glock is held may be about to become known to the kernel.
    pub(crate) fn prune(&self, mut unused: impl FnMut(&Arc<Inode>) -> bool) {
        self.table.write().retain(|_, inode| {
            let uses = inode.uses.lock();
            let keep = uses.lookups > 0
                || uses.opens > 0
                || Arc::strong_count(inode) > 2
                || !inode.glock.is_idle()
                || inode.pages.has_dirty()
                || !unused(inode);
            drop(uses);
            if !keep {
                inode.glock.set_object(None);
            }
            keep
        });
    }
}

/// An inode whose glock is held by the caller.
pub(crate) struct Locked<'f> {
    pub(crate) fs: &'f Fs,
    pub(crate) inode: Arc<Inode>,
    /// Copy of the dinode; see [`Locked::save`].
    pub(crate) d: Dinode,
    pub(crate) buf: Buf,
    holder: Holder,
}

impl std::fmt::Debug for Locked<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "inode {} under {:?}", self.inode.no.addr, self.holder)
    }
}

impl Locked<'_> {
    pub(crate) fn geo(&self) -> Geometry {
        self.fs.geometry()
    }

    pub(crate) fn glock(&self) -> &Arc<Glock> {
        &self.inode.glock
    }

    pub(crate) fn is_exclusive(&self) -> bool {
        self.holder.state() == LockState::Exclusive
    }

    pub(crate) fn into_holder(self) -> Holder {
        self.holder
    }

    /// Writes the copy of the dinode to its block, as part of the transaction, and remembers it.
    pub(crate) fn save(&mut self, trans: &Trans) {
        assert!(self.is_exclusive(), "inode {} changed without EX", self.inode.no.addr);
        self.d.payload_format =
            if self.d.is_dir() && self.d.flags & DIF_EXHASH == 0 { FORMAT_DIRENT } else { 0 };
        self.d.encode(&mut trans.modify(&self.buf));
        *self.inode.cached.lock() = Some(Cached { d: self.d.clone(), buf: self.buf.clone() });
    }

    pub(crate) fn attr(&self) -> Attr {
        attr_of(&self.d, self.geo())
    }

    /// The inode has no name any more and must not get a new one.
    pub(crate) fn is_unlinked(&self) -> bool {
        self.d.nlink == 0
    }

    pub(crate) fn touch(&mut self, now: Time) {
        self.d.mtime = now;
        self.d.ctime = now;
    }
}

pub(crate) fn attr_of(d: &Dinode, geo: Geometry) -> Attr {
    Attr {
        ino: d.num,
        mode: d.mode,
        nlink: d.nlink,
        uid: d.uid,
        gid: d.gid,
        rdev: (d.major, d.minor),
        size: d.size,
        blocks: d.blocks << (geo.shift - 9),
        atime: d.atime,
        mtime: d.mtime,
        ctime: d.ctime,
        block_size: geo.block_size,
    }
}

impl Fs {
    /// An inode that the kernel knows. Errors: ESTALE when it was deleted and its block has another by now.
    pub(crate) fn inode(&self, no: InodeNo) -> Result<Arc<Inode>> {
        self.inodes.get(no.addr).filter(|inode| inode.no == no).ok_or(Error::Errno(libc::ESTALE))
    }

    /// Takes an inode's glock and reads its dinode if need be.
    pub(crate) fn lock(&self, inode: &Arc<Inode>, state: LockState) -> Result<Locked<'_>> {
        let holder = self.volume().glocks().acquire_on(&inode.glock, state, AcquireFlags::NONE)?;
        self.attach(inode, holder)
    }

    /// As [`Fs::lock`], for an inode that a name in a directory leads to whose glock is held: it certainly exists.
    pub(crate) fn lock_named(
        &self,
        inode: &Arc<Inode>,
        state: LockState,
        flags: AcquireFlags,
    ) -> Result<Locked<'_>> {
        let holder = self.volume().glocks().acquire_on(&inode.glock, state, flags)?;
        self.attach_named(inode, holder)
    }

    /// Holders for several distinct inodes, in the order asked for, taken without deadlock.
    pub(crate) fn hold_all(&self, wanted: &[(&Arc<Inode>, LockState)]) -> Result<Vec<Holder>> {
        let names: Vec<_> = wanted.iter().map(|(inode, state)| (inode.glock.name(), *state)).collect();
        let mut holders = self.volume().glocks().acquire_all(&names)?;
        Ok(wanted
            .iter()
            .map(|(inode, _)| {
                let at = holders.iter().position(|h| Arc::ptr_eq(h.glock(), &inode.glock));
                holders.swap_remove(at.expect("invariant: one holder for each distinct inode"))
            })
            .collect())
    }

    /// As [`Fs::hold_all`], with their dinodes.
    pub(crate) fn lock_all(&self, wanted: &[(&Arc<Inode>, LockState)]) -> Result<Vec<Locked<'_>>> {
        let holders = self.hold_all(wanted)?;
        wanted.iter().zip(holders).map(|((inode, _), holder)| self.attach(inode, holder)).collect()
    }

    /// The dinode of an inode whose glock is held. Under EX a truncate that was interrupted by a crash is finished first.
    /// Errors: ESTALE when the inode was deleted.
    pub(crate) fn attach(&self, inode: &Arc<Inode>, holder: Holder) -> Result<Locked<'_>> {
        if inode.cached.lock().is_none() {
            self.require_alive(inode, &holder)?;
        }
        self.attach_named(inode, holder)
    }

    pub(crate) fn attach_named(&self, inode: &Arc<Inode>, holder: Holder) -> Result<Locked<'_>> {
        let known = inode.cached.lock().as_ref().map(|cached| (cached.d.clone(), cached.buf.clone()));
        let (d, buf) = match known {
            Some(known) => known,
            None => self.read_dinode(inode)?,
        };
        let mut locked = Locked { fs: self, inode: Arc::clone(inode), d, buf, holder };
        if locked.d.flags & DIF_TRUNC_IN_PROG != 0 && locked.is_exclusive() && !self.volume().is_read_only() {
            locked.finish_truncate()?;
        }
        Ok(locked)
    }

    /// The block of a deleted inode may still look like a dinode with links: when it was freed before its last change was written in place.
    /// What was deleted while somebody had the lock is in its value block; otherwise the bitmap knows. An inode that is open here is safe.
    fn require_alive(&self, inode: &Inode, holder: &Holder) -> Result<()> {
        if !self.volume().glocks().is_clustered() || inode.uses.lock().iopen.is_some() {
            return Ok(());
        }
        let gone = match holder.lvb().as_ref().and_then(InodeLvb::decode) {
            Some(lvb) => inode.no.formal <= lvb.generation_deleted,
            None if inode.no == self.root() => false,
            None => {
                let state = self.volume().rgrps()?.block_state(inode.no.addr)?;
                !matches!(state, BlockState::Dinode | BlockState::Unlinked)
            }
        };
        if gone { Err(Error::Errno(libc::ESTALE)) } else { Ok(()) }
    }

    fn read_dinode(&self, inode: &Arc<Inode>) -> Result<(Dinode, Buf)> {
        let addr = inode.no.addr;
        let read = || {
            let buf = self.volume().cache().read(&inode.glock, addr, MetaType::Dinode)?;
            let d = buf.with(|b| Dinode::decode_at(b, &self.geometry(), addr)).map_err(|e| e.at(addr))?;
            Ok((d, buf))
        };
        let (d, buf) = match read() {
            Ok(found) => found,
            Err(Error::Corrupt { block, what }) => {
                // Damage, or simply not an inode any more since another node deleted it.
                return Err(match self.volume().rgrps()?.block_state(addr)? {
                    BlockState::Dinode | BlockState::Unlinked => Error::Corrupt { block, what },
                    BlockState::Free | BlockState::Used => Error::Errno(libc::ESTALE),
                });
            }
            Err(other) => return Err(other),
        };
        if d.num.formal != inode.no.formal {
            return Err(Error::Errno(libc::ESTALE));
        }
        *inode.cached.lock() = Some(Cached { d: d.clone(), buf: buf.clone() });
        Ok((d, buf))
    }

    /// A new inode in memory whose dinode block was just allocated, under the EX holder of its glock. The block is created in the transaction.
    pub(crate) fn adopt_new(&self, inode: &Arc<Inode>, holder: Holder, buf: Buf, d: Dinode) -> Locked<'_> {
        Locked { fs: self, inode: Arc::clone(inode), d, buf, holder }
    }
}

impl Fs {
    /// Is this a block that resource groups manage? A table that another node's growing of the volume has made stale is read again, but not
    /// inside a transaction, where what was found before it is all there is to find.
    pub(crate) fn manages(&self, at: BlockNo) -> bool {
        match &self.rgrps {
            Some(rgrps) if rgrps.group_of(at).is_some() => true,
            Some(_) => !in_transaction() && self.volume().rgrps().is_ok_and(|r| r.group_of(at).is_some()),
            None => at.0 > self.geometry().sb_block() && at.0 < self.volume().disk().blocks(),
        }
    }
}
