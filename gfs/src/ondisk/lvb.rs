//! Lock value blocks (32 bytes): not on disk, but part of what nodes agree on byte by byte.

use super::header::MAGIC;
use super::{put_u32, put_u64, u32_at, u64_at};

type Lvb = [u8; 32];

/// Copy of a resource group's header, so that an allocator need not read the block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RgrpLvb {
    pub flags: u32,
    pub free: u32,
    pub dinodes: u32,
    pub igeneration: u64,
    /// Blocks in state UNLINKED.
    pub unlinked: u32,
}

impl RgrpLvb {
    pub const SIZE: usize = 32;

    /// `None` when the block holds nothing.
    pub fn decode(b: &Lvb) -> Option<Self> {
        (u32_at(b, 0) == MAGIC).then(|| Self {
            flags: u32_at(b, 4),
            free: u32_at(b, 8),
            dinodes: u32_at(b, 12),
            igeneration: u64_at(b, 16),
            unlinked: u32_at(b, 24),
        })
    }

    pub fn encode(&self) -> Lvb {
        let mut b = [0; 32];
        put_u32(&mut b, 0, MAGIC);
        put_u32(&mut b, 4, self.flags);
        put_u32(&mut b, 8, self.free);
        put_u32(&mut b, 12, self.dinodes);
        put_u64(&mut b, 16, self.igeneration);
        put_u32(&mut b, 24, self.unlinked);
        b
    }
}

/// Highest formal inode number deleted at an address: a smaller or equal one is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct InodeLvb {
    pub generation_deleted: u64,
}

impl InodeLvb {
    pub const SIZE: usize = 32;

    pub fn decode(b: &Lvb) -> Option<Self> {
        (u32_at(b, 0) == MAGIC).then(|| Self { generation_deleted: u64_at(b, 8) })
    }

    pub fn encode(&self) -> Lvb {
        let mut b = [0; 32];
        put_u32(&mut b, 0, MAGIC);
        put_u64(&mut b, 8, self.generation_deleted);
        b
    }
}
