//! Quorum of the present view, and the permit to write that follows from it.

use super::*;

impl NodeCore {
    pub(super) fn device_event(&mut self, now: Boottime, out: &mut Vec<NodeAction>) {
        out.push(NodeAction::Event(ClusterEvent::Device {
            held: self.held(now),
            votes: self.electorate.device_votes,
            master: self.master.map(|p| p.node),
        }));
        self.refresh(now, QuorumWhy::Device, out);
    }

    /// May the device's votes be counted now?
    pub(super) fn held(&self, now: Boottime) -> bool {
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

    pub(super) fn voters(&self) -> u32 {
        self.view.as_ref().map_or(0, |v| v.members.iter().map(|m| u32::from(m.votes)).sum())
    }

    pub(super) fn evaluate(&self, now: Boottime) -> Quorum {
        let mut q = self.evaluate_rule(now);
        if self.sabotage.quorum_off_by_one && q.have > 0 && q.have + 1 == q.needed {
            q.quorate = true;
        }
        q
    }

    pub(super) fn evaluate_rule(&self, now: Boottime) -> Quorum {
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

    pub(super) fn refresh(&mut self, now: Boottime, why: QuorumWhy, out: &mut Vec<NodeAction>) {
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

    pub(super) fn tell_quorum(&mut self, why: QuorumWhy, out: &mut Vec<NodeAction>) {
        let (quorate, recorded) = self.standing();
        if quorate && recorded {
            self.told.recorded(out);
        }
        out.extend(self.quorum_event(why).map(NodeAction::Event));
        if !quorate {
            self.told.lost(out);
        }
    }

    pub(super) fn quorum_event(&self, why: QuorumWhy) -> Option<ClusterEvent> {
        let Quorum { needed, have, quorate } = self.quorum;
        let view = ViewId(self.view.as_ref()?.id.seq);
        let quorate = quorate && self.told.is_quorate();
        Some(ClusterEvent::Quorum { view, needed, have, quorate, why })
    }

    /// The present view is quorate; is recorded.
    pub(super) fn standing(&self) -> (bool, bool) {
        (self.quorum.quorate, self.chain.is_recorded())
    }

    pub(super) fn may_fence(&self, quorate: bool) -> bool {
        (quorate || self.sabotage.fence_without_quorum) && self.stopping.is_none()
    }

    pub(super) fn log_quorum(&self, before: bool, out: &mut Vec<NodeAction>) {
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

    pub(super) fn shrink(&mut self, now: Boottime, out: &mut Vec<NodeAction>) {
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

    pub(super) fn permit_until(&self, now: Boottime) -> Result<(Boottime, ViewId), StopWhy> {
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

    pub(super) fn quorate_without_device(&self) -> bool {
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
}
