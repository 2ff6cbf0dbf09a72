//! The interface between a group-communication engine (the ring) and what stands on it.
//!
//! An engine is sans-I/O. The driver feeds [`EngineInput`] and executes [`IoAction`]; whoever stands on the engine
//! consumes the rest of [`EngineOutput`] in order. After `send`, `leave`, `hint_dead` or `open_users` the caller runs
//! `step(now, EngineInput::Tick, …)`; `next_deadline` says [`Boottime::ZERO`] while such work is pending.

use crate::event::{How, Member, RingId};
use crate::ring::log::RingLog;
use bytes::Bytes;
use cairn_base::{Boottime, Incarnation, NodeId, Proc};
use std::time::Duration;

/// Priority class of a message. Control and sync are never held back by users.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Lane {
    Control,
    Sync,
    /// Closed by the engine at every regular configuration until [`Engine::open_users`].
    User,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Guarantee {
    /// Delivered in total order.
    Agreed,
    /// Delivered only when every member of the ring has it.
    Safe,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SendError {
    #[error("the send queue is full")]
    WouldBlock,
    #[error("message of {len} bytes is longer than {max}")]
    TooLong { len: usize, max: usize },
    #[error("the engine has left the cluster")]
    Stopped,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaveReason {
    Shutdown,
    /// `leave remove`: the others recompute quorum without this node.
    Removed,
}

/// One configured node. The order of a list of peers is the ring order (by address in the dialects).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    pub node: NodeId,
    pub votes: u8,
}

#[derive(Clone, Debug)]
pub enum EngineInput {
    /// An authenticated packet. `from` and `cookie` come from the frame header.
    Frame { from: Proc, cookie: u64, packet: Bytes },
    /// Time passed, or something was queued.
    Tick,
    /// The process did not run for this long; the driver has thrown away what waited in its sockets.
    Paused(Duration),
    /// The set of healthy network paths changed.
    PathsChanged,
    /// The node known to hold the quorum device's mastership (decides between equal cliques).
    DeviceMaster(Option<NodeId>),
    /// New configuration: peers in ring order, including this node.
    Peers { peers: Vec<Peer>, config_version: u32 },
}

/// Who gets a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dest {
    Node(NodeId),
    /// Every configured peer except this node.
    All,
}

/// Frame lane: replay windows are kept per lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum FrameLane {
    Ring = 0,
    Join = 1,
    Probe = 2,
}

/// What the driver must do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IoAction {
    Send {
        to: Dest,
        lane: FrameLane,
        packet: Bytes,
    },
    /// Store the ring sequence durably, in the background.
    Persist {
        ring_seq: u64,
    },
    /// This incarnation of a peer has proved to be alive now: tell the frame layer, which bars all lower ones.
    Confirm {
        peer: Proc,
        cookie: u64,
    },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EngineOutput {
    Io(IoAction),
    /// The old ring is closing; what follows until `Regular` is delivered among `members` only.
    Transitional {
        old: RingId,
        members: Vec<Member>,
    },
    Regular {
        ring: RingId,
        members: Vec<Member>,
        joined: Vec<Member>,
        left: Vec<(Member, How)>,
    },
    Deliver {
        from: Member,
        lane: Lane,
        safe: bool,
        /// Position in the ring's total order.
        seq: u64,
        data: Bytes,
    },
    /// After `WouldBlock`: there is room again.
    Writable,
    Log(RingLog),
    /// The ordered leave is complete; nothing follows.
    Stopped,
}

pub trait Engine {
    fn local(&self) -> Member;
    /// Longest message that [`Engine::send`] takes.
    fn max_message(&self) -> usize;
    fn send(&mut self, lane: Lane, guarantee: Guarantee, data: Bytes) -> Result<(), SendError>;
    /// Opens the user lane of that ring (its synchronisation barrier is passed). Without effect when another ring has
    /// formed meanwhile: a barrier can be delivered in the very step that closes its ring.
    fn open_users(&mut self, ring: RingId);
    /// Ordered clean leave; ends with [`EngineOutput::Stopped`].
    fn leave(&mut self, reason: LeaveReason);
    /// That incarnation of the node is known to be dead (process exit, eviction): do not wait for it.
    fn hint_dead(&mut self, node: NodeId, incarnation: Incarnation);
    fn step(&mut self, now: Boottime, ev: EngineInput, out: &mut Vec<EngineOutput>);
    /// The present ring, and when its last new token was accepted in OPERATIONAL (a ring of one: the `now` of the last step);
    /// `None` in the other states. The permit to write is counted from here, once the view of this ring is installed.
    fn last_token(&self) -> Option<(RingId, Boottime)>;
    /// When `step(Tick)` must be called at the latest; `Boottime::ZERO` means at once, `Boottime::MAX` never.
    fn next_deadline(&self) -> Boottime;
}
