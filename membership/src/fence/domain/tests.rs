//! The domain in a small world: totally ordered messages inside a component, crashes before, during and after each of
//! them, cuts, heals, restarts, agents that fail. What counts is what really happened to a life, which only the world knows.

use super::*;
use cairn_base::Rng;
use std::collections::VecDeque;

const NODES: u16 = 3;

fn config(me: Proc) -> DomainConfig {
    DomainConfig {
        me,
        nodes: (1..=NODES).map(|n| (NodeId(n), (format!("n{n}"), true))).collect(),
        post_fail_delay: Some(Duration::ZERO),
        post_join_delay: Some(Duration::from_secs(3)),
        clean_start: false,
        skip_undefined: false,
        takeover: Duration::from_secs(200),
    }
}

struct Node {
    proc: Proc,
    core: Domain,
    fenced: Vec<Proc>,
    /// Messages of mine that nobody has got yet.
    sent: VecDeque<DomainMsg>,
    /// Views whose decisions its state includes.
    included: BTreeSet<u64>,
}

struct World {
    now: Boottime,
    rng: Rng,
    view: u64,
    nodes: BTreeMap<NodeId, Node>,
    /// Component of each living node.
    part: BTreeMap<NodeId, u8>,
    last_life: BTreeMap<NodeId, u64>,
    /// The last quorate view in each node's file.
    recorded: BTreeMap<NodeId, u64>,
    /// Lives that are really over.
    dead: BTreeSet<Proc>,
    left_cleanly: BTreeSet<Proc>,
    agents: Vec<(NodeId, Proc, Proc, bool)>,
    log: Vec<String>,
    fail_agents: bool,
    /// Lives that found themselves excluded; they end after the present step.
    doomed: Vec<Proc>,
    /// Last life of a node when an agent proved the death of whatever ran there.
    looked: BTreeMap<NodeId, u64>,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            now: Boottime::from_millis(1000),
            rng: Rng::new(seed),
            view: 0,
            nodes: BTreeMap::new(),
            part: BTreeMap::new(),
            last_life: BTreeMap::new(),
            recorded: BTreeMap::new(),
            dead: BTreeSet::new(),
            left_cleanly: BTreeSet::new(),
            agents: Vec::new(),
            log: Vec::new(),
            fail_agents: true,
            doomed: Vec::new(),
            looked: BTreeMap::new(),
        }
    }

    fn boot(&mut self, id: NodeId) {
        let life = self.last_life.entry(id).or_default();
        *life += 1;
        let proc = Proc { node: id, incarnation: Incarnation(*life) };
        let core = Domain::new(config(proc));
        self.nodes.insert(
            id,
            Node { proc, core, fenced: Vec::new(), sent: VecDeque::new(), included: BTreeSet::new() },
        );
        // alone in a component of its own until the next healing
        let part = (0..=u8::MAX).find(|p| !self.part.values().any(|q| q == p)).unwrap();
        self.part.insert(id, part);
        self.install(part);
    }

    fn kill(&mut self, id: NodeId, why: &str) {
        if let Some(node) = self.nodes.remove(&id) {
            self.log.push(format!("{} dies: {why}", node.proc));
            self.dead.insert(node.proc);
            let part = self.part.remove(&id).unwrap();
            self.agents.retain(|(n, ..)| *n != id);
            self.install(part);
        }
    }

    fn reap(&mut self) {
        while let Some(p) = self.doomed.pop() {
            if self.nodes.get(&p.node).is_some_and(|n| n.proc == p) {
                self.kill(p.node, "excluded");
            }
        }
    }

    fn members(&self, part: u8) -> Vec<NodeId> {
        self.part.iter().filter(|(_, p)| **p == part).map(|(n, _)| *n).collect()
    }

    fn quorate(&self, part: u8) -> bool {
        self.members(part).len() * 2 > NODES as usize
    }

    /// Synchronisation round and new view of a component.
    fn install(&mut self, part: u8) {
        let ids = self.members(part);
        if ids.is_empty() {
            return;
        }
        self.view += 1;
        let parts: Vec<(NodeId, DomainSync)> =
            ids.iter().map(|id| (*id, self.nodes[id].core.sync())).collect();
        // as the node core does it (`node::chain`)
        let last = ids.iter().filter_map(|id| self.recorded.get(id)).copied().max().unwrap_or(0);
        let knows = |n: &Node| last == 0 || n.included.contains(&last) || !n.core.state().formed;
        let passed_by: BTreeSet<Proc> =
            ids.iter().map(|id| &self.nodes[id]).filter(|n| !knows(n)).map(|n| n.proc).collect();
        let included: BTreeSet<u64> = ids
            .iter()
            .map(|id| &self.nodes[id])
            .filter(|n| knows(n))
            .flat_map(|n| n.included.iter().copied())
            .chain([last, self.view])
            .collect();
        let merged = merge(parts.iter().map(|(n, s)| (*n, s)), &passed_by);
        let procs: Vec<Proc> = ids.iter().map(|id| self.nodes[id].proc).collect();
        self.log.push(format!("view {} {procs:?}", self.view));
        let quorate = self.quorate(part);
        for id in ids {
            // what was not sent in the old view goes out in the new one
            let mut out = Vec::new();
            let node = self.nodes.get_mut(&id).unwrap();
            node.core.view(self.now, self.view, &procs, merged.clone(), 0, &mut out);
            node.included.clone_from(&included);
            node.core.set_recorded(quorate);
            node.core.quorate(self.now, quorate, &mut out);
            if quorate {
                self.recorded.insert(id, self.view);
            }
            self.act(id, out);
        }
        self.doomed.extend(passed_by);
    }

    fn act(&mut self, id: NodeId, actions: Vec<DomainAction>) {
        for action in actions {
            // an earlier action may have ended this node
            let Some(node) = self.nodes.get_mut(&id) else { return };
            match action {
                DomainAction::Send { msg, .. } => node.sent.push_back(msg),
                DomainAction::Run { victim, probe } => {
                    let me = node.proc;
                    let part = self.part[&id];
                    assert!(self.quorate(part), "an agent ran without quorum");
                    self.log.push(format!("{me} runs probe={probe} against {victim}"));
                    self.agents.push((id, me, victim, probe));
                }
                DomainAction::Fenced { proc, proof, .. } => {
                    self.log.push(format!("{} sees {proc} fenced: {proof}", node.proc));
                    assert!(!node.fenced.contains(&proc), "{proc} fenced twice at {}", node.proc);
                    node.fenced.push(proc);
                    assert!(!self.left_cleanly.contains(&proc), "{proc} had left cleanly");
                    // an unknown life: whatever was there when the agent looked
                    let looked = self.looked.get(&proc.node).copied().unwrap_or(0);
                    let alive = self.nodes.values().any(|n| {
                        let unknown = proc.incarnation.0 == 0 && !matches!(proof, Proof::Rejoined(_));
                        n.proc.node == proc.node
                            && (n.proc == proc || (unknown && n.proc.incarnation.0 <= looked))
                    });
                    assert!(!alive, "{proc} lives, but is said to be fenced");
                }
                DomainAction::Excluded => self.doomed.push(node.proc),
                DomainAction::Pending { .. } | DomainAction::Log(_) => {}
            }
        }
    }

    /// Delivers the oldest message of some sender to everybody in its component.
    fn deliver(&mut self, crash_during: bool) -> bool {
        let senders: Vec<NodeId> =
            self.nodes.iter().filter(|(_, n)| !n.sent.is_empty()).map(|(id, _)| *id).collect();
        if senders.is_empty() {
            return false;
        }
        let sender = senders[self.rng.below(senders.len() as u64) as usize];
        let from = self.nodes[&sender].proc;
        let msg = self.nodes.get_mut(&sender).unwrap().sent.pop_front().unwrap();
        self.log.push(format!("{from} says {msg:?}"));
        let part = self.part[&sender];
        let ids = self.members(part);
        // one may die with or without having got it; the others all get it
        let victim = crash_during.then(|| ids[self.rng.below(ids.len() as u64) as usize]);
        let heard = victim.is_none_or(|_| self.rng.chance(1, 2));
        if let Some(v) = victim.filter(|_| heard) {
            self.give(v, from, &msg);
        }
        for id in ids {
            if Some(id) != victim {
                self.give(id, from, &msg);
            }
        }
        if let DomainMsg::Leave(p) = msg {
            // whoever did not hear it sees a failure
            if heard && self.members(part).len() == self.nodes.len() {
                self.left_cleanly.insert(p);
            }
            self.kill(p.node, "left");
        }
        if let Some(v) = victim {
            self.kill(v, "crash at a message");
        }
        true
    }

    fn give(&mut self, id: NodeId, from: Proc, msg: &DomainMsg) {
        if let Some(node) = self.nodes.get_mut(&id) {
            let mut out = Vec::new();
            node.core.message(self.now, from, msg.clone(), &mut out);
            self.act(id, out);
        }
    }

    fn finish_agent(&mut self) {
        if self.agents.is_empty() {
            return;
        }
        let i = self.rng.below(self.agents.len() as u64) as usize;
        let (id, me, victim, probe) = self.agents.remove(i);
        let target = self.nodes.get(&victim.node).map(|n| n.proc);
        // a later life is a proof; the agent does not touch it
        let lives = target.filter(|t| victim.incarnation.0 == 0 || *t == victim);
        let result = if probe {
            if lives.is_none() { Ok(Proof::NotRunning) } else { Err("running".to_owned()) }
        } else if self.fail_agents && self.rng.chance(1, 3) {
            Err("agent failed".to_owned())
        } else {
            if lives.is_some() {
                self.kill(victim.node, "fenced");
            }
            Ok(Proof::Exited)
        };
        if result.is_ok() && victim.incarnation == Incarnation(0) {
            self.looked.insert(victim.node, self.last_life.get(&victim.node).copied().unwrap_or(0));
        }
        if let Some(node) = self.nodes.get_mut(&id)
            && node.proc == me
        {
            let mut out = Vec::new();
            node.core.agent_done(self.now, victim, result, 0, &mut out);
            self.act(id, out);
        }
    }

    fn pass_time(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            if let Some(node) = self.nodes.get_mut(&id) {
                let mut out = Vec::new();
                node.core.tick(self.now, &mut out);
                self.act(id, out);
            }
        }
    }

    fn heal(&mut self) {
        if self.part.values().collect::<BTreeSet<_>>().len() > 1 {
            self.part.values_mut().for_each(|p| *p = 0);
            self.install(0);
        }
    }

    fn cut(&mut self) {
        let ids: Vec<NodeId> = self.part.keys().copied().collect();
        if ids.len() > 1 && self.part.values().collect::<BTreeSet<_>>().len() == 1 {
            let alone = ids[self.rng.below(ids.len() as u64) as usize];
            for id in ids {
                self.part.insert(id, u8::from(id == alone));
            }
            self.install(0);
            self.install(1);
        }
    }

    fn step(&mut self) {
        match self.rng.below(100) {
            0..=49 => {
                let crash = self.rng.chance(1, 25);
                self.deliver(crash);
            }
            50..=69 => self.finish_agent(),
            70..=84 => self.pass_time(1000),
            85..=88 => self.cut(),
            89..=93 => self.heal(),
            94..=97 => {
                let absent: Vec<NodeId> =
                    (1..=NODES).map(NodeId).filter(|n| !self.nodes.contains_key(n)).collect();
                if !absent.is_empty() {
                    let id = absent[self.rng.below(absent.len() as u64) as usize];
                    self.boot(id);
                }
            }
            98 => {
                let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
                if !ids.is_empty() {
                    let id = ids[self.rng.below(ids.len() as u64) as usize];
                    self.kill(id, "crash");
                }
            }
            _ => {
                let ids: Vec<NodeId> =
                    self.nodes.iter().filter(|(_, n)| n.core.joined()).map(|(id, _)| *id).collect();
                if !ids.is_empty() {
                    let id = ids[self.rng.below(ids.len() as u64) as usize];
                    let mut out = Vec::new();
                    self.nodes.get_mut(&id).unwrap().core.leave(&mut out);
                    self.act(id, out);
                }
            }
        }
        self.reap();
    }

    /// Everything works again: what is missing now must be proved dead, and all must agree.
    fn settle(&mut self) {
        self.fail_agents = false;
        for n in 1..=NODES {
            if !self.nodes.contains_key(&NodeId(n)) && (n != 3 || self.nodes.len() < 2) {
                self.boot(NodeId(n));
            }
        }
        self.heal();
        for _ in 0..3_000 {
            while self.deliver(false) {}
            self.finish_agent();
            self.pass_time(500);
            self.reap();
            // an excluded life comes back as a new one
            for n in 1..=2 {
                if !self.nodes.contains_key(&NodeId(n)) {
                    self.boot(NodeId(n));
                    self.heal();
                }
            }
        }
        let first = self.nodes.values().next().unwrap().core.state().clone();
        assert!(first.victims.is_empty(), "left over: {:?}", first.victims);
        for node in self.nodes.values() {
            assert_eq!(node.core.state(), &first, "{} disagrees", node.proc);
            assert!(node.core.joined(), "{} is not in the domain", node.proc);
        }
        for p in &self.dead {
            assert!(!first.members.contains_key(p), "{p} is dead, and still a member");
        }
    }
}

fn run(seed: u64, steps: u32) {
    let mut w = World::new(seed);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        w.boot(NodeId(1));
        w.boot(NodeId(2));
        if !seed.is_multiple_of(3) {
            w.boot(NodeId(3));
        }
        w.heal();
        for _ in 0..steps {
            w.step();
        }
        w.settle();
    }));
    if let Err(e) = result {
        let tail = w.log.len().saturating_sub(60);
        eprintln!("seed {seed}:\n{}", w.log[tail..].join("\n"));
        std::panic::resume_unwind(e);
    }
}

#[test]
fn every_victim_is_fenced_once_and_nobody_alive_is_said_to_be() {
    for seed in 0..400 {
        run(seed, 300);
    }
}

/// Three members, two are lost together; the fencer dies at each possible point of its work.
#[test]
fn a_fencer_may_die_at_each_message() {
    for deliveries in 0..12 {
        let mut w = World::new(deliveries);
        w.fail_agents = false;
        for n in 1..=3 {
            w.boot(NodeId(n));
        }
        w.heal();
        while w.deliver(false) {}
        w.kill(NodeId(3), "crash");
        for i in 0..deliveries {
            if i % 2 == 0 {
                w.deliver(false);
            } else {
                w.finish_agent();
            }
        }
        w.kill(NodeId(1), "the fencer dies");
        w.boot(NodeId(1));
        w.settle();
    }
}

#[test]
fn absent_nodes_are_fenced_at_start_and_a_free_lock_needs_no_waiting() {
    let mut w = World::new(1);
    w.boot(NodeId(1));
    w.boot(NodeId(2));
    w.heal();
    while w.deliver(false) {}
    assert!(!w.agents.is_empty() && w.agents.iter().all(|a| a.3), "the third node is only looked at");
    while !w.agents.is_empty() {
        w.finish_agent();
    }
    while w.deliver(false) {}
    for id in [1, 2] {
        let third = Proc { node: NodeId(3), incarnation: Incarnation(0) };
        assert_eq!(w.nodes[&NodeId(id)].fenced, [third], "without any delay");
    }
}

/// Whoever was cut off sees a member fail that has left. Nobody will fence it: the leave itself is the proof.
#[test]
fn a_leave_that_was_not_heard_is_told_as_a_proof() {
    let mut w = World::new(1);
    for n in 1..=3 {
        w.boot(NodeId(n));
    }
    w.heal();
    while w.deliver(false) {}
    let second = w.nodes[&NodeId(2)].proc;
    for (id, part) in [(1, 0), (2, 0), (3, 1)] {
        w.part.insert(NodeId(id), part);
    }
    w.install(0);
    w.install(1);
    let mut out = Vec::new();
    w.nodes.get_mut(&NodeId(2)).unwrap().core.leave(&mut out);
    w.act(NodeId(2), out);
    while w.deliver(false) {}
    assert!(!w.nodes.contains_key(&NodeId(2)));
    w.heal();
    while w.deliver(false) {}
    assert_eq!(w.nodes[&NodeId(3)].fenced, [second]);
    assert!(w.nodes[&NodeId(1)].fenced.is_empty(), "it heard the leave");
}

#[test]
fn a_minority_fences_nobody() {
    let mut w = World::new(1);
    for n in 1..=3 {
        w.boot(NodeId(n));
    }
    w.heal();
    while w.deliver(false) {}
    for (id, part) in [(1, 0), (2, 1), (3, 2)] {
        w.part.insert(NodeId(id), part);
    }
    for part in 0..3 {
        w.install(part);
    }
    for _ in 0..50 {
        w.pass_time(1000);
        w.deliver(false);
    }
    assert!(w.agents.is_empty());
    // nobody was quorate in between: they go on together as if nothing had happened
    w.heal();
    while w.deliver(false) {}
    assert_eq!(w.nodes.len(), 3);
    assert!(w.nodes.values().all(|n| n.fenced.is_empty() && n.core.state().victims.is_empty()));
}

#[test]
fn the_log_has_the_historical_wording() {
    let l = |log: FenceLog, d| log.text(d);
    let name = || "web2".to_owned();
    let not_member = FenceLog::NotMember { name: name(), seconds: 0, startup: false };
    assert_eq!(
        l(not_member.clone(), Dialect::Rhel5).unwrap(),
        "web2 not a cluster member after 0 sec post_fail_delay"
    );
    assert_eq!(l(not_member, Dialect::Rhel6), None);
    assert_eq!(l(FenceLog::Fencing { name: name() }, Dialect::Rhel5).unwrap(), "fencing node \"web2\"");
    assert_eq!(l(FenceLog::Success { name: name() }, Dialect::Rhel5).unwrap(), "fence \"web2\" success");
    assert_eq!(l(FenceLog::Success { name: name() }, Dialect::Rhel6).unwrap(), "fence web2 success");
}

/// Nodes 2 and 3 come from an older quorate view than node 1, which has no state of the last one either.
#[test]
fn who_was_passed_by_is_a_victim_and_the_domain_forms_anew() {
    let life = |n: u16, i: u64| Proc { node: NodeId(n), incarnation: Incarnation(i) };
    let state = |formed, members: &[Proc]| DomainSync {
        state: DomainState {
            formed,
            members: members.iter().map(|p| (*p, true)).collect(),
            ..DomainState::default()
        },
        running: BTreeSet::new(),
    };
    let old = state(true, &[life(2, 1), life(3, 1), life(4, 1)]);
    let fresh = state(false, &[]);
    let passed_by = BTreeSet::from([life(2, 1), life(3, 1)]);
    let parts = [(NodeId(1), &fresh), (NodeId(2), &old), (NodeId(3), &old)];
    let merged = merge(parts.into_iter(), &passed_by).state;
    assert!(!merged.formed && merged.members.is_empty());
    assert_eq!(merged.victims.keys().copied().collect::<Vec<_>>(), [life(2, 1), life(3, 1), life(4, 1)]);
    // somebody's state includes the last view: it goes on, they do not
    let heir = state(true, &[life(1, 7), life(4, 2)]);
    let parts = [(NodeId(1), &heir), (NodeId(2), &old), (NodeId(3), &old)];
    let merged = merge(parts.into_iter(), &passed_by).state;
    assert!(merged.formed && merged.members.contains_key(&life(4, 2)));
    assert!(merged.is_excluded(life(2, 1)) && merged.is_excluded(life(3, 1)));
    assert!(!merged.is_excluded(life(1, 7)));
}

/// Node 1 ran an agent when the view was formed; it fails. Node 2 must not wait for it, nor it for node 2.
#[test]
fn a_failed_agent_is_busy_no_more() {
    let life = |n: u16| Proc { node: NodeId(n), incarnation: Incarnation(1) };
    let (one, two, victim) = (life(1), life(2), life(3));
    let mut state = DomainState { formed: true, ..DomainState::default() };
    state.members = [(one, false), (two, true)].into();
    state.victims = [(victim, Cause::Failed)].into();
    let part =
        |running: &[Proc]| DomainSync { state: state.clone(), running: running.iter().copied().collect() };
    let parts = [part(&[victim]), part(&[])];
    let merged = merge([(NodeId(1), &parts[0]), (NodeId(2), &parts[1])].into_iter(), &BTreeSet::new());
    let now = Boottime::from_millis(1000);
    let mut core = Domain::new(config(two));
    let mut out = Vec::new();
    core.view(now, 8, &[one, two], merged, 0, &mut out);
    core.set_recorded(true);
    core.quorate(now, true, &mut out);
    let starts = |out: &[DomainAction]| {
        out.iter().any(|a| matches!(a, DomainAction::Send { msg: DomainMsg::Start { .. }, .. }))
    };
    assert!(!starts(&out), "node 1 is at it");
    let fail = DomainMsg::Fail { victim, attempt: 1, error: "agent failed".to_owned() };
    core.message(now, one, fail, &mut out);
    assert!(starts(&out));
}

/// The domain forms anew. An old proof for node 3 says nothing of what may run there now.
#[test]
fn an_old_proof_does_not_answer_for_an_unknown_life() {
    let life = |n: u16, i: u64| Proc { node: NodeId(n), incarnation: Incarnation(i) };
    let (me, unknown) = (life(1, 5), life(3, 0));
    let how = How::Fenced { fencer: NodeId(2), proof: Proof::Exited, unix_time: 0 };
    let gone = [(NodeId(3), Gone { incarnation: Incarnation(1), how })].into();
    let part = DomainSync { state: DomainState { gone, ..DomainState::default() }, ..DomainSync::default() };
    let merged = merge([(NodeId(1), &part)].into_iter(), &BTreeSet::new());
    let now = Boottime::from_millis(1000);
    let mut core = Domain::new(config(me));
    let mut out = Vec::new();
    core.view(now, 8, &[me, life(2, 2)], merged, 0, &mut out);
    core.set_recorded(true);
    core.quorate(now, true, &mut out);
    core.message(now, me, DomainMsg::Join(me), &mut out);
    assert!(core.state().victims.contains_key(&unknown));
    let done = |victim| DomainMsg::Done { victim, proof: Proof::NotRunning, unix_time: 0 };
    core.message(now, me, done(life(3, 1)), &mut out);
    assert!(core.state().victims.contains_key(&unknown), "a known life");
    let old = core.sync();
    core.message(now, me, done(unknown), &mut out);
    assert!(core.state().victims.is_empty());
    // who has not heard the proof brings the victim not back
    let parts = [core.sync(), old];
    let merged = merge([(NodeId(1), &parts[0]), (NodeId(2), &parts[1])].into_iter(), &BTreeSet::new());
    assert!(merged.state.victims.is_empty());
}

/// The one whose agent has failed forgets that it was in charge, and so must the others: else each waits for another. (Found by the simulator.)
#[test]
fn all_take_the_same_to_be_next_when_an_agent_has_failed() {
    let proc = |node| Proc { node: NodeId(node), incarnation: Incarnation(1) };
    let (victim, now) = (Proc { node: NodeId(9), incarnation: Incarnation(1) }, Boottime::from_millis(1000));
    let fencers: BTreeSet<_> = (1..=NODES)
        .map(|me| {
            let mut core = Domain::new(config(proc(me)));
            let mut out = Vec::new();
            core.quorate = true;
            core.members = (1..=NODES).map(proc).collect();
            core.state.members = core.members.iter().map(|p| (*p, true)).collect();
            core.message(now, proc(2), DomainMsg::Start { victim, attempt: 1, view: 0 }, &mut out);
            assert_eq!(core.fencer(now, victim), Some(NodeId(2)));
            if me == 2 {
                core.agent_done(now, victim, Err("it runs".into()), 0, &mut out);
            }
            let error = "it runs".into();
            core.message(now, proc(2), DomainMsg::Fail { victim, attempt: 1, error }, &mut out);
            core.fencer(now, victim)
        })
        .collect();
    assert_eq!(fencers, BTreeSet::from([Some(NodeId(1))]));
}

/// Whomever each takes for the first, and however long there was no quorum in which to use a turn.
#[test]
fn everybody_has_turns_whomever_each_takes_for_the_first() {
    let proc = |node| Proc { node: NodeId(node), incarnation: Incarnation(1) };
    let (victim, since) =
        (Proc { node: NodeId(9), incarnation: Incarnation(0) }, Boottime::from_millis(1000));
    for me in 1..=NODES {
        let mut core = Domain::new(config(proc(me)));
        core.quorate = true;
        core.members = (1..=NODES).map(proc).collect();
        core.state.members = core.members.iter().map(|p| (*p, true)).collect();
        let fencer = (me != 2).then_some(NodeId(2));
        core.work.insert(victim, Work { fencer, since, ..Work::default() });
        for first in [1, 50] {
            let turn = |n: u32| since + core.cfg.takeover * n;
            let mine =
                (first..first + u32::from(NODES)).find(|n| core.fencer(turn(*n), victim) == Some(NodeId(me)));
            assert!(mine.is_some(), "n{me} has no turn from the {first}. on");
            let before = turn(first) + Duration::from_secs(1);
            assert_eq!(core.next_deadline(before), turn(first + 1), "and is woken for it");
        }
    }
}
