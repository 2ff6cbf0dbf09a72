use super::*;
use crate::lockspace::local::LocalSpace;
use crate::lockspace::shared::SharedSpace;
use std::sync::atomic::{AtomicI64, AtomicUsize};
use std::sync::mpsc::channel;

const A: GlockName = GlockName { ty: GlockType::Inode, number: 100 };
const B: GlockName = GlockName { ty: GlockType::Inode, number: 50 };
const LONG: Duration = Duration::from_secs(10);

fn mount(space: &Arc<SharedSpace>) -> Arc<Glocks> {
    Glocks::new(space.join().1)
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {LONG:?}: {what}");
        std::thread::yield_now();
    }
}

/// Counts releases and instantiations, and notices users during a release.
#[derive(Default)]
struct Recorder {
    released: Mutex<Vec<(LockState, LockState)>>,
    instantiated: AtomicUsize,
    fail: AtomicBool,
}

impl GlockOps for Recorder {
    fn release(&self, _glock: &Arc<Glock>, from: LockState, to: LockState) -> Result<()> {
        self.released.lock().push((from, to));
        if self.fail.load(Ordering::Relaxed) { Err(Error::Errno(libc::EIO)) } else { Ok(()) }
    }

    fn instantiate(&self, _glock: &Arc<Glock>, _state: LockState) -> Result<()> {
        self.instantiated.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn mode_stays_cached_after_the_last_holder_and_is_read_once() {
    let glocks = Glocks::new(LocalSpace::new());
    let ops = Arc::new(Recorder::default());
    glocks.set_ops(ops.clone());
    for _ in 0..3 {
        drop(glocks.acquire(A, LockState::Shared, AcquireFlags::NONE).unwrap());
    }
    drop(glocks.acquire(A, LockState::Exclusive, AcquireFlags::NONE).unwrap());
    assert_eq!(glocks.get(A).state(), LockState::Exclusive);
    assert_eq!(ops.instantiated.load(Ordering::Relaxed), 1);
    glocks.release_all(LONG).unwrap();
    assert_eq!(*ops.released.lock(), [(LockState::Exclusive, LockState::Unlocked)]);
}

#[test]
fn local_exclusive_excludes_and_shared_and_node_scope_share() {
    let glocks = Glocks::new(LocalSpace::new());
    let try_for =
        |state, flags| glocks.acquire(A, state, AcquireFlags::TRY | flags).map(drop).map_err(|e| e.errno());
    let shared = glocks.acquire(A, LockState::Shared, AcquireFlags::NONE).unwrap();
    assert_eq!(try_for(LockState::Shared, AcquireFlags::NONE), Ok(()));
    assert_eq!(try_for(LockState::Exclusive, AcquireFlags::NONE), Err(libc::EAGAIN));
    drop(shared);
    let scoped = glocks.acquire(A, LockState::Exclusive, AcquireFlags::NODE_SCOPE).unwrap();
    assert_eq!(try_for(LockState::Exclusive, AcquireFlags::NODE_SCOPE), Ok(()));
    assert_eq!(try_for(LockState::Exclusive, AcquireFlags::NONE), Err(libc::EAGAIN));
    assert_eq!(try_for(LockState::Shared, AcquireFlags::NONE), Err(libc::EAGAIN));
    drop(scoped);
    let pin = glocks.acquire(A, LockState::Exclusive, AcquireFlags::PIN).unwrap();
    assert_eq!(try_for(LockState::Exclusive, AcquireFlags::NONE), Ok(()));
    drop(pin);
}

#[test]
fn nowait_thread_never_waits_and_disturbs_nobody() {
    let space = SharedSpace::new();
    let (one, two) = (mount(&space), mount(&space));
    let held = one.acquire(A, LockState::Exclusive, AcquireFlags::NONE).unwrap();
    let refused = nowait(|| two.acquire(A, LockState::Shared, AcquireFlags::NONE));
    assert!(matches!(refused, Err(Error::WouldBlock)));
    assert!(!held.glock().is_wanted(), "a no-wait request reached the other node");
    let cached = nowait(|| one.acquire(B, LockState::Shared, AcquireFlags::NONE));
    assert!(matches!(cached, Err(Error::WouldBlock)), "not cached yet");
}

#[test]
fn other_node_gets_the_lock_after_the_holder_and_the_release() {
    let space = SharedSpace::new();
    let (one, two) = (mount(&space), mount(&space));
    let ops = Arc::new(Recorder::default());
    one.set_ops(ops.clone());
    let held = one.acquire(A, LockState::Exclusive, AcquireFlags::NONE).unwrap();
    let (send, granted) = channel();
    let waiter = std::thread::spawn({
        let two = Arc::clone(&two);
        move || {
            let holder = two.acquire(A, LockState::Shared, AcquireFlags::NONE).unwrap();
            send.send(()).unwrap();
            drop(holder);
        }
    });
    until("callback", || held.glock().is_wanted());
    assert!(granted.try_recv().is_err());
    drop(held);
    granted.recv_timeout(LONG).unwrap();
    waiter.join().unwrap();
    assert_eq!(*ops.released.lock(), [(LockState::Exclusive, LockState::Shared)]);
    assert_eq!(one.get(A).state(), LockState::Shared);
}

#[test]
fn failed_release_keeps_the_lock() {
    let space = SharedSpace::new();
    let (one, two) = (mount(&space), mount(&space));
    let ops = Arc::new(Recorder::default());
    ops.fail.store(true, Ordering::Relaxed);
    one.set_ops(ops.clone());
    drop(one.acquire(A, LockState::Exclusive, AcquireFlags::NONE).unwrap());
    let token = Arc::new(CancelToken::default());
    let waiter = std::thread::spawn({
        let (two, token) = (Arc::clone(&two), Arc::clone(&token));
        move || token.scope(|| two.acquire(A, LockState::Exclusive, AcquireFlags::NONE).map(drop))
    });
    until("failed release", || !ops.released.lock().is_empty());
    until("stuck", || format!("{:?}", one.get(A)).contains("Stuck"));
    assert_eq!(one.get(A).state(), LockState::Exclusive);
    assert!(one.acquire(A, LockState::Shared, AcquireFlags::NONE).is_err());
    token.cancel();
    assert!(matches!(waiter.join().unwrap(), Err(Error::Interrupted)));
}

#[test]
fn value_block_travels_with_the_lock_and_dies_with_its_writer() {
    let space = SharedSpace::new();
    let (id, one) = space.join();
    let one = Glocks::new(one);
    let two = mount(&space);
    let holder = one.acquire(A, LockState::Exclusive, AcquireFlags::NONE).unwrap();
    assert_eq!(holder.lvb(), None);
    holder.set_lvb([7; 32]);
    drop(holder);
    let holder = two.acquire(A, LockState::Exclusive, AcquireFlags::NONE).unwrap();
    assert_eq!(holder.lvb(), Some([7; 32]));
    drop(holder);
    drop(one.acquire(A, LockState::Exclusive, AcquireFlags::NONE).unwrap());
    space.kill(id);
    let journal = GlockName { ty: GlockType::Journal, number: 1 };
    drop(two.acquire(journal, LockState::Exclusive, AcquireFlags::TRY | AcquireFlags::RECOVERY).unwrap());
    let waiter = std::thread::spawn(move || {
        let holder = two.acquire(A, LockState::Shared, AcquireFlags::NONE).unwrap();
        holder.lvb()
    });
    space.fenced(id);
    assert!(!waiter.is_finished(), "an inode lock of a dead node was granted before the replay");
    space.recovered(id);
    assert_eq!(waiter.join().unwrap(), None);
}

#[test]
fn two_nodes_that_upgrade_at_the_same_time_both_get_there() {
    let space = SharedSpace::new();
    let mounts = [mount(&space), mount(&space)];
    for round in 0..200 {
        let threads: Vec<_> = mounts
            .iter()
            .map(|glocks| {
                let glocks = Arc::clone(glocks);
                std::thread::spawn(move || {
                    drop(glocks.acquire(A, LockState::Shared, AcquireFlags::NONE).unwrap());
                    drop(glocks.acquire(A, LockState::Exclusive, AcquireFlags::NONE).unwrap());
                })
            })
            .collect();
        until(&format!("round {round}"), || threads.iter().all(|t| t.is_finished()));
    }
}

#[test]
fn exclusive_holders_of_three_nodes_never_overlap_and_all_advance() {
    let space = SharedSpace::new();
    let inside = Arc::new(AtomicI64::new(0));
    let turns = Arc::new(AtomicUsize::new(0));
    // A mount that ends without giving its locks back would leave the others waiting.
    let mounts: Vec<_> = (0..3).map(|_| mount(&space)).collect();
    let threads: Vec<_> = (0..6)
        .map(|n| {
            let (inside, turns) = (Arc::clone(&inside), Arc::clone(&turns));
            let glocks = Arc::clone(&mounts[n % 3]);
            std::thread::spawn(move || {
                for turn in 0..150 {
                    if (turn + n) % 3 == 0 {
                        let holder = glocks.acquire(A, LockState::Shared, AcquireFlags::NONE).unwrap();
                        assert!(inside.load(Ordering::SeqCst) == 0, "a writer beside a reader");
                        drop(holder);
                    } else {
                        let holder = glocks.acquire(A, LockState::Exclusive, AcquireFlags::NONE).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        turns.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                        drop(holder);
                    }
                }
            })
        })
        .collect();
    until("all threads", || threads.iter().all(|t| t.is_finished()));
    assert_eq!(turns.load(Ordering::SeqCst), 600);
    assert!(space.violations().is_empty());
}

/// Takes time to give a lock up, as one that must flush the log does.
struct Slow(Duration);

impl GlockOps for Slow {
    fn release(&self, _glock: &Arc<Glock>, from: LockState, _to: LockState) -> Result<()> {
        if from == LockState::Exclusive {
            std::thread::sleep(self.0);
        }
        Ok(())
    }

    fn instantiate(&self, _glock: &Arc<Glock>, _state: LockState) -> Result<()> {
        Ok(())
    }
}

/// One thread that does one operation after the other keeps the mode for many of them, though it has no holder in between, and though another
/// node asks all the time; and that node gets it again and again.
#[test]
fn a_mode_in_steady_use_is_kept_for_as_long_as_giving_it_up_takes() {
    const TURNS: u64 = 40;
    let space = SharedSpace::new();
    let (a, b) = (mount(&space), mount(&space));
    a.set_ops(Arc::new(Slow(Duration::from_millis(5))));
    let ended = AtomicBool::new(false);
    let (uses, demotions) = std::thread::scope(|s| {
        let user = s.spawn(|| {
            let mut uses = 0_u64;
            while !ended.load(Ordering::Relaxed) {
                drop(a.acquire(A, LockState::Exclusive, AcquireFlags::NONE).unwrap());
                uses += 1;
            }
            uses
        });
        for _ in 0..TURNS {
            drop(b.acquire(A, LockState::Shared, AcquireFlags::NOCACHE).unwrap());
            until("the first node's turn", || a.get(A).state() == LockState::Exclusive);
        }
        ended.store(true, Ordering::Relaxed);
        (user.join().unwrap(), a.get(A).stats.demotions.load(Ordering::Relaxed))
    });
    assert!(demotions >= TURNS / 2, "{demotions} demotions");
    assert!(uses > 10 * demotions, "{uses} uses in {demotions} turns");
    assert!(space.violations().is_empty());
}

#[test]
fn several_glocks_in_opposite_orders_do_not_deadlock() {
    let space = SharedSpace::new();
    let mounts: Vec<_> = (0..4).map(|_| mount(&space)).collect();
    let threads: Vec<_> = (0..4)
        .map(|n| {
            let glocks = Arc::clone(&mounts[n]);
            std::thread::spawn(move || {
                for _ in 0..60 {
                    if n % 2 == 0 {
                        // Parent before child, against the order of numbers.
                        let parent = glocks.acquire(A, LockState::Exclusive, AcquireFlags::NONE).unwrap();
                        let child = glocks.acquire(B, LockState::Exclusive, AcquireFlags::TRY);
                        drop((parent, child));
                    } else {
                        let both = glocks
                            .acquire_all(&[
                                (A, LockState::Exclusive),
                                (B, LockState::Shared),
                                (A, LockState::Shared),
                            ])
                            .unwrap();
                        assert_eq!(both.len(), 2);
                        assert_eq!(both[1].state(), LockState::Exclusive);
                    }
                }
            })
        })
        .collect();
    until("all threads", || threads.iter().all(|t| t.is_finished()));
    for thread in threads {
        thread.join().unwrap();
    }
}

/// While caches are dropped: write-back enters at once, page requests only through a window, others wait.
#[test]
fn gate_lets_in_write_back_always_and_pages_through_a_window() {
    struct Kernel(Mutex<Option<std::sync::mpsc::Sender<()>>>, Mutex<std::sync::mpsc::Receiver<bool>>);
    impl KernelCache for Kernel {
        fn drop_caches(&self, glock: &Arc<Glock>, _from: LockState, _to: LockState) {
            if let Some(started) = self.0.lock().take() {
                started.send(()).unwrap();
                let go_on = self.1.lock();
                assert!(go_on.recv().unwrap());
                glock.begin_pass(Duration::from_millis(1));
                assert!(go_on.recv().unwrap());
                glock.end_pass();
            }
        }
    }
    let space = SharedSpace::new();
    let (one, two) = (mount(&space), mount(&space));
    let (started, begun) = channel();
    let (go, go_on) = channel();
    one.set_kernel_cache(Arc::new(Kernel(Mutex::new(Some(started)), Mutex::new(go_on))));
    drop(one.acquire(A, LockState::Exclusive, AcquireFlags::NONE).unwrap());
    let other = std::thread::spawn({
        let two = Arc::clone(&two);
        move || two.acquire(A, LockState::Exclusive, AcquireFlags::NONE).map(drop)
    });
    begun.recv_timeout(LONG).unwrap();
    let as_class = |class, state| {
        let one = Arc::clone(&one);
        std::thread::spawn(move || {
            as_request(A, class, false, || one.acquire(A, state, AcquireFlags::NONE).map(drop))
        })
    };
    as_class(Class::WriteBack, LockState::Exclusive).join().unwrap().unwrap();
    let page = as_class(Class::Page, LockState::Shared);
    let ordinary = as_class(Class::Ordinary, LockState::Shared);
    until("both queue", || format!("{:?}", one.get(A)).contains("waiting 2"));
    go.send(true).unwrap();
    page.join().unwrap().unwrap();
    assert!(!other.is_finished() && !ordinary.is_finished());
    go.send(true).unwrap();
    other.join().unwrap().unwrap();
    ordinary.join().unwrap().unwrap();
}

#[test]
fn withdrawn_mount_answers_at_once() {
    let space = SharedSpace::new();
    let (one, two) = (mount(&space), mount(&space));
    let _held = two.acquire(A, LockState::Exclusive, AcquireFlags::NONE).unwrap();
    let waiter = std::thread::spawn({
        let one = Arc::clone(&one);
        move || one.acquire(A, LockState::Shared, AcquireFlags::NONE).map(drop)
    });
    until("waiting", || format!("{:?}", one.get(A)).contains("waiting 1"));
    one.withdraw("test");
    assert!(matches!(waiter.join().unwrap(), Err(Error::Withdrawn(_))));
    assert!(matches!(one.acquire(B, LockState::Shared, AcquireFlags::NONE), Err(Error::Withdrawn(_))));
}

#[test]
fn wait_inside_a_transaction_is_a_bug() {
    let space = SharedSpace::new();
    let one = mount(&space);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _transaction = transaction_scope();
        one.acquire(A, LockState::Shared, AcquireFlags::NONE).map(drop)
    }));
    assert!(caught.is_err());
    drop(one.acquire(A, LockState::Shared, AcquireFlags::NONE).unwrap());
    let _transaction = transaction_scope();
    drop(one.acquire(A, LockState::Shared, AcquireFlags::NONE).unwrap());
}
