//! Random allocations and releases on a mounted volume, against a map of what each block must be.

use super::*;
use crate::lockspace::local::LocalSpace;
use crate::mkfs::{self, MkfsOptions};
use crate::trans::TransSize;
use crate::volume::{MountOptions, Volume};
use cairn_base::Rng;
use lun::mem::MemLun;
use std::collections::BTreeMap;

fn volume(bsize: u32) -> (MemLun, Arc<Volume>) {
    let lun = MemLun::new(64 << 20, 512);
    let options = MkfsOptions {
        lock_table: "t:fs".to_owned(),
        journal_mb: Some(8),
        block_size: bsize,
        rgrp_mb: 32,
        override_existing: true,
        ..MkfsOptions::default()
    };
    let device: lun::Lun = Arc::new(lun.clone());
    mkfs::make(&device, &options, &mut |_, _| ()).unwrap();
    (lun, Volume::mount(device, LocalSpace::new(), MountOptions::default()).unwrap())
}

#[test]
fn random_histories_agree_with_a_model_and_the_counters_with_the_bitmap() {
    for seed in 0..4u64 {
        println!("seed {seed}");
        let mut rng = Rng::new(seed);
        let (lun, vol) = volume(if seed % 2 == 0 { 512 } else { 4096 });
        let rgrps = vol.rgrps().unwrap();
        let start = vol.statfs().unwrap();
        let mut model: BTreeMap<u64, BlockState> = BTreeMap::new();
        let mut numbers: BTreeMap<u64, u64> = BTreeMap::new();
        for _ in 0..300 {
            let used: Vec<u64> = model.iter().filter(|b| *b.1 == BlockState::Used).map(|b| *b.0).collect();
            let any = model.keys().nth(rng.below(model.len().max(1) as u64) as usize).copied();
            match (rng.below(10), any) {
                (0..5, _) | (_, None) => {
                    let want = 1 + rng.below(200) as u32;
                    let goal = any.unwrap_or_else(|| rng.below(64 << 20 >> 9));
                    let res = rgrps.reserve(BlockNo(goal), want, 1).unwrap();
                    let trans = vol.begin(TransSize::new(res.trans_blocks(want, 0), 0)).unwrap();
                    if rng.chance(1, 3) {
                        let (block, generation) = res.alloc_dinode(&trans).unwrap();
                        assert!(model.insert(block.0, BlockState::Dinode).is_none(), "{block} twice");
                        let before = numbers.insert(block.0, generation);
                        assert!(before.is_none_or(|b| b < generation), "inode number used twice");
                    }
                    for _ in 0..rng.below(4) {
                        if res.left() == 0 {
                            break;
                        }
                        let e = res.alloc_blocks(&trans, 1 + rng.below(80) as u32).unwrap();
                        for b in e.start.0..e.start.0 + u64::from(e.len) {
                            assert!(model.insert(b, BlockState::Used).is_none(), "block {b} twice");
                        }
                    }
                }
                (5..8, _) if !used.is_empty() => {
                    let first = used[rng.below(used.len() as u64) as usize];
                    let len =
                        (first..).take(60).take_while(|b| model.get(b) == Some(&BlockState::Used)).count()
                            as u32;
                    let extent = Extent { start: BlockNo(first), len };
                    let res = rgrps.lock_for(&[extent.start]).unwrap();
                    let trans = vol.begin(TransSize::new(res.trans_blocks(0, len), len)).unwrap();
                    res.free_blocks(&trans, extent).unwrap();
                    (first..first + u64::from(len)).for_each(|b| {
                        model.remove(&b);
                    });
                }
                (_, Some(block)) => {
                    let res = rgrps.lock_for(&[BlockNo(block)]).unwrap();
                    let trans = vol.begin(TransSize::new(res.trans_blocks(0, 1), 1)).unwrap();
                    match model[&block] {
                        BlockState::Dinode if rng.chance(2, 3) => {
                            res.unlink_dinode(&trans, BlockNo(block)).unwrap();
                            model.insert(block, BlockState::Unlinked);
                        }
                        BlockState::Dinode | BlockState::Unlinked => {
                            res.free_dinode(&trans, BlockNo(block)).unwrap();
                            model.remove(&block);
                        }
                        _ => {
                            assert!(
                                res.unlink_dinode(&trans, BlockNo(block)).is_err(),
                                "data block unlinked"
                            );
                            assert!(
                                res.free_dinode(&trans, BlockNo(block)).is_err(),
                                "data block freed as a dinode"
                            );
                        }
                    }
                }
            }
            if rng.chance(1, 10) {
                vol.sync().unwrap();
            }
        }
        for (&block, &state) in &model {
            assert_eq!(rgrps.block_state(BlockNo(block)).unwrap(), state, "block {block}");
        }
        let unlinked: Vec<u64> =
            rgrps.groups().iter().flat_map(|g| rgrps.unlinked_in(g).unwrap().unwrap()).map(|b| b.0).collect();
        let expected: Vec<u64> =
            model.iter().filter(|b| *b.1 == BlockState::Unlinked).map(|b| *b.0).collect();
        assert_eq!(unlinked, expected);
        let now = vol.statfs().unwrap();
        assert_eq!(now.free, start.free - model.len() as u64);
        let dinodes = model.values().filter(|s| **s != BlockState::Used).count() as u64;
        assert_eq!(now.dinodes, start.dinodes + dinodes);
        vol.unmount().unwrap();

        // on disk: each header says what its bitmap says, and the sums are the totals
        let vol = Volume::mount(Arc::new(lun.clone()), LocalSpace::new(), MountOptions::default()).unwrap();
        assert_eq!(vol.statfs().unwrap(), now);
        let bsize = vol.geometry().block_size as usize;
        for g in vol.rgrps().unwrap().groups().iter() {
            let mut counts = [0u64; 4];
            let mut header = None;
            for part in g.entry().parts(&vol.geometry()) {
                let mut b = vec![0; bsize];
                vol.disk().read(BlockNo(part.block), &mut b).unwrap();
                if header.is_none() {
                    Header::verify_crc(&b).unwrap();
                    header = Some(Header::decode(&b).unwrap());
                }
                let n = bitmap::count(&b[part.offset..part.offset + part.bytes]);
                counts.iter_mut().zip(n).for_each(|(sum, n)| *sum += n);
            }
            let h = header.unwrap();
            assert_eq!(u64::from(h.free), counts[0]);
            assert_eq!(u64::from(h.dinodes), counts[2] + counts[3]);
        }
        vol.unmount().unwrap();
    }
}

#[test]
fn several_threads_of_one_node_share_a_group_without_a_block_given_twice() {
    let (_lun, vol) = volume(4096);
    let threads: Vec<_> = (0..4u64)
        .map(|t| {
            let vol = Arc::clone(&vol);
            std::thread::spawn(move || {
                let mut rng = Rng::new(t);
                let mut mine = Vec::new();
                for _ in 0..100 {
                    let n = 1 + rng.below(8) as u32;
                    let res = vol.rgrps().unwrap().reserve(BlockNo(5000), n, n).unwrap();
                    let trans = vol.begin(TransSize::new(res.trans_blocks(n, 0), 0)).unwrap();
                    while res.left() > 0 {
                        let e = res.alloc_blocks(&trans, res.left()).unwrap();
                        mine.extend(e.start.0..e.start.0 + u64::from(e.len));
                    }
                }
                mine
            })
        })
        .collect();
    let mut all: Vec<u64> = threads.into_iter().flat_map(|t| t.join().unwrap()).collect();
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), count);
}
