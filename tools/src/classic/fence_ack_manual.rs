//! `fence_ack_manual NODE`: a person asserts that the node is dead. Exit status 0 done, 1 refused or not reachable, 2 usage.

use super::NodeArg;
use cairn_base::exit;
use clap::Parser;
use membership::ipc::Command;
use std::io::{BufRead, Write};

#[derive(Parser, Debug)]
#[command(name = "fence_ack_manual", about = "Acknowledge by hand that a node has been fenced")]
struct Args {
    #[command(flatten)]
    node: NodeArg,
    /// Node that is off, or cut off from the shared storage
    victim: String,
    /// Do not ask
    #[arg(short = 'O', long)]
    yes: bool,
    /// Even though there are signs of life. The volume may be destroyed
    #[arg(long)]
    force_unsafe: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

pub(crate) fn main(argv: &[String]) -> i32 {
    let args: Args = match super::parse(argv) {
        Ok(args) => args,
        Err(code) => return code,
    };
    if args.dry_run {
        println!("{} would be declared fenced", args.victim);
        return 0;
    }
    if !args.yes {
        println!(
            "About to override fencing for {}.\nImproper use of this command can cause severe file system damage.\n",
            args.victim
        );
        print!("Continue [NO/absolutely]? ");
        let _ = std::io::stdout().flush();
        let mut line = String::new();
        let _ = std::io::stdin().lock().read_line(&mut line);
        if line.trim() != "absolutely" {
            println!("Aborted.");
            return exit::FAILED;
        }
    }
    let command = Command::FenceAckManual { node: args.victim.clone(), force_unsafe: args.force_unsafe };
    match args.node.tool().and_then(|c| c.command(command)) {
        Ok(()) => {
            println!("Done");
            exit::OK
        }
        Err(e) => {
            eprintln!("fence_ack_manual: {}: {e}", args.victim);
            exit::FAILED
        }
    }
}
