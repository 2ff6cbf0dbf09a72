//! `cairn demo`: the whole story on one machine, told to people on standard error and, with `--json`, to programs on
//! standard output.
//!
//! Exit status: 0 when every promise held; 1 when one was broken or something failed, with the place of the evidence.

mod report;
mod story;

use crate::local::{Plan, default_dir};
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
    if let Err(e) = gfs::fuse::check_system() {
        eprintln!("cairn demo: {e}");
        return exit::FAILED;
    }
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
    let mut report = report::Report::new(&args.profile);
    let cluster = match plan.create() {
        Ok(c) => c,
        Err(e) => {
            eprintln!("cairn demo: {e}");
            return exit::FAILED;
        }
    };
    let told = story::tell(&cluster, &mut report);
    if let Err(e) = &told {
        eprintln!("\ncairn demo: {e}");
        report.problems.push(e.to_string());
    }
    let must_keep = args.keep || !report.problems.is_empty();
    if args.keep && told.is_ok() {
        eprintln!(
            "The cluster is up in {}; cairn down --dir {} ends it.",
            cluster.dir.display(),
            cluster.dir.display()
        );
    } else {
        let problems = cluster.down(must_keep);
        report.problems.extend(problems);
    }
    if !report.problems.is_empty() {
        eprintln!("\nBROKEN:");
        for p in &report.problems {
            eprintln!("  {p}");
        }
        eprintln!("evidence: {}", cluster.dir.display());
    }
    if args.json {
        println!("{}", report.json());
    } else {
        eprint!("{}", report.summary());
    }
    i32::from(!report.problems.is_empty())
}
