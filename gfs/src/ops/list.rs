//! Finding names: lookup and directory listings.

use super::{Attr, Fs, Held};
use crate::dir::{DirEntry, Name};
use crate::glock::{AcquireFlags, Holder, LockState};
use crate::{Error, InodeNo, Result};

impl Fs {
    /// The inode that a name leads to; `None` when there is no such name, which then is as certain as the directory's glock.
    /// `.` and `..` are names like others. The caller counts the reference with [`Fs::remember`] while it has the holders.
    pub fn lookup(&self, parent: InodeNo, name: &[u8]) -> Result<Held<Option<Attr>>> {
        let name = Name::new(name)?;
        if name.bytes == b"." {
            return Ok(self.getattr(parent)?.map(Some));
        }
        if name.bytes == b".." {
            let up = self.lock(&self.inode(parent)?, LockState::Shared)?.dir_parent()?;
            self.inodes.obtain(self, up);
            return Ok(self.getattr(up)?.map(Some));
        }
        let dir = self.lock(&self.inode(parent)?, LockState::Shared)?;
        dir.require_dir()?;
        let Some(target) = dir.dir_find(name)? else {
            return Ok(Held::new(None, vec![dir.into_holder()]));
        };
        let inode = self.inode_of(target);
        match self.lock_named(&inode, LockState::Shared, AcquireFlags::TRY) {
            Ok(child) => Ok(Held::new(Some(child.attr()), vec![dir.into_holder(), child.into_holder()])),
            Err(Error::Errno(libc::EAGAIN)) => {
                drop(dir);
                match self.lock_entry(parent, name, LockState::Shared) {
                    Ok((dir, child)) => {
                        Ok(Held::new(Some(child.attr()), vec![dir.into_holder(), child.into_holder()]))
                    }
                    Err(Error::Errno(libc::ENOENT)) => self.lookup(parent, name.bytes),
                    Err(e) => Err(e),
                }
            }
            Err(e) => Err(Self::dangling(&dir, e)),
        }
    }

    /// The entries of a directory from position `from` on (0: the beginning), until `sink` answers false. Positions stay valid
    /// whatever happens to the directory: an entry that is there all the time is seen exactly once.
    pub fn readdir(
        &self,
        ino: InodeNo,
        from: u64,
        mut sink: impl FnMut(&DirEntry<'_>) -> bool,
    ) -> Result<Held<()>> {
        let dir = self.lock(&self.inode(ino)?, LockState::Shared)?;
        dir.require_dir()?;
        dir.dir_read(from, |entry| Ok(sink(&entry)))?;
        Ok(Held::new((), vec![dir.into_holder()]))
    }

    /// As [`Fs::readdir`], with attributes of those inodes whose glock is to be had at once; `.` and `..` come without. What it will
    /// tell the kernel the caller counts with [`Fs::remember`] when this call has returned well: an error makes void what `sink` got.
    pub fn readdirplus(
        &self,
        ino: InodeNo,
        from: u64,
        mut sink: impl FnMut(&DirEntry<'_>, Option<&Attr>) -> bool,
    ) -> Result<Held<()>> {
        let dir = self.lock(&self.inode(ino)?, LockState::Shared)?;
        dir.require_dir()?;
        let mut holders: Vec<Holder> = Vec::new();
        dir.dir_read(from, |entry| {
            if matches!(entry.name, b"." | b"..") || entry.ino == dir.inode.no {
                return Ok(sink(&entry, None));
            }
            let inode = self.inodes.obtain(self, entry.ino);
            match self.lock_named(&inode, LockState::Shared, AcquireFlags::TRY) {
                Ok(child) => {
                    let attr = child.attr();
                    holders.push(child.into_holder());
                    Ok(sink(&entry, Some(&attr)))
                }
                Err(Error::WouldBlock) => Err(Error::WouldBlock),
                Err(_) => Ok(sink(&entry, None)),
            }
        })?;
        holders.push(dir.into_holder());
        Ok(Held::new((), holders))
    }
}
