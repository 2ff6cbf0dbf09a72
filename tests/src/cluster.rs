//! A cluster as processes on this machine, made with `cairn up`.

use crate::program::cairn;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a test waits for an event.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Pause between two looks.
pub const POLL: Duration = Duration::from_millis(10);

pub fn boottime() -> u64 {
    membership::clock::boottime().0
}

pub fn signal(pid: i32, signal: i32) {
    // SAFETY: plain system call on a process of the test's own cluster.
    unsafe { libc::kill(pid, signal) };
}

/// A running cluster; ended and removed when dropped.
pub struct Cluster {
    pub dir: PathBuf,
    root: Option<tempfile::TempDir>,
    /// Leave all files of a failure where they are, and say where.
    pub keeps_evidence: bool,
}

/// One line of the write log that begins a write.
pub struct Begun {
    pub pid: i32,
    pub t: u64,
}

impl Cluster {
    pub fn up(extra: &[&str]) -> Self {
        let root = tempfile::Builder::new().prefix("cairn-cluster-").tempdir().expect("directory");
        let dir = root.path().join("c");
        let cluster = Self { dir, root: Some(root), keeps_evidence: false };
        let out = cluster.command(&["up"]).args(extra).output().expect("cairn up");
        assert!(out.status.success(), "cairn up: {}", String::from_utf8_lossy(&out.stderr));
        cluster
    }

    /// Where a test puts what belongs to the cluster and is not in its directory.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.parent().expect("made by up").join(name)
    }

    /// `cairn ARGS` about this cluster; what it starts logs its writes.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(cairn());
        command.args(args).arg("--dir").arg(&self.dir).env(lun::WRITE_LOG_ENV, self.beside("writes"));
        command
    }

    pub fn cairn(&self, args: &[&str]) {
        let out = self.command(args).output().expect("cairn");
        assert!(out.status.success(), "cairn {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// A tool that takes no cluster directory: what it prints, or what it complains about.
    pub fn run(&self, args: &[&str]) -> Result<String, String> {
        let out = Command::new(cairn()).args(args).output().expect("cairn");
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        if out.status.success() { Ok(text(&out.stdout)) } else { Err(text(&out.stdout) + &text(&out.stderr)) }
    }

    /// Every record that the writer of `name` was told is safe can be read on `node`.
    pub fn verify(&self, name: &str, node: &str) {
        let out = Command::new(cairn())
            .args(["work", "verify", "--name", name, "--file"])
            .arg(self.dir.join("mnt").join(node).join(format!("records-{name}")))
            .arg("--acks")
            .arg(self.dir.join(format!("acks-{name}")))
            .output()
            .expect("cairn work verify");
        assert!(out.status.success(), "{name} on {node}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// Unmounts everything, keeps the files; the volume must be clean.
    pub fn down_and_check(&self) {
        self.cairn(&["down", "--keep"]);
        let device = format!("file:{}#part=2", self.dir.join("lun.img").display());
        let out = Command::new(cairn()).args(["fsck.gfs", "-n", &device]).output().expect("fsck.gfs");
        assert!(out.status.success(), "fsck.gfs: {}", String::from_utf8_lossy(&out.stdout));
    }

    /// All events of a node's log since boot time `since`, in their order.
    pub fn events(&self, node: &str, since: u64) -> Vec<Value> {
        let text = fs::read_to_string(self.run_dir(node).join("log/events.jsonl")).unwrap_or_default();
        let mut all: Vec<Value> = text
            .lines()
            .filter_map(|l| serde_json::from_str::<Value>(l).ok())
            .filter(|v| v["t"].as_u64().is_some_and(|t| t >= since))
            .collect();
        all.sort_by_key(|v| v["t"].as_u64());
        all
    }

    /// What a person needs to find the cause of a failure, before the files go.
    pub fn print_evidence(&self) {
        for node in ["node1", "node2", "node3"] {
            let events = self.events(node, 0);
            eprintln!("== {node}: the last events");
            for v in &events[events.len().saturating_sub(60)..] {
                eprintln!("{v}");
            }
            for log in ["cairnd", "mount-vol"] {
                let text =
                    fs::read_to_string(self.run_dir(node).join(format!("log/{log}.log"))).unwrap_or_default();
                let lines: Vec<&str> = text.lines().filter(|l| !l.contains("[CLM  ]")).collect();
                eprintln!(
                    "== {node}: the end of {log}.log\n{}",
                    lines[lines.len().saturating_sub(30)..].join("\n")
                );
            }
        }
    }

    pub fn run_dir(&self, node: &str) -> PathBuf {
        self.dir.join("nodes").join(node)
    }

    /// Process of this role (`cairnd` or `mount`) on a node.
    pub fn pid(&self, node: &str, role: &str) -> i32 {
        membership::alive::processes(&self.run_dir(node))
            .into_iter()
            .find(|p| p.role.starts_with(role))
            .unwrap_or_else(|| panic!("no {role} on {node}"))
            .pid
    }

    /// A process that appends and fsyncs on a node's mount.
    pub fn writer(&self, node: &str) -> Writer {
        let acks = self.dir.join(format!("acks-{node}"));
        let child = Command::new(cairn())
            .args(["work", "write", "--name", node, "--file"])
            .arg(self.dir.join("mnt").join(node).join(format!("records-{node}")))
            .arg("--acks")
            .arg(&acks)
            .stderr(Stdio::null())
            .spawn()
            .expect("writer");
        let writer = Writer { child, acks };
        writer.wait_for(20);
        writer
    }

    /// Waits for an event of a node's log since boot time `since`; its time.
    pub fn wait_event(&self, node: &str, since: u64, what: &str, is_it: impl Fn(&Value) -> bool) -> u64 {
        self.wait_any(&[node], since, what, is_it)
    }

    /// The same in the log of any of these nodes.
    pub fn wait_any(&self, nodes: &[&str], since: u64, what: &str, is_it: impl Fn(&Value) -> bool) -> u64 {
        let start = Instant::now();
        loop {
            let found = nodes.iter().find_map(|n| self.events(n, since).into_iter().find(&is_it));
            if let Some(v) = found {
                return v["t"].as_u64().expect("checked");
            }
            assert!(start.elapsed() < LIMIT, "{nodes:?}: no {what} within {LIMIT:?}");
            std::thread::sleep(POLL);
        }
    }

    /// All writes and flushes that were submitted so far.
    pub fn submitted(&self) -> Vec<Begun> {
        fs::read_to_string(self.beside("writes"))
            .expect("write log")
            .lines()
            .filter_map(|l| serde_json::from_str::<Value>(l).ok())
            .filter(|v| v["ev"] == "begin")
            .filter_map(|v| Some(Begun { pid: v["pid"].as_i64()? as i32, t: v["t"].as_u64()? }))
            .collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let mut args = vec!["down"];
        if std::thread::panicking() {
            if self.keeps_evidence {
                args.push("--keep");
                let kept = self.root.take().map(tempfile::TempDir::keep);
                eprintln!("logs, LUN and journals: {}", kept.unwrap_or_default().display());
            } else {
                self.print_evidence();
            }
        }
        let out = self.command(&args).output();
        if !std::thread::panicking() {
            let out = out.expect("cairn down");
            assert!(out.status.success(), "cairn down: {}", String::from_utf8_lossy(&out.stderr));
        }
    }
}

/// A process that appends and fsyncs.
pub struct Writer {
    child: Child,
    acks: PathBuf,
}

impl Writer {
    pub fn acked(&self) -> usize {
        fs::read_to_string(&self.acks).map_or(0, |t| t.lines().count())
    }

    pub fn wait_for(&self, n: usize) {
        let start = Instant::now();
        while self.acked() < n {
            assert!(start.elapsed() < LIMIT, "no {n} acknowledged records within {LIMIT:?}");
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Writer {
    /// Not waited for: on a frozen mount it ends when the cluster does.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.try_wait();
    }
}

/// Whether this machine can mount; says so when it cannot.
pub fn can_run() -> bool {
    let ok = Path::new("/dev/fuse").exists() && nix::unistd::geteuid().is_root();
    if !ok {
        eprintln!("skipped: needs the superuser and /dev/fuse");
    }
    ok
}
