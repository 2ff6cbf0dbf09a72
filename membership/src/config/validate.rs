//! The rules that a whole configuration must keep. Each complaint names its rule and its place.

use super::{Config, DeviceRef, FenceDevice, Method, Reader, Xml};
use crate::quorum;
use crate::timing::Facts;
use std::collections::BTreeMap;

/// Name of the built-in agent and of its implied device.
pub(super) const FENCE_LOCAL: &str = "fence_local";

/// On one host every node without a method gets the built-in one: it needs no parameters.
pub(super) fn add_fence_local(config: &mut Config) {
    for node in &mut config.nodes {
        if node.methods.is_empty() {
            let device = DeviceRef { name: FENCE_LOCAL.to_owned(), attrs: Vec::new() };
            node.methods.push(Method { name: "local".to_owned(), devices: vec![device] });
        }
    }
    config.fence_devices.entry(FENCE_LOCAL.to_owned()).or_insert_with(|| FenceDevice {
        name: FENCE_LOCAL.to_owned(),
        agent: FENCE_LOCAL.to_owned(),
        attrs: vec![("agent".to_owned(), FENCE_LOCAL.to_owned())],
    });
}

pub(super) fn check(r: &mut Reader<'_>, root: Xml<'_, '_>, config: &Config, path_failover: u64) {
    let top = Reader::spot(root);
    let spot_of =
        |tag: &str| root.children().find(|c| c.tag_name().name() == tag).map_or(top, |x| Reader::spot(x));
    nodes(r, root, config);
    votes(r, config, spot_of("cman"), spot_of("quorumd"), top);
    fencing(r, root, config);

    let facts = Facts {
        nodes: config.nodes.len() as u64,
        quorum_disk: config.quorumd.is_some(),
        watchdog: false,
        hop: None,
        path_failover,
        rhel5: config.dialect == super::Dialect::Rhel5,
    };
    for rule in &config.unsafe_timing {
        if !["QD-1", "QD-2", "TT-3", "FE-2"].contains(&rule.as_str()) {
            let text = format!("unsafe_timing may not override {rule}");
            r.error(spot_of("cairn"), "CF-0", text);
        }
    }
    for breach in config.timing.breaches(&facts) {
        let at = spot_of(if breach.rule.starts_with("QD") { "quorumd" } else { "totem" });
        if !breach.safety && config.unsafe_timing.iter().any(|u| u == breach.rule) {
            r.warn(at, breach.rule, breach.text);
        } else {
            r.error(at, breach.rule, breach.text);
        }
    }
    if facts.quorum_disk
        && let Some(text) = config.timing.historic_disk_warning()
    {
        if facts.rhel5 {
            r.warn(spot_of("quorumd"), "QD-1", text);
        } else {
            r.error(spot_of("quorumd"), "QD-1", text);
        }
    }
}

fn nodes(r: &mut Reader<'_>, root: Xml<'_, '_>, config: &Config) {
    if config.nodes.is_empty() {
        r.error(Reader::spot(root), "CF-1", "no clusternode is configured");
    }
    let limit = if config.quorumd.is_some() { 16 } else { 4096 };
    if config.nodes.len() > 64 {
        r.error(Reader::spot(root), "CF-1", "more than 64 nodes");
    }
    let mut ids = BTreeMap::new();
    let mut names = BTreeMap::new();
    let mut places = BTreeMap::new();
    let mut dirs = BTreeMap::new();
    for n in &config.nodes {
        let at = super::Spot { line: n.line, column: 1 };
        let at = root
            .descendants()
            .find(|x| x.tag_name().name() == "clusternode" && x.attribute("name") == Some(&n.name))
            .map_or(at, |x| Reader::spot(x));
        if n.id == 0 || n.id > limit {
            r.error(at, "CF-1", format!("node id {} of {} is not in 1..{limit}", n.id, n.name));
        }
        if let Some(first) = ids.insert(n.id, &n.name) {
            r.error(at, "CF-1", format!("node id {} of {} is also that of {first}", n.id, n.name));
        }
        if names.insert(&n.name, n.id).is_some() {
            r.error(at, "CF-1", format!("node name {} is used twice", n.name));
        }
        if n.name.contains(['/', '\0']) || n.name.starts_with('.') {
            r.error(at, "CF-1", format!("node name {:?} cannot be part of a path", n.name));
        }
        if let Some(first) = places.insert((&n.addr, n.port), &n.name) {
            let text = format!("address {}:{} of {} is also that of {first}", n.addr, n.port, n.name);
            r.error(at, "CF-14", text);
        }
        if !n.run_dir.is_absolute() {
            r.error(at, "CF-18", format!("run directory {} is not absolute", n.run_dir.display()));
        }
        if config.one_host
            && let Some(first) = dirs.insert(&n.run_dir, &n.name)
        {
            let text = format!("run directory {} of {} is also that of {first}", n.run_dir.display(), n.name);
            r.error(at, "CF-18", text);
        }
    }
}

fn votes(r: &mut Reader<'_>, config: &Config, cman: super::Spot, quorumd: super::Spot, top: super::Spot) {
    let (v, q) = (config.node_votes(), config.device_votes());
    if config.two_node {
        let unit = config.nodes.len() == 2 && config.nodes.iter().all(|n| n.votes == 1);
        if !unit || config.expected_votes.unwrap_or(1) != 1 {
            let text = format!(
                "the two-node option requires exactly two nodes with one vote each and expected votes of 1 \
                 (node_count={} vote_sum={v})",
                config.nodes.len()
            );
            r.error(cman, "CF-2", text);
        }
        if config.quorumd.is_some() {
            r.error(cman, "CF-2", "two_node and a quorum disk exclude each other");
        }
    } else if let Some(e) = config.expected_votes
        && e < v + q
    {
        let text = format!(
            "expected_votes {e} is below {v} node votes + {q} device votes: two sides could be quorate"
        );
        r.error(cman, "CF-3", text);
    }
    if v == 0 {
        r.error(top, "CF-1", "no node has a vote");
    }
    if let Some(disk) = &config.quorumd {
        if disk.master_wins && (!disk.heuristics.is_empty() || config.nodes.len() > 2) {
            r.error(quorumd, "CF-4", "master_wins needs exactly two nodes and no heuristics");
        }
        let rhel5 = config.dialect == super::Dialect::Rhel5;
        let smallest = config.nodes.iter().map(|n| u32::from(n.votes)).filter(|&v| v > 0).min().unwrap_or(0);
        if rhel5 && q > 0 && !quorum::decisive(v, q, smallest) {
            let need = (v - 2 * smallest.min(v / 2)).max(1);
            let text = format!("quorum will not shrink: device votes {q}, at least {need} needed");
            r.warn(quorumd, "CF-9", text);
        }
    }
}

fn fencing(r: &mut Reader<'_>, root: Xml<'_, '_>, config: &Config) {
    for node in &config.nodes {
        let at = root
            .descendants()
            .find(|x| x.tag_name().name() == "clusternode" && x.attribute("name") == Some(&node.name))
            .map_or_else(|| Reader::spot(root), |x| Reader::spot(x));
        if node.methods.is_empty() && !config.fence_daemon.manual {
            let text = format!(
                "{} has no fence method (state <cairn fence=\"manual\"/> if a person does it)",
                node.name
            );
            r.error(at, "CF-5", text);
        }
        if node.methods.len() > 8 || node.methods.iter().any(|m| m.devices.len() > 8) {
            r.error(at, "CF-5", format!("{}: more than 8 methods, or more than 8 devices in one", node.name));
        }
        for method in &node.methods {
            if method.devices.is_empty() {
                r.error(at, "CF-5", format!("{}: method {:?} has no device", node.name, method.name));
            }
        }
        let used = node.methods.iter().flat_map(|m| &m.devices).chain(&node.unfence);
        for device in used {
            match config.fence_devices.get(&device.name) {
                None => {
                    let text = format!("{}: there is no fence device {:?}", node.name, device.name);
                    r.error(at, "CF-16", text);
                }
                Some(d) if d.agent == FENCE_LOCAL && !config.one_host => {
                    let text = format!(
                        "{}: fence_local proves death on this machine only; it needs <cairn one_host=\"yes\"/>",
                        node.name
                    );
                    r.error(at, "FE-3", text);
                }
                Some(_) => {}
            }
        }
    }
    for (name, device) in &config.fence_devices {
        if device.agent.contains('/') && !device.agent.starts_with('/') {
            let text = format!("agent {:?} of {name} is neither a name nor an absolute path", device.agent);
            r.error(Reader::spot(root), "CF-16", text);
        }
    }
}
