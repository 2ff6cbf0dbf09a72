//! The yardstick: a FUSE file system that hands everything to a directory (on tmpfs), through the same library and with the same
//! caching as a mount of ours on a lone node. What it does not need for the benchmark it does not have.

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const TTL: Duration = Duration::from_secs(3600);

pub(crate) struct Passthrough {
    /// Kernel inode number → path; the numbers are the lower file system's, the root excepted.
    paths: Mutex<HashMap<u64, PathBuf>>,
    files: Mutex<HashMap<u64, Arc<File>>>,
    next: AtomicU64,
}

impl Passthrough {
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            paths: Mutex::new(HashMap::from([(INodeNo::ROOT.0, root.to_owned())])),
            files: Mutex::default(),
            next: AtomicU64::new(1),
        }
    }

    fn path(&self, ino: INodeNo) -> Result<PathBuf, Errno> {
        self.paths.lock().get(&ino.0).cloned().ok_or(Errno::ENOENT)
    }

    fn child(&self, dir: INodeNo, name: &OsStr) -> Result<PathBuf, Errno> {
        Ok(self.path(dir)?.join(name))
    }

    fn file(&self, fh: FileHandle) -> Result<Arc<File>, Errno> {
        self.files.lock().get(&fh.0).cloned().ok_or(Errno::EBADF)
    }

    fn keep(&self, file: File) -> FileHandle {
        let fh = self.next.fetch_add(1, Ordering::Relaxed);
        self.files.lock().insert(fh, Arc::new(file));
        FileHandle(fh)
    }

    fn attr(&self, path: &Path, ino: Option<INodeNo>) -> Result<FileAttr, Errno> {
        let m = fs::symlink_metadata(path).map_err(errno)?;
        let ino = ino.unwrap_or(INodeNo(m.ino() + 1_000_000));
        self.paths.lock().entry(ino.0).or_insert_with(|| path.to_owned());
        let at = |t: io::Result<std::time::SystemTime>| t.unwrap_or(std::time::UNIX_EPOCH);
        Ok(FileAttr {
            ino,
            size: m.size(),
            blocks: m.blocks(),
            atime: at(m.accessed()),
            mtime: at(m.modified()),
            ctime: at(m.modified()),
            crtime: at(m.modified()),
            kind: if m.is_dir() { FileType::Directory } else { FileType::RegularFile },
            perm: (m.permissions().mode() & 0o7777) as u16,
            nlink: m.nlink() as u32,
            uid: m.uid(),
            gid: m.gid(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

fn errno(e: io::Error) -> Errno {
    Errno::from_i32(e.raw_os_error().unwrap_or(libc::EIO))
}

macro_rules! answer {
    ($reply:ident, $result:expr, $ok:expr) => {
        match $result {
            Ok(v) => $ok(v, $reply),
            Err(e) => $reply.error(e),
        }
    };
}

impl Filesystem for Passthrough {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.child(parent, name).and_then(|p| self.attr(&p, None));
        answer!(reply, found, |a: FileAttr, r: ReplyEntry| r.entry(&TTL, &a, Generation(0)));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let found = self.path(ino).and_then(|p| self.attr(&p, Some(ino)));
        answer!(reply, found, |a: FileAttr, r: ReplyAttr| r.attr(&TTL, &a));
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        let made = self.child(parent, name).and_then(|p| {
            fs::create_dir(&p).map_err(errno)?;
            self.attr(&p, None)
        });
        answer!(reply, made, |a: FileAttr, r: ReplyEntry| r.entry(&TTL, &a, Generation(0)));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.child(parent, name).and_then(|p| fs::remove_file(p).map_err(errno));
        answer!(reply, done, |(), r: ReplyEmpty| r.ok());
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.child(parent, name).and_then(|p| fs::remove_dir(p).map_err(errno));
        answer!(reply, done, |(), r: ReplyEmpty| r.ok());
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let made = self.child(parent, name).and_then(|p| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(flags & libc::O_TRUNC != 0)
                .mode(mode)
                .open(&p)
                .map_err(errno)?;
            let attr = self.attr(&p, None)?;
            // A path of an earlier file with this number is no longer true.
            self.paths.lock().insert(attr.ino.0, p);
            Ok((attr, self.keep(file)))
        });
        answer!(reply, made, |(a, fh): (FileAttr, FileHandle), r: ReplyCreate| r.created(
            &TTL,
            &a,
            Generation(0),
            fh,
            FopenFlags::FOPEN_KEEP_CACHE
        ));
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let write = flags.0 & libc::O_ACCMODE != libc::O_RDONLY;
        let opened = self.path(ino).and_then(|p| {
            let file = OpenOptions::new()
                .read(true)
                .write(write)
                .truncate(flags.0 & libc::O_TRUNC != 0)
                .open(p)
                .map_err(errno)?;
            Ok(self.keep(file))
        });
        answer!(reply, opened, |fh: FileHandle, r: ReplyOpen| r.opened(fh, FopenFlags::FOPEN_KEEP_CACHE));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buf = vec![0; size as usize];
        let read = self.file(fh).and_then(|f| f.read_at(&mut buf, offset).map_err(errno));
        answer!(reply, read, |n: usize, r: ReplyData| r.data(&buf[..n]));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = self.file(fh).and_then(|f| f.write_at(data, offset).map_err(errno));
        answer!(reply, written, |n: usize, r: ReplyWrite| r.written(n as u32));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.files.lock().remove(&fh.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}
