//! cairnd: the node's daemon. Threads, sockets, files; the decisions are those of the cores below.
//!
//! ```text
//!   socket thread (tokio) ──┐
//!   agent threads ──────────┤ bounded queue + eventfd      core thread: poll ─► ring ─► groups ─► node core ─► actions
//!   quorum-disk thread ─────┤ ───────────────────────►     (UDP sockets, pidfds of mounts and peers, one timer)
//!   persist thread ─────────┘                              │ heartbeat
//!                                              monitor thread: permit withdrawn at T/2, abort at T (SS6)
//! ```
//!
//! One process lives several lives: after a kill it ends its mounts, proves it, and starts again as a later incarnation. All state of a
//! life is in [`Runtime`]; nothing is carried over but the lock on the run directory.

mod calls;
mod disk;
mod life;
mod log;
mod runtime;
mod seal;
mod socket;
mod status;
mod wire;

use crate::alive::{self, AliveError};
use crate::config::{Config, ConfigError, OnKill};
use crate::engine::{EngineInput, IoAction};
use crate::ipc::{Call, Proof, StopWhy};
use crate::stack::End;
use cairn_base::{Boottime, Incarnation, NodeId, Proc};
use nix::fcntl::{Flock, FlockArg};
use qdisk::QdiskEvent;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub use disk::core_config;
pub use life::ring_config;
use runtime::{Durable, Runtime};
use socket::Outbox;

/// How long the processes of an earlier life may take to end.
const CONQUER_LIMIT: Duration = Duration::from_secs(30);

/// Pause before a node that lost its quorum disk looks again.
const DISK_RETRY: Duration = Duration::from_secs(1);

/// What a daemon is started with.
#[derive(Clone, Debug)]
pub struct DaemonConfig {
    pub config: PathBuf,
    /// Name of this node; default: the host's name, whole or up to the first dot.
    pub node: Option<String>,
    /// Instead of the configured one.
    pub run_dir: Option<PathBuf>,
    /// Log lines go to stderr as well.
    pub foreground: bool,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    #[error("{0}")]
    Config(#[from] ConfigError),
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("{0}: another cairnd runs here")]
    Running(String),
    #[error("{0}")]
    Alive(#[from] AliveError),
    #[error("{0}")]
    Wire(String),
    #[error("quorum disk: {0}")]
    Disk(String),
    #[error("this node was stopped: {0}")]
    Stopped(StopWhy),
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> DaemonError {
    move |source| DaemonError::Io { what: what.into(), source }
}

/// What wakes the core thread.
enum Input {
    Connected { client: u32, pid: i32, outbox: Outbox },
    Call { client: u32, call: Call },
    Closed { client: u32 },
    Agent { victim: Proc, result: Result<Proof, String>, tried: Vec<String> },
    Disk(QdiskEvent),
    Persisted { what: Durable, result: io::Result<()> },
}

/// The network under the ring: sealed datagrams.
trait Wire {
    fn fds(&self, out: &mut Vec<RawFd>);
    /// Everything that waits in the sockets and is authentic.
    fn receive(&mut self, now: Boottime, out: &mut Vec<EngineInput>);
    /// Throws away what waits: it is stale after a pause.
    fn discard(&mut self);
    fn act(&mut self, now: Boottime, action: &IoAction);
}

/// Runs the node until it leaves, is told to end by `stop`, or cannot go on.
pub fn run(daemon: &DaemonConfig, stop: &AtomicBool) -> Result<(), DaemonError> {
    let mut lock = None;
    let mut lives = 0;
    loop {
        // read again for each life: an outdated configuration is the commonest reason for a restart
        let config = Config::load(&daemon.config)?;
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        let node = own_node(&config, daemon.node.as_deref())?;
        let id = NodeId(node.id);
        let run_dir = daemon.run_dir.clone().unwrap_or_else(|| node.run_dir.clone());
        if lock.is_none() {
            lock = Some(lock_run_dir(&run_dir)?);
        }
        let on_kill = config.on_kill;
        let conquered = alive::conquer(&run_dir, CONQUER_LIMIT)?;
        let key = config.read_key()?;
        let remembered = match disk::remembered(&config, &key, id) {
            Ok(remembered) => remembered,
            Err(e) if lives > 0 && !stop.load(Ordering::Relaxed) => {
                // this is a node that has lost its LUN: it is back when the LUN is
                tracing::error!("{e}");
                drop(conquered);
                std::thread::sleep(DISK_RETRY);
                continue;
            }
            Err(e) => return Err(e),
        };
        let last =
            alive::last_incarnation(&run_dir).max(alive::fenced_up_to(&run_dir)).max(remembered.incarnation);
        let incarnation = Incarnation((last.0 + 1).max(crate::clock::incarnation_floor()));
        let guard = conquered.begin_life(incarnation)?;
        let me = Proc { node: id, incarnation };
        let start = life::Start {
            config: Arc::new(config),
            me,
            run_dir: &run_dir,
            key: &key,
            ring_seq: remembered.ring_seq,
        };
        let end = life::live(start, daemon.foreground, stop);
        drop(guard);
        lives += 1;
        match end? {
            End::Left => return Ok(()),
            End::Stopped(why) if on_kill == OnKill::Off || stop.load(Ordering::Relaxed) => {
                return Err(DaemonError::Stopped(why));
            }
            End::Stopped(why) => {
                tracing::warn!("life {me} has ended ({why}); starting again");
                // the others must have dropped it from the ring before its successor speaks
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn own_node<'a>(
    config: &'a Config,
    name: Option<&str>,
) -> Result<&'a crate::config::ClusterNode, DaemonError> {
    if let Some(name) = name {
        return Ok(config.node_named(name)?);
    }
    let host = hostname();
    let short = host.split('.').next().unwrap_or_default();
    Ok(config.node_named(&host).or_else(|_| config.node_named(short))?)
}

fn hostname() -> String {
    nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default()
}

/// One daemon per run directory; the directory is for its owner only.
fn lock_run_dir(run_dir: &Path) -> Result<Flock<File>, DaemonError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(run_dir)
        .map_err(io_error(run_dir.display().to_string()))?;
    let path = run_dir.join("cairnd.lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(io_error(path.display().to_string()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| DaemonError::Running(run_dir.display().to_string()))
}

const USAGE: &str = "usage: cairnd [-c cluster.conf] [-n node] [-r run-dir] [-f]

  -c FILE   configuration (default /etc/cluster/cluster.conf)
  -n NAME   name of this node in it (default: the host's name)
  -r DIR    run directory (default: as configured)
  -f        log to stderr as well

SIGTERM and SIGINT leave the cluster cleanly; mounts of this node are ended first.
Exit status: 0 left cleanly, 1 could not start or was stopped, 2 usage.
";

/// `cairnd` as a program.
pub fn main(args: &[String]) -> i32 {
    let mut daemon = DaemonConfig {
        config: PathBuf::from("/etc/cluster/cluster.conf"),
        node: None,
        run_dir: None,
        foreground: false,
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let (arg, mut inline) = match arg.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value.to_owned())),
            _ => (arg.as_str(), None),
        };
        let mut value = || inline.take().or_else(|| args.next().cloned());
        let taken = match arg {
            "-c" | "--config" => value().map(|v| daemon.config = v.into()),
            "-n" | "--node" => value().map(|v| daemon.node = Some(v)),
            "-r" | "--run-dir" => value().map(|v| daemon.run_dir = Some(v.into())),
            "-f" | "--foreground" => {
                daemon.foreground = true;
                Some(())
            }
            "-h" | "--help" => {
                print!("{USAGE}");
                return 0;
            }
            _ => None,
        };
        if taken.is_none() {
            eprint!("{USAGE}");
            return 2;
        }
    }
    if let Err(e) = start_log(&daemon) {
        eprintln!("cairnd: {e}");
        return 1;
    }
    if let Err(e) = catch_signals() {
        eprintln!("cairnd: signals: {e}");
        return 1;
    }
    match run(&daemon, &STOP) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("cairnd: {e}");
            1
        }
    }
}

/// The event log of the run directory; the first start in a process wins.
fn start_log(daemon: &DaemonConfig) -> Result<(), DaemonError> {
    let run_dir = match &daemon.run_dir {
        Some(run_dir) => run_dir.clone(),
        None => {
            let config = Config::load(&daemon.config)?;
            own_node(&config, daemon.node.as_deref())?.run_dir.clone()
        }
    };
    crate::log::init(&run_dir, "cairnd", false, None).map_err(io_error(run_dir.display().to_string()))
}

/// Set by SIGTERM and SIGINT; the core thread looks at it in each turn.
static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: libc::c_int) {
    STOP.store(true, Ordering::Relaxed);
}

fn catch_signals() -> io::Result<()> {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    let action = SigAction::new(SigHandler::Handler(on_signal), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        // SAFETY: the handler stores to an atomic and does nothing else.
        unsafe { sigaction(signal, &action)? };
    }
    Ok(())
}
