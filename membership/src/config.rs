//! cluster.conf: the historical XML, typed, with every complaint at its line and column and under a rule name.
//!
//! What we do not know is kept and warned about, never dropped: `<rm>` is handed to the service manager as it stands.
//! Beside the historical tree there is one element of our own:
//!
//! ```xml
//! <cairn profile="default" dialect="rhel5" one_host="no" lun="file:/srv/lun#part=2" key_file="/etc/cluster/cairn.key"
//!        run_dir="/run/cairn/%n" io_limit_ms="1000" on_kill="restart" qdisk_required="yes" unsafe_timing="QD-1"/>
//! ```
//!
//! and three attributes of `<clusternode>`: `addr`, `port`, `run_dir`. `%n` is the node's name, `%i` its id. `one_host="yes"` states
//! that all nodes run on this machine, which is what `fence_local` and the death hints through pidfds need.
//!
//! Rules (names as in the messages): `CF-0` form, `CF-1` ids and names, `CF-2` two_node, `CF-3` expected votes, `CF-4` master_wins,
//! `CF-5` fence methods, `CF-9` no shrinking, `CF-11` key file, `CF-14` addresses, `CF-15` device votes, `CF-16` references,
//! `CF-18` run directories, `FE-3` fence_local; timing rules: module `timing`.

mod validate;

use crate::timing::{Base, Profile, Timing};
use roxmltree::{Document, Node as Xml};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Longest configuration that is read.
pub const MAX_BYTES: u64 = 1 << 20;

/// Elements below each other; deeper input is refused before it can exhaust the stack.
const MAX_DEPTH: usize = 32;

pub const DEFAULT_PORT: u16 = 5405;

/// A complaint with its place. Line and column count from 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    pub file: String,
    pub line: u32,
    pub column: u32,
    pub rule: String,
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}: {}", self.file, self.line, self.column, self.rule, self.text)
    }
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    #[error("{path}: {source}")]
    Read { path: String, source: std::io::Error },
    #[error("{}", show(.0))]
    Invalid(Vec<Problem>),
    /// CF-11.
    #[error("CF-11: key file {path}: {why}")]
    Key { path: String, why: String },
    #[error("no clusternode is named {0:?}")]
    NoSuchNode(String),
}

fn show(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// An element as written; what we do not interpret ourselves is handed on in this form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Element {
    pub name: String,
    pub attrs: Vec<(String, String)>,
    pub children: Vec<Element>,
    pub line: u32,
    pub column: u32,
}

impl Element {
    pub fn attr(&self, name: &str) -> Option<&str> {
        self.attrs.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
    pub fn children_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.children.iter().filter(move |c| c.name == name)
    }
    pub fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|c| c.name == name)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    #[default]
    Rhel5,
    Rhel6,
}

/// What a node does after it was killed and has stopped its mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnKill {
    /// A new life of the daemon.
    #[default]
    Restart,
    /// The daemon ends.
    Off,
}

/// A device as a method names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRef {
    pub name: String,
    /// Everything but `name`, in order: the first lines that the agent reads.
    pub attrs: Vec<(String, String)>,
}

/// All devices must succeed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Method {
    pub name: String,
    pub devices: Vec<DeviceRef>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterNode {
    pub name: String,
    pub id: u16,
    pub votes: u8,
    /// Address or host name, without the port.
    pub addr: String,
    pub port: u16,
    pub run_dir: PathBuf,
    pub methods: Vec<Method>,
    pub unfence: Vec<DeviceRef>,
    pub line: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceDevice {
    pub name: String,
    pub agent: String,
    /// Everything but `name`, `agent` included, as agents have always been given it.
    pub attrs: Vec<(String, String)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceDaemon {
    /// Seconds; −1 for ever.
    pub post_fail_delay: i64,
    /// Seconds; −1 until all configured nodes are members.
    pub post_join_delay: i64,
    pub clean_start: bool,
    pub skip_undefined: bool,
    /// Seconds for which a failed pass waits for a manual override before it goes on.
    pub override_time: u64,
    /// Milliseconds that one run of an agent may take.
    pub agent_limit_ms: u64,
    /// `fence="manual"`: nodes without methods are allowed and wait for a person.
    pub manual: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heuristic {
    pub program: String,
    pub score: u32,
    /// Seconds; 0: by the historical formula.
    pub interval: u64,
    pub tko: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quorumd {
    /// URL of the disk.
    pub device: String,
    pub label: Option<String>,
    pub votes: u32,
    pub min_score: Option<u32>,
    pub master_wins: bool,
    pub reboot: bool,
    pub allow_kill: bool,
    pub heuristics: Vec<Heuristic>,
    pub status_file: Option<String>,
}

/// A configuration that broke no rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    pub name: String,
    pub version: u32,
    pub cluster_id: u16,
    pub dialect: Dialect,
    /// `None`: computed.
    pub expected_votes: Option<u32>,
    pub two_node: bool,
    pub wait_for_all: bool,
    pub multicast: String,
    pub key_file: Option<PathBuf>,
    pub one_host: bool,
    /// URL of the volume's LUN, for the tools.
    pub lun: Option<String>,
    pub on_kill: OnKill,
    /// A node that cannot renew its quorum disk slot may not write.
    pub qdisk_required: bool,
    pub unsafe_timing: Vec<String>,
    pub timing: Timing,
    /// Sorted by id.
    pub nodes: Vec<ClusterNode>,
    pub fence_devices: BTreeMap<String, FenceDevice>,
    pub fence_daemon: FenceDaemon,
    pub quorumd: Option<Quorumd>,
    /// `<rm>` as written.
    pub rm: Option<Element>,
    /// Elements of the root that nobody here knows.
    pub other: Vec<Element>,
    pub warnings: Vec<Problem>,
}

impl Config {
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let origin = path.display().to_string();
        let read = |source| ConfigError::Read { path: origin.clone(), source };
        let len = fs::metadata(path).map_err(read)?.len();
        if len > MAX_BYTES {
            return Err(read(std::io::Error::other(format!("{len} bytes, the limit is {MAX_BYTES}"))));
        }
        let text = fs::read_to_string(path).map_err(read)?;
        Self::parse(&text, &origin)
    }

    /// Parses and checks. `origin` is the file name for messages.
    pub fn parse(text: &str, origin: &str) -> Result<Self, ConfigError> {
        let mut reader = Reader { origin, problems: Vec::new(), warnings: Vec::new() };
        // roxmltree bounds entity expansion itself; nothing in a cluster.conf needs a DTD
        let doc = match Document::parse(text) {
            Ok(doc) => doc,
            Err(e) => {
                let pos = e.pos();
                return Err(ConfigError::Invalid(vec![Problem {
                    file: origin.to_owned(),
                    line: pos.row,
                    column: pos.col,
                    rule: "CF-0".to_owned(),
                    text: format!("not well-formed: {e}"),
                }]));
            }
        };
        let config = reader.cluster(doc.root_element());
        match config {
            Some(mut config) if reader.problems.is_empty() => {
                config.warnings = reader.warnings;
                Ok(config)
            }
            _ => Err(ConfigError::Invalid(reader.problems)),
        }
    }

    pub fn node(&self, id: u16) -> Option<&ClusterNode> {
        self.nodes.iter().find(|n| n.id == id)
    }

    pub fn node_named(&self, name: &str) -> Result<&ClusterNode, ConfigError> {
        self.nodes.iter().find(|n| n.name == name).ok_or_else(|| ConfigError::NoSuchNode(name.to_owned()))
    }

    /// The name of a node for messages, also of one that is not configured.
    pub fn name_of(&self, id: u16) -> String {
        self.node(id).map_or_else(|| format!("node {id}"), |n| n.name.clone())
    }

    /// V: votes of all nodes.
    pub fn node_votes(&self) -> u32 {
        self.nodes.iter().map(|n| u32::from(n.votes)).sum()
    }

    /// Q: votes of the quorum disk, 0 without one.
    pub fn device_votes(&self) -> u32 {
        self.quorumd.as_ref().map_or(0, |q| q.votes)
    }

    /// The cluster key. Refused (CF-11) when anybody but its owner may read it, or when it is too short to be one.
    pub fn read_key(&self) -> Result<Vec<u8>, ConfigError> {
        let path = self.key_file.as_ref().ok_or_else(|| ConfigError::Key {
            path: "-".to_owned(),
            why: "no key file is configured (<cairn key_file=…> or <cman keyfile=…>)".to_owned(),
        })?;
        let refuse = |why: String| ConfigError::Key { path: path.display().to_string(), why };
        let meta = fs::metadata(path).map_err(|e| refuse(e.to_string()))?;
        if !meta.is_file() {
            return Err(refuse("is not a regular file".to_owned()));
        }
        if meta.mode() & 0o077 != 0 {
            return Err(refuse(format!(
                "mode {:04o}: only its owner may have access (chmod 600)",
                meta.mode() & 0o7777
            )));
        }
        let me = nix::unistd::geteuid().as_raw();
        if meta.uid() != me && meta.uid() != 0 {
            return Err(refuse(format!("belongs to user {}", meta.uid())));
        }
        if !(32..=4096).contains(&meta.len()) {
            return Err(refuse(format!("{} bytes; 32 to 4096 are a key", meta.len())));
        }
        fs::read(path).map_err(|e| refuse(e.to_string()))
    }
}

/// Cluster id by the old hash: shift left, add the byte, keep 16 bits.
pub fn cluster_id(name: &str) -> u16 {
    name.bytes().fold(0u32, |h, b| (h << 1).wrapping_add(u32::from(b))) as u16
}

/// Multicast address of a cluster id: `mod 255`, as it always was, not a mask.
pub fn multicast_address(id: u16) -> String {
    format!("239.192.{}.{}", id >> 8, id % 255)
}

/// Reads the document, collecting every complaint instead of stopping at the first.
struct Reader<'a> {
    origin: &'a str,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
}

/// Where a value of the configuration stands.
#[derive(Clone, Copy)]
struct Spot {
    line: u32,
    column: u32,
}

impl Reader<'_> {
    fn spot(x: Xml<'_, '_>) -> Spot {
        let pos = x.document().text_pos_at(x.range().start);
        Spot { line: pos.row, column: pos.col }
    }

    fn attr_spot(x: Xml<'_, '_>, name: &str) -> Spot {
        x.attributes().find(|a| a.name() == name).map_or_else(
            || Self::spot(x),
            |a| {
                let pos = x.document().text_pos_at(a.range().start);
                Spot { line: pos.row, column: pos.col }
            },
        )
    }

    fn problem(&self, at: Spot, rule: &str, text: impl Into<String>) -> Problem {
        Problem {
            file: self.origin.to_owned(),
            line: at.line,
            column: at.column,
            rule: rule.to_owned(),
            text: text.into(),
        }
    }

    fn error(&mut self, at: Spot, rule: &str, text: impl Into<String>) {
        let p = self.problem(at, rule, text);
        self.problems.push(p);
    }

    fn warn(&mut self, at: Spot, rule: &str, text: impl Into<String>) {
        let p = self.problem(at, rule, text);
        self.warnings.push(p);
    }

    /// A number in `range`, or `default` when the attribute is absent.
    fn number(
        &mut self,
        x: Xml<'_, '_>,
        name: &str,
        default: i64,
        range: std::ops::RangeInclusive<i64>,
    ) -> i64 {
        let Some(text) = x.attribute(name) else { return default };
        match text.trim().parse::<i64>() {
            Ok(v) if range.contains(&v) => v,
            _ => {
                let why = format!("{name}={text:?} is not a number in {}..{}", range.start(), range.end());
                self.error(Self::attr_spot(x, name), "CF-0", why);
                default
            }
        }
    }

    fn flag(&mut self, x: Xml<'_, '_>, name: &str, default: bool) -> bool {
        match x.attribute(name) {
            None => default,
            Some("1" | "yes" | "on" | "true") => true,
            Some("0" | "no" | "off" | "false") => false,
            Some(other) => {
                let why = format!("{name}={other:?} is neither yes nor no");
                self.error(Self::attr_spot(x, name), "CF-0", why);
                default
            }
        }
    }

    /// Required and not empty.
    fn needed<'x>(&mut self, x: Xml<'x, '_>, name: &str) -> Option<&'x str> {
        match x.attribute(name) {
            Some(v) if !v.trim().is_empty() => Some(v),
            _ => {
                self.error(Self::spot(x), "CF-0", format!("<{}> needs {name}=…", x.tag_name().name()));
                None
            }
        }
    }

    fn check_attrs(&mut self, x: Xml<'_, '_>, known: &[&str]) {
        for a in x.attributes() {
            if !known.contains(&a.name()) {
                let text = format!("<{}> has no attribute {:?}", x.tag_name().name(), a.name());
                self.warn(Self::attr_spot(x, a.name()), "CF-0", text);
            }
        }
    }

    fn element(&mut self, x: Xml<'_, '_>, depth: usize) -> Element {
        let at = Self::spot(x);
        if depth > MAX_DEPTH {
            self.error(at, "CF-0", format!("elements nested deeper than {MAX_DEPTH}"));
        }
        let children = if depth > MAX_DEPTH {
            Vec::new()
        } else {
            x.children().filter(Xml::is_element).map(|c| self.element(c, depth + 1)).collect()
        };
        Element {
            name: x.tag_name().name().to_owned(),
            attrs: x.attributes().map(|a| (a.name().to_owned(), a.value().to_owned())).collect(),
            children,
            line: at.line,
            column: at.column,
        }
    }

    fn cluster(&mut self, root: Xml<'_, '_>) -> Option<Config> {
        if root.tag_name().name() != "cluster" {
            self.error(
                Self::spot(root),
                "CF-0",
                format!("root is <{}>, not <cluster>", root.tag_name().name()),
            );
            return None;
        }
        self.check_attrs(root, &["name", "alias", "config_version"]);
        let name = self.needed(root, "name").unwrap_or_default().to_owned();
        if name.len() > 15 {
            self.error(Self::attr_spot(root, "name"), "CF-1", "cluster name is longer than 15 characters");
        }
        let version = self.number(root, "config_version", 1, 0..=i64::from(u32::MAX)) as u32;

        let one = |tag: &str| root.children().find(|c| c.is_element() && c.tag_name().name() == tag);
        let (cman, cairn, totem, quorumd) = (one("cman"), one("cairn"), one("totem"), one("quorumd"));

        let mut dialect = Dialect::Rhel5;
        let mut profile = Profile::Default;
        let mut one_host = false;
        let mut lun = None;
        let mut on_kill = OnKill::Restart;
        let mut unsafe_timing = Vec::new();
        let mut run_pattern = "/run/cairn".to_owned();
        let mut key_file = None;
        let mut qdisk_required = true;
        let mut manual = false;
        let mut io_limit = None;
        let mut path_failover = 0;
        let mut base_port = i64::from(DEFAULT_PORT);
        let mut expected_votes = None;
        let mut two_node = false;
        let mut wait_for_all = None;
        let id = cluster_id(&name);
        let mut multicast = multicast_address(id);

        if let Some(x) = cman {
            self.check_attrs(x, KNOWN_CMAN);
            expected_votes =
                x.attribute("expected_votes").map(|_| self.number(x, "expected_votes", 1, 1..=65_535) as u32);
            two_node = self.flag(x, "two_node", false);
            wait_for_all = x.attribute("wait_for_all").map(|_| self.flag(x, "wait_for_all", false));
            base_port = self.number(x, "port", base_port, 1..=65_535);
            key_file = x.attribute("keyfile").map(PathBuf::from);
            if let Some(m) = x.children().find(|c| c.tag_name().name() == "multicast")
                && let Some(addr) = m.attribute("addr")
            {
                addr.clone_into(&mut multicast);
            }
        }
        if let Some(x) = cairn {
            self.check_attrs(x, KNOWN_CAIRN);
            if let Some(text) = x.attribute("profile") {
                match Profile::parse(text) {
                    Some(p) => profile = p,
                    None => self.error(Self::attr_spot(x, "profile"), "CF-0", format!("no profile {text:?}")),
                }
            }
            match x.attribute("dialect") {
                None | Some("rhel5") => {}
                Some("rhel6") => dialect = Dialect::Rhel6,
                Some(d) => self.error(Self::attr_spot(x, "dialect"), "CF-0", format!("no dialect {d:?}")),
            }
            match x.attribute("on_kill") {
                None | Some("restart") => {}
                Some("off") => on_kill = OnKill::Off,
                Some(o) => self.error(Self::attr_spot(x, "on_kill"), "CF-0", format!("no policy {o:?}")),
            }
            one_host = self.flag(x, "one_host", false);
            qdisk_required = self.flag(x, "qdisk_required", true);
            lun = x.attribute("lun").map(str::to_owned);
            if let Some(k) = x.attribute("key_file") {
                key_file = Some(PathBuf::from(k));
            }
            if let Some(r) = x.attribute("run_dir") {
                r.clone_into(&mut run_pattern);
            }
            if x.attribute("io_limit_ms").is_some() {
                io_limit = Some(self.number(x, "io_limit_ms", 1_000, 10..=600_000) as u64);
            }
            path_failover = self.number(x, "path_failover_ms", 0, 0..=3_600_000) as u64;
            manual = match x.attribute("fence") {
                None => false,
                Some("manual") => true,
                Some(f) => {
                    self.error(Self::attr_spot(x, "fence"), "CF-0", format!("fence={f:?}: only \"manual\""));
                    false
                }
            };
            if let Some(rules) = x.attribute("unsafe_timing") {
                unsafe_timing =
                    rules.split([' ', ',']).filter(|r| !r.is_empty()).map(str::to_owned).collect();
            }
        }

        let mut base = Base::of(profile);
        if let Some(x) = io_limit {
            base.io_limit = x;
        }
        if let Some(x) = totem {
            self.check_attrs(x, KNOWN_TOTEM);
            base.token = self.number(x, "token", base.token as i64, 50..=3_600_000) as u64;
            base.retransmits =
                self.number(x, "token_retransmits_before_loss_const", base.retransmits as i64, 1..=1_000)
                    as u64;
            if x.attribute("consensus").is_some() {
                let consensus = self.number(x, "consensus", base.token as i64, 1..=36_000_000) as u64;
                base.consensus_permille = (consensus * 1000).div_ceil(base.token);
            }
        }
        let nodes = self.nodes(root, base_port as u16, &run_pattern);
        let quorumd = quorumd.map(|x| self.quorumd(x, &mut base, nodes.len()));
        let fence_devices = self.fence_devices(root);
        let fence_daemon = self.fence_daemon(one("fence_daemon"), dialect, one_host, manual);
        let mut other = Vec::new();
        let mut rm = None;
        for x in root.children().filter(Xml::is_element) {
            match x.tag_name().name() {
                "rm" => rm = Some(self.element(x, 1)),
                tag if KNOWN_ELEMENTS.contains(&tag) => {}
                tag => {
                    let text = format!("element <{tag}> is not known here; kept");
                    self.warn(Self::spot(x), "CF-0", text);
                    other.push(self.element(x, 1));
                }
            }
        }
        let mut config = Config {
            name,
            version,
            cluster_id: id,
            dialect,
            expected_votes,
            two_node,
            wait_for_all: wait_for_all.unwrap_or(two_node),
            multicast,
            key_file,
            one_host,
            lun,
            on_kill,
            qdisk_required: qdisk_required && quorumd.is_some(),
            unsafe_timing,
            timing: Timing::derive(base),
            nodes,
            fence_devices,
            fence_daemon,
            quorumd,
            rm,
            other,
            warnings: Vec::new(),
        };
        if config.one_host {
            validate::add_fence_local(&mut config);
        }
        validate::check(self, root, &config, path_failover);
        Some(config)
    }

    fn nodes(&mut self, root: Xml<'_, '_>, port: u16, run_pattern: &str) -> Vec<ClusterNode> {
        let mut nodes = Vec::new();
        let list = root.children().filter(|c| c.tag_name().name() == "clusternodes");
        for x in list.flat_map(|l| l.children()).filter(|c| c.tag_name().name() == "clusternode") {
            self.check_attrs(x, &["name", "nodeid", "votes", "weight", "addr", "port", "run_dir", "altname"]);
            let Some(name) = self.needed(x, "name").map(str::to_owned) else { continue };
            if x.attribute("nodeid").is_none() {
                let text = format!("No node ID for {name}, run 'ccs_tool addnodeids' to fix");
                self.error(Self::spot(x), "CF-1", text);
                continue;
            }
            let id = self.number(x, "nodeid", 0, 0..=65_535) as u16;
            let port = self.number(x, "port", i64::from(port), 1..=65_535) as u16;
            let pattern = x.attribute("run_dir").unwrap_or(run_pattern);
            let run_dir = PathBuf::from(pattern.replace("%n", &name).replace("%i", &id.to_string()));
            let methods = x
                .children()
                .filter(|c| c.tag_name().name() == "fence")
                .flat_map(|f| f.children())
                .filter(|c| c.tag_name().name() == "method")
                .map(|m| Method {
                    name: m.attribute("name").unwrap_or_default().to_owned(),
                    devices: self.device_refs(m),
                })
                .collect::<Vec<_>>();
            let unfence = x
                .children()
                .filter(|c| c.tag_name().name() == "unfence")
                .flat_map(|u| self.device_refs(u))
                .collect();
            nodes.push(ClusterNode {
                addr: x.attribute("addr").unwrap_or(&name).to_owned(),
                votes: self.number(x, "votes", 1, 0..=255) as u8,
                name,
                id,
                port,
                run_dir,
                methods,
                unfence,
                line: Self::spot(x).line,
            });
        }
        nodes.sort_by_key(|n| n.id);
        nodes
    }

    fn device_refs(&mut self, parent: Xml<'_, '_>) -> Vec<DeviceRef> {
        let mut devices = Vec::new();
        for d in parent.children().filter(|c| c.tag_name().name() == "device") {
            if let Some(name) = self.needed(d, "name") {
                devices.push(DeviceRef { name: name.to_owned(), attrs: attrs_but_name(d) });
            }
        }
        devices
    }

    fn fence_devices(&mut self, root: Xml<'_, '_>) -> BTreeMap<String, FenceDevice> {
        let mut devices = BTreeMap::new();
        let list = root.children().filter(|c| c.tag_name().name() == "fencedevices");
        for x in list.flat_map(|l| l.children()).filter(|c| c.tag_name().name() == "fencedevice") {
            let (Some(name), Some(agent)) = (self.needed(x, "name"), self.needed(x, "agent")) else {
                continue;
            };
            let device =
                FenceDevice { name: name.to_owned(), agent: agent.to_owned(), attrs: attrs_but_name(x) };
            if devices.insert(name.to_owned(), device).is_some() {
                self.error(Self::spot(x), "CF-1", format!("fence device {name:?} is defined twice"));
            }
        }
        devices
    }

    fn fence_daemon(
        &mut self,
        x: Option<Xml<'_, '_>>,
        dialect: Dialect,
        one_host: bool,
        manual: bool,
    ) -> FenceDaemon {
        let join = match dialect {
            // nodes that do not run are told from those that are just starting, so only the latter are waited for
            _ if one_host => 30,
            Dialect::Rhel5 => 3,
            Dialect::Rhel6 => 6,
        };
        let mut daemon = FenceDaemon {
            post_fail_delay: 0,
            post_join_delay: join,
            clean_start: false,
            skip_undefined: false,
            override_time: 3,
            agent_limit_ms: 60_000,
            manual,
        };
        if let Some(x) = x {
            self.check_attrs(x, KNOWN_FENCE_DAEMON);
            daemon.post_fail_delay = self.number(x, "post_fail_delay", 0, -1..=86_400);
            daemon.post_join_delay = self.number(x, "post_join_delay", join, -1..=86_400);
            daemon.clean_start = self.flag(x, "clean_start", false);
            daemon.skip_undefined = self.flag(x, "skip_undefined", false);
            daemon.override_time = self.number(x, "override_time", 3, 0..=86_400) as u64;
            // stated here or at <cairn>
            daemon.manual |= x.attribute("fence") == Some("manual");
            daemon.agent_limit_ms = self.number(x, "agent_limit_ms", 60_000, 100..=86_400_000) as u64;
        }
        daemon
    }

    fn quorumd(&mut self, x: Xml<'_, '_>, base: &mut Base, nodes: usize) -> Quorumd {
        self.check_attrs(x, KNOWN_QUORUMD);
        if x.attribute("interval").is_some() {
            base.cycle = 1000 * self.number(x, "interval", 1, 1..=3_600) as u64;
        }
        if x.attribute("interval_ms").is_some() {
            base.cycle = self.number(x, "interval_ms", 400, 10..=3_600_000) as u64;
        }
        base.tko = self.number(x, "tko", base.tko as i64, 1..=10_000) as u64;
        let label = x.attribute("label").map(str::to_owned);
        let device = match x.attribute("device") {
            Some(d) if !d.is_empty() => d.to_owned(),
            _ => {
                let text = "<quorumd> needs device=… (a label alone is not searched for)";
                self.error(Self::spot(x), "CF-15", text);
                String::new()
            }
        };
        let heuristics: Vec<Heuristic> = x
            .children()
            .filter(|c| c.tag_name().name() == "heuristic")
            .filter_map(|h| {
                self.check_attrs(h, &["program", "score", "interval", "tko"]);
                Some(Heuristic {
                    program: self.needed(h, "program")?.to_owned(),
                    score: self.number(h, "score", 1, 1..=1_000) as u32,
                    interval: self.number(h, "interval", 0, 0..=3_600) as u64,
                    tko: self.number(h, "tko", 0, 0..=1_000) as u64,
                })
            })
            .collect();
        if heuristics.len() > 10 {
            self.error(Self::spot(x), "CF-0", "more than 10 heuristics");
        }
        let default_votes = (nodes as i64 - 1).max(0);
        Quorumd {
            device,
            label,
            votes: self.number(x, "votes", default_votes, 0..=255) as u32,
            min_score: x.attribute("min_score").map(|_| self.number(x, "min_score", 1, 0..=10_000) as u32),
            master_wins: self.flag(x, "master_wins", false),
            reboot: self.flag(x, "reboot", true),
            allow_kill: self.flag(x, "allow_kill", true),
            heuristics,
            status_file: x.attribute("status_file").map(str::to_owned),
        }
    }
}

fn attrs_but_name(x: Xml<'_, '_>) -> Vec<(String, String)> {
    x.attributes()
        .filter(|a| a.name() != "name")
        .map(|a| (a.name().to_owned(), a.value().to_owned()))
        .collect()
}

const KNOWN_ELEMENTS: &[&str] = &[
    "cman",
    "cairn",
    "totem",
    "quorumd",
    "fence_daemon",
    "clusternodes",
    "fencedevices",
    "rm",
    "dlm",
    "gfs_controld",
    "logging",
    "clvmd",
    "group",
];
const KNOWN_CAIRN: &[&str] = &[
    "profile",
    "dialect",
    "one_host",
    "lun",
    "key_file",
    "run_dir",
    "io_limit_ms",
    "path_failover_ms",
    "on_kill",
    "qdisk_required",
    "unsafe_timing",
    "fence",
];
const KNOWN_CMAN: &[&str] = &[
    "expected_votes",
    "two_node",
    "wait_for_all",
    "quorum_dev_poll",
    "shutdown_timeout",
    "ccsd_poll",
    "startup_config_timeout",
    "disallowed",
    "cluster_id",
    "hash_cluster_id",
    "port",
    "keyfile",
    "broadcast",
    "max_queued",
    "transport",
];
const KNOWN_TOTEM: &[&str] = &[
    "token",
    "token_retransmits_before_loss_const",
    "consensus",
    "join",
    "fail_recv_const",
    "vsftype",
    "secauth",
    "rrp_mode",
];
const KNOWN_FENCE_DAEMON: &[&str] = &[
    "post_fail_delay",
    "post_join_delay",
    "clean_start",
    "skip_undefined",
    "override_path",
    "override_time",
    "agent_limit_ms",
    "fence",
];
const KNOWN_QUORUMD: &[&str] = &[
    "interval",
    "interval_ms",
    "tko",
    "tko_up",
    "upgrade_wait",
    "master_wait",
    "votes",
    "min_score",
    "reboot",
    "master_wins",
    "allow_kill",
    "paranoid",
    "io_timeout",
    "max_error_cycles",
    "stop_cman",
    "use_uptime",
    "scheduler",
    "priority",
    "device",
    "label",
    "cman_label",
    "status_file",
    "log_level",
    "log_facility",
];

#[cfg(test)]
mod tests;
