//! One life of a node's daemon: the driver of the production cores in simulated time. It decides nothing; what `cairnd` does
//! with threads, sockets and processes is done here with events.

use crate::mount::{Mount, MountEnd};
use crate::tap::Tap;
use crate::world::{Call, Ev, MS, Mutant, World};
use bytes::Bytes;
use cairn_base::{Boottime, Incarnation, Proc};
use membership::daemon::{core_config, ring_config};
use membership::engine::{EngineInput, Guarantee, IoAction};
use membership::event::GroupName;
use membership::groups::{GroupError, Groups};
use membership::ipc::{ClusterEvent, Proof, StopWhy};
use membership::node::{self, NodeCore};
use membership::permit::PermitState;
use membership::ring::{Ring, Sabotage};
use membership::stack::{End, Stack, StackAction};
use qdisk::core::{Action as DiskAction, Input as DiskInput, Qdisk};
use qdisk::ondisk::{EBlock, Slot};
use qdisk::{MAX_NODES, QdiskEvent, ViewName};
use std::collections::VecDeque;
use std::time::Duration;

/// A daemon looks at its deadlines at least this often.
const LONGEST: u64 = 50 * MS;
pub(crate) const GROUP: &str = "gfs:vol";

pub(crate) struct Daemon {
    pub(crate) me: Proc,
    pub(crate) cookie: u64,
    pub(crate) stack: Stack<Tap>,
    pub(crate) disk: Option<Qdisk>,
    answer: u64,
    read_began: u64,
    read: Option<Box<[Slot; MAX_NODES]>>,
    pub(crate) permit: PermitState,
    turn_at: u64,
    tick_at: u64,
    /// Until when the queues between its two threads hold something.
    commands_until: u64,
    events_until: u64,
    /// The mount, once it has said hello.
    pub(crate) client: Option<u32>,
    joined: bool,
    pending_join: Option<Bytes>,
    retry: Vec<Call>,
    pub(crate) manager: Option<crate::services::Manager>,
    /// A mount process that was in its group and must end.
    pub(crate) dying: Option<u32>,
    pub(crate) token_seen: Boottime,
    pub(crate) renewed_seen: Boottime,
    /// The last renewals: when it knew of them (true time), and how long they are good for.
    pub(crate) renewals: VecDeque<(u64, Boottime)>,
}

impl World {
    // ---- life and death ----

    pub(crate) fn start(&mut self, i: usize) {
        let now = self.now;
        let n = &self.nodes[i];
        if n.daemon.is_some() || n.restart_at > now {
            return;
        }
        // The run directory is conquered only when every process of the life before is gone and its I/O done.
        let busy = n.mount.is_some() || self.lun.pending.values().any(|p| p.node == i);
        if busy || n.blocked {
            return self.start_at(i, now + 100 * MS);
        }
        let local = self.local(i);
        let cookie = self.rng.next_u64() | 1;
        let on_disk = self.lun.slots.iter().flatten().map(|b| b.ring_seq).max().unwrap_or(0);
        let ring_seq = self.nodes[i].ring_seq.max(on_disk);
        let n = &mut self.nodes[i];
        n.up = true;
        n.leaving = false;
        n.runs.clear();
        n.incarnation += 1;
        (n.daemon_asleep, n.mount_asleep) = (0, 0);
        let me = Proc { node: n.id, incarnation: Incarnation(n.incarnation) };
        let mut ring = Ring::new(ring_config(&self.config, me, cookie, ring_seq), local);
        ring.set_sabotage(Sabotage {
            safe_as_agreed: self.mutant == Some(Mutant::SafeAsAgreed),
            users_always_open: self.mutant == Some(Mutant::UsersAlwaysOpen),
            ..Sabotage::default()
        });
        let mut core = NodeCore::new(me, std::sync::Arc::clone(&self.config));
        core.set_last_view(n.last_view);
        core.set_sabotage(node::Sabotage {
            quorum_off_by_one: self.mutant == Some(Mutant::QuorumOffByOne),
            votes_without_lease: self.mutant == Some(Mutant::VotesWithoutLease),
            lease_of_any_view: self.mutant == Some(Mutant::LeaseOfAnyView),
            permit_for_ever: self.mutant == Some(Mutant::PermitForEver),
            fence_without_quorum: self.mutant == Some(Mutant::FenceWithoutQuorum),
            passed_by_goes_on: self.mutant == Some(Mutant::PassedByGoesOn),
        });
        let groups = Groups::new(Tap::new(ring), Box::new(node::merge));
        let disk = core_config(&self.config, me).map(|c| {
            c.check().expect("the simulation's timings keep the rules");
            Qdisk::new(c)
        });
        let stack = Stack::new(local, groups, core, self.config.timing, disk.is_some());
        let has_disk = disk.is_some();
        n.daemon = Some(Daemon {
            me,
            cookie,
            stack,
            disk,
            answer: 0,
            read_began: 0,
            read: None,
            permit: PermitState::withdrawn(me.incarnation, self.config.timing.guard()),
            turn_at: 0,
            tick_at: 0,
            commands_until: 0,
            events_until: 0,
            client: None,
            joined: false,
            pending_join: None,
            retry: Vec::new(),
            manager: None,
            dying: None,
            token_seen: Boottime::ZERO,
            renewed_seen: Boottime::ZERO,
            renewals: VecDeque::new(),
        });
        self.audit.life_begins(me);
        self.start_manager(i);
        self.say(|| format!("n{} starts as {me}", i + 1));
        if has_disk {
            self.disk_input(i, DiskInput::Tick);
        }
        self.turn(i);
        self.start_mount(i);
    }

    /// A mount of this node: a script tries again for as long as the node lives.
    pub(crate) fn start_mount(&mut self, i: usize) {
        let n = &mut self.nodes[i];
        let Some(d) = &n.daemon else { return };
        if n.mount.is_some() || n.leaving || d.stack.is_leaving() || d.dying.is_some() {
            return;
        }
        let client = n.next_client;
        n.next_client += 1;
        n.mount_incarnation += 1;
        let who = Proc { node: n.id, incarnation: Incarnation(n.mount_incarnation) };
        let life = d.me;
        n.mount = Some(Mount::new(who, life, client));
        self.audit.mounts.insert(who, (life, client));
        self.say(|| format!("n{} mount {who} starts, client {client} of {life}", i + 1));
        let delay = self.between(MS, 300 * MS);
        self.after(delay, Ev::Call { node: i, life: life.incarnation.0, client, call: Call::Hello });
    }

    /// Power fails: processes end without a word, what is on its way to the disk arrives or not.
    pub(crate) fn crash(&mut self, i: usize, why: &str) {
        if !self.nodes[i].up {
            return;
        }
        self.say(|| format!("n{} crashes: {why}", i + 1));
        if self.nodes[i].blocked {
            self.settle_io(i, u64::MAX);
        } else {
            self.lose_io(i);
        }
        self.end_daemon(i);
        self.end_mount(i, MountEnd::Killed);
        let n = &mut self.nodes[i];
        n.mount = None;
        n.runs.clear();
        n.up = false;
        n.blocked = false;
        (n.daemon_asleep, n.mount_asleep) = (0, 0);
        let back = self.between(300, 4000) * MS;
        let at = self.now + back;
        self.start_at(i, at);
    }

    /// The daemon process ends; its mounts see their sockets close.
    pub(crate) fn daemon_crash(&mut self, i: usize) {
        if self.nodes[i].daemon.is_none() || self.nodes[i].daemon_asleep > 0 {
            return;
        }
        self.say(|| format!("n{} daemon dies", i + 1));
        self.end_daemon(i);
        self.mount_told(i, ClusterEvent::Disconnected { why: "daemon died".into() });
        let back = self.between(100, 2000) * MS;
        let at = self.now + back;
        self.start_at(i, at);
    }

    fn end_daemon(&mut self, i: usize) {
        if let Some(d) = self.nodes[i].daemon.take() {
            self.nodes[i].quorate_deadline = self.stop_deadline(&d);
            self.audit.end_of_life(d.stack.groups.engine().trace.clone());
        }
        self.nodes[i].daemon_asleep = 0;
    }

    /// An administrator lets the node leave.
    pub(crate) fn leave(&mut self, i: usize) {
        let n = &mut self.nodes[i];
        if n.daemon.is_none() || n.leaving || n.daemon_asleep > 0 {
            return;
        }
        n.leaving = true;
        let with_mounts = self.rng.chance(1, 3);
        self.say(|| format!("n{} leaves, mounts killed: {with_mounts}", i + 1));
        if with_mounts || self.nodes[i].mount.is_none() {
            self.begin_leave(i);
        } else {
            self.unmount(i);
        }
    }

    pub(crate) fn begin_leave(&mut self, i: usize) {
        self.with(i, |stack, now, out| stack.begin_leave(now, out));
        self.turn(i);
    }

    fn life_ended(&mut self, i: usize, end: End) {
        let Some(d) = &self.nodes[i].daemon else { return };
        let me = d.me;
        self.say(|| format!("n{} life {me} ends: {end:?}", i + 1));
        self.end_daemon(i);
        self.mount_told(i, ClusterEvent::Disconnected { why: "daemon ended".into() });
        let back = if end == End::Left { self.between(500, 5000) } else { self.between(100, 600) };
        let at = self.now + back * MS;
        self.start_at(i, at);
    }

    pub(crate) fn wake(&mut self, i: usize) {
        let now = self.now;
        let n = &mut self.nodes[i];
        let daemon = n.daemon_asleep > 0 && n.daemon_asleep <= now;
        let mount = n.mount_asleep > 0 && n.mount_asleep <= now;
        let gap = Duration::from_nanos(now - n.asleep_since);
        if mount {
            n.mount_asleep = 0;
        }
        if !daemon {
            return;
        }
        n.daemon_asleep = 0;
        self.say(|| format!("n{} wakes", i + 1));
        let local = self.local(i);
        let Some(d) = &mut self.nodes[i].daemon else { return };
        if d.stack.is_pause(gap) && !d.stack.is_quiet(local) {
            d.permit.until = Boottime::ZERO;
            self.with(i, |stack, now, out| stack.ring(now, EngineInput::Paused(gap), out));
        }
        self.turn(i);
    }

    // ---- the core thread ----

    fn with(&mut self, i: usize, f: impl FnOnce(&mut Stack<Tap>, Boottime, &mut Vec<StackAction>)) {
        let now = self.local(i);
        let Some(d) = &mut self.nodes[i].daemon else { return };
        let mut out = Vec::new();
        f(&mut d.stack, now, &mut out);
        let me = d.me;
        for action in out {
            if self.is_life(i, me.incarnation.0) {
                self.carry_out(i, action);
            }
        }
    }

    pub(crate) fn frame(&mut self, i: usize, from: Proc, cookie: u64, packet: Bytes) {
        let asleep = self.nodes[i].daemon_asleep;
        let local = self.local(i);
        let Some(d) = &self.nodes[i].daemon else { return };
        if d.stack.is_quiet(local) {
            return;
        }
        if asleep > 0 {
            // it waits in the socket; after a pause the driver empties the sockets unread
            let gap = Duration::from_nanos(asleep - self.nodes[i].asleep_since);
            if !d.stack.is_pause(gap) {
                self.at(asleep, Ev::Frame { to: i, from, cookie, packet });
            }
            return;
        }
        self.with(i, |stack, now, out| stack.ring(now, EngineInput::Frame { from, cookie, packet }, out));
        self.turn(i);
    }

    pub(crate) fn view_recorded(&mut self, i: usize, view: ViewName) {
        self.with(i, |stack, now, out| stack.view_recorded(now, view, out));
        self.turn(i);
    }

    /// One turn of the driver's loop.
    pub(crate) fn turn(&mut self, i: usize) {
        let local = self.local(i);
        let Some(d) = &self.nodes[i].daemon else { return };
        if self.nodes[i].daemon_asleep > 0 {
            return;
        }
        if !d.stack.is_quiet(local) {
            self.with(i, |stack, now, out| stack.tick(now, out));
            let unix = self.now / 1000 / MS;
            for _ in 0..64 {
                self.with(i, |stack, now, out| stack.pass(now, unix, out));
                if self.nodes[i].daemon.as_ref().is_none_or(|d| d.stack.is_idle(local)) {
                    break;
                }
            }
        }
        let mounts = self.nodes[i].daemon.as_ref().is_some_and(|d| d.dying.is_some());
        let services = self.nodes[i].daemon.as_ref().is_some_and(|d| d.manager.is_some());
        self.with(i, |stack, now, out| stack.end_step(now, services, mounts, out));
        let Some(d) = &mut self.nodes[i].daemon else { return };
        if let Some(end) = d.stack.ended() {
            return self.life_ended(i, end);
        }
        if !d.stack.is_quiet(local) {
            let mut out = Vec::new();
            let until = d.stack.permit(local, &mut out);
            match until {
                Some((until, view)) => {
                    d.permit.grant(until, view);
                    d.permit.cut(until);
                }
                None => d.permit.until = Boottime::ZERO,
            }
            for action in out {
                self.carry_out(i, action);
            }
        }
        self.retry_calls(i);
        self.manager_speaks(i);
        let Some(d) = &mut self.nodes[i].daemon else { return };
        let token = membership::engine::Engine::last_token(d.stack.groups.engine());
        // a token counts for the view of its ring
        if let Some((_, at)) = token.filter(|(ring, _)| d.stack.core.view_id() == Some(*ring)) {
            d.token_seen = d.token_seen.max(at);
        }
        let due = d.stack.next_deadline(local);
        let life = d.me.incarnation.0;
        let quiet = d.stack.is_quiet(local);
        let due = if quiet { Boottime::MAX } else { due };
        let at = self.true_time(i, due).min(self.now + LONGEST).max(self.now + 1000);
        let d = self.nodes[i].daemon.as_mut().expect("invariant: looked at above");
        if d.turn_at <= self.now || at < d.turn_at {
            d.turn_at = at;
            self.at(at, Ev::Turn { node: i, life });
        }
        self.check_quorum();
    }

    fn carry_out(&mut self, i: usize, action: StackAction) {
        let Some(d) = &self.nodes[i].daemon else { return };
        let (me, life) = (d.me, d.me.incarnation.0);
        match action {
            StackAction::Io(IoAction::Send { to, packet, .. }) => self.send(i, to, &packet),
            StackAction::Io(IoAction::Persist { ring_seq }) => {
                let delay = self.between(MS, 10 * MS);
                self.after(delay, Ev::Persisted { node: i, life, seq: ring_seq });
            }
            StackAction::RecordView(view) => {
                let slow = self.slow_files && !self.healed && self.rng.chance(1, 2);
                let delay = if slow { self.between(50, 1500) * MS } else { self.between(MS, 10 * MS) };
                self.after(delay, Ev::Recorded { node: i, life, view });
            }
            StackAction::Io(IoAction::Confirm { .. }) | StackAction::Installed => {}
            StackAction::RingLog(line) => self.say(|| format!("n{} {line}", i + 1)),
            StackAction::Installing(view) => self.check_view(i, &view),
            StackAction::RunAgent { victim, probe } => self.run_agent(i, victim, probe),
            StackAction::Event(event) => {
                self.check_event(i, &event);
                self.say(|| format!("n{} {event:?}", i + 1));
                let hello = self.nodes[i].daemon.as_ref().is_some_and(|d| d.client.is_some());
                if hello {
                    self.mount_told(i, event.clone());
                }
                self.manager_told(i, event);
            }
            StackAction::ToClients { clients, event } => {
                let client = self.nodes[i].daemon.as_ref().and_then(|d| d.client);
                if client.is_some_and(|c| clients.contains(&c)) {
                    self.mount_told(i, event.clone());
                }
                if self.is_manager(i, &clients) {
                    self.manager_told(i, event);
                }
            }
            StackAction::Disk(command) => {
                if self.nodes[i].daemon.as_ref().is_some_and(|d| d.disk.is_some()) {
                    let at = self.queue_to(i, |d| &mut d.commands_until);
                    self.at(at, Ev::DiskCommand { node: i, life, command });
                }
            }
            StackAction::Admitted => {
                self.manager_join(i);
                let d = self.nodes[i].daemon.as_mut().expect("invariant: it just acted");
                if let (Some(payload), Some(client)) = (d.pending_join.take(), d.client) {
                    self.join_now(i, client, payload);
                }
            }
            StackAction::KillMounts => self.kill_mount(i, "the node leaves"),
            StackAction::Stopping(why) => {
                let d = self.nodes[i].daemon.as_mut().expect("invariant: it just acted");
                d.permit.until = Boottime::ZERO;
                self.say(|| format!("n{} {me} stops: {why}", i + 1));
                self.manager_told(i, ClusterEvent::Stop { why, deadline: Boottime::ZERO });
                assert_ne!(why, StopWhy::Stuck, "digests of a synchronisation round differ");
                self.kill_mount(i, "the node stops");
            }
            StackAction::Log { text, .. } => self.say(|| format!("n{} {text}", i + 1)),
            StackAction::Record(_) | StackAction::NotSent(_) => {}
        }
    }

    // ---- fence agents ----

    fn run_agent(&mut self, i: usize, victim: Proc, probe: bool) {
        self.check_fencing(i, victim, probe);
        let Some(d) = &self.nodes[i].daemon else { return };
        let life = d.me.incarnation.0;
        self.say(|| format!("n{} agent against {victim}, probe {probe}", i + 1));
        let ok = self.healed || !self.rng.chance(1, 6);
        let slow = !self.healed && self.rng.chance(1, 6);
        let d = if slow { self.between(1500, 6000) } else { self.between(20, 600) };
        self.agents += 1;
        self.after(d * MS, Ev::AgentEffect { by: i, life, victim, probe, ok });
    }

    /// The agent does its work, also when the node that ran it is gone by now.
    pub(crate) fn agent_effect(&mut self, by: usize, life: u64, victim: Proc, probe: bool, ok: bool) {
        self.agents -= 1;
        let v = usize::from(victim.node.0) - 1;
        let later = victim.incarnation.0 != 0 && self.nodes[v].incarnation > victim.incarnation.0;
        let idle = self.nodes[v].daemon.is_none()
            && self.nodes[v].mount.is_none()
            && self.nodes[v].runs.is_empty()
            && !self.lun.pending.values().any(|p| p.node == v);
        let result = if probe {
            if idle || later { Ok(Proof::NotRunning) } else { Err("it runs".to_owned()) }
        } else if !ok {
            // it may have done it all the same
            if self.rng.chance(1, 3) && !later && !self.is(Mutant::LyingAgent) {
                self.crash(v, "agent that reports failure");
            }
            Err("agent failed".to_owned())
        } else if self.is(Mutant::LyingAgent) {
            Ok(Proof::Agent("liar".to_owned()))
        } else if later {
            Ok(Proof::NotRunning)
        } else if self.fabric_fence && self.nodes[v].up {
            // its port is closed: what is on its way is refused, the machine runs on until somebody resets it
            self.say(|| format!("n{} is cut from the LUN", v + 1));
            self.nodes[v].blocked = true;
            self.settle_io(v, u64::MAX);
            let d = self.between(1000, 6000) * MS;
            self.after(d, Ev::Reset { node: v });
            Ok(Proof::Agent("fabric".to_owned()))
        } else {
            self.crash(v, "fenced");
            self.settle_io(v, u64::MAX);
            Ok(Proof::Exited)
        };
        if result.is_ok() && victim.incarnation.0 == 0 {
            self.unknown_proved(victim.node);
        }
        let delay = self.between(MS, 20 * MS);
        self.after(delay, Ev::Agent { node: by, life, victim, result });
    }

    pub(crate) fn agent_done(&mut self, i: usize, victim: Proc, result: Result<Proof, String>) {
        self.say(|| format!("n{} agent against {victim}: {result:?}", i + 1));
        let unix = self.now / 1000 / MS;
        self.with(i, |stack, now, out| {
            let mut acts = Vec::new();
            stack.core.agent_done(now, unix, victim, result, &mut acts);
            stack.perform(now, acts, out);
        });
        self.turn(i);
    }

    // ---- the quorum disk's thread ----

    /// When the other thread takes what is put into its queue now; it may be busy for a moment.
    fn queue_to(&mut self, i: usize, until: impl Fn(&mut Daemon) -> &mut u64) -> u64 {
        let lag = if self.rng.chance(1, 8) { self.between(MS / 10, 20 * MS) } else { 10_000 };
        let soonest = self.now + lag;
        let until = until(self.nodes[i].daemon.as_mut().expect("invariant: its threads speak"));
        *until = soonest.max(*until);
        *until
    }

    pub(crate) fn disk_input(&mut self, i: usize, input: DiskInput) {
        let (now, now_true) = (self.local(i), self.now);
        let Some(d) = &mut self.nodes[i].daemon else { return };
        let (me, life, read_began) = (d.me, d.me.incarnation.0, d.read_began);
        let Some(core) = &mut d.disk else { return };
        let mut out = Vec::new();
        core.step(now, input, &mut out);
        let deadline = core.next_deadline();
        let master = core.is_master().then(|| (core.term(), d.me));
        for action in out {
            match action {
                DiskAction::Write { block, .. } => self.disk_write(i, block),
                DiskAction::Read => {
                    let latency = self.latency(i);
                    let d = self.nodes[i].daemon.as_mut().expect("invariant: it just acted");
                    d.answer += 1;
                    d.read_began = now_true;
                    let answer = d.answer;
                    let ok = !self.nodes[i].blocked && (self.healed || !self.rng.chance(1, 300));
                    let sampled = self.rng.below(latency);
                    self.after(sampled, Ev::DiskSample { node: i, life, answer, ok });
                    // an answer comes after the sample, by order of insertion at the same instant
                    self.after(latency, Ev::DiskSample { node: i, life, answer: answer | 1 << 63, ok });
                }
                DiskAction::Event(event) => {
                    if let QdiskEvent::Missed(silent) = event {
                        self.check_missed(me, silent, read_began);
                    }
                    let at = self.queue_to(i, |d| &mut d.events_until);
                    self.at(at, Ev::DiskEvent { node: i, life, event });
                }
            }
        }
        if let Some((term, me)) = master {
            self.check_master(term, me);
        }
        if let Some(at) = deadline.filter(|t| *t != Boottime::MAX) {
            let at = self.true_time(i, at).max(self.now + 1000);
            let now = self.now;
            let d = self.nodes[i].daemon.as_mut().expect("invariant: it just acted");
            if d.tick_at <= now || at < d.tick_at {
                d.tick_at = at;
                self.at(at, Ev::DiskTick { node: i, life });
            }
        }
    }

    fn disk_write(&mut self, i: usize, block: Box<EBlock>) {
        let d = self.nodes[i].daemon.as_ref().expect("invariant: it just acted");
        let (me, life) = (d.me, d.me.incarnation.0);
        self.check_slot(me, &block);
        let latency = self.latency(i);
        let blocked = self.nodes[i].blocked;
        let fails = blocked || (!self.healed && self.rng.chance(1, 200));
        let settle = self.config.timing.base.io_limit * MS;
        // one that fails lands within X of its submission, or never
        let land = if fails { self.rng.below(settle - MS) } else { self.rng.below(latency) };
        if !blocked {
            self.after(land, Ev::DiskLand { node: i, life, block, failed: fails });
        }
        let answer = if fails { self.rng.below(settle) } else { latency };
        let input = if fails { DiskInput::WriteFailed } else { DiskInput::WriteDone };
        self.after(answer, Ev::DiskAnswer { node: i, life, input });
    }

    pub(crate) fn disk_land(&mut self, i: usize, life: u64, block: EBlock, failed: bool) {
        // after the end of its process a write lands within X or never
        if !self.is_life(i, life) && self.rng.chance(1, 2) || failed && self.rng.chance(1, 2) {
            return;
        }
        if self.nodes[i].incarnation > life {
            // a later life conquered the run directory: the I/O of this one was done by then
            return;
        }
        self.check_block(&block, failed);
        self.lun.slots[i] = Some(block);
    }

    pub(crate) fn disk_sample(&mut self, i: usize, life: u64, answer: u64, ok: bool) {
        if !self.is_life(i, life) {
            return;
        }
        let is_answer = answer >> 63 == 1;
        let mutant = self.mutant;
        let slots = &self.lun.slots;
        let Some(d) = &mut self.nodes[i].daemon else { return };
        if d.answer != answer & !(1 << 63) {
            return;
        }
        if !is_answer {
            let mut read = Box::new([const { Slot::Empty }; MAX_NODES]);
            for (n, slot) in slots.iter().enumerate() {
                if let Some(b) = slot {
                    let mut b = b.clone();
                    if mutant == Some(Mutant::KillsNotRead) {
                        b.kill = Default::default();
                    }
                    read[n] = Slot::Valid(Box::new(b));
                }
            }
            d.read = Some(read);
        } else if let Some(read) = d.read.take() {
            let input = if ok { DiskInput::ReadDone(read) } else { DiskInput::ReadFailed };
            self.at(self.now, Ev::DiskAnswer { node: i, life, input });
        }
    }

    pub(crate) fn disk_event(&mut self, i: usize, event: QdiskEvent) {
        match &event {
            QdiskEvent::Renewed { at } => {
                let (at, now) = (*at, self.now);
                let until = at + self.config.timing.stop_limit();
                if let Some(d) = &mut self.nodes[i].daemon {
                    d.renewed_seen = d.renewed_seen.max(at);
                    d.renewals.push_back((now, until));
                    if d.renewals.len() > 8 {
                        d.renewals.pop_front();
                    }
                    let me = d.me;
                    self.check_renewal(me, at);
                }
            }
            QdiskEvent::Votes { .. } => {}
            event => self.say(|| format!("n{} DISK {event:?}", i + 1)),
        }
        self.with(i, |stack, now, out| stack.disk_event(now, event, out));
        self.turn(i);
    }

    // ---- local clients ----

    pub(crate) fn call(&mut self, i: usize, client: u32, call: Call) {
        let now = self.local(i);
        if self.nodes[i].daemon.is_none() {
            return;
        }
        let d = self.nodes[i].daemon.as_mut().expect("invariant: just seen");
        match call {
            Call::Hello => {
                let there = self.nodes[i].mount.as_ref().is_some_and(|m| m.client == client && !m.dead);
                let Some(d) = self.nodes[i].daemon.as_mut().filter(|_| there) else { return };
                if d.stack.is_leaving() || d.stack.core.stopping().is_some() {
                    return self.kill_mount(i, "refused");
                }
                d.client = Some(client);
                let events = d.stack.core.snapshot(now);
                for event in events {
                    self.mount_told(i, event);
                }
                self.mount_connected(i);
            }
            Call::Join(payload) => {
                let payload = Bytes::from(payload);
                if d.stack.core.may_join() {
                    self.join_now(i, client, payload);
                } else {
                    d.pending_join = Some(payload);
                }
            }
            Call::Leave => {
                let name = GroupName::new(GROUP).expect("short name");
                d.joined = false;
                let _ = d.stack.groups.leave(client, &name);
            }
            Call::Say(data) => {
                let name = GroupName::new(GROUP).expect("short name");
                match d.stack.groups.mcast(client, &name, Guarantee::Safe, &data) {
                    Ok(_) => {}
                    Err(GroupError::WouldBlock) => d.retry.push(Call::Say(data)),
                    Err(e) => self.say(|| format!("n{} message refused: {e}", i + 1)),
                }
            }
        }
        self.turn(i);
    }

    fn retry_calls(&mut self, i: usize) {
        let Some(d) = &mut self.nodes[i].daemon else { return };
        let Some(client) = d.client else { return };
        let life = d.me.incarnation.0;
        for call in std::mem::take(&mut d.retry) {
            self.after(20 * MS, Ev::Call { node: i, life, client, call });
        }
    }

    fn join_now(&mut self, i: usize, client: u32, payload: Bytes) {
        let name = GroupName::new(GROUP).expect("short name");
        let Some(d) = &mut self.nodes[i].daemon else { return };
        match d.stack.groups.join(client, &name, payload.clone()) {
            Ok(()) => d.joined = true,
            Err(GroupError::WouldBlock) => d.pending_join = Some(payload),
            Err(e) => {
                self.say(|| format!("n{} join refused: {e}", i + 1));
                self.kill_mount(i, "join refused");
            }
        }
    }

    /// The connection is gone. A mount that did not leave its group first must be dead before anybody takes its journal.
    pub(crate) fn client_closed(&mut self, i: usize, client: u32) {
        let Some(d) = &mut self.nodes[i].daemon else { return };
        if d.client != Some(client) {
            return;
        }
        d.client = None;
        d.pending_join = None;
        d.retry.clear();
        if std::mem::take(&mut d.joined) {
            d.dying = Some(client);
            self.with(i, |stack, now, out| stack.client_gone(now, client, Some("vol".into()), out));
            self.end_mount(i, MountEnd::Killed);
        }
    }

    /// The mount process has ended, its I/O done.
    pub(crate) fn mount_gone(&mut self, i: usize) {
        if let Some(d) = &mut self.nodes[i].daemon
            && let Some(client) = d.dying.take()
        {
            self.with(i, |stack, now, out| {
                let mut acts = Vec::new();
                stack.core.mount_gone(client, "vol".into(), &mut acts);
                stack.perform(now, acts, out);
            });
        }
        self.turn(i);
    }
}
