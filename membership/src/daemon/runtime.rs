//! The core thread: one loop that feeds the cores and carries out what they decide.

use super::life::{read_last_view, store};
use super::log::NodeLog;
use super::socket::{Inbox, Outbox};
use super::{DaemonError, Input, Wire, io_error};
use crate::alive::{self, PidFd};
use crate::clock;
use crate::config::Config;
use crate::engine::{Engine, EngineInput, IoAction};
use crate::event::{GroupName, View};
use crate::fence::agent;
use crate::groups::Groups;
use crate::ipc::{Answer, ClientKind, ClusterEvent, Secret, StopWhy};
use crate::node::{NodeAction, NodeCore};
use crate::permit::PermitWriter;
use crate::ring::log::RingLog;
use crate::stack::{End, Stack, StackAction};
use bytes::Bytes;
use cairn_base::{Boottime, Proc};
use crossbeam_channel::{Receiver, Sender, bounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;
use qdisk::driver::QdiskHandle;
use qdisk::{QdiskCommand, QdiskEvent, ViewName};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Longest sleep of the loop; also how late the end of a lease can be noticed.
const LONGEST_POLL: Duration = Duration::from_millis(50);

/// Passes over ring and events in one turn before the sockets are looked at again.
const PASSES: usize = 64;

/// Inputs taken in one turn.
const INPUTS_PER_TURN: usize = 512;

pub(super) struct Parts<E, W> {
    pub(super) config: Arc<Config>,
    pub(super) me: Proc,
    pub(super) run_dir: PathBuf,
    pub(super) foreground: bool,
    pub(super) groups: Groups<E>,
    pub(super) wire: W,
    pub(super) inbox: Inbox,
    pub(super) inputs: Receiver<Input>,
    pub(super) disk: Option<QdiskHandle>,
    pub(super) permit: Arc<Mutex<PermitWriter>>,
    pub(super) heartbeat: Arc<AtomicU64>,
    pub(super) lock_key: Secret,
}

/// A local client, connected.
pub(super) struct Client {
    pub(super) pid: i32,
    pub(super) process: Option<PidFd>,
    /// `None` until it has said hello.
    pub(super) kind: Option<ClientKind>,
    pub(super) subscribed: bool,
    pub(super) groups: BTreeSet<GroupName>,
    pub(super) outbox: Outbox,
}

/// A mount process that was in a group and must end: its connection is gone, or this life is.
pub(super) struct DyingMount {
    pub(super) client: u32,
    pub(super) fs: String,
    pub(super) process: Option<PidFd>,
}

/// What the node must not forget when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durable {
    RingSeq(u64),
    LastView(ViewName),
}

pub(super) struct Runtime<E, W> {
    pub(super) config: Arc<Config>,
    pub(super) me: Proc,
    run_dir: PathBuf,
    pub(super) stack: Stack<E>,
    wire: W,
    inbox: Inbox,
    inputs: Receiver<Input>,
    disk: Option<QdiskHandle>,
    pub(super) permit: Arc<Mutex<PermitWriter>>,
    heartbeat: Arc<AtomicU64>,
    pub(super) lock_key: Secret,
    pub(super) log: NodeLog,
    pub(super) clients: BTreeMap<u32, Client>,
    pub(super) dying: Vec<DyingMount>,
    /// Joins that wait until this node is in the fence domain.
    pub(super) pending_joins: Vec<(u32, GroupName, Bytes)>,
    /// What must be durable is written by its own thread; views wait for their sequence.
    persist: Sender<Durable>,
    /// Daemons of the other nodes on this machine.
    peers: BTreeMap<Proc, PidFd>,
    now: Boottime,
}

impl<E: Engine, W: Wire> Runtime<E, W> {
    pub(super) fn new(p: Parts<E, W>) -> Result<Self, DaemonError> {
        let host = p.config.name_of(p.me.node.0);
        let log = NodeLog::open(&p.run_dir, p.me.node, &host, p.config.dialect, p.foreground)
            .map_err(io_error("log"))?;
        let (persist, to_write) = bounded::<Durable>(1024);
        let run_dir = p.run_dir.clone();
        let inbox = p.inbox.clone();
        std::thread::Builder::new()
            .name("cairnd-persist".into())
            .spawn(move || {
                qdisk::realtime::this_thread();
                while let Ok(what) = to_write.recv() {
                    let result = store(&run_dir, what);
                    if !inbox.put(Input::Persisted { what, result }) {
                        return;
                    }
                }
            })
            .map_err(io_error("persist thread"))?;
        let now = clock::boottime();
        let mut core = NodeCore::new(p.me, Arc::clone(&p.config));
        core.set_last_view(read_last_view(&p.run_dir));
        Ok(Self {
            stack: Stack::new(now, p.groups, core, p.config.timing, p.disk.is_some()),
            config: p.config,
            me: p.me,
            run_dir: p.run_dir,
            wire: p.wire,
            inbox: p.inbox,
            inputs: p.inputs,
            disk: p.disk,
            permit: p.permit,
            heartbeat: p.heartbeat,
            lock_key: p.lock_key,
            log,
            clients: BTreeMap::new(),
            dying: Vec::new(),
            pending_joins: Vec::new(),
            persist,
            peers: BTreeMap::new(),
            now,
        })
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.stack.is_leaving()
    }

    pub(super) fn run(mut self, stop: &AtomicBool) -> Result<End, DaemonError> {
        self.log
            .engine("MAIN", &format!("cairnd started, node {} life {}", self.me.node, self.me.incarnation));
        loop {
            self.turn();
            if stop.load(Ordering::Relaxed) && !self.is_leaving() {
                self.begin_leave();
            }
            if let Some(end) = self.stack.ended() {
                self.permit.lock().withdraw();
                self.log.engine("MAIN", &format!("cairnd ends: {end:?}"));
                return Ok(end);
            }
        }
    }

    /// Calls into the stack and carries out what it decides.
    fn with(&mut self, f: impl FnOnce(&mut Stack<E>, Boottime, &mut Vec<StackAction>)) {
        let mut out = Vec::new();
        f(&mut self.stack, self.now, &mut out);
        self.carry_out(out);
    }

    fn turn(&mut self) {
        let slept_from = clock::boottime();
        self.wait();
        self.now = clock::boottime();
        self.heartbeat.store(self.now.0, Ordering::Relaxed);
        let gap = self.now.since(slept_from);
        if self.stack.is_quiet(self.now) {
            self.wire.discard();
            self.take_inputs();
            self.end_step();
            return;
        }
        let mut received = Vec::new();
        if self.stack.is_pause(gap) {
            self.log.engine("TOTEM", &format!("process pause of {} ms detected", gap.as_millis()));
            self.permit.lock().withdraw();
            self.wire.discard();
            received.push(EngineInput::Paused(gap));
        } else {
            self.wire.receive(self.now, &mut received);
        }
        for input in received {
            self.with(|stack, now, out| stack.ring(now, input, out));
        }
        self.take_inputs();
        self.watch_processes();
        self.with(Stack::tick);
        for _ in 0..PASSES {
            self.with(|stack, now, out| stack.pass(now, clock::unix_seconds(), out));
            if self.stack.is_idle(self.now) {
                break;
            }
        }
        self.end_step();
        self.update_permit();
    }

    fn take_inputs(&mut self) {
        for _ in 0..INPUTS_PER_TURN {
            let Ok(input) = self.inputs.try_recv() else { break };
            self.input(input);
        }
    }

    /// Sleeps until a descriptor is ready or something is due.
    fn wait(&mut self) {
        let now = clock::boottime();
        let due = self.stack.next_deadline(now);
        let limit = if self.stack.is_quiet(now) { LONGEST_POLL } else { due.since(now).min(LONGEST_POLL) };
        let mut raw = Vec::new();
        self.wire.fds(&mut raw);
        raw.extend(self.peers.values().map(AsRawFd::as_raw_fd));
        raw.extend(self.dying.iter().filter_map(|d| d.process.as_ref()).map(AsRawFd::as_raw_fd));
        // SAFETY: all of these descriptors are owned by `self` and stay open during the call.
        let borrowed: Vec<BorrowedFd<'_>> =
            raw.iter().map(|fd| unsafe { BorrowedFd::borrow_raw(*fd) }).collect();
        let mut fds: Vec<PollFd<'_>> =
            borrowed.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        fds.push(PollFd::new(self.inbox.wake.as_fd(), PollFlags::POLLIN));
        // rounded up: waking before the deadline would spin
        let ms = limit.as_millis() as u16 + u16::from(!limit.subsec_nanos().is_multiple_of(1_000_000));
        let _ = poll(&mut fds, PollTimeout::from(ms));
        let _ = self.inbox.wake.read();
    }

    // ---- ring and groups ----

    fn io(&mut self, action: &IoAction) {
        let IoAction::Persist { ring_seq } = action else { return self.wire.act(self.now, action) };
        self.persist(Durable::RingSeq(*ring_seq));
    }

    fn persist(&mut self, what: Durable) {
        // a thousand writes behind is as bad as none
        if self.persist.try_send(what).is_err() {
            self.stop(StopWhy::NotDurable);
        }
    }

    fn ring_log(&mut self, line: &RingLog) {
        if let RingLog::DuplicateNode { .. } | RingLog::StaleIncarnation { .. } = line {
            tracing::error!("{line}");
        }
        self.log.engine("TOTEM", &line.to_string());
    }

    /// The configuration change report, as it always was: the survivors first, then the new configuration.
    fn clm_report(&mut self, view: &View) {
        let address = |node: cairn_base::NodeId| {
            let addr = self.config.node(node.0).map_or_else(|| node.to_string(), |n| n.addr.clone());
            format!("\tr(0) ip({addr})  ")
        };
        let stayed = view.members.iter().filter(|m| !view.joined.contains(m)).map(|m| m.node);
        let mut lines = vec!["CLM CONFIGURATION CHANGE".to_owned(), "New Configuration:".to_owned()];
        lines.extend(stayed.map(address));
        lines.push("Members Left:".to_owned());
        lines.extend(view.left.iter().map(|l| address(l.member.node)));
        lines
            .extend(["Members Joined:", "CLM CONFIGURATION CHANGE", "New Configuration:"].map(str::to_owned));
        lines.extend(view.members.iter().map(|m| address(m.node)));
        lines.extend(["Members Left:", "Members Joined:"].map(str::to_owned));
        lines.extend(view.joined.iter().map(|m| address(m.node)));
        for line in lines {
            self.log.engine("CLM", &line);
        }
        self.log.engine("SYNC", "This node is within the primary component and will provide service.");
    }

    // ---- what the stack decides ----

    /// Actions of the node core.
    pub(super) fn perform(&mut self, actions: Vec<NodeAction>) {
        self.with(|stack, now, out| stack.perform(now, actions, out));
    }

    fn carry_out(&mut self, actions: Vec<StackAction>) {
        for action in actions {
            match action {
                StackAction::Io(action) => self.io(&action),
                StackAction::RingLog(line) => self.ring_log(&line),
                StackAction::Installing(view) => self.clm_report(&view),
                StackAction::Installed => self.watch_peers(),
                StackAction::RunAgent { victim, probe } => self.run_agent(victim, probe),
                StackAction::Event(event) => {
                    if let ClusterEvent::Leaving { .. } = event {
                        self.log.engine("CMAN", "leaving the cluster");
                    }
                    self.broadcast(&event);
                }
                StackAction::ToClients { clients, event } => {
                    let answer = Answer::Event(event);
                    for client in clients {
                        self.push(client, &answer);
                    }
                }
                StackAction::Disk(command) => self.tell_disk(command),
                StackAction::RecordView(view) => self.persist(Durable::LastView(view)),
                StackAction::Admitted => self.admit(),
                StackAction::KillMounts => self.kill_mounts(),
                StackAction::Stopping(why) => {
                    self.permit.lock().withdraw();
                    self.log.engine("CMAN", &format!("this node stops: {why}"));
                    self.broadcast(&ClusterEvent::Stop { why, deadline: self.now });
                    self.kill_mounts();
                }
                StackAction::Log { program, text } => self.log.program(program, &text),
                StackAction::Record(record) => self.log.record(&record),
                StackAction::NotSent(e) => {
                    tracing::error!("a message between the daemons was not sent: {e}");
                }
            }
        }
    }

    fn run_agent(&mut self, victim: Proc, probe: bool) {
        let config = Arc::clone(&self.config);
        let inbox = self.inbox.clone();
        let name = self.config.name_of(victim.node.0);
        let work = move || {
            let mut tried = Vec::new();
            let result =
                if probe { agent::probe(&config, victim) } else { agent::fence(&config, victim, &mut tried) };
            let tried = tried.iter().filter(|t| t.result != "success").map(|t| t.text(&name)).collect();
            inbox.put(Input::Agent { victim, result: result.map_err(|e| e.to_string()), tried });
        };
        if let Err(e) = std::thread::Builder::new().name(format!("fence-{}", victim.node)).spawn(work) {
            self.inbox.put(Input::Agent {
                victim,
                result: Err(format!("error from fork: {e}")),
                tried: Vec::new(),
            });
        }
    }

    fn broadcast(&mut self, event: &ClusterEvent) {
        let answer = Answer::Event(event.clone());
        let subscribers: Vec<u32> =
            self.clients.iter().filter(|(_, c)| c.subscribed).map(|(id, _)| *id).collect();
        for client in subscribers {
            self.push(client, &answer);
        }
    }

    /// To one client; one that does not read is treated as dead.
    pub(super) fn push(&mut self, client: u32, answer: &Answer) {
        let full = self.clients.get(&client).is_some_and(|c| !c.outbox.push(answer));
        if full {
            tracing::warn!("client {client} does not read its events: disconnected");
            self.client_closed(client);
        }
    }

    fn tell_disk(&mut self, command: QdiskCommand) {
        if let Some(disk) = &self.disk
            && let Err(e) = disk.send(command)
            && !self.stack.disk_ended()
        {
            tracing::error!("{e}");
            // its loop never waits in I/O: if it takes no commands it is broken (SS6)
            self.stop(StopWhy::Stuck);
        }
    }

    // ---- inputs ----

    fn input(&mut self, input: Input) {
        match input {
            Input::Connected { client, pid, outbox } => {
                let process = alive::start_time(pid).and_then(|started| PidFd::open(pid, started));
                let state =
                    Client { pid, process, kind: None, subscribed: false, groups: BTreeSet::new(), outbox };
                self.clients.insert(client, state);
            }
            Input::Call { client, call } => self.call(client, call),
            Input::Closed { client } => self.client_closed(client),
            Input::Agent { victim, result, tried } => {
                for line in tried {
                    self.log.line("fenced", &line);
                }
                let mut acts = Vec::new();
                self.stack.core.agent_done(self.now, clock::unix_seconds(), victim, result, &mut acts);
                self.perform(acts);
            }
            Input::Disk(event) => self.disk_event(event),
            Input::Persisted { what: Durable::RingSeq(seq), result: Ok(()) } => self.stack.persisted(seq),
            Input::Persisted { what: Durable::LastView(view), result: Ok(()) } => {
                self.with(|stack, now, out| stack.view_recorded(now, view, out));
            }
            Input::Persisted { what, result: Err(e) } => {
                self.log.engine("MAIN", &format!("{what:?} cannot be stored: {e}"));
                self.stop(StopWhy::NotDurable);
            }
        }
    }

    fn disk_event(&mut self, event: QdiskEvent) {
        match &event {
            QdiskEvent::Log { line, .. } => self.log.line("qdiskd", line),
            QdiskEvent::History { incarnation, .. } if *incarnation >= self.me.incarnation => {
                // our file was lost and the clock went back: begin again above what the disk remembers
                let path = self.run_dir.join("incarnation");
                match alive::write_durable(&path, &format!("{incarnation}\n")) {
                    Ok(()) => self.stop(StopWhy::Excluded),
                    Err(e) => {
                        self.log.engine("MAIN", &format!("incarnation cannot be stored: {e}"));
                        self.stop(StopWhy::NotDurable);
                    }
                }
            }
            _ => {}
        }
        self.with(|stack, now, out| stack.disk_event(now, event, out));
    }

    // ---- processes ----

    /// On one machine the kernel tells at once when another node's daemon has ended.
    fn watch_peers(&mut self) {
        if !self.config.one_host {
            return;
        }
        let members = self.stack.core.members();
        self.peers.retain(|p, _| members.contains(p));
        for p in members {
            if p != self.me
                && !self.peers.contains_key(&p)
                && let Some(node) = self.config.node(p.node.0)
                && let Some(process) = alive::daemon_of(&node.run_dir, p.incarnation)
            {
                self.peers.insert(p, process);
            }
        }
    }

    fn watch_processes(&mut self) {
        let dead: Vec<Proc> = self.peers.iter().filter(|(_, fd)| fd.exited()).map(|(p, _)| *p).collect();
        for p in dead {
            self.peers.remove(&p);
            let mut acts = Vec::new();
            self.stack.core.peer_exited(p, &mut acts);
            self.perform(acts);
        }
        let (ended, left) = std::mem::take(&mut self.dying)
            .into_iter()
            .partition(|d: &DyingMount| d.process.as_ref().is_none_or(PidFd::exited));
        self.dying = left;
        for mount in ended {
            let mut acts = Vec::new();
            self.stack.core.mount_gone(mount.client, mount.fs, &mut acts);
            self.perform(acts);
        }
    }

    /// The connection is gone. A mount that did not leave its groups first must be dead before anybody may take its journal.
    pub(super) fn client_closed(&mut self, client: u32) {
        let Some(state) = self.clients.remove(&client) else { return };
        self.pending_joins.retain(|(c, ..)| *c != client);
        if state.groups.is_empty() {
            return;
        }
        let mount = match state.kind {
            Some(ClientKind::Mount { fs }) => Some(fs),
            _ => None,
        };
        if let Some(fs) = mount.clone() {
            if let Some(process) = &state.process {
                let _ = process.kill();
            }
            self.dying.push(DyingMount { client, fs, process: state.process });
        }
        self.with(|stack, now, out| stack.client_gone(now, client, mount, out));
    }

    fn kill_mounts(&mut self) {
        let mounts: Vec<u32> = self
            .clients
            .iter()
            .filter(|(_, c)| matches!(c.kind, Some(ClientKind::Mount { .. })))
            .map(|(id, _)| *id)
            .collect();
        for client in mounts {
            if let Some(process) = self.clients.get(&client).and_then(|c| c.process.as_ref()) {
                let _ = process.kill();
            }
            self.client_closed(client);
        }
        for mount in &self.dying {
            if let Some(process) = &mount.process {
                let _ = process.kill();
            }
        }
    }

    // ---- the end of a life ----

    pub(super) fn begin_leave(&mut self) {
        self.with(Stack::begin_leave);
    }

    fn stop(&mut self, why: StopWhy) {
        self.with(|stack, _, out| stack.stop(why, out));
    }

    fn end_step(&mut self) {
        let services = self.clients.values().any(|c| c.kind == Some(ClientKind::Rgmanager));
        let mounts = !self.dying.is_empty();
        self.with(|stack, now, out| stack.end_step(now, services, mounts, out));
    }

    fn update_permit(&mut self) {
        let mut out = Vec::new();
        let until = self.stack.permit(self.now, &mut out);
        {
            let mut page = self.permit.lock();
            match until {
                Some((until, view)) => {
                    page.grant(until, view);
                    page.cut(until);
                }
                None => page.withdraw(),
            }
        }
        self.carry_out(out);
    }
}
