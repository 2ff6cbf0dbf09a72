//! Label and status blocks as mkqdisk and qdiskd of Red Hat Cluster Suite wrote them.
//! Source: on-disk description in `qdisk(5)`, `disk.h` of cman (layout facts).

use super::{be16, be32, be64, le32, le64, put};

const HEADER: usize = 32;
const HEADER_MAGIC: u32 = 0x00DE_BB1E;
pub const LABEL_MAGIC: u32 = 0xEB7A_62C2;
/// Label of the older clumanager, recognised in lists only.
pub const LABEL_MAGIC_OLD: u32 = 0x3911_9FCD;
/// "v2": the sector size is recorded.
const LABEL_VERSION: u32 = 0x389F_ABC4;
const LABEL_SIZE: usize = 272;
pub const STATUS_MAGIC: u32 = 0x47BA_CEF8;
const STATUS_SIZE: usize = 80;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClassicError {
    #[error("{0} bytes are too short")]
    Short(usize),
    #[error("header magic {0:#010x}")]
    HeaderMagic(u32),
    #[error("bad CRC32 of the header")]
    HeaderCrc,
    #[error("payload of {0} bytes")]
    Length(u32),
    #[error("bad CRC32 of the payload")]
    DataCrc,
    #[error("magic {0:#010x}")]
    Magic(u32),
    #[error("state {0}")]
    State(u8),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    pub magic: u32,
    /// Seconds since 1970.
    pub created: u64,
    pub host: String,
    pub label: String,
    /// Sector size when the label was written.
    pub block_size: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum NodeState {
    #[default]
    None,
    Evicted,
    Initializing,
    Running,
    Master,
    Exit,
}

impl NodeState {
    fn from_byte(b: u8) -> Option<Self> {
        Some(match b {
            0 => Self::None,
            1 => Self::Evicted,
            2 => Self::Initializing,
            5 => Self::Running,
            6 => Self::Master,
            7 => Self::Exit,
            _ => return None,
        })
    }

    pub const fn to_byte(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Evicted => 1,
            Self::Initializing => 2,
            Self::Running => 5,
            Self::Master => 6,
            Self::Exit => 7,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Evicted => "Evicted",
            Self::Initializing => "Initializing",
            Self::Running => "Running",
            Self::Master => "Master",
            Self::Exit => "Exit",
        }
    }
}

/// Election message of the historic protocol; mirrored for old tools, never obeyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Message {
    /// 0 none, 1 BID, 2 ACK, 3 NACK.
    pub kind: u16,
    pub seq: u16,
    pub arg: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct StatusBlock {
    /// Last writer; another than the node itself means that somebody evicted it.
    pub update_node: u32,
    /// Seconds since 1970 (whole: that is why it is not our sign of life).
    pub timestamp: u64,
    pub node: u32,
    pub state: NodeState,
    pub flags: u16,
    pub score: u16,
    pub score_max: u16,
    /// Average and last cycle: seconds, microseconds.
    pub average: (u32, u32),
    pub last: (u32, u32),
    pub incarnation: u64,
    pub message: Message,
    /// Nodes that I see: bit n-1.
    pub mask: u64,
    /// Nodes that the master lets count the votes.
    pub master_mask: u64,
}

/// Fills `out` (one sector) with header, payload and zeros.
fn frame(out: &mut [u8], payload: &[u8], timestamp: u64) {
    out.fill(0);
    put(out, 0, &HEADER_MAGIC.to_le_bytes());
    put(out, 8, &crc32fast::hash(payload).to_le_bytes());
    put(out, 12, &(payload.len() as u32).to_le_bytes());
    put(out, 24, &timestamp.to_le_bytes());
    let crc = crc32fast::hash(&out[..HEADER]);
    put(out, 4, &crc.to_le_bytes());
    put(out, HEADER, payload);
}

/// The payload of exactly `size` bytes, and the header's time.
fn unframe(sector: &[u8], size: usize) -> Result<(&[u8], u64), ClassicError> {
    if sector.len() < HEADER + size {
        return Err(ClassicError::Short(sector.len()));
    }
    let magic = le32(sector, 0);
    if magic != HEADER_MAGIC {
        return Err(ClassicError::HeaderMagic(magic));
    }
    let mut header = [0u8; HEADER];
    header.copy_from_slice(&sector[..HEADER]);
    put(&mut header, 4, &[0; 4]);
    if crc32fast::hash(&header) != le32(sector, 4) {
        return Err(ClassicError::HeaderCrc);
    }
    let length = le32(sector, 12);
    if length as usize != size {
        return Err(ClassicError::Length(length));
    }
    let payload = &sector[HEADER..HEADER + size];
    if crc32fast::hash(payload) != le32(sector, 8) {
        return Err(ClassicError::DataCrc);
    }
    Ok((payload, le64(sector, 24)))
}

fn text(b: &[u8]) -> String {
    let end = b.iter().position(|&c| c == 0).unwrap_or(b.len());
    String::from_utf8_lossy(&b[..end]).into_owned()
}

/// At most `room - 1` bytes, cut at a character.
fn put_text(b: &mut [u8], at: usize, room: usize, s: &str) {
    let mut end = s.len().min(room - 1);
    while !s.is_char_boundary(end) {
        end -= 1;
    }
    put(b, at, &s.as_bytes()[..end]);
}

/// `out`: one sector, at least 512 bytes. Host and label are cut to 127 and 119 bytes.
pub fn encode_label(label: &Label, out: &mut [u8]) {
    let mut p = [0u8; LABEL_SIZE];
    put(&mut p, 0, &label.magic.to_be_bytes());
    put(&mut p, 4, &LABEL_VERSION.to_be_bytes());
    put(&mut p, 8, &label.created.to_be_bytes());
    put_text(&mut p, 16, 128, &label.host);
    put_text(&mut p, 144, 120, &label.label);
    put(&mut p, 264, &label.block_size.to_be_bytes());
    frame(out, &p, label.created);
}

pub fn decode_label(sector: &[u8]) -> Result<Label, ClassicError> {
    let (p, _) = unframe(sector, LABEL_SIZE)?;
    let magic = be32(p, 0);
    if magic != LABEL_MAGIC && magic != LABEL_MAGIC_OLD {
        return Err(ClassicError::Magic(magic));
    }
    // The first version did not record the size: 512 was the only one.
    let block_size = if be32(p, 4) == LABEL_VERSION { be32(p, 264) } else { 512 };
    Ok(Label { magic, created: be64(p, 8), host: text(&p[16..144]), label: text(&p[144..264]), block_size })
}

pub fn encode_status(s: &StatusBlock, out: &mut [u8]) {
    let mut p = [0u8; STATUS_SIZE];
    put(&mut p, 0, &STATUS_MAGIC.to_be_bytes());
    put(&mut p, 4, &s.update_node.to_be_bytes());
    put(&mut p, 8, &s.timestamp.to_be_bytes());
    put(&mut p, 16, &s.node.to_be_bytes());
    p[24] = s.state.to_byte();
    put(&mut p, 26, &s.flags.to_be_bytes());
    put(&mut p, 28, &s.score.to_be_bytes());
    put(&mut p, 30, &s.score_max.to_be_bytes());
    for (at, v) in [(32, s.average.0), (36, s.average.1), (40, s.last.0), (44, s.last.1)] {
        put(&mut p, at, &v.to_be_bytes());
    }
    // Host order of the machines that ran it, which is little-endian.
    put(&mut p, 48, &s.incarnation.to_le_bytes());
    put(&mut p, 56, &s.message.kind.to_be_bytes());
    put(&mut p, 58, &s.message.seq.to_be_bytes());
    put(&mut p, 60, &s.message.arg.to_be_bytes());
    // Byte (n-1)/8, bit (n-1) mod 8: the little-endian bytes of the mask.
    put(&mut p, 64, &s.mask.to_le_bytes());
    put(&mut p, 72, &s.master_mask.to_le_bytes());
    frame(out, &p, s.timestamp);
}

pub fn decode_status(sector: &[u8]) -> Result<StatusBlock, ClassicError> {
    let (p, _) = unframe(sector, STATUS_SIZE)?;
    let magic = be32(p, 0);
    if magic != STATUS_MAGIC {
        return Err(ClassicError::Magic(magic));
    }
    Ok(StatusBlock {
        update_node: be32(p, 4),
        timestamp: be64(p, 8),
        node: be32(p, 16),
        state: NodeState::from_byte(p[24]).ok_or(ClassicError::State(p[24]))?,
        flags: be16(p, 26),
        score: be16(p, 28),
        score_max: be16(p, 30),
        average: (be32(p, 32), be32(p, 36)),
        last: (be32(p, 40), be32(p, 44)),
        incarnation: le64(p, 48),
        message: Message { kind: be16(p, 56), seq: be16(p, 58), arg: be32(p, 60) },
        mask: le64(p, 64),
        master_mask: le64(p, 72),
    })
}
