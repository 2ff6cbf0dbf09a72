//! What the node writes down: `cairnd.log` in the historical wording, and the records that become `events.jsonl`.

use crate::clock;
use crate::config::Dialect;
use crate::ipc::Scope;
use crate::node::{Program, Record};
use cairn_base::{NodeId, events};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// A full disk costs lines, never the node.
pub(super) struct NodeLog {
    human: File,
    node: NodeId,
    host: String,
    dialect: Dialect,
    foreground: bool,
}

impl NodeLog {
    pub(super) fn open(
        run_dir: &Path,
        node: NodeId,
        host: &str,
        dialect: Dialect,
        foreground: bool,
    ) -> io::Result<Self> {
        let dir = run_dir.join("log");
        std::fs::create_dir_all(&dir)?;
        let open = |name: &str| OpenOptions::new().create(true).append(true).open(dir.join(name));
        Ok(Self { human: open("cairnd.log")?, node, host: host.to_owned(), dialect, foreground })
    }

    /// One line, framed as syslog would: `Mon dd HH:MM:SS host prog[pid]: text`.
    pub(super) fn line(&mut self, program: &str, text: &str) {
        let line = format!("{} {} {program}[{}]: {text}\n", timestamp(), self.host, std::process::id());
        let _ = self.human.write_all(line.as_bytes());
        if self.foreground {
            let _ = io::stderr().write_all(line.as_bytes());
        }
    }

    /// A line of the group-communication engine, with its subsystem.
    pub(super) fn engine(&mut self, subsystem: &str, text: &str) {
        match self.dialect {
            Dialect::Rhel5 => self.line("openais", &format!("[{subsystem:<5}] {text}")),
            Dialect::Rhel6 => self.line("corosync", &format!("  [{subsystem:<6}] {text}")),
        }
    }

    pub(super) fn program(&mut self, program: Program, text: &str) {
        match program {
            Program::Cman => self.engine("CMAN", text),
            Program::Fenced => self.line("fenced", text),
        }
    }

    /// A state change that others wait for: a structured record, which the event log turns into a line of `events.jsonl`.
    pub(super) fn record(&mut self, record: &Record) {
        match record {
            Record::View { view, members, quorate } => tracing::info!(
                event = events::VIEW_INSTALLED,
                node = self.node.0,
                view = view.0,
                members = members.len(),
                quorate,
                "view {view}: {members:?}"
            ),
            Record::NodeLost(p) => tracing::info!(
                event = events::NODE_LOST,
                node = p.node.0,
                incarnation = p.incarnation.0,
                "lost {p}"
            ),
            Record::Evicted(node) => {
                tracing::info!(event = events::QDISK_EVICTED, node = node.0, "node {node} is evicted");
            }
            Record::FenceStart(p) => tracing::info!(
                event = events::FENCE_START,
                node = p.node.0,
                incarnation = p.incarnation.0,
                "fencing {p}"
            ),
            Record::FenceDone { proc, scope: Scope::Node, proof } => tracing::info!(
                event = events::FENCE_DONE,
                node = proc.node.0,
                incarnation = proc.incarnation.0,
                proof = %proof,
                "{proc} is fenced: {proof}"
            ),
            Record::FenceDone { proc, scope: Scope::Mount { client, fs }, proof } => tracing::info!(
                event = events::FENCE_DONE,
                node = proc.node.0,
                incarnation = proc.incarnation.0,
                client,
                fs = fs.as_str(),
                proof = %proof,
                "mount {client} of {proc} is fenced: {proof}"
            ),
            Record::FenceFailed { proc, error } => tracing::warn!(
                event = events::FENCE_FAILED,
                node = proc.node.0,
                err = error.as_str(),
                "fence of {proc} failed: {error}"
            ),
            Record::PermitLost(why) => tracing::warn!(
                event = events::PERMIT_LOST,
                node = self.node.0,
                why = %why,
                "no permit to write: {why}"
            ),
        }
    }
}

/// `Mon dd HH:MM:SS` in local time.
fn timestamp() -> String {
    let now = clock::unix_seconds() as libc::time_t;
    // SAFETY: all zero bytes are a valid `tm`.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    let mut buf = [0u8; 32];
    // SAFETY: both pointers are valid for the call; the format is a C string; strftime writes at most `buf.len()` bytes.
    let len = unsafe {
        libc::localtime_r(&raw const now, &raw mut tm);
        libc::strftime(buf.as_mut_ptr().cast(), buf.len(), c"%b %e %H:%M:%S".as_ptr(), &raw const tm)
    };
    String::from_utf8_lossy(&buf[..len]).into_owned()
}
