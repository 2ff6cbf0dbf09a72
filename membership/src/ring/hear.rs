//! Who hears whom: presence of peers, beacons, merging of rings, hold-down.
//!
//! Every frame carries its sender's cookie; beacons and joins carry back the cookies that were heard. A peer whose
//! echo shows *my* present cookie is alive now and hears me. Members announce in order which foreign processors they
//! hear in both directions (HEARS); when every member hears every node of a foreign ring, and that ring's beacons say
//! the same of us, the representative orders a MERGE and all gather with it at once.
//! A processor that did not stay is held down: not merged with for a time that doubles with each failure. Beacons say
//! so, so that the other side does not break its ring for nothing.

use super::log::{Cause, RingLog, State};
use super::packet::{self, Beacon, Heard};
use super::set::ProcSet;
use super::{Out, Ring};
use crate::engine::{Dest, EngineOutput, FrameLane, IoAction, LeaveReason};
use crate::event::{Member, RingId};
use cairn_base::{Boottime, Incarnation, NodeId, Proc};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

const TAG_HEARS: u8 = 1;
const TAG_MERGE: u8 = 2;
const TAG_LEAVING: u8 = 3;
const TAG_REMOVED: u8 = 4;

const HOLD_DOWN_MAX: Duration = Duration::from_secs(60);
const HOLD_DOWN_FORGET: Duration = Duration::from_secs(300);
const INCOMPATIBLE_EVERY: Duration = Duration::from_secs(60);

pub(super) fn leaving_tag(reason: LeaveReason) -> u8 {
    match reason {
        LeaveReason::Shutdown => TAG_LEAVING,
        LeaveReason::Removed => TAG_REMOVED,
    }
}

pub(super) fn is_leaving(body: &[u8]) -> bool {
    matches!(body.first(), Some(&(TAG_LEAVING | TAG_REMOVED)))
}

#[derive(Default)]
struct PeerState {
    /// The incarnation that has echoed my cookie. Bars all lower ones.
    confirmed: Option<(Incarnation, u64)>,
    /// A higher one that has not yet.
    candidate: Option<(Incarnation, u64, Boottime)>,
    heard_at: Option<Boottime>,
    echo_at: Option<Boottime>,
    beacon: Option<(Beacon, Boottime)>,
    join_no: u32,
    incompatible_at: Option<Boottime>,
    stale_told: Option<Incarnation>,
}

struct HoldDown {
    incarnation: Incarnation,
    since: Boottime,
    until: Boottime,
    level: u32,
}

#[derive(Default)]
pub(super) struct Hearing {
    peers: BTreeMap<NodeId, PeerState>,
    /// What each member of the present ring said last that it hears in both directions.
    matrix: BTreeMap<Proc, ProcSet>,
    said: ProcSet,
    excluded: BTreeMap<NodeId, HoldDown>,
    /// A merge that could begin, and since when nothing about it changed.
    wanted: Option<(ProcSet, Boottime)>,
    merge_sent: bool,
    told: BTreeSet<(NodeId, usize)>,
    duplicate: Option<Proc>,
}

impl Hearing {
    pub(super) fn duplicate_is_news(&mut self, other: Proc) -> bool {
        self.duplicate.replace(other) != Some(other)
    }
}

impl Ring {
    fn fresh(&self, at: Option<Boottime>) -> bool {
        at.is_some_and(|t| self.now.since(t) <= self.cfg.timers.hear_window)
    }

    pub(super) fn hears_both_ways(&self, node: NodeId) -> bool {
        self.hear.peers.get(&node).is_some_and(|p| {
            p.confirmed.is_some() && p.candidate.is_none() && self.fresh(p.heard_at) && self.fresh(p.echo_at)
        })
    }

    /// Any frame of that processor within the hear window.
    fn is_heard(&self, p: Proc) -> bool {
        self.hear
            .peers
            .get(&p.node)
            .is_some_and(|s| s.confirmed.is_some_and(|(i, _)| i == p.incarnation) && self.fresh(s.heard_at))
    }

    pub(super) fn is_held_down(&self, p: Proc) -> bool {
        self.hear.excluded.get(&p.node).is_some_and(|h| h.incarnation == p.incarnation && self.now < h.until)
            && !self.sabotage.no_hold_down
    }

    /// Records a frame; true when its sender's incarnation is confirmed.
    pub(super) fn note_frame(&mut self, from: Proc, cookie: u64, out: Out<'_>) -> bool {
        let now = self.now;
        let peer = self.hear.peers.entry(from.node).or_default();
        match peer.confirmed {
            Some((i, c)) if i == from.incarnation && c == cookie => {
                peer.heard_at = Some(now);
                true
            }
            Some((i, _)) if from.incarnation <= i => {
                if peer.stale_told.replace(from.incarnation) != Some(from.incarnation) {
                    let confirmed = Proc { node: from.node, incarnation: i };
                    Self::note(RingLog::StaleIncarnation { peer: from, confirmed }, out);
                }
                false
            }
            _ => {
                // A recording can only show lower incarnations than the one that lives now.
                if peer.candidate.is_none_or(|(i, _, _)| i <= from.incarnation) {
                    peer.candidate = Some((from.incarnation, cookie, now));
                }
                false
            }
        }
    }

    /// Looks for my cookie in what a beacon or join echoes. True when its sender is confirmed (perhaps just now).
    pub(super) fn note_echo(&mut self, from: Proc, cookie: u64, heard: &[Heard], out: Out<'_>) -> bool {
        let (me, mine, now) = (self.me.node, self.cfg.cookie, self.now);
        let echoes = heard.iter().any(|h| h.node == me && h.cookie == mine);
        let peer = self.hear.peers.entry(from.node).or_default();
        let known = peer.confirmed == Some((from.incarnation, cookie));
        if known {
            if echoes {
                peer.echo_at = Some(now);
            }
            return true;
        }
        let is_candidate = peer.candidate.is_some_and(|(i, c, _)| (i, c) == (from.incarnation, cookie));
        if !(echoes && is_candidate) {
            self.stats.unconfirmed += 1;
            return false;
        }
        let before = peer.confirmed.replace((from.incarnation, cookie));
        peer.candidate = None;
        peer.heard_at = Some(now);
        peer.echo_at = Some(now);
        peer.beacon = None;
        peer.join_no = 0;
        out.push(EngineOutput::Io(IoAction::Confirm { peer: from, cookie }));
        if let Some((incarnation, _)) = before {
            // A node has one life at a time.
            self.on_dead(Proc { node: from.node, incarnation }, Cause::JoinNews, out);
        }
        true
    }

    /// The cookies that I hear, for beacons and joins.
    pub(super) fn heard_list(&self) -> Vec<Heard> {
        let mut list: BTreeMap<NodeId, Heard> = BTreeMap::new();
        for (&node, p) in &self.hear.peers {
            let cookie = match (p.candidate, p.confirmed) {
                (Some((_, c, at)), _) if self.fresh(Some(at)) => c,
                (_, Some((_, c))) if self.fresh(p.heard_at) => c,
                _ => continue,
            };
            let held_down =
                p.confirmed.is_some_and(|(incarnation, _)| self.is_held_down(Proc { node, incarnation }));
            list.insert(node, Heard { node, in_ring: false, held_down, cookie });
        }
        for m in &self.op.members {
            let slot = list.entry(m.node);
            slot.or_insert(Heard { node: m.node, in_ring: true, held_down: false, cookie: 0 }).in_ring = true;
        }
        // Limits hold because configured nodes and members are at most MAX_NODES each and frames come from
        // configured nodes only; a shrinking configuration may leave a few more.
        list.into_values().take(packet::MAX_NODES).collect()
    }

    /// False for a join that is a duplicate or was overtaken.
    pub(super) fn join_is_news(&mut self, node: NodeId, join_no: u32) -> bool {
        let peer = self.hear.peers.entry(node).or_default();
        let news = join_no > peer.join_no;
        peer.join_no = peer.join_no.max(join_no);
        news
    }

    pub(super) fn on_beacon(&mut self, from: Proc, cookie: u64, b: Beacon, out: Out<'_>) {
        if b.cookie != cookie {
            self.stats.malformed += 1;
            return;
        }
        if self.note_echo(from, cookie, &b.heard, out) {
            let now = self.now;
            self.hear.peers.entry(from.node).or_default().beacon = Some((b, now));
        }
    }

    pub(super) fn on_beacon_timer(&mut self, out: Out<'_>) {
        self.t.beacon = Some(self.now + self.cfg.timers.merge);
        let beacon = Beacon {
            ring: self.op.ring,
            operational: self.state == State::Operational,
            config_version: self.cfg.config_version,
            cookie: self.cfg.cookie,
            heard: self.heard_list(),
        };
        Self::send(Dest::All, FrameLane::Join, beacon.encode(), out);
        if self.state == State::Operational {
            self.say_hears(out);
            self.look_for_merge(out);
        }
    }

    /// Foreign processors with which a merge would work as far as I can see.
    fn foreign(&mut self, out: Out<'_>) -> ProcSet {
        let mut set = ProcSet::default();
        let nodes: Vec<NodeId> = self.hear.peers.keys().copied().collect();
        for node in nodes {
            let Some((incarnation, _)) = self.hear.peers[&node].confirmed else { continue };
            let p = Proc { node, incarnation };
            let Some((b, at)) = &self.hear.peers[&node].beacon else { continue };
            let version = b.config_version;
            let usable = b.operational && self.fresh(Some(*at)) && self.hears_both_ways(node);
            if self.op.member(p).is_some() || !usable || self.is_held_down(p) {
                continue;
            }
            if version != self.cfg.config_version {
                let (now, mine) = (self.now, self.cfg.config_version);
                let told =
                    &mut self.hear.peers.get_mut(&node).expect("invariant: listed above").incompatible_at;
                if told.is_none_or(|t| now.since(t) >= INCOMPATIBLE_EVERY) {
                    *told = Some(now);
                    Self::note(RingLog::Incompatible { node, config_version: version, mine }, out);
                }
                continue;
            }
            set.add(p);
        }
        set
    }

    fn say_hears(&mut self, out: Out<'_>) {
        let set = self.foreign(out);
        if set != self.hear.said {
            self.queues.ring(false, packet::encode_procs(TAG_HEARS, &set));
            self.hear.said = set;
        }
    }

    /// The representative decides about merging; everybody keeps the matrix, because anybody may become it.
    fn look_for_merge(&mut self, out: Out<'_>) {
        if self.op.members[0].proc() != self.me || self.hear.merge_sent {
            return;
        }
        let set = self.mergeable(out);
        let now = self.now;
        match &self.hear.wanted {
            // One quiet beacon period, so that nodes that start together merge together.
            Some((w, since)) if *w == set && set.len() > 0 => {
                if now.since(*since) >= self.cfg.timers.merge {
                    self.queues.ring(false, packet::encode_procs(TAG_MERGE, &set));
                    self.hear.merge_sent = true;
                    self.hear.wanted = None;
                }
            }
            _ => self.hear.wanted = (set.len() > 0).then_some((set, now)),
        }
    }

    /// Union of the foreign rings all of whose nodes hear, and are heard by, all of us and each other.
    fn mergeable(&mut self, out: Out<'_>) -> ProcSet {
        let members: Vec<Member> = self.op.members.clone();
        let mut rings: BTreeMap<RingId, ProcSet> = BTreeMap::new();
        for (&node, p) in &self.hear.peers {
            if let (Some((incarnation, _)), Some((b, at))) = (p.confirmed, &p.beacon)
                && self.fresh(Some(*at))
                && b.operational
                && b.ring != self.op.ring
            {
                rings.entry(b.ring).or_default().add(Proc { node, incarnation });
            }
        }
        let mut union = ProcSet::default();
        for procs in rings.values() {
            if procs.len() + union.len() + members.len() > packet::MAX_NODES {
                continue;
            }
            // Every node that the ring's beacons name as a member must be here itself.
            let complete = procs.iter().all(|p| {
                self.hear.peers[&p.node].beacon.as_ref().is_some_and(|(b, _)| {
                    b.heard.iter().filter(|h| h.in_ring).all(|h| procs.iter().any(|q| q.node == h.node))
                })
            });
            let mut heard_by_all = true;
            for p in procs.iter() {
                let by = members.iter().filter(|m| self.hear.matrix.get(&m.proc()).is_some_and(|s| s.has(p)));
                let by = by.count();
                if by < members.len() {
                    heard_by_all = false;
                    if by > 0 && self.hear.told.insert((p.node, by)) {
                        let log = RingLog::NotMerged { node: p.node, heard_by: by, members: members.len() };
                        Self::note(log, out);
                    }
                }
            }
            let wanted = |a: NodeId, b: NodeId| {
                self.hear.peers.get(&a).and_then(|p| p.beacon.as_ref()).is_some_and(|(beacon, _)| {
                    beacon.heard.iter().any(|h| h.node == b && h.cookie != 0 && !h.held_down)
                })
            };
            let mutual = procs.iter().all(|p| {
                members.iter().all(|m| wanted(p.node, m.node))
                    && union.iter().all(|q| wanted(p.node, q.node) && wanted(q.node, p.node))
            });
            if complete && heard_by_all && mutual {
                union.merge(procs);
            }
        }
        union
    }

    /// An ordered message between the rings' cores.
    pub(super) fn on_ring_message(&mut self, origin: Proc, body: &[u8]) {
        let Ok((tag, set)) = packet::decode_procs(body) else {
            self.stats.malformed += 1;
            return;
        };
        match tag {
            TAG_HEARS => {
                self.hear.matrix.insert(origin, set);
            }
            TAG_MERGE if self.op.members[0].proc() == origin && self.state == State::Operational => {
                self.merging = Some(set);
            }
            TAG_LEAVING | TAG_REMOVED => {
                let reason = if tag == TAG_REMOVED { LeaveReason::Removed } else { LeaveReason::Shutdown };
                self.leaving.insert(origin, reason);
                self.leave_delivered |= origin == self.me;
            }
            _ => {}
        }
    }

    /// A regular configuration was installed: `before` were with us or gathered with us.
    pub(super) fn settle_hearing(&mut self, before: &[Proc], out: Out<'_>) {
        let now = self.now;
        self.hear.excluded.retain(|_, h| now.since(h.since) < HOLD_DOWN_FORGET);
        for &p in before {
            let stayed = self.op.members.iter().any(|m| m.node == p.node);
            let restarted = self
                .hear
                .peers
                .get(&p.node)
                .is_some_and(|s| s.confirmed.is_some_and(|(i, _)| i > p.incarnation));
            if stayed || restarted || self.leaving.contains_key(&p) {
                continue;
            }
            let h = self.hear.excluded.entry(p.node).or_insert(HoldDown {
                incarnation: p.incarnation,
                since: now,
                until: now,
                level: 0,
            });
            if h.incarnation != p.incarnation {
                (h.incarnation, h.level) = (p.incarnation, 0);
            }
            let wait = self.cfg.timers.hold_down.saturating_mul(1 << h.level.min(10)).min(HOLD_DOWN_MAX);
            h.level += 1;
            h.since = now;
            h.until = now + wait;
            if self.is_heard(p) {
                Self::note(RingLog::Excluded { node: p.node, ms: wait.as_millis() as u64 }, out);
            }
        }
        self.hear.matrix.clear();
        self.hear.said = ProcSet::default();
        self.hear.wanted = None;
        self.hear.merge_sent = false;
        self.hear.told.clear();
    }
}
