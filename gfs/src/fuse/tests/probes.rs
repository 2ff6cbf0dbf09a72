//! Deadlock probes: crossing dirty mappings, page passes and replies that take their time; on one processor and on several.

use super::rig::{CLIENT, Rig, WRONG, client};
use super::stress::{must_be_right, seconds, shared_rig};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// This thread and all that it starts from now on, servers and clients, share one processor.
fn stay_on_one_cpu() {
    let all = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let first = (0..CpuSet::count()).find(|cpu| all.is_set(*cpu).unwrap()).unwrap();
    let mut one = CpuSet::new();
    one.set(first).unwrap();
    sched_setaffinity(Pid::from_raw(0), &one).unwrap();
}

const PAGE: usize = 4096;
const PAGES: usize = 8;

/// A node's view of the two files.
struct View {
    node: usize,
    own: memmap2::MmapRaw,
    other: File,
    other_map: memmap2::MmapRaw,
}

impl View {
    fn open(node: usize, root: &Path) -> std::io::Result<Self> {
        let open = |write, file: usize| {
            File::options().read(true).write(write).open(root.join(format!("cross{file}")))
        };
        let other = open(false, 1 - node)?;
        Ok(Self {
            node,
            own: memmap2::MmapRaw::map_raw(&open(true, node)?)?,
            other_map: memmap2::MmapOptions::new().map_raw_read_only(&other)?,
            other,
        })
    }

    /// The first word of a page.
    fn word(map: &memmap2::MmapRaw, page: usize) -> *mut u64 {
        assert!((page + 1) * PAGE <= map.len());
        map.as_mut_ptr().wrapping_add(page * PAGE).cast()
    }

    fn store(&self, round: u64) {
        for page in 0..PAGES {
            // SAFETY: inside the mapping of a file that keeps its size.
            unsafe { Self::word(&self.own, page).write_volatile(round.to_le()) };
        }
    }

    fn look(&self, round: u64, mapped: bool) {
        for page in 0..PAGES {
            let found = if mapped {
                // SAFETY: as above.
                u64::from_le(unsafe { Self::word(&self.other_map, page).read_volatile() })
            } else {
                let mut bytes = [0; 8];
                self.other.read_exact_at(&mut bytes, (page * PAGE) as u64).expect("read");
                u64::from_le_bytes(bytes)
            };
            if found != round {
                let node = self.node;
                println!("{WRONG}node {node}: page {page} (mapped: {mapped}): {found}, not {round}");
            }
        }
    }
}

/// Each of two nodes stores through a mapping into a file of its own, then both read the other's at the same moment: each demotion writes dirty pages
/// back while its own node waits for the other's.
#[test]
fn client_of_crossing_mappings() {
    const READERS: usize = 2;
    let Ok(words) = std::env::var(CLIENT) else { return };
    let mut words = words.split(' ');
    let wanted: u64 = words.next().unwrap().parse().unwrap();
    let roots: Vec<_> = words.map(Path::new).collect();
    let (rounds, barrier) = (AtomicU64::new(0), Barrier::new(2 * READERS));
    std::thread::scope(|s| {
        for thread in 0..2 * READERS {
            let (node, reader) = (thread / READERS, thread % READERS);
            let (view, rounds, barrier) = (View::open(node, roots[node]).unwrap(), &rounds, &barrier);
            s.spawn(move || {
                for round in 1..=wanted {
                    if reader == 0 {
                        view.store(round);
                    }
                    barrier.wait();
                    view.look(round, (round + reader as u64).is_multiple_of(2));
                    if thread == 0 {
                        rounds.store(round, Ordering::SeqCst);
                    }
                    barrier.wait();
                }
            });
        }
        while rounds.load(Ordering::SeqCst) < wanted {
            println!("beat {}", rounds.load(Ordering::SeqCst));
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

fn crossing_mappings_do_not_hang(rig: Rig, rounds: u64) {
    for file in 0..2 {
        fs::write(rig.path(0).join(format!("cross{file}")), vec![0; PAGES * PAGE]).unwrap();
    }
    let words = format!("{rounds} {} {}", rig.path(0).display(), rig.path(1).display());
    let name = "fuse::tests::probes::client_of_crossing_mappings";
    let (well, said) = client(&rig, name, &words, Duration::from_secs(15));
    let wrong: Vec<_> = said.iter().filter(|l| l.starts_with(WRONG)).collect();
    assert!(well && wrong.is_empty(), "{} wrong: {wrong:#?}\n{said:?}", wrong.len());
    for mounted in &rig.mounts {
        assert_eq!(mounted.coherence().stats.late_write_back.load(Ordering::Relaxed), 0);
    }
    assert!(rig.space.violations().is_empty());
    rig.end();
}

#[test]
fn crossing_dirty_mappings_on_one_cpu() {
    stay_on_one_cpu();
    if let Some(rig) = shared_rig(2) {
        crossing_mappings_do_not_hang(rig, 1000);
    }
}

#[test]
fn crossing_dirty_mappings_on_several_cpus() {
    if let Some(rig) = shared_rig(2) {
        crossing_mappings_do_not_hang(rig, 1000);
    }
}

/// Both files cross while passes and replies take their time as well.
#[test]
fn crossing_dirty_mappings_with_delays() {
    if let Some(rig) = shared_rig(2) {
        slow_down(&rig);
        crossing_mappings_do_not_hang(rig, 30);
    }
}

/// Page passes begin 1 to 50 ms late, and one reply in eight, with all that had to wait, is written up to 3 ms late, the glocks held.
fn slow_down(rig: &Rig) {
    for mounted in &rig.mounts {
        let probe = &mounted.core.probe;
        probe.passes.set(1, Duration::from_millis(1), Duration::from_millis(50));
        probe.replies.set(8, Duration::ZERO, Duration::from_millis(3));
    }
}

#[test]
fn every_load_with_delays_on_one_cpu() {
    stay_on_one_cpu();
    if let Some(rig) = shared_rig(2) {
        slow_down(&rig);
        must_be_right(rig, "all", seconds(4), 2);
    }
}

#[test]
fn every_load_with_delays_on_several_cpus() {
    if let Some(rig) = shared_rig(2) {
        slow_down(&rig);
        must_be_right(rig, "all", seconds(4), 2);
    }
}
