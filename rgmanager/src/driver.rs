//! The service manager's threads: feeds the core, runs agents, answers clustat and clusvcadm. Decides nothing.
//!
//! ```text
//!   membership::Client events ─┐
//!   agents' results ───────────┼─► one loop ─► Core::step ─► sends, agent runs, replies
//!   admin socket requests ─────┘
//! ```
//!
//! One worker thread per service runs its agents one after the other, so a stop waits for the start before it.
//! `<run-dir>/rgmanager.sock` (mode 0600) carries [`AdminRequest`] and [`AdminReply`] in the frames of `membership::ipc`.

use crate::agent::{self, Context, Op};
use crate::config::RmConfig;
use crate::core::{Action, AdminCode, AdminOp, Core, Event, Level, Output, Records};
use crate::record::Record;
use cairn_base::{Boottime, NodeId, Proc, events};
use crossbeam_channel::{Receiver, Sender, bounded, select, tick, unbounded};
use membership::client::Client;
use membership::ipc::{self, ClusterEvent, IpcError, LeaveReason, Scope};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Process group of the service managers.
pub const GROUP: &str = "rgmanager";

/// How long an administrator's request may take before the caller is told to look at the logs.
const REQUEST_LIMIT: Duration = Duration::from_secs(600);

/// What tools ask the service manager of their node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum AdminRequest {
    Status,
    Do { svc: String, op: AdminOp },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum AdminReply {
    Status(ServiceStatus),
    Done { code: AdminCode, owner: Option<NodeId> },
}

/// Services as this node sees them. `records` is absent while they are not agreed on (no quorum, or fencing is awaited).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceStatus {
    pub records: Option<BTreeMap<String, Record>>,
    /// Nodes that run a service manager.
    pub online: BTreeSet<NodeId>,
}

/// Why the service manager ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    #[error(transparent)]
    Ipc(#[from] IpcError),
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    #[error("{path}: {source}")]
    Socket { path: PathBuf, source: std::io::Error },
    #[error("cairnd ended: {0}")]
    Disconnected(String),
}

pub struct DriverConfig {
    pub run_dir: PathBuf,
    /// Text of cluster.conf.
    pub config: String,
    pub agents: Context,
}

struct Request {
    request: AdminRequest,
    reply: Sender<AdminReply>,
}

struct Finished {
    svc: String,
    seq: u64,
    action: Action,
    ok: bool,
}

/// Runs until the node leaves: `stop` asks for a clean end (services stopped and handed over first).
pub fn run(config: DriverConfig, stop: &Receiver<()>) -> Result<(), DriverError> {
    let mut rm = RmConfig::parse(&config.config)?;
    let client = Client::connect(&config.run_dir, ipc::ClientKind::Rgmanager)?;
    rm.localize(&client.welcome().node_name);
    let me = client.welcome().proc;
    let status = client.status()?;
    if status.device.is_some() {
        // A new master, and its first lease to the new view.
        let t = &status.timing;
        rm.quorum_grace = Duration::from_millis(t.master_after_death + 2 * t.base.cycle);
    }
    let (requests_tx, requests) = unbounded();
    let socket = serve(&config.run_dir, requests_tx)?;
    client.join_group(GROUP, &[])?;

    let (finished_tx, finished) = unbounded();
    let mut driver = Driver {
        core: Core::new(me, rm),
        client,
        me,
        agents: config.agents,
        workers: BTreeMap::new(),
        finished: finished_tx,
        waiting: BTreeMap::new(),
        next_request: 0,
        may_leave: false,
    };
    // Quorum comes with the events, which begin with the present state; a status may be ahead of them.
    let result = driver.serve_events(&requests, &finished, stop);
    let _ = std::fs::remove_file(socket);
    result
}

struct Driver {
    core: Core,
    client: Client,
    me: Proc,
    agents: Context,
    workers: BTreeMap<String, Sender<(u64, Action)>>,
    finished: Sender<Finished>,
    waiting: BTreeMap<u64, Sender<AdminReply>>,
    next_request: u64,
    may_leave: bool,
}

impl Driver {
    fn serve_events(
        &mut self,
        requests: &Receiver<Request>,
        finished: &Receiver<Finished>,
        stop: &Receiver<()>,
    ) -> Result<(), DriverError> {
        let events = self.client.events().clone();
        let ticks = tick(self.core.tick_after());
        loop {
            select! {
                recv(events) -> event => match event {
                    Ok(ClusterEvent::Disconnected { why }) => {
                        self.feed(Event::Over);
                        return Err(DriverError::Disconnected(why));
                    }
                    Ok(event) => {
                        self.on_cluster(event);
                        self.look_for_victims();
                    }
                    Err(_) => return Err(DriverError::Disconnected("event stream ended".into())),
                },
                recv(finished) -> f => if let Ok(f) = f {
                    self.feed(Event::Done { svc: f.svc, seq: f.seq, action: f.action, ok: f.ok });
                },
                recv(requests) -> r => if let Ok(r) = r { self.on_request(r) },
                recv(ticks) -> _ => {
                    self.feed(Event::Tick { wall: wall() });
                    self.look_for_victims();
                }
                recv(stop) -> _ => self.feed(Event::Shutdown),
            }
            if self.may_leave {
                self.client.leave_group(GROUP)?;
                return Ok(());
            }
        }
    }

    /// The reply comes behind every event that the daemon had sent before it: with none left to work off, the core has seen its view.
    /// A daemon that does not answer now is asked again at the next tick; that it is gone, its events say.
    fn look_for_victims(&mut self) {
        if !self.core.awaits_fences() || !self.client.events().is_empty() {
            return;
        }
        let Ok(status) = self.client.status() else { return };
        let has_none = status.quorate && status.fence.in_domain && status.fence.victims.is_empty();
        if has_none && self.client.events().is_empty() {
            self.feed(Event::NoVictims);
        }
    }

    fn on_cluster(&mut self, event: ClusterEvent) {
        match event {
            // quorum that comes with a view is told when that view is recorded
            ClusterEvent::View(v) if !v.quorate => self.feed(Event::Quorum(false)),
            ClusterEvent::Quorum { quorate, .. } => self.feed(Event::Quorum(quorate)),
            ClusterEvent::Stop { .. } => self.feed(Event::Over),
            ClusterEvent::Leaving { .. } => self.feed(Event::Shutdown),
            ClusterEvent::Fenced { proc, scope: Scope::Node, .. } if proc != self.me => {
                self.feed(Event::Fenced(proc));
            }
            ClusterEvent::GroupView { group, view_no, members, left, .. } if group == GROUP => {
                let members = members.into_iter().map(|m| m.proc).collect();
                let left = left.into_iter().map(|(m, why)| (m.proc, why == LeaveReason::Leave)).collect();
                self.feed(Event::View { view: view_no, members, left });
            }
            ClusterEvent::GroupMessage { group, from, data, .. } if group == GROUP => {
                match postcard::from_bytes(&data) {
                    Ok(msg) => self.feed(Event::Message { from, msg }),
                    Err(e) => tracing::error!(node = from.node.0, err = %e, "message does not decode"),
                }
            }
            _ => {}
        }
    }

    fn on_request(&mut self, r: Request) {
        match r.request {
            AdminRequest::Status => {
                let records: Option<Records> =
                    if self.core.is_agreed() { self.core.records().cloned() } else { None };
                let _ =
                    r.reply.send(AdminReply::Status(ServiceStatus { records, online: self.core.online() }));
            }
            AdminRequest::Do { svc, op } => {
                self.next_request += 1;
                let id = self.next_request;
                self.waiting.insert(id, r.reply);
                self.feed(Event::Request { id, svc, op, at: wall() });
            }
        }
    }

    fn feed(&mut self, event: Event) {
        let mut out = Vec::new();
        self.core.step(now(), event, &mut out);
        for o in out {
            match o {
                Output::Send(msg) => {
                    let bytes = postcard::to_stdvec(&msg).expect("invariant: our messages encode");
                    if let Err(e) = self.client.send(GROUP, false, &bytes) {
                        tracing::warn!(err = %e, "cannot send to the service managers");
                    }
                }
                Output::Run { svc, seq, action } => self.start_action(&svc, seq, action),
                Output::Reply { id, code, owner } => {
                    if let Some(to) = self.waiting.remove(&id) {
                        let _ = to.send(AdminReply::Done { code, owner });
                    }
                }
                Output::Log { level, text } => say(level, &text),
                Output::Changed { svc } => {
                    if let Some(r) = self.core.records().and_then(|m| m.get(&svc)) {
                        tracing::info!(
                            event = events::SERVICE_STATE,
                            svc,
                            state = r.state.name(),
                            node = r.owner.node.0,
                            "{}",
                            events::SERVICE_STATE
                        );
                    }
                }
                Output::MayLeave => self.may_leave = true,
            }
        }
    }

    /// Queue an action behind what the service's worker is doing.
    fn start_action(&mut self, svc: &str, seq: u64, action: Action) {
        let Some(service) = self.core.config().service(svc) else { return };
        let worker = self.workers.entry(svc.to_owned()).or_insert_with(|| {
            let (tx, rx) = unbounded::<(u64, Action)>();
            let (tree, ctx, done, name) =
                (service.tree.clone(), self.agents.clone(), self.finished.clone(), svc.to_owned());
            std::thread::Builder::new()
                .name(format!("svc-{}", service.tree.name))
                .spawn(move || {
                    for (seq, action) in rx {
                        let op = match action {
                            Action::Start => Op::Start,
                            Action::Stop => Op::Stop,
                            Action::Status => Op::Status,
                        };
                        let ok = agent::run_tree(&tree, op, &ctx, &mut |text| say(Level::Err, text));
                        if done.send(Finished { svc: name.clone(), seq, action, ok }).is_err() {
                            return;
                        }
                    }
                })
                .expect("invariant: a thread per service can be started");
            tx
        });
        let _ = worker.send((seq, action));
    }
}

fn now() -> Boottime {
    membership::clock::boottime()
}

fn wall() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The historic lines go to the log with target `rgmanager`, at the level that fits them.
fn say(level: Level, text: &str) {
    match level {
        Level::Emerg | Level::Crit | Level::Err => tracing::error!(target: "rgmanager", "{text}"),
        Level::Warning => tracing::warn!(target: "rgmanager", "{text}"),
        Level::Notice | Level::Info => tracing::info!(target: "rgmanager", "{text}"),
    }
}

/// Accept tools on `<run-dir>/rgmanager.sock`.
fn serve(run_dir: &Path, requests: Sender<Request>) -> Result<PathBuf, DriverError> {
    let path = run_dir.join("rgmanager.sock");
    let fail = |source| DriverError::Socket { path: run_dir.join("rgmanager.sock"), source };
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(fail)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    let active = Arc::new(Mutex::new(0_u32));
    std::thread::Builder::new()
        .name("rgmanager-sock".into())
        .spawn(move || {
            for stream in listener.incoming().flatten() {
                if *active.lock() >= 64 {
                    continue; // a local flood: dropped connections, no memory
                }
                *active.lock() += 1;
                let (requests, active) = (requests.clone(), Arc::clone(&active));
                let spawned = std::thread::Builder::new().name("rgmanager-tool".into()).spawn(move || {
                    if let Err(e) = answer(stream, &requests) {
                        tracing::debug!(err = %e, "tool connection");
                    }
                    *active.lock() -= 1;
                });
                if let Err(e) = spawned {
                    tracing::warn!(err = %e, "cannot serve a tool");
                }
            }
        })
        .map_err(fail)?;
    Ok(path)
}

fn answer(mut stream: UnixStream, requests: &Sender<Request>) -> Result<(), IpcError> {
    let request = ipc::decode(&ipc::read_frame(&mut stream)?)?;
    let (tx, rx) = bounded(1);
    requests.send(Request { request, reply: tx }).map_err(|_| IpcError::Closed)?;
    let reply = rx.recv_timeout(REQUEST_LIMIT).map_err(|_| IpcError::TimedOut(REQUEST_LIMIT))?;
    ipc::write_frame(&mut stream, &reply)
}

/// One request from a tool to the service manager of the node at `run_dir`.
pub fn ask(run_dir: &Path, request: &AdminRequest) -> Result<AdminReply, IpcError> {
    ask_within(run_dir, request, REQUEST_LIMIT)
}

/// The same, for callers who do not wait that long: the request stays, its answer is not awaited any more.
pub fn ask_within(run_dir: &Path, request: &AdminRequest, limit: Duration) -> Result<AdminReply, IpcError> {
    let path = run_dir.join("rgmanager.sock");
    let connect = |source| IpcError::Connect { path: path.display().to_string(), source };
    let mut stream = UnixStream::connect(&path).map_err(connect)?;
    stream.set_read_timeout(Some(limit)).map_err(connect)?;
    ipc::write_frame(&mut stream, request)?;
    match ipc::read_frame(&mut stream) {
        Err(IpcError::Io(e)) if e.kind() == std::io::ErrorKind::WouldBlock => Err(IpcError::TimedOut(limit)),
        other => ipc::decode(&other?),
    }
}
