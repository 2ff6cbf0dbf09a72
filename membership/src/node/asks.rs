//! What an administrator or a local client asks for, and what the driver has seen of both.

use super::*;

impl NodeCore {
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
}
