//! The slots of others: what is new, who is silent, who must go; kill entries and poison pills.
//!
//! A kill entry stands in the *killer's* own block (so that nothing of the victim's is overwritten), names one
//! incarnation, and stays until a later incarnation of the node appears.

use super::{
    Action, Actions, Boottime, DiskState, Flags, Kill, KillReason, LogLevel, NodeId, Peer, Phase, Pill,
    PillFailure, PillProof, PillState, Proc, Qdisk, QdiskEvent, Slot, StopWhy, idx, with_rho,
};
use crate::MAX_NODES;
use std::time::Duration;

impl Qdisk {
    /// Takes in one read of all slots.
    pub(super) fn look(
        &mut self,
        now: Boottime,
        started: Boottime,
        slots: &[Slot; MAX_NODES],
        out: &mut Actions,
    ) {
        let me = self.me_idx();
        for (i, _) in self.others().chain([(me, self.cfg.me.node)]).collect::<Vec<_>>() {
            let (d, shade) = (self.cfg.dead_after(), self.shade_limit());
            let p = &mut self.peers[i];
            match &slots[i] {
                slot @ (Slot::Torn(_) | Slot::Foreign(_) | Slot::Empty)
                    if *slot != Slot::Empty || p.last.is_some() =>
                {
                    let h = match slot {
                        Slot::Torn(h) | Slot::Foreign(h) => *h,
                        // A block that was there and is wiped.
                        Slot::Empty | Slot::Valid(_) => 0,
                    };
                    let since = match p.unreadable {
                        Some((old, since)) if old == h => since,
                        _ => now,
                    };
                    p.unreadable = Some((h, since));
                    p.hidden = started < since + d;
                    p.shaded = started < since + shade;
                    p.unchanged = p.unchanged.saturating_add(1);
                }
                Slot::Torn(_) | Slot::Foreign(_) | Slot::Empty => {
                    (p.unreadable, p.hidden, p.shaded) = (None, false, false);
                }
                Slot::Valid(b) => {
                    (p.unreadable, p.hidden, p.shaded) = (None, false, false);
                    let newer =
                        p.last.as_ref().is_none_or(|o| (b.incarnation, b.seq) > (o.incarnation, o.seq));
                    if newer {
                        self.accept(i, now, started, b, out);
                    } else {
                        p.unchanged = p.unchanged.saturating_add(1);
                        // An older value than the one I know is a late write of its owner; what counts is the newest.
                        if p.last.as_ref().is_some_and(|o| (o.incarnation, o.seq) == (b.incarnation, b.seq)) {
                            p.valid_read = Some(started);
                        }
                    }
                }
            }
        }
        self.see_kills(now, out);
    }

    fn accept(
        &mut self,
        i: usize,
        now: Boottime,
        started: Boottime,
        b: &crate::ondisk::EBlock,
        out: &mut Actions,
    ) {
        let mine = i == self.me_idx();
        let before = self.peers[i].last.take();
        if !mine || !matches!(self.phase, Phase::Running | Phase::Stopping) {
            self.note_grant(i, before.as_deref(), b, now);
        }
        if mine {
            self.own_changes += 1;
        }
        let p = &mut self.peers[i];
        let same_life = before.as_ref().is_some_and(|o| o.incarnation == b.incarnation);
        let known = before.is_some();
        if before.as_ref().is_none_or(|o| o.view != b.view) {
            p.view_since = now;
        }
        // A block with an old grant number says nothing new about the lease: its base stays.
        if before.as_ref().is_none_or(|o| (o.lease, o.incarnation) != (b.lease, b.incarnation)) {
            p.base = p.valid_read;
            p.grant_at = now;
        }
        p.valid_read = Some(started);
        p.fresh_at = now;
        p.unchanged = 0;
        let proc = b.proc();
        let (stopped_before, was_alive, was_missed) = (
            before.as_ref().is_some_and(|o| same_life && o.flags.has(Flags::STOPPED_CLEAN)),
            p.alive,
            p.missed,
        );
        // The first block that I ever read of a slot may be from last year.
        p.alive = known;
        p.missed = false;
        if !same_life {
            p.undead = false;
        }
        p.last = Some(Box::new(b.clone()));
        if mine {
            return;
        }
        if self.kills[i].is_some_and(|k| k.incarnation < b.incarnation) {
            self.kills[i] = None;
            self.kills_written[i] = None;
        }
        let left = b.flags.has(Flags::STOPPED_CLEAN);
        if known && before.is_some_and(|o| !same_life && !o.flags.has(Flags::STOPPED_CLEAN)) {
            self.log(out, LogLevel::Info, &format!("Node {} shutdown", b.node));
        }
        if left && !stopped_before && known {
            self.log(out, LogLevel::Info, &format!("Node {} shutdown", b.node));
            out.push(Action::Event(QdiskEvent::Left(proc)));
        } else if known && !left && (!was_alive || was_missed || !same_life) {
            self.log(out, LogLevel::Debug, &format!("Node {} is UP", b.node));
            out.push(Action::Event(QdiskEvent::Seen(proc)));
        }
        self.see_undead(i, now, out);
        if b.flags.has(Flags::STOPPED_KILLED) {
            self.pill_stopped(proc, out);
        }
    }

    /// A block that was whole at the last read is half written in this one.
    pub(super) fn torn_in_passing(&self, slots: &[Slot; MAX_NODES]) -> bool {
        self.others().any(|(i, _)| matches!(slots[i], Slot::Torn(_)) && self.peers[i].unreadable.is_none())
    }

    /// A slot that is whole, sealed with another key, and was written since the read before this one.
    pub(super) fn foreign_and_changing(&self, slots: &[Slot; MAX_NODES]) -> Option<NodeId> {
        let Phase::Watching { reads: 1.., .. } = self.phase else { return None };
        let changed =
            |i: usize| self.peers[i].unreadable.is_some_and(|(_, since)| Some(since) == self.last_read_end);
        self.others().find(|&(i, _)| matches!(slots[i], Slot::Foreign(_)) && changed(i)).map(|(_, n)| n)
    }

    // ---- kill entries ----

    /// A kill entry with my incarnation, in anybody's block.
    pub(super) fn killed(&mut self, out: &mut Actions) -> bool {
        let (me, inc) = (self.me_idx(), self.cfg.me.incarnation);
        let hit = self.others().find_map(|(i, n)| {
            let kill = self.peers[i].last.as_ref()?.kill[me]?;
            (kill.incarnation == inc).then_some((n, kill.reason))
        });
        if let Some((by, reason)) = hit {
            self.stop(StopWhy::Evicted { by, reason }, out);
        }
        hit.is_some()
    }

    fn see_kills(&mut self, now: Boottime, out: &mut Actions) {
        for (by, n) in self.others() {
            let Some(kills) = self.peers[by].last.as_ref().map(|b| b.kill) else { continue };
            for (v, kill) in kills.iter().enumerate() {
                if let Some(k) = kill
                    && v != self.me_idx()
                {
                    self.evicted(v, *k, n, now, out);
                }
            }
        }
    }

    fn evicted(&mut self, v: usize, k: Kill, by: NodeId, now: Boottime, out: &mut Actions) {
        let p = &mut self.peers[v];
        let current = p.proc().map(|q| q.incarnation);
        if p.evicted.is_some_and(|(i, _)| i >= k.incarnation) || current.is_some_and(|c| c > k.incarnation) {
            return;
        }
        p.evicted = Some((k.incarnation, now));
        let node = NodeId(v as u16 + 1);
        let victim = Proc { node, incarnation: k.incarnation };
        self.log(out, LogLevel::Notice, &format!("Node {node} evicted"));
        out.push(Action::Event(QdiskEvent::Evicted { victim, by, reason: k.reason }));
    }

    fn see_undead(&mut self, i: usize, now: Boottime, out: &mut Actions) {
        let grace = self.cfg.cycle * 3 + self.cfg.io_limit;
        let p = &mut self.peers[i];
        let Some(b) = &p.last else { return };
        let dead = p.evicted.is_some_and(|(inc, at)| inc == b.incarnation && now >= at + grace);
        if !dead || p.undead || p.stopped() {
            return;
        }
        p.undead = true;
        let (proc, n) = (b.proc(), b.node);
        self.log(out, LogLevel::Critical, &format!("Node {n} is undead."));
        if self.kills[i].is_some_and(|k| k.incarnation == proc.incarnation) {
            self.log(out, LogLevel::Critical, &format!("Writing eviction notice (again) for node {n}"));
            self.notices.push(n);
        }
        out.push(Action::Event(QdiskEvent::Undead(proc)));
    }

    // ---- silence ----

    /// Storage that is slow for everybody: my own renewals came late, and so did those of more than half of us.
    /// Then nobody is judged, and all counts restart.
    pub(super) fn stall_rule(&mut self, now: Boottime, started: Boottime) {
        let limit = self.cfg.cycle * 2;
        if self.renewal_gap <= limit || self.mutant(27) {
            return;
        }
        let live: Vec<usize> = self.others().map(|(i, _)| i).filter(|&i| self.counts_as_live(i)).collect();
        let late = live.iter().filter(|&&i| started.since(self.peers[i].fresh_at) > limit).count();
        if late > 0 && 2 * (late + 1) > live.len() + 1 {
            for i in live {
                // Judged from now on; `fresh_at` would say that the slot brought something new.
                self.peers[i].fresh_at = self.peers[i].fresh_at.max(Boottime(now.0 - 1));
            }
            self.election.excuse_master(now);
        }
    }

    fn counts_as_live(&self, i: usize) -> bool {
        let p = &self.peers[i];
        let evicted = p.evicted.is_some_and(|(inc, _)| p.proc().is_some_and(|q| q.incarnation <= inc));
        p.alive && !p.stopped() && !evicted && !p.missed
    }

    /// A read that shows half a block shows a write on its way, which is not silence.
    fn silent(&self, p: &Peer, started: Boottime) -> bool {
        !p.hidden && started >= p.fresh_at + self.cfg.dead_after()
    }

    pub(super) fn find_missed(&mut self, started: Boottime, out: &mut Actions) {
        for (i, n) in self.others() {
            let p = &self.peers[i];
            if p.alive && !p.missed && !p.stopped() && self.silent(p, started) {
                let proc = p.proc().expect("invariant: alive means read");
                self.peers[i].missed = true;
                self.log(out, LogLevel::Debug, &format!("Node {n} DOWN"));
                out.push(Action::Event(QdiskEvent::Missed(proc)));
            }
        }
    }

    /// What the master does about the silent, and about those who live in another component.
    pub(super) fn evict(&mut self, now: Boottime, started: Boottime, out: &mut Actions) {
        if !self.election.is_master() || !self.cfg.allow_kill || self.disk == DiskState::Lost {
            return;
        }
        for (i, n) in self.others() {
            let p = &self.peers[i];
            let Some(b) = p.last.as_ref().filter(|_| p.alive && !p.stopped()) else { continue };
            let proc = b.proc();
            if p.evicted.is_some_and(|(inc, _)| inc >= proc.incarnation)
                || self.kills[i].is_some_and(|k| k.incarnation >= proc.incarnation)
            {
                continue;
            }
            let reason = if self.silent(p, started) {
                KillReason::Silent
            } else if self.lives_elsewhere(i, now) {
                KillReason::Partitioned
            } else {
                continue;
            };
            self.log(out, LogLevel::Notice, &format!("Writing eviction notice for node {n}"));
            self.set_kill(proc, reason);
        }
    }

    fn lives_elsewhere(&self, i: usize, now: Boottime) -> bool {
        let (Some(mine), p) = (&self.mine, &self.peers[i]) else { return false };
        let Some(b) = &p.last else { return false };
        let mature =
            mine.operational && now >= mine.since + self.cfg.form && now >= p.view_since + self.cfg.form;
        let held = self.votes_held(now) == Some(mine.view.name);
        let outside = b.view.seq != 0
            && b.view != mine.view.name
            && !mine.view.members.iter().any(|m| m.node == b.node);
        // A node that only just starts has nothing to lose and will join.
        let rival = self.lost.contains(&b.proc()) || b.flags.has(Flags::DIRTY);
        mature && held && outside && rival && (self.quorate || self.can_be_quorate(self.my_votes()))
    }

    fn set_kill(&mut self, victim: Proc, reason: KillReason) {
        let Some(i) = idx(victim.node) else { return };
        let view_seq = self.my_view().seq;
        self.kills[i] = Some(Kill { incarnation: victim.incarnation, reason, view_seq });
        self.kills_written[i] = None;
        self.notices.push(victim.node);
    }

    /// My block is on the disk, with all its kill entries.
    pub(super) fn kills_landed(&mut self, now: Boottime, out: &mut Actions) {
        for i in 0..MAX_NODES {
            // An entry that was made while the block was on its way is not in it.
            let sent = |k: &Kill| self.kills_written[i].is_none() && self.kills_sent[i] == Some(*k);
            let Some(k) = self.kills[i].filter(sent) else { continue };
            self.kills_written[i] = Some(now);
            self.evicted(i, k, self.cfg.me.node, now, out);
        }
        self.pills_written(out);
    }

    fn pills_written(&mut self, out: &mut Actions) {
        for n in 0..self.pills.len() {
            let Pill { victim, state } = self.pills[n];
            let written = idx(victim.node).and_then(|i| self.kills_written[i]);
            if let (PillState::ToWrite, Some(at)) = (state, written) {
                out.push(Action::Event(QdiskEvent::PillWritten { victim, at }));
                let until = self.pill_time(victim).map(|t| at + t);
                if until.is_none() {
                    let why = PillFailure::NoWatchdog;
                    out.push(Action::Event(QdiskEvent::PillFailed { victim, why }));
                }
                self.pills[n].state = PillState::Waiting { until };
            }
        }
    }

    // ---- poison pills ----

    pub(super) fn order_pill(&mut self, victim: Proc, out: &mut Actions) {
        let fail = |why| Action::Event(QdiskEvent::PillFailed { victim, why });
        let Some(i) = idx(victim.node).filter(|&i| i != self.me_idx() && self.others().any(|(o, _)| o == i))
        else {
            out.push(fail(PillFailure::BadNode));
            return;
        };
        let Some(b) = self.peers[i].last.as_ref().filter(|b| b.incarnation == victim.incarnation) else {
            out.push(fail(PillFailure::NeverSeen));
            return;
        };
        if b.flags.has(Flags::STOPPED_KILLED) {
            out.push(Action::Event(QdiskEvent::PillProof { victim, proof: PillProof::Stopped }));
            return;
        }
        if self.pills.iter().any(|p| p.victim == victim) {
            return;
        }
        if self.kills[i].is_none_or(|k| k.incarnation != victim.incarnation) {
            self.set_kill(victim, KillReason::Fence);
        }
        self.pills.retain(|p| p.victim.node != victim.node);
        self.pills.push(Pill { victim, state: PillState::ToWrite });
        self.pills_written(out);
    }

    /// A write of mine failed or took longer than X: my block may have been unreadable for so long that a victim
    /// renewed over it. The pills count from the next write that succeeds.
    pub(super) fn pills_again(&mut self) {
        for p in &mut self.pills {
            p.state = PillState::ToWrite;
            if let Some(i) = idx(p.victim.node) {
                self.kills_written[i] = None;
            }
        }
    }

    /// S + W + X of the victim's own block, on a fast clock; `None` without a watchdog.
    fn pill_time(&self, victim: Proc) -> Option<Duration> {
        let b =
            self.peers[idx(victim.node)?].last.as_ref().filter(|b| b.incarnation == victim.incarnation)?;
        if self.mutant(20) {
            return Some(with_rho(self.cfg.stop_limit() + self.cfg.watchdog + self.cfg.io_limit));
        }
        let ms = |v: u32| Duration::from_millis(u64::from(v));
        (b.watchdog_ms > 0).then(|| with_rho(ms(b.stop_ms) + ms(b.watchdog_ms) + ms(b.settle_ms)))
    }

    pub(super) fn pill_deadlines(&mut self, now: Boottime, out: &mut Actions) {
        self.pills.retain(|p| match p.state {
            PillState::Waiting { until: Some(t) } if now >= t => {
                let proof = PillProof::Watchdog;
                out.push(Action::Event(QdiskEvent::PillProof { victim: p.victim, proof }));
                false
            }
            _ => true,
        });
    }

    fn pill_stopped(&mut self, victim: Proc, out: &mut Actions) {
        if self.pills.iter().any(|p| p.victim == victim) {
            self.pills.retain(|p| p.victim != victim);
            out.push(Action::Event(QdiskEvent::PillProof { victim, proof: PillProof::Stopped }));
        }
    }
}
