//! Handles and contents: open, read, write, sync, space.

use super::{Attr, Fs, Held};
use crate::glock::{AcquireFlags, LockState, is_nowait};
use crate::inode::{Inode, Locked};
use crate::journal::log::FlushReason;
use crate::ondisk::dinode::{DIF_APPENDONLY, DIF_SYNC};
use crate::trans::TransSize;
use crate::volume::iopen_glock;
use crate::{Error, InodeNo, Result};
use std::sync::Arc;

/// How bytes are to be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WriteMode {
    /// O_APPEND: at the end of the file, wherever that is by now.
    pub append: bool,
    /// O_DIRECT: on the device when the call returns, without metadata being durable.
    pub direct: bool,
    /// O_SYNC or O_DSYNC: durable when the call returns.
    pub sync: bool,
    /// Setuid and setgid bits go.
    pub kill_priv: bool,
    /// The kernel writes a mapped page back: what lies behind the end of the file is not data, and the file does not grow.
    pub mapped: bool,
}

/// Where a write went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written {
    pub offset: u64,
    /// Less than asked for only when space ran out.
    pub len: usize,
    /// Size of the file now.
    pub size: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SyncKind {
    All,
    /// fdatasync: what is needed to read the data back.
    Data,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fallocate {
    Allocate,
    /// FALLOC_FL_KEEP_SIZE.
    KeepSize,
    /// FALLOC_FL_PUNCH_HOLE, which implies KEEP_SIZE.
    PunchHole,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seek {
    Data,
    Hole,
}

impl Fs {
    /// Counts an open handle, of a directory too. The inode lives, on every node, until [`Fs::release`].
    /// Errors: ESTALE when the inode was deleted.
    pub fn open(&self, ino: InodeNo) -> Result<()> {
        self.count_open(&self.inode(ino)?)
    }

    /// Waits for the iopen glock, and with that held for the inode's; so nobody may wait for an iopen glock with the inode's held in EX.
    /// EXACT, since whoever freed the block's last inode has EX in its cache: a handle under that would keep every other node from opening
    /// the inode. Errors: ESTALE when the inode was deleted.
    pub(super) fn count_open(&self, inode: &Arc<Inode>) -> Result<()> {
        loop {
            {
                let mut uses = inode.uses.lock();
                if uses.iopen.is_some() {
                    uses.opens += 1;
                    return Ok(());
                }
            }
            // Taken without the lock on the counts: it may have to be waited for.
            let iopen = self.volume().glocks().acquire(
                iopen_glock(inode.no.addr),
                LockState::Shared,
                AcquireFlags::EXACT | AcquireFlags::SKIP,
            )?;
            // Another node may have deleted the inode before it could know that it is open here.
            if let Err(error) = self.lock(inode, LockState::Shared) {
                drop(iopen);
                // Whoever wanted to free it meanwhile was refused because of us. (A no-wait thread is followed by one that waits.)
                if !matches!(error, Error::WouldBlock | Error::Errno(libc::ESTALE)) {
                    self.note_unlinked(inode);
                }
                return Err(error);
            }
            let mut uses = inode.uses.lock();
            if uses.iopen.is_none() {
                uses.iopen = Some(iopen);
            }
        }
    }

    /// An open handle is closed.
    pub fn release(&self, ino: InodeNo) {
        let Ok(inode) = self.inode(ino) else { return };
        let iopen = {
            let mut uses = inode.uses.lock();
            uses.opens = uses.opens.saturating_sub(1);
            if uses.opens > 0 {
                return;
            }
            uses.iopen.take()
        };
        drop(iopen);
        // Unknown: the glock went elsewhere, and with it perhaps the last name.
        if inode.known_links() != Some(true) {
            self.note_unlinked(&inode);
        }
    }

    /// Reads from `offset` on; less than asked for only at the end of the file. `direct`: what must be read does not fill the cache.
    /// Needs the glock SH, or EX in a request that says so (`glock::as_request`).
    pub fn read(&self, ino: InodeNo, offset: u64, out: &mut [u8], direct: bool) -> Result<Held<usize>> {
        let inode = self.inode(ino)?;
        let mut file = self.lock(&inode, LockState::Shared)?;
        let now = Self::now();
        if self.wants_atime(&file.d, now) {
            drop(file);
            file = self.lock(&inode, LockState::Exclusive)?;
            file.require_file()?;
            let n = file.read_at(offset, out, !direct)?;
            if self.wants_atime(&file.d, now) {
                let trans = self.volume().begin(TransSize::new(1, 0))?;
                file.d.atime = now;
                file.save(&trans);
                trans.commit();
            }
            return Ok(Held::new(n, vec![file.into_holder()]));
        }
        file.require_file()?;
        let n = file.read_at(offset, out, !direct)?;
        Ok(Held::new(n, vec![file.into_holder()]))
    }

    /// Errors: ENOSPC, EFBIG, EPERM (immutable; append-only written elsewhere).
    pub fn write(&self, ino: InodeNo, offset: u64, data: &[u8], mode: WriteMode) -> Result<Held<Written>> {
        let held = self.change(|| self.try_write(ino, offset, data, mode))?;
        let done = held.value;
        if done.len == data.len() || mode.append || self.orphans.is_idle() {
            return Ok(held);
        }
        // Space ran out in the middle while some was about to be freed: wait for that, and go on where it stopped.
        drop(held);
        self.reclaim();
        let rest = match self.try_write(ino, done.offset + done.len as u64, &data[done.len..], mode) {
            Err(Error::Errno(libc::ENOSPC)) => self.try_write(ino, done.offset + done.len as u64, &[], mode),
            other => other,
        };
        Ok(rest?.map(|rest| Written { offset: done.offset, len: done.len + rest.len, size: rest.size }))
    }

    fn try_write(&self, ino: InodeNo, offset: u64, data: &[u8], mode: WriteMode) -> Result<Held<Written>> {
        let inode = self.inode(ino)?;
        let mut file = self.lock(&inode, LockState::Exclusive)?;
        file.require_file()?;
        file.require_mutable()?;
        let sync = mode.sync || self.options.sync || file.d.flags & DIF_SYNC != 0;
        if is_nowait() && (sync || mode.direct || self.budget.is_mostly_dirty()) {
            return Err(Error::WouldBlock);
        }
        let offset = if mode.append { file.d.size } else { offset };
        let data = if mode.mapped {
            let inside = file.d.size.saturating_sub(offset).min(data.len() as u64);
            &data[..inside as usize]
        } else {
            data
        };
        if file.d.flags & DIF_APPENDONLY != 0 && offset < file.d.size {
            return Err(Error::Errno(libc::EPERM));
        }
        let len = file.write_at(offset, data, Self::now(), mode.kill_priv)?;
        let written = Written { offset, len, size: file.d.size };
        let held = Held::new(written, vec![file.into_holder()]);
        if mode.direct || self.budget.is_mostly_dirty() {
            inode.pages.write_out_all()?;
        }
        if sync {
            self.sync_inode(&inode)?;
        }
        self.relieve_writer();
        Ok(held)
    }

    /// Durable: the data of the file, and everything its metadata needs. Other files' committed metadata comes along. Of the root
    /// directory: everything ([`Self::syncfs`]), because FUSE servers do not hear of `syncfs(2)`. `WouldBlock` on a no-wait thread.
    pub fn fsync(&self, ino: InodeNo, _kind: SyncKind) -> Result<()> {
        if is_nowait() {
            return Err(Error::WouldBlock);
        }
        if ino == self.root() {
            return self.syncfs();
        }
        self.sync_inode(&*self.inode(ino)?)
    }

    fn sync_inode(&self, inode: &Inode) -> Result<()> {
        inode.pages.write_out_all()?;
        self.volume().log_flush(FlushReason::Fsync)?;
        // The flush of the log was one of the device too, if there was anything to log after the data were written.
        inode.pages.make_durable()?;
        inode.pages.take_failure()
    }

    /// Everything that was written before the call is durable.
    pub fn syncfs(&self) -> Result<()> {
        if self.volume().is_read_only() {
            return self.volume().sync();
        }
        let inodes = self.inodes.all();
        for inode in &inodes {
            inode.pages.write_out_all()?;
        }
        self.volume().sync()?;
        self.volume().disk().flush()
    }

    /// Errors: ENOSPC, EFBIG, EINVAL, ENODEV (no regular file).
    pub fn fallocate(&self, ino: InodeNo, how: Fallocate, offset: u64, len: u64) -> Result<Held<Attr>> {
        self.change(|| self.try_fallocate(ino, how, offset, len))
    }

    fn try_fallocate(&self, ino: InodeNo, how: Fallocate, offset: u64, len: u64) -> Result<Held<Attr>> {
        let end = offset.checked_add(len).filter(|_| len > 0).ok_or(Error::Errno(libc::EINVAL))?;
        if is_nowait() {
            return Err(Error::WouldBlock);
        }
        let mut file = self.lock(&self.inode(ino)?, LockState::Exclusive)?;
        if !file.d.is_regular() {
            return Err(Error::Errno(libc::ENODEV));
        }
        file.require_mutable()?;
        let now = Self::now();
        match how {
            Fallocate::Allocate => file.allocate(offset, end, end, now)?,
            Fallocate::KeepSize => file.allocate(offset, end, 0, now)?,
            Fallocate::PunchHole => file.punch(offset, end, now)?,
        }
        Ok(Held::new(file.attr(), vec![file.into_holder()]))
    }

    /// Errors: ENXIO, when there is no such place before the end of the file.
    pub fn lseek(&self, ino: InodeNo, offset: u64, what: Seek) -> Result<Held<u64>> {
        let file = self.lock(&self.inode(ino)?, LockState::Shared)?;
        file.require_file()?;
        let at = file.seek(offset, what == Seek::Data)?.ok_or(Error::Errno(libc::ENXIO))?;
        Ok(Held::new(at, vec![file.into_holder()]))
    }

    /// After a write, outside of it: drops clean pages when memory is short.
    fn relieve_writer(&self) {
        if !is_nowait() {
            self.relieve();
        }
    }
}

impl Locked<'_> {
    fn require_file(&self) -> Result<()> {
        if self.d.is_regular() {
            return Ok(());
        }
        Err(Error::Errno(if self.d.is_dir() { libc::EISDIR } else { libc::EINVAL }))
    }
}
