//! Who of a node lives: the run directory's lock and list of processes, and how their death is proved.
//!
//! Every process of the node that may write to the LUN takes a *shared* flock on `alive.lock` first, then writes
//! `procs/<pid>` with its incarnation and its start time. Whoever needs the proof of death ("conquers" the
//! directory) kills the listed processes through pidfds until it gets the *exclusive* flock: the kernel drops a lock only
//! when the last thread of its holder is gone, and with it the I/O that was under way. Before it lets go it writes
//! `fenced`, so that a straggler of that life that registers later is refused.
//!
//! A pid is only ever killed after its start time was compared through an open pidfd: a recycled number names somebody else.
//! This works for nodes that run on this machine, and for nothing else; the configuration has to say so (`one_host`).

pub mod marked;

use crate::ipc::IpcError;
use cairn_base::Incarnation;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Pause between two looks at a directory that is not yet empty.
const POLL: Duration = Duration::from_millis(2);

/// How long a registering process waits for a fencer that holds the lock for a moment.
const REGISTER_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AliveError {
    #[error("{path}: {source}")]
    Io { path: String, source: io::Error },
    #[error("{path}: still held after {waited:?} (processes seen: {pids:?})")]
    Held { path: String, waited: Duration, pids: Vec<i32> },
    #[error("incarnation {incarnation} has been fenced")]
    Fenced { incarnation: Incarnation },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> AliveError + '_ {
    move |source| AliveError::Io { path: path.display().to_string(), source }
}

fn open_lock(run_dir: &Path) -> Result<File, AliveError> {
    let path = run_dir.join("alive.lock");
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(at(&path))
}

fn try_lock(file: File, how: FlockArg) -> Result<Result<Flock<File>, File>, nix::errno::Errno> {
    match Flock::lock(file, how) {
        Ok(lock) => Ok(Ok(lock)),
        Err((file, nix::errno::Errno::EWOULDBLOCK)) => Ok(Err(file)),
        Err((_, e)) => Err(e),
    }
}

/// A process's place among the living of its node. Keep it until after the last write.
pub struct AliveGuard {
    entry: PathBuf,
    _lock: Flock<File>,
}

impl AliveGuard {
    /// Registers this process as part of life `incarnation` of the node.
    pub fn register(run_dir: &Path, incarnation: Incarnation, role: &str) -> Result<Self, IpcError> {
        Self::try_register(run_dir, incarnation, role)
            .map_err(|e| IpcError::Alive { path: run_dir.display().to_string(), why: e.to_string() })
    }

    pub fn try_register(run_dir: &Path, incarnation: Incarnation, role: &str) -> Result<Self, AliveError> {
        let path = run_dir.join("alive.lock");
        let start = Instant::now();
        let mut file = open_lock(run_dir)?;
        let lock = loop {
            match try_lock(file, FlockArg::LockSharedNonblock).map_err(|e| at(&path)(e.into()))? {
                Ok(lock) => break lock,
                Err(back) if start.elapsed() < REGISTER_LIMIT => {
                    file = back;
                    std::thread::sleep(POLL);
                }
                Err(_) => {
                    return Err(AliveError::Held {
                        path: path.display().to_string(),
                        waited: start.elapsed(),
                        pids: Vec::new(),
                    });
                }
            }
        };
        Self::under(run_dir, incarnation, role, lock)
    }

    /// Registers with a lock that is already held; an exclusive one becomes shared.
    fn under(
        run_dir: &Path,
        incarnation: Incarnation,
        role: &str,
        lock: Flock<File>,
    ) -> Result<Self, AliveError> {
        // Looked at under the lock: a fencer writes it under the exclusive one.
        if fenced_up_to(run_dir) >= incarnation {
            return Err(AliveError::Fenced { incarnation });
        }
        let pid = std::process::id() as i32;
        let started =
            start_time(pid).ok_or_else(|| at(run_dir)(io::Error::other("cannot read own start time")))?;
        let procs = run_dir.join("procs");
        fs::create_dir_all(&procs).map_err(at(&procs))?;
        let entry = procs.join(pid.to_string());
        let text = format!("{incarnation} {started} {role}\n");
        fs::write(&entry, text).map_err(at(&entry))?;
        Ok(Self { entry, _lock: lock })
    }
}

impl Drop for AliveGuard {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.entry);
    }
}

/// A line of `procs/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcEntry {
    pub pid: i32,
    pub incarnation: Incarnation,
    pub started: u64,
    pub role: String,
}

/// The registered processes. Lines that do not parse are left out: the lock, not the list, is the proof.
pub fn processes(run_dir: &Path) -> Vec<ProcEntry> {
    let Ok(dir) = fs::read_dir(run_dir.join("procs")) else { return Vec::new() };
    let mut found: Vec<ProcEntry> = dir
        .flatten()
        .filter_map(|e| {
            let pid = e.file_name().to_str()?.parse().ok()?;
            let text = fs::read_to_string(e.path()).ok()?;
            let mut words = text.split_whitespace();
            let incarnation = Incarnation(words.next()?.parse().ok()?);
            let started = words.next()?.parse().ok()?;
            Some(ProcEntry { pid, incarnation, started, role: words.next()?.to_owned() })
        })
        .collect();
    found.sort_by_key(|e| e.pid);
    found
}

/// A process that is certainly the one meant: opened by pid, then checked by start time.
pub struct PidFd(OwnedFd);

impl PidFd {
    /// `None` when the process is gone, or the number belongs to another one now.
    pub fn open(pid: i32, started: u64) -> Option<Self> {
        // SAFETY: plain system call with two integers; the result is a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return None;
        }
        // SAFETY: the kernel just gave us this descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        (start_time(pid) == Some(started)).then_some(Self(fd))
    }

    pub fn kill(&self) -> io::Result<()> {
        // SAFETY: plain system call; a null siginfo means "as kill(2)".
        let rc = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Has the whole process ended (all threads)?
    pub fn exited(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Waits for the end of the process; false when the time ran out.
    pub fn wait(&self, limit: Duration) -> bool {
        let mut fds = [libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
        let ms = limit.as_millis().min(i32::MAX as u128) as i32;
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(fds.as_mut_ptr(), 1, ms) > 0 }
    }
}

impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// Field 22 of /proc/PID/stat: ticks after boot at which the process started. `None` when there is no such process.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // the name in field 2 may contain anything; the last ')' ends it
    let rest = &stat[stat.rfind(')')? + 1..];
    rest.split_whitespace().nth(19)?.parse().ok()
}

/// The daemon of life `incarnation` of the node at `run_dir`, if it runs.
pub fn daemon_of(run_dir: &Path, incarnation: Incarnation) -> Option<PidFd> {
    processes(run_dir)
        .into_iter()
        .find(|e| e.role == "cairnd" && e.incarnation == incarnation)
        .and_then(|e| PidFd::open(e.pid, e.started))
}

/// The highest life that was fenced through this directory.
pub fn fenced_up_to(run_dir: &Path) -> Incarnation {
    read_number(&run_dir.join("fenced"))
}

/// The last life that was started here; 0 when unknown.
pub fn last_incarnation(run_dir: &Path) -> Incarnation {
    read_number(&run_dir.join("incarnation"))
}

fn read_number(path: &Path) -> Incarnation {
    Incarnation(fs::read_to_string(path).ok().and_then(|s| s.trim().parse().ok()).unwrap_or(0))
}

/// Writes a small file so that it is durable and never half there.
pub fn write_durable(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    let tmp = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&tmp)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&tmp, path)?;
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

/// What conquering found and did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// Nothing had to be killed.
    NotRunning,
    /// This many processes were killed and seen to exit.
    Killed(usize),
}

/// The exclusive lock on a node's run directory: nobody of the node lives while it is held.
pub struct Conquered {
    run_dir: PathBuf,
    lock: Flock<File>,
    pub death: Death,
}

impl Conquered {
    /// Becomes the first process of a new life, without letting anybody in between.
    pub fn begin_life(self, incarnation: Incarnation) -> Result<AliveGuard, AliveError> {
        let path = self.run_dir.join("incarnation");
        write_durable(&path, &format!("{incarnation}\n")).map_err(at(&path))?;
        let procs = self.run_dir.join("procs");
        if let Ok(dir) = fs::read_dir(&procs) {
            for left_over in dir.flatten() {
                let _ = fs::remove_file(left_over.path());
            }
        }
        let path = self.run_dir.join("alive.lock");
        self.lock.relock(FlockArg::LockSharedNonblock).map_err(|e| at(&path)(e.into()))?;
        AliveGuard::under(&self.run_dir, incarnation, "cairnd", self.lock)
    }

    fn mark_fenced(&self, incarnation: Incarnation) -> Result<(), AliveError> {
        if incarnation > fenced_up_to(&self.run_dir) {
            let path = self.run_dir.join("fenced");
            write_durable(&path, &format!("{incarnation}\n")).map_err(at(&path))?;
        }
        Ok(())
    }
}

/// Takes the directory exclusively, killing what is registered there up to life `up_to` if `kill`; never the caller itself.
fn conquer_where(
    run_dir: &Path,
    up_to: Incarnation,
    kill: bool,
    limit: Duration,
) -> Result<Conquered, AliveError> {
    let path = run_dir.join("alive.lock");
    let own = std::process::id() as i32;
    let start = Instant::now();
    let mut killed = std::collections::BTreeSet::new();
    let mut file = open_lock(run_dir)?;
    loop {
        match try_lock(file, FlockArg::LockExclusiveNonblock).map_err(|e| at(&path)(e.into()))? {
            Ok(lock) => {
                // Whoever could have started more is dead: what a service left behind is all that remains.
                let left_over = marked::marked(run_dir, up_to);
                if left_over.is_empty() {
                    let death =
                        if killed.is_empty() { Death::NotRunning } else { Death::Killed(killed.len()) };
                    return Ok(Conquered { run_dir: run_dir.to_owned(), lock, death });
                }
                for (pid, fd) in left_over.iter().filter(|_| kill) {
                    if fd.kill().is_ok() {
                        killed.insert((*pid, 0));
                        fd.wait(limit.saturating_sub(start.elapsed()).min(Duration::from_millis(100)));
                    }
                }
                if !kill || start.elapsed() >= limit {
                    let pids = left_over.iter().map(|(pid, _)| *pid).collect();
                    return Err(AliveError::Held { path: path.display().to_string(), waited: limit, pids });
                }
                file = open_lock(run_dir)?;
                continue;
            }
            Err(back) => file = back,
        }
        let living: Vec<(ProcEntry, PidFd)> = processes(run_dir)
            .into_iter()
            .filter(|e| e.incarnation <= up_to && e.pid != own)
            .filter_map(|e| PidFd::open(e.pid, e.started).map(|fd| (e, fd)))
            .collect();
        if kill {
            for (entry, fd) in &living {
                if fd.kill().is_ok() {
                    killed.insert((entry.pid, entry.started));
                }
            }
            for (pid, fd) in marked::marked(run_dir, up_to) {
                if fd.kill().is_ok() {
                    killed.insert((pid, 0));
                }
            }
        }
        let left = limit.saturating_sub(start.elapsed());
        if left.is_zero() {
            let pids = living.iter().map(|(e, _)| e.pid).collect();
            return Err(AliveError::Held { path: path.display().to_string(), waited: limit, pids });
        }
        match living.first() {
            Some((_, fd)) if kill => {
                fd.wait(left.min(Duration::from_millis(100)));
            }
            _ => std::thread::sleep(POLL.min(left)),
        }
    }
}

/// Ends every process of earlier lives of this node and takes its directory, for the start of a new life.
pub fn conquer(run_dir: &Path, limit: Duration) -> Result<Conquered, AliveError> {
    conquer_where(run_dir, Incarnation(u64::MAX), true, limit)
}

/// Proves that life `incarnation` of the node at `run_dir` is dead, killing it if it is not. Incarnation 0 means "whatever
/// runs there". A later life is not touched, and its existence is a proof in itself: it conquered the directory
/// before it wrote its number.
pub fn fence(run_dir: &Path, incarnation: Incarnation, limit: Duration) -> Result<Death, AliveError> {
    prove(run_dir, incarnation, true, limit)
}

/// As `fence`, but kills nothing and does not wait: `Ok` when the node is not running here.
pub fn probe(run_dir: &Path, incarnation: Incarnation) -> Result<Death, AliveError> {
    prove(run_dir, incarnation, false, Duration::ZERO)
}

fn prove(run_dir: &Path, incarnation: Incarnation, kill: bool, limit: Duration) -> Result<Death, AliveError> {
    if !run_dir.exists() {
        return Ok(Death::NotRunning);
    }
    let known = incarnation != Incarnation(0);
    if known && last_incarnation(run_dir) > incarnation {
        return Ok(Death::NotRunning);
    }
    let up_to = if known { incarnation } else { Incarnation(u64::MAX) };
    let conquered = match conquer_where(run_dir, up_to, kill, limit) {
        Ok(conquered) => conquered,
        // a new life may have begun while we tried
        Err(AliveError::Held { .. }) if known && last_incarnation(run_dir) > incarnation => {
            return Ok(Death::NotRunning);
        }
        Err(e) => return Err(e),
    };
    let last = last_incarnation(run_dir);
    conquered.mark_fenced(if known { incarnation } else { last })?;
    Ok(conquered.death)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A process that holds the shared lock and is registered, as a mount would be.
    fn victim(run_dir: &Path, incarnation: u64) -> Child {
        let child = Command::new("flock")
            .args(["--shared", "--no-fork"])
            .arg(run_dir.join("alive.lock"))
            .args(["sleep", "600"])
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let deadline = Instant::now() + Duration::from_secs(10);
        // held once the exclusive lock is refused
        while File::open(run_dir.join("alive.lock"))
            .ok()
            .and_then(|f| try_lock(f, FlockArg::LockExclusiveNonblock).ok())
            .is_none_or(|r| r.is_ok())
        {
            assert!(Instant::now() < deadline, "flock(1) did not take the lock");
            std::thread::sleep(POLL);
        }
        fs::create_dir_all(run_dir.join("procs")).unwrap();
        fs::write(
            run_dir.join("procs").join(pid.to_string()),
            format!("{incarnation} {} mount\n", start_time(pid).unwrap()),
        )
        .unwrap();
        child
    }

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn fencing_kills_the_registered_and_proves_it_by_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = victim(dir.path(), 7);
        assert!(matches!(probe(dir.path(), Incarnation(7)), Err(AliveError::Held { .. })));
        assert_eq!(fence(dir.path(), Incarnation(7), LIMIT).unwrap(), Death::Killed(1));
        assert!(!child.wait().unwrap().success());
        assert_eq!(probe(dir.path(), Incarnation(7)).unwrap(), Death::NotRunning);
        // a straggler of that life is refused, a new life is not
        assert!(matches!(
            AliveGuard::try_register(dir.path(), Incarnation(7), "mount"),
            Err(AliveError::Fenced { .. })
        ));
        assert!(AliveGuard::try_register(dir.path(), Incarnation(8), "mount").is_ok());
    }

    #[test]
    fn a_later_life_is_not_touched_and_proves_the_death_of_the_earlier() {
        let dir = tempfile::tempdir().unwrap();
        write_durable(&dir.path().join("incarnation"), "9\n").unwrap();
        let mut child = victim(dir.path(), 9);
        assert_eq!(fence(dir.path(), Incarnation(8), LIMIT).unwrap(), Death::NotRunning);
        assert!(child.try_wait().unwrap().is_none(), "the new life must go on");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_recycled_pid_is_never_killed() {
        let dir = tempfile::tempdir().unwrap();
        let mut bystander = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = bystander.id() as i32;
        fs::create_dir_all(dir.path().join("procs")).unwrap();
        let other_start = start_time(pid).unwrap() - 1;
        fs::write(dir.path().join(format!("procs/{pid}")), format!("3 {other_start} mount\n")).unwrap();
        assert_eq!(fence(dir.path(), Incarnation(3), LIMIT).unwrap(), Death::NotRunning);
        assert!(bystander.try_wait().unwrap().is_none());
        bystander.kill().unwrap();
        bystander.wait().unwrap();
    }

    #[test]
    fn what_a_service_left_behind_dies_with_its_node() {
        let dir = tempfile::tempdir().unwrap();
        let mut daemon = Command::new("sleep")
            .arg("600")
            .env(marked::MARK, marked::mark(dir.path(), Incarnation(4)))
            .spawn()
            .unwrap();
        let mut later = Command::new("sleep")
            .arg("600")
            .env(marked::MARK, marked::mark(dir.path(), Incarnation(5)))
            .spawn()
            .unwrap();
        // Until exec has replaced the environment the child shows its parent's.
        let deadline = Instant::now() + LIMIT;
        while marked::marked(dir.path(), Incarnation(5)).len() < 2 {
            assert!(Instant::now() < deadline, "marked children are found");
            std::thread::sleep(POLL);
        }
        assert!(matches!(probe(dir.path(), Incarnation(4)), Err(AliveError::Held { .. })));
        assert_eq!(fence(dir.path(), Incarnation(4), LIMIT).unwrap(), Death::Killed(1));
        assert!(!daemon.wait().unwrap().success());
        assert!(later.try_wait().unwrap().is_none(), "a later life goes on");
        later.kill().unwrap();
        later.wait().unwrap();
    }

    #[test]
    fn an_unregistered_holder_blocks_the_proof() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = victim(dir.path(), 2);
        fs::remove_dir_all(dir.path().join("procs")).unwrap();
        let got = fence(dir.path(), Incarnation(2), Duration::from_millis(50));
        assert!(matches!(got, Err(AliveError::Held { .. })), "the list is no proof, the lock is");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_new_life_begins_only_over_the_dead_bodies_of_the_old() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = victim(dir.path(), 4);
        let conquered = conquer(dir.path(), LIMIT).unwrap();
        assert_eq!(conquered.death, Death::Killed(1));
        assert!(!child.wait().unwrap().success());
        let guard = conquered.begin_life(Incarnation(5)).unwrap();
        assert_eq!(last_incarnation(dir.path()), Incarnation(5));
        let listed = processes(dir.path());
        assert_eq!(listed.len(), 1);
        assert_eq!((listed[0].incarnation, listed[0].role.as_str()), (Incarnation(5), "cairnd"));
        assert!(daemon_of(dir.path(), Incarnation(5)).is_some_and(|d| !d.exited()));
        drop(guard);
        assert!(processes(dir.path()).is_empty());
    }
}
