//! Between fuser's types and those of `ops`.

use super::coherence::Coherence;
use super::node::number;
use crate::ondisk::dinode::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK};
use crate::ops::{Attr, NewNode, SetTime, Time};
use fuser::{FileAttr, FileType, Generation, INodeNo, TimeOrNow};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const NANOS: u32 = 1_000_000_000;

pub(super) fn file_type(mode: u32) -> FileType {
    match mode & S_IFMT {
        S_IFDIR => FileType::Directory,
        S_IFLNK => FileType::Symlink,
        S_IFIFO => FileType::NamedPipe,
        S_IFSOCK => FileType::Socket,
        S_IFCHR => FileType::CharDevice,
        S_IFBLK => FileType::BlockDevice,
        _ => FileType::RegularFile,
    }
}

fn system_time(time: Time) -> SystemTime {
    let whole = if time.sec >= 0 {
        UNIX_EPOCH.checked_add(Duration::from_secs(time.sec.unsigned_abs()))
    } else {
        UNIX_EPOCH.checked_sub(Duration::from_secs(time.sec.unsigned_abs()))
    };
    // What the disk says may be beyond any calendar.
    whole
        .and_then(|t| t.checked_add(Duration::from_nanos(time.nsec.min(NANOS - 1).into())))
        .unwrap_or(UNIX_EPOCH)
}

/// A time that the kernel sends, as fuser 0.18 hands it on: before 1970 it takes the fraction, which counts up, for one that counts down.
pub(super) fn asked_time(time: SystemTime) -> Time {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Time { sec: after.as_secs().cast_signed(), nsec: after.subsec_nanos() },
        Err(before) => {
            let before = before.duration();
            Time { sec: -before.as_secs().cast_signed(), nsec: before.subsec_nanos() }
        }
    }
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(at) => SetTime::At(asked_time(at)),
    }
}

/// The kernel's 32-bit device number: minor in bits 0–7 and 20–31, major in 8–19.
fn encode_device((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn decode_device(device: u32) -> (u32, u32) {
    ((device & 0xf_ff00) >> 8, (device & 0xff) | ((device >> 12) & 0xf_ff00))
}

/// What mknod(2) is asked to make; `None` for types it does not make.
pub(super) fn new_node(mode: u32, device: u32) -> Option<NewNode<'static>> {
    let (major, minor) = decode_device(device);
    match mode & S_IFMT {
        S_IFREG | 0 => Some(NewNode::File),
        S_IFIFO => Some(NewNode::Fifo),
        S_IFSOCK => Some(NewNode::Socket),
        S_IFCHR => Some(NewNode::CharDevice { major, minor }),
        S_IFBLK => Some(NewNode::BlockDevice { major, minor }),
        _ => None,
    }
}

impl Coherence {
    /// Attributes for a reply that gives the inode its node id (`entry`), or for one that only shows its number.
    pub(super) fn file_attr(&self, attr: &Attr, entry: bool) -> FileAttr {
        FileAttr {
            ino: INodeNo(if entry { self.nodes.id(attr.ino) } else { number(attr.ino) }),
            size: attr.size,
            blocks: attr.blocks,
            atime: system_time(attr.atime),
            mtime: system_time(attr.mtime),
            ctime: system_time(attr.ctime),
            crtime: UNIX_EPOCH,
            kind: file_type(attr.mode),
            perm: (attr.mode & 0o7777) as u16,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            rdev: encode_device(attr.rdev),
            blksize: attr.block_size,
            flags: 0,
        }
    }
}

/// Node id 0: "no such name", with a lifetime.
pub(super) fn no_attr() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

pub(super) fn generation(attr: &Attr) -> Generation {
    Generation(attr.ino.formal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_survive_both_ways() {
        for device in [(0, 0), (8, 1), (259, 1_048_575), (4095, 255)] {
            assert_eq!(decode_device(encode_device(device)), device);
        }
    }
}
