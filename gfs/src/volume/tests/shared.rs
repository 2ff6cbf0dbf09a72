//! Several mounts of one volume, locks handed to and fro.

use super::rig::{self, Rig, fsck, volume_image};
use super::*;
use crate::glock::{AcquireFlags, Glocks};
use crate::lockspace::LockState;
use crate::lockspace::shared::SharedSpace;
use cairn_base::Rng;
use std::time::Instant;

#[test]
fn two_nodes_see_each_others_files_at_once() {
    let rig = Rig::new(volume_image(1024, 2));
    let space = SharedSpace::new();
    let a = rig.mount_as("a", space.join().1, MountOptions::default()).unwrap();
    let b = rig.mount_as("b", space.join().1, MountOptions::default()).unwrap();
    assert_eq!((a.journal(), b.journal()), (Some(JournalId(0)), Some(JournalId(1))));
    for i in 0..30u64 {
        let (one, other) = if i % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let name = format!("f{}", i % 10);
        match rig::create_file(one, &name, i as u32 % 5, i) {
            Ok(()) => assert_eq!(rig::read_file(other, &name), Some(i as u32 % 5)),
            Err(Error::Errno(libc::EEXIST)) => {
                rig::remove_file(one, &name).unwrap();
                assert_eq!(rig::read_file(other, &name), None);
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert_eq!(rig::names(&a), rig::names(&b));
    assert!(space.violations().is_empty());
    b.unmount().unwrap();
    a.unmount().unwrap();
    fsck(&rig.lun.durable());
}

#[test]
fn a_third_node_is_told_how_to_get_a_journal() {
    let rig = Rig::new(volume_image(4096, 2));
    let space = SharedSpace::new();
    let a = rig.mount(space.join().1, MountOptions::default()).unwrap();
    let b = rig.mount(space.join().1, MountOptions::default()).unwrap();
    let text = rig.mount(space.join().1, MountOptions::default()).err().unwrap().to_string();
    assert!(text.contains("all 2 journals are in use") && text.contains("gfs2_jadd"), "{text}");
    a.unmount().unwrap();
    let c = rig.mount(space.join().1, MountOptions::default()).unwrap();
    assert_eq!(c.journal(), Some(JournalId(0)));
    b.unmount().unwrap();
    c.unmount().unwrap();
}

/// Makes and removes files of its own until `ops` are done; returns those that are left.
pub(super) fn churn(vol: &Arc<Volume>, who: &str, seed: u64, ops: u64) -> Vec<String> {
    let mut rng = Rng::new(seed);
    let mut mine: Vec<String> = Vec::new();
    for i in 0..ops {
        if mine.len() < 4 && rng.chance(2, 3) || mine.is_empty() {
            let name = format!("{who}{i}");
            rig::create_file(vol, &name, rng.below(30) as u32, seed ^ i).unwrap();
            mine.push(name);
        } else {
            let at = rng.below(mine.len() as u64) as usize;
            rig::remove_file(vol, &mine.swap_remove(at)).unwrap();
        }
        if rng.chance(1, 8) {
            vol.log_flush(FlushReason::Fsync).unwrap();
        }
    }
    mine
}

#[test]
fn concurrent_nodes_and_threads_leave_a_volume_that_fsck_accepts() {
    let rig = Rig::new(volume_image(4096, 2));
    let space = SharedSpace::new();
    let options = || MountOptions { commit: Duration::from_millis(200), ..MountOptions::default() };
    let a = rig.mount_as("a", space.join().1, options()).unwrap();
    let b = rig.mount_as("b", space.join().1, options()).unwrap();
    let before = a.statfs().unwrap();
    let threads: Vec<_> = [(&a, "a", 1), (&a, "aa", 2), (&b, "b", 3), (&b, "bb", 4)]
        .map(|(vol, who, seed)| {
            let vol = Arc::clone(vol);
            std::thread::spawn(move || churn(&vol, who, seed, 60))
        })
        .into_iter()
        .collect();
    let mut left: Vec<String> = threads.into_iter().flat_map(|t| t.join().unwrap()).collect();
    left.sort();
    assert_eq!(rig::names(&b), left);
    a.statfs_sync().unwrap();
    b.statfs_sync().unwrap();
    assert_eq!(a.statfs().unwrap().dinodes, before.dinodes + left.len() as u64);
    for name in &left {
        assert!(rig::read_file(&a, name).is_some());
    }
    a.unmount().unwrap();
    b.unmount().unwrap();
    fsck(&rig.lun.durable());
}

/// The last who has it mounted dies, and so does one in the middle of its own mount. Nobody can replay before somebody has mounted: what the
/// dead hold, fenced by now, must not stand in the way of that.
#[test]
fn mounting_does_not_wait_for_a_replay_that_nobody_can_do() {
    let rig = Rig::new(volume_image(1024, 2));
    let space = SharedSpace::new();
    let (first, of_first) = space.join();
    let (second, of_second) = space.join();
    let a = rig.mount_as("a", of_first, MountOptions::default()).unwrap();
    rig::create_file(&a, "kept", 3, 1).unwrap();
    a.log_flush(FlushReason::Fsync).unwrap();
    let mounting = Glocks::new(of_second);
    let lock = mount::nondisk(0);
    let held = mounting.acquire(lock, LockState::Exclusive, AcquireFlags::NONE).unwrap();
    space.kill(first);
    space.kill_with_what_it_mastered(second);
    for member in [first, second] {
        space.fenced(member);
    }
    let (done, mounted) = std::sync::mpsc::channel();
    std::thread::scope(|s| {
        s.spawn(|| done.send(rig.mount_as("b", space.join().1, MountOptions::default())));
        let b = mounted.recv_timeout(Duration::from_secs(20));
        for member in [first, second] {
            space.recovered(member);
        }
        let b = b.expect("it is mounted before the replay").unwrap();
        assert_eq!(rig::read_file(&b, "kept"), Some(3));
        let c = rig.mount_as("c", space.join().1, MountOptions::default()).unwrap();
        assert_eq!(rig::names(&c), ["kept"]);
        assert!(space.violations().is_empty());
        c.unmount().unwrap();
        b.unmount().unwrap();
    });
    drop(held);
    fsck(&rig.lun.durable());
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One dies, and the one that has it mounted beside it, before it has replayed the journal on which a third waits with its mount.
#[test]
fn who_waits_for_a_replay_becomes_first_when_nobody_is_left_to_do_it() {
    let rig = Rig::new(volume_image(1024, 2));
    let space = SharedSpace::new();
    let (leader, of_leader) = space.join();
    let (other, of_other) = space.join();
    let (late, of_late) = space.join();
    let a = rig.mount_as("a", of_leader, MountOptions::default()).unwrap();
    let b = rig.mount_as("b", of_other, MountOptions::default()).unwrap();
    for (vol, name) in [(&a, "by_a"), (&b, "by_b")] {
        rig::create_file(vol, name, 3, 1).unwrap();
        vol.log_flush(FlushReason::Fsync).unwrap();
    }
    space.kill(other);
    space.fenced(other);
    std::thread::scope(|s| {
        let (done, mounted) = std::sync::mpsc::channel();
        let options = MountOptions { first_mounter_wait: Duration::from_secs(40), ..MountOptions::default() };
        let rig = &rig;
        s.spawn(move || done.send(rig.mount_as("c", of_late, options)));
        wait_until("it is not first", || space.held(late, mount::nondisk(5)) == LockState::Shared);
        space.kill(leader);
        // Not proved dead, it may still write: whoever waits has to go on waiting.
        assert!(mounted.recv_timeout(Duration::from_millis(300)).is_err());
        space.fenced(leader);
        let c = mounted.recv_timeout(Duration::from_secs(20));
        for member in [leader, other] {
            space.recovered(member);
        }
        let c = c.expect("it is mounted before the replay").unwrap();
        assert_eq!(rig::names(&c), ["by_a", "by_b"]);
        assert!(space.violations().is_empty());
        c.unmount().unwrap();
    });
    fsck(&rig.lun.durable());
}

/// The one that has it mounted dies, with all that it mastered, while another, which is not first, has still to take the locks of its journal.
#[test]
fn who_is_not_first_does_not_wait_for_a_replay_of_its_own() {
    let rig = Rig::new(volume_image(1024, 2));
    let space = SharedSpace::new();
    let (leader, of_leader) = space.join();
    let (late, of_late) = space.join();
    let a = rig.mount_as("a", of_leader, MountOptions::default()).unwrap();
    rig::create_file(&a, "kept", 3, 1).unwrap();
    a.log_flush(FlushReason::Fsync).unwrap();
    let third = Glocks::new(space.join().1);
    let system = crate::lockspace::GlockName {
        ty: crate::lockspace::GlockType::Inode,
        number: a.superblock().master.addr.0,
    };
    let held = third.acquire(system, LockState::Exclusive, AcquireFlags::NONE).unwrap();
    std::thread::scope(|s| {
        let (done, mounted) = std::sync::mpsc::channel();
        let rig = &rig;
        s.spawn(move || done.send(rig.mount_as("b", of_late, MountOptions::default())));
        wait_until("it is not first", || space.held(late, mount::nondisk(5)) == LockState::Shared);
        space.kill_with_what_it_mastered(leader);
        space.fenced(leader);
        drop(held);
        let b = mounted.recv_timeout(Duration::from_secs(20));
        let is_replayed = b.is_ok();
        if let Ok(Ok(b)) = &b {
            b.recover_journal(JournalId(0)).unwrap().expect("its journal is free");
        }
        space.recovered(leader);
        assert!(is_replayed, "it waits for a replay that only it can do");
        let b = b.unwrap().unwrap();
        assert_eq!(rig::read_file(&b, "kept"), Some(3));
        assert!(space.violations().is_empty());
        b.unmount().unwrap();
    });
    fsck(&rig.lun.durable());
}
