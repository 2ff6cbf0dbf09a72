//! What this node does next, given records on which all agree.

use super::{Action, AdminCode, AdminOp, Core, Held, Level, Msg, Output, Phase, Records, log};
use crate::config::Service;
use crate::place;
use crate::record::{Record, ServiceState};
use cairn_base::{Boottime, NodeId};
use std::collections::BTreeSet;

impl Core {
    /// What this node should do next, given records on which all agree.
    pub(super) fn evaluate(&mut self, out: &mut Vec<Output>) {
        if !self.is_agreed() {
            if self.is_shutting_down && self.running.is_empty() {
                out.push(Output::MayLeave);
            }
            return;
        }
        self.answer_waiters(out);
        self.reconcile(out);
        if self.is_shutting_down {
            self.stop_mine(out);
            return;
        }
        let online: BTreeSet<NodeId> =
            self.members.iter().filter(|p| !self.leaving.contains(p)).map(|p| p.node).collect();
        let records = self.records.as_ref().expect("invariant: agreed means records");
        let mut claims = Vec::new();
        for s in &self.config.services {
            let Some(r) = records.get(&s.id) else { continue };
            let idle = matches!(r.state, ServiceState::Stopped | ServiceState::Recovering);
            if idle && !r.frozen && !r.parked && self.claimed.get(&s.id) != Some(&r.seq) {
                let blocked = s
                    .depend
                    .as_ref()
                    .is_some_and(|(d, _)| records.get(d).is_none_or(|o| o.state != ServiceState::Started));
                if !blocked && self.best_node(s, r, records, &online) == Some(self.me.node) {
                    claims.push((s.id.clone(), r.seq));
                }
            }
        }
        for (svc, seq) in claims {
            self.claimed.insert(svc.clone(), seq);
            out.push(Output::Send(Msg::Claim { svc, seq, at: self.wall }));
        }
        if std::mem::take(&mut self.has_joiner) {
            self.fail_back(&online, out);
        }
        self.stop_dependents(out);
    }

    fn best_node(
        &self,
        s: &Service,
        r: &Record,
        records: &Records,
        online: &BTreeSet<NodeId>,
    ) -> Option<NodeId> {
        if let Some(t) = r.target
            && online.contains(&t)
            && !r.tried.contains(&t)
        {
            return Some(t);
        }
        let domain = s.domain.as_ref().and_then(|d| self.config.domains.get(d));
        let busy = |n: NodeId, exclusive_only: bool| {
            records.iter().any(|(id, o)| {
                *id != s.id
                    && o.owner.node == n
                    && o.state.is_held()
                    && (!exclusive_only || self.config.service(id).is_some_and(|c| c.is_exclusive))
            })
        };
        let list = place::candidates(&s.id, domain, online, None);
        let allowed = |n: &NodeId| !busy(*n, !s.is_exclusive);
        list.iter()
            .map(|c| c.1)
            .filter(allowed)
            .find(|n| !r.tried.contains(n))
            // Everybody else failed: the node that gave it up may have it back (#70) unless it failed to start there.
            .or_else(|| {
                let last = r.last_owner;
                (r.state == ServiceState::Recovering && r.tried == [last] && online.contains(&last))
                    .then_some(last)
            })
    }

    /// Brings together what the records say of the services here and what their agents did: what has ended is said, what is ordered is
    /// done. Once per record's sequence number; a new view asks again.
    fn reconcile(&mut self, out: &mut Vec<Output>) {
        let records = self.records.as_ref().expect("invariant: agreed means records");
        let mine: Vec<(String, ServiceState, u64)> = records
            .iter()
            .filter(|(_, r)| r.owner == self.me && r.state.is_held())
            .map(|(svc, r)| (svc.clone(), r.state, r.seq))
            .collect();
        for (svc, state, seq) in mine {
            let (held, at) = (self.running.get(&svc).copied(), self.wall);
            let msg = |svc: &String| match (state, held.map(|h| h.phase)) {
                (ServiceState::Starting, Some(Phase::Up)) => Some(Msg::Started { svc: svc.clone(), seq, at }),
                // Stopped by an emergency in the middle, or before it began.
                (
                    ServiceState::Starting,
                    None | Some(Phase::StartFailed | Phase::Stopping | Phase::StopFailed),
                ) => Some(Msg::StartFailed { svc: svc.clone(), seq, at }),
                (
                    ServiceState::Started,
                    None | Some(Phase::StartFailed | Phase::Stopping | Phase::StopFailed),
                ) => Some(Msg::StatusFailed { svc: svc.clone(), seq, at }),
                (ServiceState::Stopping | ServiceState::Recoverable, None) => {
                    Some(Msg::Stopped { svc: svc.clone(), seq, at })
                }
                (ServiceState::Stopping | ServiceState::Recoverable, Some(Phase::StopFailed))
                    if held.is_some_and(|h| h.ordered == Some(seq)) =>
                {
                    Some(Msg::StopFailed { svc: svc.clone(), seq, at })
                }
                _ => None,
            };
            if let Some(msg) = msg(&svc) {
                if self.claimed.insert(svc, seq) != Some(seq) {
                    out.push(Output::Send(msg));
                }
                continue;
            }
            match (state, held) {
                (ServiceState::Stopping | ServiceState::Recoverable, Some(h))
                    if h.ordered != Some(seq) || !matches!(h.phase, Phase::Stopping | Phase::StopFailed) =>
                {
                    self.run_stop(&svc, seq, out);
                }
                // After a loss of quorum the checks begin anew, at once.
                (ServiceState::Started, Some(Held { phase: Phase::Up, .. })) => {
                    self.checks.entry(svc).or_insert((Boottime::ZERO, false));
                }
                _ => {}
            }
        }
    }

    /// A service whose hard dependency does not run is stopped.
    fn stop_dependents(&mut self, out: &mut Vec<Output>) {
        let records = self.records.as_ref().expect("invariant: agreed means records");
        for s in &self.config.services {
            let Some((dependency, true)) = &s.depend else { continue };
            let gone = records.get(dependency).is_none_or(|d| {
                !matches!(d.state, ServiceState::Started | ServiceState::Starting | ServiceState::Recovering)
            });
            let Some(r) = records.get(&s.id) else { continue };
            if gone
                && r.owner == self.me
                && r.state == ServiceState::Started
                && self.claimed.get(&s.id) != Some(&r.seq)
            {
                log(out, Level::Warning, &format!("Stopping service {}: Dependency missing", s.id));
                self.claimed.insert(s.id.clone(), r.seq);
                out.push(Output::Send(Msg::Admin { svc: s.id.clone(), op: AdminOp::Stop, at: self.wall }));
            }
        }
    }

    pub(super) fn unpark_dependents(&mut self, svc: &str) {
        let Some(records) = self.records.as_mut() else { return };
        for s in self.config.services.iter().filter(|s| s.depend.as_ref().is_some_and(|(d, _)| d == svc)) {
            if let Some(r) = records.get_mut(&s.id) {
                r.parked = false;
            }
        }
    }

    fn fail_back(&mut self, online: &BTreeSet<NodeId>, out: &mut Vec<Output>) {
        let records = self.records.as_ref().expect("invariant: agreed means records");
        for s in &self.config.services {
            let Some(r) = records.get(&s.id) else { continue };
            if r.state != ServiceState::Started || r.owner != self.me || r.frozen || s.domain.is_none() {
                continue;
            }
            if self.claimed.get(&s.id) == Some(&r.seq) {
                continue;
            }
            let domain = s.domain.as_ref().and_then(|d| self.config.domains.get(d));
            let mine = place::score(domain, self.me.node, online, Some(self.me.node));
            let best = place::candidates(&s.id, domain, online, Some(self.me.node)).first().copied();
            if let Some((score, node)) = best
                && score > mine
            {
                log(
                    out,
                    Level::Notice,
                    &format!("Relocating {} to better node {}", s.id, self.config.node_name(node)),
                );
                self.claimed.insert(s.id.clone(), r.seq);
                out.push(Output::Send(Msg::FailBack {
                    svc: s.id.clone(),
                    seq: r.seq,
                    target: node,
                    at: self.wall,
                }));
            }
        }
    }

    /// On the way out: stop what runs here; the others start it.
    fn stop_mine(&mut self, out: &mut Vec<Output>) {
        let records = self.records.as_ref().expect("invariant: agreed means records");
        let mine: Vec<(String, u64)> = records
            .iter()
            .filter(|(_, r)| r.owner == self.me && r.state == ServiceState::Started)
            .map(|(s, r)| (s.clone(), r.seq))
            .filter(|(s, seq)| self.claimed.get(s) != Some(seq))
            .collect();
        let held = records.values().any(|r| r.owner == self.me && r.state.is_held());
        for (svc, seq) in mine {
            self.claimed.insert(svc.clone(), seq);
            out.push(Output::Send(Msg::Admin { svc, op: AdminOp::Relocate { target: None }, at: self.wall }));
        }
        if !held && self.leaving.contains(&self.me) {
            out.push(Output::MayLeave);
        }
    }

    pub(super) fn poll_status(&mut self, now: Boottime, out: &mut Vec<Output>) {
        let Some(records) = self.records.as_ref() else { return };
        for (svc, (due, is_running)) in &mut self.checks {
            let Some(r) = records.get(svc) else { continue };
            if r.state == ServiceState::Started
                && r.owner == self.me
                && !r.frozen
                && !*is_running
                && *due <= now
            {
                *is_running = true;
                out.push(Output::Run { svc: svc.clone(), seq: r.seq, action: Action::Status });
            }
        }
    }

    fn answer_waiters(&mut self, out: &mut Vec<Output>) {
        if self.waiters.is_empty() {
            return;
        }
        let Some(records) = self.records.as_ref() else { return };
        let online = self.online();
        let runnable: BTreeSet<String> = self
            .config
            .services
            .iter()
            .filter(|s| {
                records
                    .get(&s.id)
                    .is_some_and(|r| !r.parked && self.best_node(s, r, records, &online).is_some())
            })
            .map(|s| s.id.clone())
            .collect();
        self.waiters.retain(|w| {
            if !w.is_delivered {
                return true;
            }
            let Some(r) = records.get(&w.svc) else { return false };
            let answer = match (&w.op, r.state) {
                (
                    AdminOp::Enable { .. } | AdminOp::Relocate { .. } | AdminOp::Restart,
                    ServiceState::Started,
                ) => Some(AdminCode::Success),
                (
                    AdminOp::Enable { .. } | AdminOp::Relocate { .. } | AdminOp::Restart,
                    ServiceState::Disabled,
                ) => Some(AdminCode::Failure),
                (
                    AdminOp::Enable { .. } | AdminOp::Relocate { .. } | AdminOp::Restart,
                    ServiceState::Stopped | ServiceState::Recovering,
                ) if runnable.contains(&w.svc) => None,
                (
                    AdminOp::Enable { .. } | AdminOp::Relocate { .. } | AdminOp::Restart,
                    ServiceState::Stopped | ServiceState::Recovering,
                ) => Some(AdminCode::Failure),
                (AdminOp::Disable, ServiceState::Disabled) => Some(AdminCode::Success),
                (AdminOp::Stop, ServiceState::Stopped) => Some(AdminCode::Success),
                (AdminOp::Freeze | AdminOp::Unfreeze, _) => Some(AdminCode::Success),
                (_, ServiceState::Failed) => Some(AdminCode::Aborted),
                _ => None,
            };
            if let Some(code) = answer {
                out.push(Output::Reply { id: w.id, code, owner: Some(r.owner.node) });
            }
            answer.is_none()
        });
    }
}
