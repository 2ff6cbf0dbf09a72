//! Making things: files, directories, links, symbolic links, device nodes.
//!
//! The block of a new dinode is chosen before the transaction, because its glock must be had before: no other node may still be using what
//! was there. Everything else of a creation is one transaction, so that a crash leaves all of it or nothing.

use super::{Attr, Caller, Fs, Held, SetAttr};
use crate::dir::{Name, Target, init_linear};
use crate::glock::{AcquireFlags, Holder, LockState};
use crate::inode::{Inode, Locked};
use crate::ondisk::bitmap::BlockState;
use crate::ondisk::dinode::{
    DIF_INHERIT_JDATA, DIF_JDATA, DIF_SYSTEM, DIF_TOPDIR, Dinode, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO,
    S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK, Time,
};
use crate::ondisk::header::MetaType;
use crate::rgrp::Reservation;
use crate::trans::TransSize;
use crate::volume::{inode_glock, iopen_glock};
use crate::{BlockNo, Error, InodeNo, Result};
use std::sync::Arc;

const S_ISGID: u32 = 0o2000;
const PERMISSIONS: u32 = 0o7777;
/// How many free blocks a creation tries whose glocks somebody still holds, before it waits for one.
const CANDIDATES: u32 = 8;

/// What is to be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NewNode<'a> {
    File,
    Directory,
    Symlink(&'a [u8]),
    Fifo,
    Socket,
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
}

impl NewNode<'_> {
    fn type_bits(&self) -> u32 {
        match self {
            Self::File => S_IFREG,
            Self::Directory => S_IFDIR,
            Self::Symlink(_) => S_IFLNK,
            Self::Fifo => S_IFIFO,
            Self::Socket => S_IFSOCK,
            Self::CharDevice { .. } => S_IFCHR,
            Self::BlockDevice { .. } => S_IFBLK,
        }
    }

    fn device(&self) -> (u32, u32) {
        match *self {
            Self::CharDevice { major, minor } | Self::BlockDevice { major, minor } => (major, minor),
            _ => (0, 0),
        }
    }
}

/// What is to become of a regular file that [`Fs::create_or_open`] finds.
pub struct Existing<'a> {
    /// O_TRUNC.
    pub truncate: bool,
    /// With `truncate`: setuid and setgid bits go.
    pub kill_priv: bool,
    /// Whether the caller may open the file (the second) in the directory (the first).
    pub may: &'a dyn Fn(&Attr, &Attr) -> Result<()>,
}

/// A block with the glocks that its new inode needs.
struct Claimed {
    at: BlockNo,
    inode: Holder,
    iopen: Option<Holder>,
}

/// A free block that nobody else can take any more.
struct Place {
    res: Reservation,
    block: Claimed,
}

impl Fs {
    /// Makes `name` in a directory. `mode`: permission bits, umask applied.
    /// Errors: EEXIST, ENOENT (the directory is removed), ENOTDIR, ENAMETOOLONG, ENOSPC, EMLINK.
    pub fn mknod(
        &self,
        caller: Caller,
        parent: InodeNo,
        name: &[u8],
        mode: u32,
        node: NewNode<'_>,
    ) -> Result<Held<Attr>> {
        self.make(caller, parent, name, mode, node, false)
    }

    /// Makes a regular file and opens it: as [`Fs::mknod`] and [`Fs::open`] in one.
    pub fn create(&self, caller: Caller, parent: InodeNo, name: &[u8], mode: u32) -> Result<Held<Attr>> {
        self.make(caller, parent, name, mode, NewNode::File, true)
    }

    /// Opens a regular file, which is made unless it is there: open(2) with O_CREAT and without O_EXCL. However often other nodes remove and
    /// make the file meanwhile, the answer is never EEXIST, nor ENOENT unless the directory is removed.
    /// Errors: as [`Fs::create`]; EISDIR; ESTALE for what is there and is neither; those of `existing.may`.
    pub fn create_or_open(
        &self,
        caller: Caller,
        parent: InodeNo,
        name: &[u8],
        mode: u32,
        existing: &Existing<'_>,
    ) -> Result<Held<Attr>> {
        if Name::new(name)?.is_dots() {
            return Err(Error::Errno(libc::EISDIR));
        }
        loop {
            match self.create(caller, parent, name, mode) {
                Err(Error::Errno(libc::EEXIST)) => {}
                other => return other,
            }
            match self.open_named(parent, name, existing) {
                // Removed since: this directory says so itself if it is the one that is gone.
                Err(Error::Errno(libc::ENOENT)) => {}
                other => return other,
            }
        }
    }

    /// Errors: ENOENT when there is no such name (any more), and as [`Fs::create_or_open`].
    fn open_named(&self, parent: InodeNo, name: &[u8], existing: &Existing<'_>) -> Result<Held<Attr>> {
        let (dir, child) = self.lock_entry(parent, Name::new(name)?, LockState::Shared)?;
        let attr = child.attr();
        match attr.mode & S_IFMT {
            S_IFREG => {}
            S_IFDIR => return Err(Error::Errno(libc::EISDIR)),
            _ => return Err(Error::Errno(libc::ESTALE)),
        }
        (existing.may)(&dir.attr(), &attr)?;
        let inode = Arc::clone(&child.inode);
        // An iopen glock is not waited for with the inode's held: see `count_open`.
        drop((dir, child));
        match self.count_open(&inode) {
            Err(Error::Errno(libc::ESTALE)) => return Err(Error::Errno(libc::ENOENT)),
            other => other?,
        }
        let opened = if existing.truncate {
            let set = SetAttr { size: Some(0), kill_priv: existing.kill_priv, ..SetAttr::default() };
            self.setattr(inode.no, &set)
        } else {
            let file = self.lock(&inode, LockState::Exclusive);
            file.map(|file| Held::new(file.attr(), vec![file.into_holder()]))
        };
        opened.inspect_err(|_| self.release(inode.no))
    }

    pub fn mkdir(&self, caller: Caller, parent: InodeNo, name: &[u8], mode: u32) -> Result<Held<Attr>> {
        self.make(caller, parent, name, mode, NewNode::Directory, false)
    }

    /// The target may have up to block size − 233 bytes.
    pub fn symlink(&self, caller: Caller, parent: InodeNo, name: &[u8], target: &[u8]) -> Result<Held<Attr>> {
        if target.is_empty() {
            return Err(Error::Errno(libc::ENOENT));
        }
        if target.len() >= self.geometry().stuffed() {
            return Err(Error::Errno(libc::ENAMETOOLONG));
        }
        self.make(caller, parent, name, 0o777, NewNode::Symlink(target), false)
    }

    fn make(
        &self,
        caller: Caller,
        parent: InodeNo,
        name: &[u8],
        mode: u32,
        node: NewNode<'_>,
        open: bool,
    ) -> Result<Held<Attr>> {
        self.change(|| self.try_make(caller, parent, name, mode, node, open))
    }

    fn try_make(
        &self,
        caller: Caller,
        parent: InodeNo,
        name: &[u8],
        mode: u32,
        node: NewNode<'_>,
        open: bool,
    ) -> Result<Held<Attr>> {
        let name = Name::new(name)?;
        if name.is_dots() {
            return Err(Error::Errno(libc::EEXIST));
        }
        let parent = self.inode(parent)?;
        let mut claimed = None;
        loop {
            let dir = self.lock(&parent, LockState::Exclusive)?;
            dir.require_dir()?;
            if dir.is_unlinked() {
                return Err(Error::Errno(libc::ENOENT));
            }
            if dir.dir_find(name)?.is_some() {
                return Err(Error::Errno(libc::EEXIST));
            }
            if node == NewNode::Directory && dir.d.nlink == u32::MAX || dir.d.entries == u32::MAX {
                return Err(Error::Errno(libc::EMLINK));
            }
            let plan = dir.dir_plan(name)?;
            let goal = self.goal_of_new(&dir, name, &node);
            match self.place_for(goal, plan.alloc, open, claimed.take())? {
                Ok(place) => return self.make_at(caller, dir, name, mode, node, place, plan.touched),
                Err(busy) => {
                    drop(dir);
                    claimed = self.wait_for_block(busy, open)?;
                }
            }
        }
    }

    /// Directories directly below the top are spread over the resource groups, everything else stays near its directory.
    fn goal_of_new(&self, dir: &Locked<'_>, name: Name<'_>, node: &NewNode<'_>) -> BlockNo {
        let top = dir.inode.no == self.root() || dir.d.flags & DIF_TOPDIR != 0;
        if let (true, NewNode::Directory, Some(rgrps)) = (top, node, &self.rgrps) {
            let groups = rgrps.groups();
            return BlockNo(groups[name.hash as usize % groups.len().max(1)].entry().data0);
        }
        BlockNo(dir.d.goal_meta)
    }

    /// Reserves a dinode and `more` blocks. The inner error names a block whose glocks are busy, as are those of the others looked at.
    fn place_for(
        &self,
        goal: BlockNo,
        more: u64,
        open: bool,
        claimed: Option<Claimed>,
    ) -> Result<Result<Place, BlockNo>> {
        let want = u32::try_from(1 + more).map_err(|_| Error::Errno(libc::ENOSPC))?;
        let rgrps = self.volume().rgrps()?;
        if let Some(block) = claimed
            && let Some(res) = rgrps.reserve_dinode_at(block.at, want)?
        {
            return Ok(Ok(Place { res, block }));
        }
        let res = rgrps.reserve(goal, want, want)?;
        let mut at = res.pick_dinode()?;
        for _ in 0..CANDIDATES {
            match self.claim_block(at, open, AcquireFlags::TRY_1CB) {
                Err(Error::Errno(libc::EAGAIN)) => at = res.pick_next_dinode()?,
                other => return Ok(Ok(Place { block: other?, res })),
            }
        }
        Ok(Err(at))
    }

    /// In this order, because whoever opens an inode waits for its glock with the iopen glock held. The iopen glock as in `count_open`; SETTLED
    /// waits until the EX is gone with which the block was freed here.
    fn claim_block(&self, at: BlockNo, open: bool, how: AcquireFlags) -> Result<Claimed> {
        let (glocks, flags) = (self.volume().glocks(), how | AcquireFlags::SKIP);
        let opened = flags | AcquireFlags::EXACT | AcquireFlags::SETTLED;
        let iopen = open.then(|| glocks.acquire(iopen_glock(at), LockState::Shared, opened)).transpose()?;
        let inode = glocks.acquire(inode_glock(at), LockState::Exclusive, flags)?;
        Ok(Claimed { at, inode, iopen })
    }

    /// Waits, with nothing held, for the glocks of a block, and keeps them if it is still free: while they are kept no other creation can take it, so
    /// a creation that had to wait does not lose to the same competitor again and again. Nobody waits without limit for the glock of a free block
    /// with a directory locked, so the creation may wait for its directory with this one.
    fn wait_for_block(&self, at: BlockNo, open: bool) -> Result<Option<Claimed>> {
        let claimed = self.claim_block(at, open, AcquireFlags::NONE)?;
        let free = self.volume().rgrps()?.block_state(at)? == BlockState::Free;
        Ok(free.then_some(claimed))
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "second half of make: everything that was decided before the transaction"
    )]
    fn make_at(
        &self,
        caller: Caller,
        mut dir: Locked<'_>,
        name: Name<'_>,
        mode: u32,
        node: NewNode<'_>,
        place: Place,
        touched: u64,
    ) -> Result<Held<Attr>> {
        let vol = self.volume();
        let now = Self::now();
        let Place { res, block: Claimed { at, inode: holder, iopen } } = place;
        let blocks = res.trans_blocks(res.left(), 0) + touched as u32 + 2;
        let trans = vol.begin(TransSize::new(blocks, 0))?;
        let (new, dir) = self.atomically(&trans, || {
            dir.dir_make_room(&trans, Some(&res), name, now)?;
            let (addr, generation) = res.alloc_dinode(&trans)?;
            assert!(addr == at, "dinode allocated at {addr}, its glock held for {at}");
            let no = InodeNo { addr, formal: generation };
            let d = new_dinode(caller, &dir, no, mode, &node, self.geometry().stuffed() as u64, now);
            let buf = trans.create(vol.cache(), holder.glock(), addr, MetaType::Dinode)?;
            match node {
                NewNode::Directory => init_linear(&mut trans.modify(&buf), no, dir.inode.no),
                NewNode::Symlink(target) => {
                    trans.modify(&buf)[Dinode::SIZE..Dinode::SIZE + target.len()].copy_from_slice(target);
                }
                _ => {}
            }
            let target = Target { num: no, ty: d.dirent_type() };
            let mut new = self.adopt_new(&self.inodes.obtain(self, no), holder, buf, d);
            new.save(&trans);
            dir.dir_place(&trans, name, target, now)?;
            if node == NewNode::Directory {
                dir.d.nlink += 1;
            }
            dir.touch(now);
            dir.save(&trans);
            Ok((new, dir))
        })?;
        trans.commit();
        drop(res);
        if let Some(iopen) = iopen {
            let mut uses = new.inode.uses.lock();
            uses.opens += 1;
            uses.iopen = Some(iopen);
        }
        Ok(Held::new(new.attr(), vec![dir.into_holder(), new.into_holder()]))
    }

    /// Another name for an inode. Errors: EPERM for directories, EEXIST, ENOENT, EMLINK, ENOSPC.
    pub fn link(&self, ino: InodeNo, parent: InodeNo, name: &[u8]) -> Result<Held<Attr>> {
        self.change(|| self.try_link(ino, parent, name))
    }

    fn try_link(&self, ino: InodeNo, parent: InodeNo, name: &[u8]) -> Result<Held<Attr>> {
        let name = Name::new(name)?;
        if name.is_dots() {
            return Err(Error::Errno(libc::EEXIST));
        }
        let (inode, parent) = (self.inode(ino)?, self.inode(parent)?);
        if inode.no.addr == parent.no.addr {
            return Err(Error::Errno(libc::EPERM));
        }
        let mut locks = self.lock_all(&[(&parent, LockState::Exclusive), (&inode, LockState::Exclusive)])?;
        let (mut inode, mut dir) = (locks.remove(1), locks.remove(0));
        dir.require_dir()?;
        if inode.d.is_dir() {
            return Err(Error::Errno(libc::EPERM));
        }
        if dir.is_unlinked() || inode.is_unlinked() {
            return Err(Error::Errno(libc::ENOENT));
        }
        if dir.dir_find(name)?.is_some() {
            return Err(Error::Errno(libc::EEXIST));
        }
        if inode.d.nlink == u32::MAX || dir.d.entries == u32::MAX {
            return Err(Error::Errno(libc::EMLINK));
        }
        let plan = dir.dir_plan(name)?;
        let res = self.reserve_some(BlockNo(dir.d.goal_meta), plan.alloc, &[])?;
        let bitmaps = res.as_ref().map_or(0, |r| r.trans_blocks(r.left(), 0));
        let now = Self::now();
        let trans = self.volume().begin(TransSize::new(bitmaps + plan.touched as u32 + 2, 0))?;
        self.atomically(&trans, || {
            dir.dir_make_room(&trans, res.as_ref(), name, now)?;
            let target = Target { num: inode.inode.no, ty: inode.d.dirent_type() };
            dir.dir_place(&trans, name, target, now)?;
            dir.touch(now);
            dir.save(&trans);
            inode.d.nlink += 1;
            inode.d.ctime = now;
            inode.save(&trans);
            Ok(())
        })?;
        trans.commit();
        Ok(Held::new(inode.attr(), vec![dir.into_holder(), inode.into_holder()]))
    }

    /// A reservation when there is something to reserve or to touch.
    pub(crate) fn reserve_some(
        &self,
        goal: BlockNo,
        blocks: u64,
        touch: &[BlockNo],
    ) -> Result<Option<Reservation>> {
        let rgrps = self.volume().rgrps()?;
        let want = u32::try_from(blocks).map_err(|_| Error::Errno(libc::ENOSPC))?;
        match (want, touch) {
            (0, []) => Ok(None),
            (0, touch) => rgrps.lock_for(touch).map(Some),
            (want, touch) => rgrps.reserve_touching(goal, want, want, touch).map(Some),
        }
    }

    /// The inode of a directory entry that was just read.
    pub(crate) fn inode_of(&self, target: Target) -> Arc<Inode> {
        self.inodes.obtain(self, target.num)
    }
}

fn new_dinode(
    caller: Caller,
    dir: &Locked<'_>,
    no: InodeNo,
    mode: u32,
    node: &NewNode<'_>,
    stuffed: u64,
    now: Time,
) -> Dinode {
    let is_dir = *node == NewNode::Directory;
    let inherits_group = dir.d.mode & S_ISGID != 0;
    let mut mode = node.type_bits() | (mode & PERMISSIONS);
    if inherits_group && is_dir {
        mode |= S_ISGID;
    }
    let (major, minor) = node.device();
    let mut flags = dir.d.flags & DIF_SYSTEM;
    match node {
        NewNode::Directory => flags |= DIF_JDATA | dir.d.flags & DIF_INHERIT_JDATA,
        NewNode::File if dir.d.flags & DIF_INHERIT_JDATA != 0 => flags |= DIF_JDATA,
        _ => {}
    }
    Dinode {
        num: no,
        mode,
        uid: caller.uid,
        gid: if inherits_group { dir.d.gid } else { caller.gid },
        nlink: if is_dir { 2 } else { 1 },
        size: match node {
            NewNode::Directory => stuffed,
            NewNode::Symlink(target) => target.len() as u64,
            _ => 0,
        },
        blocks: 1,
        atime: now,
        mtime: now,
        ctime: now,
        major,
        minor,
        goal_meta: no.addr.0,
        goal_data: no.addr.0,
        generation: no.formal,
        flags,
        entries: if is_dir { 2 } else { 0 },
        ..Dinode::default()
    }
}
