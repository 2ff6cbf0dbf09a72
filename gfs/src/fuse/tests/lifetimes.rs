//! Attributes that the kernel keeps: given when they have settled, and gone before another mount changes them.
//!
//! That they are not given earlier is for `stress::two_mounts_agree_with_long_lifetimes` to show: with lifetimes at once it finds stale sizes.

use super::rig::{Rig, can_mount};
use crate::fuse::coherence::Part;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
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
