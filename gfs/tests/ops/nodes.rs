//! Several nodes on one volume: what one writes the others read, whoever holds what.

use crate::model::Rng;
use crate::rig::{ME, Node, done, errno, fsck, volume_image_for};
use gfs::glock::AcquireFlags;
use gfs::lockspace::shared::SharedSpace;
use gfs::lockspace::{GlockName, GlockType, LockState};
use gfs::ondisk::bitmap::BlockState;
use gfs::ops::{Fs, FsOptions, NewNode, RenameMode, SetAttr, WriteMode};
use gfs::volume::{MountOptions, Volume};
use gfs::{Error, InodeNo};
use lun::mem::MemLun;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

struct Cluster {
    lun: MemLun,
    space: Arc<SharedSpace>,
    nodes: Vec<Node>,
    members: Vec<u32>,
}

impl Cluster {
    fn new(bsize: u32, nodes: u32) -> Self {
        let lun = MemLun::from_image(volume_image_for(bsize, 32 + 32 * u64::from(nodes), nodes), 512);
        let space = SharedSpace::new();
        let mut members = Vec::new();
        let nodes = (0..nodes)
            .map(|i| {
                let (number, member) = space.join();
                members.push(number);
                let lun = lun.handle(&format!("node{i}"));
                let vol = Volume::mount(Arc::new(lun), member, MountOptions::default()).unwrap();
                Node { fs: Fs::new(vol, FsOptions::default()) }
            })
            .collect();
        Self { lun, space, nodes, members }
    }

    /// The last node dies, is fenced, and the first one replays its journal.
    fn kill_last(&mut self) {
        let (dead, member) = (self.nodes.pop().unwrap(), self.members.pop().unwrap());
        let journal = dead.fs.volume().journal().unwrap();
        self.space.kill(member);
        dead.fs.volume().withdraw("killed");
        self.space.fenced(member);
        assert!(self.nodes[0].fs.volume().recover_journal(journal).unwrap().is_some());
        self.space.recovered(member);
    }

    fn end(self) {
        for node in self.nodes {
            node.unmount();
        }
        assert_eq!(self.space.violations(), Vec::<String>::new());
        fsck(&self.lun.durable());
    }
}

#[test]
fn what_one_node_writes_the_other_reads() {
    for bsize in [512, 4096] {
        let c = Cluster::new(bsize, 2);
        let (a, b) = (&c.nodes[0], &c.nodes[1]);
        let f = a.file(a.root(), "f");
        a.write(f, 0, b"from a");
        assert_eq!(b.get(b.root(), "f").unwrap().ino, f);
        assert_eq!(b.read(f, 0, 100), b"from a");
        let data: Vec<u8> = (0..200_000u32).map(|i| (i % 253) as u8).collect();
        b.write(f, 6, &data);
        assert_eq!(a.size(f), 200_006);
        assert!(a.read(f, 6, 300_000) == data);
        a.truncate(f, 100);
        assert_eq!(b.read(f, 0, 1000), [b"from a", &data[..94]].concat());
        for i in 0..200 {
            [a, b][i % 2].file(a.root(), &format!("n{i}"));
        }
        assert_eq!(a.names(a.root(), 1000), b.names(b.root(), 7));
        for i in 0..200 {
            done([b, a][i % 2].fs.unlink(a.root(), format!("n{i}").as_bytes()).unwrap());
        }
        assert_eq!(a.names(a.root(), 1000).len(), 3);
        c.end();
    }
}

#[test]
fn appends_of_all_nodes_are_all_there() {
    let c = Cluster::new(4096, 3);
    let f = c.nodes[0].file(c.nodes[0].root(), "log");
    for node in &c.nodes {
        node.get(node.root(), "log").unwrap();
    }
    std::thread::scope(|s| {
        for (i, node) in c.nodes.iter().enumerate() {
            s.spawn(move || {
                for _ in 0..300 {
                    let mode = WriteMode { append: true, ..WriteMode::default() };
                    done(node.fs.write(f, 0, &[b'a' + i as u8; 16], mode).unwrap());
                }
            });
        }
    });
    let all = c.nodes[1].read(f, 0, 1 << 20);
    assert_eq!(all.len(), 3 * 300 * 16);
    for record in all.chunks(16) {
        assert!(record.iter().all(|b| *b == record[0]), "{record:?}");
    }
    c.end();
}

#[test]
fn a_file_open_on_one_node_outlives_its_removal_on_another() {
    for remembered in [false, true] {
        let c = Cluster::new(4096, 2);
        let (a, b) = (&c.nodes[0], &c.nodes[1]);
        let f = a.file(a.root(), "f");
        a.write(f, 0, &vec![7; 100_000]);
        a.get(a.root(), "f").unwrap();
        if remembered {
            a.fs.remember(f, 1);
        }
        a.open(f);
        done(b.fs.unlink(b.root(), b"f").unwrap());
        b.fs.reclaim();
        assert_eq!(a.read(f, 99_999, 10), [7]);
        assert_eq!(a.attr(f).nlink, 0);
        a.write(f, 100_000, b"still here");
        let before = a.fs.statfs().unwrap();
        a.fs.release(f);
        if remembered {
            a.fs.forget(f, 1);
        }
        a.fs.reclaim();
        assert!(a.fs.statfs().unwrap().free > before.free, "the last user frees it");
        assert_eq!(errno(a.fs.getattr(f)), libc::ESTALE);
        c.end();
    }
}

#[test]
fn a_file_only_known_on_one_node_goes_when_another_removes_it() {
    let c = Cluster::new(4096, 2);
    let (a, b) = (&c.nodes[0], &c.nodes[1]);
    let f = a.file(a.root(), "f");
    a.fs.remember(f, 1);
    done(b.fs.unlink(b.root(), b"f").unwrap());
    b.fs.reclaim();
    assert_eq!(errno(a.fs.getattr(f)), libc::ESTALE);
    assert_eq!(errno(a.fs.open(f)), libc::ESTALE);
    // The search for a free block goes once around the volume; then its block is that of another file, which must not be taken for it.
    let mut made = (0..100_000).map(|i| format!("g{i}")).map(|name| (b.file(b.root(), &name), name));
    let (next, name) = made.find(|(ino, _)| ino.addr == f.addr).expect("the block is used again");
    assert_eq!(a.get(a.root(), &name).unwrap().ino, next);
    let change = SetAttr { mode: Some(0), ..SetAttr::default() };
    assert_eq!(errno(a.fs.setattr(f, &change)), libc::ESTALE);
    assert_eq!(errno(a.fs.getattr(f)), libc::ESTALE);
    assert_eq!(errno(a.fs.open(f)), libc::ESTALE);
    assert_eq!(errno(a.fs.write(f, 0, b"x", WriteMode::default())), libc::ESTALE);
    // References are those of one inode: the other, removed here, stays as long as it is known.
    a.fs.remember(next, 1);
    done(a.fs.unlink(a.root(), name.as_bytes()).unwrap());
    a.fs.forget(f, 1);
    a.fs.reclaim();
    assert_eq!((a.attr(next).nlink, a.size(next)), (0, 0));
    a.fs.forget(next, 1);
    // By this node, or by the other, which freed the block before and still has its iopen glock in its cache.
    let deadline = Instant::now() + Duration::from_secs(20);
    while a.fs.getattr(next).is_ok() {
        assert!(Instant::now() < deadline, "the inode is not freed");
        std::thread::yield_now();
    }
    assert_eq!(errno(a.fs.getattr(next)), libc::ESTALE);
    c.end();
}

/// A directory is removed after a rename has looked at its names and before it has the locks: what is moved must not vanish with it.
#[test]
fn nothing_is_renamed_into_a_directory_that_is_being_removed() {
    for (what, mover, remover) in [("file", 0, 0), ("file", 0, 1), ("dir", 0, 0), ("dir", 1, 0)] {
        let c = Cluster::new(4096, 2);
        let (a, b) = (&c.nodes[mover], &c.nodes[remover]);
        let from = a.dir(a.root(), "from");
        if what == "file" {
            a.file(from, "x");
        } else {
            a.dir(from, "x");
        }
        let to = a.dir(a.root(), "to");
        // Open, so that it is not freed at once: its dinode is still there, empty and without a name.
        a.open(to);
        assert_eq!(b.get(b.root(), "to").unwrap().ino, to);
        assert_eq!(b.get(b.root(), "from").unwrap().ino, from);
        let name = GlockName { ty: GlockType::Inode, number: from.addr.0 };
        let glock = a.fs.volume().glocks().get(name);
        std::thread::scope(|s| {
            // Looking is shared, moving is not.
            let holder = a.fs.volume().glocks().acquire(name, LockState::Shared, AcquireFlags::NONE).unwrap();
            let moved = s.spawn(|| a.fs.rename(from, b"x", to, b"y", RenameMode::Replace).map(done));
            while glock.waiters() == 0 {
                std::thread::yield_now();
            }
            done(b.fs.rmdir(b.root(), b"to").unwrap());
            drop(holder);
            assert_eq!(errno(moved.join().unwrap()), libc::ENOENT, "{what} {mover} {remover}");
        });
        assert!(b.get(from, "x").is_some());
        a.fs.release(to);
        c.end();
    }
}

/// A file that was open on a node, but is not any more, leaves its iopen glock cached there. Whoever removes it elsewhere cannot free it, and the
/// node that can must.
#[test]
fn a_file_closed_on_one_node_is_freed_after_its_removal_on_another() {
    let c = Cluster::new(4096, 3);
    for round in 0..20 {
        let f = c.nodes[0].file(c.nodes[0].root(), "f");
        for node in &c.nodes {
            node.get(node.root(), "f").unwrap();
            node.open(f);
            node.fs.release(f);
        }
        let remover = &c.nodes[round % 3];
        done(remover.fs.unlink(remover.root(), b"f").unwrap());
        let deadline = Instant::now() + Duration::from_secs(20);
        while remover.fs.volume().rgrps().unwrap().block_state(f.addr).unwrap() != BlockState::Free {
            assert!(Instant::now() < deadline, "round {round}: the inode is not freed");
            std::thread::yield_now();
        }
    }
    c.end();
}

/// Whoever frees an inode holds its iopen glock exclusively and keeps that in its cache. When the next inode at that address is held open there, another
/// node must be able to open it as well.
#[test]
fn a_file_in_a_freed_place_can_be_open_on_all_nodes() {
    for in_one_step in [false, true] {
        let c = Cluster::new(4096, 2);
        let (a, b) = (&c.nodes[0], &c.nodes[1]);
        let make = |name: &str| {
            if !in_one_step {
                let f = a.file(a.root(), name);
                a.open(f);
                return f;
            }
            done(a.fs.create(ME, a.root(), name.as_bytes(), 0o644).unwrap()).ino
        };
        let first = make("first");
        done(a.fs.unlink(a.root(), b"first").unwrap());
        a.fs.release(first);
        a.fs.reclaim();
        a.fs.syncfs().unwrap();
        // The search for a free block goes once around the volume.
        let (mut name, mut second) = (String::new(), None);
        for i in 0..100_000 {
            name = format!("f{i}");
            let at = make(&name);
            if at.addr == first.addr {
                second = Some(at);
                break;
            }
            a.fs.release(at);
        }
        let second = second.expect("the block is used again");
        let name = name.as_str();
        assert_eq!(b.get(b.root(), name).unwrap().ino, second);
        std::thread::scope(|s| {
            let (opened, is_open) = std::sync::mpsc::channel();
            s.spawn(move || {
                b.open(second);
                opened.send(()).unwrap();
            });
            let both = is_open.recv_timeout(Duration::from_secs(20));
            a.fs.release(second);
            both.expect("the second node waits for the first one to close the file");
        });
        c.end();
    }
}

/// Another node takes the glocks of free blocks again and again, as one does that frees inodes. A creation must neither give up nor starve.
#[test]
fn a_creation_outlasts_any_contention_for_free_blocks() {
    let c = Cluster::new(4096, 2);
    let (a, b) = (&c.nodes[0], &c.nodes[1]);
    let first = a.file(a.root(), "first");
    let names: Vec<_> =
        (1..=40).map(|i| GlockName { ty: GlockType::Inode, number: first.addr.0 + i }).collect();
    let ended = AtomicBool::new(false);
    std::thread::scope(|s| {
        let take = || -> Vec<_> {
            let glocks = b.fs.volume().glocks();
            let one = |name: &GlockName| glocks.acquire(*name, LockState::Exclusive, AcquireFlags::SKIP);
            names.iter().map(|name| one(name).unwrap()).collect()
        };
        let mut held = take();
        let ours = || names.iter().map(|name| a.fs.volume().glocks().get(*name)).collect::<Vec<_>>();
        let glocks = ours();
        let made = s.spawn(|| {
            let made: Vec<_> = (0..20).map(|i| a.file(a.root(), &format!("n{i}"))).collect();
            ended.store(true, Ordering::SeqCst);
            made
        });
        let mut rounds = 0;
        while !ended.load(Ordering::SeqCst) {
            if glocks.iter().any(|g| g.waiters() > 0) {
                drop(held);
                rounds += 1;
                held = take();
            }
            std::thread::yield_now();
        }
        let made = made.join().unwrap();
        assert_eq!(made.iter().collect::<BTreeSet<_>>().len(), 20);
        assert!(rounds > 0, "nobody waited");
    });
    c.end();
}

/// Each node owns some records of each file and writes ever higher numbers into them; whoever reads sees no number go back, and at the end
/// every node sees the last one of each.
#[test]
fn records_of_shared_files_never_go_back() {
    for seed in 0..2 {
        eprintln!("seed {seed}");
        let c = Cluster::new(4096, 3);
        let n = c.nodes.len() as u64;
        let (files, records) = (3, 24);
        let inos: Vec<InodeNo> =
            (0..files).map(|i| c.nodes[0].file(c.nodes[0].root(), &format!("f{i}"))).collect();
        for node in &c.nodes {
            for i in 0..files {
                node.get(node.root(), &format!("f{i}")).unwrap();
            }
        }
        let last: Vec<BTreeMap<(usize, u64), u64>> = std::thread::scope(|s| {
            let threads: Vec<_> = (0..n)
                .map(|me| {
                    let (node, inos) = (&c.nodes[me as usize], &inos);
                    s.spawn(move || {
                        let mut rng = Rng::new(seed * 100 + me);
                        let (mut mine, mut seen) = (BTreeMap::new(), BTreeMap::new());
                        for round in 1..400u64 {
                            let file = rng.below(files as u64) as usize;
                            let record = rng.below(records);
                            if record % n == me {
                                let bytes: Vec<u8> = round.to_be_bytes().repeat(64);
                                node.write(inos[file], record * 512, &bytes);
                                mine.insert((file, record), round);
                            } else {
                                let bytes = node.read(inos[file], record * 512, 512);
                                if bytes.is_empty() {
                                    continue;
                                }
                                let value = u64::from_be_bytes(bytes[..8].try_into().unwrap());
                                assert!(bytes.chunks(8).all(|c| c == &bytes[..8]), "torn record");
                                let before = seen.insert((file, record), value).unwrap_or(0);
                                assert!(
                                    value >= before,
                                    "record {record} of file {file}: {before}, then {value}"
                                );
                            }
                        }
                        mine
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        for node in &c.nodes {
            for ((file, record), value) in last.iter().flatten() {
                assert_eq!(node.read(inos[*file], record * 512, 8), value.to_be_bytes());
            }
        }
        c.end();
    }
}

#[test]
fn nodes_that_do_everything_at_once_leave_a_whole_volume() {
    for (bsize, seed) in [(512, 1), (4096, 2)] {
        eprintln!("seed {seed}");
        let c = Cluster::new(bsize, 3);
        let shared = c.nodes[0].dir(c.nodes[0].root(), "shared");
        for node in &c.nodes {
            node.get(node.root(), "shared").unwrap();
        }
        std::thread::scope(|s| {
            for (i, node) in c.nodes.iter().enumerate() {
                for t in 0..2 {
                    s.spawn(move || storm(node, shared, seed * 10 + 2 * i as u64 + t));
                }
            }
        });
        let names = c.nodes[0].names(shared, 100);
        for node in &c.nodes {
            assert_eq!(node.names(shared, 100), names);
        }
        c.end();
    }
}

fn storm(n: &Node, shared: InodeNo, seed: u64) {
    let mut rng = Rng::new(seed);
    let dirs = [n.root(), shared];
    for _ in 0..150 {
        let dir = dirs[rng.below(2) as usize];
        let name = format!("n{}", rng.below(20));
        let result = match rng.below(9) {
            0 | 1 => n.fs.mknod(ME, dir, name.as_bytes(), 0o644, NewNode::File).map(|h| {
                let ino = h.value.ino;
                drop(h);
                let size = rng.below(30_000) as usize + 1;
                let _ = n.fs.write(ino, rng.below(50_000), &vec![seed as u8; size], WriteMode::default());
            }),
            2 => n.fs.mkdir(ME, dir, name.as_bytes(), 0o755).map(drop),
            3 => n.fs.unlink(dir, name.as_bytes()).map(drop),
            4 => n.fs.rmdir(dir, name.as_bytes()).map(drop),
            5 | 6 => {
                let to = dirs[rng.below(2) as usize];
                let mode = [RenameMode::Replace, RenameMode::Exchange][rng.below(2) as usize];
                n.fs.rename(dir, name.as_bytes(), to, format!("n{}", rng.below(20)).as_bytes(), mode)
                    .map(drop)
            }
            7 => n.fs.lookup(dir, name.as_bytes()).map(|h| {
                if let Some(attr) = h.value {
                    drop(h);
                    if n.fs.open(attr.ino).is_ok() {
                        let mut out = [0; 100];
                        let _ = n.fs.read(attr.ino, 0, &mut out, false);
                        n.fs.release(attr.ino);
                    }
                }
            }),
            _ => n.fs.readdirplus(dir, 0, |_, _| true).map(drop),
        };
        match result {
            Ok(()) | Err(Error::Errno(_)) => {}
            Err(e) => panic!("{e}"),
        }
    }
}

#[test]
fn what_a_dead_node_synced_is_there_and_what_it_had_open_is_freed() {
    let mut c = Cluster::new(4096, 2);
    let (a, b) = (&c.nodes[0], &c.nodes[1]);
    let f = a.file(a.root(), "open on b");
    a.write(f, 0, &vec![1; 200_000]);
    b.get(b.root(), "open on b").unwrap();
    b.open(f);
    let g = b.file(b.root(), "synced by b");
    b.write(g, 0, b"must stay");
    b.fs.fsync(g, gfs::ops::SyncKind::All).unwrap();
    b.write(g, 4, b"may stay ");
    done(a.fs.unlink(a.root(), b"open on b").unwrap());
    a.fs.reclaim();
    assert_eq!(b.read(f, 0, 1), [1]);
    let before = a.fs.statfs().unwrap();
    c.kill_last();
    let a = &c.nodes[0];
    let g = a.get(a.root(), "synced by b").unwrap().ino;
    assert_eq!(&a.read(g, 0, 100)[..4], b"must");
    assert_eq!(a.fs.sweep_orphans().unwrap(), 1);
    assert!(a.fs.statfs().unwrap().free >= before.free + 49);
    c.end();
}
