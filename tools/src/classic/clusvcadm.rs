//! `clusvcadm`: enable, disable, relocate, restart, stop, freeze services. Exit status: the answer's code modulo 256; 0 when it was
//! running already.

use super::NodeArg;
use cairn_base::{NodeId, exit};
use clap::Parser;
use rgmanager::core::{AdminCode, AdminOp};
use rgmanager::driver::{AdminReply, AdminRequest};
use std::io::Write;

#[derive(Parser, Debug)]
#[command(name = "clusvcadm", about = "Administer clustered services")]
#[command(group(clap::ArgGroup::new("op").required(true)))]
struct Args {
    #[command(flatten)]
    node: NodeArg,
    /// Enable SERVICE here (or on -m MEMBER)
    #[arg(short = 'e', value_name = "SERVICE", group = "op")]
    enable: Option<String>,
    /// Disable SERVICE
    #[arg(short = 'd', value_name = "SERVICE", group = "op")]
    disable: Option<String>,
    /// Relocate SERVICE to another node (or to -m MEMBER)
    #[arg(short = 'r', value_name = "SERVICE", group = "op")]
    relocate: Option<String>,
    /// Restart SERVICE where it runs
    #[arg(short = 'R', value_name = "SERVICE", group = "op")]
    restart: Option<String>,
    /// Stop SERVICE until the next event
    #[arg(short = 's', value_name = "SERVICE", group = "op")]
    stop: Option<String>,
    /// Freeze SERVICE: no status checks, no failover
    #[arg(short = 'Z', value_name = "SERVICE", group = "op")]
    freeze: Option<String>,
    /// Unfreeze SERVICE
    #[arg(short = 'U', value_name = "SERVICE", group = "op")]
    unfreeze: Option<String>,
    /// Target member
    #[arg(short = 'm', short_alias = 'n', value_name = "MEMBER")]
    member: Option<String>,
    /// Say nothing
    #[arg(short = 'q')]
    quiet: bool,
    /// JSON
    #[arg(long)]
    json: bool,
    /// Say what would be asked, and ask nothing
    #[arg(long)]
    dry_run: bool,
}

pub(crate) fn main(argv: &[String]) -> i32 {
    let args: Args = match super::parse(argv) {
        Ok(args) => args,
        Err(code) => return code,
    };
    let report = match args.node.ask() {
        Ok((_, report)) => report,
        Err(e) => {
            eprintln!("Could not connect to cluster service: {e}");
            return exit::FAILED;
        }
    };
    let target = match &args.member {
        None => None,
        Some(name) => match report.nodes.iter().find(|n| n.name == *name) {
            Some(n) => Some(n.node),
            None => {
                let names: Vec<&str> = report.nodes.iter().map(|n| n.name.as_str()).collect();
                eprintln!("'{name}' not in membership list ({})", names.join(", "));
                return exit::FAILED;
            }
        },
    };
    let (name, op, lead) = request(&args, target);
    let svc = crate::service_id(&name);
    let lead = lead.replace("%s", &svc);
    if args.dry_run {
        println!("{lead}... (not asked: --dry-run)");
        return 0;
    }
    if !args.quiet && !args.json {
        print!("{lead}...");
        let _ = std::io::stdout().flush();
    }
    let asked_target = target.unwrap_or(report.node);
    match rgmanager::driver::ask(&args.node.run_dir, &AdminRequest::Do { svc: svc.clone(), op: op.clone() }) {
        Ok(AdminReply::Done { code, owner }) => {
            let owner_name = owner
                .filter(|o| o.0 != 0)
                .and_then(|o| report.nodes.iter().find(|n| n.node == o))
                .map(|n| n.name.clone());
            if args.json {
                println!(
                    "{}",
                    serde_json::json!({"service": svc, "code": code as i32, "text": code.text(), "owner": owner_name})
                );
            } else if !args.quiet {
                println!("{}", code.text());
                if let (AdminCode::Success, AdminOp::Enable { .. } | AdminOp::Relocate { .. }, Some(n)) =
                    (code, &op, &owner_name)
                {
                    let elsewhere =
                        matches!(op, AdminOp::Enable { .. } | AdminOp::Relocate { target: Some(_) })
                            && owner != Some(asked_target);
                    println!("{}{svc} is now running on {n}", if elsewhere { "Warning: " } else { "" });
                }
            }
            match code {
                AdminCode::AlreadyRunning => 0,
                other => (other as i32).rem_euclid(256),
            }
        }
        Ok(AdminReply::Status(_)) => exit::FAILED,
        Err(e) => {
            eprintln!("Could not connect to resource group manager: {e}");
            exit::FAILED
        }
    }
}

fn request(args: &Args, target: Option<NodeId>) -> (String, AdminOp, String) {
    let to = args.member.as_ref().map_or(String::new(), |m| format!(" to {m}"));
    let choices = [
        (
            &args.enable,
            AdminOp::Enable { target },
            args.member.as_ref().map_or("Local machine trying to enable %s".into(), |m| {
                format!("Member {m} trying to enable %s")
            }),
        ),
        (&args.disable, AdminOp::Disable, "Local machine disabling %s".into()),
        (&args.relocate, AdminOp::Relocate { target }, format!("Trying to relocate %s{to}")),
        (&args.restart, AdminOp::Restart, "Local machine trying to restart %s".into()),
        (&args.stop, AdminOp::Stop, "Local machine stopping %s".into()),
        (&args.freeze, AdminOp::Freeze, "Local machine freezing %s".into()),
        (&args.unfreeze, AdminOp::Unfreeze, "Local machine unfreezing %s".into()),
    ];
    let (name, op, lead) = choices
        .into_iter()
        .find_map(|(name, op, lead)| name.clone().map(|n| (n, op, lead)))
        .expect("invariant: clap requires one operation");
    (name, op, lead)
}
