//! `cairn demo`: the whole story on one machine, told to people on standard error and, with `--json`, to programs on
//! standard output.
//!
//! Exit status: 0 when every promise held; 1 when one was broken or something failed, with the place of the evidence; 128 and the signal's
//! number when SIGINT, SIGTERM or SIGHUP ended it, with nothing left behind.

mod report;
mod story;

use crate::interrupt;
use crate::local::{Cluster, Failure, Plan, Result, cli, default_dir};
use cairn_base::exit;
use clap::Parser;
use std::path::PathBuf;

#[derive(Parser, Debug)]
#[command(name = "demo", about = "Share a volume, crash a node, fence, replay, take over, verify")]
pub(crate) struct Args {
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
    /// Leave the cluster running at the end
    #[arg(long)]
    keep: bool,
    /// Timing profile
    #[arg(long, default_value = "fast", value_parser = crate::local::cli::PROFILES)]
    profile: String,
    /// Directory for the cluster; by default a new one, removed at the end
    #[arg(long)]
    dir: Option<PathBuf>,
}

pub(crate) fn main(argv: &[String]) -> i32 {
    let args: Args = match crate::classic::parse(argv) {
        Ok(args) => args,
        Err(code) => return code,
    };
    let mut report = report::Report::new(&args.profile);
    let evidence = run(&args, &mut report);
    if !report.problems.is_empty() {
        eprintln!("{}", if interrupt::caught().is_some() { "\nENDED:" } else { "\nBROKEN:" });
        for p in &report.problems {
            eprintln!("  {p}");
        }
        if let Some(dir) = evidence {
            eprintln!("evidence: {}; cairn down --dir {} removes it", dir.display(), dir.display());
        }
    }
    if args.json {
        println!("{}", report.json());
    } else {
        eprint!("{}", report.summary());
    }
    match interrupt::caught() {
        Some(signal) => interrupt::exit_code(signal),
        None if report.problems.is_empty() => exit::OK,
        None => exit::FAILED,
    }
}

/// The story and the end of its cluster. Returns where the evidence of a problem lies.
fn run(args: &Args, report: &mut report::Report) -> Option<PathBuf> {
    let cluster = match create(args) {
        Ok(cluster) => cluster,
        Err(e) => {
            report.problems.push(interrupt::cause(e).to_string());
            return None;
        }
    };
    let mut told = story::tell(&cluster, report).and_then(|()| interrupt::check());
    if told.is_ok() && args.keep && report.problems.is_empty() {
        // The checks wanted the volume unmounted.
        told = cli::up(&cluster);
        if told.is_ok() {
            eprint!("{}", cli::describe(&cluster, false));
            return None;
        }
    }
    if let Err(e) = told {
        report.problems.push(interrupt::cause(e).to_string());
    }
    let is_interrupted = interrupt::caught().is_some();
    let is_evidence = !report.problems.is_empty() && !is_interrupted;
    report.problems.extend(cluster.down(is_evidence));
    is_evidence.then_some(cluster.dir)
}

fn create(args: &Args) -> Result<Cluster> {
    gfs::fuse::check_system().map_err(|e| Failure(e.to_string()))?;
    interrupt::catch()?;
    let dir = args.dir.clone().unwrap_or_else(|| {
        let mut name = default_dir().into_os_string();
        name.push(format!("-demo-{}", std::process::id()));
        name.into()
    });
    let plan = Plan {
        dir,
        nodes: 3,
        profile: args.profile.clone(),
        volume_mib: 512,
        journal_mib: 32,
        has_quorum_disk: true,
    };
    plan.create()
}
