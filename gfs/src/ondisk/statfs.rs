//! Contents of the `statfs`, `statfs_changeN` and `inum_rangeN` files.

use super::{FormatError, i64_at, need, put_i64, put_u64, u64_at};

/// Totals of the volume, or one node's unsynced deltas.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct StatfsChange {
    pub total: i64,
    pub free: i64,
    pub dinodes: i64,
}

impl StatfsChange {
    pub const SIZE: usize = 24;

    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        need(b, Self::SIZE, "statfs")?;
        Ok(Self { total: i64_at(b, 0), free: i64_at(b, 8), dinodes: i64_at(b, 16) })
    }

    pub fn encode(&self, b: &mut [u8]) {
        put_i64(b, 0, self.total);
        put_i64(b, 8, self.free);
        put_i64(b, 16, self.dinodes);
    }

    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }

    /// Sum; wraps rather than panics, since both sides come from disk.
    pub fn plus(self, other: Self) -> Self {
        Self {
            total: self.total.wrapping_add(other.total),
            free: self.free.wrapping_add(other.free),
            dinodes: self.dinodes.wrapping_add(other.dinodes),
        }
    }
}

/// Legacy allocation range of formal inode numbers; both 0 on current volumes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct InumRange {
    pub start: u64,
    pub length: u64,
}

impl InumRange {
    pub const SIZE: usize = 16;

    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        need(b, Self::SIZE, "inum range")?;
        Ok(Self { start: u64_at(b, 0), length: u64_at(b, 8) })
    }

    pub fn encode(&self, b: &mut [u8]) {
        put_u64(b, 0, self.start);
        put_u64(b, 8, self.length);
    }
}
