//! Ordered operations on the records: the transitions of the table in [`super`], the same at every member.

use super::{AdminCode, AdminOp, Core, Level, Msg, Output, Phase, log};
use crate::config::{Recovery, Service};
use crate::record::{AfterStop, NOBODY, Record, ServiceState};
use cairn_base::{Boottime, NodeId, Proc};
use std::collections::BTreeSet;

impl Core {
    /// One ordered operation on the records. The same at every member that has them.
    pub(super) fn apply(&mut self, now: Boottime, from: Proc, msg: Msg, out: &mut Vec<Output>) {
        match msg {
            Msg::Hello { .. } | Msg::Records { .. } | Msg::Resync { .. } => {}
            Msg::ShuttingDown => {
                self.leaving.insert(from);
            }
            Msg::Claim { svc, seq, at } => self.apply_claim(from, &svc, seq, at, out),
            Msg::Started { svc, seq, at } => {
                if self.transition(from, &svc, seq, ServiceState::Starting) {
                    let r = self.record(&svc);
                    r.enter(ServiceState::Started, at);
                    r.tried.clear();
                    r.target = None;
                    r.take_over_from = None;
                    self.unpark_dependents(&svc);
                    if from == self.me {
                        log(out, Level::Notice, &format!("Service {svc} started"));
                        let due = now + self.config.status_poll;
                        self.checks.insert(svc.clone(), (due, false));
                    }
                    self.changed(&svc, out);
                }
            }
            Msg::StartFailed { svc, seq, at } => {
                if self.transition(from, &svc, seq, ServiceState::Starting) {
                    let r = self.record(&svc);
                    r.tried.push(from.node);
                    r.after_stop = Some(AfterStop::StartAgain { target: None, avoid: Some(from.node) });
                    r.enter(ServiceState::Recoverable, at);
                    self.owner_stops(from, &svc, out);
                }
            }
            Msg::StatusFailed { svc, seq, at } => self.apply_status_failed(from, &svc, seq, at, out),
            Msg::Stopped { svc, seq, at } => self.apply_stopped(from, &svc, seq, at, out),
            Msg::StopFailed { svc, seq, at } => {
                if self.transition_any(from, &svc, seq, &[ServiceState::Stopping, ServiceState::Recoverable])
                {
                    let r = self.record(&svc);
                    r.last_owner = r.owner.node;
                    r.after_stop = None;
                    r.enter(ServiceState::Failed, at);
                    if from == self.me {
                        log(
                            out,
                            Level::Crit,
                            &format!("#12: RG {svc} failed to stop; intervention required"),
                        );
                        log(out, Level::Notice, &format!("Service {svc} is failed"));
                    }
                    self.changed(&svc, out);
                }
            }
            Msg::FailBack { svc, seq, target, at } => {
                if self.transition(from, &svc, seq, ServiceState::Started) {
                    let r = self.record(&svc);
                    r.after_stop = Some(AfterStop::StartAgain { target: Some(target), avoid: None });
                    r.enter(ServiceState::Stopping, at);
                    self.owner_stops(from, &svc, out);
                }
            }
            Msg::Admin { svc, op, at } => self.apply_admin(from, &svc, &op, at, out),
        }
    }

    fn apply_claim(&mut self, from: Proc, svc: &str, seq: u64, at: u64, out: &mut Vec<Output>) {
        if from == self.me {
            self.claimed.remove(svc);
        }
        if !self.members.contains(&from) || self.leaving.contains(&from) {
            return;
        }
        let Some(r) = self.records.as_mut().and_then(|m| m.get_mut(svc)) else { return };
        if r.seq != seq || !matches!(r.state, ServiceState::Stopped | ServiceState::Recovering) {
            return;
        }
        r.owner = from;
        r.enter(ServiceState::Starting, at);
        let (seq, dead) = (r.seq, r.take_over_from);
        if from == self.me {
            assert!(self.is_quorate, "invariant I20: services start only with quorum");
            match dead {
                Some(node) => log(
                    out,
                    Level::Notice,
                    &format!("Taking over service {svc} from down member {}", self.config.node_name(node)),
                ),
                None => log(out, Level::Notice, &format!("Starting stopped service {svc}")),
            }
            self.run(svc, Phase::Starting, Some(seq), out);
        }
        self.changed(svc, out);
    }

    fn apply_status_failed(&mut self, from: Proc, svc: &str, seq: u64, at: u64, out: &mut Vec<Output>) {
        if !self.transition(from, svc, seq, ServiceState::Started) {
            return;
        }
        let Some(conf) = self.config.service(svc).cloned() else { return };
        let r = self.record(svc);
        let over = over_limit(r, &conf, at);
        let relocate = AfterStop::StartAgain { target: None, avoid: Some(from.node) };
        let here = AfterStop::StartAgain { target: Some(from.node), avoid: None };
        let (after, why) = match (conf.recovery, over) {
            (Recovery::Disable, _) => (AfterStop::Disabled, None),
            (Recovery::Relocate, _) => (relocate, None),
            (Recovery::Restart, true) => (relocate, Some("attempting to relocate")),
            (Recovery::RestartDisable, true) => (AfterStop::Disabled, Some("disabling")),
            (Recovery::Restart | Recovery::RestartDisable, false) => {
                r.restarts += 1;
                r.restart_times.push(at);
                (here, None)
            }
        };
        r.after_stop = Some(after);
        r.enter(ServiceState::Recoverable, at);
        if let (Some(text), true) = (why, from == self.me) {
            log(out, Level::Warning, &format!("Restart threshold for {svc} exceeded; {text}"));
        }
        self.owner_stops(from, svc, out);
    }

    fn apply_stopped(&mut self, from: Proc, svc: &str, seq: u64, at: u64, out: &mut Vec<Output>) {
        if !self.transition_any(from, svc, seq, &[ServiceState::Stopping, ServiceState::Recoverable]) {
            return;
        }
        let me = self.me;
        let r = self.record(svc);
        r.last_owner = r.owner.node;
        r.owner = NOBODY;
        r.take_over_from = None;
        let text = match r.after_stop.take().unwrap_or(AfterStop::Stopped) {
            AfterStop::Stopped => {
                r.parked = true;
                r.enter(ServiceState::Stopped, at);
                "stopped"
            }
            AfterStop::Disabled => {
                r.enter(ServiceState::Disabled, at);
                "disabled"
            }
            AfterStop::StartAgain { target, avoid } => {
                r.target = target;
                if let Some(n) = avoid
                    && !r.tried.contains(&n)
                {
                    r.tried.push(n);
                }
                r.enter(ServiceState::Recovering, at);
                "recovering"
            }
        };
        if from == me {
            log(out, Level::Notice, &format!("Service {svc} is {text}"));
        }
        self.changed(svc, out);
    }

    fn apply_admin(&mut self, from: Proc, svc: &str, op: &AdminOp, at: u64, out: &mut Vec<Output>) {
        let online = self.online();
        let is_failed_here = self
            .records
            .as_ref()
            .and_then(|m| m.get(svc))
            .is_some_and(|r| r.state == ServiceState::Failed && r.owner == self.me);
        let result = self.admin_transition(from, svc, op, at, &online);
        if is_failed_here && *op == AdminOp::Disable && result.is_ok() {
            // By this the administrator vouches for what the failed stop may have left.
            self.running.remove(svc);
        }
        if from == self.me
            && let Some(w) = self.waiters.iter_mut().find(|w| !w.is_delivered && w.svc == svc && w.op == *op)
        {
            w.is_delivered = true;
            if let Err(code) = result {
                let id = w.id;
                self.waiters.retain(|w| w.id != id);
                let owner = self.records.as_ref().and_then(|m| m.get(svc)).map(|r| r.owner.node);
                out.push(Output::Reply { id, code, owner });
            }
        }
        if let Ok(Some(owner)) = result
            && self.me == owner
        {
            self.owner_stops(owner, svc, out);
        }
        self.changed(svc, out);
    }

    /// Ok(Some(owner)): the owner has to run a stop. Ok(None): the record says it all. Err: refused.
    fn admin_transition(
        &mut self,
        from: Proc,
        svc: &str,
        op: &AdminOp,
        at: u64,
        online: &BTreeSet<NodeId>,
    ) -> Result<Option<Proc>, AdminCode> {
        let Some(r) = self.records.as_mut().and_then(|m| m.get_mut(svc)) else {
            return Err(AdminCode::NoService);
        };
        let stop_then = |r: &mut Record, after: AfterStop| {
            r.after_stop = Some(after);
            if matches!(r.state, ServiceState::Stopping | ServiceState::Recoverable) {
                return Ok(None); // a stop is running already; only what follows has changed
            }
            let owner = r.owner;
            r.enter(ServiceState::Stopping, at);
            Ok(Some(owner))
        };
        if r.frozen && !matches!(op, AdminOp::Unfreeze) {
            return Err(AdminCode::Frozen);
        }
        match op {
            AdminOp::Enable { target } => match r.state {
                ServiceState::Started | ServiceState::Starting => Err(AdminCode::AlreadyRunning),
                ServiceState::Failed => Err(AdminCode::Aborted),
                ServiceState::Stopping | ServiceState::Recoverable => stop_then(
                    r,
                    AfterStop::StartAgain { target: Some(target.unwrap_or(from.node)), avoid: None },
                ),
                ServiceState::Stopped | ServiceState::Recovering | ServiceState::Disabled => {
                    let target = target.unwrap_or(from.node);
                    if !online.contains(&target) {
                        return Err(AdminCode::BadTarget);
                    }
                    r.target = Some(target);
                    r.tried.clear();
                    r.parked = false;
                    r.enter(ServiceState::Stopped, at);
                    Ok(None)
                }
            },
            AdminOp::Disable => match r.state {
                ServiceState::Disabled => Ok(None),
                ServiceState::Stopped | ServiceState::Recovering | ServiceState::Failed => {
                    if r.owner != NOBODY {
                        r.last_owner = r.owner.node;
                    }
                    r.owner = NOBODY;
                    r.enter(ServiceState::Disabled, at);
                    Ok(None)
                }
                ServiceState::Starting
                | ServiceState::Started
                | ServiceState::Stopping
                | ServiceState::Recoverable => stop_then(r, AfterStop::Disabled),
            },
            AdminOp::Stop => match r.state {
                ServiceState::Starting
                | ServiceState::Started
                | ServiceState::Stopping
                | ServiceState::Recoverable => stop_then(r, AfterStop::Stopped),
                ServiceState::Stopped => Ok(None),
                ServiceState::Recovering | ServiceState::Disabled | ServiceState::Failed => {
                    Err(AdminCode::Invalid)
                }
            },
            AdminOp::Relocate { target } => {
                if target.is_some_and(|t| !online.contains(&t)) {
                    return Err(AdminCode::BadTarget);
                }
                match r.state {
                    ServiceState::Started | ServiceState::Starting => {
                        r.tried.clear();
                        let avoid = if target.is_none() { Some(r.owner.node) } else { None };
                        stop_then(r, AfterStop::StartAgain { target: *target, avoid })
                    }
                    ServiceState::Stopped | ServiceState::Recovering => {
                        r.target = *target;
                        r.parked = false;
                        r.enter(ServiceState::Stopped, at);
                        Ok(None)
                    }
                    ServiceState::Failed => Err(AdminCode::Aborted),
                    ServiceState::Disabled | ServiceState::Stopping | ServiceState::Recoverable => {
                        Err(AdminCode::Invalid)
                    }
                }
            }
            AdminOp::Restart => match r.state {
                ServiceState::Started => {
                    let here = Some(r.owner.node);
                    stop_then(r, AfterStop::StartAgain { target: here, avoid: None })
                }
                _ => Err(AdminCode::Invalid),
            },
            AdminOp::Freeze | AdminOp::Unfreeze => match r.state {
                ServiceState::Stopped | ServiceState::Started | ServiceState::Disabled => {
                    r.frozen = matches!(op, AdminOp::Freeze);
                    Ok(None)
                }
                _ => Err(AdminCode::Invalid),
            },
        }
    }

    pub(super) fn record(&mut self, svc: &str) -> &mut Record {
        self.records.as_mut().and_then(|m| m.get_mut(svc)).expect("invariant: checked by transition()")
    }

    /// The message counts: right owner, right sequence number, right state.
    pub(super) fn transition(&self, from: Proc, svc: &str, seq: u64, state: ServiceState) -> bool {
        self.transition_any(from, svc, seq, &[state])
    }

    fn transition_any(&self, from: Proc, svc: &str, seq: u64, states: &[ServiceState]) -> bool {
        self.records
            .as_ref()
            .and_then(|m| m.get(svc))
            .is_some_and(|r| r.owner == from && r.seq == seq && states.contains(&r.state))
    }

    /// If this is the owner: run the stop that the record asks for.
    fn owner_stops(&mut self, owner: Proc, svc: &str, out: &mut Vec<Output>) {
        if owner == self.me {
            let seq = self.record(svc).seq;
            self.run_stop(svc, seq, out);
        }
        self.changed(svc, out);
    }

    pub(super) fn run_stop(&mut self, svc: &str, seq: u64, out: &mut Vec<Output>) {
        self.checks.remove(svc);
        log(out, Level::Notice, &format!("Stopping service {svc}"));
        self.run(svc, Phase::Stopping, Some(seq), out);
    }

    fn changed(&mut self, svc: &str, out: &mut Vec<Output>) {
        if self.records.as_ref().is_some_and(|m| m.contains_key(svc)) {
            out.push(Output::Changed { svc: svc.to_owned() });
        }
    }
}

/// `max_restarts` restarts lie inside the window already.
fn over_limit(r: &mut Record, conf: &Service, at: u64) -> bool {
    if conf.max_restarts == 0 {
        return false;
    }
    let window = conf.restart_expire.as_secs();
    if window > 0 {
        r.restart_times.retain(|t| t + window > at);
    }
    r.restart_times.len() >= conf.max_restarts as usize
}
