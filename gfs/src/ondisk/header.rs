//! The 24-byte header with which every metadata block begins.

use super::{FormatError, need, put_u32, put_u64, u32_at};

pub const MAGIC: u32 = 0x0116_1970;

/// Formats that appear inside other fields.
pub const FORMAT_RINDEX: u32 = 1100;
pub const FORMAT_DIRENT: u32 = 1200;
pub const FORMAT_QUOTA: u32 = 1500;

/// Kind of a metadata block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
#[repr(u32)]
pub enum MetaType {
    Superblock = 1,
    Rgrp = 2,
    RgrpBitmap = 3,
    Dinode = 4,
    Indirect = 5,
    Leaf = 6,
    /// Block of a directory's hash table.
    JournaledData = 7,
    LogHeader = 8,
    LogDescriptor = 9,
    ExtAttr = 10,
    ExtAttrData = 11,
    /// Continuation of a revoke list.
    LogBlock = 12,
    QuotaChange = 14,
}

impl MetaType {
    pub fn from_u32(v: u32) -> Option<Self> {
        Some(match v {
            1 => Self::Superblock,
            2 => Self::Rgrp,
            3 => Self::RgrpBitmap,
            4 => Self::Dinode,
            5 => Self::Indirect,
            6 => Self::Leaf,
            7 => Self::JournaledData,
            8 => Self::LogHeader,
            9 => Self::LogDescriptor,
            10 => Self::ExtAttr,
            11 => Self::ExtAttrData,
            12 => Self::LogBlock,
            14 => Self::QuotaChange,
            _ => return None,
        })
    }

    /// `mh_format` that belongs to the type.
    pub fn format(self) -> u32 {
        match self {
            Self::ExtAttr => 1600,
            Self::ExtAttrData => 1700,
            Self::LogBlock => 1000,
            Self::QuotaChange => 1400,
            other => other as u32 * 100,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Superblock => "superblock",
            Self::Rgrp => "resource group header",
            Self::RgrpBitmap => "resource group bitmap block",
            Self::Dinode => "dinode",
            Self::Indirect => "indirect block",
            Self::Leaf => "directory leaf",
            Self::JournaledData => "hash table block",
            Self::LogHeader => "log header",
            Self::LogDescriptor => "log descriptor",
            Self::ExtAttr => "extended attribute block",
            Self::ExtAttrData => "extended attribute data block",
            Self::LogBlock => "log continuation block",
            Self::QuotaChange => "quota change block",
        }
    }
}

/// `mh_jid` tells which node logged the block last; informational, so readers keep it and nobody checks it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MetaHeader {
    pub ty: MetaType,
    pub format: u32,
    pub jid: u32,
}

impl MetaHeader {
    pub const SIZE: usize = 24;

    pub fn new(ty: MetaType) -> Self {
        Self { ty, format: ty.format(), jid: 0 }
    }

    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "metadata header";
        need(b, Self::SIZE, WHAT)?;
        if !has_magic(b) {
            return Err(FormatError::Magic { what: WHAT, found: u32_at(b, 0) });
        }
        let raw = u32_at(b, 4);
        let ty = MetaType::from_u32(raw).ok_or(FormatError::Field {
            what: WHAT,
            field: "mh_type",
            value: raw.into(),
        })?;
        Ok(Self { ty, format: u32_at(b, 16), jid: u32_at(b, 20) })
    }

    /// The header, which must be of type `ty`.
    pub fn expect(b: &[u8], ty: MetaType) -> Result<Self, FormatError> {
        need(b, Self::SIZE, ty.name())?;
        if !has_magic(b) {
            return Err(FormatError::Magic { what: ty.name(), found: u32_at(b, 0) });
        }
        if u32_at(b, 4) != ty as u32 {
            return Err(FormatError::Type { what: ty.name(), wanted: ty as u32, found: u32_at(b, 4) });
        }
        Ok(Self { ty, format: u32_at(b, 16), jid: u32_at(b, 20) })
    }

    pub fn encode(&self, b: &mut [u8]) {
        put_u32(b, 0, MAGIC);
        put_u32(b, 4, self.ty as u32);
        put_u64(b, 8, 0);
        put_u32(b, 16, self.format);
        put_u32(b, 20, self.jid);
    }
}

/// Does the block begin with the magic number? (False for a block shorter than that.)
pub fn has_magic(b: &[u8]) -> bool {
    b.len() >= 4 && u32_at(b, 0) == MAGIC
}

/// What the log does to the header of a block copy: the writer's journal id in, the pad cleared.
pub fn stamp_for_log(b: &mut [u8], jid: u32) {
    put_u64(b, 8, 0);
    put_u32(b, 20, jid);
}
