//! Directory entries, and the walk over the records of one block.
//!
//! Records fill their area to the last byte; only the first of a block may be empty; slack after a name belongs to its
//! record. [`Records`] checks all of that as it goes, ends after the first fault, and always makes progress.

use super::{FormatError, inum_at, need, put_inum, put_u16, put_u32, u16_at, u32_at};
use crate::InodeNo;

pub const NAME_MAX: usize = 255;

/// The fixed part of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Dirent {
    pub num: InodeNo,
    pub hash: u32,
    pub rec_len: u16,
    pub name_len: u16,
    /// `mode >> 12`.
    pub ty: u16,
    /// Blocks behind the target's dinode worth reading ahead; a hint.
    pub rahead: u16,
}

/// Least length of a record that holds a name of `name_len` bytes.
pub const fn rec_min(name_len: usize) -> usize {
    (Dirent::SIZE + name_len + 7) & !7
}

impl Dirent {
    pub const SIZE: usize = 40;

    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        need(b, Self::SIZE, "directory entry")?;
        Ok(Self {
            num: inum_at(b, 0),
            hash: u32_at(b, 16),
            rec_len: u16_at(b, 20),
            name_len: u16_at(b, 22),
            ty: u16_at(b, 24),
            rahead: u16_at(b, 26),
        })
    }

    /// Writes the fixed part; the 12 bytes of pad (host-endian cookies of kernels) become zero.
    pub fn encode(&self, b: &mut [u8]) {
        b[..Self::SIZE].fill(0);
        put_inum(b, 0, self.num);
        put_u32(b, 16, self.hash);
        put_u16(b, 20, self.rec_len);
        put_u16(b, 22, self.name_len);
        put_u16(b, 24, self.ty);
        put_u16(b, 26, self.rahead);
    }

    /// An empty record ("sentinel").
    pub fn is_empty(&self) -> bool {
        self.num.addr.0 == 0 || self.num.formal == 0
    }

    /// Bytes of this record that a new record may take.
    pub fn slack(&self) -> usize {
        if self.is_empty() {
            self.rec_len as usize
        } else {
            (self.rec_len as usize).saturating_sub(rec_min(self.name_len as usize))
        }
    }
}

/// One checked record of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record<'a> {
    /// Byte offset in the block.
    pub offset: usize,
    pub head: Dirent,
    /// Empty for an empty record.
    pub name: &'a [u8],
}

/// All records of a block, from `start` (232 in a dinode, 104 in a leaf) to its end, empty ones included.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    block: &'a [u8],
    start: usize,
    next: usize,
}

impl<'a> Records<'a> {
    pub fn new(block: &'a [u8], start: usize) -> Self {
        Self { block, start, next: start }
    }

    fn parse(&self) -> Result<Record<'a>, &'static str> {
        let at = self.next;
        let rest = &self.block[at..];
        let head = Dirent::decode(rest).map_err(|_| "no room for a record before the end of the block")?;
        let (rec_len, name_len) = (head.rec_len as usize, head.name_len as usize);
        if !rec_len.is_multiple_of(8) {
            return Err("record length is not a multiple of 8");
        }
        if rec_len < rec_min(1) {
            return Err("record is too short");
        }
        if rec_len > rest.len() {
            return Err("record reaches past the end of the block");
        }
        if head.is_empty() {
            if at != self.start {
                return Err("empty record is not the first of its block");
            }
            return Ok(Record { offset: at, head, name: &[] });
        }
        if name_len == 0 || name_len > NAME_MAX {
            return Err("name length is not 1 to 255");
        }
        if Dirent::SIZE + name_len > rec_len {
            return Err("name is longer than its record");
        }
        Ok(Record { offset: at, head, name: &rest[Dirent::SIZE..Dirent::SIZE + name_len] })
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.block.len() {
            return None;
        }
        Some(match self.parse() {
            Ok(r) => {
                self.next += r.head.rec_len as usize;
                Ok(r)
            }
            Err(why) => {
                let offset = std::mem::replace(&mut self.next, self.block.len());
                Err(FormatError::Record { what: "directory entry", offset, why })
            }
        })
    }
}

/// Write a used record at `offset`: `head.name_len` follows from `name`, `head.rec_len` must have room for it.
pub fn put_record(block: &mut [u8], offset: usize, mut head: Dirent, name: &[u8]) {
    assert!(!name.is_empty() && name.len() <= NAME_MAX, "name of {} bytes", name.len());
    assert!(rec_min(name.len()) <= head.rec_len as usize, "record too short for its name");
    head.name_len = name.len() as u16;
    head.encode(&mut block[offset..]);
    let from = offset + Dirent::SIZE;
    block[from..from + name.len()].copy_from_slice(name);
}

/// Make the record at `offset` an empty one that was never used.
pub fn put_sentinel(block: &mut [u8], offset: usize, rec_len: u16) {
    Dirent { rec_len, ..Dirent::default() }.encode(&mut block[offset..]);
}

pub fn put_rec_len(block: &mut [u8], offset: usize, rec_len: u16) {
    put_u16(block, offset + 20, rec_len);
}

/// Empty the record at `offset`, keeping its length and name (what a delete does to the first record of a block).
pub fn clear_target(block: &mut [u8], offset: usize) {
    put_inum(block, offset, InodeNo::default());
}

/// Point an existing record at another inode; hash and name stay.
pub fn put_target(block: &mut [u8], offset: usize, num: InodeNo, ty: u16) {
    put_inum(block, offset, num);
    put_u16(block, offset + 24, ty);
}
