//! Scenarios on one core with hand-made blocks of the others. Each runs on the real core, where it must hold, and on a
//! sabotaged one, where it must fail: a test that cannot fail proves nothing.

use super::super::*;
use crate::event::QdiskCommand as Cmd;

const I: u64 = 100;

fn ms(t: u64) -> Boottime {
    Boottime::from_millis(t)
}

fn proc(n: u16) -> Proc {
    Proc { node: NodeId(n), incarnation: Incarnation(10) }
}

fn name(seq: u64) -> ViewName {
    ViewName { seq, rep: NodeId(1), rep_incarnation: Incarnation(10) }
}

fn view(seq: u64, members: &[u16]) -> Input {
    let members = members.iter().map(|&n| proc(n)).collect();
    Input::Command(Cmd::View(Some(RingView { name: name(seq), members })))
}

/// Node `me` of three, k = 8, X = 150 ms; the others' slots are ours to write.
struct One {
    core: Qdisk,
    slots: Box<[Slot; MAX_NODES]>,
    out: Vec<Action>,
    block: EBlock,
    me: usize,
}

impl One {
    fn new(me: u16, mutant: u8) -> Self {
        let cfg = QdiskConfig {
            me: proc(me),
            cycle: Duration::from_millis(I),
            tko: 8,
            io_limit: Duration::from_millis(150),
            watchdog: Duration::ZERO,
            form: Duration::from_millis(60),
            node_votes: vec![(NodeId(1), 1), (NodeId(2), 1), (NodeId(3), 1)],
            device_votes: 2,
            needed: 3,
            shrinks: true,
            min_score: 1,
            reboot_on_score: false,
            allow_kill: true,
        };
        cfg.check().unwrap();
        let mut core = Qdisk::new(cfg);
        core.mutant = mutant;
        let slots = Box::new([const { Slot::Empty }; MAX_NODES]);
        Self { core, slots, out: Vec::new(), block: EBlock::default(), me: usize::from(me) - 1 }
    }

    fn step(&mut self, t: u64, input: Input) {
        let mut out = Vec::new();
        self.core.step(ms(t), input, &mut out);
        for a in &out {
            if let Action::Write { block, .. } = a {
                self.block = (**block).clone();
            }
        }
        self.out.extend(out);
    }

    fn wants_read(&self) -> bool {
        matches!(self.core.io, Io::Reading { .. })
    }

    /// One cycle from `t` on: write done after 5 ms, read done after `read` more. The slots are as they are at the end.
    fn cycle(&mut self, t: u64, read: u64) {
        self.step(t, Input::Tick);
        let mut at = t;
        if matches!(self.core.io, Io::Writing { .. }) {
            at += 5;
            self.slots[self.me] = Slot::Valid(Box::new(self.block.clone()));
            self.step(at, Input::WriteDone);
        }
        assert!(self.wants_read(), "{:?}", self.core.io);
        self.step(at + read, Input::ReadDone(self.slots.clone()));
    }

    fn peer(&mut self, n: u16, change: impl FnOnce(&mut EBlock)) {
        let slot = &mut self.slots[usize::from(n) - 1];
        let mut b = match slot {
            Slot::Valid(b) => (**b).clone(),
            _ => EBlock { node: NodeId(n), incarnation: Incarnation(10), score: 1, ..EBlock::default() },
        };
        b.seq += 1;
        change(&mut b);
        *slot = Slot::Valid(Box::new(b));
    }

    /// Runs through the watching phase and the first renewal; the next cycle may begin at the answer.
    fn up(&mut self, view_of: Input) -> u64 {
        let mut t = 1000;
        for _ in 0..6 {
            for n in 1..=3u16 {
                if usize::from(n) != self.me + 1 {
                    self.peer(n, |b| b.view = name(8));
                }
            }
            self.cycle(t, 5);
            t += I;
        }
        assert!(self.core.renewed_at.is_some());
        self.step(t - 50, view_of);
        self.out.clear();
        t
    }

    fn votes_until(&self) -> Option<Boottime> {
        self.out.iter().rev().find_map(|a| match a {
            Action::Event(QdiskEvent::Votes { until, .. }) => Some(*until),
            _ => None,
        })
    }
}

fn master_block(b: &mut EBlock, grant: u64) {
    b.term = 3;
    b.value = proc(1);
    b.flags.set(Flags::CHOSEN, true);
    b.view = name(8);
    b.lease = Lease { term: 3, grant, view: name(8), mask: 0b111 };
}

fn holds_and_fails_when_sabotaged(mutant: u8, scenario: fn(u8)) {
    scenario(0);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let sabotaged = std::panic::catch_unwind(|| scenario(mutant));
    std::panic::set_hook(hook);
    assert!(sabotaged.is_err(), "mutant {mutant} is not noticed");
}

#[test]
fn all_sabotages_are_noticed() {
    holds_and_fails_when_sabotaged(16, lease_counts_from_the_last_read_without_the_grant);
    holds_and_fails_when_sabotaged(17, a_slow_read_does_not_make_a_master_dead);
    holds_and_fails_when_sabotaged(27, nobody_is_evicted_when_the_storage_was_slow_for_all);
    holds_and_fails_when_sabotaged(102, a_new_view_gets_no_grant_while_the_old_one_may_be_counted);
    holds_and_fails_when_sabotaged(103, a_first_grant_waits_for_a_second_read);
}

fn lease_counts_from_the_last_read_without_the_grant(mutant: u8) {
    let mut n = One::new(2, mutant);
    let mut t = n.up(view(8, &[1, 2, 3]));
    let mut before = 0;
    for grant in 1..=5 {
        n.peer(1, |b| master_block(b, grant));
        n.peer(3, |_| {});
        n.out.clear();
        n.cycle(t, 5);
        if let Some(until) = n.votes_until() {
            let latest = ms(before + 5) + n.core.config().stop_limit();
            assert!(until <= latest, "counted until {until:?}, at most {latest:?}");
        } else {
            assert!(grant <= 1, "grant {grant} is not counted");
        }
        before = t;
        t += I;
    }
}

fn a_first_grant_waits_for_a_second_read(mutant: u8) {
    let mut n = One::new(2, mutant);
    let t = n.up(view(8, &[1, 2, 3]));
    n.peer(1, |b| master_block(b, 1));
    n.cycle(t, 5);
    assert_eq!(n.votes_until(), None, "one read may show a late grant and miss the next term");
    // The second read shows the next term: the grant was a late one.
    n.peer(1, |b| master_block(b, 1));
    n.peer(3, |b| b.term = 4);
    n.cycle(t + I, 5);
    n.cycle(t + 2 * I, 5);
    assert_eq!(n.votes_until(), None);
}

fn a_slow_read_does_not_make_a_master_dead(mutant: u8) {
    let mut n = One::new(2, mutant);
    let mut t = n.up(view(8, &[1, 2, 3]));
    n.peer(1, |b| master_block(b, 1));
    n.cycle(t, 5);
    let fresh = t + 10;
    let d = 9 * I;
    // Quiet cycles; the last read begins before D is over and ends after it.
    while t + I + 5 + 60 < fresh + d {
        t += I;
        n.peer(3, |_| {});
        n.cycle(t, 5);
    }
    t += I;
    n.peer(3, |_| {});
    assert!(t + 5 < fresh + d && fresh + d <= t + 95);
    n.cycle(t, 90);
    assert!(!n.core.election.balloting(), "a bid although the read began before D was over");
}

fn nobody_is_evicted_when_the_storage_was_slow_for_all(mutant: u8) {
    let (mut n, mut t) = master(mutant);
    // Everything stands still for longer than D, then comes back; the others' writes are a little later than mine.
    n.step(t, Input::Tick);
    t += 12 * I;
    n.slots[n.me] = Slot::Valid(Box::new(n.block.clone()));
    n.step(t, Input::WriteDone);
    n.step(t + 5, Input::ReadDone(n.slots.clone()));
    n.cycle(t + I, 5);
    n.cycle(t + 2 * I, 5);
    n.cycle(t + 3 * I, 5);
    assert_eq!(n.block.kill, [None; MAX_NODES], "evicted after a stall of the whole storage");
    n.peer(2, |_| {});
    n.peer(3, |_| {});
    n.cycle(t + 4 * I, 5);
    assert_eq!(n.block.kill, [None; MAX_NODES]);
}

fn a_new_view_gets_no_grant_while_the_old_one_may_be_counted(mutant: u8) {
    let (mut n, mut t) = master(mutant);
    let last = n.block.lease;
    assert_eq!((last.view, last.mask), (name(8), 0b111));
    let landed = t - I + 5;
    n.step(t - 50, Input::Command(Cmd::View(None)));
    n.step(t - 49, view(12, &[1, 2]));
    n.peer(2, |b| b.view = name(12));
    // Node 3 lives on in the old view and may count its lease until L after the landing.
    let over = landed + 8 * I;
    while t < over {
        n.peer(2, |_| {});
        n.peer(3, |_| {});
        n.cycle(t, 5);
        assert_eq!(n.block.lease, last, "a grant to the new view at {t}, not before {over}");
        t += I;
    }
    for _ in 0..2 {
        n.peer(2, |_| {});
        n.peer(3, |_| {});
        n.cycle(t + 5, 5);
        t += I;
    }
    assert_eq!(n.block.lease.view, name(12), "granted when the old lease is over");
}

/// Node 3 is proved dead while its block still looks alive, in a view that was larger than what is left: the new view gets its votes at once, and
/// the master does not give way to a dead rival.
#[test]
fn who_is_proved_dead_holds_nothing_up() {
    let (mut n, mut t) = master(0);
    n.peer(3, |b| b.voters = 3);
    n.cycle(t, 5);
    t += I;
    n.step(t - 50, Input::Command(Cmd::View(None)));
    n.step(t - 49, Input::Command(Cmd::Gone(proc(3))));
    n.step(t - 48, view(12, &[1, 2]));
    n.step(t - 48, Input::Command(Cmd::Quorate(false)));
    n.peer(2, |b| b.view = name(12));
    for cycle in 0..7 {
        n.peer(2, |_| {});
        n.cycle(t, 5);
        assert!(n.core.is_master(), "still the master in cycle {cycle}");
        assert_eq!(n.block.lease.view, name(12), "granted in cycle {cycle}");
        t += I;
    }
}

/// Node 1 as master of the first term, with the votes of view 8 granted to all three.
fn master(mutant: u8) -> (One, u64) {
    let mut n = One::new(1, mutant);
    let mut t = n.up(view(8, &[1, 2, 3]));
    for _ in 0..8 {
        n.peer(2, |_| {});
        n.peer(3, |_| {});
        n.cycle(t, 5);
        t += I;
    }
    assert!(n.core.is_master() && n.core.votes_held(ms(t)) == Some(name(8)));
    (n, t)
}

#[test]
fn a_kill_entry_for_my_incarnation_stops_me_and_an_old_one_does_not() {
    let mut n = One::new(2, 0);
    let t = n.up(view(8, &[1, 2, 3]));
    let kill = |inc| Some(Kill { incarnation: Incarnation(inc), reason: KillReason::Silent, view_seq: 8 });
    n.peer(1, |b| b.kill[1] = kill(9));
    n.cycle(t, 5);
    assert_eq!(n.core.phase, Phase::Running);
    n.peer(1, |b| b.kill[1] = kill(10));
    n.out.clear();
    n.cycle(t + I, 5);
    let stop = StopWhy::Evicted { by: NodeId(1), reason: KillReason::Silent };
    assert!(n.out.iter().any(|a| matches!(a, Action::Event(QdiskEvent::Stop(w)) if *w == stop)));
    assert!(
        !n.out.iter().any(|a| matches!(a, Action::Event(QdiskEvent::Renewed { .. }))),
        "renewed by that read"
    );
    // Nothing is written from then on, until the mounts are proven gone.
    n.out.clear();
    n.step(t + 3 * I, Input::Tick);
    assert!(!n.out.iter().any(|a| matches!(a, Action::Write { .. })));
    n.step(t + 4 * I, Input::Command(Cmd::StoppedKilled));
    assert!(n.block.flags.has(Flags::STOPPED_KILLED));
    n.step(t + 4 * I + 5, Input::WriteDone);
    assert!(matches!(n.out.last(), Some(Action::Event(QdiskEvent::Ended))));
}

#[test]
fn a_higher_incarnation_in_my_slot_silences_me_for_good() {
    let mut n = One::new(2, 0);
    let t = n.up(view(8, &[1, 2, 3]));
    n.step(t, Input::Tick);
    let other = EBlock { incarnation: Incarnation(11), ..n.block.clone() };
    n.step(t + 5, Input::WriteDone);
    n.slots[1] = Slot::Valid(Box::new(other));
    n.out.clear();
    n.step(t + 10, Input::ReadDone(n.slots.clone()));
    let stop = StopWhy::Duplicate { incarnation: Incarnation(11) };
    assert!(n.out.iter().any(|a| matches!(a, Action::Event(QdiskEvent::Stop(w)) if *w == stop)));
    n.out.clear();
    n.step(t + I, Input::Command(Cmd::Leave));
    assert!(n.out.iter().all(|a| !matches!(a, Action::Write { .. })), "I11: the slot is another's now");
}

#[test]
fn stop_limit_takes_votes_on_time_at_both_edges() {
    let (mut n, t) = master(0);
    // The next write hangs.
    n.step(t, Input::Tick);
    let renewed = n.core.renewed_at.unwrap();
    let edge = renewed + n.core.config().stop_limit();
    n.out.clear();
    n.core.step(Boottime(edge.0 - 1), Input::Tick, &mut n.out);
    assert!(n.core.votes_held(Boottime(edge.0 - 1)).is_some() && n.core.disk == DiskState::Slow);
    n.core.step(edge, Input::Tick, &mut n.out);
    assert!(n.core.votes_held(edge).is_none() && n.core.disk == DiskState::Lost);
}

/// A view is recorded with the next write, which comes at once, but not while a failed one may still land. What others have recorded
/// is told before the votes, and goes on in my block.
#[test]
fn a_view_is_recorded_at_once_and_shown_to_all() {
    let mut one = One::new(1, 0);
    let t = one.up(view(8, &[1, 2, 3]));
    one.cycle(t, 5);
    one.out.clear();
    one.step(t + 20, Input::Command(Cmd::Record(name(8))));
    assert_eq!(one.block.last_view, name(8), "the cycle is brought forward");
    one.slots[0] = Slot::Valid(Box::new(one.block.clone()));
    let recorded = |one: &One, view| {
        one.out.iter().any(|a| matches!(a, Action::Event(QdiskEvent::Recorded(v)) if *v == view))
    };
    assert!(!recorded(&one, name(8)));
    one.step(t + 25, Input::WriteDone);
    assert!(recorded(&one, name(8)));
    one.peer(2, |b| b.last_view = name(12));
    one.step(t + 30, Input::ReadDone(one.slots.clone()));
    let at = |one: &One, f: &dyn Fn(&QdiskEvent) -> bool| {
        one.out.iter().position(|a| matches!(a, Action::Event(e) if f(e)))
    };
    assert!(at(&one, &|e| *e == QdiskEvent::LastView(name(12))).is_some());
    // a write fails: nothing goes out before it has landed or never will
    let next = t + 20 + I;
    one.step(next, Input::Tick);
    assert_eq!(one.block.last_view, name(12));
    let seq = one.block.seq;
    one.step(next + 5, Input::WriteFailed);
    one.step(next + 6, Input::Command(Cmd::Record(name(16))));
    assert_eq!(one.block.seq, seq);
    one.step(next + 150, Input::Tick);
    assert_eq!((one.block.seq, one.block.last_view), (seq + 1, name(16)));
}
