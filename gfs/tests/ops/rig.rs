//! A volume in memory, mounted by one node that is alone, with the few words that tests need.

use gfs::lockspace::local::LocalSpace;
use gfs::ops::{Attr, Caller, DirEntry, Fs, FsOptions, Held, SetAttr, WriteMode};
use gfs::volume::{MountOptions, Volume};
use gfs::{Error, InodeNo, Result};
use lun::image::Image;
use lun::mem::MemLun;
use std::process::Command;
use std::sync::Arc;

pub(crate) const ME: Caller = Caller { uid: 1000, gid: 100 };

/// A directory in memory, where there is one: the tools sync what they write, and beside other work a disk takes seconds for that.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("cairn-ops-")
        .tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a temporary directory")
}

/// A fresh volume of one journal.
pub(crate) fn volume_image(bsize: u32, mib: u64) -> Image {
    volume_image_for(bsize, mib, 1)
}

/// A fresh volume for so many nodes.
pub(crate) fn volume_image_for(bsize: u32, mib: u64, nodes: u32) -> Image {
    volume_image_with(bsize, mib, nodes, &[])
}

/// As [`volume_image_for`], with more arguments for `mkfs.gfs2`.
pub(crate) fn volume_image_with(bsize: u32, mib: u64, nodes: u32, more: &[&str]) -> Image {
    let dir = scratch();
    let path = dir.path().join("lun");
    std::fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    let (bsize, nodes) = (bsize.to_string(), nodes.to_string());
    let made = Command::new("mkfs.gfs2")
        .args(["-q", "-O", "-K", "-p", "lock_dlm", "-t", "test:fs", "-J", "8", "-j", &nodes, "-b", &bsize])
        .args(more)
        .arg(&path)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    Image::load(&path).unwrap()
}

/// `fsck.gfs2 -n`: exit code 0, no finding, no dirty journal. Our own checker must be of the same opinion.
pub(crate) fn fsck(image: &Image) {
    let lun: lun::Lun = Arc::new(MemLun::from_image(image.clone(), 512));
    let report = gfs::check::check(&lun).unwrap();
    assert!(report.is_clean(), "{report:#?}");
    let dir = scratch();
    let path = dir.path().join("lun");
    image.save(&path).unwrap();
    let out = Command::new("fsck.gfs2").arg("-n").arg(&path).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    let bad = ["dirty", "corrupt", "bitmap says", "wrong"].iter().any(|w| text.contains(w));
    if !out.status.success() || bad {
        if let Ok(keep) = std::env::var("KEEP_IMAGE") {
            image.save(keep.as_ref()).unwrap();
        }
        panic!("fsck.gfs2: {}\n{text}", out.status);
    }
}

pub(crate) struct Rig {
    pub(crate) lun: MemLun,
}

impl Rig {
    pub(crate) fn new(bsize: u32, mib: u64) -> Self {
        Self { lun: MemLun::from_image(volume_image(bsize, mib), 512) }
    }

    pub(crate) fn mount(&self) -> Node {
        self.mount_with(FsOptions::default(), MountOptions::default())
    }

    pub(crate) fn mount_with(&self, options: FsOptions, mount: MountOptions) -> Node {
        let vol = Volume::mount(Arc::new(self.lun.clone()), LocalSpace::new(), mount).unwrap();
        Node { fs: Fs::new(vol, options) }
    }

    /// Runs `f` on a mount, unmounts, and has the volume checked.
    pub(crate) fn with(&self, f: impl FnOnce(&Node)) {
        let node = self.mount();
        f(&node);
        node.unmount();
        fsck(&self.lun.durable());
    }
}

pub(crate) struct Node {
    pub(crate) fs: Arc<Fs>,
}

pub(crate) fn errno<T: std::fmt::Debug>(result: Result<T>) -> i32 {
    match result {
        Err(Error::Errno(e)) => e,
        other => panic!("an errno was expected, not {other:?}"),
    }
}

/// A value, its glocks dropped.
pub(crate) fn done<T>(held: Held<T>) -> T {
    held.value
}

/// First as a thread that must not wait, then, when that is what it would have to do, as one that may: what the FUSE adapter does.
pub(crate) fn twice<T>(f: impl Fn() -> Result<T>) -> Result<T> {
    match gfs::glock::nowait(&f) {
        Err(Error::WouldBlock) => f(),
        other => other,
    }
}

impl Node {
    pub(crate) fn unmount(self) {
        self.fs.stop().unwrap();
        self.fs.volume().unmount().unwrap();
    }

    pub(crate) fn root(&self) -> InodeNo {
        self.fs.root()
    }

    pub(crate) fn get(&self, dir: InodeNo, name: &str) -> Option<Attr> {
        done(self.fs.lookup(dir, name.as_bytes()).unwrap())
    }

    pub(crate) fn file(&self, dir: InodeNo, name: &str) -> InodeNo {
        done(self.fs.mknod(ME, dir, name.as_bytes(), 0o644, gfs::ops::NewNode::File).unwrap()).ino
    }

    pub(crate) fn dir(&self, dir: InodeNo, name: &str) -> InodeNo {
        done(self.fs.mkdir(ME, dir, name.as_bytes(), 0o755).unwrap()).ino
    }

    pub(crate) fn write(&self, ino: InodeNo, offset: u64, data: &[u8]) {
        let written = done(self.fs.write(ino, offset, data, WriteMode::default()).unwrap());
        assert_eq!((written.offset, written.len), (offset, data.len()));
    }

    pub(crate) fn read(&self, ino: InodeNo, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0xEE; len];
        let n = done(self.fs.read(ino, offset, &mut out, false).unwrap());
        out.truncate(n);
        out
    }

    pub(crate) fn size(&self, ino: InodeNo) -> u64 {
        self.attr(ino).size
    }

    pub(crate) fn attr(&self, ino: InodeNo) -> Attr {
        done(self.fs.getattr(ino).unwrap())
    }

    pub(crate) fn truncate(&self, ino: InodeNo, size: u64) {
        done(self.fs.setattr(ino, &SetAttr { size: Some(size), ..SetAttr::default() }).unwrap());
    }

    pub(crate) fn open(&self, ino: InodeNo) {
        self.fs.open(ino).unwrap();
    }

    /// All names, listed in pieces of `batch`.
    pub(crate) fn names(&self, dir: InodeNo, batch: usize) -> Vec<String> {
        let mut names = Vec::new();
        let mut from = 0;
        loop {
            let mut n = 0;
            done(
                self.fs
                    .readdir(dir, from, |e: &DirEntry<'_>| {
                        if n == batch {
                            return false;
                        }
                        n += 1;
                        from = e.next;
                        names.push(String::from_utf8(e.name.to_vec()).unwrap());
                        true
                    })
                    .unwrap(),
            );
            if n == 0 {
                return names;
            }
        }
    }
}
