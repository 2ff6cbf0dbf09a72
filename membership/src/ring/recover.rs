//! RECOVERY and the step to OPERATIONAL.
//!
//! Among those that come from the same old ring, everything that anybody holds is sent again inside the new ring's
//! sequence. When the retransmission flag has been clear for three visits and the token shows on two successive
//! visits that everybody has everything, the old configuration is closed.
//!
//! *Obligation.* Who has completed a recovery must deliver what the others of that recovery may have delivered, even
//! if the new ring breaks before it became a configuration here: the origins of that recovery are carried along (bits
//! of the old member list) and count as present in every later attempt. All members of a later attempt use the union
//! of the obligations in the commit token, so they deliver the same.

use super::log::{RingLog, State};
use super::order::Order;
use super::packet::{Commit, Kind, Mcast, Packet, Token, decode};
use super::{Out, Ring, hear};
use crate::engine::LeaveReason;
use crate::engine::{EngineOutput, Lane};
use crate::event::{How, Member};
use cairn_base::{Boottime, Proc};
use std::collections::{BTreeSet, VecDeque};

pub(super) struct Recovery {
    /// The new ring.
    pub(super) order: Order,
    /// Members that come from my old ring.
    trans: Vec<Member>,
    /// Highest message of the old ring that anybody of them holds, …
    hi: u64,
    /// … and the highest that one of them has delivered.
    stable: u64,
    /// Old messages that I am to send again.
    queue: VecDeque<u64>,
    seen: BTreeSet<u64>,
    owns_flag: bool,
    quiet: u32,
    install_seq: u64,
    pub(super) received: bool,
    /// Whose messages must be delivered, bits of the old ring's member list.
    pub(super) promise: u64,
    first_token_sent: bool,
}

impl Recovery {
    pub(super) fn new(
        commit: &Commit,
        members: Vec<Member>,
        me: Proc,
        old: &Order,
        window: u32,
        now: Boottime,
        out: Out<'_>,
    ) -> Self {
        let same = |p: Proc| commit.entries.iter().find(|e| e.proc == p && e.old_ring == old.ring);
        let entries: Vec<_> = old.members.iter().filter_map(|m| same(m.proc())).collect();
        let trans =
            members.iter().copied().filter(|m| old.member(m.proc()).is_some() && same(m.proc()).is_some());
        let trans: Vec<Member> = trans.collect();
        let low = entries.iter().map(|e| e.aru).min().unwrap_or(old.aru);
        let hi = entries.iter().map(|e| e.high_seen).max().unwrap_or(old.high_seen);
        let stable = entries.iter().map(|e| e.high_delivered).max().unwrap_or(old.high_delivered);
        let mut promise = entries.iter().fold(0, |m, e| m | e.obligation);
        for (i, m) in old.members.iter().enumerate() {
            if trans.contains(m) {
                promise |= 1 << i;
            }
        }
        // Who has most of it in one piece sends that piece; what lies above, whoever holds it.
        let leader = entries.iter().max_by_key(|e| e.aru).map(|e| e.aru).unwrap_or(old.aru);
        let first_with = entries.iter().find(|e| e.aru == leader).is_some_and(|e| e.proc == me);
        let from = if first_with { low } else { leader };
        let queue: VecDeque<u64> = old.held(from + 1, hi).collect();
        if low == hi {
            out.push(EngineOutput::Log(RingLog::NothingToOriginate));
        } else {
            out.push(EngineOutput::Log(RingLog::Copying { from: low + 1, to: hi }));
            out.push(EngineOutput::Log(RingLog::Originated { count: queue.len() }));
        }
        Self {
            order: Order::new(commit.ring, members, me, window, now),
            trans,
            hi,
            stable,
            queue,
            seen: BTreeSet::new(),
            owns_flag: false,
            quiet: 0,
            install_seq: 0,
            received: false,
            promise,
            first_token_sent: false,
        }
    }

    /// Packets of the old ring to send at this visit.
    pub(super) fn take(&mut self, old: &Order, max: u64) -> Vec<Mcast> {
        let mut list = Vec::new();
        while (list.len() as u64) < max
            && let Some(seq) = self.queue.pop_front()
        {
            if self.seen.insert(seq)
                && let Some(m) = old.get(seq)
            {
                list.push(m.clone());
            }
        }
        list
    }

    pub(super) fn backlog(&self) -> u32 {
        self.queue.len() as u32
    }

    /// After the sending part of a token visit. True when everybody has everything.
    pub(super) fn visit(&mut self, t: &mut Token, received_aru: u64, sent_before: u64) -> bool {
        if !self.queue.is_empty() {
            if !t.retrans {
                t.retrans = true;
                self.owns_flag = true;
            }
        } else if t.retrans && self.owns_flag {
            t.retrans = false;
            self.owns_flag = false;
        }
        self.quiet = if t.retrans { 0 } else { self.quiet + 1 };
        if self.quiet == 2 {
            self.install_seq = t.seq;
        }
        if self.quiet >= 2 && self.order.aru >= self.install_seq {
            self.received = true;
        }
        self.quiet >= 3 && received_aru >= self.install_seq && sent_before >= self.install_seq
    }
}

impl Ring {
    /// A message of the new ring, which may carry one of the old.
    pub(super) fn recover_message(&mut self, m: Mcast) {
        let Some(r) = self.recovery.as_mut() else { return };
        if m.kind == Kind::Encapsulated
            && let Ok(Packet::Mcast(inner)) = decode(&m.payload)
            && inner.ring == self.op.ring
            && inner.seq <= r.hi
        {
            r.seen.insert(inner.seq);
            self.op.insert(inner);
        }
        r.order.insert(m);
    }

    pub(super) fn send_first_token(&mut self, out: Out<'_>) {
        let r = self.recovery.as_mut().expect("invariant: RECOVERY");
        if !std::mem::replace(&mut r.first_token_sent, true) {
            Self::note(RingLog::InitialToken, out);
            let token = Token { ring: r.order.ring, token_seq: 1, ..Token::default() };
            self.on_token(token, out);
        }
    }

    /// Closes the old configuration and opens the new one; one atomic sequence.
    pub(super) fn enter_operational(&mut self, out: Out<'_>) {
        let r = self.recovery.take().expect("invariant: RECOVERY");
        // In the old regular configuration: up to the first gap or the first safe message that nobody delivered.
        while let Some(m) = self.op.get(self.op.high_delivered + 1).cloned() {
            if m.seq > r.hi || (m.safe && m.seq > r.stable && !self.sabotage.safe_as_agreed) {
                break;
            }
            self.op.high_delivered = m.seq;
            self.deliver_one(&m, out);
        }
        out.push(EngineOutput::Transitional { old: self.op.ring, members: r.trans.clone() });
        let bits = r.promise;
        let owed = |p: Proc| {
            let i = self.op.members.iter().position(|m| m.proc() == p);
            i.is_some_and(|i| bits >> i & 1 == 1) || r.trans.iter().any(|m| m.proc() == p)
        };
        let mut rest = Vec::new();
        let (mut next, mut gap) = (self.op.high_delivered + 1, false);
        for seq in self.op.held(next, r.hi) {
            gap |= seq != next;
            next = seq + 1;
            let m = self.op.get(seq).expect("invariant: held");
            // Above a gap only those whose every message we surely have.
            if !gap || owed(m.origin) || self.sabotage.deliver_everything_after_gap {
                rest.push(m.clone());
            }
            if gap && self.sabotage.stop_at_gap {
                break;
            }
        }
        for m in rest {
            self.deliver_one(&m, out);
        }
        self.reassembly.clear();
        self.queues.switch(hear::is_leaving);
        self.queues.drop_sync();
        self.queues.users_open = self.sabotage.users_always_open;

        let old = std::mem::replace(&mut self.op, r.order);
        let members = self.op.members.clone();
        let is_in = |list: &[Member], p: Proc| list.iter().any(|m| m.proc() == p);
        let joined = members.iter().copied().filter(|m| !is_in(&old.members, m.proc())).collect();
        let left: Vec<(Member, How)> = old
            .members
            .iter()
            .filter(|m| !is_in(&members, m.proc()))
            .map(|&m| (m, self.how(m.proc(), &members)))
            .collect();
        let ring = self.op.ring;
        let mut before: Vec<Proc> = self.gather.proc.iter().collect();
        before.extend(old.members.iter().map(|m| m.proc()));
        before.sort();
        before.dedup();

        self.state = State::Operational;
        self.stats.configurations += 1;
        self.committing = None;
        self.received = false;
        self.obligation = 0;
        self.cancel_hold = false;
        self.cancel_sent = false;
        self.merging = None;
        self.reset_gather();
        self.settle_hearing(&before, out);
        self.leaving.clear();
        if std::mem::take(&mut self.leave_delivered) {
            // It was ordered in a ring that is over; those who come from elsewhere must hear it too.
            self.my_leave_again();
        }
        (self.t.join, self.t.consensus, self.t.retransmit) = (None, None, None);
        if self.op.alone() {
            (self.t.token, self.t.warning) = (None, None);
        }
        Self::note(RingLog::EnteringOperational { ring }, out);
        out.push(EngineOutput::Regular { ring, members, joined, left });
    }

    fn how(&self, p: Proc, members: &[Member]) -> How {
        if let Some(m) = members.iter().find(|m| m.node == p.node) {
            return How::Restarted(m.incarnation);
        }
        match self.leaving.get(&p) {
            Some(LeaveReason::Shutdown) => How::Clean,
            Some(LeaveReason::Removed) => How::Removed,
            None => How::Failed,
        }
    }

    pub(super) fn deliver_one(&mut self, m: &Mcast, out: Out<'_>) {
        let lane = match m.kind {
            Kind::Encapsulated => return,
            Kind::Ring => {
                let origin = m.origin;
                self.on_ring_message(origin, &m.payload);
                return;
            }
            Kind::Control => Lane::Control,
            Kind::Sync => Lane::Sync,
            Kind::User => Lane::User,
        };
        if let Some(data) = self.reassembly.add(m) {
            self.stats.delivered += 1;
            let from = self.op.member(m.origin).unwrap_or_else(|| self.cfg.member(m.origin));
            out.push(EngineOutput::Deliver { from, lane, safe: m.safe, seq: m.seq, data });
        }
    }
}
