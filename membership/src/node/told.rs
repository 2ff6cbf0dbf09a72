//! What clients are told: quorum, and the groups' views and messages, of recorded views only; proofs of death in their order with these.
//!
//! Clients decide with them too: a lock manager that is given a view passes locks on in it, a service manager starts services. What is
//! passed on in a view that nobody has recorded is not known to a later side which that view does not pass by: it would take a lock for
//! the first holder's, and give it away with that one's replay while the second one's journal is not replayed.
//!
//! Until a view is recorded the clients go on in the one before: they lose no quorum, and nothing stops but what needs the new view.

use super::{NodeAction, NodeCore};
use crate::event::{GroupMessage, GroupView, Reason};
use crate::fence::domain;
use crate::ipc::{ClusterEvent, GroupMember, LeaveReason, Proof, QuorumWhy, Scope, ViewInfo, ViewMember};
use cairn_base::{Boottime, Proc, ViewId};

#[derive(Debug, Default)]
pub(super) struct Told {
    /// Clients take this node for quorate. Ends with quorum; begins in a recorded view.
    quorate: bool,
    /// Events of quorate views that are not recorded yet, in order.
    held: Vec<NodeAction>,
}

impl Told {
    pub(super) const fn is_quorate(&self) -> bool {
        self.quorate
    }

    /// `quorate`, `recorded`: the present view.
    pub(super) fn event(
        &mut self,
        clients: Vec<u32>,
        event: ClusterEvent,
        (quorate, recorded): (bool, bool),
        out: &mut Vec<NodeAction>,
    ) {
        self.held.push(NodeAction::ToClients { clients, event });
        if !quorate || recorded {
            self.release(out);
        }
    }

    /// A proof of death keeps its place in the order: what the dead had said before is held at one node and was told at another. Told
    /// ahead of it, service managers would go on with different records.
    pub(super) fn fenced(&mut self, event: ClusterEvent, out: &mut Vec<NodeAction>) {
        let event = NodeAction::Event(event);
        if self.held.is_empty() { out.push(event) } else { self.held.push(event) }
    }

    /// There is no quorum, which clients have been told: what they hear now they may not act on.
    pub(super) fn lost(&mut self, out: &mut Vec<NodeAction>) {
        self.quorate = false;
        self.release(out);
    }

    /// The present view is quorate and recorded. Quorum is to be told behind what was held: that may be what begins with it.
    pub(super) fn recorded(&mut self, out: &mut Vec<NodeAction>) {
        self.quorate = true;
        self.release(out);
    }

    fn release(&mut self, out: &mut Vec<NodeAction>) {
        out.append(&mut self.held);
    }
}

impl NodeCore {
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
}

pub(super) fn group_view(view: GroupView) -> ClusterEvent {
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

pub(super) fn group_message(m: GroupMessage) -> ClusterEvent {
    ClusterEvent::GroupMessage {
        group: m.group.as_str().to_owned(),
        from: m.from.proc(),
        client: m.from.client,
        no: m.no,
        safe: m.safe,
        data: m.data.to_vec(),
    }
}
