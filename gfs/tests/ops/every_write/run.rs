//! A workload under way: each step is done to a mounted volume and to a model, and the model of every moment is kept.

use crate::rig::{ME, Node, Rig, done, errno};
use gfs::InodeNo;
use gfs::lockspace::{GlockName, GlockType};
use gfs::ops::{Fallocate, NewNode, RenameMode, SetAttr, SetTime, SyncKind, Time, WriteMode};
use gfs::volume::inode_glock;
use lun::mem::{MemLun, Trace};
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    File(Arc<Vec<u8>>),
    Dir,
    Symlink(Vec<u8>),
    /// Type bits, major and minor number.
    Device(u32, (u32, u32)),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Item {
    pub(crate) kind: Kind,
    pub(crate) perm: u32,
    pub(crate) owner: (u32, u32),
    /// Seconds, once the workload has set it and until something else changes it.
    pub(crate) mtime: Option<i64>,
}

/// What can be seen from outside at one moment: paths, and what they lead to.
#[derive(Clone, Default, Debug)]
pub(crate) struct Tree {
    pub(crate) names: BTreeMap<String, usize>,
    pub(crate) items: BTreeMap<usize, Arc<Item>>,
}

/// The tree after a step.
pub(crate) struct Version {
    /// Events in the device's log when the step began: an earlier crash cannot show it.
    pub(crate) began: usize,
    pub(crate) tree: Tree,
}

/// Everything that is known about a run when it is over.
pub(crate) struct History {
    pub(crate) trace: Trace,
    pub(crate) versions: Vec<Version>,
    /// (events in the log when it was acknowledged, version): crashes from there on show this version or a later one.
    pub(crate) synced: Vec<(usize, usize)>,
    /// (version, item): this step changed bytes in place. Such data are not part of any transaction: until the next sync each sector of
    /// the file shows one of its contents, whatever else the crash shows.
    pub(crate) in_place: Vec<(usize, usize)>,
}

impl History {
    /// The version that a crash after so many events must at least show.
    pub(crate) fn floor(&self, event: usize) -> usize {
        self.synced.iter().rev().find(|s| s.0 <= event).expect("the beginning is synced").1
    }
}

pub(crate) struct Run<'a> {
    pub(crate) node: &'a Node,
    rig: &'a Rig,
    tree: Tree,
    addr: BTreeMap<usize, InodeNo>,
    versions: Vec<Version>,
    synced: Vec<(usize, usize)>,
    in_place: Vec<(usize, usize)>,
}

/// Bytes in which every sector differs from every other.
pub(crate) fn bytes(salt: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| ((i / 512 + 1).wrapping_mul(salt * 2 + 1).wrapping_mul(0x9E37_79B9) >> 9 ^ i) as u8 | 1)
        .collect()
}

/// Data of one step at most: what one transaction maps.
const PIECE: usize = 256 << 10;

impl<'a> Run<'a> {
    pub(crate) fn new(rig: &'a Rig, node: &'a Node) -> Self {
        let first = Version { began: 0, tree: Tree::default() };
        Self {
            node,
            rig,
            tree: Tree::default(),
            addr: BTreeMap::new(),
            versions: vec![first],
            synced: vec![(0, 0)],
            in_place: Vec::new(),
        }
    }

    /// What came before is durable and of no more interest.
    pub(crate) fn begin(&mut self) {
        self.node.fs.reclaim();
        self.node.fs.syncfs().unwrap();
        self.rig.lun.restart_log();
        self.versions = vec![Version { began: 0, tree: self.tree.clone() }];
        self.synced = vec![(0, 0)];
        self.in_place.clear();
    }

    pub(crate) fn end(self, trace: Trace) -> History {
        History { trace, versions: self.versions, synced: self.synced, in_place: self.in_place }
    }

    pub(crate) fn lun(&self) -> MemLun {
        self.rig.lun.clone()
    }

    /// Inodes that the workload knows and that have lost all their names.
    pub(crate) fn open_without_name(&self) -> Vec<InodeNo> {
        self.addr.iter().filter(|(id, _)| !self.tree.items.contains_key(id)).map(|(_, addr)| *addr).collect()
    }

    /// Events in the device's log.
    pub(crate) fn events(&self) -> usize {
        self.rig.lun.log_len()
    }

    pub(crate) fn tree(&self) -> &Tree {
        &self.tree
    }

    /// One operation: all of it or nothing of it survives.
    fn step<T>(&mut self, act: impl FnOnce(&Node) -> T, change: impl FnOnce(&mut Tree, &T)) -> T {
        let began = self.rig.lun.log_len();
        let got = act(self.node);
        change(&mut self.tree, &got);
        self.versions.push(Version { began, tree: self.tree.clone() });
        got
    }

    fn synced(&mut self) {
        self.synced.push((self.rig.lun.log_len(), self.versions.len() - 1));
    }

    fn changed_in_place(&mut self, id: usize) {
        self.in_place.push((self.versions.len() - 1, id));
    }

    pub(crate) fn id(&self, path: &str) -> usize {
        *self.tree.names.get(path).unwrap_or_else(|| panic!("the workload knows no {path}"))
    }

    /// The inode that a path leads to.
    pub(crate) fn at(&self, path: &str) -> InodeNo {
        if path.is_empty() { self.node.root() } else { self.addr[&self.id(path)] }
    }

    fn place<'p>(&self, path: &'p str) -> (InodeNo, &'p [u8]) {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        (self.at(dir), name.as_bytes())
    }

    fn data(&self, path: &str) -> Arc<Vec<u8>> {
        match &self.tree.items[&self.id(path)].kind {
            Kind::File(data) => Arc::clone(data),
            other => panic!("{path} is {other:?}"),
        }
    }

    fn make(&mut self, path: &str, perm: u32, kind: Kind) {
        let (dir, name) = self.place(path);
        let id = self.addr.len();
        let node = match &kind {
            Kind::File(_) => NewNode::File,
            Kind::Dir => NewNode::Directory,
            Kind::Symlink(target) => NewNode::Symlink(target),
            Kind::Device(0o010_000, _) => NewNode::Fifo,
            Kind::Device(0o140_000, _) => NewNode::Socket,
            Kind::Device(0o020_000, (major, minor)) => NewNode::CharDevice { major: *major, minor: *minor },
            Kind::Device(_, (major, minor)) => NewNode::BlockDevice { major: *major, minor: *minor },
        };
        let item = Item { kind: kind.clone(), perm, owner: (ME.uid, ME.gid), mtime: None };
        let addr = self.step(
            |n| done(n.fs.mknod(ME, dir, name, perm, node).unwrap()).ino,
            |tree, _| {
                tree.names.insert(path.to_owned(), id);
                tree.items.insert(id, Arc::new(item));
            },
        );
        self.addr.insert(id, addr);
    }

    pub(crate) fn create(&mut self, path: &str) {
        self.make(path, 0o640, Kind::File(Arc::default()));
    }
    pub(crate) fn mkdir(&mut self, path: &str) {
        self.make(path, 0o750, Kind::Dir);
    }
    pub(crate) fn symlink(&mut self, path: &str, target: &[u8]) {
        self.make(path, 0o777, Kind::Symlink(target.to_vec()));
    }
    pub(crate) fn device(&mut self, path: &str, type_bits: u32, number: (u32, u32)) {
        self.make(path, 0o600, Kind::Device(type_bits, number));
    }

    pub(crate) fn link(&mut self, old: &str, new: &str) {
        let (id, ino) = (self.id(old), self.at(old));
        let (dir, name) = self.place(new);
        self.step(
            |n| drop(n.fs.link(ino, dir, name).unwrap()),
            |tree, ()| {
                tree.names.insert(new.to_owned(), id);
            },
        );
    }

    pub(crate) fn unlink(&mut self, path: &str) {
        let (dir, name) = self.place(path);
        self.step(|n| done(n.fs.unlink(dir, name).unwrap()), |tree, ()| tree.remove(path));
    }

    pub(crate) fn rmdir(&mut self, path: &str) {
        let (dir, name) = self.place(path);
        self.step(|n| done(n.fs.rmdir(dir, name).unwrap()), |tree, ()| tree.remove(path));
    }

    pub(crate) fn rename(&mut self, old: &str, new: &str, mode: RenameMode) {
        let (old_place, new_place) = (self.place(old), self.place(new));
        self.step(
            |n| done(n.fs.rename(old_place.0, old_place.1, new_place.0, new_place.1, mode).unwrap()),
            |tree, ()| tree.rename(old, new, mode == RenameMode::Exchange),
        );
    }

    /// A rename that must be refused, and change nothing.
    pub(crate) fn rename_fails(&mut self, old: &str, new: &str, mode: RenameMode, with: i32) {
        let (old_place, new_place) = (self.place(old), self.place(new));
        let result = self.node.fs.rename(old_place.0, old_place.1, new_place.0, new_place.1, mode);
        assert_eq!(errno(result), with);
    }

    pub(crate) fn write(&mut self, path: &str, offset: usize, data: &[u8]) {
        self.write_as(path, offset, data, WriteMode::default());
    }

    pub(crate) fn write_as(&mut self, path: &str, offset: usize, data: &[u8], mode: WriteMode) {
        let (ino, id) = (self.at(path), self.id(path));
        let mut at = 0;
        while at < data.len() {
            let old = self.data(path);
            let from = if mode.append { old.len() } else { offset + at };
            let n = (data.len() - at).min(PIECE);
            let piece = &data[at..at + n];
            let len = self.step(
                |n| done(n.fs.write(ino, (offset + at) as u64, piece, mode).unwrap()).len,
                |tree, len| {
                    let mut new = (*old).clone();
                    new.resize(new.len().max(from + len), 0);
                    new[from..from + len].copy_from_slice(&piece[..*len]);
                    tree.change(id, |item| item.kind = Kind::File(Arc::new(new)));
                },
            );
            assert!(len > 0, "nothing was written to {path}");
            if from < old.len() {
                self.changed_in_place(id);
            }
            at += len;
        }
        if mode.sync {
            self.synced();
        }
    }

    pub(crate) fn truncate(&mut self, path: &str, size: usize) {
        let (ino, id, old) = (self.at(path), self.id(path), self.data(path));
        self.step(
            |n| n.truncate(ino, size as u64),
            |tree, ()| {
                let mut new = (*old).clone();
                new.resize(size, 0);
                tree.change(id, |item| item.kind = Kind::File(Arc::new(new)));
            },
        );
        if size < old.len() {
            // the rest of the last block is zeroed in its place
            self.changed_in_place(id);
        }
    }

    pub(crate) fn fallocate(&mut self, path: &str, how: Fallocate, from: usize, len: usize) {
        let (ino, id, old) = (self.at(path), self.id(path), self.data(path));
        self.step(
            |n| done(n.fs.fallocate(ino, how, from as u64, len as u64).unwrap()),
            |tree, _| {
                let mut new = (*old).clone();
                let end = from + len;
                match how {
                    Fallocate::Allocate => new.resize(new.len().max(end), 0),
                    Fallocate::KeepSize => {}
                    Fallocate::PunchHole => {
                        let end = end.min(new.len());
                        new[from.min(end)..end].fill(0);
                    }
                }
                tree.change(id, |item| item.kind = Kind::File(Arc::new(new)));
            },
        );
        if how == Fallocate::PunchHole {
            self.changed_in_place(id);
        }
    }

    /// Permission bits, owner, or modification time.
    pub(crate) fn attributes(
        &mut self,
        path: &str,
        perm: Option<u32>,
        owner: Option<(u32, u32)>,
        mtime: Option<i64>,
    ) {
        let (ino, id) = (self.at(path), self.id(path));
        let set = SetAttr {
            mode: perm,
            uid: owner.map(|o| o.0),
            gid: owner.map(|o| o.1),
            mtime: mtime.map(|sec| SetTime::At(Time { sec, nsec: 5 })),
            ..SetAttr::default()
        };
        self.step(
            |n| done(n.fs.setattr(ino, &set).unwrap()),
            |tree, _| {
                tree.change(id, |item| {
                    item.perm = perm.unwrap_or(item.perm);
                    item.owner = owner.unwrap_or(item.owner);
                });
                if let (Some(_), Some(item)) = (mtime, tree.items.get_mut(&id)) {
                    Arc::make_mut(item).mtime = mtime;
                }
            },
        );
    }

    pub(crate) fn fsync(&mut self, path: &str) {
        self.node.fs.fsync(self.at(path), SyncKind::All).unwrap();
        self.synced();
    }

    pub(crate) fn fdatasync(&mut self, path: &str) {
        self.node.fs.fsync(self.at(path), SyncKind::Data).unwrap();
        self.synced();
    }

    pub(crate) fn syncfs(&mut self) {
        self.node.fs.syncfs().unwrap();
        self.synced();
    }

    /// All metadata in place, as when the locks are given up. Nothing is promised by it: data of files may still be in memory.
    pub(crate) fn checkpoint(&self) {
        let vol = self.node.fs.volume();
        let inodes = self.addr.values().copied().chain([self.node.root()]).map(|ino| inode_glock(ino.addr));
        let groups = vol.rgrps().unwrap().groups();
        let groups = groups.iter().map(|g| GlockName { ty: GlockType::Rgrp, number: g.entry().addr });
        for name in inodes.chain(groups) {
            vol.sync_glock(&vol.glocks().get(name)).unwrap();
        }
    }

    /// The mounted volume shows the last version.
    pub(crate) fn check_live(&self) {
        for (path, id) in &self.tree.names {
            let item = &self.tree.items[id];
            let (dir, name) = self.place(path);
            let attr =
                done(self.node.fs.lookup(dir, name).unwrap()).unwrap_or_else(|| panic!("{path} is gone"));
            assert_eq!(attr.ino, self.addr[id], "{path}");
            assert_eq!((attr.mode & 0o7777, (attr.uid, attr.gid)), (item.perm, item.owner), "{path}");
            if let Kind::File(data) = &item.kind {
                assert_eq!(attr.size, data.len() as u64, "{path}");
                assert!(self.node.read(attr.ino, 0, data.len() + 1) == **data, "contents of {path}");
            }
        }
        let dirs = self.tree.names.iter().filter(|(_, id)| self.tree.items[*id].kind == Kind::Dir);
        let all: usize = dirs
            .map(|(_, id)| self.addr[id])
            .chain([self.node.root()])
            .map(|d| self.node.names(d, 500).len() - 2)
            .sum();
        assert_eq!(all, self.tree.names.len(), "names on the volume");
    }
}

impl Tree {
    fn change(&mut self, id: usize, f: impl FnOnce(&mut Item)) {
        let item = Arc::make_mut(self.items.get_mut(&id).expect("a known item"));
        item.mtime = None;
        f(item);
    }

    fn remove(&mut self, path: &str) {
        let id = self.names.remove(path).expect("a known path");
        if !self.names.values().any(|other| *other == id) {
            self.items.remove(&id);
        }
    }

    /// The names at and below a path, without that path.
    fn take(&mut self, path: &str) -> Vec<(String, usize)> {
        let below =
            |name: &str| name == path || name.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'));
        let taken: Vec<(String, usize)> =
            self.names.iter().filter(|n| below(n.0)).map(|n| (n.0.clone(), *n.1)).collect();
        for (name, _) in &taken {
            self.names.remove(name);
        }
        taken.into_iter().map(|(name, id)| (name[path.len()..].to_owned(), id)).collect()
    }

    fn rename(&mut self, old: &str, new: &str, exchange: bool) {
        let moved = self.take(old);
        let target = self.take(new);
        for (rest, id) in moved {
            self.names.insert(format!("{new}{rest}"), id);
        }
        for (rest, id) in target {
            if exchange {
                self.names.insert(format!("{old}{rest}"), id);
            } else if !self.names.values().any(|other| *other == id) {
                self.items.remove(&id);
            }
        }
    }
}
