//! The faults.

use crate::world::{NODES, World};
use cairn_tests::cluster::{boottime, signal};
use cairn_tests::program::cairn;
use std::process::Command;
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug)]
enum Fault {
    Crash,
    CrashTwo,
    CrashAll,
    CrashMaster,
    /// The one that fences or replays dies as well, or the next.
    CrashInRecovery,
    KillDaemon,
    KillMount,
    KillService,
    KillLoad,
    Pause,
    PauseDaemon,
    PauseMount,
    Relocate,
    Leave,
    Unmount,
}

use Fault::*;

/// Each as often as it stands here.
const FAULTS: [Fault; 27] = [
    Crash,
    Crash,
    Crash,
    CrashTwo,
    CrashTwo,
    CrashAll,
    CrashMaster,
    CrashMaster,
    CrashInRecovery,
    CrashInRecovery,
    KillDaemon,
    KillDaemon,
    KillMount,
    KillMount,
    KillService,
    KillLoad,
    Pause,
    Pause,
    Pause,
    PauseDaemon,
    PauseMount,
    Relocate,
    Relocate,
    Relocate,
    Leave,
    Unmount,
    Unmount,
];

/// Longest pause; the fast profile loses a node after two seconds.
const PAUSE_MS: u64 = 6000;
const START_MS: u64 = 4000;
const GAP_MS: u64 = 2500;

impl World {
    /// Two to five faults with little time between them.
    pub(crate) fn round(&mut self) {
        for _ in 0..2 + self.rng.below(4) {
            let fault = FAULTS[self.rng.below(FAULTS.len() as u64) as usize];
            let victim = self.rng.below(NODES.len() as u64) as usize;
            self.faults += 1;
            self.say(&format!("{fault:?} {}", NODES[victim]));
            self.inflict(fault, victim);
            let gap = if self.rng.chance(1, 3) { GAP_MS / 10 } else { GAP_MS };
            let gap = Duration::from_millis(self.rng.below(gap));
            self.let_pass(gap);
        }
    }

    fn inflict(&mut self, fault: Fault, victim: usize) {
        let other = (victim + 1 + self.rng.below(2) as usize) % NODES.len();
        match fault {
            Crash => self.crash(victim),
            CrashTwo => {
                self.crash(victim);
                self.crash(other);
            }
            CrashAll => {
                for i in 0..NODES.len() {
                    self.crash(i);
                }
            }
            CrashMaster => {
                let master = (0..NODES.len()).find_map(|i| self.status(i)?.device?.master);
                if let Some(master) = master {
                    self.crash(usize::from(master.0) - 1);
                }
            }
            CrashInRecovery => {
                let since = boottime();
                self.crash(victim);
                self.wait_fence(victim, since);
                let later = Duration::from_millis(self.rng.below(60));
                self.let_pass(later);
                self.crash(other);
            }
            KillDaemon => self.kill(victim, "cairnd"),
            KillMount => self.kill(victim, "mount"),
            KillService => {
                let marks = cairn_tests::load::lines(&self.acks.join("service.marks"));
                let pid = marks.last().and_then(|l| l.split(' ').nth(1)?.parse::<i32>().ok());
                let named = |pid: i32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                if let Some(pid) = pid.filter(|p| named(*p).windows(7).any(|w| w == b"service")) {
                    signal(pid, libc::SIGKILL);
                }
            }
            KillLoad => self.end_load(victim),
            Pause => {
                self.cluster.cairn(&["pause", NODES[victim]]);
                self.resume_later(victim);
            }
            PauseDaemon | PauseMount => {
                let role = if matches!(fault, PauseDaemon) { "cairnd" } else { "mount" };
                if let Some(pid) = self.process(victim, role) {
                    signal(pid, libc::SIGSTOP);
                }
                self.resume_later(victim);
            }
            Relocate => {
                let run_dir = self.cluster.run_dir(NODES[other]);
                let mut command = Command::new(cairn());
                command.args(["clusvcadm", "-r", "web"]);
                if self.rng.chance(1, 2) {
                    command.args(["-m", NODES[victim]]);
                }
                command.arg("--run-dir").arg(run_dir);
                self.errand(command);
            }
            Leave => {
                let mut command = Command::new(cairn());
                command.args(["cman_tool", "leave", "force", "--run-dir"]);
                command.arg(self.cluster.run_dir(NODES[victim]));
                self.errand(command);
                self.start_later(victim);
            }
            Unmount => {
                self.end_load(victim);
                let mut command = Command::new("umount");
                command.arg(self.mount(victim));
                self.errand(command);
                self.start_later(victim);
            }
        }
    }

    fn crash(&mut self, i: usize) {
        self.cluster.cairn(&["crash", NODES[i]]);
        self.nodes[i].resume_at = None;
        self.start_later(i);
    }

    fn kill(&mut self, i: usize, role: &str) {
        if let Some(pid) = self.process(i, role) {
            signal(pid, libc::SIGKILL);
        }
        self.start_later(i);
    }

    fn start_later(&mut self, i: usize) {
        let after = Duration::from_millis(self.rng.below(START_MS));
        self.nodes[i].start_at.get_or_insert(Instant::now() + after);
    }

    fn resume_later(&mut self, i: usize) {
        let after = Duration::from_millis(self.rng.below(PAUSE_MS));
        self.nodes[i].resume_at.get_or_insert(Instant::now() + after);
        self.start_later(i);
    }

    /// Until a survivor is told that the node is fenced, or nobody is there who could be.
    fn wait_fence(&mut self, victim: usize, since: u64) {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            let told = NODES.iter().any(|n| {
                self.cluster
                    .events(n, since)
                    .iter()
                    .any(|v| v["event"] == "fence_done" && v["node"] == victim as u64 + 1)
            });
            if told {
                return;
            }
            self.let_pass(Duration::from_millis(20));
        }
    }
}
