//! Attributes: getattr, setattr, readlink, statfs, access time.

use super::{Atime, Attr, Fs, Held, Time};
use crate::glock::LockState;
use crate::inode::Locked;
use crate::ondisk::dinode::{DIF_APPENDONLY, DIF_IMMUTABLE, DIF_NOATIME, Dinode, S_IFMT};
use crate::trans::TransSize;
use crate::{Error, InodeNo, Result};

const S_ISUID: u32 = 0o4000;
const S_ISGID: u32 = 0o2000;
const S_IXGRP: u32 = 0o010;
const PERMISSIONS: u32 = 0o7777;
const DAY: i64 = 24 * 60 * 60;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetTime {
    Now,
    At(Time),
}

/// What setattr is to change; `None` stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
    pub ctime: Option<Time>,
    /// Size changed by someone without CAP_FSETID: setuid and setgid bits go.
    pub kill_priv: bool,
}

/// Numbers for statfs(2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StatFs {
    pub block_size: u32,
    pub blocks: u64,
    pub free: u64,
    pub files: u64,
    pub files_free: u64,
    pub name_max: u32,
}

/// Mode without the bits that give its caller another identity.
pub(crate) fn without_privileges(mode: u32) -> u32 {
    let group_executable = mode & S_IXGRP != 0;
    mode & !S_ISUID & !(if group_executable { S_ISGID } else { 0 })
}

impl Fs {
    pub fn getattr(&self, ino: InodeNo) -> Result<Held<Attr>> {
        let inode = self.lock(&self.inode(ino)?, LockState::Shared)?;
        Ok(Held::new(inode.attr(), vec![inode.into_holder()]))
    }

    /// Errors: EINVAL (size of something that is no file), EFBIG, ENOSPC (a small file that grows out of its dinode), EPERM (immutable).
    pub fn setattr(&self, ino: InodeNo, set: &SetAttr) -> Result<Held<Attr>> {
        self.change(|| self.try_setattr(ino, set))
    }

    fn try_setattr(&self, ino: InodeNo, set: &SetAttr) -> Result<Held<Attr>> {
        let mut inode = self.lock(&self.inode(ino)?, LockState::Exclusive)?;
        inode.require_mutable()?;
        let now = Self::now();
        if let Some(size) = set.size {
            match inode.d.mode & S_IFMT {
                crate::ondisk::dinode::S_IFREG => {}
                crate::ondisk::dinode::S_IFDIR => return Err(Error::Errno(libc::EISDIR)),
                _ => return Err(Error::Errno(libc::EINVAL)),
            }
            if inode.d.flags & DIF_APPENDONLY != 0 {
                return Err(Error::Errno(libc::EPERM));
            }
            inode.set_size(size, now)?;
        }
        if *set != SetAttr::default() {
            apply(&mut inode.d, set, now);
            inode.d.ctime = set.ctime.unwrap_or(now);
            let trans = self.volume().begin(TransSize::new(1, 0))?;
            inode.save(&trans);
            trans.commit();
        }
        Ok(Held::new(inode.attr(), vec![inode.into_holder()]))
    }

    pub fn readlink(&self, ino: InodeNo) -> Result<Held<Vec<u8>>> {
        let inode = self.lock(&self.inode(ino)?, LockState::Shared)?;
        if !inode.d.is_symlink() {
            return Err(Error::Errno(libc::EINVAL));
        }
        let len = inode.d.size as usize;
        if inode.d.height != 0 || len == 0 || len > self.geometry().stuffed() {
            let what = format!("symbolic link of {len} bytes and height {}", inode.d.height);
            return Err(Error::Corrupt { block: ino.addr, what });
        }
        let target = inode.buf.with(|b| b[Dinode::SIZE..Dinode::SIZE + len].to_vec());
        Ok(Held::new(target, vec![inode.into_holder()]))
    }

    pub fn statfs(&self) -> Result<StatFs> {
        let totals = self.volume().statfs()?;
        Ok(StatFs {
            block_size: self.geometry().block_size,
            blocks: totals.blocks,
            free: totals.free,
            files: totals.free + totals.dinodes,
            files_free: totals.free,
            name_max: crate::ondisk::dirent::NAME_MAX as u32,
        })
    }

    /// Would reading this inode now change its access time?
    pub(crate) fn wants_atime(&self, d: &Dinode, now: Time) -> bool {
        // Among nodes a reader would take the glock from all the others, and a READ must not wait for more than its page needs.
        self.options.atime == Atime::Relative
            && !self.volume().glocks().is_clustered()
            && !self.volume().is_read_only()
            && d.flags & DIF_NOATIME == 0
            && d.nlink > 0
            && (d.atime <= d.mtime || d.atime <= d.ctime || now.sec - d.atime.sec >= DAY)
    }
}

fn apply(d: &mut Dinode, set: &SetAttr, now: Time) {
    let time = |t: SetTime| match t {
        SetTime::Now => now,
        SetTime::At(t) => t,
    };
    if set.uid.is_some() || set.gid.is_some() {
        d.uid = set.uid.unwrap_or(d.uid);
        d.gid = set.gid.unwrap_or(d.gid);
        if !d.is_dir() {
            d.mode = without_privileges(d.mode);
        }
    }
    if set.kill_priv && d.is_regular() {
        d.mode = without_privileges(d.mode);
    }
    if let Some(mode) = set.mode {
        d.mode = (d.mode & S_IFMT) | (mode & PERMISSIONS);
    }
    d.atime = set.atime.map_or(d.atime, time);
    d.mtime = set.mtime.map_or(d.mtime, time);
}

impl Locked<'_> {
    pub(crate) fn require_mutable(&self) -> Result<()> {
        if self.d.flags & DIF_IMMUTABLE != 0 { Err(Error::Errno(libc::EPERM)) } else { Ok(()) }
    }
}
