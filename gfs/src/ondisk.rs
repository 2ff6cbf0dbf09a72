//! The bytes of GFS2: every structure, and the only place that knows offsets.
//!
//! Everything on disk is big-endian. Each structure has `SIZE`, `decode` and `encode`; `decode` checks the length of the
//! buffer before it looks at a byte, so hostile blocks give a [`FormatError`], never a panic. `encode` writes reserved
//! bytes as zero and recomputes checksums. A decoder does not know where its block lies: [`FormatError::at`] adds the place.
//!
//! Source: `linux/gfs2_ondisk.h` of Linux 6.1 (names), gfs2-utils 3.5 (what mkfs writes).

pub mod bitmap;
pub mod checksum;
pub mod dinode;
pub mod dirent;
pub mod ea;
pub mod header;
pub mod leaf;
pub mod log;
pub mod lvb;
pub mod quota;
pub mod rgrp;
pub mod rindex;
pub mod sb;
pub mod statfs;

use crate::{BlockNo, Error, InodeNo};

/// What is wrong with the bytes of one structure.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    #[error("{what}: {got} bytes, need {need}")]
    Short { what: &'static str, need: usize, got: usize },
    #[error("{what}: magic number is {found:#010x}")]
    Magic { what: &'static str, found: u32 },
    #[error("{what}: block type is {found}, expected {wanted}")]
    Type { what: &'static str, wanted: u32, found: u32 },
    #[error("{what}: {field} is {value}")]
    Field { what: &'static str, field: &'static str, value: u64 },
    #[error("{what}: checksum {field} is {found:#010x}, computed {computed:#010x}")]
    Checksum { what: &'static str, field: &'static str, found: u32, computed: u32 },
    #[error("{what} at byte {offset}: {why}")]
    Record { what: &'static str, offset: usize, why: &'static str },
}

impl FormatError {
    /// The same complaint as an error of the file system about one block.
    pub fn at(&self, block: BlockNo) -> Error {
        Error::Corrupt { block, what: self.to_string() }
    }
}

pub(crate) fn need(buf: &[u8], size: usize, what: &'static str) -> Result<(), FormatError> {
    if buf.len() < size {
        return Err(FormatError::Short { what, need: size, got: buf.len() });
    }
    Ok(())
}

/// Big-endian fields at byte offsets. They panic beyond the end: check the length first.
pub fn u16_at(b: &[u8], o: usize) -> u16 {
    u16::from_be_bytes([b[o], b[o + 1]])
}
pub fn u32_at(b: &[u8], o: usize) -> u32 {
    u32::from_be_bytes([b[o], b[o + 1], b[o + 2], b[o + 3]])
}
pub fn u64_at(b: &[u8], o: usize) -> u64 {
    (u64::from(u32_at(b, o)) << 32) | u64::from(u32_at(b, o + 4))
}
pub fn i64_at(b: &[u8], o: usize) -> i64 {
    u64_at(b, o).cast_signed()
}
pub fn put_u16(b: &mut [u8], o: usize, v: u16) {
    b[o..o + 2].copy_from_slice(&v.to_be_bytes());
}
pub fn put_u32(b: &mut [u8], o: usize, v: u32) {
    b[o..o + 4].copy_from_slice(&v.to_be_bytes());
}
pub fn put_u64(b: &mut [u8], o: usize, v: u64) {
    b[o..o + 8].copy_from_slice(&v.to_be_bytes());
}
pub fn put_i64(b: &mut [u8], o: usize, v: i64) {
    put_u64(b, o, v.cast_unsigned());
}

/// Pointer number `i` of an array of block addresses that begins at byte `base`. 0 is a hole.
/// `base` is [`dinode::Dinode::SIZE`] in a dinode, [`header::MetaHeader::SIZE`] in an indirect block.
pub fn pointer_at(block: &[u8], base: usize, i: usize) -> u64 {
    u64_at(block, base + 8 * i)
}
pub fn put_pointer(block: &mut [u8], base: usize, i: usize, to: u64) {
    put_u64(block, base + 8 * i, to);
}

/// An inode identity as it stands in dirents, dinodes and the superblock (formal number first).
pub fn inum_at(b: &[u8], o: usize) -> InodeNo {
    InodeNo { formal: u64_at(b, o), addr: BlockNo(u64_at(b, o + 8)) }
}
pub fn put_inum(b: &mut [u8], o: usize, n: InodeNo) {
    put_u64(b, o, n.formal);
    put_u64(b, o + 8, n.addr.0);
}

#[cfg(test)]
mod tests;
