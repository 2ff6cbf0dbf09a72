//! The extension area: its header, and one sealed block per node.
//!
//! | offset | field |
//! |---|---|
//! | 0 | magic "CAIRNQE1", version 1 (u32), node (u32) |
//! | 16 | incarnation, write seq, boot time of the writer (ns) |
//! | 40 | current view: seq, representative, its incarnation (24 bytes, zero: none) |
//! | 64 | votes of that view (u32), score, highest score (u16 each) |
//! | 72 | flags, S in ms, W in ms, X in ms (u32 each) |
//! | 88 | term, mbal, bal, value (u64 each; value = node << 48 \| incarnation's low 48 bits) |
//! | 120 | lease: term, grant, view (24 bytes), mask |
//! | 168 | highest ring seq, highest own incarnation |
//! | 192 | kill[16]: incarnation u64, reason u8 and view seq (56 bits) |
//! | 448 | seen[16]: incarnation's low 32 bits, cycles without change (u32 each), write seq u64 |
//! | 960 | last recorded view (24 bytes, zero: none) |
//! | 4064 | tag: first 16 bytes of HMAC-SHA-256 over the slot number and bytes 0…4063 |
//! | 4080 | CRC-32C of bytes 0…4079 |
//!
//! Unused bytes are zero and not looked at.

use super::{SLOT, le16, le32, le64, put};
use crate::MAX_NODES;
use crate::event::{KillReason, ViewName};
use cairn_base::{Incarnation, NodeId, Proc};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

const HEADER_MAGIC: &[u8; 8] = b"CAIRNQX1";
const BLOCK_MAGIC: &[u8; 8] = b"CAIRNQE1";
const VERSION: u32 = 1;
const LAST_VIEW_AT: usize = 960;
const TAG_AT: usize = 4064;
const CRC_AT: usize = 4080;

/// The key that seals E-blocks, derived from the cluster key for this purpose only.
#[derive(Clone)]
pub struct Seal(Hmac<Sha256>);

impl Seal {
    /// `uuid` is the disk's: a block copied from another quorum disk of the same cluster is foreign here.
    pub fn derive(cluster_key: &[u8], cluster: &str, uuid: &[u8; 16]) -> Self {
        let hk = hkdf::Hkdf::<Sha256>::new(Some(uuid), cluster_key);
        let mut key = [0u8; 32];
        hk.expand_multi_info(&[b"cairn quorum disk 1", cluster.as_bytes()], &mut key)
            .expect("invariant: 32 bytes are within the limit of HKDF");
        Self(Hmac::new_from_slice(&key).expect("invariant: HMAC takes any key length"))
    }

    fn mac(&self, slot: u16, body: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        mac.update(&slot.to_le_bytes());
        mac.update(body);
        mac
    }

    fn seal(&self, slot: u16, block: &mut [u8]) {
        let tag = self.mac(slot, &block[..TAG_AT]).finalize().into_bytes();
        put(block, TAG_AT, &tag[..CRC_AT - TAG_AT]);
        let crc = crc32c(&block[..CRC_AT]);
        put(block, CRC_AT, &crc.to_le_bytes());
    }
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seal(…)")
    }
}

fn crc32c(b: &[u8]) -> u32 {
    ::crc32c::crc32c(b)
}

/// Slot 0 of the extension. Written by mkqdisk, read by everyone, changed by nobody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtHeader {
    pub uuid: [u8; 16],
    pub label: String,
    pub block_size: u32,
}

impl ExtHeader {
    pub fn encode(&self) -> Vec<u8> {
        let mut b = vec![0u8; SLOT];
        put(&mut b, 0, HEADER_MAGIC);
        put(&mut b, 8, &VERSION.to_le_bytes());
        put(&mut b, 12, &self.block_size.to_le_bytes());
        put(&mut b, 16, &self.uuid);
        let mut end = self.label.len().min(127);
        while !self.label.is_char_boundary(end) {
            end -= 1;
        }
        put(&mut b, 32, &self.label.as_bytes()[..end]);
        let crc = crc32c(&b[..CRC_AT]);
        put(&mut b, CRC_AT, &crc.to_le_bytes());
        b
    }

    pub fn decode(b: &[u8]) -> Result<Self, &'static str> {
        if b.len() < SLOT {
            return Err("too short");
        }
        if &b[..8] != HEADER_MAGIC {
            return Err("no extension area (made by another mkqdisk)");
        }
        if crc32c(&b[..CRC_AT]) != le32(b, CRC_AT) {
            return Err("checksum of the extension header is wrong");
        }
        if le32(b, 8) != VERSION {
            return Err("unknown version of the extension area");
        }
        let name = &b[32..160];
        let end = name.iter().position(|&c| c == 0).unwrap_or(name.len());
        Ok(Self {
            uuid: b[16..32].try_into().expect("invariant: sixteen bytes"),
            label: String::from_utf8_lossy(&name[..end]).into_owned(),
            block_size: le32(b, 12),
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flags(pub u32);

impl Flags {
    pub const QUORATE: Self = Self(1);
    pub const DIRTY: Self = Self(2);
    pub const SUSPENDED: Self = Self(4);
    pub const STOPPED_CLEAN: Self = Self(8);
    pub const STOPPED_KILLED: Self = Self(16);
    /// I was the master of my term and am not any more.
    pub const RESIGN: Self = Self(32);
    /// The value in this block is known to be the decision of its term.
    pub const CHOSEN: Self = Self(64);
    /// My last life's block could not be read: it may have known higher terms than any block shows now.
    pub const LOST: Self = Self(128);

    pub const fn has(self, f: Self) -> bool {
        self.0 & f.0 == f.0
    }

    pub fn set(&mut self, f: Self, on: bool) {
        if on {
            self.0 |= f.0;
        } else {
            self.0 &= !f.0;
        }
    }
}

/// A ballot number: round and proposer. Zero: none. Two nodes never use the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Ballot(pub u64);

impl Ballot {
    pub const fn new(round: u64, node: NodeId) -> Self {
        Self((round << 8) | node.0 as u64)
    }

    pub const fn round(self) -> u64 {
        self.0 >> 8
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lease {
    pub term: u64,
    /// A new number each cycle; a lease counts from the landing of its number.
    pub grant: u64,
    pub view: ViewName,
    /// Nodes that may count the device votes: bit n-1.
    pub mask: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kill {
    pub incarnation: Incarnation,
    pub reason: KillReason,
    pub view_seq: u64,
}

/// What I last saw in another slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SeenSlot {
    pub incarnation_low: u32,
    pub unchanged: u32,
    pub seq: u64,
}

/// One node's block.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EBlock {
    pub node: NodeId,
    pub incarnation: Incarnation,
    pub seq: u64,
    pub written_at: u64,
    pub view: ViewName,
    pub voters: u32,
    pub score: u16,
    pub score_max: u16,
    pub flags: Flags,
    pub stop_ms: u32,
    pub watchdog_ms: u32,
    pub settle_ms: u32,
    pub term: u64,
    pub mbal: Ballot,
    pub bal: Ballot,
    /// Proposed or decided master of the term; node 0: none.
    pub value: Proc,
    pub lease: Lease,
    pub ring_seq: u64,
    pub highest_incarnation: Incarnation,
    pub kill: [Option<Kill>; MAX_NODES],
    pub seen: [SeenSlot; MAX_NODES],
    /// The newest quorate view that the writer knows of in which something may have been decided.
    pub last_view: ViewName,
}

/// What a slot holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Slot {
    /// All zero: never written.
    Empty,
    /// Half written or damaged: as if the write had not come yet. With a hash of the content.
    Torn(u32),
    /// Whole, but not sealed with our key, or not for this slot. With a hash of the content.
    Foreign(u32),
    Valid(Box<EBlock>),
}

fn put_view(b: &mut [u8], at: usize, v: ViewName) {
    put(b, at, &v.seq.to_le_bytes());
    put(b, at + 8, &v.rep.0.to_le_bytes());
    put(b, at + 16, &v.rep_incarnation.0.to_le_bytes());
}

fn view_at(b: &[u8], at: usize) -> ViewName {
    ViewName {
        seq: le64(b, at),
        rep: NodeId(le16(b, at + 8)),
        rep_incarnation: Incarnation(le64(b, at + 16)),
    }
}

const LOW48: u64 = (1 << 48) - 1;

/// How a value names `p`: the incarnation cut to 48 bits.
pub(crate) fn low48(p: Proc) -> Proc {
    Proc { node: p.node, incarnation: Incarnation(p.incarnation.0 & LOW48) }
}

/// Whether `value` (whose incarnation is kept to 48 bits) names `p`.
pub(crate) fn same_proc(value: Proc, p: Proc) -> bool {
    low48(value) == low48(p)
}

impl EBlock {
    pub const fn proc(&self) -> Proc {
        Proc { node: self.node, incarnation: self.incarnation }
    }

    pub fn encode(&self, seal: &Seal) -> Vec<u8> {
        let mut b = vec![0u8; SLOT];
        put(&mut b, 0, BLOCK_MAGIC);
        put(&mut b, 8, &VERSION.to_le_bytes());
        put(&mut b, 12, &u32::from(self.node.0).to_le_bytes());
        put(&mut b, 16, &self.incarnation.0.to_le_bytes());
        put(&mut b, 24, &self.seq.to_le_bytes());
        put(&mut b, 32, &self.written_at.to_le_bytes());
        put_view(&mut b, 40, self.view);
        put(&mut b, 64, &self.voters.to_le_bytes());
        put(&mut b, 68, &self.score.to_le_bytes());
        put(&mut b, 70, &self.score_max.to_le_bytes());
        for (at, v) in [(72, self.flags.0), (76, self.stop_ms), (80, self.watchdog_ms), (84, self.settle_ms)]
        {
            put(&mut b, at, &v.to_le_bytes());
        }
        let value = (u64::from(self.value.node.0) << 48) | (self.value.incarnation.0 & LOW48);
        for (at, v) in [(88, self.term), (96, self.mbal.0), (104, self.bal.0), (112, value)] {
            put(&mut b, at, &v.to_le_bytes());
        }
        put(&mut b, 120, &self.lease.term.to_le_bytes());
        put(&mut b, 128, &self.lease.grant.to_le_bytes());
        put_view(&mut b, 136, self.lease.view);
        put(&mut b, 160, &self.lease.mask.to_le_bytes());
        put(&mut b, 168, &self.ring_seq.to_le_bytes());
        put(&mut b, 176, &self.highest_incarnation.0.to_le_bytes());
        for (n, k) in self.kill.iter().enumerate() {
            if let Some(k) = k {
                let reason: u64 = match k.reason {
                    KillReason::Silent => 1,
                    KillReason::Partitioned => 2,
                    KillReason::Fence => 3,
                };
                put(&mut b, 192 + n * 16, &k.incarnation.0.to_le_bytes());
                put(&mut b, 200 + n * 16, &((k.view_seq & (u64::MAX >> 8)) << 8 | reason).to_le_bytes());
            }
        }
        for (n, s) in self.seen.iter().enumerate() {
            put(&mut b, 448 + n * 16, &s.incarnation_low.to_le_bytes());
            put(&mut b, 452 + n * 16, &s.unchanged.to_le_bytes());
            put(&mut b, 456 + n * 16, &s.seq.to_le_bytes());
        }
        put_view(&mut b, LAST_VIEW_AT, self.last_view);
        seal.seal(self.node.0, &mut b);
        b
    }

    /// `slot`: the node to which the place belongs.
    pub fn decode(b: &[u8], slot: NodeId, seal: &Seal) -> Slot {
        if b.len() < SLOT {
            return Slot::Torn(crc32c(b));
        }
        let b = &b[..SLOT];
        if b.iter().all(|&x| x == 0) {
            return Slot::Empty;
        }
        if &b[..8] != BLOCK_MAGIC || crc32c(&b[..CRC_AT]) != le32(b, CRC_AT) {
            return Slot::Torn(crc32c(&b[..CRC_AT]));
        }
        let tag = &b[TAG_AT..CRC_AT];
        let node = NodeId(slot.0);
        if seal.mac(slot.0, &b[..TAG_AT]).verify_truncated_left(tag).is_err()
            || le32(b, 8) != VERSION
            || le32(b, 12) != u32::from(node.0)
        {
            // Not the CRC of the whole: with its own CRC at the end that is the same for every block.
            return Slot::Foreign(crc32c(&b[..CRC_AT]));
        }
        let value = le64(b, 112);
        let mut block = Self {
            node,
            incarnation: Incarnation(le64(b, 16)),
            seq: le64(b, 24),
            written_at: le64(b, 32),
            view: view_at(b, 40),
            voters: le32(b, 64),
            score: le16(b, 68),
            score_max: le16(b, 70),
            flags: Flags(le32(b, 72)),
            stop_ms: le32(b, 76),
            watchdog_ms: le32(b, 80),
            settle_ms: le32(b, 84),
            term: le64(b, 88),
            mbal: Ballot(le64(b, 96)),
            bal: Ballot(le64(b, 104)),
            value: Proc { node: NodeId((value >> 48) as u16), incarnation: Incarnation(value & LOW48) },
            lease: Lease {
                term: le64(b, 120),
                grant: le64(b, 128),
                view: view_at(b, 136),
                mask: le64(b, 160),
            },
            ring_seq: le64(b, 168),
            highest_incarnation: Incarnation(le64(b, 176)),
            kill: [None; MAX_NODES],
            seen: [SeenSlot::default(); MAX_NODES],
            last_view: view_at(b, LAST_VIEW_AT),
        };
        for n in 0..MAX_NODES {
            let word = le64(b, 200 + n * 16);
            let reason = match word & 0xFF {
                1 => KillReason::Silent,
                2 => KillReason::Partitioned,
                3 => KillReason::Fence,
                _ => continue,
            };
            let incarnation = Incarnation(le64(b, 192 + n * 16));
            block.kill[n] = Some(Kill { incarnation, reason, view_seq: word >> 8 });
        }
        for (n, s) in block.seen.iter_mut().enumerate() {
            *s = SeenSlot {
                incarnation_low: le32(b, 448 + n * 16),
                unchanged: le32(b, 452 + n * 16),
                seq: le64(b, 456 + n * 16),
            };
        }
        Slot::Valid(Box::new(block))
    }
}
