//! The node's decisions above process groups: quorum, the fence domain, the permit to write, self-stop. Sans-I/O.
//!
//! It stands between `Groups` (ordered events), the quorum disk (leases, evictions) and the driver, which carries out
//! [`NodeAction`]s in the order given. One replicated state, exchanged in each synchronisation round: what is expected, what a
//! shrinking cluster agreed on, and the fence domain.
//!
//! Rules of self-stop that are decided here: SS1 (view not quorate: no permit), SS2 (no token: the permit runs out by
//! itself), SS3 (disk not renewed), SS4 (killed), SS5 (a quorate view went on without this life).

mod chain;
mod told;

use crate::config::{Config, Dialect};
use crate::event::{GroupMessage, GroupView, GroupsEvent, How, Reason, RingId, View};
use crate::fence::domain::{
    self, Domain, DomainAction, DomainConfig, DomainMerged, DomainMsg, DomainSync, FenceLog,
};
use crate::groups::Agreed;
use crate::ipc::{
    ClusterEvent, Departure, GroupMember, LeaveReason, Proof, QuorumWhy, Scope, StopWhy, ViewInfo, ViewMember,
};
use crate::quorum::{self, Electorate, Quorum, Standing};
use bytes::Bytes;
use cairn_base::{Boottime, Incarnation, NodeId, Proc, ViewId};
use chain::{Chain, Step};
use qdisk::event::{QdiskCommand, QdiskEvent, RingView};
use qdisk::{DiskState, ViewName};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use told::Told;

/// Service number of the node core in the ordered messages between daemons.
pub const SERVICE: u8 = 1;

/// Records of mounts that ended, kept for re-sending after a merge.
const MOUNTS_REMEMBERED: usize = 1024;

/// Ordered messages between node cores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum NodeMsg {
    Domain(DomainMsg),
    /// The sender has installed this view.
    Installed(ViewName),
    /// The sender has recorded it.
    Recorded(ViewName),
    /// An evicted life is out of the view: the electorate may shrink to what is there.
    Shrink(Proc),
    Expected(u32),
    /// That life must stop.
    Kill(Proc),
    /// A mount process of the sender's node must end without a leave. Comes before its groups hear of it.
    MountDying {
        client: u32,
        fs: String,
    },
    /// The mount process of the sender's node is gone, its I/O done.
    MountGone {
        client: u32,
        fs: String,
    },
}

/// A node's part of the synchronisation round.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct NodeSync {
    /// The last view that was installed here.
    past: RingId,
    expected: u32,
    effective: u32,
    all_seen: bool,
    config_version: u32,
    domain: DomainSync,
    /// Mount processes of this node that are ending.
    dying: Vec<(u32, String)>,
    /// The newest recorded view that this node knows of, and those that its state includes.
    last: ViewName,
    included: Vec<ViewName>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct NodeMerged {
    /// All come from the same view, so that what they agreed on still holds.
    same_past: bool,
    expected: u32,
    effective: u32,
    all_seen: bool,
    /// Nodes whose configuration is not the newest among us.
    outdated: Vec<NodeId>,
    domain: DomainMerged,
    dying: BTreeMap<(Proc, u32), String>,
    last: ViewName,
    /// What the states of those who go on include.
    included: BTreeSet<ViewName>,
    /// Lives with state that does not include the last recorded view.
    passed_by: BTreeSet<Proc>,
}

/// The merge function for `Groups`. A part that does not decode (another version) is as if the node knew nothing.
pub fn merge(_ring: &RingId, ring_parts: &[(crate::event::Member, Bytes)]) -> Agreed {
    let parts: Vec<(Proc, NodeSync)> = ring_parts
        .iter()
        .filter_map(|(m, bytes)| postcard::from_bytes(bytes).ok().map(|sync| (m.proc(), sync)))
        .collect();
    let newest = parts.iter().map(|(_, s)| s.config_version).max().unwrap_or(0);
    let last = parts.iter().map(|(_, s)| s.last).max().unwrap_or(ViewName::NONE);
    let is_passed_by =
        |s: &NodeSync| s.domain.state.formed && last != ViewName::NONE && !s.included.contains(&last);
    let passed_by: BTreeSet<Proc> = parts.iter().filter(|(_, s)| is_passed_by(s)).map(|(p, _)| *p).collect();
    let dying = parts.iter().flat_map(|(p, s)| s.dying.iter().map(|(c, fs)| ((*p, *c), fs.clone())));
    let merged = NodeMerged {
        same_past: parts.windows(2).all(|w| w[0].1.past == w[1].1.past),
        expected: parts.iter().map(|(_, s)| s.expected).max().unwrap_or(0),
        effective: parts.iter().map(|(_, s)| s.effective).max().unwrap_or(0),
        all_seen: parts.iter().any(|(_, s)| s.all_seen),
        outdated: parts.iter().filter(|(_, s)| s.config_version < newest).map(|(p, _)| p.node).collect(),
        domain: domain::merge(parts.iter().map(|(p, s)| (p.node, &s.domain)), &passed_by),
        dying: dying.collect(),
        last,
        included: parts
            .iter()
            .filter(|(p, _)| !passed_by.contains(p))
            .flat_map(|(_, s)| s.included.iter().copied())
            .collect(),
        passed_by,
    };
    let excluded = ring_parts
        .iter()
        .map(|(m, _)| m.proc())
        .filter(|p| {
            merged.outdated.contains(&p.node)
                || merged.passed_by.contains(p)
                || merged.domain.state.is_excluded(*p)
        })
        .collect();
    Agreed { state: postcard::to_stdvec(&merged).unwrap_or_default(), excluded }
}

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
                    out.push(NodeAction::Event(ClusterEvent::Fenced {
                        proc: from,
                        scope,
                        proof: Proof::Exited,
                        view,
                    }));
                }
                while self.mounts_gone.len() > MOUNTS_REMEMBERED {
                    self.mounts_gone.pop_first();
                }
            }
        }
        self.tick(now, out);
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
                    out.push(NodeAction::Event(ClusterEvent::Fenced {
                        proc,
                        scope: Scope::Node,
                        proof,
                        view,
                    }));
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

    fn device_event(&mut self, now: Boottime, out: &mut Vec<NodeAction>) {
        out.push(NodeAction::Event(ClusterEvent::Device {
            held: self.held(now),
            votes: self.electorate.device_votes,
            master: self.master.map(|p| p.node),
        }));
        self.refresh(now, QuorumWhy::Device, out);
    }

    /// May the device's votes be counted now?
    fn held(&self, now: Boottime) -> bool {
        if self.sabotage.votes_without_lease {
            return self.renewed_at.is_some_and(|at| now < at + self.config.timing.stop_limit());
        }
        match (&self.lease, &self.view) {
            (Some(lease), Some(view)) => {
                (lease.view == name_of(view.id) || self.sabotage.lease_of_any_view) && now < lease.until
            }
            _ => false,
        }
    }

    fn voters(&self) -> u32 {
        self.view.as_ref().map_or(0, |v| v.members.iter().map(|m| u32::from(m.votes)).sum())
    }

    fn evaluate(&self, now: Boottime) -> Quorum {
        let mut q = self.evaluate_rule(now);
        if self.sabotage.quorum_off_by_one && q.have > 0 && q.have + 1 == q.needed {
            q.quorate = true;
        }
        q
    }

    fn evaluate_rule(&self, now: Boottime) -> Quorum {
        quorum::evaluate(
            &self.electorate,
            &Standing {
                voters: self.voters(),
                members: self.view.as_ref().map_or(0, |v| v.members.len() as u32),
                expected: self.expected,
                effective: self.effective,
                device_held: self.held(now),
                waiting: self.config.wait_for_all && !self.all_seen,
            },
        )
    }

    fn refresh(&mut self, now: Boottime, why: QuorumWhy, out: &mut Vec<NodeAction>) {
        let before = self.quorum;
        self.quorum = self.evaluate(now);
        if self.view.is_none() || before == self.quorum {
            return;
        }
        let quorate = self.quorum.quorate;
        self.tell_quorum(why, out);
        self.log_quorum(before.quorate, out);
        if before.quorate != quorate {
            if self.config.quorumd.is_some() {
                out.push(NodeAction::Disk(QdiskCommand::Quorate(quorate)));
            }
            let mut acts = Vec::new();
            self.domain.quorate(now, self.may_fence(quorate), &mut acts);
            self.domain_actions(acts, out);
        }
    }

    fn tell_quorum(&mut self, why: QuorumWhy, out: &mut Vec<NodeAction>) {
        let (quorate, recorded) = self.standing();
        if quorate && recorded {
            self.told.recorded(out);
        }
        out.extend(self.quorum_event(why).map(NodeAction::Event));
        if !quorate {
            self.told.lost(out);
        }
    }

    fn quorum_event(&self, why: QuorumWhy) -> Option<ClusterEvent> {
        let Quorum { needed, have, quorate } = self.quorum;
        let view = ViewId(self.view.as_ref()?.id.seq);
        let quorate = quorate && self.told.is_quorate();
        Some(ClusterEvent::Quorum { view, needed, have, quorate, why })
    }

    /// The present view is quorate; is recorded.
    fn standing(&self) -> (bool, bool) {
        (self.quorum.quorate, self.chain.is_recorded())
    }

    fn may_fence(&self, quorate: bool) -> bool {
        (quorate || self.sabotage.fence_without_quorum) && self.stopping.is_none()
    }

    fn log_quorum(&self, before: bool, out: &mut Vec<NodeAction>) {
        let text = match (before, self.quorum.quorate) {
            (false, true) => "quorum regained, resuming activity",
            (true, false) => "quorum lost, blocking activity",
            _ => return,
        };
        out.push(NodeAction::Log { program: Program::Cman, text: text.to_owned() });
    }

    /// Everything that depends on time, and on what has changed.
    pub fn tick(&mut self, now: Boottime, out: &mut Vec<NodeAction>) {
        self.refresh(now, QuorumWhy::Device, out);
        if self.stopping.is_none() {
            let mut acts = Vec::new();
            self.domain.tick(now, &mut acts);
            self.domain_actions(acts, out);
        }
        self.record(now, out);
        self.shrink(now, out);
    }

    fn shrink(&mut self, now: Boottime, out: &mut Vec<NodeAction>) {
        let lowest = self.view.as_ref().and_then(|v| v.members.iter().map(|m| m.node).min());
        if !self.electorate.shrinks || !self.held(now) || lowest != Some(self.me.node) {
            return;
        }
        let view = self.view.as_ref().map(|v| v.members.clone()).unwrap_or_default();
        let lost: Vec<Proc> = self
            .evicted
            .iter()
            .filter(|p| !self.shrink_sent.contains(p) && !view.iter().any(|m| m.node == p.node))
            .filter(|p| {
                let gone = self.domain.state().gone.get(&p.node);
                !gone.is_some_and(|g| g.incarnation == p.incarnation && g.how == domain::How::Left)
            })
            .copied()
            .collect();
        if self.effective <= self.voters() + self.electorate.device_votes {
            return;
        }
        for p in lost {
            self.shrink_sent.insert(p);
            send(&NodeMsg::Shrink(p), true, out);
        }
    }

    /// Until when mounts may write, seen now; `last_token` as [`crate::engine::Engine::last_token`] says (`None`: the earlier one counts
    /// on). A token of a ring whose view is not installed says nothing: the view that would judge it may have no quorum (MB9).
    pub fn permit(
        &mut self,
        now: Boottime,
        last_token: Option<(RingId, Boottime)>,
        out: &mut Vec<NodeAction>,
    ) -> Option<(Boottime, ViewId)> {
        if let (Some((ring, at)), Some(view)) = (last_token, &self.view)
            && ring == view.id
        {
            self.last_token = self.last_token.max(at);
        }
        let verdict = self.permit_until(now);
        match verdict {
            Ok((_, view)) if !self.permit => {
                self.permit = true;
                out.push(NodeAction::Event(ClusterEvent::PermitGranted { view }));
            }
            Err(why) if self.permit => {
                self.permit = false;
                out.push(NodeAction::Record(Record::PermitLost(why)));
                out.push(NodeAction::Event(ClusterEvent::PermitWithdrawn { why }));
            }
            _ => {}
        }
        verdict.ok()
    }

    fn permit_until(&self, now: Boottime) -> Result<(Boottime, ViewId), StopWhy> {
        if let Some(why) = self.stopping {
            return Err(why);
        }
        let view = self.view.as_ref().ok_or(StopWhy::NotQuorate)?;
        if !self.evaluate(now).quorate {
            return Err(StopWhy::NotQuorate);
        }
        if self.sabotage.permit_for_ever {
            return Ok((now + self.config.timing.permit(), ViewId(view.id.seq)));
        }
        let mut until = self.last_token + self.config.timing.permit();
        let mut why = StopWhy::NoToken;
        if self.config.qdisk_required {
            let renewed = self.renewed_at.ok_or(StopWhy::DiskStale)?;
            let disk = renewed + self.config.timing.stop_limit();
            if disk < until {
                until = disk;
                why = StopWhy::DiskStale;
            }
        }
        // a quorum that rests on the device ends with its lease
        if !self.quorate_without_device()
            && let Some(lease) = self.lease
        {
            until = until.min(lease.until);
        }
        if now >= until { Err(why) } else { Ok((until, ViewId(view.id.seq))) }
    }

    fn quorate_without_device(&self) -> bool {
        let standing = Standing {
            voters: self.voters(),
            members: self.view.as_ref().map_or(0, |v| v.members.len() as u32),
            expected: self.expected,
            effective: self.effective,
            device_held: false,
            waiting: false,
        };
        quorum::evaluate(&self.electorate, &standing).quorate
    }

    /// When something happens by time alone.
    pub fn next_deadline(&self, now: Boottime) -> Boottime {
        let lease = self.lease.map_or(Boottime::MAX, |l| l.until);
        let lease = if lease > now { lease } else { Boottime::MAX };
        self.domain.next_deadline(now).min(lease)
    }

    // ---- what an administrator or a local client asks for ----

    pub fn kill_node(&mut self, node: NodeId, out: &mut Vec<NodeAction>) -> Result<(), String> {
        let proc = self.member(node).ok_or_else(|| format!("node {node} is not a member"))?;
        send(&NodeMsg::Kill(proc), true, out);
        Ok(())
    }

    pub fn fence_node(&mut self, node: NodeId, out: &mut Vec<NodeAction>) -> Result<(), String> {
        if self.config.node(node.0).is_none() {
            return Err(format!("node {node} is not configured"));
        }
        if !self.quorum.quorate {
            return Err("not quorate: nobody fences".to_owned());
        }
        if self.member(node).is_some() {
            // out of the ring first; a member of the domain is then a victim by itself
            return self.kill_node(node, out);
        }
        let life = self.domain.victims_of(node).first().copied();
        let proc = life.unwrap_or(Proc { node, incarnation: Incarnation(0) });
        send(&NodeMsg::Domain(DomainMsg::Ask(proc)), true, out);
        Ok(())
    }

    /// A person's word for a victim. Evidence of life is the driver's to look for.
    pub fn acknowledge(
        &mut self,
        node: NodeId,
        user: String,
        unix: u64,
        out: &mut Vec<NodeAction>,
    ) -> Result<(), String> {
        if !self.quorum.quorate {
            return Err("not quorate".to_owned());
        }
        if self.member(node).is_some() {
            return Err(format!("{} is a member of the cluster", self.config.name_of(node.0)));
        }
        if !self.domain.is_recorded() {
            return Err("the members have not recorded this view yet; try again".to_owned());
        }
        let victims = self.domain.victims_of(node);
        if victims.is_empty() {
            return Err(format!("{} is not waiting to be fenced", self.config.name_of(node.0)));
        }
        for victim in victims {
            let proof = Proof::Override { user: user.clone(), unix_time: unix };
            send(&NodeMsg::Domain(DomainMsg::Done { victim, proof, unix_time: unix }), true, out);
        }
        Ok(())
    }

    pub fn set_expected(&mut self, votes: u32, out: &mut Vec<NodeAction>) -> Result<(), String> {
        let settled = self.domain.state().victims.is_empty();
        if !settled || !quorum::may_expect(&self.electorate, votes, self.quorum.have) {
            return Err("can't set expected votes: Invalid argument".to_owned());
        }
        send(&NodeMsg::Expected(votes), true, out);
        Ok(())
    }

    /// The kernel of this machine says that the daemon of another node has ended: it counts no lease on the quorum disk any more.
    pub fn peer_exited(&mut self, p: Proc, out: &mut Vec<NodeAction>) {
        out.push(NodeAction::HintDead(p));
        if self.config.quorumd.is_some() {
            out.push(NodeAction::Disk(QdiskCommand::Gone(p)));
        }
    }

    /// A mount process of this node must end, and its groups will hear that it is lost: nobody may take it for dead before its end.
    pub fn mount_dying(&mut self, client: u32, fs: String, out: &mut Vec<NodeAction>) {
        self.mounts_dying.insert((self.me, client), fs.clone());
        send(&NodeMsg::MountDying { client, fs }, true, out);
    }

    /// A mount process of this node is gone, seen by its exit: tell everybody.
    pub fn mount_gone(&mut self, client: u32, fs: String, out: &mut Vec<NodeAction>) {
        send(&NodeMsg::MountGone { client, fs }, true, out);
    }

    /// First step of a clean leave; `LeftDomain` follows when it is ordered. False: nothing to wait for.
    pub fn leave_domain(&mut self, out: &mut Vec<NodeAction>) -> bool {
        self.leaving = true;
        let mut acts = Vec::new();
        self.domain.leave(&mut acts);
        let sent = !acts.is_empty();
        self.domain_actions(acts, out);
        sent
    }

    /// What a subscriber must know before its first event.
    pub fn snapshot(&self, now: Boottime) -> Vec<ClusterEvent> {
        let mut events = Vec::new();
        if let Some(v) = &self.view {
            let quorate = self.quorum.quorate;
            let members = v.members.iter().map(|m| ViewMember {
                node: m.node,
                incarnation: m.incarnation,
                votes: u32::from(m.votes),
                name: self.config.name_of(m.node.0),
            });
            let id = ViewId(v.id.seq);
            events.push(ClusterEvent::View(ViewInfo {
                id,
                members: members.collect(),
                joined: Vec::new(),
                left: Vec::new(),
                quorate,
            }));
            events.extend(self.quorum_event(QuorumWhy::View));
            if self.permit {
                events.push(ClusterEvent::PermitGranted { view: id });
            }
        }
        if self.electorate.device_votes > 0 {
            events.push(ClusterEvent::Device {
                held: self.held(now),
                votes: self.electorate.device_votes,
                master: self.master.map(|p| p.node),
            });
        }
        for victim in self.domain.state().victims.keys() {
            events.push(ClusterEvent::FencePending { proc: *victim, scope: Scope::Node });
        }
        for ((proc, client), fs) in &self.mounts_dying {
            let scope = Scope::Mount { client: *client, fs: fs.clone() };
            events.push(ClusterEvent::FencePending { proc: *proc, scope });
        }
        // Proofs are told once: of the dead that others tell a newcomer of, it would never hear that they are dead.
        let view = ViewId(self.view.as_ref().map_or(0, |v| v.id.seq));
        for (node, gone) in &self.domain.state().gone {
            if let domain::How::Fenced { proof, .. } = &gone.how {
                let proc = Proc { node: *node, incarnation: gone.incarnation };
                let proof = proof.clone();
                events.push(ClusterEvent::Fenced { proc, scope: Scope::Node, proof, view });
            }
        }
        for ((proc, client), fs) in &self.mounts_gone {
            let scope = Scope::Mount { client: *client, fs: fs.clone() };
            events.push(ClusterEvent::Fenced { proc: *proc, scope, proof: Proof::Exited, view });
        }
        events
    }

    // ---- for the status ----

    pub fn member(&self, node: NodeId) -> Option<Proc> {
        self.view.as_ref()?.members.iter().find(|m| m.node == node).map(|m| m.proc())
    }
    pub fn members(&self) -> Vec<Proc> {
        self.view.as_ref().map_or_else(Vec::new, |v| v.members.iter().map(|m| m.proc()).collect())
    }
    pub fn domain(&self) -> &Domain {
        &self.domain
    }
    /// Groups that write may be joined: this node is in the fence domain, and nobody can pass by its view without knowing.
    pub fn may_join(&self) -> bool {
        self.domain.joined() && self.domain.is_recorded()
    }
    /// Somebody who may have written is not proved dead.
    pub fn is_fencing(&self) -> bool {
        !self.domain.state().victims.is_empty() || !self.mounts_dying.is_empty()
    }
    pub fn mounts_dying(&self) -> impl Iterator<Item = (Proc, &str)> {
        self.mounts_dying.iter().map(|((p, _), fs)| (*p, fs.as_str()))
    }
    pub fn quorum(&self) -> Quorum {
        self.quorum
    }
    /// As [`Self::quorum`], with the leases that hold at `now`.
    pub fn quorum_at(&self, now: Boottime) -> Quorum {
        self.evaluate(now)
    }
    pub fn expected_votes(&self) -> u32 {
        self.expected
    }
    /// The name of the present view.
    pub fn view_id(&self) -> Option<RingId> {
        self.view.as_ref().map(|v| v.id)
    }
    pub fn generation(&self) -> u64 {
        self.view.as_ref().map_or(0, |v| v.id.seq)
    }
    pub fn stopping(&self) -> Option<StopWhy> {
        self.stopping
    }
    pub fn device_held(&self, now: Boottime) -> bool {
        self.held(now)
    }
    pub fn device_master(&self) -> Option<NodeId> {
        self.master.map(|p| p.node)
    }
    pub fn disk(&self) -> (bool, DiskState, Option<Boottime>) {
        (self.disk_ready, self.disk_state, self.renewed_at)
    }
    pub fn evicted(&self) -> Vec<Proc> {
        self.evicted.iter().copied().collect()
    }
    /// (ring sequence, wall time, life) of a node's last join.
    pub fn joined_at(&self, node: NodeId) -> Option<(u64, u64, Incarnation)> {
        self.joined.get(&node).copied()
    }
}

/// An ordered message of this node.
fn send(msg: &NodeMsg, safe: bool, out: &mut Vec<NodeAction>) {
    let data = postcard::to_stdvec(msg).expect("a message of our own always encodes");
    out.push(NodeAction::Service { safe, data: data.into() });
}

fn group_view(view: GroupView) -> ClusterEvent {
    let entry = |m: &crate::event::GroupMember, payload: &[u8]| GroupMember {
        proc: m.proc(),
        client: m.client,
        payload: payload.to_vec(),
    };
    let of = |m: &crate::event::GroupMember| {
        let payload = view.members.iter().find(|e| e.member == *m).map_or(&[][..], |e| &e.payload[..]);
        entry(m, payload)
    };
    ClusterEvent::GroupView {
        group: view.group.as_str().to_owned(),
        view_no: view.view_no,
        members: view.members.iter().map(|e| entry(&e.member, &e.payload)).collect(),
        joined: view.joined.iter().map(of).collect(),
        left: view
            .left
            .iter()
            .map(|(m, why)| {
                let why = match why {
                    Reason::Leave => LeaveReason::Leave,
                    Reason::NodeDown => LeaveReason::NodeDown,
                    Reason::ProcDown => LeaveReason::ProcDown,
                };
                (of(m), why)
            })
            .collect(),
    }
}

fn group_message(m: GroupMessage) -> ClusterEvent {
    ClusterEvent::GroupMessage {
        group: m.group.as_str().to_owned(),
        from: m.from.proc(),
        client: m.from.client,
        no: m.no,
        safe: m.safe,
        data: m.data.to_vec(),
    }
}

#[cfg(test)]
mod tests;
