//! Every byte of a quorum disk. The only module that knows offsets.
//!
//! ```text
//! 0          label                                     classic area: as the historic tools wrote it
//! 4096·n     status block of node n, n = 1…16
//! 131072     header of the extension (slot 0)          extension: what our safety rests on
//! 131072 + 4096·n   E-block of node n
//! ```
//!
//! Classic objects are a 32-byte shared header (little-endian) and a payload (big-endian but for `incarnation`), padded
//! with zeros to one sector. E-blocks are little-endian, 4096 bytes, ended by a keyed tag over bytes 0…4063 and the slot
//! number, and a CRC-32C over everything before it. The CRC tells a torn block (late write) from one that is whole but
//! sealed with another key.
//!
//! The content of a disk is hostile until checked: decoding never panics and answers *why* a block is not usable.

mod classic;
pub(crate) mod eblock;

pub use classic::{
    ClassicError, LABEL_MAGIC, LABEL_MAGIC_OLD, Label, Message, NodeState, STATUS_MAGIC, StatusBlock,
    decode_label, decode_status, encode_label, encode_status,
};
pub use eblock::{Ballot, EBlock, ExtHeader, Flags, Kill, Lease, Seal, SeenSlot, Slot};

use crate::MAX_NODES;

/// Size of one object's slot, in bytes.
pub const SLOT: usize = 4096;
/// Where the extension area starts.
pub const EXTENSION: u64 = 131_072;
/// A quorum disk of ours has at least this many bytes.
pub const MIN_SIZE: u64 = 1 << 20;
/// What the historic tools ask for.
pub const CLASSIC_MIN_SIZE: u64 = 73_728;
/// Bytes of one read of all slots 0…16 of an area.
pub const AREA: usize = SLOT * (MAX_NODES + 1);

/// Byte offset of node `n`'s classic status block (0: the label).
pub const fn classic_offset(n: u16) -> u64 {
    n as u64 * SLOT as u64
}

/// Byte offset of node `n`'s E-block (0: the header).
pub const fn ext_offset(n: u16) -> u64 {
    EXTENSION + n as u64 * SLOT as u64
}

fn le16(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(b[at..at + 2].try_into().expect("invariant: two bytes"))
}

fn le32(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(b[at..at + 4].try_into().expect("invariant: four bytes"))
}

fn le64(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().expect("invariant: eight bytes"))
}

fn be16(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(b[at..at + 2].try_into().expect("invariant: two bytes"))
}

fn be32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(b[at..at + 4].try_into().expect("invariant: four bytes"))
}

fn be64(b: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(b[at..at + 8].try_into().expect("invariant: eight bytes"))
}

fn put(b: &mut [u8], at: usize, bytes: &[u8]) {
    b[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests;
