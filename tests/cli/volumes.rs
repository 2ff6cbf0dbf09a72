//! Devices that hold no volume, a damaged one, or something else: `mount.gfs`, `fsck.gfs`, `mkfs.gfs`.

use super::{Mount, blank, can_mount, hash, put, say, scratch, text, untouched, volume};
use cairn_base::exit;
use gfs::ondisk::sb::SB_OFFSET;
use std::path::Path;

fn mount(device: &str, at: &Path) -> super::Said {
    say(&["mount.gfs", "-o", "lockproto=lock_nolock", device, text(at)])
}

#[test]
fn what_is_no_volume_is_named_with_the_reason_and_left_alone() {
    if !can_mount() {
        return;
    }
    let dir = scratch();
    let at = dir.path().join("mnt");
    std::fs::create_dir(&at).unwrap();
    blank(dir.path(), "empty", 0);
    blank(dir.path(), "sector", 512);
    blank(dir.path(), "small", 65536 + 100);
    blank(dir.path(), "zeros", 64 << 20);
    put(&blank(dir.path(), "ext4", 64 << 20), 1080, &[0x53, 0xef]);
    let disk = blank(dir.path(), "disk", 64 << 20);
    super::qdisk::partition(&disk);
    volume(dir.path(), "whole");
    // name, what fsck.gfs answers, what both say
    let cases: [(&str, i32, &[&str]); 12] = [
        ("empty", exit::fsck::FAILED, &["is empty"]),
        ("sector", exit::fsck::FAULTS, &["only 512 bytes, too small for a GFS2 volume", "#part=N"]),
        ("small", exit::fsck::FAULTS, &["too small for a GFS2 volume"]),
        ("zeros", exit::fsck::FAULTS, &["not a GFS2 volume", "name the right device"]),
        ("ext4", exit::fsck::FAULTS, &["not a GFS2 volume", "an ext2/3/4 file system"]),
        ("disk", exit::fsck::FAULTS, &["not a GFS2 volume", "a GPT partition table", "#part=N"]),
        ("disk#part=9", exit::fsck::FAILED, &["no usable partition 9"]),
        ("disk#part=0", exit::fsck::FAILED, &["partition number is not in 1…128"]),
        ("disk#part=x", exit::fsck::FAILED, &["partition number is not a number"]),
        ("whole#part=1", exit::fsck::FAILED, &["no usable partition 1", "no GPT signature"]),
        ("nothing", exit::fsck::FAILED, &["cannot open: No such file"]),
        ("mnt", exit::fsck::FAILED, &["neither a regular file nor a block device"]),
    ];
    for (name, fsck, words) in cases {
        let device = dir.path().join(name);
        let file = dir.path().join(name.split('#').next().unwrap());
        untouched(&file, || {
            let said = mount(text(&device), &at);
            said.refused(exit::mount::FAILED, words).refused(exit::mount::FAILED, &[text(&device)]);
            let said = say(&["fsck.gfs", text(&device)]);
            assert_eq!(said.code, fsck, "{}: {}{}", said.line, said.out, said.err);
            let all = format!("{}{}", said.out, said.err);
            for word in words {
                assert!(all.contains(word), "{}: no {word:?} in {all}", said.line);
            }
        });
    }
    assert!(!super::is_mounted(&at));
    mount("iscsi://host/lun", &at).refused(exit::mount::FAILED, &["iscsi://host/lun", "not supported"]);
}

#[test]
fn damaged_and_unsupported_superblocks_are_told_apart() {
    if !can_mount() {
        return;
    }
    let dir = scratch();
    let at = dir.path().join("mnt");
    std::fs::create_dir(&at).unwrap();
    let good = volume(dir.path(), "good");
    let cases: [(u64, &[u8], &[&str]); 7] = [
        (0, &[0; 4], &["not a GFS2 volume", "no superblock at byte 65536"]),
        (4, &[0, 0, 0, 4], &["superblock is damaged", "fsck.gfs2 mends it"]),
        (24, &1309_u32.to_be_bytes(), &["GFS2 format 1309 is not supported", "1801 and 1802"]),
        (24, &1803_u32.to_be_bytes(), &["GFS2 format 1803 is not supported"]),
        (28, &1901_u32.to_be_bytes(), &["GFS2 format 1901 is not supported", "1900"]),
        (36, &8192_u32.to_be_bytes(), &["blocks of 8192 bytes are not supported", "4096"]),
        (40, &[0, 0, 0, 9], &["superblock is damaged", "sb_bsize_shift is 9"]),
    ];
    for (offset, bytes, words) in cases {
        let bad = dir.path().join("bad");
        std::fs::copy(&good, &bad).unwrap();
        put(&bad, SB_OFFSET + offset, bytes);
        untouched(&bad, || {
            mount(text(&bad), &at).refused(exit::mount::FAILED, words).refused(32, &[text(&bad)]);
            let said = say(&["fsck.gfs", text(&bad)]);
            assert_eq!(said.code, exit::fsck::FAULTS, "{}{}", said.out, said.err);
            assert!(words.iter().all(|w| said.out.contains(w)), "{words:?}: {}", said.out);
        });
    }
    // A protocol that we do not know is the volume's word only; ours goes before it.
    let foreign = dir.path().join("foreign");
    std::fs::copy(&good, &foreign).unwrap();
    put(&foreign, SB_OFFSET + 96, b"lock_gulm\0\0\0");
    untouched(&foreign, || {
        say(&["mount.gfs", text(&foreign), text(&at)]).refused(
            exit::mount::FAILED,
            &[text(&foreign), "lock protocol \"lock_gulm\" is not supported", "-o lockproto=lock_nolock"],
        );
    });
    Mount::new(&foreign, &at).end(&foreign);
}

#[test]
fn a_device_smaller_than_its_volume_is_refused() {
    if !can_mount() {
        return;
    }
    let dir = scratch();
    let at = dir.path().join("mnt");
    std::fs::create_dir(&at).unwrap();
    let cut = volume(dir.path(), "cut");
    std::fs::File::options().write(true).open(&cut).unwrap().set_len(20 << 20).unwrap();
    untouched(&cut, || {
        mount(text(&cut), &at)
            .refused(exit::mount::FAILED, &[text(&cut), "smaller than the volume", "the device at 5120"]);
        let said = say(&["fsck.gfs", text(&cut)]);
        assert_eq!(said.code, exit::fsck::FAULTS, "{}", said.err);
        assert!(said.out.contains("smaller than the volume"), "{}", said.out);
    });
    // with its size back it is whole again
    std::fs::File::options().write(true).open(&cut).unwrap().set_len(64 << 20).unwrap();
    assert_eq!(say(&["fsck.gfs", text(&cut)]).code, exit::OK);
}

#[test]
fn mkfs_overwrites_nothing_without_being_told() {
    let dir = scratch();
    volume(dir.path(), "gfs2");
    put(&blank(dir.path(), "ext4", 64 << 20), 1080, &[0x53, 0xef]);
    put(&blank(dir.path(), "xfs", 64 << 20), 0, b"XFSB");
    let mbr = blank(dir.path(), "mbr", 64 << 20);
    put(&mbr, 446 + 4, &[0x83]);
    put(&mbr, 510, &[0x55, 0xaa]);
    super::qdisk::partition(&blank(dir.path(), "gpt", 64 << 20));
    let qdisk = blank(dir.path(), "qdisk", 64 << 20);
    say(&["mkqdisk", "-q", "-c", text(&qdisk), "-l", "old"]).worked();
    for (name, what) in [
        ("gfs2", "a GFS2 (or GFS) file system"),
        ("ext4", "an ext2/3/4 file system"),
        ("xfs", "an XFS file system"),
        ("mbr", "a partition table"),
        ("gpt", "a GPT partition table"),
        ("qdisk", "a quorum disk"),
    ] {
        let device = dir.path().join(name);
        let args = ["mkfs.gfs", "-q", "-p", "lock_nolock", text(&device)];
        untouched(&device, || {
            say(&args).refused(
                exit::FAILED,
                &[text(&device), "appears to contain", what, "nothing was written", "-O"],
            );
        });
        let before = hash(&device);
        say(&["mkfs.gfs", "-q", "-O", "-p", "lock_nolock", text(&device)]).worked();
        assert!(before != hash(&device), "{name}");
        assert_eq!(say(&["fsck.gfs", text(&device)]).code, exit::OK, "{name}");
    }
}

#[test]
fn mkfs_says_what_is_wrong_with_its_arguments() {
    let dir = scratch();
    let device = blank(dir.path(), "device", 64 << 20);
    let d = text(&device);
    let usage: [(&[&str], &[&str]); 10] = [
        (&["--bogus", d], &["--bogus", "--help"]),
        (&[], &["<DEVICE>"]),
        (&[d], &["lock_dlm needs a lock table", "-t cluster:fsname"]),
        (&["-t", "a", d], &["`a` is not cluster:fsname"]),
        (&["-t", "a b:c", d], &["is not cluster:fsname"]),
        (&["-p", "lock_gulm", d], &["`lock_gulm`", "lock_dlm or lock_nolock"]),
        (&["-t", "a:b", "-j", "0", d], &["number of journals is 0", "1 to 65536"]),
        (&["-t", "a:b", "-b", "8192", d], &["block size 8192 is not 512, 1024, 2048 or 4096"]),
        (&["-t", "a:b", d, "999999999"], &["999999999 blocks wanted", "has 16384"]),
        (&["-t", "a:b", "--root-owner", "me", d], &["UID:GID"]),
    ];
    untouched(&device, || {
        for (args, words) in usage {
            let all: Vec<&str> = ["mkfs.gfs"].iter().chain(args).copied().collect();
            say(&all).refused(exit::USAGE, words);
        }
        say(&["mkfs.gfs", "-t", "a:b", "-j", "9", d]).refused(exit::FAILED, &[d, "too few for 9 journal(s)"]);
        say(&["mkfs.gfs", "-t", "a:b", &format!("{d}#part=1")])
            .refused(exit::FAILED, &["no usable partition 1"]);
    });
    let small = blank(dir.path(), "small", 1 << 20);
    untouched(&small, || {
        say(&["mkfs.gfs", "-t", "a:b", text(&small)]).refused(exit::FAILED, &[text(&small), "too few"]);
    });
    say(&["fsck.gfs", "--bogus", d]).refused(exit::fsck::USAGE, &["--bogus"]);
    say(&["fsck.gfs"]).refused(exit::fsck::USAGE, &["<DEVICE>"]);
}

#[test]
fn the_root_directory_belongs_to_whom_mkfs_was_told() {
    if !can_mount() {
        return;
    }
    use std::os::unix::fs::MetadataExt;
    let dir = scratch();
    let device = blank(dir.path(), "device", 64 << 20);
    say(&["mkfs.gfs", "-q", "-p", "lock_nolock", "--root-owner", "12:34", text(&device)]).worked();
    assert_eq!(say(&["fsck.gfs", text(&device)]).code, exit::OK);
    let m = Mount::new(&device, &dir.path().join("mnt"));
    let about = std::fs::metadata(&m.at).unwrap();
    assert_eq!((about.uid(), about.gid()), (12, 34));
    m.end(&device);
}

/// A damaged file answers EIO, the log of the mount names the block, and everything else is readable.
#[test]
fn damage_is_told_with_its_block_and_stays_where_it_is() {
    use std::os::unix::fs::MetadataExt;
    if !can_mount() {
        return;
    }
    let dir = scratch();
    let device = volume(dir.path(), "volume");
    let (at, run_dir) = (dir.path().join("mnt"), dir.path().join("run"));
    let m = Mount::new(&device, &at);
    for name in ["bad", "good"] {
        std::fs::write(at.join(name), name).unwrap();
    }
    // The low 44 bits of an inode's number are its address.
    let block = std::fs::metadata(at.join("bad")).unwrap().ino() & ((1 << 44) - 1);
    m.end(&device);
    put(&device, block * 4096, b"xxxx");
    let options = format!("lockproto=lock_nolock,run_dir={}", text(&run_dir));
    say(&["mount.gfs", "-o", &options, text(&device), text(&at)]).worked();
    let m = Mount { at: at.clone() };
    assert!(!run_dir.exists(), "there is nothing to tell");
    assert_eq!(std::fs::read(at.join("bad")).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(std::fs::read(at.join("good")).unwrap(), b"good");
    let log = std::fs::read_to_string(run_dir.join("log/mount-vol.log")).unwrap();
    assert!(log.lines().any(|l| l.contains("ERROR") && l.contains(&format!("block {block}"))), "{log}");
    m.end(&device);
}
