//! A mount process: its place among the mounts (`gfs::cluster::members`), its member of the lock space (`dlm::Core`), its journal, and
//! users who increase counters under EX and read them under PR. The steps of mounting are those of `gfs::volume`.

mod replay;
mod steps;
mod users;

use crate::daemon::GROUP;
use crate::lun::Op;
use crate::world::{COUNTERS, Call, Ev, MS, Mutant, Tag, World};
use cairn_base::{Boottime, Proc, ViewId};
use dlm::{Completion, CoreView, Flags, LockId, Lvb, Mode, ResName, SbFlags, Status};
use gfs::cluster::members::{Action, Dead, Members, Payload, encode};
use membership::ipc::{ClusterEvent, LeaveReason, Scope};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

// names of the lock space: the counters, those of a mount, the journals
pub(crate) const MOUNT: usize = COUNTERS;
const CONTROL: usize = COUNTERS + 1;
const MOUNTED: usize = COUNTERS + 2;
const LIVE: usize = COUNTERS + 3;
pub(crate) const JOURNAL: usize = COUNTERS + 4;

/// Between two attempts of whatever was busy.
const RETRY: u64 = 200 * MS;
/// A mount that has not come so far gives up; its script begins again.
const MOUNT_LIMIT: u64 = 60_000 * MS;

pub(crate) fn name_of(name: usize) -> ResName {
    ResName::root_of(format!("{name:24}").as_bytes()).expect("24 bytes are a legal name")
}

/// As the file system asks: these names do not wait for a replay.
pub(crate) const fn until_fence(name: usize) -> bool {
    name >= MOUNT
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MountEnd {
    Killed,
    Clean,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Connecting,
    Joining,
    Settling,
    MountLock,
    Live,
    Control,
    MountedEx,
    MountedSh,
    Backoff,
    TryJournal(usize),
    LookJournal(usize),
    Replaying,
    FirstDone,
    Mounted,
    /// Everything is given up, one after the other.
    Unmounting,
    Draining(u64),
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Glock {
    pub(crate) id: Option<LockId>,
    pub(crate) held: Option<Mode>,
    pub(crate) pending: Option<Mode>,
    pub(crate) asked: u64,
    recovery: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Busy {
    #[default]
    No,
    Lock,
    Read,
    Log(u64),
    InPlace,
    Revoke,
}

#[derive(Clone, Debug, Default)]
struct Counter {
    cached: Option<u64>,
    /// The journal knows more than the place.
    dirty: bool,
    busy: Busy,
    demote: Option<Mode>,
    job: Option<Job>,
    /// Just granted: the job comes first, or two nodes could hand the lock to and fro for ever.
    owed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Job {
    Increase,
    Look,
}

#[derive(Clone, Debug)]
struct Replay {
    /// `None`: the first mounter's.
    dead: Option<Dead>,
    journals: Vec<usize>,
    at: usize,
    all: bool,
    entries: Vec<(usize, u64)>,
    written: usize,
    /// The clean header is there.
    cleared: bool,
}

pub(crate) struct Mount {
    pub(crate) who: Proc,
    pub(crate) life: Proc,
    pub(crate) client: u32,
    pub(crate) dead: bool,
    over: bool,
    pub(crate) members: Members,
    pub(crate) core: dlm::Core,
    links: BTreeSet<Proc>,
    /// Events of the daemon on their way here.
    untold: u32,
    pub(crate) links_gone: BTreeSet<Proc>,
    step: Step,
    since: u64,
    first: bool,
    pub(crate) jid: Option<usize>,
    pub(crate) glocks: BTreeMap<usize, Glock>,
    counters: Vec<Counter>,
    replay: Option<Replay>,
    to_recover: VecDeque<Dead>,
    retry_at: u64,
    frozen: Vec<(Op, Tag)>,
    timer_at: u64,
    tick_at: u64,
    unmounting: bool,
    revoked: bool,
    pub(crate) increased: u64,
    pub(crate) looked: u64,
}

impl Mount {
    pub(crate) fn new(who: Proc, life: Proc, client: u32) -> Self {
        Self {
            who,
            life,
            client,
            dead: false,
            over: false,
            members: Members::new(who),
            core: dlm::Core::new(dlm::Config::new(who)),
            links: BTreeSet::new(),
            untold: 0,
            links_gone: BTreeSet::new(),
            step: Step::Connecting,
            since: 0,
            first: false,
            jid: None,
            glocks: BTreeMap::new(),
            counters: vec![Counter::default(); COUNTERS],
            replay: None,
            to_recover: VecDeque::new(),
            retry_at: 0,
            frozen: Vec::new(),
            timer_at: 0,
            tick_at: 0,
            unmounting: false,
            revoked: false,
            increased: 0,
            looked: 0,
        }
    }

    pub(crate) fn is_mounted(&self) -> bool {
        self.step == Step::Mounted && !self.dead
    }

    /// One line for a story.
    pub(crate) fn picture(&self) -> String {
        let asked: Vec<_> = self.glocks.iter().filter(|(_, g)| g.pending.is_some()).collect();
        let gates: Vec<_> = self.core.gates().collect();
        format!(
            "{} {:?} view {:?} settled {} jid {:?} asked {asked:?} gates {gates:?} waits for {:?} replay {:?} frozen {}",
            self.who,
            self.step,
            self.core.view(),
            self.core.settled(),
            self.jid,
            self.members.waiting(),
            self.replay,
            self.frozen.len()
        )
    }
}

const fn lvb_of(value: u64) -> Lvb {
    let mut lvb = [0; 32];
    let bytes = value.to_le_bytes();
    let mut i = 0;
    while i < 8 {
        lvb[i] = bytes[i];
        i += 1;
    }
    lvb
}

impl World {
    pub(super) fn m(&mut self, i: usize) -> &mut Mount {
        self.nodes[i].mount.as_mut().expect("invariant: a mount acts only while it is there")
    }

    pub(super) fn call_daemon(&mut self, i: usize, call: Call) {
        let m = self.m(i);
        let (life, client) = (m.life.incarnation.0, m.client);
        self.after(50_000, Ev::Call { node: i, life, client, call });
    }

    pub(super) fn timer(&mut self, i: usize, delay: u64) {
        let at = self.now + delay;
        let now = self.now;
        let m = self.m(i);
        let who = m.who;
        if m.timer_at < now || at < m.timer_at {
            m.timer_at = at;
            self.at(at, Ev::Timer { node: i, who });
        }
    }

    // ---- from the daemon ----

    /// Puts an event into the socket of the node's mount.
    pub(crate) fn mount_told(&mut self, i: usize, event: ClusterEvent) {
        let Some(m) = &mut self.nodes[i].mount else { return };
        m.untold += 1;
        let who = m.who;
        self.after(50_000, Ev::ToMount { node: i, who, event });
    }

    pub(crate) fn mount_connected(&mut self, i: usize) {
        let now = self.now;
        let m = self.m(i);
        m.step = Step::Joining;
        m.since = now;
        let address = "127.0.0.1:1".parse().expect("an address");
        let payload = encode(&Payload { incarnation: m.who.incarnation.0, address });
        self.call_daemon(i, Call::Join(payload));
        self.timer(i, RETRY);
    }

    pub(crate) fn mount_event(&mut self, i: usize, event: &ClusterEvent) {
        if let ClusterEvent::Stop { .. } | ClusterEvent::Disconnected { .. } = event {
            return self.kill_mount(i, "the life of its node is over");
        }
        let mutant = self.mutant;
        let m = self.m(i);
        m.untold -= 1;
        if let ClusterEvent::GroupMessage { from, client, data, .. } = event {
            let (who, text) = (m.who, String::from_utf8_lossy(data).into_owned());
            self.say(|| format!("{who} hears {from} {client} {text}"));
        }
        let m = self.m(i);
        let mut actions = m.members.event(GROUP, event);
        if mutant == Some(Mutant::ReplayBeforeFence)
            && let ClusterEvent::GroupView { left, .. } = event
        {
            for (gone, why) in left.iter().filter(|(_, why)| *why != LeaveReason::Leave) {
                let _ = why;
                actions.extend(m.members.fenced(gone.proc, &Scope::Node));
            }
        }
        for action in actions {
            self.member_action(i, action);
        }
        self.mount_go_on(i);
    }

    pub(super) fn member_action(&mut self, i: usize, action: Action) {
        match action {
            Action::LockView { view, members, left_clean } => {
                let members: Vec<Proc> = members.into_iter().map(|(p, _)| p).collect();
                let m = self.m(i);
                let who = m.who;
                let gone: Vec<Proc> = m.links.iter().filter(|p| !members.contains(p)).copied().collect();
                m.links = members.iter().filter(|p| **p != who).copied().collect();
                m.links_gone.extend(&gone);
                for p in gone {
                    self.lanes.remove(&(who, p));
                }
                self.say(|| format!("{who} lock view {view}: {members:?} clean {left_clean:?}"));
                self.dlm_step(i, dlm::Event::View(CoreView { id: ViewId(view), members, left_clean }));
            }
            Action::LockFenced(who) => {
                self.dlm_step(i, dlm::Event::Fenced(who));
                if self.is(Mutant::GateOpenedAtFence) {
                    self.dlm_step(i, dlm::Event::Recovered { who, spread: false });
                }
            }
            Action::LockRecovered(who) => self.dlm_step(i, dlm::Event::Recovered { who, spread: true }),
            Action::Suspend => self.dlm_step(i, dlm::Event::Suspend),
            Action::Resume => self.dlm_step(i, dlm::Event::Resume),
            Action::Recover(dead) => self.m(i).to_recover.push_back(dead),
            Action::Say(note) => self.call_daemon(i, Call::Say(encode(&note))),
        }
    }

    // ---- the lock manager ----

    pub(crate) fn dlm_step(&mut self, i: usize, event: dlm::Event) {
        let now = self.local(i);
        let m = self.m(i);
        let mut out = Vec::new();
        if let Err(e) = m.core.step(now, event, &mut out) {
            let who = m.who;
            self.say(|| format!("{who} lock manager: {e}"));
        }
        self.dlm_actions(i, out);
        self.mount_go_on(i);
    }

    pub(crate) fn dlm_tick(&mut self, i: usize) {
        self.dlm_step(i, dlm::Event::Tick);
    }

    fn dlm_actions(&mut self, i: usize, actions: Vec<dlm::Action>) {
        let m = self.m(i);
        let (who, view) = (m.who, m.core.view().unwrap_or_default());
        if let Some(at) = m.core.next_deadline() {
            let at = self.true_time(i, at);
            let now = self.now;
            let m = self.m(i);
            if m.tick_at <= now || at < m.tick_at {
                m.tick_at = at;
                self.at(at, Ev::DlmTick { node: i, who });
            }
        }
        for action in actions {
            match action {
                dlm::Action::Send { to, msg } => {
                    if self.m(i).links.contains(&to) {
                        self.lane_push(who, to, view, msg);
                    }
                }
                dlm::Action::Complete(c) => self.completed(i, c),
                dlm::Action::Block { user, mode, .. } => self.blocked(i, user as usize, mode),
                dlm::Action::PlockDone { .. } | dlm::Action::Rebuilt(_) => {}
                dlm::Action::PeerError { from, what } => {
                    self.audit.fail(format!("DLM {who} blames {from}: {what}"));
                }
            }
        }
    }

    pub(super) fn ask(&mut self, i: usize, name: usize, mode: Mode, flags: Flags) {
        let now = self.local(i);
        let true_now = self.now;
        let m = self.m(i);
        let mut flags = flags;
        if until_fence(name) {
            flags |= Flags::RELEASE_AT_FENCE;
        } else {
            flags |= Flags::VALBLK;
        }
        let g = m.glocks.entry(name).or_default();
        assert!(g.pending.is_none(), "one request per name");
        g.pending = Some(mode);
        g.asked = true_now;
        g.recovery = flags.has(Flags::RECOVERY);
        let mut out = Vec::new();
        let asked = match (g.id, g.held) {
            (Some(id), Some(held)) => {
                let down = held.covers(mode);
                if down {
                    g.held = Some(mode);
                } else if !flags.has(Flags::NOQUEUE) {
                    flags |= Flags::QUECVT;
                }
                m.core.convert(now, id, mode, flags, None, None, &mut out).map(|()| id)
            }
            _ => m.core.request(now, &name_of(name), mode, flags, name as u64, None, &mut out),
        };
        let who = m.who;
        match asked {
            Ok(id) => {
                let m = self.m(i);
                m.glocks.get_mut(&name).expect("entered above").id = Some(id);
                self.audit.asked(who, name, mode, true_now);
                self.dlm_actions(i, out);
            }
            Err(e) => {
                self.audit.fail(format!("I3 {who} request {mode:?} on {name}: {e}"));
            }
        }
    }

    pub(super) fn give(&mut self, i: usize, name: usize) {
        let now = self.local(i);
        let m = self.m(i);
        let Some(g) = m.glocks.get(&name) else { return };
        let Some(id) = g.id else { return };
        let value = m.counters.get(name).and_then(|c| c.cached).filter(|_| g.held == Some(Mode::EX));
        let (flags, lvb) = match value {
            Some(v) => (Flags::VALBLK, Some(lvb_of(v))),
            None => (Flags::NONE, None),
        };
        let mut out = Vec::new();
        m.glocks.remove(&name);
        let who = m.who;
        // who is proved dead and does not know writes no value any more
        if let Some(v) = value.filter(|_| !self.audit.mount_fenced(who)) {
            self.audit.lvb[name] = Some(v);
        }
        let m = self.m(i);
        if let Err(e) = m.core.unlock(now, id, flags, lvb.as_ref(), &mut out) {
            self.audit.fail(format!("I3 {who} unlock of {name}: {e}"));
        }
        self.dlm_actions(i, out);
    }

    fn completed(&mut self, i: usize, c: Completion) {
        let name = c.user as usize;
        let now = self.now;
        let m = self.m(i);
        let who = m.who;
        if c.status == Status::Unlocked {
            return;
        }
        let Some(g) = m.glocks.get_mut(&name) else {
            return self.audit.fail(format!("I3 {who} answer {c:?} for a lock that is not there"));
        };
        let Some(want) = g.pending.take() else {
            return self.audit.fail(format!("I3 {who} answer {c:?} without a request"));
        };
        g.id = Some(c.lock);
        let ok = match c.status {
            Status::Granted => {
                g.held = c.mode;
                c.mode == Some(want)
            }
            Status::Again | Status::Deadlock => {
                g.held = c.mode;
                false
            }
            Status::Cancelled | Status::TimedOut | Status::Unlocked | Status::Queued => {
                return self.audit.fail(format!("I3 {who} strange answer {c:?}"));
            }
        };
        if c.mode.is_none() {
            m.glocks.remove(&name);
        }
        self.say(|| format!("{who} {name} {want:?}: {:?}", c.status));
        self.audit.answered(who, name, ok, now);
        if ok {
            self.check_grant(i, name, want);
            if let Some(v) = c.lvb
                && name < COUNTERS
                && c.sb.0 & SbFlags::VALNOTVALID == 0
            {
                let v = u64::from_le_bytes(*v.first_chunk().expect("32 bytes"));
                self.check_lvb(who, name, v);
            }
        }
        self.lock_answer(i, name, ok, c.status);
    }

    fn blocked(&mut self, i: usize, name: usize, mode: Mode) {
        let m = self.m(i);
        if name < COUNTERS {
            let to = if Mode::PR.compatible(mode) { Mode::PR } else { Mode::NL };
            let c = &mut m.counters[name];
            c.demote = Some(match c.demote {
                Some(Mode::NL) => Mode::NL,
                _ => to,
            });
        }
    }

    // ---- disk ----

    /// A write of this process: waits while there is no permit, then leaves it a moment after the check.
    pub(super) fn write(&mut self, i: usize, op: Op, tag: Tag) {
        let local = self.local(i);
        let checked = !self.is(Mutant::PermitNotChecked);
        let n = &self.nodes[i];
        let m = n.mount.as_ref().expect("invariant: a mount acts only while it is there");
        if m.over {
            return;
        }
        // the page of a daemon that is gone stays as it was
        let permit = n.daemon.as_ref().filter(|d| d.me == m.life).map(|d| d.permit);
        let verdict = match permit {
            Some(p) => p.check(local, m.life.incarnation).is_ok(),
            None => false,
        };
        if checked && !verdict {
            self.m(i).frozen.push((op, tag));
            return self.timer(i, 5 * MS);
        }
        self.check_write_start(i);
        let who = self.m(i).who;
        let delay = self.rng.below(MS / 5);
        self.after(delay, Ev::Submit { node: i, who, op, tag });
    }

    pub(crate) fn write_done(&mut self, i: usize, ok: bool, tag: Tag) {
        if !ok {
            // an error of the device: the mount withdraws, its locks go with the proof of its end
            return self.kill_mount(i, "withdrawn after an I/O error");
        }
        match tag {
            Tag::Counter(name) => self.counter_written(i, name),
            Tag::Replay => self.replay_written(i),
            Tag::Unmount => {
                self.m(i).revoked = true;
            }
        }
        self.mount_go_on(i);
    }

    pub(super) fn read(&mut self, i: usize, tag: Tag, what: usize) {
        let who = self.m(i).who;
        let latency = self.latency(i);
        self.after(latency, Ev::Read { node: i, who, tag, what });
    }

    /// The sample is taken now; a process that sleeps looks at it later, under locks that it may have lost by then only with its life.
    pub(crate) fn read_done(&mut self, i: usize, tag: Tag, what: usize) {
        if self.nodes[i].blocked {
            return self.kill_mount(i, "withdrawn after a read error");
        }
        match tag {
            Tag::Counter(name) => {
                let value = self.lun.counters[name];
                self.check_read(i, name, value);
                let m = self.m(i);
                let c = &mut m.counters[name];
                assert_eq!(c.busy, Busy::Read, "one operation per counter");
                c.busy = Busy::No;
                c.cached = Some(value);
            }
            Tag::Replay => {
                let entries: Vec<(usize, u64)> =
                    self.lun.journals[what].iter().map(|(c, v)| (*c, *v)).collect();
                let clean = self.lun.clean[what];
                let m = self.m(i);
                if let Some(r) = &mut m.replay {
                    r.entries = entries;
                    r.written = 0;
                    r.cleared = clean;
                    self.replay_next(i);
                }
            }
            Tag::Unmount => {
                let clean = self.lun.clean[what];
                self.journal_seen(i, what, clean);
            }
        }
        self.mount_go_on(i);
    }

    pub(crate) fn mount_timer(&mut self, i: usize) {
        let now = self.now;
        let m = self.m(i);
        if m.timer_at == 0 || m.timer_at > now {
            // one that has been overtaken; after a pause it comes late
            return;
        }
        m.timer_at = 0;
        for (op, tag) in std::mem::take(&mut m.frozen) {
            self.write(i, op, tag);
        }
        self.mount_go_on(i);
    }

    // ---- the end ----

    pub(crate) fn unmount(&mut self, i: usize) {
        if !self.nodes[i].mount.as_ref().is_some_and(Mount::is_mounted) {
            return self.kill_mount(i, "not mounted yet");
        }
        self.m(i).unmounting = true;
        self.mount_go_on(i);
    }

    fn unmount_go_on(&mut self, i: usize) {
        let m = self.m(i);
        if m.replay.is_some() || !m.members.is_settled() && !m.to_recover.is_empty() {
            return;
        }
        if m.counters.iter().any(|c| c.busy != Busy::No) || (0..COUNTERS).any(|n| m.glocks.contains_key(&n)) {
            return;
        }
        if m.step == Step::Mounted {
            self.set_step(i, Step::Unmounting);
            let jid = self.m(i).jid.expect("invariant: mounted");
            return self.write(i, Op::Clear { jid }, Tag::Unmount);
        }
        if !m.revoked {
            return;
        }
        let (jid, until) = (m.jid.expect("invariant: mounted"), self.now + 5000 * MS);
        self.lun.journal_of[jid] = None;
        for name in [JOURNAL + jid, MOUNTED, LIVE] {
            self.give(i, name);
        }
        let m = self.m(i);
        m.jid = None;
        if let Err(e) = m.core.leave() {
            let who = m.who;
            return self.audit.fail(format!("I3 {who} cannot leave the lock space: {e}"));
        }
        self.set_step(i, Step::Draining(until));
    }

    /// Somebody ends the process.
    pub(crate) fn kill_mount(&mut self, i: usize, why: &str) {
        let Some(m) = &self.nodes[i].mount else { return };
        let (who, client) = (m.who, m.client);
        if !m.dead {
            self.say(|| format!("{who} is killed: {why}"));
            self.end_mount(i, MountEnd::Killed);
        }
        self.client_closed(i, client);
    }

    /// The process executes nothing any more. It is gone when its I/O is.
    pub(crate) fn end_mount(&mut self, i: usize, how: MountEnd) {
        let Some(m) = &mut self.nodes[i].mount else { return };
        if std::mem::replace(&mut m.dead, true) {
            return;
        }
        m.over = true;
        let (who, life, client) = (m.who, m.life, m.client);
        let held: Vec<(usize, Mode)> = m.glocks.iter().filter_map(|(n, g)| Some((*n, g.held?))).collect();
        self.audit.buried(who, life, client, held, how == MountEnd::Clean);
        if how == MountEnd::Killed {
            self.cut_lanes_of(who);
        }
        self.nodes[i].mount_asleep = 0;
        self.after(MS, Ev::Reap { node: i, who });
    }

    pub(crate) fn reap(&mut self, i: usize, who: Proc) {
        let Some(m) = &self.nodes[i].mount else { return };
        if m.who != who {
            return;
        }
        if self.lun.busy(who) {
            return self.after(3 * MS, Ev::Reap { node: i, who });
        }
        let client = m.client;
        self.nodes[i].mount = None;
        self.client_closed(i, client);
        self.mount_gone(i);
        if self.nodes[i].leaving {
            return self.begin_leave(i);
        }
        let again = self.between(200, 3000) * MS;
        self.after(again, Ev::Remount { node: i });
    }

    /// What a node's process may write until, by its own clock.
    pub(crate) fn stop_deadline(&self, d: &crate::daemon::Daemon) -> Boottime {
        let token = d.token_seen + self.config.timing.permit();
        if self.config.qdisk_required {
            token.min(d.renewed_seen + self.config.timing.stop_limit())
        } else {
            token
        }
    }
}
