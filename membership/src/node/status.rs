//! What is known here, for the status and for the driver.

use super::*;

impl NodeCore {
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
