//! READDIR and READDIRPLUS.
//!
//! Attributes in listings are for lone mounts. Among nodes what the kernel makes of a reply must be in place before the glocks go under which it
//! was written, and for READDIRPLUS nothing says when that is: the reader enters one name after the other when it gets to run, waits for LOOKUPs
//! of the same names in between, and marks names with the epoch of that moment (LOOKUP: with that of the request). A name could so outlive
//! the directory's glock by all of its lifetime, and an inode whose address was used again meanwhile would be taken for the stale one and given up.
//! Without lifetimes every name is looked up again on use, and brings its attributes then: nothing would be gained.
//! (Tried on Linux 6.18: 111 to 173 wrong answers in 5 s of `tests/listing.rs`.) Source: fs/fuse/readdir.c, `fuse_direntplus_link`, Linux 6.16 to 6.18.

use super::adapter::{Adapter, errno};
use super::coherence::LONG;
use super::convert::{file_type, no_attr};
use super::node::number;
use crate::InodeNo;
use crate::ops::Attr;
use fuser::{FileAttr, Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// Names of one READDIR reply at most (the kernel asks again).
const MAX_NAMES: usize = 1024;
/// Bytes of one READDIRPLUS reply for which inodes are read: what the C library asks for. How much the kernel takes is not told to us.
const PLUS_BYTES: usize = 32 << 10;
/// Of these, what each entry takes beside its name (`fuse_direntplus`).
const PLUS_ENTRY: usize = 152;

struct Entry {
    ino: InodeNo,
    next: u64,
    mode: u32,
    name: Vec<u8>,
    attr: Option<Attr>,
}

impl Entry {
    /// What the kernel neither enters nor counts.
    fn is_dots(&self) -> bool {
        matches!(&self.name[..], b"." | b"..")
    }

    /// Its name and number, for an inode whose attributes are not to be had. The reply has one field for the number that is shown and the one that the
    /// kernel makes an inode of, so "no inode" (0) would be shown. A size that no file has keeps the kernel from making one: it sends a FORGET instead.
    fn name_only(&self) -> FileAttr {
        FileAttr { ino: INodeNo(number(self.ino)), kind: file_type(self.mode), size: u64::MAX, ..no_attr() }
    }
}

impl Adapter {
    pub(super) fn serve_readdir(&self, dir: InodeNo, from: u64, reply: ReplyDirectory) {
        self.serve(
            reply,
            move |core| {
                let mut names: Vec<(u64, u64, u32, Vec<u8>)> = Vec::new();
                let held = core.fs.readdir(dir, from, |entry| {
                    names.push((
                        number(entry.ino),
                        entry.next,
                        u32::from(entry.ty) << 12,
                        entry.name.to_vec(),
                    ));
                    names.len() < MAX_NAMES
                })?;
                Ok((held, names))
            },
            |_, mut reply, result| match result {
                Ok((held, names)) => {
                    for (ino, next, mode, name) in names {
                        if reply.add(INodeNo(ino), next, file_type(mode), OsStr::from_bytes(&name)) {
                            break;
                        }
                    }
                    reply.ok();
                    drop(held);
                }
                Err(e) => reply.error(errno(&e)),
            },
        );
    }

    pub(super) fn serve_readdirplus(&self, dir: InodeNo, from: u64, reply: ReplyDirectoryPlus) {
        self.serve(
            reply,
            move |core| {
                let (mut entries, mut bytes) = (Vec::new(), 0);
                let held = core.fs.readdirplus(dir, from, |entry, attr| {
                    let name = entry.name.to_vec();
                    bytes += PLUS_ENTRY + name.len().next_multiple_of(8);
                    let mode = u32::from(entry.ty) << 12;
                    entries.push(Entry { ino: entry.ino, next: entry.next, mode, name, attr: attr.copied() });
                    bytes < PLUS_BYTES
                })?;
                Ok((held, entries))
            },
            |core, mut reply, result| match result {
                Ok((held, entries)) => {
                    for entry in entries {
                        let shown = match &entry.attr {
                            Some(attr) => core.kernel.file_attr(attr, true),
                            None => entry.name_only(),
                        };
                        let (name, generation) =
                            (OsStr::from_bytes(&entry.name), Generation(entry.ino.formal));
                        if reply.add(shown.ino, entry.next, name, &LONG, &shown, generation) {
                            break;
                        }
                        // Also for a name alone: a FORGET will come.
                        if !entry.is_dots() {
                            core.remember(entry.ino);
                        }
                    }
                    reply.ok();
                    drop(held);
                }
                Err(e) => reply.error(errno(&e)),
            },
        );
    }
}
