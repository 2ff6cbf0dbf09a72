//! `<rm>` of cluster.conf: failover domains, shared resources, services as trees.

use crate::place::Domain;
use crate::tree::Resource;
use cairn_base::NodeId;
use roxmltree::{Document, Node};
use std::collections::BTreeMap;
use std::time::Duration;

/// How a service recovers from a failed status check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Recovery {
    Restart,
    Relocate,
    Disable,
    RestartDisable,
}

/// One `<service>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// `service:<name>`, the name used everywhere.
    pub id: String,
    pub tree: Resource,
    pub domain: Option<String>,
    pub is_autostart: bool,
    pub is_exclusive: bool,
    pub recovery: Recovery,
    pub max_restarts: u32,
    pub restart_expire: Duration,
    /// `service:<name>` this one needs, and whether its stop stops this one.
    pub depend: Option<(String, bool)>,
}

/// The whole of `<rm>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RmConfig {
    pub domains: BTreeMap<String, Domain>,
    /// In file order.
    pub services: Vec<Service>,
    pub status_poll: Duration,
    /// Node names by id, for messages.
    pub node_names: BTreeMap<NodeId, String>,
    /// How long services go on without quorum. Zero in the file's terms; the driver sets it where a quorum disk's votes follow each view.
    pub quorum_grace: Duration,
}

/// Why `<rm>` was refused, with the place in the file.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigError {
    #[error("line {line}, column {column}: {what}")]
    At { line: u32, column: u32, what: String },
    #[error("not XML: {0}")]
    Xml(String),
}

/// Resource types that Cairn runs itself; others need an agent file in the agent directory.
pub const BUILT_IN: &[&str] = &["service", "script", "clusterfs", "fs", "ip"];
/// Deepest nesting accepted in a resource tree.
const MAX_DEPTH: usize = 16;

impl RmConfig {
    /// Parse the text of cluster.conf. A file without `<rm>` has no services.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let doc = Document::parse(text).map_err(|e| ConfigError::Xml(e.to_string()))?;
        let root = doc.root_element();
        let mut node_ids = BTreeMap::new();
        for n in root.descendants().filter(|n| n.has_tag_name("clusternode")) {
            let id = n.attribute("nodeid").and_then(|v| v.parse::<u16>().ok());
            if let (Some(name), Some(id)) = (n.attribute("name"), id) {
                node_ids.insert(name.to_owned(), NodeId(id));
            }
        }
        let mut config = Self {
            domains: BTreeMap::new(),
            services: Vec::new(),
            status_poll: Duration::from_secs(10),
            quorum_grace: Duration::ZERO,
            node_names: node_ids.iter().map(|(n, i)| (*i, n.clone())).collect(),
        };
        let Some(rm) = root.children().find(|n| n.has_tag_name("rm")) else { return Ok(config) };
        if let Some(v) = rm.attribute("status_poll_interval") {
            config.status_poll = seconds(&rm, "status_poll_interval", v)?;
        }
        for d in rm.descendants().filter(|n| n.has_tag_name("failoverdomain")) {
            let domain = parse_domain(&d, &node_ids)?;
            if config.domains.insert(domain.name.clone(), domain).is_some() {
                return Err(at(&d, "failover domain defined twice"));
            }
        }
        let shared: Vec<Node<'_, '_>> = rm
            .children()
            .filter(|n| n.has_tag_name("resources"))
            .flat_map(|n| n.children().filter(Node::is_element))
            .collect();
        for s in rm.children().filter(|n| n.has_tag_name("service")) {
            let service = parse_service(&s, &shared, &config.domains)?;
            if config.services.iter().any(|other| other.id == service.id) {
                return Err(at(&s, &format!("{} is defined twice", service.id)));
            }
            config.services.push(service);
        }
        for s in rm.children().filter(|n| n.has_tag_name("service")) {
            if let Some(d) = s.attribute("depend")
                && !config.services.iter().any(|o| o.id == d)
            {
                return Err(at(&s, &format!("depend=\"{d}\" names no service")));
            }
        }
        Ok(config)
    }

    /// Replaces `%n` by the node's name in all attributes: on one machine the nodes mount at different places.
    pub fn localize(&mut self, node_name: &str) {
        fn walk(r: &mut Resource, node_name: &str) {
            for value in r.attrs.values_mut() {
                if value.contains("%n") {
                    *value = value.replace("%n", node_name);
                }
            }
            for child in &mut r.children {
                walk(child, node_name);
            }
        }
        for s in &mut self.services {
            walk(&mut s.tree, node_name);
        }
    }

    pub fn service(&self, id: &str) -> Option<&Service> {
        self.services.iter().find(|s| s.id == id)
    }

    pub fn node_name(&self, node: NodeId) -> String {
        self.node_names.get(&node).cloned().unwrap_or_else(|| format!("node{}", node.0))
    }
}

fn at(node: &Node<'_, '_>, what: &str) -> ConfigError {
    let pos = node.document().text_pos_at(node.range().start);
    ConfigError::At { line: pos.row, column: pos.col, what: format!("<{}>: {what}", node.tag_name().name()) }
}

fn seconds(node: &Node<'_, '_>, key: &str, value: &str) -> Result<Duration, ConfigError> {
    let (number, unit) =
        value.strip_suffix('m').map_or((value.strip_suffix('s').unwrap_or(value), 1), |v| (v, 60));
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(unit))
        .map(Duration::from_secs)
        .ok_or_else(|| at(node, &format!("{key}=\"{value}\" is not a number of seconds")))
}

fn number(node: &Node<'_, '_>, key: &str) -> Result<u32, ConfigError> {
    node.attribute(key)
        .map_or(Ok(0), |v| v.parse().map_err(|_| at(node, &format!("{key}=\"{v}\" is not a number"))))
}

fn flag(node: &Node<'_, '_>, key: &str, default: bool) -> bool {
    node.attribute(key).map_or(default, |v| matches!(v, "1" | "yes" | "true" | "on"))
}

fn parse_domain(d: &Node<'_, '_>, ids: &BTreeMap<String, NodeId>) -> Result<Domain, ConfigError> {
    let name = d.attribute("name").ok_or_else(|| at(d, "has no name"))?;
    let mut domain = Domain {
        name: name.to_owned(),
        is_ordered: flag(d, "ordered", false),
        is_restricted: flag(d, "restricted", false),
        has_no_failback: flag(d, "nofailback", false),
        nodes: BTreeMap::new(),
    };
    for n in d.children().filter(|n| n.has_tag_name("failoverdomainnode")) {
        let node_name = n.attribute("name").ok_or_else(|| at(&n, "has no name"))?;
        let id = ids.get(node_name).ok_or_else(|| at(&n, &format!("\"{node_name}\" is no cluster node")))?;
        let priority = match number(&n, "priority")? {
            0 => 1,
            p @ 1..=100 => p as u8,
            p => return Err(at(&n, &format!("priority {p} is not in 1…100"))),
        };
        domain.nodes.insert(*id, priority);
    }
    Ok(domain)
}

fn parse_service(
    s: &Node<'_, '_>,
    shared: &[Node<'_, '_>],
    domains: &BTreeMap<String, Domain>,
) -> Result<Service, ConfigError> {
    let tree = parse_resource(s, shared, &BTreeMap::new(), 0)?;
    let domain = s.attribute("domain").map(str::to_owned);
    if let Some(d) = &domain
        && !domains.contains_key(d)
    {
        return Err(at(s, &format!("domain=\"{d}\" is not defined under <failoverdomains>")));
    }
    let recovery = match s.attribute("recovery") {
        None | Some("restart") => Recovery::Restart,
        Some("relocate") => Recovery::Relocate,
        Some("disable") => Recovery::Disable,
        Some("restart-disable") => Recovery::RestartDisable,
        Some(other) => {
            return Err(at(
                s,
                &format!("recovery=\"{other}\" is not one of restart, relocate, disable, restart-disable"),
            ));
        }
    };
    let restart_expire = s
        .attribute("restart_expire_time")
        .map_or(Ok(Duration::ZERO), |v| seconds(s, "restart_expire_time", v))?;
    Ok(Service {
        id: format!("service:{}", tree.name),
        domain,
        is_autostart: flag(s, "autostart", true),
        is_exclusive: flag(s, "exclusive", false),
        recovery,
        max_restarts: number(s, "max_restarts")?,
        restart_expire,
        depend: s.attribute("depend").map(|d| (d.to_owned(), s.attribute("depend_mode") != Some("soft"))),
        tree,
    })
}

/// The attribute that names a resource of this type.
fn primary(kind: &str) -> &'static str {
    if kind == "ip" { "address" } else { "name" }
}

fn parse_resource(
    n: &Node<'_, '_>,
    shared: &[Node<'_, '_>],
    inherited: &BTreeMap<String, String>,
    depth: usize,
) -> Result<Resource, ConfigError> {
    if depth > MAX_DEPTH {
        return Err(at(n, &format!("resources nest deeper than {MAX_DEPTH}")));
    }
    let kind = n.tag_name().name().to_owned();
    let mut attrs: BTreeMap<String, String> = BTreeMap::new();
    let mut nested: Vec<Node<'_, '_>> = Vec::new();
    if let Some(reference) = n.attribute("ref") {
        let found = shared
            .iter()
            .find(|r| r.has_tag_name(kind.as_str()) && r.attribute(primary(&kind)) == Some(reference))
            .ok_or_else(|| at(n, &format!("ref=\"{reference}\" names no <{kind}> under <resources>")))?;
        attrs.extend(found.attributes().map(|a| (a.name().to_owned(), a.value().to_owned())));
        nested.extend(found.children().filter(Node::is_element));
    }
    attrs.extend(
        n.attributes().filter(|a| a.name() != "ref").map(|a| (a.name().to_owned(), a.value().to_owned())),
    );
    nested.extend(n.children().filter(Node::is_element));
    let name =
        attrs.get(primary(&kind)).cloned().ok_or_else(|| at(n, &format!("has no {}", primary(&kind))))?;
    let required: &[&str] = match kind.as_str() {
        "script" => &["file"],
        "clusterfs" | "fs" => &["mountpoint", "device"],
        _ => &[],
    };
    if let Some(missing) = required.iter().find(|k| !attrs.contains_key(**k)) {
        return Err(at(n, &format!("\"{name}\" has no {missing}")));
    }
    // Inherited parameters take the nearest ancestor's value unless set.
    let mut below = inherited.clone();
    if kind == "service" {
        below.insert("service_name".into(), name.clone());
    }
    if let Some(m) = attrs.get("mountpoint") {
        below.insert("mountpoint".into(), m.clone());
    }
    for (key, value) in inherited {
        attrs.entry(key.clone()).or_insert_with(|| value.clone());
    }
    let children = nested
        .iter()
        .filter(|c| !c.has_tag_name("action"))
        .map(|c| parse_resource(c, shared, &below, depth + 1))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Resource { kind, name, attrs, children })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONF: &str = r#"<?xml version="1.0"?>
<cluster name="c" config_version="1">
  <clusternodes><clusternode name="a" nodeid="1"/><clusternode name="b" nodeid="2"/></clusternodes>
  <rm status_poll_interval="3">
    <failoverdomains><failoverdomain name="d" ordered="1" nofailback="1">
      <failoverdomainnode name="a" priority="1"/><failoverdomainnode name="b" priority="2"/>
    </failoverdomain></failoverdomains>
    <resources><clusterfs name="vol" device="file:/x" mountpoint="/m" fstype="gfs2"/></resources>
    <service name="web" domain="d" recovery="relocate" max_restarts="2" restart_expire_time="60">
      <clusterfs ref="vol"><script name="httpd" file="/bin/true"/></clusterfs>
    </service>
  </rm>
</cluster>"#;

    #[test]
    fn references_are_resolved_and_values_inherited() {
        let c = RmConfig::parse(CONF).unwrap();
        let s = c.service("service:web").unwrap();
        assert_eq!(s.recovery, Recovery::Relocate);
        assert_eq!((s.max_restarts, s.restart_expire.as_secs()), (2, 60));
        let fs = &s.tree.children[0];
        assert_eq!(fs.attr("mountpoint"), Some("/m"));
        assert_eq!(fs.children[0].attr("service_name"), Some("web"));
        assert_eq!(fs.children[0].attr("mountpoint"), Some("/m"));
        assert_eq!(c.domains["d"].nodes[&NodeId(2)], 2);
        assert_eq!(c.status_poll.as_secs(), 3);
    }

    #[test]
    fn mistakes_are_named_with_line_and_column() {
        for (from, to, expect) in [
            ("ref=\"vol\"", "ref=\"nope\"", "names no <clusterfs>"),
            ("domain=\"d\"", "domain=\"x\"", "is not defined"),
            ("recovery=\"relocate\"", "recovery=\"pray\"", "not one of"),
            ("file=\"/bin/true\"", "", "has no file"),
            ("failoverdomainnode name=\"b\"", "failoverdomainnode name=\"z\"", "is no cluster node"),
            ("max_restarts=\"2\"", "max_restarts=\"-2\"", "not a number"),
        ] {
            let text = CONF.replace(from, to);
            assert_ne!(text, CONF, "{from}");
            match RmConfig::parse(&text) {
                Err(ConfigError::At { line, what, .. }) => {
                    assert!(what.contains(expect), "{what}");
                    assert!(line > 3);
                }
                other => panic!("{from}: {other:?}"),
            }
        }
    }
}
