//! Holder: this node's own locks, the calls of its users, and what reaches them.
//!
//! A release or a conversion to a weaker mode takes effect at the call and is sent one way (S-24). While the master is
//! not known, operations wait in the tree in order; what a rebuild presents is the state before them.

use super::{Action, Completion, Core, Know, Lock, Phase, PlockHolder, PlockPending, ZERO_LVB};
use crate::msg::{Msg, PlockAnswer, Probe, TreeOp};
use crate::mutant::{self, Mutant};
use crate::name::ResName;
use crate::plock::{self, PlockKey, PlockRange};
use crate::resource::{LvbCopy, Out};
use crate::types::{
    Flags, LockError, LockId, Lvb, LvbMove, Mode, SbFlags, Status, Term, lvb_move, quecvt_legal,
};
use cairn_base::{Boottime, Proc};
use std::time::Duration;

impl Core {
    fn check_flags(flags: Flags, mode: Mode, from: Option<Mode>) -> Result<(), LockError> {
        let conv = from.is_some();
        if !flags.known() || flags.has(Flags::FORCEUNLOCK) {
            return Err(LockError::Invalid("unknown flag"));
        }
        let bad = [
            (flags.has(Flags::NOQUEUE) && flags.has(Flags::CONVDEADLK), "NOQUEUE with CONVDEADLK"),
            (flags.has(Flags::NOQUEUE) && flags.has(Flags::EXPEDITE), "NOQUEUE with EXPEDITE"),
            (flags.has(Flags::NOQUEUEBAST) && !flags.has(Flags::NOQUEUE), "NOQUEUEBAST without NOQUEUE"),
            (flags.has(Flags::EXPEDITE) && (conv || mode != Mode::NL), "EXPEDITE only for a new NL request"),
            (flags.has(Flags::EXPEDITE) && flags.has(Flags::QUECVT), "EXPEDITE with QUECVT"),
            (
                !conv
                    && (flags.has(Flags::QUECVT)
                        || flags.has(Flags::CONVDEADLK)
                        || flags.has(Flags::NODLCKWT)
                        || flags.has(Flags::IVVALBLK)),
                "flag of a conversion on a new request",
            ),
            (
                flags.has(Flags::QUECVT) && from.is_some_and(|f| !quecvt_legal(f, mode)),
                "QUECVT is not legal for this conversion",
            ),
        ];
        match bad.iter().find(|(b, _)| *b) {
            Some((_, why)) => Err(LockError::Invalid(why)),
            None => Ok(()),
        }
    }

    fn usable(&self) -> Result<(), LockError> {
        if self.evicted || self.leaving { Err(LockError::Gone) } else { Ok(()) }
    }

    fn tick_order(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A new lock. The answer comes as `Action::Complete` with `user` in it, possibly in this call.
    #[allow(clippy::too_many_arguments)] // the arguments of the interface
    pub fn request(
        &mut self,
        now: Boottime,
        name: &ResName,
        mode: Mode,
        flags: Flags,
        user: u64,
        timeout: Option<Duration>,
        out: &mut Vec<Action>,
    ) -> Result<LockId, LockError> {
        self.now = self.now.max(now);
        self.usable()?;
        Self::check_flags(flags, mode, None)?;
        self.sync.used = true;
        let is_root = name.is_root();
        let tree =
            if is_root && let Some(&t) = self.by_root.get(name) { t } else { self.tree_of(name.root()) };
        let order = self.tick_order();
        let slot = self.free_locks.pop().map_or(self.locks.len(), |s| s as usize);
        let lock = Lock {
            generation: self.locks.get(slot).map_or(1, |l| l.generation.wrapping_add(1).max(1)),
            live: true,
            closing: false,
            tree,
            name: (!is_root).then(|| Box::new(name.clone())),
            user,
            flags,
            granted: None,
            sent: None,
            want: Some(mode),
            phase: Phase::Queued,
            op: 1,
            sent_op: 0,
            order,
            cancelling: false,
            timed_out: false,
            deadline: None,
            valblk: flags.has(Flags::VALBLK),
            lvb: None,
            lvb_valid: true,
        };
        if slot == self.locks.len() {
            self.locks.push(lock)
        } else {
            self.locks[slot] = lock
        }
        let id = self.id_of(slot);
        self.set_deadline(slot, timeout);
        let t = &mut self.trees[tree as usize];
        t.locks.push(slot as u32);
        t.idle_since = None;
        self.dispatch(tree, name.clone(), TreeOp::Request { id, op: 1, mode, flags, order }, out);
        Ok(id)
    }

    fn set_deadline(&mut self, slot: usize, timeout: Option<Duration>) {
        if let Some(d) = timeout {
            let at = self.now + d;
            self.locks[slot].deadline = Some(at);
            self.deadlines.insert((at, self.id_of(slot)));
        }
    }

    fn clear_deadline(&mut self, slot: usize) {
        if let Some(at) = self.locks[slot].deadline.take() {
            let id = self.id_of(slot);
            self.deadlines.remove(&(at, id));
        }
    }

    /// Changes the mode of a granted lock. `lvb` is stored where the table says "write" and VALBLK is set.
    #[allow(clippy::too_many_arguments)] // the arguments of the interface
    pub fn convert(
        &mut self,
        now: Boottime,
        id: LockId,
        mode: Mode,
        flags: Flags,
        lvb: Option<&Lvb>,
        timeout: Option<Duration>,
        out: &mut Vec<Action>,
    ) -> Result<(), LockError> {
        self.now = self.now.max(now);
        self.usable()?;
        let slot = self.lock_slot(id).filter(|&s| !self.locks[s].closing).ok_or(LockError::NoLock)?;
        let l = &self.locks[slot];
        if l.phase != Phase::Idle {
            return Err(LockError::Busy);
        }
        let from = l.granted.expect("an idle lock is granted");
        Self::check_flags(flags, mode, Some(from))?;
        let order = self.tick_order();
        let name = self.name_of(slot);
        let l = &mut self.locks[slot];
        l.op += 1;
        l.flags = flags;
        l.order = order;
        l.cancelling = false;
        l.timed_out = false;
        l.valblk |= flags.has(Flags::VALBLK);
        let lvb = lvb.copied().filter(|_| flags.has(Flags::VALBLK));
        let (op, tree) = (l.op, l.tree);
        let down = from.is_down_to(mode);
        if down {
            l.granted = Some(mode);
            Self::own_write(l, from, mode, flags, lvb);
            let (user, sb) = (l.user, SbFlags::default());
            let done =
                Completion { lock: id, user, status: Status::Granted, mode: Some(mode), sb, lvb: None };
            out.push(Action::Complete(done));
        } else {
            if from == mode {
                // The same mode again is always granted; from PW and EX it writes.
                Self::own_write(l, from, mode, flags, lvb);
            }
            l.want = Some(mode);
            l.phase = Phase::Queued;
            self.set_deadline(slot, timeout);
        }
        self.dispatch(tree, name, TreeOp::Convert { id, op, mode, flags, order, lvb }, out);
        Ok(())
    }

    /// Keeps the holder's copy of the value in step with what it writes.
    fn own_write(l: &mut Lock, from: Mode, to: Mode, flags: Flags, lvb: Option<Lvb>) {
        if lvb_move(Some(from), to) != LvbMove::Write {
            return;
        }
        if flags.has(Flags::IVVALBLK) {
            l.lvb_valid = false;
        } else if let Some(bytes) = lvb {
            let seq = l.lvb.map_or(0, |c| c.seq) + 1;
            l.lvb = Some(LvbCopy { bytes, seq });
            l.lvb_valid = true;
        }
    }

    /// Releases a lock; complete at once. FORCEUNLOCK also while an operation is under way.
    pub fn unlock(
        &mut self,
        now: Boottime,
        id: LockId,
        flags: Flags,
        lvb: Option<&Lvb>,
        out: &mut Vec<Action>,
    ) -> Result<(), LockError> {
        self.now = self.now.max(now);
        if self.evicted {
            return Err(LockError::Gone);
        }
        let slot = self.lock_slot(id).filter(|&s| !self.locks[s].closing).ok_or(LockError::NoLock)?;
        if self.locks[slot].phase != Phase::Idle && !flags.has(Flags::FORCEUNLOCK) {
            return Err(LockError::Busy);
        }
        self.clear_deadline(slot);
        let name = self.name_of(slot);
        let l = &mut self.locks[slot];
        l.closing = true;
        let lvb = lvb.copied().filter(|_| flags.has(Flags::VALBLK));
        let (user, tree) = (l.user, l.tree);
        let sb = SbFlags::default();
        out.push(Action::Complete(Completion {
            lock: id,
            user,
            status: Status::Unlocked,
            mode: None,
            sb,
            lvb: None,
        }));
        self.dispatch(tree, name, TreeOp::Release { id, flags, lvb }, out);
        Ok(())
    }

    /// Gives up the pending operation, if there is one; its completion says how it ended.
    pub fn cancel(&mut self, now: Boottime, id: LockId, out: &mut Vec<Action>) -> Result<(), LockError> {
        self.now = self.now.max(now);
        let slot = self.lock_slot(id).filter(|&s| !self.locks[s].closing).ok_or(LockError::NoLock)?;
        let l = &mut self.locks[slot];
        if l.phase == Phase::Idle || l.cancelling {
            return Ok(());
        }
        l.cancelling = true;
        let (op, tree) = (l.op, l.tree);
        let name = self.name_of(slot);
        self.dispatch(tree, name, TreeOp::Cancel { id, op }, out);
        Ok(())
    }

    pub(super) fn timed_out(&mut self, id: LockId, out: &mut Vec<Action>) {
        if let Some(slot) = self.lock_slot(id) {
            self.locks[slot].deadline = None;
            self.locks[slot].timed_out = true;
            let _ = self.cancel(self.now, id, out);
        }
    }

    /// Stops using the lock space. Refused while locks stronger than NL are held.
    pub fn leave(&mut self) -> Result<(), LockError> {
        let held = self
            .locks
            .iter()
            .filter(|l| l.live && !l.closing && l.granted.is_none_or(|m| m != Mode::NL))
            .count();
        if held > 0 {
            return Err(LockError::StillHeld(held));
        }
        self.leaving = true;
        Ok(())
    }

    // ---- sending -------------------------------------------------------------------------------------------------

    /// Hands an operation to the master of its tree, wherever it is, keeping the order of the tree's operations.
    pub(super) fn dispatch(&mut self, at: u32, name: ResName, op: TreeOp, out: &mut Vec<Action>) {
        let t = &mut self.trees[at as usize];
        match t.know {
            Know::Mine | Know::At(..) => self.transmit(at, name, op, out),
            Know::LookingUp | Know::Orphan => {
                if mutant::on(Mutant::DownOvertaken) && matches!(op, TreeOp::Request { .. }) {
                    t.unsent.push_front((name, op));
                } else {
                    t.unsent.push_back((name, op));
                }
            }
            Know::Unknown => {
                t.know = Know::LookingUp;
                t.lookup_op = Some((name, op));
                self.lookups.insert(at);
                self.send_lookup(at, out);
            }
        }
    }

    pub(super) fn send_lookup(&mut self, at: u32, out: &mut Vec<Action>) {
        let t = &self.trees[at as usize];
        // A joiner does not know yet which gates are shut: it asks when it does.
        if !self.synced() {
            return;
        }
        let Some((name, op)) = t.lookup_op.clone() else { return };
        match self.dir.owner(t.slice) {
            Some(owner) if owner == self.me => self.dir_lookup(self.me, name, op, out),
            Some(owner) => self.send(owner, Msg::Lookup { name, op }, out),
            None => {} // no view yet: sent when it comes
        }
    }

    /// Notes what the master will know once it has read `op`.
    fn note_sent(&mut self, op: &TreeOp) {
        match op {
            TreeOp::Request { id, op, .. } => {
                if let Some(s) = self.lock_slot(*id)
                    && self.locks[s].op == *op
                {
                    self.locks[s].phase = Phase::Sent;
                    self.locks[s].sent_op = *op;
                }
            }
            TreeOp::Convert { id, op, mode, .. } => {
                if let Some(s) = self.lock_slot(*id) {
                    let l = &mut self.locks[s];
                    l.sent_op = *op;
                    if l.want.is_some() && l.op == *op {
                        l.phase = Phase::Sent;
                    } else {
                        l.sent = Some(*mode); // a conversion down
                    }
                }
            }
            TreeOp::Release { id, .. } => {
                if let Some(s) = self.lock_slot(*id) {
                    self.free_lock(s);
                }
            }
            TreeOp::PlockLock { ticket, .. }
            | TreeOp::PlockUnlock { ticket, .. }
            | TreeOp::PlockTest { ticket, .. } => {
                self.plock_mark(*ticket, true);
            }
            TreeOp::Cancel { .. } | TreeOp::PlockCancel { .. } | TreeOp::PlockProbe { .. } => {}
        }
    }

    /// The operation goes back to the start.
    pub(super) fn mark_queued(&mut self, op: &TreeOp) {
        match op {
            TreeOp::Request { id, op, .. } | TreeOp::Convert { id, op, .. } => {
                if let Some(s) = self.lock_slot(*id)
                    && self.locks[s].op == *op
                    && self.locks[s].phase == Phase::Sent
                {
                    self.locks[s].phase = Phase::Queued;
                }
            }
            TreeOp::PlockLock { ticket, .. }
            | TreeOp::PlockUnlock { ticket, .. }
            | TreeOp::PlockTest { ticket, .. } => {
                self.plock_mark(*ticket, false);
            }
            _ => {}
        }
    }

    fn transmit(&mut self, at: u32, name: ResName, op: TreeOp, out: &mut Vec<Action>) {
        match self.trees[at as usize].know {
            Know::Mine => {
                let term = self.trees[at as usize].master.as_ref().expect("mine").term;
                self.note_sent(&op);
                self.execute(at, self.me, name, term, op, false, out);
                self.settle(at);
            }
            Know::At(p, term) => {
                self.note_sent(&op);
                self.send(p, Msg::Op { name, term, op }, out);
                self.settle(at);
            }
            _ => unreachable!("transmit needs a master"),
        }
    }

    /// The master is known now: everything that waited goes to it in order.
    pub(super) fn flush(&mut self, at: u32, out: &mut Vec<Action>) {
        self.lookups.remove(&at);
        while matches!(self.trees[at as usize].know, Know::Mine | Know::At(..)) {
            let Some((name, op)) = self.trees[at as usize].unsent.pop_front() else { break };
            self.transmit(at, name, op, out);
        }
        self.settle(at);
    }

    pub(super) fn free_lock(&mut self, slot: usize) {
        self.clear_deadline(slot);
        let l = &mut self.locks[slot];
        assert!(l.live, "double free of a lock");
        l.live = false;
        l.name = None;
        let tree = l.tree;
        let t = &mut self.trees[tree as usize];
        let at = t.locks.iter().position(|s| *s as usize == slot).expect("a lock is in its tree");
        t.locks.swap_remove(at);
        self.free_locks.push(slot as u32);
    }

    // ---- answers -------------------------------------------------------------------------------------------------

    /// A master answered an operation of a looked-up tree: from here on we know it. `is_lookup`: it is the one that
    /// went through the directory.
    pub(super) fn learn(&mut self, at: u32, from: Proc, term: Term, is_lookup: bool) -> bool {
        let t = &mut self.trees[at as usize];
        let learn = match t.know {
            Know::LookingUp => is_lookup && term >= t.term,
            Know::Orphan => term > t.term,
            _ => false,
        };
        if learn {
            t.know = Know::At(from, term);
            t.term = term;
            if is_lookup {
                t.lookup_op = None;
            }
        }
        learn
    }

    pub(super) fn holder_result(
        &mut self,
        from: Proc,
        name: &ResName,
        term: Term,
        r: Out,
        out: &mut Vec<Action>,
    ) {
        let Out::Result { id, op, status, mode, sb, lvb, .. } = r else { return };
        let at = self.by_root.get(name).copied().or_else(|| self.by_root.get(&name.root()).copied());
        let mut learned = false;
        if let Some(at) = at
            && from != self.me
        {
            let is_lookup = matches!(
                self.trees[at as usize].lookup_op,
                Some((_, TreeOp::Request { id: i, op: o, .. })) if i == id && o == op
            );
            if is_lookup && matches!(self.trees[at as usize].know, Know::LookingUp) {
                let looked = self.trees[at as usize].lookup_op.clone();
                learned = self.learn(at, from, term, true);
                if learned && let Some((_, op)) = looked {
                    self.note_sent(&op);
                }
            } else {
                learned = self.learn(at, from, term, false);
            }
        }
        match self.lock_slot(id) {
            // The lock is long gone (an operation that was executed twice): what was granted goes back.
            None => {
                if matches!(status, Status::Granted | Status::Queued) {
                    let op = TreeOp::Release { id, flags: Flags::NONE, lvb: None };
                    if from == self.me {
                        if let Some(at) = at {
                            self.execute(at, from, name.clone(), term, op, false, out);
                        }
                    } else {
                        self.send(from, Msg::Op { name: name.clone(), term, op }, out);
                    }
                }
            }
            Some(slot) => self.complete(slot, op, status, mode, sb, lvb, out),
        }
        if learned && let Some(at) = at {
            self.flush(at, out);
        }
        if let Some(at) = at {
            self.settle(at);
        }
    }

    #[allow(clippy::too_many_arguments)] // the fields of one message
    fn complete(
        &mut self,
        slot: usize,
        op: u32,
        status: Status,
        mode: Option<Mode>,
        sb: SbFlags,
        lvb: Option<LvbCopy>,
        out: &mut Vec<Action>,
    ) {
        let id = self.id_of(slot);
        let l = &mut self.locks[slot];
        if l.closing || l.phase == Phase::Idle || l.op != op {
            // A duplicate, or the answer to an operation that a forced release swallowed (S-22).
            if mutant::on(Mutant::CancelAndGrant) && status == Status::Cancelled {
                let c = Completion { lock: id, user: l.user, status, mode, sb, lvb: None };
                out.push(Action::Complete(c));
            }
            return;
        }
        l.sent_op = op;
        if status == Status::Queued {
            l.phase = Phase::Sent;
            return;
        }
        let mut seen = None;
        if status == Status::Granted {
            let mode = mode.expect("a grant names its mode");
            // The master converted from NL when it had to demote us first.
            let from = if sb.0 & SbFlags::DEMOTED != 0 { Some(Mode::NL) } else { l.granted };
            l.granted = Some(mode);
            l.sent = Some(mode);
            let read = lvb_move(from, mode) == LvbMove::Read;
            if l.flags.has(Flags::VALBLK) && read {
                l.lvb = Some(lvb.unwrap_or(LvbCopy { bytes: ZERO_LVB, seq: 0 }));
                l.lvb_valid = sb.0 & SbFlags::VALNOTVALID == 0;
                seen = lvb.map(|c| c.bytes);
            } else if from != Some(mode) {
                l.lvb = None; // not read at this grant: the copy may be old
            }
        } else if sb.0 & SbFlags::DEMOTED != 0 {
            l.granted = Some(Mode::NL);
            l.sent = Some(Mode::NL);
        }
        l.want = None;
        l.phase = Phase::Idle;
        l.cancelling = false;
        let status = if status == Status::Cancelled && l.timed_out { Status::TimedOut } else { status };
        let (user, mode, tree) = (l.user, l.granted, l.tree);
        self.clear_deadline(slot);
        out.push(Action::Complete(Completion { lock: id, user, status, mode, sb, lvb: seen }));
        if mode.is_none() {
            // A cancel of this operation that has not been sent would find nothing.
            let stale = |o: &TreeOp| matches!(o, TreeOp::Cancel { id: i, .. } if *i == id);
            self.trees[tree as usize].unsent.retain(|(_, o)| !stale(o));
            self.free_lock(slot);
        }
    }

    pub(super) fn holder_bast(&mut self, id: LockId, mode: Mode, out: &mut Vec<Action>) {
        let Some(slot) = self.lock_slot(id) else { return };
        let l = &self.locks[slot];
        // A notice that our present mode does not deserve any more is dropped (S-17).
        let blocks = l.granted.is_some_and(|g| !g.compatible(mode));
        if !l.closing && (blocks || mutant::on(Mutant::BastNumeric)) {
            out.push(Action::Block { lock: id, user: l.user, mode });
        }
    }

    pub(super) fn redirected(
        &mut self,
        from: Proc,
        root: &ResName,
        term: Term,
        looked_up: bool,
        out: &mut Vec<Action>,
    ) {
        let Some(&at) = self.by_root.get(root) else { return };
        let t = &mut self.trees[at as usize];
        match t.know {
            Know::At(p, known) if !looked_up && p == from && known == term => {
                // A hint that was too old. No lock of ours is there, so everything outstanding starts again.
                t.know = Know::Unknown;
                let mut again = self.outstanding(at);
                let t = &mut self.trees[at as usize];
                again.extend(std::mem::take(&mut t.unsent));
                for (name, op) in again {
                    self.mark_queued(&op);
                    self.dispatch(at, name, op, out);
                }
                self.settle(at);
            }
            Know::LookingUp if looked_up => self.send_lookup(at, out),
            _ => {}
        }
    }

    /// Operations sent to a master that never executed them, in order.
    fn outstanding(&self, at: u32) -> Vec<(ResName, TreeOp)> {
        let t = &self.trees[at as usize];
        let mut slots: Vec<usize> = t.locks.iter().map(|s| *s as usize).collect();
        slots.sort_unstable_by_key(|s| self.locks[*s].order);
        let mut ops = Vec::new();
        for s in slots {
            let l = &self.locks[s];
            assert!(l.granted.is_none(), "a lock was granted by a master that denies its term");
            if l.phase != Phase::Sent {
                continue;
            }
            let (id, name) = (self.id_of(s), self.name_of(s));
            let mode = l.want.expect("pending");
            ops.push((name.clone(), TreeOp::Request { id, op: l.op, mode, flags: l.flags, order: l.order }));
            if l.cancelling {
                ops.push((name, TreeOp::Cancel { id, op: l.op }));
            }
        }
        if let Some(p) = &t.plocks {
            assert!(p.held.is_empty(), "a range was granted by a master that denies its term");
            ops.extend(p.ops.iter().filter(|o| o.sent).map(|o| (t.root.clone(), o.op.clone())));
        }
        ops
    }

    // ---- byte ranges ---------------------------------------------------------------------------------------------

    fn plock_dispatch(
        &mut self,
        root: &ResName,
        make: impl FnOnce(u64) -> TreeOp,
        out: &mut Vec<Action>,
    ) -> u64 {
        self.next_ticket += 1;
        let ticket = self.next_ticket;
        let op = make(ticket);
        let at = self.tree_of(root.root());
        self.tickets.insert(ticket, at);
        let t = &mut self.trees[at as usize];
        t.idle_since = None;
        let p = t.plocks.get_or_insert_with(Box::<PlockHolder>::default);
        p.ops.push(PlockPending { ticket, op: op.clone(), sent: false, queued: false, cancelling: false });
        self.dispatch(at, root.root(), op, out);
        ticket
    }

    /// Byte-range lock in the tree `root`; answered by `Action::PlockDone` with the returned ticket.
    pub fn plock_lock(
        &mut self,
        now: Boottime,
        root: &ResName,
        range: PlockRange,
        wait: bool,
        out: &mut Vec<Action>,
    ) -> Result<u64, LockError> {
        self.plock_check(now, &range)?;
        Ok(self.plock_dispatch(root, |ticket| TreeOp::PlockLock { ticket, range, wait }, out))
    }

    pub fn plock_unlock(
        &mut self,
        now: Boottime,
        root: &ResName,
        range: PlockRange,
        out: &mut Vec<Action>,
    ) -> Result<u64, LockError> {
        self.plock_check(now, &range)?;
        Ok(self.plock_dispatch(root, |ticket| TreeOp::PlockUnlock { ticket, range }, out))
    }

    /// Who would be in the way?
    pub fn plock_test(
        &mut self,
        now: Boottime,
        root: &ResName,
        range: PlockRange,
        out: &mut Vec<Action>,
    ) -> Result<u64, LockError> {
        self.plock_check(now, &range)?;
        Ok(self.plock_dispatch(root, |ticket| TreeOp::PlockTest { ticket, range }, out))
    }

    fn plock_check(&mut self, now: Boottime, range: &PlockRange) -> Result<(), LockError> {
        self.now = self.now.max(now);
        self.usable()?;
        if range.start > range.end {
            return Err(LockError::Invalid("range ends before it starts"));
        }
        self.sync.used = true;
        Ok(())
    }

    pub fn plock_cancel(&mut self, now: Boottime, ticket: u64, out: &mut Vec<Action>) {
        self.now = self.now.max(now);
        self.plock_take_back(ticket, false, out);
    }

    pub(super) fn plock_take_back(&mut self, ticket: u64, deadlock: bool, out: &mut Vec<Action>) {
        let Some(&at) = self.tickets.get(&ticket) else { return };
        let t = &mut self.trees[at as usize];
        let root = t.root.clone();
        let Some(o) = t.plocks.as_mut().and_then(|p| p.ops.iter_mut().find(|o| o.ticket == ticket)) else {
            return;
        };
        if !o.cancelling {
            o.cancelling = true;
            self.dispatch(at, root, TreeOp::PlockCancel { ticket, deadlock }, out);
        }
    }

    fn plock_mark(&mut self, ticket: u64, sent: bool) {
        if let Some(&at) = self.tickets.get(&ticket)
            && let Some(p) = &mut self.trees[at as usize].plocks
            && let Some(o) = p.ops.iter_mut().find(|o| o.ticket == ticket)
        {
            o.sent = sent;
        }
    }

    pub(super) fn plock_result(
        &mut self,
        from: Proc,
        name: &ResName,
        term: Term,
        ticket: u64,
        answer: PlockAnswer,
        out: &mut Vec<Action>,
    ) {
        let Some(&at) = self.by_root.get(name) else { return };
        let is_lookup = matches!(
            &self.trees[at as usize].lookup_op,
            Some((_, TreeOp::PlockLock { ticket: t, .. } | TreeOp::PlockUnlock { ticket: t, .. }
                | TreeOp::PlockTest { ticket: t, .. })) if *t == ticket
        );
        let learned = from != self.me && self.learn(at, from, term, is_lookup);
        if learned && is_lookup {
            self.plock_mark(ticket, true);
        }
        if answer == PlockAnswer::Queued
            && let Some(p) = &mut self.trees[at as usize].plocks
            && let Some(o) = p.ops.iter_mut().find(|o| o.ticket == ticket)
        {
            o.queued = true;
        }
        if self.tickets.get(&ticket) == Some(&at) && answer != PlockAnswer::Queued {
            let p = self.trees[at as usize].plocks.as_mut().expect("a ticket has its tree's state");
            if let Some(i) = p.ops.iter().position(|o| o.ticket == ticket) {
                let o = p.ops.remove(i);
                match (answer, &o.op) {
                    (PlockAnswer::Granted, TreeOp::PlockLock { range, .. }) => {
                        plock::apply(&mut p.held, *range, true)
                    }
                    (PlockAnswer::Granted, TreeOp::PlockUnlock { range, .. }) => {
                        plock::apply(&mut p.held, *range, false);
                    }
                    _ => {}
                }
                self.tickets.remove(&ticket);
                out.push(Action::PlockDone { ticket, answer });
            }
        }
        if learned {
            self.flush(at, out);
        }
        self.settle(at);
    }

    /// A probe reached the home of `owner`: does it wait somewhere?
    pub(super) fn probe_at_home(&mut self, probe: Probe, out: &mut Vec<Action>) {
        if probe.owner == probe.victim {
            self.plock_take_back(probe.ticket, true, out);
            return;
        }
        let mut waits = Vec::new();
        for (&ticket, &at) in &self.tickets {
            let t = &self.trees[at as usize];
            let waiting = t.plocks.as_ref().is_some_and(|p| {
                p.ops.iter().any(|o| {
                    o.ticket == ticket
                        && o.sent
                        && matches!(&o.op, TreeOp::PlockLock { range, wait: true, .. } if range.owner == probe.owner.owner)
                })
            });
            if waiting && matches!(t.know, Know::Mine | Know::At(..)) {
                waits.push((ticket, at));
            }
        }
        waits.sort_unstable();
        for (ticket, at) in waits {
            let root = self.trees[at as usize].root.clone();
            self.dispatch(at, root, TreeOp::PlockProbe { ticket, probe }, out);
        }
    }

    /// Byte-range operations of this node that wait at their masters.
    pub fn plock_waits(&self) -> usize {
        let waits = |p: &PlockHolder| p.ops.iter().filter(|o| o.queued).count();
        self.trees.iter().filter(|t| t.live).filter_map(|t| t.plocks.as_deref()).map(waits).sum()
    }

    pub(super) fn plock_key(&self, who: Proc, owner: u64) -> PlockKey {
        PlockKey { who, owner }
    }
}
