//! Seeded simulator of a cluster: virtual time, a bad network, nodes that crash, restart and sleep.
//!
//! One thread, one seed: the same seed gives the same run. A [`Host`] is whatever sits on a node (a bare ring, the
//! group core, a whole node runtime); the simulator moves its packets and its time and knows nothing else.

pub mod evs;
mod host;

pub use host::{RingHost, fast_timers, message_id, payload};

use crate::engine::{Dest, EngineInput, IoAction};
use bytes::Bytes;
use cairn_base::{Boottime, Incarnation, NodeId, Proc, Rng};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What a node is made from.
#[derive(Clone, Debug)]
pub struct Birth {
    pub me: Proc,
    pub cookie: u64,
    /// All nodes of the cluster, in ring order.
    pub nodes: Vec<NodeId>,
    /// What the node's own file says about the last ring.
    pub ring_seq: u64,
    pub now: Boottime,
}

/// The software of one node in one life.
pub trait Host {
    fn step(&mut self, now: Boottime, ev: EngineInput, io: &mut Vec<IoAction>);
    fn next_deadline(&self) -> Boottime;
    /// True when it has ended by itself; the simulator then forgets it.
    fn ended(&self) -> bool;
}

/// Behaviour of all links. Probabilities in 1/1000.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    pub loss: u64,
    pub duplicate: u64,
    pub delay: Duration,
    pub jitter: Duration,
    /// A packet of these is late by up to 20 jitters: reordering.
    pub late: u64,
}

impl Weather {
    pub const CALM: Self = Self {
        loss: 0,
        duplicate: 0,
        delay: Duration::from_micros(50),
        jitter: Duration::from_micros(50),
        late: 0,
    };
}

struct Slot<H> {
    host: Option<H>,
    proc: Proc,
    cookie: u64,
    ring_seq: u64,
    asleep_until: Option<Boottime>,
    asleep_since: Boottime,
}

struct Flight {
    to: NodeId,
    from: Proc,
    cookie: u64,
    packet: Bytes,
}

/// A packet filter of a directed scenario: false loses the packet.
pub type Filter = Box<dyn FnMut(NodeId, NodeId, &[u8]) -> bool>;

pub struct Cluster<H> {
    pub now: Boottime,
    pub rng: Rng,
    pub weather: Weather,
    /// Directed links that carry nothing.
    pub cut: BTreeSet<(NodeId, NodeId)>,
    pub filter: Option<Filter>,
    /// Gap after which the driver reports a pause.
    pub pause_limit: Duration,
    pub packets: u64,
    /// The network dies after this many packets: ends the storms of deliberately broken rings.
    pub budget: u64,
    nodes: BTreeMap<NodeId, Slot<H>>,
    order: Vec<NodeId>,
    flights: BTreeMap<(Boottime, u64), Flight>,
    count: u64,
    make: Box<dyn Fn(Birth) -> H>,
    /// Hosts of lives that are over, in the order of their end.
    pub dead: Vec<H>,
}

impl<H: Host> Cluster<H> {
    pub fn new(seed: u64, nodes: u16, make: impl Fn(Birth) -> H + 'static) -> Self {
        Self {
            now: Boottime::from_millis(1000),
            rng: Rng::new(seed),
            weather: Weather::CALM,
            cut: BTreeSet::new(),
            filter: None,
            pause_limit: Duration::from_millis(500),
            packets: 0,
            budget: u64::MAX,
            nodes: BTreeMap::new(),
            order: (1..=nodes).map(NodeId).collect(),
            flights: BTreeMap::new(),
            count: 0,
            make: Box::new(make),
            dead: Vec::new(),
        }
    }

    pub fn node_ids(&self) -> Vec<NodeId> {
        self.order.clone()
    }

    pub fn alive(&self) -> Vec<NodeId> {
        self.nodes.iter().filter(|(_, s)| s.host.is_some()).map(|(&n, _)| n).collect()
    }

    pub fn awake(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|s| s.host.is_some() && s.asleep_until.is_none())
    }

    pub fn host(&self, node: NodeId) -> Option<&H> {
        self.nodes.get(&node)?.host.as_ref()
    }

    pub fn proc(&self, node: NodeId) -> Proc {
        self.nodes[&node].proc
    }

    pub fn cookie(&self, node: NodeId) -> u64 {
        self.nodes[&node].cookie
    }

    pub fn hosts(&self) -> impl Iterator<Item = (NodeId, &H)> {
        self.nodes.iter().filter_map(|(&n, s)| s.host.as_ref().map(|h| (n, h)))
    }

    /// Starts or restarts a node; its incarnation rises. `forget`: its own file is lost.
    pub fn start(&mut self, node: NodeId, forget: bool) {
        let before = self.nodes.get(&node).map(|s| (s.proc.incarnation.0, s.ring_seq));
        let (incarnation, ring_seq) = before.unwrap_or((0, 0));
        let proc = Proc { node, incarnation: Incarnation(incarnation + 1) };
        let cookie = self.rng.next_u64() | 1;
        let ring_seq = if forget { 0 } else { ring_seq };
        let host =
            (self.make)(Birth { me: proc, cookie, nodes: self.order.clone(), ring_seq, now: self.now });
        let slot =
            Slot { host: Some(host), proc, cookie, ring_seq, asleep_until: None, asleep_since: self.now };
        if let Some(old) = self.nodes.insert(node, slot) {
            self.dead.extend(old.host);
        }
        self.input(node, EngineInput::Tick);
    }

    pub fn start_all(&mut self) {
        for n in self.order.clone() {
            self.start(n, false);
        }
    }

    pub fn crash(&mut self, node: NodeId) {
        let host = self.nodes.get_mut(&node).and_then(|s| s.host.take());
        self.dead.extend(host);
    }

    pub fn pause(&mut self, node: NodeId, time: Duration) {
        let now = self.now;
        if let Some(s) = self.nodes.get_mut(&node) {
            s.asleep_until = Some(now + time);
            s.asleep_since = now;
        }
    }

    /// Cuts or restores both directions between two nodes.
    pub fn link(&mut self, a: NodeId, b: NodeId, up: bool) {
        for pair in [(a, b), (b, a)] {
            if up {
                self.cut.remove(&pair);
            } else {
                self.cut.insert(pair);
            }
        }
    }

    /// Splits the cluster: nodes with different numbers do not hear each other.
    pub fn partition(&mut self, side: impl Fn(NodeId) -> u64) {
        self.cut.clear();
        for &a in &self.order {
            for &b in self.order.iter().filter(|&&b| side(a) != side(b)) {
                self.cut.insert((a, b));
            }
        }
    }

    /// Calls into a host and then lets it work.
    pub fn with<R>(&mut self, node: NodeId, f: impl FnOnce(&mut H, Boottime) -> R) -> Option<R> {
        let now = self.now;
        let result = self.nodes.get_mut(&node)?.host.as_mut().map(|h| f(h, now))?;
        if self.awake(node) {
            self.input(node, EngineInput::Tick);
        }
        Some(result)
    }

    pub fn input(&mut self, node: NodeId, ev: EngineInput) {
        let now = self.now;
        let mut io = Vec::new();
        let Some(slot) = self.nodes.get_mut(&node) else { return };
        let Some(host) = slot.host.as_mut() else { return };
        host.step(now, ev, &mut io);
        let (from, cookie) = (slot.proc, slot.cookie);
        if host.ended() {
            let host = slot.host.take();
            self.dead.extend(host);
        }
        for action in io {
            match action {
                IoAction::Send { to: Dest::Node(to), packet, .. } => self.send(from, cookie, to, &packet),
                IoAction::Send { to: Dest::All, packet, .. } => {
                    for to in self.order.clone().into_iter().filter(|&n| n != node) {
                        self.send(from, cookie, to, &packet);
                    }
                }
                IoAction::Persist { ring_seq } => {
                    let slot = self.nodes.get_mut(&node).expect("invariant: it just stepped");
                    slot.ring_seq = ring_seq;
                }
                IoAction::Confirm { .. } => {}
            }
        }
    }

    fn send(&mut self, from: Proc, cookie: u64, to: NodeId, packet: &Bytes) {
        self.packets += 1;
        let w = self.weather;
        let dropped = self.cut.contains(&(from.node, to)) || self.rng.chance(w.loss, 1000);
        if dropped
            || self.packets > self.budget
            || self.filter.as_mut().is_some_and(|f| !f(from.node, to, packet))
        {
            return;
        }
        let copies = 1 + u64::from(self.rng.chance(w.duplicate, 1000));
        for _ in 0..copies {
            let spread = if self.rng.chance(w.late, 1000) { 20 } else { 1 };
            let jitter = self.rng.below(spread * w.jitter.as_nanos() as u64 + 1);
            self.count += 1;
            let at = self.now + w.delay + Duration::from_nanos(jitter);
            self.flights.insert((at, self.count), Flight { to, from, cookie, packet: packet.clone() });
        }
    }

    fn next_event(&self) -> Boottime {
        let flight = self.flights.keys().next().map_or(Boottime::MAX, |k| k.0);
        let timers = self.nodes.values().filter_map(|s| {
            let host = s.host.as_ref()?;
            Some(s.asleep_until.unwrap_or_else(|| host.next_deadline()))
        });
        timers.min().unwrap_or(Boottime::MAX).min(flight)
    }

    /// Runs until `until`, or earlier when `stop` says so (asked after every instant).
    pub fn run_while(&mut self, until: Boottime, mut go_on: impl FnMut(&Self) -> bool) -> bool {
        while go_on(self) {
            let next = self.next_event();
            if next > until {
                self.now = until;
                return false;
            }
            self.now = self.now.max(next);
            self.instant();
        }
        true
    }

    pub fn run(&mut self, time: Duration) {
        let until = self.now + time;
        self.run_while(until, |_| true);
    }

    fn instant(&mut self) {
        let now = self.now;
        for node in self.order.clone() {
            let Some(slot) = self.nodes.get_mut(&node) else { continue };
            if let Some(wake) = slot.asleep_until {
                if wake > now {
                    continue;
                }
                slot.asleep_until = None;
                let gap = now.since(slot.asleep_since);
                if gap > self.pause_limit {
                    self.input(node, EngineInput::Paused(gap));
                }
            }
        }
        while let Some((&key, _)) = self.flights.first_key_value()
            && key.0 <= now
        {
            let f = self.flights.remove(&key).expect("invariant: just seen");
            if self.awake(f.to) {
                self.input(f.to, EngineInput::Frame { from: f.from, cookie: f.cookie, packet: f.packet });
            } else if let Some(slot) = self.nodes.get(&f.to)
                && let Some(wake) = slot.asleep_until
                && slot.host.is_some()
                && wake.since(slot.asleep_since) <= self.pause_limit
            {
                // It waits in the socket; after a longer pause the driver empties the sockets unread.
                self.count += 1;
                self.flights.insert((wake, self.count), f);
            }
        }
        for node in self.order.clone() {
            if self.host(node).is_some_and(|h| h.next_deadline() <= now) && self.awake(node) {
                self.input(node, EngineInput::Tick);
            }
        }
    }
}
