//! The reference: a file system of maps and vectors, and a generator that does the same random things to it and to a mounted volume.

use crate::rig::{ME, Node, done, twice};
use gfs::ops::{Fallocate, NewNode, RenameMode, Seek, SetAttr, WriteMode};
use gfs::{Error, InodeNo, Result};
use std::collections::{BTreeMap, BTreeSet};

/// xorshift64*: enough for choosing, and the same everywhere.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File(Vec<u8>),
    Dir(BTreeMap<String, usize>),
    Link(Vec<u8>),
}

#[derive(Clone, Debug)]
struct Item {
    kind: Kind,
    mode: u32,
    nlink: u32,
    ino: InodeNo,
    opens: u32,
}

#[derive(Clone)]
pub(crate) struct Model {
    items: Vec<Item>,
    /// Things changed since [`Model::mark`]: items, and names by directory.
    touched: BTreeSet<usize>,
}

pub(crate) struct Limits {
    pub(crate) names: u64,
    pub(crate) max_file: u64,
}

const ROOT: usize = 0;

fn code<T>(result: &Result<T>) -> Option<i32> {
    match result {
        Ok(_) => None,
        Err(Error::Errno(e)) => Some(*e),
        Err(e) => panic!("{e}"),
    }
}

impl Model {
    pub(crate) fn new(root: InodeNo) -> Self {
        let root = Item { kind: Kind::Dir(BTreeMap::new()), mode: 0o755, nlink: 2, ino: root, opens: 0 };
        Self { items: vec![root], touched: BTreeSet::new() }
    }

    pub(crate) fn mark(&mut self) {
        self.touched.clear();
    }

    fn dir(&mut self, at: usize) -> &mut BTreeMap<String, usize> {
        self.touched.insert(at);
        match &mut self.items[at].kind {
            Kind::Dir(entries) => entries,
            other => panic!("{other:?} is no directory"),
        }
    }

    fn entries(&self, at: usize) -> &BTreeMap<String, usize> {
        match &self.items[at].kind {
            Kind::Dir(entries) => entries,
            other => panic!("{other:?} is no directory"),
        }
    }

    fn is_dir(&self, at: usize) -> bool {
        matches!(self.items[at].kind, Kind::Dir(_))
    }

    fn find(&self, dir: usize, name: &str) -> Option<usize> {
        self.entries(dir).get(name).copied()
    }

    fn live(&self, want: impl Fn(&Item) -> bool) -> Vec<usize> {
        (0..self.items.len()).filter(|i| self.items[*i].nlink > 0 && want(&self.items[*i])).collect()
    }

    fn dirs(&self) -> Vec<usize> {
        self.live(|i| matches!(i.kind, Kind::Dir(_)))
    }

    fn is_below(&self, at: usize, top: usize) -> bool {
        at == top || self.entries(top).values().any(|c| self.is_dir(*c) && self.is_below(at, *c))
    }

    fn name(rng: &mut Rng, limits: &Limits) -> String {
        let n = rng.below(limits.names);
        match n % 5 {
            0 => format!("{n}"),
            1 => format!("name-{n}-{}", "x".repeat((n % 40) as usize)),
            2 => format!("{n:0200}"),
            _ => format!("file{n}"),
        }
    }

    /// One random step on both sides; what they answer must agree.
    pub(crate) fn step(&mut self, rng: &mut Rng, node: &Node, limits: &Limits) {
        let fs = &node.fs;
        let dirs = self.dirs();
        let dir = rng.pick(&dirs);
        let at = self.items[dir].ino;
        let name = Self::name(rng, limits);
        let there = self.find(dir, &name);
        match rng.below(34) {
            0..=5 => {
                let got = twice(|| fs.mknod(ME, at, name.as_bytes(), 0o640, NewNode::File)).map(done);
                self.made(dir, name, there, Kind::File(Vec::new()), 0o640, got);
            }
            6 | 7 => {
                let got = twice(|| fs.mkdir(ME, at, name.as_bytes(), 0o750)).map(done);
                self.made(dir, name, there, Kind::Dir(BTreeMap::new()), 0o750, got);
            }
            8 => {
                let target = vec![b'y'; 1 + rng.below(200) as usize];
                let got = twice(|| fs.symlink(ME, at, name.as_bytes(), &target)).map(done);
                self.made(dir, name, there, Kind::Link(target), 0o777, got);
            }
            9 => {
                let files = self.live(|i| !matches!(i.kind, Kind::Dir(_)));
                if files.is_empty() {
                    return;
                }
                let f = rng.pick(&files);
                let got = twice(|| fs.link(self.items[f].ino, at, name.as_bytes())).map(done);
                assert_eq!(code(&got), there.map(|_| libc::EEXIST), "link {name}");
                if got.is_ok() {
                    self.items[f].nlink += 1;
                    self.touched.insert(f);
                    self.dir(dir).insert(name, f);
                }
            }
            10..=12 => {
                let got = twice(|| fs.unlink(at, name.as_bytes())).map(done);
                let want = match there {
                    None => Some(libc::ENOENT),
                    Some(c) if self.is_dir(c) => Some(libc::EISDIR),
                    Some(_) => None,
                };
                assert_eq!(code(&got), want, "unlink {name}");
                if let (Some(c), None) = (there, want) {
                    self.dir(dir).remove(&name);
                    self.touched.insert(c);
                    self.items[c].nlink -= 1;
                }
            }
            13 => {
                let got = twice(|| fs.rmdir(at, name.as_bytes())).map(done);
                let want = match there {
                    None => Some(libc::ENOENT),
                    Some(c) if !self.is_dir(c) => Some(libc::ENOTDIR),
                    Some(c) if !self.entries(c).is_empty() => Some(libc::ENOTEMPTY),
                    Some(_) => None,
                };
                assert_eq!(code(&got), want, "rmdir {name}");
                if let (Some(c), None) = (there, want) {
                    self.dir(dir).remove(&name);
                    self.touched.insert(c);
                    self.items[c].nlink = 0;
                    self.items[dir].nlink -= 1;
                }
            }
            14..=18 => {
                let to_dir = rng.pick(&dirs);
                let to = Self::name(rng, limits);
                let mode = rng.pick(&[
                    RenameMode::Replace,
                    RenameMode::Replace,
                    RenameMode::NoReplace,
                    RenameMode::Exchange,
                ]);
                self.rename(node, (dir, name), (to_dir, to), mode);
            }
            19 => {
                let mode = rng.below(0o10000) as u32;
                let any = rng.pick(&self.live(|_| true));
                let set = SetAttr { mode: Some(mode), ..SetAttr::default() };
                done(twice(|| fs.setattr(self.items[any].ino, &set)).unwrap());
                self.items[any].mode = mode;
                self.touched.insert(any);
            }
            20 => {
                let files = self.live(|i| matches!(i.kind, Kind::File(_)));
                if let Some(f) = (!files.is_empty()).then(|| rng.pick(&files)) {
                    twice(|| fs.open(self.items[f].ino)).unwrap();
                    self.items[f].opens += 1;
                }
            }
            21 => {
                let open: Vec<usize> = (0..self.items.len()).filter(|i| self.items[*i].opens > 0).collect();
                if let Some(f) = (!open.is_empty()).then(|| rng.pick(&open)) {
                    fs.release(self.items[f].ino);
                    self.items[f].opens -= 1;
                }
            }
            22 => self.check_dir(node, dir, 1 + rng.below(20) as usize),
            _ => self.file_step(rng, node, limits),
        }
    }

    fn made(
        &mut self,
        dir: usize,
        name: String,
        there: Option<usize>,
        kind: Kind,
        mode: u32,
        got: Result<gfs::ops::Attr>,
    ) {
        assert_eq!(code(&got), there.map(|_| libc::EEXIST), "making {name}");
        if let Ok(attr) = got {
            let is_dir = matches!(kind, Kind::Dir(_));
            let mode = if is_dir { mode | (self.items[dir].mode & 0o2000) } else { mode };
            self.items.push(Item { kind, mode, nlink: if is_dir { 2 } else { 1 }, ino: attr.ino, opens: 0 });
            let new = self.items.len() - 1;
            self.touched.insert(new);
            self.dir(dir).insert(name, new);
            self.items[dir].nlink += u32::from(is_dir);
        }
    }

    fn rename(&mut self, node: &Node, from: (usize, String), to: (usize, String), mode: RenameMode) {
        let (old, new) = (self.items[from.0].ino, self.items[to.0].ino);
        let got = twice(|| node.fs.rename(old, from.1.as_bytes(), new, to.1.as_bytes(), mode)).map(done);
        let source = self.find(from.0, &from.1);
        let target = self.find(to.0, &to.1);
        let want = self.rename_answer(&from, &to, source, target, mode);
        let what = format!("rename {from:?} to {to:?} {mode:?}");
        match want {
            Some(errors) => {
                assert!(code(&got).is_some_and(|e| errors.contains(&e)), "{what}: {got:?}, wanted {errors:?}")
            }
            None => {
                assert_eq!(code(&got), None, "{what}");
                let source = source.unwrap();
                if target == Some(source) {
                    return;
                }
                self.touched.insert(source);
                self.touched.extend(target);
                let moves = self.is_dir(source);
                match (mode, target) {
                    (RenameMode::Exchange, Some(t)) => {
                        self.dir(from.0).insert(from.1, t);
                        self.dir(to.0).insert(to.1, source);
                        let back = self.is_dir(t);
                        self.items[to.0].nlink = self.items[to.0].nlink + u32::from(moves) - u32::from(back);
                        self.items[from.0].nlink =
                            self.items[from.0].nlink + u32::from(back) - u32::from(moves);
                    }
                    (_, target) => {
                        self.dir(from.0).remove(&from.1);
                        self.dir(to.0).insert(to.1, source);
                        if let Some(t) = target {
                            if self.is_dir(t) {
                                self.items[t].nlink = 0;
                                self.items[to.0].nlink -= 1;
                            } else {
                                self.items[t].nlink -= 1;
                            }
                        }
                        self.items[to.0].nlink += u32::from(moves);
                        self.items[from.0].nlink -= u32::from(moves);
                    }
                }
            }
        }
    }

    /// Errors of which any is right; `None`: it must work.
    fn rename_answer(
        &self,
        from: &(usize, String),
        to: &(usize, String),
        source: Option<usize>,
        target: Option<usize>,
        mode: RenameMode,
    ) -> Option<Vec<i32>> {
        let Some(source) = source else { return Some(vec![libc::ENOENT]) };
        let loops = self.is_dir(source) && self.is_below(to.0, source);
        match (target, mode) {
            (Some(_), RenameMode::NoReplace) => return Some(vec![libc::EEXIST]),
            (None, RenameMode::Exchange) => return Some(vec![libc::ENOENT]),
            _ => {}
        }
        if loops {
            return Some(vec![libc::EINVAL]);
        }
        let t = target?;
        if t == source {
            return None;
        }
        if mode == RenameMode::Exchange {
            let back = self.is_dir(t) && self.is_below(from.0, t);
            return back.then(|| vec![libc::EINVAL]);
        }
        match (self.is_dir(source), self.is_dir(t)) {
            (true, false) => Some(vec![libc::ENOTDIR]),
            (false, true) => Some(vec![libc::EISDIR, libc::ENOTEMPTY]),
            (true, true) if !self.entries(t).is_empty() => Some(vec![libc::ENOTEMPTY]),
            _ => None,
        }
    }

    fn file_step(&mut self, rng: &mut Rng, node: &Node, limits: &Limits) {
        let fs = &node.fs;
        // also files that are open and have lost their name
        let files: Vec<usize> = (0..self.items.len())
            .filter(|i| {
                matches!(self.items[*i].kind, Kind::File(_))
                    && (self.items[*i].nlink > 0 || self.items[*i].opens > 0)
            })
            .collect();
        if files.is_empty() {
            return;
        }
        let f = rng.pick(&files);
        let ino = self.items[f].ino;
        let what = rng.below(12);
        if what >= 3 {
            self.touched.insert(f);
        }
        let Kind::File(data) = &mut self.items[f].kind else { unreachable!() };
        let len = data.len() as u64;
        match what {
            0..=2 => {
                let from = rng.below(len + 10);
                let mut out = vec![0; 1 + rng.below(40_000) as usize];
                let direct = rng.below(4) == 0;
                let n = match gfs::glock::nowait(|| fs.read(ino, from, &mut out, direct)) {
                    Err(Error::WouldBlock) => done(fs.read(ino, from, &mut out, direct).unwrap()),
                    other => done(other.unwrap()),
                };
                let want = data.get(from as usize..).unwrap_or_default();
                let want = &want[..want.len().min(out.len())];
                assert!(out[..n] == *want, "read of {ino:?} at {from}: {n} bytes, {} wanted", want.len());
                if len > 0 {
                    let at = rng.below(len);
                    let hole = done(twice(|| fs.lseek(ino, at, Seek::Hole)).unwrap());
                    assert!(hole <= len);
                }
            }
            3..=7 => {
                let append = rng.below(5) == 0;
                let small = rng.below(3) > 0;
                let size = 1 + rng.below(if small { 500 } else { 60_000 });
                let from = if append { len } else { rng.below((len + 5000).min(limits.max_file)) };
                let fill = rng.next() as u8;
                let bytes: Vec<u8> = (0..size).map(|i| fill.wrapping_add(i as u8)).collect();
                let mode = WriteMode {
                    append,
                    direct: rng.below(8) == 0,
                    sync: rng.below(30) == 0,
                    ..WriteMode::default()
                };
                let offset = if append { 0 } else { from };
                let written = done(twice(|| fs.write(ino, offset, &bytes, mode)).unwrap());
                assert_eq!((written.offset, written.len), (from, bytes.len()));
                let end = from as usize + bytes.len();
                if data.len() < end {
                    data.resize(end, 0);
                }
                data[from as usize..end].copy_from_slice(&bytes);
            }
            8 | 9 => {
                let size = if rng.below(3) == 0 { 0 } else { rng.below(limits.max_file) };
                done(twice(|| fs.setattr(ino, &SetAttr { size: Some(size), ..SetAttr::default() })).unwrap());
                data.resize(size as usize, 0);
            }
            10 => {
                let (from, n) = (rng.below(limits.max_file), 1 + rng.below(50_000));
                done(twice(|| fs.fallocate(ino, Fallocate::PunchHole, from, n)).unwrap());
                let end = data.len().min((from + n) as usize);
                if (from as usize) < end {
                    data[from as usize..end].fill(0);
                }
            }
            _ => {
                let (from, n) = (rng.below(limits.max_file), 1 + rng.below(50_000));
                let how = if rng.below(2) == 0 { Fallocate::Allocate } else { Fallocate::KeepSize };
                done(twice(|| fs.fallocate(ino, how, from, n)).unwrap());
                if how == Fallocate::Allocate && data.len() < (from + n) as usize {
                    data.resize((from + n) as usize, 0);
                }
            }
        }
    }

    fn check_dir(&self, node: &Node, dir: usize, batch: usize) {
        let mut names = node.names(self.items[dir].ino, batch);
        names.sort();
        let mut want: Vec<String> = self.entries(dir).keys().cloned().collect();
        want.extend([".".to_owned(), "..".to_owned()]);
        want.sort();
        assert_eq!(names, want, "listing of {:?}", self.items[dir].ino);
    }

    /// Everything on the volume is what it is here. Handles do not survive a mount.
    pub(crate) fn check_all(&mut self, node: &Node) {
        self.check_below(node, ROOT, node.root(), &|_| true);
    }

    /// After a crash: what was durable at the last mark and not touched since is as it was.
    pub(crate) fn check_untouched(durable: &mut Self, later: &Self, node: &Node) {
        let touched = later.touched.clone();
        durable.check_below(node, ROOT, node.root(), &|i| !touched.contains(&i));
    }

    fn check_below(&mut self, node: &Node, at: usize, ino: InodeNo, sure: &dyn Fn(usize) -> bool) {
        self.items[at].ino = ino;
        self.items[at].opens = 0;
        let attr = node.attr(ino);
        let item = self.items[at].clone();
        if sure(at) {
            assert_eq!((attr.nlink, attr.mode & 0o7777), (item.nlink, item.mode), "inode {ino:?}");
        }
        match item.kind {
            Kind::File(data) => {
                if sure(at) {
                    assert_eq!(attr.size, data.len() as u64, "size of {ino:?}");
                    assert!(node.read(ino, 0, data.len() + 1) == data, "contents of {ino:?}");
                }
            }
            Kind::Link(target) => assert_eq!(done(node.fs.readlink(ino).unwrap()), target),
            Kind::Dir(entries) => {
                if sure(at) {
                    self.check_dir(node, at, 50);
                }
                for (name, child) in entries {
                    match node.get(ino, &name) {
                        Some(attr) if sure(at) || sure(child) && attr.ino == self.items[child].ino => {
                            self.check_below(node, child, attr.ino, sure);
                        }
                        Some(_) => {}
                        None => assert!(!sure(at), "{name} is gone from {ino:?}"),
                    }
                }
            }
        }
    }
}
