//! `clustat`: members and services at a glance.
//!
//! Exit status: 0; with `-m` 0 online, 1 offline, 255 unknown; with `-s` 0 for starting, started and stopping, else the state's
//! number, 255 unknown; with `-Q` 0 quorate, 1 not; 1 when the daemon cannot be reached.

use super::{NodeArg, ctime};
use cairn_base::exit;
use clap::Parser;
use membership::ipc::StatusReport;
use rgmanager::core::AdminCode;
use rgmanager::driver::{AdminReply, AdminRequest, ServiceStatus};
use rgmanager::{Record, ServiceState};
use serde_json::json;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Parser, Debug)]
#[command(name = "clustat", about = "Show cluster members and services")]
struct Args {
    #[command(flatten)]
    node: NodeArg,
    /// Refresh every SECONDS
    #[arg(short = 'i', value_name = "SECONDS", conflicts_with = "xml")]
    interval: Option<u64>,
    /// Print the local node id
    #[arg(short = 'I')]
    id: bool,
    /// Only this member
    #[arg(short = 'm', value_name = "MEMBER")]
    member: Option<String>,
    /// Only this service
    #[arg(short = 's', value_name = "SERVICE")]
    service: Option<String>,
    /// Long form of services
    #[arg(short = 'l')]
    long: bool,
    /// XML
    #[arg(short = 'x')]
    xml: bool,
    /// Print nothing, exit 0 if quorate
    #[arg(short = 'Q')]
    quiet_quorum: bool,
    /// Local data only (everything is local here; accepted for old scripts)
    #[arg(short = 'f')]
    fast: bool,
    /// JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(argv: &[String]) -> i32 {
    let args: Args = match super::parse(argv) {
        Ok(args) => args,
        Err(code) => return code,
    };
    loop {
        let code = once(&args);
        let Some(secs) = args.interval else { return code };
        std::thread::sleep(std::time::Duration::from_secs(secs.max(1)));
        print!("\x1b[H\x1b[J");
    }
}

fn once(args: &Args) -> i32 {
    let report = match args.node.ask() {
        Ok((_, report)) => report,
        Err(e) => {
            eprintln!("Could not connect to CMAN: {e}");
            return exit::FAILED;
        }
    };
    if args.quiet_quorum {
        return i32::from(!report.quorate);
    }
    if args.id {
        println!("0x{:08x}", report.node.0);
        return 0;
    }
    let services = match rgmanager::driver::ask(&args.node.run_dir, &AdminRequest::Status) {
        Ok(AdminReply::Status(s)) => Some(s),
        _ => None,
    };
    if args.json {
        println!("{}", to_json(&report, services.as_ref()));
        return 0;
    }
    if args.xml {
        print!("{}", to_xml(&report, services.as_ref()));
        return 0;
    }
    if let Some(name) = &args.member {
        let Some(node) = report.nodes.iter().find(|n| n.name == *name) else { return 255 };
        print!("{}{}", member_header(), member_row(&report, node.node.0, services.as_ref()));
        return i32::from(!node.member);
    }
    if let Some(name) = &args.service {
        let id = crate::service_id(name);
        let Some(r) = services.as_ref().and_then(|s| s.records.as_ref()).and_then(|m| m.get(&id)) else {
            return 255;
        };
        print!("{}{}", service_header(), service_row(&id, r, &report));
        return match r.state {
            ServiceState::Starting | ServiceState::Started | ServiceState::Stopping => 0,
            other => other.number(),
        };
    }
    print!("{}", page(&report, services.as_ref(), args.long));
    0
}

fn node_name(report: &StatusReport, node: u16) -> String {
    if node == 0 {
        return "none".into();
    }
    report.nodes.iter().find(|n| n.node.0 == node).map_or_else(|| format!("node{node}"), |n| n.name.clone())
}

fn member_header() -> String {
    format!(" {:<40} {:<4} Status\n {:<40} {:<4} ------\n", "Member Name", "ID", "------ ----", "----")
}

fn status_words(report: &StatusReport, node: u16, services: Option<&ServiceStatus>) -> String {
    let n = report.nodes.iter().find(|n| n.node.0 == node);
    let mut words = vec![if n.is_some_and(|n| n.member) { "Online" } else { "Offline" }];
    if report.node.0 == node {
        words.push("Local");
    }
    if services.is_some_and(|s| s.online.iter().any(|o| o.0 == node)) {
        words.push("rgmanager");
    }
    words.join(", ")
}

fn member_row(report: &StatusReport, node: u16, services: Option<&ServiceStatus>) -> String {
    format!(" {:<40} {node:>4} {}\n", node_name(report, node), status_words(report, node, services))
}

fn service_header() -> String {
    format!(
        " {:<30} {:<30} {:<14}\n {:<30} {:<30} {:<14}\n",
        "Service Name", "Owner (Last)", "State", "------- ----", "----- ------", "-----"
    )
}

fn owner_text(r: &Record, report: &StatusReport) -> String {
    match r.state {
        ServiceState::Stopped | ServiceState::Disabled | ServiceState::Failed | ServiceState::Recoverable => {
            format!("({})", node_name(report, r.last_owner.0))
        }
        _ => node_name(report, r.owner.node.0),
    }
}

fn service_row(id: &str, r: &Record, report: &StatusReport) -> String {
    let state = if r.frozen { format!("{:<10} [Z]", r.state.name()) } else { r.state.name().to_owned() };
    format!(" {id:<30} {:<30} {state:<14}\n", owner_text(r, report))
}

fn page(report: &StatusReport, services: Option<&ServiceStatus>, long: bool) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let mut out = format!(
        "Cluster Status for {} @ {}\nMember Status: {}\n\n{}",
        report.cluster_name,
        ctime(now),
        if report.quorate { "Quorate" } else { "Inquorate" },
        member_header()
    );
    for n in &report.nodes {
        out += &member_row(report, n.node.0, services);
    }
    if let Some(d) = &report.device {
        let word = if d.held { "Online" } else { "Offline" };
        out += &format!(" {:<40} {:>4} {word}, Quorum Disk\n", d.name, 0);
    }
    out.push('\n');
    let Some(services) = services else { return out };
    let Some(records) = &services.records else {
        out += &format!("Service states unavailable: {}\n", AdminCode::NoQuorum.text());
        return out;
    };
    if long {
        out += "Service Information\n------- -----------\n\n";
        for (id, r) in records {
            out += &format!(
                "Service Name      : {id}\n  Current State   : {} ({})\n  Flags           : {}\n  Owner           : {}\n  Last Owner      : {}\n  Last Transition : {}\n\n",
                r.state.name(),
                r.state.number(),
                if r.frozen { "frozen (1)" } else { "none (0)" },
                node_name(report, r.owner.node.0),
                node_name(report, r.last_owner.0),
                ctime(r.transition)
            );
        }
        return out;
    }
    if !records.is_empty() {
        out += &service_header();
        for (id, r) in records {
            out += &service_row(id, r, report);
        }
    }
    out
}

fn to_json(report: &StatusReport, services: Option<&ServiceStatus>) -> serde_json::Value {
    let nodes: Vec<_> = report
        .nodes
        .iter()
        .map(|n| {
            json!({"name": n.name, "id": n.node.0, "online": n.member, "local": n.node == report.node,
                   "rgmanager": services.is_some_and(|s| s.online.contains(&n.node))})
        })
        .collect();
    let records = services.and_then(|s| s.records.as_ref()).map(|m| {
        m.iter()
            .map(|(id, r)| {
                json!({"name": id, "state": r.state.name(), "state_number": r.state.number(),
                       "owner": if r.owner.node.0 == 0 { None } else { Some(node_name(report, r.owner.node.0)) },
                       "last_owner": if r.last_owner.0 == 0 { None } else { Some(node_name(report, r.last_owner.0)) },
                       "frozen": r.frozen, "restarts": r.restarts, "last_transition": r.transition})
            })
            .collect::<Vec<_>>()
    });
    json!({"cluster": report.cluster_name, "quorate": report.quorate, "nodes": nodes,
           "quorum_disk": report.device.as_ref().map(|d| json!({"name": d.name, "votes": d.votes, "held": d.held})),
           "services": records})
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn to_xml(report: &StatusReport, services: Option<&ServiceStatus>) -> String {
    let mut out = format!(
        "<?xml version=\"1.0\"?>\n<clustat version=\"4.1.1\">\n  <cluster name=\"{}\" id=\"{}\" generation=\"{}\"/>\n  <quorum quorate=\"{}\" groupmember=\"1\"/>\n  <nodes>\n",
        escape(&report.cluster_name),
        report.cluster_id,
        report.generation,
        u8::from(report.quorate)
    );
    for n in &report.nodes {
        let rg = services.is_some_and(|s| s.online.contains(&n.node));
        out += &format!(
            "    <node name=\"{}\" state=\"{}\" local=\"{}\" estranged=\"0\" rgmanager=\"{}\" rgmanager_master=\"0\" qdisk=\"0\" nodeid=\"0x{:08x}\"/>\n",
            escape(&n.name),
            u8::from(n.member),
            u8::from(n.node == report.node),
            u8::from(rg),
            n.node.0
        );
    }
    out += "  </nodes>\n  <groups>\n";
    for (id, r) in services.and_then(|s| s.records.as_ref()).into_iter().flatten() {
        out += &format!(
            "    <group name=\"{}\" state=\"{}\" state_str=\"{}\" flags=\"{}\" flags_str=\"{}\" owner=\"{}\" last_owner=\"{}\" restarts=\"{}\" last_transition=\"{}\" last_transition_str=\"{}\"/>\n",
            escape(id),
            r.state.number(),
            r.state.name(),
            u8::from(r.frozen),
            if r.frozen { "frozen" } else { "" },
            escape(&node_name(report, r.owner.node.0)),
            escape(&node_name(report, r.last_owner.0)),
            r.restarts,
            r.transition,
            ctime(r.transition)
        );
    }
    out += "  </groups>\n</clustat>\n";
    out
}
