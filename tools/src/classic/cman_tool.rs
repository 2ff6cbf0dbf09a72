//! `cman_tool status | nodes | leave | kill | expected | wait | version`. Errors go to standard error as `cman_tool: …`, exit 1; a time-out
//! exits 2. A name that `kill` does not know is told and passed over (exit 0), as it always was.

use super::{NodeArg, iso_time};
use cairn_base::exit;
use clap::{Parser, Subcommand};
use membership::ipc::{Command, IpcError, StatusReport};
use std::time::{Duration, Instant};

#[derive(Parser, Debug)]
#[command(name = "cman_tool", about = "Cluster membership")]
struct Args {
    #[command(flatten)]
    node: NodeArg,
    #[command(subcommand)]
    op: Op,
}

#[derive(Subcommand, Debug)]
enum Op {
    /// State of the cluster as this node sees it
    Status {
        #[arg(long)]
        json: bool,
    },
    /// Known nodes
    Nodes {
        /// Also their addresses
        #[arg(short = 'a')]
        addresses: bool,
        /// Only this node (may be repeated)
        #[arg(short = 'n', value_name = "NAME")]
        names: Vec<String>,
        #[arg(long)]
        json: bool,
    },
    /// Leave the cluster
    Leave {
        /// `remove`: quorum is recomputed without this node; `force`: mounts are ended first
        words: Vec<String>,
        #[arg(long)]
        dry_run: bool,
    },
    /// Tell members to stop
    Kill {
        #[arg(short = 'n', value_name = "NAME", required = true)]
        names: Vec<String>,
        #[arg(long)]
        dry_run: bool,
    },
    /// Set expected votes
    Expected {
        #[arg(short = 'e')]
        votes: u32,
        #[arg(long)]
        dry_run: bool,
    },
    /// Wait until this node is a member, or (-q) quorate
    Wait {
        #[arg(short = 'q')]
        quorate: bool,
        #[arg(short = 't', value_name = "SECONDS")]
        timeout: Option<u64>,
    },
    /// Protocol and configuration version
    Version,
}

pub(crate) fn main(argv: &[String]) -> i32 {
    let args: Args = match super::parse(argv) {
        Ok(args) => args,
        Err(code) => return code,
    };
    match run(&args) {
        Ok(code) => code,
        Err(IpcError::Connect { source, .. }) if source.kind() == std::io::ErrorKind::PermissionDenied => {
            eprintln!("cman_tool: Cannot open connection to cman, permission denied.");
            exit::FAILED
        }
        Err(e @ IpcError::Connect { .. }) => {
            eprintln!("cman_tool: Cannot open connection to cman, is it running ?\ncman_tool: {e}");
            exit::FAILED
        }
        Err(e) => {
            eprintln!("cman_tool: {e}");
            exit::FAILED
        }
    }
}

fn run(args: &Args) -> Result<i32, IpcError> {
    if let Op::Wait { quorate, timeout } = &args.op {
        return Ok(wait(&args.node, *quorate, timeout.map(Duration::from_secs)));
    }
    let (client, report) = args.node.ask()?;
    match &args.op {
        Op::Status { json: true } | Op::Nodes { json: true, .. } => {
            let value = if matches!(args.op, Op::Status { .. }) {
                serde_json::to_value(&report)
            } else {
                serde_json::to_value(&report.nodes)
            };
            println!("{}", value.expect("invariant: reports are plain data"));
        }
        Op::Status { .. } => print!("{}", status(&report)),
        Op::Nodes { addresses, names, .. } => print!("{}", nodes(&report, *addresses, names)),
        Op::Leave { words, dry_run } => {
            let (remove, force) = (words.iter().any(|w| w == "remove"), words.iter().any(|w| w == "force"));
            if let Some(bad) = words.iter().find(|w| !matches!(w.as_str(), "remove" | "force")) {
                eprintln!("cman_tool: unknown option {bad}");
                return Ok(exit::FAILED);
            }
            if *dry_run {
                println!("{} would leave the cluster", report.node_name);
            } else if let Err(e) = client.command(Command::LeaveCluster { force, remove }) {
                eprintln!("cman_tool: Error leaving cluster: {e}");
                return Ok(exit::FAILED);
            }
        }
        Op::Kill { names, dry_run } => {
            for name in names {
                if *dry_run {
                    println!("{name} would be killed");
                } else if let Err(e) = client.command(Command::KillNode { node: name.clone() }) {
                    eprintln!("cman_tool: Can't kill node {name} : {e}");
                }
            }
        }
        Op::Expected { votes, dry_run } => {
            if *dry_run {
                println!("expected votes would become {votes}");
            } else {
                client.command(Command::SetExpected { votes: *votes })?;
            }
        }
        Op::Version => println!("{} config {}", report.protocol_version, report.config_version),
        Op::Wait { .. } => {}
    }
    Ok(0)
}

/// Asks every 100 ms: the daemon may not even run yet.
fn wait(node: &NodeArg, quorate: bool, timeout: Option<Duration>) -> i32 {
    let start = Instant::now();
    loop {
        if let Ok(r) = node.tool().and_then(|c| c.status())
            && (r.quorate || !quorate)
            && r.state == membership::ipc::MembershipState::ClusterMember
        {
            return 0;
        }
        if timeout.is_some_and(|t| start.elapsed() >= t) {
            println!("Timed-out waiting for cluster");
            return 2;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn status(r: &StatusReport) -> String {
    let members = r.nodes.iter().filter(|n| n.member).count();
    let mut out = format!(
        "Version: {}\nConfig Version: {}\nCluster Name: {}\nCluster Id: {}\nCluster Member: {}\nCluster Generation: {}\nMembership state: {}\nNodes: {members}\nExpected votes: {}\n",
        r.protocol_version,
        r.config_version,
        r.cluster_name,
        r.cluster_id,
        if r.state == membership::ipc::MembershipState::ClusterMember { "Yes" } else { "No" },
        r.generation,
        r.state,
        r.expected_votes
    );
    if let Some(v) = r.device_votes {
        out += &format!("Quorum device votes: {v}\n");
    }
    out += &format!("Total votes: {}\n", r.total_votes);
    if !r.rhel5 {
        out += &format!("Node votes: {}\n", r.node_votes);
    }
    let ports: String = r.ports_bound.iter().map(|p| format!("{p} ")).collect();
    let addresses: String = r.addresses.iter().map(|a| format!("{a} ")).collect();
    let flags: String = r.flags.iter().map(|f| format!("{f} ")).collect();
    out += &format!(
        "Quorum: {} {}\nActive subsystems: {}\nFlags: {flags}\nPorts Bound: {ports} \nNode name: {}\nNode ID: {}\nMulticast addresses: {} \nNode addresses: {addresses}\n",
        r.quorum,
        if r.quorate { " " } else { "Activity blocked" },
        r.active_subsystems,
        r.node_name,
        r.node.0,
        r.multicast
    );
    out
}

fn nodes(r: &StatusReport, addresses: bool, names: &[String]) -> String {
    let mut out = String::from("Node  Sts   Inc   Joined               Name\n");
    if let Some(d) = &r.device
        && names.is_empty()
    {
        out += &format!("{:>4}   {}  {:>5}   {:19}  {}\n", 0, if d.held { 'M' } else { 'X' }, 0, "", d.name);
    }
    for n in r.nodes.iter().filter(|n| names.is_empty() || names.contains(&n.name)) {
        let joined = n.joined_unix.filter(|_| n.member).map(iso_time).unwrap_or_default();
        out += &format!(
            "{:>4}   {}  {:>5}   {joined:19}  {}\n",
            n.node.0,
            if n.member { 'M' } else { 'X' },
            n.joined_generation,
            n.name
        );
        if addresses {
            out += &format!("       Addresses: {} \n", n.addresses.join(" "));
        }
    }
    out
}
