//! A cluster on this machine: every node is a set of processes with a run directory of its own, all share one LUN file.
//!
//! ```text
//!   DIR/cluster.json   layout (this module)      DIR/cluster.conf  DIR/cairn.key  DIR/httpd (service script)
//!   DIR/lun.img        sparse; GPT: 1 quorum disk, 2 volume
//!   DIR/nodes/NAME/    run directory: sockets, permit, alive.lock, log/
//!   DIR/mnt/NAME/      the node's mount
//! ```

pub(crate) mod cli;
mod create;

use crate::interrupt;
use membership::alive::{self, marked};
use membership::client::Client;
use membership::ipc::{ClientKind, Command as NodeCommand, IpcError, StatusReport};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ffi::CString;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) use create::Plan;

/// What went wrong, in a sentence that names the thing and the cure.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

pub(crate) fn fail<T>(text: impl Into<String>) -> Result<T> {
    Err(Failure(text.into()))
}

/// Attach what was being done to an error.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Failure(format!("{what}: {e}")))
    }
}

/// Pause between two looks at something that another process brings about.
const POLL: Duration = Duration::from_millis(20);

/// `cluster.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Layout {
    pub(crate) cluster: String,
    pub(crate) fs: String,
    pub(crate) profile: String,
    pub(crate) nodes: Vec<String>,
    /// Where the service answers.
    pub(crate) http: String,
}

pub(crate) struct Cluster {
    pub(crate) dir: PathBuf,
    pub(crate) layout: Layout,
}

/// `$CAIRN_DIR`, else `cairn-<uid>` in the directory for temporary files.
pub(crate) fn default_dir() -> PathBuf {
    std::env::var_os("CAIRN_DIR")
        .map_or_else(|| std::env::temp_dir().join(format!("cairn-{}", nix::unistd::getuid())), PathBuf::from)
}

impl Cluster {
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("cluster.json");
        let text = fs::read_to_string(&path).doing(format!(
            "no cluster in {} (cairn up makes one, --dir names another): {}",
            dir.display(),
            path.display()
        ))?;
        let layout = serde_json::from_str(&text).doing(path.display())?;
        // The kernel's list of mounts and the marks of processes have the whole path.
        Ok(Self { dir: dir.canonicalize().doing(dir.display())?, layout })
    }

    pub(crate) fn run_dir(&self, node: &str) -> PathBuf {
        self.dir.join("nodes").join(node)
    }

    pub(crate) fn mount_point(&self, node: &str) -> PathBuf {
        self.dir.join("mnt").join(node)
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.dir.join("cluster.conf")
    }

    pub(crate) fn device(&self) -> String {
        format!("file:{}#part=2", self.dir.join("lun.img").display())
    }

    pub(crate) fn run_dirs(&self) -> Vec<(String, PathBuf)> {
        self.layout.nodes.iter().map(|n| (n.clone(), self.run_dir(n))).collect()
    }

    pub(crate) fn check_node(&self, node: &str) -> Result<()> {
        if self.layout.nodes.iter().any(|n| n == node) {
            return Ok(());
        }
        fail(format!("no node \"{node}\"; there are {}", self.layout.nodes.join(", ")))
    }

    pub(crate) fn status(&self, node: &str) -> Result<StatusReport> {
        let client = Client::connect(&self.run_dir(node), ClientKind::Tool).doing(node)?;
        client.status().doing(node)
    }

    /// Start the daemon of a node, unless it runs; returns when its control socket answers.
    pub(crate) fn start_daemon(&self, node: &str, limit: Duration) -> Result<Option<Child>> {
        if self.status(node).is_ok() {
            return Ok(None);
        }
        let run_dir = self.run_dir(node);
        fs::create_dir_all(run_dir.join("log")).doing(run_dir.display())?;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(run_dir.join("log/cairnd.log"))
            .doing(run_dir.display())?;
        let mut command = Command::new(own_exe()?);
        command
            .arg("cairnd")
            .arg("--config")
            .arg(self.config())
            .args(["--node", node])
            .arg("--run-dir")
            .arg(&run_dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone().doing(node)?)
            .stderr(log)
            .current_dir("/");
        // SAFETY: setsid is async-signal-safe; the child leaves our terminal and process group.
        unsafe {
            command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
        }
        let mut child = command.spawn().doing("cairnd")?;
        let start = Instant::now();
        loop {
            if self.status(node).is_ok() {
                return Ok(Some(child));
            }
            if let Some(status) = child.try_wait().doing(node)? {
                return fail(format!(
                    "cairnd of {node} ended with {status}:\n{}",
                    tail(&run_dir.join("log/cairnd.log"))
                ));
            }
            let waited = if start.elapsed() > limit {
                let log = run_dir.join("log");
                fail(format!("cairnd of {node} does not answer after {limit:?}; see {}", log.display()))
            } else {
                interrupt::pause(POLL)
            };
            if let Err(e) = waited {
                // Perhaps it is not yet among the node's registered processes.
                let _ = child.kill();
                let _ = child.wait();
                return Err(e);
            }
        }
    }

    /// Wait until `is_done` says so of the node's status, or the daemon, if it is ours, has ended.
    pub(crate) fn wait_status(
        &self,
        node: &str,
        daemon: Option<&mut Child>,
        what: &str,
        limit: Duration,
        mut is_done: impl FnMut(&StatusReport) -> bool,
    ) -> Result<()> {
        let start = Instant::now();
        let mut daemon = daemon;
        loop {
            if self.status(node).is_ok_and(|s| is_done(&s)) {
                return Ok(());
            }
            if let Some(status) = daemon.as_mut().and_then(|d| d.try_wait().transpose()) {
                let log = self.run_dir(node).join("log/cairnd.log");
                return fail(format!(
                    "cairnd of {node} ended with {} before there was a {what}; see {}",
                    status.doing(node)?,
                    log.display()
                ));
            }
            if start.elapsed() > limit {
                return fail(format!(
                    "{node}: no {what} after {limit:?}; see {}",
                    self.run_dir(node).join("log").display()
                ));
            }
            interrupt::pause(POLL)?;
        }
    }

    /// Mount the volume on a node; returns when it is mounted.
    pub(crate) fn mount(&self, node: &str) -> Result<()> {
        let at = self.mount_point(node);
        let _one = lock_mounting(&self.run_dir(node)).doing(node)?;
        self.detach_stale(node);
        if rgmanager::agent::is_mounted(&at) {
            return Ok(());
        }
        fs::create_dir_all(&at).doing(at.display())?;
        let run_dir = self.run_dir(node);
        let log_path = run_dir.join(format!("log/mount-{}.log", self.layout.fs));
        let log = OpenOptions::new().create(true).append(true).open(&log_path).doing(log_path.display())?;
        interrupt::check()?;
        let status = Command::new(own_exe()?)
            .arg("mount.gfs")
            .arg(self.device())
            .arg(&at)
            .args(["-o", "lockproto=lock_dlm", "--run-dir"])
            .arg(&run_dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone().doing(node)?)
            .stderr(log)
            // Whole or not at all: the terminal's Ctrl-C is for us.
            .process_group(0)
            .status()
            .doing("mount.gfs")?;
        if status.success() {
            return Ok(());
        }
        fail(format!("mount.gfs on {node}: {status}:\n{}", tail(&log_path)))
    }

    /// Every process of a node: registered ones and what its services have started.
    pub(crate) fn processes(&self, node: &str) -> Vec<i32> {
        let run_dir = self.run_dir(node);
        let mut pids: Vec<i32> = alive::processes(&run_dir)
            .into_iter()
            // A zombie that nobody reaps has exited, too.
            .filter(|e| alive::PidFd::open(e.pid, e.started).is_some_and(|fd| !fd.exited()))
            .map(|e| e.pid)
            .collect();
        pids.extend(
            marked::marked(&run_dir, cairn_base::Incarnation(u64::MAX)).into_iter().map(|(pid, _)| pid),
        );
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Send a signal to every process of a node; says how many there were. Looks again until nobody is new: one may have been born, as a
    /// service that just starts, between the look and the signal to its parent.
    pub(crate) fn signal(&self, node: &str, signal: i32) -> usize {
        let mut reached = BTreeSet::new();
        loop {
            let before = reached.len();
            for pid in self.processes(node) {
                if reached.insert(pid) {
                    // SAFETY: plain system call; the pids were compared with their start times just now.
                    unsafe { libc::kill(pid, signal) };
                }
            }
            if reached.len() == before {
                return before;
            }
        }
    }

    /// The process that serves the node's mount, while it lives.
    fn mount_server(&self, node: &str) -> Option<alive::PidFd> {
        alive::processes(&self.run_dir(node))
            .into_iter()
            .filter(|e| e.role.starts_with("mount"))
            .find_map(|e| alive::PidFd::open(e.pid, e.started).filter(|fd| !fd.exited()))
    }

    /// Mounted, and somebody serves it. Asks the kernel's list and not the mount, which may be frozen.
    pub(crate) fn is_served(&self, node: &str) -> bool {
        rgmanager::agent::is_mounted(&self.mount_point(node)) && self.mount_server(node).is_some()
    }

    /// Takes a mount whose server is gone out of the tree.
    pub(crate) fn detach_stale(&self, node: &str) {
        let at = self.mount_point(node);
        if rgmanager::agent::is_mounted(&at) && self.mount_server(node).is_none() {
            detach(&at);
        }
    }

    /// Waits until no process of the node is left, after a signal that ends them.
    pub(crate) fn wait_gone(&self, node: &str, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            let left = self.processes(node);
            if left.is_empty() {
                return Ok(());
            }
            if start.elapsed() > limit {
                return fail(format!(
                    "{node}: processes {left:?} were killed and do not end within {limit:?}"
                ));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Unmount cleanly; a mount that does not come off within `limit` is aborted, and that is an error.
    pub(crate) fn unmount(&self, node: &str, limit: Duration) -> Result<()> {
        let at = self.mount_point(node);
        self.detach_stale(node);
        if !rgmanager::agent::is_mounted(&at) {
            return Ok(());
        }
        let server = self.mount_server(node);
        let connection = fuse_connection(&at);
        // In a thread: the call writes dirty pages back, and waits for ever where the server is frozen. An abort sets it free.
        let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (stop, path) = (std::sync::Arc::clone(&done), at.clone());
        let thread = std::thread::spawn(move || {
            while rgmanager::agent::is_mounted(&path) && !stop.load(std::sync::atomic::Ordering::Relaxed) {
                unmount_once(&path);
                std::thread::sleep(POLL);
            }
        });
        let start = Instant::now();
        while !thread.is_finished() && start.elapsed() < limit {
            std::thread::sleep(POLL);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        if !thread.is_finished() {
            abort(connection);
            detach(&at);
            return fail(format!(
                "{}: busy or hanging after {limit:?}; its connection was aborted",
                at.display()
            ));
        }
        // The mount process writes its last log header after the kernel has let go.
        if server.is_some_and(|s| !s.wait(limit)) {
            return fail(format!("mount process of {node} does not end after {limit:?}"));
        }
        Ok(())
    }

    /// Clean end of a node: leaves the cluster, daemon ends. Falls back to SIGKILL after `limit`.
    pub(crate) fn stop_daemon(&self, node: &str, limit: Duration) -> Result<()> {
        let Ok(client) = Client::connect(&self.run_dir(node), ClientKind::Tool) else {
            self.signal(node, libc::SIGKILL);
            return Ok(());
        };
        let asked = client.command(NodeCommand::LeaveCluster { force: true, remove: false });
        drop(client);
        let start = Instant::now();
        while !self.processes(node).is_empty() {
            if start.elapsed() > limit {
                self.signal(node, libc::SIGKILL);
                return fail(format!("{node} did not leave within {limit:?} ({asked:?}); it was killed"));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// End everything and remove what the cluster made. Problems are collected, nothing is left behind.
    pub(crate) fn down(&self, keep_files: bool) -> Vec<String> {
        let limit = Duration::from_secs(20);
        let mut problems = Vec::new();
        for node in &self.layout.nodes {
            self.signal(node, libc::SIGCONT);
        }
        for node in &self.layout.nodes {
            // Services first: they keep files open on the mounts.
            problems.extend(rgmanager_stop(&self.run_dir(node), limit).err().map(|e| format!("{node}: {e}")));
        }
        for node in &self.layout.nodes {
            problems.extend(self.unmount(node, limit).err().map(|e| e.0));
        }
        for node in &self.layout.nodes {
            problems.extend(self.stop_daemon(node, limit).err().map(|e| e.0));
        }
        for node in &self.layout.nodes {
            self.signal(node, libc::SIGKILL);
            let at = self.mount_point(node);
            if rgmanager::agent::is_mounted(&at) {
                abort(fuse_connection(&at));
                detach(&at);
            }
        }
        if !keep_files && let Err(e) = fs::remove_dir_all(&self.dir) {
            problems.push(format!("{}: {e}", self.dir.display()));
        }
        problems
    }
}

/// One mount of a node at a time: its service manager mounts what a service needs, people mount by hand. Held until dropped.
pub(crate) fn lock_mounting(run_dir: &Path) -> io::Result<nix::fcntl::Flock<fs::File>> {
    let file =
        OpenOptions::new().create(true).truncate(false).write(true).open(run_dir.join("mounting.lock"))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).map_err(|(_, e)| e.into())
}

/// Disable every service, so that nothing runs on the mounts any more. A node without a service manager has none.
fn rgmanager_stop(run_dir: &Path, limit: Duration) -> std::result::Result<(), IpcError> {
    use rgmanager::core::AdminOp;
    use rgmanager::driver::{AdminReply, AdminRequest, ask_within};
    let Ok(AdminReply::Status(status)) = ask_within(run_dir, &AdminRequest::Status, limit) else {
        return Ok(());
    };
    for svc in status.records.into_iter().flatten().map(|(svc, _)| svc) {
        ask_within(run_dir, &AdminRequest::Do { svc, op: AdminOp::Disable }, limit)?;
    }
    Ok(())
}

pub(crate) fn own_exe() -> Result<PathBuf> {
    std::env::current_exe().doing("cannot find my own program file")
}

/// The last lines of a log, for an error message.
pub(crate) fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

fn c_path(path: &Path) -> Option<CString> {
    CString::new(path.as_os_str().as_bytes()).ok()
}

/// One attempt to unmount, as root or through fusermount3.
fn unmount_once(at: &Path) {
    if nix::unistd::geteuid().is_root() {
        if let Some(path) = c_path(at) {
            // SAFETY: a valid C string.
            unsafe { libc::umount2(path.as_ptr(), 0) };
        }
    } else {
        let _ = Command::new("fusermount3").arg("-u").arg(at).stderr(Stdio::null()).status();
    }
}

/// Take a dead mount out of the tree.
pub(crate) fn detach(at: &Path) {
    if nix::unistd::geteuid().is_root() {
        if let Some(path) = c_path(at) {
            // SAFETY: a valid C string.
            unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        }
    } else {
        let _ = Command::new("fusermount3").args(["-u", "-z"]).arg(at).stderr(Stdio::null()).status();
    }
}

/// Minor number of the mount's device: the name of its directory in fusectl.
fn fuse_connection(at: &Path) -> Option<u32> {
    rgmanager::agent::mounted_device(at)?.split_once(':')?.1.parse().ok()
}

/// Make every request of a hanging mount fail.
fn abort(connection: Option<u32>) {
    if let Some(minor) = connection {
        let _ = fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Children are born all the time, also between the look at the processes and the signal to their parent.
    #[test]
    fn a_signal_reaches_who_is_born_while_it_is_sent() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout {
            cluster: "c".into(),
            fs: "f".into(),
            profile: "fast".into(),
            nodes: vec!["n".into()],
            http: String::new(),
        };
        let cluster = Cluster { dir: dir.path().to_owned(), layout };
        let run_dir = cluster.run_dir("n");
        fs::create_dir_all(&run_dir).unwrap();
        let script = "i=0; while [ $i -lt 3000 ]; do sleep 20 & i=$((i+1)); done; wait";
        let mut parent = Command::new("sh")
            .args(["-c", script])
            .env(marked::MARK, marked::mark(&run_dir, cairn_base::Incarnation(1)))
            .spawn()
            .unwrap();
        while cluster.processes("n").len() < 5 {
            std::thread::yield_now();
        }
        assert!(cluster.signal("n", libc::SIGKILL) >= 5);
        parent.wait().unwrap();
        cluster.wait_gone("n", Duration::from_secs(5)).unwrap();
    }
}
