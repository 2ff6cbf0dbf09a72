//! Threads around the core: an event loop with the clock, and a helper that does the I/O on the disk's own handle.
//!
//! The loop never waits in I/O: a hanging LUN leaves ticks and commands running, and the core's deadlines pass by time.
//! Nothing is decided here.

use crate::core::{Action, Input, Qdisk};
use crate::event::{LogLevel, QdiskCommand, QdiskConfig, QdiskEvent, StopWhy};
use crate::heuristic::{self, Report};
use crate::ondisk::{
    AREA, EBlock, EXTENSION, ExtHeader, MIN_SIZE, NodeState, SLOT, Seal, Slot, StatusBlock, classic_offset,
    decode_label, encode_status, ext_offset,
};
use crate::{MAX_NODES, mkqdisk};
use cairn_base::{Boottime, Incarnation, NodeId};
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, never, select};
use lun::aligned::AlignedBuf;
use lun::{BlockDevice, Lun, LunError, OpenOptions, Share, Write};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Commands that may wait for the loop.
pub const COMMANDS: usize = 256;
/// Events that may wait for the runtime. When they overflow the runtime has stopped listening, and the disk ends.
pub const EVENTS: usize = 4096;
/// The loop looks at its deadlines at least this often, whatever the core asks for.
const LONGEST_WAIT: Duration = Duration::from_millis(250);

/// One `<heuristic>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeuristicSpec {
    /// Run by `sh -c`; exit status 0 is good.
    pub program: String,
    pub score: u16,
    pub interval: Duration,
    /// Consecutive failures after which it counts as down.
    pub tko: u32,
    /// A run that takes longer counts as failed.
    pub limit: Duration,
}

/// What a quorum disk thread needs.
#[derive(Clone, Debug)]
pub struct QdiskOptions {
    /// LUN name as for `lun::open`.
    pub device: String,
    /// Expected label; `None`: not compared.
    pub label: Option<String>,
    pub cluster: String,
    pub cluster_key: Vec<u8>,
    pub config: QdiskConfig,
    pub heuristics: Vec<HeuristicSpec>,
    /// Rewritten each cycle.
    pub status_file: Option<PathBuf>,
}

/// What the disk remembers about a node, read before its incarnation is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Remembered {
    /// Highest incarnation of this node that any block names.
    pub incarnation: Incarnation,
    /// Highest ring sequence number that any block names.
    pub ring_seq: u64,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    #[error(transparent)]
    Lun(#[from] LunError),
    #[error("{device}: not a quorum disk: {reason}")]
    NotQdisk { device: String, reason: String },
    #[error("{device}: the label is '{found}', not '{wanted}'")]
    Label { device: String, found: String, wanted: String },
    #[error("quorum disk configuration: {0}")]
    Config(String),
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandleError {
    #[error("the quorum disk thread has ended")]
    Ended,
    #[error("the quorum disk thread does not take commands: {COMMANDS} are waiting")]
    Full,
}

/// The runtime's end of the queues. Dropping it ends the threads without another write.
pub struct QdiskHandle {
    commands: Sender<QdiskCommand>,
    events: Receiver<QdiskEvent>,
    thread: Option<JoinHandle<()>>,
}

impl QdiskHandle {
    /// Never blocks.
    pub fn send(&self, command: QdiskCommand) -> Result<(), HandleError> {
        self.commands.try_send(command).map_err(|e| match e {
            TrySendError::Full(_) => HandleError::Full,
            TrySendError::Disconnected(_) => HandleError::Ended,
        })
    }

    /// To be selected on beside other sources; disconnected when the thread has ended.
    pub fn events(&self) -> &Receiver<QdiskEvent> {
        &self.events
    }

    /// Waits for the event loop to end (after `Ended`). An I/O that hangs in the helper is left behind.
    pub fn join(mut self) {
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

/// An opened and checked quorum disk.
struct Disk {
    lun: Lun,
    seal: Seal,
}

fn open(
    device: &str,
    label: Option<&str>,
    cluster: &str,
    key: &[u8],
    read_only: bool,
) -> Result<Disk, DriverError> {
    // Shared with the other nodes of this host; keeps mkqdisk and mkfs.gfs away from a disk that is in use.
    let options = OpenOptions { read_only, ..OpenOptions::default() };
    let lun = lun::open(device, &options.share(Share::Shared))?;
    attach(lun, label, cluster, key)
}

fn attach(lun: Lun, label: Option<&str>, cluster: &str, key: &[u8]) -> Result<Disk, DriverError> {
    let device = lun.name().to_owned();
    let bad = |reason: &str| DriverError::NotQdisk { device: device.clone(), reason: reason.to_owned() };
    if lun.size() < MIN_SIZE {
        return Err(bad("CF-13: smaller than 1 MiB"));
    }
    let mut block = AlignedBuf::zeroed(SLOT);
    lun.read_at(0, &mut block)?;
    let found = decode_label(&block).map_err(|e| bad(&e.to_string()))?;
    if let Some(wanted) = label.filter(|&l| l != found.label) {
        return Err(DriverError::Label { device, found: found.label, wanted: wanted.to_owned() });
    }
    lun.read_at(EXTENSION, &mut block)?;
    let header = ExtHeader::decode(&block).map_err(bad)?;
    let seal = Seal::derive(key, cluster, &header.uuid);
    Ok(Disk { lun, seal })
}

impl Disk {
    fn read(&self) -> Result<Box<[Slot; MAX_NODES]>, LunError> {
        let mut area = AlignedBuf::zeroed(AREA);
        self.lun.read_at(EXTENSION, &mut area)?;
        let mut slots = Box::new([const { Slot::Empty }; MAX_NODES]);
        for (i, slot) in slots.iter_mut().enumerate() {
            let at = (i + 1) * SLOT;
            *slot = EBlock::decode(&area[at..at + SLOT], NodeId(i as u16 + 1), &self.seal);
        }
        Ok(slots)
    }

    /// The E-block must be durable; the classic blocks are for old tools and go into the same batch.
    fn write(&self, block: &EBlock, status: &StatusBlock, notices: &[NodeId]) -> Result<(), LunError> {
        let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let sector = self.lun.sector_size() as usize;
        let sealed = AlignedBuf::copy_of(&block.encode(&self.seal));
        let mut classic = Vec::with_capacity(1 + notices.len());
        let mut own = AlignedBuf::zeroed(sector);
        encode_status(&StatusBlock { timestamp, ..status.clone() }, &mut own);
        classic.push((block.node, own));
        for &n in notices {
            let mut b = AlignedBuf::zeroed(sector);
            let notice = StatusBlock {
                update_node: u32::from(block.node.0),
                timestamp,
                node: u32::from(n.0),
                state: NodeState::Evicted,
                ..StatusBlock::default()
            };
            encode_status(&notice, &mut b);
            classic.push((n, b));
        }
        let mut batch: Vec<Write<'_>> =
            classic.iter().map(|(n, b)| Write { offset: classic_offset(n.0), buf: b }).collect();
        batch.push(Write { offset: ext_offset(block.node.0), buf: &sealed });
        self.lun.write_batch(&batch)?;
        self.lun.flush()
    }
}

/// Reads what the disk remembers about `node`; called before its incarnation is chosen.
pub fn remembered(
    device: &str,
    label: Option<&str>,
    cluster: &str,
    cluster_key: &[u8],
    node: NodeId,
) -> Result<Remembered, DriverError> {
    let disk = open(device, label, cluster, cluster_key, true)?;
    let mut r = Remembered::default();
    let at = usize::from(node.0).wrapping_sub(1);
    for (i, slot) in disk.read()?.iter().enumerate() {
        let Slot::Valid(b) = slot else { continue };
        r.ring_seq = r.ring_seq.max(b.ring_seq);
        if i == at {
            r.incarnation = r.incarnation.max(b.incarnation).max(b.highest_incarnation);
        }
        if let Some(k) = b.kill.get(at).copied().flatten() {
            r.incarnation = r.incarnation.max(k.incarnation);
        }
    }
    Ok(r)
}

/// Now on CLOCK_BOOTTIME.
fn boottime() -> Boottime {
    let t =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME exists on Linux");
    Boottime(t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// One I/O for the helper.
enum Job {
    Read,
    Write { block: Box<EBlock>, status: StatusBlock, notices: Vec<NodeId> },
}

/// Opens the disk and starts the threads. The ring may start after [`QdiskEvent::Initialized`].
pub fn spawn(options: QdiskOptions) -> Result<QdiskHandle, DriverError> {
    let o = &options;
    o.config.check().map_err(DriverError::Config)?;
    let disk = open(&o.device, o.label.as_deref(), &o.cluster, &o.cluster_key, false)?;
    start(disk, options)
}

/// The same on a LUN that is open already (tests with faults).
pub fn spawn_on(lun: Lun, options: QdiskOptions) -> Result<QdiskHandle, DriverError> {
    options.config.check().map_err(DriverError::Config)?;
    let disk = attach(lun, options.label.as_deref(), &options.cluster, &options.cluster_key)?;
    start(disk, options)
}

fn start(disk: Disk, options: QdiskOptions) -> Result<QdiskHandle, DriverError> {
    let (command_in, commands) = bounded(COMMANDS);
    let (event_out, events) = bounded(EVENTS);
    // One I/O is open at a time, so one place in each queue is enough.
    let (job_in, jobs) = bounded::<Job>(1);
    let (answer_out, answers) = bounded::<Input>(1);
    let label = options.label.clone().unwrap_or_default();
    let device = disk.lun.name().to_owned();
    let spawn = |name: &str, f: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new().name(name.to_owned()).spawn(f).map_err(DriverError::Thread)
    };
    spawn(
        "qdisk-io",
        Box::new(move || {
            crate::realtime::this_thread();
            for job in &jobs {
                let answer = perform(&disk, job);
                if answer_out.send(answer).is_err() {
                    return;
                }
            }
        }),
    )?;
    let (end, ended) = bounded::<()>(0);
    let (report_out, reports) = bounded(64);
    for (i, spec) in options.heuristics.iter().cloned().enumerate() {
        let (ended, out) = (ended.clone(), report_out.clone());
        spawn("qdisk-heuristic", Box::new(move || heuristic::watch(i, spec, &ended, &out)))?;
    }
    let mut event_loop = Loop {
        core: Qdisk::new(options.config.clone()),
        jobs: job_in,
        events: event_out,
        status: options.status_file,
        scores: options.heuristics.iter().map(|h| (h.score, false)).collect(),
        over: false,
    };
    event_loop.log(LogLevel::Info, &format!("Quorum Partition: {device} Label: {label}"));
    event_loop.log(LogLevel::Info, "Quorum Daemon Initializing");
    let thread = spawn(
        "qdisk",
        Box::new(move || {
            crate::realtime::this_thread();
            event_loop.run(&commands, &answers, &reports);
            drop(end);
        }),
    )?;
    Ok(QdiskHandle { commands: command_in, events, thread: Some(thread) })
}

fn perform(disk: &Disk, job: Job) -> Input {
    match job {
        Job::Read => match disk.read() {
            Ok(slots) => Input::ReadDone(slots),
            Err(e) => {
                tracing::warn!(err = %e, "quorum disk: read failed");
                Input::ReadFailed
            }
        },
        Job::Write { block, status, notices } => match disk.write(&block, &status, &notices) {
            Ok(()) => Input::WriteDone,
            Err(e) => {
                tracing::warn!(err = %e, "quorum disk: write failed");
                Input::WriteFailed
            }
        },
    }
}

struct Loop {
    core: Qdisk,
    jobs: Sender<Job>,
    events: Sender<QdiskEvent>,
    status: Option<PathBuf>,
    /// Score of each heuristic, and whether it is up.
    scores: Vec<(u16, bool)>,
    over: bool,
}

impl Loop {
    fn run(
        &mut self,
        commands: &Receiver<QdiskCommand>,
        answers: &Receiver<Input>,
        reports: &Receiver<Report>,
    ) {
        if !self.scores.is_empty() {
            self.score();
        }
        self.step(Input::Tick);
        let mut commands = commands.clone();
        let mut reports = if self.scores.is_empty() { never() } else { reports.clone() };
        while !self.over {
            let now = boottime();
            let wait = self.core.next_deadline().map_or(LONGEST_WAIT, |t| t.since(now)).min(LONGEST_WAIT);
            select! {
                recv(answers) -> a => match a {
                    Ok(a) => {
                        let cycle = matches!(a, Input::ReadDone(_));
                        self.step(a);
                        if cycle {
                            self.write_status();
                        }
                    }
                    // The helper never ends while we hold the queue of its jobs.
                    Err(_) => self.fail("the I/O thread has ended"),
                },
                recv(commands) -> c => match c {
                    Ok(c) => self.step(Input::Command(c)),
                    Err(_) => {
                        commands = never();
                        self.step(Input::Command(QdiskCommand::Abort));
                    }
                },
                recv(reports) -> r => match r {
                    Ok(r) => self.report(r),
                    Err(_) => reports = never(),
                },
                default(wait) => self.step(Input::Tick),
            }
        }
    }

    fn step(&mut self, input: Input) {
        let mut actions = Vec::new();
        self.core.step(boottime(), input, &mut actions);
        for a in actions {
            match a {
                Action::Read => self.job(Job::Read),
                Action::Write { block, status, notices } => self.job(Job::Write { block, status, notices }),
                Action::Event(e) => self.emit(e),
            }
        }
    }

    fn job(&mut self, job: Job) {
        if self.jobs.try_send(job).is_err() {
            self.fail("the I/O thread takes no job although none is open");
        }
    }

    fn fail(&mut self, why: &str) {
        tracing::error!(why, "quorum disk: internal error");
        self.over = true;
        let _ = self.events.try_send(QdiskEvent::Stop(StopWhy::Internal(why.to_owned())));
        let _ = self.events.try_send(QdiskEvent::Ended);
    }

    fn emit(&mut self, e: QdiskEvent) {
        self.over |= e == QdiskEvent::Ended;
        if let QdiskEvent::Log { level, line } = &e {
            trace_line(*level, line);
        }
        if self.events.try_send(e).is_err() {
            // Nobody listens any more. The queue's end tells a runtime that is only late.
            self.over = true;
        }
    }

    fn log(&mut self, level: LogLevel, line: &str) {
        self.emit(QdiskEvent::Log { level, line: line.to_owned() });
    }

    fn report(&mut self, r: Report) {
        if let Some((level, line)) = r.log {
            self.log(level, &line);
        }
        if let Some(s) = self.scores.get_mut(r.index)
            && s.1 != r.up
        {
            s.1 = r.up;
            self.score();
        }
    }

    fn score(&mut self) {
        let max = self.scores.iter().map(|&(s, _)| s).sum();
        let score = self.scores.iter().filter(|&&(_, up)| up).map(|&(s, _)| s).sum();
        self.step(Input::Score { score, max });
    }

    /// Rewritten in place of the old one, so that a reader sees one or the other.
    fn write_status(&self) {
        let Some(path) = &self.status else { return };
        let mut part = path.clone().into_os_string();
        part.push(".new");
        let text = status_text(&self.core, &mkqdisk::ctime(SystemTime::now()));
        if let Err(e) = std::fs::write(&part, text).and_then(|()| std::fs::rename(&part, path)) {
            tracing::debug!(err = %e, path = %path.display(), "quorum disk: status file");
        }
    }
}

fn set(mask: u64) -> String {
    let nodes: Vec<String> =
        (0..MAX_NODES).filter(|n| mask >> n & 1 == 1).map(|n| format!("{} ", n + 1)).collect();
    format!("{{ {}}}", nodes.concat())
}

/// The classic status file.
fn status_text(core: &Qdisk, time: &str) -> String {
    let (score, max) = core.score();
    let required = core.config().min_score;
    let head = format!("Time Stamp: {time}\nNode ID: {}\n", core.config().me.node);
    let state = core.state_name();
    let text =
        format!("{head}Score: {score}/{max} (Minimum required = {required})\nCurrent state: {state}\n");
    let text = format!("{text}Initializing Set: {{ }}\nVisible Set: {}\n", set(core.visible()));
    match core.master() {
        Some(m) => format!("{text}Master Node ID: {}\nQuorate Set: {}\n", m.node, set(core.quorate_set())),
        None => format!("{text}Master Node ID: (none)\n"),
    }
}

fn trace_line(level: LogLevel, line: &str) {
    match level {
        LogLevel::Debug => tracing::debug!(target: "qdiskd", "{line}"),
        LogLevel::Info | LogLevel::Notice => tracing::info!(target: "qdiskd", "{line}"),
        LogLevel::Warning => tracing::warn!(target: "qdiskd", "{line}"),
        LogLevel::Error | LogLevel::Critical => tracing::error!(target: "qdiskd", "{line}"),
    }
}

#[cfg(test)]
mod tests;
