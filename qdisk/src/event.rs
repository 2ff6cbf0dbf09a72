//! What the membership runtime and the quorum disk tell each other.

use cairn_base::{Boottime, Incarnation, NodeId, Proc};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// Full name of a ring as it stands in an E-block (24 bytes). Never used twice. All zero: none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ViewName {
    pub seq: u64,
    pub rep: NodeId,
    pub rep_incarnation: Incarnation,
}

impl ViewName {
    pub const NONE: Self = Self { seq: 0, rep: NodeId(0), rep_incarnation: Incarnation(0) };
}

impl fmt::Display for ViewName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}.{}", self.seq, self.rep.0, self.rep_incarnation.0)
    }
}
impl fmt::Debug for ViewName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A view of the ring, as far as the disk cares.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RingView {
    pub name: ViewName,
    pub members: Vec<Proc>,
}

/// Why a node must stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KillReason {
    /// Its slot was silent.
    Silent,
    /// It lives in another component than the holder of the device.
    Partitioned,
    /// The fence domain asked for it (poison pill).
    Fence,
}

/// From the runtime to the disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum QdiskCommand {
    /// The ring installed a view (`Some`), or left OPERATIONAL (`None`). With `None` the disk neither grants nor counts
    /// anything new; a lease already counted for the last view stays counted until it ends or another view comes.
    View(Option<RingView>),
    /// Whether the present view is quorate (partition eviction needs it).
    Quorate(bool),
    /// This incarnation has left cleanly or is proven dead: it counts no votes any more.
    Gone(Proc),
    /// Poison pill. Answered by [`QdiskEvent::PillWritten`], then `PillProof` or `PillFailed`.
    Kill(Proc),
    /// This node has state that must not be merged (services, mounts ran in a quorate view).
    Dirty(bool),
    /// Highest ring sequence number used; goes into the own block.
    RingSeq(u64),
    /// In this view something will be decided: onto the disk with it, at once. Answered by [`QdiskEvent::Recorded`].
    Record(ViewName),
    /// All mounts of this node are proven gone after a kill: write stopped-killed, then end. Answered by `Ended`.
    StoppedKilled,
    /// Leave cleanly: resign, write stopped-clean, then end. Answered by `Ended`.
    Leave,
    /// End without another write.
    Abort,
}

/// How a poison pill became a proof of death.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PillProof {
    /// The victim wrote that all its mounts are gone.
    Stopped,
    /// Stop limit, watchdog and I/O settling time of the victim are over.
    Watchdog,
}

/// Why a poison pill cannot prove anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PillFailure {
    /// The victim's block names no watchdog. The kill entry stays; `PillProof(Stopped)` may still come.
    NoWatchdog,
    /// The victim never wrote a block in that incarnation.
    NeverSeen,
    /// Not a node of the quorum disk.
    BadNode,
}

/// Why this node does not count the device votes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VotesWhy {
    /// The lease ran out without a new grant.
    Expired,
    /// The view to which it was given is over.
    ViewChanged,
    /// The score fell below the minimum.
    Score,
    /// The disk has not been renewed within the stop limit.
    DiskLost,
    /// This node stops or leaves.
    Stopping,
}

/// Why this node must stop at once (SS4).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StopWhy {
    /// A kill entry with my incarnation.
    Evicted { by: NodeId, reason: KillReason },
    /// Another process uses my node id with a later or equal incarnation.
    Duplicate { incarnation: Incarnation },
    /// The score fell below the minimum and the configuration says `reboot="1"`.
    Score,
    /// A block on the disk is sealed with another key: this is not our cluster's disk, or not our key.
    WrongKey { slot: NodeId },
    /// The event loop or its configuration is broken.
    Internal(String),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskState {
    /// Cycles are on time.
    Ok,
    /// The last renewal is older than half of the stop limit.
    Slow,
    /// The last renewal is older than the stop limit (SS3): votes and permit are gone until it returns.
    Lost,
}

/// From the disk to the runtime.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum QdiskEvent {
    /// The first renewal succeeded: my incarnation is on the disk, the ring may start.
    Initialized,
    /// A renewal succeeded whose write was submitted at `at`: S counts from there.
    Renewed {
        at: Boottime,
    },
    /// The device votes count for `view` until `until` (exclusive). Repeated with later instants.
    Votes {
        view: ViewName,
        until: Boottime,
    },
    /// The device votes do not count from now on.
    VotesLost {
        why: VotesWhy,
    },
    Disk(DiskState),
    /// The master changed. `None`: nobody yet.
    Master {
        term: u64,
        master: Option<Proc>,
    },
    /// A node's slot shows life (first time in this incarnation, or again after `Missed`).
    Seen(Proc),
    /// A node's slot is unchanged for longer than the limit.
    Missed(Proc),
    /// A node wrote that it left cleanly.
    Left(Proc),
    /// A kill entry against this incarnation is on the disk: a hint to take it out of the ring, no proof of death.
    Evicted {
        victim: Proc,
        by: NodeId,
        reason: KillReason,
    },
    /// An evicted incarnation goes on writing.
    Undead(Proc),
    /// My kill entry against this incarnation is on the disk since `at` (completion of the write).
    PillWritten {
        victim: Proc,
        at: Boottime,
    },
    PillProof {
        victim: Proc,
        proof: PillProof,
    },
    PillFailed {
        victim: Proc,
        why: PillFailure,
    },
    /// Stop now: kill the mounts, verify, answer `StoppedKilled` (or reboot). The votes are gone already.
    Stop(StopWhy),
    /// Highest ring sequence number and own incarnation found on the disk at the start, for the rules of 3.2.
    History {
        ring_seq: u64,
        incarnation: Incarnation,
    },
    /// This view, named by [`QdiskCommand::Record`], is on the disk.
    Recorded(ViewName),
    /// The newest view that any block records; comes before the votes of the read that showed it.
    LastView(ViewName),
    /// The thread writes nothing any more (after `Leave`, `StoppedKilled`, `Abort`, or a fatal error).
    Ended,
    /// A line for the log, in the historical words.
    Log {
        level: LogLevel,
        line: String,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogLevel {
    Debug,
    Info,
    Notice,
    Warning,
    Error,
    Critical,
}

/// Times and votes that the core works with. All derived values come from the runtime's timing table.
#[derive(Clone, Debug)]
pub struct QdiskConfig {
    pub me: Proc,
    /// i.
    pub cycle: Duration,
    /// k.
    pub tko: u32,
    /// X: the longest life of an I/O that has been issued.
    pub io_limit: Duration,
    /// W of this node; zero: no watchdog.
    pub watchdog: Duration,
    /// F: time to form a ring; a view younger than that is not judged.
    pub form: Duration,
    /// Votes of each node, by id; nodes that are not listed are ignored on the disk.
    pub node_votes: Vec<(NodeId, u16)>,
    pub device_votes: u16,
    /// Votes needed without shrinking (E/2 + 1).
    pub needed: u16,
    /// The quorum shrinks while the device is held (dialect rhel5, decisive configuration).
    pub shrinks: bool,
    pub min_score: u16,
    /// Stop when the score falls below the minimum.
    pub reboot_on_score: bool,
    /// `allow_kill`: whether a master may evict.
    pub allow_kill: bool,
}

/// Rate error of clocks that is allowed for, in parts per thousand (twice the promised 0.1 %).
pub const RHO_PER_MILLE: u32 = 2;

impl QdiskConfig {
    /// S, and L, the life of a vote lease: k · i.
    pub fn stop_limit(&self) -> Duration {
        self.cycle * self.tko
    }

    /// D: silence after which a master is taken over and a node evicted: (k + 1) · i.
    pub fn dead_after(&self) -> Duration {
        self.cycle * (self.tko + 1)
    }

    /// Refuses what the proofs do not cover. The names are those of the timing rules.
    pub fn check(&self) -> Result<(), String> {
        if !(4..=249).contains(&self.tko) {
            return Err(format!("QD-3: tko {} is not in 4…249", self.tko));
        }
        if self.cycle < Duration::from_millis(10) {
            return Err("QD-3: a cycle below 10 ms".to_owned());
        }
        if self.io_limit + 2 * self.cycle > self.stop_limit() {
            return Err("QD-4: I/O limit + 2 cycles exceed the stop limit".to_owned());
        }
        if self.me.node.0 == 0 || usize::from(self.me.node.0) > crate::MAX_NODES {
            return Err(format!("node id {} is not in 1…16", self.me.node));
        }
        if !self.node_votes.iter().any(|&(n, _)| n == self.me.node) {
            return Err(format!("node {} is not in the configuration", self.me.node));
        }
        if self.node_votes.iter().any(|&(n, _)| n.0 == 0 || usize::from(n.0) > crate::MAX_NODES) {
            return Err("a node id is not in 1…16".to_owned());
        }
        Ok(())
    }
}
