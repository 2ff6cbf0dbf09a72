//! Nodes that must fall silent: nothing of them reaches the LUN behind the fence, or behind their own deadline (I9, I10).

use super::{Cluster, POLL, boottime, can_run, signal};

/// Fast profile: permit P = 2.4 s behind the last token, and one retransmission.
const DEADLINE_NS: u64 = 2_400_000_000 + 122_000_000;

/// A node is stopped in the middle of writes, with dirty caches and exclusive locks, for five times its timeout; it is fenced while it
/// sleeps. From the fence on not one of its writes is submitted, and the others go on.
#[test]
fn fence_paused_node_wakes_writes_nothing() {
    if !can_run() {
        return;
    }
    let c = Cluster::up(&[]);
    let victim = c.writer("node2");
    let survivor = c.writer("node1");
    let pids = [c.pid("node2", "cairnd"), c.pid("node2", "mount")];
    let paused_at = boottime();
    c.cairn(&["pause", "node2"]);
    let fenced_at =
        c.wait_event("node1", paused_at, "fence of node2", |v| v["event"] == "fence_done" && v["node"] == 2);
    // Whichever survivor gets the journal's lock replays it.
    c.wait_any(&["node1", "node3"], fenced_at, "replay", |v| v["event"] == "journal_replayed");
    for pid in pids {
        signal(pid, libc::SIGCONT);
    }
    survivor.wait_for(survivor.acked() + 50);
    while boottime() < paused_at + 5 * 1_000_000_000 {
        std::thread::sleep(POLL);
    }
    let all = c.submitted();
    assert!(
        all.iter().any(|w| pids.contains(&w.pid) && w.t < paused_at),
        "the log names the victim's writes"
    );
    let late = all.iter().filter(|w| pids.contains(&w.pid) && w.t > fenced_at).count();
    assert_eq!(late, 0, "writes of node2 behind its fence");
    drop(victim);
}

/// Only the daemon dies: the mount ends by itself, without anybody's help, before its deadline.
#[test]
fn mount_without_daemon_stops_writing() {
    if !can_run() {
        return;
    }
    let c = Cluster::up(&[]);
    let writer = c.writer("node3");
    let (daemon, mount) = (c.pid("node3", "cairnd"), c.pid("node3", "mount"));
    let killed_at = boottime();
    signal(daemon, libc::SIGKILL);
    c.wait_event("node1", killed_at, "fence of node3", |v| v["event"] == "fence_done" && v["node"] == 3);
    while boottime() < killed_at + DEADLINE_NS {
        std::thread::sleep(POLL);
    }
    let late = c.submitted().iter().filter(|w| w.pid == mount && w.t > killed_at + DEADLINE_NS).count();
    assert_eq!(late, 0, "writes of a mount whose daemon is dead");
    drop(writer);
}

/// Two of three nodes are stopped without a quorum disk: the third loses quorum, is not helped by anybody, and submits nothing behind its own
/// deadline. When the others wake the cluster goes on or ends by its rules, and nothing hangs.
#[test]
fn node_without_quorum_stops_writing() {
    if !can_run() {
        return;
    }
    let c = Cluster::up(&["--no-quorum-disk"]);
    let mount = c.pid("node3", "mount");
    let writer = c.writer("node3");
    let paused_at = boottime();
    c.cairn(&["pause", "node1"]);
    c.cairn(&["pause", "node2"]);
    let last_pause = boottime();
    c.wait_event("node3", paused_at, "lost permit", |v| v["event"] == "permit_lost");
    while boottime() < last_pause + 5 * 1_000_000_000 {
        std::thread::sleep(POLL);
    }
    let all = c.submitted();
    assert!(all.iter().any(|w| w.pid == mount && w.t > paused_at), "the log names the writer's mount");
    let late = all.iter().filter(|w| w.pid == mount && w.t > last_pause + DEADLINE_NS).count();
    assert_eq!(late, 0, "writes of node3 without quorum");
    // Nobody had quorum, so nobody was fenced: when the others wake, all go on where they were.
    let acked = writer.acked();
    c.cairn(&["resume", "node1"]);
    c.cairn(&["resume", "node2"]);
    writer.wait_for(acked + 50);
    drop(writer);
}
