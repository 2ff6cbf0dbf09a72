//! Views, fences and the sync round: how members come to hold the same records.

use super::{Core, Hello, Level, Msg, Ordered, Output, Phase, Records, Sync, log};
use crate::config::Service;
use crate::record::{AfterStop, NOBODY, Record, ServiceState};
use cairn_base::{Boottime, Proc};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

impl Core {
    pub(super) fn on_view(
        &mut self,
        view: u64,
        members: Vec<Proc>,
        left: Vec<(Proc, bool)>,
        out: &mut Vec<Output>,
    ) {
        assert!(view > self.view || self.view == 0, "invariant: group views rise");
        self.view = view;
        self.round = 0;
        let members: BTreeSet<Proc> = members.into_iter().collect();
        self.has_joiner |= members.iter().any(|m| !self.members.contains(m));
        self.members = members;
        self.is_clear = false;
        self.leaving.retain(|p| self.members.contains(p));
        // A node event gives parked services another chance; not those whose stop ends with it.
        if let Some(records) = &mut self.records {
            for r in records.values_mut() {
                r.parked = false;
                r.tried.clear();
            }
        }
        for (p, clean) in left {
            if clean {
                log(out, Level::Notice, &format!("Member {} shutting down", p.node));
                // Nothing ran there any more. What it said of that last may not have been ordered.
                self.release_of(p, out);
            } else {
                log(out, Level::Info, &format!("State change: {} DOWN", self.config.node_name(p.node)));
                if self.fenced.contains(&p) {
                    self.release_of(p, out);
                }
            }
        }
        self.fenced.retain(|p| self.members.contains(p));
        self.start_sync(out);
    }

    fn start_sync(&mut self, out: &mut Vec<Output>) {
        self.claimed.clear();
        self.sync = Sync::Hellos { seen: BTreeMap::new() };
        if self.members.contains(&self.me) {
            out.push(Output::Send(Msg::Hello {
                view: self.view,
                round: self.round,
                is_quorate: self.is_quorate,
                has_records: self.records.is_some(),
                kept: self.kept.as_ref().map(|k| k.0),
                running: self
                    .running
                    .iter()
                    .map(|(svc, h)| (svc.clone(), matches!(h.phase, Phase::Starting | Phase::Up)))
                    .collect(),
                is_clear: self.is_clear,
            }));
        }
    }

    pub(super) fn on_fenced(&mut self, p: Proc, out: &mut Vec<Output>) {
        if self.members.contains(&p) {
            self.fenced.insert(p);
        }
        match &mut self.sync {
            Sync::AwaitRecords { buffered, .. } => buffered.push_back(Ordered::Fenced(p)),
            Sync::Agreed | Sync::Hellos { .. } => self.release_of(p, out),
        }
    }

    /// Who may run services and is not a member is proved dead, or never was in the domain and could not join us. Names do not tell: of whom a
    /// side without quorum lost the domain may have a proof for whatever ran on the node; of whom a side before us had, we know nothing.
    /// Only where nobody has records: those change with ordered events alone.
    pub(super) fn on_no_victims(&mut self, out: &mut Vec<Output>) {
        if self.awaits_fences() {
            self.is_clear = true;
            out.push(Output::Send(Msg::Resync { view: self.view }));
        }
    }

    /// The owner is proven dead, or has left: what it held is stopped now, and disabled if that was to follow.
    fn release_of(&mut self, dead: Proc, out: &mut Vec<Output>) {
        assert!(dead != self.me, "invariant: a fenced incarnation hears of it by its own end");
        let wall = self.wall;
        let Some(records) = &mut self.records else { return };
        for (svc, r) in records.iter_mut().filter(|(_, r)| r.owner == dead && r.state.is_held()) {
            r.last_owner = dead.node;
            r.owner = NOBODY;
            r.take_over_from = Some(dead.node);
            r.target = None;
            r.tried.clear();
            r.end_stop(wall);
            out.push(Output::Changed { svc: svc.clone() });
        }
    }

    pub(super) fn on_message(&mut self, now: Boottime, from: Proc, msg: Msg, out: &mut Vec<Output>) {
        match msg {
            Msg::Hello { view, round, is_quorate, has_records, kept, running, is_clear } => {
                if (view, round) != (self.view, self.round) {
                    return;
                }
                let Sync::Hellos { seen } = &mut self.sync else { return };
                seen.insert(from, Hello { is_quorate, has_records, kept, running, is_clear });
                if self.members.iter().all(|m| seen.get(m).is_some_and(|h| h.is_quorate)) {
                    let seen = std::mem::take(seen);
                    self.cut(&seen, out);
                }
            }
            Msg::Resync { view } => {
                if view == self.view {
                    self.round += 1;
                    self.start_sync(out);
                }
            }
            Msg::Records { view, round, records } => {
                if (view, round) != (self.view, self.round) {
                    return;
                }
                let Sync::AwaitRecords { sender, buffered } = &mut self.sync else { return };
                if *sender != from {
                    return;
                }
                let buffered = std::mem::take(buffered);
                self.adopt(records);
                for item in buffered {
                    match item {
                        Ordered::Message(from, msg) => self.apply(now, from, msg, out),
                        Ordered::Fenced(p) => self.release_of(p, out),
                    }
                }
                log(out, Level::Info, "Service records received");
            }
            other => match &mut self.sync {
                Sync::AwaitRecords { buffered, .. } => buffered.push_back(Ordered::Message(from, other)),
                // Before the cut: members with records keep applying, so that all of them are equal at the cut.
                Sync::Hellos { .. } | Sync::Agreed => self.apply(now, from, other, out),
            },
        }
    }

    /// All Hellos of the view are here, all quorate; every member is at this same position of the total order.
    fn cut(&mut self, seen: &BTreeMap<Proc, Hello>, out: &mut Vec<Output>) {
        if !self.is_quorate {
            return; // lost since our Hello; when it comes back we ask for a new round
        }
        let holder = seen.iter().find(|(_, h)| h.has_records).map(|(p, _)| *p);
        match (holder, &self.records) {
            (Some(sender), Some(records)) => {
                if sender == self.me {
                    out.push(Output::Send(Msg::Records {
                        view: self.view,
                        round: self.round,
                        records: records.clone(),
                    }));
                }
                self.agree();
            }
            (Some(sender), None) if sender == self.me => {
                // Quorum was lost between our Hello and the cut, and the records with it.
                out.push(Output::Send(Msg::Resync { view: self.view }));
            }
            (Some(sender), None) => self.sync = Sync::AwaitRecords { sender, buffered: VecDeque::new() },
            (None, _) if seen.values().any(|h| !h.is_clear) => {
                log(out, Level::Notice, "Waiting for fencing to complete before services are initialized");
                self.sync = Sync::Hellos { seen: seen.clone() };
            }
            (None, _) => self.make_records(seen, out),
        }
    }

    /// Nobody has records, everybody who may run something and is no member is proven dead: the newest ones put aside, as the Hellos correct them.
    fn make_records(&mut self, seen: &BTreeMap<Proc, Hello>, out: &mut Vec<Output>) {
        let newest = seen.values().filter_map(|h| h.kept).max();
        let sender = seen.iter().find(|(_, h)| newest.is_some() && h.kept == newest).map(|(p, _)| *p);
        let old = match (sender, &self.kept) {
            (Some(p), _) if p != self.me => {
                self.sync = Sync::AwaitRecords { sender: p, buffered: VecDeque::new() };
                return;
            }
            (Some(_), Some((view, _))) if Some(*view) != newest => {
                out.push(Output::Send(Msg::Resync { view: self.view }));
                return;
            }
            (Some(_), Some((_, records))) => records.clone(),
            _ => Records::new(),
        };
        let records: Records = self
            .config
            .services
            .iter()
            .map(|s| {
                let base = old.get(&s.id).cloned().unwrap_or_else(|| fresh(s));
                (s.id.clone(), corrected(&s.id, base, seen))
            })
            .collect();
        if sender.is_some() {
            out.push(Output::Send(Msg::Records {
                view: self.view,
                round: self.round,
                records: records.clone(),
            }));
        }
        self.adopt(records);
        log(out, Level::Info, "Services Initialized");
    }

    fn adopt(&mut self, mut records: Records) {
        records.retain(|svc, _| self.config.service(svc).is_some());
        for s in &self.config.services {
            records.entry(s.id.clone()).or_insert_with(|| fresh(s));
        }
        self.records = Some(records);
        self.agree();
    }

    fn agree(&mut self) {
        self.sync = Sync::Agreed;
        self.agreed_view = self.view;
        self.kept = None;
    }
}

/// A record of before, as what runs now corrects it. Nobody is left who could run it unseen.
fn corrected(svc: &str, mut r: Record, seen: &BTreeMap<Proc, Hello>) -> Record {
    let was_parked = std::mem::take(&mut r.parked);
    r.tried.clear();
    let holder = seen
        .iter()
        .find_map(|(p, h)| h.running.iter().find(|(s, _)| s == svc).map(|(_, is_up)| (*p, *is_up)));
    let at = r.transition;
    match (holder, r.state) {
        (Some((p, _)), ServiceState::Failed | ServiceState::Stopping | ServiceState::Recoverable) => {
            r.owner = p
        }
        (Some((p, true)), ServiceState::Starting) if r.owner == p => {}
        (Some((p, true)), _) => {
            r.owner = p;
            r.enter(ServiceState::Started, at);
        }
        (Some((p, false)), _) => {
            r.owner = p;
            r.after_stop = Some(match r.state {
                ServiceState::Disabled => AfterStop::Disabled,
                ServiceState::Stopped if was_parked => AfterStop::Stopped,
                _ => AfterStop::StartAgain { target: None, avoid: None },
            });
            r.enter(ServiceState::Stopping, at);
        }
        (None, ServiceState::Failed) if seen.contains_key(&r.owner) => {}
        (None, state) if state.is_held() => {
            if !seen.contains_key(&r.owner) {
                r.take_over_from = Some(r.owner.node);
            }
            r.last_owner = r.owner.node;
            r.owner = NOBODY;
            r.target = None;
            r.end_stop(at);
        }
        (None, _) => {}
    }
    r
}

/// A service nobody has touched yet.
fn fresh(s: &Service) -> Record {
    Record::new(if s.is_autostart { ServiceState::Stopped } else { ServiceState::Disabled })
}
