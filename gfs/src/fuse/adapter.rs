//! fuser's trait over [`Fs`]: each request is tried on the thread that read it, and handed to a thread of its own if it would have to wait.

use super::access::Opener;
use super::coherence::Coherence;
use super::convert::{asked_time, generation, new_node, no_attr, set_time};
use super::data::Handle;
use super::node::Node;
use super::second_look::SecondLooks;
use crate::glock::nowait;
use crate::ops::{Attr, Caller, Existing, Fallocate, Fs, Held, RenameMode, Seek, SetAttr, SyncKind};
use crate::workers::Workers;
use crate::{Error, InodeNo, Result};
use fuser::{
    BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyLock, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

/// Threads that wait for a lock or the disk at the same time; beyond, requests queue.
const MAX_BLOCKED: usize = 16_384;
/// Threads for the write-back of mapped pages, for which demotions wait: never used for anything else.
const MAX_WRITE_BACK: usize = 256;
/// One READ or WRITE.
const MAX_TRANSFER: u32 = 1 << 20;

/// Handle of a directory that we have opened ourselves: see [`super::size`].
const OURS: u64 = 1;

/// What request threads share.
pub(super) struct Core {
    pub(super) fs: Arc<Fs>,
    pub(super) kernel: Arc<Coherence>,
    pub(super) looks: SecondLooks,
    #[cfg(test)]
    pub(super) probe: super::tests::Probe,
}

pub(super) struct Adapter {
    pub(super) core: Arc<Core>,
    pub(super) blocked: Workers,
    pub(super) write_back: Workers,
    #[cfg(test)]
    pub(super) max_background: u16,
}

impl Adapter {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self {
            core,
            blocked: Workers::new("gfs-wait", MAX_BLOCKED),
            write_back: Workers::new("gfs-mapped", MAX_WRITE_BACK),
            #[cfg(test)]
            max_background: u16::MAX,
        }
    }

    /// Runs `op` here without waiting, else on a thread that may wait; then `answer`, which writes the reply. What `op` returned, glock
    /// holders included, lives until the reply is written.
    pub(super) fn serve<R: Send + 'static, T: 'static>(
        &self,
        reply: R,
        op: impl Fn(&Core) -> Result<T> + Send + 'static,
        answer: impl FnOnce(&Arc<Core>, R, Result<T>) + Send + 'static,
    ) {
        let tried = if self.core.is_slow() { Err(Error::WouldBlock) } else { nowait(|| op(&self.core)) };
        match tried {
            Err(Error::WouldBlock) => {
                let core = Arc::clone(&self.core);
                self.blocked.run(move || {
                    let result = op(&core);
                    core.before_slow_reply();
                    answer(&core, reply, result);
                });
            }
            result => answer(&self.core, reply, result),
        }
    }

    fn ino(&self, node: INodeNo) -> InodeNo {
        self.core.kernel.nodes.no(node.0)
    }

    fn serve_empty(&self, reply: ReplyEmpty, op: impl Fn(&Core) -> Result<Held<()>> + Send + 'static) {
        self.serve(reply, op, |_, reply, result| match result {
            Ok(held) => {
                reply.ok();
                drop(held);
            }
            Err(e) => reply.error(errno(&e)),
        });
    }

    /// CREATE and its like, except for opening: a new name in `dir`.
    fn serve_new(
        &self,
        reply: ReplyEntry,
        dir: InodeNo,
        op: impl Fn(&Core) -> Result<Held<Attr>> + Send + 'static,
    ) {
        self.serve(reply, op, move |core, reply, result| match result {
            Ok(held) => {
                let (node, _) = core.remember(held.value.ino);
                node.size.lock().told(held.value.size);
                let ttl = core.kernel.unchecked_attr_ttl(&node, &held.value);
                let names = core.kernel.name_ttl(&core.kernel.nodes.get(dir));
                let attr = core.kernel.file_attr(&held.value, true);
                reply.entry_with_ttls(&ttl, &names, &attr, generation(&held.value));
                drop(held);
            }
            Err(e) => reply.error(errno(&e)),
        });
    }
}

impl Core {
    pub(super) fn new(fs: Arc<Fs>, kernel: Arc<Coherence>) -> Self {
        Self {
            fs,
            kernel,
            looks: SecondLooks::new(),
            #[cfg(test)]
            probe: super::tests::Probe::default(),
        }
    }

    /// Tests let some replies take a thread of their own, and their time.
    #[cfg(test)]
    pub(super) fn is_slow(&self) -> bool {
        self.probe.replies.chooses()
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "tests slow replies down")]
    pub(super) const fn is_slow(&self) -> bool {
        false
    }

    #[cfg(test)]
    pub(super) fn before_slow_reply(&self) {
        self.probe.replies.pause();
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "tests slow replies down")]
    pub(super) const fn before_slow_reply(&self) {}

    /// The kernel is about to be told of the inode; true when it does not know it yet.
    pub(super) fn remember(&self, ino: InodeNo) -> (Arc<Node>, bool) {
        let told = self.kernel.nodes.remember(ino);
        self.fs.remember(ino, 1 + told.inherited);
        (told.node, told.first)
    }

    /// Whether handles for reading go without pages, since the kernel's size of the file could not be made right in time: see [`super::size`].
    fn reads_direct(&self, ino: InodeNo) -> bool {
        #[cfg(test)]
        if self.probe.reads_direct.load(std::sync::atomic::Ordering::Relaxed) {
            return self.kernel.is_clustered();
        }
        self.kernel
            .nodes
            .find(ino)
            .is_some_and(|node| node.reads_direct.load(std::sync::atomic::Ordering::Relaxed))
    }

    /// Handle flags, and their effect on the rules of caching. Among nodes only.
    fn open_flags(&self, handle: Handle) -> FopenFlags {
        // Also for handles that do not use the cache: an open without it drops all pages of the inode, also those under a WRITE on its way.
        let keep = FopenFlags::FOPEN_KEEP_CACHE;
        if self.kernel.is_clustered() && handle.direct {
            // The kernel serialises appends itself; others may run side by side.
            keep | FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
        } else {
            keep
        }
    }
}

pub(super) fn errno(error: &Error) -> Errno {
    match error {
        Error::Errno(_) | Error::WouldBlock | Error::Interrupted => {}
        Error::Withdrawn(_) => tracing::debug!(err = %error, "request to a withdrawn mount"),
        other => tracing::error!(err = %other, "request failed"),
    }
    Errno::from_i32(error.errno())
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid() }
}

fn owned(name: &OsStr) -> Vec<u8> {
    name.as_bytes().to_vec()
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Not FUSE_ATOMIC_O_TRUNC: an OPEN that truncates comes before the kernel has looked whether the file is a running program.
        let mut wanted = InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2;
        wanted |= if self.core.kernel.is_clustered() {
            // Alone, the kernel keeps all file locks itself, and knows flock from fcntl.
            InitFlags::FUSE_POSIX_LOCKS | InitFlags::FUSE_FLOCK_LOCKS | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP
        } else {
            // Among nodes a listing's attributes cannot be kept true: see `listing`.
            InitFlags::FUSE_DO_READDIRPLUS | InitFlags::FUSE_READDIRPLUS_AUTO
        };
        for flag in wanted.iter() {
            if let Err(missing) = config.add_capabilities(flag) {
                tracing::debug!(?missing, "not offered by this kernel");
            }
        }
        let limits = |e: u32| std::io::Error::other(format!("the kernel's limit is {e}"));
        config.set_max_write(MAX_TRANSFER).map_err(limits)?;
        // WRITEs of mapped pages are background requests, and demotions wait for them: they must never queue behind READs that wait for locks.
        #[cfg(not(test))]
        let max_background = u16::MAX;
        #[cfg(test)]
        let max_background = self.max_background;
        let _ = config.set_max_background(max_background);
        let _ = config.set_congestion_threshold(max_background / 4 * 3 + 1);
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        #[cfg(test)]
        self.core.probe.asked.single.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (dir, name, thread) = (self.ino(parent), owned(name), req.pid());
        self.serve(
            reply,
            move |core| core.lookup_agreed(thread, dir, &name),
            move |core, reply, result| match result {
                Ok((agreement, held)) => {
                    let names = core.kernel.name_ttl(&core.kernel.nodes.get(dir));
                    if let Some(attr) = &held.value {
                        let (node, first) = core.remember(attr.ino);
                        node.size.lock().told(attr.size);
                        let ttl = core.kernel.entry_attr_ttl(&node, attr, first, agreement);
                        reply.entry_with_ttls(
                            &ttl,
                            &names,
                            &core.kernel.file_attr(attr, true),
                            generation(attr),
                        );
                    } else {
                        reply.entry_with_ttls(&names, &names, &no_attr(), Generation(0));
                    }
                    drop(held);
                }
                Err(e) => reply.error(errno(&e)),
            },
        );
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        let ino = self.ino(ino);
        self.core.kernel.nodes.forget(ino, nlookup);
        self.core.fs.forget(ino, nlookup);
        #[cfg(test)]
        self.core.probe.asked.forgets.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }

    fn getattr(&self, req: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let Some(reply) = self.answer_ourselves(req.pid(), ino, reply) else { return };
        #[cfg(test)]
        self.core.probe.asked.single.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (ino, thread) = (self.ino(ino), req.pid());
        self.serve(
            reply,
            move |core| core.getattr(ino, thread, fh.is_some()),
            move |core, reply, result| match result {
                Ok((agreement, held)) => {
                    let ttl = core.kernel.attr_ttl(&core.kernel.nodes.get(ino), &held.value, agreement);
                    reply.attr(&ttl, &core.kernel.file_attr(&held.value, false));
                    drop(held);
                }
                Err(e) => reply.error(errno(&e)),
            },
        );
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some(reply) = self.answer_ourselves(req.pid(), ino, reply) else { return };
        let (ino, thread) = (self.ino(ino), req.pid());
        let set = SetAttr {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
            ctime: ctime.map(asked_time),
            // The kernel's own word on this (FATTR_KILL_SUIDGID) is not passed on; the superuser is who keeps the bits.
            kill_priv: size.is_some() && req.uid() != 0,
        };
        self.serve(
            reply,
            move |core| core.fs.setattr(ino, &set),
            move |core, reply, result| match result {
                Ok(held) => {
                    let node = core.kernel.nodes.get(held.value.ino);
                    if core.kernel.is_clustered() {
                        node.size.lock().set(held.value.size, thread);
                    }
                    let ttl = core.kernel.unchecked_attr_ttl(&node, &held.value);
                    reply.attr(&ttl, &core.kernel.file_attr(&held.value, false));
                    drop(held);
                }
                Err(e) => reply.error(errno(&e)),
            },
        );
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        self.serve_readlink(self.ino(ino), reply);
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let Some(node) = new_node(mode, rdev) else { return reply.error(Errno::EINVAL) };
        let (dir, name, who) = (self.ino(parent), owned(name), caller(req));
        self.serve_new(reply, dir, move |core| core.fs.mknod(who, dir, &name, mode, node));
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let (dir, name, who) = (self.ino(parent), owned(name), caller(req));
        self.serve_new(reply, dir, move |core| core.fs.mkdir(who, dir, &name, mode));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (dir, name) = (self.ino(parent), owned(name));
        self.serve_empty(reply, move |core| core.fs.unlink(dir, &name));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (dir, name) = (self.ino(parent), owned(name));
        self.serve_empty(reply, move |core| core.fs.rmdir(dir, &name));
    }

    fn symlink(&self, req: &Request, parent: INodeNo, link_name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (dir, name, who) = (self.ino(parent), owned(link_name), caller(req));
        let target = owned(target.as_os_str());
        self.serve_new(reply, dir, move |core| core.fs.symlink(who, dir, &name, &target));
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mode = match flags {
            f if f.is_empty() => RenameMode::Replace,
            RenameFlags::RENAME_NOREPLACE => RenameMode::NoReplace,
            RenameFlags::RENAME_EXCHANGE => RenameMode::Exchange,
            _ => return reply.error(Errno::EINVAL),
        };
        let (old, old_name) = (self.ino(parent), owned(name));
        let (new, new_name) = (self.ino(newparent), owned(newname));
        self.serve(
            reply,
            move |core| core.fs.rename(old, &old_name, new, &new_name, mode),
            move |core, reply, result| match result {
                Ok(held) => {
                    // The kernel moves its names along, with the lifetimes they have.
                    for dir in [old, new] {
                        core.kernel.names_handed_out(&core.kernel.nodes.get(dir));
                    }
                    reply.ok();
                    drop(held);
                }
                Err(e) => reply.error(errno(&e)),
            },
        );
    }

    fn link(&self, _req: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let (ino, dir, name) = (self.ino(ino), self.ino(newparent), owned(newname));
        self.serve_new(reply, dir, move |core| core.fs.link(ino, dir, &name));
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let ino = self.ino(ino);
        let handle = Handle::new(flags.0);
        let thread = req.pid();
        let clustered = self.core.kernel.is_clustered();
        if clustered && handle.writer {
            self.core.count_writer(ino);
        }
        self.serve(
            reply,
            move |core| {
                if clustered && handle.writer {
                    core.take_for_writing(ino)?;
                }
                core.fs.open(ino)
            },
            move |core, reply, result| {
                core.opened(thread, &result);
                match result {
                    Ok(()) => {
                        let direct = handle.direct || (!handle.writer && core.reads_direct(ino));
                        let handle = Handle { direct, ..handle };
                        reply.opened(handle.number(), core.open_flags(handle));
                    }
                    Err(e) => {
                        if clustered && handle.writer {
                            core.uncount_writer(ino);
                        }
                        reply.error(errno(&e));
                    }
                }
            },
        );
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (dir, name, who) = (self.ino(parent), owned(name), caller(req));
        let handle = Handle::new(flags);
        let opener = Opener::new(req, flags);
        let (truncate, kill_priv, thread) = (flags & libc::O_TRUNC != 0, req.uid() != 0, req.pid());
        self.serve(
            reply,
            move |core| {
                if flags & libc::O_EXCL != 0 {
                    return core.fs.create(who, dir, &name, mode);
                }
                // Another node may have made it since the kernel looked.
                let existing = Existing { truncate, kill_priv, may: &|dir, file| opener.may(dir, file) };
                core.fs.create_or_open(who, dir, &name, mode, &existing)
            },
            move |core, reply, result| {
                core.opened(thread, &result);
                match result {
                    Ok(held) => {
                        let (node, _) = core.remember(held.value.ino);
                        node.size.lock().told(held.value.size);
                        if core.kernel.is_clustered() && handle.writer {
                            // Its glock is held in EX here.
                            core.count_writer(held.value.ino);
                        }
                        // One lifetime for name and attributes, so among nodes none.
                        let ttl = core.kernel.unchecked_attr_ttl(&node, &held.value);
                        let attr = core.kernel.file_attr(&held.value, true);
                        reply.created(
                            &ttl,
                            &attr,
                            generation(&held.value),
                            handle.number(),
                            core.open_flags(handle),
                        );
                        drop(held);
                    }
                    Err(e) => reply.error(errno(&e)),
                }
            },
        );
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.serve_read(
            self.ino(ino),
            Handle::from(fh),
            offset,
            size.min(MAX_TRANSFER),
            flags.0,
            req.pid(),
            reply,
        );
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.serve_write(
            self.ino(ino),
            Handle::from(fh),
            offset,
            data,
            write_flags,
            flags.0,
            req.pid(),
            reply,
        );
    }

    fn flush(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        self.core.release_locks(self.ino(ino), owner.0);
        reply.ok();
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let ino = self.ino(ino);
        if let Some(owner) = lock_owner {
            self.core.release_locks(ino, owner.0);
        }
        if self.core.kernel.is_clustered() && Handle::from(fh).writer {
            self.core.uncount_writer(ino);
        }
        self.core.fs.release(ino);
        reply.ok();
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.sync(ino, datasync, reply);
    }

    fn opendir(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.core.kernel.sizes.is_asking(req.pid()) {
            return reply.opened(FileHandle(OURS), FopenFlags::empty());
        }
        let ino = self.ino(ino);
        self.serve(
            reply,
            move |core| core.fs.open(ino),
            |_, reply, result| match result {
                // No listing is kept: the kernel adds to it after the reply, when our glock may be gone; on a lone mount what was
                // read before a name was removed goes into the listing that another handle has begun since.
                Ok(()) => reply.opened(FileHandle(0), FopenFlags::empty()),
                Err(e) => reply.error(errno(&e)),
            },
        );
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.serve_readdir(self.ino(ino), offset, reply);
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        #[cfg(test)]
        self.core.probe.asked.listings.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.serve_readdirplus(self.ino(ino), offset, reply);
    }

    fn releasedir(&self, _req: &Request, ino: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        if fh.0 != OURS {
            self.core.fs.release(self.ino(ino));
        }
        reply.ok();
    }

    fn fsyncdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.sync(ino, datasync, reply);
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.serve(
            reply,
            |core| core.fs.statfs(),
            |_, reply, result| match result {
                Ok(s) => reply.statfs(
                    s.blocks,
                    s.free,
                    s.free,
                    s.files,
                    s.files_free,
                    s.block_size,
                    s.name_max,
                    s.block_size,
                ),
                Err(e) => reply.error(errno(&e)),
            },
        );
    }

    fn setxattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (ino, name, value) = (self.ino(ino), owned(name), value.to_vec());
        self.serve_blocking(reply, move |core| core.fs.setxattr(ino, &name, &value));
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (ino, name) = (self.ino(ino), owned(name));
        self.serve(
            reply,
            move |core| core.fs.getxattr(ino, &name),
            move |_, reply, result| xattr(reply, size, result),
        );
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let ino = self.ino(ino);
        self.serve(
            reply,
            move |core| core.fs.listxattr(ino),
            move |_, reply, result| xattr(reply, size, result),
        );
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (ino, name) = (self.ino(ino), owned(name));
        self.serve_blocking(reply, move |core| core.fs.removexattr(ino, &name));
    }

    fn getlk(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        self.core.get_lock(self.ino(ino), owner.0, (start, end), typ, pid, reply);
    }

    fn setlk(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        self.core.set_lock(self.ino(ino), owner.0, (start, end), typ, pid, sleep, reply);
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let how = match mode {
            0 => Fallocate::Allocate,
            libc::FALLOC_FL_KEEP_SIZE => Fallocate::KeepSize,
            PUNCH => Fallocate::PunchHole,
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        let (ino, thread) = (self.ino(ino), req.pid());
        self.serve(
            reply,
            move |core| core.fs.fallocate(ino, how, offset, length),
            move |core, reply, result| match result {
                Ok(held) => {
                    if core.kernel.is_clustered() && how == Fallocate::Allocate {
                        core.kernel.nodes.get(ino).size.lock().reaches(offset + length, thread);
                    }
                    reply.ok();
                    drop(held);
                }
                Err(e) => reply.error(errno(&e)),
            },
        );
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        let ino = self.ino(ino);
        self.serve(
            reply,
            move |core| core.fs.lseek(ino, offset, what),
            |_, reply, result| match result {
                Ok(held) => {
                    reply.offset(held.value.cast_signed());
                    drop(held);
                }
                Err(e) => reply.error(errno(&e)),
            },
        );
    }
}

impl Adapter {
    fn sync(&self, ino: INodeNo, datasync: bool, reply: ReplyEmpty) {
        let ino = self.ino(ino);
        let kind = if datasync { SyncKind::Data } else { SyncKind::All };
        self.serve_blocking(reply, move |core| core.fs.fsync(ino, kind));
    }

    /// For what waits for the disk by its nature.
    fn serve_blocking(&self, reply: ReplyEmpty, op: impl FnOnce(&Core) -> Result<()> + Send + 'static) {
        let core = Arc::clone(&self.core);
        self.blocked.run(move || match op(&core) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(&e)),
        });
    }
}

fn xattr(reply: ReplyXattr, size: u32, result: Result<Held<Vec<u8>>>) {
    match result {
        Ok(held) => {
            let len = held.value.len();
            if size == 0 {
                reply.size(len as u32);
            } else if len > size as usize {
                reply.error(Errno::ERANGE);
            } else {
                reply.data(&held.value);
            }
            drop(held);
        }
        Err(e) => reply.error(errno(&e)),
    }
}
