//! Names against inodes: every entry leads somewhere, every inode has as many names as it says, every directory hangs in one place.

use super::{Checker, Entry, EntryKind, Fault};
use crate::ondisk::dinode::{S_IFDIR, S_IFMT};
use std::collections::{BTreeMap, BTreeSet};

impl Checker<'_> {
    pub(super) fn check_links(&mut self) {
        let entries = std::mem::take(&mut self.entries);
        let tops = [self.sb.root.addr.0, self.sb.master.addr.0];
        for (name, num) in [("root", self.sb.root), ("master", self.sb.master)] {
            match self.inodes.get(&num.addr.0) {
                Some(i) if i.mode & S_IFMT == S_IFDIR && i.formal == num.formal && !i.unlinked => {}
                _ => self
                    .report
                    .add(Fault::System { why: format!("the {name} directory at {} is not there", num.addr) }),
            }
        }
        let mut references: BTreeMap<u64, u64> = BTreeMap::new();
        let mut names: BTreeMap<u64, u64> = BTreeMap::new();
        let mut parents: BTreeMap<u64, u64> = BTreeMap::new();
        let mut children: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for e in &entries {
            // the entries of an orphaned directory count for nobody
            if self.inodes.get(&e.dir).is_some_and(|d| d.unlinked) {
                continue;
            }
            self.entry(e);
            *references.entry(e.target).or_default() += 1;
            if e.kind == EntryKind::Name {
                *names.entry(e.target).or_default() += 1;
                parents.entry(e.target).or_insert(e.dir);
                children.entry(e.dir).or_default().push(e.target);
            }
        }
        for e in &entries {
            if self.inodes.get(&e.dir).is_some_and(|d| d.unlinked) {
                continue;
            }
            let (dir, target) = (e.dir, e.target);
            match e.kind {
                EntryKind::Dot if target != dir => self.report.add(Fault::DotTarget { dir, target }),
                EntryKind::DotDot => {
                    let parent = if tops.contains(&dir) { Some(dir) } else { parents.get(&dir).copied() };
                    if let Some(parent) = parent
                        && parent != target
                    {
                        self.report.add(Fault::DotDotTarget { dir, target, parent });
                    }
                }
                _ => {}
            }
        }
        let mut reached: BTreeSet<u64> = tops.into_iter().collect();
        let mut todo: Vec<u64> = tops.to_vec();
        while let Some(dir) = todo.pop() {
            for &child in children.get(&dir).into_iter().flatten() {
                let is_dir = self.inodes.get(&child).is_some_and(|i| i.mode & S_IFMT == S_IFDIR);
                if is_dir && reached.insert(child) {
                    todo.push(child);
                }
            }
        }
        for (&inode, info) in &self.inodes {
            if info.unlinked {
                continue;
            }
            let counted = references.get(&inode).copied().unwrap_or(0);
            let named = names.get(&inode).copied().unwrap_or(0);
            let is_top = tops.contains(&inode);
            let is_dir = info.mode & S_IFMT == S_IFDIR;
            if named == 0 && !is_top {
                self.report.add(Fault::Unreferenced { inode });
                continue;
            }
            if is_dir && named != u64::from(!is_top) {
                self.report.add(Fault::DirectoryNames { dir: inode, names: named });
            }
            if counted != u64::from(info.nlink) {
                self.report.add(Fault::LinkCount { inode, found: info.nlink.into(), counted });
            }
            if is_dir && !reached.contains(&inode) {
                self.report.add(Fault::Unreachable { dir: inode });
            }
        }
    }

    /// One entry against the inode it names.
    fn entry(&mut self, e: &Entry) {
        let (dir, target) = (e.dir, e.target);
        let Some(&info) = self.inodes.get(&target) else {
            let name = self.name_of(e);
            return self.report.add(Fault::Dangling { dir, name, target });
        };
        if info.unlinked {
            let name = self.name_of(e);
            self.report.add(Fault::Dangling { dir, name, target });
        }
        if info.formal != e.formal {
            let name = self.name_of(e);
            let fault = Fault::EntryFormal { dir, name, target, formal: e.formal, found: info.formal };
            self.report.add(fault);
        }
        let found = ((info.mode & S_IFMT) >> 12) as u16;
        if found != e.ty {
            let name = self.name_of(e);
            self.report.add(Fault::EntryType { dir, name, target, ty: e.ty, found });
        }
    }
}
