//! What journals are made of: log headers, log descriptors and revoke continuation blocks.

use super::header::{MetaHeader, MetaType};
use super::{FormatError, checksum, i64_at, need, put_i64, put_u32, put_u64, u32_at, u64_at};
use crate::geometry::Geometry;

/// The log is clean as of this header.
pub const LHF_UNMOUNT: u32 = 0x0000_0001;
pub const LHF_FLUSH_NORMAL: u32 = 0x0000_0002;
pub const LHF_FLUSH_SYNC: u32 = 0x0000_0004;
pub const LHF_FLUSH_SHUTDOWN: u32 = 0x0000_0008;
pub const LHF_FLUSH_FREEZE: u32 = 0x0000_0010;
pub const LHF_RECOVERY: u32 = 0x0000_0020;
pub const LHF_USERSPACE: u32 = 0x8000_0000;
/// Who asked for the flush; informational.
pub const LHC_SHUTDOWN: u32 = 0x0000_0100;
pub const LHC_JDATA: u32 = 0x0000_0200;
pub const LHC_SET_FLAGS: u32 = 0x0000_0400;
pub const LHC_AIL_EMPTY_GL: u32 = 0x0000_0800;
pub const LHC_AIL_FLUSH: u32 = 0x0000_1000;
pub const LHC_RGRP_GO_SYNC: u32 = 0x0000_2000;
pub const LHC_INODE_GO_SYNC: u32 = 0x0000_4000;
pub const LHC_INODE_GO_INVAL: u32 = 0x0000_8000;
pub const LHC_FREEZE: u32 = 0x0001_0000;
pub const LHC_KILL_SB: u32 = 0x0002_0000;
pub const LHC_DO_SYNC: u32 = 0x0004_0000;
pub const LHC_INPLACE_RESERVE: u32 = 0x0008_0000;
pub const LHC_WRITE_INODE: u32 = 0x0010_0000;
pub const LHC_MAKE_FS_RO: u32 = 0x0020_0000;
pub const LHC_SYNC_FS: u32 = 0x0040_0000;
pub const LHC_EVICT_INODE: u32 = 0x0080_0000;
pub const LHC_TRANS_END: u32 = 0x0100_0000;
pub const LHC_LOGD_JFLUSH_REQD: u32 = 0x0200_0000;
pub const LHC_LOGD_AIL_FLUSH_REQD: u32 = 0x0400_0000;

/// Descriptor kinds.
pub const LD_METADATA: u32 = 300;
pub const LD_REVOKE: u32 = 301;
pub const LD_JDATA: u32 = 302;

/// A log header: the commit mark of a flush. It is the only log block with checksums.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LogHeader {
    /// `mh_jid`: journal of the node that wrote it.
    pub jid: u32,
    pub sequence: u64,
    pub flags: u32,
    /// Journal block where the oldest live transaction begins.
    pub tail: u32,
    /// Journal block of this header.
    pub blkno: u32,
    pub nsec: u32,
    pub sec: i64,
    /// Absolute address of this header.
    pub addr: u64,
    /// Address of the journal's dinode.
    pub jinode: u64,
    pub statfs_addr: u64,
    pub quota_addr: u64,
    /// The writer's unsynced statfs deltas as of this flush.
    pub local_total: i64,
    pub local_free: i64,
    pub local_dinodes: i64,
}

impl LogHeader {
    pub const SIZE: usize = 120;

    /// `b` is the whole block: the second checksum reaches to its end. A zero `lh_crc` marks a header of version 1.
    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "log header";
        need(b, Self::SIZE, WHAT)?;
        let header = MetaHeader::expect(b, MetaType::LogHeader)?;
        let (found, computed) = (u32_at(b, 44), checksum::lh_hash(b));
        if found != computed {
            return Err(FormatError::Checksum { what: WHAT, field: "lh_hash", found, computed });
        }
        let found = u32_at(b, 48);
        if found != 0 {
            let computed = checksum::lh_crc(b);
            if found != computed {
                return Err(FormatError::Checksum { what: WHAT, field: "lh_crc", found, computed });
            }
        }
        Ok(Self {
            jid: header.jid,
            sequence: u64_at(b, 24),
            flags: u32_at(b, 32),
            tail: u32_at(b, 36),
            blkno: u32_at(b, 40),
            nsec: u32_at(b, 52),
            sec: i64_at(b, 56),
            addr: u64_at(b, 64),
            jinode: u64_at(b, 72),
            statfs_addr: u64_at(b, 80),
            quota_addr: u64_at(b, 88),
            local_total: i64_at(b, 96),
            local_free: i64_at(b, 104),
            local_dinodes: i64_at(b, 112),
        })
    }

    /// A header that is valid at journal block `at`.
    pub fn decode_at(b: &[u8], at: u32) -> Result<Self, FormatError> {
        let h = Self::decode(b)?;
        if h.blkno != at {
            return Err(FormatError::Field { what: "log header", field: "lh_blkno", value: h.blkno.into() });
        }
        Ok(h)
    }

    /// Fills the whole block and both checksums.
    pub fn encode(&self, b: &mut [u8]) {
        b.fill(0);
        MetaHeader { jid: self.jid, ..MetaHeader::new(MetaType::LogHeader) }.encode(b);
        put_u64(b, 24, self.sequence);
        put_u32(b, 32, self.flags);
        put_u32(b, 36, self.tail);
        put_u32(b, 40, self.blkno);
        let hash = checksum::lh_hash(b);
        put_u32(b, 44, hash);
        put_u32(b, 52, self.nsec);
        put_i64(b, 56, self.sec);
        put_u64(b, 64, self.addr);
        put_u64(b, 72, self.jinode);
        put_u64(b, 80, self.statfs_addr);
        put_u64(b, 88, self.quota_addr);
        put_i64(b, 96, self.local_total);
        put_i64(b, 104, self.local_free);
        put_i64(b, 112, self.local_dinodes);
        let crc = checksum::lh_crc(b);
        put_u32(b, 48, crc);
    }

    pub fn is_clean(&self) -> bool {
        self.flags & LHF_UNMOUNT != 0
    }
}

/// Head of a chunk of log blocks. Entries follow from byte 72.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogDescriptor {
    /// One of `LD_METADATA`, `LD_REVOKE`, `LD_JDATA`.
    pub kind: u32,
    /// Log blocks of the chunk, this one included.
    pub length: u32,
    /// Copied blocks, or revoked addresses.
    pub count: u32,
}

impl LogDescriptor {
    pub const SIZE: usize = 72;

    /// Checks kind, length and count against each other and against the block size: a decoded descriptor never has
    /// more entries than its blocks hold.
    pub fn decode(b: &[u8], geo: &Geometry) -> Result<Self, FormatError> {
        const WHAT: &str = "log descriptor";
        need(b, geo.block_size as usize, WHAT)?;
        MetaHeader::expect(b, MetaType::LogDescriptor)?;
        let d = Self { kind: u32_at(b, 24), length: u32_at(b, 28), count: u32_at(b, 32) };
        let field = |field, value: u32| Err(FormatError::Field { what: WHAT, field, value: value.into() });
        if d.length == 0 {
            return field("ld_length", d.length);
        }
        let room = match d.kind {
            LD_METADATA => geo.ldptrs() as u64,
            LD_JDATA => geo.ldptrs() as u64 / 2,
            LD_REVOKE => geo.ldptrs() as u64 + u64::from(d.length - 1) * geo.inptrs() as u64,
            other => return field("ld_type", other),
        };
        if u64::from(d.count) > room {
            return field("ld_data1", d.count);
        }
        if d.kind != LD_REVOKE && d.count != d.length - 1 {
            return field("ld_data1", d.count);
        }
        Ok(d)
    }

    /// Writes the first 72 bytes; `mh_jid` is always 0 here.
    pub fn encode(&self, b: &mut [u8]) {
        b[..Self::SIZE].fill(0);
        MetaHeader::new(MetaType::LogDescriptor).encode(b);
        put_u32(b, 24, self.kind);
        put_u32(b, 28, self.length);
        put_u32(b, 32, self.count);
    }

    /// Entry `i` of a metadata or (first block of a) revoke descriptor.
    pub fn address(b: &[u8], i: usize) -> u64 {
        u64_at(b, Self::SIZE + 8 * i)
    }

    /// Entry `i` of a journaled-data descriptor: address, and whether the copy's magic number was escaped.
    pub fn jdata(b: &[u8], i: usize) -> (u64, bool) {
        (u64_at(b, Self::SIZE + 16 * i), u64_at(b, Self::SIZE + 16 * i + 8) != 0)
    }
}
