//! The status report, put together from what the parts know.

use super::Runtime;
use crate::config::Dialect;
use crate::engine::Engine;
use crate::fence::domain::How;
use crate::ipc::{
    ClientStatus, DeviceStatus, FenceRecord, FenceStatus, GroupMember, GroupStatus, MembershipState,
    NodeStatus, StatusReport, VictimStatus, WaitState,
};
use cairn_base::{Boottime, Incarnation, NodeId, Proc};

impl<E: Engine, W: super::Wire> Runtime<E, W> {
    pub(super) fn status(&self, now: Boottime) -> StatusReport {
        let c = &self.config;
        let core = &self.stack.core;
        let quorum = core.quorum();
        let held = core.device_held(now);
        let me = self.me;
        let member = core.member(me.node).is_some();
        let domain = core.domain().state();
        let own = c.node(me.node.0);
        let mut flags = Vec::new();
        if c.two_node {
            flags.push("2node".to_owned());
        }
        if self.is_leaving() {
            flags.push("Shutdown".to_owned());
        }
        if domain.members.contains_key(&me) {
            flags.push(if c.dialect == Dialect::Rhel5 { "Dirty" } else { "HaveState" }.to_owned());
        }
        let rgmanager = self.clients.values().any(|c| c.kind == Some(crate::ipc::ClientKind::Rgmanager));
        StatusReport {
            protocol_version: "6.2.0".to_owned(),
            config_version: c.version,
            cluster_name: c.name.clone(),
            cluster_id: c.cluster_id,
            rhel5: c.dialect == Dialect::Rhel5,
            node_name: c.name_of(me.node.0),
            node: me.node,
            incarnation: me.incarnation,
            generation: core.generation(),
            state: match (self.is_leaving(), member) {
                (true, _) => MembershipState::Leaving,
                (false, true) => MembershipState::ClusterMember,
                (false, false) => MembershipState::Joining,
            },
            quorate: quorum.quorate,
            expected_votes: core.expected_votes(),
            node_votes: own.map_or(0, |n| u32::from(n.votes)),
            device_votes: held.then(|| c.device_votes()),
            total_votes: quorum.have,
            quorum: quorum.needed,
            active_subsystems: self.clients.values().filter(|c| c.kind.is_some()).count() as u32,
            flags,
            ports_bound: if rgmanager { vec![0, 177] } else { vec![0] },
            multicast: c.multicast.clone(),
            addresses: own.map(|n| n.addr.clone()).into_iter().collect(),
            nodes: c.nodes.iter().map(|n| self.node_status(n)).collect(),
            device: c.quorumd.as_ref().map(|q| {
                let (ready, state, renewed) = core.disk();
                DeviceStatus {
                    name: q.device.clone(),
                    label: q.label.clone().unwrap_or_default(),
                    votes: q.votes,
                    held,
                    master: core.device_master(),
                    state: if ready { format!("{state:?}") } else { "Initializing".to_owned() },
                    renewed_ms_ago: renewed.map(|at| now.since(at).as_millis() as u64),
                    evicted: core.evicted(),
                }
            }),
            fence: self.fence_status(),
            groups: self.group_status(),
            clients: self
                .clients
                .iter()
                .filter_map(|(id, c)| {
                    Some(ClientStatus {
                        client: *id,
                        pid: c.pid as u32,
                        kind: c.kind.clone()?,
                        groups: c.groups.iter().map(|g| g.as_str().to_owned()).collect(),
                    })
                })
                .collect(),
            ring_state: self.stack.ring_state().to_string(),
            permit_left_ms: self.permit.lock().state().until.since(now).as_millis() as u64,
            stop: core.stopping(),
            timing: c.timing,
        }
    }

    fn node_status(&self, n: &crate::config::ClusterNode) -> NodeStatus {
        let node = NodeId(n.id);
        let member = self.stack.core.member(node);
        let joined = self.stack.core.joined_at(node);
        NodeStatus {
            node,
            name: n.name.clone(),
            votes: u32::from(n.votes),
            member: member.is_some(),
            joined_generation: joined.map_or(0, |j| j.0),
            joined_unix: member.and(joined.map(|j| j.1)),
            incarnation: member.map(|p| p.incarnation).or(joined.map(|j| j.2)).unwrap_or(Incarnation(0)),
            addresses: vec![n.addr.clone()],
            in_fence_domain: self.stack.core.domain().state().members.keys().any(|p| p.node == node),
        }
    }

    fn fence_status(&self) -> FenceStatus {
        let domain = self.stack.core.domain();
        let state = domain.state();
        let here = self.stack.core.members();
        let mut members: Vec<NodeId> =
            state.members.keys().filter(|p| here.contains(p)).map(|p| p.node).collect();
        members.sort_unstable();
        let victims: Vec<VictimStatus> = state
            .victims
            .iter()
            .map(|(p, cause)| {
                let (fencer, attempts, error) = domain.progress(*p);
                VictimStatus {
                    proc: *p,
                    name: self.config.name_of(p.node.0),
                    cause: format!("{cause:?}").to_lowercase(),
                    fencer,
                    attempts,
                    last_error: error.to_owned(),
                }
            })
            .chain(self.stack.core.mounts_dying().map(|(p, fs)| VictimStatus {
                proc: p,
                name: format!("{} (mount of {fs})", self.config.name_of(p.node.0)),
                cause: "mount".to_owned(),
                fencer: None,
                attempts: 0,
                last_error: String::new(),
            }))
            .collect();
        let wait_state = if !self.stack.core.quorum().quorate {
            WaitState::Quorum
        } else if !victims.is_empty() {
            WaitState::Fencing
        } else if !domain.joined() {
            WaitState::Messages
        } else {
            WaitState::None
        };
        FenceStatus {
            in_domain: domain.joined(),
            members,
            victim_now: victims.iter().find(|v| v.fencer.is_some()).map(|v| v.proc.node),
            victims,
            master: domain.master(),
            wait_state,
            history: state
                .gone
                .iter()
                .filter_map(|(node, gone)| match &gone.how {
                    How::Left => None,
                    How::Fenced { fencer, proof, unix_time } => Some(FenceRecord {
                        proc: Proc { node: *node, incarnation: gone.incarnation },
                        fencer: *fencer,
                        proof: proof.clone(),
                        unix_time: *unix_time,
                    }),
                })
                .collect(),
        }
    }

    fn group_status(&self) -> Vec<GroupStatus> {
        let mut names: Vec<_> = self.clients.values().flat_map(|c| c.groups.iter().cloned()).collect();
        names.sort();
        names.dedup();
        names
            .into_iter()
            .filter_map(|name| {
                let state = self.stack.groups.group(&name)?;
                Some(GroupStatus {
                    name: name.as_str().to_owned(),
                    view_no: state.view_no,
                    members: state
                        .members
                        .iter()
                        .map(|e| GroupMember {
                            proc: e.member.proc(),
                            client: e.member.client,
                            payload: e.payload.to_vec(),
                        })
                        .collect(),
                })
            })
            .collect()
    }
}
