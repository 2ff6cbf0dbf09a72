//! The same as a user in no special group: `/dev/fuse` open to everybody, mounts through fusermount3.
//!
//! The user lives in a mount namespace with a device node of its own, so that nothing of this machine changes.

use super::{Said, cairn, run, scratch, text, untouched, volume};
use cairn_base::exit;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

const USER: u32 = 65534;

/// A home directory with the program in it, and `/dev/fuse` as it is to be.
struct User {
    home: tempfile::TempDir,
    fuse_mode: &'static str,
}

impl User {
    /// `None`, said with the reason, where this machine does not allow it.
    fn new(fuse_mode: &'static str) -> Option<Self> {
        if !super::can_mount() {
            return None;
        }
        let home = scratch();
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o700)).unwrap();
        fs::copy(cairn(), home.path().join("cairn")).unwrap();
        chown(home.path(), Some(USER), Some(USER)).unwrap();
        let user = Self { home, fuse_mode };
        let said = user.run(&["sh", "-c", "command -v fusermount3 >/dev/null && cat /dev/null"]);
        if said.code == 0 {
            return Some(user);
        }
        eprintln!("skipped: no mount namespace, device node, setpriv or fusermount3 here: {}", said.err);
        None
    }

    fn program(&self) -> PathBuf {
        self.home.path().join("cairn")
    }

    fn run(&self, args: &[&str]) -> Said {
        let dev = format!("{}.dev", self.home.path().display());
        let script = format!(
            "set -e; mkdir -p '{dev}'; mount -t tmpfs none '{dev}'; mknod -m {} '{dev}/fuse' c 10 229; \
             mount --bind '{dev}/fuse' /dev/fuse; cd /; \
             exec setpriv --reuid={USER} --regid={USER} --clear-groups -- \"$@\"",
            self.fuse_mode
        );
        let home = self.home.path();
        let said = run(Command::new("unshare")
            .args(["-m", "--propagation", "private", "sh", "-c", &script, "sh"])
            .args(args)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", home)
            .env("TMPDIR", home));
        let _ = fs::remove_dir(dev);
        said
    }

    fn cairn(&self, args: &[&str]) -> Said {
        let program = self.program();
        let all: Vec<&str> = [text(&program)].into_iter().chain(args.iter().copied()).collect();
        self.run(&all)
    }

    fn own(&self, path: &Path) {
        chown(path, Some(USER), Some(USER)).unwrap();
    }
}

fn fuse_mode() -> u32 {
    fs::metadata("/dev/fuse").unwrap().mode()
}

#[test]
fn the_demonstration_needs_no_privilege() {
    let before = fuse_mode();
    let Some(user) = User::new("666") else { return };
    let said = user.cairn(&["demo", "--json"]);
    said.worked();
    let report: serde_json::Value = serde_json::from_str(&said.out).expect(&said.out);
    assert_eq!(report["ok"], true, "{report}\n{}", said.err);
    assert_eq!(
        (&report["lost_writes"], &report["last_node_kept_service"]),
        (&0.into(), &true.into()),
        "{report}"
    );
    let left: Vec<_> = fs::read_dir(user.home.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["cairn"], "the demonstration cleans up");
    assert_eq!(fuse_mode(), before);
}

#[test]
fn a_user_without_the_device_is_told_before_anything_is_written() {
    let Some(user) = User::new("600") else { return };
    let at = user.home.path().join("mnt");
    fs::create_dir(&at).unwrap();
    let device = volume(user.home.path(), "volume");
    user.own(&at);
    user.own(&device);
    let words = ["/dev/fuse", "Permission denied", "chmod 666 /dev/fuse"];
    untouched(&device, || {
        user.cairn(&["mount.gfs", "-o", "lockproto=lock_nolock", text(&device), text(&at)])
            .refused(exit::mount::USAGE, &words);
    });
    let dir = user.home.path().join("c");
    for command in ["up", "demo"] {
        user.cairn(&[command, "--dir", text(&dir)]).refused(exit::FAILED, &words);
        assert!(!dir.exists());
    }
}

#[test]
fn a_user_may_not_touch_what_is_not_theirs() {
    let Some(user) = User::new("666") else { return };
    let at = user.home.path().join("mnt");
    fs::create_dir(&at).unwrap();
    user.own(&at);
    let device = volume(user.home.path(), "volume");
    fs::set_permissions(&device, fs::Permissions::from_mode(0o600)).unwrap();
    let d = text(&device);
    untouched(&device, || {
        let denied = [d, "Permission denied"];
        user.cairn(&["mount.gfs", "-o", "lockproto=lock_nolock", d, text(&at)])
            .refused(exit::mount::FAILED, &denied);
        user.cairn(&["mkfs.gfs", "-O", "-p", "lock_nolock", d]).refused(exit::FAILED, &denied);
        user.cairn(&["mkqdisk", "-y", "-O", "-c", d, "-l", "x"]).refused(exit::FAILED, &denied);
        user.cairn(&["fsck.gfs", d]).refused(exit::fsck::FAILED, &denied);
    });
    // A mount point of somebody else.
    let own = volume(user.home.path(), "own");
    user.own(&own);
    untouched(&own, || {
        user.cairn(&["mount.gfs", "-o", "lockproto=lock_nolock", text(&own), "/usr"])
            .refused(exit::mount::USAGE, &["/usr", "not permitted to mount", "a directory of yours"]);
    });
}
