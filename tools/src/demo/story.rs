//! The six acts. Each says what it does, waits for what must happen, and fails with a sentence when it does not.

use super::report::Report;
use crate::interrupt;
use crate::local::{Cluster, Doing, Result, cli, fail, own_exe};
use crate::timeline::{self, Entry};
use crate::work;
use cairn_base::events;
use rgmanager::ServiceState;
use rgmanager::driver::{AdminReply, AdminRequest};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PAGE: &str = "<h1>served from the shared volume</h1>\n";
const INCREMENTS: u64 = 40;
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

fn say(text: &str) {
    eprintln!("{text}");
}

pub(super) fn tell(cluster: &Cluster, report: &mut Report) -> Result<()> {
    say("1. three nodes, one LUN: a quorum disk and a volume with three journals");
    cli::up(cluster)?;
    say("   quorate, fence domain joined, volume mounted on node1, node2, node3");
    share(cluster)?;
    counter(cluster, report)?;
    let mut writers = service_and_writers(cluster)?;
    let owner = crash_owner(cluster, report, &mut writers)?;
    last_man(cluster, report, &owner, &mut writers)?;
    verify(cluster, report, writers)
}

/// Act 2, first half: one node writes, another reads; a lock taken on one is refused on the other.
fn share(cluster: &Cluster) -> Result<()> {
    say("2. write on node1, read on node2; one lock for all");
    let a = cluster.mount_point("node1");
    let b = cluster.mount_point("node2");
    fs::create_dir_all(a.join("www")).doing("mkdir on node1")?;
    fs::write(a.join("www/index.html"), PAGE).doing("write on node1")?;
    let seen = fs::read_to_string(b.join("www/index.html")).doing("read on node2")?;
    if seen != PAGE {
        return fail(format!("node2 read {seen:?} where node1 wrote {PAGE:?}"));
    }
    let path = "edited-on-both";
    fs::write(a.join(path), "draft\n").doing("write on node1")?;
    let mine = File::options().write(true).open(a.join(path)).doing("open on node1")?;
    let theirs = File::options().write(true).open(b.join(path)).doing("open on node2")?;
    flock(&mine, libc::LOCK_EX | libc::LOCK_NB).doing("flock on node1")?;
    match flock(&theirs, libc::LOCK_EX | libc::LOCK_NB) {
        Err(e) if e.raw_os_error() == Some(libc::EWOULDBLOCK) => {}
        other => return fail(format!("node2 got {other:?} for a file that node1 has locked")),
    }
    flock(&mine, libc::LOCK_UN).doing("unlock on node1")?;
    flock(&theirs, libc::LOCK_EX | libc::LOCK_NB).doing("flock on node2 after the unlock")?;
    say("   node2 was refused while node1 held the lock, and got it afterwards");
    Ok(())
}

fn flock(f: &File, how: i32) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    if unsafe { libc::flock(f.as_raw_fd(), how) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Act 2, second half: a counter that all nodes increment under fcntl locks.
fn counter(cluster: &Cluster, report: &mut Report) -> Result<()> {
    let exe = own_exe()?;
    let mut children = Vec::new();
    for node in &cluster.layout.nodes {
        let child = Command::new(&exe)
            .args(["work", "count", "--times", &INCREMENTS.to_string(), "--file"])
            .arg(cluster.mount_point(node).join("counter"))
            .spawn()
            .doing("work count")?;
        children.push((node, Load(child)));
    }
    for (node, load) in &mut children {
        if !load.wait(LIMIT).doing(format!("counter on {node}"))? {
            return fail(format!("the counter on {node} failed"));
        }
    }
    report.counter_expected = INCREMENTS * cluster.layout.nodes.len() as u64;
    let f = File::open(cluster.mount_point("node3").join("counter")).doing("counter")?;
    report.counter_actual = work::read_counter(&f).doing("counter")?;
    say(&format!(
        "   counter: {} of {} increments under fcntl locks",
        report.counter_actual, report.counter_expected
    ));
    if report.counter_actual != report.counter_expected {
        report.problems.push("the counter lost increments".into());
    }
    Ok(())
}

/// A process that works on a mount; killed when dropped.
struct Load(Child);

impl Load {
    /// Its success, or an error when it does not end in time.
    fn wait(&mut self, limit: Duration) -> Result<bool> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().doing("wait")? {
                return Ok(status.success());
            }
            if start.elapsed() > limit {
                return fail(format!("not done after {limit:?}"));
            }
            interrupt::pause(POLL)?;
        }
    }

    fn stop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A process that appends and fsyncs on one node.
struct Writer {
    node: String,
    /// Name in the records: node and life.
    name: String,
    load: Load,
}

impl Writer {
    fn start(cluster: &Cluster, node: &str, life: u32) -> Result<Self> {
        let name = format!("{node}.{life}");
        let child = Command::new(own_exe()?)
            .args(["work", "write", "--name", &name, "--file"])
            .arg(cluster.mount_point(node).join(format!("records-{name}")))
            .arg("--acks")
            .arg(acks(cluster, &name))
            .stderr(Stdio::null())
            .spawn()
            .doing("work write")?;
        Ok(Self { node: node.to_owned(), name, load: Load(child) })
    }
}

fn acks(cluster: &Cluster, name: &str) -> PathBuf {
    cluster.dir.join(format!("acks-{name}"))
}

/// Act 3.
fn service_and_writers(cluster: &Cluster) -> Result<Vec<Writer>> {
    say("3. a web server on the shared volume, and a writer with fsync on every node");
    let owner = wait_owner(cluster, &cluster.layout.nodes, None)?;
    let by = wait_http(cluster, LIMIT)?;
    if by != owner {
        return fail(format!("service:web is recorded on {owner}, but {by} answers"));
    }
    say(&format!("   http://{}/ is served by {owner}", cluster.layout.http));
    let mut writers = Vec::new();
    for node in &cluster.layout.nodes {
        writers.push(Writer::start(cluster, node, 1)?);
    }
    for w in &writers {
        wait_acks(cluster, &w.name, 20)?;
    }
    Ok(writers)
}

fn wait_acks(cluster: &Cluster, name: &str, n: usize) -> Result<()> {
    let start = Instant::now();
    while work::read_acks(&acks(cluster, name)).map_or(0, |a| a.len()) < n {
        if start.elapsed() > LIMIT {
            return fail(format!("writer {name} has no {n} acknowledged records after {LIMIT:?}"));
        }
        interrupt::pause(POLL)?;
    }
    Ok(())
}

/// The node that runs the service, as the given nodes' service managers record it; not `other_than`.
fn wait_owner(cluster: &Cluster, ask: &[String], other_than: Option<&str>) -> Result<String> {
    let start = Instant::now();
    loop {
        for node in ask {
            if let Some(owner) = owner_by(cluster, node)
                && other_than != Some(owner.as_str())
            {
                return Ok(owner);
            }
        }
        if start.elapsed() > LIMIT {
            return fail(format!("service:web does not start within {LIMIT:?}"));
        }
        interrupt::pause(POLL)?;
    }
}

fn owner_by(cluster: &Cluster, node: &str) -> Option<String> {
    let Ok(AdminReply::Status(s)) = rgmanager::driver::ask(&cluster.run_dir(node), &AdminRequest::Status)
    else {
        return None;
    };
    let records = s.records?;
    let r = records.get("service:web")?;
    (r.state == ServiceState::Started).then(|| format!("node{}", r.owner.node.0))
}

/// GET the page; says who served it.
fn http(cluster: &Cluster) -> io::Result<String> {
    let addr = cluster.layout.http.parse().map_err(io::Error::other)?;
    let mut s = TcpStream::connect_timeout(&addr, Duration::from_millis(500))?;
    s.set_read_timeout(Some(Duration::from_secs(2)))?;
    write!(s, "GET /index.html HTTP/1.0\r\nHost: {addr}\r\n\r\n")?;
    let mut text = String::new();
    s.read_to_string(&mut text)?;
    if !text.starts_with("HTTP/1.0 200") && !text.starts_with("HTTP/1.1 200") || !text.ends_with(PAGE) {
        return Err(io::Error::other(format!("unexpected answer {:?}", text.lines().next())));
    }
    text.lines()
        .find_map(|l| l.strip_prefix("X-Served-By: "))
        .map(|v| v.trim().to_owned())
        .ok_or_else(|| io::Error::other("no X-Served-By"))
}

fn wait_http(cluster: &Cluster, limit: Duration) -> Result<String> {
    let start = Instant::now();
    loop {
        match http(cluster) {
            Ok(by) => return Ok(by),
            Err(e) if start.elapsed() > limit => {
                return fail(format!("http://{}/: {e}", cluster.layout.http));
            }
            Err(_) => interrupt::pause(POLL)?,
        }
    }
}

fn now() -> u64 {
    membership::clock::boottime().0
}

/// Act 4. Returns the node that was killed.
fn crash_owner(cluster: &Cluster, report: &mut Report, writers: &mut [Writer]) -> Result<String> {
    let victim = wait_owner(cluster, &cluster.layout.nodes, None)?;
    let survivors: Vec<String> = cluster.layout.nodes.iter().filter(|n| **n != victim).cloned().collect();
    say(&format!("4. SIGKILL for everything on {victim}, in the middle of writes"));
    let killed_at = now();
    let n = cluster.signal(&victim, libc::SIGKILL);
    if n == 0 {
        return fail(format!("no process of {victim} was found"));
    }
    let heir = wait_http_from(cluster, &victim)?;
    let answered_at = now();
    let heir_recorded = wait_owner(cluster, &survivors, Some(&victim))?;
    if heir != heir_recorded {
        report.problems.push(format!("{heir} answers, but {heir_recorded} is recorded as owner"));
    }
    for w in writers.iter_mut().filter(|w| w.node == victim) {
        w.load.stop();
    }
    // The survivors must be seen writing again before their stall can be measured.
    for w in writers.iter().filter(|w| w.node != victim) {
        let before = work::read_acks(&acks(cluster, &w.name)).map_or(0, |a| a.len());
        wait_acks(cluster, &w.name, before + 20)?;
    }
    let dirs: Vec<_> = cluster.run_dirs().into_iter().filter(|(n, _)| *n != victim).collect();
    let entries: Vec<Entry> = timeline::read(&dirs).into_iter().filter(|e| e.t >= killed_at).collect();
    phases(report, &entries, killed_at, answered_at, &victim);
    for e in &entries {
        if e.t <= answered_at + 1_000_000_000 {
            say(&format!("   {}", timeline::line(e, killed_at)));
        }
    }
    let stall = longest_stall(cluster, writers, &victim, killed_at, answered_at);
    report.survivor_longest_stall_ms = stall / 1_000_000;
    say(&format!(
        "   {heir} answers {} ms after the crash; survivors' writes were held up {} ms at most",
        (answered_at - killed_at) / 1_000_000,
        report.survivor_longest_stall_ms
    ));
    Ok(victim)
}

fn wait_http_from(cluster: &Cluster, not: &str) -> Result<String> {
    let start = Instant::now();
    loop {
        if let Ok(by) = http(cluster)
            && by != not
        {
            return Ok(by);
        }
        if start.elapsed() > LIMIT {
            return fail(format!("nobody took the service over from {not} within {LIMIT:?}"));
        }
        interrupt::pause(POLL)?;
    }
}

fn phases(report: &mut Report, entries: &[Entry], killed_at: u64, answered_at: u64, victim: &str) {
    let id = victim.trim_start_matches("node").parse::<u64>().ok();
    let about_victim = |e: &&Entry| e.number("node") == id;
    let mut first = |phase: &'static str, found: Option<&Entry>| match found {
        Some(e) => {
            report.phases.insert(phase, (e.t - killed_at) / 1_000_000);
        }
        None => report.problems.push(format!("the survivors logged no event for the phase \"{phase}\"")),
    };
    let named = |name: &'static str| entries.iter().filter(move |e| e.event() == name);
    first("detected", named(events::NODE_LOST).find(about_victim));
    first("evicted", named(events::VIEW_INSTALLED).find(|e| e.number("members") == Some(2)));
    first("fenced", named(events::FENCE_DONE).find(about_victim));
    first("replayed", named(events::JOURNAL_REPLAYED).next());
    first("service_started", named(events::SERVICE_STATE).find(|e| e.text("state") == Some("started")));
    report.phases.insert("http_answering", (answered_at - killed_at) / 1_000_000);
}

/// Longest time between two acknowledgements of one survivor around the crash, in nanoseconds.
fn longest_stall(cluster: &Cluster, writers: &[Writer], victim: &str, from: u64, to: u64) -> u64 {
    writers
        .iter()
        .filter(|w| w.node != victim)
        .filter_map(|w| work::read_acks(&acks(cluster, &w.name)).ok())
        .flat_map(|a| {
            a.windows(2)
                .filter(|w| w[1].1 >= from && w[0].1 <= to)
                .map(|w| w[1].1 - w[0].1)
                .collect::<Vec<_>>()
        })
        .max()
        .unwrap_or(0)
}

/// Act 5: the dead node rejoins; then two of three die and the last one goes on, thanks to the quorum disk.
fn last_man(cluster: &Cluster, report: &mut Report, victim: &str, writers: &mut Vec<Writer>) -> Result<()> {
    say(&format!("5. {victim} rejoins; then two of three die"));
    cli::start(cluster, victim)?;
    let seen = fs::read_to_string(cluster.mount_point(victim).join("www/index.html")).doing(victim)?;
    if seen != PAGE {
        report.problems.push(format!("{victim} reads {seen:?} after it rejoined"));
    }
    writers.push(Writer::start(cluster, victim, 2)?);
    wait_acks(cluster, &format!("{victim}.2"), 10)?;
    let owner = wait_owner(cluster, &cluster.layout.nodes, None)?;
    let last = cluster.layout.nodes.iter().find(|n| **n != owner).cloned().unwrap_or_default();
    let doomed: Vec<String> = cluster.layout.nodes.iter().filter(|n| **n != last).cloned().collect();
    for node in &doomed {
        cluster.signal(node, libc::SIGKILL);
    }
    for w in writers.iter_mut().filter(|w| w.node != last) {
        w.load.stop();
    }
    let by = wait_http_from(cluster, &owner)?;
    let acked = writers
        .iter()
        .filter(|w| w.node == last)
        .filter_map(|w| work::read_acks(&acks(cluster, &w.name)).ok().map(|a| (w.name.clone(), a.len())))
        .next_back();
    if let Some((name, n)) = acked {
        wait_acks(cluster, &name, n + 10)?;
    }
    let quorate = cluster.status(&last).is_ok_and(|s| s.quorate);
    report.last_node_kept_service = by == last && quorate;
    say(&format!("   {last} alone with the quorum disk: quorate {quorate}, service on {by}, writes go on"));
    if !report.last_node_kept_service {
        report
            .problems
            .push(format!("the last node {last} did not keep the service (quorate {quorate}, {by} answers)"));
    }
    Ok(())
}

/// Act 6: clean unmount, checkers, every acknowledged write.
fn verify(cluster: &Cluster, report: &mut Report, mut writers: Vec<Writer>) -> Result<()> {
    say("6. every acknowledged write is looked for, then the volume is unmounted and checked");
    for w in &mut writers {
        w.load.stop();
    }
    let names: Vec<String> = writers.iter().map(|w| w.name.clone()).collect();
    drop(writers);
    let reader = cluster
        .layout
        .nodes
        .iter()
        .find(|n| cluster.status(n).is_ok_and(|s| s.quorate))
        .cloned()
        .ok_or(crate::local::Failure("no quorate node is left".into()))?;
    for name in &names {
        let acked = work::read_acks(&acks(cluster, name)).doing(name)?;
        let file = cluster.mount_point(&reader).join(format!("records-{name}"));
        let lost = work::lost(&file, name, &acked).doing(file.display())?;
        report.acknowledged_writes += acked.len() as u64;
        report.lost_writes += lost.len() as u64;
        if let Some(first) = lost.first() {
            report
                .problems
                .push(format!("{name}: {} acknowledged records are lost, first {first}", lost.len()));
        }
    }
    let f = File::open(cluster.mount_point(&reader).join("counter")).doing("counter")?;
    report.counter_actual = work::read_counter(&f).doing("counter")?;
    drop(f);
    if report.counter_actual != report.counter_expected {
        report.problems.push("the counter changed after the crashes".into());
    }
    report.problems.extend(cluster.down(true));
    let dev = lun::open(&cluster.device(), &lun::OpenOptions::read_only()).doing("the volume")?;
    match gfs::check::check(&dev) {
        Ok(r) if r.is_clean() => report.fsck_own = "clean".into(),
        Ok(r) => {
            report.fsck_own = "dirty".into();
            let json = serde_json::to_string(&r).unwrap_or_default();
            report.problems.push(format!("own checker: {json}"));
        }
        Err(e) => {
            report.fsck_own = "failed".into();
            report.problems.push(format!("own checker: {e}"));
        }
    }
    report.fsck_gfs2_utils = match fsck_gfs2(cluster) {
        Ok(Some(true)) => "clean".into(),
        Ok(None) => "not installed".into(),
        Ok(Some(false)) => {
            report.problems.push("fsck.gfs2 complains; see fsck.log".into());
            "dirty".into()
        }
        Err(e) => {
            report.problems.push(format!("fsck.gfs2: {e}"));
            "failed".into()
        }
    };
    Ok(())
}

/// fsck.gfs2 wants the volume as a file of its own: a copy of the partition. `None` when it is not installed.
fn fsck_gfs2(cluster: &Cluster) -> Result<Option<bool>> {
    let program =
        ["/usr/sbin/fsck.gfs2", "/sbin/fsck.gfs2"].into_iter().find(|p| std::path::Path::new(p).exists());
    let Some(program) = program else { return Ok(None) };
    let copy = cluster.dir.join("volume.img");
    copy_sparse(cluster, &copy).doing(copy.display())?;
    let out = Command::new(program).arg("-n").arg(&copy).output().doing(program)?;
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    fs::write(cluster.dir.join("fsck.log"), &text).doing("fsck.log")?;
    // Its exit status alone says nothing about dirty journals.
    let is_clean = out.status.success() && !text.contains("is dirty");
    if is_clean {
        fs::remove_file(&copy).doing(copy.display())?;
    }
    Ok(Some(is_clean))
}

fn copy_sparse(cluster: &Cluster, to: &std::path::Path) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let dev = lun::open(&cluster.device(), &lun::OpenOptions::read_only()).map_err(io::Error::other)?;
    let out = File::create(to)?;
    out.set_len(dev.size())?;
    let mut buf = vec![0; 1 << 20];
    let mut at = 0;
    while at < dev.size() {
        let n = buf.len().min((dev.size() - at) as usize);
        dev.read_at(at, &mut buf[..n]).map_err(io::Error::other)?;
        if buf[..n].iter().any(|b| *b != 0) {
            out.write_all_at(&buf[..n], at)?;
        }
        at += n as u64;
    }
    Ok(())
}
