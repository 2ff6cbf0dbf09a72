//! The replicated service state machine: `step(now, event) -> actions`, no I/O.
//!
//! Every member feeds the same ordered events (messages, group views, `Fenced`) to its core, so all records agree.
//! Rules (invariant I20, at most one running copy):
//!
//! * A service is claimed by an ordered [`Msg::Claim`] that counts only while its record is not held; the first one
//!   delivered wins. Only the node named by the record runs agents for it.
//! * The record of a lost owner stays held until `Fenced(owner)` is delivered; then it becomes stopped.
//! * Nothing is claimed without quorum, or before the members' records agree (the sync round below).
//! * Losing quorum ends every decision at once: the records are put aside. What runs here is stopped (emergency) when quorum is not back within
//!   [`RmConfig::quorum_grace`]: the device's votes follow a new view by a moment, and nobody can take a service over before this node's fence.
//!
//! Sync round: at each group view, and when quorum comes back, every member multicasts [`Msg::Hello`]. At the delivery of the last one (the cut),
//! if all are quorate, the lowest member that has records multicasts them; members without buffer what is delivered after the cut and
//! apply it on top. If nobody has records they are made anew, when the fence domain has nobody left to fence, from what the Hellos say is running, from the
//! newest records put aside (what an administrator has disabled or frozen, what has failed), and from the configuration.
//! Records exist only while their holder is quorate, so two different sets of them can never meet.
//!
//! What an owner says of its services follows from its record and from what its agents did last ([`Core::reconcile`]), never
//! from the one moment in which an agent ended: that may fall between two views.
//!
//! | state | left by |
//! |---|---|
//! | stopped, recovering | Claim → starting |
//! | starting | Started → started; StartFailed → recoverable (stop), then another node |
//! | started | admin, StatusFailed, better node → stopping / recoverable |
//! | stopping, recoverable | Stopped → as `after_stop` says; StopFailed → failed |
//! | failed | admin disable |
//! | disabled | admin enable |

mod apply;
mod decide;
mod event;
mod sync;

pub use event::{Action, AdminCode, AdminOp, Event, Level, Msg, Output, Records};

use crate::config::RmConfig;
use cairn_base::{Boottime, NodeId, Proc};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

struct Waiter {
    id: u64,
    svc: String,
    op: AdminOp,
    /// Requests are matched to their own ordered message: true once it was delivered.
    is_delivered: bool,
}

#[derive(Clone)]
struct Hello {
    is_quorate: bool,
    has_records: bool,
    kept: Option<u64>,
    running: Vec<(String, bool)>,
    is_clear: bool,
}

/// What the agents of a service did last on this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Starting,
    Up,
    StartFailed,
    Stopping,
    StopFailed,
}

/// A service that may hold resources on this node.
#[derive(Clone, Copy, Debug)]
struct Held {
    phase: Phase,
    /// Sequence number of the record that ordered the last action; `None` for an emergency stop.
    ordered: Option<u64>,
    /// Number of that action. Agents work off a service's actions one after the other, so only the end of the last one tells what is held.
    action: u64,
}

/// Member-local phase of the sync round.
enum Sync {
    /// Waiting for Hellos of `view`.
    Hellos {
        seen: BTreeMap<Proc, Hello>,
    },
    /// The cut passed, we have no records: messages after it are kept until the records come.
    AwaitRecords {
        sender: Proc,
        buffered: VecDeque<Ordered>,
    },
    Agreed,
}

/// What is delivered between the cut and the records.
enum Ordered {
    Message(Proc, Msg),
    Fenced(Proc),
}

/// See the module comment.
pub struct Core {
    me: Proc,
    config: RmConfig,
    is_quorate: bool,
    view: u64,
    /// Sync rounds asked for in this view; the same at every member, since `Resync` is ordered.
    round: u64,
    members: BTreeSet<Proc>,
    leaving: BTreeSet<Proc>,
    /// Members that are proved dead already. What they have said last, a claim too, may be ordered behind the proof and before the view without them.
    fenced: BTreeSet<Proc>,
    sync: Sync,
    records: Option<Records>,
    /// Group view in which the records were agreed on last.
    agreed_view: u64,
    /// Records of the time before quorum was lost, with their `agreed_view`.
    kept: Option<(u64, Records)>,
    /// When everything here stops unless quorum is back.
    stop_at: Option<Boottime>,
    /// Services whose agents run or may have run on this node since the last completed stop.
    running: BTreeMap<String, Held>,
    /// Number of the last start or stop given to agents.
    actions: u64,
    waiters: Vec<Waiter>,
    /// Claims sent and not yet delivered: not sent twice.
    claimed: BTreeMap<String, u64>,
    /// Status checks: next due, and whether one is running.
    checks: BTreeMap<String, (Boottime, bool)>,
    /// In this view the fence domain had nobody left to fence. With records the lost hold their services by name; without, whoever is not proved
    /// dead may run any, also one of whom no member has ever heard.
    is_clear: bool,
    is_shutting_down: bool,
    /// A node joined since services were last compared with their best node.
    has_joiner: bool,
    wall: u64,
}

impl Core {
    pub fn new(me: Proc, config: RmConfig) -> Self {
        Self {
            me,
            config,
            is_quorate: false,
            view: 0,
            round: 0,
            members: BTreeSet::new(),
            leaving: BTreeSet::new(),
            fenced: BTreeSet::new(),
            sync: Sync::Hellos { seen: BTreeMap::new() },
            records: None,
            agreed_view: 0,
            kept: None,
            stop_at: None,
            running: BTreeMap::new(),
            actions: 0,
            has_joiner: false,
            waiters: Vec::new(),
            claimed: BTreeMap::new(),
            checks: BTreeMap::new(),
            is_clear: false,
            is_shutting_down: false,
            wall: 0,
        }
    }

    /// Services are not initialized before [`Event::NoVictims`].
    pub fn awaits_fences(&self) -> bool {
        self.records.is_none()
            && self.is_quorate
            && !self.is_clear
            && self.members.contains(&self.me)
            && matches!(self.sync, Sync::Hellos { .. })
    }

    pub fn records(&self) -> Option<&Records> {
        self.records.as_ref()
    }

    pub fn config(&self) -> &RmConfig {
        &self.config
    }

    /// Nodes that run a service manager in the present view.
    pub fn online(&self) -> BTreeSet<NodeId> {
        self.members.iter().map(|p| p.node).collect()
    }

    pub fn is_agreed(&self) -> bool {
        self.is_quorate && matches!(self.sync, Sync::Agreed) && self.records.is_some()
    }

    pub fn step(&mut self, now: Boottime, event: Event, out: &mut Vec<Output>) {
        match event {
            Event::Quorum(is) => self.on_quorum(now, is, out),
            Event::Over => {
                self.on_quorum(now, false, out);
                self.emergency_stop(out);
            }
            Event::View { view, members, left } => self.on_view(view, members, left, out),
            Event::Fenced(p) => self.on_fenced(p, out),
            Event::NoVictims => self.on_no_victims(out),
            Event::Message { from, msg } => self.on_message(now, from, msg, out),
            Event::Done { svc, seq, action, ok } => self.on_done(now, &svc, seq, action, ok, out),
            Event::Request { id, svc, op, at } => self.on_request(id, svc, op, at, out),
            Event::Shutdown => self.on_shutdown(out),
            Event::Tick { wall } => {
                self.wall = wall;
                if self.stop_at.is_some_and(|at| now >= at) {
                    self.emergency_stop(out);
                }
                self.poll_status(now, out);
            }
        }
        self.evaluate(out);
    }

    fn on_quorum(&mut self, now: Boottime, is: bool, out: &mut Vec<Output>) {
        if is == self.is_quorate {
            return;
        }
        self.is_quorate = is;
        if is {
            self.stop_at = None;
            log(out, Level::Notice, "Quorum formed");
            if self.members.contains(&self.me) {
                out.push(Output::Send(Msg::Resync { view: self.view }));
            }
            return;
        }
        self.is_clear = false;
        log(out, Level::Emerg, "#1: Quorum Dissolved");
        if self.config.quorum_grace.is_zero() {
            self.emergency_stop(out);
        } else {
            self.stop_at = Some(now + self.config.quorum_grace);
        }
        if let Some(records) = self.records.take() {
            self.kept = Some((self.agreed_view, records));
        }
        self.claimed.clear();
        self.checks.clear();
        self.sync = Sync::Hellos { seen: BTreeMap::new() };
        for w in std::mem::take(&mut self.waiters) {
            out.push(Output::Reply { id: w.id, code: AdminCode::NoQuorum, owner: None });
        }
    }

    fn emergency_stop(&mut self, out: &mut Vec<Output>) {
        self.stop_at = None;
        for svc in self.running.keys().cloned().collect::<Vec<_>>() {
            self.run(&svc, Phase::Stopping, None, out);
        }
    }

    /// Gives a start or a stop to the agents.
    fn run(&mut self, svc: &str, phase: Phase, ordered: Option<u64>, out: &mut Vec<Output>) {
        self.actions += 1;
        self.running.insert(svc.to_owned(), Held { phase, ordered, action: self.actions });
        let action = if phase == Phase::Starting { Action::Start } else { Action::Stop };
        out.push(Output::Run { svc: svc.to_owned(), seq: self.actions, action });
    }

    fn on_done(
        &mut self,
        now: Boottime,
        svc: &str,
        seq: u64,
        action: Action,
        ok: bool,
        out: &mut Vec<Output>,
    ) {
        match action {
            Action::Status => {
                if let Some(c) = self.checks.get_mut(svc) {
                    *c = (now + self.config.status_poll, false);
                }
                if !ok {
                    self.checks.remove(svc);
                    out.push(Output::Send(Msg::StatusFailed { svc: svc.to_owned(), seq, at: self.wall }));
                }
            }
            // An answer to an older action than the last one says nothing of now.
            Action::Start => {
                if !ok {
                    log(out, Level::Err, &format!("#68: Failed to start {svc}; return value: 1"));
                }
                if let Some(h) = self.running.get_mut(svc).filter(|h| h.action == seq) {
                    h.phase = if ok { Phase::Up } else { Phase::StartFailed };
                }
            }
            Action::Stop => {
                let is_last = |h: &Held| h.action == seq;
                if ok {
                    if self.running.get(svc).is_some_and(is_last) {
                        self.running.remove(svc);
                    }
                } else if let Some(h) = self.running.get_mut(svc).filter(|h| is_last(h)) {
                    h.phase = Phase::StopFailed;
                }
            }
        }
    }

    fn on_request(&mut self, id: u64, svc: String, op: AdminOp, at: u64, out: &mut Vec<Output>) {
        let code = if !self.is_agreed() {
            Some(AdminCode::NoQuorum)
        } else if self.config.service(&svc).is_none() {
            Some(AdminCode::NoService)
        } else {
            None
        };
        if let Some(code) = code {
            out.push(Output::Reply { id, code, owner: None });
            return;
        }
        self.waiters.push(Waiter { id, svc: svc.clone(), op: op.clone(), is_delivered: false });
        out.push(Output::Send(Msg::Admin { svc, op, at }));
    }

    fn on_shutdown(&mut self, out: &mut Vec<Output>) {
        if !self.is_shutting_down {
            self.is_shutting_down = true;
            log(out, Level::Notice, "Shutting down");
            out.push(Output::Send(Msg::ShuttingDown));
        }
    }

    /// Ask for the next `Tick` no later than this.
    pub fn tick_after(&self) -> Duration {
        self.config.status_poll.min(Duration::from_secs(1))
    }
}

fn log(out: &mut Vec<Output>, level: Level, text: &str) {
    out.push(Output::Log { level, text: text.to_owned() });
}

#[cfg(test)]
mod tests;
