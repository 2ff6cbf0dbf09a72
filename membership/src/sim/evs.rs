//! Checker of extended virtual synchrony over the merged trace of all nodes' lives.
//!
//! | id | property |
//! |---|---|
//! | EVS1 | what is delivered was sent, unchanged, once per node, by a member of the ring it is delivered in |
//! | EVS2 | same ring id: same members; same step from ring to ring: same transitional members; a node is in all of its own |
//! | EVS3 | ring seq rises within a life; regular and transitional alternate; transitional ⊆ old ∩ new |
//! | EVS4 | all deliveries of a message belong to one ring |
//! | EVS5 | who goes together from ring to ring delivers the same, in the regular part and in the transitional |
//! | EVS6 | one total order per ring |
//! | EVS7 | no gaps, but for origins outside a transitional configuration |
//! | EVS8 | safe: delivered by every member that does not fail |
//! | EVS9 | own messages are delivered unless the node fails |

use crate::event::{How, RingId};
use cairn_base::{Boottime, Proc};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    Sent { id: u64, safe: bool },
    Transitional { old: RingId, members: Vec<Proc> },
    Regular { ring: RingId, members: Vec<Proc>, left: Vec<(Proc, How)>, at: Boottime },
    Delivered { id: u64, from: Proc, safe: bool, seq: u64 },
    Stopped,
}

/// One life of a node.
#[derive(Clone, Debug)]
pub struct Trace {
    pub proc: Proc,
    pub events: Vec<Event>,
}

impl Trace {
    pub fn new(proc: Proc) -> Self {
        Self { proc, events: Vec::new() }
    }

    pub fn push(&mut self, e: Event) {
        self.events.push(e);
    }
}

/// What one life delivered while a ring was its regular configuration, and in the transitional after it.
#[derive(Default)]
struct Stay {
    ring: RingId,
    members: Vec<Proc>,
    regular: Vec<(u64, u64)>,
    /// Members of the transitional configuration that closed it.
    trans: Option<Vec<Proc>>,
    transitional: Vec<(u64, u64)>,
    next: Option<RingId>,
    /// Who was reported gone, and how, when it ended.
    left: Vec<(Proc, How)>,
}

impl Stay {
    fn delivered(&self) -> impl Iterator<Item = &(u64, u64)> {
        self.regular.iter().chain(&self.transitional)
    }
}

struct Message {
    from: Proc,
    safe: bool,
}

macro_rules! ensure {
    ($cond:expr, $($arg:tt)+) => {
        if !$cond {
            return Err(format!($($arg)+));
        }
    };
}

type Check = Result<(), String>;

/// Splits a life into its stays, checking what can be checked alone (EVS1 once, EVS2 self, EVS3).
fn stays(t: &Trace) -> Result<Vec<Stay>, String> {
    let p = t.proc;
    let mut list: Vec<Stay> = Vec::new();
    let mut seen = BTreeSet::new();
    let mut in_trans = true;
    for e in &t.events {
        match e {
            Event::Sent { .. } | Event::Stopped => {}
            Event::Transitional { old, members } => {
                ensure!(members.contains(&p), "EVS2 {p} is not in its transitional configuration of {old}");
                if let Some(s) = list.last_mut() {
                    ensure!(!in_trans, "EVS3 {p}: two transitional configurations after {}", s.ring);
                    ensure!(s.ring == *old, "EVS3 {p}: transitional closes {old}, current is {}", s.ring);
                    let inside = members.iter().all(|m| s.members.contains(m));
                    ensure!(inside, "EVS3 {p}: transitional of {old} has strangers");
                    s.trans = Some(members.clone());
                }
                in_trans = true;
            }
            Event::Regular { ring, members, left, .. } => {
                ensure!(members.contains(&p), "EVS2 {p} is not in its configuration {ring}");
                ensure!(in_trans, "EVS3 {p}: {ring} without a transitional configuration");
                in_trans = false;
                if let Some(s) = list.last_mut() {
                    ensure!(s.ring.seq < ring.seq, "EVS3 {p}: {ring} after {}", s.ring);
                    let inside = s.trans.iter().flatten().all(|m| members.contains(m));
                    ensure!(inside, "EVS3 {p}: transitional members of {} missing in {ring}", s.ring);
                    s.next = Some(*ring);
                    s.left.clone_from(left);
                }
                list.push(Stay { ring: *ring, members: members.clone(), ..Stay::default() });
            }
            Event::Delivered { id, from, seq, .. } => {
                ensure!(*id != u64::MAX, "EVS1 {p}: damaged message from {from}");
                ensure!(seen.insert(*id), "EVS1 {p}: message {id} twice");
                let Some(s) = list.last_mut() else {
                    return Err(format!("EVS1 {p}: message {id} before any configuration"));
                };
                ensure!(s.members.contains(from), "EVS1 {p}: {id} from {from}, not in {}", s.ring);
                let part = if in_trans { &mut s.transitional } else { &mut s.regular };
                part.push((*seq, *id));
            }
        }
    }
    Ok(list)
}

/// `alive`: lives that had not ended and were healthy at the end of the run, after everything had settled.
pub fn check(traces: &[Trace], alive: &BTreeSet<Proc>) -> Check {
    let mut sent: BTreeMap<u64, Message> = BTreeMap::new();
    for t in traces {
        for e in &t.events {
            if let Event::Sent { id, safe } = e {
                sent.insert(*id, Message { from: t.proc, safe: *safe });
            }
        }
    }
    for t in traces {
        for e in &t.events {
            if let Event::Delivered { id, from, safe, .. } = e {
                let ok = sent.get(id).is_some_and(|m| m.from == *from && m.safe == *safe);
                ensure!(ok, "EVS1 {}: {id} from {from} was never sent so", t.proc);
            }
        }
    }
    let mut lives: BTreeMap<Proc, Vec<Stay>> = BTreeMap::new();
    for t in traces {
        lives.insert(t.proc, stays(t)?);
    }
    configurations(&lives)?;
    let orders = order(&lives)?;
    gaps(&lives, &sent, &orders)?;
    together(&lives)?;
    safe(&lives, &sent, alive)?;
    for (id, m) in &sent {
        if alive.contains(&m.from) {
            let got = lives[&m.from].iter().any(|s| s.delivered().any(|(_, i)| i == id));
            ensure!(got, "EVS9 {} never delivered its own {id}", m.from);
        }
    }
    Ok(())
}

type Lives = BTreeMap<Proc, Vec<Stay>>;

fn configurations(lives: &Lives) -> Check {
    let mut members: BTreeMap<RingId, &Vec<Proc>> = BTreeMap::new();
    let mut steps: BTreeMap<(RingId, RingId), &Vec<Proc>> = BTreeMap::new();
    for (p, stays) in lives {
        for s in stays {
            let same = *members.entry(s.ring).or_insert(&s.members) == &s.members;
            ensure!(same, "EVS2 {p}: ring {} has other members elsewhere", s.ring);
            if let (Some(trans), Some(next)) = (&s.trans, s.next) {
                let same = *steps.entry((s.ring, next)).or_insert(trans) == trans;
                ensure!(same, "EVS2 {p}: other transitional between {} and {next}", s.ring);
            }
        }
    }
    Ok(())
}

/// Position → message for each ring (EVS4, EVS6).
fn order(lives: &Lives) -> Result<BTreeMap<RingId, BTreeMap<u64, u64>>, String> {
    let mut orders: BTreeMap<RingId, BTreeMap<u64, u64>> = BTreeMap::new();
    let mut home: BTreeMap<u64, RingId> = BTreeMap::new();
    for (p, stays) in lives {
        for s in stays {
            let mut last = 0;
            for &(seq, id) in s.delivered() {
                ensure!(seq > last, "EVS6 {p}: {id} at {seq} after {last} in {}", s.ring);
                last = seq;
                let slot = *orders.entry(s.ring).or_default().entry(seq).or_insert(id);
                ensure!(slot == id, "EVS6 {p}: {seq} of {} is {id} here, {slot} elsewhere", s.ring);
                let ring = *home.entry(id).or_insert(s.ring);
                ensure!(ring == s.ring, "EVS4 {p}: {id} in {} here, in {ring} elsewhere", s.ring);
            }
        }
    }
    Ok(orders)
}

fn gaps(
    lives: &Lives,
    sent: &BTreeMap<u64, Message>,
    orders: &BTreeMap<RingId, BTreeMap<u64, u64>>,
) -> Check {
    for (p, stays) in lives {
        for s in stays {
            let Some(all) = orders.get(&s.ring) else { continue };
            let have: BTreeSet<u64> = s.delivered().map(|d| d.0).collect();
            let last_regular = s.regular.last().map_or(0, |d| d.0);
            let last = have.last().copied().unwrap_or(0);
            for (seq, id) in all.range(..last).filter(|(seq, _)| !have.contains(seq)) {
                ensure!(*seq > last_regular, "EVS7 {p}: gap at {seq} ({id}) in regular {}", s.ring);
                let from = sent[id].from;
                let outside = s.trans.as_ref().is_some_and(|t| !t.contains(&from));
                ensure!(outside, "EVS7 {p}: gap at {seq} ({id}) of {from} after {}", s.ring);
                // Nothing of the same origin may follow what was skipped.
                let later = s.transitional.iter().find(|(q, i)| q > seq && sent[i].from == from);
                ensure!(later.is_none(), "EVS7 {p}: {later:?} of {from} delivered, {seq} ({id}) not");
            }
        }
    }
    Ok(())
}

fn together(lives: &Lives) -> Check {
    let mut groups: BTreeMap<(RingId, RingId), (&Proc, &Stay)> = BTreeMap::new();
    for (p, stays) in lives {
        for s in stays {
            let Some(next) = s.next else { continue };
            let (q, other) = *groups.entry((s.ring, next)).or_insert((p, s));
            ensure!(
                s.left == other.left,
                "{p} and {q} disagree on who left {}: {:?} {:?}",
                s.ring,
                s.left,
                other.left
            );
            ensure!(
                s.regular == other.regular && s.transitional == other.transitional,
                "EVS5 {p} and {q} went from {} to {next} with {:?}+{:?} and {:?}+{:?}",
                s.ring,
                tail(&s.regular),
                s.transitional,
                tail(&other.regular),
                other.transitional
            );
        }
    }
    Ok(())
}

fn tail(list: &[(u64, u64)]) -> &[(u64, u64)] {
    &list[list.len().saturating_sub(8)..]
}

fn safe(lives: &Lives, sent: &BTreeMap<u64, Message>, alive: &BTreeSet<Proc>) -> Check {
    for (p, stays) in lives {
        for s in stays {
            let regular = s.regular.iter().map(|d| (d, &s.members));
            let trans = s.transitional.iter().filter_map(|d| s.trans.as_ref().map(|t| (d, t)));
            for (&(seq, id), among) in regular.chain(trans).filter(|(d, _)| sent[&d.1].safe) {
                for q in among {
                    let theirs = lives.get(q).and_then(|l| l.iter().find(|x| x.ring == s.ring));
                    // Who has closed the ring or is healthy to the end has no excuse.
                    let settled = theirs.is_some_and(|x| x.next.is_some()) || alive.contains(q);
                    let got = theirs.is_some_and(|x| x.delivered().any(|d| d.1 == id));
                    ensure!(got || !settled, "EVS8 {q} lacks safe {id} ({seq} of {}), {p} has it", s.ring);
                }
            }
        }
    }
    Ok(())
}

/// Number that two equal runs share.
pub fn digest(traces: &[Trace]) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325u64;
    for t in traces {
        for b in format!("{} {:?}", t.proc, t.events).bytes() {
            h = (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    h
}
