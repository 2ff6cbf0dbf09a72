use super::*;
use crate::event::{DiskState, RingView, ViewName};
use cairn_base::Proc;
use lun::fault::{Fault, FaultLun, Op};
use lun::mem::MemLun;
use std::sync::Arc;
use std::time::Instant;

const LIMIT: Duration = Duration::from_secs(20);

fn options(device: &str, node: u16, incarnation: u64) -> QdiskOptions {
    QdiskOptions {
        device: device.to_owned(),
        label: Some("q".to_owned()),
        cluster: "c".to_owned(),
        cluster_key: b"0123456789abcdef".to_vec(),
        config: QdiskConfig {
            me: Proc { node: NodeId(node), incarnation: Incarnation(incarnation) },
            cycle: Duration::from_millis(50),
            tko: 8,
            io_limit: Duration::from_millis(100),
            watchdog: Duration::ZERO,
            form: Duration::from_millis(50),
            node_votes: vec![(NodeId(1), 1), (NodeId(2), 1)],
            device_votes: 1,
            needed: 2,
            shrinks: true,
            min_score: 1,
            reboot_on_score: false,
            allow_kill: true,
        },
        heuristics: Vec::new(),
        status_file: None,
    }
}

fn image(dir: &tempfile::TempDir) -> String {
    let path = dir.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let name = path.to_str().unwrap().to_owned();
    mkqdisk::create(&name, "q", |_| {}).unwrap();
    name
}

/// Waits for the first event that `want` accepts.
fn wait<T>(h: &QdiskHandle, what: &str, mut want: impl FnMut(&QdiskEvent) -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    let mut seen = Vec::new();
    loop {
        match h.events().recv_deadline(deadline) {
            Ok(e) => {
                if let Some(t) = want(&e) {
                    return t;
                }
                if !matches!(e, QdiskEvent::Renewed { .. } | QdiskEvent::Votes { .. }) {
                    seen.push(e);
                }
            }
            Err(e) => panic!("{what}: {e}; seen {seen:#?}"),
        }
    }
}

fn view(members: &[(u16, u64)], seq: u64) -> QdiskCommand {
    let proc = |&(n, i): &(u16, u64)| Proc { node: NodeId(n), incarnation: Incarnation(i) };
    let members: Vec<Proc> = members.iter().map(proc).collect();
    let name = ViewName { seq, rep: members[0].node, rep_incarnation: members[0].incarnation };
    QdiskCommand::View(Some(RingView { name, members }))
}

#[test]
fn two_nodes_on_a_file_elect_count_evict_and_leave() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(&dir);
    let mut one = options(&disk, 1, 1 << 50);
    one.status_file = Some(dir.path().join("status"));
    let a = spawn(one).unwrap();
    let b = spawn(options(&disk, 2, 7)).unwrap();
    for h in [&a, &b] {
        wait(h, "initialized", |e| matches!(e, QdiskEvent::Initialized).then_some(()));
        h.send(view(&[(1, 1 << 50), (2, 7)], 4)).unwrap();
    }
    for h in [&a, &b] {
        wait(h, "votes", |e| matches!(e, QdiskEvent::Votes { view, .. } if view.seq == 4).then_some(()));
    }
    let status = std::fs::read_to_string(dir.path().join("status")).unwrap();
    assert!(status.contains("Node ID: 1\nScore: 1/1 (Minimum required = 1)\n"), "{status}");
    // Node 2 ends without a word: it is evicted.
    b.send(QdiskCommand::Abort).unwrap();
    wait(&b, "ended", |e| matches!(e, QdiskEvent::Ended).then_some(()));
    b.join();
    a.send(view(&[(1, 1 << 50)], 8)).unwrap();
    let victim = wait(&a, "evicted", |e| match e {
        QdiskEvent::Evicted { victim, .. } => Some(*victim),
        _ => None,
    });
    assert_eq!(victim, Proc { node: NodeId(2), incarnation: Incarnation(7) });
    wait(&a, "votes", |e| matches!(e, QdiskEvent::Votes { view, .. } if view.seq == 8).then_some(()));
    // The next life must be higher than what the disk remembers.
    let r = remembered(&disk, Some("q"), "c", b"0123456789abcdef", NodeId(2)).unwrap();
    assert_eq!((r.incarnation, r.ring_seq), (Incarnation(7), 8));
    let again = spawn(options(&disk, 2, 7)).unwrap();
    wait(&again, "refused", |e| {
        matches!(e, QdiskEvent::Stop(StopWhy::Duplicate { incarnation: Incarnation(7) })).then_some(())
    });
    a.send(QdiskCommand::Leave).unwrap();
    wait(&a, "ended", |e| matches!(e, QdiskEvent::Ended).then_some(()));
    a.join();
    let found = mkqdisk::examine(&disk).unwrap().unwrap();
    assert_eq!(found.nodes.iter().map(|n| (n.node, n.state)).collect::<Vec<_>>(), [(2, "Evicted")]);
}

#[test]
fn a_hanging_disk_is_reported_in_time_and_recovers() {
    let mem = MemLun::new(1 << 20, 512);
    let dir = tempfile::tempdir().unwrap();
    let disk = image(&dir);
    let bytes = std::fs::read(&disk).unwrap();
    mem.write_durable(0, &bytes).unwrap();
    let (faulty, faults) = FaultLun::new(mem.handle("node1"));
    let h = spawn_on(Arc::new(faulty), options("mem", 1, 5)).unwrap();
    wait(&h, "initialized", |e| matches!(e, QdiskEvent::Initialized).then_some(()));
    h.send(view(&[(1, 5)], 4)).unwrap();
    wait(&h, "votes", |e| matches!(e, QdiskEvent::Votes { .. }).then_some(()));
    faults.always(Op::Write, Fault::Hang);
    assert!(faults.wait_hanging(1, LIMIT));
    let hung = Instant::now();
    wait(&h, "lost", |e| matches!(e, QdiskEvent::Disk(DiskState::Lost)).then_some(()));
    // S is 400 ms; it counts from a renewal before the hang.
    assert!(hung.elapsed() < Duration::from_secs(2), "{:?}", hung.elapsed());
    faults.clear();
    faults.release();
    wait(&h, "ok", |e| matches!(e, QdiskEvent::Disk(DiskState::Ok)).then_some(()));
    wait(&h, "votes", |e| matches!(e, QdiskEvent::Votes { .. }).then_some(()));
    // All that was ever written by this node lies in its own two slots.
    for l in mem.log().iter().filter(|l| &*l.who == "node1") {
        if let Some((offset, data)) = l.write() {
            let end = offset + data.len() as u64;
            let own =
                [classic_offset(1), ext_offset(1)].iter().any(|&s| offset >= s && end <= s + SLOT as u64);
            assert!(own, "a write of {} bytes at {offset}", data.len());
        }
    }
}

#[test]
fn strangers_and_wrong_labels_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(&dir);
    let mut o = options(&disk, 1, 5);
    o.label = Some("other".into());
    assert!(matches!(spawn(o).err().unwrap(), DriverError::Label { .. }));
    let plain = dir.path().join("plain");
    std::fs::File::create(&plain).unwrap().set_len(1 << 20).unwrap();
    let e = spawn(options(plain.to_str().unwrap(), 1, 5)).err().unwrap();
    assert!(matches!(e, DriverError::NotQdisk { .. }), "{e}");
    // A live node with another key on the same disk: the newcomer must not start.
    let a = spawn(options(&disk, 1, 5)).unwrap();
    wait(&a, "initialized", |e| matches!(e, QdiskEvent::Initialized).then_some(()));
    let mut o = options(&disk, 2, 5);
    o.cluster_key = b"another key here".to_vec();
    let b = spawn(o).unwrap();
    wait(&b, "stop", |e| matches!(e, QdiskEvent::Stop(StopWhy::WrongKey { slot: NodeId(1) })).then_some(()));
}

#[test]
fn heuristics_give_the_score() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(&dir);
    let flag = dir.path().join("up");
    std::fs::write(&flag, "").unwrap();
    let mut o = options(&disk, 1, 5);
    o.heuristics = vec![HeuristicSpec {
        program: format!("test -e {}", flag.display()),
        score: 2,
        interval: Duration::from_millis(20),
        tko: 1,
        limit: Duration::from_secs(5),
    }];
    let h = spawn(o).unwrap();
    wait(&h, "initialized", |e| matches!(e, QdiskEvent::Initialized).then_some(()));
    h.send(view(&[(1, 5)], 4)).unwrap();
    wait(&h, "votes", |e| matches!(e, QdiskEvent::Votes { .. }).then_some(()));
    std::fs::remove_file(&flag).unwrap();
    wait(&h, "lost", |e| matches!(e, QdiskEvent::VotesLost { why: crate::VotesWhy::Score }).then_some(()));
    std::fs::write(&flag, "").unwrap();
    wait(&h, "again", |e| matches!(e, QdiskEvent::Votes { .. }).then_some(()));
}
