//! Volumes made here: clean for fsck.gfs2, and equal to mkfs.gfs2's byte by byte.

use crate::common::{as_lun, blank, fsck, has_tool};
use gfs::geometry::Geometry;
use gfs::mkfs::{MkfsError, MkfsOptions, make};
use gfs::ondisk::log::LogHeader;
use gfs::ondisk::rindex::RindexEntry;
use lun::BlockDevice;
use lun::image::Image;
use std::process::Command;

fn nolock(block_size: u32, journals: u32, journal_mb: Option<u32>) -> MkfsOptions {
    MkfsOptions {
        lock_proto: "lock_nolock".into(),
        block_size,
        journals,
        journal_mb,
        ..MkfsOptions::default()
    }
}

#[test]
fn volumes_of_every_block_size_and_several_journal_counts_pass_fsck() {
    if !has_tool("fsck.gfs2") {
        return;
    }
    for block_size in [512, 1024, 2048, 4096] {
        for (journals, mib) in [(1, 20), (2, 64), (3, 300), (20, 400)] {
            let lun = blank(mib << 20);
            let options = nolock(block_size, journals, Some(8));
            let mut last = (0, 0);
            let summary = make(&as_lun(&lun), &options, &mut |done, total| last = (done, total)).unwrap();
            assert_eq!(last.0, last.1, "progress ends at its total");
            assert_eq!(summary.journals, journals);
            assert!(summary.fs_blocks <= summary.device_blocks);
            let verdict = fsck(&lun.durable());
            assert!(
                verdict.is_clean(),
                "{block_size} {journals} {mib}: {:?}\n{}",
                verdict.code,
                verdict.text
            );
        }
    }
}

#[test]
fn directories_of_journals_grow_to_hash_tables_outside_the_dinode() {
    if !has_tool("fsck.gfs2") {
        return;
    }
    let lun = blank(1600 << 20);
    make(&as_lun(&lun), &nolock(512, 90, Some(8)), &mut |_, _| {}).unwrap();
    let verdict = fsck(&lun.durable());
    assert!(verdict.is_clean(), "{:?}\n{}", verdict.code, verdict.text);
}

/// First sequence number of each journal of an image made by mkfs.gfs2, and the time of its inodes.
fn entropy(image: &Image, geo: Geometry, journals: &[u64]) -> (Vec<u32>, i64) {
    let mut block = vec![0; geo.block_size as usize];
    let starts = journals
        .iter()
        .map(|&first| {
            image.read(geo.byte(first).unwrap(), &mut block);
            LogHeader::decode_at(&block, 0).unwrap().sequence as u32
        })
        .collect();
    image.read(geo.byte(geo.sb_block() + 1).unwrap(), &mut block);
    let rg = gfs::ondisk::rgrp::Rgrp::decode(&block).unwrap();
    image.read(geo.byte(rg.data0).unwrap(), &mut block);
    (starts, gfs::ondisk::dinode::Dinode::decode(&block).unwrap().mtime.sec)
}

#[test]
fn the_bytes_are_those_of_mkfs_gfs2() {
    if !has_tool("mkfs.gfs2") {
        return;
    }
    // block size, journals, journal size, device size, resource group size, format
    for (bsize, journals, jmb, mib, rgrp_mb, format) in [
        (4096, 1, 8, 256u64, 256, 1801),
        (4096, 1, 8, 64, 256, 1802),
        (1024, 1, 8, 128, 32, 1802),
        (2048, 3, 8, 257, 64, 1802),
        (4096, 3, 32, 500, 32, 1802),
        (512, 2, 8, 100, 32, 1802),
        (512, 1, 8, 4000, 32, 1802),
        (512, 8, 8, 256, 256, 1802),
        (4096, 1, 8, 33, 256, 1802),
        (1024, 2, 16, 8000, 32, 1802),
    ] {
        let what = format!("-b {bsize} -j {journals} -J {jmb} -r {rgrp_mb}, {mib} MiB");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volume");
        std::fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
        let args = format!(
            "-q -O -p lock_dlm -t mycluster:myfs -U 00112233-4455-6677-8899-aabbccddeeff -b {bsize} -j {journals} -J {jmb} -r {rgrp_mb} -o format={format}"
        );
        let out = Command::new("mkfs.gfs2").args(args.split(' ')).arg(&path).output().unwrap();
        assert!(out.status.success(), "{out:?}");
        let mut theirs = Image::load(&path).unwrap();
        let geo = Geometry::new(bsize).unwrap();

        let jblks = (jmb as u64) << 20 >> geo.shift;
        let mut options = MkfsOptions {
            lock_table: "mycluster:myfs".into(),
            journals,
            journal_mb: Some(jmb),
            block_size: bsize,
            rgrp_mb,
            uuid: Some(*b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff"),
            fs_format: format,
            time: Some(0),
            ..MkfsOptions::default()
        };
        // journals are at the start of the first groups: dinode, indirect blocks, log
        let mut firsts = Vec::new();
        let mut block = vec![0; bsize as usize];
        let mut at = geo.sb_block() + 1;
        for _ in 0..journals {
            theirs.read(geo.byte(at).unwrap(), &mut block);
            let rg = gfs::ondisk::rgrp::Rgrp::decode(&block).unwrap();
            firsts.push(rg.data0 + 1 + geo.tree_blocks(jblks) - jblks);
            at += u64::from(rg.skip);
        }
        let (starts, time) = entropy(&theirs, geo, &firsts);
        (options.journal_starts, options.time) = (starts, Some(time));
        let lun = blank(mib << 20);
        make(&as_lun(&lun), &options, &mut |_, _| {}).unwrap();
        let ours = lun.durable();
        // mkfs.gfs2 leaves stray bytes in the reserved fields of rindex entries
        clean_rindex(&mut theirs, geo);
        if let Some(byte) = ours.first_difference(&theirs) {
            let (at, within) = (byte >> geo.shift, byte & u64::from(bsize - 1));
            let (mut a, mut b) = (vec![0; bsize as usize], vec![0; bsize as usize]);
            ours.read(at << geo.shift, &mut a);
            theirs.read(at << geo.shift, &mut b);
            panic!(
                "{what}: block {at} byte {within} (type {:x?}): ours {:x?} theirs {:x?}",
                &b[4..8],
                &a[within as usize..][..16.min(bsize as usize - within as usize)],
                &b[within as usize..][..16.min(bsize as usize - within as usize)]
            );
        }
    }
}

/// Zero the reserved bytes of every rindex entry, found by walking master by hand.
fn clean_rindex(image: &mut Image, geo: Geometry) {
    use gfs::ondisk::dinode::Dinode;
    use gfs::ondisk::dirent::Records;
    let bsize = geo.block_size as usize;
    let mut block = vec![0; bsize];
    image.read(65536, &mut block);
    let master = gfs::ondisk::sb::Superblock::decode(&block).unwrap().master.addr.0;
    let mut dir = vec![0; bsize];
    image.read(geo.byte(master).unwrap(), &mut dir);
    // at 512 bytes the master directory is hashed: look through its leaves
    let blocks: Vec<(u64, usize)> = if Dinode::decode(&dir).unwrap().is_exhash() {
        (0..geo.new_hash_ptrs()).map(|i| (gfs::ondisk::pointer_at(&dir, Dinode::SIZE, i), 104)).collect()
    } else {
        vec![(master, Dinode::SIZE)]
    };
    let rindex = blocks
        .iter()
        .find_map(|&(block, start)| {
            let mut b = vec![0; bsize];
            image.read(geo.byte(block).unwrap(), &mut b);
            Records::new(&b, start).flatten().find(|r| r.name == b"rindex").map(|r| r.head.num.addr.0)
        })
        .unwrap();
    let mut di = vec![0; bsize];
    image.read(geo.byte(rindex).unwrap(), &mut di);
    let d = Dinode::decode(&di).unwrap();
    assert!(d.height <= 1);
    for i in 0..d.size / RindexEntry::SIZE as u64 {
        for (at, len) in [(12u64, 4usize), (32, 64)] {
            for k in 0..len as u64 {
                let byte = i * 96 + at + k;
                let place = match d.height {
                    0 => geo.byte(rindex).unwrap() + 232 + byte,
                    _ => {
                        let l = (byte >> geo.shift) as usize;
                        let p = gfs::ondisk::pointer_at(&di, Dinode::SIZE, l);
                        geo.byte(p).unwrap() + (byte & u64::from(geo.block_size - 1))
                    }
                };
                image.write(place, &[0]);
            }
        }
    }
}

#[test]
fn a_device_with_content_is_refused_and_untouched() {
    let lun = blank(32 << 20);
    lun.write_at(1024, &{
        let mut sector = [0; 512];
        sector[56..58].copy_from_slice(&[0x53, 0xef]);
        sector
    })
    .unwrap();
    let before = lun.current();
    let error = make(&as_lun(&lun), &nolock(4096, 1, Some(8)), &mut |_, _| {}).unwrap_err();
    assert!(matches!(&error, MkfsError::InUse { what, .. } if what.contains("ext")), "{error}");
    assert_eq!(lun.current().first_difference(&before), None);
    let options = MkfsOptions { override_existing: true, ..nolock(4096, 1, Some(8)) };
    make(&as_lun(&lun), &options, &mut |_, _| {}).unwrap();
    let error = make(&as_lun(&lun), &nolock(4096, 1, Some(8)), &mut |_, _| {}).unwrap_err();
    assert!(matches!(&error, MkfsError::InUse { what, .. } if what.contains("GFS2")), "{error}");
}

#[test]
fn no_crash_during_mkfs_leaves_something_that_looks_like_a_volume() {
    use lun::mem::Keep;
    let lun = blank(20 << 20);
    make(&as_lun(&lun), &nolock(4096, 1, Some(8)), &mut |_, _| {}).unwrap();
    lun.restart_log();
    let options = MkfsOptions { override_existing: true, ..nolock(1024, 1, Some(8)) };
    make(&as_lun(&lun), &options, &mut |_, _| {}).unwrap();
    for keep in [Keep::Everything, Keep::Nothing] {
        let (mut old, mut nothing, mut new) = (0, 0, 0);
        for point in lun.trace().points() {
            let image = point.image(&keep);
            let mut sb = vec![0; 4096];
            image.read(65536, &mut sb);
            match gfs::ondisk::sb::Superblock::decode(&sb) {
                Err(_) => nothing += 1,
                Ok(sb) if sb.block_size == 1024 => new += 1,
                Ok(_) => {
                    assert_eq!(new + nothing, 0, "the old superblock came back");
                    old += 1;
                }
            }
        }
        assert!(old > 0 && nothing > 0 && new > 0, "{old} {nothing} {new}");
    }
}

#[test]
fn options_that_make_no_sense_are_refused_by_name() {
    let lun = as_lun(&blank(32 << 20));
    let base = || nolock(4096, 1, Some(8));
    let cases = [
        (MkfsOptions { lock_proto: "lock_dlm".into(), ..base() }, "lock table"),
        (MkfsOptions { lock_proto: "lock_gulm".into(), ..base() }, "lock_gulm"),
        (MkfsOptions { lock_table: "a:b:c".into(), ..base() }, "a:b:c"),
        (MkfsOptions { lock_table: format!("c:{}", "x".repeat(31)), ..base() }, "at most 32 and 30"),
        (MkfsOptions { journals: 0, ..base() }, "number of journals"),
        (MkfsOptions { journal_mb: Some(7), ..base() }, "journal size"),
        (MkfsOptions { rgrp_mb: 16, ..base() }, "resource group size"),
        (MkfsOptions { block_size: 256, ..base() }, "256"),
        (MkfsOptions { size_blocks: Some(1 << 40), ..base() }, "blocks wanted"),
        (MkfsOptions { fs_format: 1803, ..base() }, "format"),
        (MkfsOptions { journal_mb: Some(32), ..base() }, "too few"),
    ];
    for (options, words) in cases {
        let error = make(&lun, &options, &mut |_, _| {}).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}
