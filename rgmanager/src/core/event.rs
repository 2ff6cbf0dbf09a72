//! What the core hears, says and does.

use crate::record::Record;
use cairn_base::{NodeId, Proc};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Records of all services by id (`service:name`).
pub type Records = BTreeMap<String, Record>;

/// Messages between members, all totally ordered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Msg {
    /// First message of each member in a group view. `running`: services that may hold resources on this node, and whether they run
    /// or start (else they stop). `kept`: the view of the records that it has put aside.
    Hello {
        view: u64,
        round: u64,
        is_quorate: bool,
        has_records: bool,
        kept: Option<u64>,
        running: Vec<(String, bool)>,
        is_clear: bool,
    },
    /// Start the sync round of `view` again: quorum came back, or the records were lost before they were sent.
    Resync {
        view: u64,
    },
    /// Records as of the cut of `view`.
    Records {
        view: u64,
        round: u64,
        records: Records,
    },
    Claim {
        svc: String,
        seq: u64,
        at: u64,
    },
    Started {
        svc: String,
        seq: u64,
        at: u64,
    },
    StartFailed {
        svc: String,
        seq: u64,
        at: u64,
    },
    StatusFailed {
        svc: String,
        seq: u64,
        at: u64,
    },
    Stopped {
        svc: String,
        seq: u64,
        at: u64,
    },
    StopFailed {
        svc: String,
        seq: u64,
        at: u64,
    },
    /// The owner moves the service to a better node that joined.
    FailBack {
        svc: String,
        seq: u64,
        target: NodeId,
        at: u64,
    },
    Admin {
        svc: String,
        op: AdminOp,
        at: u64,
    },
    /// This member stops its services and leaves; it claims nothing any more.
    ShuttingDown,
}

/// What an administrator can ask for (clusvcadm).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum AdminOp {
    Enable { target: Option<NodeId> },
    Disable,
    Relocate { target: Option<NodeId> },
    Restart,
    Stop,
    Freeze,
    Unfreeze,
}

/// Answers with the classic numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum AdminCode {
    Success = 0,
    Failure = -1,
    Aborted = -2,
    NoService = -4,
    Invalid = -8,
    NoQuorum = -9,
    AlreadyRunning = -10,
    Frozen = -11,
    BadTarget = -12,
}

impl AdminCode {
    pub const fn text(self) -> &'static str {
        match self {
            Self::Success => "Success",
            Self::Failure => "Failure",
            Self::Aborted => "Aborted; service failed",
            Self::NoService => "Service does not exist",
            Self::Invalid => "Invalid operation for resource",
            Self::NoQuorum => "Operation requires quorum",
            Self::AlreadyRunning => "Service is already running",
            Self::Frozen => "Failure: Service is frozen",
            Self::BadTarget => "Target node dead / nonexistent",
        }
    }
}

#[derive(Clone, Debug)]
pub enum Event {
    /// Quorum of this node's component changed.
    Quorum(bool),
    /// This life of the node ends: what runs here is stopped at once.
    Over,
    /// Ordered: the group's members. `left` with true: it had said `ShuttingDown` and left cleanly.
    View { view: u64, members: Vec<Proc>, left: Vec<(Proc, bool)> },
    /// Ordered.
    Fenced(Proc),
    /// In a quorate view that this core has seen, the fence domain, of which this node is a member, has nobody left to fence.
    NoVictims,
    /// Ordered.
    Message { from: Proc, msg: Msg },
    /// Agents of an action have ended. `ok` false: some agent failed.
    Done { svc: String, seq: u64, action: Action, ok: bool },
    /// A local administrator's request; answered by `Reply` with the same number. `at`: wall clock, seconds.
    Request { id: u64, svc: String, op: AdminOp, at: u64 },
    /// Stop everything here and leave.
    Shutdown,
    /// Time passed. `wall`: wall clock in seconds, only displayed and used for restart windows.
    Tick { wall: u64 },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    Start,
    Stop,
    Status,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// Multicast, ordered.
    Send(Msg),
    /// Run the agents of this service; `Done` follows with the same numbers. The actions of one service are run one after the other, in
    /// this order. `seq`: a number of this node's own, for a status check that of the record.
    Run {
        svc: String,
        seq: u64,
        action: Action,
    },
    Reply {
        id: u64,
        code: AdminCode,
        owner: Option<NodeId>,
    },
    Log {
        level: Level,
        text: String,
    },
    /// A record changed: for `cairn_base::events::SERVICE_STATE` and the status views.
    Changed {
        svc: String,
    },
    /// All services here are stopped and the others know: the group may be left.
    MayLeave,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    Emerg,
    Crit,
    Err,
    Warning,
    Notice,
    Info,
}
