//! `cairn up | down | status | crash | start | pause | resume`. Exit status: 0 done, 1 failed, 2 wrong usage; `up` that a signal ended: 128
//! and its number, with nothing left behind.

use super::{Cluster, Failure, Plan, Result, default_dir, fail};
use crate::interrupt;
use cairn_base::exit;
use clap::{Parser, Subcommand};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// Nodes of a local cluster: slots of the quorum disk.
const MAX_NODES: i64 = 16;
/// Timing profiles of cluster.conf.
pub(crate) const PROFILES: [&str; 3] = ["fast", "default", "classic"];
const JOURNAL_MIB: u64 = 32;

#[derive(Parser, Debug)]
#[command(name = "cairn", about = "A cluster on this machine")]
struct Args {
    #[command(subcommand)]
    op: Op,
    /// Directory of the cluster
    #[arg(long, default_value_os_t = default_dir(), global = true)]
    dir: PathBuf,
    /// One JSON object on standard output
    #[arg(long, global = true)]
    json: bool,
    /// Say what would be done, and do nothing
    #[arg(long, global = true)]
    dry_run: bool,
}

#[derive(Subcommand, Debug)]
enum Op {
    /// Make a cluster and leave it running
    Up {
        /// 1 to 16, the quorum disk's slots
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=MAX_NODES))]
        nodes: u16,
        /// Timing
        #[arg(long, default_value = "fast", value_parser = PROFILES)]
        profile: String,
        /// Size of the volume in MiB [default: 512, more for many journals]
        #[arg(long)]
        size: Option<u64>,
        /// Quorum by the nodes' votes alone
        #[arg(long)]
        no_quorum_disk: bool,
    },
    /// Stop the cluster and remove its files
    Down {
        /// Leave the files where they are
        #[arg(long)]
        keep: bool,
    },
    /// Nodes, mounts and services
    Status,
    /// SIGKILL every process of a node
    Crash { node: String },
    /// Start a node again, and mount
    Start { node: String },
    /// SIGSTOP every process of a node
    Pause { node: String },
    /// SIGCONT
    Resume { node: String },
}

pub(crate) fn main(argv: &[String]) -> i32 {
    let with_name: Vec<String> = std::iter::once("cairn".to_owned()).chain(argv.iter().cloned()).collect();
    let args: Args = match crate::classic::parse(&with_name) {
        Ok(args) => args,
        Err(code) => return code,
    };
    match run(&args) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("cairn: {e}");
            exit::FAILED
        }
    }
}

fn run(args: &Args) -> Result<i32> {
    if let Op::Up { nodes, profile, size, no_quorum_disk } = &args.op {
        let plan = Plan {
            dir: args.dir.clone(),
            nodes: *nodes,
            profile: profile.clone(),
            volume_mib: size.unwrap_or(512.max(2 * JOURNAL_MIB * u64::from(*nodes))),
            journal_mib: JOURNAL_MIB,
            has_quorum_disk: !no_quorum_disk,
        };
        if args.dry_run {
            println!("would make {plan:?}");
            return Ok(0);
        }
        gfs::fuse::check_system().map_err(|e| Failure(e.to_string()))?;
        interrupt::catch()?;
        let cluster = plan.create()?;
        if let Err(e) = up(&cluster) {
            if let Some(signal) = interrupt::caught() {
                for problem in [e.0].into_iter().chain(cluster.down(false)) {
                    eprintln!("cairn: {problem}");
                }
                return Ok(interrupt::exit_code(signal));
            }
            // nothing keeps running that nobody knows of; the files are the evidence
            let mut text = e.0;
            for problem in cluster.down(true) {
                text += &format!("\n{problem}");
            }
            let dir = cluster.dir.display();
            return fail(format!("{text}\nlogs are kept in {dir}; cairn down --dir {dir} removes them"));
        }
        print!("{}", describe(&cluster, args.json));
        return Ok(0);
    }
    let cluster = Cluster::open(&args.dir)?;
    match &args.op {
        Op::Up { .. } => {}
        Op::Down { keep } => {
            if args.dry_run {
                println!(
                    "would stop {} and remove {}",
                    cluster.layout.nodes.join(", "),
                    cluster.dir.display()
                );
                return Ok(0);
            }
            let problems = cluster.down(*keep);
            for p in &problems {
                eprintln!("cairn: {p}");
            }
            return Ok(i32::from(!problems.is_empty()));
        }
        Op::Status => print!("{}", status(&cluster, args.json)),
        Op::Crash { node } => {
            signal(&cluster, args, node, libc::SIGKILL, "killed")?;
            if !args.dry_run {
                cluster.wait_gone(node, Duration::from_secs(20))?;
            }
        }
        Op::Pause { node } => signal(&cluster, args, node, libc::SIGSTOP, "stopped")?,
        Op::Resume { node } => signal(&cluster, args, node, libc::SIGCONT, "continued")?,
        Op::Start { node } => {
            cluster.check_node(node)?;
            if args.dry_run {
                println!("would start {node}");
                return Ok(0);
            }
            start(&cluster, node)?;
            println!(
                "{}",
                if args.json {
                    json!({"node": node, "started": true}).to_string()
                } else {
                    format!("{node} is back")
                }
            );
        }
    }
    Ok(0)
}

fn signal(cluster: &Cluster, args: &Args, node: &str, signal: i32, word: &str) -> Result<()> {
    cluster.check_node(node)?;
    let n = if args.dry_run { cluster.processes(node).len() } else { cluster.signal(node, signal) };
    if args.json {
        println!("{}", json!({"node": node, "processes": n, "done": !args.dry_run}));
    } else {
        println!("{node}: {n} processes {}{word}", if args.dry_run { "would be " } else { "" });
    }
    Ok(())
}

/// Start all daemons, wait for quorum, mount everywhere.
pub(crate) fn up(cluster: &Cluster) -> Result<()> {
    let limit = Duration::from_secs(60);
    let mut daemons = Vec::new();
    for node in &cluster.layout.nodes {
        daemons.push(cluster.start_daemon(node, limit)?);
    }
    let n = cluster.layout.nodes.len();
    for (node, daemon) in cluster.layout.nodes.iter().zip(&mut daemons) {
        let what = "quorate view of all nodes in the fence domain";
        cluster.wait_status(node, daemon.as_mut(), what, limit, |s| {
            s.quorate && s.nodes.iter().filter(|n| n.member).count() == n && s.fence.in_domain
        })?;
    }
    for node in &cluster.layout.nodes {
        cluster.mount(node)?;
    }
    Ok(())
}

/// Start one node's daemon, wait until it is in the fence domain of a quorate view, mount.
pub(crate) fn start(cluster: &Cluster, node: &str) -> Result<()> {
    let limit = Duration::from_secs(60);
    if cluster.status(node).is_err() {
        // What is left of its last life is about to end: killed, fenced or by its own deadline.
        let _ = cluster.wait_gone(node, Duration::from_secs(5));
    }
    cluster.detach_stale(node);
    let mut daemon = cluster.start_daemon(node, limit)?;
    cluster.wait_status(node, daemon.as_mut(), "quorate view", limit, |s| s.quorate && s.fence.in_domain)?;
    cluster.mount(node)
}

pub(crate) fn describe(cluster: &Cluster, as_json: bool) -> String {
    if as_json {
        return status(cluster, true);
    }
    let mut out = format!("cluster \"{}\" is up in {}\n", cluster.layout.cluster, cluster.dir.display());
    for node in &cluster.layout.nodes {
        out += &format!(
            "  {node}: mount {}   sockets and logs {}\n",
            cluster.mount_point(node).display(),
            cluster.run_dir(node).display()
        );
    }
    out += &format!(
        "  service web: http://{}/\n  ask a node: CAIRN_RUN_DIR={} cairn clustat\n  stop: cairn down --dir {}\n",
        cluster.layout.http,
        cluster.run_dir(&cluster.layout.nodes[0]).display(),
        cluster.dir.display()
    );
    out
}

fn status(cluster: &Cluster, as_json: bool) -> String {
    let mut rows = Vec::new();
    for node in &cluster.layout.nodes {
        let report = cluster.status(node).ok();
        rows.push(json!({
            "node": node,
            "running": report.is_some(),
            "quorate": report.as_ref().is_some_and(|r| r.quorate),
            "processes": cluster.processes(node),
            "run_dir": cluster.run_dir(node),
            "mount": cluster.mount_point(node),
            "mounted": cluster.is_served(node),
            "logs": cluster.run_dir(node).join("log"),
            "socket": cluster.run_dir(node).join("cairnd.sock"),
        }));
    }
    if as_json {
        let all = json!({"dir": cluster.dir, "cluster": cluster.layout.cluster, "device": cluster.device(),
                         "http": cluster.layout.http, "nodes": rows});
        return format!("{all}\n");
    }
    let mut out = String::from("node      daemon   quorum     mount\n");
    for r in rows {
        let word = |key: &str, yes: &'static str, no: &'static str| if r[key] == true { yes } else { no };
        out += &format!(
            "{:<9} {:<8} {:<10} {} {}\n",
            r["node"].as_str().unwrap_or(""),
            word("running", "running", "down"),
            word("quorate", "quorate", "-"),
            word("mounted", "mounted", "not mounted"),
            r["mount"].as_str().unwrap_or(""),
        );
    }
    out
}
