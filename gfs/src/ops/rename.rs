//! Renaming: within a directory, between directories, over something, two names against each other.
//!
//! Moving a directory to another parent happens under the cluster's rename glock, so that the way up from the new parent, walked before the
//! inodes are locked, cannot change until the move is done.

use super::{Fs, Held, Time};
use crate::dir::{DOTDOT, Name, Target};
use crate::glock::{AcquireFlags, Holder, LockState};
use crate::inode::{Inode, Locked};
use crate::lockspace::{GlockName, GlockType};
use crate::rgrp::Reservation;
use crate::trans::{Trans, TransSize};
use crate::{BlockNo, Error, InodeNo, Result};
use std::sync::Arc;

/// The non-disk glock that serialises moves of directories.
const RENAME: GlockName = GlockName { ty: GlockType::NonDisk, number: 3 };

/// More parents than any path has; a longer way up is a loop.
const MAX_ANCESTORS: usize = 1 << 16;

const DIRECTORY: u16 = 4;

/// What happens to an existing target.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum RenameMode {
    #[default]
    Replace,
    /// EEXIST.
    NoReplace,
    /// The two names change places; both must exist.
    Exchange,
}

fn errno<T>(e: i32) -> Result<T> {
    Err(Error::Errno(e))
}

/// The inodes of one rename: each once, whatever roles it plays.
struct Party<'f> {
    locks: Vec<Locked<'f>>,
    old: usize,
    new: usize,
    source: usize,
    target: Option<usize>,
}

impl<'f> Party<'f> {
    fn old_dir(&mut self) -> &mut Locked<'f> {
        &mut self.locks[self.old]
    }
    fn new_dir(&mut self) -> &mut Locked<'f> {
        &mut self.locks[self.new]
    }
}

impl Fs {
    /// Errors: ENOENT, EEXIST, EISDIR, ENOTDIR, ENOTEMPTY, EINVAL (a directory into itself), EBUSY for `.` and `..`, EMLINK, ENOSPC.
    pub fn rename(
        &self,
        old_parent: InodeNo,
        old_name: &[u8],
        new_parent: InodeNo,
        new_name: &[u8],
        mode: RenameMode,
    ) -> Result<Held<()>> {
        self.change(|| self.try_rename(old_parent, old_name, new_parent, new_name, mode))
    }

    fn try_rename(
        &self,
        old_parent: InodeNo,
        old_name: &[u8],
        new_parent: InodeNo,
        new_name: &[u8],
        mode: RenameMode,
    ) -> Result<Held<()>> {
        let (from, to) = (Name::new(old_name)?, Name::new(new_name)?);
        if from.is_dots() || to.is_dots() {
            return errno(if mode == RenameMode::NoReplace && !from.is_dots() {
                libc::EEXIST
            } else {
                libc::EBUSY
            });
        }
        let (old, new) = (self.inode(old_parent)?, self.inode(new_parent)?);
        let mut rename_lock: Option<Holder> = None;
        loop {
            let (source, target) = self.peek(&old, from, &new, to)?;
            let exchange = mode == RenameMode::Exchange;
            match (target, mode) {
                (Some(_), RenameMode::NoReplace) => return errno(libc::EEXIST),
                (None, RenameMode::Exchange) => return errno(libc::ENOENT),
                _ => {}
            }
            let moves = |t: Target| t.ty == DIRECTORY && !Arc::ptr_eq(&old, &new);
            if moves(source) || exchange && target.is_some_and(moves) {
                if rename_lock.is_none() {
                    rename_lock = Some(self.volume().glocks().acquire(
                        RENAME,
                        LockState::Exclusive,
                        AcquireFlags::NONE,
                    )?);
                    continue;
                }
                if moves(source) && self.is_below(&new, source.num)? {
                    return errno(libc::EINVAL);
                }
                if let Some(target) = target.filter(|t| moves(*t))
                    && self.is_below(&old, target.num)?
                {
                    return errno(if exchange { libc::EINVAL } else { libc::ENOTEMPTY });
                }
            } else if target.is_some_and(|t| t.num == old.no) {
                return errno(libc::ENOTEMPTY);
            }
            let Some(party) = self.party((&old, from), (&new, to), source, target)? else { continue };
            if target.is_some_and(|t| t.num == source.num) {
                return Ok(Held::new((), party.locks.into_iter().map(Locked::into_holder).collect()));
            }
            return if exchange { self.exchange(party, from, to) } else { self.replace(party, from, to) };
        }
    }

    /// What the two names lead to now.
    fn peek(
        &self,
        old: &Arc<Inode>,
        from: Name<'_>,
        new: &Arc<Inode>,
        to: Name<'_>,
    ) -> Result<(Target, Option<Target>)> {
        let look = |dir: &Arc<Inode>, name| {
            let dir = self.lock(dir, LockState::Shared)?;
            dir.require_dir()?;
            if dir.is_unlinked() {
                return errno(libc::ENOENT);
            }
            dir.dir_find(name)
        };
        let source = look(old, from)?.ok_or(Error::Errno(libc::ENOENT))?;
        Ok((source, look(new, to)?))
    }

    /// Is `dir` the directory `top`, or does the way up from it lead through `top`? Under the rename glock.
    fn is_below(&self, dir: &Arc<Inode>, top: InodeNo) -> Result<bool> {
        let mut at = Arc::clone(dir);
        for _ in 0..MAX_ANCESTORS {
            if at.no == top {
                return Ok(true);
            }
            if at.no == self.root() {
                return Ok(false);
            }
            let parent = self.lock(&at, LockState::Shared)?.dir_parent()?;
            if parent == at.no {
                return Ok(false);
            }
            at = self.inodes.obtain(self, parent);
        }
        Err(Error::Corrupt { block: dir.no.addr, what: "the way up to the root does not end".to_owned() })
    }

    /// All inodes of the rename, EX. `None`: the names lead elsewhere by now.
    fn party(
        &self,
        old: (&Arc<Inode>, Name<'_>),
        new: (&Arc<Inode>, Name<'_>),
        source: Target,
        target: Option<Target>,
    ) -> Result<Option<Party<'_>>> {
        let mut inodes: Vec<Arc<Inode>> = vec![Arc::clone(old.0)];
        let mut role = |inode: Arc<Inode>| {
            inodes.iter().position(|i| i.no.addr == inode.no.addr).unwrap_or_else(|| {
                inodes.push(inode);
                inodes.len() - 1
            })
        };
        let dirs = (0, role(Arc::clone(new.0)));
        let source_at = role(self.inode_of(source));
        let target_at = target.map(|t| role(self.inode_of(t)));
        if source_at <= dirs.1 || target_at.is_some_and(|t| t <= dirs.1) {
            let what = "a name leads to its own directory".to_owned();
            return Err(Error::Corrupt { block: old.0.no.addr, what });
        }
        let wanted: Vec<_> = inodes.iter().map(|i| (i, LockState::Exclusive)).collect();
        let mut locks = Vec::with_capacity(inodes.len());
        for (at, (inode, holder)) in inodes.iter().zip(self.hold_all(&wanted)?).enumerate() {
            if at > dirs.1 {
                // Children come after the directories, which must still say that they are.
                let find = |dir: usize, name| Locked::dir_find(&locks[dir], name);
                if find(dirs.0, old.1)? != Some(source) || find(dirs.1, new.1)? != target {
                    return Ok(None);
                }
                let child = self.attach_named(inode, holder);
                locks.push(child.map_err(|e| Self::dangling(&locks[0], e))?);
            } else {
                let dir = self.attach(inode, holder)?;
                // Its being empty is no sign of life: it may have been removed since the names were looked at.
                if dir.is_unlinked() {
                    return errno(libc::ENOENT);
                }
                locks.push(dir);
            }
        }
        Ok(Some(Party { locks, old: dirs.0, new: dirs.1, source: source_at, target: target_at }))
    }

    fn replace(&self, mut p: Party<'_>, from: Name<'_>, to: Name<'_>) -> Result<Held<()>> {
        let moves_dir = p.locks[p.source].d.is_dir();
        if let Some(t) = p.target {
            match (moves_dir, p.locks[t].d.is_dir()) {
                (true, false) => return errno(libc::ENOTDIR),
                (false, true) => return errno(libc::EISDIR),
                (true, true) if p.locks[t].d.entries > 2 => return errno(libc::ENOTEMPTY),
                _ => {}
            }
        }
        let parent_changes = p.old != p.new;
        if p.new_dir().d.entries == u32::MAX || moves_dir && parent_changes && p.new_dir().d.nlink == u32::MAX
        {
            return errno(libc::EMLINK);
        }
        if moves_dir && parent_changes {
            p.locks[p.source].dir_parent()?;
        }
        let plan =
            if p.target.is_none() { p.new_dir().dir_plan(to)? } else { crate::dir::DirPlan::default() };
        let last = p.target.filter(|t| moves_dir || p.locks[*t].d.nlink <= 1);
        let touch: Vec<BlockNo> = last.iter().map(|t| p.locks[*t].inode.no.addr).collect();
        let res = self.reserve_some(BlockNo(p.new_dir().d.goal_meta), plan.alloc, &touch)?;
        for at in &touch {
            res.as_ref().map_or(Ok(()), |r| r.require_dinode(*at))?;
        }
        let bitmaps = res.as_ref().map_or(0, |r| r.trans_blocks(r.left(), touch.len() as u32));
        let now = Self::now();
        let trans = self.volume().begin(TransSize::new(bitmaps + plan.touched as u32 + 8, 0))?;
        self.atomically(&trans, || Self::replace_in(&trans, &mut p, res.as_ref(), from, to, now))?;
        trans.commit();
        drop(res);
        let orphan = last.map(|t| Arc::clone(&p.locks[t].inode));
        let held = Held::new((), p.locks.into_iter().map(Locked::into_holder).collect());
        if let Some(inode) = orphan {
            self.note_unlinked(&inode);
        }
        Ok(held)
    }

    fn replace_in(
        trans: &Trans,
        p: &mut Party<'_>,
        res: Option<&Reservation>,
        from: Name<'_>,
        to: Name<'_>,
        now: Time,
    ) -> Result<()> {
        let source = target_of(&p.locks[p.source]);
        let moves_dir = p.locks[p.source].d.is_dir();
        match p.target {
            None => {
                p.new_dir().dir_make_room(trans, res, to, now)?;
                p.new_dir().dir_place(trans, to, source, now)?;
            }
            Some(t) => {
                p.new_dir().dir_retarget(trans, to, source)?;
                if moves_dir {
                    p.new_dir().d.nlink = p.new_dir().d.nlink.saturating_sub(1);
                }
                Self::drop_link(trans, &mut p.locks[t], res, now)?;
            }
        }
        p.old_dir().dir_remove(trans, from, now)?;
        if moves_dir && p.old != p.new {
            Self::change_parent(trans, p, p.source, p.new)?;
            p.old_dir().d.nlink = p.old_dir().d.nlink.saturating_sub(1);
            p.new_dir().d.nlink += 1;
        }
        Self::finish(trans, p, now);
        Ok(())
    }

    fn exchange(&self, mut p: Party<'_>, from: Name<'_>, to: Name<'_>) -> Result<Held<()>> {
        let target = p.target.expect("invariant: an exchange has two names");
        let is_dir = |p: &Party<'_>, i: usize| i64::from(p.locks[i].d.is_dir());
        let moved = is_dir(&p, p.source) - is_dir(&p, target);
        if p.old != p.new {
            // their `..` will change: damage is found before anything is
            for child in [p.source, target].into_iter().filter(|c| p.locks[*c].d.is_dir()) {
                p.locks[child].dir_parent()?;
            }
        }
        let now = Self::now();
        let trans = self.volume().begin(TransSize::new(8, 0))?;
        self.atomically(&trans, || {
            let (a, b) = (target_of(&p.locks[p.source]), target_of(&p.locks[target]));
            p.old_dir().dir_retarget(&trans, from, b)?;
            p.new_dir().dir_retarget(&trans, to, a)?;
            if p.old != p.new {
                for (child, parent) in [(p.source, p.new), (target, p.old)] {
                    if p.locks[child].d.is_dir() {
                        Self::change_parent(&trans, &mut p, child, parent)?;
                    }
                }
                p.new_dir().d.nlink = p.new_dir().d.nlink.saturating_add_signed(moved as i32);
                p.old_dir().d.nlink = p.old_dir().d.nlink.saturating_add_signed(-moved as i32);
            }
            p.locks[target].d.ctime = now;
            p.locks[target].save(&trans);
            Self::finish(&trans, &mut p, now);
            Ok(())
        })?;
        trans.commit();
        Ok(Held::new((), p.locks.into_iter().map(Locked::into_holder).collect()))
    }

    fn change_parent(trans: &Trans, p: &mut Party<'_>, child: usize, parent: usize) -> Result<()> {
        let up = target_of(&p.locks[parent]);
        p.locks[child].dir_retarget(trans, Name::new(DOTDOT)?, up)
    }

    fn finish(trans: &Trans, p: &mut Party<'_>, now: Time) {
        p.locks[p.source].d.ctime = now;
        p.locks[p.source].save(trans);
        p.old_dir().touch(now);
        p.old_dir().save(trans);
        if p.old != p.new {
            p.new_dir().touch(now);
            p.new_dir().save(trans);
        }
    }
}

fn target_of(inode: &Locked<'_>) -> Target {
    Target { num: inode.inode.no, ty: inode.d.dirent_type() }
}
