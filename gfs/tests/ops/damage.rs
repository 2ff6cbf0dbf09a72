//! Volumes with damaged blocks: an error that names the block, the rest stays usable, never a panic.

use crate::model::Rng;
use crate::rig::{ME, Node, Rig, done};
use gfs::lockspace::local::LocalSpace;
use gfs::ops::{Fs, FsOptions, NewNode, RenameMode, SetAttr, WriteMode};
use gfs::volume::{MountOptions, Volume};
use gfs::{Error, InodeNo};
use lun::BlockDevice;
use lun::image::Image;
use lun::mem::MemLun;
use std::sync::Arc;

fn populated(bsize: u32) -> (Image, Vec<(String, InodeNo)>) {
    let rig = Rig::new(bsize, 32);
    let node = rig.mount();
    let mut files = Vec::new();
    for i in 0..20u64 {
        let name = format!("file{i}");
        let f = node.file(node.root(), &name);
        node.write(f, 0, &vec![i as u8; (i * i * 400) as usize + 1]);
        files.push((name, f));
    }
    let d = node.dir(node.root(), "dir");
    for i in 0..200 {
        node.file(d, &format!("entry{i}"));
    }
    done(node.fs.symlink(ME, node.root(), b"link", b"target").unwrap());
    node.unmount();
    (rig.lun.durable(), files)
}

#[test]
fn a_damaged_dinode_gives_eio_with_its_block_and_the_others_stay() {
    for bsize in [512, 4096] {
        let (image, files) = populated(bsize);
        let rig = Rig { lun: MemLun::from_image(image, 512) };
        let bad = files[7].1;
        for at in [0, 32, 138] {
            let mut block = vec![0; bsize as usize];
            let offset = bad.addr.0 * u64::from(bsize);
            rig.lun.read_at(offset, &mut block).unwrap();
            let good = block.clone();
            block[at] ^= 0x55;
            rig.lun.write_at(offset, &block).unwrap();
            let node = rig.mount();
            match node.fs.lookup(node.root(), b"file7") {
                Err(Error::Corrupt { block, .. }) => assert_eq!(block, bad.addr),
                other => panic!("byte {at}: {other:?}"),
            }
            for (i, (name, ino)) in files.iter().enumerate().filter(|(i, _)| *i != 7) {
                assert_eq!(node.get(node.root(), name).unwrap().ino, *ino);
                assert_eq!(node.read(*ino, 0, 1), [i as u8]);
            }
            node.file(node.root(), &format!("new{at}"));
            node.unmount();
            rig.lun.write_at(offset, &good).unwrap();
        }
        rig.with(|n| assert_eq!(n.names(n.root(), 100).len(), 27));
    }
}

/// A few random bytes of metadata are wrong, then everything is tried. What comes out does not matter, that it comes out does.
#[test]
fn random_damage_never_panics() {
    let rounds: u64 = std::env::var("CAIRN_STEPS").ok().and_then(|s| s.parse().ok()).unwrap_or(30);
    for bsize in [512u32, 4096] {
        let (image, _) = populated(bsize);
        let mut block = vec![0; bsize as usize];
        let metadata: Vec<u64> = (0..image.size() / u64::from(bsize))
            .filter(|b| {
                image.read(b * u64::from(bsize), &mut block);
                // inodes, pointers, leaves, tables, groups; not the journal, whose replay has its own tests
                block[..4] == [1, 0x16, 0x19, 0x70] && matches!(block[7], 2..=7 | 10)
            })
            .collect();
        for seed in 0..rounds {
            let mut rng = Rng::new(seed * 2 + 1);
            let lun = MemLun::from_image(image.clone(), 512);
            for _ in 0..1 + rng.below(20) {
                let at = metadata[rng.below(metadata.len() as u64) as usize] * u64::from(bsize);
                lun.read_at(at, &mut block).unwrap();
                let byte = match rng.below(3) {
                    0 => rng.below(232) as usize,
                    _ => rng.below(u64::from(bsize)) as usize,
                };
                block[byte] = match rng.below(3) {
                    0 => 0xff,
                    1 => 0,
                    _ => rng.next() as u8,
                };
                lun.write_at(at, &block).unwrap();
            }
            eprintln!("CAIRN_SEED={seed} block size {bsize}");
            let Ok(vol) = Volume::mount(Arc::new(lun), LocalSpace::new(), MountOptions::default()) else {
                continue;
            };
            let node = Node { fs: Fs::new(vol, FsOptions::default()) };
            use_everything(&node, node.root(), &mut rng, 3);
            let _ = node.fs.stop();
            let _ = node.fs.volume().unmount();
        }
    }
}

fn use_everything(n: &Node, dir: InodeNo, rng: &mut Rng, depth: u32) {
    let mut names: Vec<Vec<u8>> = Vec::new();
    let _ = n.fs.readdir(dir, 0, |e| {
        names.push(e.name.to_vec());
        names.len() < 400
    });
    for name in names {
        let Ok(Some(attr)) = n.fs.lookup(dir, &name).map(done) else { continue };
        let ino = attr.ino;
        let mut out = vec![0; 20_000];
        let _ = n.fs.read(ino, rng.below(10_000), &mut out, false);
        let _ = n.fs.readlink(ino);
        let _ = n.fs.listxattr(ino);
        match rng.below(12) {
            0 => drop(n.fs.write(
                ino,
                rng.below(100_000),
                &out[..rng.below(9000) as usize + 1],
                WriteMode::default(),
            )),
            1 => drop(n.fs.setattr(ino, &SetAttr { size: Some(rng.below(100_000)), ..SetAttr::default() })),
            2 => drop(n.fs.unlink(dir, &name)),
            3 => drop(n.fs.rmdir(dir, &name)),
            4 => drop(n.fs.rename(dir, &name, n.root(), b"renamed", RenameMode::Replace)),
            5 => {
                drop(n.fs.mknod(ME, dir, format!("new{}", rng.below(1000)).as_bytes(), 0o644, NewNode::File))
            }
            6 => drop(n.fs.link(ino, dir, format!("hard{}", rng.below(1000)).as_bytes())),
            _ => {}
        }
        if depth > 0 && attr.mode & 0o170_000 == 0o040_000 && name != b"." && name != b".." {
            use_everything(n, ino, rng, depth - 1);
        }
    }
    n.fs.reclaim();
}

/// Reads everything that can be reached. Returns how many inodes were read and how many errors there were.
fn read_everything(n: &Node, dir: InodeNo, depth: u32) -> (u64, u64) {
    let (mut read, mut errors) = (0, 0);
    let mut names: Vec<Vec<u8>> = Vec::new();
    let listed = n.fs.readdir(dir, 0, |e| {
        names.push(e.name.to_vec());
        true
    });
    errors += u64::from(listed.is_err());
    for name in names.iter().filter(|name| !matches!(&name[..], b"." | b"..")) {
        let attr = match n.fs.lookup(dir, name).map(done) {
            Ok(Some(attr)) => attr,
            Ok(None) => continue,
            Err(_) => {
                errors += 1;
                continue;
            }
        };
        read += 1;
        let ino = attr.ino;
        let failed = match attr.mode & 0o170_000 {
            0o040_000 if depth > 0 => {
                let below = read_everything(n, ino, depth - 1);
                (read, errors) = (read + below.0, errors + below.1);
                false
            }
            0o120_000 => n.fs.readlink(ino).is_err(),
            0o100_000 => {
                let mut out = vec![0; 200_000];
                n.fs.read(ino, 0, &mut out, false).is_err() || n.fs.listxattr(ino).is_err()
            }
            _ => false,
        };
        errors += u64::from(failed);
    }
    (read, errors)
}

/// One block of metadata is garbage: whole, in its first bytes, or in a few. Reading gives errors at most: it writes nothing, and the mount
/// goes on. Then one file is made: it works, or says what is wrong.
#[test]
fn a_garbage_block_costs_what_depends_on_it_and_reading_writes_nothing() {
    let rounds: u64 = std::env::var("CAIRN_STEPS").ok().and_then(|s| s.parse().ok()).unwrap_or(40);
    for bsize in [512u32, 4096] {
        let (image, files) = populated(bsize);
        let mut block = vec![0; bsize as usize];
        let metadata: Vec<u64> = (0..image.size() / u64::from(bsize))
            .filter(|b| {
                image.read(b * u64::from(bsize), &mut block);
                block[..4] == [1, 0x16, 0x19, 0x70] && matches!(block[7], 1..=7 | 10)
            })
            .collect();
        let (mut mounted, mut all, mut wrong) = (0, 0, 0);
        for seed in 0..rounds {
            println!("CAIRN_SEED={seed} block size {bsize}");
            let mut rng = Rng::new(seed * 2 + 1);
            let lun = MemLun::from_image(image.clone(), 512);
            let at = metadata[rng.below(metadata.len() as u64) as usize] * u64::from(bsize);
            lun.read_at(at, &mut block).unwrap();
            let n = [1, 24, bsize as u64][rng.below(3) as usize];
            let from = rng.below(u64::from(bsize) - n + 1);
            for byte in &mut block[from as usize..(from + n) as usize] {
                *byte = rng.next() as u8;
            }
            lun.write_at(at, &block).unwrap();
            let options = MountOptions { read_only: true, ..MountOptions::default() };
            let Ok(vol) = Volume::mount(Arc::new(lun.clone()), LocalSpace::new(), options) else { continue };
            mounted += 1;
            let node = Node { fs: Fs::new(vol, FsOptions::default()) };
            let events = lun.log_len();
            let (read, errors) = read_everything(&node, node.root(), 3);
            (all, wrong) = (all + read, wrong + errors);
            assert_eq!(lun.log_len(), events, "reading has written");
            node.fs.volume().check().expect("reading never withdraws");
            let _ = node.fs.stop();
            let _ = node.fs.volume().unmount();
            let Ok(vol) = Volume::mount(Arc::new(lun), LocalSpace::new(), MountOptions::default()) else {
                continue;
            };
            let node = Node { fs: Fs::new(vol, FsOptions::default()) };
            if let Ok(made) = node.fs.mknod(ME, node.root(), b"made", 0o600, NewNode::File).map(done) {
                let _ = node.fs.write(made.ino, 0, &vec![5; 50_000], WriteMode::default());
            }
            let _ = node.fs.stop();
            let _ = node.fs.volume().unmount();
        }
        println!("block size {bsize}: {mounted} of {rounds} mounted, {all} inodes read, {wrong} errors");
        assert!(
            mounted * 2 > rounds && all > mounted * files.len() as u64,
            "most of the volume stays readable"
        );
    }
}

/// Blocks of a directory's tree that lead to this or hold it, by kind (byte 7 of the header).
fn blocks_of_kind(image: &Image, bsize: u32, kind: u8, mine: impl Fn(&[u8]) -> bool) -> Vec<u64> {
    let mut block = vec![0; bsize as usize];
    (0..image.size() / u64::from(bsize))
        .filter(|b| {
            image.read(b * u64::from(bsize), &mut block);
            block[..4] == [1, 0x16, 0x19, 0x70] && block[7] == kind && mine(&block)
        })
        .collect()
}

/// Damage that an operation meets is found before the first change: the operation fails, the mount goes on.
#[test]
fn damage_found_on_the_way_to_a_change_withdraws_nothing() {
    let bsize = 512;
    let rig = Rig::new(bsize, 24);
    let node = rig.mount();
    let (a, b) = (node.dir(node.root(), "a"), node.dir(node.root(), "b"));
    let moved = node.dir(a, "moved");
    let big = node.dir(node.root(), "big");
    for i in 0..40 {
        node.file(moved, &format!("entry{i}"));
    }
    for i in 0..600 {
        node.file(big, &format!("entry{i}"));
    }
    node.unmount();
    let image = rig.lun.durable();
    let damage = |at: u64| {
        let lun = MemLun::from_image(image.clone(), 512);
        lun.write_at(at * u64::from(bsize), &vec![0xA5; bsize as usize]).unwrap();
        Rig { lun }
    };

    // the leaves of the directory that is moved, of which one has its `..`
    let leaves = blocks_of_kind(&image, bsize, 6, |leaf| {
        gfs::ondisk::leaf::Leaf::decode(leaf).is_ok_and(|head| head.inode == moved.addr.0)
    });
    let mut failed = 0;
    for leaf in leaves {
        let rig = damage(leaf);
        let node = rig.mount();
        for name in ["a", "b"] {
            node.get(node.root(), name).unwrap();
        }
        node.get(a, "moved");
        for mode in [RenameMode::Replace, RenameMode::NoReplace] {
            let result = node.fs.rename(a, b"moved", b, b"moved", mode);
            node.fs.volume().check().expect("a damaged leaf withdraws nothing");
            match result {
                Err(Error::Corrupt { block, .. }) => {
                    assert_eq!(block.0, leaf);
                    failed += 1;
                }
                Err(e) => assert_eq!(e.errno(), libc::ENOENT, "{e}"),
                Ok(_) => {}
            }
        }
        node.file(node.root(), "goes on");
    }
    assert!(failed >= 2, "the leaf with .. was damaged");

    // blocks of the hash table: kind 7
    let tables = blocks_of_kind(&image, bsize, 7, |_| true);
    assert!(tables.len() > 1, "a table of {} blocks", tables.len());
    let mut failed = 0;
    for table in tables {
        // a table of a system directory is in the way of the mount
        let shared = Arc::new(damage(table).lun);
        let Ok(vol) = Volume::mount(shared, LocalSpace::new(), MountOptions::default()) else { continue };
        let node = Node { fs: Fs::new(vol, FsOptions::default()) };
        node.get(node.root(), "big").unwrap();
        for i in 0..400 {
            if let Err(e) = node.fs.mknod(ME, big, format!("new{i}").as_bytes(), 0o600, NewNode::File) {
                assert!(matches!(&e, Error::Corrupt { .. }), "{e}");
                failed += 1;
            }
            node.fs.volume().check().expect("a damaged table withdraws nothing");
        }
    }
    assert!(failed > 0, "a damaged table was met");
}

/// The block of garbage, as a volume of its own.
fn with_garbage(image: &Image, bsize: u32, blocks: &[u64]) -> Rig {
    let lun = MemLun::from_image(image.clone(), 512);
    for at in blocks {
        lun.write_at(at * u64::from(bsize), &vec![0xA5; bsize as usize]).unwrap();
    }
    Rig { lun }
}

fn try_mount(rig: &Rig) -> gfs::Result<Node> {
    let vol = Volume::mount(Arc::new(rig.lun.clone()), LocalSpace::new(), MountOptions::default())?;
    Ok(Node { fs: Fs::new(vol, FsOptions::default()) })
}

#[test]
fn a_damaged_superblock_is_no_volume() {
    for bsize in [512, 4096] {
        let (image, _) = populated(bsize);
        let at = (64 << 10) / u64::from(bsize);
        let rig = with_garbage(&image, bsize, &[at]);
        let error = try_mount(&rig).err().expect("without a superblock there is nothing to mount");
        println!("{error}");
        assert!(error.to_string().contains("superblock"), "{error}");
        assert_eq!(rig.lun.log_len(), 1, "nothing but the damage is written");
    }
}

/// What a dead node's journal does not give is not passed over: the mount is refused, with journal and place.
#[test]
fn a_damaged_journal_of_a_dead_node_refuses_the_mount() {
    for bsize in [512u32, 4096] {
        let rig = Rig::new(bsize, 24);
        let node = rig.mount();
        let from = rig.lun.log_len();
        for i in 0..10 {
            node.file(node.root(), &format!("f{i}"));
        }
        node.fs.syncfs().unwrap();
        let image = rig.lun.durable();
        let mut descriptors: Vec<u64> = Vec::new();
        for (offset, data) in rig.lun.log_since(from).iter().filter_map(|e| e.write()) {
            for (i, block) in data.chunks_exact(bsize as usize).enumerate() {
                if block[..4] == [1, 0x16, 0x19, 0x70] && block[7] == 9 {
                    descriptors.push(offset / u64::from(bsize) + i as u64);
                }
            }
        }
        let headers = blocks_of_kind(&image, bsize, 8, |_| true);
        assert!(!descriptors.is_empty() && !headers.is_empty());
        for damaged in descriptors.iter().map(|d| vec![*d]).chain([headers.clone()]) {
            let rig = with_garbage(&image, bsize, &damaged);
            let error = try_mount(&rig).err().expect("the journal cannot be replayed");
            println!("{error}");
            assert!(matches!(&error, Error::Journal { jid, .. } if jid.0 == 0), "{damaged:?}: {error:?}");
            assert!(error.errno() == libc::EIO);
        }
        node.unmount();
    }
}
