//! Running what a resource needs: built-in kinds and outside agents.
//!
//! | kind | start | stop | status |
//! |---|---|---|---|
//! | `service` | nothing | nothing | nothing |
//! | `script` | `file start` | `file stop` | `file status` |
//! | `clusterfs` | mount it if need be, then wait until every journal of a fenced node is replayed | unmount only with `force_unmount` | is it mounted? |
//! | `fs` | mount(8) | umount(8) | is it mounted? |
//! | `ip` | `ip addr add` on the interface of its subnet, gratuitous ARP | `ip addr del` | is it there? |
//! | other | `<agent dir>/<kind>[.sh] start`, `ocf:` agents with `OCF_RESKEY_*` | … | … |
//!
//! A start that fails stops the walk; a stop that fails goes on and is reported. Status of a stopped resource is a failure.
//! Agents see `CAIRN_RUN_DIR` and the mark of this life in their environment and inherit the node's `alive.lock`, so that fencing
//! the node on this machine also ends what they started (`membership::alive::marked`).
//! Source: agent contract of rgmanager and OCF RA API 1.0.

use crate::tree::Resource;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

/// What an agent run came to: `Err` carries the line for the log.
pub type AgentResult = Result<(), String>;

/// The cluster file systems of this node, as the service manager sees them.
pub trait Storage: Send + Sync {
    /// Mount `device` at `mountpoint` if it is not, then wait until the mount is live and every journal of a node
    /// fenced before this call is replayed.
    fn ensure_ready(&self, device: &str, mountpoint: &Path, options: &str) -> AgentResult;
    /// Unmount; `force` ends its users first.
    fn unmount(&self, mountpoint: &Path, force: bool) -> AgentResult;
}

/// What all agents of a node share.
#[derive(Clone)]
pub struct Context {
    pub storage: Arc<dyn Storage>,
    /// Where outside agents lie; classic: `/usr/share/cluster`.
    pub agent_dir: PathBuf,
    /// Output of agents is appended to `service-<name>.log` here.
    pub log_dir: PathBuf,
    pub run_dir: PathBuf,
    /// Which life of the node starts the agents.
    pub incarnation: cairn_base::Incarnation,
    /// A shared lock on `alive.lock` without close-on-exec, inherited by everything that agents start.
    pub alive: Option<Arc<File>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Start,
    Stop,
    Status,
}

impl Op {
    const fn word(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Status => "status",
        }
    }
}

/// Run `op` on the whole tree in its order. Messages of failures go to `log`.
pub fn run_tree(tree: &Resource, op: Op, ctx: &Context, log: &mut dyn FnMut(&str)) -> bool {
    let order = match op {
        Op::Start | Op::Status => tree.start_order(),
        Op::Stop => tree.stop_order(),
    };
    let mut all_good = true;
    for resource in order {
        if let Err(why) = run_one(resource, op, &tree.name, ctx) {
            log(&format!("{} on {} \"{}\" failed: {why}", op.word(), resource.kind, resource.name));
            all_good = false;
            if op != Op::Stop {
                return false;
            }
        }
    }
    all_good
}

fn run_one(r: &Resource, op: Op, service: &str, ctx: &Context) -> AgentResult {
    match r.kind.as_str() {
        "service" => Ok(()),
        "script" => script(r, op, service, ctx),
        "clusterfs" => clusterfs(r, op, ctx),
        "fs" => local_fs(r, op, service, ctx),
        "ip" => address(r, op, service, ctx),
        _ => outside(r, op, service, ctx),
    }
}

fn script(r: &Resource, op: Op, service: &str, ctx: &Context) -> AgentResult {
    let file = r.attr("file").ok_or("no file attribute")?;
    run(agent_command(file, r, service, ctx).arg(op.word()))
}

fn outside(r: &Resource, op: Op, service: &str, ctx: &Context) -> AgentResult {
    let candidates = [
        ctx.agent_dir.join(format!("{}.sh", r.kind)),
        ctx.agent_dir.join(&r.kind),
        PathBuf::from(format!(
            "/usr/lib/ocf/resource.d/{}",
            r.attr("type").unwrap_or("heartbeat/none").replace(':', "/")
        )),
    ];
    let Some(agent) = candidates.iter().find(|p| p.is_file()) else {
        return Err(format!("no agent for <{}> in {}", r.kind, ctx.agent_dir.display()));
    };
    let is_ocf = agent.starts_with("/usr/lib/ocf");
    let word = if is_ocf && op == Op::Status { "monitor" } else { op.word() };
    run(agent_command(agent, r, service, ctx).arg(word))
}

fn clusterfs(r: &Resource, op: Op, ctx: &Context) -> AgentResult {
    let (device, at) = mount_of(r)?;
    match op {
        Op::Start => ctx.storage.ensure_ready(device, at, r.attr("options").unwrap_or("")),
        Op::Stop if r.flag("force_unmount", false) => ctx.storage.unmount(at, true),
        Op::Stop => Ok(()),
        Op::Status => is_mounted(at).then_some(()).ok_or_else(|| format!("{} is not mounted", at.display())),
    }
}

fn local_fs(r: &Resource, op: Op, service: &str, ctx: &Context) -> AgentResult {
    let (device, at) = mount_of(r)?;
    match (op, is_mounted(at)) {
        (Op::Start, true) | (Op::Stop, false) | (Op::Status, true) => Ok(()),
        (Op::Start, false) => {
            let mut c = agent_command("mount", r, service, ctx);
            if let Some(t) = r.attr("fstype") {
                c.args(["-t", t]);
            }
            if let Some(o) = r.attr("options").filter(|o| !o.is_empty()) {
                c.args(["-o", o]);
            }
            run(c.arg(device).arg(at))
        }
        (Op::Stop, true) => run(agent_command("umount", r, service, ctx).arg(at)),
        (Op::Status, false) => Err(format!("{} is not mounted", at.display())),
    }
}

fn mount_of(r: &Resource) -> Result<(&str, &Path), String> {
    let device = r.attr("device").ok_or("no device attribute")?;
    let at = r.attr("mountpoint").ok_or("no mountpoint attribute")?;
    Ok((device, Path::new(at)))
}

/// Is something mounted exactly here?
pub fn is_mounted(at: &Path) -> bool {
    mounted_device(at).is_some()
}

/// Device number (`major:minor`) of what is mounted exactly here, on top of the rest. (/proc/self/mountinfo, fields 3 and 5, the path with
/// its octal escapes.)
pub fn mounted_device(at: &Path) -> Option<String> {
    let want = at.to_string_lossy().replace('\\', "\\134").replace(' ', "\\040").replace('\t', "\\011");
    let want = if want.len() > 1 { want.trim_end_matches('/') } else { &want };
    let table = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mut entries = table.lines().rev().map(|l| l.split(' ').collect::<Vec<_>>());
    let found = entries.find(|fields| fields.get(4) == Some(&want))?;
    Some(found[2].to_owned())
}

/// IPv4 address on the interface that already has one of the same subnet.
fn address(r: &Resource, op: Op, service: &str, ctx: &Context) -> AgentResult {
    let text = r.attr("address").ok_or("no address attribute")?;
    let (ip, bits) = text.split_once('/').map_or((text, None), |(a, b)| (a, b.parse::<u8>().ok()));
    let ip: std::net::Ipv4Addr = ip.parse().map_err(|_| format!("{text} is not an IPv4 address"))?;
    let mut present = None;
    let mut host = None;
    for (dev, addr, len) in addresses()? {
        if addr == ip {
            present = Some((dev, len));
        } else if same_subnet(addr, ip, len) && host.is_none() {
            host = Some((dev, len));
        }
    }
    let ip_tool = |words: &[&str]| run(agent_command("ip", r, service, ctx).args(words));
    match (op, present) {
        (Op::Start, Some(_)) | (Op::Stop, None) | (Op::Status, Some(_)) => Ok(()),
        (Op::Status, None) => Err(format!("{ip} is not configured")),
        (Op::Start, None) => {
            let (dev, len) =
                host.ok_or_else(|| format!("no interface has an address in the subnet of {ip}"))?;
            let len = bits.unwrap_or(len);
            ip_tool(&["addr", "add", &format!("{ip}/{len}"), "dev", &dev])?;
            // Tell the neighbours; without the tool they learn it when their ARP entries expire.
            let _ = ip_tool(&["neigh", "flush", "to", &ip.to_string()]);
            let _ = run(agent_command("arping", r, service, ctx).args([
                "-q",
                "-U",
                "-c",
                "2",
                "-I",
                &dev,
                &ip.to_string(),
            ]));
            Ok(())
        }
        (Op::Stop, Some((dev, len))) => {
            ip_tool(&["addr", "del", &format!("{ip}/{}", bits.unwrap_or(len)), "dev", &dev])?;
            let secs = r.attr("sleeptime").and_then(|v| v.parse().ok()).unwrap_or(0);
            std::thread::sleep(std::time::Duration::from_secs(secs));
            Ok(())
        }
    }
}

/// (interface, address, prefix length) of everything configured in this network namespace.
fn addresses() -> Result<Vec<(String, std::net::Ipv4Addr, u8)>, String> {
    let out =
        Command::new("ip").args(["-o", "-4", "addr", "show"]).output().map_err(|e| format!("ip: {e}"))?;
    let text = String::from_utf8_lossy(&out.stdout);
    Ok(text
        .lines()
        .filter_map(|l| {
            let mut words = l.split_whitespace();
            let dev = words.nth(1)?;
            let (addr, len) = words.nth(1)?.split_once('/')?;
            Some((dev.to_owned(), addr.parse().ok()?, len.parse().ok()?))
        })
        .collect())
}

fn same_subnet(a: std::net::Ipv4Addr, b: std::net::Ipv4Addr, len: u8) -> bool {
    let mask = u32::MAX.checked_shl(32 - u32::from(len.min(32))).unwrap_or(0);
    u32::from(a) & mask == u32::from(b) & mask
}

/// A command with the agent contract's environment, its own process group and its output in the service's log.
fn agent_command(program: impl AsRef<OsStr>, r: &Resource, service: &str, ctx: &Context) -> Command {
    let mut c = Command::new(program);
    for (key, value) in &r.attrs {
        c.env(format!("OCF_RESKEY_{key}"), value);
    }
    c.env("OCF_RA_VERSION_MAJOR", "1")
        .env("OCF_RA_VERSION_MINOR", "0")
        .env("OCF_ROOT", "/usr/lib/ocf")
        .env("OCF_RESOURCE_INSTANCE", format!("{}:{}", r.kind, r.name))
        .env("OCF_RESOURCE_TYPE", &r.kind)
        .env("OCF_CHECK_LEVEL", "0")
        .env("CAIRN_RUN_DIR", &ctx.run_dir)
        .env(membership::alive::marked::MARK, membership::alive::marked::mark(&ctx.run_dir, ctx.incarnation))
        .current_dir("/")
        .stdin(Stdio::null())
        .process_group(0);
    let log = ctx.log_dir.join(format!("service-{service}.log"));
    match OpenOptions::new().create(true).append(true).open(log) {
        Ok(file) => {
            let err = file.try_clone().map_or_else(|_| Stdio::null(), Stdio::from);
            c.stdout(file).stderr(err);
        }
        Err(_) => {
            c.stdout(Stdio::null()).stderr(Stdio::null());
        }
    }
    if let Some(alive) = ctx.alive.clone() {
        use std::os::fd::AsRawFd;
        // SAFETY: fcntl is async-signal-safe; the descriptor is kept open by the Arc moved into the closure.
        unsafe {
            c.pre_exec(move || {
                if libc::fcntl(alive.as_raw_fd(), libc::F_SETFD, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
    }
    c
}

fn run(c: &mut Command) -> AgentResult {
    let program = c.get_program().to_string_lossy().into_owned();
    let status = c.status().map_err(|e| format!("{program}: {e}"))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(code) => Err(format!("returned {code} ({})", code_text(code))),
        None => Err(format!("{program}: {status}")),
    }
}

/// Texts of the agent return codes.
const fn code_text(code: i32) -> &'static str {
    match code {
        0 => "success",
        2 => "invalid argument(s)",
        3 => "function not implemented",
        4 => "insufficient privileges",
        5 => "program not installed",
        6 => "program not configured",
        7 => "not running",
        _ => "generic error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::os::unix::fs::PermissionsExt;

    struct NoStorage;
    impl Storage for NoStorage {
        fn ensure_ready(&self, _: &str, _: &Path, _: &str) -> AgentResult {
            Err("journal of node 2 is not replayed".into())
        }
        fn unmount(&self, _: &Path, _: bool) -> AgentResult {
            Ok(())
        }
    }

    fn context(dir: &Path) -> Context {
        Context {
            storage: Arc::new(NoStorage),
            agent_dir: dir.to_owned(),
            log_dir: dir.to_owned(),
            run_dir: dir.to_owned(),
            incarnation: cairn_base::Incarnation(1),
            alive: None,
        }
    }

    fn resource(kind: &str, attrs: &[(&str, &str)], children: Vec<Resource>) -> Resource {
        let attrs: BTreeMap<_, _> = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let name = attrs.get("name").cloned().unwrap_or_else(|| kind.to_owned());
        Resource { kind: kind.into(), name, attrs, children }
    }

    fn script_file(dir: &Path, body: &str) -> String {
        let path = dir.join("agent.sh");
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.to_string_lossy().into_owned()
    }

    #[test]
    fn a_script_gets_the_action_and_the_environment() {
        let dir = tempfile::tempdir().unwrap();
        let file = script_file(dir.path(), "echo $1 $OCF_RESKEY_service_name $OCF_RESOURCE_INSTANCE");
        let s = resource("script", &[("name", "httpd"), ("file", &file), ("service_name", "web")], vec![]);
        let tree = resource("service", &[("name", "web")], vec![s]);
        let ctx = context(dir.path());
        for op in [Op::Start, Op::Status, Op::Stop] {
            assert!(run_tree(&tree, op, &ctx, &mut |t| panic!("{t}")));
        }
        let log = std::fs::read_to_string(dir.path().join("service-web.log")).unwrap();
        assert_eq!(log, "start web script:httpd\nstatus web script:httpd\nstop web script:httpd\n");
    }

    #[test]
    fn nothing_starts_on_storage_that_is_not_ready() {
        let dir = tempfile::tempdir().unwrap();
        let file = script_file(dir.path(), &format!("touch {}/ran", dir.path().display()));
        let s = resource("script", &[("name", "httpd"), ("file", &file)], vec![]);
        let fs = resource("clusterfs", &[("name", "v"), ("device", "d"), ("mountpoint", "/m")], vec![]);
        let tree = resource("service", &[("name", "web")], vec![s, fs]);
        let mut said = Vec::new();
        assert!(!run_tree(&tree, Op::Start, &context(dir.path()), &mut |t| said.push(t.to_owned())));
        assert!(said[0].contains("is not replayed"), "{said:?}");
        assert!(!dir.path().join("ran").exists(), "the script never ran");
    }

    #[test]
    fn a_failing_stop_goes_on_and_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let bad = script_file(dir.path(), "exit 7");
        let a = resource("script", &[("name", "a"), ("file", &bad)], vec![]);
        let b = resource("script", &[("name", "b"), ("file", "/nonexistent")], vec![]);
        let tree = resource("service", &[("name", "web")], vec![a, b]);
        let mut said = Vec::new();
        assert!(!run_tree(&tree, Op::Stop, &context(dir.path()), &mut |t| said.push(t.to_owned())));
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said.iter().any(|t| t.contains("returned 7 (not running)")), "{said:?}");
    }

    #[test]
    fn subnets() {
        let a = "10.0.1.7".parse().unwrap();
        assert!(same_subnet(a, "10.0.1.200".parse().unwrap(), 24));
        assert!(!same_subnet(a, "10.0.2.200".parse().unwrap(), 24));
        assert!(same_subnet(a, "99.0.2.200".parse().unwrap(), 0));
    }
}
