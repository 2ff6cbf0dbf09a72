//! One resource at its master: three queues, value block, ghosts and masks, and the rules by which locks are granted.
//!
//! Pure decisions: every call changes the resource and appends answers to `out`. Invariants: granted and converting
//! locks are pairwise compatible in their granted modes (I-1; asserted at every grant unless the grant passed a gate by
//! RECOVERY); `held` counts exactly those modes; nothing that a rule would grant stays queued when a call returns (I-5).

use crate::mutant::{self, Mutant};
use crate::name::ResName;
use crate::types::{Flags, LVB_LEN, LockId, Lvb, LvbMove, Mode, ModeSet, SbFlags, Status, lvb_move};
use cairn_base::Proc;
use std::collections::BTreeMap;

/// One lock as the master sees it.
#[derive(Clone, Debug)]
pub(crate) struct MLock {
    pub(crate) who: Proc,
    pub(crate) id: LockId,
    /// Number of the last operation executed for this lock.
    pub(crate) op: u32,
    pub(crate) granted: Option<Mode>,
    pub(crate) want: Option<Mode>,
    pub(crate) flags: Flags,
    pub(crate) order: u64,
    /// Strongest mode that its owner has been told about since its last grant (S-15).
    pub(crate) told: Option<Mode>,
    /// Took part in value transfers: its death in PW or EX spoils the value.
    pub(crate) valblk: bool,
    pub(crate) demoted: bool,
}

/// What a dead node still holds until its gate opens.
#[derive(Clone, Debug)]
pub(crate) struct Ghost {
    pub(crate) who: Proc,
    pub(crate) mode: Mode,
    pub(crate) at_fence: bool,
}

/// Answers of a resource, turned into messages or local completions by the core.
#[derive(Clone, Debug)]
pub(crate) enum Out {
    Result {
        who: Proc,
        id: LockId,
        op: u32,
        status: Status,
        mode: Option<Mode>,
        sb: SbFlags,
        lvb: Option<LvbCopy>,
    },
    Bast {
        who: Proc,
        id: LockId,
        mode: Mode,
    },
}

/// A value with its sequence number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LvbCopy {
    pub bytes: Lvb,
    pub seq: u64,
}

/// What a decision may look at beside the resource.
pub(crate) struct Ctx<'a> {
    /// Shut gates: dead proc → fenced already.
    pub(crate) gates: &'a BTreeMap<Proc, bool>,
    /// Conservative mode: nothing is granted while any gate is shut.
    pub(crate) stop_all: bool,
    /// No quorum: nothing is granted at all.
    pub(crate) suspended: bool,
}

impl Ctx<'_> {
    fn fenced(&self, p: Proc) -> bool {
        mutant::on(Mutant::RecoveryBeforeFence) || self.gates.get(&p).copied().unwrap_or(true)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    /// In the call that brought the request; the lock is in no queue yet.
    Now,
    /// In a later pass; position in its own queue.
    Later(usize),
}

#[derive(Debug)]
pub(crate) struct Resource {
    pub(crate) name: ResName,
    pub(crate) granted: Vec<MLock>,
    pub(crate) converting: Vec<MLock>,
    pub(crate) waiting: Vec<MLock>,
    held: [u32; 6],
    pub(crate) ghosts: Vec<Ghost>,
    /// What each dead proc may have held here, as far as survivors could bound it.
    pub(crate) masks: Vec<(Proc, ModeSet)>,
    pub(crate) lvb: Lvb,
    /// 0: never had a value.
    pub(crate) lvb_seq: u64,
    pub(crate) lvb_invalid: bool,
}

impl Resource {
    pub(crate) fn new(name: ResName, masked_by: &[Proc]) -> Self {
        Self {
            name,
            granted: Vec::new(),
            converting: Vec::new(),
            waiting: Vec::new(),
            held: [0; 6],
            ghosts: Vec::new(),
            masks: masked_by.iter().map(|&p| (p, ModeSet::ALL)).collect(),
            lvb: [0; LVB_LEN],
            lvb_seq: 0,
            lvb_invalid: false,
        }
    }

    /// Nobody holds, waits for or haunts it.
    pub(crate) fn is_idle(&self) -> bool {
        self.granted.is_empty()
            && self.converting.is_empty()
            && self.waiting.is_empty()
            && self.ghosts.is_empty()
            && self.masks.is_empty()
    }

    pub(crate) fn has_queue(&self) -> bool {
        !self.converting.is_empty() || !self.waiting.is_empty()
    }

    /// The last lock is gone: the value goes too (S-12). Ghosts keep it.
    fn forget_value_if_unused(&mut self) {
        if self.granted.is_empty()
            && self.converting.is_empty()
            && self.waiting.is_empty()
            && self.ghosts.is_empty()
        {
            self.lvb = [0; LVB_LEN];
            self.lvb_seq = 0;
            self.lvb_invalid = false;
        }
    }

    pub(crate) fn find(&self, who: Proc, id: LockId) -> Option<&MLock> {
        let is = |l: &&MLock| l.id == id && l.who == who;
        self.granted
            .iter()
            .find(is)
            .or_else(|| self.converting.iter().find(is))
            .or_else(|| self.waiting.iter().find(is))
    }

    // ---- the rules -----------------------------------------------------------------------------------------------

    fn clear_of_dead(&self, ctx: &Ctx<'_>, want: Mode, flags: Flags) -> bool {
        let recovery = flags.has(Flags::RECOVERY);
        if self.ghosts.iter().any(|g| !g.mode.compatible(want) && !(recovery && ctx.fenced(g.who))) {
            return false;
        }
        // A resource whose users mark RELEASE_AT_FENCE is free of what a fenced node may have held on it.
        let passes = recovery || flags.has(Flags::RELEASE_AT_FENCE);
        if self.masks.iter().any(|(p, set)| !set.all_compatible_with(want) && !(passes && ctx.fenced(*p))) {
            return false;
        }
        !(ctx.stop_all
            && want != Mode::NL
            && !ctx.gates.is_empty()
            && !(recovery && ctx.gates.values().all(|f| *f)))
    }

    /// No granted or converting lock other than one with granted mode `own` stands against `want`.
    fn clear_of_living(&self, want: Mode, own: Option<Mode>) -> bool {
        Mode::ALL.iter().all(|&m| {
            let mut n = self.held[m.index()];
            if mutant::on(Mutant::ConvertingIgnored) {
                n -= self.converting.iter().filter(|l| l.granted == Some(m)).count() as u32;
                return n == 0 || want.compatible(m) || (own == Some(m) && n <= 1);
            }
            if own == Some(m) {
                n -= 1;
            }
            n == 0 || want.compatible(m)
        })
    }

    /// Grant rules in their order (S-3) for one mode.
    fn grantable(&self, ctx: &Ctx<'_>, l: &MLock, want: Mode, when: When) -> bool {
        let conv = l.granted.is_some();
        if ctx.suspended {
            return false;
        }
        if l.flags.has(Flags::EXPEDITE) {
            return true;
        }
        if !self.clear_of_living(want, l.granted) || !self.clear_of_dead(ctx, want, l.flags) {
            return false;
        }
        match (when, conv) {
            (When::Now, true) => {
                !l.flags.has(Flags::QUECVT)
                    || mutant::on(Mutant::QuecvtIgnored)
                    || l.flags.has(Flags::NOORDER)
                    || self.converting.is_empty()
            }
            (When::Now, false) => {
                l.flags.has(Flags::NOORDER) || (self.converting.is_empty() && self.waiting.is_empty())
            }
            (When::Later(at), true) => l.flags.has(Flags::NOORDER) || at == 0,
            (When::Later(at), false) => {
                l.flags.has(Flags::NOORDER) || (self.converting.is_empty() && at == 0)
            }
        }
    }

    /// The mode in which `l` may be granted at this moment, alternates included.
    fn decide(&self, ctx: &Ctx<'_>, l: &MLock, when: When) -> Option<Mode> {
        let want = l.want.expect("only locks with an operation are decided");
        if self.grantable(ctx, l, want, when) {
            return Some(want);
        }
        for (flag, alt) in [(Flags::ALTPR, Mode::PR), (Flags::ALTCW, Mode::CW)] {
            if l.flags.has(flag) && alt != want && self.grantable(ctx, l, alt, when) {
                return Some(alt);
            }
        }
        None
    }

    // ---- effects -------------------------------------------------------------------------------------------------

    fn move_value(
        &mut self,
        l: &MLock,
        from: Option<Mode>,
        to: Mode,
        given: Option<&Lvb>,
    ) -> (Option<LvbCopy>, SbFlags) {
        let mut sb = SbFlags::default();
        if !l.flags.has(Flags::VALBLK) && !l.flags.has(Flags::IVVALBLK) {
            return (None, sb);
        }
        match lvb_move(from, to) {
            LvbMove::Read if l.flags.has(Flags::VALBLK) => {
                if self.lvb_invalid {
                    sb.0 |= SbFlags::VALNOTVALID;
                }
                let known = self.lvb_seq > 0 || self.lvb_invalid;
                (known.then_some(LvbCopy { bytes: self.lvb, seq: self.lvb_seq }), sb)
            }
            LvbMove::Write => {
                self.write_value(l.flags, given);
                if self.lvb_invalid {
                    sb.0 |= SbFlags::VALNOTVALID;
                }
                (None, sb)
            }
            _ => (None, sb),
        }
    }

    fn write_value(&mut self, flags: Flags, given: Option<&Lvb>) {
        if flags.has(Flags::IVVALBLK) {
            self.lvb_invalid = true;
        } else if flags.has(Flags::VALBLK)
            && let Some(bytes) = given
        {
            self.lvb = *bytes;
            self.lvb_seq += 1;
            self.lvb_invalid = false;
        }
    }

    /// Puts `l` on the granted queue in `mode` and answers.
    fn grant(&mut self, mut l: MLock, mode: Mode, given: Option<&Lvb>, out: &mut Vec<Out>) {
        let (lvb, mut sb) = self.move_value(&l, l.granted, mode, given);
        if l.want != Some(mode) {
            sb.0 |= SbFlags::ALTMODE;
        }
        if l.demoted {
            sb.0 |= SbFlags::DEMOTED;
        }
        if let Some(old) = l.granted {
            self.held[old.index()] -= 1;
        }
        if !mutant::on(Mutant::ConvertingIgnored) {
            assert!(
                self.clear_of_living(mode, None),
                "I-1: {:?} granted {mode:?} on {} beside {:?}",
                l.id,
                self.name,
                self.held
            );
        }
        self.held[mode.index()] += 1;
        l.granted = Some(mode);
        l.want = None;
        l.told = None;
        l.demoted = false;
        l.valblk |= l.flags.has(Flags::VALBLK);
        out.push(Out::Result {
            who: l.who,
            id: l.id,
            op: l.op,
            status: Status::Granted,
            mode: Some(mode),
            sb,
            lvb,
        });
        self.granted.push(l);
    }

    fn refuse(l: &MLock, status: Status, out: &mut Vec<Out>) {
        let sb = SbFlags(if l.demoted { SbFlags::DEMOTED } else { 0 });
        out.push(Out::Result { who: l.who, id: l.id, op: l.op, status, mode: l.granted, sb, lvb: None });
    }

    /// A new lock asks. `say_queued`: the requester has to learn who the master is even if it must wait.
    pub(crate) fn request(&mut self, ctx: &Ctx<'_>, l: MLock, say_queued: bool, out: &mut Vec<Out>) {
        if let Some(mode) = self.decide(ctx, &l, When::Now) {
            self.grant(l, mode, None, out);
            self.pass(ctx, out);
            return;
        }
        if l.flags.has(Flags::NOQUEUE) {
            if l.flags.has(Flags::NOQUEUEBAST) {
                self.tell_blockers_of(l.want.expect("request has a mode"), out);
            }
            Self::refuse(&l, Status::Again, out);
            self.forget_value_if_unused();
            return;
        }
        if say_queued {
            Self::refuse(&l, Status::Queued, out);
        }
        if l.flags.has(Flags::HEADQUE) {
            self.waiting.insert(0, l)
        } else {
            self.waiting.push(l)
        }
        self.tell_blockers(out);
    }

    /// Puts a granted lock of a rebuilt tree back, no questions asked.
    pub(crate) fn restore(&mut self, l: MLock) {
        let m = l.granted.expect("restored locks are granted");
        self.held[m.index()] += 1;
        self.granted.push(l);
    }

    pub(crate) fn fits(&self, mode: Mode) -> bool {
        self.clear_of_living(mode, None)
    }

    /// A conversion of a granted lock. False when there is no such lock on the granted queue.
    #[allow(clippy::too_many_arguments)] // the fields of one message
    pub(crate) fn convert(
        &mut self,
        ctx: &Ctx<'_>,
        who: Proc,
        id: LockId,
        op: u32,
        want: Mode,
        flags: Flags,
        given: Option<&Lvb>,
        order: u64,
        out: &mut Vec<Out>,
    ) -> bool {
        let Some(at) = self.granted.iter().position(|l| l.id == id && l.who == who && l.op < op) else {
            return false;
        };
        let mut l = self.granted.remove(at);
        let from = l.granted.expect("granted queue");
        l.op = op;
        l.flags = flags;
        l.order = order;
        if from.is_down_to(want) {
            // Strictly weaker: compatible with whatever the old mode was compatible with. No answer is expected.
            let _ = self.move_value(&l, Some(from), want, given);
            self.held[from.index()] -= 1;
            self.held[want.index()] += 1;
            l.granted = Some(want);
            l.told = None;
            l.valblk |= flags.has(Flags::VALBLK);
            self.granted.push(l);
            self.pass(ctx, out);
            return true;
        }
        l.want = Some(want);
        if from == want {
            self.grant(l, want, given, out);
            self.pass(ctx, out); // it may be in the way and has to be told again
            return true;
        }
        if let Some(mode) = self.decide(ctx, &l, When::Now) {
            self.grant(l, mode, given, out);
            // ALTPR or ALTCW may have stepped down from what others wait for.
            self.pass(ctx, out);
            return true;
        }
        if flags.has(Flags::NOQUEUE) {
            if flags.has(Flags::NOQUEUEBAST) {
                self.tell_blockers_of(want, out);
            }
            l.want = None;
            Self::refuse(&l, Status::Again, out);
            self.granted.push(l);
            return true;
        }
        if self.conversion_deadlock(&l, from, want, flags.has(Flags::HEADQUE)) {
            if flags.has(Flags::CONVDEADLK) {
                self.held[from.index()] -= 1;
                self.held[Mode::NL.index()] += 1;
                l.granted = Some(Mode::NL);
                l.demoted = true;
                self.pass_converting(ctx, out);
                if let Some(mode) = self.decide(ctx, &l, When::Now) {
                    self.grant(l, mode, given, out);
                    self.pass(ctx, out);
                    return true;
                }
            } else if flags.has(Flags::NODLCKWT) {
                out.push(Out::Bast { who, id, mode: want });
            } else {
                l.want = None;
                Self::refuse(&l, Status::Deadlock, out);
                self.granted.push(l);
                return true;
            }
        }
        if flags.has(Flags::HEADQUE) {
            self.converting.insert(0, l)
        } else {
            self.converting.push(l)
        }
        self.tell_blockers(out);
        true
    }

    /// Would the arriving conversion close a circle (1.9)?
    fn conversion_deadlock(&self, l: &MLock, from: Mode, want: Mode, head: bool) -> bool {
        debug_assert!(l.want == Some(want));
        self.converting.iter().any(|e| {
            let (eg, ew) = (e.granted.expect("converting"), e.want.expect("converting"));
            let i_block = !from.compatible(ew);
            let it_blocks = !eg.compatible(want);
            if head { i_block && it_blocks } else { i_block }
        })
    }

    /// Removes a lock in whatever state it is. False when it is not here.
    pub(crate) fn release(
        &mut self,
        ctx: &Ctx<'_>,
        who: Proc,
        id: LockId,
        flags: Flags,
        given: Option<&Lvb>,
        out: &mut Vec<Out>,
    ) -> bool {
        let Some(l) = self.take(who, id) else { return false };
        if l.granted.is_some_and(Mode::writes_lvb) {
            self.write_value(flags, given);
        }
        if mutant::on(Mutant::MaskForgotten) {
            self.masks.clear();
        }
        self.forget_value_if_unused();
        self.pass(ctx, out);
        true
    }

    fn take(&mut self, who: Proc, id: LockId) -> Option<MLock> {
        for q in [&mut self.granted, &mut self.converting, &mut self.waiting] {
            if let Some(at) = q.iter().position(|l| l.id == id && l.who == who) {
                let l = q.remove(at);
                if let Some(m) = l.granted {
                    self.held[m.index()] -= 1;
                }
                return Some(l);
            }
        }
        None
    }

    /// Takes back operation `op` if it still waits (S-20, S-21).
    pub(crate) fn cancel(&mut self, ctx: &Ctx<'_>, who: Proc, id: LockId, op: u32, out: &mut Vec<Out>) {
        let is = |l: &MLock| l.id == id && l.who == who && l.op == op;
        if let Some(at) = self.waiting.iter().position(is) {
            let l = self.waiting.remove(at);
            Self::refuse(&l, Status::Cancelled, out);
            self.forget_value_if_unused();
        } else if let Some(at) = self.converting.iter().position(is) {
            let mut l = self.converting.remove(at);
            l.want = None;
            Self::refuse(&l, Status::Cancelled, out);
            l.demoted = false;
            self.granted.push(l);
        } else {
            if mutant::on(Mutant::CancelAndGrant)
                && let Some(l) = self.granted.iter().find(|l| is(l))
            {
                Self::refuse(&l.clone(), Status::Cancelled, out);
            }
            return;
        }
        self.pass(ctx, out);
    }

    /// Grants what can be granted, then tells the holders that are still in the way (S-4).
    pub(crate) fn pass(&mut self, ctx: &Ctx<'_>, out: &mut Vec<Out>) {
        if !self.has_queue() {
            return;
        }
        self.pass_converting(ctx, out);
        let mut at = 0;
        while at < self.waiting.len() {
            if let Some(mode) = self.decide(ctx, &self.waiting[at], When::Later(at)) {
                let l = self.waiting.remove(at);
                self.grant(l, mode, None, out);
                at = 0;
            } else {
                at += 1;
            }
        }
        self.tell_blockers(out);
    }

    fn pass_converting(&mut self, ctx: &Ctx<'_>, out: &mut Vec<Out>) {
        let mut at = 0;
        while at < self.converting.len() {
            if let Some(mode) = self.decide(ctx, &self.converting[at], When::Later(at)) {
                let l = self.converting.remove(at);
                self.grant(l, mode, None, out);
                at = 0;
            } else {
                at += 1;
            }
        }
    }

    /// Blocking callbacks for everything that is queued (S-13 to S-15).
    fn tell_blockers(&mut self, out: &mut Vec<Out>) {
        let mut wanted: [Option<Mode>; 6] = [None; 6];
        let mut n = 0;
        for l in self.converting.iter().chain(&self.waiting) {
            let m = l.want.expect("queued");
            if !wanted[..n].contains(&Some(m)) {
                wanted[n] = Some(m);
                n += 1;
            }
        }
        for g in &mut self.granted {
            let mode = g.granted.expect("granted");
            let mut strongest: Option<Mode> = None;
            for m in wanted[..n].iter().flatten().copied() {
                let blocked = !m.compatible(mode);
                let better = strongest
                    .is_none_or(|s| if mutant::on(Mutant::BastNumeric) { m > s } else { m.covers(s) });
                if blocked && better {
                    strongest = Some(m);
                }
            }
            if mutant::on(Mutant::BastNumeric) {
                strongest = wanted[..n].iter().flatten().copied().max().filter(|m| !m.compatible(mode));
            }
            Self::tell(g, strongest, out);
        }
    }

    fn tell_blockers_of(&mut self, want: Mode, out: &mut Vec<Out>) {
        for g in self.granted.iter_mut().chain(&mut self.converting) {
            if !g.granted.expect("granted").compatible(want) {
                Self::tell(g, Some(want), out);
            }
        }
    }

    fn tell(g: &mut MLock, mode: Option<Mode>, out: &mut Vec<Out>) {
        if let Some(m) = mode
            && !g.flags.has(Flags::NOBAST)
            && !g.told.is_some_and(|t| t.covers(m))
        {
            g.told = Some(m);
            out.push(Out::Bast { who: g.who, id: g.id, mode: m });
        }
    }

    // ---- death ---------------------------------------------------------------------------------------------------

    /// `who` is no longer a member. Its waiting requests go; what it held stays as ghosts unless it left cleanly.
    /// True when anything of it was here.
    pub(crate) fn member_gone(&mut self, who: Proc, clean: bool) -> bool {
        let before = self.granted.len() + self.converting.len() + self.waiting.len();
        let mut spoilt = false;
        self.waiting.retain(|l| l.who != who);
        for q in [&mut self.granted, &mut self.converting] {
            q.retain(|l| {
                if l.who != who {
                    return true;
                }
                let mode = l.granted.expect("granted");
                // It may have written a value that will never arrive (S-10 c).
                spoilt |= !clean && l.valblk && mode.writes_lvb();
                self.held[mode.index()] -= 1;
                // NL conflicts with nothing: no ghost.
                if !clean && mode != Mode::NL && !mutant::on(Mutant::GhostsDropped) {
                    self.ghosts.push(Ghost { who, mode, at_fence: l.flags.has(Flags::RELEASE_AT_FENCE) });
                }
                false
            });
        }
        if spoilt && !mutant::on(Mutant::LvbUnflagged) {
            self.lvb_invalid = true;
        }
        self.forget_value_if_unused();
        before != self.granted.len() + self.converting.len() + self.waiting.len()
    }

    /// `who` is fenced (`recovered` false: only what is released at the fence goes) or recovered (everything goes).
    pub(crate) fn exorcise(&mut self, who: Proc, recovered: bool) {
        self.ghosts.retain(|g| g.who != who || !(recovered || g.at_fence));
        if recovered {
            self.masks.retain(|(p, _)| *p != who);
        }
        self.forget_value_if_unused();
    }

    /// Bounds what each of `dead` may hold here by what the survivors hold. Called once, at the rebuild.
    pub(crate) fn set_masks(&mut self, dead: &[Proc], survivors: impl Iterator<Item = Mode>) {
        let union = mutant::on(Mutant::MaskUnion);
        let set = survivors.fold(if union { ModeSet(1) } else { ModeSet::ALL }, |s, m| {
            if union { ModeSet(s.0 | m.compatible_set().0) } else { s.intersect(m.compatible_set()) }
        });
        // {NL} blocks nothing, so it is not kept.
        self.masks = if set.0 == 1 { Vec::new() } else { dead.iter().map(|&p| (p, set)).collect() };
    }

    /// All that must hold between calls.
    pub(crate) fn check(&self) {
        let mut held = [0; 6];
        let mut modes: Vec<Mode> = Vec::new();
        for l in self.granted.iter().chain(&self.converting) {
            let m = l.granted.expect("granted");
            held[m.index()] += 1;
            assert!(
                modes.iter().all(|o| o.compatible(m)),
                "I-1 at the master: {m:?} beside {modes:?} on {}",
                self.name
            );
            modes.push(m);
        }
        assert_eq!(held, self.held, "mode counts of {}", self.name);
    }
}
