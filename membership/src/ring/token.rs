//! The token: sequence numbers, retransmission requests, flow control, delivery, holding.

use super::log::State;
use super::order::{LastToken, Order};
use super::packet::{Kind, MAX_RTR, Mcast, Token};
use super::set::ProcSet;
use super::{Out, QUIET_VISITS, Ring, RingConfig, hear, packet};
use crate::engine::{Dest, FrameLane};
use bytes::Bytes;
use cairn_base::NodeId;

/// Token visits that a gap must survive before it is asked for: one rotation settles what the network delays.
const MISS_VISITS: u8 = 2;
/// A stuck aru needs at least this many visits, however long they take.
const STUCK_VISITS: u32 = 50;
/// Visits with retransmissions going on during which the token is not held.
const RTR_VISITS: u32 = 2;
/// Messages that a ring of one orders before it lets go of the thread.
const ALONE_BATCH: usize = 1024;

fn allowed(o: &Order, t: &Token, cfg: &RingConfig) -> u64 {
    let mut a = cfg.max_messages.min(cfg.window.saturating_sub(t.fcc));
    let total = (u64::from(t.backlog) + u64::from(o.my_cbl)).saturating_sub(u64::from(o.my_pbl));
    if total > 0 {
        // Never 0, else a small sender starves.
        let share = (u64::from(cfg.window) * u64::from(o.my_cbl) / total).max(1);
        a = a.min(u32::try_from(share).unwrap_or(u32::MAX));
    }
    u64::from(a).min(o.limit(cfg.window).saturating_sub(t.seq))
}

impl Order {
    /// Answers requests, asks for what is missing. Returns the packets to send again.
    fn serve(&mut self, t: &mut Token) -> Vec<Bytes> {
        let mut again = Vec::new();
        t.rtr.retain(|&s| match self.get(s) {
            Some(m) => {
                again.push(m.packet.clone());
                false
            }
            None => true,
        });
        let mut missing: Vec<u64> = Vec::new();
        let mut next = self.aru + 1;
        for s in self.held(self.aru + 1, t.seq).chain([t.seq.min(self.reach()) + 1]) {
            missing.extend(next..s);
            next = s + 1;
        }
        for s in missing {
            let visits = self.miss.entry(s).or_insert(0);
            *visits = visits.saturating_add(1);
            if *visits >= MISS_VISITS && t.rtr.len() < MAX_RTR && !t.rtr.contains(&s) {
                t.rtr.push(s);
            }
        }
        again
    }

    fn put_aru(&self, t: &mut Token, me: NodeId) {
        if self.aru < t.aru || t.aru_node == me || t.aru_node == NodeId(0) {
            t.aru = self.aru.min(t.seq);
            t.aru_node = if t.aru == t.seq { NodeId(0) } else { me };
        }
    }

    fn count_flow(&mut self, t: &mut Token, sent: u32) {
        t.fcc = (t.fcc + sent).saturating_sub(self.my_trc);
        t.backlog = t.backlog.saturating_add(self.my_cbl).saturating_sub(self.my_pbl);
        self.my_trc = sent;
        self.my_pbl = self.my_cbl;
    }
}

impl Ring {
    pub(super) fn on_token(&mut self, mut t: Token, out: Out<'_>) {
        let order = match (self.state, self.recovery.as_mut()) {
            (State::Operational, _) => &mut self.op,
            (State::Recovery, Some(r)) => &mut r.order,
            // From leaving OPERATIONAL to RECOVERY of the new ring every token is old.
            _ => return,
        };
        // A retransmission must not touch any variable or timer.
        let old = t.token_seq <= order.token_seq && !self.sabotage.accept_duplicate_token;
        if t.ring != order.ring || old || self.held.is_some() {
            return;
        }
        order.token_seq = t.token_seq;
        order.last_token = None;
        self.t.retransmit = None;
        self.stats.tokens += 1;
        self.token_at = self.now;
        let received_aru = t.aru;
        let sent_before = order.sent_aru;
        let backlog = self.recovery.as_ref().map_or_else(|| self.queues.backlog(), |r| r.backlog());
        let order = self.recovery.as_mut().map_or(&mut self.op, |r| &mut r.order);
        order.my_cbl = backlog;
        let again = order.serve(&mut t);
        let budget = allowed(order, &t, &self.cfg).saturating_sub(again.len() as u64);
        order.rtr_visits = if t.rtr.is_empty() && again.is_empty() { 0 } else { order.rtr_visits + 1 };
        let mut sent = again.len() as u64;
        self.stats.retransmits += sent;
        for packet in again {
            Self::send(Dest::All, FrameLane::Ring, packet, out);
        }
        sent += self.send_new(&mut t, budget, out);

        let me = self.me.node;
        let now = self.now;
        let order = self.recovery.as_mut().map_or(&mut self.op, |r| &mut r.order);
        order.count_flow(&mut t, sent as u32);
        order.put_aru(&mut t, me);
        let quiet =
            t.seq == order.last_seq && sent == 0 && (t.rtr.is_empty() || order.rtr_visits > RTR_VISITS);
        order.quiet = if quiet { order.quiet + 1 } else { 0 };
        order.last_seq = t.seq;
        if t.aru == order.sent_aru && t.aru_node != NodeId(0) {
            order.aru_stuck += 1;
        } else {
            order.aru_stuck = 0;
            order.stuck_since = now;
        }
        order.sent_aru = t.aru;
        self.cancel_sent = false;
        if self.look_for_stuck(&t, out) {
            return;
        }
        match &mut self.recovery {
            Some(r) => {
                if r.visit(&mut t, received_aru, sent_before) {
                    self.enter_operational(out);
                }
            }
            None => {
                // Departed with ≥ s and came back with ≥ s: nobody on the way had less.
                let line = if self.sabotage.release_early { t.seq } else { sent_before.min(received_aru) };
                self.op.safe_line = self.op.safe_line.max(line.min(self.op.aru));
                self.deliver(out);
                self.op.release();
                if self.merging.is_some() || self.leave_delivered {
                    // The token ends here. Who leaves sends it on, so that the others have the messages and need
                    // not wait for its loss.
                    if self.leave_delivered {
                        self.forward(t, out);
                    }
                    return;
                }
            }
        }
        let hold = self.state == State::Operational
            && self.op.my_index == 0
            && self.op.quiet >= QUIET_VISITS
            && !std::mem::take(&mut self.cancel_hold)
            && self.queues.is_empty();
        if hold {
            self.t.hold = Some(self.now + self.cfg.timers.hold);
            self.arm_token();
            self.held = Some(t);
        } else {
            self.forward(t, out);
        }
    }

    fn look_for_stuck(&mut self, t: &Token, out: Out<'_>) -> bool {
        let order = self.recovery.as_ref().map_or(&self.op, |r| &r.order);
        let since = self.now.since(order.stuck_since);
        let members = order.members.clone();
        let half = self.cfg.timers.token / 2;
        let mine = t.aru_node == self.me.node && order.aru_stuck > STUCK_VISITS && since >= half;
        let other = order.aru_stuck > STUCK_VISITS + 2 * members.len() as u32
            && since >= half + self.cfg.timers.retransmit;
        if mine || other {
            self.give_up(t.aru_node, &members, out);
        }
        mine || other
    }

    fn arm_token(&mut self) {
        let t = self.cfg.timers.token;
        self.t.token = Some(self.now + t);
        self.t.warning = Some(self.now + t * 3 / 4);
    }

    fn forward(&mut self, mut t: Token, out: Out<'_>) {
        t.token_seq += 1;
        let order = self.recovery.as_mut().map_or(&mut self.op, |r| &mut r.order);
        let (to, packet) = (order.next(), t.encode());
        order.last_token = Some(LastToken { to, packet: packet.clone(), seq: t.seq });
        Self::send(Dest::Node(to), FrameLane::Ring, packet, out);
        self.arm_token();
        self.t.retransmit = Some(self.now + self.cfg.timers.retransmit);
    }

    /// Assigns sequence numbers to at most `budget` packets and sends them.
    fn send_new(&mut self, t: &mut Token, budget: u64, out: Out<'_>) -> u64 {
        let list = match &mut self.recovery {
            Some(r) => r.take(&self.op, budget),
            None => Vec::new(),
        };
        let mut sent = 0;
        if let Some(r) = &mut self.recovery {
            for inner in list {
                t.seq += 1;
                let (ring, kind) = (r.order.ring, Kind::Encapsulated);
                let m = Mcast::build(ring, t.seq, self.me, kind, false, (0, 1), 0, &inner.packet);
                Self::send(Dest::All, FrameLane::Ring, m.packet.clone(), out);
                r.order.insert(m);
                sent += 1;
            }
            return sent;
        }
        while sent < budget
            && let Some(f) = self.queues.pop()
        {
            t.seq += 1;
            let frag = (f.index, f.count);
            let m = Mcast::build(self.op.ring, t.seq, self.me, f.kind, f.safe, frag, f.msg_no, &f.data);
            Self::send(Dest::All, FrameLane::Ring, m.packet.clone(), out);
            self.op.insert(m);
            sent += 1;
            self.stats.sent += 1;
        }
        sent
    }

    /// Hands up what is in order. Stops where a message changes the ring: what follows is for the recovery.
    pub(super) fn deliver(&mut self, out: Out<'_>) {
        if self.sabotage.safe_as_agreed {
            self.op.safe_line = self.op.aru;
        }
        while self.merging.is_none()
            && !self.leave_delivered
            && let Some(m) = self.op.deliverable()
        {
            self.deliver_one(&m, out);
        }
    }

    pub(super) fn on_mcast(&mut self, m: Mcast, out: Out<'_>) {
        match self.state {
            State::Operational if m.ring == self.op.ring => {
                if self.op.last_token.as_ref().is_some_and(|l| m.seq > l.seq) {
                    // Somebody behind me has had the token.
                    self.op.last_token = None;
                    self.t.retransmit = None;
                }
                if self.op.member(m.origin).is_some() && self.op.insert(m) {
                    self.deliver(out);
                }
            }
            State::Gather if m.ring == self.op.ring && self.op.member(m.origin).is_some() => {
                self.op.insert(m);
            }
            State::Commit | State::Recovery if m.ring == self.op.ring && self.sabotage.no_freeze => {
                self.op.insert(m);
            }
            State::Recovery => {
                let ours = self.recovery.as_ref().is_some_and(|r| r.order.ring == m.ring);
                if ours {
                    self.recover_message(m);
                }
            }
            _ => {}
        }
    }

    pub(super) fn release_hold(&mut self, out: Out<'_>) {
        let Some(mut t) = self.held.take() else { return };
        self.t.hold = None;
        self.op.my_cbl = self.queues.backlog();
        let budget = allowed(&self.op, &t, &self.cfg);
        let sent = self.send_new(&mut t, budget, out) as u32;
        if sent > 0 {
            self.op.quiet = 0;
            t.fcc += sent;
            self.op.my_trc += sent;
            self.op.last_seq = t.seq;
            let me = self.me.node;
            self.op.put_aru(&mut t, me);
            self.op.sent_aru = t.aru;
            self.deliver(out);
        }
        self.cancel_hold = false;
        if self.merging.is_none() {
            self.forward(t, out);
        }
    }

    /// A ring of one: the same order, without packets.
    pub(super) fn order_alone(&mut self, out: Out<'_>) {
        let mut batch = 0;
        while batch < ALONE_BATCH
            && self.merging.is_none()
            && !self.leave_delivered
            && let Some(f) = self.queues.pop()
        {
            let (seq, frag) = (self.op.high_seen + 1, (f.index, f.count));
            let m = Mcast::build(self.op.ring, seq, self.me, f.kind, f.safe, frag, f.msg_no, &f.data);
            self.op.insert(m);
            self.stats.sent += 1;
            self.op.safe_line = self.op.aru;
            self.deliver(out);
            self.op.release();
            batch += 1;
        }
        self.pending |= !self.queues.is_empty();
    }

    pub(super) fn my_leave_again(&mut self) {
        if let Some(reason) = self.my_leave {
            let body = packet::encode_procs(hear::leaving_tag(reason), &ProcSet::default());
            self.queues.ring(true, body);
            self.pending = true;
        }
    }
}
