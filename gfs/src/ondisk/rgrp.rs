//! Resource group headers. The bitmap begins behind the header and goes on in RB blocks: see [`super::rindex`].

use super::header::{MetaHeader, MetaType};
use super::{FormatError, checksum, need, put_u32, put_u64, u32_at, u64_at};

pub const RGF_JOURNAL: u32 = 0x1;
pub const RGF_METAONLY: u32 = 0x2;
pub const RGF_DATAONLY: u32 = 0x4;
pub const RGF_NOALLOC: u32 = 0x8;
pub const RGF_TRIMMED: u32 = 0x10;
/// Bits that kernels use in memory only.
pub const RGF_IN_MEMORY: u32 = 0xf000_0000;

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rgrp {
    /// `mh_jid`, informational.
    pub jid: u32,
    pub flags: u32,
    /// Blocks in state FREE.
    pub free: u32,
    /// Blocks in state DINODE or UNLINKED.
    pub dinodes: u32,
    /// Blocks to the next group's header, 0 in the last or when unknown. Readers trust the rindex.
    pub skip: u32,
    /// Generation for the next inode allocated here.
    pub igeneration: u64,
    pub data0: u64,
    pub data: u32,
    pub bitbytes: u32,
}

impl Rgrp {
    pub const SIZE: usize = 128;

    /// The checksum is not verified, as kernels do not: see [`Rgrp::verify_crc`].
    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        need(b, Self::SIZE, "resource group header")?;
        let header = MetaHeader::expect(b, MetaType::Rgrp)?;
        Ok(Self {
            jid: header.jid,
            flags: u32_at(b, 24),
            free: u32_at(b, 28),
            dinodes: u32_at(b, 32),
            skip: u32_at(b, 36),
            igeneration: u64_at(b, 40),
            data0: u64_at(b, 48),
            data: u32_at(b, 56),
            bitbytes: u32_at(b, 60),
        })
    }

    /// 0 means "not computed" and is accepted.
    pub fn verify_crc(b: &[u8]) -> Result<(), FormatError> {
        need(b, Self::SIZE, "resource group header")?;
        let (found, computed) = (u32_at(b, 64), checksum::rg_crc(b));
        if found != 0 && found != computed {
            let what = "resource group header";
            return Err(FormatError::Checksum { what, field: "rg_crc", found, computed });
        }
        Ok(())
    }

    /// Writes the first 128 bytes with a fresh checksum; the bitmap stays.
    pub fn encode(&self, b: &mut [u8]) {
        b[..Self::SIZE].fill(0);
        MetaHeader { jid: self.jid, ..MetaHeader::new(MetaType::Rgrp) }.encode(b);
        put_u32(b, 24, self.flags & !RGF_IN_MEMORY);
        put_u32(b, 28, self.free);
        put_u32(b, 32, self.dinodes);
        put_u32(b, 36, self.skip);
        put_u64(b, 40, self.igeneration);
        put_u64(b, 48, self.data0);
        put_u32(b, 56, self.data);
        put_u32(b, 60, self.bitbytes);
        let crc = checksum::rg_crc(b);
        put_u32(b, 64, crc);
    }
}
