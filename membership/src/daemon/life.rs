//! One life of the daemon: everything is made here, and unmade when the life ends.

use super::runtime::{Durable, Parts, Runtime};
use super::socket::{Inbox, Server};
use super::{DaemonError, io_error};
use crate::alive;
use crate::clock;
use crate::config::Config;
use crate::engine::Peer;
use crate::groups::Groups;
use crate::ipc::Secret;
use crate::node;
use crate::permit::PermitWriter;
use crate::ring::{Ring, RingConfig, RingTimers};
use crate::stack::End;
use crate::timing::Timing;
use cairn_base::{Boottime, Incarnation, NodeId, Proc};
use crossbeam_channel::bounded;
use parking_lot::Mutex;
use qdisk::{ViewName, realtime};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Inputs that may wait for the core thread.
const INBOX: usize = 4096;

/// What a life begins with.
pub(super) struct Start<'a> {
    pub(super) config: Arc<Config>,
    pub(super) me: Proc,
    pub(super) run_dir: &'a Path,
    pub(super) key: &'a [u8],
    /// What the quorum disk remembers.
    pub(super) ring_seq: u64,
}

pub(super) fn live(start: Start<'_>, foreground: bool, stop: &AtomicBool) -> Result<End, DaemonError> {
    let Start { config, me, run_dir, key, ring_seq } = start;
    let cookie = random_u64()?;
    let permit = PermitWriter::create(run_dir, me.incarnation, config.timing.guard())
        .map_err(io_error("permit page"))?;
    let permit = Arc::new(Mutex::new(permit));
    let ring_seq = ring_seq.max(read_ring_seq(run_dir));
    let ring = Ring::new(ring_config(&config, me, cookie, ring_seq), clock::boottime());
    let wire = super::wire::UdpWire::open(&config, me, cookie, key)?;
    let groups = Groups::new(ring, Box::new(node::merge));
    let (queue, inputs) = bounded(INBOX);
    let inbox = Inbox::new(queue).map_err(io_error("eventfd"))?;
    let disk = super::disk::start(&config, me, key, &inbox)?;
    let server = Server::start(run_dir, inbox.clone()).map_err(io_error("control socket"))?;
    let heartbeat = Arc::new(AtomicU64::new(clock::boottime().0));
    let monitor = Monitor::start(&config.timing, &heartbeat, &permit);
    let lock_key = Secret::lock_key(key, &config.name);
    let parts = Parts {
        config,
        me,
        run_dir: run_dir.to_owned(),
        foreground,
        groups,
        wire,
        inbox,
        inputs,
        disk,
        permit,
        heartbeat,
        lock_key,
    };
    realtime::this_thread();
    let end = Runtime::new(parts)?.run(stop);
    drop(monitor);
    drop(server);
    end
}

/// How node `me` runs the ring. `cookie`: 64 random bits of this life; `ring_seq`: the highest sequence it may have used.
pub fn ring_config(config: &Config, me: Proc, cookie: u64, ring_seq: u64) -> RingConfig {
    let t = &config.timing;
    let ms = Duration::from_millis;
    RingConfig {
        me,
        cookie,
        peers: config.nodes.iter().map(|n| Peer { node: NodeId(n.id), votes: n.votes }).collect(),
        config_version: config.version,
        ring_seq,
        mtu: 1400 - 120,
        window: 50,
        max_messages: 17,
        user_queue: 4 << 20,
        timers: RingTimers {
            token: ms(t.base.token),
            retransmit: ms(t.ret),
            hold: ms(t.hold),
            join: ms(t.join),
            consensus: ms(t.consensus),
            merge: ms(t.merge),
            hear_window: ms(t.hear_window),
            hold_down: ms(t.hold_down),
        },
    }
}

fn random_u64() -> Result<u64, DaemonError> {
    getrandom::u64().map_err(|e| DaemonError::Wire(format!("no randomness: {e}")))
}

pub(super) fn store(run_dir: &Path, what: Durable) -> std::io::Result<()> {
    match what {
        Durable::RingSeq(seq) => alive::write_durable(&run_dir.join("ringseq"), &format!("{seq}\n")),
        Durable::LastView(v) => {
            let text = format!("{} {} {}\n", v.seq, v.rep, v.rep_incarnation.0);
            alive::write_durable(&run_dir.join("lastview"), &text)
        }
    }
}

/// The last view that this node has recorded. Missing: none; what was decided in it is then known to its other members and the disk.
pub(super) fn read_last_view(run_dir: &Path) -> ViewName {
    let text = std::fs::read_to_string(run_dir.join("lastview")).unwrap_or_default();
    let mut words = text.split_whitespace().map(str::parse::<u64>);
    match (words.next(), words.next(), words.next()) {
        (Some(Ok(seq)), Some(Ok(rep)), Some(Ok(life))) => {
            ViewName { seq, rep: NodeId(rep as u16), rep_incarnation: Incarnation(life) }
        }
        _ => ViewName::NONE,
    }
}

/// The highest ring sequence this node has used. Missing or damaged: 0, because ring ids contain incarnations and stay unique.
fn read_ring_seq(run_dir: &Path) -> u64 {
    std::fs::read_to_string(run_dir.join("ringseq")).ok().and_then(|s| s.trim().parse().ok()).unwrap_or(0)
}

/// SS6: watches the core thread from outside. At half of T without a sign of life the permit goes, at T the process.
struct Monitor {
    end: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Monitor {
    fn start(timing: &Timing, heartbeat: &Arc<AtomicU64>, permit: &Arc<Mutex<PermitWriter>>) -> Self {
        let token = timing.token();
        let end = Arc::new(AtomicBool::new(false));
        let (heartbeat, permit, ended) = (Arc::clone(heartbeat), Arc::clone(permit), Arc::clone(&end));
        let thread = std::thread::spawn(move || {
            realtime::this_thread();
            let mut last = clock::boottime();
            while !ended.load(Ordering::Relaxed) {
                std::thread::park_timeout(token / 8);
                let now = clock::boottime();
                // if this thread slept as well, the whole machine did: the core thread sees to that itself (SS9)
                let slept = now.since(last) > token / 2;
                last = now;
                let silent = now.since(Boottime(heartbeat.load(Ordering::Relaxed)));
                if slept || silent <= token / 2 {
                    continue;
                }
                permit.lock().withdraw();
                if silent > token {
                    tracing::error!("the core thread made no progress for {silent:?}: aborting");
                    std::process::abort();
                }
            }
        });
        Self { end, thread: Some(thread) }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
