//! The simulated world: true time, machines with clocks of their own, the network, the order of everything.
//!
//! One heap of events, one seed; whatever a process does happens in the handler of one event. A paused process gets
//! nothing until it wakes, then everything in the old order (its ring's packets are thrown away by the driver when it slept too long).

use crate::check::Audit;
use crate::daemon::Daemon;
use crate::lun::{Lun, Op};
use crate::mount::Mount;
use crate::services::SERVICES;
use bytes::Bytes;
use cairn_base::{Boottime, NodeId, Proc, Rng, ViewId};
use dlm::Msg;
use membership::config::{Config, Dialect};
use membership::engine::Dest;
use membership::ipc::{ClusterEvent, Proof};
use qdisk::core::Input as DiskInput;
use qdisk::ondisk::EBlock;
use qdisk::{QdiskCommand, QdiskEvent, ViewName};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;

pub(crate) const MS: u64 = 1_000_000;
/// Resources whose counters are kept on the LUN.
pub(crate) const COUNTERS: usize = 4;

/// A rule taken away, to see that the checks notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mutant {
    ReplayBeforeFence,
    GateOpenedAtFence,
    PermitNotChecked,
    LyingAgent,
    QuorumOffByOne,
    VotesWithoutLease,
    LeaseOfAnyView,
    PermitForEver,
    FenceWithoutQuorum,
    PassedByGoesOn,
    SafeAsAgreed,
    UsersAlwaysOpen,
    KillsNotRead,
    NoVictimsAtOnce,
}

/// From this seed on local disks are slow.
pub(crate) const SLOW_FILES: u64 = 100_000;

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    pub(crate) mutant: Option<Mutant>,
    pub(crate) trace: bool,
}

/// What one mount asks of its node's daemon.
#[derive(Clone, Debug)]
pub(crate) enum Call {
    Hello,
    Join(Vec<u8>),
    Leave,
    Say(Vec<u8>),
}

/// What a disk operation of a mount was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tag {
    Counter(usize),
    Replay,
    Unmount,
}

pub(crate) enum Ev {
    Start { node: usize },
    Wake { node: usize },
    Reset { node: usize },
    Remount { node: usize },
    Fault,
    Heal,
    Frame { to: usize, from: Proc, cookie: u64, packet: Bytes },
    Turn { node: usize, life: u64 },
    Persisted { node: usize, life: u64, seq: u64 },
    Recorded { node: usize, life: u64, view: ViewName },
    AgentEffect { by: usize, life: u64, victim: Proc, probe: bool, ok: bool },
    Agent { node: usize, life: u64, victim: Proc, result: Result<Proof, String> },
    DiskTick { node: usize, life: u64 },
    DiskCommand { node: usize, life: u64, command: QdiskCommand },
    DiskEvent { node: usize, life: u64, event: QdiskEvent },
    DiskAnswer { node: usize, life: u64, input: DiskInput },
    DiskLand { node: usize, life: u64, block: Box<EBlock>, failed: bool },
    DiskSample { node: usize, life: u64, answer: u64, ok: bool },
    Call { node: usize, life: u64, client: u32, call: Call },
    ToMount { node: usize, who: Proc, event: ClusterEvent },
    Lane { from: Proc, to: Proc },
    User { node: usize, who: Proc },
    Timer { node: usize, who: Proc },
    Submit { node: usize, who: Proc, op: Op, tag: Tag },
    Land { id: u64 },
    Done { node: usize, who: Proc, ok: bool, tag: Tag },
    Read { node: usize, who: Proc, tag: Tag, what: usize },
    Reap { node: usize, who: Proc },
    DlmTick { node: usize, who: Proc },
    ToManager { node: usize, life: u64, event: ClusterEvent },
    ManagerTick { node: usize, life: u64 },
    ServiceDone { node: usize, life: u64, svc: String, seq: u64, action: rgmanager::core::Action },
}

/// One machine.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    rate: i64,
    offset: i64,
    pub(crate) up: bool,
    pub(crate) daemon: Option<Daemon>,
    pub(crate) mount: Option<Mount>,
    pub(crate) incarnation: u64,
    pub(crate) mount_incarnation: u64,
    pub(crate) next_client: u32,
    /// As the machine's own file says.
    pub(crate) ring_seq: u64,
    pub(crate) last_view: ViewName,
    /// Until when the daemon, the mount sleep; 0: awake.
    pub(crate) daemon_asleep: u64,
    pub(crate) mount_asleep: u64,
    pub(crate) asleep_since: u64,
    pub(crate) slow_until: u64,
    pub(crate) hang_until: u64,
    /// Cut from the LUN by a fence agent until the machine is reset.
    pub(crate) blocked: bool,
    pub(crate) restart_at: u64,
    pub(crate) leaving: bool,
    /// Services that agents have started here and not stopped.
    pub(crate) runs: BTreeSet<String>,
    pub(crate) quorate_deadline: Boottime,
}

#[derive(Default)]
pub(crate) struct Lane {
    queue: VecDeque<(ViewId, Msg)>,
    scheduled: bool,
}

#[derive(Clone, Copy)]
struct Weather {
    loss: u64,
    duplicate: u64,
    delay: u64,
    jitter: u64,
    late: u64,
}

const CALM: Weather = Weather { loss: 0, duplicate: 0, delay: MS / 2, jitter: MS / 4, late: 0 };

pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) rng: Rng,
    order: u64,
    heap: BinaryHeap<Reverse<(u64, u64, usize)>>,
    events: Vec<Option<Ev>>,
    free: Vec<usize>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) lun: Lun,
    pub(crate) config: Arc<Config>,
    pub(crate) fabric_fence: bool,
    /// Local disks are slow: views stay unrecorded for a while.
    pub(crate) slow_files: bool,
    /// Fence agents under way: whoever they are after may still be hit.
    pub(crate) agents: u32,
    weather: Weather,
    cut: BTreeSet<(u16, u16)>,
    pub(crate) lanes: BTreeMap<(Proc, Proc), Lane>,
    pub(crate) audit: Audit,
    pub(crate) mutant: Option<Mutant>,
    /// There are service managers; their dice.
    pub(crate) services: Option<Rng>,
    pub(crate) healed: bool,
    /// Users rest, so that everything on the way arrives.
    pub(crate) quiet: bool,
    pub(crate) steps: u64,
    hash: u64,
    trace: bool,
    pub(crate) story: VecDeque<String>,
    pub(crate) kinds: BTreeMap<String, u64>,
}

/// The cluster of one seed.
fn config_of(rng: &mut Rng) -> Config {
    let n = 2 + rng.below(4);
    let with_disk = rng.chance(1, 2);
    let dialect = if rng.chance(1, 2) { Dialect::Rhel5 } else { Dialect::Rhel6 };
    let votes = if rng.chance(2, 3) { n - 1 } else { 1 };
    let mut xml = format!(
        "<cluster name=\"c\" config_version=\"1\"><cairn profile=\"fast\" one_host=\"yes\" \
         run_dir=\"/nonexistent/%n\"/><fence_daemon post_join_delay=\"1\" post_fail_delay=\"0\"/>"
    );
    if with_disk {
        xml += &format!("<quorumd device=\"file:/x\" votes=\"{votes}\"/>");
    }
    xml += "<clusternodes>";
    for i in 1..=n {
        xml += &format!(
            "<clusternode name=\"n{i}\" nodeid=\"{i}\"><fence><method name=\"1\"><device name=\"local\"/></method></fence></clusternode>"
        );
    }
    xml += "</clusternodes><fencedevices><fencedevice name=\"local\" agent=\"fence_local\"/></fencedevices></cluster>";
    let mut config =
        Config::parse(&xml, "simulation").expect("the simulation's configuration keeps all rules");
    // set here: rhel6 refuses a quorum disk that is slow by the historical formula, which the fast profile is
    config.dialect = dialect;
    config
}

impl World {
    pub(crate) fn new(seed: u64, opt: Options) -> Self {
        let mut rng = Rng::new(seed ^ 0x51D0);
        let config = Arc::new(config_of(&mut rng));
        let n = config.nodes.len();
        let nodes = (1..=n as u16)
            .map(|i| Node {
                id: NodeId(i),
                rate: rng.below(1001) as i64 - 500,
                offset: ((1 + rng.below(1000)) * 1000 * MS) as i64,
                up: false,
                daemon: None,
                mount: None,
                incarnation: 0,
                mount_incarnation: 0,
                next_client: 1,
                ring_seq: 0,
                last_view: ViewName::NONE,
                daemon_asleep: 0,
                mount_asleep: 0,
                asleep_since: 0,
                slow_until: 0,
                hang_until: 0,
                blocked: false,
                restart_at: 0,
                leaving: false,
                runs: BTreeSet::new(),
                quorate_deadline: Boottime::ZERO,
            })
            .collect();
        let rough = rng.chance(2, 3);
        let weather = if rough {
            Weather {
                loss: rng.below(60),
                duplicate: rng.below(30),
                delay: MS / 2 + rng.below(2 * MS),
                jitter: rng.below(3 * MS),
                late: rng.below(20),
            }
        } else {
            CALM
        };
        let mut w = Self {
            now: 0,
            order: 0,
            heap: BinaryHeap::new(),
            events: Vec::new(),
            free: Vec::new(),
            nodes,
            lun: Lun::new(n),
            fabric_fence: rng.chance(1, 3),
            slow_files: seed >= SLOW_FILES,
            agents: 0,
            weather,
            cut: BTreeSet::new(),
            lanes: BTreeMap::new(),
            audit: Audit::default(),
            mutant: opt.mutant,
            services: (seed >= SERVICES).then(|| Rng::new(seed ^ 0x5E21)),
            healed: false,
            quiet: false,
            steps: 0,
            hash: 0xcbf2_9ce4_8422_2325,
            trace: opt.trace,
            story: VecDeque::new(),
            kinds: BTreeMap::new(),
            config,
            rng,
        };
        for i in 0..n {
            let at = if w.rng.chance(3, 4) { w.rng.below(200) } else { w.rng.below(6000) };
            w.start_at(i, at * MS);
        }
        w
    }

    pub(crate) fn is(&self, m: Mutant) -> bool {
        self.mutant == Some(m)
    }

    // ---- time and order ----

    pub(crate) fn at(&mut self, t: u64, ev: Ev) {
        self.order += 1;
        let slot = if let Some(slot) = self.free.pop() {
            self.events[slot] = Some(ev);
            slot
        } else {
            self.events.push(Some(ev));
            self.events.len() - 1
        };
        self.heap.push(Reverse((t.max(self.now), self.order, slot)));
    }

    pub(crate) fn after(&mut self, d: u64, ev: Ev) {
        self.at(self.now + d, ev);
    }

    pub(crate) fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.rng.below(to - from)
    }

    pub(crate) fn local(&self, i: usize) -> Boottime {
        self.local_at(i, self.now)
    }

    pub(crate) fn local_at(&self, i: usize, now: u64) -> Boottime {
        let n = &self.nodes[i];
        let t = i128::from(now) * i128::from(1_000_000 + n.rate) / 1_000_000 + i128::from(n.offset);
        Boottime(t as u64)
    }

    /// The true instant at which that node's clock shows `at`, not earlier.
    pub(crate) fn true_time(&self, i: usize, at: Boottime) -> u64 {
        let n = &self.nodes[i];
        let t = (i128::from(at.0) - i128::from(n.offset)) * 1_000_000 / i128::from(1_000_000 + n.rate);
        t.max(0) as u64 + 2_000
    }

    /// Something worth a line of the story; part of the run's hash.
    pub(crate) fn say(&mut self, text: impl FnOnce() -> String) {
        if self.trace {
            let line = format!("{:>10.4} {}", self.now as f64 / MS as f64 / 1000.0, text());
            self.story.push_back(line);
            if self.story.len() > 40_000 {
                self.story.pop_front();
            }
        }
    }

    /// What each mount waits for, at the end of the story.
    pub(crate) fn picture(&mut self) {
        let lines: Vec<String> =
            self.nodes.iter().filter_map(|n| Some(n.mount.as_ref()?.picture())).collect();
        lines.into_iter().for_each(|line| self.say(|| line));
    }

    fn mix(&mut self, word: u64) {
        self.hash = (self.hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(5);
    }

    /// Number that two equal runs share.
    pub(crate) fn digest(&self) -> u64 {
        self.hash
    }

    /// Runs until `until`, until a rule is broken, or until `stop` says so (asked every 50 ms).
    pub(crate) fn run(&mut self, until: u64, mut stop: impl FnMut(&mut Self) -> bool) -> bool {
        let mut ask = self.now;
        while self.audit.broken.is_none() {
            let Some(&Reverse((t, _, slot))) = self.heap.peek() else { break };
            if t > until {
                self.now = until;
                return false;
            }
            self.heap.pop();
            self.now = t;
            let ev = self.events[slot].take().expect("invariant: a queued event is there");
            self.free.push(slot);
            self.steps += 1;
            if self.trace {
                let kind = format!("{:?}", std::mem::discriminant(&ev));
                *self.kinds.entry(kind).or_default() += 1;
            }
            self.mix(t);
            self.handle(ev);
            if self.now >= ask {
                ask = self.now + 50 * MS;
                self.sample();
                if stop(self) {
                    return true;
                }
            }
        }
        false
    }

    fn handle(&mut self, ev: Ev) {
        // Who sleeps gets it when it wakes, in the same order.
        let asleep = match &ev {
            Ev::Turn { node, .. }
            | Ev::Persisted { node, .. }
            | Ev::Recorded { node, .. }
            | Ev::Agent { node, .. }
            | Ev::DiskTick { node, .. }
            | Ev::DiskCommand { node, .. }
            | Ev::DiskEvent { node, .. }
            | Ev::DiskAnswer { node, .. }
            | Ev::ToManager { node, .. }
            | Ev::ManagerTick { node, .. }
            | Ev::ServiceDone { node, .. }
            | Ev::Call { node, .. } => self.nodes[*node].daemon_asleep,
            Ev::ToMount { node, .. }
            | Ev::User { node, .. }
            | Ev::Timer { node, .. }
            | Ev::Submit { node, .. }
            | Ev::Done { node, .. }
            | Ev::DlmTick { node, .. } => self.nodes[*node].mount_asleep,
            _ => 0,
        };
        if asleep > 0 {
            return self.at(asleep, ev);
        }
        match ev {
            Ev::Start { node } => self.start(node),
            Ev::Wake { node } => self.wake(node),
            Ev::Reset { node } => {
                // not a machine that has been reset since
                if self.nodes[node].blocked {
                    self.crash(node, "reset by the operator");
                }
            }
            Ev::Remount { node } => self.start_mount(node),
            Ev::Fault => self.fault(),
            Ev::Heal => self.heal(),
            Ev::Frame { to, from, cookie, packet } => self.frame(to, from, cookie, packet),
            Ev::Turn { node, life } => {
                if self.is_life(node, life) {
                    self.turn(node);
                }
            }
            Ev::Persisted { node, life, seq } => {
                if self.is_life(node, life) {
                    let n = &mut self.nodes[node];
                    n.ring_seq = n.ring_seq.max(seq);
                    if let Some(d) = &mut n.daemon {
                        d.stack.persisted(seq);
                    }
                    self.turn(node);
                }
            }
            Ev::Recorded { node, life, view } => {
                if self.is_life(node, life) {
                    let n = &mut self.nodes[node];
                    n.last_view = n.last_view.max(view);
                    self.view_recorded(node, view);
                }
            }
            Ev::AgentEffect { by, life, victim, probe, ok } => self.agent_effect(by, life, victim, probe, ok),
            Ev::Agent { node, life, victim, result } => {
                if self.is_life(node, life) {
                    self.agent_done(node, victim, result);
                }
            }
            Ev::DiskTick { node, life } => {
                if self.is_life(node, life) {
                    self.disk_input(node, DiskInput::Tick);
                }
            }
            Ev::DiskCommand { node, life, command } => {
                if self.is_life(node, life) {
                    self.disk_input(node, DiskInput::Command(command));
                }
            }
            Ev::DiskEvent { node, life, event } => {
                if self.is_life(node, life) {
                    self.disk_event(node, event);
                }
            }
            Ev::DiskAnswer { node, life, input } => {
                if self.is_life(node, life) {
                    self.disk_input(node, input);
                }
            }
            Ev::DiskLand { node, life, block, failed } => self.disk_land(node, life, *block, failed),
            Ev::DiskSample { node, life, answer, ok } => self.disk_sample(node, life, answer, ok),
            Ev::Call { node, life, client, call } => {
                if self.is_life(node, life) {
                    self.call(node, client, call);
                }
            }
            Ev::ToMount { node, who, event } => {
                if self.is_mount(node, who) {
                    self.mount_event(node, &event);
                }
            }
            Ev::ToManager { node, life, event } => {
                if self.is_life(node, life) {
                    self.manager_event(node, event);
                    self.turn(node);
                }
            }
            Ev::ManagerTick { node, life } => {
                if self.is_life(node, life) {
                    self.manager_tick(node);
                    self.turn(node);
                }
            }
            Ev::ServiceDone { node, life, svc, seq, action } => {
                if self.is_life(node, life) {
                    self.service_done(node, svc, seq, action);
                    self.turn(node);
                }
            }
            Ev::Lane { from, to } => self.lane(from, to),
            Ev::User { node, who } => {
                if self.is_mount(node, who) {
                    self.user(node);
                }
            }
            Ev::Timer { node, who } => {
                if self.is_mount(node, who) {
                    self.mount_timer(node);
                }
            }
            Ev::Submit { node, who, op, tag } => {
                if self.is_mount(node, who) {
                    self.submit(node, op, tag);
                }
            }
            Ev::Land { id } => self.land(id),
            Ev::Done { node, who, ok, tag } => {
                if self.is_mount(node, who) {
                    self.write_done(node, ok, tag);
                }
            }
            Ev::Read { node, who, tag, what } => {
                if self.is_mount(node, who) {
                    // sampled when it happens, looked at when the process runs
                    self.read_done(node, tag, what);
                }
            }
            Ev::Reap { node, who } => self.reap(node, who),
            Ev::DlmTick { node, who } => {
                if self.is_mount(node, who) {
                    self.dlm_tick(node);
                }
            }
        }
    }

    pub(crate) fn is_life(&self, node: usize, life: u64) -> bool {
        self.nodes[node].daemon.as_ref().is_some_and(|d| d.me.incarnation.0 == life)
    }

    pub(crate) fn is_mount(&self, node: usize, who: Proc) -> bool {
        self.nodes[node].mount.as_ref().is_some_and(|m| m.who == who && !m.dead)
    }

    // ---- the network ----

    pub(crate) fn send(&mut self, i: usize, to: Dest, packet: &Bytes) {
        let Some(d) = &self.nodes[i].daemon else { return };
        let (from, cookie) = (d.me, d.cookie);
        let targets: Vec<usize> = match to {
            Dest::Node(n) => vec![usize::from(n.0) - 1],
            Dest::All => (0..self.nodes.len()).filter(|j| *j != i).collect(),
        };
        for to in targets {
            let w = self.weather;
            let cut = self.cut.contains(&(i as u16, to as u16));
            if cut || self.rng.chance(w.loss, 1000) {
                continue;
            }
            let copies = 1 + u64::from(self.rng.chance(w.duplicate, 1000));
            for _ in 0..copies {
                let spread = if self.rng.chance(w.late, 1000) { 20 } else { 1 };
                let d = w.delay + self.rng.below(spread * w.jitter + 1);
                self.after(d, Ev::Frame { to, from, cookie, packet: packet.clone() });
            }
        }
    }

    /// Puts a message into the lane to a peer. Lanes are reliable and ordered, and end with a process or a view.
    pub(crate) fn lane_push(&mut self, from: Proc, to: Proc, view: ViewId, msg: Msg) {
        let lane = self.lanes.entry((from, to)).or_default();
        lane.queue.push_back((view, msg));
        if !std::mem::replace(&mut lane.scheduled, true) {
            let d = self.lane_delay();
            self.after(d, Ev::Lane { from, to });
        }
    }

    fn lane_delay(&mut self) -> u64 {
        let w = self.weather;
        let lost = self.rng.chance(w.loss, 1000);
        w.delay + self.rng.below(w.jitter + 1) + if lost { 40 * MS } else { 0 }
    }

    pub(crate) fn lane_is_empty(&self, from: Proc) -> bool {
        self.lanes.iter().all(|((f, _), l)| *f != from || l.queue.is_empty())
    }

    fn lane(&mut self, from: Proc, to: Proc) {
        let (a, b) = (from.node.0 - 1, to.node.0 - 1);
        let j = usize::from(b);
        let Some(lane) = self.lanes.get_mut(&(from, to)) else { return };
        let receiver = self.nodes[j].mount.as_ref().filter(|m| m.who == to && !m.dead);
        let Some(receiver) = receiver else {
            // a process that is gone, or one that is not there yet
            if self.nodes[j].mount_incarnation >= to.incarnation.0 {
                self.lanes.remove(&(from, to));
            }
            return;
        };
        if receiver.links_gone.contains(&from) {
            self.lanes.remove(&(from, to));
            return;
        }
        let cut = self.cut.contains(&(a, b)) || self.cut.contains(&(b, a));
        if cut || self.nodes[j].mount_asleep > 0 {
            return self.after(30 * MS, Ev::Lane { from, to });
        }
        let Some((view, msg)) = lane.queue.pop_front() else {
            lane.scheduled = false;
            return;
        };
        lane.scheduled = !lane.queue.is_empty();
        if lane.scheduled {
            let d = self.rng.below(200_000);
            self.after(d, Ev::Lane { from, to });
        }
        self.dlm_step(j, dlm::Event::Msg { from, view, msg });
    }

    /// The sender is dead: of what it said an arbitrary tail never arrives.
    pub(crate) fn cut_lanes_of(&mut self, who: Proc) {
        let keys: Vec<(Proc, Proc)> =
            self.lanes.keys().filter(|(f, t)| *f == who || *t == who).copied().collect();
        for key in keys {
            if key.1 == who {
                self.lanes.remove(&key);
            } else if let Some(lane) = self.lanes.get_mut(&key) {
                let keep = self.rng.below(lane.queue.len() as u64 + 1) as usize;
                lane.queue.truncate(keep);
            }
        }
    }

    // ---- faults ----

    fn partition(&mut self) {
        self.cut.clear();
        let salt = self.rng.next_u64();
        let one_way = self.rng.chance(1, 4);
        for a in 0..self.nodes.len() as u16 {
            for b in 0..self.nodes.len() as u16 {
                let (x, y) = (salt >> (a * 4) & 1, salt >> (b * 4) & 1);
                if x != y && (!one_way || x == 1) {
                    self.cut.insert((a, b));
                }
            }
        }
        let cut = self.cut.clone();
        self.say(|| format!("NET cut {cut:?}"));
    }

    fn fault(&mut self) {
        if self.healed {
            return;
        }
        let gap = *[300, 1500, 5000].get(self.rng.below(3) as usize).expect("index below 3");
        let d = self.rng.below(gap * MS);
        self.after(d, Ev::Fault);
        let i = self.rng.below(self.nodes.len() as u64) as usize;
        match self.rng.below(20) {
            0 | 1 => self.partition(),
            2..=4 => {
                self.cut.clear();
                self.say(|| "NET healed".into());
            }
            5 => {
                let j = self.rng.below(self.nodes.len() as u64) as usize;
                self.cut.insert((i as u16, j as u16));
                if self.rng.chance(1, 2) {
                    self.cut.insert((j as u16, i as u16));
                }
                self.say(|| format!("NET cut n{} n{}", i + 1, j + 1));
            }
            6 | 7 => self.crash(i, "power lost"),
            8 => self.daemon_crash(i),
            9 => self.kill_mount(i, "mount killed"),
            10..=12 => {
                // up to five times the token time-out
                let d = self.between(20, 5000) * MS;
                let kind = self.rng.below(4);
                self.pause(i, d, kind != 1, kind != 2);
            }
            13 => {
                let d = self.between(50, 2500) * MS;
                self.say(|| format!("n{} disk hangs {} ms", i + 1, d / MS));
                self.nodes[i].hang_until = self.now + d;
            }
            14 => {
                let d = self.between(50, 2000) * MS;
                self.say(|| format!("all disks hang {} ms", d / MS));
                for n in &mut self.nodes {
                    n.hang_until = self.now + d;
                }
            }
            15 | 16 => {
                let d = self.between(100, 3000) * MS;
                self.say(|| format!("n{} disk slow {} ms", i + 1, d / MS));
                self.nodes[i].slow_until = self.now + d;
            }
            17 => self.leave(i),
            18 => {
                if self.rng.chance(1, 3) {
                    for j in 0..self.nodes.len() {
                        self.crash(j, "power lost everywhere");
                    }
                }
            }
            _ => {}
        }
    }

    fn pause(&mut self, i: usize, d: u64, daemon: bool, mount: bool) {
        let n = &mut self.nodes[i];
        if !n.up || n.daemon_asleep > 0 || n.mount_asleep > 0 {
            return;
        }
        let until = self.now + d;
        n.asleep_since = self.now;
        if daemon {
            n.daemon_asleep = until;
        }
        if mount {
            n.mount_asleep = until;
        }
        self.say(|| format!("n{} pauses {} ms daemon {daemon} mount {mount}", i + 1, d / MS));
        self.at(until, Ev::Wake { node: i });
    }

    pub(crate) fn schedule_faults(&mut self, until: u64) {
        let first = self.between(2000, 6000) * MS;
        self.at(first, Ev::Fault);
        self.at(until, Ev::Heal);
    }

    fn heal(&mut self) {
        self.healed = true;
        self.cut.clear();
        self.weather = CALM;
        self.say(|| "HEAL".into());
        for i in 0..self.nodes.len() {
            let n = &mut self.nodes[i];
            (n.slow_until, n.hang_until) = (0, 0);
            if n.blocked {
                self.crash(i, "reset by the operator");
            }
        }
    }

    pub(crate) fn start_at(&mut self, i: usize, at: u64) {
        self.nodes[i].restart_at = at;
        self.at(at, Ev::Start { node: i });
    }

    /// Latency of one disk operation of that node.
    pub(crate) fn latency(&mut self, i: usize) -> u64 {
        let n = &self.nodes[i];
        let hang = n.hang_until.saturating_sub(self.now);
        let slow = self.now < n.slow_until;
        let base = if slow { self.rng.below(300 * MS) } else { self.between(MS / 5, 8 * MS) };
        base + hang
    }
}
