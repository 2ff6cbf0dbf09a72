//! A full volume: every operation that needs space answers ENOSPC, changes nothing and stops nothing; what is freed can be used again.

use crate::rig::{ME, Node, Rig, done, errno};
use gfs::InodeNo;
use gfs::ops::{Fallocate, NewNode, RenameMode, SetAttr, WriteMode};

/// Takes every free block: large pieces first, then single blocks.
fn fill(n: &Node, bsize: u32) -> InodeNo {
    let filler = n.file(n.root(), "filler");
    let mut at = 0u64;
    let mut piece = 1u64 << 20;
    while piece >= u64::from(bsize) {
        match n.fs.fallocate(filler, Fallocate::Allocate, at, piece) {
            Ok(_) => at += piece,
            Err(e) => {
                assert_eq!(e.errno(), libc::ENOSPC, "{e}");
                piece /= 2;
            }
        }
    }
    // what is left is less than a block with its indirect blocks takes
    let mut made = 0;
    while n.fs.mknod(ME, n.root(), format!("last{made}").as_bytes(), 0o600, NewNode::File).is_ok() {
        made += 1;
    }
    assert_eq!(n.fs.statfs().unwrap().free, 0);
    filler
}

#[test]
fn every_operation_that_needs_space_says_so_on_a_full_volume() {
    for bsize in [512, 4096] {
        let rig = Rig::new(bsize, 24);
        rig.with(|n| {
            let root = n.root();
            // a directory that is exactly full, and files of every form
            let d = n.dir(root, "d");
            let empty = n.attr(d).blocks;
            let mut entries = 0;
            while n.attr(d).blocks == empty {
                n.file(d, &format!("entry{entries:04}"));
                entries += 1;
            }
            let source = n.file(root, "source");
            n.write(source, 0, b"contents");
            let (stuffed, large) = (n.file(root, "stuffed"), n.file(root, "large"));
            n.write(stuffed, 0, &vec![7; 100]);
            n.write(large, 0, &vec![8; 5 * bsize as usize]);
            let blocks = n.attr(d).blocks;
            fill(n, bsize);
            let full = |what: &str, e: i32| {
                assert_eq!(e, libc::ENOSPC, "{what} with blocks of {bsize}");
                n.fs.volume().check().unwrap_or_else(|e| panic!("{what}: {e}"));
            };
            for round in 0..2 {
                full("mknod", errno(n.fs.mknod(ME, root, b"no", 0o600, NewNode::File)));
                full("create", errno(n.fs.create(ME, root, b"no", 0o600)));
                full("mkdir", errno(n.fs.mkdir(ME, root, b"no", 0o700)));
                full("symlink", errno(n.fs.symlink(ME, root, b"no", b"target")));
                full("device", errno(n.fs.mknod(ME, root, b"no", 0o600, NewNode::Fifo)));
                full("write", errno(n.fs.write(large, 500_000, b"x", WriteMode::default())));
                full(
                    "append",
                    errno(n.fs.write(large, 5 * u64::from(bsize), &vec![1; 9000], WriteMode::default())),
                );
                full(
                    "unstuffing write",
                    errno(n.fs.write(stuffed, 50, &vec![1; bsize as usize], WriteMode::default())),
                );
                full("sparse write", errno(n.fs.write(large, 1 << 40, b"x", WriteMode::default())));
                let grow = SetAttr { size: Some(100_000), ..SetAttr::default() };
                full("truncate up", errno(n.fs.setattr(stuffed, &grow)));
                full("fallocate", errno(n.fs.fallocate(large, Fallocate::Allocate, 0, 1 << 20)));
                full("fallocate keep", errno(n.fs.fallocate(stuffed, Fallocate::KeepSize, 0, 1 << 16)));
                // names go into the directory until it would have to grow
                let mut links = 0;
                let e = loop {
                    match n.fs.link(source, d, format!("link{round}-{links:04}").as_bytes()) {
                        Ok(held) => drop(done(held)),
                        Err(e) => break e.errno(),
                    }
                    links += 1;
                    assert!(links < 2000, "the directory never needs a block");
                };
                full("link", e);
                full(
                    "rename",
                    errno(n.fs.rename(root, b"source", d, b"a new name in a full leaf", RenameMode::Replace)),
                );
                // into a place that is there
                n.write(large, 0, b"overwritten");
                assert_eq!(n.read(source, 0, 100), b"contents");
                assert_eq!(n.read(stuffed, 0, 1000), vec![7; 100]);
                assert_eq!(n.attr(d).blocks, blocks, "nothing was allocated");
                for i in 0..links {
                    done(n.fs.unlink(d, format!("link{round}-{i:04}").as_bytes()).unwrap());
                }
            }
            // freeing needs no space
            done(n.fs.unlink(root, b"filler").unwrap());
            let again = n.file(root, "again");
            n.write(again, 0, &vec![3; 5_000_000]);
            n.truncate(stuffed, 100_000);
            n.dir(root, "no");
            done(n.fs.fallocate(large, Fallocate::Allocate, 0, 1 << 20).unwrap());
            for i in 0..50 {
                n.file(d, &format!("more{i}"));
            }
        });
    }
}
