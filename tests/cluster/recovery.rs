//! Deaths that nobody, or only a part of a node, survives: nothing acknowledged is lost, nothing is replayed before its fence.

use super::{Cluster, boottime, can_run};

const NODES: [&str; 3] = ["node1", "node2", "node3"];

/// All nodes die in the middle of writes. The first one back knows nobody who could tell it what happened: it fences everybody that it cannot
/// see, and replays every journal only then.
#[test]
fn all_nodes_die_and_come_back() {
    if !can_run() {
        return;
    }
    let c = Cluster::up(&[]);
    let writers = NODES.map(|n| c.writer(n));
    for w in &writers {
        w.wait_for(50);
    }
    for node in NODES {
        c.cairn(&["crash", node]);
    }
    drop(writers);
    let since = boottime();
    c.cairn(&["start", "node1"]);
    let events = c.events("node1", since);
    let at = |is_it: &dyn Fn(&serde_json::Value) -> bool| events.iter().position(is_it);
    let replay = at(&|v| v["event"] == "journal_replayed").expect("the first mounter replays");
    for node in [2, 3] {
        let fenced = at(&|v| v["event"] == "fence_done" && v["node"] == node).expect("fenced at the start");
        assert!(fenced < replay, "replay before the fence of node{node}: {events:#?}");
    }
    assert_eq!(
        events.iter().filter(|v| v["event"] == "journal_replayed").count(),
        3,
        "every journal was dirty"
    );
    c.cairn(&["start", "node2"]);
    for name in NODES {
        c.verify(name, "node1");
        c.verify(name, "node2");
    }
    c.down_and_check();
}

/// Only the mount process of a node dies; its daemon lives and vouches for the death. The others replay its journal, and the node mounts again.
#[test]
fn a_mount_dies_alone_and_comes_back() {
    if !can_run() {
        return;
    }
    let c = Cluster::up(&[]);
    let writer = c.writer("node3");
    let other = c.writer("node1");
    let died_at = boottime();
    super::signal(c.pid("node3", "mount"), libc::SIGKILL);
    c.wait_any(&["node1", "node2"], died_at, "replay", |v| v["event"] == "journal_replayed");
    other.wait_for(other.acked() + 50);
    c.verify("node3", "node1");
    c.cairn(&["start", "node3"]);
    c.verify("node3", "node3");
    drop((writer, other));
    c.down_and_check();
}

/// A service on a node that lives does not notice that another node dies, though quorum is gone for the moment in which the device's votes
/// follow the view.
#[test]
fn a_service_on_a_survivor_goes_on() {
    if !can_run() {
        return;
    }
    let c = Cluster::up(&[]);
    let started = |v: &serde_json::Value| v["event"] == "service_state" && v["state"] == "started";
    c.wait_event("node1", 0, "start of the service", started);
    let owner = c.events("node1", 0).iter().rfind(|v| started(v)).and_then(|v| v["node"].as_u64());
    let victim = if owner == Some(3) { "node2" } else { "node3" };
    // So that its journal is dirty.
    let writer = c.writer(victim);
    let died_at = boottime();
    c.cairn(&["crash", victim]);
    drop(writer);
    c.wait_any(&NODES, died_at, "replay", |v| v["event"] == "journal_replayed");
    // The records are agreed on again: an administrator is answered.
    let run_dir = c.run_dir("node1").display().to_string();
    let frozen = ["-Z", "-U"].map(|op| c.run(&["clusvcadm", op, "web", "--run-dir", &run_dir]));
    assert_eq!(frozen.map(|o| o.is_ok()), [true, true]);
    let node = format!("node{}", owner.expect("an owner"));
    let states: Vec<_> =
        c.events(&node, died_at).into_iter().filter(|v| v["event"] == "service_state").collect();
    assert!(
        states.iter().all(|v| v["state"] == "started" && v["node"].as_u64() == owner),
        "the service was touched: {states:#?}"
    );
}
