//! Quota file entries and slots of quota_change files.

use super::{FormatError, i64_at, need, put_i64, put_u32, put_u64, u32_at, u64_at};

/// Entry of the quota file at byte `88 * (2 * id + is_group)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct QuotaEntry {
    /// Blocks; 0 means none.
    pub limit: u64,
    pub warn: u64,
    pub value: u64,
}

impl QuotaEntry {
    pub const SIZE: usize = 88;

    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        need(b, Self::SIZE, "quota entry")?;
        Ok(Self { limit: u64_at(b, 0), warn: u64_at(b, 8), value: u64_at(b, 16) })
    }

    pub fn encode(&self, b: &mut [u8]) {
        b[..Self::SIZE].fill(0);
        put_u64(b, 0, self.limit);
        put_u64(b, 8, self.warn);
        put_u64(b, 16, self.value);
    }
}

/// Slot of a quota_change block; free when `change` is 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct QuotaChange {
    pub change: i64,
    /// Bit 0: a user, else a group.
    pub flags: u32,
    pub id: u32,
}

impl QuotaChange {
    pub const SIZE: usize = 16;

    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        need(b, Self::SIZE, "quota change slot")?;
        Ok(Self { change: i64_at(b, 0), flags: u32_at(b, 8), id: u32_at(b, 12) })
    }

    pub fn encode(&self, b: &mut [u8]) {
        put_i64(b, 0, self.change);
        put_u32(b, 8, self.flags);
        put_u32(b, 12, self.id);
    }
}
