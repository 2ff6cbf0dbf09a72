//! The quorum disk as a state machine: `step(now, input, &mut actions)`. No I/O, no clock, no randomness.
//!
//! ```text
//!   Watching (reads only, X and 4 cycles) ──► cycle:  write own block ─► done ─► read all ─► judge ─► rest ─┐
//!                                               ▲───────────────────────────────────────────────────────────┘
//! ```
//!
//! One I/O is open at a time, so a second write is never issued before the first is decided, and a read always
//! begins after the write before it has ended. After a failed write the next one waits for X: until then the
//! failed one may still land.
//!
//! Instants are those at which the core *processes* a thing, and each is used on its safe side: a submission is
//! stamped before it happens, an end is stamped after it happened.
//!
//! | question | measured from | to |
//! |---|---|---|
//! | is my permit good (S)? | submission of a write that a later read confirmed | now |
//! | is a slot dead (D)? | end of the read that last showed something new | start of a read that shows nothing new |
//! | does a grant count (L)? | start of the last read that did *not* yet show it | now |
//! | may I grant to another view? | end of the read that last showed a grant, or end of my write | now |
//!
//! A grant that does not extend a running lease counts only after *another* read, begun after the one that showed
//! it, has shown no higher term: a write of an old master may land arbitrarily late, and a read is not atomic over
//! the slots, so one read alone can show the late grant and miss the new term.
//!
//! Submodules: `election` (Disk Paxos, rank, resignation), `lease` (grants, counting), `watch` (slots, eviction,
//! kill entries, poison pills).

mod election;
mod lease;
mod watch;

use crate::MAX_NODES;
use crate::event::{
    DiskState, KillReason, LogLevel, PillFailure, PillProof, QdiskCommand, QdiskConfig, QdiskEvent,
    RHO_PER_MILLE, RingView, StopWhy, ViewName, VotesWhy,
};
use crate::ondisk::eblock::{low48, same_proc};
use crate::ondisk::{Ballot, EBlock, Flags, Kill, Lease, Message, NodeState, SeenSlot, Slot, StatusBlock};
use cairn_base::{Boottime, Incarnation, NodeId, Proc};
use std::collections::BTreeSet;
use std::time::Duration;

/// What happens to the core.
#[derive(Clone, Debug)]
pub enum Input {
    /// Time has passed.
    Tick,
    /// The write of the last [`Action::Write`] is on the disk.
    WriteDone,
    /// It failed, or its answer was lost: it may have landed, or land within X of its submission.
    WriteFailed,
    /// All slots, 1…16, as the read of the last [`Action::Read`] showed them.
    ReadDone(Box<[Slot; MAX_NODES]>),
    ReadFailed,
    Score {
        score: u16,
        max: u16,
    },
    Command(QdiskCommand),
}

/// What the driver must do.
#[derive(Clone, Debug)]
pub enum Action {
    /// Write these durably, as one batch, then answer `WriteDone` or `WriteFailed`. The driver stamps wall-clock time
    /// into the classic blocks and seals the E-block.
    Write {
        block: Box<EBlock>,
        status: StatusBlock,
        notices: Vec<NodeId>,
    },
    /// Read all slots, then answer `ReadDone` or `ReadFailed`.
    Read,
    Event(QdiskEvent),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Io {
    /// The next cycle begins at this instant.
    Rest(Boottime),
    Writing {
        submitted: Boottime,
    },
    Reading {
        started: Boottime,
        /// Submission of the write that ended before this read, when there was one in this cycle.
        after: Option<Boottime>,
        /// The second read of this cycle.
        again: bool,
    },
    /// Nothing is written any more.
    Over,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Reads only, until this instant and so many more reads.
    Watching {
        until: Option<Boottime>,
        reads: u32,
    },
    Running,
    /// Told to stop: writes nothing but the last word.
    Stopping,
}

/// What is known about a slot.
#[derive(Clone, Debug, Default)]
struct Peer {
    /// Highest (incarnation, seq) accepted.
    last: Option<Box<EBlock>>,
    /// End of the last read that showed something new.
    fresh_at: Boottime,
    /// Seen to change during my life, in the present incarnation.
    alive: bool,
    missed: bool,
    /// Reads in a row that showed nothing new.
    unchanged: u32,
    /// Start of the last read that showed a valid block.
    valid_read: Option<Boottime>,
    /// The same, before the read that brought the present grant: the base of its lease.
    base: Option<Boottime>,
    /// End of the read that brought the present grant.
    grant_at: Boottime,
    /// Content hash and end of the first of the reads that showed the same unreadable content.
    unreadable: Option<(u32, Boottime)>,
    /// The present read showed nothing usable, and has not done so for as long as D.
    hidden: bool,
    /// The same for a shorter time: a kill entry against me could be behind it.
    shaded: bool,
    /// End of the read that first showed the present view.
    view_since: Boottime,
    /// Evicted incarnation, and when I first saw or wrote the kill entry.
    evicted: Option<(Incarnation, Boottime)>,
    undead: bool,
}

impl Peer {
    fn proc(&self) -> Option<Proc> {
        self.last.as_ref().map(|b| b.proc())
    }

    fn stopped(&self) -> bool {
        self.last
            .as_ref()
            .is_some_and(|b| b.flags.has(Flags::STOPPED_CLEAN) || b.flags.has(Flags::STOPPED_KILLED))
    }
}

/// The view that the ring gave us.
#[derive(Clone, Debug)]
struct Mine {
    view: RingView,
    since: Boottime,
    /// The ring is OPERATIONAL in it now.
    operational: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum PillState {
    ToWrite,
    /// Written at; without a watchdog only the victim's own word can prove anything.
    Waiting {
        until: Option<Boottime>,
    },
}

#[derive(Clone, Copy, Debug)]
struct Pill {
    victim: Proc,
    state: PillState,
}

/// The state machine of one node on one quorum disk.
#[derive(Clone, Debug)]
pub struct Qdisk {
    cfg: QdiskConfig,
    phase: Phase,
    io: Io,
    /// Until then my last failed write may still land.
    settled: Boottime,
    /// Start of the present cycle; the next begins `cycle` later.
    cycle_start: Boottime,
    peers: [Peer; MAX_NODES],
    /// My next block's write number.
    seq: u64,
    renewed_at: Option<Boottime>,
    /// From the submission of the renewal before the last to the end of the last, for the rule that nobody is evicted
    /// while the storage is slow for all.
    renewal_gap: Duration,
    last_read_end: Option<Boottime>,
    disk: DiskState,
    own_changes: u32,
    /// My last life's block was unreadable; the highest term that I saw elsewhere then.
    lost_over: Option<u64>,
    mine: Option<Mine>,
    quorate: bool,
    dirty: bool,
    ring_seq: u64,
    /// The newest recorded view that I know of, and the one of mine that is to be reported when it has landed.
    last_view: ViewName,
    recording: Option<ViewName>,
    /// The same, in the block that is on its way.
    recording_sent: Option<ViewName>,
    highest_incarnation: Incarnation,
    score: u16,
    score_max: u16,
    upgraded: bool,
    lost: BTreeSet<Proc>,
    gone: BTreeSet<Proc>,
    election: election::Election,
    lease: lease::LeaseState,
    kills: [Option<Kill>; MAX_NODES],
    /// My kill entries as they stand in the block that is on its way.
    kills_sent: [Option<Kill>; MAX_NODES],
    /// My kill entries that are on the disk since.
    kills_written: [Option<Boottime>; MAX_NODES],
    notices: Vec<NodeId>,
    pills: Vec<Pill>,
    last_word: Option<Flags>,
    /// My slot belongs to somebody else: nothing may be written, not even the last word.
    mute: bool,
    cycle_times: CycleTimes,
    #[cfg(test)]
    pub(crate) mutant: u8,
}

/// For the classic block: last and average cycle.
#[derive(Clone, Copy, Debug, Default)]
struct CycleTimes {
    last: Duration,
    average: Duration,
}

type Actions = Vec<Action>;

fn idx(n: NodeId) -> Option<usize> {
    (1..=MAX_NODES).contains(&usize::from(n.0)).then(|| usize::from(n.0) - 1)
}

fn bit(n: NodeId) -> u64 {
    1 << (n.0 - 1)
}

/// d · (1 + ρ), rounded up.
fn with_rho(d: Duration) -> Duration {
    d + d * RHO_PER_MILLE / 1000 + Duration::from_nanos(1)
}

impl Qdisk {
    /// The configuration has passed [`QdiskConfig::check`].
    pub fn new(cfg: QdiskConfig) -> Self {
        assert!(idx(cfg.me.node).is_some(), "node id {} is not in 1…16", cfg.me.node);
        Self {
            phase: Phase::Watching { until: None, reads: 0 },
            io: Io::Rest(Boottime::ZERO),
            settled: Boottime::ZERO,
            cycle_start: Boottime::ZERO,
            peers: Default::default(),
            seq: 0,
            renewed_at: None,
            renewal_gap: Duration::ZERO,
            last_read_end: None,
            disk: DiskState::Ok,
            own_changes: 0,
            lost_over: None,
            mine: None,
            quorate: false,
            dirty: false,
            ring_seq: 0,
            last_view: ViewName::NONE,
            recording: None,
            recording_sent: None,
            highest_incarnation: cfg.me.incarnation,
            score: 1,
            score_max: 1,
            upgraded: cfg.min_score <= 1,
            lost: BTreeSet::new(),
            gone: BTreeSet::new(),
            election: election::Election::default(),
            lease: lease::LeaseState::default(),
            kills: [None; MAX_NODES],
            kills_sent: [None; MAX_NODES],
            kills_written: [None; MAX_NODES],
            notices: Vec::new(),
            pills: Vec::new(),
            last_word: None,
            mute: false,
            cycle_times: CycleTimes::default(),
            #[cfg(test)]
            mutant: 0,
            cfg,
        }
    }

    #[cfg(test)]
    fn mutant(&self, n: u8) -> bool {
        self.mutant == n
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self)]
    const fn mutant(&self, _: u8) -> bool {
        false
    }

    pub fn config(&self) -> &QdiskConfig {
        &self.cfg
    }

    /// The earliest instant at which `Tick` has something to do.
    pub fn next_deadline(&self) -> Option<Boottime> {
        let mut at: Vec<Boottime> = Vec::new();
        if let Io::Rest(t) = self.io {
            at.push(t);
        }
        if let Some(r) = self.renewed_at {
            let s = self.cfg.stop_limit();
            match self.disk {
                DiskState::Ok => at.push(r + s / 2),
                DiskState::Slow => at.push(r + s),
                DiskState::Lost => {}
            }
        }
        at.extend(self.lease.deadline());
        at.extend(self.pills.iter().filter_map(|p| match p.state {
            PillState::Waiting { until } => until,
            PillState::ToWrite => None,
        }));
        at.into_iter().min()
    }

    /// The one way in. Inputs that do not fit the open I/O are a driver's fault and panic.
    pub fn step(&mut self, now: Boottime, input: Input, out: &mut Actions) {
        match input {
            // Answers of an I/O that was open when the core ended.
            Input::WriteDone | Input::WriteFailed | Input::ReadDone(_) | Input::ReadFailed
                if self.io == Io::Over => {}
            Input::Tick => {}
            Input::WriteDone => self.write_done(now, out),
            Input::WriteFailed => self.write_failed(now, out),
            Input::ReadDone(slots) => self.read_done(now, &slots, out),
            Input::ReadFailed => {
                assert!(matches!(self.io, Io::Reading { .. }), "no read is open: {:?}", self.io);
                self.rest(now);
            }
            Input::Score { score, max } => self.set_score(score, max, out),
            Input::Command(c) => self.command(now, c, out),
        }
        self.deadlines(now, out);
        if let Io::Rest(at) = self.io
            && now >= at
        {
            self.begin_cycle(now, out);
        }
        #[cfg(test)]
        self.sabotage_io(now, out);
    }

    // ---- the cycle ----

    fn begin_cycle(&mut self, now: Boottime, out: &mut Actions) {
        self.cycle_start = now;
        match self.phase {
            Phase::Watching { .. } => self.begin_read(now, None, out),
            Phase::Stopping if self.last_word.is_none() => self.io = Io::Rest(Boottime::MAX),
            Phase::Running | Phase::Stopping => self.begin_write(now, out),
        }
    }

    fn begin_read(&mut self, now: Boottime, after: Option<Boottime>, out: &mut Actions) {
        self.io = Io::Reading { started: now, after, again: false };
        out.push(Action::Read);
    }

    fn begin_write(&mut self, now: Boottime, out: &mut Actions) {
        self.lease_before_write(now);
        self.seq += 1;
        let block = self.block(now);
        let status = self.status_block();
        self.election.written(self.seq);
        self.kills_sent = self.kills;
        self.recording_sent = self.recording;
        self.io = Io::Writing { submitted: now };
        out.push(Action::Write {
            block: Box::new(block),
            status,
            notices: std::mem::take(&mut self.notices),
        });
    }

    fn write_done(&mut self, now: Boottime, out: &mut Actions) {
        let Io::Writing { submitted } = self.io else { panic!("no write is open: {:?}", self.io) };
        self.lease_landed(now);
        if now.since(submitted) > self.cfg.io_limit {
            self.pills_again();
        }
        self.kills_landed(now, out);
        if let Some(view) = self.recording_sent.take() {
            self.recording = self.recording.filter(|v| *v > view);
            out.push(Action::Event(QdiskEvent::Recorded(view)));
        }
        if self.phase == Phase::Stopping && self.last_word.is_some() {
            self.io = Io::Over;
            out.push(Action::Event(QdiskEvent::Ended));
            return;
        }
        self.begin_read(now, Some(submitted), out);
    }

    fn write_failed(&mut self, now: Boottime, _out: &mut Actions) {
        let Io::Writing { submitted } = self.io else { panic!("no write is open: {:?}", self.io) };
        let settled = (submitted + self.cfg.io_limit).max(now);
        self.lease_landed(settled);
        self.pills_again();
        self.settled = settled;
        self.io = Io::Rest(settled.max(self.cycle_start + self.cfg.cycle));
    }

    fn rest(&mut self, now: Boottime) {
        self.io = Io::Rest((self.cycle_start + self.cfg.cycle).max(now));
    }

    fn read_done(&mut self, now: Boottime, slots: &[Slot; MAX_NODES], out: &mut Actions) {
        let Io::Reading { started, after, again } = self.io else { panic!("no read is open: {:?}", self.io) };
        if !again && self.torn_in_passing(slots) {
            // Somebody was just writing. Its block will be whole now, and waiting a cycle would cost lease time.
            self.io = Io::Reading { started: now, after, again: true };
            out.push(Action::Read);
            return;
        }
        self.rest(now);
        let took = now.since(self.cycle_start);
        self.cycle_times.last = took;
        self.cycle_times.average = (self.cycle_times.average * 59 + took) / 60;
        self.look(now, started, slots, out);
        let shown = self.peers.iter().filter_map(|p| p.last.as_ref()).map(|b| b.last_view).max();
        if let Some(view) = shown.filter(|v| *v > self.last_view) {
            self.last_view = view;
            out.push(Action::Event(QdiskEvent::LastView(view)));
        }
        self.last_read_end = Some(now);
        match self.phase {
            Phase::Watching { .. } => self.watched(now, slots, out),
            Phase::Running => {
                if self.check_own_slot(&slots[self.me_idx()], out) && !self.killed(out) {
                    let confirmed = matches!(&slots[self.me_idx()], Slot::Valid(b)
                        if b.incarnation == self.cfg.me.incarnation && b.seq == self.seq);
                    let clear = !self.others().any(|(i, _)| self.peers[i].shaded);
                    if let (Some(submitted), true) = (after, (confirmed && clear) || self.mutant(19)) {
                        self.renew(now, submitted, out);
                    }
                    self.judge(now, started, confirmed.then_some(after).flatten(), out);
                }
            }
            Phase::Stopping => {}
        }
    }

    /// The order in which a read is judged: term and election, the lease, then what I may do as master.
    fn judge(&mut self, now: Boottime, started: Boottime, mine: Option<Boottime>, out: &mut Actions) {
        self.stall_rule(now, started);
        self.elect(now, started, mine.is_some(), out);
        self.count_lease(now, started, mine, out);
        self.find_missed(started, out);
        self.arbitrate(now, out);
        self.evict(now, started, out);
    }

    fn renew(&mut self, now: Boottime, submitted: Boottime, out: &mut Actions) {
        match self.renewed_at {
            Some(before) if submitted <= before => return,
            Some(before) => self.renewal_gap = now.since(before),
            None => {
                out.push(Action::Event(QdiskEvent::Initialized));
                self.log(out, LogLevel::Info, "Initialization complete");
            }
        }
        self.renewed_at = Some(submitted);
        out.push(Action::Event(QdiskEvent::Renewed { at: submitted }));
    }

    /// How long half a block in a slot keeps me from renewing. Longer than any write lives that will still end, and
    /// short enough that a block torn by its owner's death does not cost the others their permit.
    fn shade_limit(&self) -> Duration {
        (self.cfg.stop_limit() / 2).max(self.cfg.io_limit)
    }

    /// First reads: nothing of an earlier life may still be on its way, and nobody may use my node id.
    fn watched(&mut self, now: Boottime, slots: &[Slot; MAX_NODES], out: &mut Actions) {
        let Phase::Watching { until, reads } = self.phase else { return };
        if let Some(n) = self.foreign_and_changing(slots) {
            return self.stop(StopWhy::WrongKey { slot: n }, out);
        }
        let me = &self.peers[self.me_idx()];
        let seen = me.last.as_ref().map_or(Incarnation(0), |b| b.incarnation.max(b.highest_incarnation));
        // One change may be a late write of my last life; two are another process with my id.
        if seen >= self.cfg.me.incarnation || self.own_changes > 2 {
            return self.stop(StopWhy::Duplicate { incarnation: seen }, out);
        }
        let until = until.unwrap_or(now + self.cfg.io_limit);
        self.phase = Phase::Watching { until: Some(until), reads: reads + 1 };
        if reads + 1 < 4 || now < until {
            return;
        }
        self.carry_over(slots, now);
        let ring_seq =
            self.peers.iter().filter_map(|p| p.last.as_ref()).map(|b| b.ring_seq).max().unwrap_or(0);
        self.ring_seq = self.ring_seq.max(ring_seq);
        out.push(Action::Event(QdiskEvent::History { ring_seq, incarnation: seen }));
        self.log(out, LogLevel::Info, &format!("Initial score {}/{}", self.score, self.score_max));
        self.phase = Phase::Running;
    }

    /// My slot after a cycle: false when another process writes it.
    fn check_own_slot(&mut self, slot: &Slot, out: &mut Actions) -> bool {
        match slot {
            Slot::Valid(b) if b.incarnation > self.cfg.me.incarnation => {
                let incarnation = b.incarnation;
                self.stop(StopWhy::Duplicate { incarnation }, out);
                false
            }
            _ => true,
        }
    }

    // ---- time ----

    fn deadlines(&mut self, now: Boottime, out: &mut Actions) {
        if let (Some(r), true) = (self.renewed_at, self.phase == Phase::Running) {
            let (age, s) = (now.since(r), self.cfg.stop_limit());
            let state = if age >= s {
                DiskState::Lost
            } else if age >= s / 2 {
                DiskState::Slow
            } else {
                DiskState::Ok
            };
            if state != self.disk {
                self.disk = state;
                out.push(Action::Event(QdiskEvent::Disk(state)));
                if state == DiskState::Lost {
                    self.drop_votes(VotesWhy::DiskLost, out);
                }
            }
        }
        self.lease_deadline(now, out);
        self.pill_deadlines(now, out);
    }

    // ---- commands ----

    fn command(&mut self, now: Boottime, command: QdiskCommand, out: &mut Actions) {
        match command {
            QdiskCommand::View(view) => self.set_view(now, view, out),
            QdiskCommand::Quorate(q) => self.quorate = q,
            QdiskCommand::Gone(p) => {
                self.gone.insert(p);
                while self.gone.len() > 4 * MAX_NODES {
                    self.gone.pop_first();
                }
            }
            QdiskCommand::Kill(victim) => self.order_pill(victim, out),
            QdiskCommand::Dirty(d) => self.dirty = d,
            QdiskCommand::RingSeq(s) => self.ring_seq = self.ring_seq.max(s),
            QdiskCommand::Record(view) => {
                self.last_view = self.last_view.max(view);
                self.recording = Some(view);
                if let (Phase::Running, Io::Rest(at)) = (self.phase, self.io) {
                    self.io = Io::Rest(at.min(self.settled.max(now)));
                }
            }
            QdiskCommand::StoppedKilled => self.finish(now, Flags::STOPPED_KILLED, out),
            QdiskCommand::Leave => self.finish(now, Flags::STOPPED_CLEAN, out),
            QdiskCommand::Abort => {
                self.drop_votes(VotesWhy::Stopping, out);
                self.phase = Phase::Stopping;
                self.io = Io::Over;
                out.push(Action::Event(QdiskEvent::Ended));
            }
        }
    }

    fn set_view(&mut self, now: Boottime, view: Option<RingView>, out: &mut Actions) {
        let Some(view) = view else {
            if let Some(m) = &mut self.mine {
                m.operational = false;
            }
            return;
        };
        if let Some(m) = &self.mine {
            let left = m.view.members.iter().filter(|p| !view.members.contains(p));
            self.lost.extend(left.copied());
        }
        self.lost.retain(|p| !view.members.contains(p));
        while self.lost.len() > 4 * MAX_NODES {
            self.lost.pop_first();
        }
        self.ring_seq = self.ring_seq.max(view.name.seq);
        self.quorate = false;
        self.mine = Some(Mine { view, since: now, operational: true });
        self.view_changed(out);
    }

    fn set_score(&mut self, score: u16, max: u16, out: &mut Actions) {
        (self.score, self.score_max) = (score, max);
        let (enough, min) = (score >= self.cfg.min_score, self.cfg.min_score);
        if enough == self.upgraded {
            return;
        }
        self.upgraded = enough;
        let (word, next) = if enough { ("sufficient", "upgrading") } else { ("insufficient", "downgrading") };
        let line = format!("Score {word} for master operation ({score}/{max}; required={min}); {next}");
        self.log(out, LogLevel::Notice, &line);
        if !enough {
            self.drop_votes(VotesWhy::Score, out);
            self.resign("score", out);
            if self.cfg.reboot_on_score && self.phase == Phase::Running {
                self.stop(StopWhy::Score, out);
            }
        }
    }

    // ---- the end ----

    fn stop(&mut self, why: StopWhy, out: &mut Actions) {
        if self.phase == Phase::Stopping {
            return;
        }
        self.drop_votes(VotesWhy::Stopping, out);
        self.phase = Phase::Stopping;
        self.election.abdicate();
        self.mute |= matches!(why, StopWhy::Duplicate { .. } | StopWhy::WrongKey { .. });
        out.push(Action::Event(QdiskEvent::Stop(why)));
    }

    fn finish(&mut self, now: Boottime, word: Flags, out: &mut Actions) {
        self.drop_votes(VotesWhy::Stopping, out);
        if self.io == Io::Over {
            out.push(Action::Event(QdiskEvent::Ended));
            return;
        }
        if self.mute || self.seq == 0 {
            // Nothing was ever written, or nothing may be.
            self.io = Io::Over;
            out.push(Action::Event(QdiskEvent::Ended));
            return;
        }
        self.resign("leaving", out);
        if word == Flags::STOPPED_CLEAN {
            self.log(out, LogLevel::Info, "Unregistering quorum device.");
        }
        self.phase = Phase::Stopping;
        self.last_word = Some(word);
        if let Io::Rest(_) = self.io {
            self.io = Io::Rest(now);
        }
    }

    // ---- helpers ----

    fn me_idx(&self) -> usize {
        usize::from(self.cfg.me.node.0) - 1
    }

    /// Configured nodes but me, with their places.
    fn others(&self) -> impl Iterator<Item = (usize, NodeId)> + use<> {
        let nodes =
            self.cfg.node_votes.iter().fold(0, |mask, &(n, _)| mask | bit(n)) & !bit(self.cfg.me.node);
        (0..MAX_NODES).filter(move |i| nodes >> i & 1 == 1).map(|i| (i, NodeId(i as u16 + 1)))
    }

    fn votes_of(&self, n: NodeId) -> u32 {
        self.cfg.node_votes.iter().find(|&&(m, _)| m == n).map_or(0, |&(_, v)| u32::from(v))
    }

    fn my_votes(&self) -> u32 {
        self.mine.as_ref().map_or(0, |m| m.view.members.iter().map(|p| self.votes_of(p.node)).sum())
    }

    fn my_view(&self) -> ViewName {
        self.mine.as_ref().map_or(ViewName::NONE, |m| m.view.name)
    }

    fn can_be_quorate(&self, voters: u32) -> bool {
        voters > 0
            && (self.cfg.shrinks || voters + u32::from(self.cfg.device_votes) >= u32::from(self.cfg.needed))
    }

    #[allow(clippy::unused_self)] // read as "this node says"
    fn log(&self, out: &mut Actions, level: LogLevel, line: &str) {
        out.push(Action::Event(QdiskEvent::Log { level, line: line.to_owned() }));
    }

    fn millis(d: Duration) -> u32 {
        u32::try_from(d.as_millis()).unwrap_or(u32::MAX)
    }

    fn block(&self, now: Boottime) -> EBlock {
        let mut flags = Flags::default();
        flags.set(Flags::QUORATE, self.quorate);
        flags.set(Flags::DIRTY, self.dirty);
        flags.set(Flags::SUSPENDED, self.disk == DiskState::Lost);
        flags.set(Flags::RESIGN, self.election.resigned);
        flags.set(Flags::CHOSEN, self.election.chosen);
        flags.set(Flags::LOST, self.lost_over.is_some());
        if let Some(word) = self.last_word {
            flags.set(word, true);
        }
        let mut seen = [SeenSlot::default(); MAX_NODES];
        for (s, p) in seen.iter_mut().zip(&self.peers) {
            if let Some(b) = &p.last {
                *s = SeenSlot { incarnation_low: b.incarnation.0 as u32, unchanged: p.unchanged, seq: b.seq };
            }
        }
        EBlock {
            node: self.cfg.me.node,
            incarnation: self.cfg.me.incarnation,
            seq: self.seq,
            written_at: now.0,
            view: self.my_view(),
            voters: self.my_votes(),
            score: if self.upgraded { self.score.max(1) } else { 0 },
            score_max: self.score_max,
            flags,
            stop_ms: Self::millis(self.cfg.stop_limit()),
            watchdog_ms: Self::millis(self.cfg.watchdog),
            settle_ms: Self::millis(self.cfg.io_limit),
            term: self.election.term,
            mbal: self.election.mbal,
            bal: self.election.bal,
            value: self.election.value,
            lease: self.lease.granted,
            ring_seq: self.ring_seq,
            highest_incarnation: self.highest_incarnation,
            kill: self.kills,
            seen,
            last_view: self.last_view,
        }
    }

    /// Nodes whose slots live, me included.
    pub fn visible(&self) -> u64 {
        self.others()
            .filter(|&(i, _)| self.peers[i].alive && !self.peers[i].missed && !self.peers[i].stopped())
            .fold(bit(self.cfg.me.node), |mask, (_, n)| mask | bit(n))
    }

    fn status_block(&self) -> StatusBlock {
        let me = u32::from(self.cfg.me.node.0);
        let state = match (self.phase, self.election.is_master(), self.upgraded) {
            (Phase::Stopping, ..) => NodeState::None,
            (_, true, _) => NodeState::Master,
            (_, _, true) if self.renewed_at.is_some() => NodeState::Running,
            _ => NodeState::Initializing,
        };
        let message = if self.election.balloting() {
            Message { kind: 1, seq: self.seq as u16, arg: me }
        } else if self.election.decided().is_some() && !self.election.is_master() {
            Message { kind: 2, seq: self.seq as u16, arg: u32::from(self.election.value.node.0) }
        } else {
            Message::default()
        };
        let parts = |d: Duration| (d.as_secs() as u32, d.subsec_micros());
        StatusBlock {
            update_node: me,
            timestamp: 0,
            node: me,
            state,
            flags: 0,
            score: 0,
            score_max: 0,
            average: parts(self.cycle_times.average),
            last: parts(self.cycle_times.last),
            incarnation: self.cfg.me.incarnation.0,
            message,
            mask: self.visible(),
            master_mask: if self.election.is_master() { self.lease.granted.mask } else { 0 },
        }
    }

    /// The decided master of the present term (with its whole incarnation where its block is known).
    pub fn master(&self) -> Option<Proc> {
        let v = self.election.decided()?;
        let known = idx(v.node).and_then(|i| self.peers[i].proc()).into_iter().chain([self.cfg.me]);
        Some(known.into_iter().find(|&p| same_proc(v, p)).unwrap_or(v))
    }

    pub fn term(&self) -> u64 {
        self.election.term
    }

    pub fn is_master(&self) -> bool {
        self.election.is_master()
    }

    /// The lease mask that the master gives now (mine if I am the master).
    pub fn quorate_set(&self) -> u64 {
        if self.election.is_master() {
            return self.lease.granted.mask;
        }
        let master = self.master().and_then(|p| idx(p.node));
        master.and_then(|i| self.peers[i].last.as_ref()).map_or(0, |b| b.lease.mask)
    }

    pub fn score(&self) -> (u16, u16) {
        (self.score, self.score_max)
    }

    pub fn state_name(&self) -> &'static str {
        self.status_block().state.name()
    }

    #[cfg(test)]
    fn sabotage_io(&mut self, now: Boottime, out: &mut Actions) {
        let late = now >= self.cycle_start + self.cfg.cycle;
        if let (Io::Writing { submitted }, true) = (self.io, late) {
            if self.mutant(18) {
                self.begin_cycle(now, out);
            } else if self.mutant(19) {
                self.begin_read(now, Some(submitted), out);
            }
        }
    }
}

#[cfg(test)]
mod tests;
