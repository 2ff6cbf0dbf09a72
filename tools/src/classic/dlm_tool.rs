//! `dlm_tool ls`: the lock spaces of this node's mounts. Exit status 0 done, 1 the daemon cannot be reached, 2 usage.

use super::NodeArg;
use cairn_base::exit;
use clap::{Parser, Subcommand};

#[derive(Parser, Debug)]
#[command(name = "dlm_tool", about = "Look into the lock manager")]
struct Args {
    #[command(flatten)]
    node: NodeArg,
    #[command(subcommand)]
    op: Op,
}

#[derive(Subcommand, Debug)]
enum Op {
    /// Lock spaces of this node
    Ls {
        #[arg(long)]
        json: bool,
    },
}

pub(crate) fn main(argv: &[String]) -> i32 {
    let args: Args = match super::parse(argv) {
        Ok(args) => args,
        Err(code) => return code,
    };
    let report = match args.node.ask() {
        Ok((_, report)) => report,
        Err(e) => {
            eprintln!("dlm_tool: {e}");
            return exit::FAILED;
        }
    };
    let spaces: Vec<_> =
        report.groups.iter().filter_map(|g| Some((g.name.strip_prefix("gfs:")?, g))).collect();
    let Op::Ls { json } = args.op;
    if json {
        let list: Vec<_> = spaces
            .iter()
            .map(|(name, g)| {
                let members: Vec<u16> = g.members.iter().map(|m| m.proc.node.0).collect();
                serde_json::json!({"name": name, "view": g.view_no, "members": members,
                    "state": if report.quorate { "run" } else { "stopped" }})
            })
            .collect();
        println!("{}", serde_json::Value::Array(list));
        return 0;
    }
    println!("dlm lockspaces");
    for (name, g) in spaces {
        let members: Vec<String> = g.members.iter().map(|m| m.proc.node.0.to_string()).collect();
        println!(
            "name          {name}\nchange        member {} seq {}\nmembers       {}\n",
            members.len(),
            g.view_no,
            members.join(" ")
        );
    }
    0
}
