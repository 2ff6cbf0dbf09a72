//! Mastership: one Disk Paxos instance per term, on blocks that only their owners write.
//!
//! ```text
//!   no ballot ──may start, rank waited──► phase 1: write mbal ─ read all ─► phase 2: write bal, value ─ read all ─► chosen
//!        ▲          a higher mbal, a higher term, a decision seen            │
//!        └──────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Term t+1 may be started when the master of t wrote that it resigns, or its slot has been silent for D. Starting
//! is all that must be checked: whoever sees t+1 on the disk knows that somebody checked it. What is *not* implied
//! is that leases of older terms are over; `lease.rs` sees to that.
//!
//! Adopting a higher term wipes the ballot of the lower one from my block. That is safe: a proposer that could
//! still decide the lower term reads my block after its own write and finds the higher term there.
//! Source: Gafni, Lamport: Disk Paxos, Distributed Computing 16 (2003).

use super::{Actions, Ballot, EBlock, Flags, NodeId, Peer, Phase, Proc, Qdisk, Slot, idx, low48, same_proc};
use crate::MAX_NODES;
use crate::event::{LogLevel, QdiskEvent};
use cairn_base::Boottime;
use std::cmp::Reverse;

/// The next term is the next multiple of this when a slot cannot be read: its owner may have been ahead of
/// everything that can be.
const TERM_JUMP: u64 = 1 << 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Try {
    None,
    /// Write number that carries the step; `None` until it was submitted.
    One(Option<u64>),
    Two(Option<u64>),
}

#[derive(Clone, Debug)]
pub(super) struct Election {
    pub(super) term: u64,
    pub(super) mbal: Ballot,
    pub(super) bal: Ballot,
    pub(super) value: Proc,
    /// `value` is the decision of `term`.
    pub(super) chosen: bool,
    /// The decided master was me (or an earlier life of me) and does not act any more.
    pub(super) resigned: bool,
    master: bool,
    attempt: Try,
    /// End of the last read that showed the decided master's slot changing.
    master_fresh: Boottime,
    /// Since when a ballot may be started.
    open_since: Option<Boottime>,
    retry_at: Boottime,
    announced: Option<(u64, Option<Proc>)>,
}

impl Default for Election {
    fn default() -> Self {
        Self {
            term: 0,
            mbal: Ballot(0),
            bal: Ballot(0),
            value: Proc::default(),
            chosen: false,
            resigned: false,
            master: false,
            attempt: Try::None,
            master_fresh: Boottime::ZERO,
            open_since: None,
            retry_at: Boottime::ZERO,
            announced: None,
        }
    }
}

impl Election {
    pub(super) const fn is_master(&self) -> bool {
        self.master
    }

    pub(super) fn balloting(&self) -> bool {
        self.attempt != Try::None
    }

    pub(super) fn decided(&self) -> Option<Proc> {
        self.chosen.then_some(self.value)
    }

    /// The silence of the master counts from now on.
    pub(super) fn excuse_master(&mut self, now: Boottime) {
        self.master_fresh = now;
    }

    pub(super) fn abdicate(&mut self) {
        self.master = false;
        self.attempt = Try::None;
    }

    /// A block with this write number is on its way; it carries the present step.
    pub(super) fn written(&mut self, seq: u64) {
        match &mut self.attempt {
            Try::One(w) | Try::Two(w) if w.is_none() => *w = Some(seq),
            _ => {}
        }
    }

    fn enter_term(&mut self, term: u64, now: Boottime) {
        assert!(term > self.term, "terms rise");
        let announced = self.announced;
        *self = Self { term, announced, master_fresh: now, retry_at: self.retry_at, ..Self::default() };
    }

    fn learn(&mut self, value: Proc, now: Boottime) {
        self.value = value;
        self.chosen = true;
        self.attempt = Try::None;
        self.open_since = None;
        self.master_fresh = now;
    }
}

/// Order of candidates, better is greater.
type Rank = (bool, bool, bool, u32, Reverse<u16>);

impl Qdisk {
    /// My last life's ballot state goes on: what it wrote may have been decided.
    pub(super) fn carry_over(&mut self, slots: &[Slot; MAX_NODES], now: Boottime) {
        let me = self.me_idx();
        let e = &mut self.election;
        e.master_fresh = now;
        if let Some(b) = &self.peers[me].last {
            (e.term, e.mbal, e.bal, e.value) = (b.term, b.mbal, b.bal, b.value);
            e.chosen = b.flags.has(Flags::CHOSEN);
            let over = [Flags::RESIGN, Flags::STOPPED_CLEAN, Flags::STOPPED_KILLED];
            e.resigned = e.chosen && b.value.node == self.cfg.me.node && over.iter().any(|&f| b.flags.has(f));
            self.highest_incarnation = self.highest_incarnation.max(b.highest_incarnation);
            self.lease.granted = b.lease;
            // Kill entries of my last life stand until the victim comes again.
            for (i, kill) in b.kill.iter().enumerate() {
                if self.kills[i].is_none() {
                    self.kills[i] = *kill;
                    self.kills_written[i] = kill.map(|_| now);
                }
            }
        }
        if matches!(slots[me], Slot::Torn(_) | Slot::Foreign(_)) {
            let seen = self.peers.iter().filter_map(|p| p.last.as_ref()).map(|b| b.term).max();
            self.lost_over = Some(seen.unwrap_or(0));
        }
    }

    /// `mine`: the read shows my present block, so it ended the write before it.
    pub(super) fn elect(&mut self, now: Boottime, started: Boottime, mine: bool, out: &mut Actions) {
        self.adopt(now, out);
        if mine {
            self.advance_ballot(now, out);
        }
        self.maybe_start(now, started, out);
        self.announce(out);
    }

    fn in_term(&self) -> impl Iterator<Item = &Peer> + '_ {
        let term = self.election.term;
        self.others()
            .map(|(i, _)| &self.peers[i])
            .filter(move |p| p.last.as_ref().is_some_and(|b| b.term == term))
    }

    /// Takes over what others know: a higher term, the decision of this one.
    fn adopt(&mut self, now: Boottime, out: &mut Actions) {
        let top =
            self.others().filter_map(|(i, _)| self.peers[i].last.as_ref()).map(|b| b.term).max().unwrap_or(0);
        if top > self.election.term {
            if self.election.master {
                self.log(out, LogLevel::Warning, "Master conflict: abdicating");
            }
            self.election.enter_term(top, now);
            self.found_again();
        }
        let mut decided: Vec<Proc> = self
            .in_term()
            .filter_map(|p| p.last.as_ref())
            .filter(|b| b.flags.has(Flags::CHOSEN))
            .map(|b| b.value)
            .collect();
        decided.extend(self.election.decided());
        decided.dedup();
        let Some(&value) = decided.first() else { return };
        if decided.iter().any(|&v| v != value) {
            // Cannot happen while blocks have one writer; whoever broke that must not get two masters.
            self.log(
                out,
                LogLevel::Critical,
                &format!("two masters of term {}: {decided:?}", self.election.term),
            );
            let next = (self.election.term / TERM_JUMP + 1) * TERM_JUMP;
            self.election.enter_term(next, now);
            return;
        }
        if !self.election.chosen {
            self.election.learn(value, now);
            // Somebody finished my ballot for me.
            if same_proc(value, self.cfg.me) && self.phase == Phase::Running {
                self.become_master(out);
            }
        }
        if let Some(i) = idx(value.node)
            && self.peers[i].fresh_at == now
            && self.peers[i].proc().is_some_and(|p| same_proc(value, p))
            && value.node != self.cfg.me.node
        {
            self.election.master_fresh = now;
        }
    }

    fn advance_ballot(&mut self, now: Boottime, out: &mut Actions) {
        let (Try::One(Some(seq)) | Try::Two(Some(seq))) = self.election.attempt else { return };
        if seq > self.seq {
            return;
        }
        let mbal = self.election.mbal;
        let beaten = self.in_term().filter_map(|p| p.last.as_ref()).any(|b| b.mbal > mbal);
        if beaten && !self.mutant(101) {
            self.election.attempt = Try::None;
            self.election.retry_at = now + self.cfg.cycle * (1 + self.rank() as u32);
            return;
        }
        if self.hidden_slots() {
            return;
        }
        match self.election.attempt {
            Try::One(_) => {
                let best = self
                    .in_term()
                    .filter_map(|p| p.last.as_ref())
                    .map(|b| (b.bal, b.value))
                    .chain([(self.election.bal, self.election.value)])
                    .max_by_key(|&(bal, _)| bal);
                let value = best.filter(|&(bal, _)| bal > Ballot(0)).map_or(low48(self.cfg.me), |(_, v)| v);
                self.election.bal = mbal;
                self.election.value = value;
                self.election.attempt = Try::Two(None);
            }
            Try::Two(_) => {
                let value = self.election.value;
                self.election.learn(value, now);
                if same_proc(value, self.cfg.me) {
                    self.become_master(out);
                }
            }
            Try::None => {}
        }
    }

    fn become_master(&mut self, out: &mut Actions) {
        if self.election.resigned {
            return;
        }
        self.election.master = true;
        self.log(out, LogLevel::Info, "Assuming master role");
    }

    /// A configured slot could hide something newer than what I know of it.
    pub(super) fn hidden_slots(&self) -> bool {
        self.others().any(|(i, _)| self.peers[i].hidden)
    }

    /// Whether the master of the present term is out of office, judged by a read that began at `started`.
    fn vacant(&self, started: Boottime, now: Boottime) -> bool {
        let e = &self.election;
        let Some(v) = e.decided() else { return true };
        if same_proc(v, self.cfg.me) {
            return e.resigned;
        }
        if v.node == self.cfg.me.node && e.resigned {
            return true;
        }
        let word = idx(v.node).and_then(|i| self.peers[i].last.as_ref()).is_some_and(|b| {
            let over = [Flags::RESIGN, Flags::STOPPED_CLEAN, Flags::STOPPED_KILLED];
            b.term == e.term && over.iter().any(|&f| b.flags.has(f))
        });
        let until = if self.mutant(17) { now } else { started };
        word || until >= e.master_fresh + self.cfg.dead_after()
    }

    fn eligible(&self) -> bool {
        self.phase == Phase::Running
            && self.renewed_at.is_some()
            && self.upgraded
            && self.mine.as_ref().is_some_and(|m| m.operational)
    }

    fn maybe_start(&mut self, now: Boottime, started: Boottime, out: &mut Actions) {
        if self.election.balloting() || self.election.master {
            return;
        }
        if !self.vacant(started, now) || !self.eligible() || self.hidden_slots() {
            self.election.open_since = None;
            return;
        }
        let since = *self.election.open_since.get_or_insert(now);
        if now < since + self.cfg.cycle * (2 * self.rank() as u32) || now < self.election.retry_at {
            return;
        }
        let term = self.election.term;
        // A term at a jump that is still open is above everything that cannot be read.
        let open_jump = !self.election.chosen && term > 0 && term.is_multiple_of(TERM_JUMP);
        if self.knowledge_lost() && !open_jump {
            self.election.enter_term((term / TERM_JUMP + 1) * TERM_JUMP, now);
        } else if self.election.chosen || term == 0 {
            self.election.enter_term(term + 1, now);
        }
        self.found_again();
        let round = self
            .in_term()
            .filter_map(|p| p.last.as_ref())
            .map(|b| b.mbal.round())
            .chain([self.election.mbal.round()])
            .max()
            .unwrap_or(0);
        self.election.mbal = Ballot::new(round + 1, self.cfg.me.node);
        self.election.attempt = Try::One(None);
        self.log(out, LogLevel::Debug, "Making bid for master");
    }

    /// Some slot has held more than I can know.
    fn knowledge_lost(&self) -> bool {
        self.lost_over.is_some()
            || self.others().any(|(i, _)| {
                let p = &self.peers[i];
                let lost = |b: &EBlock| {
                    b.flags.has(Flags::LOST) && b.term / TERM_JUMP == self.election.term / TERM_JUMP
                };
                p.unreadable.is_some() || p.last.as_ref().is_some_and(|b| lost(b))
            })
    }

    fn found_again(&mut self) {
        if self.lost_over.is_some_and(|t| self.election.term / TERM_JUMP > t / TERM_JUMP) {
            self.lost_over = None;
        }
    }

    fn announce(&mut self, out: &mut Actions) {
        let now_known = (self.election.term, self.master());
        if self.election.announced != Some(now_known) {
            self.election.announced = Some(now_known);
            let (term, master) = now_known;
            out.push(super::Action::Event(QdiskEvent::Master { term, master }));
            if let Some(m) = master.filter(|m| m.node != self.cfg.me.node) {
                self.log(out, LogLevel::Info, &format!("Node {} is the master", m.node));
            }
        }
    }

    // ---- order of candidates, arbitration ----

    fn rank_of(&self, n: NodeId) -> Option<Rank> {
        if n == self.cfg.me.node {
            let votes = self.my_votes();
            return Some((
                !self.election.resigned,
                self.upgraded,
                self.can_be_quorate(votes),
                votes,
                Reverse(n.0),
            ));
        }
        let p = &self.peers[idx(n)?];
        // Proved dead: its block looks alive until it is old, and its view may be larger than what is left.
        let is_gone = p.proc().is_some_and(|q| self.gone.contains(&q));
        if !p.alive
            || p.missed
            || p.stopped()
            || is_gone
            || p.evicted.is_some_and(|(i, _)| Some(i) == p.proc().map(|q| q.incarnation))
        {
            return None;
        }
        let b = p.last.as_ref()?;
        let resigned = b.flags.has(Flags::RESIGN) && b.term == self.election.term;
        Some((!resigned, b.score > 0, self.can_be_quorate(b.voters), b.voters, Reverse(n.0)))
    }

    /// How many living nodes come before me.
    fn rank(&self) -> usize {
        let mine = self.rank_of(self.cfg.me.node);
        self.others().filter(|&(_, n)| self.rank_of(n) > mine).count()
    }

    /// The master gives way to a better component: the larger healthy one, ties stay.
    pub(super) fn arbitrate(&mut self, now: Boottime, out: &mut Actions) {
        let Some(mine) = &self.mine else { return };
        if !self.election.master || now < mine.since + self.cfg.form {
            return;
        }
        let name = mine.view.name;
        let own = (self.upgraded, self.can_be_quorate(self.my_votes()), self.my_votes());
        let better = self.others().find(|&(i, n)| {
            let p = &self.peers[i];
            let (Some(rank), Some(b)) = (self.rank_of(n), p.last.as_ref()) else { return false };
            let rival = b.view != name && b.view.seq != 0 && now >= p.view_since + self.cfg.form;
            // A node that is still on its way into the ring is no rival of a component that works.
            let split = self.lost.contains(&b.proc()) || !self.quorate;
            rival && split && (rank.1, rank.2, rank.3) > own
        });
        if let Some((_, n)) = better {
            self.resign(&format!("node {n} lives in a better component"), out);
        }
    }

    pub(super) fn resign(&mut self, why: &str, out: &mut Actions) {
        if self.election.master {
            self.log(out, LogLevel::Notice, &format!("Resigning as master: {why}"));
            self.election.resigned = true;
        }
        self.election.abdicate();
    }
}
