//! What the ring says about itself: one variant per historic line, plus those of our own rules.
//!
//! `Display` gives the historic wording without an address; a dialect that prints addresses formats
//! [`RingLog::Position`] itself. Radix is mixed on purpose, as in the historic engine: the new ring's sequence is
//! printed in hex, the previous ring's in decimal.

use crate::event::RingId;
use cairn_base::{NodeId, Proc};
use std::fmt;

/// State of the membership protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum State {
    #[default]
    Operational,
    Gather,
    Commit,
    Recovery,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Operational => "OPERATIONAL",
            Self::Gather => "GATHER",
            Self::Commit => "COMMIT",
            Self::Recovery => "RECOVERY",
        })
    }
}

/// Why GATHER was entered; numbers as in the historic logs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
#[repr(u8)]
pub enum Cause {
    /// The consensus timer expired with silent processors, which were put into `failed`.
    #[default]
    ConsensusTimeout = 0,
    TokenLostOperational = 2,
    TokenLostGather = 3,
    TokenLostCommit = 4,
    TokenLostRecovery = 5,
    /// The aru does not advance: somebody does not receive.
    FailedToReceive = 6,
    Merge = 9,
    /// A join brought new processors or new failures.
    JoinNews = 11,
    /// A join arrived while OPERATIONAL and brought nothing new.
    JoinOperational = 12,
    JoinCommit = 13,
    JoinRecovery = 14,
    PathsChanged = 15,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RingLog {
    TokenLost {
        state: State,
    },
    TokenWarning {
        ms: u64,
    },
    Gather {
        cause: Cause,
    },
    CreatingCommit,
    SavingState {
        aru: u64,
        high_seen: u64,
    },
    StoringSeq {
        ring_seq: u64,
    },
    EnteringCommit,
    EnteringRecovery,
    Position {
        index: usize,
        member: Proc,
        previous: RingId,
        aru: u64,
        high_delivered: u64,
        received: bool,
    },
    NothingToOriginate,
    Copying {
        from: u64,
        to: u64,
    },
    Originated {
        count: usize,
    },
    InitialToken,
    EnteringOperational {
        ring: RingId,
    },
    FailedToReceive {
        node: NodeId,
    },
    /// Once per change: a foreign node that not every member hears.
    NotMerged {
        node: NodeId,
        heard_by: usize,
        members: usize,
    },
    /// At most once a minute and node.
    Incompatible {
        node: NodeId,
        config_version: u32,
        mine: u32,
    },
    /// A frame with our node id and another life.
    DuplicateNode {
        other: Proc,
    },
    /// A peer whose incarnation is below one that was already confirmed: it lost its incarnation file.
    StaleIncarnation {
        peer: Proc,
        confirmed: Proc,
    },
    Excluded {
        node: NodeId,
        ms: u64,
    },
}

impl fmt::Display for RingLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TokenLost { state } => write!(f, "The token was lost in the {state} state."),
            Self::TokenWarning { ms } => write!(f, "Token has not been received in {ms} ms"),
            Self::Gather { cause } => write!(f, "entering GATHER state from {}.", *cause as u8),
            Self::CreatingCommit => f.write_str("Creating commit token because I am the rep."),
            Self::SavingState { aru, high_seen } => {
                write!(f, "Saving state aru {aru:x} high seq received {high_seen:x}")
            }
            Self::StoringSeq { ring_seq } => write!(f, "Storing new sequence id for ring {ring_seq:x}"),
            Self::EnteringCommit => f.write_str("entering COMMIT state."),
            Self::EnteringRecovery => f.write_str("entering RECOVERY state."),
            Self::Position { index, member, previous, aru, high_delivered, received } => write!(
                f,
                "position [{index}] member {}: previous ring seq {} rep {} aru {aru:x} high delivered \
                 {high_delivered:x} received flag {}",
                member.node,
                previous.seq,
                previous.rep,
                u8::from(*received)
            ),
            Self::NothingToOriginate => f.write_str("Did not need to originate any messages in recovery."),
            Self::Copying { from, to } => write!(f, "copying all old ring messages from {from:x}-{to:x}."),
            Self::Originated { count } => write!(f, "Originated {count} messages in RECOVERY."),
            Self::InitialToken => f.write_str("Sending initial ORF token"),
            Self::EnteringOperational { .. } => f.write_str("entering OPERATIONAL state."),
            Self::FailedToReceive { node } => write!(f, "FAILED TO RECEIVE: node {node}"),
            Self::NotMerged { node, heard_by, members } => {
                write!(f, "node {node} is reachable from {heard_by} of {members} members; not merged")
            }
            Self::Incompatible { node, config_version, mine } => write!(
                f,
                "node {node} has configuration version {config_version}, mine is {mine}; not merged"
            ),
            Self::DuplicateNode { other } => write!(f, "my node id is in use by {other}"),
            Self::StaleIncarnation { peer, confirmed } => {
                write!(f, "ignoring {peer}: {confirmed} was seen alive before")
            }
            Self::Excluded { node, ms } => write!(f, "node {node} is not merged for {ms} ms"),
        }
    }
}
