//! The cluster, its load, and what is under way to heal it.

use cairn_base::Rng;
use cairn_tests::cluster::{Cluster, POLL, boottime};
use cairn_tests::load;
use membership::alive;
use membership::client::Client;
use membership::ipc::{ClientKind, StatusReport};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) const NODES: [&str; 3] = ["node1", "node2", "node3"];
/// The kinds of load that count something on every node.
pub(crate) const KINDS: [&str; 5] = ["own", "shared", "names", "counter", "section"];
/// What the processes of a node's load do.
const PROCESSES: [&str; 2] = ["own,shared,names,counter,reader", "section"];
/// Bounds a hang, not the speed of the machine.
pub(crate) const WHOLE_LIMIT: Duration = Duration::from_secs(150);
/// Healing that takes this long says what it waits for.
const SLOW: Duration = Duration::from_secs(8);
/// A load whose mount ended must notice.
const LOAD_LIMIT: Duration = Duration::from_secs(60);

pub(crate) struct Node {
    pub(crate) name: &'static str,
    /// Its processes; they end together.
    load: Vec<Child>,
    life: u32,
    /// When the load's mount was first seen without its server.
    orphaned: Option<Instant>,
    respawn_at: Instant,
    /// `cairn start`, under way.
    starting: Option<Child>,
    pub(crate) start_at: Option<Instant>,
    pub(crate) resume_at: Option<Instant>,
}

/// A process of the cluster that has been seen: (pid, from when, node number, incarnation).
pub(crate) type Seen = (i32, u64, u64, u64);

pub(crate) struct World {
    pub(crate) cluster: Cluster,
    pub(crate) acks: PathBuf,
    pub(crate) nodes: Vec<Node>,
    pub(crate) rng: Rng,
    /// Commands of an administrator, under way; how they end is not judged.
    pub(crate) errands: Vec<Child>,
    pub(crate) seen: BTreeSet<Seen>,
    began: Instant,
    pub(crate) longest_healing: Duration,
    pub(crate) faults: u32,
}

pub(crate) fn load_program() -> &'static str {
    env!("CARGO_BIN_EXE_chaos-load")
}

impl World {
    pub(crate) fn begin(seed: u64) -> Self {
        let mut cluster = Cluster::up(&[]);
        cluster.keeps_evidence = true;
        let acks = cluster.beside("acks");
        fs::create_dir(&acks).expect("directory");
        let world = Self {
            nodes: NODES
                .iter()
                .map(|name| Node {
                    name,
                    load: Vec::new(),
                    life: 0,
                    orphaned: None,
                    respawn_at: Instant::now(),
                    starting: None,
                    start_at: None,
                    resume_at: None,
                })
                .collect(),
            cluster,
            acks,
            rng: Rng::new(seed),
            errands: Vec::new(),
            seen: BTreeSet::new(),
            began: Instant::now(),
            longest_healing: Duration::ZERO,
            faults: 0,
        };
        world.install_service();
        world
    }

    pub(crate) fn say(&self, text: &str) {
        eprintln!("{:>8} ms  {} {text}", self.began.elapsed().as_millis(), boottime());
    }

    /// Our service instead of the web server, under the same script.
    fn install_service(&self) {
        let run_dir = self.cluster.run_dir("node1").display().to_string();
        self.cluster.run(&["clusvcadm", "-d", "web", "--run-dir", &run_dir]).expect("disabled");
        fs::create_dir_all(self.mount(0).join("www")).expect("directory of the service");
        let path = self.cluster.dir.join("httpd");
        let script = fs::read_to_string(&path).expect("script");
        let cairn = cairn_tests::program::cairn();
        let ours = format!("'{}' service --acks '{}'", load_program(), self.acks.display());
        let theirs = format!("'{}' http-serve", cairn.display());
        assert!(script.contains(&theirs), "{script}");
        fs::write(&path, script.replace(&theirs, &ours)).expect("script");
        self.cluster.run(&["clusvcadm", "-e", "web", "--run-dir", &run_dir]).expect("enabled");
    }

    pub(crate) fn mount(&self, i: usize) -> PathBuf {
        self.cluster.dir.join("mnt").join(NODES[i])
    }

    pub(crate) fn status(&self, i: usize) -> Option<StatusReport> {
        Client::connect(&self.cluster.run_dir(NODES[i]), ClientKind::Tool).ok()?.status().ok()
    }

    fn server_lives(&self, i: usize) -> bool {
        alive::processes(&self.cluster.run_dir(NODES[i]))
            .into_iter()
            .filter(|p| p.role.starts_with("mount"))
            .any(|p| alive::PidFd::open(p.pid, p.started).is_some_and(|fd| !fd.exited()))
    }

    fn is_served(&self, i: usize) -> bool {
        rgmanager::agent::is_mounted(&self.mount(i)) && self.server_lives(i)
    }

    /// A process of this role on a node, if one lives.
    pub(crate) fn process(&self, i: usize, role: &str) -> Option<i32> {
        alive::processes(&self.cluster.run_dir(NODES[i]))
            .into_iter()
            .find(|p| p.role.starts_with(role) && alive::start_time(p.pid) == Some(p.started))
            .map(|p| p.pid)
    }

    pub(crate) fn end_load(&mut self, i: usize) {
        for load in &mut self.nodes[i].load {
            let _ = load.kill();
        }
    }

    /// A tool that works by itself.
    pub(crate) fn errand(&mut self, mut command: Command) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.acks.join("tools.log"));
        let log = log.expect("log");
        let out = log.try_clone().expect("log");
        self.errands.push(command.stdin(Stdio::null()).stdout(out).stderr(log).spawn().expect("a tool"));
    }

    /// Everything that goes on beside the faults.
    pub(crate) fn tick(&mut self) {
        let now = Instant::now();
        for (n, name) in NODES.iter().enumerate() {
            for p in alive::processes(&self.cluster.run_dir(name)) {
                if !self.seen.iter().any(|s| s.0 == p.pid && s.3 == p.incarnation.0) {
                    self.seen.insert((p.pid, boottime(), n as u64 + 1, p.incarnation.0));
                }
            }
        }
        self.errands.retain_mut(|c| matches!(c.try_wait(), Ok(None)));
        for i in 0..self.nodes.len() {
            let name = self.nodes[i].name;
            if self.nodes[i].resume_at.is_some_and(|t| t <= now) {
                self.nodes[i].resume_at = None;
                self.say(&format!("{name} goes on"));
                self.cluster.cairn(&["resume", name]);
            }
            if let Some(child) = &mut self.nodes[i].starting
                && child.try_wait().expect("wait").is_some()
            {
                self.nodes[i].starting = None;
            }
            if self.nodes[i].start_at.is_some_and(|t| t <= now) && self.nodes[i].starting.is_none() {
                self.nodes[i].start_at = None;
                self.say(&format!("start of {name}"));
                self.start(i);
            }
            self.tend_load(i);
        }
        let violation = load::journals(&self.acks, "violation").expect("acks");
        if let Some((life, path)) = violation.first() {
            self.fail(&format!("{life}: {}", fs::read_to_string(path).unwrap_or_default()));
        }
    }

    fn start(&mut self, i: usize) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.acks.join("tools.log"));
        let log = log.expect("log");
        let mut command = self.cluster.command(&["start", NODES[i]]);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("log")).stderr(log);
        self.nodes[i].starting = Some(command.spawn().expect("cairn start"));
    }

    fn tend_load(&mut self, i: usize) {
        let served = self.is_served(i);
        let mount = self.mount(i);
        let node = &mut self.nodes[i];
        if !node.load.is_empty() {
            let before = node.load.len();
            node.load.retain_mut(|l| l.try_wait().expect("wait").is_none());
            if node.load.len() < before {
                for other in &mut node.load {
                    let _ = other.kill();
                }
            }
            if node.load.is_empty() {
                node.orphaned = None;
                node.respawn_at = Instant::now() + Duration::from_millis(300);
            } else if served && before == PROCESSES.len() {
                node.orphaned = None;
            } else if node.orphaned.get_or_insert_with(Instant::now).elapsed() > LOAD_LIMIT {
                let text = format!("the load of {} hangs; its mount is served: {served}", node.name);
                self.fail(&text);
            }
            return;
        }
        if !served || node.respawn_at > Instant::now() {
            return;
        }
        node.life += 1;
        let life = format!("{}.{}", node.name, node.life);
        for kinds in PROCESSES {
            let log = fs::OpenOptions::new().create(true).append(true).open(self.acks.join("load.log"));
            let child = Command::new(load_program())
                .args(["run", "--life", &life, "--seed", &(u64::from(node.life) << 8 | i as u64).to_string()])
                .args(["--kinds", kinds, "--mount"])
                .arg(&mount)
                .arg("--acks")
                .arg(&self.acks)
                .stdin(Stdio::null())
                .stderr(log.expect("log"))
                .spawn();
            node.load.push(child.expect("load"));
        }
    }

    pub(crate) fn let_pass(&mut self, time: Duration) {
        let start = Instant::now();
        loop {
            self.tick();
            if start.elapsed() >= time {
                return;
            }
            std::thread::sleep(POLL);
        }
    }

    /// What counts progress: lines of each journal of a node's present life, by kind; and of the service.
    fn progress(&self) -> BTreeMap<(usize, &'static str), usize> {
        let mut all = BTreeMap::new();
        for (i, node) in self.nodes.iter().enumerate() {
            for kind in KINDS {
                let path = self.acks.join(format!("{kind}-{}.{}", node.name, node.life));
                all.insert((i, kind), load::lines(&path).len());
            }
        }
        let service = load::journals(&self.acks, "service").expect("acks");
        let lines = service.iter().map(|(_, path)| load::lines(path).len()).sum();
        all.insert((0, "service"), lines);
        all
    }

    /// What is still missing for a whole cluster.
    fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        for (i, node) in self.nodes.iter().enumerate() {
            let Some(s) = self.status(i) else {
                missing.push(format!("daemon of {}", node.name));
                continue;
            };
            let members = s.nodes.iter().filter(|n| n.member).count();
            if !s.quorate || members != NODES.len() || !s.fence.in_domain || !s.fence.victims.is_empty() {
                missing.push(format!(
                    "{}: quorate {}, members {members}, in domain {}, victims {:?}",
                    node.name, s.quorate, s.fence.in_domain, s.fence.victims
                ));
            }
            if !self.is_served(i) {
                missing.push(format!("mount of {}", node.name));
            }
        }
        missing
    }

    /// Helps everybody up; all must be well within [`WHOLE_LIMIT`].
    pub(crate) fn make_whole(&mut self) {
        let start = Instant::now();
        for i in 0..self.nodes.len() {
            self.nodes[i].resume_at = None;
            self.nodes[i].start_at = None;
            self.cluster.cairn(&["resume", NODES[i]]);
        }
        let (mut base, mut said) = (None, 1);
        let mut next_start = Instant::now();
        loop {
            self.let_pass(Duration::from_millis(50));
            let mut missing = self.missing();
            if !missing.is_empty() && next_start <= Instant::now() {
                for i in 0..self.nodes.len() {
                    if self.nodes[i].starting.is_none() && !self.is_served(i) {
                        self.start(i);
                    }
                }
                next_start = Instant::now() + Duration::from_secs(1);
            }
            if missing.is_empty()
                && self.nodes.iter().all(|n| n.load.len() == PROCESSES.len() && n.starting.is_none())
            {
                let now = self.progress();
                let from = base.get_or_insert_with(|| now.clone());
                for (what, n) in &now {
                    // A new life counts from nothing.
                    let before = from.get_mut(what).expect("the same keys");
                    *before = (*before).min(*n);
                    if *n < *before + 4 {
                        missing.push(format!("progress of {}: {what:?} since {before}", NODES[what.0]));
                    }
                }
            } else if missing.is_empty() {
                missing.push("tools or loads are under way".into());
            }
            if missing.is_empty() {
                break;
            }
            if start.elapsed() > said * SLOW {
                said += 1;
                self.say(&format!("missing after {} ms: {missing:?}", start.elapsed().as_millis()));
            }
            if start.elapsed() > WHOLE_LIMIT {
                self.fail(&format!("not whole after {WHOLE_LIMIT:?}: {missing:#?}"));
            }
        }
        self.longest_healing = self.longest_healing.max(start.elapsed());
        self.say(&format!("whole after {} ms", start.elapsed().as_millis()));
    }

    /// Ends the load everywhere and waits for it.
    pub(crate) fn quiesce(&mut self) {
        for i in 0..self.nodes.len() {
            self.end_load(i);
        }
        let start = Instant::now();
        for i in 0..self.nodes.len() {
            let name = self.nodes[i].name;
            while !self.nodes[i].load.is_empty() {
                self.nodes[i].load.retain_mut(|l| l.try_wait().expect("wait").is_none());
                if start.elapsed() > LOAD_LIMIT {
                    self.fail(&format!("the load of {name} does not end"));
                }
                std::thread::sleep(POLL);
            }
        }
    }

    /// The end of a run that found something: what is lost when the processes end is written down first.
    pub(crate) fn fail(&self, text: &str) -> ! {
        self.say(&format!("FAILED: {text}"));
        let write = |name: &str, text: String| {
            let _ = fs::write(self.acks.join(name), text);
        };
        write("failure", text.to_owned());
        for (file, args) in [("timeline", vec!["timeline"]), ("status", vec!["status", "--json"])] {
            let out = self.cluster.command(&args).output().expect("cairn");
            write(file, String::from_utf8_lossy(&out.stdout).into_owned());
        }
        for (i, name) in NODES.iter().enumerate() {
            write(&format!("status-{name}"), format!("{:#?}", self.status(i)));
        }
        write("stacks", self.stacks());
        panic!("{text}");
    }

    /// Where the threads of all our processes wait in the kernel.
    fn stacks(&self) -> String {
        let ours = self.cluster.beside("").display().to_string();
        let mut text = String::new();
        for entry in fs::read_dir("/proc").expect("proc").flatten() {
            let path = entry.path();
            let line = fs::read(path.join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if !line.contains(ours.trim_end_matches('/')) {
                continue;
            }
            text += &format!("== {} {line}\n", entry.file_name().display());
            for task in fs::read_dir(path.join("task")).into_iter().flatten().flatten() {
                let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
                text += &format!(
                    "{} {} {} {}",
                    task.file_name().display(),
                    read("comm").trim(),
                    read("wchan"),
                    read("stack")
                );
                text.push('\n');
            }
        }
        text
    }

    pub(crate) fn write_log(&self) -> File {
        File::open(self.cluster.beside("writes")).expect("write log")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            for child in node.load.iter_mut().chain(&mut node.starting) {
                let _ = child.kill();
            }
        }
        for child in &mut self.errands {
            let _ = child.kill();
        }
    }
}
