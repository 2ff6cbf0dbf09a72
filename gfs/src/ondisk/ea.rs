//! Extended attribute records, and the walk over the records of one EA block.
//!
//! Records fill the block from byte 24 to its end; the last carries `EA_LAST`. [`EaRecords`] checks lengths, names and
//! pointer arrays as it goes and always makes progress.

use super::header::MetaHeader;
use super::{FormatError, need, put_u32, u32_at, u64_at};

pub const EA_LAST: u8 = 0x01;
pub const EATYPE_UNUSED: u8 = 0;
pub const EATYPE_USR: u8 = 1;
pub const EATYPE_SYS: u8 = 2;
pub const EATYPE_SECURITY: u8 = 3;
/// Format 1802 only.
pub const EATYPE_TRUSTED: u8 = 4;
pub const EA_MAX_DATA: u32 = 65536;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EaHead {
    pub rec_len: u32,
    pub data_len: u32,
    pub name_len: u8,
    pub ty: u8,
    pub flags: u8,
    /// 0: the value stands inline; else the number of ED blocks.
    pub num_ptrs: u8,
}

const fn align8(n: usize) -> usize {
    (n + 7) & !7
}

impl EaHead {
    pub const SIZE: usize = 16;

    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        need(b, Self::SIZE, "extended attribute")?;
        Ok(Self {
            rec_len: u32_at(b, 0),
            data_len: u32_at(b, 4),
            name_len: b[8],
            ty: b[9],
            flags: b[10],
            num_ptrs: b[11],
        })
    }

    pub fn encode(&self, b: &mut [u8]) {
        put_u32(b, 0, self.rec_len);
        put_u32(b, 4, self.data_len);
        b[8] = self.name_len;
        b[9] = self.ty;
        b[10] = self.flags;
        b[11] = self.num_ptrs;
        put_u32(b, 12, 0);
    }

    pub fn is_last(&self) -> bool {
        self.flags & EA_LAST != 0
    }
    pub fn is_unused(&self) -> bool {
        self.ty == EATYPE_UNUSED
    }
    /// Where the value (inline) or the pointers begin, counted from the record.
    pub fn body(&self) -> usize {
        match self.num_ptrs {
            0 => Self::SIZE + self.name_len as usize,
            _ => Self::SIZE + align8(self.name_len as usize),
        }
    }
    /// Bytes the record needs for what it holds.
    pub fn used(&self) -> usize {
        match self.num_ptrs {
            0 => inline_size(self.name_len as usize, self.data_len as usize),
            n => unstuffed_size(self.name_len as usize, n as usize),
        }
    }
}

/// Record size of an attribute whose value stands inline.
pub const fn inline_size(name_len: usize, data_len: usize) -> usize {
    align8(EaHead::SIZE + name_len + data_len)
}

/// Record size of an attribute whose value lies in `ptrs` ED blocks.
pub const fn unstuffed_size(name_len: usize, ptrs: usize) -> usize {
    align8(EaHead::SIZE + name_len + 8 * ptrs)
}

/// One checked record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EaRecord<'a> {
    pub offset: usize,
    pub head: EaHead,
    pub name: &'a [u8],
    /// The inline value, or the pointer array as bytes; empty for an unused record.
    pub body: &'a [u8],
}

impl EaRecord<'_> {
    /// Addresses of the ED blocks; empty for an inline value.
    pub fn pointers(&self) -> impl ExactSizeIterator<Item = u64> {
        let n = if self.head.is_unused() { 0 } else { self.head.num_ptrs as usize };
        (0..n).map(|i| u64_at(self.body, 8 * i))
    }
}

#[derive(Clone, Debug)]
pub struct EaRecords<'a> {
    block: &'a [u8],
    next: usize,
}

impl<'a> EaRecords<'a> {
    /// `block` is a whole EA block whose header has been checked.
    pub fn new(block: &'a [u8]) -> Self {
        Self { block, next: MetaHeader::SIZE }
    }

    fn parse(&self) -> Result<EaRecord<'a>, &'static str> {
        let at = self.next;
        let rest = &self.block[at..];
        let head = EaHead::decode(rest).map_err(|_| "no room for a record before the end of the block")?;
        let rec_len = head.rec_len as usize;
        if rec_len < EaHead::SIZE || !rec_len.is_multiple_of(8) {
            return Err("record length is too small or not a multiple of 8");
        }
        if rec_len > rest.len() {
            return Err("record reaches past the end of the block");
        }
        if head.is_last() != (rec_len == rest.len()) {
            return Err("the last-record flag and the end of the block do not agree");
        }
        if head.is_unused() {
            return Ok(EaRecord { offset: at, head, name: &[], body: &[] });
        }
        if head.ty > EATYPE_TRUSTED {
            return Err("unknown attribute type");
        }
        if head.name_len == 0 {
            return Err("attribute without a name");
        }
        if head.data_len > EA_MAX_DATA {
            return Err("value is longer than 65536 bytes");
        }
        let (from, len) = match head.num_ptrs {
            0 => (head.body(), head.data_len as usize),
            n => (head.body(), 8 * n as usize),
        };
        if from + len > rec_len {
            return Err("name and value are longer than their record");
        }
        let room = (self.block.len() - MetaHeader::SIZE) * head.num_ptrs as usize;
        if head.num_ptrs != 0 && room < head.data_len as usize {
            return Err("too few data blocks for the value");
        }
        let name = &rest[EaHead::SIZE..EaHead::SIZE + head.name_len as usize];
        Ok(EaRecord { offset: at, head, name, body: &rest[from..from + len] })
    }
}

impl<'a> Iterator for EaRecords<'a> {
    type Item = Result<EaRecord<'a>, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.block.len() {
            return None;
        }
        Some(match self.parse() {
            Ok(r) => {
                self.next += r.head.rec_len as usize;
                Ok(r)
            }
            Err(why) => {
                let offset = std::mem::replace(&mut self.next, self.block.len());
                Err(FormatError::Record { what: "extended attribute", offset, why })
            }
        })
    }
}
