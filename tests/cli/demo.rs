//! The demonstration and local clusters as commands: what they print, and that nothing stays behind, also when a signal ends them.

use super::{LIMIT, POLL, Said, can_mount, run, say, scratch, text};
use cairn_base::exit;
use cairn_tests::program::cairn;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// No process and no mount of the cluster is left, and nothing of its directory.
#[track_caller]
fn assert_nothing_left(dir: &Path) {
    assert!(!dir.exists(), "{} is left: {:?}", dir.display(), fs::read_dir(dir).map(Iterator::count));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(text(dir)), "{mounts}");
    let mut left = Vec::new();
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let words = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        if words.contains(text(dir)) {
            left.push(words);
        }
    }
    assert!(left.is_empty(), "{left:?}");
}

#[track_caller]
fn report(out: &str) -> Value {
    serde_json::from_str(out).unwrap_or_else(|e| panic!("not one JSON object ({e}): {out}"))
}

#[test]
fn the_demonstration_reports_in_one_object_and_can_leave_its_cluster_up() {
    if !can_mount() {
        return;
    }
    let root = scratch();
    let dir = root.path().join("c");
    let said = say(&["demo", "--json", "--keep", "--dir", text(&dir)]);
    said.worked();
    let r = report(&said.out);
    assert!(r["ok"] == true && r["last_node_kept_service"] == true, "{r}");
    assert!(r["nodes"] == 3 && r["profile"] == "fast" && r["lost_writes"] == 0, "{r}");
    assert!(
        r["counter"]["expected"].as_u64() > Some(0) && r["counter"]["expected"] == r["counter"]["actual"],
        "{r}"
    );
    assert!(r["fsck"]["own"] == "clean" && r["fsck"]["gfs2_utils"].is_string(), "{r}");
    for number in ["crash_to_service_ms", "survivor_longest_stall_ms", "acknowledged_writes"] {
        assert!(r[number].as_u64() > Some(0), "{number}: {r}");
    }
    for phase in ["detected", "evicted", "fenced", "replayed", "service_started", "http_answering"] {
        assert!(r["phases_ms"][phase].is_u64(), "{phase}: {r}");
    }
    // It is up, as it says.
    let status = report(&say(&["status", "--json", "--dir", text(&dir)]).out);
    for node in status["nodes"].as_array().unwrap() {
        assert!(node["mounted"] == true && node["quorate"] == true, "{node}");
    }
    assert!(dir.join("mnt/node2/www/index.html").exists());
    say(&["down", "--dir", text(&dir)]).worked();
    assert_nothing_left(&dir);
}

/// Starts a command, waits until standard error has `line`, and sends it a signal.
fn interrupted(args: &[&str], dir: &Path, reached: impl Fn(&str) -> bool, signal: Signal) -> Said {
    let log = dir.with_extension("err");
    let mut command = Command::new(cairn());
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(&log).unwrap());
    // SAFETY: signal is async-signal-safe. Whoever runs the tests may ignore these (nohup, a script's background job).
    unsafe {
        command.pre_exec(|| {
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
                libc::signal(signal, libc::SIG_DFL);
            }
            Ok(())
        });
    }
    let child = command.spawn().unwrap();
    let pid = Pid::from_raw(child.id().cast_signed());
    let start = Instant::now();
    while !reached(&fs::read_to_string(&log).unwrap()) {
        assert!(start.elapsed() < LIMIT, "{}", fs::read_to_string(&log).unwrap());
        std::thread::sleep(POLL);
    }
    kill(pid, signal).unwrap();
    let out = child.wait_with_output().unwrap();
    Said {
        code: out.status.code().unwrap_or(-1),
        out: String::from_utf8(out.stdout).unwrap(),
        err: fs::read_to_string(&log).unwrap(),
        line: format!("{args:?}, {signal}"),
    }
}

#[test]
fn a_signal_ends_the_demonstration_and_all_that_it_began() {
    if !can_mount() {
        return;
    }
    let root = scratch();
    let acts =
        [("1.", Signal::SIGTERM), ("2.", Signal::SIGINT), ("3.", Signal::SIGHUP), ("5.", Signal::SIGINT)];
    for (act, signal) in acts {
        let dir = root.path().join("c");
        let reached = |err: &str| err.lines().any(|l| l.starts_with(act));
        let said = interrupted(&["demo", "--json", "--dir", text(&dir)], &dir, reached, signal);
        said.refused(128 + signal as i32, &["interrupted by SIG"]);
        let r = report(&said.out);
        assert!(r["ok"] == false && r["problems"][0] == format!("interrupted by {signal}"), "{r}");
        assert_nothing_left(&dir);
    }
}

#[test]
fn a_signal_ends_up_and_all_that_it_began() {
    if !can_mount() {
        return;
    }
    let root = scratch();
    let dir = root.path().join("c");
    // The first daemon runs, the cluster is not up.
    let reached = |_: &str| dir.join("nodes/node1/cairnd.sock").exists();
    interrupted(&["up", "--dir", text(&dir)], &dir, reached, Signal::SIGINT)
        .refused(128 + Signal::SIGINT as i32, &["interrupted by SIGINT"]);
    assert_nothing_left(&dir);
}

#[test]
fn a_demonstration_that_cannot_begin_says_so_in_its_object() {
    if !can_mount() {
        return;
    }
    let dir = scratch();
    fs::write(dir.path().join("mine"), "x").unwrap();
    let said = say(&["demo", "--json", "--dir", text(dir.path())]);
    said.refused(exit::FAILED, &["not empty"]);
    let r = report(&said.out);
    assert!(r["ok"] == false && r["problems"][0].as_str().unwrap().contains("not empty"), "{r}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_cluster_lives_in_any_directory_or_says_why_not() {
    if !can_mount() {
        return;
    }
    let root = scratch();
    let here = |args: &[&str]| run(Command::new(cairn()).args(args).current_dir(root.path()));
    for name in ["relative", "with space", "a&b<c>\"d'e"] {
        let dir = root.path().join(name);
        here(&["up", "--nodes", "1", "--dir", name]).worked();
        let status = report(&here(&["status", "--json", "--dir", name]).out);
        assert!(
            status["nodes"][0]["mounted"] == true
                && status["nodes"][0]["mount"] == text(&dir.join("mnt/node1")),
            "{status}"
        );
        here(&["crash", "node1", "--dir", name]).worked();
        here(&["start", "node1", "--dir", name]).worked();
        fs::write(dir.join("mnt/node1/file"), "x").unwrap();
        here(&["down", "--dir", name]).worked();
        assert_nothing_left(&dir);
    }
    let long = "x".repeat(90);
    for name in ["%n", "a#part=1", "a\nb", &long] {
        here(&["up", "--nodes", "1", "--dir", name]).refused(exit::FAILED, &["choose another --dir"]);
        assert!(!root.path().join(name).exists());
    }
}
