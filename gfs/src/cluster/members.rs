//! What a mount knows of the others: a pure state machine over the ordered events of its node's daemon.
//!
//! A mount that leaves the group without a leave is *lost*; with `Fenced` of its node's life (or of its process) it is *fenced*; with
//! the note `Recovered` it is settled. Everything that is not settled is told to those who join later.
//!
//! A loss counts once a quorate view has shown it to the lock manager. A mount that was only missed by a side without quorum
//! and is back, in the same life, was never lost: nobody fences it, nobody may wait for that. One that was lost and comes back is a
//! ghost: it is waiting for its fence, and stays out of the lock manager's views.

use crate::JournalId;
use cairn_base::{Incarnation, NodeId, Proc};
use membership::ipc::{ClusterEvent, GroupMember, LeaveReason, Scope};
use serde::{Deserialize, Serialize};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

/// Join payload of a mount: its identity in the lock space and where its lock manager listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload {
    pub incarnation: u64,
    pub address: SocketAddr,
}

/// A fenced mount, and the journal it used if it had said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dead {
    pub who: Proc,
    pub jid: Option<JournalId>,
}

pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("invariant: group messages are plain data")
}

/// Messages between mounts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Note {
    /// The sender uses this journal (`None`: it writes nothing).
    Journal { jid: Option<u32> },
    /// The sender has not mounted the volume yet.
    Waiting,
    /// For those who joined: dead mounts that are not recovered yet.
    Lost { list: Vec<LostNote> },
    /// The journal of this dead mount is replayed.
    Recovered { node: u16, incarnation: u64 },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostNote {
    node: u16,
    node_incarnation: u64,
    client: u32,
    incarnation: u64,
    jid: Option<u32>,
    is_fenced: bool,
    is_given: bool,
}

/// A member of the group, as its join said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The node's life.
    pub node: Proc,
    pub client: u32,
    /// Identity in the lock space.
    pub who: Proc,
    pub address: SocketAddr,
}

/// What the mount must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    LockView { view: u64, members: Vec<(Proc, SocketAddr)>, left_clean: Vec<Proc> },
    LockFenced(Proc),
    LockRecovered(Proc),
    Suspend,
    Resume,
    Recover(Dead),
    Say(Note),
}

struct Lost {
    node: Proc,
    client: u32,
    jid: Option<JournalId>,
    is_fenced: bool,
    /// A quorate view without it was given to the lock manager.
    is_given: bool,
}

struct Known {
    peer: Peer,
    jid: Option<JournalId>,
    /// It has said what it is since we have seen it come, and with that, before, which dead it knows of.
    is_heard: bool,
}

/// The state machine. The lock manager is told of quorate views only; a gate is opened by `Fenced` and a replay.
pub struct Members {
    me: Proc,
    own_jid: Option<JournalId>,
    is_mounted: bool,
    /// By (life of the node, client).
    present: BTreeMap<(Proc, u32), Known>,
    /// By identity in the lock space.
    lost: BTreeMap<Proc, Lost>,
    is_quorate: bool,
    /// The newest view, not yet given to the lock manager for want of quorum.
    pending: Option<(u64, Vec<Proc>)>,
    left_clean: Vec<Proc>,
    /// Fences delivered so far: a proof may be older than the view that shows the loss.
    fences: BTreeSet<(Proc, Scope)>,
    /// Recovered while we were here: a note that was sent before that may come after it.
    recovered: BTreeSet<Proc>,
}

impl Members {
    pub fn new(me: Proc) -> Self {
        Self {
            me,
            own_jid: None,
            is_mounted: false,
            present: BTreeMap::new(),
            lost: BTreeMap::new(),
            is_quorate: false,
            pending: None,
            left_clean: Vec::new(),
            fences: BTreeSet::new(),
            recovered: BTreeSet::new(),
        }
    }

    /// An event of the daemon; those of other groups and those that end the mount are none of ours.
    pub fn event(&mut self, group: &str, event: &ClusterEvent) -> Vec<Action> {
        match event {
            // quorum that comes with a view is told when that view is recorded, behind the groups' views of it
            ClusterEvent::View(v) if !v.quorate => self.quorate(false),
            ClusterEvent::Quorum { quorate, .. } => self.quorate(*quorate),
            ClusterEvent::GroupView { group: of, view_no, members, left, .. } if of == group => {
                let peers = members.iter().filter_map(peer_of).collect();
                let left: Vec<_> =
                    left.iter().map(|(m, why)| (m.proc, m.client, *why == LeaveReason::Leave)).collect();
                self.view(*view_no, peers, &left)
            }
            ClusterEvent::GroupMessage { group: of, from, client, data, .. } if of == group => {
                match serde_json::from_slice::<Note>(data) {
                    Ok(note) => self.note(*from, *client, note),
                    Err(e) => {
                        tracing::error!(node = from.node.0, err = %e, "group message does not decode");
                        Vec::new()
                    }
                }
            }
            ClusterEvent::Fenced { proc, scope, .. } => self.fenced(*proc, scope),
            _ => Vec::new(),
        }
    }

    /// The journals to replay for a dead mount, of `all` that the volume has. Without a known journal every one that no living mount
    /// has named is tried: a clean one costs a look. A journal that a living mount has named since is not the dead one's any more:
    /// that mount found it clean, and holds its lock for as long as it lives.
    pub fn journals_of(&self, dead: Dead, all: u32) -> Vec<JournalId> {
        let used = self.journals_in_use();
        let list = dead.jid.map_or_else(|| (0..all).map(JournalId).collect(), |jid| vec![jid]);
        list.into_iter().filter(|j| !used.contains(j)).collect()
    }

    /// Everybody who may have had the volume mounted before is proved dead, and these gates of the lock manager are shut. What
    /// members with state told our lock manager they told us too ([`Self::is_informed`]), unless they died in between: then nobody else knows of these dead.
    pub fn adopt(&mut self, gates: impl Iterator<Item = (Proc, bool)>) -> Vec<Action> {
        let mut out = Vec::new();
        for (who, _) in gates {
            if self.lost.contains_key(&who) || self.recovered.contains(&who) {
                continue;
            }
            let node = Proc { node: who.node, incarnation: Incarnation(0) };
            self.lost.insert(who, Lost { node, client: 0, jid: None, is_fenced: true, is_given: true });
            out.push(Action::LockFenced(who));
        }
        if !out.is_empty() {
            out.push(Action::Say(self.lost_note()));
        }
        out
    }

    /// The volume is mounted. Returns what to say, and the fenced mounts that now can be recovered here.
    pub fn set_own_journal(&mut self, jid: Option<JournalId>) -> (Note, Vec<Dead>) {
        self.own_jid = jid;
        self.is_mounted = true;
        let dead = self
            .lost
            .iter()
            .filter(|(_, l)| l.is_fenced)
            .map(|(who, l)| Dead { who: *who, jid: l.jid })
            .collect();
        (Note::Journal { jid: jid.map(|j| j.0) }, dead)
    }

    pub fn quorate(&mut self, is: bool) -> Vec<Action> {
        if is == self.is_quorate {
            return Vec::new();
        }
        self.is_quorate = is;
        if !is {
            return vec![Action::Suspend];
        }
        let mut out = self.give_view();
        out.push(Action::Resume);
        out
    }

    /// The lock manager sees quorate views only.
    fn give_view(&mut self) -> Vec<Action> {
        if !self.is_quorate {
            return Vec::new();
        }
        let Some((view, left_clean)) = self.pending.take() else { return Vec::new() };
        let members = self.present.values().map(|k| (k.peer.who, k.peer.address)).collect();
        let mut out = vec![Action::LockView { view, members, left_clean }];
        // Told before, its fence would be that of somebody whom the lock manager never had a gate for.
        for (who, l) in &mut self.lost {
            if !std::mem::replace(&mut l.is_given, true) && l.is_fenced {
                out.push(Action::LockFenced(*who));
            }
        }
        out
    }

    /// `left`: (life of the node, client, said goodbye).
    pub fn view(&mut self, view: u64, peers: Vec<Peer>, left: &[(Proc, u32, bool)]) -> Vec<Action> {
        for (node, client, clean) in left {
            let Some(known) = self.present.remove(&(*node, *client)) else { continue };
            if *clean {
                self.left_clean.push(known.peer.who);
            } else {
                self.lost.insert(
                    known.peer.who,
                    Lost { node: *node, client: *client, jid: known.jid, is_fenced: false, is_given: false },
                );
            }
        }
        let mut has_joiner = false;
        for peer in peers {
            let key = (peer.node, peer.client);
            let mut jid = None;
            if let Entry::Occupied(l) = self.lost.entry(peer.who) {
                if l.get().is_given || l.get().is_fenced {
                    continue;
                }
                jid = l.remove().jid;
            }
            has_joiner |= !self.present.contains_key(&key) && peer.who != self.me;
            self.present.entry(key).or_insert(Known { peer, jid, is_heard: false });
        }
        let mut clean = self.pending.take().map_or_else(Vec::new, |(_, c)| c);
        clean.append(&mut self.left_clean);
        self.pending = Some((view, clean));
        let mut out = self.give_view();
        if has_joiner {
            // In this order: who is led by a mount has heard which dead it knows of.
            if !self.lost.is_empty() {
                out.push(Action::Say(self.lost_note()));
            }
            out.push(Action::Say(if self.is_mounted {
                Note::Journal { jid: self.own_jid.map(|j| j.0) }
            } else {
                Note::Waiting
            }));
        }
        out.extend(self.apply_fences());
        out
    }

    fn apply_fences(&mut self) -> Vec<Action> {
        self.fences.clone().into_iter().flat_map(|(node, scope)| self.apply_fence(node, &scope)).collect()
    }

    fn lost_note(&self) -> Note {
        let list = self
            .lost
            .iter()
            .map(|(who, l)| LostNote {
                node: who.node.0,
                node_incarnation: l.node.incarnation.0,
                client: l.client,
                incarnation: who.incarnation.0,
                jid: l.jid.map(|j| j.0),
                is_fenced: l.is_fenced,
                is_given: l.is_given,
            })
            .collect();
        Note::Lost { list }
    }

    pub fn note(&mut self, from: Proc, client: u32, note: Note) -> Vec<Action> {
        match note {
            Note::Journal { jid } => {
                if let Some(k) = self.present.get_mut(&(from, client)) {
                    k.jid = jid.map(JournalId);
                    k.is_heard = true;
                }
                Vec::new()
            }
            Note::Waiting => {
                if let Some(k) = self.present.get_mut(&(from, client)) {
                    k.is_heard = true;
                }
                Vec::new()
            }
            Note::Lost { list } => {
                let mut out = Vec::new();
                for l in list {
                    let who = Proc { node: NodeId(l.node), incarnation: Incarnation(l.incarnation) };
                    let node = Proc { node: NodeId(l.node), incarnation: Incarnation(l.node_incarnation) };
                    if self.recovered.contains(&who) {
                        // Its sender was behind, and those who joined since have not heard it.
                        out.push(Action::Say(Note::Recovered { node: l.node, incarnation: l.incarnation }));
                        continue;
                    }
                    if self.present.values().any(|k| k.peer.who == who) {
                        continue;
                    }
                    let known = self.lost.entry(who).or_insert(Lost {
                        node,
                        client: l.client,
                        jid: l.jid.map(JournalId),
                        is_fenced: false,
                        is_given: l.is_given,
                    });
                    known.jid = known.jid.or(l.jid.map(JournalId));
                    // The sender was told the proof. We, or our lock manager, may have been told of the loss before it, and will not be
                    // told of the proof.
                    if l.is_fenced && !known.is_fenced {
                        known.is_fenced = true;
                        out.push(Action::LockFenced(who));
                        if self.is_mounted {
                            out.push(Action::Recover(Dead { who, jid: known.jid }));
                        }
                    }
                }
                // A fence that was delivered between the note and its sending.
                out.extend(self.apply_fences());
                out
            }
            Note::Recovered { node, incarnation } => {
                let who = Proc { node: NodeId(node), incarnation: Incarnation(incarnation) };
                // Only what is fenced can be recovered; a note that says otherwise is an error of its sender.
                if self.lost.get(&who).is_none_or(|l| l.is_fenced) {
                    self.recovered.insert(who);
                }
                if self.lost.get(&who).is_some_and(|l| l.is_fenced) {
                    self.lost.remove(&who);
                    vec![Action::LockRecovered(who)]
                } else {
                    Vec::new()
                }
            }
        }
    }

    pub fn fenced(&mut self, node: Proc, scope: &Scope) -> Vec<Action> {
        self.fences.insert((node, scope.clone()));
        self.apply_fence(node, scope)
    }

    fn apply_fence(&mut self, node: Proc, scope: &Scope) -> Vec<Action> {
        let mut out = Vec::new();
        for (who, l) in &mut self.lost {
            let hit = match scope {
                // the daemon remembers one proof per node: that of its last dead life, which answers for the earlier ones
                Scope::Node => l.node.node == node.node && l.node.incarnation <= node.incarnation,
                Scope::Mount { client, .. } => l.node == node && *client == l.client,
            };
            if hit && !l.is_fenced {
                l.is_fenced = true;
                out.push(Action::LockFenced(*who));
                if self.is_mounted {
                    out.push(Action::Recover(Dead { who: *who, jid: l.jid }));
                }
            }
        }
        out
    }

    /// Fenced, not yet replayed.
    pub fn needs_recovery(&self, who: Proc) -> bool {
        self.lost.get(&who).is_some_and(|l| l.is_fenced)
    }

    pub fn journals_in_use(&self) -> Vec<JournalId> {
        self.present.values().filter_map(|k| k.jid).chain(self.own_jid).collect()
    }

    pub fn is_settled(&self) -> bool {
        self.lost.is_empty()
    }

    /// There is quorum, and the lock manager has the newest view.
    pub fn is_current(&self) -> bool {
        self.is_quorate && self.pending.is_none()
    }

    /// Somebody else has the volume mounted: whoever died before is known to it.
    pub fn is_led(&self) -> bool {
        self.present.values().any(|k| k.jid.is_some() && k.peer.who != self.me)
    }

    /// All who are here have told us of the dead that they know. Before that a gate may be that of one who was lost and is not proved dead: who knows of it
    /// would believe us that it is.
    pub fn is_informed(&self) -> bool {
        self.present.values().all(|k| k.is_heard || k.peer.who == self.me)
    }

    /// Lost and not proved dead.
    pub fn unfenced(&self) -> Vec<Proc> {
        self.lost.iter().filter(|(_, l)| !l.is_fenced).map(|(who, _)| *who).collect()
    }

    pub fn waiting(&self) -> Vec<Proc> {
        self.lost.keys().copied().collect()
    }
}

fn peer_of(m: &GroupMember) -> Option<Peer> {
    match serde_json::from_slice::<Payload>(&m.payload) {
        Ok(p) => Some(Peer {
            node: m.proc,
            client: m.client,
            who: Proc { node: m.proc.node, incarnation: Incarnation(p.incarnation) },
            address: p.address,
        }),
        Err(e) => {
            tracing::error!(node = m.proc.node.0, err = %e, "join payload does not decode");
            None
        }
    }
}
