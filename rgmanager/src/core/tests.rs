//! The core under a totally ordered bus with crashes, joins, quorum loss, failing agents and administrators.
//! Checked at every step: a service's agents run on at most one node that is not proven dead (I20).

use super::*;
use crate::record::{NOBODY, Record, ServiceState};
use cairn_base::{Incarnation, Rng};

const CONF: &str = r#"<cluster name="c" config_version="1">
  <clusternodes><clusternode name="a" nodeid="1"/><clusternode name="b" nodeid="2"/><clusternode name="c" nodeid="3"/></clusternodes>
  <rm><failoverdomains><failoverdomain name="d" ordered="1">
      <failoverdomainnode name="a" priority="1"/><failoverdomainnode name="b" priority="2"/></failoverdomain></failoverdomains>
    <service name="web" domain="d" max_restarts="2" restart_expire_time="1000"/>
    <service name="db" recovery="relocate"/>
    <service name="solo" exclusive="1" autostart="0"/>
    <service name="dep" depend="service:db" recovery="disable"/>
  </rm></cluster>"#;

/// One node with its service manager and what its agents hold.
struct Node {
    core: Core,
    /// Services whose start was run and whose stop has not ended well.
    held: BTreeSet<String>,
    /// Those whose last stop has failed: an administrator who disables them has cleaned up.
    failed: BTreeSet<String>,
    /// Actions given to agents and not ended.
    agents: VecDeque<(String, u64, Action)>,
    /// Position in the ordered log.
    delivered: usize,
    /// Requests answered.
    replies: Vec<(u64, AdminCode)>,
    may_leave: bool,
}

#[derive(Clone)]
enum Item {
    View { view: u64, members: Vec<Proc>, left: Vec<(Proc, bool)> },
    Message(Proc, Msg),
    Fenced(Proc),
}

struct Bus {
    nodes: BTreeMap<Proc, Node>,
    log: Vec<Item>,
    members: BTreeSet<Proc>,
    /// Dead, agents perhaps still running, not fenced yet.
    dead: BTreeMap<Proc, BTreeSet<String>>,
    /// What an administrator may vouch for after all.
    dead_failed: BTreeSet<(Proc, String)>,
    view: u64,
    wall: u64,
    fail_start: u64,
    fail_stop: u64,
    grace: Duration,
    seed: u64,
    rng: Rng,
}

impl Bus {
    fn new(seed: u64, fail_start: u64, fail_stop: u64) -> Self {
        Self {
            nodes: BTreeMap::new(),
            log: Vec::new(),
            members: BTreeSet::new(),
            dead: BTreeMap::new(),
            dead_failed: BTreeSet::new(),
            view: 0,
            wall: 1000,
            fail_start,
            fail_stop,
            grace: Duration::ZERO,
            seed,
            rng: Rng::new(seed),
        }
    }

    fn proc(node: u16, incarnation: u64) -> Proc {
        Proc { node: NodeId(node), incarnation: Incarnation(incarnation) }
    }

    fn join(&mut self, p: Proc) {
        let mut config = RmConfig::parse(CONF).unwrap();
        config.quorum_grace = self.grace;
        let core = Core::new(p, config);
        let node = Node {
            core,
            held: BTreeSet::new(),
            failed: BTreeSet::new(),
            agents: VecDeque::new(),
            delivered: self.log.len(),
            replies: Vec::new(),
            may_leave: false,
        };
        self.nodes.insert(p, node);
        self.members.insert(p);
        self.event(p, Event::Quorum(true));
        self.new_view(vec![]);
    }

    fn new_view(&mut self, left: Vec<(Proc, bool)>) {
        self.view += 1;
        self.log.push(Item::View { view: self.view, members: self.members.iter().copied().collect(), left });
    }

    fn crash(&mut self, p: Proc) {
        let node = self.nodes.remove(&p).unwrap();
        self.dead_failed.extend(node.failed.into_iter().map(|svc| (p, svc)));
        self.dead.insert(p, node.held);
        self.members.remove(&p);
        self.new_view(vec![(p, false)]);
    }

    fn fence(&mut self, p: Proc) {
        self.dead.remove(&p);
        self.log.push(Item::Fenced(p));
    }

    fn event(&mut self, p: Proc, event: Event) {
        let mut out = Vec::new();
        let now = Boottime::from_millis(self.wall * 1000);
        let n = self.nodes.get_mut(&p).unwrap();
        n.core.step(now, event, &mut out);
        let is_disabled =
            |svc: &str| n.core.records().is_some_and(|r| r[svc].state == ServiceState::Disabled);
        for (p, svc) in self.dead_failed.iter().filter(|(_, svc)| is_disabled(svc)) {
            self.dead.get_mut(p).map(|held| held.remove(svc));
        }
        for svc in std::mem::take(&mut n.failed) {
            if n.core.records().is_some_and(|r| r[&svc].state == ServiceState::Disabled)
                && !n.agents.iter().any(|(s, ..)| *s == svc)
            {
                n.held.remove(&svc);
            } else {
                n.failed.insert(svc);
            }
        }
        for o in out {
            match o {
                Output::Send(m) => {
                    if self.members.contains(&p) {
                        self.log.push(Item::Message(p, m));
                    }
                }
                Output::Run { svc, seq, action } => {
                    let n = self.nodes.get_mut(&p).unwrap();
                    if action == Action::Start {
                        n.held.insert(svc.clone());
                        self.check();
                    }
                    self.nodes.get_mut(&p).unwrap().agents.push_back((svc, seq, action));
                }
                Output::Reply { id, code, .. } => self.nodes.get_mut(&p).unwrap().replies.push((id, code)),
                Output::MayLeave => self.nodes.get_mut(&p).unwrap().may_leave = true,
                Output::Log { .. } | Output::Changed { .. } => {}
            }
        }
    }

    /// I20.
    fn check(&self) {
        for svc in ["service:web", "service:db", "service:solo", "service:dep"] {
            let live = self.nodes.iter().filter(|(_, n)| n.held.contains(svc)).map(|(p, _)| p);
            let dead = self.dead.iter().filter(|(_, h)| h.contains(svc)).map(|(p, _)| p);
            let holders: Vec<_> = live.chain(dead).collect();
            assert!(holders.len() <= 1, "seed {}: {svc} runs on {holders:?}", self.seed);
        }
    }

    /// Deliver the next ordered item to one node.
    fn deliver(&mut self, p: Proc) -> bool {
        let n = self.nodes.get_mut(&p).unwrap();
        let Some(item) = self.log.get(n.delivered).cloned() else {
            let is_clear = self.dead.is_empty() && n.core.awaits_fences();
            if is_clear {
                self.event(p, Event::NoVictims);
            }
            return is_clear;
        };
        n.delivered += 1;
        let event = match item {
            Item::View { view, members, left } => Event::View { view, members, left },
            Item::Message(from, msg) => Event::Message { from, msg },
            Item::Fenced(p) => Event::Fenced(p),
        };
        self.event(p, event);
        true
    }

    fn run_agent(&mut self, p: Proc) -> bool {
        let (start, stop) = (self.fail_start, self.fail_stop);
        let ok_start = !self.rng.chance(start, 100);
        let ok_stop = !self.rng.chance(stop, 100);
        let n = self.nodes.get_mut(&p).unwrap();
        let Some((svc, seq, action)) = n.agents.pop_front() else { return false };
        let ok = match action {
            Action::Start => {
                // A stop that was queued before may have taken away what the order to start had put here.
                n.held.insert(svc.clone());
                ok_start
            }
            Action::Stop => {
                if ok_stop {
                    n.held.remove(&svc);
                    n.failed.remove(&svc);
                } else {
                    n.failed.insert(svc.clone());
                }
                ok_stop
            }
            Action::Status => ok_start,
        };
        self.check();
        self.event(p, Event::Done { svc, seq, action, ok });
        true
    }

    fn settle(&mut self) {
        for _ in 0..2000 {
            let mut moved = false;
            for p in self.nodes.keys().copied().collect::<Vec<_>>() {
                while self.deliver(p) {
                    moved = true;
                }
                while self.run_agent(p) {
                    moved = true;
                }
            }
            if !moved {
                return;
            }
        }
        panic!("services never settle");
    }

    fn record(&self, svc: &str) -> Record {
        self.nodes.values().next().unwrap().core.records().unwrap()[svc].clone()
    }
}

fn three(fail_start: u64) -> (Bus, [Proc; 3]) {
    let mut bus = Bus::new(1, fail_start, 0);
    let p = [Bus::proc(1, 1), Bus::proc(2, 1), Bus::proc(3, 1)];
    for q in p {
        bus.join(q);
    }
    bus.settle();
    (bus, p)
}

#[test]
fn services_start_once_on_their_best_node() {
    let (bus, p) = three(0);
    assert_eq!(bus.record("service:web").owner, p[0]);
    assert_eq!(bus.record("service:web").state, ServiceState::Started);
    assert_eq!(bus.record("service:dep").state, ServiceState::Started);
    assert_eq!(bus.record("service:solo").state, ServiceState::Disabled);
    let first = bus.nodes[&p[0]].core.records();
    assert!(p.iter().all(|q| bus.nodes[q].core.records() == first), "records agree");
}

#[test]
fn takeover_waits_for_the_fence() {
    let (mut bus, p) = three(0);
    bus.crash(p[0]);
    bus.settle();
    assert_eq!(bus.record("service:web").owner, p[0], "still held by the lost node");
    bus.fence(p[0]);
    bus.settle();
    assert_eq!(bus.record("service:web").owner, p[1], "next priority of the domain");
    // The node returns: ordered domain without nofailback, so the service goes home.
    let again = Bus::proc(1, 2);
    bus.join(again);
    bus.settle();
    assert_eq!(bus.record("service:web").owner, again);
}

#[test]
fn a_late_fence_of_an_old_life_does_not_stop_the_new_one() {
    let (mut bus, p) = three(0);
    bus.crash(p[2]);
    let again = Bus::proc(3, 2);
    bus.join(again);
    bus.settle();
    bus.event(
        again,
        Event::Request {
            id: 1,
            svc: "service:web".into(),
            op: AdminOp::Relocate { target: Some(NodeId(3)) },
            at: 1,
        },
    );
    bus.settle();
    assert_eq!(bus.record("service:web").owner, again);
    bus.fence(p[2]);
    bus.settle();
    assert_eq!(bus.record("service:web").owner, again, "only the dead incarnation's services are released");
    assert_eq!(bus.record("service:web").state, ServiceState::Started);
}

#[test]
fn a_failed_stop_holds_the_service_until_disabled() {
    let (mut bus, p) = three(0);
    bus.fail_stop = 100;
    bus.event(
        p[1],
        Event::Request { id: 7, svc: "service:web".into(), op: AdminOp::Relocate { target: None }, at: 1 },
    );
    bus.settle();
    assert_eq!(bus.record("service:web").state, ServiceState::Failed);
    assert_eq!(bus.nodes[&p[1]].replies, [(7, AdminCode::Aborted)]);
    bus.fail_stop = 0;
    bus.event(p[1], Event::Request { id: 8, svc: "service:web".into(), op: AdminOp::Disable, at: 1 });
    bus.settle();
    assert_eq!(bus.record("service:web").state, ServiceState::Disabled);
    assert_eq!(bus.nodes[&p[1]].replies[1], (8, AdminCode::Success));
}

#[test]
fn losing_quorum_stops_everything_and_regaining_it_starts_anew() {
    let (mut bus, p) = three(0);
    for q in p {
        bus.event(q, Event::Quorum(false));
    }
    bus.settle();
    assert!(bus.nodes.values().all(|n| n.held.is_empty() && n.core.records().is_none()));
    for q in p {
        bus.event(q, Event::Quorum(true));
    }
    bus.settle();
    assert_eq!(bus.record("service:web").state, ServiceState::Started);
}

/// The device's votes follow a new view by a moment: what runs goes on, what is disabled stays so, checks go on.
#[test]
fn a_short_loss_of_quorum_stops_nothing() {
    let mut bus = Bus::new(1, 0, 0);
    bus.grace = Duration::from_secs(10);
    let p = [Bus::proc(1, 1), Bus::proc(2, 1), Bus::proc(3, 1)];
    for q in p {
        bus.join(q);
    }
    bus.settle();
    bus.event(p[1], Event::Request { id: 1, svc: "service:db".into(), op: AdminOp::Disable, at: 1 });
    bus.settle();
    let held: Vec<_> = p.iter().map(|q| bus.nodes[q].held.clone()).collect();
    bus.crash(p[2]);
    for q in &p[..2] {
        bus.event(*q, Event::Quorum(false));
    }
    bus.settle();
    assert!(p[..2].iter().all(|q| bus.nodes[q].core.records().is_none()));
    bus.fence(p[2]);
    for q in &p[..2] {
        bus.event(*q, Event::Quorum(true));
    }
    bus.settle();
    assert_eq!(bus.record("service:db").state, ServiceState::Disabled);
    assert_eq!(bus.record("service:web").owner, p[0]);
    for (q, before) in p[..2].iter().zip(held) {
        assert_eq!(bus.nodes[q].held, before, "nothing was stopped, nothing was started");
    }
    bus.fail_start = 100;
    let wall = bus.wall;
    bus.event(p[0], Event::Tick { wall });
    bus.run_agent(p[0]);
    bus.fail_start = 0;
    bus.settle();
    assert_eq!(bus.record("service:web").restarts, 1, "a failed check is noticed");
}

/// Quorum stays away: everything stops when the time is up, and not before.
#[test]
fn a_long_loss_of_quorum_stops_everything() {
    let mut bus = Bus::new(1, 0, 0);
    bus.grace = Duration::from_secs(10);
    let p = Bus::proc(1, 1);
    bus.join(p);
    bus.settle();
    bus.event(p, Event::Quorum(false));
    for (after, running) in [(9, true), (10, false)] {
        bus.wall = 1000 + after;
        let wall = bus.wall;
        bus.event(p, Event::Tick { wall });
        bus.settle();
        assert_eq!(!bus.nodes[&p].held.is_empty(), running, "after {after} s");
    }
    bus.event(p, Event::Quorum(true));
    bus.settle();
    assert_eq!(bus.record("service:web").state, ServiceState::Started);
    bus.event(p, Event::Over);
    bus.settle();
    assert!(bus.nodes[&p].held.is_empty(), "the end of a life waits for nothing");
}

/// Two nodes missed each other while neither had quorum: nobody is fenced, nobody waits for that.
#[test]
fn who_comes_back_in_the_same_life_needs_no_fence() {
    let (mut bus, p) = three(0);
    for q in p {
        bus.event(q, Event::Quorum(false));
    }
    bus.settle();
    bus.members.remove(&p[2]);
    bus.new_view(vec![(p[2], false)]);
    for q in &p[..2] {
        while bus.deliver(*q) {}
    }
    bus.members.insert(p[2]);
    bus.new_view(vec![]);
    for q in p {
        bus.event(q, Event::Quorum(true));
    }
    bus.settle();
    assert_eq!(bus.record("service:web").state, ServiceState::Started);
}

/// A side without quorum loses a node that no quorate side ever saw. When the fence domain forms, it proves that nothing runs on that node, and
/// says so of no life by name.
#[test]
fn who_the_fence_domain_never_knew_is_not_waited_for_when_it_has_no_victims() {
    let (mut bus, p) = three(0);
    for q in p {
        bus.event(q, Event::Quorum(false));
    }
    bus.settle();
    bus.nodes.remove(&p[2]);
    bus.members.remove(&p[2]);
    bus.new_view(vec![(p[2], false)]);
    bus.settle();
    for q in &p[..2] {
        bus.event(*q, Event::Quorum(true));
    }
    let whatever_runs = Proc { incarnation: Incarnation(0), ..p[2] };
    bus.dead.insert(whatever_runs, BTreeSet::new());
    bus.settle();
    assert!(p[..2].iter().all(|q| bus.nodes[q].core.awaits_fences()));
    bus.event(p[0], Event::NoVictims);
    bus.settle();
    assert!(bus.nodes[&p[0]].core.records().is_none(), "the other one still knows of a victim");
    bus.fence(whatever_runs);
    bus.settle();
    assert_eq!(bus.record("service:web").state, ServiceState::Started);
}

/// A claim of one that is proved dead already is ordered behind the proof, as what the ring recovers of its last messages may be.
#[test]
fn a_claim_behind_the_proof_of_its_death_holds_nothing() {
    let (mut bus, p) = three(0);
    bus.crash(p[0]);
    bus.settle();
    bus.fence(p[0]);
    let before = bus.log.len();
    while bus.log.len() == before {
        assert!(bus.deliver(p[1]), "it takes the service over");
    }
    assert!(matches!(bus.log[before], Item::Message(by, _) if by == p[1]), "its claim");
    bus.log.insert(before, Item::Fenced(p[1]));
    bus.nodes.remove(&p[1]);
    bus.members.remove(&p[1]);
    bus.new_view(vec![(p[1], false)]);
    bus.settle();
    let r = bus.record("service:web");
    assert_eq!((r.owner, r.state), (p[2], ServiceState::Started));
}

/// Its last stop ends while a view is being agreed on: it goes, and nobody has heard of the stop.
#[test]
fn what_a_leaver_could_not_say_any_more_holds_nothing() {
    let (mut bus, p) = three(0);
    assert_eq!(bus.record("service:web").owner, p[0]);
    bus.event(p[0], Event::Shutdown);
    while bus.nodes[&p[0]].agents.is_empty() {
        assert!(p.iter().any(|q| bus.deliver(*q)), "its services are stopped");
    }
    bus.crash(p[2]);
    while bus.nodes[&p[0]].core.is_agreed() {
        assert!(bus.deliver(p[0]));
    }
    while bus.run_agent(p[0]) {}
    assert!(bus.nodes[&p[0]].may_leave);
    bus.nodes.remove(&p[0]);
    bus.members.remove(&p[0]);
    bus.new_view(vec![(p[0], true)]);
    bus.fence(p[2]);
    bus.settle();
    assert_eq!(
        (bus.record("service:web").owner, bus.record("service:web").state),
        (p[1], ServiceState::Started)
    );
}

/// An administrator's stop does not end: its owner dies in it, or goes and nobody has heard.
#[test]
fn a_disable_or_stop_holds_though_the_owner_does_not_live_to_say_it() {
    for (op, state) in [(AdminOp::Disable, ServiceState::Disabled), (AdminOp::Stop, ServiceState::Stopped)] {
        for goes in [false, true] {
            let (mut bus, p) = three(0);
            assert_eq!(bus.record("service:web").owner, p[0]);
            bus.event(p[1], Event::Request { id: 1, svc: "service:web".into(), op: op.clone(), at: 1 });
            while p.iter().any(|q| bus.deliver(*q)) {}
            let r = bus.record("service:web");
            assert_eq!((r.owner, r.state), (p[0], ServiceState::Stopping), "{op:?}");
            if goes {
                // It has ended well, which is not ordered any more.
                bus.nodes.remove(&p[0]);
                bus.members.remove(&p[0]);
                bus.new_view(vec![(p[0], true)]);
            } else {
                bus.crash(p[0]);
                bus.settle();
                assert_eq!(bus.nodes[&p[1]].replies, [], "nothing is promised before the fence");
                bus.fence(p[0]);
            }
            bus.settle();
            let r = bus.record("service:web");
            assert_eq!((r.owner, r.state), (NOBODY, state), "{op:?}, goes {goes}");
            assert!(bus.nodes.values().all(|n| !n.held.contains("service:web")), "{op:?}, goes {goes}");
            assert_eq!(bus.nodes[&p[1]].replies, [(1, AdminCode::Success)]);
            bus.event(
                p[1],
                Event::Request {
                    id: 2,
                    svc: "service:web".into(),
                    op: AdminOp::Enable { target: None },
                    at: 1,
                },
            );
            bus.settle();
            assert_eq!(bus.record("service:web").owner, p[1], "it can be enabled again");
        }
    }
}

/// The owner is dead already, and not yet fenced, when the administrator asks.
#[test]
fn a_disable_between_crash_and_fence_holds() {
    let (mut bus, p) = three(0);
    bus.crash(p[0]);
    bus.settle();
    bus.event(p[1], Event::Request { id: 1, svc: "service:web".into(), op: AdminOp::Disable, at: 1 });
    bus.settle();
    assert_eq!(bus.record("service:web").state, ServiceState::Stopping);
    bus.fence(p[0]);
    bus.settle();
    assert_eq!(bus.record("service:web").state, ServiceState::Disabled);
    assert_eq!(bus.nodes[&p[1]].replies, [(1, AdminCode::Success)]);
}

/// New lives become quorate while one of before, of which they have never heard, still runs everything.
#[test]
fn who_knows_nothing_of_before_starts_nothing_until_the_fence_domain_has_no_victims() {
    let mut bus = Bus::new(1, 0, 0);
    let whatever_runs = Bus::proc(3, 0);
    bus.dead.insert(whatever_runs, ["service:web", "service:db"].map(String::from).into());
    for q in [Bus::proc(1, 1), Bus::proc(2, 1)] {
        bus.join(q);
    }
    bus.settle();
    assert!(bus.nodes.values().all(|n| n.held.is_empty() && n.core.records().is_none()));
    bus.fence(whatever_runs);
    bus.settle();
    assert_eq!(bus.record("service:web").state, ServiceState::Started);
}

/// Somebody is to be fenced since: what was so before quorum was lost says nothing of now.
#[test]
fn that_there_were_no_victims_does_not_outlive_quorum() {
    let (mut bus, p) = three(0);
    for is in [false, true, false] {
        for q in p {
            bus.event(q, Event::Quorum(is));
            bus.event(q, Event::NoVictims);
        }
    }
    bus.settle();
    let asked_for = Bus::proc(4, 0);
    bus.dead.insert(asked_for, BTreeSet::new());
    for q in p {
        bus.event(q, Event::Quorum(true));
    }
    bus.settle();
    assert!(p.iter().all(|q| bus.nodes[q].core.awaits_fences()));
    bus.fence(asked_for);
    bus.settle();
    assert_eq!(bus.record("service:web").owner, p[0]);
}

#[test]
fn restart_limit_relocates() {
    let (mut bus, p) = three(0);
    for round in 0..3 {
        let r = bus.record("service:web");
        let msg = Msg::StatusFailed { svc: "service:web".into(), seq: r.seq, at: 1000 + round };
        bus.log.push(Item::Message(r.owner, msg));
        bus.settle();
        let expect = if round < 2 { p[0] } else { p[1] };
        assert_eq!(bus.record("service:web").owner, expect, "round {round}");
    }
}

#[test]
fn a_leaver_hands_its_services_over_before_it_goes() {
    let (mut bus, p) = three(0);
    bus.event(p[0], Event::Shutdown);
    bus.settle();
    assert!(bus.nodes[&p[0]].may_leave);
    assert!(bus.nodes[&p[0]].held.is_empty());
    assert_eq!(bus.record("service:web").owner, p[1]);
}

/// Random crashes, fences, joins, quorum losses, agent failures, administrators; then calm: everything settles.
#[test]
fn prop_one_copy_under_random_faults() {
    for seed in 0..3000 {
        let mut bus = Bus::new(seed, 10, 3);
        bus.grace = Duration::from_secs(seed % 2 * 5);
        let mut lives = [1_u64; 3];
        for node in 1..=3 {
            bus.join(Bus::proc(node, 1));
        }
        for step in 0..300 {
            let mut rng = bus.rng.fork(step);
            let nodes: Vec<Proc> = bus.nodes.keys().copied().collect();
            let pick = nodes.get(rng.below(nodes.len() as u64) as usize).copied();
            match (rng.below(100), pick) {
                (0..60, Some(p)) => {
                    bus.deliver(p);
                }
                (60..80, Some(p)) => {
                    bus.run_agent(p);
                }
                (80..83, Some(p)) if nodes.len() > 1 => bus.crash(p),
                (83..88, _) => {
                    if let Some(p) = bus.dead.keys().next().copied() {
                        bus.fence(p);
                    }
                }
                (88..91, _) => {
                    let node = rng.below(3) as u16 + 1;
                    if !bus.nodes.keys().any(|p| p.node.0 == node) {
                        lives[node as usize - 1] += 1;
                        bus.join(Bus::proc(node, lives[node as usize - 1]));
                    }
                }
                (91..94, _) => {
                    // Quorum goes for all of the component, at different positions of their streams.
                    for p in &nodes {
                        bus.event(*p, Event::Quorum(false));
                    }
                    for p in &nodes {
                        while rng.chance(1, 2) && (bus.deliver(*p) || bus.run_agent(*p)) {}
                        bus.event(*p, Event::Quorum(true));
                    }
                }
                (94..98, Some(p)) => {
                    let ops = [
                        AdminOp::Enable { target: None },
                        AdminOp::Disable,
                        AdminOp::Relocate { target: None },
                        AdminOp::Restart,
                        AdminOp::Stop,
                    ];
                    let op = ops[rng.below(5) as usize].clone();
                    let svc =
                        ["service:web", "service:db", "service:solo", "service:dep"][rng.below(4) as usize];
                    bus.event(p, Event::Request { id: step, svc: svc.into(), op, at: 1 });
                }
                (_, Some(p)) => {
                    bus.wall += 7;
                    let wall = bus.wall;
                    bus.event(p, Event::Tick { wall });
                }
                _ => {}
            }
            bus.check();
        }
        bus.fail_start = 0;
        bus.fail_stop = 0;
        while let Some(p) = bus.dead.keys().next().copied() {
            bus.fence(p);
        }
        bus.settle();
        bus.check();
        let all: Vec<_> = bus.nodes.values().map(|n| n.core.records()).collect();
        for w in all.windows(2) {
            assert_eq!(strip(w[0]), strip(w[1]), "seed {seed}: records differ");
        }
        for (svc, r) in all[0].unwrap() {
            let held = bus.nodes.iter().find(|(_, n)| n.held.contains(svc)).map(|(p, _)| *p);
            match r.state {
                ServiceState::Started => assert_eq!(
                    held,
                    Some(r.owner),
                    "seed {seed}: {svc} is recorded as running where it does not run"
                ),
                ServiceState::Failed => {}
                ServiceState::Stopped | ServiceState::Recovering | ServiceState::Disabled => {
                    assert_eq!(held, None, "seed {seed}: {svc} runs and is recorded as {:?}", r.state);
                }
                state => panic!("seed {seed}: {svc} stays {state:?}"),
            }
        }
    }
}

/// Times of takeovers are taken from each node's own clock; everything else must be equal.
fn strip(records: Option<&Records>) -> Option<Records> {
    let mut r = records?.clone();
    for v in r.values_mut() {
        v.transition = 0;
    }
    Some(r)
}
