//! Running fence agents: levels in file order, all devices of a level must succeed, the first good level wins.
//!
//! Agents get their parameters as `name=value` lines on standard input, never in argv or environment: device attributes of
//! the node first, `nodename` if not given, then the attributes of the fence device. Exit status 0 is success, anything else and every
//! signal is failure. `fence_local` is built in (module `alive`); `fence_manual` waits for a person and so always "fails".
//!
//! Everything here blocks; the driver runs it on a thread per victim.

use crate::alive::{self, Death};
use crate::config::{ClusterNode, Config, DeviceRef, FenceDevice};
use crate::ipc::Proof;
use cairn_base::Proc;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long an agent that was told to end may take before it is killed.
const TERM_GRACE: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    #[error("error no method")]
    NoMethod,
    #[error("error no device")]
    NoDevice,
    #[error("error from fork: {0}")]
    Fork(std::io::Error),
    #[error("error from agent: {0}")]
    Agent(String),
    #[error("error from agent: no answer within {0:?}")]
    TimedOut(Duration),
    #[error("{0}")]
    Local(#[from] alive::AliveError),
    #[error("waiting for fence_ack_manual")]
    Manual,
    #[error("no node with id {0} is configured")]
    NoNode(u16),
}

/// One device that was tried, for the log: `fence <n> dev %d.%d agent %s result: %s`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    pub method: usize,
    pub device: usize,
    pub agent: String,
    pub result: String,
}

impl Tried {
    pub fn text(&self, node: &str) -> String {
        let mut s = String::new();
        let _ = write!(
            s,
            "fence {node} dev {}.{} agent {} result: {}",
            self.method, self.device, self.agent, self.result
        );
        s
    }
}

/// Runs the victim's methods until one level succeeds. What was tried is appended to `tried`.
pub fn fence(config: &Config, victim: Proc, tried: &mut Vec<Tried>) -> Result<Proof, AgentError> {
    let node = config.node(victim.node.0).ok_or(AgentError::NoNode(victim.node.0))?;
    let mut last = AgentError::NoMethod;
    for (m, method) in node.methods.iter().enumerate() {
        let mut proof = None;
        last = AgentError::NoDevice;
        for (d, device) in method.devices.iter().enumerate() {
            let known = config.fence_devices.get(&device.name);
            let result = match known {
                Some(known) => run_device(config, node, victim, device, known),
                None => Err(AgentError::NoDevice),
            };
            tried.push(Tried {
                method: m,
                device: d,
                agent: known.map_or_else(|| device.name.clone(), |k| k.agent.clone()),
                result: result.as_ref().map_or_else(ToString::to_string, |_| "success".to_owned()),
            });
            match result {
                Ok(p) => proof = Some(p),
                Err(e) => {
                    proof = None;
                    last = e;
                    break;
                }
            }
        }
        if let Some(proof) = proof {
            return Ok(proof);
        }
    }
    Err(last)
}

/// Is the node certainly not running? Kills nothing and waits for nothing.
pub fn probe(config: &Config, victim: Proc) -> Result<Proof, AgentError> {
    let node = config.node(victim.node.0).ok_or(AgentError::NoNode(victim.node.0))?;
    if !config.one_host {
        return Err(AgentError::NoMethod);
    }
    alive::probe(&node.run_dir, victim.incarnation)?;
    Ok(Proof::NotRunning)
}

fn run_device(
    config: &Config,
    node: &ClusterNode,
    victim: Proc,
    device: &DeviceRef,
    known: &FenceDevice,
) -> Result<Proof, AgentError> {
    let limit = Duration::from_millis(config.fence_daemon.agent_limit_ms);
    match known.agent.as_str() {
        "fence_local" if config.one_host => match alive::fence(&node.run_dir, victim.incarnation, limit)? {
            Death::NotRunning => Ok(Proof::NotRunning),
            Death::Killed(_) => Ok(Proof::Exited),
        },
        // the configuration is refused before this (FE-3); a proof must not depend on that alone
        "fence_local" => Err(AgentError::Agent("fence_local is for one host only".to_owned())),
        "fence_manual" => Err(AgentError::Manual),
        agent => {
            run_agent(agent, &parameters(node, device, known), limit)?;
            Ok(Proof::Agent(agent.to_owned()))
        }
    }
}

/// What the agent reads. Line breaks inside a value would make parameters of their own: such values are cut there.
fn parameters(node: &ClusterNode, device: &DeviceRef, known: &FenceDevice) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let value = value.split(['\n', '\r']).next().unwrap_or_default();
        let _ = writeln!(text, "{name}={value}");
    };
    for (name, value) in &device.attrs {
        line(name, value);
    }
    if !device.attrs.iter().any(|(n, _)| n == "nodename") {
        line("nodename", &node.name);
    }
    for (name, value) in &known.attrs {
        line(name, value);
    }
    text
}

/// Runs one agent in a process group of its own, so that its children end with it.
fn run_agent(agent: &str, input: &str, limit: Duration) -> Result<(), AgentError> {
    let program = if agent.contains('/') {
        PathBuf::from(agent)
    } else {
        // agents live in sbin, which is not in everybody's PATH
        ["/usr/sbin", "/sbin", "/usr/local/sbin"]
            .iter()
            .map(|d| PathBuf::from(d).join(agent))
            .find(|p| p.exists())
            .unwrap_or_else(|| PathBuf::from(agent))
    };
    let mut child = Command::new(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(AgentError::Fork)?;
    if let Some(mut stdin) = child.stdin.take() {
        // an agent that does not read its parameters fails by itself
        let _ = stdin.write_all(input.as_bytes());
    }
    if wait(&mut child, limit).is_none() {
        signal_group(&child, libc::SIGTERM);
        if wait(&mut child, TERM_GRACE).is_none() {
            signal_group(&child, libc::SIGKILL);
            let _ = child.wait();
        }
        return Err(AgentError::TimedOut(limit));
    }
    let status = child.wait().map_err(AgentError::Fork)?;
    if status.success() { Ok(()) } else { Err(AgentError::Agent(status.to_string())) }
}

fn signal_group(child: &Child, signal: i32) {
    // SAFETY: our own, not yet reaped child leads this process group; the number cannot have been reused.
    unsafe { libc::kill(-(child.id() as i32), signal) };
}

/// Waits for the child to end without reaping it; `None` when the time ran out.
fn wait(child: &mut Child, limit: Duration) -> Option<()> {
    let start = Instant::now();
    // SAFETY: plain system call with two integers; the result is a new descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    if fd < 0 {
        // no pidfd to spare: look now and then
        while start.elapsed() < limit {
            if matches!(child.try_wait(), Ok(Some(_))) {
                return Some(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        return None;
    }
    // SAFETY: the kernel just gave us this descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    loop {
        let left = limit.saturating_sub(start.elapsed());
        let mut fds = [libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
        let ms = left.as_millis().min(i32::MAX as u128) as i32;
        // SAFETY: one valid pollfd.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), 1, ms) };
        if n > 0 {
            return Some(());
        }
        if left.is_zero() {
            return None;
        }
    }
}

/// `fence_local` as a program: reads `run_dir=` and `incarnation=` (and `action=`) from standard input like any agent.
/// Exit status 0: the node's processes are gone; `status`: 0 running, 2 not.
pub fn fence_local_main(input: &str) -> i32 {
    let get = |key: &str| {
        input.lines().filter_map(|l| l.split_once('=')).find(|(k, _)| k.trim() == key).map(|(_, v)| v.trim())
    };
    let Some(run_dir) = get("run_dir").filter(|d| d.starts_with('/')) else {
        eprintln!("fence_local: run_dir=/… is needed");
        return 1;
    };
    let run_dir = PathBuf::from(run_dir);
    let incarnation = cairn_base::Incarnation(get("incarnation").and_then(|v| v.parse().ok()).unwrap_or(0));
    match get("action").or(get("option")).unwrap_or("off") {
        "off" | "reboot" => match alive::fence(&run_dir, incarnation, Duration::from_secs(30)) {
            Ok(_) => 0,
            Err(e) => {
                eprintln!("fence_local: {e}");
                1
            }
        },
        "status" | "monitor" => match alive::probe(&run_dir, incarnation) {
            Ok(_) => 2,
            Err(alive::AliveError::Held { .. }) => 0,
            Err(_) => 1,
        },
        other => {
            eprintln!("fence_local: no action {other:?}");
            1
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_base::{Incarnation, NodeId};
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    /// An agent that appends its input to `<dir>/<name>.in` and then does `body`.
    fn script(dir: &Path, name: &str, body: &str) -> String {
        let path = dir.join(name);
        let text = format!("#!/bin/sh\ncat >> {0}.in\necho \"$#\" >> {0}.argc\n{body}\n", path.display());
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        path.display().to_string()
    }

    fn config(dir: &Path, methods: &str, limit_ms: u64) -> Config {
        let text = format!(
            r#"<cluster name="c"><cairn run_dir="{0}/%n" one_host="yes"/><fence_daemon agent_limit_ms="{limit_ms}"/>
            <clusternodes><clusternode name="a" nodeid="1"><fence>{methods}</fence></clusternode></clusternodes>
            <fencedevices><fencedevice name="good" agent="{1}" passwd="secret"/><fencedevice name="bad" agent="{2}"/>
            <fencedevice name="slow" agent="{3}"/><fencedevice name="hand" agent="fence_manual"/></fencedevices></cluster>"#,
            dir.display(),
            script(dir, "good", "exit 0"),
            script(dir, "bad", "exit 3"),
            script(dir, "slow", "trap '' TERM; sleep 600 & wait; sleep 600"),
        );
        Config::parse(&text, "test").unwrap()
    }

    const VICTIM: Proc = Proc { node: NodeId(1), incarnation: Incarnation(3) };

    #[test]
    fn levels_fall_through_to_the_first_good_one() {
        let dir = tempfile::tempdir().unwrap();
        let c = config(
            dir.path(),
            r#"<method name="1"><device name="good" port="7"/><device name="bad"/></method>
               <method name="2"><device name="good" port="8"/></method>"#,
            10_000,
        );
        let mut tried = Vec::new();
        let proof = fence(&c, VICTIM, &mut tried).unwrap();
        assert!(matches!(proof, Proof::Agent(name) if name.ends_with("/good")));
        let results: Vec<_> = tried.iter().map(|t| (t.method, t.device, t.result == "success")).collect();
        assert_eq!(results, [(0, 0, true), (0, 1, false), (1, 0, true)]);
        assert!(tried[1].text("a").starts_with("fence a dev 0.1 agent "));
        let given = std::fs::read_to_string(dir.path().join("good.in")).unwrap();
        assert!(given.starts_with("port=7\nnodename=a\nagent="), "{given}");
        assert!(given.contains("passwd=secret\n"));
        let argc = std::fs::read_to_string(dir.path().join("good.argc")).unwrap();
        assert!(argc.lines().all(|l| l == "0"), "no secrets in argv");
    }

    #[test]
    fn an_agent_that_hangs_is_ended_and_counts_as_failed() {
        let dir = tempfile::tempdir().unwrap();
        let c = config(dir.path(), r#"<method name="1"><device name="slow"/></method>"#, 200);
        let mut tried = Vec::new();
        assert!(matches!(fence(&c, VICTIM, &mut tried), Err(AgentError::TimedOut(_))));
    }

    #[test]
    fn a_manual_device_never_succeeds_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let c = config(dir.path(), r#"<method name="1"><device name="hand"/></method>"#, 1_000);
        assert!(matches!(fence(&c, VICTIM, &mut Vec::new()), Err(AgentError::Manual)));
    }

    #[test]
    fn a_line_break_in_a_value_makes_no_parameter() {
        let dir = tempfile::tempdir().unwrap();
        let c = config(
            dir.path(),
            r#"<method name="1"><device name="good" port="7&#10;action=on"/></method>"#,
            10_000,
        );
        fence(&c, VICTIM, &mut Vec::new()).unwrap();
        let given = std::fs::read_to_string(dir.path().join("good.in")).unwrap();
        assert!(!given.lines().any(|l| l == "action=on"), "{given}");
    }

    #[test]
    fn without_methods_there_is_no_proof() {
        let dir = tempfile::tempdir().unwrap();
        let mut c = config(dir.path(), "", 1_000);
        c.nodes[0].methods.clear();
        assert!(matches!(fence(&c, VICTIM, &mut Vec::new()), Err(AgentError::NoMethod)));
        assert_eq!(probe(&c, VICTIM).unwrap(), Proof::NotRunning, "nothing was ever started there");
    }
}
