//! `mount.gfs` without a cluster: options, mount points, devices that are in use, a system that cannot mount, a full volume.

use super::{LIMIT, Mount, POLL, cairn, can_mount, is_mounted, run, say, scratch, text, untouched, volume};
use cairn_base::exit;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

const NOLOCK: [&str; 3] = ["mount.gfs", "-o", "lockproto=lock_nolock"];

#[test]
fn options_and_mount_points_are_checked_before_the_volume_is_touched() {
    if !can_mount() {
        return;
    }
    let dir = scratch();
    let device = volume(dir.path(), "volume");
    let at = dir.path().join("mnt");
    fs::create_dir(&at).unwrap();
    fs::write(dir.path().join("file"), "x").unwrap();
    let (d, m) = (text(&device), text(&at));
    let usage: [(&[&str], &[&str]); 8] = [
        (&["--bogus", d, m], &["--bogus", "--help"]),
        (&[d], &["<DIR>"]),
        (&["-o", "frob", d, m], &["option frob: is unknown"]),
        (&["-o", "lockproto=lock_gulm", d, m], &["lockproto=lock_gulm", "lock_nolock or lock_dlm"]),
        (&["-o", "commit=0", d, m], &["commit=0", "at least one second"]),
        (&["-o", "cache=1M", d, m], &["cache=1M", "at least 16M"]),
        (&["-o", "journal=x", d, m], &["journal=x", "needs a number"]),
        (&["-o", "remount,ro", d, m], &["remount", "unmount and mount again"]),
    ];
    let nowhere = dir.path().join("nowhere");
    let file = dir.path().join("file");
    let run_dir = dir.path().join("run");
    let sock = run_dir.join("cairnd.sock");
    untouched(&device, || {
        for (args, words) in usage {
            let all: Vec<&str> = ["mount.gfs"].iter().chain(args).copied().collect();
            say(&all).refused(exit::mount::USAGE, words);
        }
        let failed = |extra: &[&str], words: &[&str]| {
            let all: Vec<&str> = NOLOCK.iter().chain(extra).copied().collect();
            say(&all).refused(exit::mount::FAILED, words);
        };
        failed(&[d, text(&nowhere)], &[text(&nowhere), "no such directory", "mkdir"]);
        failed(&[d, text(&file)], &[text(&file), "not a directory"]);
        failed(
            &["-o", "journal=5", d, m],
            &["lone:vol", "there is no journal 5: the volume has 1", "gfs2_jadd"],
        );
        let clustered = ["mount.gfs", "-o", "lockproto=lock_dlm", "--run-dir", text(&run_dir), d, m];
        say(&clustered).refused(
            exit::mount::FAILED,
            &["lone:vol", text(&sock), "is it running", "lockproto=lock_nolock"],
        );
    });
    assert!(!is_mounted(&at));
    assert!(!run_dir.exists());
}

#[test]
fn a_mount_point_need_not_be_empty() {
    if !can_mount() {
        return;
    }
    let dir = scratch();
    let device = volume(dir.path(), "volume");
    let at = dir.path().join("mnt");
    fs::create_dir(&at).unwrap();
    fs::write(at.join("below"), "x").unwrap();
    let m = Mount::new(&device, &at);
    assert!(!at.join("below").exists(), "hidden while mounted");
    m.end(&device);
    assert_eq!(fs::read(at.join("below")).unwrap(), b"x");
}

#[test]
fn a_device_in_use_is_left_to_its_user() {
    if !can_mount() {
        return;
    }
    let dir = scratch();
    let device = volume(dir.path(), "volume");
    let second = dir.path().join("second");
    fs::create_dir(&second).unwrap();
    let d = text(&device);
    let refuse_all = |clustered_too: bool| {
        untouched(&device, || {
            let again: Vec<&str> = NOLOCK.iter().chain(&[d, text(&second)]).copied().collect();
            say(&again).refused(exit::mount::FAILED, &[d, "is in use on this host", "end that one first"]);
            say(&["mkfs.gfs", "-q", "-O", "-p", "lock_nolock", d])
                .refused(exit::FAILED, &[d, "is in use on this host"]);
            say(&["mkqdisk", "-y", "-O", "-c", d, "-l", "x"])
                .refused(exit::FAILED, &[d, "is in use on this host"]);
            say(&["fsck.gfs", "--replay", d]).refused(exit::fsck::FAILED, &[d, "is in use on this host"]);
            if clustered_too {
                say(&["fsck.gfs", d]).refused(exit::fsck::FAILED, &[d, "is in use on this host"]);
            }
        });
        assert!(!is_mounted(&second));
    };
    // by another mount
    let m = Mount::new(&device, &dir.path().join("first"));
    refuse_all(true);
    fs::write(m.at.join("still"), "here").unwrap();
    m.end(&device);
    // by another process, alone or sharing (as a mount of a cluster does)
    for share in [lun::Share::Exclusive, lun::Share::Shared] {
        let held = lun::open(d, &lun::OpenOptions::default().share(share)).unwrap();
        refuse_all(true);
        drop(held);
    }
    // by one that only reads
    let options = lun::OpenOptions::read_only().share(lun::Share::Exclusive);
    let held = lun::open(d, &options).unwrap();
    refuse_all(false);
    drop(held);
    let m = Mount::new(&device, &second);
    assert_eq!(fs::read(m.at.join("still")).unwrap(), b"here");
    m.end(&device);
}

#[test]
fn a_read_only_spectator_mounts_and_writes_nothing() {
    if !can_mount() {
        return;
    }
    let dir = scratch();
    let device = volume(dir.path(), "volume");
    let at = dir.path().join("mnt");
    Mount::new(&device, &at).end(&device);
    untouched(&device, || {
        say(&["mount.gfs", "-o", "lockproto=lock_nolock,spectator", text(&device), text(&at)]).worked();
        let m = Mount { at: at.clone() };
        let e = fs::write(at.join("x"), "x").unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EROFS));
        m.end(&device);
    });
}

/// A loop device over an image; detached when dropped.
struct Loop(String);

impl Loop {
    fn new(image: &Path) -> Option<Self> {
        let out = Command::new("losetup").args(["--find", "--show"]).arg(image).output().ok()?;
        out.status.success().then(|| Self(String::from_utf8_lossy(&out.stdout).trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// A block device that the kernel has: here claimed by this process as a mount would.
#[test]
fn a_block_device_that_the_kernel_uses_is_refused() {
    use std::os::unix::fs::OpenOptionsExt;
    if !can_mount() {
        return;
    }
    let dir = scratch();
    let image = volume(dir.path(), "image");
    let Some(device) = Loop::new(&image) else {
        eprintln!("skipped: no loop device");
        return;
    };
    let d = device.0.as_str();
    let at = dir.path().join("mnt");
    fs::create_dir(&at).unwrap();
    let claim = File::options().read(true).custom_flags(libc::O_EXCL).open(d).unwrap();
    untouched(&image, || {
        say(&["mkfs.gfs", "-q", "-O", "-p", "lock_nolock", d])
            .refused(exit::FAILED, &[d, "in use on this host", "the kernel has it"]);
        let mount: Vec<&str> = NOLOCK.iter().chain(&[d, text(&at)]).copied().collect();
        say(&mount).refused(exit::mount::FAILED, &[d, "the kernel has it"]);
    });
    drop(claim);
    Mount::new(Path::new(d), &at).end(Path::new(d));
}

/// The blocks of a loop device have two names; what is in use under one is refused under the other.
#[test]
fn a_loop_device_and_its_image_are_one_device() {
    use std::os::unix::fs::OpenOptionsExt;
    if !can_mount() {
        return;
    }
    let dir = scratch();
    let image = volume(dir.path(), "image");
    let Some(device) = Loop::new(&image) else {
        eprintln!("skipped: no loop device");
        return;
    };
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    fs::create_dir(&second).unwrap();
    let refused = |name: &str| {
        untouched(&image, || {
            say(&["mkfs.gfs", "-q", "-O", "-p", "lock_nolock", name])
                .refused(exit::FAILED, &[name, "in use on this host"]);
            let mount: Vec<&str> = NOLOCK.iter().chain(&[name, text(&second)]).copied().collect();
            say(&mount).refused(exit::mount::FAILED, &[name, "in use on this host"]);
        });
    };
    for [used, other] in [[device.0.as_str(), text(&image)], [text(&image), device.0.as_str()]] {
        let m = Mount::new(Path::new(used), &first);
        refused(other);
        m.end(Path::new(used));
        // as a mount of a cluster does
        let held = lun::open(used, &lun::OpenOptions::default().share(lun::Share::Shared)).unwrap();
        refused(other);
        drop(held);
    }
    // by a file system of the kernel
    let claim = File::options().read(true).custom_flags(libc::O_EXCL).open(&device.0).unwrap();
    refused(text(&image));
    drop(claim);
    Mount::new(&image, &first).end(&image);
}

#[test]
fn without_dev_fuse_nothing_is_touched() {
    if !can_mount() {
        return;
    }
    let dir = scratch();
    let device = volume(dir.path(), "volume");
    let at = dir.path().join("mnt");
    fs::create_dir(&at).unwrap();
    let hidden = |args: &[&str]| {
        let script =
            "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9 && exec \"$@\"";
        run(Command::new("unshare")
            .args(["-m", "--propagation", "private", "sh", "-c", script, "sh"])
            .arg(cairn())
            .args(args))
    };
    if hidden(&["--version"]).code != 0 {
        eprintln!("skipped: no mount namespaces here");
        return;
    }
    let mount: Vec<&str> = NOLOCK.iter().chain(&[text(&device), text(&at)]).copied().collect();
    untouched(&device, || {
        hidden(&mount).refused(exit::mount::SYSTEM, &[text(&at), "/dev/fuse", "modprobe fuse", "container"]);
    });
    let cluster = dir.path().join("cluster");
    for command in ["demo", "up"] {
        hidden(&[command, "--dir", text(&cluster)]).refused(exit::FAILED, &["/dev/fuse", "modprobe fuse"]);
        assert!(!cluster.exists(), "cairn {command} left files");
    }
}

#[test]
fn a_full_volume_says_so_and_its_space_returns() {
    if !can_mount() {
        return;
    }
    let dir = scratch();
    let device = volume(dir.path(), "volume");
    let m = Mount::new(&device, &dir.path().join("mnt"));
    let free = || nix::sys::statvfs::statvfs(&m.at).unwrap().blocks_free();
    let at_first = free();
    assert!(at_first > 1000, "{at_first}");
    let chunk = vec![0x5a; 1 << 20];
    for round in 0..3 {
        let path = m.at.join(format!("big-{round}"));
        let mut file = File::create(&path).unwrap();
        let error = loop {
            if let Err(e) = file.write_all(&chunk) {
                break e;
            }
        };
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
        let written = file.metadata().unwrap().len();
        assert!(
            written / 4096 + 256 > at_first,
            "round {round}: only {written} bytes of {at_first} blocks fit"
        );
        // Names still can be taken away, and what was there is still there.
        file.sync_all().unwrap();
        assert!(fs::read(&path).unwrap().iter().all(|b| *b == 0x5a));
        drop(file);
        fs::remove_file(&path).unwrap();
        let start = Instant::now();
        while free() < at_first {
            assert!(start.elapsed() < LIMIT, "round {round}: {} of {at_first} blocks are free again", free());
            std::thread::sleep(POLL);
        }
    }
    m.end(&device);
    assert_eq!(say(&["fsck.gfs", text(&device)]).code, exit::OK);
}
