//! The superblock, always at byte 65536.

use super::header::{MetaHeader, MetaType};
use super::{FormatError, inum_at, need, put_inum, put_u32, u32_at};
use crate::InodeNo;

/// Byte address of the superblock on every volume.
pub const SB_OFFSET: u64 = 65536;
pub const FORMAT_1801: u32 = 1801;
pub const FORMAT_1802: u32 = 1802;
pub const MULTIHOST_FORMAT: u32 = 1900;
pub const BLOCK_SIZE_MIN: u32 = 512;
/// The kernel's limit is the CPU page size.
pub const BLOCK_SIZE_MAX: u32 = 4096;
/// Room of the lock protocol and lock table fields, with one NUL.
pub const LOCKNAME_LEN: usize = 64;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    pub fs_format: u32,
    pub block_size: u32,
    pub master: InodeNo,
    pub root: InodeNo,
    /// `lock_nolock` or `lock_dlm`.
    pub lock_proto: String,
    /// `cluster:fsname`, or empty.
    pub lock_table: String,
    pub uuid: [u8; 16],
}

fn text(b: &[u8], field: &'static str) -> Result<String, FormatError> {
    let end = b.iter().position(|&c| c == 0).unwrap_or(b.len());
    match std::str::from_utf8(&b[..end]) {
        Ok(s) => Ok(s.to_owned()),
        Err(e) => Err(FormatError::Field { what: "superblock", field, value: e.valid_up_to() as u64 }),
    }
}

impl Superblock {
    pub const SIZE: usize = 272;

    /// Everything that makes a kernel refuse the mount is refused here.
    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "superblock";
        need(b, Self::SIZE, WHAT)?;
        MetaHeader::expect(b, MetaType::Superblock)?;
        let field = |field, value: u32| Err(FormatError::Field { what: WHAT, field, value: value.into() });
        let fs_format = u32_at(b, 24);
        if !(FORMAT_1801..=FORMAT_1802).contains(&fs_format) {
            return field("sb_fs_format", fs_format);
        }
        if u32_at(b, 28) != MULTIHOST_FORMAT {
            return field("sb_multihost_format", u32_at(b, 28));
        }
        let block_size = u32_at(b, 36);
        if !block_size.is_power_of_two() || !(BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&block_size) {
            return field("sb_bsize", block_size);
        }
        if u32_at(b, 40) != block_size.trailing_zeros() {
            return field("sb_bsize_shift", u32_at(b, 40));
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&b[256..272]);
        Ok(Self {
            fs_format,
            block_size,
            master: inum_at(b, 48),
            root: inum_at(b, 80),
            lock_proto: text(&b[96..160], "sb_lockproto")?,
            lock_table: text(&b[160..224], "sb_locktable")?,
            uuid,
        })
    }

    /// Writes the first 272 bytes. Lock names longer than 63 bytes are a caller's mistake and are cut.
    pub fn encode(&self, b: &mut [u8]) {
        b[..Self::SIZE].fill(0);
        MetaHeader::new(MetaType::Superblock).encode(b);
        put_u32(b, 24, self.fs_format);
        put_u32(b, 28, MULTIHOST_FORMAT);
        put_u32(b, 36, self.block_size);
        put_u32(b, 40, self.block_size.trailing_zeros());
        put_inum(b, 48, self.master);
        put_inum(b, 80, self.root);
        for (at, name) in [(96, &self.lock_proto), (160, &self.lock_table)] {
            let n = name.len().min(LOCKNAME_LEN - 1);
            b[at..at + n].copy_from_slice(&name.as_bytes()[..n]);
        }
        b[256..272].copy_from_slice(&self.uuid);
    }

    /// The file system part of the lock table: name of the DLM lock space.
    pub fn fs_name(&self) -> &str {
        self.lock_table.split_once(':').map_or(self.lock_table.as_str(), |(_, fs)| fs)
    }
}
