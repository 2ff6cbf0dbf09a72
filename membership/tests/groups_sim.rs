//! Process groups under the same weather as the ring: one history per ring for all, no ghosts, no lost clients.
//!
//! `GROUP_SEEDS=n` runs more seeds, `GROUP_SEED=s` one.

use bytes::Bytes;
use cairn_base::{Boottime, NodeId, Proc, Rng};
use membership::engine::{EngineInput, Guarantee, IoAction, LeaveReason};
use membership::event::{GroupMember, GroupName, GroupsEvent, RingId};
use membership::groups::{Agreed, GroupError, Groups, GroupsOutput};
use membership::ring::{Ring, Sabotage};
use membership::sim::{Birth, Cluster, Host, RingHost, Weather, message_id, payload};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What a node showed its clients: comparable across nodes within one ring.
#[derive(Clone, PartialEq, Debug)]
enum Shown {
    View {
        members: Vec<Proc>,
        state: Bytes,
    },
    Group {
        group: GroupName,
        view_no: u64,
        members: Vec<GroupMember>,
    },
    Message {
        group: GroupName,
        view_no: u64,
        from: GroupMember,
        no: u64,
        id: u64,
    },
    Service {
        from: Proc,
        data: Bytes,
    },
    /// The last local client of the group has gone.
    Deaf {
        group: GroupName,
    },
}

struct GroupHost {
    me: Proc,
    groups: Groups<Ring>,
    /// Ordered service messages counted so far: replicated state of a built-in service.
    counter: u64,
    /// Everything since the last view, and the whole story per ring.
    ring: RingId,
    story: BTreeMap<RingId, Vec<Shown>>,
    views: BTreeSet<RingId>,
    /// What each local client believes about its groups.
    belief: BTreeMap<(u32, GroupName), (u64, BTreeSet<GroupMember>)>,
    next_no: BTreeMap<(GroupName, GroupMember), u64>,
    seen_no: BTreeMap<GroupName, u64>,
    clients: BTreeMap<u32, BTreeSet<GroupName>>,
    next_client: u32,
    blocked: bool,
    /// From a view to the end of its regular configuration; what comes after differs between sides of a cut.
    recording: bool,
    leaving: bool,
    errors: Vec<String>,
    ended: bool,
}

fn sum(ring: &RingId, parts: &[(membership::event::Member, Bytes)]) -> Agreed {
    let max = parts.iter().map(|(_, b)| u64::from_le_bytes(b[..].try_into().expect("8 bytes"))).max();
    let state = [max.expect("I am a member"), ring.seq].iter().flat_map(|n| n.to_le_bytes()).collect();
    Agreed { state, ..Agreed::default() }
}

impl GroupHost {
    fn new(b: &Birth, sabotage: Sabotage) -> Self {
        let mut ring = Ring::new(RingHost::config(b), b.now);
        ring.set_sabotage(sabotage);
        Self {
            me: b.me,
            groups: Groups::new(ring, Box::new(sum)),
            counter: 0,
            ring: RingId::default(),
            story: BTreeMap::new(),
            views: BTreeSet::new(),
            belief: BTreeMap::new(),
            next_no: BTreeMap::new(),
            seen_no: BTreeMap::new(),
            clients: BTreeMap::new(),
            next_client: 0,
            blocked: true,
            recording: false,
            leaving: false,
            errors: Vec::new(),
            ended: false,
        }
    }

    fn wrong(&mut self, what: String) {
        self.errors.push(format!("{}: {what}", self.me));
    }

    fn event(&mut self, e: GroupsEvent) {
        match e {
            GroupsEvent::Writable { .. } => {}
            GroupsEvent::Transitional { .. } => self.recording = false,
            GroupsEvent::Blocked => self.blocked = true,
            GroupsEvent::Unblocked => self.blocked = false,
            GroupsEvent::Stopped => self.ended = true,
            GroupsEvent::SyncMismatch { mine, others, .. } => {
                self.wrong(format!("digests {mine} {others:?}"))
            }
            GroupsEvent::SyncWanted { ring, .. } => {
                self.groups.sync_state(ring, self.counter.to_le_bytes().to_vec().into());
            }
            GroupsEvent::View { view, state } => {
                self.counter = u64::from_le_bytes(state[..8].try_into().expect("8 bytes"));
                self.ring = view.id;
                self.recording = true;
                self.views.insert(view.id);
                let members = view.members.iter().map(|m| m.proc()).collect();
                self.show(Shown::View { members, state });
            }
            GroupsEvent::Service { from, data, .. } => {
                if self.blocked && !self.views.contains(&self.ring) {
                    self.wrong("service message before any view".into());
                }
                self.counter += 1;
                self.show(Shown::Service { from: from.proc(), data });
            }
            GroupsEvent::GroupView { local, view } => {
                let members: BTreeSet<GroupMember> = view.members.iter().map(|e| e.member).collect();
                if !self.belief.keys().any(|(_, g)| *g == view.group) {
                    // Nobody here was looking for a while.
                    self.next_no.retain(|(g, _), _| *g != view.group);
                }
                for client in local {
                    let key = (client, view.group.clone());
                    let me = GroupMember { node: self.me.node, incarnation: self.me.incarnation, client };
                    let (no, before) = self.belief.get(&key).cloned().unwrap_or_default();
                    if view.view_no <= no {
                        self.wrong(format!("view {} after {no} of {}", view.view_no, view.group));
                    }
                    // The differences a client is told must lead from what it knew to what it is shown.
                    if no > 0 {
                        let mut now = before;
                        view.left.iter().for_each(|(m, _)| {
                            now.remove(m);
                        });
                        now.extend(view.joined.iter().copied());
                        if now != members {
                            self.wrong(format!(
                                "differences of {} {} do not add up",
                                view.group, view.view_no
                            ));
                        }
                    }
                    if members.contains(&me) {
                        self.belief.insert(key, (view.view_no, members.clone()));
                    } else {
                        self.belief.remove(&key);
                    }
                }
                if view.joined.is_empty() && view.left.is_empty()
                    || view.view_no > self.last_no(&view.group) + 1
                {
                    // Some were apart; messages between may be missing.
                    self.next_no.retain(|(g, _), _| *g != view.group);
                }
                self.seen_no.insert(view.group.clone(), view.view_no);
                for m in view.joined.iter().chain(view.left.iter().map(|(m, _)| m)) {
                    self.next_no.remove(&(view.group.clone(), *m));
                }
                let (group, view_no) = (view.group, view.view_no);
                self.show(Shown::Group { group, view_no, members: members.into_iter().collect() });
            }
            GroupsEvent::GroupMessage { local, message } => {
                let mut view_no = 0;
                for client in local {
                    let known = self.belief.get(&(client, message.group.clone()));
                    if !known.is_some_and(|(_, m)| m.contains(&message.from)) {
                        self.wrong(format!("message of a stranger {:?}", message.from));
                    }
                    let key = (client, message.group.clone());
                    view_no = self.belief.get(&key).map_or(0, |b| b.0);
                }
                let Some(id) = message_id(&message.data) else {
                    return self.wrong("damaged message".into());
                };
                let next = self.next_no.entry((message.group.clone(), message.from)).or_insert(message.no);
                if *next != message.no {
                    let want = *next;
                    self.wrong(format!("message {} of {:?}, expected {want}", message.no, message.from));
                } else {
                    *next += 1;
                }
                self.show(Shown::Message {
                    group: message.group,
                    view_no,
                    from: message.from,
                    no: message.no,
                    id,
                });
            }
        }
    }

    fn last_no(&self, group: &GroupName) -> u64 {
        self.seen_no.get(group).copied().unwrap_or(0)
    }

    fn show(&mut self, s: Shown) {
        if self.recording {
            self.story.entry(self.ring).or_default().push(s);
        }
    }
}

impl Host for GroupHost {
    fn step(&mut self, now: Boottime, ev: EngineInput, io: &mut Vec<IoAction>) {
        let mut out = Vec::new();
        self.groups.step(now, ev, &mut out);
        for o in out {
            match o {
                GroupsOutput::Io(a) => io.push(a),
                GroupsOutput::Log(_) => {}
                GroupsOutput::Event(e) => self.event(e),
            }
        }
    }

    fn next_deadline(&self) -> Boottime {
        self.groups.next_deadline()
    }

    fn ended(&self) -> bool {
        self.ended
    }
}

type Sim = Cluster<GroupHost>;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn name(n: u64) -> GroupName {
    GroupName::new(&format!("g{n}")).expect("short name")
}

fn client_action(h: &mut GroupHost, rng: &mut Rng, id: &mut u64) {
    if h.leaving {
        return;
    }
    let client = h.clients.keys().nth(rng.below(h.clients.len().max(1) as u64) as usize).copied();
    match (rng.below(8), client) {
        (0, _) | (_, None) => {
            h.next_client += 1;
            h.clients.insert(h.next_client, BTreeSet::new());
        }
        (1 | 2, Some(c)) => {
            let g = name(rng.below(3));
            match h.groups.join(c, &g, vec![1, 2, 3].into()) {
                Ok(()) => assert!(h.clients.get_mut(&c).expect("exists").insert(g)),
                Err(GroupError::AlreadyMember { .. }) => assert!(h.clients[&c].contains(&g)),
                Err(e) => h.wrong(format!("join: {e}")),
            }
        }
        (3, Some(c)) => {
            if let Some(g) = h.clients[&c].first().cloned() {
                h.groups.leave(c, &g).expect("it is a member");
                h.clients.get_mut(&c).expect("exists").remove(&g);
            }
        }
        (4, Some(c)) if rng.chance(1, 3) => {
            h.clients.remove(&c);
            let before: BTreeSet<GroupName> = h.belief.keys().map(|k| k.1.clone()).collect();
            h.belief.retain(|(x, _), _| *x != c);
            for group in before {
                if !h.belief.keys().any(|k| k.1 == group) {
                    h.show(Shown::Deaf { group });
                }
            }
            h.groups.client_gone(c);
        }
        (5, _) => {
            *id += 1;
            let _ = h.groups.send_service(7, Guarantee::Safe, payload(*id, 16));
        }
        (_, Some(c)) => {
            for g in h.clients[&c].clone() {
                *id += 1;
                let guarantee = if rng.chance(1, 3) { Guarantee::Safe } else { Guarantee::Agreed };
                let len = if rng.chance(1, 12) { 20_000 } else { 24 };
                let _ = h.groups.mcast(c, &g, guarantee, &payload(*id, len));
            }
        }
    }
}

fn settled(c: &Sim) -> bool {
    let alive = c.alive();
    let mut rings = c.hosts().map(|(_, h)| (h.ring, h.blocked, h.groups.engine().members().len()));
    let Some(first) = rings.next() else { return true };
    !first.1 && first.2 == alive.len() && rings.all(|r| r == first)
}

fn run(seed: u64, sabotage: Sabotage) -> Result<(usize, usize), String> {
    let mut rng = Rng::new(seed ^ 0x6805);
    let n = 2 + rng.below(3) as u16;
    let mut c: Sim = Cluster::new(seed, n, move |b| GroupHost::new(&b, sabotage));
    if rng.chance(2, 3) {
        c.weather = Weather {
            loss: rng.below(100),
            duplicate: rng.below(50),
            delay: Duration::from_micros(50 + rng.below(1000)),
            jitter: Duration::from_micros(rng.below(2000)),
            late: rng.below(30),
        };
    }
    c.start_all();
    let mut id = 0;
    for _ in 0..6 + rng.below(12) {
        for _ in 0..rng.below(12) {
            let alive = c.alive();
            if alive.is_empty() {
                break;
            }
            let node = alive[rng.below(alive.len() as u64) as usize];
            c.with(node, |h, _| client_action(h, &mut rng, &mut id));
            let gap = if rng.chance(1, 4) { 300 } else { 4 };
            c.run(ms(rng.below(gap)));
        }
        let nodes = c.node_ids();
        let n = nodes[rng.below(nodes.len() as u64) as usize];
        let m = nodes[rng.below(nodes.len() as u64) as usize];
        match rng.below(9) {
            0 => c.crash(n),
            1 | 2 => {
                if c.host(n).is_none() {
                    c.start(n, false);
                }
            }
            3 => c.pause(n, ms(rng.below(4000))),
            4 => {
                let salt = rng.next_u64();
                c.partition(|x: NodeId| (salt >> (x.0 * 4)) % 2);
            }
            5 | 6 => c.cut.clear(),
            7 => c.link(n, m, false),
            _ => {
                if rng.chance(1, 4) {
                    c.with(n, |h, _| {
                        h.leaving = true;
                        h.groups.leave_cluster(LeaveReason::Shutdown);
                    });
                }
            }
        }
        let gap = *[5, 50, 500, 3000].get(rng.below(4) as usize).expect("index below 4");
        c.run(ms(rng.below(gap)));
    }
    c.cut.clear();
    c.weather = Weather::CALM;
    c.run(ms(6000));
    for node in c.node_ids() {
        if c.host(node).is_none() {
            c.start(node, false);
        }
    }
    let until = c.now + ms(150_000);
    if !c.run_while(until, |c| !settled(c)) {
        return Err("no common view after healing".into());
    }
    c.run(ms(3000));
    check(&c)
}

/// What was said under one view of one group (or, without group, by the services) in one ring.
type Talk = (RingId, Option<(GroupName, u64)>);

fn check(c: &Sim) -> Result<(usize, usize), String> {
    let all = || c.dead.iter().chain(c.hosts().map(|(_, h)| h));
    for h in all() {
        if let Some(e) = h.errors.first() {
            return Err(e.clone());
        }
    }
    // Between a view and the end of its regular configuration all nodes tell one story: the same members under one
    // view number, and the same messages between two views, as far as each of them got.
    let mut shown = 0;
    let mut members: BTreeMap<(RingId, GroupName, u64), &Vec<GroupMember>> = BTreeMap::new();
    let mut talks: BTreeMap<Talk, (Vec<&Shown>, bool)> = BTreeMap::new();
    for h in all() {
        for (ring, story) in &h.story {
            let mut mine: BTreeMap<Talk, (Vec<&Shown>, bool)> = BTreeMap::new();
            let mut looking: BTreeMap<&GroupName, u64> = BTreeMap::new();
            for s in story {
                shown += 1;
                match s {
                    Shown::View { .. } | Shown::Service { .. } => {
                        mine.entry((*ring, None)).or_default().0.push(s);
                    }
                    Shown::Message { group, view_no, .. } => {
                        mine.entry((*ring, Some((group.clone(), *view_no)))).or_default().0.push(s);
                        looking.insert(group, *view_no);
                    }
                    Shown::Group { group, view_no, members: list } => {
                        let same = *members.entry((*ring, group.clone(), *view_no)).or_insert(list) == list;
                        if !same {
                            return Err(format!("{}: view {view_no} of {group} in {ring} differs", h.me));
                        }
                        if let Some(no) = looking.insert(group, *view_no) {
                            mine.entry((*ring, Some((group.clone(), no)))).or_default().1 = true;
                        }
                        if !list.iter().any(|m| m.proc() == h.me) {
                            looking.remove(group);
                        }
                    }
                    Shown::Deaf { group } => {
                        looking.remove(group);
                    }
                }
            }
            for (key, (list, complete)) in mine {
                let Some((other, other_complete)) = talks.get(&key) else {
                    talks.insert(key, (list, complete));
                    continue;
                };
                let fits = other.starts_with(&list) && (!complete || other.len() == list.len())
                    || list.starts_with(other) && (!other_complete || other.len() == list.len());
                if !fits {
                    return Err(format!(
                        "{}: {key:?} {complete} {list:?}, elsewhere {other_complete} {other:?}",
                        h.me
                    ));
                }
                if list.len() > other.len() || complete {
                    talks.insert(key, (list, complete));
                }
            }
        }
    }
    // In the end: the same groups everywhere, and in them exactly the clients that want to be there.
    let mut want: BTreeMap<GroupName, BTreeSet<GroupMember>> = BTreeMap::new();
    for (_, h) in c.hosts() {
        for (&client, groups) in &h.clients {
            for g in groups {
                let m = GroupMember { node: h.me.node, incarnation: h.me.incarnation, client };
                want.entry(g.clone()).or_default().insert(m);
            }
        }
    }
    let mut views: BTreeMap<GroupName, u64> = BTreeMap::new();
    for (node, h) in c.hosts() {
        let have: BTreeMap<GroupName, BTreeSet<GroupMember>> = h
            .groups
            .groups()
            .map(|(n, g)| (n.clone(), g.members.iter().map(|e| e.member).collect()))
            .collect();
        if have != want {
            return Err(format!("node {node} has {have:?}, wanted {want:?}"));
        }
        for (name, g) in h.groups.groups() {
            if *views.entry(name.clone()).or_insert(g.view_no) != g.view_no {
                return Err(format!("view numbers of {name} differ"));
            }
        }
    }
    Ok((shown, all().map(|h| h.views.len()).sum()))
}

#[test]
fn sim_groups_random_faults_keep_one_history() {
    let one = std::env::var("GROUP_SEED").ok().and_then(|s| s.parse::<u64>().ok());
    let n = std::env::var("GROUP_SEEDS").ok().and_then(|s| s.parse().ok());
    let n = n.unwrap_or(if cfg!(debug_assertions) { 150 } else { 800 });
    let seeds = one.map_or(1..n + 1, |s| s..s + 1);
    let (mut shown, mut views, mut failed) = (0, 0, Vec::new());
    for seed in seeds {
        match run(seed, Sabotage::default()) {
            Ok((s, v)) => {
                shown += s;
                views += v;
            }
            Err(e) => {
                println!("GROUP_SEED={seed}: {}", &e[..e.len().min(3000)]);
                failed.push(seed);
            }
        }
    }
    println!("{views} views, {shown} events");
    assert!(failed.is_empty(), "{} seeds failed: {:?}", failed.len(), &failed[..failed.len().min(20)]);
    assert!(shown > 0 && views > 0);
}

#[test]
fn a_user_lane_open_before_the_barrier_is_noticed() {
    let broken = Sabotage { users_always_open: true, ..Sabotage::default() };
    let found = (1..=400).find_map(|seed| run(seed, broken).err().map(|e| (seed, e)));
    let (seed, why) = found.expect("the checker must notice within 400 seeds");
    println!("seed {seed}: {}", &why[..why.len().min(200)]);
}
