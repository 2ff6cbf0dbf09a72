//! Long random histories against the reference model.

use crate::model::{Limits, Model, Rng};
use crate::rig::{Rig, fsck};
use gfs::ops::FsOptions;
use gfs::volume::MountOptions;

/// Steps of each history; more by `CAIRN_STEPS`.
pub(crate) fn steps(usual: u64) -> u64 {
    std::env::var("CAIRN_STEPS").ok().and_then(|s| s.parse().ok()).unwrap_or(usual)
}

pub(crate) fn seeds(usual: u64) -> std::ops::Range<u64> {
    match std::env::var("CAIRN_SEED").ok().and_then(|s| s.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 0..usual,
    }
}

fn history(bsize: u32, seed: u64, steps: u64, names: u64) {
    eprintln!("CAIRN_SEED={seed} block size {bsize}, {steps} steps, {names} names");
    let rig = Rig::new(bsize, 64);
    let mut rng = Rng::new(seed);
    let mut node = rig.mount();
    let mut model = Model::new(node.root());
    let limits = Limits { names, max_file: 400_000 };
    for step in 0..steps {
        model.step(&mut rng, &node, &limits);
        if step % 1000 == 999 {
            node.unmount();
            rig.lun.restart_log();
            fsck(&rig.lun.durable());
            // little memory: pages come and go
            node = rig.mount_with(
                FsOptions { data_cache: 1 << 20, ..FsOptions::default() },
                MountOptions::default(),
            );
            model.check_all(&node);
        }
    }
    model.check_all(&node);
    node.unmount();
    fsck(&rig.lun.durable());
}

#[test]
fn prop_random_history_matches_the_model_4096() {
    for seed in seeds(2) {
        history(4096, seed, steps(2000), 60);
    }
}

#[test]
fn prop_random_history_matches_the_model_512() {
    for seed in seeds(2) {
        history(512, 100 + seed, steps(2000), 200);
    }
}
