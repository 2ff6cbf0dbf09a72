//! What the demonstration found, in numbers.

use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Milliseconds after the crash, by phase; in the order of the story.
pub(super) const PHASES: [&str; 6] =
    ["detected", "evicted", "fenced", "replayed", "service_started", "http_answering"];

#[derive(Default)]
pub(super) struct Report {
    pub(super) profile: String,
    pub(super) phases: BTreeMap<&'static str, u64>,
    pub(super) survivor_longest_stall_ms: u64,
    pub(super) acknowledged_writes: u64,
    pub(super) lost_writes: u64,
    pub(super) counter_expected: u64,
    pub(super) counter_actual: u64,
    pub(super) last_node_kept_service: bool,
    pub(super) fsck_own: String,
    pub(super) fsck_gfs2_utils: String,
    /// Empty means that every promise held.
    pub(super) problems: Vec<String>,
}

impl Report {
    pub(super) fn new(profile: &str) -> Self {
        Self {
            profile: profile.to_owned(),
            fsck_own: "not run".into(),
            fsck_gfs2_utils: "not run".into(),
            ..Self::default()
        }
    }

    pub(super) fn json(&self) -> Value {
        let phases: serde_json::Map<String, Value> = PHASES
            .iter()
            .map(|p| ((*p).to_owned(), self.phases.get(p).map_or(Value::Null, |ms| (*ms).into())))
            .collect();
        json!({
            "ok": self.problems.is_empty(),
            "nodes": 3,
            "profile": self.profile,
            "crash_to_service_ms": self.phases.get("http_answering"),
            "phases_ms": phases,
            "survivor_longest_stall_ms": self.survivor_longest_stall_ms,
            "acknowledged_writes": self.acknowledged_writes,
            "lost_writes": self.lost_writes,
            "counter": {"expected": self.counter_expected, "actual": self.counter_actual},
            "last_node_kept_service": self.last_node_kept_service,
            "fsck": {"own": self.fsck_own, "gfs2_utils": self.fsck_gfs2_utils},
            "problems": self.problems,
        })
    }

    pub(super) fn summary(&self) -> String {
        let mut out = format!("\nSummary ({} profile)\n", self.profile);
        for p in PHASES {
            if let Some(ms) = self.phases.get(p) {
                out += &format!("  {:<18} {ms:>6} ms after the crash\n", p.replace('_', " "));
            }
        }
        out += &format!(
            "  survivors' longest stall {} ms\n  acknowledged writes {}, lost {}\n  counter {} of {}\n  last node kept the service: {}\n  volume: own checker {}, fsck.gfs2 {}\n",
            self.survivor_longest_stall_ms,
            self.acknowledged_writes,
            self.lost_writes,
            self.counter_actual,
            self.counter_expected,
            if self.last_node_kept_service { "yes" } else { "NO" },
            self.fsck_own,
            self.fsck_gfs2_utils,
        );
        out += if self.problems.is_empty() { "  every promise held\n" } else { "  PROMISES BROKEN\n" };
        out
    }
}
