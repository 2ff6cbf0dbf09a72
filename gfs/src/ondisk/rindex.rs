//! Entries of the resource group index, and where the bits of a group lie.

use super::header::MetaHeader;
use super::rgrp::Rgrp;
use super::{FormatError, need, put_u32, put_u64, u32_at, u64_at};
use crate::geometry::Geometry;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RindexEntry {
    /// Address of the RG block.
    pub addr: u64,
    /// Header blocks: one RG and `length - 1` RB blocks.
    pub length: u32,
    /// First data block.
    pub data0: u64,
    /// Data blocks, a multiple of 4.
    pub data: u32,
    /// Bytes of bitmap: `data / 4`.
    pub bitbytes: u32,
}

/// The piece of a group's bitmap that one of its header blocks holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BitmapPart {
    /// Address of the block.
    pub block: u64,
    /// Where the bits begin in the block, in bytes.
    pub offset: usize,
    /// Length in bytes.
    pub bytes: usize,
    /// Index in the group of the first data block it describes.
    pub first: u32,
}

impl RindexEntry {
    pub const SIZE: usize = 96;

    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        need(b, Self::SIZE, "rindex entry")?;
        Ok(Self {
            addr: u64_at(b, 0),
            length: u32_at(b, 8),
            data0: u64_at(b, 16),
            data: u32_at(b, 24),
            bitbytes: u32_at(b, 28),
        })
    }

    pub fn encode(&self, b: &mut [u8]) {
        b[..Self::SIZE].fill(0);
        put_u64(b, 0, self.addr);
        put_u32(b, 8, self.length);
        put_u64(b, 16, self.data0);
        put_u32(b, 24, self.data);
        put_u32(b, 28, self.bitbytes);
    }

    /// Are the numbers consistent with each other and with a device of `device_blocks`?
    pub fn validate(&self, geo: &Geometry, device_blocks: u64) -> Result<(), FormatError> {
        let field = |field, value| Err(FormatError::Field { what: "rindex entry", field, value });
        if self.length == 0 || self.length > geo.max_rgrp_length() {
            return field("ri_length", self.length.into());
        }
        if self.addr <= geo.sb_block() || self.addr >= device_blocks {
            return field("ri_addr", self.addr);
        }
        if self.data0 != self.addr + u64::from(self.length) {
            return field("ri_data0", self.data0);
        }
        if self.data == 0 || !self.data.is_multiple_of(4) {
            return field("ri_data", self.data.into());
        }
        if self.bitbytes != self.data / 4 {
            return field("ri_bitbytes", self.bitbytes.into());
        }
        let first = geo.block_size as usize - Rgrp::SIZE;
        let room = first + (self.length as usize - 1) * (geo.block_size as usize - MetaHeader::SIZE);
        if self.bitbytes as usize > room {
            return field("ri_bitbytes beyond the header blocks", self.bitbytes.into());
        }
        if self.end() > device_blocks {
            return field("ri_data beyond the device", self.data.into());
        }
        Ok(())
    }

    /// First block behind the group's data.
    pub fn end(&self) -> u64 {
        self.data0.saturating_add(self.data.into())
    }

    /// Is `block` one of the group's data blocks?
    pub fn contains(&self, block: u64) -> bool {
        (self.data0..self.end()).contains(&block)
    }

    /// The pieces of the bitmap, one per header block (those behind the last used byte are empty).
    pub fn parts(&self, geo: &Geometry) -> impl ExactSizeIterator<Item = BitmapPart> + use<> {
        let (entry, geo) = (*self, *geo);
        (0..entry.length).map(move |i| entry.part(&geo, i))
    }

    /// Piece number `i` of the bitmap.
    pub fn part(&self, geo: &Geometry, i: u32) -> BitmapPart {
        let bsize = geo.block_size as usize;
        let (in_rg, in_rb) = (bsize - Rgrp::SIZE, bsize - MetaHeader::SIZE);
        let (offset, before, room) = match i {
            0 => (Rgrp::SIZE, 0, in_rg),
            _ => (MetaHeader::SIZE, in_rg + (i as usize - 1) * in_rb, in_rb),
        };
        let bytes = (self.bitbytes as usize).saturating_sub(before).min(room);
        BitmapPart { block: self.addr + u64::from(i), offset, bytes, first: (before * 4) as u32 }
    }

    /// Which piece holds the bits of data block number `k` of the group, and its index within the piece.
    pub fn locate(&self, geo: &Geometry, k: u32) -> (u32, usize) {
        let (rg, rb) = (geo.blocks_per_rg_block(), geo.blocks_per_rb_block());
        if k < rg { (0, k as usize) } else { (1 + (k - rg) / rb, ((k - rg) % rb) as usize) }
    }
}
