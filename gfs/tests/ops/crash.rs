//! Power cuts at random moments of random histories: replay, whatever the device had kept of its cache, must give a volume without a fault on
//! which everything is that had been synced and not touched since.

use crate::model::{Limits, Model, Rng};
use crate::random::{seeds, steps};
use crate::rig::{ME, Node, Rig, done, fsck};
use gfs::InodeNo;
use gfs::ops::{FsOptions, NewNode, SetAttr, SyncKind};
use gfs::volume::MountOptions;
use lun::mem::{Keep, MemLun, Trace};

/// A history, and after each sync of everything power cuts at random moments of what follows.
fn crashes(bsize: u32, seed: u64) {
    eprintln!("CAIRN_SEED={seed} block size {bsize}");
    let mut rng = Rng::new(seed);
    let rig = Rig::new(bsize, 32);
    let node = rig.mount();
    let mut model = Model::new(node.root());
    let limits = Limits { names: 80, max_file: 200_000 };
    for round in 0..steps(600) / 60 {
        for _ in 0..rng.below(60) {
            model.step(&mut rng, &node, &limits);
        }
        node.fs.syncfs().unwrap();
        rig.lun.restart_log();
        let durable = model.clone();
        model.mark();
        for _ in 0..1 + rng.below(60) {
            model.step(&mut rng, &node, &limits);
            match rng.below(10) {
                0 => node.fs.volume().sync().unwrap(),
                1 => node.fs.syncfs().unwrap(),
                _ => {}
            }
        }
        let trace = rig.lun.trace();
        for _ in 0..3 {
            let what = |n| format!("round {round}: power cut at event {n} of {}", trace.log.len());
            let survivor = after_power_cut(&trace, &mut rng, 0, &what);
            let node = survivor.mount();
            Model::check_untouched(&mut durable.clone(), &model, &node);
            node.fs.sweep_orphans().unwrap();
            node.unmount();
            fsck(&survivor.lun.durable());
        }
    }
    node.unmount();
    fsck(&rig.lun.durable());
}

#[test]
fn crash_leaves_a_clean_volume_with_everything_synced_4096() {
    for seed in seeds(1) {
        crashes(4096, seed);
    }
}

#[test]
fn crash_leaves_a_clean_volume_with_everything_synced_512() {
    for seed in seeds(1) {
        crashes(512, 50 + seed);
    }
}

/// What the medium may hold when the power goes at a random moment after event `from`.
fn after_power_cut(trace: &Trace, rng: &mut Rng, from: usize, what: &dyn Fn(usize) -> String) -> Rig {
    let at = from + rng.below((trace.log.len() - from) as u64 + 1) as usize;
    let point = trace.point(at);
    let n = point.unflushed().len();
    let keep = match rng.below(4) {
        0 => Keep::Nothing,
        1 => Keep::Everything,
        2 => Keep::Prefix(rng.below(n as u64 + 1) as usize),
        _ => Keep::Subset((0..n).filter(|_| rng.below(2) == 0).collect()),
    };
    eprintln!("  {}, {n} writes not flushed", what(at));
    Rig { lun: MemLun::from_image(point.image(&keep), 512) }
}

/// There is nothing to write, which is no error.
#[test]
fn a_spectator_can_be_synced() {
    let rig = Rig::new(4096, 32);
    let options = MountOptions { read_only: true, spectator: true, ..MountOptions::default() };
    let node = rig.mount_with(FsOptions::default(), options);
    node.fs.fsync(node.root(), SyncKind::All).unwrap();
    node.fs.syncfs().unwrap();
    node.unmount();
}

/// On a synchronous mount, and after an fsync of the root directory on any, nothing that was answered is lost.
#[test]
fn crash_takes_nothing_from_a_synchronous_mount_or_from_behind_an_fsync_of_the_root() {
    for (bsize, sync) in [(512, true), (4096, true), (4096, false)] {
        let mut rng = Rng::new(7);
        let rig = Rig::new(bsize, 32);
        let node = rig.mount_with(FsOptions { sync, ..FsOptions::default() }, MountOptions::default());
        let mut model = Model::new(node.root());
        let limits = Limits { names: 40, max_file: 50_000 };
        for round in 0..12 {
            for _ in 0..1 + rng.below(12) {
                model.step(&mut rng, &node, &limits);
            }
            if !sync {
                node.fs.fsync(node.root(), SyncKind::All).unwrap();
            }
            let survivor = Rig { lun: MemLun::from_image(rig.lun.durable(), 512) };
            eprintln!("block size {bsize}, sync {sync}, round {round}");
            let again = survivor.mount();
            model.clone().check_all(&again);
            again.unmount();
            fsck(&survivor.lun.durable());
        }
        node.unmount();
    }
}

#[test]
fn crash_after_fsync_keeps_the_file_its_name_and_its_size() {
    for (bsize, seed) in [(512, 1), (4096, 2)] {
        eprintln!("seed {seed}");
        let mut rng = Rng::new(seed);
        let rig = Rig::new(bsize, 32);
        let node = rig.mount();
        let d = node.dir(node.root(), "d");
        for round in 0..8u64 {
            rig.lun.restart_log();
            let name = format!("file{round}");
            let f = node.file(d, &name);
            let data: Vec<u8> = (0..1 + rng.below(100_000)).map(|i| (i * (round + 3) % 251) as u8).collect();
            node.write(f, 0, &data);
            // others dirty things too
            let other = node.file(d, &format!("other{round}"));
            node.write(other, 5, &data);
            node.fs.fsync(f, SyncKind::All).unwrap();
            let synced = rig.lun.log_len();
            node.write(other, 100, &data);
            done(node.fs.setattr(other, &SetAttr { size: Some(7), ..SetAttr::default() }).unwrap());
            if rng.below(2) == 0 {
                node.fs.volume().sync().unwrap();
            }
            let survivor =
                after_power_cut(&rig.lun.trace(), &mut rng, synced, &|n| format!("round {round}, event {n}"));
            let again = survivor.mount();
            let d = again.get(again.root(), "d").unwrap().ino;
            let f = again.get(d, &name).unwrap();
            assert_eq!(f.size, data.len() as u64);
            assert!(again.read(f.ino, 0, data.len()) == data);
            again.unmount();
            fsck(&survivor.lun.durable());
        }
        node.unmount();
    }
}

/// Blocks of a deleted file are full of a pattern; new files that get them must never show it, whatever the power cut left.
#[test]
fn crash_never_shows_what_was_in_a_block_before() {
    for (bsize, seed) in [(512, 3), (4096, 4)] {
        eprintln!("seed {seed}");
        let mut rng = Rng::new(seed);
        let rig = Rig::new(bsize, 24);
        let node = rig.mount();
        for round in 0..4 {
            fill_with_pattern(&node);
            rig.lun.restart_log();
            for i in 0..30u64 {
                let name = format!("new{i}");
                if node.get(node.root(), &name).is_some() {
                    done(node.fs.unlink(node.root(), name.as_bytes()).unwrap());
                }
                let f = node.file(node.root(), &name);
                node.write(f, rng.below(3) * 5000, &vec![b'n'; 1 + rng.below(60_000) as usize]);
                if rng.below(3) == 0 {
                    node.fs.volume().sync().unwrap();
                }
                if rng.below(6) == 0 {
                    node.truncate(f, rng.below(20_000));
                }
            }
            for _ in 0..3 {
                let survivor =
                    after_power_cut(&rig.lun.trace(), &mut rng, 0, &|n| format!("round {round}, event {n}"));
                let again = survivor.mount();
                for i in 0..30 {
                    let Some(attr) = again.get(again.root(), &format!("new{i}")) else { continue };
                    let bytes = again.read(attr.ino, 0, attr.size as usize);
                    assert!(bytes.iter().all(|b| *b == 0 || *b == b'n'), "new{i} shows what is not its own");
                }
                again.unmount();
                fsck(&survivor.lun.durable());
            }
        }
        node.unmount();
    }
}

fn fill_with_pattern(node: &Node) {
    let f: InodeNo = done(node.fs.mknod(ME, node.root(), b"old", 0o600, NewNode::File).unwrap()).ino;
    node.write(f, 0, &vec![b'S'; 6_000_000]);
    node.fs.syncfs().unwrap();
    done(node.fs.unlink(node.root(), b"old").unwrap());
    node.fs.reclaim();
}
