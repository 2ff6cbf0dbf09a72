//! The shared record of a service: who runs it, in which state, since when.

use cairn_base::{NodeId, Proc};
use serde::{Deserialize, Serialize};

/// States with the numbers that clustat shows and exits with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ServiceState {
    /// Not running; evaluated again at the next service or node event.
    Stopped = 110,
    Starting = 111,
    Started = 112,
    Stopping = 113,
    /// A stop failed: resources may still be allocated. Only `disable` leads out.
    Failed = 114,
    /// A failed status check: the stop for recovery is running.
    Recoverable = 117,
    /// Stopped cleanly during recovery or relocation; somebody is about to start it.
    Recovering = 118,
    /// Never started automatically.
    Disabled = 119,
}

impl ServiceState {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Started => "started",
            Self::Stopping => "stopping",
            Self::Failed => "failed",
            Self::Recoverable => "recoverable",
            Self::Recovering => "recovering",
            Self::Disabled => "disabled",
        }
    }

    pub const fn number(self) -> i32 {
        self as i32
    }

    /// Resources may be allocated on the owner: nobody else may start the service.
    pub const fn is_held(self) -> bool {
        match self {
            Self::Starting | Self::Started | Self::Stopping | Self::Failed | Self::Recoverable => true,
            Self::Stopped | Self::Recovering | Self::Disabled => false,
        }
    }
}

/// What follows when the stop that is running has ended well.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum AfterStop {
    Stopped,
    Disabled,
    /// Start again: on this node if given, else on the best one. `from_failure` says that the previous run failed.
    StartAgain {
        target: Option<NodeId>,
        avoid: Option<NodeId>,
    },
}

/// Replicated; every field changes only on delivery of an ordered message.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Who holds the service, in which life; node 0 means nobody.
    pub owner: Proc,
    pub last_owner: NodeId,
    pub state: ServiceState,
    pub frozen: bool,
    pub restarts: u32,
    /// Wall clock (seconds) of the last transition, taken from the message that caused it; 0 never.
    pub transition: u64,
    /// Rises with every transition: answers to an older one are ignored.
    pub seq: u64,
    /// Set while a stop is running.
    pub after_stop: Option<AfterStop>,
    /// Preferred node of the next start.
    pub target: Option<NodeId>,
    /// Nodes where starting failed since the last success.
    pub tried: Vec<NodeId>,
    /// The service is stopped and waits for an event (a node joins, an administrator acts) before it is tried again.
    pub parked: bool,
    /// The former owner died with the service; its takeover is announced by the historic line.
    pub take_over_from: Option<NodeId>,
    /// Wall-clock seconds of restarts within the window of `restart_expire_time`.
    pub restart_times: Vec<u64>,
}

/// No owner.
pub const NOBODY: Proc = Proc { node: NodeId(0), incarnation: cairn_base::Incarnation(0) };

impl Record {
    pub const fn new(state: ServiceState) -> Self {
        Self {
            owner: NOBODY,
            last_owner: NodeId(0),
            state,
            frozen: false,
            restarts: 0,
            transition: 0,
            seq: 0,
            after_stop: None,
            target: None,
            tried: Vec::new(),
            parked: false,
            take_over_from: None,
            restart_times: Vec::new(),
        }
    }

    /// Nothing runs any more, though the owner has not said so. Who asked for a stop is obeyed; nobody else waits.
    pub fn end_stop(&mut self, at: u64) {
        let after = self.after_stop.take();
        assert!(
            after.is_none() || matches!(self.state, ServiceState::Stopping | ServiceState::Recoverable),
            "invariant: only a stop has something to follow it"
        );
        self.parked = after == Some(AfterStop::Stopped);
        let is_disabled = after == Some(AfterStop::Disabled);
        if self.parked || is_disabled {
            self.take_over_from = None;
        }
        self.enter(if is_disabled { ServiceState::Disabled } else { ServiceState::Stopped }, at);
    }

    pub fn enter(&mut self, state: ServiceState, at: u64) {
        self.state = state;
        self.transition = at;
        self.seq += 1;
    }
}
