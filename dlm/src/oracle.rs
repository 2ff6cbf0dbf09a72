//! The reference: one resource, one node, lists only, written straight from the rules; and the state machine compared
//! with it, answer by answer, over random histories. Tables of modes, conversions and flags are spelled out here.

use crate::core::{Action, Completion, Config, Core, CoreView, Event};
use crate::name::ResName;
use crate::types::{Flags, LockError, LockId, Lvb, LvbMove, Mode, SbFlags, Status, lvb_move, quecvt_legal};
use cairn_base::{Boottime, Incarnation, NodeId, Proc, Rng, ViewId};

/// Granted row × requested column, as printed in every manual.
const TABLE: [[u8; 6]; 6] = [
    [1, 1, 1, 1, 1, 1], // NL
    [1, 1, 1, 1, 1, 0], // CR
    [1, 1, 1, 0, 0, 0], // CW
    [1, 1, 0, 1, 0, 0], // PR
    [1, 1, 0, 0, 0, 0], // PW
    [1, 0, 0, 0, 0, 0], // EX
];

fn fits(a: Mode, b: Mode) -> bool {
    TABLE[a as usize][b as usize] == 1
}

#[derive(Clone)]
struct OLock {
    user: u64,
    granted: Option<Mode>,
    want: Option<Mode>,
    flags: Flags,
    demoted: bool,
}

type Answer = (u64, Status, Option<Mode>, u8, Option<Lvb>);

/// Every lock is in `locks`; the queues list users.
#[derive(Default)]
struct Oracle {
    locks: Vec<OLock>,
    converting: Vec<u64>,
    waiting: Vec<u64>,
    value: Option<Lvb>,
    invalid: bool,
    answers: Vec<Answer>,
}

impl Oracle {
    fn at(&mut self, user: u64) -> &mut OLock {
        self.locks.iter_mut().find(|l| l.user == user).unwrap()
    }

    fn may(&self, l: &OLock, want: Mode, first_try: bool) -> bool {
        let f = |x: Flags| l.flags.has(x);
        if f(Flags::EXPEDITE) {
            return true;
        }
        for o in self.locks.iter().filter(|o| o.user != l.user) {
            if o.granted.is_some_and(|g| !fits(g, want)) {
                return false;
            }
        }
        let is_conv = l.granted.is_some();
        if first_try && is_conv && !f(Flags::QUECVT) {
            return true;
        }
        if f(Flags::NOORDER) {
            return true;
        }
        match (first_try, is_conv) {
            (true, true) => self.converting.is_empty(),
            (true, false) => self.converting.is_empty() && self.waiting.is_empty(),
            (false, true) => self.converting.first() == Some(&l.user),
            (false, false) => self.converting.is_empty() && self.waiting.first() == Some(&l.user),
        }
    }

    fn mode_for(&self, l: &OLock, first_try: bool) -> Option<Mode> {
        let want = l.want.unwrap();
        let mut tries = vec![want];
        if l.flags.has(Flags::ALTPR) {
            tries.push(Mode::PR);
        }
        if l.flags.has(Flags::ALTCW) {
            tries.push(Mode::CW);
        }
        tries.into_iter().find(|m| self.may(l, *m, first_try))
    }

    fn write(&mut self, flags: Flags, lvb: Option<Lvb>) {
        if flags.has(Flags::IVVALBLK) {
            self.invalid = true;
        } else if flags.has(Flags::VALBLK) && lvb.is_some() {
            self.value = lvb;
            self.invalid = false;
        }
    }

    fn grant(&mut self, user: u64, mode: Mode, lvb: Option<Lvb>) {
        self.converting.retain(|u| *u != user);
        self.waiting.retain(|u| *u != user);
        let l = self.at(user).clone();
        let mut sb = 0;
        let mut read = None;
        match lvb_move(l.granted, mode) {
            LvbMove::Read if l.flags.has(Flags::VALBLK) => {
                if self.invalid {
                    sb |= SbFlags::VALNOTVALID;
                }
                read = self.value.or(self.invalid.then_some([0; 32]));
            }
            LvbMove::Write => {
                self.write(l.flags, lvb);
                if self.invalid && (l.flags.has(Flags::VALBLK) || l.flags.has(Flags::IVVALBLK)) {
                    sb |= SbFlags::VALNOTVALID;
                }
            }
            _ => {}
        }
        if l.want != Some(mode) {
            sb |= SbFlags::ALTMODE;
        }
        if l.demoted {
            sb |= SbFlags::DEMOTED;
        }
        let l = self.at(user);
        l.granted = Some(mode);
        l.want = None;
        l.demoted = false;
        self.answers.push((user, Status::Granted, Some(mode), sb, read));
    }

    fn refuse(&mut self, user: u64, status: Status) {
        let l = self.at(user).clone();
        let sb = if l.demoted { SbFlags::DEMOTED } else { 0 };
        self.answers.push((user, status, l.granted, sb, None));
        self.at(user).want = None;
        self.at(user).demoted = false;
        if l.granted.is_none() {
            self.locks.retain(|x| x.user != user);
            self.forget();
        }
    }

    fn forget(&mut self) {
        if self.locks.is_empty() {
            self.value = None;
            self.invalid = false;
        }
    }

    fn later(&mut self) {
        self.later_in(true);
        self.later_in(false);
    }

    fn later_in(&mut self, conv: bool) {
        'again: loop {
            let q = if conv { self.converting.clone() } else { self.waiting.clone() };
            for user in q {
                let l = self.at(user).clone();
                if let Some(m) = self.mode_for(&l, false) {
                    self.grant(user, m, None);
                    continue 'again;
                }
            }
            return;
        }
    }

    fn request(&mut self, user: u64, mode: Mode, flags: Flags) {
        let l = OLock { user, granted: None, want: Some(mode), flags, demoted: false };
        self.locks.push(l.clone());
        if let Some(m) = self.mode_for(&l, true) {
            self.grant(user, m, None);
            self.later();
        } else if flags.has(Flags::NOQUEUE) {
            self.refuse(user, Status::Again);
        } else if flags.has(Flags::HEADQUE) {
            self.waiting.insert(0, user);
        } else {
            self.waiting.push(user);
        }
    }

    fn convert(&mut self, user: u64, mode: Mode, flags: Flags, lvb: Option<Lvb>) {
        let l = self.at(user);
        l.flags = flags;
        l.want = Some(mode);
        let from = l.granted.unwrap();
        if from.is_down_to(mode) {
            let writes = lvb_move(Some(from), mode) == LvbMove::Write;
            self.answers.push((user, Status::Granted, Some(mode), 0, None));
            let l = self.at(user);
            l.granted = Some(mode);
            l.want = None;
            if writes {
                self.write(flags, lvb);
            }
            self.later();
            return;
        }
        let l = l.clone();
        if from == mode {
            self.grant(user, mode, lvb);
            self.later();
        } else if let Some(m) = self.mode_for(&l, true) {
            self.grant(user, m, lvb);
            self.later();
        } else if flags.has(Flags::NOQUEUE) {
            self.refuse(user, Status::Again);
        } else {
            let head = flags.has(Flags::HEADQUE);
            let circle = self.converting.iter().any(|u| {
                let e = self.locks.iter().find(|l| l.user == *u).unwrap();
                !fits(from, e.want.unwrap()) && (!head || !fits(e.granted.unwrap(), mode))
            });
            if circle && !flags.has(Flags::CONVDEADLK) && !flags.has(Flags::NODLCKWT) {
                return self.refuse(user, Status::Deadlock);
            }
            if circle && flags.has(Flags::CONVDEADLK) {
                let l = self.at(user);
                l.granted = Some(Mode::NL);
                l.demoted = true;
                self.later_in(true);
                let l = self.at(user).clone();
                if let Some(m) = self.mode_for(&l, true) {
                    self.grant(user, m, lvb);
                    return self.later();
                }
            }
            if head { self.converting.insert(0, user) } else { self.converting.push(user) }
        }
    }

    fn unlock(&mut self, user: u64, flags: Flags, lvb: Option<Lvb>) {
        let l = self.at(user).clone();
        self.answers.push((user, Status::Unlocked, None, 0, None));
        self.converting.retain(|u| *u != user);
        self.waiting.retain(|u| *u != user);
        self.locks.retain(|x| x.user != user);
        if l.granted.is_some_and(|g| matches!(g, Mode::PW | Mode::EX)) {
            self.write(flags, lvb);
        }
        self.forget();
        self.later();
    }

    fn cancel(&mut self, user: u64) {
        if self.at(user).want.is_some() {
            self.converting.retain(|u| *u != user);
            self.waiting.retain(|u| *u != user);
            self.refuse(user, Status::Cancelled);
            self.later();
        }
    }
}

fn alone() -> Core {
    let me = Proc { node: NodeId(1), incarnation: Incarnation(1) };
    let mut core = Core::new(Config::new(me));
    let v = CoreView { id: ViewId(1), members: vec![me], left_clean: Vec::new() };
    core.step(Boottime(1), Event::View(v), &mut Vec::new()).unwrap();
    core
}

fn completions(out: &mut Vec<Action>) -> Vec<Completion> {
    out.drain(..).filter_map(|a| if let Action::Complete(c) = a { Some(c) } else { None }).collect()
}

#[test]
fn random_histories_give_the_answers_of_the_reference() {
    let name = ResName::path(&[b"tree", b"leaf"]).unwrap();
    for seed in 0..3000 {
        let mut rng = Rng::new(seed);
        let (mut core, mut oracle) = (alone(), Oracle::default());
        let mut ids: Vec<(u64, LockId)> = Vec::new();
        let mut out = Vec::new();
        let mut value = 0_u8;
        for step in 1..80_u64 {
            let now = Boottime(step);
            value = value.wrapping_add(1);
            let lvb = [value; 32];
            let mode = Mode::ALL[rng.below(6) as usize];
            let mut flags = Flags::NONE;
            let mut maybe = |f: Flags, n: u64| {
                if rng.chance(1, n) {
                    flags |= f;
                }
            };
            maybe(Flags::VALBLK, 2);
            maybe(Flags::NOQUEUE, 5);
            maybe(Flags::QUECVT, 3);
            maybe(Flags::CONVDEADLK, 8);
            maybe(Flags::NODLCKWT, 8);
            maybe(Flags::HEADQUE, 8);
            maybe(Flags::NOORDER, 12);
            maybe(Flags::ALTPR, 10);
            maybe(Flags::ALTCW, 10);
            maybe(Flags::IVVALBLK, 10);
            maybe(Flags::EXPEDITE, 14);
            let what = rng.below(5);
            let target = if ids.is_empty() { None } else { Some(ids[rng.below(ids.len() as u64) as usize]) };
            match (what, target) {
                (0 | 1, _) if ids.len() < 7 => {
                    if let Ok(id) = core.request(now, &name, mode, flags, step, None, &mut out) {
                        ids.push((step, id));
                        oracle.request(step, mode, flags);
                    }
                }
                (2 | 3, Some((user, id))) => {
                    let busy = oracle.at(user).want.is_some();
                    match core.convert(now, id, mode, flags, Some(&lvb), None, &mut out) {
                        Ok(()) => oracle.convert(user, mode, flags, Some(lvb)),
                        Err(LockError::Busy) => assert!(busy),
                        Err(LockError::Invalid(_)) => {}
                        Err(e) => panic!("seed {seed}: {e}"),
                    }
                }
                (4, Some((user, id))) => {
                    if rng.chance(1, 2) {
                        core.cancel(now, id, &mut out).unwrap();
                        oracle.cancel(user);
                    } else {
                        let f = Flags(flags.0 & (Flags::VALBLK.0 | Flags::IVVALBLK.0)) | Flags::FORCEUNLOCK;
                        core.unlock(now, id, f, Some(&lvb), &mut out).unwrap();
                        oracle.unlock(user, f, Some(lvb));
                        ids.retain(|(u, _)| *u != user);
                    }
                }
                _ => {}
            }
            core.check();
            let got: Vec<Answer> =
                completions(&mut out).iter().map(|c| (c.user, c.status, c.mode, c.sb.0, c.lvb)).collect();
            let want = std::mem::take(&mut oracle.answers);
            assert_eq!(got, want, "seed {seed} step {step}");
            ids.retain(|(u, _)| oracle.locks.iter().any(|l| l.user == *u));
        }
    }
}

#[test]
fn compatibility_is_the_table_and_symmetric() {
    for a in Mode::ALL {
        for b in Mode::ALL {
            assert_eq!(a.compatible(b), fits(a, b), "{a:?} {b:?}");
            assert_eq!(a.compatible(b), b.compatible(a));
        }
    }
}

/// Kind and value movement of all 36 conversions and of new requests, spelled out.
#[test]
fn conversions_move_the_value_as_the_table_says() {
    let rows = [
        (None, "Ur Ur Ur Ur Ur Ur"),
        (Some(Mode::NL), "=r Ur Ur Ur Ur Ur"),
        (Some(Mode::CR), "D. =r Ur Ur Ur Ur"),
        (Some(Mode::CW), "D. D. =r Mr Ur Ur"),
        (Some(Mode::PR), "D. D. M. =r Ur Ur"),
        (Some(Mode::PW), "Dw Dw Dw Dw =w Ur"),
        (Some(Mode::EX), "Dw Dw Dw Dw Dw =w"),
    ];
    for (from, row) in rows {
        for (to, cell) in Mode::ALL.into_iter().zip(row.split(' ')) {
            let kind = match from {
                None => 'U',
                Some(f) if f == to => '=',
                Some(f) if f.is_down_to(to) => 'D',
                Some(f) if f.is_middle_to(to) => 'M',
                Some(_) => 'U',
            };
            let moved = match lvb_move(from, to) {
                LvbMove::Read => 'r',
                LvbMove::Write => 'w',
                LvbMove::None => '.',
            };
            assert_eq!(format!("{kind}{moved}"), cell, "{from:?} to {to:?}");
            if let Some(f) = from {
                assert_eq!(quecvt_legal(f, to), kind == 'U' || kind == 'M', "QUECVT {f:?} to {to:?}");
            }
        }
    }
}

#[test]
fn illegal_flags_are_refused_without_a_completion() {
    let (mut core, mut out) = (alone(), Vec::new());
    let name = ResName::root_of(b"r").unwrap();
    let new = [
        Flags::QUECVT,
        Flags::CONVDEADLK,
        Flags::NODLCKWT,
        Flags::IVVALBLK,
        Flags::EXPEDITE,
        Flags::NOQUEUEBAST,
        Flags::FORCEUNLOCK,
        Flags(0x4),
        Flags(0x8000_0000),
    ];
    for f in new {
        let r = core.request(Boottime(1), &name, Mode::PR, f, 0, None, &mut out);
        assert!(matches!(r, Err(LockError::Invalid(_))), "{f:?}");
    }
    assert!(out.is_empty());
    let id = core.request(Boottime(1), &name, Mode::PR, Flags::NONE, 0, None, &mut out).unwrap();
    out.clear();
    for f in [Flags::NOQUEUE | Flags::CONVDEADLK, Flags::EXPEDITE] {
        let r = core.convert(Boottime(1), id, Mode::EX, f, None, None, &mut out);
        assert!(matches!(r, Err(LockError::Invalid(_))), "{f:?}");
    }
    let r = core.convert(Boottime(1), id, Mode::NL, Flags::QUECVT, None, None, &mut out);
    assert!(matches!(r, Err(LockError::Invalid(_))));
    assert!(out.is_empty());
}

#[test]
fn a_request_with_a_time_limit_ends_with_it() {
    let (mut core, mut out) = (alone(), Vec::new());
    let name = ResName::root_of(b"r").unwrap();
    let second = std::time::Duration::from_secs(1);
    core.request(Boottime(0), &name, Mode::EX, Flags::NONE, 1, None, &mut out).unwrap();
    core.request(Boottime(0), &name, Mode::EX, Flags::NONE, 2, Some(second), &mut out).unwrap();
    out.clear();
    let at = core.next_deadline().unwrap();
    core.step(Boottime(at.0 - 1), Event::Tick, &mut out).unwrap();
    assert!(out.is_empty());
    core.step(at, Event::Tick, &mut out).unwrap();
    let c = completions(&mut out);
    assert_eq!((c.len(), c[0].user, c[0].status, c[0].mode), (1, 2, Status::TimedOut, None));
}

/// What may be granted beside a dead master's unknown lock, by the strongest mode that a survivor presents (R-4).
#[test]
fn masks_allow_what_the_survivors_own_locks_would_allow() {
    use crate::resource::Resource;
    let dead = Proc { node: NodeId(9), incarnation: Incarnation(1) };
    let rows: [(&[Mode], &[Mode]); 7] = [
        (&[], &[Mode::NL]),
        (&[Mode::NL], &[Mode::NL]),
        (&[Mode::CR], &[Mode::NL, Mode::CR]),
        (&[Mode::CW], &[Mode::NL, Mode::CR, Mode::CW]),
        (&[Mode::PR, Mode::CR], &[Mode::NL, Mode::CR, Mode::PR]),
        (&[Mode::PW], &[Mode::NL, Mode::CR]),
        (&[Mode::EX], &[Mode::NL]),
    ];
    for (survivors, allowed) in rows {
        let mut r = Resource::new(ResName::root_of(b"r").unwrap(), &[]);
        r.set_masks(&[dead], survivors.iter().copied());
        for m in Mode::ALL {
            let masked = r.masks.iter().any(|(_, set)| !set.all_compatible_with(m));
            let beside_survivors = survivors.iter().all(|s| s.compatible(m));
            assert_eq!(!masked && beside_survivors, allowed.contains(&m), "{survivors:?}: {m:?}");
        }
    }
}
