//! The node's decisions above process groups: quorum, the fence domain, the permit to write, self-stop. Sans-I/O.
//!
//! It stands between `Groups` (ordered events), the quorum disk (leases, evictions) and the driver, which carries out
//! [`NodeAction`]s in the order given. One replicated state, exchanged in each synchronisation round: what is expected, what a
//! shrinking cluster agreed on, and the fence domain.
//!
//! Rules of self-stop that are decided here: SS1 (view not quorate: no permit), SS2 (no token: the permit runs out by
//! itself), SS3 (disk not renewed), SS4 (killed), SS5 (a quorate view went on without this life).

mod agree;
mod asks;
mod chain;
mod standing;
mod status;
mod told;

use crate::config::{Config, Dialect};
use crate::event::{GroupsEvent, How, RingId, View};
use crate::fence::domain::{self, Domain, DomainAction, DomainConfig, DomainMsg, FenceLog};
use crate::ipc::{ClusterEvent, Departure, Proof, QuorumWhy, Scope, StopWhy, ViewInfo, ViewMember};
use crate::quorum::{self, Electorate, Quorum, Standing};
pub use agree::merge;
use agree::{NodeMerged, NodeMsg, NodeSync, send};
use bytes::Bytes;
use cairn_base::{Boottime, Incarnation, NodeId, Proc, ViewId};
use chain::{Chain, Step};
use qdisk::event::{QdiskCommand, QdiskEvent, RingView};
use qdisk::{DiskState, ViewName};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use told::{Told, group_message, group_view};

/// Service number of the node core in the ordered messages between daemons.
pub const SERVICE: u8 = 1;

/// Records of mounts that ended, kept for re-sending after a merge.
const MOUNTS_REMEMBERED: usize = 1024;

/// What the driver must do, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum NodeAction {
    /// Ordered message to all node cores.
    Service {
        safe: bool,
        data: Bytes,
    },
    /// Answer to the ring's `SyncWanted`.
    SyncState {
        ring: RingId,
        data: Bytes,
    },
    HintDead(Proc),
    RunAgent {
        victim: Proc,
        probe: bool,
    },
    /// To every subscriber.
    Event(ClusterEvent),
    /// To these clients of the node.
    ToClients {
        clients: Vec<u32>,
        event: ClusterEvent,
    },
    Disk(QdiskCommand),
    /// Into this node's file, durably; answered by [`NodeCore::view_recorded`].
    RecordView(ViewName),
    /// The node is in the fence domain, and its view is recorded: groups that write may be joined.
    Admitted,
    /// My leave of the domain has been delivered.
    LeftDomain,
    /// Stop all mounts, prove it, and end this life.
    Stop(StopWhy),
    Log {
        program: Program,
        text: String,
    },
    Record(Record),
}

/// Whose historical log prefix a line carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Cman,
    Fenced,
}

/// A state change for `events.jsonl`; names are those of `cairn_base::events`.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    View { view: ViewId, members: Vec<NodeId>, quorate: bool },
    NodeLost(Proc),
    Evicted(NodeId),
    FenceStart(Proc),
    FenceDone { proc: Proc, scope: Scope, proof: Proof },
    FenceFailed { proc: Proc, error: String },
    PermitLost(StopWhy),
}

/// A lease of the device votes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lease {
    view: ViewName,
    until: Boottime,
}

#[derive(Clone, Debug)]
struct Current {
    id: RingId,
    members: Vec<crate::event::Member>,
}

pub struct NodeCore {
    me: Proc,
    config: Arc<Config>,
    electorate: Electorate,
    domain: Domain,
    chain: Chain,
    told: Told,
    view: Option<Current>,
    expected: u32,
    effective: u32,
    all_seen: bool,
    lease: Option<Lease>,
    master: Option<Proc>,
    renewed_at: Option<Boottime>,
    disk_ready: bool,
    disk_state: DiskState,
    evicted: BTreeSet<Proc>,
    shrink_sent: BTreeSet<Proc>,
    quorum: Quorum,
    permit: bool,
    was_admitted: bool,
    stopping: Option<StopWhy>,
    leaving: bool,
    mounts_gone: BTreeMap<(Proc, u32), String>,
    /// Mounts whose groups have lost them and whose end is not proved, on nodes that are here: victims as nodes are.
    mounts_dying: BTreeMap<(Proc, u32), String>,
    /// For the status: ring sequence and wall time at which each member joined.
    joined: BTreeMap<NodeId, (u64, u64, Incarnation)>,
    last_token: Boottime,
    sabotage: Sabotage,
}

/// Rules taken away on purpose, so that a simulation can show that it notices.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sabotage {
    /// One vote less than half and one is enough.
    pub quorum_off_by_one: bool,
    /// The device votes count for everybody whose disk can be renewed, without a lease.
    pub votes_without_lease: bool,
    /// A lease counts in every view, not only in the one it was granted to.
    pub lease_of_any_view: bool,
    /// A permit once given does not end with the token, the disk or the lease.
    pub permit_for_ever: bool,
    /// The domain is told that every view is quorate.
    pub fence_without_quorum: bool,
    /// Nobody knows of a recorded view that it was not in.
    pub passed_by_goes_on: bool,
}

fn name_of(id: RingId) -> ViewName {
    ViewName { seq: id.seq, rep: id.rep, rep_incarnation: id.rep_incarnation }
}

fn seconds(s: i64) -> Option<Duration> {
    u64::try_from(s).ok().map(Duration::from_secs)
}

impl NodeCore {
    pub fn new(me: Proc, config: Arc<Config>) -> Self {
        let votes: Vec<u32> = config.nodes.iter().map(|n| u32::from(n.votes)).collect();
        let electorate = Electorate {
            node_votes: votes.iter().sum(),
            device_votes: config.device_votes(),
            smallest: votes.into_iter().filter(|&v| v > 0).min().unwrap_or(0),
            two_node: config.two_node,
            shrinks: config.dialect == Dialect::Rhel5,
        };
        let expected = quorum::expected(&electorate, config.expected_votes.unwrap_or(0));
        let fd = &config.fence_daemon;
        let passes =
            config.nodes.iter().map(|n| n.methods.iter().map(|m| m.devices.len()).sum::<usize>()).max();
        let domain = Domain::new(DomainConfig {
            me,
            nodes: config
                .nodes
                .iter()
                .map(|n| (NodeId(n.id), (n.name.clone(), !n.methods.is_empty())))
                .collect(),
            post_fail_delay: seconds(fd.post_fail_delay),
            post_join_delay: seconds(fd.post_join_delay),
            clean_start: fd.clean_start,
            skip_undefined: fd.skip_undefined,
            // a pass over all methods, a pause, and as much again
            takeover: 2
                * (Duration::from_millis(fd.agent_limit_ms) * passes.unwrap_or(1).max(1) as u32
                    + Duration::from_mins(1)),
        });
        Self {
            me,
            electorate,
            domain,
            chain: Chain::default(),
            told: Told::default(),
            view: None,
            expected,
            effective: expected,
            all_seen: false,
            lease: None,
            master: None,
            renewed_at: None,
            disk_ready: false,
            disk_state: DiskState::Ok,
            evicted: BTreeSet::new(),
            shrink_sent: BTreeSet::new(),
            quorum: Quorum { needed: expected / 2 + 1, have: 0, quorate: false },
            permit: false,
            was_admitted: false,
            stopping: None,
            leaving: false,
            mounts_gone: BTreeMap::new(),
            mounts_dying: BTreeMap::new(),
            joined: BTreeMap::new(),
            last_token: Boottime::ZERO,
            sabotage: Sabotage::default(),
            config,
        }
    }

    /// The last view that an earlier life of this node has recorded.
    pub fn set_last_view(&mut self, last: ViewName) {
        self.chain.start(last);
    }

    /// For simulations only.
    pub fn set_sabotage(&mut self, sabotage: Sabotage) {
        self.sabotage = sabotage;
    }

    /// An ordered event of the process groups.
    pub fn groups_event(&mut self, now: Boottime, unix: u64, event: GroupsEvent, out: &mut Vec<NodeAction>) {
        match event {
            GroupsEvent::Transitional { .. } => self.ring_broken(out),
            GroupsEvent::SyncWanted { ring, .. } => {
                let data = postcard::to_stdvec(&self.sync()).unwrap_or_default();
                out.push(NodeAction::SyncState { ring, data: data.into() });
            }
            GroupsEvent::View { view, state } => self.on_view(now, unix, view, &state, out),
            GroupsEvent::GroupView { local, view } => {
                self.told.event(local, group_view(view), self.standing(), out);
            }
            GroupsEvent::GroupMessage { local, message } => {
                self.told.event(local, group_message(message), self.standing(), out);
            }
            GroupsEvent::Service { service: SERVICE, from, data, .. } => {
                // an ordered message that does not decode comes from another version; all ignore it alike
                if let Ok(msg) = postcard::from_bytes(&data) {
                    self.on_message(now, from.proc(), msg, out);
                }
            }
            GroupsEvent::SyncMismatch { stop: true, .. } => self.stop(StopWhy::Stuck, out),
            GroupsEvent::Service { .. }
            | GroupsEvent::SyncMismatch { .. }
            | GroupsEvent::Writable { .. }
            | GroupsEvent::Blocked
            | GroupsEvent::Unblocked
            | GroupsEvent::Stopped => {}
        }
    }

    /// The ring left OPERATIONAL: nothing new is counted for its view.
    pub fn ring_broken(&mut self, out: &mut Vec<NodeAction>) {
        self.chain.broken();
        self.domain.set_recorded(false);
        self.was_admitted = false;
        if self.config.quorumd.is_some() {
            out.push(NodeAction::Disk(QdiskCommand::View(None)));
        }
    }

    fn sync(&self) -> NodeSync {
        NodeSync {
            past: self.view.as_ref().map_or_else(RingId::default, |v| v.id),
            expected: self.expected,
            effective: self.effective,
            all_seen: self.all_seen,
            config_version: self.config.version,
            domain: self.domain.sync(),
            dying: self
                .mounts_dying
                .iter()
                .filter(|((p, _), _)| *p == self.me)
                .map(|((_, c), fs)| (*c, fs.clone()))
                .collect(),
            last: if self.sabotage.passed_by_goes_on { ViewName::NONE } else { self.chain.last() },
            included: self.chain.included(),
        }
    }

    fn on_view(&mut self, now: Boottime, unix: u64, view: View, state: &[u8], out: &mut Vec<NodeAction>) {
        let merged: NodeMerged = match postcard::from_bytes(state) {
            Ok(merged) => merged,
            Err(_) => return self.stop(StopWhy::Stuck, out),
        };
        let members: Vec<Proc> = view.members.iter().map(|m| m.proc()).collect();
        self.expected =
            quorum::expected(&self.electorate, merged.expected.max(self.config.expected_votes.unwrap_or(0)));
        self.effective = if merged.same_past { merged.effective.min(self.expected) } else { self.expected };
        let present: BTreeSet<NodeId> = members.iter().map(|p| p.node).collect();
        self.all_seen = merged.all_seen || self.config.nodes.iter().all(|n| present.contains(&NodeId(n.id)));
        self.evicted.retain(|p| !members.iter().any(|m| m.node == p.node && m.incarnation >= p.incarnation));
        self.shrink_sent.clear();
        // Each node speaks for its own; those of a node that is gone end with it.
        self.mounts_dying = merged.dying;
        self.chain.view(name_of(view.id), &members, merged.last, &merged.included);
        self.was_admitted = false;
        send(&NodeMsg::Installed(name_of(view.id)), true, out);
        for m in &members {
            let entry = self.joined.entry(m.node).or_insert((0, 0, Incarnation(0)));
            if entry.2 != m.incarnation || view.joined.iter().any(|j| j.proc() == *m) {
                *entry = (view.seq, unix, m.incarnation);
            }
        }
        self.view = Some(Current { id: view.id, members: view.members.to_vec() });
        if self.config.quorumd.is_some() {
            let ring_view = RingView { name: name_of(view.id), members: members.clone() };
            out.push(NodeAction::Disk(QdiskCommand::RingSeq(view.seq)));
            out.push(NodeAction::Disk(QdiskCommand::View(Some(ring_view))));
        }
        let known = &merged.domain.state;
        let left: Vec<(Proc, Departure)> = view
            .left
            .iter()
            .map(|l| {
                let p = l.member.proc();
                let fenced = known.gone.get(&p.node).is_some_and(|g| {
                    g.incarnation == p.incarnation && matches!(g.how, domain::How::Fenced { .. })
                });
                let matters = known.members.contains_key(&p) || known.victims.contains_key(&p) || fenced;
                let how = match l.how {
                    How::Restarted(inc) => Departure::Restarted(inc),
                    _ if matters => Departure::Failed,
                    _ => Departure::Clean,
                };
                (p, how)
            })
            .collect();
        for l in view.left.iter().filter(|l| matches!(l.how, How::Clean | How::Removed)) {
            // It said goodbye to the disk before the ring. Who is only no loss (it was never admitted) may go on counting a lease.
            out.push(NodeAction::Disk(QdiskCommand::Gone(l.member.proc())));
        }
        for (p, _) in left.iter().filter(|(_, how)| *how != Departure::Clean) {
            out.push(NodeAction::Record(Record::NodeLost(*p)));
        }
        let before = self.quorum;
        self.quorum = self.evaluate(now);
        let info = ViewInfo {
            id: ViewId(view.seq),
            members: view
                .members
                .iter()
                .map(|m| ViewMember {
                    node: m.node,
                    incarnation: m.incarnation,
                    votes: u32::from(m.votes),
                    name: self.config.name_of(m.node.0),
                })
                .collect(),
            joined: view.joined.iter().map(|m| m.proc()).collect(),
            left,
            quorate: self.quorum.quorate,
        };
        out.push(NodeAction::Record(Record::View {
            view: info.id,
            members: members.iter().map(|p| p.node).collect(),
            quorate: self.quorum.quorate,
        }));
        out.push(NodeAction::Event(ClusterEvent::View(info)));
        let quorate = self.quorum.quorate;
        if !quorate {
            self.tell_quorum(QuorumWhy::View, out);
        }
        self.log_quorum(before.quorate, out);
        let mut acts = Vec::new();
        self.domain.view(now, view.seq, &members, merged.domain, unix, &mut acts);
        self.domain.quorate(now, self.may_fence(quorate), &mut acts);
        self.domain_actions(acts, out);
        if merged.passed_by.contains(&self.me) {
            self.stop(StopWhy::Excluded, out);
        }
        if merged.outdated.contains(&self.me.node) {
            let text =
                "Activity suspended on this node: its configuration is older than the cluster's".to_owned();
            out.push(NodeAction::Log { program: Program::Cman, text });
            self.stop(StopWhy::Excluded, out);
        }
        if !view.joined.is_empty() {
            // the newcomers may come from where our earlier messages did not reach
            let mine: Vec<(u32, String)> = self
                .mounts_gone
                .iter()
                .filter(|((p, _), _)| *p == self.me)
                .map(|((_, client), fs)| (*client, fs.clone()))
                .collect();
            for (client, fs) in mine {
                send(&NodeMsg::MountGone { client, fs }, true, out);
            }
        }
        if self.config.quorumd.is_some() {
            out.push(NodeAction::Disk(QdiskCommand::Quorate(quorate)));
        }
        self.tick(now, out);
    }

    fn on_message(&mut self, now: Boottime, from: Proc, msg: NodeMsg, out: &mut Vec<NodeAction>) {
        match msg {
            NodeMsg::Domain(msg) => {
                let my_leave = msg == DomainMsg::Leave(self.me);
                let mut acts = Vec::new();
                self.domain.message(now, from, msg, &mut acts);
                self.domain_actions(acts, out);
                if my_leave {
                    out.push(NodeAction::LeftDomain);
                }
            }
            NodeMsg::Installed(view) => self.chain.installed(from, view),
            NodeMsg::Recorded(view) => self.chain.recorded(from, view),
            NodeMsg::Shrink(p) => {
                let here = self.view.as_ref().is_some_and(|v| v.members.iter().any(|m| m.proc() == p));
                if self.electorate.shrinks && !here {
                    self.effective = (self.voters() + self.electorate.device_votes).min(self.expected);
                    self.refresh(now, QuorumWhy::Shrink, out);
                }
            }
            NodeMsg::Expected(votes) => {
                self.expected = quorum::expected(&self.electorate, votes);
                self.effective = self.effective.min(self.expected);
                self.refresh(now, QuorumWhy::Expected, out);
            }
            NodeMsg::Kill(p) if p == self.me => {
                let text = format!(
                    "cman killed by node {} because we were killed by cman_tool or other application",
                    from.node
                );
                out.push(NodeAction::Log { program: Program::Cman, text });
                self.stop(StopWhy::Killed, out);
            }
            NodeMsg::Kill(p) => out.push(NodeAction::HintDead(p)),
            // its node's proof has answered for it
            NodeMsg::MountDying { .. } | NodeMsg::MountGone { .. } if self.is_proved(from) => {}
            NodeMsg::MountDying { client, fs } => {
                if !self.mounts_gone.contains_key(&(from, client)) {
                    let scope = Scope::Mount { client, fs: fs.clone() };
                    self.mounts_dying.insert((from, client), fs);
                    out.push(NodeAction::Event(ClusterEvent::FencePending { proc: from, scope }));
                }
            }
            NodeMsg::MountGone { client, fs } => {
                self.mounts_dying.remove(&(from, client));
                if self.mounts_gone.insert((from, client), fs.clone()).is_none() {
                    let scope = Scope::Mount { client, fs };
                    let view = ViewId(self.view.as_ref().map_or(0, |v| v.id.seq));
                    out.push(NodeAction::Record(Record::FenceDone {
                        proc: from,
                        scope: scope.clone(),
                        proof: Proof::Exited,
                    }));
                    let event = ClusterEvent::Fenced { proc: from, scope, proof: Proof::Exited, view };
                    self.told.fenced(event, out);
                }
                while self.mounts_gone.len() > MOUNTS_REMEMBERED {
                    self.mounts_gone.pop_first();
                }
            }
        }
        self.tick(now, out);
    }

    /// That life of a node is proved dead; it may be back as a ghost, and tell what it knows.
    fn is_proved(&self, p: Proc) -> bool {
        let gone = self.domain.state().gone.get(&p.node).filter(|g| g.incarnation >= p.incarnation);
        gone.is_some_and(|g| matches!(g.how, domain::How::Fenced { .. }))
    }

    fn domain_actions(&mut self, acts: Vec<DomainAction>, out: &mut Vec<NodeAction>) {
        let view = ViewId(self.view.as_ref().map_or(0, |v| v.id.seq));
        for act in acts {
            match act {
                DomainAction::Send { msg, safe } => send(&NodeMsg::Domain(msg), safe, out),
                DomainAction::Run { victim, probe } => {
                    if !probe {
                        out.push(NodeAction::Record(Record::FenceStart(victim)));
                    }
                    out.push(NodeAction::RunAgent { victim, probe });
                }
                DomainAction::Fenced { proc, proof, .. } => {
                    self.mounts_gone
                        .retain(|(p, _), _| p.node != proc.node || p.incarnation > proc.incarnation);
                    self.mounts_dying
                        .retain(|(p, _), _| p.node != proc.node || p.incarnation > proc.incarnation);
                    if self.config.quorumd.is_some() && proc.incarnation != Incarnation(0) {
                        out.push(NodeAction::Disk(QdiskCommand::Gone(proc)));
                    }
                    out.push(NodeAction::Record(Record::FenceDone {
                        proc,
                        scope: Scope::Node,
                        proof: proof.clone(),
                    }));
                    let event = ClusterEvent::Fenced { proc, scope: Scope::Node, proof, view };
                    self.told.fenced(event, out);
                }
                DomainAction::Pending { proc } => {
                    out.push(NodeAction::Event(ClusterEvent::FencePending { proc, scope: Scope::Node }));
                }
                DomainAction::Log(line) => {
                    if let FenceLog::Failed { victim, error, .. } = &line {
                        let (proc, error) = (*victim, error.clone());
                        out.push(NodeAction::Record(Record::FenceFailed { proc, error }));
                    }
                    if let Some(text) = line.text(self.config.dialect) {
                        out.push(NodeAction::Log { program: Program::Fenced, text });
                    }
                }
                DomainAction::Excluded => self.stop(StopWhy::Excluded, out),
            }
        }
        self.admit(out);
    }

    fn admit(&mut self, out: &mut Vec<NodeAction>) {
        let admitted = self.may_join();
        if admitted && !self.was_admitted {
            out.push(NodeAction::Admitted);
        }
        self.was_admitted = admitted;
    }

    /// Records the present view, step by step; then the domain may decide.
    fn record(&mut self, now: Boottime, out: &mut Vec<NodeAction>) {
        let quorate = self.quorum.quorate && self.stopping.is_none();
        let by_device = quorate && !self.quorate_without_device();
        if quorate && self.chain.is_overtaken() && !self.sabotage.passed_by_goes_on {
            // the next life's ring begins above what the disk remembers
            return self.stop(StopWhy::Excluded, out);
        }
        match self.chain.step(quorate, by_device) {
            Some(Step::Record(view)) => {
                if self.config.quorumd.is_some() {
                    out.push(NodeAction::Disk(QdiskCommand::Record(view)));
                }
                out.push(NodeAction::RecordView(view));
            }
            Some(Step::Say(view)) => send(&NodeMsg::Recorded(view), true, out),
            None => {}
        }
        if self.chain.is_recorded() && !self.domain.is_recorded() {
            self.domain.set_recorded(true);
            if self.quorum.quorate {
                self.tell_quorum(QuorumWhy::View, out);
            }
            let mut acts = Vec::new();
            self.domain.tick(now, &mut acts);
            self.domain_actions(acts, out);
        }
    }

    /// This view is in the file.
    pub fn view_recorded(&mut self, now: Boottime, view: ViewName, out: &mut Vec<NodeAction>) {
        self.chain.in_file(view);
        self.tick(now, out);
    }

    /// A view is on the disk in which something may have been decided. Who has state that does not include it was passed by.
    fn view_shown(&mut self, view: ViewName, out: &mut Vec<NodeAction>) {
        if self.sabotage.passed_by_goes_on || self.chain.shown(view) {
            return;
        }
        if self.domain.state().formed {
            self.stop(StopWhy::Excluded, out);
        } else {
            self.chain.is_fresh_for(view);
        }
    }

    /// This life ends. Told once; the permit goes first.
    pub fn stop(&mut self, why: StopWhy, out: &mut Vec<NodeAction>) {
        if self.stopping.is_none() {
            self.stopping = Some(why);
            out.push(NodeAction::Stop(why));
        }
    }

    /// An agent of this node has ended.
    pub fn agent_done(
        &mut self,
        now: Boottime,
        unix: u64,
        victim: Proc,
        result: Result<Proof, String>,
        out: &mut Vec<NodeAction>,
    ) {
        let mut acts = Vec::new();
        self.domain.agent_done(now, victim, result, unix, &mut acts);
        self.domain_actions(acts, out);
    }

    /// News from the quorum disk.
    pub fn disk_event(&mut self, now: Boottime, event: QdiskEvent, out: &mut Vec<NodeAction>) {
        match event {
            QdiskEvent::Initialized => self.disk_ready = true,
            QdiskEvent::Recorded(view) => self.chain.on_disk(view),
            QdiskEvent::LastView(view) => self.view_shown(view, out),
            QdiskEvent::Renewed { at } => self.renewed_at = Some(at),
            QdiskEvent::Votes { view, until } => {
                let held = self.held(now);
                self.lease = Some(Lease { view, until });
                if !held {
                    self.device_event(now, out);
                }
            }
            QdiskEvent::VotesLost { .. } => {
                self.lease = None;
                self.device_event(now, out);
            }
            QdiskEvent::Disk(state) => self.disk_state = state,
            QdiskEvent::Master { master, .. } => {
                self.master = master;
                self.device_event(now, out);
            }
            QdiskEvent::Evicted { victim, .. } => {
                if self.evicted.insert(victim) {
                    out.push(NodeAction::Record(Record::Evicted(victim.node)));
                }
                if victim != self.me {
                    out.push(NodeAction::HintDead(victim));
                }
            }
            QdiskEvent::Stop(why) => {
                let text = format!("quorum disk: {why:?}");
                out.push(NodeAction::Log { program: Program::Cman, text });
                self.stop(StopWhy::Killed, out);
            }
            _ => {}
        }
        self.tick(now, out);
    }
}

#[cfg(test)]
mod tests;
