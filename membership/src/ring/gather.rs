//! GATHER and COMMIT: agreeing on who forms the next ring.
//!
//! Joins carry (proc, failed); both only grow within a gather, so that it ends. Consensus is reached when the latest
//! join of everybody in proc − failed carries my own sets and echoes my cookie. Then the first in ring order sends
//! a commit token round twice: the first round collects what everybody has of its old ring, the second tells all.

use super::clique::Graph;
use super::log::{Cause, RingLog, State};
use super::packet::{Commit, CommitEntry, Join, MAX_NODES};
use super::recover::Recovery;
use super::set::ProcSet;
use super::{Committing, JOIN_BURST, Out, PROTO, Ring};
use crate::engine::{Dest, EngineOutput, FrameLane, IoAction};
use crate::event::{Member, RingId};
use cairn_base::{Boottime, Incarnation, NodeId, Proc};

impl Ring {
    /// `cause` is `None` at the start only.
    pub(super) fn enter_gather(&mut self, cause: Option<Cause>, out: Out<'_>) {
        let t = self.cfg.timers;
        if self.state != State::Gather || cause.is_none() {
            if let Some(r) = self.recovery.take() {
                // What was recovered stays in the old ring's store; the id that failed is burnt.
                self.received |= r.received;
                self.obligation |= r.promise;
            }
            self.committing = None;
            self.held = None;
            self.gather.joins.clear();
            self.gather.cap = self.now + 3 * t.consensus;
            self.gather.sealed = false;
            self.gather.join_tokens = JOIN_BURST;
            self.state = State::Gather;
            (self.t.warning, self.t.retransmit, self.t.hold) = (None, None, None);
        }
        self.stats.gathers += 1;
        self.gather.agreed = false;
        self.gather.proc.add(self.me);
        if let Some(cause) = cause {
            Self::note(RingLog::Gather { cause }, out);
        }
        self.t.token = None;
        self.t.consensus = Some((self.now + t.consensus).min(self.gather.cap.max(self.now + t.join)));
        if self.gather.join_tokens > 0 {
            self.gather.join_tokens -= 1;
            self.send_join(cause.unwrap_or_default(), out);
        }
        self.check_consensus(out);
    }

    fn send_join(&mut self, cause: Cause, out: Out<'_>) {
        self.gather.join_no += 1;
        let join = Join {
            sender: self.me,
            max_ring_seq: self.max_ring_seq,
            cookie: self.cfg.cookie,
            cause: cause as u8,
            proto_min: PROTO,
            proto_max: PROTO,
            config_version: self.cfg.config_version,
            join_no: self.gather.join_no,
            proc: self.gather.proc.clone(),
            failed: self.gather.failed.clone(),
            heard: self.heard_list(),
        };
        Self::send(Dest::All, FrameLane::Join, join.encode(), out);
        self.t.join = Some(self.now + self.cfg.timers.join);
    }

    pub(super) fn on_join_timer(&mut self, out: Out<'_>) {
        if self.state == State::Gather {
            self.gather.join_tokens = (self.gather.join_tokens + 1).min(JOIN_BURST);
            self.send_join(Cause::JoinNews, out);
        }
    }

    /// Processors that are to form the ring, in ring order.
    fn candidates(&self) -> Vec<Proc> {
        let mut list = self.gather.proc.without(&self.gather.failed);
        list.sort_by_key(|p| self.cfg.place(p.node));
        list
    }

    fn votes_for_my_sets(&self, p: Proc) -> bool {
        p == self.me
            || self.gather.joins.get(&p).is_some_and(|(j, _)| {
                j.proc == self.gather.proc && j.failed == self.gather.failed && self.echoes_me(j)
            })
    }

    fn echoes_me(&self, j: &Join) -> bool {
        j.heard.iter().any(|h| h.node == self.me.node && h.cookie == self.cfg.cookie)
    }

    fn check_consensus(&mut self, out: Out<'_>) {
        if self.state != State::Gather || self.gather.agreed {
            return;
        }
        let list = self.candidates();
        if list.len() > MAX_NODES || !list.iter().all(|&p| self.votes_for_my_sets(p)) {
            return;
        }
        self.gather.agreed = true;
        self.t.consensus = None;
        self.t.token = Some(self.now + self.cfg.timers.token);
        if list[0] == self.me {
            self.create_commit(&list, out);
        }
    }

    /// That processor is dead for certain (hint, newer incarnation, own word).
    pub(super) fn on_dead(&mut self, p: Proc, cause: Cause, out: Out<'_>) {
        if p.node == self.me.node {
            return;
        }
        let concerned = match self.state {
            State::Operational => self.op.member(p).is_some(),
            State::Gather => self.gather.proc.has(p) && !self.gather.failed.covers(p),
            State::Commit | State::Recovery => {
                self.committing.as_ref().is_some_and(|c| c.commit.entries.iter().any(|e| e.proc == p))
            }
        };
        if concerned {
            let cause = match self.state {
                State::Operational | State::Gather => cause,
                State::Commit => Cause::JoinCommit,
                State::Recovery => Cause::JoinRecovery,
            };
            self.gather.failed.add(p);
            self.enter_gather(Some(cause), out);
        }
    }

    pub(super) fn on_leave(&mut self, from: Proc, out: Out<'_>) {
        self.on_dead(from, Cause::JoinOperational, out);
    }

    pub(super) fn on_join(&mut self, from: Proc, cookie: u64, j: Join, out: Out<'_>) {
        let sane = j.sender == from
            && j.cookie == cookie
            && j.proc.has(from)
            && !j.failed.covers(from)
            && !j.proc.iter().any(|p| p.node == self.me.node && p.incarnation > self.me.incarnation);
        if !sane {
            self.stats.malformed += 1;
            return;
        }
        if !self.note_echo(from, cookie, &j.heard, out) || !self.join_is_news(from.node, j.join_no) {
            return;
        }
        let member = self.op.member(from).is_some();
        let fits =
            j.config_version == self.cfg.config_version && (j.proto_min..=j.proto_max).contains(&PROTO);
        if !member && !fits {
            return;
        }
        match self.state {
            State::Operational => {
                let stale = j.max_ring_seq < self.op.ring.seq;
                let foreign_wants_us = j.proc.has(self.me) && self.echoes_me(&j) && !self.is_held_down(from);
                // A member that cannot receive says so by going on alone.
                if member && !stale && j.cause == Cause::FailedToReceive as u8 && j.failed.covers(self.me) {
                    return self.on_dead(from, Cause::JoinNews, out);
                }
                if j.failed.covers(self.me) || if member { stale } else { !foreign_wants_us } {
                    return;
                }
                let news = !(j.proc.is_covered_by(&self.gather.proc) && j.failed.len() == 0);
                let cause = if news { Cause::JoinNews } else { Cause::JoinOperational };
                self.max_ring_seq = self.max_ring_seq.max(j.max_ring_seq);
                self.merge_sets(&j);
                self.enter_gather(Some(cause), out);
                self.gather.joins.insert(from, (j, self.now));
                self.check_consensus(out);
            }
            State::Gather => self.join_in_gather(from, j, out),
            State::Commit | State::Recovery => {
                let commit = self.committing.as_ref().expect("invariant: set in COMMIT and RECOVERY");
                let in_ring = commit.commit.entries.iter().any(|e| e.proc == from);
                let newer = j.max_ring_seq >= commit.commit.ring.seq;
                // In COMMIT also a member whose sets have grown since it agreed: it will not accept the commit.
                let moved_on = self.state == State::Commit
                    && !(j.proc.is_covered_by(&self.gather.proc)
                        && j.failed.is_covered_by(&self.gather.failed));
                if in_ring && (newer || moved_on) {
                    let cause =
                        if self.state == State::Commit { Cause::JoinCommit } else { Cause::JoinRecovery };
                    self.enter_gather(Some(cause), out);
                    self.join_in_gather(from, j, out);
                }
            }
        }
    }

    fn merge_sets(&mut self, j: &Join) {
        let g = &mut self.gather;
        if g.sealed {
            for p in j.proc.iter().filter(|&p| !g.proc.covers(p)).collect::<Vec<_>>() {
                g.failed.add(p);
            }
        }
        g.proc.merge(&j.proc);
        // An earlier life of mine may be in it, and must be taken over, else the sets never become equal.
        for p in j.failed.iter().filter(|p| p.node != self.me.node || p.incarnation < self.me.incarnation) {
            g.failed.add(p);
        }
    }

    fn join_in_gather(&mut self, from: Proc, j: Join, out: Out<'_>) {
        self.max_ring_seq = self.max_ring_seq.max(j.max_ring_seq);
        let known = self.gather.proc.covers(from);
        if j.failed.covers(self.me) {
            // It goes on without us, so we go on without it.
            if known && !self.gather.failed.covers(from) {
                self.gather.failed.add(from);
                self.enter_gather(Some(Cause::JoinNews), out);
            }
            return;
        }
        let echoes = self.echoes_me(&j);
        if !known && !(j.proc.has(self.me) && echoes && !self.is_held_down(from)) {
            return;
        }
        let covered = j.proc.is_covered_by(&self.gather.proc) && j.failed.is_covered_by(&self.gather.failed);
        self.gather.joins.insert(from, (j, self.now));
        // Half-heard: it does not vote and teaches nothing, but the clique decision must know its edges.
        if !echoes || self.gather.failed.covers(from) {
            return;
        }
        if covered {
            self.check_consensus(out);
        } else {
            let (j, _) = self.gather.joins[&from].clone();
            self.merge_sets(&j);
            self.enter_gather(Some(Cause::JoinNews), out);
        }
    }

    pub(super) fn on_consensus_timer(&mut self, out: Out<'_>) {
        if self.state != State::Gather {
            return;
        }
        let list = self.candidates();
        let silent: Vec<Proc> = list.iter().copied().filter(|&p| !self.votes_for_my_sets(p)).collect();
        if !silent.is_empty() {
            let keep = self.best_clique(&list);
            for p in list.into_iter().filter(|p| !keep.contains(p)) {
                self.gather.failed.add(p);
            }
            if self.now >= self.gather.cap {
                self.gather.sealed = true;
                // Somebody in the clique still does not agree with our sets: forming it again would only wait.
                self.gather.cap = self.now + self.cfg.timers.consensus;
            }
        }
        self.enter_gather(Some(Cause::ConsensusTimeout), out);
    }

    /// The preferred clique if I am in it, else the best with me.
    fn best_clique(&self, list: &[Proc]) -> Vec<Proc> {
        let window = self.cfg.timers.hear_window;
        let mut procs: Vec<Proc> = list
            .iter()
            .copied()
            .filter(|p| {
                *p == self.me || self.gather.joins.get(p).is_some_and(|(_, at)| self.now.since(*at) <= window)
            })
            .collect();
        procs.sort();
        procs.truncate(MAX_NODES);
        let mine = self.heard_list();
        let cookie = |p: Proc| if p == self.me { self.cfg.cookie } else { self.gather.joins[&p].0.cookie };
        let hears = |a: Proc, b: Proc| {
            let list = if a == self.me { &mine } else { &self.gather.joins[&a].0.heard };
            list.iter().any(|h| h.node == b.node && h.cookie == cookie(b))
        };
        let edges = procs
            .iter()
            .map(|&a| {
                let near = procs.iter().enumerate().filter(|&(_, &b)| a != b && hears(a, b) && hears(b, a));
                near.fold(0u64, |m, (i, _)| m | 1 << i)
            })
            .collect();
        let nodes = procs.iter().map(|p| (p.node, self.cfg.member(*p).votes)).collect();
        let graph = Graph { nodes, edges, device_master: self.device_master };
        let me = procs.iter().position(|&p| p == self.me).expect("invariant: I am a vertex");
        let best = graph.best(0);
        let best = if best >> me & 1 == 1 { best } else { graph.best(1 << me) };
        let nodes: Vec<NodeId> = graph.members(best).collect();
        procs.into_iter().filter(|p| nodes.contains(&p.node)).collect()
    }

    // ---- COMMIT

    fn create_commit(&mut self, list: &[Proc], out: Out<'_>) {
        Self::note(RingLog::CreatingCommit, out);
        let rep_incarnation =
            if self.sabotage.ring_id_without_incarnation { Incarnation(0) } else { self.me.incarnation };
        let ring = RingId { seq: self.max_ring_seq + 4, rep: self.me.node, rep_incarnation };
        let blank = |&proc: &Proc| CommitEntry {
            proc,
            old_ring: RingId::default(),
            aru: 0,
            high_delivered: 0,
            high_seen: 0,
            obligation: 0,
            filled: false,
            received: false,
        };
        let entries = list.iter().map(blank).collect();
        let commit = Commit { ring, token_seq: 0, round: 1, proto: PROTO, index: 0, entries };
        self.accept_commit(commit, out);
        if list.len() == 1 {
            self.enter_recovery(out);
            self.enter_operational(out);
        }
    }

    fn accept_commit(&mut self, mut c: Commit, out: Out<'_>) {
        assert!(c.ring.seq > self.committed_seq, "ring {} was committed to before", c.ring);
        self.committed_seq = c.ring.seq;
        self.max_ring_seq = self.max_ring_seq.max(c.ring.seq);
        Self::note(RingLog::SavingState { aru: self.op.aru, high_seen: self.op.high_seen }, out);
        Self::note(RingLog::StoringSeq { ring_seq: c.ring.seq }, out);
        out.push(EngineOutput::Io(IoAction::Persist { ring_seq: c.ring.seq }));
        Self::note(RingLog::EnteringCommit, out);
        let e = &mut c.entries[c.index as usize];
        e.old_ring = self.op.ring;
        e.aru = self.op.aru;
        e.high_delivered = self.op.high_delivered;
        e.high_seen = self.op.high_seen;
        e.obligation = if self.received { self.obligation } else { 0 };
        e.received = self.received;
        e.filled = true;
        self.state = State::Commit;
        (self.t.join, self.t.consensus) = (None, None);
        self.forward_commit(c, out);
    }

    fn forward_commit(&mut self, mut c: Commit, out: Out<'_>) {
        let n = c.entries.len();
        let token_seq = c.token_seq;
        let mine = c.clone();
        c.index = ((usize::from(c.index) + 1) % n) as u16;
        c.token_seq += 1;
        let next = c.entries[c.index as usize].proc.node;
        let packet = c.encode();
        if n > 1 {
            Self::send(Dest::Node(next), FrameLane::Ring, packet.clone(), out);
            self.t.retransmit = Some(self.now + self.cfg.timers.retransmit);
        }
        self.t.token = Some(self.now + self.cfg.timers.token);
        self.committing = Some(Committing { commit: mine, next, packet, token_seq });
    }

    pub(super) fn on_commit(&mut self, c: Commit, out: Out<'_>) {
        let mine = &c.entries[c.index as usize];
        if mine.proc != self.me || c.proto != PROTO || c.entries[0].proc.node != c.ring.rep {
            return;
        }
        match self.state {
            State::Gather => {
                let set: ProcSet = c.entries.iter().map(|e| e.proc).collect();
                let wanted: ProcSet = self.candidates().into_iter().collect();
                let first = c.round == 1 && c.index > 0 && !mine.filled;
                if first && set == wanted && c.ring.seq > self.committed_seq {
                    self.accept_commit(c, out);
                }
            }
            State::Commit => {
                let k = self.committing.as_ref().expect("invariant: set in COMMIT");
                let full = c.entries.iter().all(|e| e.filled);
                let turn = if c.index == 0 { c.round == 1 } else { c.round == 2 };
                if c.ring != k.commit.ring || c.token_seq <= k.token_seq || !full || !turn {
                    return;
                }
                // My own entry must come back as I filled it.
                if *mine != k.commit.entries[c.index as usize] {
                    self.stats.malformed += 1;
                    return;
                }
                let mut c = c;
                c.round = 2;
                self.forward_commit(c, out);
                self.enter_recovery(out);
            }
            State::Recovery => {
                let k = self.committing.as_ref().expect("invariant: set in RECOVERY");
                let back = c.index == 0 && c.round == 2 && c.ring == k.commit.ring;
                if back && c.token_seq > k.token_seq {
                    self.send_first_token(out);
                }
            }
            State::Operational => {}
        }
    }

    fn enter_recovery(&mut self, out: Out<'_>) {
        let commit = &self.committing.as_ref().expect("invariant: set in COMMIT").commit;
        let members = commit.entries.iter().map(|e| self.cfg.member(e.proc)).collect();
        Self::note(RingLog::EnteringRecovery, out);
        for (index, e) in commit.entries.iter().enumerate() {
            out.push(EngineOutput::Log(RingLog::Position {
                index,
                member: e.proc,
                previous: e.old_ring,
                aru: e.aru,
                high_delivered: e.high_delivered,
                received: e.received,
            }));
        }
        let recovery = Recovery::new(commit, members, self.me, &self.op, self.cfg.window, self.now, out);
        self.recovery = Some(recovery);
        self.state = State::Recovery;
    }

    /// The aru does not advance because of `node`. The victim itself leaves alone and says so in its join; if it
    /// does not, everybody else goes on without it.
    pub(super) fn give_up(&mut self, node: NodeId, members: &[Member], out: Out<'_>) {
        Self::note(RingLog::FailedToReceive { node }, out);
        let alone = node == self.me.node;
        for p in members.iter().map(|m| m.proc()).filter(|p| (p.node == node) != alone) {
            self.gather.failed.add(p);
        }
        let cause = if alone { Cause::FailedToReceive } else { Cause::JoinNews };
        self.enter_gather(Some(cause), out);
    }

    /// Sets of the gather that follows start from the ring just formed.
    pub(super) fn reset_gather(&mut self) {
        self.gather.proc = self.op.members.iter().map(|m| m.proc()).collect();
        if !self.sabotage.keep_failed {
            self.gather.failed = ProcSet::default();
        }
        self.gather.joins.clear();
        self.gather.cap = Boottime::MAX;
        self.gather.sealed = false;
        self.gather.agreed = false;
    }
}
