//! A mounted volume as the kernel sees it: FUSE sessions, and coherence with what the kernel caches.
//!
//! | file | what |
//! |---|---|
//! | `adapter` | fuser's trait; inline or on a waiting thread |
//! | `access` | may a process open a file that its kernel does not know yet |
//! | `data` | READ, WRITE, byte-range locks |
//! | `listing` | READDIR, READDIRPLUS |
//! | `coherence` | demotions against the kernel's caches; lifetimes |
//! | `traffic` | order of READs and WRITEs on the same pages |
//! | `second_look` | the path walk after an ESTALE finds what it may open |
//! | `size` | the size in the kernel's inode; `size::known`: what is known of it |
//! | `node` `notify` `range` `convert` | per-inode records, raw notifications, page ranges, types |
//!
//! Only this module names fuser's types. Known limits of that crate are told in docs/semantics.md: no interrupts, flock and fcntl
//! cannot be told apart, no syncfs.

mod access;
mod adapter;
mod coherence;
mod convert;
mod data;
mod listing;
mod node;
mod notify;
mod range;
mod second_look;
mod size;
#[cfg(test)]
mod tests;
mod traffic;

pub use coherence::{Coherence, CoherenceStats};

use crate::ops::Fs;
use crate::{Error, Result};
use adapter::{Adapter, Core};
use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};
use notify::Notify;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How the kernel mounts it.
#[derive(Clone, Debug)]
pub struct FuseOptions {
    /// Shown as the device in mount(8).
    pub source: String,
    pub read_only: bool,
    /// Everybody may use it, not only the one who mounts.
    pub allow_other: bool,
    /// Device nodes and setuid programs work; for the superuser only.
    pub dev_suid: bool,
    /// Further options for mount(2), such as `noexec`.
    pub noexec: bool,
    /// Threads that read requests.
    pub threads: usize,
    /// Of sequential readers, in KiB.
    pub read_ahead_kb: u32,
}

impl Default for FuseOptions {
    fn default() -> Self {
        let root = nix::unistd::geteuid().is_root();
        Self {
            source: "gfs".to_owned(),
            read_only: false,
            allow_other: root,
            dev_suid: root,
            noexec: false,
            threads: std::thread::available_parallelism().map_or(2, |n| n.get()).clamp(2, 8),
            read_ahead_kb: 1024,
        }
    }
}

/// A mount that is being served.
pub struct Mounted {
    session: BackgroundSession,
    core: Arc<Core>,
    dir: PathBuf,
}

/// Mounts `fs` at `dir` and serves it on threads of its own.
pub fn mount(fs: Arc<Fs>, dir: &Path, options: &FuseOptions) -> Result<Mounted> {
    mount_adapter(fs, dir, options, |adapter| adapter)
}

fn mount_adapter(
    fs: Arc<Fs>,
    dir: &Path,
    options: &FuseOptions,
    adjust: impl FnOnce(Adapter) -> Adapter,
) -> Result<Mounted> {
    if fs.volume().disk().blocks() > node::MAX_BLOCKS {
        let what = format!("more than {} blocks: their inodes have no numbers here", node::MAX_BLOCKS);
        return Err(Error::Mount(what));
    }
    let glocks = Arc::clone(fs.volume().glocks());
    let kernel = Arc::new(Coherence::new(glocks.is_clustered(), fs.root()));
    glocks.set_kernel_cache(Arc::clone(&kernel) as Arc<dyn crate::glock::KernelCache>);
    let core = Arc::new(Core::new(fs, kernel));
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(options.source.clone()),
        MountOption::Subtype("gfs".to_owned()),
        MountOption::DefaultPermissions,
        if options.read_only { MountOption::RO } else { MountOption::RW },
        if options.dev_suid { MountOption::Dev } else { MountOption::NoDev },
        if options.dev_suid { MountOption::Suid } else { MountOption::NoSuid },
    ];
    if options.noexec {
        config.mount_options.push(MountOption::NoExec);
    }
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(options.threads);
    config.clone_fd = true;
    let failed = |e: std::io::Error| Error::Mount(mount_failure(dir, &e));
    let session = Session::new(adjust(Adapter::new(Arc::clone(&core))), dir, &config).map_err(failed)?;
    let notify = Notify::new(session.as_fd().try_clone_to_owned().map_err(failed)?);
    #[cfg(test)]
    let notify = notify.slowed(Arc::clone(&core.probe.passes));
    core.kernel.connect(notify);
    core.kernel.sizes.mounted_at(dir);
    let session = session.spawn().map_err(failed)?;
    let mounted = Mounted { session, core, dir: dir.to_owned() };
    mounted.set_read_ahead(options.read_ahead_kb);
    Ok(mounted)
}

/// Major and minor number of the file system at `dir`, without a request to its server: one that waits for an answer of its own, for instance until
/// another node gives up a lock, cannot be killed. The thread keeps `/dev/fuse` open, and the kernel keeps the thread for as long as that is open.
fn device(dir: &Path) -> std::io::Result<(u32, u32)> {
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes())?;
    let about = statx(libc::AT_FDCWD, &path, libc::AT_STATX_DONT_SYNC, libc::STATX_TYPE)?;
    Ok((about.stx_dev_major, about.stx_dev_minor))
}

/// statx(2): what stat(2) tells, and whether the file system may answer from what it knows.
fn statx(at: i32, path: &std::ffi::CStr, flags: i32, mask: u32) -> std::io::Result<libc::statx> {
    let mut about = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: a valid C string, and a structure that the kernel fills in.
    let result = unsafe { libc::statx(at, path.as_ptr(), flags, mask, about.as_mut_ptr()) };
    if result != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: all of it are numbers, zeroed before.
    Ok(unsafe { about.assume_init() })
}

/// Why this process cannot serve a mount at all, before anything is touched for one.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Unusable {
    #[error(
        "no usable /dev/fuse on this system ({0}): load the module (modprobe fuse), or give the device to the container"
    )]
    Absent(String),
    #[error("/dev/fuse: {0}: be root, or have root open it to users (chmod 666 /dev/fuse)")]
    Forbidden(String),
    #[error("only root mounts without fusermount3, which is not in the PATH: install it (package fuse3)")]
    NoHelper,
}

/// Looks for what every FUSE mount needs.
pub fn check_system() -> Result<(), Unusable> {
    if let Err(e) = std::fs::File::options().read(true).write(true).open("/dev/fuse") {
        return Err(match e.kind() {
            std::io::ErrorKind::PermissionDenied => Unusable::Forbidden(e.to_string()),
            _ => Unusable::Absent(e.to_string()),
        });
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has_helper = || {
        std::env::split_paths(&path)
            .any(|d| ["fusermount3", "fusermount"].iter().any(|f| d.join(f).is_file()))
    };
    if !nix::unistd::geteuid().is_root() && !has_helper() {
        return Err(Unusable::NoHelper);
    }
    Ok(())
}

fn mount_failure(dir: &Path, error: &std::io::Error) -> String {
    let dir = dir.display();
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            format!(
                "{dir}: not permitted to mount ({error}): be root, or install fusermount3 and own the directory"
            )
        }
        Some(libc::ENOENT) => format!("{dir}: no such directory"),
        Some(libc::ENOTDIR) => format!("{dir}: not a directory"),
        _ => format!("{dir}: cannot mount: {error}"),
    }
}

impl Mounted {
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn fs(&self) -> &Arc<Fs> {
        &self.core.fs
    }

    pub fn coherence(&self) -> &Arc<Coherence> {
        &self.core.kernel
    }

    /// The protocol caps read-ahead at 128 KiB; the device's own setting does not.
    fn set_read_ahead(&self, kb: u32) {
        let Ok((major, minor)) = device(&self.dir) else { return };
        let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
        if let Err(e) = std::fs::write(&path, kb.to_string()) {
            tracing::debug!(%path, err = %e, "read-ahead stays at the kernel's default");
        }
    }

    /// Returns when somebody has unmounted it.
    pub fn wait(self) -> Result<Arc<Fs>> {
        let dir = self.dir.clone();
        let ended = self.session.join();
        self.core.kernel.disconnect();
        ended.map_err(|e| Error::Mount(format!("{}: session ended: {e}", dir.display())))?;
        Ok(self.core.fs.clone())
    }

    /// Unmounts (lazily, when it is busy) and returns when the last user has gone.
    pub fn unmount(self) -> Result<Arc<Fs>> {
        let dir = self.dir.clone();
        let ended = self.session.umount_and_join();
        self.core.kernel.disconnect();
        ended.map_err(|e| Error::Mount(format!("{}: cannot unmount: {e}", dir.display())))?;
        Ok(self.core.fs.clone())
    }
}
