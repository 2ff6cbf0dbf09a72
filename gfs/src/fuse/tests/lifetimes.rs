//! Attributes that the kernel keeps: given when they have settled, and gone before another mount changes them.
//!
//! That they are not given earlier is for `stress::two_mounts_agree_with_long_lifetimes` to show: with lifetimes at once it finds stale sizes.

use super::rig::{Rig, can_mount};
use crate::fuse::coherence::Part;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{self, Relaxed};
use std::time::{Duration, Instant};

const ROUNDS: u64 = 10;

struct Pair {
    rig: Rig,
    here: PathBuf,
    there: PathBuf,
    size: u64,
}

impl Pair {
    fn new() -> Option<Self> {
        can_mount().then(|| {
            let mut rig = Rig::new(2, 128);
            rig.mount_shared(2);
            rig.mounts.iter().for_each(|m| m.coherence().set_contended(Duration::ZERO));
            let (here, there) = (rig.path(0).join("file"), rig.path(1).join("file"));
            fs::write(&there, b"1").unwrap();
            Self { rig, here, there, size: 1 }
        })
    }

    fn seen(&self) -> u64 {
        fs::metadata(&self.here).unwrap().size()
    }

    /// Asks until the kernel asks us no more.
    fn settle(&self) {
        settle(&self.rig, || assert_eq!(self.seen(), self.size));
    }

    fn grow_there(&mut self) {
        OpenOptions::new().append(true).open(&self.there).unwrap().write_all(b"2").unwrap();
        self.size += 1;
    }
}

/// Repeats what `looks` at the first mount until the kernel answers all of it.
fn settle(rig: &Rig, looks: impl Fn()) {
    let asked = || rig.mounts[0].coherence().stats.attributes.load(Relaxed);
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let before = asked();
        looks();
        if asked() == before {
            return;
        }
        assert!(Instant::now() < deadline, "the kernel was never given attributes to keep");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// With the protocol's own idea of what is contended.
#[test]
fn attributes_of_files_that_nobody_else_uses_are_kept() {
    if !can_mount() {
        return;
    }
    let mut rig = Rig::new(2, 128);
    rig.mount_shared(2);
    let dir = rig.path(0).join("own");
    fs::create_dir(&dir).unwrap();
    for n in 0..50 {
        fs::write(dir.join(n.to_string()), b"x").unwrap();
    }
    settle(&rig, || {
        (0..50).for_each(|n| assert_eq!(fs::metadata(dir.join(n.to_string())).unwrap().size(), 1))
    });
    rig.end();
}

#[test]
fn kept_attributes_end_with_the_glock() {
    let Some(mut pair) = Pair::new() else { return };
    for _ in 0..ROUNDS {
        pair.settle();
        pair.grow_there();
        assert_eq!(pair.seen(), pair.size);
    }
    pair.rig.end();
}

#[test]
fn missing_attribute_invalidation_is_noticed() {
    let Some(mut pair) = Pair::new() else { return };
    pair.rig.mounts[0].coherence().sabotage.skip(Part::Attributes);
    pair.settle();
    pair.grow_there();
    assert_eq!(pair.seen(), pair.size - 1, "attributes were kept for an hour, and nobody invalidated them");
}

/// A read asks for the size, and a notification behind the reply to that makes the kernel forget the reply: so there is none for nothing.
#[test]
fn a_read_behind_the_old_end_sees_what_the_other_node_has_appended() {
    if !can_mount() {
        return;
    }
    const RECORD: u64 = 64;
    let mut rig = Rig::new(2, 128);
    rig.mount_shared(2);
    let mut there = OpenOptions::new().create(true).append(true).open(rig.path(0).join("grows")).unwrap();
    let path = rig.path(1).join("grows");
    let done = AtomicU64::new(0);
    let until = Instant::now() + Duration::from_secs(4);
    let late = std::thread::scope(|s| {
        s.spawn(|| {
            while Instant::now() < until {
                there.write_all(&[1; RECORD as usize]).unwrap();
                done.fetch_add(1, Ordering::SeqCst);
            }
        });
        let mut late = 0;
        while Instant::now() < until {
            let Some(last) = done.load(Ordering::SeqCst).checked_sub(1) else { continue };
            let mut bytes = [0; RECORD as usize];
            let n = File::open(&path).unwrap().read_at(&mut bytes, last * RECORD).unwrap();
            late += u32::from(n < bytes.len() || bytes != [1; RECORD as usize]);
        }
        late
    });
    assert_eq!(late, 0, "reads of {} appended records ended short", done.into_inner());
    drop(there);
    rig.end();
}
