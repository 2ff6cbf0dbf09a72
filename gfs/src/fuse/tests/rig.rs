//! Volumes in a file, mounted once or several times in this process, and a watchdog over the mounts.

use crate::fuse::adapter::Adapter;
use crate::fuse::{FuseOptions, Mounted, mount_adapter};
use crate::glock::{Glock, GlockType};
use crate::lockspace::LockSpace;
use crate::lockspace::local::LocalSpace;
use crate::lockspace::shared::SharedSpace;
use crate::mkfs::{self, MkfsOptions};
use crate::ops::{Fs, FsOptions};
use crate::volume::{MountOptions, Volume};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Whether this machine lets us mount; says why not, so that a skipped test is seen.
pub(super) fn can_mount() -> bool {
    let ok = Path::new("/dev/fuse").exists() && nix::unistd::geteuid().is_root();
    if !ok {
        eprintln!("skipped: needs /dev/fuse and the superuser");
    }
    ok
}

pub(super) struct Rig {
    image: PathBuf,
    pub(super) space: Arc<SharedSpace>,
    pub(super) mounts: Vec<Mounted>,
    dir: tempfile::TempDir,
}

impl Rig {
    pub(super) fn new(journals: u32, size_mb: u64) -> Self {
        let filter =
            tracing_subscriber::EnvFilter::try_from_env("CAIRN_LOG").unwrap_or_else(|_| "error".into());
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
        // Memory where there is some: then hand-overs, not the disk, set the pace.
        let place = Path::new("/dev/shm");
        let place = if place.is_dir() { place.to_owned() } else { std::env::temp_dir() };
        let dir = tempfile::Builder::new().prefix("cairn-fuse-").tempdir_in(place).unwrap();
        let image = dir.path().join("lun");
        std::fs::File::create(&image).unwrap().set_len(size_mb << 20).unwrap();
        let options = MkfsOptions {
            lock_table: "test:fs".into(),
            journals,
            journal_mb: Some(8),
            ..MkfsOptions::default()
        };
        mkfs::make(&Self::lun(&image), &options, &mut |_, _| {}).unwrap();
        Self { image, space: SharedSpace::new(), mounts: Vec::new(), dir }
    }

    fn lun(image: &Path) -> lun::Lun {
        lun::open(&format!("file:{}", image.display()), &lun::OpenOptions::default()).unwrap()
    }

    fn mount_on(&mut self, space: Arc<dyn LockSpace>, adjust: impl FnOnce(Adapter) -> Adapter) {
        let vol = Volume::mount(Self::lun(&self.image), space, MountOptions::default()).unwrap();
        let fs = Fs::new(vol, FsOptions::default());
        let dir = self.dir.path().join(format!("mnt{}", self.mounts.len()));
        std::fs::create_dir_all(&dir).unwrap();
        let options = FuseOptions { source: "cairn-test".into(), ..FuseOptions::default() };
        self.mounts.push(mount_adapter(fs, &dir, &options, adjust).unwrap());
    }

    /// The only mount of a lone node.
    pub(super) fn mount_alone(&mut self) -> PathBuf {
        self.mount_on(LocalSpace::new(), |a| a);
        self.path(0)
    }

    /// The same with nothing cached, here or in the kernel.
    pub(super) fn remount_alone(&mut self) -> PathBuf {
        self.unmount();
        self.mount_alone()
    }

    fn unmount(&mut self) {
        for mounted in std::mem::take(&mut self.mounts) {
            let dir = mounted.dir().to_owned();
            let fs = mounted.unmount().unwrap();
            fs.stop().unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
            fs.volume().unmount().unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        }
    }

    pub(super) fn mount_shared(&mut self, n: usize) {
        self.mount_shared_with(n, |a| a);
    }

    pub(super) fn mount_shared_with(&mut self, n: usize, adjust: impl Fn(Adapter) -> Adapter) {
        for _ in 0..n {
            let space = self.space.join().1;
            self.mount_on(space, &adjust);
        }
    }

    pub(super) fn path(&self, n: usize) -> PathBuf {
        self.mounts[n].dir().to_owned()
    }

    /// Unmounts everything and has the volume checked by the reference where it is installed.
    pub(super) fn end(mut self) {
        self.unmount();
        let Ok(out) = Command::new("fsck.gfs2").arg("-n").arg(&self.image).output() else { return };
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        // Findings without the report of progress: a long message is cut off where it is needed most.
        let progress =
            |l: &&str| l.starts_with("Starting ") || l.contains(" completed in ") || l.starts_with("Level ");
        let text: Vec<_> = text.lines().filter(|l| !progress(l) && !l.is_empty()).collect();
        assert!(out.status.success(), "fsck.gfs2: {}\n{}", out.status, text.join("\n"));
    }
}

impl Drop for Rig {
    /// After a failure: the kernel lets go of mounts that nobody serves any more.
    fn drop(&mut self) {
        for mounted in &self.mounts {
            abort(mounted.dir());
            let _ = nix::mount::umount2(mounted.dir(), nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

fn connection(dir: &Path) -> Option<PathBuf> {
    const CONTROL: &str = "/sys/fs/fuse/connections";
    if std::fs::read_dir(CONTROL).ok()?.next().is_none() {
        let none: Option<&str> = None;
        let _ = nix::mount::mount(none, CONTROL, Some("fusectl"), nix::mount::MsFlags::empty(), none);
    }
    // The device number is in the table of mounts: stat would ask the server that hangs.
    let table = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let line = table.lines().find(|l| l.split(' ').nth(4) == dir.to_str())?;
    let minor = line.split(' ').nth(2)?.split(':').nth(1)?;
    Some(Path::new(CONTROL).join(minor))
}

/// Every request of the mount fails from now on.
fn abort(dir: &Path) {
    if let Some(connection) = connection(dir) {
        let _ = std::fs::write(connection.join("abort"), "1");
    }
}

/// Users of the mounts live in a process of their own: a page fault of a mapping holds the address space of its process, and a server in the
/// same process would wait for itself.
///
/// Runs test `name` of this binary with `words` in the environment as [`CLIENT`]. Lines that begin with "beat" are signs of life; when none differs from
/// the one before for `limit`, all stacks are printed and the mounts aborted. True when the client ended well in time.
pub(super) fn client(rig: &Rig, name: &str, words: &str, limit: Duration) -> (bool, Vec<String>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CLIENT, words)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (send, lines) = channel();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let reader =
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).for_each(|l| drop(send.send(l))));
    let (mut last, mut since, mut hung) = (String::new(), Instant::now(), false);
    let mut said: Vec<String> = Vec::new();
    loop {
        match lines.recv_timeout(Duration::from_millis(200)) {
            Ok(line) if line.starts_with("beat") => {
                if line != last {
                    (last, since) = (line, Instant::now());
                }
            }
            Ok(line) => {
                if line.starts_with(WRONG) && !said.iter().any(|l| l.starts_with(WRONG)) {
                    eprintln!("{line}");
                    print_glocks(rig, |_| true);
                }
                said.push(line);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if since.elapsed() > limit && !hung {
            hung = true;
            eprintln!("nothing moved for {limit:?}");
            print_glocks(rig, |g| !g.is_idle());
            print_stacks("self");
            print_stacks(&child.id().to_string());
            rig.mounts.iter().for_each(|m| abort(m.dir()));
        }
    }
    reader.join().unwrap();
    let status = child.wait().unwrap();
    if !status.success() {
        said.push(format!("client: {status}"));
    }
    (status.success() && !hung, said)
}

/// Lines of a client that begin with this are findings.
pub(super) const WRONG: &str = "wrong: ";

/// Glocks of inodes and of their users (types 2 and 5) on all mounts.
fn print_glocks(rig: &Rig, which: impl Fn(&Glock) -> bool) {
    for (n, mounted) in rig.mounts.iter().enumerate() {
        let all = mounted.fs().volume().glocks().all();
        let of_inodes = |g: &Glock| matches!(g.name().ty, GlockType::Inode | GlockType::Iopen);
        for glock in all.iter().filter(|g| of_inodes(g) && which(g)) {
            eprintln!("  mount {n}: {glock:?}");
        }
    }
}

/// Name of the variable that makes a client of a test process.
pub(super) const CLIENT: &str = "CAIRN_TEST_CLIENT";

fn print_stacks(pid: &str) {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return };
    for task in tasks.flatten() {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let (name, stack) = (read("comm"), read("stack"));
        if !stack.contains("futex") || stack.contains("fuse") {
            eprintln!("{pid} {} {name}{stack}", task.file_name().to_string_lossy());
        }
    }
}
