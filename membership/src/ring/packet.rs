//! Bytes of the ring's packets. Little-endian; every packet starts with an 8-byte head:
//! `type` u8, `ver` u8, `flags` u16 (unknown bits ignored), `len` u32 (the whole packet).
//!
//! | type | packet | fixed part | lists |
//! |---|---|---|---|
//! | 1 | TOKEN | 72 | rtr u64 each, at most 128 |
//! | 2 | MCAST | 72 | payload |
//! | 3 | BEACON | 48 | 16 per node: id, flags, cookie heard from it (0: not heard) |
//! | 4 | JOIN | 56 + 8 | proc, failed: 16 each; heard: 16 each |
//! | 5 | COMMIT | 48 | 80 per member |
//! | 6 | HOLD_CANCEL | 32 | |
//! | 7 | LEAVE | 56 | |
//!
//! A decoder accepts exactly what an encoder writes: lists sorted by node without duplicates, at most
//! [`MAX_NODES`] entries, lengths that match to the byte, no node id 0. Nothing is allocated before the
//! counts have been checked against the length.

use super::set::ProcSet;
use crate::event::RingId;
use bytes::{BufMut, Bytes, BytesMut};
use cairn_base::{Incarnation, NodeId, Proc};

pub(crate) const MAX_NODES: usize = 64;
pub(crate) const MAX_RTR: usize = 128;
const VERSION: u8 = 1;
const HEAD: usize = 8;
pub(crate) const MCAST_HEAD: usize = 72;

const TOKEN: u8 = 1;
const MCAST: u8 = 2;
const BEACON: u8 = 3;
const JOIN: u8 = 4;
const COMMIT: u8 = 5;
const HOLD_CANCEL: u8 = 6;
const LEAVE: u8 = 7;

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("packet ends early or has bytes left over")]
    Length,
    #[error("packet version {0}")]
    Version(u8),
    #[error("packet type {0}")]
    Type(u8),
    #[error("list of {0} entries")]
    Count(usize),
    #[error("list is not sorted by node")]
    Unsorted,
    #[error("node id 0")]
    NodeZero,
    #[error("field has an impossible value")]
    Value,
}
type Result<T> = std::result::Result<T, DecodeError>;

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Token {
    pub(crate) ring: RingId,
    pub(crate) token_seq: u64,
    /// Highest message sequence assigned on this ring.
    pub(crate) seq: u64,
    /// Everything up to here is held by everybody (once it has gone round).
    pub(crate) aru: u64,
    /// Who lowered `aru`; node 0: nobody.
    pub(crate) aru_node: NodeId,
    /// Somebody still has old messages to send in RECOVERY.
    pub(crate) retrans: bool,
    pub(crate) backlog: u32,
    pub(crate) fcc: u32,
    pub(crate) rtr: Vec<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub(crate) enum Kind {
    User = 0,
    /// A whole packet of the old ring, in RECOVERY.
    Encapsulated = 1,
    Control = 2,
    Sync = 3,
    /// Between the rings themselves: HEARS, MERGE, LEAVING.
    Ring = 4,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Mcast {
    pub(crate) ring: RingId,
    pub(crate) seq: u64,
    pub(crate) origin: Proc,
    pub(crate) kind: Kind,
    pub(crate) safe: bool,
    pub(crate) frag_index: u16,
    pub(crate) frag_count: u16,
    pub(crate) msg_no: u64,
    pub(crate) payload: Bytes,
    /// The packet itself, for retransmission.
    pub(crate) packet: Bytes,
}

/// One node in a beacon.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Heard {
    pub(crate) node: NodeId,
    /// It is a member of the sender's ring.
    pub(crate) in_ring: bool,
    /// The sender will not merge with it for now.
    pub(crate) held_down: bool,
    /// The cookie heard from it within the hear window; 0: none.
    pub(crate) cookie: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Beacon {
    pub(crate) ring: RingId,
    pub(crate) operational: bool,
    pub(crate) config_version: u32,
    pub(crate) cookie: u64,
    pub(crate) heard: Vec<Heard>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Join {
    pub(crate) sender: Proc,
    pub(crate) max_ring_seq: u64,
    pub(crate) cookie: u64,
    pub(crate) cause: u8,
    pub(crate) proto_min: u8,
    pub(crate) proto_max: u8,
    pub(crate) config_version: u32,
    pub(crate) join_no: u32,
    pub(crate) proc: ProcSet,
    pub(crate) failed: ProcSet,
    pub(crate) heard: Vec<Heard>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct CommitEntry {
    pub(crate) proc: Proc,
    pub(crate) old_ring: RingId,
    pub(crate) aru: u64,
    pub(crate) high_delivered: u64,
    pub(crate) high_seen: u64,
    /// Members of the old ring (bit = position) whose messages this member has promised to deliver, from a recovery
    /// that it completed but that did not become a configuration for it.
    pub(crate) obligation: u64,
    pub(crate) filled: bool,
    pub(crate) received: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Commit {
    pub(crate) ring: RingId,
    pub(crate) token_seq: u64,
    pub(crate) round: u8,
    pub(crate) proto: u8,
    /// Position of the receiver.
    pub(crate) index: u16,
    pub(crate) entries: Vec<CommitEntry>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Leave {
    pub(crate) ring: RingId,
    pub(crate) removed: bool,
    pub(crate) sender: Proc,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Packet {
    Token(Token),
    Mcast(Mcast),
    Beacon(Beacon),
    Join(Join),
    Commit(Commit),
    HoldCancel(RingId),
    Leave(Leave),
}

/// A driver that has drained its sockets hands tokens in last, so that everything sent before them is seen before.
pub fn is_token(packet: &[u8]) -> bool {
    packet.first() == Some(&TOKEN)
}

/// One of the packets that a peer not yet proved alive may send.
pub(crate) fn is_presence(packet: &[u8]) -> bool {
    matches!(packet.first(), Some(&(BEACON | JOIN)))
}

// ---- writing

struct W(BytesMut);

impl W {
    fn new(kind: u8, cap: usize) -> Self {
        let mut b = BytesMut::with_capacity(cap);
        b.put_slice(&[kind, VERSION, 0, 0, 0, 0, 0, 0]);
        Self(b)
    }
    fn ring(&mut self, r: &RingId) {
        self.0.put_u64_le(r.seq);
        self.0.put_u64_le(r.rep_incarnation.0);
        self.0.put_u16_le(r.rep.0);
        self.pad(6);
    }
    fn proc(&mut self, p: Proc) {
        self.0.put_u16_le(p.node.0);
        self.pad(6);
        self.0.put_u64_le(p.incarnation.0);
    }
    fn heard(&mut self, list: &[Heard]) {
        for h in list {
            self.0.put_u16_le(h.node.0);
            self.0.put_u8(u8::from(h.in_ring) | u8::from(h.held_down) << 1);
            self.pad(5);
            self.0.put_u64_le(h.cookie);
        }
    }
    fn pad(&mut self, n: usize) {
        self.0.put_bytes(0, n);
    }
    fn done(mut self) -> Bytes {
        let len = (self.0.len() as u32).to_le_bytes();
        self.0[4..8].copy_from_slice(&len);
        self.0.freeze()
    }
}

impl Token {
    pub(crate) fn encode(&self) -> Bytes {
        let mut w = W::new(TOKEN, 72 + 8 * self.rtr.len());
        w.ring(&self.ring);
        w.0.put_u64_le(self.token_seq);
        w.0.put_u64_le(self.seq);
        w.0.put_u64_le(self.aru);
        w.0.put_u16_le(self.aru_node.0);
        w.0.put_u16_le(u16::from(self.retrans));
        w.0.put_u32_le(self.backlog);
        w.0.put_u32_le(self.fcc);
        w.0.put_u16_le(self.rtr.len() as u16);
        w.pad(2);
        self.rtr.iter().for_each(|&s| w.0.put_u64_le(s));
        w.done()
    }
}

impl Mcast {
    /// Builds the packet of a message; `payload` and `packet` of the result share memory.
    #[allow(clippy::too_many_arguments)] // one per field of the format
    pub(crate) fn build(
        ring: RingId,
        seq: u64,
        origin: Proc,
        kind: Kind,
        safe: bool,
        frag: (u16, u16),
        msg_no: u64,
        payload: &[u8],
    ) -> Self {
        let mut w = W::new(MCAST, MCAST_HEAD + payload.len());
        w.ring(&ring);
        w.0.put_u64_le(seq);
        w.proc(origin);
        w.0.put_u8(kind as u8);
        w.0.put_u8(u8::from(safe));
        w.0.put_u16_le(frag.0);
        w.0.put_u16_le(frag.1);
        w.pad(2);
        w.0.put_u64_le(msg_no);
        debug_assert_eq!(w.0.len(), MCAST_HEAD);
        w.0.put_slice(payload);
        let packet = w.done();
        let payload = packet.slice(MCAST_HEAD..);
        Self {
            ring,
            seq,
            origin,
            kind,
            safe,
            frag_index: frag.0,
            frag_count: frag.1,
            msg_no,
            payload,
            packet,
        }
    }
}

impl Beacon {
    pub(crate) fn encode(&self) -> Bytes {
        let mut w = W::new(BEACON, 48 + 16 * self.heard.len());
        w.ring(&self.ring);
        w.0.put_u8(u8::from(self.operational));
        w.pad(1);
        w.0.put_u16_le(self.heard.len() as u16);
        w.0.put_u32_le(self.config_version);
        w.0.put_u64_le(self.cookie);
        w.heard(&self.heard);
        w.done()
    }
}

impl Join {
    pub(crate) fn encode(&self) -> Bytes {
        let n = self.proc.len() + self.failed.len() + self.heard.len();
        let mut w = W::new(JOIN, 64 + 16 * n);
        w.proc(self.sender);
        w.0.put_u64_le(self.max_ring_seq);
        w.0.put_u64_le(self.cookie);
        w.0.put_slice(&[self.cause, self.proto_min, self.proto_max, 0]);
        w.0.put_u32_le(self.config_version);
        w.0.put_u32_le(self.join_no);
        w.0.put_u16_le(self.proc.len() as u16);
        w.0.put_u16_le(self.failed.len() as u16);
        self.proc.iter().for_each(|p| w.proc(p));
        self.failed.iter().for_each(|p| w.proc(p));
        w.0.put_u16_le(self.heard.len() as u16);
        w.pad(6);
        w.heard(&self.heard);
        w.done()
    }
}

impl Commit {
    pub(crate) fn encode(&self) -> Bytes {
        let mut w = W::new(COMMIT, 48 + 80 * self.entries.len());
        w.ring(&self.ring);
        w.0.put_u64_le(self.token_seq);
        w.0.put_u8(self.round);
        w.0.put_u8(self.proto);
        w.0.put_u16_le(self.index);
        w.0.put_u16_le(self.entries.len() as u16);
        w.pad(2);
        for e in &self.entries {
            w.proc(e.proc);
            w.ring(&e.old_ring);
            w.0.put_u64_le(e.aru);
            w.0.put_u64_le(e.high_delivered);
            w.0.put_u64_le(e.high_seen);
            w.0.put_u64_le(e.obligation);
            w.0.put_slice(&[u8::from(e.filled), u8::from(e.received)]);
            w.pad(6);
        }
        w.done()
    }
}

pub(crate) fn encode_hold_cancel(ring: &RingId) -> Bytes {
    let mut w = W::new(HOLD_CANCEL, 32);
    w.ring(ring);
    w.done()
}

impl Leave {
    pub(crate) fn encode(&self) -> Bytes {
        let mut w = W::new(LEAVE, 56);
        w.ring(&self.ring);
        w.0.put_u8(if self.removed { 3 } else { 0 });
        w.pad(7);
        w.proc(self.sender);
        w.done()
    }
}

/// Body of HEARS and MERGE messages (kind [`Kind::Ring`]): a tag and a list of processors.
pub(crate) fn encode_procs(tag: u8, set: &ProcSet) -> Bytes {
    let mut w = W(BytesMut::with_capacity(8 + 16 * set.len()));
    w.0.put_u8(tag);
    w.pad(5);
    w.0.put_u16_le(set.len() as u16);
    set.iter().for_each(|p| w.proc(p));
    w.0.freeze()
}

pub(crate) fn decode_procs(body: &[u8]) -> Result<(u8, ProcSet)> {
    let mut r = R(body);
    let tag = r.u8()?;
    r.skip(5)?;
    let n = r.u16()? as usize;
    let set = r.procs(n)?;
    r.end()?;
    Ok((tag, set))
}

// ---- reading

struct R<'a>(&'a [u8]);

impl<'a> R<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(DecodeError::Length)?;
        self.0 = rest;
        Ok(head)
    }
    fn skip(&mut self, n: usize) -> Result<()> {
        self.take(n).map(|_| ())
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(DecodeError::Length)?;
        self.0 = rest;
        Ok(*head)
    }
    fn u8(&mut self) -> Result<u8> {
        self.array().map(|[b]| b)
    }
    fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }
    fn bool(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError::Value),
        }
    }
    fn node(&mut self) -> Result<NodeId> {
        match self.u16()? {
            0 => Err(DecodeError::NodeZero),
            n => Ok(NodeId(n)),
        }
    }
    fn ring(&mut self) -> Result<RingId> {
        let seq = self.u64()?;
        let rep_incarnation = Incarnation(self.u64()?);
        let rep = NodeId(self.u16()?);
        self.skip(6)?;
        Ok(RingId { seq, rep, rep_incarnation })
    }
    fn proc(&mut self) -> Result<Proc> {
        let node = self.node()?;
        self.skip(6)?;
        Ok(Proc { node, incarnation: Incarnation(self.u64()?) })
    }
    /// Refuses a count that is above the limit or cannot fit, before anything is allocated.
    fn room(&self, count: usize, max: usize, size: usize) -> Result<()> {
        if count > max {
            return Err(DecodeError::Count(count));
        }
        if count * size > self.0.len() { Err(DecodeError::Length) } else { Ok(()) }
    }
    fn procs(&mut self, n: usize) -> Result<ProcSet> {
        self.room(n, MAX_NODES, 16)?;
        let mut set = ProcSet::default();
        let mut last = NodeId(0);
        for _ in 0..n {
            let p = self.proc()?;
            if p.node <= last {
                return Err(DecodeError::Unsorted);
            }
            last = p.node;
            set.add(p);
        }
        Ok(set)
    }
    fn heard(&mut self, n: usize) -> Result<Vec<Heard>> {
        self.room(n, MAX_NODES, 16)?;
        let mut list = Vec::with_capacity(n);
        let mut last = NodeId(0);
        for _ in 0..n {
            let node = self.node()?;
            let flags = self.u8()?;
            self.skip(5)?;
            if node <= last {
                return Err(DecodeError::Unsorted);
            }
            last = node;
            let cookie = self.u64()?;
            list.push(Heard { node, in_ring: flags & 1 != 0, held_down: flags & 2 != 0, cookie });
        }
        Ok(list)
    }
    fn end(&self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(DecodeError::Length) }
    }
}

pub(crate) fn decode(packet: &Bytes) -> Result<Packet> {
    let mut r = R(packet);
    let kind = r.u8()?;
    let version = r.u8()?;
    if version != VERSION {
        return Err(DecodeError::Version(version));
    }
    r.skip(2)?;
    if r.u32()? as usize != packet.len() {
        return Err(DecodeError::Length);
    }
    debug_assert_eq!(packet.len() - r.0.len(), HEAD);
    match kind {
        TOKEN => decode_token(r).map(Packet::Token),
        MCAST => decode_mcast(r, packet).map(Packet::Mcast),
        BEACON => decode_beacon(r).map(Packet::Beacon),
        JOIN => decode_join(r).map(Packet::Join),
        COMMIT => decode_commit(r).map(Packet::Commit),
        HOLD_CANCEL => {
            let ring = r.ring()?;
            r.end()?;
            Ok(Packet::HoldCancel(ring))
        }
        LEAVE => {
            let ring = r.ring()?;
            let reason = r.u8()?;
            r.skip(7)?;
            let sender = r.proc()?;
            r.end()?;
            Ok(Packet::Leave(Leave { ring, removed: reason == 3, sender }))
        }
        other => Err(DecodeError::Type(other)),
    }
}

fn decode_token(mut r: R<'_>) -> Result<Token> {
    let ring = r.ring()?;
    let (token_seq, seq, aru) = (r.u64()?, r.u64()?, r.u64()?);
    let aru_node = NodeId(r.u16()?);
    let retrans = r.u16()? & 1 != 0;
    let (backlog, fcc) = (r.u32()?, r.u32()?);
    let n = r.u16()? as usize;
    r.skip(2)?;
    r.room(n, MAX_RTR, 8)?;
    let mut rtr = Vec::with_capacity(n);
    for _ in 0..n {
        rtr.push(r.u64()?);
    }
    r.end()?;
    // Sequences near the end of the number space are not reached in the life of a ring; refusing them keeps
    // every sum below free of overflow.
    if aru > seq || seq > u64::MAX / 4 || token_seq > u64::MAX / 4 {
        return Err(DecodeError::Value);
    }
    Ok(Token { ring, token_seq, seq, aru, aru_node, retrans, backlog, fcc, rtr })
}

fn decode_mcast(mut r: R<'_>, packet: &Bytes) -> Result<Mcast> {
    let ring = r.ring()?;
    let seq = r.u64()?;
    let origin = r.proc()?;
    let kind = match r.u8()? {
        0 => Kind::User,
        1 => Kind::Encapsulated,
        2 => Kind::Control,
        3 => Kind::Sync,
        4 => Kind::Ring,
        _ => return Err(DecodeError::Value),
    };
    let safe = r.bool()?;
    let (frag_index, frag_count) = (r.u16()?, r.u16()?);
    r.skip(2)?;
    let msg_no = r.u64()?;
    if seq == 0 || seq > u64::MAX / 4 || frag_index >= frag_count {
        return Err(DecodeError::Value);
    }
    let payload = packet.slice(MCAST_HEAD..);
    Ok(Mcast {
        ring,
        seq,
        origin,
        kind,
        safe,
        frag_index,
        frag_count,
        msg_no,
        payload,
        packet: packet.clone(),
    })
}

fn decode_beacon(mut r: R<'_>) -> Result<Beacon> {
    let ring = r.ring()?;
    let operational = r.bool()?;
    r.skip(1)?;
    let n = r.u16()? as usize;
    let config_version = r.u32()?;
    let cookie = r.u64()?;
    let heard = r.heard(n)?;
    r.end()?;
    Ok(Beacon { ring, operational, config_version, cookie, heard })
}

fn decode_join(mut r: R<'_>) -> Result<Join> {
    let sender = r.proc()?;
    let max_ring_seq = r.u64()?;
    let cookie = r.u64()?;
    let [cause, proto_min, proto_max, _] = r.array()?;
    let config_version = r.u32()?;
    let join_no = r.u32()?;
    let (np, nf) = (r.u16()? as usize, r.u16()? as usize);
    let proc = r.procs(np)?;
    let failed = r.procs(nf)?;
    let nh = r.u16()? as usize;
    r.skip(6)?;
    let heard = r.heard(nh)?;
    r.end()?;
    if max_ring_seq > u64::MAX / 4 {
        return Err(DecodeError::Value);
    }
    Ok(Join {
        sender,
        max_ring_seq,
        cookie,
        cause,
        proto_min,
        proto_max,
        config_version,
        join_no,
        proc,
        failed,
        heard,
    })
}

fn decode_commit(mut r: R<'_>) -> Result<Commit> {
    let ring = r.ring()?;
    let token_seq = r.u64()?;
    let (round, proto) = (r.u8()?, r.u8()?);
    let index = r.u16()?;
    let n = r.u16()? as usize;
    r.skip(2)?;
    r.room(n, MAX_NODES, 80)?;
    let mut entries = Vec::with_capacity(n);
    let mut nodes = ProcSet::default();
    for _ in 0..n {
        let proc = r.proc()?;
        let old_ring = r.ring()?;
        let (aru, high_delivered, high_seen, obligation) = (r.u64()?, r.u64()?, r.u64()?, r.u64()?);
        let (filled, received) = (r.bool()?, r.bool()?);
        r.skip(6)?;
        if aru > high_seen || high_delivered > aru || high_seen > u64::MAX / 4 {
            return Err(DecodeError::Value);
        }
        nodes.add(proc);
        entries.push(CommitEntry {
            proc,
            old_ring,
            aru,
            high_delivered,
            high_seen,
            obligation,
            filled,
            received,
        });
    }
    r.end()?;
    // Ring order is not node order, so only duplicates can be refused here.
    if nodes.len() != n || n == 0 || index as usize >= n || !matches!(round, 1 | 2) {
        return Err(DecodeError::Value);
    }
    if ring.seq > u64::MAX / 4 {
        return Err(DecodeError::Value);
    }
    Ok(Commit { ring, token_seq, round, proto, index, entries })
}

#[cfg(test)]
mod tests;
