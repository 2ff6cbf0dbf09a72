//! Leaf blocks of hashed directories: a 104-byte header, then dirents.

use super::header::{FORMAT_DIRENT, MetaHeader, MetaType};
use super::{FormatError, i64_at, need, put_i64, put_u16, put_u32, put_u64, u16_at, u32_at, u64_at};

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Leaf {
    /// `mh_jid`, informational.
    pub jid: u32,
    /// Number of hash bits that all names of the leaf share.
    pub depth: u16,
    /// Used records in this block.
    pub entries: u16,
    /// Next block of the chain, 0 at its end.
    pub next: u64,
    /// Address of the directory; informational.
    pub inode: u64,
    /// Position in the chain from 1; 0 from mkfs.
    pub dist: u32,
    pub nsec: u32,
    pub sec: i64,
}

impl Leaf {
    pub const SIZE: usize = 104;

    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        need(b, Self::SIZE, "directory leaf")?;
        let header = MetaHeader::expect(b, MetaType::Leaf)?;
        Ok(Self {
            jid: header.jid,
            depth: u16_at(b, 24),
            entries: u16_at(b, 26),
            next: u64_at(b, 32),
            inode: u64_at(b, 40),
            dist: u32_at(b, 48),
            nsec: u32_at(b, 52),
            sec: i64_at(b, 56),
        })
    }

    /// Writes the header; the records stay.
    pub fn encode(&self, b: &mut [u8]) {
        b[..Self::SIZE].fill(0);
        MetaHeader { jid: self.jid, ..MetaHeader::new(MetaType::Leaf) }.encode(b);
        put_u16(b, 24, self.depth);
        put_u16(b, 26, self.entries);
        put_u32(b, 28, FORMAT_DIRENT);
        put_u64(b, 32, self.next);
        put_u64(b, 40, self.inode);
        put_u32(b, 48, self.dist);
        put_u32(b, 52, self.nsec);
        put_i64(b, 56, self.sec);
    }
}
