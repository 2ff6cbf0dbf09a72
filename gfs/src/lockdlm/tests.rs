//! Two lock spaces over real nodes and sockets, as two mounts have them.

use super::*;
use cairn_base::{Incarnation, NodeId};
use parking_lot::Condvar;
use std::time::Instant;

#[derive(Default)]
struct Seen {
    done: Mutex<Vec<(GlockName, Result<Granted>)>>,
    blocked: Mutex<Vec<(GlockName, LockState)>>,
    changed: Condvar,
}

impl LockEvents for Seen {
    fn completed(&self, name: GlockName, result: Result<Granted>) {
        self.done.lock().push((name, result));
        self.changed.notify_all();
    }
    fn blocked(&self, name: GlockName, wanted: LockState) {
        self.blocked.lock().push((name, wanted));
    }
}

struct Mount {
    dlm: Dlm,
    space: Arc<dyn LockSpace>,
    seen: Arc<Seen>,
}

const LIMIT: Duration = Duration::from_secs(20);

impl Mount {
    fn start(node: u16) -> Self {
        let me = Proc { node: NodeId(node), incarnation: Incarnation(5) };
        let node = Node::start(NodeConfig {
            core: Config::new(me),
            bind: "127.0.0.1:0".parse().unwrap(),
            cluster: "c".into(),
            lockspace: "fs".into(),
            key: b"key".to_vec(),
        })
        .unwrap();
        let dlm = Dlm::over(node);
        let (space, seen) = (dlm.space(), Arc::new(Seen::default()));
        space.attach(seen.clone());
        Self { dlm, space, seen }
    }

    fn who(&self) -> (Proc, SocketAddr) {
        (self.dlm.0.node.me(), self.dlm.address())
    }

    fn ask(&self, name: GlockName, want: LockState, flags: RequestFlags, lvb: Option<&Lvb>) {
        self.space.request(name, want, flags, lvb);
    }

    fn answer(&self, name: GlockName) -> Result<Granted> {
        let until = Instant::now() + LIMIT;
        let mut done = self.seen.done.lock();
        loop {
            if let Some(i) = done.iter().position(|(n, _)| *n == name) {
                return done.remove(i).1;
            }
            assert!(!self.seen.changed.wait_until(&mut done, until).timed_out(), "no answer for {name}");
        }
    }

    fn lock(&self, name: GlockName, want: LockState, flags: RequestFlags) -> Result<Granted> {
        self.ask(name, want, flags, None);
        self.answer(name)
    }

    fn wait_blocked(&self, name: GlockName) -> LockState {
        let until = Instant::now() + LIMIT;
        loop {
            {
                let mut blocked = self.seen.blocked.lock();
                if let Some(i) = blocked.iter().position(|(n, _)| *n == name) {
                    return blocked.remove(i).1;
                }
            }
            assert!(Instant::now() < until, "nobody called back for {name}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn two() -> [Mount; 2] {
    let mounts = [Mount::start(1), Mount::start(2)];
    let members: Vec<_> = mounts.iter().map(Mount::who).collect();
    for m in &mounts {
        m.dlm.members().set_view(ViewId(7), &members, &[]);
    }
    for m in &mounts {
        m.dlm.settle().unwrap();
    }
    mounts
}

fn inode(number: u64) -> GlockName {
    GlockName { ty: GlockType::Inode, number }
}

const PLAIN: RequestFlags =
    RequestFlags { try_lock: false, try_1cb: false, recovery: false, release_at_fence: false, lvb: false };

#[test]
fn modes_values_tries_and_callbacks_cross_between_mounts() {
    let [a, b] = two();
    let n = inode(0x926);
    let lvb = RequestFlags { lvb: true, ..PLAIN };
    assert_eq!(a.lock(n, LockState::Exclusive, lvb).unwrap().state, LockState::Exclusive);
    let try_once = RequestFlags { try_lock: true, try_1cb: true, ..lvb };
    assert!(matches!(b.lock(n, LockState::Shared, try_once), Err(Error::Errno(libc::EAGAIN))));
    assert_eq!(a.wait_blocked(n), LockState::Shared);
    b.ask(n, LockState::Shared, lvb, None);
    a.ask(n, LockState::Shared, lvb, Some(&[9; 32]));
    assert_eq!(a.answer(n).unwrap().state, LockState::Shared);
    let got = b.answer(n).unwrap();
    assert_eq!((got.state, got.lvb), (LockState::Shared, Some([9; 32])));
    // Both want EX: one is told to begin again.
    a.ask(n, LockState::Exclusive, lvb, None);
    assert_eq!(b.wait_blocked(n), LockState::Exclusive);
    assert!(matches!(b.lock(n, LockState::Exclusive, lvb), Err(Error::Errno(libc::EDEADLK))));
    assert_eq!(b.lock(n, LockState::Unlocked, lvb).unwrap().state, LockState::Unlocked);
    assert_eq!(a.answer(n).unwrap().state, LockState::Exclusive);
    // A waiting request is given up.
    b.ask(n, LockState::Exclusive, lvb, None);
    b.space.cancel(n);
    assert!(matches!(b.answer(n), Err(Error::Interrupted)));
    assert_eq!(a.lock(n, LockState::Unlocked, lvb).unwrap().state, LockState::Unlocked);
    for m in [&a, &b] {
        m.dlm.leave();
    }
}

#[test]
fn what_a_dead_mount_held_waits_for_fence_and_replay_and_the_rest_goes_on() {
    let [a, b] = two();
    let (held, free, journal) = (inode(1), inode(2), GlockName { ty: GlockType::Journal, number: 1 });
    let at_fence = RequestFlags { release_at_fence: true, ..PLAIN };
    // A resource that the survivor has a hand in, one of its own, and the journal.
    assert!(a.lock(free, LockState::Exclusive, PLAIN).is_ok());
    assert!(b.lock(held, LockState::Exclusive, PLAIN).is_ok());
    assert!(b.lock(journal, LockState::Exclusive, at_fence).is_ok());
    let dead = b.who().0;
    b.dlm.0.node.shutdown();
    a.dlm.members().set_view(ViewId(9), &[a.who()], &[]);
    a.dlm.settle().unwrap();
    a.ask(held, LockState::Shared, PLAIN, None);
    let replay = RequestFlags { try_lock: true, recovery: true, release_at_fence: true, ..PLAIN };
    assert!(matches!(a.lock(journal, LockState::Exclusive, replay), Err(Error::Errno(libc::EAGAIN))));
    assert!(a.lock(free, LockState::Shared, PLAIN).is_ok());
    a.dlm.members().fenced(dead);
    assert_eq!(a.lock(journal, LockState::Exclusive, replay).unwrap().state, LockState::Exclusive);
    assert!(a.seen.done.lock().is_empty(), "granted before the replay");
    a.dlm.members().recovered(dead);
    assert_eq!(a.answer(held).unwrap().state, LockState::Shared);
}
