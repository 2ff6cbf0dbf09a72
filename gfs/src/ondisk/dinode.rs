//! Dinodes: 232 bytes of attributes, then stuffed data or block pointers.

use super::header::{MetaHeader, MetaType};
use super::{FormatError, i64_at, inum_at, need, put_i64, put_inum, put_u16, put_u32, put_u64};
use super::{u16_at, u32_at, u64_at};
use crate::geometry::Geometry;
use crate::{BlockNo, InodeNo};

pub const DIF_JDATA: u32 = 0x0000_0001;
pub const DIF_EXHASH: u32 = 0x0000_0002;
pub const DIF_EA_INDIRECT: u32 = 0x0000_0008;
pub const DIF_DIRECTIO: u32 = 0x0000_0010;
pub const DIF_IMMUTABLE: u32 = 0x0000_0020;
pub const DIF_APPENDONLY: u32 = 0x0000_0040;
pub const DIF_NOATIME: u32 = 0x0000_0080;
pub const DIF_SYNC: u32 = 0x0000_0100;
pub const DIF_SYSTEM: u32 = 0x0000_0200;
pub const DIF_TOPDIR: u32 = 0x0000_0400;
pub const DIF_TRUNC_IN_PROG: u32 = 0x2000_0000;
pub const DIF_INHERIT_DIRECTIO: u32 = 0x4000_0000;
pub const DIF_INHERIT_JDATA: u32 = 0x8000_0000;

pub const S_IFMT: u32 = 0o170_000;
pub const S_IFIFO: u32 = 0o010_000;
pub const S_IFCHR: u32 = 0o020_000;
pub const S_IFDIR: u32 = 0o040_000;
pub const S_IFBLK: u32 = 0o060_000;
pub const S_IFREG: u32 = 0o100_000;
pub const S_IFLNK: u32 = 0o120_000;
pub const S_IFSOCK: u32 = 0o140_000;

/// Deepest hash table of a directory: 2^17 pointers.
pub const DIR_MAX_DEPTH: u16 = 17;

/// A time on disk: seconds may be negative, nanoseconds always count upwards.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Time {
    pub sec: i64,
    pub nsec: u32,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Dinode {
    /// `mh_jid`, informational.
    pub jid: u32,
    pub num: InodeNo,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    pub size: u64,
    /// All blocks the inode owns, this one included.
    pub blocks: u64,
    pub atime: Time,
    pub mtime: Time,
    pub ctime: Time,
    pub major: u32,
    pub minor: u32,
    pub goal_meta: u64,
    pub goal_data: u64,
    pub generation: u64,
    pub flags: u32,
    pub payload_format: u32,
    pub height: u16,
    pub depth: u16,
    /// Directories: entries, `.` and `..` included.
    pub entries: u32,
    pub eattr: u64,
}

impl Dinode {
    pub const SIZE: usize = 232;

    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        need(b, Self::SIZE, "dinode")?;
        let header = MetaHeader::expect(b, MetaType::Dinode)?;
        let time = |sec, nsec| Time { sec: i64_at(b, sec), nsec: u32_at(b, nsec) };
        Ok(Self {
            jid: header.jid,
            num: inum_at(b, 24),
            mode: u32_at(b, 40),
            uid: u32_at(b, 44),
            gid: u32_at(b, 48),
            nlink: u32_at(b, 52),
            size: u64_at(b, 56),
            blocks: u64_at(b, 64),
            atime: time(72, 176),
            mtime: time(80, 180),
            ctime: time(88, 184),
            major: u32_at(b, 96),
            minor: u32_at(b, 100),
            goal_meta: u64_at(b, 104),
            goal_data: u64_at(b, 112),
            generation: u64_at(b, 120),
            flags: u32_at(b, 128),
            payload_format: u32_at(b, 132),
            height: u16_at(b, 138),
            depth: u16_at(b, 146),
            entries: u32_at(b, 148),
            eattr: u64_at(b, 168),
        })
    }

    /// Decode the dinode that lies at `addr`, and check what every later calculation relies on.
    pub fn decode_at(b: &[u8], geo: &Geometry, addr: BlockNo) -> Result<Self, FormatError> {
        let di = Self::decode(b)?;
        di.validate(geo, addr)?;
        Ok(di)
    }

    /// Own address, height, depth, and sizes of stuffed contents and hash tables.
    pub fn validate(&self, geo: &Geometry, addr: BlockNo) -> Result<(), FormatError> {
        let field = |field, value| Err(FormatError::Field { what: "dinode", field, value });
        if self.num.addr != addr {
            return field("no_addr", self.num.addr.0);
        }
        if u32::from(self.height) > geo.max_height() {
            return field("di_height", self.height.into());
        }
        if self.is_exhash() {
            if !self.is_dir() || self.depth > DIR_MAX_DEPTH {
                return field("di_depth", self.depth.into());
            }
            if self.size != 8u64 << self.depth {
                return field("di_size of a hashed directory", self.size);
            }
        }
        let linear = self.is_dir() && !self.is_exhash();
        if linear && self.height != 0 {
            return field("di_height of a linear directory", self.height.into());
        }
        if self.height == 0 && !linear && self.size > geo.stuffed() as u64 {
            return field("di_size of a stuffed inode", self.size);
        }
        if self.size > i64::MAX as u64 {
            return field("di_size", self.size);
        }
        Ok(())
    }

    /// Writes the first 232 bytes; the payload stays.
    pub fn encode(&self, b: &mut [u8]) {
        b[..Self::SIZE].fill(0);
        MetaHeader { jid: self.jid, ..MetaHeader::new(MetaType::Dinode) }.encode(b);
        put_inum(b, 24, self.num);
        put_u32(b, 40, self.mode);
        put_u32(b, 44, self.uid);
        put_u32(b, 48, self.gid);
        put_u32(b, 52, self.nlink);
        put_u64(b, 56, self.size);
        put_u64(b, 64, self.blocks);
        for (sec, nsec, t) in [(72, 176, self.atime), (80, 180, self.mtime), (88, 184, self.ctime)] {
            put_i64(b, sec, t.sec);
            put_u32(b, nsec, t.nsec);
        }
        put_u32(b, 96, self.major);
        put_u32(b, 100, self.minor);
        put_u64(b, 104, self.goal_meta);
        put_u64(b, 112, self.goal_data);
        put_u64(b, 120, self.generation);
        put_u32(b, 128, self.flags);
        put_u32(b, 132, self.payload_format);
        put_u16(b, 138, self.height);
        put_u16(b, 146, self.depth);
        put_u32(b, 148, self.entries);
        put_u64(b, 168, self.eattr);
    }

    pub fn is_dir(&self) -> bool {
        self.mode & S_IFMT == S_IFDIR
    }
    pub fn is_regular(&self) -> bool {
        self.mode & S_IFMT == S_IFREG
    }
    pub fn is_symlink(&self) -> bool {
        self.mode & S_IFMT == S_IFLNK
    }
    pub fn is_exhash(&self) -> bool {
        self.flags & DIF_EXHASH != 0
    }
    pub fn is_jdata(&self) -> bool {
        self.flags & DIF_JDATA != 0
    }
    pub fn is_system(&self) -> bool {
        self.flags & DIF_SYSTEM != 0
    }
    pub fn is_stuffed(&self) -> bool {
        self.height == 0
    }
    /// `de_type` of a dirent that names this inode.
    pub fn dirent_type(&self) -> u16 {
        ((self.mode & S_IFMT) >> 12) as u16
    }
}
