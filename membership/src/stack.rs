//! A node of the cluster without its I/O: process groups over the ring, the node core, and what has to happen between them in
//! which order. The daemon drives one, and so does the simulation of whole clusters.
//!
//! Decided here: nothing is sent before this life is known to the quorum disk (*quiet*); a view waits until its ring sequence is
//! durable; ordered messages wait for room in their order; when a gap in the driver's time is a pause; the steps of a
//! clean leave (services, mounts, domain, disk, ring) and of a life that was told to stop.
//!
//! Contract of a driver: carry out [`StackAction`]s in order before the next call; after each input run [`Stack::tick`], then
//! [`Stack::pass`] until [`Stack::is_idle`], then [`Stack::end_step`], then publish [`Stack::permit`].

use crate::engine::{Engine, EngineInput, Guarantee, IoAction, LeaveReason};
use crate::event::{GroupsEvent, View};
use crate::groups::{GroupError, Groups, GroupsOutput};
use crate::ipc::{ClusterEvent, StopWhy};
use crate::node::{NodeAction, NodeCore, Program, Record, SERVICE};
use crate::ring::log::{RingLog, State};
use crate::timing::Timing;
use bytes::Bytes;
use cairn_base::{Boottime, Proc, ViewId};
use qdisk::{QdiskCommand, QdiskEvent, ViewName};
use std::collections::VecDeque;
use std::time::Duration;

/// How long services may take to stop when the node leaves.
const SERVICES_LIMIT: Duration = Duration::from_mins(1);

/// How long the quorum disk may take to write its goodbye.
const DISK_GOODBYE: Duration = Duration::from_secs(3);

/// How a life ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Left cleanly, as asked.
    Left,
    /// Stopped itself, everything of it is proved gone.
    Stopped(StopWhy),
}

/// Where an end has got to. The order is that of the rules: domain, disk, ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// The service manager is handing over.
    LeavingServices(Boottime),
    /// Mounts are being ended.
    LeavingMounts,
    /// The leave of the fence domain is on its way.
    LeavingDomain,
    LeavingDisk(Boottime),
    LeavingRing(Boottime),
    /// This life was told to stop; its mounts are being ended.
    Stopping(StopWhy),
    StoppingDisk(StopWhy, Boottime),
    Ended(End),
}

/// What the driver must do, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum StackAction {
    /// `Persist` is answered by [`Stack::persisted`].
    Io(IoAction),
    RingLog(RingLog),
    /// This view is installed next.
    Installing(View),
    /// The members are those of [`NodeCore::members`] now.
    Installed,
    RunAgent {
        victim: Proc,
        probe: bool,
    },
    /// To every subscriber.
    Event(ClusterEvent),
    /// To these clients of the node.
    ToClients {
        clients: Vec<u32>,
        event: ClusterEvent,
    },
    Disk(QdiskCommand),
    /// Into the file of the last recorded view; answered by [`Stack::view_recorded`].
    RecordView(ViewName),
    /// Groups that write may be joined.
    Admitted,
    /// End all mount processes; `end_step` is told when none is left.
    KillMounts,
    /// This life ends: withdraw the permit, say so, end all mount processes.
    Stopping(StopWhy),
    Log {
        program: Program,
        text: String,
    },
    Record(Record),
    /// An ordered message was refused for good.
    NotSent(GroupError),
}

type Out<'a> = &'a mut Vec<StackAction>;

pub struct Stack<E> {
    pub core: NodeCore,
    pub groups: Groups<E>,
    timing: Timing,
    /// Ordered messages that the ring's queue did not take yet, in order.
    services: VecDeque<(bool, Bytes)>,
    events: VecDeque<GroupsEvent>,
    durable_seq: u64,
    asked_seq: u64,
    ring_state: State,
    phase: Phase,
    /// Until this life is on the quorum disk, or until this instant, no packet is sent: the disk is what tells it from an earlier one.
    quiet_until: Boottime,
    has_disk: bool,
    disk_ended: bool,
}

impl<E: Engine> Stack<E> {
    pub fn new(now: Boottime, groups: Groups<E>, core: NodeCore, timing: Timing, has_disk: bool) -> Self {
        let quiet = Duration::from_millis(2 * timing.evicted_after_death);
        Self {
            core,
            groups,
            timing,
            services: VecDeque::new(),
            events: VecDeque::new(),
            durable_seq: 0,
            asked_seq: 0,
            ring_state: State::Gather,
            phase: Phase::Running,
            quiet_until: if has_disk { now + quiet } else { Boottime::ZERO },
            has_disk,
            disk_ended: false,
        }
    }

    pub fn ring_state(&self) -> State {
        self.ring_state
    }

    /// Leaving, stopping, or ended.
    pub fn is_leaving(&self) -> bool {
        self.phase != Phase::Running
    }

    pub fn ended(&self) -> Option<End> {
        match self.phase {
            Phase::Ended(end) => Some(end),
            _ => None,
        }
    }

    /// Neither sends nor hears: what arrives from the network is thrown away, only the disk's events are taken.
    pub fn is_quiet(&self, now: Boottime) -> bool {
        now < self.quiet_until && !self.core.disk().0
    }

    /// Did a driver that was away for `gap` sleep? It then throws away what waits in its sockets, withdraws the permit and says
    /// [`EngineInput::Paused`] before anything else.
    pub fn is_pause(&self, gap: Duration) -> bool {
        gap > Duration::from_millis(self.timing.pause_limit)
    }

    pub fn disk_ended(&self) -> bool {
        self.disk_ended
    }

    pub fn next_deadline(&self, now: Boottime) -> Boottime {
        self.groups.next_deadline().min(self.core.next_deadline(now))
    }

    // ---- inputs ----

    pub fn ring(&mut self, now: Boottime, input: EngineInput, out: Out<'_>) {
        let mut list = Vec::new();
        self.groups.step(now, input, &mut list);
        for output in list {
            match output {
                GroupsOutput::Io(action) => {
                    if let IoAction::Persist { ring_seq } = action {
                        self.asked_seq = self.asked_seq.max(ring_seq);
                    }
                    out.push(StackAction::Io(action));
                }
                GroupsOutput::Log(line) => {
                    match line {
                        RingLog::Gather { .. } => {
                            self.ring_state = State::Gather;
                            let mut acts = Vec::new();
                            self.core.ring_broken(&mut acts);
                            self.perform(now, acts, out);
                        }
                        RingLog::EnteringCommit => self.ring_state = State::Commit,
                        RingLog::EnteringRecovery => self.ring_state = State::Recovery,
                        RingLog::EnteringOperational { .. } => self.ring_state = State::Operational,
                        _ => {}
                    }
                    out.push(StackAction::RingLog(line));
                }
                GroupsOutput::Event(event) => self.events.push_back(event),
            }
        }
    }

    /// This ring sequence, and every lower one, is durable.
    pub fn persisted(&mut self, seq: u64) {
        self.durable_seq = self.durable_seq.max(seq);
    }

    /// This view is in the file, durably.
    pub fn view_recorded(&mut self, now: Boottime, view: ViewName, out: Out<'_>) {
        let mut acts = Vec::new();
        self.core.view_recorded(now, view, &mut acts);
        self.perform(now, acts, out);
    }

    pub fn disk_event(&mut self, now: Boottime, event: QdiskEvent, out: Out<'_>) {
        match &event {
            QdiskEvent::Ended => self.disk_ended = true,
            QdiskEvent::Master { master, .. } if !self.is_quiet(now) => {
                self.ring(now, EngineInput::DeviceMaster(master.map(|p| p.node)), out);
            }
            _ => {}
        }
        let mut acts = Vec::new();
        self.core.disk_event(now, event, &mut acts);
        self.perform(now, acts, out);
    }

    /// Actions of the node core, asked for by a call on it.
    pub fn perform(&mut self, now: Boottime, actions: Vec<NodeAction>, out: Out<'_>) {
        for action in actions {
            match action {
                NodeAction::Service { safe, data } => self.services.push_back((safe, data)),
                NodeAction::SyncState { ring, data } => self.groups.sync_state(ring, data),
                NodeAction::HintDead(p) => self.groups.hint_dead(p.node, p.incarnation),
                NodeAction::RunAgent { victim, probe } => out.push(StackAction::RunAgent { victim, probe }),
                NodeAction::Event(event) => out.push(StackAction::Event(event)),
                NodeAction::ToClients { clients, event } => {
                    out.push(StackAction::ToClients { clients, event });
                }
                NodeAction::Disk(command) => out.push(StackAction::Disk(command)),
                NodeAction::RecordView(view) => out.push(StackAction::RecordView(view)),
                NodeAction::Admitted => out.push(StackAction::Admitted),
                NodeAction::LeftDomain => {
                    if self.phase == Phase::LeavingDomain {
                        self.leave_disk(now, out);
                    }
                }
                NodeAction::Stop(why) => self.stop(why, out),
                NodeAction::Log { program, text } => out.push(StackAction::Log { program, text }),
                NodeAction::Record(record) => out.push(StackAction::Record(record)),
            }
        }
    }

    /// A local client's connection is closed. `mount`: it was a mount of this file system, and did not leave its groups; until
    /// [`NodeCore::mount_gone`] it may still write.
    pub fn client_gone(&mut self, now: Boottime, client: u32, mount: Option<String>, out: Out<'_>) {
        if let Some(fs) = mount {
            let mut acts = Vec::new();
            self.core.mount_dying(client, fs, &mut acts);
            self.perform(now, acts, out);
        }
        self.groups.client_gone(client);
    }

    // ---- one turn of the driver ----

    pub fn tick(&mut self, now: Boottime, out: Out<'_>) {
        let mut acts = Vec::new();
        self.core.tick(now, &mut acts);
        self.perform(now, acts, out);
    }

    /// One pass over what waits: messages to the ring, the ring's timers, its events. `unix`: wall-clock seconds, for records.
    pub fn pass(&mut self, now: Boottime, unix: u64, out: Out<'_>) {
        self.send_services(out);
        self.ring(now, EngineInput::Tick, out);
        self.handle_events(now, unix, out);
    }

    pub fn is_idle(&self, now: Boottime) -> bool {
        self.groups.next_deadline() > now && self.services.is_empty()
    }

    /// Until when mounts may write, seen now.
    pub fn permit(&mut self, now: Boottime, out: Out<'_>) -> Option<(Boottime, ViewId)> {
        let last_token = self.groups.engine().last_token();
        let mut acts = Vec::new();
        let until = self.core.permit(now, last_token, &mut acts);
        self.perform(now, acts, out);
        until
    }

    fn send_services(&mut self, out: Out<'_>) {
        while let Some((safe, data)) = self.services.front() {
            let guarantee = if *safe { Guarantee::Safe } else { Guarantee::Agreed };
            match self.groups.send_service(SERVICE, guarantee, data.clone()) {
                Err(GroupError::WouldBlock) => return,
                Err(e) => out.push(StackAction::NotSent(e)),
                Ok(()) => {}
            }
            self.services.pop_front();
        }
    }

    /// Events in order. A view waits until its sequence number is durable here: it may never be used twice.
    fn handle_events(&mut self, now: Boottime, unix: u64, out: Out<'_>) {
        while let Some(event) = self.events.pop_front() {
            if let GroupsEvent::View { view, .. } = &event {
                if view.seq <= self.asked_seq && view.seq > self.durable_seq {
                    self.events.push_front(event);
                    return;
                }
                out.push(StackAction::Installing(view.clone()));
            }
            let stopped = event == GroupsEvent::Stopped;
            let is_view = matches!(event, GroupsEvent::View { .. });
            let mut acts = Vec::new();
            self.core.groups_event(now, unix, event, &mut acts);
            self.perform(now, acts, out);
            if is_view {
                out.push(StackAction::Installed);
            }
            if stopped && matches!(self.phase, Phase::LeavingRing(_)) {
                self.phase = Phase::Ended(End::Left);
            }
        }
    }

    // ---- the end of a life ----

    /// A clean leave begins; nothing when an end is under way already.
    pub fn begin_leave(&mut self, now: Boottime, out: Out<'_>) {
        if self.phase == Phase::Running {
            let deadline = now + SERVICES_LIMIT;
            out.push(StackAction::Event(ClusterEvent::Leaving { deadline }));
            self.phase = Phase::LeavingServices(deadline);
        }
    }

    /// This life stops, not cleanly.
    pub fn stop(&mut self, why: StopWhy, out: Out<'_>) {
        if !matches!(self.phase, Phase::Stopping(_) | Phase::StoppingDisk(..) | Phase::Ended(_)) {
            self.phase = Phase::Stopping(why);
            out.push(StackAction::Stopping(why));
        }
    }

    /// Goes on with a leave or a stop as far as it can. `services`: some may still run here; `mounts`: a mount process that was told
    /// to end has not been seen to be gone.
    pub fn end_step(&mut self, now: Boottime, services: bool, mounts: bool, out: Out<'_>) {
        let disk_done = !self.has_disk || self.disk_ended;
        match self.phase {
            Phase::LeavingServices(until) => {
                if !services {
                    out.push(StackAction::KillMounts);
                    self.phase = Phase::LeavingMounts;
                } else if now >= until {
                    // whether services still run here is not known: the others have to fence this node
                    self.stop(StopWhy::Shutdown, out);
                }
            }
            // The leave of the domain goes before everything that clients send: others would find their mounts lost, and nobody to fence.
            Phase::LeavingMounts if !mounts && self.groups.is_settled() => {
                let mut acts = Vec::new();
                self.phase = Phase::LeavingDomain;
                let wait = self.core.leave_domain(&mut acts);
                self.perform(now, acts, out);
                if !wait {
                    self.leave_disk(now, out);
                }
            }
            Phase::LeavingDisk(until) if disk_done || now >= until => {
                self.groups.leave_cluster(LeaveReason::Shutdown);
                self.phase = Phase::LeavingRing(now + 2 * self.timing.token());
            }
            Phase::LeavingRing(until) if now >= until => self.phase = Phase::Ended(End::Left),
            // the fencer of the others is on its way: whoever can prove its end by itself does it now
            Phase::Stopping(why) if !mounts && !self.has_disk => self.phase = Phase::Ended(End::Stopped(why)),
            Phase::Stopping(why) if !mounts => {
                out.push(StackAction::Disk(QdiskCommand::StoppedKilled));
                self.phase = Phase::StoppingDisk(why, now + DISK_GOODBYE);
            }
            Phase::StoppingDisk(why, until) if disk_done || now >= until => {
                self.phase = Phase::Ended(End::Stopped(why));
            }
            _ => {}
        }
    }

    fn leave_disk(&mut self, now: Boottime, out: Out<'_>) {
        out.push(StackAction::Disk(QdiskCommand::Leave));
        self.phase = Phase::LeavingDisk(now + DISK_GOODBYE);
    }
}
