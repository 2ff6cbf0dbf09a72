//! Messages of one ring: what is here, what was delivered, what may be forgotten; and the queues that feed it.
//!
//! ```text
//!   released   high_delivered      aru            high_seen
//!      |             |              |                 |
//!  ----+=============+==============+---#--##-#-------#      # received above a gap
//!      everybody has it             everything up to here is here
//! ```
//! Invariants: released ≤ high_delivered ≤ aru ≤ high_seen; nothing outside (released, released + W] is stored.

use super::packet::{Kind, Mcast};
use crate::engine::{Lane, SendError};
use crate::event::{Member, RingId};
use bytes::{Bytes, BytesMut};
use cairn_base::{Boottime, NodeId, Proc};
use std::collections::{BTreeMap, VecDeque};

/// Longest message, and what its fragments may add up to.
pub(crate) const MAX_MESSAGE: usize = (1 << 20) - 512;

/// The token as sent, kept until somebody shows that it went on.
pub(crate) struct LastToken {
    pub(crate) to: NodeId,
    pub(crate) packet: Bytes,
    pub(crate) seq: u64,
}

pub(crate) struct Order {
    pub(crate) ring: RingId,
    /// In ring order.
    pub(crate) members: Vec<Member>,
    pub(crate) my_index: usize,
    store: BTreeMap<u64, Mcast>,
    pub(crate) aru: u64,
    pub(crate) high_seen: u64,
    pub(crate) high_delivered: u64,
    pub(crate) released: u64,
    /// Every member has everything up to here.
    pub(crate) safe_line: u64,
    slots: u64,
    // the token
    pub(crate) token_seq: u64,
    pub(crate) last_token: Option<LastToken>,
    /// `aru` of the token as I sent it last time. (As *sent*: the value received says nothing about those who
    /// have not lowered it yet.)
    pub(crate) sent_aru: u64,
    pub(crate) last_seq: u64,
    pub(crate) aru_stuck: u32,
    pub(crate) stuck_since: Boottime,
    pub(crate) quiet: u32,
    pub(crate) rtr_visits: u32,
    pub(crate) my_pbl: u32,
    pub(crate) my_cbl: u32,
    pub(crate) my_trc: u32,
    pub(crate) miss: BTreeMap<u64, u8>,
}

impl Order {
    pub(crate) fn new(ring: RingId, members: Vec<Member>, me: Proc, window: u32, now: Boottime) -> Self {
        let my_index =
            members.iter().position(|m| m.proc() == me).expect("invariant: I am in every ring I form");
        let slots = (4 * u64::from(window) * members.len() as u64).next_power_of_two().max(4096);
        Self {
            ring,
            members,
            my_index,
            store: BTreeMap::new(),
            aru: 0,
            high_seen: 0,
            high_delivered: 0,
            released: 0,
            safe_line: 0,
            slots,
            token_seq: 0,
            last_token: None,
            sent_aru: 0,
            last_seq: 0,
            aru_stuck: 0,
            stuck_since: now,
            quiet: 0,
            rtr_visits: 0,
            my_pbl: 0,
            my_cbl: 0,
            my_trc: 0,
            miss: BTreeMap::new(),
        }
    }

    pub(crate) fn next(&self) -> NodeId {
        self.members[(self.my_index + 1) % self.members.len()].node
    }

    pub(crate) fn member(&self, p: Proc) -> Option<Member> {
        self.members.iter().copied().find(|m| m.proc() == p)
    }

    pub(crate) fn alone(&self) -> bool {
        self.members.len() == 1
    }

    /// Highest sequence that may be assigned without overrunning the slowest receiver.
    pub(crate) fn limit(&self, window: u32) -> u64 {
        (self.released + self.slots).saturating_sub(u64::from(window) * self.members.len() as u64)
    }

    /// False when it is a duplicate, released already or too far ahead.
    pub(crate) fn insert(&mut self, m: Mcast) -> bool {
        let seq = m.seq;
        if seq <= self.aru || seq > self.released + self.slots || self.store.contains_key(&seq) {
            return false;
        }
        self.store.insert(seq, m);
        self.high_seen = self.high_seen.max(seq);
        self.miss.remove(&seq);
        while self.store.contains_key(&(self.aru + 1)) {
            self.aru += 1;
        }
        true
    }

    pub(crate) fn get(&self, seq: u64) -> Option<&Mcast> {
        self.store.get(&seq)
    }

    /// Highest sequence that would be taken in.
    pub(crate) fn reach(&self) -> u64 {
        self.released + self.slots
    }

    /// Sequences of the messages here, from `from` to `to`.
    pub(crate) fn held(&self, from: u64, to: u64) -> impl Iterator<Item = u64> + use<> {
        let list: Vec<u64> =
            if from <= to { self.store.range(from..=to).map(|(&s, _)| s).collect() } else { Vec::new() };
        list.into_iter()
    }

    /// Next message in order if its guarantee is met.
    pub(crate) fn deliverable(&mut self) -> Option<Mcast> {
        let seq = self.high_delivered + 1;
        if seq > self.aru {
            return None;
        }
        let m = self.store.get(&seq).expect("invariant: everything in (released, aru] is stored");
        if m.safe && seq > self.safe_line {
            return None;
        }
        self.high_delivered = seq;
        Some(m.clone())
    }

    pub(crate) fn release(&mut self) {
        let line = self.safe_line.min(self.high_delivered);
        if line > self.released {
            self.store = self.store.split_off(&(line + 1));
            self.released = line;
        }
        assert!(self.released <= self.high_delivered && self.high_delivered <= self.aru);
        assert!(self.aru <= self.high_seen);
    }
}

/// A message on its way out; `next` fragments of it have been sent on the present ring.
struct Outgoing {
    safe: bool,
    data: Bytes,
    next: u16,
    count: u16,
    msg_no: u64,
}

/// One fragment ready to be sent.
pub(crate) struct Fragment {
    pub(crate) kind: Kind,
    pub(crate) safe: bool,
    pub(crate) index: u16,
    pub(crate) count: u16,
    pub(crate) msg_no: u64,
    pub(crate) data: Bytes,
}

/// Send queues by priority: ring, control, sync, user.
pub(crate) struct Queues {
    queues: [VecDeque<Outgoing>; 4],
    bytes: [usize; 4],
    budget: [usize; 4],
    fragment: usize,
    msg_no: u64,
    pub(crate) users_open: bool,
    refused: bool,
}

const KINDS: [Kind; 4] = [Kind::Ring, Kind::Control, Kind::Sync, Kind::User];
/// Control messages are short and few; users can never take this room.
const CONTROL_BUDGET: usize = 64 << 10;
const SYNC_BUDGET: usize = 16 << 20;
/// What a queued message costs beside its bytes.
const OVERHEAD: usize = 64;

impl Queues {
    /// `fragment`: payload bytes of one packet.
    pub(crate) fn new(fragment: usize, user_budget: usize) -> Self {
        Self {
            queues: Default::default(),
            bytes: [0; 4],
            budget: [usize::MAX, CONTROL_BUDGET, SYNC_BUDGET, user_budget],
            fragment,
            msg_no: 0,
            users_open: false,
            refused: false,
        }
    }

    pub(crate) fn lane(&mut self, lane: Lane, safe: bool, data: Bytes) -> Result<(), SendError> {
        let q = match lane {
            Lane::Control => 1,
            Lane::Sync => 2,
            Lane::User => 3,
        };
        if data.len() > MAX_MESSAGE {
            return Err(SendError::TooLong { len: data.len(), max: MAX_MESSAGE });
        }
        // A message larger than the whole budget may go when the queue is empty.
        if self.bytes[q] > 0 && self.bytes[q] + data.len() + OVERHEAD > self.budget[q] {
            self.refused = true;
            return Err(SendError::WouldBlock);
        }
        self.push(q, safe, data);
        Ok(())
    }

    pub(crate) fn ring(&mut self, safe: bool, data: Bytes) {
        self.push(0, safe, data);
    }

    fn push(&mut self, q: usize, safe: bool, data: Bytes) {
        let count = data.len().div_ceil(self.fragment).max(1) as u16;
        self.bytes[q] += data.len() + OVERHEAD;
        self.queues[q].push_back(Outgoing { safe, data, next: 0, count, msg_no: 0 });
    }

    fn open(&self, q: usize) -> bool {
        q != 3 || self.users_open
    }

    pub(crate) fn is_empty(&self) -> bool {
        (0..4).all(|q| !self.open(q) || self.queues[q].is_empty())
    }

    /// Packets that wait, for the ring's backlog.
    pub(crate) fn backlog(&self) -> u32 {
        let n: usize = (0..4).filter(|&q| self.open(q)).map(|q| self.queues[q].len()).sum();
        n.min(1 << 20) as u32
    }

    pub(crate) fn pop(&mut self) -> Option<Fragment> {
        let q = (0..4).find(|&q| self.open(q) && !self.queues[q].is_empty())?;
        let m = self.queues[q].front_mut()?;
        if m.next == 0 {
            self.msg_no += 1;
            m.msg_no = self.msg_no;
        }
        let from = usize::from(m.next) * self.fragment;
        let data = m.data.slice(from..m.data.len().min(from + self.fragment));
        let out =
            Fragment { kind: KINDS[q], safe: m.safe, index: m.next, count: m.count, msg_no: m.msg_no, data };
        m.next += 1;
        if m.next == m.count {
            self.bytes[q] -= m.data.len() + OVERHEAD;
            self.queues[q].pop_front();
        }
        Some(out)
    }

    /// A new ring begins: what was sent only in part starts again, users wait for the barrier, and the ring's own
    /// messages, which are about the old one, are dropped (except the announcement to leave).
    pub(crate) fn switch(&mut self, keep_ring: impl Fn(&[u8]) -> bool) {
        for m in self.queues.iter_mut().filter_map(|q| q.front_mut()) {
            m.next = 0;
        }
        self.queues[0].retain(|m| keep_ring(&m.data));
        self.bytes[0] = self.queues[0].iter().map(|m| m.data.len() + OVERHEAD).sum();
        self.users_open = false;
    }

    /// Sync messages belong to one ring and never outlive it.
    pub(crate) fn drop_sync(&mut self) {
        self.queues[2].clear();
        self.bytes[2] = 0;
    }

    /// True once after a refusal, when half of the room is free again.
    pub(crate) fn writable(&mut self) -> bool {
        let ready = self.refused && (1..4).all(|q| self.bytes[q] <= self.budget[q] / 2);
        self.refused &= !ready;
        ready
    }
}

/// Puts fragments together, per origin and lane.
#[derive(Default)]
pub(crate) struct Reassembly(BTreeMap<(Proc, Kind), Partial>);

struct Partial {
    msg_no: u64,
    next: u16,
    count: u16,
    data: BytesMut,
}

impl Reassembly {
    /// The whole message when `m` was its last fragment. What does not fit together is dropped; every member sees
    /// the same sequence, so all drop the same.
    pub(crate) fn add(&mut self, m: &Mcast) -> Option<Bytes> {
        if m.frag_count == 1 {
            return Some(m.payload.clone());
        }
        let key = (m.origin, m.kind);
        if m.frag_index == 0 {
            let data = BytesMut::from(&m.payload[..]);
            self.0.insert(key, Partial { msg_no: m.msg_no, next: 1, count: m.frag_count, data });
            return None;
        }
        let p = self.0.get_mut(&key)?;
        let fits = (p.msg_no, p.next, p.count) == (m.msg_no, m.frag_index, m.frag_count)
            && p.data.len() + m.payload.len() <= MAX_MESSAGE;
        if !fits {
            self.0.remove(&key);
            return None;
        }
        p.data.extend_from_slice(&m.payload);
        p.next += 1;
        if p.next < p.count { None } else { self.0.remove(&key).map(|p| p.data.freeze()) }
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}
