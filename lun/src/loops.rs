//! Loop devices: the same blocks under two names, the device's and its backing file's. Who opens one of them must see who has the other.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

fn backing_file(dir: &Path) -> Option<PathBuf> {
    let text = std::fs::read_to_string(dir.join("backing_file")).ok()?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

/// Backing file of the loop device with this device number, and where in it the device begins.
pub(crate) fn backing(rdev: u64) -> Option<(PathBuf, u64)> {
    let dir = format!("/sys/dev/block/{}:{}/loop", libc::major(rdev), libc::minor(rdev));
    let offset = std::fs::read_to_string(format!("{dir}/offset")).ok()?;
    Some((backing_file(Path::new(&dir))?, offset.trim().parse().ok()?))
}

/// A loop device over this file that somebody in the kernel has (a mount, a partition's mount, a RAID).
pub(crate) fn claimed_over(file: &Metadata) -> Option<PathBuf> {
    let entries = std::fs::read_dir("/sys/block").ok()?;
    let over = |dir: &Path| {
        backing_file(&dir.join("loop"))
            .and_then(|path| path.metadata().ok())
            .is_some_and(|m| (m.dev(), m.ino()) == (file.dev(), file.ino()))
    };
    let devices =
        entries.flatten().filter(|e| over(&e.path())).map(|e| Path::new("/dev").join(e.file_name()));
    devices.into_iter().find(|device| is_claimed(device))
}

fn is_claimed(device: &Path) -> bool {
    let claim = File::options().read(true).custom_flags(libc::O_EXCL).open(device);
    claim.is_err_and(|e: io::Error| e.raw_os_error() == Some(libc::EBUSY))
}
