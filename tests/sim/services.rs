//! The service manager of each node: a thread of its daemon, with agents that outlive both.
//!
//! What runs on a machine is known to the world alone ([`Node::runs`]): it ends with its stop, with the machine, or when the next life conquers
//! the run directory. A machine that is cut from the LUN may go on running: it changes nothing any more.

use crate::world::{Ev, MS, Mutant, Node, World};
use cairn_base::Rng;
use membership::engine::Guarantee;
use membership::event::GroupName;
use membership::groups::GroupError;
use membership::ipc::{ClusterEvent, LeaveReason, Scope};
use rgmanager::RmConfig;
use rgmanager::core::{Action, Core, Event, Output};
use rgmanager::driver::GROUP;
use rgmanager::record::ServiceState;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// From this seed on nodes have service managers.
pub(crate) const SERVICES: u64 = 300_000;
const RM: &str = r#"<rm><service name="web"/><service name="db" recovery="relocate"/></rm></cluster>"#;

pub(crate) struct Manager {
    core: Core,
    client: u32,
    /// Events of the daemon on their way here.
    untold: u32,
    joined: bool,
    /// Said, and not taken by the daemon yet.
    unsaid: VecDeque<Vec<u8>>,
    /// Until when the agents of a service are busy.
    busy: BTreeMap<String, u64>,
}

fn group() -> GroupName {
    GroupName::new(GROUP).expect("short name")
}

impl World {
    /// A random number that changes nothing for anybody else.
    fn dice(&mut self, below: u64) -> u64 {
        self.services.as_mut().map_or(0, |rng: &mut Rng| rng.below(below))
    }

    pub(crate) fn start_manager(&mut self, i: usize) {
        if self.services.is_none() {
            return;
        }
        let now = self.local(i);
        let mut text = String::from("<cluster name=\"c\" config_version=\"1\"><clusternodes>");
        for n in &self.config.nodes {
            text += &format!("<clusternode name=\"{}\" nodeid=\"{}\"/>", n.name, n.id);
        }
        let mut rm = RmConfig::parse(&(text + "</clusternodes>" + RM)).expect("a good configuration");
        if self.config.quorumd.is_some() {
            let t = &self.config.timing;
            rm.quorum_grace = Duration::from_millis(t.master_after_death + 2 * t.base.cycle);
        }
        let n = &mut self.nodes[i];
        let client = n.next_client;
        n.next_client += 1;
        let d = n.daemon.as_mut().expect("invariant: it has just begun");
        let (me, life) = (d.me, d.me.incarnation.0);
        let core = Core::new(me, rm);
        d.manager = Some(Manager {
            core,
            client,
            untold: 0,
            joined: false,
            unsaid: VecDeque::new(),
            busy: BTreeMap::new(),
        });
        for event in d.stack.core.snapshot(now) {
            self.manager_told(i, event);
        }
        self.after(1000 * MS, Ev::ManagerTick { node: i, life });
    }

    fn manager(&mut self, i: usize) -> Option<&mut Manager> {
        self.nodes[i].daemon.as_mut()?.manager.as_mut()
    }

    pub(crate) fn is_manager(&self, i: usize, clients: &[u32]) -> bool {
        let manager = self.nodes[i].daemon.as_ref().and_then(|d| d.manager.as_ref());
        manager.is_some_and(|m| clients.contains(&m.client))
    }

    /// Puts an event into the manager's socket.
    pub(crate) fn manager_told(&mut self, i: usize, event: ClusterEvent) {
        let Some(m) = self.manager(i) else { return };
        m.untold += 1;
        let life = self.nodes[i].daemon.as_ref().map_or(0, |d| d.me.incarnation.0);
        self.after(50_000, Ev::ToManager { node: i, life, event });
    }

    /// As `rgmanager::driver` does it.
    pub(crate) fn manager_event(&mut self, i: usize, event: ClusterEvent) {
        let Some(d) = &self.nodes[i].daemon else { return };
        let me = d.me;
        let Some(m) = self.manager(i) else { return };
        m.untold -= 1;
        let event = match event {
            ClusterEvent::View(v) if !v.quorate => Event::Quorum(false),
            ClusterEvent::Quorum { quorate, .. } => Event::Quorum(quorate),
            ClusterEvent::Stop { .. } => Event::Over,
            ClusterEvent::Leaving { .. } => Event::Shutdown,
            ClusterEvent::Fenced { proc, scope: Scope::Node, .. } if proc != me => Event::Fenced(proc),
            ClusterEvent::GroupView { group, view_no, members, left, .. } if group == GROUP => Event::View {
                view: view_no,
                members: members.into_iter().map(|m| m.proc).collect(),
                left: left.into_iter().map(|(m, why)| (m.proc, why == LeaveReason::Leave)).collect(),
            },
            ClusterEvent::GroupMessage { group, from, data, .. } if group == GROUP => {
                Event::Message { from, msg: postcard::from_bytes(&data).expect("one of ours") }
            }
            _ => return,
        };
        self.feed_manager(i, event);
        self.look_for_victims(i);
    }

    pub(crate) fn manager_tick(&mut self, i: usize) {
        let life = self.nodes[i].daemon.as_ref().map_or(0, |d| d.me.incarnation.0);
        self.manager_join(i);
        self.feed_manager(i, Event::Tick { wall: self.now / MS / 1000 });
        self.look_for_victims(i);
        self.after(1000 * MS, Ev::ManagerTick { node: i, life });
    }

    fn look_for_victims(&mut self, i: usize) {
        let careless = self.is(Mutant::NoVictimsAtOnce);
        let Some(d) = &self.nodes[i].daemon else { return };
        let Some(m) = &d.manager else { return };
        let core = &d.stack.core;
        let has_none =
            core.quorum().quorate && core.domain().joined() && core.domain().state().victims.is_empty();
        if m.core.awaits_fences() && m.untold == 0 && (has_none || careless) {
            self.feed_manager(i, Event::NoVictims);
        }
    }

    pub(crate) fn manager_join(&mut self, i: usize) {
        let Some(d) = &mut self.nodes[i].daemon else { return };
        let Some(m) = &mut d.manager else { return };
        if !m.joined && d.stack.core.may_join() && !d.stack.is_leaving() {
            m.joined = d.stack.groups.join(m.client, &group(), bytes::Bytes::new()).is_ok();
        }
    }

    fn feed_manager(&mut self, i: usize, event: Event) {
        let now = self.local(i);
        let Some(m) = self.manager(i) else { return };
        let mut out = Vec::new();
        m.core.step(now, event, &mut out);
        for o in out {
            match o {
                Output::Send(msg) => {
                    let bytes = postcard::to_stdvec(&msg).expect("ours encode");
                    self.manager(i).expect("it acts").unsaid.push_back(bytes);
                }
                Output::Run { svc, seq, action } => self.run_service(i, svc, seq, action),
                Output::MayLeave => {
                    let d = self.nodes[i].daemon.as_mut().expect("it acts");
                    let m = d.manager.take().expect("it acts");
                    let _ = d.stack.groups.leave(m.client, &group());
                    return;
                }
                Output::Log { text, .. } => self.say(|| format!("n{} services: {text}", i + 1)),
                Output::Reply { .. } | Output::Changed { .. } => {}
            }
        }
        self.manager_speaks(i);
    }

    pub(crate) fn manager_speaks(&mut self, i: usize) {
        let Some(d) = &mut self.nodes[i].daemon else { return };
        let Some(m) = &mut d.manager else { return };
        while let Some(data) = m.unsaid.front() {
            match d.stack.groups.mcast(m.client, &group(), Guarantee::Agreed, data) {
                Err(GroupError::WouldBlock) => return,
                _ => m.unsaid.pop_front(),
            };
        }
    }

    fn run_service(&mut self, i: usize, svc: String, seq: u64, action: Action) {
        if action == Action::Start {
            self.service_starts(i, &svc);
        }
        let time = (5 + self.dice(200)) * MS;
        let now = self.now;
        let d = self.nodes[i].daemon.as_mut().expect("it acts");
        let life = d.me.incarnation.0;
        let busy = d.manager.as_mut().expect("it acts").busy.entry(svc.clone()).or_default();
        *busy = now.max(*busy) + time;
        let at = *busy;
        self.at(at, Ev::ServiceDone { node: i, life, svc, seq, action });
    }

    /// I20: nobody may start it while somebody else may still change something with it.
    fn service_starts(&mut self, i: usize, svc: &str) {
        let other = |(j, n): &(usize, &Node)| *j != i && !n.blocked && n.runs.contains(svc);
        let found = self.nodes.iter().enumerate().find(other).filter(|_| !self.nodes[i].blocked);
        if let Some((j, _)) = found {
            self.audit.fail(format!("I20 {svc} starts on n{} and runs on n{}", i + 1, j + 1));
        }
        self.say(|| format!("n{} starts {svc}", i + 1));
        self.nodes[i].runs.insert(svc.to_owned());
    }

    pub(crate) fn service_done(&mut self, i: usize, svc: String, seq: u64, action: Action) {
        match action {
            Action::Start => self.service_starts(i, &svc),
            Action::Stop => {
                self.nodes[i].runs.remove(&svc);
            }
            Action::Status => {}
        }
        let ok = action != Action::Status || self.healed || self.dice(20) > 0;
        self.feed_manager(i, Event::Done { svc, seq, action, ok });
    }

    /// What is not yet as it should be with the services.
    pub(crate) fn services_missing(&self) -> String {
        if self.services.is_none() {
            return String::new();
        }
        for (i, n) in self.nodes.iter().enumerate() {
            let Some(m) = n.daemon.as_ref().and_then(|d| d.manager.as_ref()) else {
                return format!("n{} has no service manager", i + 1);
            };
            let Some(records) = m.core.records().filter(|_| m.core.is_agreed()) else {
                return format!("n{} has no records, awaits fences: {}", i + 1, m.core.awaits_fences());
            };
            for (svc, r) in records {
                let at = usize::from(r.owner.node.0).wrapping_sub(1);
                let runs = self.nodes.get(at).is_some_and(|n| n.runs.contains(svc));
                if r.state != ServiceState::Started || !runs {
                    return format!("{svc} is {:?} of {}", r.state, r.owner);
                }
            }
        }
        String::new()
    }
}
