//! One of everything.

use crate::rig::{ME, Rig, done, errno};
use gfs::ops::{Fallocate, NewNode, RenameMode, Seek, SetAttr, SyncKind, WriteMode};
use gfs::volume::inode_glock;
use lun::mem::What;

const SIZES: [u32; 3] = [512, 1024, 4096];

#[test]
fn a_volume_mounted_and_left_alone_is_clean() {
    for bsize in SIZES {
        Rig::new(bsize, 32).with(|n| {
            assert_eq!(
                n.names(n.root(), 10),
                ["..", "."].map(String::from).into_iter().rev().collect::<Vec<_>>()
            );
        });
    }
}

#[test]
fn files_keep_what_is_written_to_them() {
    for bsize in SIZES {
        let rig = Rig::new(bsize, 32);
        let data: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        rig.with(|n| {
            let small = n.file(n.root(), "small");
            n.write(small, 0, b"hello");
            n.write(small, 10, b"world");
            assert_eq!(n.read(small, 0, 100), b"hello\0\0\0\0\0world");
            let big = n.file(n.root(), "big");
            n.write(big, 0, &data);
            assert_eq!(n.read(big, 0, data.len() + 10), data);
            n.write(big, 1000, b"patch");
            assert_eq!(n.read(big, 998, 9), [&data[998..1000], b"patch", &data[1005..1007]].concat());
            let grown = n.file(n.root(), "grown");
            for i in 0..200u32 {
                n.write(grown, u64::from(i) * 37, &data[..37]);
            }
            assert_eq!(n.size(grown), 200 * 37);
        });
        rig.with(|n| {
            let big = n.get(n.root(), "big").unwrap().ino;
            assert_eq!(n.read(big, 2000, data.len()), &data[2000..]);
            assert_eq!(n.read(big, 998, 9), [&data[998..1000], b"patch", &data[1005..1007]].concat());
            let grown = n.get(n.root(), "grown").unwrap().ino;
            assert_eq!(n.read(grown, 37 * 150, 37), &data[..37]);
        });
    }
}

#[test]
fn names_of_every_kind_come_and_go() {
    for bsize in SIZES {
        let rig = Rig::new(bsize, 32);
        rig.with(|n| {
            let root = n.root();
            let d = n.dir(root, "d");
            assert_eq!(n.attr(root).nlink, 3);
            let link = done(n.fs.symlink(ME, d, b"link", b"/some/where").unwrap());
            assert_eq!(done(n.fs.readlink(link.ino).unwrap()), b"/some/where");
            let dev = NewNode::CharDevice { major: 4, minor: 65 };
            assert_eq!(done(n.fs.mknod(ME, d, b"tty", 0o600, dev).unwrap()).rdev, (4, 65));
            done(n.fs.mknod(ME, d, b"fifo", 0o600, NewNode::Fifo).unwrap());
            done(n.fs.mknod(ME, d, b"sock", 0o600, NewNode::Socket).unwrap());
            let f = n.file(d, "f");
            assert_eq!(done(n.fs.link(f, root, b"also").unwrap()).nlink, 2);
            assert_eq!(errno(n.fs.link(d, root, b"x")), libc::EPERM);
            assert_eq!(errno(n.fs.rmdir(root, b"d")), libc::ENOTEMPTY);
            assert_eq!(errno(n.fs.unlink(root, b"d")), libc::EISDIR);
            assert_eq!(errno(n.fs.rmdir(d, b"f")), libc::ENOTDIR);
            assert_eq!(errno(n.fs.unlink(d, b"nope")), libc::ENOENT);
            assert_eq!(errno(n.fs.mkdir(ME, root, b"d", 0o755)), libc::EEXIST);
            assert_eq!(errno(n.fs.mkdir(ME, f, b"d", 0o755)), libc::ENOTDIR);
            assert_eq!(
                errno(n.fs.symlink(ME, d, b"l", &vec![b'x'; bsize as usize - 232])),
                libc::ENAMETOOLONG
            );
            done(n.fs.symlink(ME, d, b"l", &vec![b'x'; bsize as usize - 233]).unwrap());
            assert_eq!(errno(n.fs.mkdir(ME, root, &[b'n'; 256], 0o755)), libc::ENAMETOOLONG);
            done(n.fs.rename(d, b"f", root, b"moved", RenameMode::Replace).unwrap());
            assert_eq!(n.get(d, "f"), None);
            assert_eq!(n.get(root, "moved").unwrap().ino, f);
            for name in ["link", "tty", "fifo", "sock", "l"] {
                done(n.fs.unlink(d, name.as_bytes()).unwrap());
            }
            done(n.fs.rmdir(root, b"d").unwrap());
            assert_eq!(n.attr(root).nlink, 2);
            assert_eq!(n.names(root, 1).len(), 4);
        });
        rig.with(|n| assert_eq!(n.get(n.root(), "also").unwrap().nlink, 2));
    }
}

#[test]
fn space_comes_back_when_files_go() {
    for bsize in SIZES {
        let rig = Rig::new(bsize, 32);
        rig.with(|n| {
            let before = n.fs.statfs().unwrap();
            for i in 0..20 {
                let f = n.file(n.root(), &format!("f{i}"));
                n.write(f, i * 1000, &vec![7; 100_000]);
            }
            let d = n.dir(n.root(), "d");
            for i in 0..100 {
                n.file(d, &format!("name{i}"));
            }
            assert!(n.fs.statfs().unwrap().free < before.free - 20 * (100_000 / u64::from(bsize)));
            for i in 0..100 {
                done(n.fs.unlink(d, format!("name{i}").as_bytes()).unwrap());
            }
            done(n.fs.rmdir(n.root(), b"d").unwrap());
            for i in 0..20 {
                done(n.fs.unlink(n.root(), format!("f{i}").as_bytes()).unwrap());
            }
            n.fs.reclaim();
            let after = n.fs.statfs().unwrap();
            // the root directory has become hashed at small block sizes and stays so
            let kept = n.attr(n.root()).blocks * 512 / u64::from(bsize) - 1;
            assert_eq!(
                (after.free + kept, after.files - after.free),
                (before.free, before.files - before.free)
            );
        });
    }
}

#[test]
fn sizes_holes_and_seeks() {
    for bsize in SIZES {
        let b = u64::from(bsize);
        let rig = Rig::new(bsize, 32);
        rig.with(|n| {
            let f = n.file(n.root(), "f");
            n.write(f, 100 * b, b"x");
            assert_eq!(n.size(f), 100 * b + 1);
            assert_eq!(
                n.read(f, 99 * b, 2 * bsize as usize),
                [vec![0; bsize as usize], b"x".to_vec()].concat()
            );
            assert_eq!(done(n.fs.lseek(f, 0, Seek::Data).unwrap()), 100 * b);
            assert_eq!(done(n.fs.lseek(f, 0, Seek::Hole).unwrap()), 0);
            assert_eq!(done(n.fs.lseek(f, 100 * b, Seek::Hole).unwrap()), 100 * b + 1);
            assert_eq!(errno(n.fs.lseek(f, 101 * b, Seek::Data)), libc::ENXIO);
            n.truncate(f, 1 << 40);
            n.write(f, (1 << 40) - 3, b"end");
            n.truncate(f, 100 * b + 1);
            n.truncate(f, 200 * b);
            assert_eq!(n.read(f, 100 * b, 10), b"x\0\0\0\0\0\0\0\0\0");
            done(n.fs.fallocate(f, Fallocate::Allocate, 0, 50 * b).unwrap());
            assert_eq!(done(n.fs.lseek(f, 0, Seek::Hole).unwrap()), 50 * b);
            assert_eq!(n.read(f, 0, bsize as usize), vec![0; bsize as usize]);
            n.write(f, 0, &vec![9; 10 * bsize as usize]);
            done(n.fs.fallocate(f, Fallocate::PunchHole, b / 2, 3 * b).unwrap());
            let mut want = vec![9; 10 * bsize as usize];
            want[bsize as usize / 2..bsize as usize * 7 / 2].fill(0);
            assert_eq!(n.read(f, 0, 10 * bsize as usize), want);
            assert_eq!(done(n.fs.lseek(f, 0, Seek::Hole).unwrap()), b);
            done(n.fs.fallocate(f, Fallocate::KeepSize, 300 * b, 5 * b).unwrap());
            assert_eq!(n.size(f), 200 * b);
            n.truncate(f, 0);
            assert_eq!((n.size(f), n.attr(f).blocks), (0, b / 512));
        });
    }
}

#[test]
fn attributes_change_as_posix_says() {
    Rig::new(4096, 32).with(|n| {
        let root = n.root();
        let f = done(n.fs.mknod(ME, root, b"f", 0o6755, NewNode::File).unwrap());
        assert_eq!((f.mode & 0o7777, f.uid, f.gid), (0o6755, ME.uid, ME.gid));
        let f = f.ino;
        let set = |s: SetAttr| done(n.fs.setattr(f, &s).unwrap());
        let after = set(SetAttr { uid: Some(5), ..SetAttr::default() });
        assert_eq!((after.mode & 0o7777, after.uid), (0o755, 5));
        set(SetAttr { mode: Some(0o6755), ..SetAttr::default() });
        done(n.fs.write(f, 0, b"x", WriteMode { kill_priv: true, ..WriteMode::default() }).unwrap());
        assert_eq!(n.attr(f).mode & 0o7777, 0o755);
        let d = n.dir(root, "d");
        done(n.fs.setattr(d, &SetAttr { mode: Some(0o2775), gid: Some(77), ..SetAttr::default() }).unwrap());
        let sub = done(n.fs.mkdir(ME, d, b"sub", 0o755).unwrap());
        assert_eq!((sub.mode & 0o7777, sub.gid), (0o2755, 77));
        assert_eq!(done(n.fs.mknod(ME, d, b"g", 0o644, NewNode::File).unwrap()).gid, 77);
        assert_eq!(errno(n.fs.setattr(d, &SetAttr { size: Some(0), ..SetAttr::default() })), libc::EISDIR);
        done(
            n.fs.write(f, 0, b"abc", WriteMode { append: true, sync: true, ..WriteMode::default() }).unwrap(),
        );
        assert_eq!(n.read(f, 0, 10), b"xabc");
        n.fs.fsync(f, SyncKind::All).unwrap();
        n.fs.syncfs().unwrap();
    });
}

#[test]
fn an_open_file_lives_without_a_name() {
    for bsize in SIZES {
        Rig::new(bsize, 32).with(|n| {
            let f = n.file(n.root(), "f");
            n.open(f);
            n.write(f, 0, &vec![5; 50_000]);
            done(n.fs.unlink(n.root(), b"f").unwrap());
            n.fs.reclaim();
            assert_eq!(n.attr(f).nlink, 0);
            n.write(f, 50_000, b"more");
            assert_eq!(n.read(f, 49_999, 10), b"\x05more");
            let before = n.fs.statfs().unwrap();
            n.fs.release(f);
            n.fs.reclaim();
            assert!(n.fs.statfs().unwrap().free > before.free);
            assert_eq!(errno(n.fs.getattr(f)), libc::ESTALE);
            // known to the kernel, but not open
            let g = n.file(n.root(), "g");
            n.fs.remember(g, 1);
            done(n.fs.unlink(n.root(), b"g").unwrap());
            n.fs.reclaim();
            assert_eq!(n.attr(g).nlink, 0);
            n.fs.forget(g, 1);
            n.fs.reclaim();
            assert_eq!(errno(n.fs.getattr(g)), libc::ESTALE);
        });
    }
}

/// A lock that is given up makes what it covers durable in its place, which takes two flushes of the device and a header however little it is. What is in
/// the log for others goes along: where another node looks at one file after the other, most have nothing left to write.
#[test]
fn locks_given_up_one_after_the_other_share_their_flushes() {
    let rig = Rig::new(4096, 64);
    rig.with(|n| {
        let files: Vec<_> = (0..200).map(|i| n.file(n.root(), &format!("f{i}"))).collect();
        let vol = n.fs.volume();
        let flushes = |f: gfs::InodeNo| {
            let before = rig.lun.log_len();
            vol.sync_glock(&vol.glocks().get(inode_glock(f.addr))).unwrap();
            rig.lun.log_since(before).iter().filter(|e| e.what == What::Flush).count()
        };
        assert!(flushes(files[0]) >= 2);
        let rest: usize = files[1..].iter().map(|f| flushes(*f)).sum();
        assert_eq!(rest, 0, "flushes for the rest");
    });
}
