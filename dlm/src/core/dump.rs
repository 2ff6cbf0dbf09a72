//! A picture of the state for people and tools (`dlm_tool ls`, `lockdebug`, `why`).

use super::{Core, Know, Phase};
use crate::types::Mode;
use serde::Serialize;

#[derive(Clone, Debug, Serialize)]
pub struct DumpState {
    pub me: String,
    pub view: u64,
    pub members: Vec<String>,
    /// Dead members whose gates are shut, and what each still needs.
    pub gates: Vec<(String, &'static str)>,
    /// Members whose part of the rebuild is missing.
    pub rebuild_waits_for: Vec<String>,
    pub suspended: bool,
    pub stop_all: bool,
    pub resources: Vec<DumpResource>,
}

#[derive(Clone, Debug, Serialize)]
pub struct DumpResource {
    pub name: String,
    /// "here", a member, "looking up" or "orphan".
    pub master: String,
    pub granted: Vec<DumpLock>,
    pub converting: Vec<DumpLock>,
    pub waiting: Vec<DumpLock>,
    /// Modes still held by dead members.
    pub ghosts: Vec<(String, Mode)>,
    /// Dead members that may hold more here than anybody knows.
    pub masked_by: Vec<String>,
    pub lvb_seq: u64,
    pub lvb_valid: bool,
    pub lvb: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct DumpLock {
    pub member: String,
    pub id: u64,
    pub granted: Option<Mode>,
    pub requested: Option<Mode>,
    pub told: Option<Mode>,
}

/// Sizes of the directory part owned here.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct DumpDir {
    pub slices: usize,
    pub entries: usize,
}

impl Core {
    pub fn dump_dir(&self) -> DumpDir {
        let slices = self.dir.slices.iter().filter(|s| s.ready).count();
        DumpDir { slices, entries: self.dir.entries.len() }
    }

    pub fn dump(&self) -> DumpState {
        let mut resources = Vec::new();
        for t in self.trees.iter().filter(|t| t.live) {
            let Some(m) = &t.master else {
                let own = |phase: bool| {
                    t.locks
                        .iter()
                        .map(|s| (*s as usize, &self.locks[*s as usize]))
                        .filter(|(_, l)| (l.phase != Phase::Idle) == phase)
                        .map(|(s, l)| DumpLock {
                            member: self.me.to_string(),
                            id: self.id_of(s).0,
                            granted: l.granted,
                            requested: l.want,
                            told: None,
                        })
                        .collect::<Vec<_>>()
                };
                let (conv, wait) = own(true).into_iter().partition(|l| l.granted.is_some());
                resources.push(DumpResource {
                    name: t.root.to_string(),
                    master: match t.know {
                        Know::At(p, _) => p.to_string(),
                        Know::Orphan => "orphan".into(),
                        _ => "looking up".into(),
                    },
                    granted: own(false),
                    converting: conv,
                    waiting: wait,
                    ghosts: Vec::new(),
                    masked_by: Vec::new(),
                    lvb_seq: 0,
                    lvb_valid: true,
                    lvb: String::new(),
                });
                continue;
            };
            for r in std::iter::once(&m.top).chain(m.below.values()) {
                let show = |q: &[crate::resource::MLock]| {
                    q.iter()
                        .map(|l| DumpLock {
                            member: l.who.to_string(),
                            id: l.id.0,
                            granted: l.granted,
                            requested: l.want,
                            told: l.told,
                        })
                        .collect()
                };
                resources.push(DumpResource {
                    name: r.name.to_string(),
                    master: "here".into(),
                    granted: show(&r.granted),
                    converting: show(&r.converting),
                    waiting: show(&r.waiting),
                    ghosts: r.ghosts.iter().map(|g| (g.who.to_string(), g.mode)).collect(),
                    masked_by: r.masks.iter().map(|(p, _)| p.to_string()).collect(),
                    lvb_seq: r.lvb_seq,
                    lvb_valid: !r.lvb_invalid,
                    lvb: r.lvb.iter().map(|b| format!("{b:02x}")).collect(),
                });
            }
        }
        resources.sort_by(|a, b| a.name.cmp(&b.name));
        DumpState {
            me: self.me.to_string(),
            view: self.view.map_or(0, |v| v.0),
            members: self.members.iter().map(|p| p.to_string()).collect(),
            gates: self
                .gates
                .iter()
                .map(|(p, fenced)| (p.to_string(), if *fenced { "journal replay" } else { "fencing" }))
                .collect(),
            rebuild_waits_for: self.sync.waiting.iter().map(|p| p.to_string()).collect(),
            suspended: self.suspended,
            stop_all: self.cfg.stop_all,
            resources,
        }
    }
}
