//! Whole mounts against power cuts and dead nodes: what fsync acknowledged is there, the rest is whole, the volume is consistent.

use super::rig::{self, Rig, fsck, volume_image};
use super::shared::churn;
use super::*;
use crate::lockspace::shared::SharedSpace;
use crate::lockspace::{GlockName, Granted, LockEvents, LockState, RequestFlags};
use crate::volume::mount::journal_glock;
use cairn_base::Rng;
use lun::image::Image;
use lun::mem::Keep;
use std::collections::BTreeMap;
use std::sync::mpsc;

/// Mounts the image as the first and only node, looks at it, unmounts, and lets fsck judge. Returns the names with their blocks.
fn recovered_names(image: Image, judge: bool) -> BTreeMap<String, u32> {
    let rig = Rig::new(image);
    let vol = rig.mount(SharedSpace::new().join().1, MountOptions::default()).unwrap();
    let names = rig::names(&vol)
        .into_iter()
        .map(|n| {
            let blocks = rig::read_file(&vol, &n).unwrap();
            (n, blocks)
        })
        .collect();
    vol.unmount().unwrap();
    if judge {
        fsck(&rig.lun.durable());
    }
    names
}

#[test]
fn a_power_cut_at_any_write_leaves_a_consistent_volume_with_everything_that_was_synced() {
    for seed in 0..3 {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let rig = Rig::new(volume_image(4096, 1));
        let vol = rig.mount(LocalSpace::new(), MountOptions::default()).unwrap();
        // states of the directory after each operation, and (log length, state) of acknowledged flushes
        let mut now: BTreeMap<String, u32> = BTreeMap::new();
        let mut states = vec![now.clone()];
        let mut synced = vec![(0usize, 0usize)];
        for i in 0..40u64 {
            if now.len() < 6 && rng.chance(2, 3) || now.is_empty() {
                let (name, blocks) = (format!("f{i}"), rng.below(40) as u32);
                rig::create_file(&vol, &name, blocks, i).unwrap();
                now.insert(name, blocks);
            } else {
                let name = now.keys().nth(rng.below(now.len() as u64) as usize).unwrap().clone();
                rig::remove_file(&vol, &name).unwrap();
                now.remove(&name);
            }
            states.push(now.clone());
            if rng.chance(1, 4) {
                vol.log_flush(FlushReason::Fsync).unwrap();
                synced.push((rig.lun.log_len(), states.len() - 1));
            }
            if rng.chance(1, 10) {
                vol.log().unwrap().flush_and_empty(FlushReason::LogSpace).unwrap();
                synced.push((rig.lun.log_len(), states.len() - 1));
            }
        }
        let trace = rig.lun.trace();
        let points = trace.log.len();
        let mut judged = 0;
        let mut pick = rng.fork(1);
        for n in (0..=points).filter(|_| pick.chance(60, points as u64)) {
            let point = trace.point(n);
            let open = point.unflushed().len();
            let keep = match rng.below(3) {
                0 => Keep::Nothing,
                1 => Keep::Everything,
                _ => Keep::Subset((0..open).filter(|_| rng.chance(1, 2)).collect()),
            };
            judged += 1;
            let names = recovered_names(point.image(&keep), judged % 4 == 0);
            let floor = synced.iter().rev().find(|s| s.0 <= n).map_or(0, |s| s.1);
            assert!(
                states[floor..].contains(&names),
                "crash at {n}, {keep:?}: {names:?} is no state since {floor}"
            );
        }
        assert!(judged > 20);
    }
}

#[test]
fn a_survivor_replays_the_dead_nodes_journal_and_goes_on() {
    for seed in 0..4 {
        println!("seed {seed}");
        let rig = Rig::new(volume_image(4096, 2));
        let space = SharedSpace::new();
        let a = rig.mount_as("a", space.join().1, MountOptions::default()).unwrap();
        let (dead, end) = space.join();
        let b = rig.mount_as("b", end, MountOptions::default()).unwrap();
        let before = a.statfs().unwrap();
        churn(&a, "a", seed, 20);
        let of_b = churn(&b, "b", seed + 50, 25);
        b.log_flush(FlushReason::Fsync).unwrap();
        // not synced: may be there or not, whole or not at all
        rig::create_file(&b, "late", 9, 1).unwrap();

        space.kill(dead);
        b.disk().withdraw("killed by the test");
        assert!(a.recover_journal(JournalId(0)).unwrap().is_none(), "our own journal is in use");
        space.fenced(dead);
        let done = a.recover_journal(JournalId(1)).unwrap().expect("the journal is free");
        assert!(!done.clean && done.replay.metadata_replayed > 0);
        // the lock of the first time may still be on its way back
        let again = (0..100).find_map(|_| {
            let done = a.recover_journal(JournalId(1)).unwrap();
            if done.is_none() {
                std::thread::sleep(Duration::from_millis(20));
            }
            done
        });
        assert!(again.expect("the journal is free again").clean, "nothing to do");
        space.recovered(dead);

        for name in &of_b {
            assert!(rig::read_file(&a, name).is_some(), "{name} was synced");
        }
        let left = churn(&a, "c", seed + 90, 20);
        // file data goes to its place with the flush, and is read from there
        a.sync().unwrap();
        assert!(left.iter().all(|n| rig::read_file(&a, n).is_some()));
        a.statfs_sync().unwrap();
        let names = rig::names(&a);
        assert_eq!(
            a.statfs().unwrap().dinodes,
            before.dinodes + names.len() as u64,
            "the dead node's deltas are in the totals"
        );

        let b2 = rig.mount_as("b2", space.join().1, MountOptions::default()).unwrap();
        assert_eq!(b2.journal(), Some(JournalId(1)));
        assert_eq!(rig::names(&b2), names);
        b2.unmount().unwrap();
        a.unmount().unwrap();
        fsck(&rig.lun.durable());
        drop(b);
    }
}

#[test]
fn a_crash_of_all_nodes_at_any_moment_is_healed_by_the_first_mounter() {
    for seed in 0..3u64 {
        println!("seed {seed}");
        let rig = Rig::new(volume_image(4096, 2));
        let space = SharedSpace::new();
        let a = rig.mount_as("a", space.join().1, MountOptions::default()).unwrap();
        let b = rig.mount_as("b", space.join().1, MountOptions::default()).unwrap();
        let mut rng = Rng::new(seed);
        let threads: Vec<_> = [(&a, "a"), (&b, "b")]
            .map(|(vol, who)| {
                let vol = Arc::clone(vol);
                std::thread::spawn(move || drop(churn(&vol, who, seed + who.len() as u64, 25)))
            })
            .into_iter()
            .collect();
        for t in threads {
            t.join().unwrap();
        }
        let trace = rig.lun.trace();
        let points = trace.log.len();
        let mut pick = rng.fork(1);
        for n in (0..=points).filter(|_| pick.chance(25, points as u64)) {
            let point = trace.point(n);
            let open = point.unflushed().len();
            let keep = Keep::Subset((0..open).filter(|_| rng.chance(1, 2)).collect());
            println!("crash at {n} of {points}");
            recovered_names(point.image(&keep), true);
        }
        drop((a, b));
    }
}

/// A member of the lock space that has a journal's lock and says when somebody waits for it.
struct Leaver {
    granted: mpsc::Sender<()>,
    wanted: mpsc::Sender<Option<Arc<Volume>>>,
}

impl LockEvents for Leaver {
    fn completed(&self, _: GlockName, result: Result<Granted>) {
        result.unwrap();
        self.granted.send(()).unwrap();
    }

    fn blocked(&self, name: GlockName, _: LockState) {
        assert_eq!(name, journal_glock(JournalId(1)));
        let _ = self.wanted.send(None);
    }
}

#[test]
fn the_first_mounter_waits_for_the_lock_of_a_journal_rather_than_passing_over_it() {
    let rig = Rig::new(volume_image(4096, 2));
    let space = SharedSpace::new();
    let a = rig.mount_as("a", space.join().1, MountOptions::default()).unwrap();
    let b = rig.mount_as("b", space.join().1, MountOptions::default()).unwrap();
    rig::create_file(&b, "synced", 3, 7).unwrap();
    b.log_flush(FlushReason::Fsync).unwrap();
    assert_eq!(b.journal(), Some(JournalId(1)));
    let dead = Rig::new(rig.lun.crash_point().image(&Keep::Nothing));

    // the lock of journal 1 is not free yet when the next one mounts as the first
    let space = SharedSpace::new();
    let (number, leaver) = space.join();
    let (granted, is_granted) = mpsc::channel();
    let (wanted, news) = mpsc::channel();
    leaver.attach(Arc::new(Leaver { granted, wanted: wanted.clone() }));
    leaver.request(journal_glock(JournalId(1)), LockState::Exclusive, RequestFlags::default(), None);
    is_granted.recv().unwrap();
    let c = std::thread::scope(|s| {
        s.spawn(|| wanted.send(Some(dead.mount(space.join().1, MountOptions::default()).unwrap())).unwrap());
        assert!(news.recv().unwrap().is_none(), "mounted with a journal that is not replayed");
        space.leave(number);
        news.recv().unwrap().expect("one callback, then the mount")
    });
    assert!(rig::read_file(&c, "synced").is_some(), "what journal 1 knew is there");
    c.unmount().unwrap();
    drop((a, b));
}

#[test]
fn a_crash_in_the_middle_of_recovery_is_healed_by_recovering_again() {
    let rig = Rig::new(volume_image(1024, 1));
    let vol = rig.mount(LocalSpace::new(), MountOptions::default()).unwrap();
    for i in 0..8u64 {
        rig::create_file(&vol, &format!("f{i}"), 5, i).unwrap();
    }
    vol.sync().unwrap();
    let image = rig.lun.crash_point().image(&Keep::Nothing);
    let expected = recovered_names(image.clone(), true);
    assert_eq!(expected.len(), 8);

    let second = Rig::new(image);
    let again = second.mount(LocalSpace::new(), MountOptions::default()).unwrap();
    let trace = second.lun.trace();
    assert!(trace.log.len() > 5);
    for n in 0..=trace.log.len() {
        let point = trace.point(n);
        for keep in [Keep::Nothing, Keep::Everything] {
            assert_eq!(recovered_names(point.image(&keep), n % 4 == 0), expected, "crash at {n} {keep:?}");
        }
    }
    drop(again);
}
