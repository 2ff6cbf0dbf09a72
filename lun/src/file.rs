//! Regular files and block devices as LUNs: opening, geometry, locks, and the choice of the engine.
//!
//! Engines (`pool`, `uring`) move bytes; this module checks ranges, brings buffers into
//! aligned memory where O_DIRECT wants it, and names errors. `flush` is fdatasync, which for a block device
//! includes the device's cache flush.

use crate::aligned::{AlignedBuf, is_aligned};
use crate::loops;
use crate::pool::{self, Failed};
use crate::uring::Uring;
use crate::{BlockDevice, LunError, Read, Result, Write, check_range};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Who else may have the LUN open on this host. A lock is advisory, covers the part that was opened, and
/// ends with the handle. Other hosts do not see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Share {
    /// No lock.
    #[default]
    Any,
    /// Together with others that share (mounts).
    Shared,
    /// Alone (mkfs, fsck, a mount without a cluster). A block device must not be in use by the kernel either. A handle that only reads
    /// makes sure that nobody else has the LUN, and keeps writers out from then on.
    Exclusive,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Direct {
    /// Block devices: required. Files: when the file system takes it and its alignment allows the sector.
    #[default]
    Auto,
    /// Never (page cache of this host).
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Engine {
    /// Batched reads by io_uring where the kernel allows it, else by threads. Writes always by threads.
    #[default]
    Auto,
    Uring,
    Threads,
}

/// How to open a LUN.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    pub read_only: bool,
    pub share: Share,
    pub direct: Direct,
    pub engine: Engine,
    /// Sector size to present for a regular file: 512 or 4096. Block devices say theirs.
    pub file_sector: u32,
    /// Side file that gets one line per completed write (see [`crate::logged`]); for tests.
    pub write_log: Option<PathBuf>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            share: Share::Any,
            direct: Direct::Auto,
            engine: Engine::Auto,
            file_sector: 512,
            write_log: None,
        }
    }
}

impl OpenOptions {
    pub fn read_only() -> Self {
        Self { read_only: true, ..Self::default() }
    }

    pub fn share(mut self, share: Share) -> Self {
        self.share = share;
        self
    }
}

pub(crate) struct FileLun {
    name: String,
    file: File,
    /// Of a loop device: its backing file, and where the device begins there. Locked along.
    backing: Option<(File, u64)>,
    size: u64,
    sector: u32,
    direct: bool,
    read_only: bool,
    /// Present when batched reads go through io_uring.
    uring: Option<Uring>,
}

impl FileLun {
    pub(crate) fn open(name: &str, path: &Path, options: &OpenOptions) -> Result<Self> {
        let open_error = |source| LunError::Open { name: name.to_owned(), source };
        let url_error = |reason: String| LunError::Url { name: name.to_owned(), reason };
        let meta = std::fs::metadata(path).map_err(open_error)?;
        let block_device = meta.file_type().is_block_device();
        if !block_device && !meta.is_file() {
            return Err(url_error("neither a regular file nor a block device".to_owned()));
        }
        // O_EXCL on a block device: nobody in the kernel (a mount, a RAID, a partition's mount) may have it. Not for a partition by
        // number: its neighbours may be in use.
        let alone = options.share == Share::Exclusive && !name.contains("#part=");
        let claim = block_device && alone;
        if !block_device && alone && loops::claimed_over(&meta).is_some() {
            return Err(LunError::InUse {
                name: name.to_owned(),
                held: "the kernel has it through a loop device",
            });
        }
        let open = |direct: bool| {
            std::fs::OpenOptions::new()
                .read(true)
                .write(!options.read_only)
                .custom_flags(if direct { libc::O_DIRECT } else { 0 } | if claim { libc::O_EXCL } else { 0 })
                .open(path)
        };
        let open_error = |source: io::Error| match source.raw_os_error() {
            Some(libc::EBUSY) if claim => LunError::InUse {
                name: name.to_owned(),
                held: "the kernel has it: mounted, or part of something",
            },
            _ => open_error(source),
        };
        let (file, direct) = match options.direct {
            Direct::Off => (open(false).map_err(open_error)?, false),
            Direct::Auto => match open(true) {
                Ok(file) => (file, true),
                Err(e) if !block_device && e.raw_os_error() == Some(libc::EINVAL) => {
                    (open(false).map_err(open_error)?, false)
                }
                Err(e) => return Err(open_error(e)),
            },
        };
        let (size, sector) = if block_device {
            block_geometry(&file).map_err(open_error)?
        } else {
            (meta.len(), options.file_sector)
        };
        if !sector.is_power_of_two() || !(512..=4096).contains(&sector) {
            return Err(url_error(format!("sector size {sector} is not supported")));
        }
        let size = size - size % u64::from(sector);
        if size == 0 {
            return Err(url_error("is empty".to_owned()));
        }
        // A file system may want more than our sector for O_DIRECT (a file on a 4Kn disk): use the cache then.
        let (file, direct) = if direct && !block_device && !takes_direct(&file, sector) {
            (open(false).map_err(open_error)?, false)
        } else {
            (file, direct)
        };
        let uring = engine(options.engine).map_err(open_error)?;
        let backing = (block_device && options.share != Share::Any)
            .then(|| loops::backing(meta.rdev()))
            .flatten()
            .and_then(|(path, at)| {
                // One that we may not open, or that has no name any more, cannot be locked.
                let file = std::fs::OpenOptions::new().read(true).write(!options.read_only).open(path);
                Some((file.ok()?, at))
            });
        Ok(Self {
            name: name.to_owned(),
            file,
            backing,
            size,
            sector,
            direct,
            read_only: options.read_only,
            uring,
        })
    }

    /// Locks a byte range against other opens on this host; the lock ends with this handle.
    pub(crate) fn lock(&self, share: Share, start: u64, len: u64) -> Result<()> {
        if let Some((file, at)) = &self.backing {
            self.lock_in(file, share, at + start, len)?;
        }
        self.lock_in(&self.file, share, start, len)
    }

    fn lock_in(&self, file: &File, share: Share, start: u64, len: u64) -> Result<()> {
        let kind = match share {
            Share::Any => return Ok(()),
            Share::Shared => libc::F_RDLCK,
            Share::Exclusive => libc::F_WRLCK,
        };
        let in_use = || {
            let held = match share {
                Share::Exclusive => "we need it alone",
                _ => "which needs it alone",
            };
            Err(LunError::InUse { name: self.name.clone(), held })
        };
        let mut lock = range_lock(kind, start, len);
        if self.read_only && share == Share::Exclusive {
            // A handle that cannot write cannot lock against readers; it can ask whether there are any.
            let mut other = lock;
            // SAFETY: the descriptor is ours and open; the kernel fills the structure.
            if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut other) } != 0 {
                return Err(LunError::Open { name: self.name.clone(), source: io::Error::last_os_error() });
            }
            if libc::c_int::from(other.l_type) != libc::F_UNLCK {
                return in_use();
            }
            lock = range_lock(libc::F_RDLCK, start, len);
        }
        // SAFETY: the descriptor is ours and open; the kernel only reads the structure.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) {
            return in_use();
        }
        Err(LunError::Open { name: self.name.clone(), source: e })
    }

    fn move_in(&self, batch: &mut [Read<'_>]) -> Result<(), Failed> {
        let fd = self.file.as_raw_fd();
        match &self.uring {
            Some(uring) if batch.len() > 1 => uring.read_all(fd, batch),
            _ => pool::read_all(fd, batch, self.direct),
        }
    }

    fn io_error(&self, op: &'static str, f: Failed) -> LunError {
        LunError::Io { name: self.name.clone(), op, offset: f.offset, len: f.len as u64, source: f.source }
    }
}

fn range_lock(kind: libc::c_int, start: u64, len: u64) -> libc::flock {
    // SAFETY: `flock` is plain data; zero is a valid value of every field.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start as libc::off_t;
    lock.l_len = len as libc::off_t;
    lock
}

/// Size in bytes and logical sector of a block device.
fn block_geometry(file: &File) -> io::Result<(u64, u32)> {
    let mut sector: libc::c_int = 0;
    // SAFETY: BLKSSZGET stores one int.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut sector) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // BLKGETSIZE64 = _IOR(0x12, 114, size_t); libc has no name for it on every target.
    nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
    let mut size: u64 = 0;
    // SAFETY: BLKGETSIZE64 stores one u64.
    unsafe { blkgetsize64(file.as_raw_fd(), &raw mut size) }?;
    Ok((size, sector as u32))
}

fn takes_direct(file: &File, sector: u32) -> bool {
    let mut buf = AlignedBuf::zeroed(sector as usize);
    // SAFETY: the buffer is valid for its length.
    let n = unsafe { libc::pread(file.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), 0) };
    n == buf.len() as isize
}

/// Whether this process may use io_uring.
#[cfg(test)]
pub(crate) fn uring_allowed() -> bool {
    Uring::new().is_ok()
}

fn engine(wish: Engine) -> io::Result<Option<Uring>> {
    match wish {
        Engine::Threads => Ok(None),
        Engine::Uring => Uring::new().map(Some),
        Engine::Auto => match Uring::new() {
            Ok(uring) => Ok(Some(uring)),
            Err(e) => {
                tracing::debug!(err = %e, "io_uring is not available, using threads");
                Ok(None)
            }
        },
    }
}

impl BlockDevice for FileLun {
    fn sector_size(&self) -> u32 {
        self.sector
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn read_batch(&self, batch: &mut [Read<'_>]) -> Result<()> {
        for r in batch.iter() {
            check_range(self, "read", r.offset, r.buf.len())?;
        }
        if !self.direct || batch.iter().all(|r| is_aligned(r.buf)) {
            return self.move_in(batch).map_err(|f| self.io_error("read", f));
        }
        let mut copies: Vec<AlignedBuf> = batch.iter().map(|r| AlignedBuf::zeroed(r.buf.len())).collect();
        let mut inner: Vec<Read<'_>> =
            copies.iter_mut().zip(batch.iter()).map(|(c, r)| Read { offset: r.offset, buf: c }).collect();
        self.move_in(&mut inner).map_err(|f| self.io_error("read", f))?;
        for (r, c) in batch.iter_mut().zip(&copies) {
            r.buf.copy_from_slice(c);
        }
        Ok(())
    }

    fn write_batch(&self, batch: &[Write<'_>]) -> Result<()> {
        for w in batch {
            check_range(self, "write", w.offset, w.buf.len())?;
        }
        if self.read_only {
            if let Some(w) = batch.first() {
                let source = io::Error::from_raw_os_error(libc::EROFS);
                return Err(self.io_error("write", Failed { offset: w.offset, len: w.buf.len(), source }));
            }
            return Ok(());
        }
        let fd = self.file.as_raw_fd();
        let copies: Vec<Option<AlignedBuf>> = batch
            .iter()
            .map(|w| (self.direct && !is_aligned(w.buf)).then(|| AlignedBuf::copy_of(w.buf)))
            .collect();
        let inner: Vec<Write<'_>> = batch
            .iter()
            .zip(&copies)
            .map(|(w, c)| Write { offset: w.offset, buf: c.as_deref().unwrap_or(w.buf) })
            .collect();
        pool::write_all(fd, &inner, self.direct).map_err(|f| self.io_error("write", f))
    }

    fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        pool::fdatasync(self.file.as_raw_fd())
            .map_err(|source| LunError::Flush { name: self.name.clone(), source })
    }
}

#[cfg(test)]
mod tests;
