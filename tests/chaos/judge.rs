//! What must hold.

use crate::world::{KINDS, NODES, World};
use cairn_tests::load;
use cairn_tests::oracle;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Journals of a kind by life.
fn journals(world: &World, kind: &str) -> BTreeMap<String, Vec<String>> {
    let found = load::journals(&world.acks, kind).expect("acks");
    found.into_iter().map(|(life, path)| (life, load::lines(&path))).collect()
}

/// Acknowledged records of a kind by life.
fn acked(world: &World, kind: &str) -> BTreeMap<String, Vec<u64>> {
    let found = load::journals(&world.acks, kind).expect("acks");
    found.into_iter().map(|(life, path)| (life, load::acked(&path))).collect()
}

/// Records on one mount. The journals are read first: what they hold is in the files read after them.
fn records(world: &World, mount: &Path, quiet: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut judge = |file: &str, acked: &BTreeMap<String, Vec<u64>>| match fs::read(mount.join(file)) {
        Ok(bytes) => {
            let found = load::judge_records(&bytes, acked, quiet);
            wrong.extend(found.into_iter().map(|w| format!("{file} on {}: {w}", mount.display())));
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound && acked.values().all(Vec::is_empty) => {}
        Err(e) => wrong.push(format!("{file} on {}: {e}", mount.display())),
    };
    for kind in ["shared", "service"] {
        judge(kind, &acked(world, kind));
    }
    for (life, seqs) in acked(world, "own") {
        judge(&format!("own-{life}"), &BTreeMap::from([(life, seqs)]));
    }
    wrong
}

/// After a round, beside the load.
pub(crate) fn while_it_runs(world: &World) {
    let mount = world.mount(world.faults as usize % NODES.len());
    let mut wrong = records(world, &mount, false);
    wrong.extend(load::judge_sections(&journals(world, "section")));
    if !wrong.is_empty() {
        world.fail(&wrong.join("\n"));
    }
}

pub(crate) fn at_the_end(mut world: World) {
    world.quiesce();
    let run_dir = world.cluster.run_dir("node1").display().to_string();
    // Its records must not grow any more either.
    if let Err(e) = world.cluster.run(&["clusvcadm", "-d", "web", "--run-dir", &run_dir]) {
        world.fail(&format!("the service cannot be disabled: {e}"));
    }
    let mut wrong = Vec::new();
    let names = journals(&world, "names");
    let counters: Vec<_> = journals(&world, "counter").into_values().collect();
    for i in 0..NODES.len() {
        let mount = world.mount(i);
        wrong.extend(records(&world, &mount, true));
        match (counter(&mount), directory(&mount.join("names"))) {
            (Ok(value), Ok(dir)) => {
                wrong.extend(load::judge_counter(value, &counters));
                wrong.extend(load::judge_names(&dir, &names));
            }
            (a, b) => wrong.push(format!("{}: {:?} {:?}", mount.display(), a.err(), b.err())),
        }
    }
    wrong.extend(load::judge_sections(&journals(&world, "section")));
    if !wrong.is_empty() {
        world.fail(&wrong.join("\n"));
    }
    let out = world.cluster.command(&["down", "--keep"]).output().expect("cairn down");
    if !out.status.success() {
        world.fail(&format!("cairn down: {}", String::from_utf8_lossy(&out.stderr)));
    }
    wrong.extend(writes_behind_fences(&world));
    wrong.extend(volume(&world));
    wrong.extend(left_over(&world));
    if !wrong.is_empty() {
        world.fail(&wrong.join("\n"));
    }
    let count = |kind: &str| journals(&world, kind).values().map(Vec::len).sum::<usize>();
    let counts: Vec<String> = KINDS.iter().chain(&["service"]).map(|k| format!("{k} {}", count(k))).collect();
    world.say(&format!(
        "{} faults, longest healing {} ms; lines of the journals: {}",
        world.faults,
        world.longest_healing.as_millis(),
        counts.join(", ")
    ));
}

fn counter(mount: &Path) -> io::Result<u64> {
    let mut text = [0; 32];
    let n = File::open(mount.join("counter"))?.read_at(&mut text, 0)?;
    String::from_utf8_lossy(&text[..n]).trim().parse().map_err(io::Error::other)
}

fn directory(path: &Path) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        all.insert(entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?);
    }
    Ok(all)
}

/// I9, from the log of the LUN's writes.
fn writes_behind_fences(world: &World) -> Vec<String> {
    // (node, incarnation) to the time at which somebody first knew of its fence.
    let mut fences: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    for v in NODES.iter().flat_map(|n| world.cluster.events(n, 0)) {
        if v["event"] == "fence_done"
            && v["fs"].is_null()
            && let (Some(node), Some(inc), Some(t)) =
                (v["node"].as_u64(), v["incarnation"].as_u64(), v["t"].as_u64())
        {
            let first = fences.entry((node, inc)).or_insert(t);
            *first = t.min(*first);
        }
    }
    let mut wrong = Vec::new();
    let mut known = 0;
    for line in BufReader::new(world.write_log()).lines().map_while(Result::ok) {
        let Ok(v) = serde_json::from_str::<Value>(&line) else { continue };
        let (Some(pid), Some(t)) = (v["pid"].as_i64(), v["t"].as_u64()) else { continue };
        // Numbers of processes are used again: the latest that was seen before the write, or else the first.
        let of_pid = || world.seen.iter().filter(|s| i64::from(s.0) == pid);
        let who = of_pid().filter(|s| s.1 <= t).max_by_key(|s| s.1).or_else(|| of_pid().min_by_key(|s| s.1));
        let Some((_, _, node, inc)) = who else { continue };
        known += 1;
        if let Some(fence) = fences.get(&(*node, *inc)).filter(|f| **f < t && v["ev"] == "begin") {
            wrong.push(format!("node{node} in life {inc} writes {} ns behind its fence: {line}", t - fence));
        }
    }
    if known == 0 {
        wrong.push("the log of writes names nobody that was seen".into());
    }
    wrong.truncate(10);
    wrong
}

fn volume(world: &World) -> Vec<String> {
    let mut wrong = Vec::new();
    let device = format!("file:{}#part=2", world.cluster.dir.join("lun.img").display());
    let dev = lun::open(&device, &lun::OpenOptions::read_only()).expect("the volume");
    match gfs::check::check(&dev) {
        Ok(r) if r.is_clean() => {}
        other => wrong.push(format!("own checker: {other:?}")),
    }
    if oracle::present(oracle::missing_utils()) {
        let copy = world.cluster.beside("volume.img");
        copy_sparse(&dev, &copy).expect("copy of the volume");
        let said = oracle::fsck_gfs2(&copy);
        if !said.is_clean() {
            wrong.push(format!("fsck.gfs2: {said:?}"));
        }
    }
    wrong
}

fn copy_sparse(dev: &lun::Lun, to: &Path) -> io::Result<()> {
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

/// Processes and mounts that should have gone with the cluster.
fn left_over(world: &World) -> Vec<String> {
    let dir = world.cluster.dir.display().to_string();
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let mut found: Vec<String> =
        mounts.lines().filter(|l| l.contains(&dir)).map(|l| format!("mount {l}")).collect();
    for entry in fs::read_dir("/proc").expect("proc").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if pid != std::process::id() && line.contains(&dir) {
            found.push(format!("process {pid} {line}"));
        }
    }
    found
}
