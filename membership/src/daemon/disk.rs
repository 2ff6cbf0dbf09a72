//! The quorum disk's thread, its options from the configuration, its events brought into the core thread.

use super::socket::Inbox;
use super::{DaemonError, Input};
use crate::config::{Config, Dialect, Heuristic, Quorumd};
use crate::quorum;
use cairn_base::{NodeId, Proc};
use qdisk::driver::{self, HeuristicSpec, QdiskHandle, QdiskOptions, Remembered};
use qdisk::event::QdiskConfig;
use qdisk::realtime;
use std::path::PathBuf;
use std::time::Duration;

/// What the disk remembers about this node; nothing without a quorum disk.
pub(super) fn remembered(config: &Config, key: &[u8], node: NodeId) -> Result<Remembered, DaemonError> {
    let Some(disk) = &config.quorumd else { return Ok(Remembered::default()) };
    driver::remembered(&disk.device, disk.label.as_deref(), &config.name, key, node)
        .map_err(|e| DaemonError::Disk(e.to_string()))
}

/// Starts the disk's thread, if there is a quorum disk.
pub(super) fn start(
    config: &Config,
    me: Proc,
    key: &[u8],
    inbox: &Inbox,
) -> Result<Option<QdiskHandle>, DaemonError> {
    let Some(options) = options(config, me, key) else { return Ok(None) };
    let handle = driver::spawn(options).map_err(|e| DaemonError::Disk(e.to_string()))?;
    let events = handle.events().clone();
    let inbox = inbox.clone();
    std::thread::Builder::new()
        .name("cairnd-qdisk".into())
        .spawn(move || {
            realtime::this_thread();
            while let Ok(event) = events.recv() {
                if !inbox.put(Input::Disk(event)) {
                    return;
                }
            }
        })
        .map_err(|e| DaemonError::Disk(e.to_string()))?;
    Ok(Some(handle))
}

/// What the quorum disk's thread needs to know; `None` without a quorum disk.
fn options(config: &Config, me: Proc, key: &[u8]) -> Option<QdiskOptions> {
    let disk = config.quorumd.as_ref()?;
    let t = &config.timing.base;
    Some(QdiskOptions {
        device: disk.device.clone(),
        label: disk.label.clone(),
        cluster: config.name.clone(),
        cluster_key: key.to_vec(),
        config: core_config(config, me)?,
        heuristics: disk.heuristics.iter().map(|h| heuristic(h, t.cycle, t.tko)).collect(),
        status_file: disk.status_file.as_ref().map(PathBuf::from),
    })
}

/// As the historical daemon computed it, not as its manual said.
fn min_score(disk: &Quorumd) -> u16 {
    let sum: u32 = disk.heuristics.iter().map(|h| h.score).sum();
    let default = if disk.heuristics.is_empty() { 1 } else { sum / 2 + 1 };
    disk.min_score.unwrap_or(default).min(u32::from(u16::MAX)) as u16
}

/// Defaults by the historical formula: everything follows from the time in which a node may be silent.
fn heuristic(h: &Heuristic, cycle_ms: u64, tko: u64) -> HeuristicSpec {
    let silence = (cycle_ms * tko.saturating_sub(1) / 1000).max(1);
    let interval = match (h.interval, silence) {
        (0, 0..=4) => 1,
        (0, 5..=22) => 2,
        (0, 23..=39) => 3,
        (0, 40..=50) => 4,
        (0, _) => 5,
        (set, _) => set,
    };
    let tko = if h.tko == 0 { (silence / interval).max(1) } else { h.tko };
    HeuristicSpec {
        program: h.program.clone(),
        score: h.score as u16,
        interval: Duration::from_secs(interval),
        tko: tko as u32,
        limit: Duration::from_secs(silence),
    }
}

/// How node `me` runs the quorum disk's core; `None` without a quorum disk.
pub fn core_config(config: &Config, me: Proc) -> Option<QdiskConfig> {
    let disk = config.quorumd.as_ref()?;
    let t = &config.timing.base;
    let (votes, device) = (config.node_votes(), config.device_votes());
    let smallest = config.nodes.iter().map(|n| u32::from(n.votes)).filter(|v| *v > 0).min().unwrap_or(0);
    let expected = config.expected_votes.unwrap_or(0).max(votes + device);
    Some(QdiskConfig {
        me,
        cycle: Duration::from_millis(t.cycle),
        tko: t.tko as u32,
        io_limit: Duration::from_millis(t.io_limit),
        // no watchdog is driven: time alone proves nothing about this node
        watchdog: Duration::ZERO,
        form: Duration::from_millis(config.timing.form),
        node_votes: config.nodes.iter().map(|n| (NodeId(n.id), u16::from(n.votes))).collect(),
        device_votes: device as u16,
        needed: (expected / 2 + 1) as u16,
        shrinks: config.dialect == Dialect::Rhel5 && quorum::decisive(votes, device, smallest),
        min_score: min_score(disk),
        reboot_on_score: disk.reboot,
        allow_kill: disk.allow_kill,
    })
}
