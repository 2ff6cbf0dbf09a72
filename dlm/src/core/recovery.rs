//! Views, gates and the rebuild of what a departed member mastered or directed.
//!
//! At a view every member sends every other one stream on its lane: trees it masters in slices the receiver gained,
//! claims (full lock records) on trees whose master is gone, and an end marker with its shut gates. When all markers
//! are in, the slice owner settles: one claimant becomes master itself; with several the slice owner does, having
//! all records; with none the root stays masked until the gates open. Roots of a slice whose table is new may have
//! been mastered by any dead proc whose gate is shut: the slice is tainted by them.
//! A further view starts again: claims are repeated, markers counted anew; nothing else is undone.

use super::{Action, Core, CoreView, Know, Master, Phase, RebuildReport};
use crate::directory::{Directory, Entry, SLICES, Slice};
use crate::msg::{Claim, Msg, Record, TreeOp};
use crate::mutant::{self, Mutant};
use crate::name::ResName;
use crate::plock::{self, PlockRange};
use crate::resource::{Ctx, MLock, Out, Resource};
use crate::types::{Flags, LockError, Mode, SbFlags, Status, Term};
use cairn_base::Proc;
use std::collections::{BTreeMap, BTreeSet};

/// Most trees or claims in one message.
const CHUNK: usize = 200;

#[derive(Default)]
struct Stream {
    mastered: Vec<(ResName, Term)>,
    claims: Vec<Claim>,
}

impl Core {
    pub(super) fn install_view(&mut self, v: CoreView, out: &mut Vec<Action>) -> Result<(), LockError> {
        if let Some(have) = self.view
            && v.id <= have
        {
            return Err(LockError::ViewGap { have: have.0, got: v.id.0 });
        }
        if v.id.0 >= 1 << 32 {
            return Err(LockError::Invalid("view numbers above 2^32 do not fit into terms"));
        }
        let mut members = v.members;
        members.sort_unstable();
        members.dedup();
        if members.binary_search(&self.me).is_err() {
            self.evicted = true;
            return Err(LockError::Gone);
        }
        // Views that passed while this member had no quorum: what happened in them it learns like a joiner, and it
        // tells the owners of all slices what it masters, because it cannot know what moved.
        let gap = self.view.is_some_and(|have| v.id.0 != have.0 + 1);
        let was_suspended = std::mem::replace(&mut self.suspended, false);
        self.view = Some(v.id);
        let before = std::mem::replace(&mut self.members, members);
        let mut gone: Vec<(Proc, bool)> = Vec::new();
        for p in before {
            if self.members.binary_search(&p).is_ok() {
                continue;
            }
            let fenced = self.early_fenced.remove(&p);
            let open = v.left_clean.contains(&p)
                || self.early_recovered.remove(&p)
                || (fenced && !self.cfg.needs_recovery);
            if !open {
                self.gates.insert(p, fenced);
            }
            gone.push((p, open));
        }
        let prev = self.dir.install(Directory::table(&self.members));
        for s in 0..SLICES {
            let kept = prev.get(s) == Some(&self.me) && self.dir.owner(s as u16) == Some(self.me);
            if !kept {
                self.dir.slices[s] = Slice::default();
            } else if gap {
                self.dir.slices[s].ready = false;
            }
        }
        let me = self.me;
        let is_gone = |p: Proc| gone.iter().any(|(g, _)| *g == p);
        let owners = Directory::table(&self.members);
        self.dir.entries.retain(|root, e| {
            if e.master.is_some_and(is_gone) {
                e.master = None;
            }
            owners[crate::directory::slice_of(root) as usize] == me
        });
        self.held_lookups.clear();
        self.sync.claims.clear();
        self.sync.peer_gates = None;
        self.sync.fresh_gates.clear();
        self.sync.waiting = self.members.iter().copied().filter(|p| *p != me).collect();
        self.sync.running = true;
        self.sync.merge = gap || self.is_fresh();
        self.sync.report = RebuildReport { view: v.id, ..RebuildReport::default() };

        let mut streams: BTreeMap<Proc, Stream> = BTreeMap::new();
        let mut touched = Vec::new();
        let mut redrop = Vec::new();
        let mut restart = Vec::new();
        for at in 0..self.trees.len() as u32 {
            if !self.trees[at as usize].live {
                continue;
            }
            let slice = self.trees[at as usize].slice as usize;
            let owner = owners[slice];
            let moved = gap || prev.get(slice) != Some(&owner);
            if self.trees[at as usize].master.is_some() {
                if self.members_gone_from(at, &gone) {
                    touched.push(at);
                }
                let t = &self.trees[at as usize];
                let m = t.master.as_ref().expect("checked");
                if moved && owner == me {
                    // With a gap the entry may be there; the terms agree then.
                    let e = Entry { master: Some(me), term: m.term, masks: m.masks.clone() };
                    self.dir.entries.insert(t.root.clone(), e);
                } else if moved {
                    streams.entry(owner).or_default().mastered.push((t.root.clone(), m.term));
                }
                if m.dropping {
                    redrop.push(at);
                }
                continue;
            }
            if let Know::At(p, _) = self.trees[at as usize].know
                && is_gone(p)
            {
                self.orphan(at);
            }
            if self.trees[at as usize].know == Know::Orphan {
                let claim = self.own_claim(at);
                if claim.records.is_empty() && claim.ranges.is_empty() {
                    restart.push(at); // nothing was granted or queued: an ordinary lookup
                } else if owner == me {
                    self.sync.claims.entry(claim.root.clone()).or_default().push((me, claim));
                } else {
                    streams.entry(owner).or_default().claims.push(claim);
                }
            }
        }
        self.send_streams(streams, out);
        for at in touched {
            self.pass_tree(at, out);
        }
        for at in redrop {
            let t = &mut self.trees[at as usize];
            let (root, m) = (t.root.clone(), t.master.as_ref().expect("dropping"));
            let term = m.term;
            match self.dir.owner(t.slice) {
                Some(o) if o == me => {
                    if self.dir.entries.get(&root).is_some_and(|e| e.master == Some(me) && e.term == term) {
                        self.dir.entries.remove(&root);
                    }
                    self.dropped(&root, term, out);
                }
                Some(o) => self.send(o, Msg::Drop { root, term }, out),
                None => {}
            }
        }
        if !mutant::on(Mutant::LookupNotResent) {
            self.resend_lookups(out);
        }
        for at in restart {
            let t = &mut self.trees[at as usize];
            t.know = Know::Unknown;
            let ops = std::mem::take(&mut t.unsent);
            for (name, op) in ops {
                self.dispatch(at, name, op, out);
            }
            self.settle(at);
        }
        if was_suspended {
            self.pass_all(out);
        }
        self.try_complete_sync(out);
        let later = self.future.split_off(&cairn_base::ViewId(v.id.0 + 1));
        for (view, list) in std::mem::replace(&mut self.future, later) {
            for (from, msg) in list {
                self.future_len -= 1;
                self.receive(from, view, msg, out);
            }
        }
        Ok(())
    }

    fn resend_lookups(&mut self, out: &mut Vec<Action>) {
        for at in self.lookups.clone() {
            if self.trees[at as usize].know == Know::LookingUp {
                self.send_lookup(at, out);
            }
        }
    }

    fn send_streams(&mut self, mut streams: BTreeMap<Proc, Stream>, out: &mut Vec<Action>) {
        let gates: Vec<_> = self.gates().collect();
        for p in self.members.clone() {
            if p == self.me {
                continue;
            }
            let s = streams.remove(&p).unwrap_or_default();
            for c in s.mastered.chunks(CHUNK) {
                self.send(p, Msg::Mastered { trees: c.to_vec() }, out);
            }
            for c in s.claims.chunks(CHUNK) {
                self.send(p, Msg::Claims { claims: c.to_vec() }, out);
            }
            self.send(p, Msg::SyncEnd { fresh: self.is_fresh(), gates: gates.clone() }, out);
        }
    }

    /// Locks of departed members become ghosts, or vanish. True when the tree was touched.
    fn members_gone_from(&mut self, at: u32, gone: &[(Proc, bool)]) -> bool {
        let gates = &self.gates;
        let m = self.trees[at as usize].master.as_mut().expect("mastered");
        let mut touched = false;
        for &(p, open) in gone {
            // Its fence may have come before the view that shows the loss.
            let fenced = gates.get(&p) == Some(&true);
            for r in m.resources() {
                touched |= r.member_gone(p, open);
                if fenced {
                    r.exorcise(p, false);
                }
            }
            m.ranges.member_gone(p, open);
            if fenced {
                m.ranges.fenced(p);
            }
            m.held.retain(|(from, ..)| *from != p);
        }
        touched |= m.ranges.haunted(gates);
        if m.resources().any(|r| !r.ghosts.is_empty()) || m.ranges.haunted(gates) {
            self.haunted.insert(at);
        }
        touched
    }

    /// The master of a tree that we use is gone.
    fn orphan(&mut self, at: u32) {
        let t = &self.trees[at as usize];
        assert!(t.unsent.is_empty(), "a tree with a master sends at once");
        if t.locks.is_empty() && t.plocks.as_ref().is_none_or(|p| p.ops.is_empty() && p.held.is_empty()) {
            self.trees[at as usize].know = Know::Unknown;
            return;
        }
        let mut again = Vec::new();
        for &s in &t.locks {
            let l = &self.locks[s as usize];
            if l.cancelling && l.phase == Phase::Sent {
                again.push((
                    self.name_of(s as usize),
                    TreeOp::Cancel { id: self.id_of(s as usize), op: l.op },
                ));
            }
        }
        let t = &mut self.trees[at as usize];
        t.know = Know::Orphan;
        if let Some(p) = &mut t.plocks {
            for o in &mut p.ops {
                o.sent = false;
                o.queued = false;
                again.push((t.root.clone(), o.op.clone()));
            }
            for o in p.ops.iter().filter(|o| o.cancelling) {
                again.push((t.root.clone(), TreeOp::PlockCancel { ticket: o.ticket, deadlock: false }));
            }
        }
        t.unsent.extend(again);
    }

    /// What we present of a tree: every lock as its master last knew it for certain.
    pub(super) fn own_claim(&self, at: u32) -> Claim {
        let t = &self.trees[at as usize];
        let mut records = Vec::new();
        for &s in &t.locks {
            let l = &self.locks[s as usize];
            let under_way = l.phase == Phase::Sent;
            if l.sent.is_none() && !under_way {
                continue;
            }
            records.push(Record {
                name: self.name_of(s as usize),
                id: self.id_of(s as usize),
                op: l.sent_op,
                granted: l.sent,
                want: if under_way { l.want } else { None },
                flags: l.flags,
                order: l.order,
                valblk: l.valblk,
                lvb: l.lvb,
                lvb_valid: l.lvb_valid,
            });
        }
        records.sort_unstable_by_key(|r| r.order);
        let ranges = t.plocks.as_ref().map_or_else(Vec::new, |p| {
            // The dead master may have executed what it never answered: releases count as done.
            let mut held = p.held.clone();
            for o in &p.ops {
                match o.op {
                    TreeOp::PlockUnlock { range, .. } => plock::apply(&mut held, range, false),
                    TreeOp::PlockLock { range, .. } if !range.write => {
                        let mine = |r: &&PlockRange| r.owner == range.owner && r.write && r.overlaps(&range);
                        let weaker: Vec<_> = held.iter().filter(mine).copied().collect();
                        for w in weaker {
                            let (start, end) = (w.start.max(range.start), w.end.min(range.end));
                            plock::apply(&mut held, PlockRange { start, end, write: false, ..w }, true);
                        }
                    }
                    _ => {}
                }
            }
            held
        });
        Claim { root: t.root.clone(), records, ranges }
    }

    pub(super) fn sync_end(
        &mut self,
        from: Proc,
        fresh: bool,
        gates: Vec<(Proc, bool)>,
        out: &mut Vec<Action>,
    ) {
        let theirs: BTreeMap<Proc, bool> = gates.into_iter().collect();
        if self.sync.merge && fresh {
            for (p, f) in theirs {
                *self.sync.fresh_gates.entry(p).or_default() |= f;
            }
        } else if self.sync.merge {
            // A gate that any member knows to be open is open; one that any knows to be fenced is fenced.
            self.sync.peer_gates = Some(match self.sync.peer_gates.take() {
                None => theirs,
                Some(mine) => {
                    mine.into_iter().filter_map(|(p, f)| theirs.get(&p).map(|g| (p, f | g))).collect()
                }
            });
        }
        self.sync.waiting.remove(&from);
        self.try_complete_sync(out);
    }

    pub(super) fn mastered(&mut self, from: Proc, trees: Vec<(ResName, Term)>) {
        for (root, term) in trees {
            let slice = crate::directory::slice_of(&root);
            let newer = self.dir.entries.get(&root).is_none_or(|e| e.term < term);
            if self.dir.owner(slice) == Some(self.me) && newer {
                self.dir.entries.insert(root, Entry { master: Some(from), term, masks: Vec::new() });
            }
        }
    }

    pub(super) fn try_complete_sync(&mut self, out: &mut Vec<Action>) {
        if !self.sync.running || !self.sync.waiting.is_empty() {
            return;
        }
        let first = self.is_fresh();
        if self.sync.merge {
            self.sync.merge = false;
            // No member with state is left: newcomers share what they have seen, and whoever uses the space must
            // treat it as just founded (replay everything) before it trusts a lock.
            self.sync.founder = first && self.sync.peer_gates.is_none();
            let fresh = std::mem::take(&mut self.sync.fresh_gates);
            for (p, fenced) in self.sync.peer_gates.take().unwrap_or(fresh) {
                if self.members.binary_search(&p).is_err() && !self.early_recovered.contains(&p) {
                    let fenced = fenced | self.early_fenced.contains(&p);
                    *self.gates.entry(p).or_default() |= fenced;
                }
            }
            self.sync.synced = true;
            let members = &self.members;
            self.early_fenced.retain(|p| members.binary_search(p).is_ok());
            self.early_recovered.retain(|p| members.binary_search(p).is_ok());
        }
        self.sync.running = false;
        let shut: Vec<Proc> = self.gates.keys().copied().collect();
        for s in 0..SLICES {
            if self.dir.owner(s as u16) == Some(self.me) && !self.dir.slices[s].ready {
                self.dir.slices[s] = Slice { ready: true, taint: shut.clone() };
            }
        }
        let mut claims = std::mem::take(&mut self.sync.claims);
        let mut roots: BTreeSet<ResName> = claims.keys().cloned().collect();
        roots.extend(self.dir.entries.iter().filter(|(_, e)| e.master.is_none()).map(|(r, _)| r.clone()));
        for root in roots {
            let list = claims.remove(&root).unwrap_or_default();
            self.settle_root(root, list, &shut, out);
        }
        if first {
            self.resend_lookups(out);
        }
        for (from, name, op) in std::mem::take(&mut self.held_lookups) {
            self.dir_lookup(from, name, op, out);
        }
        let report = std::mem::take(&mut self.sync.report);
        out.push(Action::Rebuilt(report));
    }

    /// Decides who masters a root whose master is gone.
    fn settle_root(
        &mut self,
        root: ResName,
        mut claims: Vec<(Proc, Claim)>,
        shut: &[Proc],
        out: &mut Vec<Action>,
    ) {
        claims.retain(|(p, _)| self.members.binary_search(p).is_ok());
        if let Some(e) = self.dir.entries.get(&root)
            && let Some(m) = e.master
            && claims.iter().all(|(p, _)| *p != m)
        {
            // It has a living master; the claimants have not heard of it.
            let term = e.term;
            for (p, _) in claims {
                if p == self.me {
                    self.assigned(self.me, true, &root, m, term, out);
                } else {
                    self.send(p, Msg::Assign { root: root.clone(), master: m, term }, out);
                }
            }
            return;
        }
        match claims.as_slice() {
            [] if shut.is_empty() => {
                self.dir.entries.remove(&root);
            }
            [] => {
                if let Some(e) = self.dir.entries.get_mut(&root) {
                    e.masks = if mutant::on(Mutant::NoTaint) { Vec::new() } else { shut.to_vec() };
                    self.sync.report.trees_masked += 1;
                }
            }
            [(p, _)] => {
                let (p, term) = (*p, self.next_term());
                self.dir.entries.insert(root.clone(), Entry { master: Some(p), term, masks: shut.to_vec() });
                self.sync.report.trees_given += 1;
                if p == self.me {
                    let at = self.by_root[&root];
                    self.become_master(at, term, shut, out);
                } else {
                    self.send(p, Msg::YouAreMaster { root, term, masks: shut.to_vec() }, out);
                }
            }
            _ => {
                let term = self.next_term();
                let e = Entry { master: Some(self.me), term, masks: shut.to_vec() };
                self.dir.entries.insert(root.clone(), e);
                let at = self.tree_of(root.clone());
                for (p, _) in &claims {
                    if *p != self.me {
                        self.send(*p, Msg::Assign { root: root.clone(), master: self.me, term }, out);
                    }
                }
                self.build_master(at, term, shut, claims, out);
                self.adopt(at, out);
            }
        }
    }

    pub(super) fn assigned(
        &mut self,
        from: Proc,
        current: bool,
        root: &ResName,
        master: Proc,
        term: Term,
        out: &mut Vec<Action>,
    ) {
        let slice = crate::directory::slice_of(root);
        let credible = from == master || (current && self.dir.owner(slice) == Some(from));
        if !credible || master == self.me || self.members.binary_search(&master).is_err() {
            return;
        }
        if let Some(&at) = self.by_root.get(root)
            && self.trees[at as usize].know == Know::Orphan
            && self.learn(at, master, term, false)
        {
            self.flush(at, out);
        }
    }

    /// Master state from what survivors present. `dead`: procs that may hold what nobody presents.
    pub(super) fn build_master(
        &mut self,
        at: u32,
        term: Term,
        dead: &[Proc],
        claims: Vec<(Proc, Claim)>,
        out: &mut Vec<Action>,
    ) {
        let root = self.trees[at as usize].root.clone();
        if self.sync.merge {
            // This member has still to hear which gates are shut; these are.
            for p in dead {
                if !self.early_recovered.contains(p) {
                    let fenced = self.early_fenced.contains(p);
                    self.gates.entry(*p).or_insert(fenced);
                }
            }
        }
        let dead: Vec<Proc> = dead.iter().copied().filter(|p| self.gates.contains_key(p)).collect();
        let unfenced: Vec<Proc> = dead.iter().copied().filter(|p| !self.gates[p]).collect();
        let mut m = Box::new(Master::new(&root, term, &dead, &unfenced));
        let mut by_name: BTreeMap<ResName, Vec<(Proc, Record)>> = BTreeMap::new();
        for (p, c) in claims {
            m.ranges.restore(p, &c.ranges);
            for r in c.records {
                if r.name.root() == root {
                    by_name.entry(r.name.clone()).or_default().push((p, r));
                }
            }
        }
        let ctx = Ctx { gates: &self.gates, stop_all: self.cfg.stop_all, suspended: self.suspended };
        let mut all: Vec<(ResName, Vec<Out>)> = Vec::new();
        let mut locks = 0;
        for (name, mut records) in by_name {
            records.sort_by_key(|(p, r)| (r.order, *p));
            locks += records.len();
            let mut outs = Vec::new();
            let res = rebuild_resource(&name, &records, &dead, &ctx, &mut outs);
            if name == root {
                m.top = res
            } else {
                m.below.insert(name.clone(), res);
            }
            all.push((name, outs));
        }
        if !dead.is_empty() {
            self.haunted.insert(at);
        }
        self.sync.report.trees_rebuilt += usize::from(locks > 0);
        self.sync.report.locks_rebuilt += locks;
        let t = &mut self.trees[at as usize];
        assert!(t.master.is_none() && term > t.term, "term {term:?} of {root} after {:?}", t.term);
        t.master = Some(m);
        t.know = Know::Mine;
        t.term = term;
        for (name, mut outs) in all {
            self.deliver(at, &name, term, &mut outs, out);
        }
        self.settle(at);
    }

    // ---- gates ---------------------------------------------------------------------------------------------------

    pub(super) fn fenced(&mut self, who: Proc, out: &mut Vec<Action>) {
        match self.gates.get_mut(&who) {
            Some(f) => {
                *f = true;
                if self.cfg.needs_recovery {
                    self.exorcise(who, false, out)
                } else {
                    self.recovered(who, out)
                }
            }
            None if self.sync.merge || self.view.is_none() || self.members.binary_search(&who).is_ok() => {
                self.early_fenced.insert(who);
            }
            None => {}
        }
    }

    pub(super) fn recovered(&mut self, who: Proc, out: &mut Vec<Action>) {
        if self.sync.merge || self.view.is_none() || self.members.binary_search(&who).is_ok() {
            self.early_recovered.insert(who);
        }
        if self.gates.remove(&who).is_none() {
            return;
        }
        for s in &mut self.dir.slices {
            s.taint.retain(|p| *p != who);
        }
        let running = self.sync.running;
        self.dir.entries.retain(|_, e| {
            e.masks.retain(|p| *p != who);
            e.master.is_some() || running || !e.masks.is_empty()
        });
        self.exorcise(who, true, out);
    }

    fn exorcise(&mut self, who: Proc, recovered: bool, out: &mut Vec<Action>) {
        for at in self.haunted.clone() {
            let Some(m) = self.trees[at as usize].master.as_mut() else {
                self.haunted.remove(&at);
                continue;
            };
            for r in m.resources() {
                r.exorcise(who, recovered);
            }
            m.ranges.fenced(who);
            if recovered {
                m.masks.retain(|p| *p != who);
            }
            let clean =
                m.masks.is_empty() && m.resources().all(|r| r.ghosts.is_empty() && r.masks.is_empty());
            if clean && !m.ranges.haunted(&self.gates) {
                self.haunted.remove(&at);
            }
            self.pass_tree(at, out);
        }
        if self.cfg.stop_all {
            self.pass_all(out);
        }
    }

    pub(super) fn resume(&mut self, out: &mut Vec<Action>) {
        if std::mem::replace(&mut self.suspended, false) {
            for (from, name, op) in std::mem::take(&mut self.held_lookups) {
                self.dir_lookup(from, name, op, out);
            }
            self.pass_all(out);
        }
    }

    // ---- checks --------------------------------------------------------------------------------------------------

    /// What must hold between steps; asserted by tests after every step and by the driver at every view.
    pub fn check(&mut self) {
        for at in 0..self.trees.len() {
            let t = &mut self.trees[at];
            if !t.live {
                continue;
            }
            assert_eq!(t.know == Know::Mine, t.master.is_some(), "knowledge of {}", t.root);
            if let Some(m) = &mut t.master {
                assert_eq!(m.term, t.term);
                for r in m.resources() {
                    r.check();
                }
            }
            assert!(
                t.unsent.is_empty() || matches!(t.know, Know::LookingUp | Know::Orphan),
                "operations of {} wait although its master is known",
                t.root
            );
        }
    }

    /// Nothing left behind (I-13): trees, locks, directory entries.
    pub fn residue(&self) -> (usize, usize, usize) {
        let trees = self.trees.iter().filter(|t| t.live).count();
        let locks = self.locks.iter().filter(|l| l.live).count();
        (trees, locks, self.dir.entries.len())
    }
}

/// A conversion under way whose old mode the dead master may have changed already (S-23, and demotion).
fn uncertain(r: &Record) -> bool {
    match (r.granted, r.want) {
        (Some(g), Some(w)) => g.is_middle_to(w) || r.flags.has(Flags::CONVDEADLK),
        _ => false,
    }
}

fn rebuild_resource(
    name: &ResName,
    records: &[(Proc, Record)],
    dead: &[Proc],
    ctx: &Ctx<'_>,
    outs: &mut Vec<Out>,
) -> Resource {
    let mut res = Resource::new(name.clone(), &[]);
    let lock = |p: Proc, r: &Record| MLock {
        who: p,
        id: r.id,
        // The operation under way is executed below, as if it arrived now.
        op: r.op - u32::from(r.want.is_some()),
        granted: r.granted,
        want: None,
        flags: r.flags,
        order: r.order,
        told: None,
        valblk: r.valblk,
        demoted: false,
    };
    let mut done = BTreeSet::new();
    let sure = |r: &Record| r.granted.is_some() && !uncertain(r);
    for (p, r) in records.iter().filter(|(_, r)| sure(r)) {
        let mode = r.granted.expect("sure");
        assert!(
            res.fits(mode),
            "I-1: survivors present {mode:?} of {p} on {name} beside a lock it conflicts with"
        );
        res.restore(lock(*p, r));
    }
    for (p, r) in records.iter().filter(|(_, r)| uncertain(r)) {
        let (old, want) = (r.granted.expect("uncertain"), r.want.expect("uncertain"));
        if res.fits(old) {
            res.restore(lock(*p, r));
        } else if r.flags.has(Flags::CONVDEADLK) {
            res.restore(MLock { granted: Some(Mode::NL), ..lock(*p, r) });
        } else {
            // Others hold what excludes the old mode: the dead master had granted the new one.
            assert!(res.fits(want), "I-1: neither {old:?} nor {want:?} of {p} fits on {name}");
            res.restore(MLock { granted: Some(want), op: r.op, ..lock(*p, r) });
            done.insert((*p, r.id));
            outs.push(Out::Result {
                who: *p,
                id: r.id,
                op: r.op,
                status: Status::Granted,
                mode: Some(want),
                sb: SbFlags(if r.flags.has(Flags::VALBLK) { SbFlags::VALNOTVALID } else { 0 }),
                lvb: None,
            });
        }
    }
    let bound = |r: &Record| match (r.granted, uncertain(r)) {
        (Some(_), true) if r.flags.has(Flags::CONVDEADLK) => Some(Mode::NL),
        (Some(_), true) => Some(Mode::CR),
        (g, _) => g,
    };
    res.set_masks(dead, records.iter().filter_map(|(_, r)| bound(r)));
    rebuild_value(&mut res, records);
    for (p, r) in records.iter().filter(|(p, r)| r.granted.is_some() && !done.contains(&(*p, r.id))) {
        if let Some(want) = r.want {
            res.convert(ctx, *p, r.id, r.op, want, r.flags, None, r.order, outs);
        }
    }
    for (p, r) in records.iter().filter(|(_, r)| r.granted.is_none()) {
        let l = MLock { want: r.want, op: r.op, ..lock(*p, r) };
        res.request(ctx, l, false, outs);
    }
    res
}

/// The value: exact when a survivor pins it, else the newest copy, flagged (S-10 d).
fn rebuild_value(res: &mut Resource, records: &[(Proc, Record)]) {
    let users = records.iter().filter(|(_, r)| r.valblk && r.granted.is_some());
    let pinned = users
        .clone()
        .find(|(_, r)| r.lvb.is_some() && !uncertain(r) && r.granted.is_some_and(Mode::pins_lvb));
    if let Some((_, r)) = pinned {
        let c = r.lvb.expect("checked");
        res.lvb = c.bytes;
        res.lvb_seq = c.seq;
        res.lvb_invalid = !r.lvb_valid;
        return;
    }
    if let Some(c) = users.clone().filter_map(|(_, r)| r.lvb).max_by_key(|c| c.seq) {
        res.lvb = c.bytes;
        res.lvb_seq = c.seq;
    }
    if users.count() > 0 && !mutant::on(Mutant::LvbUnflagged) {
        res.lvb_invalid = true;
    }
}
