//! Commands about a cluster: none there, wrong words, and a running one that must not be disturbed.

use super::{blank, can_mount, say, scratch, text, untouched};
use cairn_base::exit;
use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn without_a_daemon_every_tool_says_where_it_looked() {
    let dir = scratch();
    let run = dir.path().join("run");
    let socket = run.join("cairnd.sock");
    let commands: [(&[&str], &str); 16] = [
        (&["clustat"], "Could not connect to CMAN"),
        (&["clustat", "-Q"], "Could not connect to CMAN"),
        (&["clustat", "--json"], "Could not connect to CMAN"),
        (&["cman_tool", "status"], "cman_tool: Cannot open connection to cman, is it running ?"),
        (&["cman_tool", "nodes"], "cman_tool: Cannot open connection to cman"),
        (&["cman_tool", "leave"], "cman_tool: Cannot open connection to cman"),
        (&["cman_tool", "kill", "-n", "x"], "cman_tool: Cannot open connection to cman"),
        (&["cman_tool", "expected", "-e", "3"], "cman_tool: Cannot open connection to cman"),
        (&["cman_tool", "version"], "cman_tool: Cannot open connection to cman"),
        (&["clusvcadm", "-e", "web"], "Could not connect to cluster service"),
        (&["clusvcadm", "-d", "web"], "Could not connect to cluster service"),
        (&["clusvcadm", "-r", "web", "-m", "x"], "Could not connect to cluster service"),
        (&["dlm_tool", "ls"], "dlm_tool: "),
        (&["dlm_tool", "ls", "--json"], "dlm_tool: "),
        (&["fence_ack_manual", "-O", "x"], "fence_ack_manual: x: "),
        (&["fence_ack_manual", "-O", "--force-unsafe", "x"], "fence_ack_manual: x: "),
    ];
    for (args, lead) in commands {
        let all: Vec<&str> = args.iter().copied().chain(["--run-dir", text(&run)]).collect();
        let said = say(&all);
        said.refused(exit::FAILED, &[lead, text(&socket), "is it running", "CAIRN_RUN_DIR"]);
        assert_eq!(said.out, "", "{all:?}");
    }
    let said = say(&["cman_tool", "wait", "-t", "1", "--run-dir", text(&run)]);
    assert_eq!((said.code, said.out.as_str()), (2, "Timed-out waiting for cluster\n"), "the historic code");
    // Nobody there to answer the question: nothing is asserted about the node.
    let said = say(&["fence_ack_manual", "x", "--run-dir", text(&run)]);
    assert_eq!(said.code, exit::FAILED);
    assert!(said.out.ends_with("Aborted.\n"), "{}", said.out);
    assert!(!run.exists());
}

#[test]
fn wrong_words_are_usage_everywhere() {
    let usage: [&[&str]; 19] = [
        &["frobnicate"],
        &["clustat", "--bogus"],
        &["cman_tool"],
        &["cman_tool", "frob"],
        &["cman_tool", "kill"],
        &["cman_tool", "expected", "-e", "many"],
        &["clusvcadm"],
        &["clusvcadm", "-e", "a", "-d", "b"],
        &["dlm_tool", "frob"],
        &["fence_ack_manual"],
        &["fence_ack_manual", "a", "b"],
        &["up", "--bogus"],
        &["crash"],
        &["down", "node1"],
        &["timeline", "--bogus"],
        &["demo", "--bogus"],
        &["demo", "--profile", "hasty"],
        &["install-links"],
        &["cairnd", "--bogus"],
    ];
    for args in usage {
        let said = say(args);
        assert!(!said.refused(exit::USAGE, &[]).err.is_empty(), "{args:?}");
    }
    say(&["install-links", "/nonexistent/dir"])
        .refused(exit::FAILED, &["/nonexistent/dir", "make the directory"]);
    for help in [&["--help"][..], &["up", "--help"], &["clustat", "--help"], &["mount.gfs", "--help"]] {
        assert!(say(help).worked().out.contains("Usage:") || help[0] == "--help");
    }
}

#[test]
fn up_refuses_what_it_cannot_make_and_leaves_nothing() {
    if !can_mount() {
        return;
    }
    let dir = scratch();
    let c = dir.path().join("c");
    for nodes in ["0", "17", "65536", "-1", "x"] {
        say(&["up", "--dir", text(&c), &format!("--nodes={nodes}")])
            .refused(exit::USAGE, &["--nodes", nodes]);
    }
    say(&["up", "--dir", text(&c), "--nodes", "17"]).refused(exit::USAGE, &["1..=16"]);
    say(&["up", "--dir", text(&c), "--profile", "hasty"]).refused(exit::USAGE, &["hasty", "fast", "classic"]);
    say(&["up", "--dir", text(&c), "--size", "1"]).refused(exit::FAILED, &["too few for 3 journal(s)"]);
    assert!(!c.exists());
    fs::create_dir(&c).unwrap();
    say(&["up", "--dir", text(&c), "--size", "1"]).refused(exit::FAILED, &["too few for 3 journal(s)"]);
    assert_eq!(fs::read_dir(&c).unwrap().count(), 0, "the caller's directory is empty again");
    fs::write(c.join("mine"), "x").unwrap();
    say(&["up", "--dir", text(&c)]).refused(exit::FAILED, &[text(&c), "not empty", "--dir"]);
    assert_eq!(fs::read(c.join("mine")).unwrap(), b"x");
    for args in [&["status"][..], &["down"], &["crash", "node1"], &["start", "node1"], &["timeline"]] {
        let all: Vec<&str> = args.iter().copied().chain(["--dir", text(&c)]).collect();
        say(&all).refused(exit::FAILED, &["no cluster in", text(&c), "cairn up makes one"]);
    }
    assert_eq!(fs::read(c.join("mine")).unwrap(), b"x");
}

/// A cluster of two nodes; ended and removed when dropped.
struct Cluster<'a>(&'a Path);

impl Cluster<'_> {
    fn node1(&self, args: &[&str]) -> super::Said {
        let run = self.0.join("nodes/node1");
        let all: Vec<&str> = args.iter().copied().chain(["--run-dir", text(&run)]).collect();
        say(&all)
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        let _ = say(&["down", "--dir", text(self.0)]);
    }
}

#[test]
fn a_running_cluster_is_not_disturbed() {
    if !can_mount() {
        return;
    }
    let root = scratch();
    let dir = root.path().join("c");
    let d = text(&dir);
    let cluster = Cluster(&dir);
    say(&["up", "--nodes", "2", "--dir", d]).worked();
    say(&["up", "--nodes", "2", "--dir", d]).refused(exit::FAILED, &[d, "not empty", "cairn down --dir"]);
    let file = |node: &str| dir.join("mnt").join(node).join("file");
    fs::write(file("node1"), "before").unwrap();

    for op in ["crash", "pause", "resume", "start"] {
        say(&[op, "nosuchnode", "--dir", d])
            .refused(exit::FAILED, &["no node \"nosuchnode\"", "node1, node2"]);
    }
    let lun = dir.join("lun.img");
    let (quorum, volume) = (format!("{}#part=1", lun.display()), format!("{}#part=2", lun.display()));
    let in_use = "is in use on this host";
    for device in [quorum.as_str(), &volume, text(&lun)] {
        say(&["mkfs.gfs", "-q", "-O", "-t", "a:b", device]).refused(exit::FAILED, &[device, in_use]);
        say(&["mkqdisk", "-y", "-O", "-c", device, "-l", "new"]).refused(exit::FAILED, &[device, in_use]);
    }
    say(&["fsck.gfs", &volume]).refused(exit::fsck::FAILED, &[&volume, in_use]);
    let at = root.path().join("mnt");
    fs::create_dir(&at).unwrap();
    say(&["mount.gfs", "-o", "lockproto=lock_nolock", &volume, text(&at)])
        .refused(exit::mount::FAILED, &[&volume, in_use]);
    cluster
        .node1(&["mount.gfs", &volume, text(&at)])
        .refused(exit::mount::FAILED, &["cairn:vol", "all 2 journals are in use", "gfs2_jadd"]);

    let other = blank(root.path(), "other", 64 << 20);
    say(&["mkfs.gfs", "-q", "-t", "elsewhere:vol", text(&other)]).worked();
    untouched(&other, || {
        cluster
            .node1(&["mount.gfs", text(&other), text(&at)])
            .refused(exit::mount::FAILED, &["cluster \"elsewhere\"", "this node to \"cairn\""]);
        cluster.node1(&["mount.gfs", "-o", "locktable=cairn:other", text(&other), text(&at)]).refused(
            exit::mount::FAILED,
            &[text(&other), "\"elsewhere:vol\"", "\"cairn:other\"", "tunegfs2"],
        );
    });
    assert!(!super::is_mounted(&at));

    let said = cluster.node1(&["clusvcadm", "-e", "nosuch"]);
    assert_eq!((said.code, said.out.contains("Service does not exist")), (252, true), "{}", said.out);
    cluster
        .node1(&["clusvcadm", "-e", "web", "-m", "nosuch"])
        .refused(exit::FAILED, &["'nosuch' not in membership list", "node1, node2"]);
    assert_eq!(cluster.node1(&["clustat", "-m", "nosuch"]).code, 255);
    assert_eq!(cluster.node1(&["clustat", "-s", "nosuch"]).code, 255);
    cluster
        .node1(&["fence_ack_manual", "-O", "nosuch"])
        .refused(exit::FAILED, &["no clusternode is named \"nosuch\""]);
    cluster
        .node1(&["fence_ack_manual", "-O", "node2"])
        .refused(exit::FAILED, &["node2 is still running here"]);
    cluster.node1(&["cman_tool", "kill", "-n", "nosuch"]).refused(exit::OK, &["Can't kill node nosuch"]);
    cluster.node1(&["cman_tool", "expected", "-e", "1"]).refused(exit::FAILED, &["can't set expected votes"]);
    cluster.node1(&["cman_tool", "leave", "remove"]).refused(exit::FAILED, &["leave remove is not offered"]);
    let conf = dir.join("cluster.conf");
    cluster
        .node1(&["cairnd", "--config", text(&conf), "--node", "node1"])
        .refused(exit::FAILED, &["another cairnd runs here"]);

    // Everything is as it was.
    assert!(say(&["mkqdisk", "-f", "cairn", &quorum]).worked().out.contains("cairn"));
    assert_eq!(cluster.node1(&["clustat", "-Q"]).code, exit::OK, "quorate");
    let status: serde_json::Value =
        serde_json::from_str(&say(&["status", "--json", "--dir", d]).out).unwrap();
    for node in status["nodes"].as_array().unwrap() {
        assert!(node["mounted"] == true && node["quorate"] == true, "{node}");
    }
    assert_eq!(fs::read(file("node2")).unwrap(), b"before");
    fs::write(file("node2"), "after").unwrap();
    assert_eq!(fs::read(file("node1")).unwrap(), b"after");
    say(&["down", "--keep", "--dir", d]).worked();
    assert_eq!(say(&["fsck.gfs", &volume]).code, exit::OK);
    say(&["down", "--dir", d]).worked();
    assert!(!dir.exists());
    say(&["down", "--dir", d]).refused(exit::FAILED, &["no cluster in", d]);
}

/// The number in the file of a server that crashed belongs to another process by now: nothing of it is the service's.
#[test]
fn the_service_script_leaves_alone_who_has_the_number_of_its_server_now() {
    if !can_mount() {
        return;
    }
    let root = scratch();
    let dir = root.path().join("c");
    let cluster = Cluster(&dir);
    say(&["up", "--nodes", "1", "--dir", text(&dir)]).worked();
    say(&["down", "--keep", "--dir", text(&dir)]).worked();
    let layout: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("cluster.json")).unwrap()).unwrap();
    let answers = || TcpStream::connect(layout["http"].as_str().unwrap()).is_ok();
    let mut innocent = Command::new("sleep").arg("600").spawn().unwrap();
    let pid_file = root.path().join("httpd.pid");
    let script = |op: &str| {
        let mut command = Command::new(dir.join("httpd"));
        command.arg(op).env("CAIRN_RUN_DIR", root.path()).env("OCF_RESKEY_mountpoint", root.path());
        // the server inherits what it writes to
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().code()
    };
    let crash = || fs::write(&pid_file, format!("{}\n", innocent.id())).unwrap();
    crash();
    let stopped = (script("status"), script("stop"), pid_file.exists());
    crash();
    let started = (script("start"), answers(), script("start"), script("status"));
    let ended = (script("stop"), answers(), script("status"), pid_file.exists());
    let is_alive = innocent.try_wait().unwrap().is_none();
    let _ = innocent.kill();
    innocent.wait().unwrap();
    drop(cluster);
    assert_eq!(stopped, (Some(1), Some(0), false));
    assert!(is_alive, "the script killed a process that is not its own");
    assert_eq!(started, (Some(0), true, Some(0), Some(0)));
    assert_eq!(ended, (Some(0), false, Some(1), false));
}
