//! Taking names away: unlink, rmdir.
//!
//! An inode whose last name goes becomes UNLINKED in the bitmap, in the same transaction; its blocks are freed when nobody uses it any
//! more (module `orphan`).

use super::{Fs, Held};
use crate::dir::{Name, Target};
use crate::glock::{AcquireFlags, LockState};
use crate::inode::Locked;
use crate::trans::TransSize;
use crate::{Error, InodeNo, Result};

impl Fs {
    /// Errors: ENOENT, EISDIR.
    pub fn unlink(&self, parent: InodeNo, name: &[u8]) -> Result<Held<()>> {
        self.change(|| self.remove(parent, name, false))
    }

    /// Errors: ENOENT, ENOTDIR, ENOTEMPTY, EINVAL for `.`.
    pub fn rmdir(&self, parent: InodeNo, name: &[u8]) -> Result<Held<()>> {
        match name {
            b"." => Err(Error::Errno(libc::EINVAL)),
            b".." => Err(Error::Errno(libc::ENOTEMPTY)),
            _ => self.change(|| self.remove(parent, name, true)),
        }
    }

    fn remove(&self, parent: InodeNo, name: &[u8], is_rmdir: bool) -> Result<Held<()>> {
        let name = Name::new(name)?;
        if name.is_dots() {
            return Err(Error::Errno(libc::EISDIR));
        }
        let (mut dir, mut child) = self.lock_entry(parent, name, LockState::Exclusive)?;
        match (is_rmdir, child.d.is_dir()) {
            (true, false) => return Err(Error::Errno(libc::ENOTDIR)),
            (false, true) => return Err(Error::Errno(libc::EISDIR)),
            (true, true) if child.d.entries > 2 => return Err(Error::Errno(libc::ENOTEMPTY)),
            _ => {}
        }
        let last = is_rmdir || child.d.nlink <= 1;
        let touch = [child.inode.no.addr];
        let res = self.reserve_some(touch[0], 0, if last { &touch } else { &[] })?;
        if let Some(res) = &res {
            res.require_dinode(touch[0])?;
        }
        let bitmaps = res.as_ref().map_or(0, |r| r.trans_blocks(0, 1));
        let now = Self::now();
        let trans = self.volume().begin(TransSize::new(bitmaps + 3, 0))?;
        self.atomically(&trans, || {
            dir.dir_remove(&trans, name, now)?;
            if is_rmdir {
                dir.d.nlink = dir.d.nlink.saturating_sub(1);
            }
            dir.touch(now);
            dir.save(&trans);
            Self::drop_link(&trans, &mut child, res.as_ref(), now)
        })?;
        trans.commit();
        drop(res);
        let orphan = last.then(|| std::sync::Arc::clone(&child.inode));
        let held = Held::new((), vec![dir.into_holder(), child.into_holder()]);
        if let Some(inode) = orphan {
            self.note_unlinked(&inode);
        }
        Ok(held)
    }

    /// One name less for an inode, all of them for a directory. `res` holds the inode's resource group when it was the last.
    pub(crate) fn drop_link(
        trans: &crate::trans::Trans,
        child: &mut Locked<'_>,
        res: Option<&crate::rgrp::Reservation>,
        now: crate::ops::Time,
    ) -> Result<()> {
        child.d.nlink = if child.d.is_dir() { 0 } else { child.d.nlink.saturating_sub(1) };
        child.d.ctime = now;
        if child.d.nlink == 0 {
            child.d.entries = 0;
            let res =
                res.expect("invariant: the resource group of an inode that loses its last link is held");
            res.unlink_dinode(trans, child.inode.no.addr)?;
            child.inode.unlinked_here.store(true, std::sync::atomic::Ordering::Relaxed);
        }
        child.save(trans);
        Ok(())
    }

    /// A directory and what one of its names leads to, both locked. Errors: ENOENT, ENOTDIR.
    pub(crate) fn lock_entry(
        &self,
        parent: InodeNo,
        name: Name<'_>,
        state: LockState,
    ) -> Result<(Locked<'_>, Locked<'_>)> {
        let parent = self.inode(parent)?;
        let find = |dir: &Locked<'_>| -> Result<Target> {
            dir.require_dir()?;
            dir.dir_find(name)?.ok_or(Error::Errno(libc::ENOENT))
        };
        let mut dir = self.lock(&parent, state)?;
        let mut target = find(&dir)?;
        loop {
            let inode = self.inode_of(target);
            if inode.no.addr == parent.no.addr {
                return Err(Error::Corrupt {
                    block: parent.no.addr,
                    what: "directory contains itself".to_owned(),
                });
            }
            match self.lock_named(&inode, state, AcquireFlags::TRY_1CB) {
                Err(Error::Errno(libc::EAGAIN)) => {}
                Err(e) => return Err(Self::dangling(&dir, e)),
                Ok(child) => return Ok((dir, child)),
            }
            drop(dir);
            let mut holders = self.hold_all(&[(&parent, state), (&inode, state)])?;
            let child = holders.pop().expect("invariant: two holders");
            dir = self.attach(&parent, holders.remove(0))?;
            let again = find(&dir)?;
            if again == target {
                return match self.attach_named(&inode, child) {
                    Ok(child) => Ok((dir, child)),
                    Err(e) => Err(Self::dangling(&dir, e)),
                };
            }
            target = again;
        }
    }

    /// A name led to an inode that is not there: damage, not a race, since the directory is locked.
    pub(crate) fn dangling(dir: &Locked<'_>, e: Error) -> Error {
        match e {
            Error::Errno(libc::ESTALE) => Error::Corrupt {
                block: dir.inode.no.addr,
                what: "a name leads to an inode that does not exist".to_owned(),
            },
            other => other,
        }
    }
}
