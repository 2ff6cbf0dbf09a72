//! Heuristics: programs whose exit status says whether this node is fit (it reaches the router, its array is clean).
//!
//! Each runs in its own thread, again and again; its result reaches the core as a new score. A program that hangs is
//! killed with its process group and counts as failed; it can never delay a cycle of the disk.

use crate::driver::HeuristicSpec;
use crate::event::LogLevel;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How often a running program is looked at.
const POLL: Duration = Duration::from_millis(20);

/// What a heuristic's thread reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    /// Place in the configuration.
    pub(crate) index: usize,
    pub(crate) up: bool,
    pub(crate) log: Option<(LogLevel, String)>,
}

/// Counts misses; pure, so that the words and edges can be tested.
#[derive(Clone, Debug)]
struct Judge {
    spec: HeuristicSpec,
    up: bool,
    misses: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Run {
    Good,
    Bad,
    TooLong,
}

impl Judge {
    fn new(spec: HeuristicSpec) -> Self {
        Self { spec, up: false, misses: 0 }
    }

    /// The new state and, when it changed, the line for the log.
    fn judge(&mut self, run: Run) -> Option<(LogLevel, String)> {
        let (name, tko) = (&self.spec.program, self.spec.tko.max(1));
        let was = self.up;
        match run {
            Run::Good => {
                (self.up, self.misses) = (true, 0);
                (!was).then(|| (LogLevel::Info, format!("Heuristic: '{name}' UP")))
            }
            Run::TooLong => {
                (self.up, self.misses) = (false, tko);
                let limit = self.spec.limit.as_secs().max(1);
                was.then(|| {
                    (
                        LogLevel::Notice,
                        format!("Heuristic: '{name}' DOWN - Exceeded timeout of {limit} seconds"),
                    )
                })
            }
            Run::Bad => {
                self.misses = (self.misses + 1).min(tko);
                self.up = was && self.misses < tko;
                (was && !self.up)
                    .then(|| (LogLevel::Notice, format!("Heuristic: '{name}' DOWN ({}/{tko})", self.misses)))
            }
        }
    }
}

fn kill_group(child: &mut Child) {
    if let Ok(group) = libc::pid_t::try_from(child.id()) {
        // The child is not waited for yet, so its number cannot belong to another process.
        let _ =
            nix::sys::signal::killpg(nix::unistd::Pid::from_raw(group), nix::sys::signal::Signal::SIGKILL);
    }
    let _ = child.wait();
}

/// One run. `None`: told to end.
fn run(spec: &HeuristicSpec, end: &Receiver<()>) -> Option<Run> {
    let started = Command::new("/bin/sh")
        .args(["-c", &spec.program])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn();
    let Ok(mut child) = started else { return Some(Run::Bad) };
    let deadline = Instant::now() + spec.limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(if status.success() { Run::Good } else { Run::Bad }),
            Ok(None) => {}
            Err(_) => return Some(Run::Bad),
        }
        if Instant::now() >= deadline {
            kill_group(&mut child);
            return Some(Run::TooLong);
        }
        if !matches!(end.recv_timeout(POLL), Err(RecvTimeoutError::Timeout)) {
            kill_group(&mut child);
            return None;
        }
    }
}

/// Until `end` is closed.
pub(crate) fn watch(index: usize, spec: HeuristicSpec, end: &Receiver<()>, reports: &Sender<Report>) {
    let mut judge = Judge::new(spec.clone());
    while let Some(result) = run(&spec, end) {
        let log = judge.judge(result);
        if reports.send(Report { index, up: judge.up, log }).is_err() {
            return;
        }
        if !matches!(end.recv_timeout(spec.interval), Err(RecvTimeoutError::Timeout)) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(program: &str) -> HeuristicSpec {
        HeuristicSpec {
            program: program.to_owned(),
            score: 1,
            interval: Duration::from_millis(10),
            tko: 3,
            limit: Duration::from_secs(1),
        }
    }

    #[test]
    fn a_heuristic_goes_down_after_tko_misses_and_up_at_once() {
        let mut j = Judge::new(spec("true"));
        assert_eq!(j.judge(Run::Good).unwrap().1, "Heuristic: 'true' UP");
        assert!(j.judge(Run::Bad).is_none() && j.judge(Run::Bad).is_none() && j.up);
        assert_eq!(j.judge(Run::Bad).unwrap().1, "Heuristic: 'true' DOWN (3/3)");
        assert!(!j.up && j.judge(Run::Bad).is_none());
        assert!(j.judge(Run::Good).is_some() && j.up);
        assert_eq!(
            j.judge(Run::TooLong).unwrap().1,
            "Heuristic: 'true' DOWN - Exceeded timeout of 1 seconds"
        );
    }

    #[test]
    fn programs_run_fail_and_are_killed_when_they_hang() {
        let (keep, end) = crossbeam_channel::bounded::<()>(0);
        assert_eq!(run(&spec("exit 0"), &end), Some(Run::Good));
        assert_eq!(run(&spec("exit 3"), &end), Some(Run::Bad));
        let hung = HeuristicSpec { limit: Duration::from_millis(100), ..spec("sleep 600 & wait") };
        assert_eq!(run(&hung, &end), Some(Run::TooLong));
        drop(keep);
        assert_eq!(run(&spec("sleep 600"), &end), None);
    }
}
