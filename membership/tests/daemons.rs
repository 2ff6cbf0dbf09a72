//! Three real daemons on this machine, with real processes as their mounts: killed, stopped, paused, restarted.
//!
//! The test program is the daemon and the mount as well: it starts itself again with `CAIRN_TEST_ROLE` set.

use cairn_base::{NodeId, Proc};
use membership::client::Client;
use membership::ipc::{
    ClientKind, ClusterEvent, Command, Departure, LeaveReason, Proof, Scope, StatusReport,
};
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Lines};
use std::net::UdpSocket;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command as Process, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

/// Not a test by itself: what the children run.
#[test]
fn role() {
    let Ok(role) = std::env::var("CAIRN_TEST_ROLE") else { return };
    let args: Vec<String> =
        std::env::var("CAIRN_TEST_ARGS").unwrap().split('\n').map(str::to_owned).collect();
    let code = match role.as_str() {
        "cairnd" => membership::daemon::main(&args),
        "mount" => mount(Path::new(&args[0])),
        other => panic!("no role {other}"),
    };
    std::process::exit(code);
}

/// A mount without a file system: joins its group, says what it sees, writes nothing. Unlike a good mount it does not end with
/// its daemon: somebody has to kill it.
fn mount(run_dir: &Path) -> i32 {
    let client = Client::connect(run_dir, ClientKind::Mount { fs: "web".into() }).unwrap();
    let permit = client.permit().unwrap();
    client.join_group("gfs:web", b"journal").unwrap();
    println!("client {}", client.welcome().client);
    for event in client.events() {
        match event {
            ClusterEvent::GroupView { members, .. } => {
                println!("members {} permit {}", members.len(), permit.check().is_ok());
            }
            ClusterEvent::Disconnected { .. } => loop {
                std::thread::park();
            },
            _ => {}
        }
    }
    0
}

fn spawn(role: &str, args: &[&str]) -> Child {
    let child = Process::new(std::env::current_exe().unwrap())
        .args(["--exact", "role", "--nocapture", "--test-threads=1"])
        .env("CAIRN_TEST_ROLE", role)
        .env("CAIRN_TEST_ARGS", args.join("\n"))
        .stdin(Stdio::null())
        .stdout(if role == "mount" { Stdio::piped() } else { Stdio::null() })
        .stderr(Stdio::inherit())
        .spawn();
    child.unwrap()
}

struct Cluster {
    dir: tempfile::TempDir,
    daemons: Vec<Option<Child>>,
}

struct Mount {
    child: Child,
    client: u32,
    /// Kept open: a closed pipe would end the mount.
    _lines: Lines<BufReader<ChildStdout>>,
}

/// Reads the mount's output until it says what is wanted.
fn start_mount(run_dir: &Path, members: usize) -> Mount {
    let mut child = spawn("mount", &[run_dir.to_str().unwrap()]);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut client = None;
    let want = format!("members {members} permit true");
    loop {
        // libtest puts its own words before ours
        let line = lines.next().expect("the mount ended").unwrap();
        if let Some((_, n)) = line.split_once("client ") {
            client = n.trim().parse().ok();
        }
        if line.contains(&want) {
            break;
        }
    }
    Mount { child, client: client.expect("said before the members"), _lines: lines }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Cluster {
    fn start(nodes: usize) -> Self {
        Self::start_with(nodes, false)
    }

    /// `disk`: with a quorum disk of as many votes as make a single node quorate.
    fn start_with(nodes: usize, disk: bool) -> Self {
        let mut cluster = Self::configured(nodes, disk);
        for n in 1..=nodes {
            cluster.boot(n);
        }
        cluster
    }

    /// Nobody is started yet.
    fn configured(nodes: usize, disk: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&key).unwrap();
        fs::write(&key, [42u8; 32]).unwrap();
        // held until all are known, so that no number is given twice
        let sockets: Vec<UdpSocket> = (0..nodes).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        let list: String = sockets
            .iter()
            .enumerate()
            .map(|(i, s)| {
                let port = s.local_addr().unwrap().port();
                format!(
                    "<clusternode name=\"n{0}\" nodeid=\"{0}\" addr=\"127.0.0.1\" port=\"{port}\"/>\n",
                    i + 1
                )
            })
            .collect();
        drop(sockets);
        let lun = dir.path().join("lun");
        let quorumd = if disk {
            fs::File::create(&lun).unwrap().set_len(1 << 20).unwrap();
            qdisk::mkqdisk::create(&format!("file:{}", lun.display()), "qd", |_| ()).unwrap();
            format!("<quorumd device=\"file:{}\" label=\"qd\" votes=\"{}\"/>", lun.display(), nodes - 1)
        } else {
            String::new()
        };
        let text = format!(
            "<cluster name=\"test\" config_version=\"1\"><cairn one_host=\"yes\" key_file=\"{}\" run_dir=\"{}/%n\"/>\n\
             {quorumd}<clusternodes>\n{list}</clusternodes></cluster>",
            key.display(),
            dir.path().display()
        );
        fs::write(dir.path().join("cluster.conf"), text).unwrap();
        Self { dir, daemons: (0..nodes).map(|_| None).collect() }
    }

    fn run_dir(&self, n: usize) -> PathBuf {
        self.dir.path().join(format!("n{n}"))
    }

    fn boot(&mut self, n: usize) {
        let conf = self.dir.path().join("cluster.conf");
        let daemon = spawn("cairnd", &["-c", conf.to_str().unwrap(), "-n", &format!("n{n}")]);
        self.daemons[n - 1] = Some(daemon);
    }

    fn kill(&mut self, n: usize) {
        let mut daemon = self.daemons[n - 1].take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    fn client(&self, n: usize) -> Client {
        let deadline = Instant::now() + LIMIT;
        loop {
            match Client::connect(&self.run_dir(n), ClientKind::Other("watcher".into())) {
                Ok(client) => return client,
                Err(e) => assert!(Instant::now() < deadline, "node {n}: {e}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until node `n` reports what `good` wants.
    fn status(&self, n: usize, what: &str, good: impl Fn(&StatusReport) -> bool) -> StatusReport {
        let deadline = Instant::now() + LIMIT;
        let client = self.client(n);
        loop {
            let status = client.status().unwrap();
            if good(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "node {n}: {what}: {status:#?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn all_in(&self, nodes: &[usize]) {
        for n in nodes {
            self.status(*n, "all in the fence domain", |s| {
                s.quorate
                    && s.nodes.iter().filter(|n| n.member).count() == nodes.len()
                    && s.fence.members.len() == nodes.len()
                    && s.fence.victims.is_empty()
                    && s.permit_left_ms > 0
            });
        }
    }

    fn proc(&self, n: usize) -> Proc {
        self.client(n).welcome().proc
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for daemon in self.daemons.iter_mut().flatten() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// The next event that `pick` wants; the others are passed over, and shown if it never comes.
fn wait_for<T>(client: &Client, what: &str, mut pick: impl FnMut(&ClusterEvent) -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    let mut seen = Vec::new();
    loop {
        match client.events().recv_deadline(deadline) {
            Ok(event) => match pick(&event) {
                Some(found) => return found,
                None => seen.push(event),
            },
            Err(e) => panic!("{what}: {e}; seen {seen:#?}"),
        }
    }
}

#[test]
fn a_killed_node_is_fenced_with_its_mounts_and_comes_back_as_a_new_life() {
    let mut c = Cluster::start(3);
    c.all_in(&[1, 2, 3]);
    let mut on3 = start_mount(&c.run_dir(3), 1);
    let mut on1 = start_mount(&c.run_dir(1), 2);
    let old = c.proc(3);
    let watchers = [c.client(1), c.client(2)];
    let killed = Instant::now();
    c.kill(3);
    for watcher in &watchers {
        let left = wait_for(watcher, "a view without node 3", |e| match e {
            ClusterEvent::View(v) if v.members.len() == 2 => Some(v.left.clone()),
            _ => None,
        });
        assert_eq!(left, [(old, Departure::Failed)]);
        let proof = wait_for(watcher, "fenced", |e| match e {
            ClusterEvent::Fenced { proc, scope: Scope::Node, proof, .. } if *proc == old => {
                Some(proof.clone())
            }
            _ => None,
        });
        assert_eq!(proof, Proof::Exited, "its mount was still there and had to be killed");
    }
    eprintln!("kill -9 to Fenced at both survivors: {:?}", killed.elapsed());
    assert!(!on3.child.wait().unwrap().success(), "the mount was killed by the fencer");

    c.boot(3);
    c.all_in(&[1, 2, 3]);
    let new = c.proc(3);
    assert!(new.incarnation > old.incarnation);
    // a mount alone dies: the node lives, the mount is proved dead
    on1.child.kill().unwrap();
    on1.child.wait().unwrap();
    let one = c.proc(1);
    for watcher in &watchers {
        wait_for(watcher, "mount of node 1 fenced", |e| match e {
            ClusterEvent::Fenced {
                proc, scope: Scope::Mount { client, fs }, proof: Proof::Exited, ..
            } => (*proc == one && *client == on1.client && fs == "web").then_some(()),
            _ => None,
        });
    }
    c.all_in(&[1, 2, 3]);
}

#[test]
fn who_leaves_cleanly_is_not_fenced_and_who_is_told_to_die_comes_back() {
    let mut c = Cluster::start(3);
    c.all_in(&[1, 2, 3]);
    let watcher = c.client(1);
    let (two, three) = (c.proc(2), c.proc(3));
    c.client(2).command(Command::LeaveCluster { force: false, remove: false }).unwrap();
    let left = wait_for(&watcher, "a view without node 2", |e| match e {
        ClusterEvent::View(v) if v.members.len() == 2 => Some(v.left.clone()),
        _ => None,
    });
    assert_eq!(left, [(two, Departure::Clean)]);
    assert!(c.daemons[1].take().unwrap().wait().unwrap().success());
    c.boot(2);
    c.all_in(&[1, 2, 3]);

    c.client(1).command(Command::KillNode { node: "n3".into() }).unwrap();
    let deadline = Instant::now() + LIMIT;
    // It ends this life by itself and begins another one, unless the fence was faster and took the whole process: then it is started
    // again, as a machine would.
    loop {
        let daemon = c.daemons[2].as_mut().unwrap();
        if daemon.try_wait().unwrap().is_some() {
            c.boot(3);
            break;
        }
        let life = Client::connect(&c.run_dir(3), ClientKind::Tool).map(|client| client.welcome().proc);
        if life.is_ok_and(|p| p != three) {
            break;
        }
        assert!(Instant::now() < deadline, "node 3 does not start a new life");
        std::thread::sleep(Duration::from_millis(20));
    }
    c.all_in(&[1, 2, 3]);
    let mut fenced = Vec::new();
    while let Ok(event) = watcher.events().try_recv() {
        if let ClusterEvent::Fenced { proc, .. } = event {
            fenced.push(proc);
        }
    }
    assert_eq!(fenced, [three], "the killed life is proved dead, the clean leaver needs no proof");
}

#[test]
fn a_frozen_node_is_fenced_after_its_token_is_lost() {
    let c = Cluster::start(3);
    c.all_in(&[1, 2, 3]);
    let watcher = c.client(1);
    let frozen = c.proc(2);
    let pid = nix::unistd::Pid::from_raw(c.daemons[1].as_ref().unwrap().id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let proof = wait_for(&watcher, "the frozen node fenced", |e| match e {
        ClusterEvent::Fenced { proc, scope: Scope::Node, proof, .. } if *proc == frozen => {
            Some(proof.clone())
        }
        _ => None,
    });
    assert_eq!(proof, Proof::Exited);
}

#[test]
fn group_messages_arrive_in_one_order_and_a_lost_member_is_named() {
    let mut c = Cluster::start(3);
    c.all_in(&[1, 2, 3]);
    let clients: Vec<Client> = (1..=3).map(|n| c.client(n)).collect();
    for client in &clients {
        client.join_group("talk", b"hello").unwrap();
    }
    for client in &clients {
        wait_for(client, "three members", |e| match e {
            ClusterEvent::GroupView { members, .. } if members.len() == 3 => {
                assert!(members.iter().all(|m| m.payload == b"hello"));
                Some(())
            }
            _ => None,
        });
    }
    std::thread::scope(|s| {
        for client in &clients {
            s.spawn(move || {
                for i in 0..100u32 {
                    let mut data = i.to_le_bytes().to_vec();
                    data.resize(1 + 97 * i as usize, 7);
                    client.send("talk", i % 3 == 0, &data).unwrap();
                }
            });
        }
    });
    let heard: Vec<Vec<(NodeId, u64, usize)>> = clients
        .iter()
        .map(|client| {
            (0..300)
                .map(|_| {
                    wait_for(client, "a message", |e| match e {
                        ClusterEvent::GroupMessage { from, no, data, .. } => {
                            Some((from.node, *no, data.len()))
                        }
                        _ => None,
                    })
                })
                .collect()
        })
        .collect();
    assert_eq!(heard[0], heard[1]);
    assert_eq!(heard[0], heard[2]);
    let three = c.proc(3);
    c.kill(3);
    for client in &clients[..2] {
        let left = wait_for(client, "a group without node 3", |e| match e {
            ClusterEvent::GroupView { left, members, .. } if members.len() == 2 => Some(left.clone()),
            _ => None,
        });
        assert_eq!((left[0].0.proc, left[0].1), (three, LeaveReason::NodeDown));
    }
}

/// A member that nobody would fence when it is lost would keep its services: it must not be seen in their group.
#[test]
fn only_members_of_the_fence_domain_join_the_group_of_the_service_managers() {
    let mut c = Cluster::configured(3, false);
    c.boot(1);
    assert!(!c.client(1).status().unwrap().fence.in_domain, "there is no quorum");
    let manager = Client::connect(&c.run_dir(1), ClientKind::Rgmanager).unwrap();
    manager.join_group("rgmanager", b"").unwrap();
    // joins of one client are ordered as they are made: what waits is passed by those that do not
    manager.join_group("talk", b"").unwrap();
    let view = |e: &ClusterEvent| match e {
        ClusterEvent::GroupView { group, members, .. } if !members.is_empty() => Some(group.clone()),
        _ => None,
    };
    assert_eq!(wait_for(&manager, "a group without quorum", view), "talk");
    c.boot(2);
    wait_for(&manager, "the managers' group", |e| view(e).filter(|g| g == "rgmanager"));
    assert!(manager.status().unwrap().fence.in_domain);
}

#[test]
fn with_a_quorum_disk_the_last_node_goes_on_alone_and_quorum_sinks_with_the_evicted() {
    let mut c = Cluster::start_with(3, true);
    c.all_in(&[1, 2, 3]);
    let s = c.status(1, "device votes", |s| s.device_votes == Some(2));
    assert_eq!((s.expected_votes, s.total_votes, s.quorum), (5, 5, 3));
    let watcher = c.client(1);
    let dead = [c.proc(2), c.proc(3)];
    c.kill(3);
    c.kill(2);
    let s = c.status(1, "quorate alone", |s| {
        s.quorate
            && s.nodes.iter().filter(|n| n.member).count() == 1
            && s.quorum == 2
            && s.fence.victims.is_empty()
    });
    assert_eq!((s.expected_votes, s.total_votes), (5, 3), "the displayed expectation stays");
    let mut fenced = Vec::new();
    while fenced.len() < 2 {
        fenced.push(wait_for(&watcher, "both fenced", |e| match e {
            ClusterEvent::Fenced { proc, scope: Scope::Node, .. } => Some(*proc),
            _ => None,
        }));
    }
    fenced.sort_unstable();
    assert_eq!(fenced, dead);
    c.status(1, "a permit", |s| s.permit_left_ms > 0);
    c.boot(2);
    c.boot(3);
    c.all_in(&[1, 2, 3]);
    c.status(1, "quorum as at the start", |s| s.quorum == 3 && s.total_votes == 5);
}
