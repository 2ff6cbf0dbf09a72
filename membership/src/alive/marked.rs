//! Processes that a node started without registering them: what services run, and whatever that has forked.
//!
//! They carry [`MARK`] in their environment, which children inherit. The scan finds those that closed the inherited lock.
//! A process that clears its environment *and* closes its descriptors escapes; the manual says so.

use super::PidFd;
use cairn_base::Incarnation;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Environment variable `CAIRN_LIFE=<run directory>:<incarnation>`.
pub const MARK: &str = "CAIRN_LIFE";

/// The value of [`MARK`] for children of this life.
pub fn mark(run_dir: &Path, incarnation: Incarnation) -> std::ffi::OsString {
    let dir = fs::canonicalize(run_dir).unwrap_or_else(|_| run_dir.to_owned());
    let mut text = dir.into_os_string();
    text.push(format!(":{incarnation}"));
    text
}

/// Living processes marked with a life of this directory up to `up_to`; never the caller.
pub fn marked(run_dir: &Path, up_to: Incarnation) -> Vec<(i32, PidFd)> {
    let dir = fs::canonicalize(run_dir).unwrap_or_else(|_| run_dir.to_owned());
    let mut prefix = MARK.as_bytes().to_vec();
    prefix.push(b'=');
    prefix.extend_from_slice(dir.as_os_str().as_bytes());
    prefix.push(b':');
    let own = std::process::id() as i32;
    let Ok(proc) = fs::read_dir("/proc") else { return Vec::new() };
    proc.flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own)
        .filter_map(|pid| {
            let started = super::start_time(pid)?;
            let environ = fs::read(format!("/proc/{pid}/environ")).ok()?;
            let life = environ.split(|b| *b == 0).find_map(|v| v.strip_prefix(prefix.as_slice()))?;
            let life: u64 = std::str::from_utf8(life).ok()?.parse().ok()?;
            if Incarnation(life) > up_to {
                return None;
            }
            let fd = PidFd::open(pid, started)?;
            (!fd.exited()).then_some((pid, fd))
        })
        .collect()
}
