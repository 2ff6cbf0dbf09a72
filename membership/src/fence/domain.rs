//! The fence domain: the one place that decides who is a victim, who fences it, and when it counts as dead.
//!
//! Replicated state is a lattice, so that merging the states of a new view's members is a union and no order matters:
//! `gone` (highest life of each node that is proved dead or left cleanly) only rises and beats the rest; `members` and `victims` are
//! sets from which `gone` removes. What only concerns timing (delays, attempts, who runs an agent) is local.
//!
//! ```text
//!   domain member missing from a quorate view ──► victim ──FENCE_START──► agent runs ──FENCE_DONE (safe)──► gone, `Fenced` to all
//!      clean leave (ordered LEAVE first) ─► gone            └── FENCE_FAIL ── pause ── again, for ever
//! ```
//!
//! Invariants: only a quorate node starts an agent, and only after its own FENCE_START came back in the same view; a victim leaves the
//! set only by a proof; a life that is a victim or gone is never admitted; `Fenced` is emitted once per life at each node.

use crate::config::Dialect;
use crate::ipc::Proof;
use cairn_base::{Boottime, Incarnation, NodeId, Proc};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// First pause between two passes over the methods; grows by half each time.
const RETRY_FIRST: Duration = Duration::from_secs(5);
const RETRY_MAX: Duration = Duration::from_mins(1);

/// Agents that run at once.
const PARALLEL: usize = 4;

/// Identical failures after which the log is thinned to one line per 600.
const LOUD_FAILURES: u32 = 3;

#[derive(Clone, Debug)]
pub struct DomainConfig {
    pub me: Proc,
    /// All configured nodes, with whether they have a fence method.
    pub nodes: BTreeMap<NodeId, (String, bool)>,
    /// `None`: wait for ever.
    pub post_fail_delay: Option<Duration>,
    pub post_join_delay: Option<Duration>,
    pub clean_start: bool,
    pub skip_undefined: bool,
    /// Silence of a fencer after which the next one takes over.
    pub takeover: Duration,
}

/// Why somebody is a victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Cause {
    /// Lost without a leave.
    Failed,
    /// Configured and absent when the domain was formed; its life is unknown (incarnation 0).
    Startup,
    /// Asked for by an administrator.
    Asked,
}

/// Why a life is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    Left,
    Fenced { fencer: NodeId, proof: Proof, unix_time: u64 },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gone {
    pub incarnation: Incarnation,
    pub how: How,
}

/// Whatever may run on a node, named by the view in which somebody wanted a proof of its death. A proof of a life that was known
/// before says nothing of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unknown {
    pub wanted: u64,
    pub proved: u64,
}

/// What all members know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainState {
    /// Somebody has joined since the cluster was started cold.
    pub formed: bool,
    /// Members, and whether they were there when nobody was left to fence.
    pub members: BTreeMap<Proc, bool>,
    pub victims: BTreeMap<Proc, Cause>,
    pub gone: BTreeMap<NodeId, Gone>,
    /// Stands for the victims with incarnation 0; both numbers only rise.
    pub unknown: BTreeMap<NodeId, Unknown>,
}

impl DomainState {
    /// A quorate view has removed that life: it may take part in nothing any more.
    pub fn is_excluded(&self, p: Proc) -> bool {
        self.victims.contains_key(&p) || self.is_gone(p)
    }

    fn is_gone(&self, p: Proc) -> bool {
        if p.incarnation == Incarnation(0) {
            return self.unknown.get(&p.node).is_none_or(|u| u.proved >= u.wanted);
        }
        self.gone.get(&p.node).is_some_and(|g| g.incarnation >= p.incarnation)
    }

    /// Whatever runs on that node is a victim, by a view of this number.
    fn suspect(&mut self, node: NodeId, view: u64, cause: Cause) {
        let u = self.unknown.entry(node).or_default();
        u.wanted = u.wanted.max(view);
        if u.wanted > u.proved {
            self.victims.entry(Proc { node, incarnation: Incarnation(0) }).or_insert(cause);
        }
    }

    fn bury(&mut self, p: Proc, how: How) {
        if p.incarnation == Incarnation(0)
            && let Some(u) = self.unknown.get_mut(&p.node)
        {
            u.proved = u.wanted;
        }
        let newer = self.gone.get(&p.node).is_none_or(|g| g.incarnation < p.incarnation);
        if newer {
            self.gone.insert(p.node, Gone { incarnation: p.incarnation, how });
        }
        self.prune();
    }

    fn prune(&mut self) {
        let over: Vec<Proc> =
            self.members.keys().chain(self.victims.keys()).filter(|p| self.is_gone(**p)).copied().collect();
        for p in over {
            self.members.remove(&p);
            self.victims.remove(&p);
        }
    }

    fn absorb(&mut self, other: &Self) {
        self.formed |= other.formed;
        for (node, gone) in &other.gone {
            let mine = self.gone.get(node);
            // at equal lives a proof says more than a leave; otherwise the first in node order stays
            let better = mine.is_none_or(|m| {
                m.incarnation < gone.incarnation
                    || (m.incarnation == gone.incarnation && m.how == How::Left && gone.how != How::Left)
            });
            if better {
                self.gone.insert(*node, gone.clone());
            }
        }
        for (p, started) in &other.members {
            *self.members.entry(*p).or_default() |= started;
        }
        for (node, u) in &other.unknown {
            let mine = self.unknown.entry(*node).or_default();
            mine.wanted = mine.wanted.max(u.wanted);
            mine.proved = mine.proved.max(u.proved);
        }
        for (p, cause) in &other.victims {
            let c = self.victims.entry(*p).or_insert(*cause);
            *c = (*c).min(*cause);
        }
    }
}

/// A node's part of the synchronisation round.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainSync {
    pub state: DomainState,
    /// Victims against which an agent runs on this node right now.
    pub running: BTreeSet<Proc>,
}

/// The union of all members' parts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainMerged {
    pub state: DomainState,
    pub running: BTreeMap<Proc, NodeId>,
}

/// Pure function of the parts, given in node order. `passed_by`: lives whose state does not include what a later quorate view has
/// decided. They are victims; where nobody's state includes it, the domain forms anew, and fences whatever runs on the absent nodes.
pub fn merge<'a>(
    parts: impl Iterator<Item = (NodeId, &'a DomainSync)>,
    passed_by: &BTreeSet<Proc>,
) -> DomainMerged {
    let parts: Vec<(NodeId, &'a DomainSync)> = parts.collect();
    let mut merged = DomainMerged::default();
    let mut heirs = false;
    for (node, part) in &parts {
        merged.state.absorb(&part.state);
        heirs |= part.state.formed && !passed_by.iter().any(|p| p.node == *node);
        for victim in &part.running {
            merged.running.entry(*victim).or_insert(*node);
        }
    }
    for p in passed_by {
        if merged.state.members.contains_key(p) {
            merged.state.victims.insert(*p, Cause::Failed);
        }
    }
    if merged.state.formed && !heirs {
        merged.state.formed = false;
        for p in std::mem::take(&mut merged.state.members).into_keys() {
            merged.state.victims.insert(p, Cause::Failed);
        }
    }
    merged.state.prune();
    merged
}

/// Ordered messages between the domains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DomainMsg {
    Join(Proc),
    /// The sender leaves; from its delivery on it is no victim any more.
    Leave(Proc),
    Start {
        victim: Proc,
        attempt: u32,
        view: u64,
    },
    Done {
        victim: Proc,
        proof: Proof,
        unix_time: u64,
    },
    Fail {
        victim: Proc,
        attempt: u32,
        error: String,
    },
    /// An administrator wants this node fenced.
    Ask(Proc),
}

/// What fenced writes to the log; `text` has the historical wording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FenceLog {
    NotMember { name: String, seconds: u64, startup: bool },
    Fencing { name: String },
    Success { name: String },
    Failed { name: String, victim: Proc, error: String },
    StillRetrying { name: String },
    Deferred { to: String },
    Overridden { name: String },
    Averted { name: String },
}

impl FenceLog {
    /// The line in the wording of the dialect; `None` where that dialect says nothing.
    pub fn text(&self, dialect: Dialect) -> Option<String> {
        let q = |name: &str| if dialect == Dialect::Rhel5 { format!("\"{name}\"") } else { name.to_owned() };
        Some(match self {
            Self::NotMember { name, seconds, startup } => {
                if dialect == Dialect::Rhel6 {
                    return None;
                }
                let delay = if *startup { "post_join_delay" } else { "post_fail_delay" };
                format!("{name} not a cluster member after {seconds} sec {delay}")
            }
            Self::Fencing { name } => format!("fencing node {}", q(name)),
            Self::Success { name } => format!("fence {} success", q(name)),
            Self::Failed { name, .. } => format!("fence {} failed", q(name)),
            Self::StillRetrying { name } => format!("fencing node {} still retrying", q(name)),
            Self::Deferred { to } => format!("fencing deferred to {to}"),
            Self::Overridden { name } => {
                format!("fence {} overridden by administrator intervention", q(name))
            }
            Self::Averted { name } => format!("averting fence of node {}", q(name)),
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainAction {
    Send {
        msg: DomainMsg,
        safe: bool,
    },
    /// Run the methods against the victim; `probe`: only look whether it is dead already.
    Run {
        victim: Proc,
        probe: bool,
    },
    Fenced {
        proc: Proc,
        fencer: NodeId,
        proof: Proof,
    },
    Pending {
        proc: Proc,
    },
    Log(FenceLog),
    /// This life has been removed by a quorate view: stop.
    Excluded,
}

/// What this node knows about the work on one victim, in the present view.
#[derive(Clone, Debug, Default)]
struct Work {
    /// Not fenced before this; set when the victim was first seen.
    not_before: Boottime,
    /// Named by the last FENCE_START of this view.
    fencer: Option<NodeId>,
    /// Last sign of progress.
    since: Boottime,
    attempts: u32,
    failures: u32,
    last_error: String,
    /// My FENCE_START is on its way.
    starting: bool,
    probed: bool,
    retry_at: Boottime,
    announced: bool,
}

pub struct Domain {
    cfg: DomainConfig,
    state: DomainState,
    view: u64,
    members: BTreeSet<Proc>,
    quorate: bool,
    /// All members have recorded the present view: admissions and proofs may be ordered in it.
    recorded: bool,
    wants: bool,
    join_sent: bool,
    work: BTreeMap<Proc, Work>,
    /// Agents of this node, and whether they only probe.
    running: BTreeMap<Proc, bool>,
    running_elsewhere: BTreeMap<Proc, NodeId>,
    /// Proofs that this node has and that have not come back ordered.
    proofs: BTreeMap<Proc, (Proof, u64)>,
}

impl Domain {
    pub fn new(cfg: DomainConfig) -> Self {
        Self {
            cfg,
            state: DomainState::default(),
            view: 0,
            members: BTreeSet::new(),
            quorate: false,
            recorded: false,
            wants: true,
            join_sent: false,
            work: BTreeMap::new(),
            running: BTreeMap::new(),
            running_elsewhere: BTreeMap::new(),
            proofs: BTreeMap::new(),
        }
    }

    pub fn state(&self) -> &DomainState {
        &self.state
    }

    /// Acted on by the next [`Self::tick`].
    pub fn set_recorded(&mut self, recorded: bool) {
        self.recorded = recorded;
    }

    pub fn is_recorded(&self) -> bool {
        self.recorded
    }

    pub fn joined(&self) -> bool {
        self.state.members.contains_key(&self.cfg.me)
    }

    /// (fencer of this view, passes over the methods, last error) of a victim.
    pub fn progress(&self, victim: Proc) -> (Option<NodeId>, u32, &str) {
        self.work.get(&victim).map_or((None, 0, ""), |w| (w.fencer, w.attempts, w.last_error.as_str()))
    }

    /// Who fences by default in this view.
    pub fn master(&self) -> Option<NodeId> {
        self.candidates().first().copied()
    }

    /// My part of the synchronisation round.
    pub fn sync(&self) -> DomainSync {
        let running = self.running.iter().filter(|(_, probe)| !**probe).map(|(p, _)| *p).collect();
        DomainSync { state: self.state.clone(), running }
    }

    /// A view was installed; `merged` comes from all its members. Quorum of it is told by [`Self::quorate`] afterwards.
    pub fn view(
        &mut self,
        now: Boottime,
        view: u64,
        members: &[Proc],
        merged: DomainMerged,
        unix_time: u64,
        out: &mut Vec<DomainAction>,
    ) {
        let before = std::mem::replace(&mut self.state, merged.state);
        self.view = view;
        self.members = members.iter().copied().collect();
        // As it was when the states were exchanged: an agent of mine that has ended since is running to the others.
        let running = merged.running;
        self.running_elsewhere =
            running.iter().filter(|(_, n)| **n != self.cfg.me.node).map(|(p, n)| (*p, *n)).collect();
        self.quorate = false;
        self.recorded = false;
        self.join_sent = false;
        for work in self.work.values_mut() {
            *work = Work {
                not_before: work.not_before,
                probed: work.probed,
                failures: work.failures,
                attempts: work.attempts,
                last_error: std::mem::take(&mut work.last_error),
                announced: work.announced,
                since: now,
                ..Work::default()
            };
        }
        if self.state.is_excluded(self.cfg.me) {
            out.push(DomainAction::Excluded);
        }
        // Proofs that were ordered in views in which we were not; also for a newcomer, whose clients may be here already.
        for (node, gone) in &self.state.gone {
            let known = before.gone.get(node).is_some_and(|g| g.incarnation >= gone.incarnation);
            let proc = Proc { node: *node, incarnation: gone.incarnation };
            let here = before.members.contains_key(&proc) || before.victims.contains_key(&proc);
            match &gone.how {
                How::Fenced { fencer, proof, .. } if !known => {
                    out.push(DomainAction::Fenced { proc, fencer: *fencer, proof: proof.clone() });
                }
                // Left while we were apart: how its mounts ended was told there. That all have, its leave proves.
                How::Left if !known && here => {
                    out.push(DomainAction::Fenced { proc, fencer: *node, proof: Proof::StoppedClean });
                }
                _ => {}
            }
        }
        // a later life of a node answers for its earlier ones: it has conquered their run directory
        let candidates: BTreeSet<Proc> =
            self.state.members.keys().chain(self.state.victims.keys()).copied().collect();
        for old in candidates {
            let heir = self.members.iter().find(|m| m.node == old.node && m.incarnation > old.incarnation);
            if let Some(heir) = heir
                && !running.contains_key(&old)
            {
                let was_victim = self.state.victims.contains_key(&old);
                let proof = Proof::Rejoined(heir.incarnation);
                self.apply_done(old, heir.node, proof, unix_time, out);
                if was_victim {
                    out.push(DomainAction::Log(FenceLog::Averted { name: self.name(old.node) }));
                }
            }
        }
        self.settle();
    }

    /// Quorum of the present view, now.
    pub fn quorate(&mut self, now: Boottime, quorate: bool, out: &mut Vec<DomainAction>) {
        self.quorate = quorate;
        self.tick(now, out);
    }

    pub fn leave(&mut self, out: &mut Vec<DomainAction>) {
        self.wants = false;
        if self.joined() {
            out.push(DomainAction::Send { msg: DomainMsg::Leave(self.cfg.me), safe: true });
        }
    }

    /// An ordered message, delivered.
    pub fn message(&mut self, now: Boottime, from: Proc, msg: DomainMsg, out: &mut Vec<DomainAction>) {
        match msg {
            DomainMsg::Join(p) => self.on_join(p, from),
            DomainMsg::Leave(p) => {
                if p == from && !self.state.is_gone(p) {
                    self.state.bury(p, How::Left);
                }
            }
            DomainMsg::Start { victim, attempt, view } => {
                if view == self.view && !self.state.is_gone(victim) {
                    self.on_start(now, victim, attempt, from, out);
                }
            }
            DomainMsg::Done { victim, proof, unix_time } => {
                self.proofs.remove(&victim);
                // a victim that is back in the view is told to stop and fenced when it is out again
                if !self.members.contains(&victim) {
                    let overridden = matches!(proof, Proof::Override { .. });
                    let news = self.apply_done(victim, from.node, proof, unix_time, out);
                    if news && overridden {
                        out.push(DomainAction::Log(FenceLog::Overridden { name: self.name(victim.node) }));
                    }
                }
            }
            DomainMsg::Fail { victim, attempt, error } => {
                // Its agent was running when the view was formed, and is not any more.
                self.running_elsewhere.retain(|v, by| *v != victim || *by != from.node);
                if let Some(work) = self.work.get_mut(&victim) {
                    work.since = now;
                    work.attempts = work.attempts.max(attempt);
                    work.last_error = error;
                    // As it forgets itself: all must take the same one to be next.
                    if work.fencer == Some(from.node) {
                        work.fencer = None;
                    }
                }
            }
            DomainMsg::Ask(p) => {
                if p.incarnation == Incarnation(0) {
                    self.state.suspect(p.node, self.view, Cause::Asked);
                } else if !self.state.is_gone(p) && !self.members.contains(&p) {
                    self.state.victims.entry(p).or_insert(Cause::Asked);
                }
            }
        }
        self.settle();
        self.tick(now, out);
    }

    /// An agent of this node has ended.
    pub fn agent_done(
        &mut self,
        now: Boottime,
        victim: Proc,
        result: Result<Proof, String>,
        unix_time: u64,
        out: &mut Vec<DomainAction>,
    ) {
        let probe = self.running.remove(&victim).unwrap_or(false);
        match result {
            Ok(proof) => {
                if !probe {
                    out.push(DomainAction::Log(FenceLog::Success { name: self.name(victim.node) }));
                }
                // told by `tick` as soon as the view is quorate, and again in each view until it comes back
                self.proofs.insert(victim, (proof, unix_time));
            }
            Err(_) if probe => {}
            Err(error) => {
                let name = self.name(victim.node);
                let work = self.work.entry(victim).or_default();
                work.failures += 1;
                work.retry_at = now + backoff(work.failures);
                let same = work.last_error == error;
                work.last_error.clone_from(&error);
                if work.failures <= LOUD_FAILURES || !same {
                    out.push(DomainAction::Log(FenceLog::Failed { name, victim, error: error.clone() }));
                } else if work.failures.is_multiple_of(600) {
                    out.push(DomainAction::Log(FenceLog::StillRetrying { name }));
                }
                let attempt = work.attempts;
                work.fencer = None;
                out.push(DomainAction::Send { msg: DomainMsg::Fail { victim, attempt, error }, safe: false });
            }
        }
        self.tick(now, out);
    }

    /// Everything that depends on time and on what has changed.
    pub fn tick(&mut self, now: Boottime, out: &mut Vec<DomainAction>) {
        if !self.quorate {
            return;
        }
        let missing: Vec<Proc> =
            self.state.members.keys().filter(|p| !self.members.contains(p)).copied().collect();
        for p in missing {
            self.state.victims.entry(p).or_insert(Cause::Failed);
        }
        let blocked = self.state.victims.keys().any(|v| v.node == self.cfg.me.node);
        if self.wants
            && self.recorded
            && !self.joined()
            && !self.join_sent
            && !blocked
            && !self.state.is_gone(self.cfg.me)
        {
            self.join_sent = true;
            out.push(DomainAction::Send { msg: DomainMsg::Join(self.cfg.me), safe: true });
        }
        self.work.retain(|v, _| self.state.victims.contains_key(v));
        self.proofs.retain(|v, _| self.state.victims.contains_key(v));
        let victims: Vec<(Proc, Cause)> = self.state.victims.iter().map(|(p, c)| (*p, *c)).collect();
        for (victim, cause) in victims {
            self.tick_victim(now, victim, cause, out);
        }
    }

    fn tick_victim(&mut self, now: Boottime, victim: Proc, cause: Cause, out: &mut Vec<DomainAction>) {
        let delay = match cause {
            Cause::Failed => self.cfg.post_fail_delay,
            Cause::Startup => self.cfg.post_join_delay,
            Cause::Asked => Some(Duration::ZERO),
        };
        let work = self.work.entry(victim).or_insert_with(|| Work {
            not_before: delay.map_or(Boottime::MAX, |d| now + d),
            since: now,
            ..Work::default()
        });
        if !work.announced {
            work.announced = true;
            out.push(DomainAction::Pending { proc: victim });
        }
        // still there: it was told to stop and is on its way out
        if self.members.contains(&victim) || !self.joined() {
            return;
        }
        if let Some((proof, unix_time)) = self.proofs.get(&victim) {
            // proved in an earlier view, and not ordered there
            let msg = DomainMsg::Done { victim, proof: proof.clone(), unix_time: *unix_time };
            let work = self.work.get_mut(&victim).expect("entered above");
            if self.recorded && !work.starting {
                work.starting = true;
                out.push(DomainAction::Send { msg, safe: true });
            }
            return;
        }
        if self.runs(victim) {
            return;
        }
        let fencer = self.fencer(now, victim);
        if fencer != Some(self.cfg.me.node) {
            return;
        }
        let work = self.work.get_mut(&victim).expect("entered above");
        if cause == Cause::Startup && !work.probed && !self.running.contains_key(&victim) {
            work.probed = true;
            self.running.insert(victim, true);
            out.push(DomainAction::Run { victim, probe: true });
            return;
        }
        let ready = now >= work.not_before && now >= work.retry_at && !work.starting;
        if ready && !self.running.contains_key(&victim) && self.running.len() < PARALLEL {
            let work = self.work.get_mut(&victim).expect("entered above");
            work.starting = true;
            work.attempts += 1;
            let attempt = work.attempts;
            out.push(DomainAction::Send {
                msg: DomainMsg::Start { victim, attempt, view: self.view },
                safe: false,
            });
        }
    }

    /// When [`Self::tick`] has something to do by time alone, after `now`.
    pub fn next_deadline(&self, now: Boottime) -> Boottime {
        if !self.quorate {
            return Boottime::MAX;
        }
        self.work
            .values()
            .flat_map(|w| {
                let turns = u32::try_from(self.silence(now, w) + 1).unwrap_or(u32::MAX);
                [w.not_before, w.retry_at, Self::due(now, w) + self.cfg.takeover.saturating_mul(turns)]
            })
            .filter(|t| *t > now)
            .min()
            .unwrap_or(Boottime::MAX)
    }

    /// The victims of that node, for a person's acknowledgement.
    pub fn victims_of(&self, node: NodeId) -> Vec<Proc> {
        self.state.victims.keys().filter(|v| v.node == node).copied().collect()
    }

    fn runs(&self, victim: Proc) -> bool {
        self.running.get(&victim) == Some(&false)
    }

    fn name(&self, node: NodeId) -> String {
        self.cfg.nodes.get(&node).map_or_else(|| format!("node {node}"), |(n, _)| n.clone())
    }

    /// Members of the domain in this view: those that completed a start first, then by id.
    fn candidates(&self) -> Vec<NodeId> {
        let mut all: Vec<(bool, NodeId)> = self
            .state
            .members
            .iter()
            .filter(|(p, _)| self.members.contains(p) && !self.state.victims.contains_key(p))
            .map(|(p, started)| (!started, p.node))
            .collect();
        all.sort_unstable();
        all.into_iter().map(|(_, n)| n).collect()
    }

    /// Who is to fence the victim now. After silence of the one in charge the next candidates take over, one after the other.
    fn fencer(&self, now: Boottime, victim: Proc) -> Option<NodeId> {
        let candidates = self.candidates();
        let work = self.work.get(&victim)?;
        let busy = self.running_elsewhere.get(&victim).copied().filter(|n| candidates.contains(n));
        let first =
            work.fencer.filter(|n| candidates.contains(n)).or(busy).or(candidates.first().copied())?;
        let silent = self.silence(now, work);
        if silent == 0 {
            return Some(first);
        }
        // Round and round: whom each node takes for the first may differ, and a turn passes unused while there is no quorum.
        let others = candidates.iter().copied().filter(|n| *n != first);
        let order: Vec<NodeId> = std::iter::once(first).chain(others).collect();
        Some(order[(silent % order.len() as u128) as usize])
    }

    /// How many takeover times nothing has been heard of work that is due.
    fn silence(&self, now: Boottime, work: &Work) -> u128 {
        now.since(Self::due(now, work)).as_nanos() / self.cfg.takeover.as_nanos().max(1)
    }

    fn due(now: Boottime, work: &Work) -> Boottime {
        work.since.max(if work.not_before == Boottime::MAX { now } else { work.not_before })
    }

    fn on_join(&mut self, p: Proc, from: Proc) {
        let held = self.state.victims.keys().any(|v| v.node == p.node);
        if p != from || !self.members.contains(&p) || self.state.is_gone(p) {
            return;
        }
        if !self.state.formed {
            self.state.formed = true;
            if !self.cfg.clean_start {
                for (node, (_, has_methods)) in &self.cfg.nodes {
                    let absent = !self.members.iter().any(|m| m.node == *node);
                    if absent && (*has_methods || !self.cfg.skip_undefined) {
                        self.state.suspect(*node, self.view, Cause::Startup);
                    }
                }
            }
        }
        if held {
            // not before the proof of its earlier life; it asks again then
            return;
        }
        self.state.members.entry(p).or_insert(false);
    }

    fn on_start(
        &mut self,
        now: Boottime,
        victim: Proc,
        attempt: u32,
        from: Proc,
        out: &mut Vec<DomainAction>,
    ) {
        if self.members.contains(&victim) {
            return;
        }
        self.state.victims.entry(victim).or_insert(Cause::Failed);
        let startup = self.state.victims[&victim] == Cause::Startup;
        let name = self.name(victim.node);
        let from_name = self.name(from.node);
        let me = from == self.cfg.me;
        let runs = self.running.contains_key(&victim);
        let work = self.work.entry(victim).or_insert_with(|| Work { since: now, ..Work::default() });
        let first = work.attempts <= 1 && attempt <= 1;
        work.since = now;
        work.attempts = work.attempts.max(attempt);
        let deferred = work.fencer != Some(from.node);
        work.fencer = Some(from.node);
        work.announced = true;
        if !me {
            if deferred {
                out.push(DomainAction::Log(FenceLog::Deferred { to: from_name }));
            }
            return;
        }
        work.starting = false;
        // checked again after the order is known: quorum may be gone by now
        if !self.quorate || runs || !self.joined() {
            return;
        }
        if first {
            let delay = if startup { self.cfg.post_join_delay } else { self.cfg.post_fail_delay };
            let seconds = delay.map_or(0, |d| d.as_secs());
            out.push(DomainAction::Log(FenceLog::NotMember { name: name.clone(), seconds, startup }));
        }
        out.push(DomainAction::Log(FenceLog::Fencing { name }));
        self.running.insert(victim, false);
        out.push(DomainAction::Run { victim, probe: false });
    }

    /// Applies a proof; true when it was news.
    fn apply_done(
        &mut self,
        victim: Proc,
        fencer: NodeId,
        proof: Proof,
        unix_time: u64,
        out: &mut Vec<DomainAction>,
    ) -> bool {
        let known = self.state.is_gone(victim) && !self.state.victims.contains_key(&victim);
        if known {
            return false;
        }
        let how = How::Fenced { fencer, proof: proof.clone(), unix_time };
        self.state.bury(victim, how);
        self.state.victims.remove(&victim);
        self.state.members.remove(&victim);
        self.work.remove(&victim);
        self.join_sent = false;
        out.push(DomainAction::Fenced { proc: victim, fencer, proof });
        true
    }

    /// Members that are here while nobody is left to fence have completed a start.
    fn settle(&mut self) {
        if self.state.victims.is_empty() {
            for (p, started) in &mut self.state.members {
                *started |= self.members.contains(p);
            }
        }
    }
}

fn backoff(failures: u32) -> Duration {
    let factor = 1.5f64.powi(failures.saturating_sub(1).min(20) as i32);
    RETRY_FIRST.mul_f64(factor).min(RETRY_MAX)
}

#[cfg(test)]
mod tests;
