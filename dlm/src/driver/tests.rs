//! Real members over loopback sockets.

use super::*;
use crate::types::Status;
use cairn_base::{Incarnation, NodeId};
use std::time::Instant;

#[derive(Default)]
struct Seen {
    done: Mutex<Vec<Completion>>,
    blocks: Mutex<Vec<(LockId, Mode)>>,
    plocks: Mutex<BTreeMap<u64, PlockAnswer>>,
    changed: Condvar,
}

impl Callbacks for Seen {
    fn completed(&self, done: Completion) {
        self.done.lock().push(done);
        self.changed.notify_all();
    }
    fn blocked(&self, lock: LockId, _user: u64, mode: Mode) {
        self.blocks.lock().push((lock, mode));
    }
    fn plock_done(&self, ticket: u64, answer: PlockAnswer) {
        self.plocks.lock().insert(ticket, answer);
    }
}

impl Seen {
    fn wait(&self, lock: LockId, status: Status) -> Completion {
        let until = Instant::now() + Duration::from_secs(10);
        let mut d = self.done.lock();
        loop {
            if let Some(i) = d.iter().position(|c| c.lock == lock) {
                let c = d.remove(i);
                assert_eq!(c.status, status);
                return c;
            }
            assert!(!self.changed.wait_until(&mut d, until).timed_out(), "no completion of {lock:?}");
        }
    }
}

fn until(what: &str, mut f: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !f() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn cluster(n: u16, key: &[u8]) -> (Vec<Arc<Node>>, Vec<Arc<Seen>>) {
    let nodes: Vec<_> = (1..=n)
        .map(|i| {
            let me = Proc { node: NodeId(i), incarnation: Incarnation(7) };
            Node::start(NodeConfig {
                core: Config::new(me),
                bind: "127.0.0.1:0".parse().unwrap(),
                cluster: "c".into(),
                lockspace: "fs".into(),
                key: key.to_vec(),
            })
            .unwrap()
        })
        .collect();
    let seen: Vec<_> = nodes
        .iter()
        .map(|n| {
            let s = Arc::new(Seen::default());
            n.set_callbacks(s.clone());
            s
        })
        .collect();
    (nodes, seen)
}

fn view(id: u64, nodes: &[Arc<Node>]) -> View {
    View {
        id: ViewId(id),
        members: nodes.iter().map(|n| (n.me(), n.address())).collect(),
        left_clean: Vec::new(),
    }
}

#[test]
fn locks_move_between_members_and_survive_broken_connections_and_a_death() {
    let (nodes, seen) = cluster(3, b"key");
    for n in &nodes {
        n.set_view(view(1, &nodes)).unwrap();
    }
    let name = ResName::root_of(b"       2             926").unwrap();
    let mut held: Option<(usize, LockId)> = None;
    for round in 0..60 {
        let i = round % 3;
        let id = nodes[i].request(&name, Mode::EX, Flags::VALBLK, 0, None).unwrap();
        if let Some((h, old)) = held {
            until("blocking callback", || seen[h].blocks.lock().iter().any(|(l, _)| *l == old));
            let mut v = [0; 32];
            v[0] = round as u8;
            nodes[h].unlock(old, Flags::VALBLK, Some(&v)).unwrap();
            seen[h].wait(old, Status::Unlocked);
        }
        seen[i].wait(id, Status::Granted);
        held = Some((i, id));
        if round % 7 == 3 {
            nodes[i].links.break_all();
        }
    }
    // The last holder dies: what it held stays blocked until it is fenced and recovered.
    let (h, _) = held.unwrap();
    let dead = nodes[h].me();
    nodes[h].shutdown();
    let rest: Vec<_> = nodes.iter().filter(|n| n.me() != dead).cloned().collect();
    let rest_seen: Vec<_> = (0..3).filter(|i| *i != h).map(|i| seen[i].clone()).collect();
    for n in &rest {
        n.set_view(view(2, &rest)).unwrap();
    }
    let id = rest[0].request(&name, Mode::PR, Flags::NONE, 0, None).unwrap();
    for n in &rest {
        assert!(n.wait_settled(Duration::from_secs(10)));
        n.fenced(dead);
    }
    let replay = rest[1].request(&name, Mode::EX, Flags::RECOVERY | Flags::NOQUEUE, 0, None).unwrap();
    until("an answer to the replayer", || rest_seen[1].done.lock().iter().any(|c| c.lock == replay));
    assert!(!rest_seen[0].done.lock().iter().any(|c| c.lock == id), "granted through a shut gate");
    rest_seen[1].done.lock().retain(|c| {
        if c.lock == replay && c.status == Status::Granted {
            rest[1].unlock(replay, Flags::NONE, None).unwrap();
        }
        c.lock != replay
    });
    rest[1].recovered(dead);
    rest_seen[0].wait(id, Status::Granted);
    for n in &rest {
        n.shutdown();
    }
}

#[test]
fn a_peer_with_another_key_never_connects() {
    let (a, _) = cluster(1, b"one");
    let me = Proc { node: NodeId(9), incarnation: Incarnation(1) };
    let b = Node::start(NodeConfig {
        core: Config::new(me),
        bind: "127.0.0.1:0".parse().unwrap(),
        cluster: "c".into(),
        lockspace: "fs".into(),
        key: b"two".to_vec(),
    })
    .unwrap();
    let both = [a[0].clone(), b.clone()];
    for n in &both {
        n.set_view(view(1, &both)).unwrap();
    }
    assert!(!a[0].wait_settled(Duration::from_millis(400)), "an unauthenticated peer took part in a rebuild");
    assert!(a[0].links.handshakes_failed() > 0 || b.links.handshakes_failed() > 0);
    a[0].shutdown();
    b.shutdown();
}

#[test]
fn byte_ranges_conflict_across_members_and_circles_are_refused() {
    let (nodes, seen) = cluster(2, b"key");
    for n in &nodes {
        n.set_view(view(1, &nodes)).unwrap();
    }
    let f = |i: u8| ResName::root_of(&[b'p', i]).unwrap();
    let range = PlockRange { owner: 1, pid: 10, start: 0, end: 9, write: true };
    let get = |i: usize, t: u64| {
        let mut a = None;
        until("an answer", || {
            a = seen[i].plocks.lock().remove(&t);
            a.is_some()
        });
        a.unwrap()
    };
    for i in 0..2 {
        let t = nodes[i].plock_lock(&f(i as u8), range, false, |_| {}).unwrap();
        assert_eq!(get(i, t), PlockAnswer::Granted);
    }
    let t = nodes[1].plock_test(&f(0), range, |_| {}).unwrap();
    assert!(matches!(get(1, t), PlockAnswer::Tested(Some(c)) if c.who == nodes[0].me()));
    let t0 = nodes[0].plock_lock(&f(1), range, true, |_| {}).unwrap();
    until("the first waits", || nodes.iter().map(|n| n.inner.lock().core.plock_waits()).sum::<usize>() == 1);
    let t1 = nodes[1].plock_lock(&f(0), range, true, |_| {}).unwrap();
    assert_eq!(get(1, t1), PlockAnswer::Deadlock);
    let t = nodes[1].plock_unlock(&f(1), range, |_| {}).unwrap();
    assert_eq!(get(1, t), PlockAnswer::Granted);
    assert_eq!(get(0, t0), PlockAnswer::Granted);
    for n in &nodes {
        n.shutdown();
    }
}

/// Figures for a person; fails only when something is absurd.
#[test]
fn speed_of_local_and_remote_locks() {
    let (nodes, seen) = cluster(2, b"key");
    for n in &nodes {
        n.set_view(view(1, &nodes)).unwrap();
    }
    for n in &nodes {
        assert!(n.wait_settled(Duration::from_secs(10)));
    }
    let name = ResName::root_of(b"       2             926").unwrap();
    let keep = nodes[0].request(&name, Mode::NL, Flags::NONE, 0, None).unwrap();
    seen[0].wait(keep, Status::Granted);
    let n = 200_000;
    let begin = Instant::now();
    for _ in 0..n {
        let id = nodes[0].request(&name, Mode::EX, Flags::NONE, 0, None).unwrap();
        nodes[0].unlock(id, Flags::NONE, None).unwrap();
        seen[0].done.lock().clear();
    }
    eprintln!("local lock+unlock: {:.0} pairs/s", f64::from(n) / begin.elapsed().as_secs_f64());
    let id = nodes[1].request(&name, Mode::NL, Flags::NONE, 0, None).unwrap();
    seen[1].wait(id, Status::Granted);
    let n = 2000;
    let begin = Instant::now();
    for _ in 0..n {
        nodes[1].convert(id, Mode::EX, Flags::NONE, None, None).unwrap();
        seen[1].wait(id, Status::Granted);
        nodes[1].convert(id, Mode::NL, Flags::NONE, None, None).unwrap();
        seen[1].wait(id, Status::Granted);
    }
    eprintln!("remote NL->EX->NL: {:.1} us each", begin.elapsed().as_secs_f64() * 1e6 / f64::from(n));
    for n in &nodes {
        n.shutdown();
    }
}
