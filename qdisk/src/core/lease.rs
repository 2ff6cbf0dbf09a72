//! The device votes: a lease that the master gives to one named view, counted from before its landing.
//!
//! Granting. The master puts a new number on its lease each cycle. To another view than the last one it grants only
//! when no node that may still count an older lease is outside the new view: it is a member of it, is gone, shows a
//! later view in its block, or the older lease is over by the clock.
//!
//! Counting. A grant counts until `base + L`, base = start of the last read that did not yet show it, so base lies
//! before its landing. While the lease runs, a new number extends it at once: a takeover needs a silence of
//! D > L(1 + 2ρ) after the last landing, so it cannot have begun. Otherwise it waits for a second read (see `core`).

use super::{Actions, Lease, Phase, Qdisk, RingView, ViewName, idx, same_proc, with_rho};
use crate::MAX_NODES;
use crate::event::{QdiskEvent, VotesWhy};
use crate::ondisk::EBlock;
use cairn_base::Boottime;

/// A lease that somebody may still count.
#[derive(Clone, Copy, Debug)]
struct Outstanding {
    view: ViewName,
    mask: u64,
    clear_at: Boottime,
}

/// The lease that I count.
#[derive(Clone, Copy, Debug)]
struct Counted {
    view: ViewName,
    term: u64,
    until: Boottime,
}

/// A first grant that waits for its second read.
#[derive(Clone, Copy, Debug)]
struct Pending {
    view: ViewName,
    term: u64,
    grant: u64,
    base: Boottime,
    /// End of the read that showed it.
    shown: Boottime,
}

#[derive(Clone, Debug, Default)]
pub(super) struct LeaseState {
    /// What my own block says.
    pub(super) granted: Lease,
    /// The block on its way carries a new number.
    granting: bool,
    /// The last block that was confirmed carried a new number.
    fresh_grant: bool,
    /// By slot; mine is what I granted.
    outstanding: [Option<Outstanding>; MAX_NODES],
    counted: Option<Counted>,
    pending: Option<Pending>,
}

impl LeaseState {
    pub(super) fn deadline(&self) -> Option<Boottime> {
        self.counted.map(|c| c.until)
    }
}

impl Qdisk {
    /// Every slot's grants are remembered, whoever is master: `b` is new, read by `now`.
    pub(super) fn note_grant(&mut self, i: usize, before: Option<&EBlock>, b: &EBlock, now: Boottime) {
        if b.lease.grant != 0 && before.is_none_or(|o| (o.lease, o.incarnation) != (b.lease, b.incarnation)) {
            let clear_at = now + with_rho(self.cfg.dead_after());
            self.lease.outstanding[i] =
                Some(Outstanding { view: b.lease.view, mask: b.lease.mask, clear_at });
        }
    }

    /// Before a block is built: decide whether it carries a new grant.
    pub(super) fn lease_before_write(&mut self, now: Boottime) {
        self.lease.granting = false;
        let fresh = self.last_read_end.is_some_and(|t| now.since(t) <= self.cfg.cycle * 2);
        if !self.election.is_master() || self.phase != Phase::Running || !self.upgraded || !fresh {
            return;
        }
        let Some(mine) = self.mine.as_ref().filter(|m| m.operational) else { return };
        if !self.may_grant(&mine.view, now) && !self.mutant(102) {
            return;
        }
        let mask = mine
            .view
            .members
            .iter()
            .filter(|p| self.votes_known(p.node))
            .fold(0, |mask, p| mask | super::bit(p.node));
        let view = mine.view.name;
        self.lease.granted =
            Lease { term: self.election.term, grant: self.lease.granted.grant + 1, view, mask };
        self.lease.granting = true;
        // From submission to completion nobody may take it for over.
        self.lease.outstanding[self.me_idx()] = Some(Outstanding { view, mask, clear_at: Boottime::MAX });
    }

    fn votes_known(&self, n: cairn_base::NodeId) -> bool {
        self.cfg.node_votes.iter().any(|&(m, _)| m == n)
    }

    /// My block landed at the latest at `at`.
    pub(super) fn lease_landed(&mut self, at: Boottime) {
        if self.lease.granting {
            let me = self.me_idx();
            if let Some(o) = &mut self.lease.outstanding[me] {
                o.clear_at = at + with_rho(self.cfg.stop_limit());
            }
        }
        self.lease.fresh_grant = std::mem::take(&mut self.lease.granting);
    }

    fn may_grant(&self, view: &RingView, now: Boottime) -> bool {
        self.lease.outstanding.iter().flatten().all(|o| {
            o.view == view.name
                || now >= o.clear_at
                || (0..MAX_NODES).filter(|n| o.mask & (1 << n) != 0).all(|n| self.counts_no_more(n, o, view))
        })
    }

    fn counts_no_more(&self, n: usize, o: &Outstanding, view: &RingView) -> bool {
        let inside = view.members.iter().any(|p| idx(p.node) == Some(n));
        let peer = &self.peers[n];
        let gone = peer.proc().is_some_and(|p| self.gone.contains(&p));
        // Ring numbers rise along a node's life, so one that shows a later view will not come back to this one.
        let later = peer.last.as_ref().is_some_and(|b| b.view.seq > o.view.seq);
        inside || gone || later
    }

    /// `mine`: submission of the write that this read confirmed.
    pub(super) fn count_lease(
        &mut self,
        now: Boottime,
        started: Boottime,
        mine: Option<Boottime>,
        out: &mut Actions,
    ) {
        let Some(view) = self.mine.as_ref().filter(|m| m.operational).map(|m| m.view.name) else {
            self.lease.pending = None;
            return;
        };
        if !self.upgraded || self.phase != Phase::Running {
            return;
        }
        let life = self.cfg.stop_limit();
        let term = self.election.term;
        // A pending grant is confirmed by a later read that shows no higher term and hides nothing.
        if let Some(p) = self.lease.pending
            && (p.term != term || p.view != view)
        {
            self.lease.pending = None;
        }
        let clear = !self.hidden_slots() || self.mutant(103);
        if let Some(p) = self.lease.pending
            && started >= p.shown
            && clear
        {
            self.lease.pending = None;
            self.count(view, term, p.base + life, now, out);
        }
        let runs = self.lease.counted.is_some_and(|c| c.view == view && c.term == term && now < c.until);
        if self.election.is_master() {
            // The read that confirms my write is the second read.
            if let Some(submitted) = mine
                && std::mem::take(&mut self.lease.fresh_grant)
                && self.lease.granted.view == view
                && (runs || clear)
            {
                self.count(view, term, submitted + life, now, out);
            }
            return;
        }
        let Some(master) = self.election.decided() else { return };
        let Some(i) = idx(master.node).filter(|&i| i != self.me_idx()) else { return };
        let peer = &self.peers[i];
        let Some(b) = &peer.last else { return };
        let named =
            b.lease.term == term && b.term == term && b.lease.view == view && same_proc(master, b.proc());
        if !named || b.lease.mask & super::bit(self.cfg.me.node) == 0 || peer.grant_at != now {
            return;
        }
        let Some(base) = (if self.mutant(16) { Some(now) } else { peer.base }) else { return };
        if runs || self.mutant(103) {
            self.count(view, term, base + life, now, out);
        } else if self.lease.pending.is_none_or(|p| p.grant < b.lease.grant && now >= p.base + life / 2) {
            // The oldest unconfirmed grant is kept while it is of use.
            self.lease.pending = Some(Pending { view, term, grant: b.lease.grant, base, shown: now });
        }
    }

    fn count(&mut self, view: ViewName, term: u64, until: Boottime, now: Boottime, out: &mut Actions) {
        // The votes never outlive the permit of this node.
        let until = self.renewed_at.map_or(Boottime::ZERO, |r| until.min(r + self.cfg.stop_limit()));
        let kept = self
            .lease
            .counted
            .filter(|c| c.view == view && c.term == term)
            .map_or(Boottime::ZERO, |c| c.until);
        if until > now && until > kept {
            self.lease.counted = Some(Counted { view, term, until });
            out.push(super::Action::Event(QdiskEvent::Votes { view, until }));
        }
    }

    /// The device votes are counted at `now`, for this view.
    pub fn votes_held(&self, now: Boottime) -> Option<ViewName> {
        self.lease.counted.filter(|c| now < c.until).map(|c| c.view)
    }

    pub(super) fn drop_votes(&mut self, why: VotesWhy, out: &mut Actions) {
        self.lease.pending = None;
        if self.lease.counted.take().is_some() {
            out.push(super::Action::Event(QdiskEvent::VotesLost { why }));
        }
    }

    pub(super) fn view_changed(&mut self, out: &mut Actions) {
        self.drop_votes(VotesWhy::ViewChanged, out);
    }

    pub(super) fn lease_deadline(&mut self, now: Boottime, out: &mut Actions) {
        if self.lease.counted.is_some_and(|c| now >= c.until) {
            self.lease.counted = None;
            out.push(super::Action::Event(QdiskEvent::VotesLost { why: VotesWhy::Expired }));
        }
    }
}
