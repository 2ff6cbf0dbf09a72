//! Bad input to the command line: each refusal names the thing and the cure, ends with the documented exit code
//! (docs/runbook.md), and has written nothing.

mod cluster;
mod config;
mod demo;
mod mounts;
mod qdisk;
mod unprivileged;
mod volumes;

use cairn_base::exit;
use cairn_tests::program::cairn;
use sha2::{Digest, Sha256};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(20);
/// For anything that ends by itself.
const LIMIT: Duration = Duration::from_secs(120);

/// What a command said.
struct Said {
    code: i32,
    out: String,
    err: String,
    line: String,
}

impl Said {
    /// It failed with this code, and standard error contains every one of `words`.
    #[track_caller]
    fn refused(&self, code: i32, words: &[&str]) -> &Self {
        assert_eq!(self.code, code, "{}\nout: {}\nerr: {}", self.line, self.out, self.err);
        for word in words {
            assert!(self.err.contains(word), "{}\nno {word:?} in: {}", self.line, self.err);
        }
        assert!(!self.err.contains("panicked"), "{}: {}", self.line, self.err);
        self
    }

    #[track_caller]
    fn worked(&self) -> &Self {
        self.refused(exit::OK, &[])
    }
}

/// Runs a program to its end, which must come within [`LIMIT`].
fn run(command: &mut Command) -> Said {
    let line = format!("{command:?}");
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{line}: {e}"));
    let (pid, ended) = (child.id() as i32, std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let (watch, text) = (std::sync::Arc::clone(&ended), line.clone());
    std::thread::spawn(move || {
        let start = Instant::now();
        while start.elapsed() < LIMIT {
            std::thread::sleep(POLL * 10);
            if watch.load(std::sync::atomic::Ordering::Acquire) {
                return;
            }
        }
        eprintln!("{text}: not done after {LIMIT:?}, killed");
        // SAFETY: our child, not reaped yet: it has not ended.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    });
    let out = child.wait_with_output().expect("output");
    ended.store(true, std::sync::atomic::Ordering::Release);
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    Said { code: out.status.code().unwrap_or(-1), out: text(&out.stdout), err: text(&out.stderr), line }
}

/// `cairn` with these arguments.
fn say<S: AsRef<OsStr>>(args: &[S]) -> Said {
    run(Command::new(cairn()).args(args))
}

/// A directory for one test.
fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("cairn-cli-").tempdir().expect("directory")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A sparse file.
fn blank(dir: &Path, name: &str, size: u64) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).and_then(|f| f.set_len(size)).expect("image");
    path
}

/// A small volume for one node.
fn volume(dir: &Path, name: &str) -> PathBuf {
    let path = blank(dir, name, 64 << 20);
    say(&["mkfs.gfs", "-q", "-p", "lock_nolock", "-t", "lone:vol", text(&path)]).worked();
    path
}

fn put(path: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(path).and_then(|f| f.write_all_at(bytes, at)).expect("write");
}

/// Everything in a file, as a hash; of what is no regular file: nothing.
fn hash(path: &Path) -> Option<[u8; 32]> {
    if !path.metadata().ok()?.is_file() {
        return None;
    }
    let mut file = File::open(path).expect("open");
    let (mut sum, mut buf) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buf).expect("read") {
            0 => return Some(sum.finalize().into()),
            n => sum.update(&buf[..n]),
        }
    }
}

/// What `act` answers; the file is the same before and after.
#[track_caller]
fn untouched<T>(path: &Path, act: impl FnOnce() -> T) -> T {
    let before = hash(path);
    let answer = act();
    assert!(before == hash(path), "{} was written to", path.display());
    answer
}

/// Whether this machine can mount; says so when it cannot.
fn can_mount() -> bool {
    let ok = Path::new("/dev/fuse").exists() && nix::unistd::geteuid().is_root();
    if !ok {
        eprintln!("skipped: needs the superuser and /dev/fuse");
    }
    ok
}

/// A mount by `mount.gfs` alone on its device; unmounted when dropped.
struct Mount {
    at: PathBuf,
}

impl Mount {
    fn new(device: &Path, at: &Path) -> Self {
        fs::create_dir_all(at).expect("mount point");
        let said = say(&["mount.gfs", "-o", "lockproto=lock_nolock", text(device), text(at)]);
        said.worked();
        assert_eq!((said.out.as_str(), said.err.as_str()), ("", ""), "a mount that works says nothing");
        Self { at: at.to_owned() }
    }

    /// Returns when the process that served it has let the device go.
    fn end(self, device: &Path) {
        let at = self.at.clone();
        drop(self);
        assert!(!is_mounted(&at));
        let start = Instant::now();
        let alone = lun::OpenOptions::default().share(lun::Share::Exclusive);
        while lun::open(text(device), &alone).is_err() {
            assert!(start.elapsed() < LIMIT, "{}: still held after the unmount", device.display());
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.at, nix::mount::MntFlags::empty());
        if is_mounted(&self.at) {
            let _ = nix::mount::umount2(&self.at, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

fn is_mounted(at: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    mounts.lines().any(|l| l.split(' ').nth(1) == at.to_str())
}
