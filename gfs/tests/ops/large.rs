//! Many names, deep trees, full volumes, many threads.

use crate::model::Rng;
use crate::rig::{ME, Node, Rig, done, errno};
use gfs::ops::{Fallocate, NewNode, RenameMode, Seek, SyncKind, WriteMode};
use gfs::{Error, InodeNo};
use std::collections::BTreeSet;

#[test]
fn directories_of_thousands_of_names_stay_whole() {
    for (bsize, count) in [(512, 3000), (1024, 3000), (4096, 12_000)] {
        let rig = Rig::new(bsize, 128);
        rig.with(|n| {
            let d = n.dir(n.root(), "d");
            for i in 0..count {
                n.file(d, &format!("entry-{i}"));
            }
            assert_eq!(n.names(d, 1000).len(), count + 2);
            for i in (0..count).step_by(3) {
                done(n.fs.unlink(d, format!("entry-{i}").as_bytes()).unwrap());
            }
            assert_eq!(errno(n.fs.rmdir(n.root(), b"d")), libc::ENOTEMPTY);
        });
        rig.with(|n| {
            let d = n.get(n.root(), "d").unwrap().ino;
            for i in 0..count {
                assert_eq!(n.get(d, &format!("entry-{i}")).is_some(), i % 3 != 0, "entry-{i}");
            }
            for i in (0..count).filter(|i| i % 3 != 0) {
                done(n.fs.unlink(d, format!("entry-{i}").as_bytes()).unwrap());
            }
            done(n.fs.rmdir(n.root(), b"d").unwrap());
        });
    }
}

/// Names whose hashes agree in their first 17 bits: no table can tell them apart.
fn colliding(count: usize) -> Vec<String> {
    let hash = |i: u64| crc32fast::hash(format!("c{i}").as_bytes()) >> 15;
    let want = hash(0);
    (0..).filter(|i| hash(*i) == want).map(|i| format!("c{i}")).take(count).collect()
}

#[test]
fn names_with_equal_hash_bits_make_a_table_of_greatest_depth_and_chains() {
    let names = colliding(30);
    let rig = Rig::new(512, 64);
    rig.with(|n| {
        let d = n.dir(n.root(), "d");
        for name in &names {
            n.file(d, name);
        }
        // as the kernel lays them out: 2149 table blocks, 37 indirect ones, at least 20 leaves and the dinode
        let blocks = n.attr(d).blocks;
        assert!((2200..2212).contains(&blocks), "{blocks} blocks");
        assert_eq!(n.attr(d).size, 8 << 17);
    });
    rig.with(|n| {
        let d = n.get(n.root(), "d").unwrap().ino;
        for name in &names {
            assert!(n.get(d, name).is_some(), "{name}");
        }
        assert_eq!(n.names(d, 7).len(), 32);
        for name in &names {
            done(n.fs.unlink(d, name.as_bytes()).unwrap());
        }
        done(n.fs.rmdir(n.root(), b"d").unwrap());
    });
}

#[test]
fn a_listing_sees_what_stays_exactly_once_while_the_directory_changes() {
    for (bsize, seed) in [(512, 1), (512, 2), (4096, 3)] {
        eprintln!("seed {seed}");
        let mut rng = Rng::new(seed);
        Rig::new(bsize, 64).with(|n| {
            let d = n.dir(n.root(), "d");
            let stay: BTreeSet<String> = (0..300).map(|i| format!("stay{i}")).collect();
            for name in &stay {
                n.file(d, name);
            }
            let mut others = BTreeSet::new();
            let (mut from, mut seen) = (0, Vec::new());
            loop {
                let mut next = None;
                done(
                    n.fs.readdir(d, from, |e| {
                        if next.is_some() {
                            return false;
                        }
                        seen.push(String::from_utf8(e.name.to_vec()).unwrap());
                        next = Some(e.next);
                        true
                    })
                    .unwrap(),
                );
                let Some(next) = next else { break };
                from = next;
                for _ in 0..4 {
                    let name = format!("other{}", rng.below(2000));
                    if others.remove(&name) {
                        done(n.fs.unlink(d, name.as_bytes()).unwrap());
                    } else {
                        n.file(d, &name);
                        others.insert(name);
                    }
                }
            }
            let mut mine: Vec<String> = seen.iter().filter(|s| s.starts_with("stay")).cloned().collect();
            mine.sort();
            assert!(mine.iter().eq(stay.iter()), "{} of {} names", mine.len(), stay.len());
            assert_eq!(seen.len(), seen.iter().collect::<BTreeSet<_>>().len(), "a name was seen twice");
        });
    }
}

#[test]
fn trees_of_every_height_map_what_was_written() {
    for bsize in [512, 4096] {
        let b = u64::from(bsize);
        let rig = Rig::new(bsize, 64);
        let max = if bsize == 512 { 60 } else { 62 };
        let offsets: Vec<u64> = (13..max).step_by(3).map(|p| (1u64 << p) - b / 2).collect();
        rig.with(|n| {
            for (i, upwards) in [true, false].into_iter().enumerate() {
                let f = n.file(n.root(), &format!("f{i}"));
                let mut order = offsets.clone();
                if !upwards {
                    order.reverse();
                }
                for at in order {
                    n.write(f, at, &at.to_be_bytes());
                }
            }
        });
        rig.with(|n| {
            for name in ["f0", "f1"] {
                let f = n.get(n.root(), name).unwrap().ino;
                for at in &offsets {
                    assert_eq!(n.read(f, *at, 8), at.to_be_bytes(), "{name} at {at}");
                }
                for (i, at) in offsets.iter().enumerate().rev() {
                    n.truncate(f, at + 4);
                    assert_eq!(n.read(f, *at, 8), at.to_be_bytes()[..4]);
                    if i > 0 {
                        assert_eq!(n.read(f, offsets[i - 1], 8), offsets[i - 1].to_be_bytes());
                    }
                }
                n.truncate(f, 0);
                assert_eq!(n.attr(f).blocks, b / 512);
            }
            let f = n.file(n.root(), "too big");
            assert_eq!(
                errno(n.fs.write(f, i64::MAX as u64 - 3, b"12345", WriteMode::default())),
                libc::EFBIG
            );
        });
    }
}

/// What lies between two places of a sparse file costs as many steps as the tree has levels and pointers, not one for each block.
#[test]
fn holes_of_exabytes_cost_nothing() {
    let (done_with, all) = std::sync::mpsc::channel();
    let worker = std::thread::spawn(move || {
        for bsize in [512, 4096] {
            Rig::new(bsize, 24).with(|n| {
                let f = n.file(n.root(), "f");
                n.write(f, 0, &[1; 10_000]);
                n.truncate(f, 1 << 58);
                n.write(f, 1 << 59, &[2; 10_000]);
                done(n.fs.fallocate(f, Fallocate::KeepSize, (1 << 59) + (1 << 20), 5000).unwrap());
                n.truncate(f, (1 << 59) + (1 << 21));
                assert_eq!(n.read(f, (1 << 59) - 3, 5), [0, 0, 0, 2, 2]);
                assert_eq!(done(n.fs.lseek(f, 20_000, Seek::Data).unwrap()) >> 20, 1 << 39);
                done(n.fs.fallocate(f, Fallocate::PunchHole, 5000, (1 << 59) - 5000).unwrap());
                assert_eq!(n.read(f, 4999, 2), [1, 0]);
                n.truncate(f, 1 << 40);
                n.truncate(f, 0);
            });
        }
        done_with.send(()).unwrap();
    });
    // A panic of the worker ends the wait too.
    let ended = all.recv_timeout(std::time::Duration::from_secs(60));
    assert_ne!(ended, Err(std::sync::mpsc::RecvTimeoutError::Timeout), "every block of a hole is looked at");
    worker.join().unwrap();
}

#[test]
fn truncates_in_every_direction_keep_the_contents() {
    for (bsize, seed) in [(512, 7), (4096, 8)] {
        eprintln!("seed {seed}");
        let mut rng = Rng::new(seed);
        let rig = Rig::new(bsize, 128);
        rig.with(|n| {
            let f = n.file(n.root(), "f");
            let mut model: Vec<u8> = Vec::new();
            for _ in 0..60 {
                let size = rng.below(6_000_000) as usize;
                n.truncate(f, size as u64);
                model.resize(size, 0);
                let at = rng.below(size as u64 + 1) as usize;
                let bytes = vec![rng.next() as u8; rng.below(2_000_000) as usize];
                if !bytes.is_empty() {
                    n.write(f, at as u64, &bytes);
                    model.resize(model.len().max(at + bytes.len()), 0);
                    model[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                if rng.below(4) == 0 {
                    n.fs.fsync(f, SyncKind::Data).unwrap();
                }
                assert!(n.read(f, 0, model.len() + 1) == model);
            }
        });
    }
}

#[test]
fn a_full_volume_says_so_loses_nothing_and_recovers() {
    for bsize in [1024, 4096] {
        let rig = Rig::new(bsize, 24);
        rig.with(|n| {
            let before = n.fs.statfs().unwrap();
            let keep = n.file(n.root(), "keep");
            n.write(keep, 0, b"precious");
            let mut files = 0;
            let chunk = vec![3u8; 700_000];
            'fill: loop {
                let f = match n.fs.mknod(ME, n.root(), format!("f{files}").as_bytes(), 0o644, NewNode::File) {
                    Ok(held) => done(held).ino,
                    Err(Error::Errno(libc::ENOSPC)) => break,
                    Err(e) => panic!("{e}"),
                };
                files += 1;
                let mut at = 0;
                while at < 2_000_000 {
                    match n.fs.write(f, at, &chunk, WriteMode::default()) {
                        Ok(held) => {
                            let w = done(held);
                            at += w.len as u64;
                            if w.len < chunk.len() {
                                continue;
                            }
                        }
                        Err(Error::Errno(libc::ENOSPC)) => {
                            // until not a single block is left
                            let free = n.fs.statfs().unwrap().free;
                            if free == 0 {
                                break 'fill;
                            }
                            let mut one = 0;
                            while n.fs.write(f, at + one, b"x", WriteMode::default()).is_ok() {
                                one += u64::from(bsize);
                            }
                            break;
                        }
                        Err(e) => panic!("{e}"),
                    }
                }
            }
            assert_eq!(errno(n.fs.mkdir(ME, n.root(), b"no", 0o755)), libc::ENOSPC);
            assert_eq!(errno(n.fs.fallocate(keep, Fallocate::Allocate, 0, 10_000_000)), libc::ENOSPC);
            assert_eq!(n.read(keep, 0, 8), b"precious");
            assert!(n.fs.statfs().unwrap().free < 8, "{:?}", n.fs.statfs().unwrap());
            for i in 0..files {
                done(n.fs.unlink(n.root(), format!("f{i}").as_bytes()).unwrap());
            }
            n.truncate(keep, 8);
            n.fs.reclaim();
            let after = n.fs.statfs().unwrap();
            assert!(before.free - after.free < 20, "{before:?} {after:?}");
            let again = n.file(n.root(), "again");
            n.write(again, 0, &vec![1; 5_000_000]);
        });
    }
}

#[test]
fn space_of_files_just_removed_is_there_at_once() {
    let rig = Rig::new(4096, 24);
    rig.with(|n| {
        for round in 0..5 {
            let f = n.file(n.root(), &format!("f{round}"));
            n.write(f, 0, &vec![round; 11_000_000]);
            done(n.fs.unlink(n.root(), format!("f{round}").as_bytes()).unwrap());
        }
    });
}

#[test]
fn threads_that_do_everything_at_once_leave_a_whole_volume() {
    for bsize in [512, 4096] {
        let rig = Rig::new(bsize, 128);
        rig.with(|n| {
            let shared = n.dir(n.root(), "shared");
            std::thread::scope(|s| {
                for t in 0..6u64 {
                    s.spawn(move || storm(n, shared, t));
                }
            });
            assert!(n.names(shared, 10).len() >= 2);
        });
    }
}

fn storm(n: &Node, shared: InodeNo, t: u64) {
    let mut rng = Rng::new(t + 1);
    let own = n.dir(n.root(), &format!("own{t}"));
    let dirs = [own, shared, n.root()];
    let ok = |what: &str, e: Error| match e {
        Error::Errno(
            libc::ENOENT
            | libc::EEXIST
            | libc::ENOTEMPTY
            | libc::EISDIR
            | libc::ENOTDIR
            | libc::ESTALE
            | libc::EINVAL
            | libc::EPERM,
        ) => {}
        e => panic!("{what}: {e}"),
    };
    for _ in 0..400 {
        let dir = dirs[rng.below(3) as usize];
        let name = format!("n{}", rng.below(30));
        let result = match rng.below(9) {
            0 | 1 => n.fs.mknod(ME, dir, name.as_bytes(), 0o644, NewNode::File).map(|h| {
                let ino = h.value.ino;
                drop(h);
                let _ = n.fs.write(
                    ino,
                    rng.below(50_000),
                    &vec![t as u8; rng.below(30_000) as usize + 1],
                    WriteMode::default(),
                );
            }),
            2 => n.fs.mkdir(ME, dir, name.as_bytes(), 0o755).map(drop),
            3 => n.fs.unlink(dir, name.as_bytes()).map(drop),
            4 => n.fs.rmdir(dir, name.as_bytes()).map(drop),
            5 | 6 => {
                let to = dirs[rng.below(3) as usize];
                let mode = [RenameMode::Replace, RenameMode::Exchange][rng.below(2) as usize];
                n.fs.rename(dir, name.as_bytes(), to, format!("n{}", rng.below(30)).as_bytes(), mode)
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
        if let Err(e) = result {
            ok("storm", e);
        }
    }
}
