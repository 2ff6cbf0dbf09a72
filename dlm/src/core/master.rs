//! Master: trees decided here, and the directory entries of the slices owned here.

use super::{Action, Core, Know, Master};
use crate::directory::Entry;
use crate::msg::{Msg, PlockAnswer, Probe, TreeOp};
use crate::mutant::{self, Mutant};
use crate::name::ResName;
use crate::plock::{PlockOut, Ranges};
use crate::resource::{Ctx, MLock, Out, Resource};
use crate::types::Term;
use cairn_base::Proc;
use std::collections::BTreeMap;

/// Longest chain of owners that a search for a circle of byte-range waits follows.
const PROBE_HOPS: u8 = 32;

impl Core {
    /// An operation for the master of `name`'s tree, from a member or from this node through the directory.
    pub(super) fn master_op(
        &mut self,
        from: Proc,
        name: ResName,
        term: Term,
        op: TreeOp,
        looked_up: bool,
        out: &mut Vec<Action>,
    ) {
        let at = self.by_root.get(&name.root()).copied();
        let ours = at.filter(|&at| {
            let m = self.trees[at as usize].master.as_ref();
            m.is_some_and(|m| m.term == term || mutant::on(Mutant::TermIgnored))
        });
        match ours {
            Some(at) => {
                self.trees[at as usize].idle_since = None;
                self.execute(at, from, name, term, op, looked_up, out);
                self.settle(at);
            }
            None if from == self.me => self.redirected(self.me, &name.root(), term, looked_up, out),
            None => {
                let root = name.root();
                // The directory believes us to be its master. Only one that missed views can; tell it.
                let wanted = at
                    .is_some_and(|at| matches!(self.trees[at as usize].know, Know::Orphan | Know::LookingUp));
                if looked_up
                    && !wanted
                    && let Some(owner) = self.dir.owner(crate::directory::slice_of(&root))
                    && owner != self.me
                {
                    self.send(owner, Msg::Drop { root: root.clone(), term }, out);
                }
                self.send(from, Msg::Redirect { root, term, looked_up }, out);
            }
        }
    }

    /// Executes one operation on a tree that is mastered here.
    #[allow(clippy::too_many_arguments)] // the fields of one message
    pub(super) fn execute(
        &mut self,
        at: u32,
        from: Proc,
        name: ResName,
        _term: Term,
        op: TreeOp,
        looked_up: bool,
        out: &mut Vec<Action>,
    ) {
        let mut outs = std::mem::take(&mut self.scratch);
        let mut plocks = std::mem::take(&mut self.plock_scratch);
        let ctx = Ctx { gates: &self.gates, stop_all: self.cfg.stop_all, suspended: self.suspended };
        let m = self.trees[at as usize].master.as_mut().expect("checked by the caller");
        if m.dropping {
            m.held.push((from, name, op, looked_up));
            self.scratch = outs;
            self.plock_scratch = plocks;
            return;
        }
        let term = m.term;
        let is_top = m.top.name == name;
        match op {
            TreeOp::Request { id, op, mode, flags, order } => {
                let res = if is_top {
                    &mut m.top
                } else {
                    let masks: &[Proc] = if mutant::on(Mutant::ChildUnmasked) { &[] } else { &m.masks };
                    m.below.entry(name.clone()).or_insert_with(|| Resource::new(name.clone(), masks))
                };
                // Executed already: it came twice, directly and through the directory.
                if res.find(from, id).is_none() {
                    let l = MLock {
                        who: from,
                        id,
                        op,
                        granted: None,
                        want: Some(mode),
                        flags,
                        order,
                        told: None,
                        valblk: flags.has(crate::types::Flags::VALBLK),
                        demoted: false,
                    };
                    res.request(&ctx, l, looked_up, &mut outs);
                }
            }
            TreeOp::Convert { id, op, mode, flags, order, lvb } => {
                if let Some(res) = m.resource(&name) {
                    res.convert(&ctx, from, id, op, mode, flags, lvb.as_ref(), order, &mut outs);
                }
            }
            TreeOp::Release { id, flags, lvb } => {
                if let Some(res) = m.resource(&name) {
                    res.release(&ctx, from, id, flags, lvb.as_ref(), &mut outs);
                }
            }
            TreeOp::Cancel { id, op } => {
                if let Some(res) = m.resource(&name) {
                    res.cancel(&ctx, from, id, op, &mut outs);
                }
            }
            TreeOp::PlockLock { ticket, range, wait } => {
                m.ranges.lock(from, ticket, range, wait, &mut plocks)
            }
            TreeOp::PlockUnlock { ticket, range } => m.ranges.unlock(from, ticket, range, &mut plocks),
            TreeOp::PlockTest { ticket, range } => m.ranges.test(from, ticket, range, &mut plocks),
            TreeOp::PlockCancel { ticket, deadlock } => m.ranges.cancel(from, ticket, deadlock, &mut plocks),
            TreeOp::PlockProbe { ticket, probe } => {
                let next = m.ranges.blockers(from, ticket);
                for owner in next {
                    self.send_probe(Probe { owner, hops: probe.hops + 1, ..probe }, out);
                }
            }
        }
        if !is_top {
            let m = self.trees[at as usize].master.as_mut().expect("checked");
            if m.below.get(&name).is_some_and(|r| r.is_idle()) && m.masks.is_empty() {
                m.below.remove(&name);
            }
        }
        self.deliver(at, &name, term, &mut outs, out);
        self.deliver_plocks(at, term, &mut plocks, out);
        self.scratch = outs;
        self.plock_scratch = plocks;
    }

    /// Answers of a resource go to their owners: messages, or straight into our own locks.
    pub(super) fn deliver(
        &mut self,
        at: u32,
        name: &ResName,
        term: Term,
        outs: &mut Vec<Out>,
        out: &mut Vec<Action>,
    ) {
        for o in outs.drain(..) {
            match o {
                Out::Result { who, .. } if who == self.me => self.holder_result(who, name, term, o, out),
                Out::Bast { who, id, mode } if who == self.me => self.holder_bast(id, mode, out),
                Out::Result { who, id, op, status, mode, sb, lvb } => {
                    let name = name.clone();
                    self.send(who, Msg::Result { name, term, id, op, status, mode, sb, lvb }, out);
                }
                Out::Bast { who, id, mode } => self.send(who, Msg::Bast { id, mode }, out),
            }
        }
        debug_assert!(self.trees[at as usize].live);
    }

    pub(super) fn deliver_plocks(
        &mut self,
        at: u32,
        term: Term,
        outs: &mut Vec<PlockOut>,
        out: &mut Vec<Action>,
    ) {
        for o in outs.drain(..) {
            let root = self.trees[at as usize].root.clone();
            if o.who == self.me {
                self.plock_result(self.me, &root, term, o.ticket, o.answer, out);
            } else {
                self.send(
                    o.who,
                    Msg::PlockResult { name: root, term, ticket: o.ticket, answer: o.answer },
                    out,
                );
            }
            // A new wait may have closed a circle.
            if o.answer == PlockAnswer::Queued
                && let Some(m) = &self.trees[at as usize].master
            {
                let owner = m.ranges.waiting_owner(o.who, o.ticket);
                let blockers = m.ranges.blockers(o.who, o.ticket);
                if let Some(owner) = owner {
                    let victim = self.plock_key(o.who, owner);
                    for b in blockers {
                        self.send_probe(Probe { victim, ticket: o.ticket, owner: b, hops: 0 }, out);
                    }
                }
            }
        }
    }

    /// On along one edge: to the home of the owner that blocks, or, when that is the victim, the circle is closed.
    fn send_probe(&mut self, p: Probe, out: &mut Vec<Action>) {
        if p.hops >= PROBE_HOPS || self.members.binary_search(&p.owner.who).is_err() {
            return;
        }
        if p.owner.who == self.me {
            self.probe_at_home(p, out);
        } else if p.owner == p.victim {
            self.send(p.owner.who, Msg::PlockVictim { ticket: p.ticket }, out);
        } else {
            self.send(p.owner.who, Msg::Probe(p), out);
        }
    }

    // ---- directory -----------------------------------------------------------------------------------------------

    pub(super) fn next_term(&mut self) -> Term {
        self.term_counter += 1;
        Term(self.view.expect("terms belong to views").0 << 32 | u64::from(self.term_counter))
    }

    pub(super) fn dir_lookup(&mut self, from: Proc, name: ResName, op: TreeOp, out: &mut Vec<Action>) {
        let root = name.root();
        let slice = crate::directory::slice_of(&root);
        if self.dir.owner(slice) != Some(self.me) {
            return; // moved; the requester asks the new owner in its next view
        }
        if from == self.me
            && self.by_root.get(&root).is_none_or(|&at| self.trees[at as usize].know != Know::LookingUp)
        {
            return; // answered meanwhile
        }
        let ready = self.dir.slices[slice as usize].ready;
        let known = self.dir.entries.get(&root).map(|e| (e.master, e.term));
        match known {
            Some((Some(m), term)) if m != from => {
                if m == self.me {
                    self.master_op(from, name, term, op, true, out);
                } else {
                    self.send(m, Msg::Forward { origin: from, name, term, op }, out);
                }
                return;
            }
            // Still being put together, or nothing may be decided now.
            _ if self.suspended || !ready => {
                self.held_lookups.push((from, name, op));
                return;
            }
            _ if self.sync.running
                && (self.sync.claims.contains_key(&root) || matches!(known, Some((None, _)))) =>
            {
                self.held_lookups.push((from, name, op));
                return;
            }
            _ => {}
        }
        // Asked twice in this view: the answer to the first is on its way.
        if let Some((Some(m), term)) = known
            && m == from
            && from != self.me
            && self.view.is_some_and(|v| term.0 >> 32 == v.0)
        {
            return;
        }
        // Nobody masters it (or the requester should, and never heard of it): the requester becomes master.
        let masks = match self.dir.entries.get(&root) {
            Some(e) => e.masks.clone(),
            None if mutant::on(Mutant::NoTaint) => Vec::new(),
            None => self.dir.slices[slice as usize].taint.clone(),
        };
        let term = self.next_term();
        self.dir.entries.insert(root.clone(), Entry { master: Some(from), term, masks: masks.clone() });
        if from == self.me {
            let at = self.by_root[&root];
            self.become_master(at, term, &masks, out);
        } else {
            self.send(from, Msg::YouAreMaster { root, term, masks }, out);
        }
    }

    pub(super) fn you_are_master(
        &mut self,
        from: Proc,
        root: &ResName,
        term: Term,
        masks: &[Proc],
        out: &mut Vec<Action>,
    ) {
        let slice = crate::directory::slice_of(root);
        if self.dir.owner(slice) != Some(from) {
            return;
        }
        // Even if nothing here wants it any more: then it is idle, and dropped with the usual care.
        let at = self.tree_of(root.clone());
        let t = &self.trees[at as usize];
        if term > t.term && matches!(t.know, Know::LookingUp | Know::Orphan | Know::Unknown) {
            self.become_master(at, term, masks, out);
        }
    }

    /// The directory made us master: build the state from our own locks, then execute what waited.
    pub(super) fn become_master(&mut self, at: u32, term: Term, masks: &[Proc], out: &mut Vec<Action>) {
        let own = self.own_claim(at);
        self.build_master(at, term, masks, vec![(self.me, own)], out);
        self.adopt(at, out);
    }

    /// The tree is mastered here now: whatever this node had waiting for its master is executed.
    pub(super) fn adopt(&mut self, at: u32, out: &mut Vec<Action>) {
        self.lookups.remove(&at);
        if let Some(first) = self.trees[at as usize].lookup_op.take() {
            self.trees[at as usize].unsent.push_front(first);
        }
        self.flush(at, out);
    }

    pub(super) fn dir_drop(&mut self, from: Proc, root: &ResName, term: Term, out: &mut Vec<Action>) {
        let slice = crate::directory::slice_of(root);
        if self.dir.owner(slice) != Some(self.me) {
            return; // its sender repeats it to the new owner
        }
        let e = self.dir.entries.get(root);
        if e.is_some_and(|e| (e.master == Some(from) && e.term == term) || mutant::on(Mutant::DropKillsNewer))
        {
            self.dir.entries.remove(root);
        }
        self.send(from, Msg::Dropped { root: root.clone(), term }, out);
    }

    // ---- passes over what is mastered here -----------------------------------------------------------------------

    /// Grant pass over a whole tree, after something outside of it changed.
    pub(super) fn pass_tree(&mut self, at: u32, out: &mut Vec<Action>) {
        let Some(m) = self.trees[at as usize].master.as_ref() else { return };
        let term = m.term;
        let names: Vec<ResName> =
            std::iter::once(m.top.name.clone()).chain(m.below.keys().cloned()).collect();
        for name in names {
            let mut outs = Vec::new();
            let ctx = Ctx { gates: &self.gates, stop_all: self.cfg.stop_all, suspended: self.suspended };
            if let Some(m) = self.trees[at as usize].master.as_mut()
                && let Some(res) = m.resource(&name)
            {
                res.pass(&ctx, &mut outs);
            }
            self.deliver(at, &name, term, &mut outs, out);
        }
        let mut outs = Vec::new();
        if let Some(m) = self.trees[at as usize].master.as_mut() {
            m.ranges.pass(&mut outs);
            if m.masks.is_empty() {
                m.below.retain(|_, r| !r.is_idle());
            }
        }
        self.deliver_plocks(at, term, &mut outs, out);
        self.settle(at);
    }

    pub(super) fn pass_all(&mut self, out: &mut Vec<Action>) {
        for at in 0..self.trees.len() as u32 {
            if self.trees[at as usize].live && self.trees[at as usize].master.is_some() {
                self.pass_tree(at, out);
            }
        }
    }
}

impl Master {
    pub(super) fn new(root: &ResName, term: Term, masks: &[Proc], unfenced: &[Proc]) -> Self {
        let mut ranges = Ranges::default();
        ranges.mask(unfenced);
        Self {
            term,
            masks: masks.to_vec(),
            top: Resource::new(root.clone(), masks),
            below: BTreeMap::new(),
            ranges,
            dropping: false,
            held: Vec::new(),
        }
    }

    pub(super) fn resource(&mut self, name: &ResName) -> Option<&mut Resource> {
        if self.top.name == *name { Some(&mut self.top) } else { self.below.get_mut(name) }
    }
}
