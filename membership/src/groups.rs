//! Process groups above any [`Engine`]: who is in which group, and messages within groups, in the ring's total order.
//!
//! ```text
//!  Regular ─► Blocked, SyncWanted ─► SYNC_STATE of every member ─► BARRIER(digest) of every member
//!                                                                      │ all equal
//!                        user lane open ◄─ Unblocked ◄─ GroupViews ◄─ View
//! ```
//!
//! join, leave, the death of a client and messages are ordered messages, so all members see them at one position.
//! After each regular configuration a synchronisation round brings together those that come from different rings.
//! Its result is a function of the SYNC_STATEs alone, never of local differences: each node contributes its own
//! clients, so a process that slept cannot believe that the others left, and a node that is gone leaves no ghosts.
//! Members that were apart for a while without a change of clients get a new view number with an empty difference:
//! within one view number all members of a group are shown the same messages.
//! A life that the services' merged state excludes is in no group, at no member: without that, old members, who saw it lost, and
//! newcomers, who did not, would make different lists of one view.
//! A new configuration at any moment throws the round away, in every phase; and user messages wait until the
//! barrier, so a message is never delivered to a list of members that is not agreed on yet.
//!
//! | file | noun |
//! |---|---|
//! | `wire` | bytes of the messages |
//! | `sync` | the round and its merge |

mod sync;
mod wire;

use crate::engine::{Engine, EngineInput, EngineOutput, Guarantee, IoAction, Lane, LeaveReason, SendError};
use crate::event::{
    GroupEntry, GroupMember, GroupMessage, GroupName, GroupView, GroupsEvent, How, Left, Member, Reason,
    RingId,
};
use crate::ring::log::RingLog;
use bytes::Bytes;
use cairn_base::{Boottime, Incarnation, NodeId, Proc};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use sync::Round;
use wire::Wire;

/// What the built-in services' states of all members come to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Agreed {
    pub state: Vec<u8>,
    /// Members of the ring whose life is over by that state and who have not stopped yet: no group has them.
    pub excluded: BTreeSet<Proc>,
}

/// Merges the built-in services' states of all members; must be a pure function of its argument (ring order).
pub type MergeFn = Box<dyn Fn(&RingId, &[(Member, Bytes)]) -> Agreed + Send>;

/// Groups in the cluster, and members of one group. Joins beyond are ignored by all alike.
pub const MAX_GROUPS: usize = 4096;
pub const MAX_MEMBERS: usize = 1024;
/// Bytes that one client may have on the way.
pub const CLIENT_QUEUE: usize = 256 << 10;

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GroupError {
    #[error("the send queue is full")]
    WouldBlock,
    #[error("message of {len} bytes is longer than {max}")]
    TooLong { len: usize, max: usize },
    #[error("client {client} is not a member of the group")]
    NotMember { client: u32 },
    #[error("client {client} is a member of the group already")]
    AlreadyMember { client: u32 },
    #[error("too many groups or members")]
    Limit,
    #[error("the node has left the cluster")]
    Stopped,
}

impl From<SendError> for GroupError {
    fn from(e: SendError) -> Self {
        match e {
            SendError::WouldBlock => Self::WouldBlock,
            SendError::TooLong { len, max } => Self::TooLong { len, max },
            SendError::Stopped => Self::Stopped,
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GroupsOutput {
    Io(IoAction),
    Log(RingLog),
    Event(GroupsEvent),
}

/// State of one group as all nodes know it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GroupState {
    pub view_no: u64,
    /// Sorted by member.
    pub members: Vec<GroupEntry>,
}

impl GroupState {
    fn find(&self, m: GroupMember) -> Option<usize> {
        self.members.iter().position(|e| e.member == m)
    }
}

#[derive(Default)]
struct Client {
    /// Groups it has asked to be in, with the number of its last message there.
    groups: BTreeMap<GroupName, u64>,
    /// Bytes sent and not yet delivered back.
    on_the_way: usize,
    refused: bool,
}

pub struct Groups<E> {
    engine: E,
    me: Proc,
    merge: MergeFn,
    groups: BTreeMap<GroupName, GroupState>,
    clients: BTreeMap<u32, Client>,
    join_no: u64,
    /// Highest view number of groups that are gone: a group that comes back goes on counting. The same at all members.
    floor: u64,
    /// What may not be refused (leave, death of a client) and waits for room, in order.
    owed: VecDeque<Bytes>,
    /// Joins, leaves and deaths of my clients that have not come back ordered.
    moves: usize,
    round: Option<Round>,
    /// Members of the last installed view.
    members: Vec<Member>,
    /// Those of them whose life is over, and who will find that out.
    excluded: BTreeSet<Proc>,
    /// Members with whom nothing has come between since.
    together: BTreeSet<Proc>,
    /// How those that are gone since then went.
    left: BTreeMap<Proc, How>,
    blocked: bool,
    /// Messages between services that came before the barrier of their ring.
    early: Vec<(u8, Member, bool, Bytes)>,
}

type Out<'a> = &'a mut Vec<GroupsOutput>;

fn event(e: GroupsEvent, out: Out<'_>) {
    out.push(GroupsOutput::Event(e));
}

impl<E: Engine> Groups<E> {
    pub fn new(engine: E, merge: MergeFn) -> Self {
        Self {
            me: engine.local().proc(),
            engine,
            merge,
            groups: BTreeMap::new(),
            clients: BTreeMap::new(),
            join_no: 0,
            floor: 0,
            owed: VecDeque::new(),
            moves: 0,
            round: None,
            members: Vec::new(),
            excluded: BTreeSet::new(),
            together: BTreeSet::new(),
            left: BTreeMap::new(),
            blocked: true,
            early: Vec::new(),
        }
    }

    pub fn engine(&self) -> &E {
        &self.engine
    }

    pub fn engine_mut(&mut self) -> &mut E {
        &mut self.engine
    }

    /// Takes effect with the GroupView that shows it. `payload` is shown to all members.
    pub fn join(&mut self, client: u32, group: &GroupName, payload: Bytes) -> Result<(), GroupError> {
        if self.clients.get(&client).is_some_and(|c| c.groups.contains_key(group)) {
            return Err(GroupError::AlreadyMember { client });
        }
        let full = self
            .groups
            .get(group)
            .map_or(self.groups.len() >= MAX_GROUPS, |g| g.members.len() >= MAX_MEMBERS);
        if full {
            return Err(GroupError::Limit);
        }
        let join_no = self.join_no + 1;
        let message = Wire::Join { client, join_no, group: group.clone(), payload }.encode();
        // Behind a leave that still waits, else the order would turn round.
        let sent = if self.owed.is_empty() {
            self.engine.send(Lane::User, Guarantee::Agreed, message)
        } else {
            Err(SendError::WouldBlock)
        };
        if let Err(e) = sent {
            self.clients.entry(client).or_default().refused |= e == SendError::WouldBlock;
            return Err(e.into());
        }
        self.join_no = join_no;
        self.moves += 1;
        self.clients.entry(client).or_default().groups.insert(group.clone(), 0);
        Ok(())
    }

    pub fn leave(&mut self, client: u32, group: &GroupName) -> Result<(), GroupError> {
        let c = self.clients.get_mut(&client).ok_or(GroupError::NotMember { client })?;
        c.groups.remove(group).ok_or(GroupError::NotMember { client })?;
        self.owe(&Wire::Leave { client, group: group.clone() });
        Ok(())
    }

    /// The client's connection closed: an ordered PROCDOWN in all its groups.
    pub fn client_gone(&mut self, client: u32) {
        if self.clients.remove(&client).is_some() {
            self.owe(&Wire::ProcDown { client });
        }
    }

    /// Who is in which group because of this node is known to all: nothing of it is on its way.
    pub fn is_settled(&self) -> bool {
        self.moves == 0
    }

    fn owe(&mut self, message: &Wire) {
        self.moves += 1;
        self.owed.push_back(message.encode());
        self.pay();
    }

    fn pay(&mut self) {
        while let Some(message) = self.owed.front() {
            if self.engine.send(Lane::User, Guarantee::Agreed, message.clone()).is_err() {
                return;
            }
            self.owed.pop_front();
        }
    }

    /// Returns the number that the message will carry.
    pub fn mcast(
        &mut self,
        client: u32,
        group: &GroupName,
        guarantee: Guarantee,
        data: &[u8],
    ) -> Result<u64, GroupError> {
        let c = self.clients.get_mut(&client).ok_or(GroupError::NotMember { client })?;
        let no = c.groups.get_mut(group).ok_or(GroupError::NotMember { client })?;
        if !self.owed.is_empty() || (c.on_the_way > 0 && c.on_the_way + data.len() > CLIENT_QUEUE) {
            c.refused = true;
            return Err(GroupError::WouldBlock);
        }
        let message = wire::encode_mcast(client, *no + 1, group, data);
        match self.engine.send(Lane::User, guarantee, message) {
            Ok(()) => {
                *no += 1;
                c.on_the_way += data.len();
                Ok(*no)
            }
            Err(e) => {
                c.refused |= e == SendError::WouldBlock;
                Err(e.into())
            }
        }
    }

    pub fn group(&self, group: &GroupName) -> Option<&GroupState> {
        self.groups.get(group)
    }

    pub fn groups(&self) -> impl Iterator<Item = (&GroupName, &GroupState)> {
        self.groups.iter()
    }

    /// Ordered message between the built-in services of all nodes (control lane). Delivered in no ring before its
    /// barrier: services start from agreed state.
    pub fn send_service(&mut self, service: u8, guarantee: Guarantee, data: Bytes) -> Result<(), GroupError> {
        self.engine.send(Lane::Control, guarantee, wire::encode_service(service, &data))?;
        Ok(())
    }

    /// Answer to [`GroupsEvent::SyncWanted`]; ignored when another ring has formed meanwhile.
    pub fn sync_state(&mut self, ring: RingId, state: Bytes) {
        let Some(round) = self.round.as_mut().filter(|r| r.ring == ring && !r.state_sent) else { return };
        round.state_sent = true;
        let groups = sync::my_groups(&self.groups, self.me);
        let message =
            Wire::State { ring, floor: self.floor, apart: self.apart(), groups, service: state }.encode();
        // A refusal can only mean that the state is too long or that we have left: the round then never ends here,
        // which the caller sees as a view that does not come.
        let _ = self.engine.send(Lane::Sync, Guarantee::Agreed, message);
    }

    /// Members of the coming view that may have delivered what I have not, or the other way round.
    fn apart(&self) -> Vec<Proc> {
        let all = self.round.iter().flat_map(|r| r.members.iter().map(|m| m.proc()));
        all.filter(|p| !self.together.contains(p)).collect()
    }

    pub fn leave_cluster(&mut self, reason: LeaveReason) {
        self.engine.leave(reason);
    }

    pub fn hint_dead(&mut self, node: NodeId, incarnation: Incarnation) {
        self.engine.hint_dead(node, incarnation);
    }

    /// Every call above is followed by `step(now, EngineInput::Tick, …)`.
    pub fn step(&mut self, now: Boottime, ev: EngineInput, out: &mut Vec<GroupsOutput>) {
        self.pay();
        let mut list = Vec::new();
        self.engine.step(now, ev, &mut list);
        for o in list {
            match o {
                EngineOutput::Io(a) => out.push(GroupsOutput::Io(a)),
                EngineOutput::Log(l) => out.push(GroupsOutput::Log(l)),
                EngineOutput::Transitional { old, members } => {
                    self.together.retain(|p| members.iter().any(|m| m.proc() == *p));
                    event(GroupsEvent::Transitional { old, members }, out);
                }
                EngineOutput::Regular { ring, members, left, .. } => self.regular(ring, members, left, out),
                EngineOutput::Deliver { from, safe, data, .. } => self.deliver(from, safe, &data, out),
                EngineOutput::Writable => self.writable(out),
                EngineOutput::Stopped => event(GroupsEvent::Stopped, out),
            }
        }
    }

    pub fn next_deadline(&self) -> Boottime {
        self.engine.next_deadline()
    }

    fn writable(&mut self, out: Out<'_>) {
        self.pay();
        if self.owed.is_empty() {
            for (&client, c) in self.clients.iter_mut().filter(|(_, c)| c.on_the_way <= CLIENT_QUEUE / 2) {
                if std::mem::take(&mut c.refused) {
                    event(GroupsEvent::Writable { client }, out);
                }
            }
        }
    }

    fn regular(&mut self, ring: RingId, members: Vec<Member>, left: Vec<(Member, How)>, out: Out<'_>) {
        for (m, how) in left {
            self.left.insert(m.proc(), how);
        }
        // Whatever the round before had reached is worth nothing now.
        self.round = Some(Round::new(ring, members.clone()));
        // Services start from agreed state: what came too early is dropped by all alike and sent again by its sender.
        for (service, from, safe, data) in std::mem::take(&mut self.early) {
            if from.proc() == self.me {
                let guarantee = if safe { Guarantee::Safe } else { Guarantee::Agreed };
                let _ = self.engine.send(Lane::Control, guarantee, wire::encode_service(service, &data));
            }
        }
        if !std::mem::replace(&mut self.blocked, true) {
            event(GroupsEvent::Blocked, out);
        }
        event(GroupsEvent::SyncWanted { ring, members }, out);
    }

    fn deliver(&mut self, from: Member, safe: bool, data: &Bytes, out: Out<'_>) {
        let Some(message) = Wire::decode(data) else {
            tracing::warn!(node = %from.node, "ordered message that does not decode");
            return;
        };
        let who = |client| GroupMember { node: from.node, incarnation: from.incarnation, client };
        let is_move = matches!(message, Wire::Join { .. } | Wire::Leave { .. } | Wire::ProcDown { .. });
        self.moves -= usize::from(is_move && from.proc() == self.me);
        match message {
            Wire::Join { client, join_no, group, payload } => {
                self.on_join(GroupEntry { member: who(client), join_no, payload }, group, out);
            }
            Wire::Leave { client, group } => self.on_gone(who(client), &group, Reason::Leave, out),
            Wire::ProcDown { client } => {
                let m = who(client);
                let of: Vec<GroupName> =
                    self.groups.iter().filter(|(_, g)| g.find(m).is_some()).map(|(n, _)| n.clone()).collect();
                of.iter().for_each(|g| self.on_gone(m, g, Reason::ProcDown, out));
            }
            Wire::Mcast { client, no, group, data } => self.on_mcast(who(client), no, group, safe, data, out),
            Wire::Service { service, data } if self.blocked => self.early.push((service, from, safe, data)),
            Wire::Service { service, data } => {
                event(GroupsEvent::Service { service, from, safe, data }, out);
            }
            Wire::State { ring, floor, apart, groups, service } => {
                if let Some(round) = self.round.as_mut().filter(|r| r.ring == ring) {
                    round.floor = round.floor.max(floor);
                    round.apart.extend(apart.into_iter().map(|p| (from.proc(), p)));
                    round.states.insert(from.proc(), (groups, service));
                    self.all_states();
                }
            }
            Wire::Barrier { ring, digest } => {
                if let Some(round) = self.round.as_mut().filter(|r| r.ring == ring) {
                    round.barriers.insert(from.proc(), digest);
                    self.all_barriers(out);
                }
            }
        }
    }

    fn on_join(&mut self, entry: GroupEntry, group: GroupName, out: Out<'_>) {
        let known = self.groups.get(&group);
        let full = known.map_or(self.groups.len() >= MAX_GROUPS, |g| g.members.len() >= MAX_MEMBERS);
        if full
            || self.excluded.contains(&entry.member.proc())
            || known.is_some_and(|g| g.find(entry.member).is_some())
        {
            return;
        }
        let member = entry.member;
        let floor = self.floor;
        let state = self
            .groups
            .entry(group.clone())
            .or_insert_with(|| GroupState { view_no: floor, members: Vec::new() });
        state.members.push(entry);
        state.members.sort_by_key(|e| e.member);
        state.view_no += 1;
        self.show(&group, vec![member], Vec::new(), &[], out);
    }

    fn on_gone(&mut self, m: GroupMember, group: &GroupName, reason: Reason, out: Out<'_>) {
        let Some(state) = self.groups.get_mut(group) else { return };
        let Some(i) = state.find(m) else { return };
        state.members.remove(i);
        state.view_no += 1;
        // Who left by itself is told; who died is not there any more.
        let told = m.proc() == self.me && reason == Reason::Leave && self.clients.contains_key(&m.client);
        let also: &[u32] = if told { &[m.client] } else { &[] };
        self.show(group, Vec::new(), vec![(m, reason)], also, out);
        if let Some(g) = self.groups.get(group)
            && g.members.is_empty()
        {
            self.floor = self.floor.max(g.view_no);
            self.groups.remove(group);
        }
    }

    /// Clients of this daemon in the group; those whose death is not ordered yet are not there any more.
    fn local(&self, g: &GroupState) -> Vec<u32> {
        let mine = g.members.iter().filter(|e| e.member.proc() == self.me).map(|e| e.member.client);
        mine.filter(|c| self.clients.contains_key(c)).collect()
    }

    fn show(
        &self,
        group: &GroupName,
        joined: Vec<GroupMember>,
        left: Vec<(GroupMember, Reason)>,
        also: &[u32],
        out: Out<'_>,
    ) {
        let Some(state) = self.groups.get(group) else { return };
        let mut local = self.local(state);
        local.extend_from_slice(also);
        if !local.is_empty() {
            let (view_no, members) = (state.view_no, state.members.clone());
            let view = GroupView { group: group.clone(), view_no, members, joined, left };
            event(GroupsEvent::GroupView { local, view }, out);
        }
    }

    fn on_mcast(
        &mut self,
        from: GroupMember,
        no: u64,
        group: GroupName,
        safe: bool,
        data: Bytes,
        out: Out<'_>,
    ) {
        if from.proc() == self.me
            && let Some(c) = self.clients.get_mut(&from.client)
        {
            c.on_the_way = c.on_the_way.saturating_sub(data.len());
            if c.on_the_way <= CLIENT_QUEUE / 2 && self.owed.is_empty() && std::mem::take(&mut c.refused) {
                event(GroupsEvent::Writable { client: from.client }, out);
            }
        }
        // Closed groups: only members are heard, and only members hear.
        let Some(state) = self.groups.get(&group).filter(|g| g.find(from).is_some()) else { return };
        let local = self.local(state);
        if !local.is_empty() {
            let message = GroupMessage { group, from, no, safe, data };
            event(GroupsEvent::GroupMessage { local, message }, out);
        }
    }

    fn all_states(&mut self) {
        let Some(round) = self.round.as_mut() else { return };
        if round.result.is_none() && round.states.len() == round.members.len() {
            let result = round.merge(&self.merge);
            let barrier = Wire::Barrier { ring: round.ring, digest: result.digest }.encode();
            round.result = Some(result);
            let _ = self.engine.send(Lane::Sync, Guarantee::Agreed, barrier);
        }
    }

    fn all_barriers(&mut self, out: Out<'_>) {
        let Some(round) = self.round.as_mut() else { return };
        if round.installed || round.barriers.len() < round.members.len() {
            return;
        }
        let result = round.result.take().expect("invariant: a barrier follows all states, mine among them");
        round.installed = true;
        let (ring, members) = (round.ring, round.members.clone());
        if round.barriers.values().any(|d| *d != result.digest) {
            let stop = sync::must_stop(&round.barriers, self.me);
            let others = round.barriers.iter().filter(|(p, _)| **p != self.me).map(|(p, d)| (p.node, *d));
            let others = others.collect();
            event(GroupsEvent::SyncMismatch { ring, mine: result.digest, others, stop }, out);
            return;
        }
        self.floor = result.floor;
        self.excluded = result.excluded;
        let before = std::mem::replace(&mut self.groups, result.groups);
        let joined = members.iter().copied().filter(|m| !self.members.iter().any(|x| x.proc() == m.proc()));
        let joined = joined.collect();
        let gone: Vec<Left> = self
            .members
            .iter()
            .filter(|m| !members.iter().any(|x| x.proc() == m.proc()))
            .map(|m| {
                let how = self.left.get(&m.proc()).copied().unwrap_or(How::Failed);
                Left { member: *m, how, fenced: false }
            })
            .collect();
        self.left.clear();
        self.members.clone_from(&members);
        self.together = members.iter().map(|m| m.proc()).collect();
        let view = crate::event::View {
            id: ring,
            seq: ring.seq,
            members: members.into(),
            joined,
            left: gone,
            quorate: false,
        };
        event(GroupsEvent::View { view, state: result.service }, out);
        for group in result.changed {
            let old = before.get(&group).map_or(&[][..], |g| &g.members);
            let new = self.groups.get(&group).map_or(&[][..], |g| &g.members);
            let (joined, left) = sync::difference(old, new);
            self.show(&group, joined, left, &[], out);
        }
        for (service, from, safe, data) in std::mem::take(&mut self.early) {
            event(GroupsEvent::Service { service, from, safe, data }, out);
        }
        self.blocked = false;
        self.engine.open_users(ring);
        event(GroupsEvent::Unblocked, out);
    }

    /// Clients whose joins are known to the cluster.
    pub fn local_clients(&self) -> BTreeSet<u32> {
        self.groups.values().flat_map(|g| self.local(g)).collect()
    }
}
