//! Whole mounts on an in-memory LUN: allocation, hand-over between nodes, crashes, recovery, clean ends.
//! Files here are as simple as they can be: one dinode with direct pointers and an entry in the root directory.

mod crash;
mod rig;
mod shared;

use super::*;
use crate::lockspace::local::LocalSpace;
use crate::rgrp::Extent;
use rig::{Rig, fsck, volume_image};
use std::time::Duration;

#[test]
fn a_mounted_and_unmounted_volume_is_clean() {
    for bsize in [512, 1024, 4096] {
        let rig = Rig::new(volume_image(bsize, 2));
        let vol = rig.mount(LocalSpace::new(), MountOptions::default()).unwrap();
        assert_eq!((vol.journal(), vol.journals()), (Some(JournalId(0)), 2));
        vol.unmount().unwrap();
        fsck(&rig.lun.durable());
    }
}

#[test]
fn files_made_and_removed_leave_a_volume_that_fsck_accepts() {
    for bsize in [1024, 4096] {
        let rig = Rig::new(volume_image(bsize, 1));
        let vol = rig.mount(LocalSpace::new(), MountOptions::default()).unwrap();
        let before = vol.statfs().unwrap();
        for i in 0..12u64 {
            rig::create_file(&vol, &format!("file{i}"), i as u32 % 7, i).unwrap();
        }
        for i in (0..12u64).step_by(3) {
            rig::remove_file(&vol, &format!("file{i}")).unwrap();
        }
        vol.sync().unwrap();
        let now = vol.statfs().unwrap();
        assert_eq!(now.dinodes, before.dinodes + 8);
        let data: u64 = (0..12).filter(|i| i % 3 != 0).map(|i| i % 7).sum();
        assert_eq!(now.free, before.free - 8 - data);
        vol.unmount().unwrap();
        let image = rig.lun.durable();
        fsck(&image);

        let again = rig.mount(LocalSpace::new(), MountOptions::default()).unwrap();
        assert_eq!(again.statfs().unwrap(), now);
        for i in 0..12u64 {
            let found = rig::read_file(&again, &format!("file{i}"));
            assert_eq!(found, (i % 3 != 0).then_some(i as u32 % 7), "file{i}");
        }
        again.unmount().unwrap();
    }
}

#[test]
fn a_full_volume_answers_enospc_and_freed_blocks_come_back_after_the_flush() {
    let rig = Rig::new(volume_image(4096, 1));
    let vol = rig.mount(LocalSpace::new(), MountOptions::default()).unwrap();
    let mut files = 0u64;
    let full = loop {
        match rig::create_file(&vol, &format!("f{files}"), 400, files) {
            Ok(()) => files += 1,
            Err(e) => break e,
        }
    };
    assert!(matches!(full, Error::Errno(libc::ENOSPC)), "{full}");
    assert!(vol.statfs().unwrap().free < 401 * vol.rgrps().unwrap().groups().len() as u64);
    rig::remove_file(&vol, "f0").unwrap();
    // no flush in between: the reservation makes one
    rig::create_file(&vol, "g", 400, 7).unwrap();
    vol.unmount().unwrap();
    fsck(&rig.lun.durable());
}

#[test]
fn blocks_freed_in_a_transaction_are_not_given_out_before_it_is_durable() {
    let rig = Rig::new(volume_image(4096, 1));
    let vol = rig.mount(LocalSpace::new(), MountOptions::default()).unwrap();
    let rgrps = vol.rgrps().unwrap();
    let group = rgrps.groups()[1].clone();
    let goal = BlockNo(group.entry().data0);
    let res = rgrps.reserve(goal, 10, 10).unwrap();
    let trans = vol.begin(TransSize::new(res.trans_blocks(10, 0), 0)).unwrap();
    let got = res.alloc_blocks(&trans, 10).unwrap();
    drop(trans);
    drop(res);
    vol.sync().unwrap();
    let free = |extent: Extent| {
        let res = rgrps.lock_for(&[extent.start]).unwrap();
        let trans = vol.begin(TransSize::new(res.trans_blocks(0, extent.len), extent.len)).unwrap();
        res.free_blocks(&trans, extent).unwrap();
    };
    let overlap = |e: Extent| {
        e.start.0 < got.start.0 + u64::from(got.len) && got.start.0 < e.start.0 + u64::from(e.len)
    };
    let take = || {
        let res = rgrps.reserve(goal, 10, 10).unwrap();
        let trans = vol.begin(TransSize::new(res.trans_blocks(10, 0), 0)).unwrap();
        let e = res.alloc_blocks(&trans, 10).unwrap();
        assert_eq!(res.left(), 10 - e.len);
        e
    };
    free(got);
    let other = take();
    assert!(!overlap(other), "{got:?} given out again as {other:?}");
    free(other);
    vol.sync().unwrap();
    assert!(overlap(take()));
    // freeing what is free is refused, and changes nothing
    let res = rgrps.lock_for(&[got.start]).unwrap();
    let trans = vol.begin(TransSize::new(res.trans_blocks(0, 2), 2)).unwrap();
    let last = Extent { start: BlockNo(group.entry().end() - 2), len: 2 };
    assert!(matches!(res.free_blocks(&trans, last), Err(Error::Corrupt { .. })));
}

#[test]
fn what_is_not_a_volume_is_refused_with_its_reason() {
    let refused = |image: lun::image::Image, options: MountOptions| {
        Rig::new(image).mount(LocalSpace::new(), options).err().expect("refused").to_string()
    };
    assert!(refused(lun::image::Image::new(1 << 24), MountOptions::default()).contains("not a GFS2 volume"));
    assert!(refused(lun::image::Image::new(65536), MountOptions::default()).contains("too small"));
    let image = volume_image(4096, 1);
    let table = Some("other:fs".to_owned());
    let text = refused(image.clone(), MountOptions { lock_table: table, ..MountOptions::default() });
    assert!(text.contains("other:fs") && text.contains("lock table"), "{text}");
    let mut damaged = image.clone();
    damaged.write(65536 + 24, &1803u32.to_be_bytes());
    assert!(refused(damaged, MountOptions::default()).contains("GFS2 format 1803 is not supported"));
    let options = MountOptions { journal: Some(JournalId(4)), ..MountOptions::default() };
    assert!(refused(image, options).contains("no journal 4"));
}

#[test]
fn read_only_and_spectator_mounts_change_nothing() {
    let rig = Rig::new(volume_image(4096, 1));
    let spectator = MountOptions { spectator: true, ..MountOptions::default() };
    let read_only = MountOptions { read_only: true, ..MountOptions::default() };
    let vol = rig.mount(LocalSpace::new(), spectator).unwrap();
    assert!(vol.begin(TransSize::new(1, 0)).is_err() && vol.journal().is_none());
    assert!(vol.statfs().unwrap().blocks > 0);
    vol.unmount().unwrap();
    assert_eq!(rig.lun.log_len(), 0, "a spectator writes nothing");
    let vol = rig.mount(LocalSpace::new(), read_only).unwrap();
    assert!(matches!(vol.begin(TransSize::new(1, 0)).err(), Some(Error::Errno(libc::EROFS))));
    vol.unmount().unwrap();
    fsck(&rig.lun.durable());
}
