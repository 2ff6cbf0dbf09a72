//! What the process-group core tells the node core: views, group views, messages, in one total order.
//!
//! The node core adds quorum, the fence domain and the permit and shows clients the events of module `ipc`. Order promises
//! (G1–G8): all nodes of a view deliver View, Fenced, GroupView and GroupMessage in one order; no event of view v
//! after View v' > v; GroupViews of all local groups between View and the first GroupMessage of that view.

use bytes::Bytes;
use cairn_base::{Incarnation, NodeId, Proc};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// Full name of a ring: never used twice, because it contains the representative's incarnation.
///
/// Order: by seq, then representative, then its incarnation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct RingId {
    pub seq: u64,
    pub rep: NodeId,
    pub rep_incarnation: Incarnation,
}

impl fmt::Display for RingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}.{}", self.seq, self.rep.0, self.rep_incarnation.0)
    }
}
impl fmt::Debug for RingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A node in one of its lives, with the votes that its configuration entry gives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Member {
    pub node: NodeId,
    pub incarnation: Incarnation,
    pub votes: u8,
}

impl Member {
    pub const fn proc(&self) -> Proc {
        Proc { node: self.node, incarnation: self.incarnation }
    }
}

/// How a member went away. Agreed by all nodes that go from one view to the next together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum How {
    /// An ordered announcement of its own was delivered before.
    Clean,
    /// The same, for `leave remove` (quorum is recomputed without it).
    Removed,
    /// Silence, cut, hint: a victim.
    Failed,
    /// Its successor was seen: a victim whose processes are known to be a later incarnation now.
    Restarted(Incarnation),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Left {
    pub member: Member,
    pub how: How,
    /// True when the proof was already delivered; then no separate event follows.
    pub fenced: bool,
}

/// A regular configuration after its synchronisation barrier.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct View {
    pub id: RingId,
    pub seq: u64,
    /// In ring order.
    pub members: Arc<[Member]>,
    pub joined: Vec<Member>,
    pub left: Vec<Left>,
    /// Set by the node runtime; false when it comes out of the process-group core.
    pub quorate: bool,
}

/// Name of a process group, at most [`GroupName::MAX`] bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GroupName(Arc<str>);

impl GroupName {
    pub const MAX: usize = 128;

    /// `None` when the name is empty or longer than [`Self::MAX`] bytes.
    pub fn new(name: &str) -> Option<Self> {
        (!name.is_empty() && name.len() <= Self::MAX).then(|| Self(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}
impl fmt::Display for GroupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for GroupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &self.0)
    }
}

/// One client of one daemon. `client` is chosen by the daemon and not reused within its incarnation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct GroupMember {
    pub node: NodeId,
    pub incarnation: Incarnation,
    pub client: u32,
}

impl GroupMember {
    pub const fn proc(&self) -> Proc {
        Proc { node: self.node, incarnation: self.incarnation }
    }
}

/// A member together with what it said when it joined.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GroupEntry {
    pub member: GroupMember,
    /// Rises with every join of that daemon; a member that left and came back has another one.
    pub join_no: u64,
    /// Opaque to the cluster (a mount puts its lock-manager address and journal id here).
    pub payload: Bytes,
}

/// Why a member is gone (numbers as in the historic interface).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[repr(u8)]
pub enum Reason {
    Leave = 2,
    NodeDown = 3,
    ProcDown = 5,
}

/// A change of one group, the same at all of its members.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GroupView {
    pub group: GroupName,
    /// Counts the changes of this group; the same number at all members.
    pub view_no: u64,
    /// Sorted by member.
    pub members: Vec<GroupEntry>,
    pub joined: Vec<GroupMember>,
    pub left: Vec<(GroupMember, Reason)>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GroupMessage {
    pub group: GroupName,
    pub from: GroupMember,
    /// Counts the messages of this sender in this group, from 1, without holes.
    pub no: u64,
    pub safe: bool,
    pub data: Bytes,
}

/// What the process-group core tells the node runtime, in order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GroupsEvent {
    /// The old ring is closing; `members` are those that go on together.
    Transitional {
        old: RingId,
        members: Vec<Member>,
    },
    /// A ring has formed and wants the built-in services' replicated state: answer with
    /// `Groups::sync_state(ring, bytes)` after everything before this event has been handled.
    SyncWanted {
        ring: RingId,
        members: Vec<Member>,
    },
    /// The barrier is passed. `state` is what the merge function made of all members' states: install it now.
    View {
        view: View,
        state: Bytes,
    },
    /// `local`: clients of this daemon that must see it.
    GroupView {
        local: Vec<u32>,
        view: GroupView,
    },
    GroupMessage {
        local: Vec<u32>,
        message: GroupMessage,
    },
    /// An ordered message between the built-in services of all nodes.
    Service {
        service: u8,
        from: Member,
        safe: bool,
        data: Bytes,
    },
    /// A client that got `WouldBlock` may try again.
    Writable {
        client: u32,
    },
    /// No user message is sent from here to the matching `Unblocked` (view change in progress).
    Blocked,
    Unblocked,
    /// Digests of the synchronisation round differ: a programming error. `stop` is true at the nodes in the
    /// smaller set, which must stop themselves.
    SyncMismatch {
        ring: RingId,
        mine: u64,
        others: Vec<(NodeId, u64)>,
        stop: bool,
    },
    /// The ordered leave is complete; nothing follows.
    Stopped,
}
