//! Totem single ring with extended virtual synchrony: one total order of messages and configurations.
//!
//! ```text
//!            token lost, join, leave, merge, hint          consensus on (proc, failed)
//!   OPERATIONAL ------------------------------> GATHER ---------------------------> COMMIT
//!        ^                                        ^  ^                                 | round 2
//!        |   everybody holds what anybody held    |  '----- token lost, join ----------+
//!        '------------------------------------ RECOVERY <------------------------------'
//! ```
//!
//! A token goes round the members; who has it assigns sequence numbers to its messages. A membership change runs the
//! four states above; on entering OPERATIONAL the old configuration is closed in one atomic sequence (rest of the old
//! ring, transitional configuration, rest among those that go together, regular configuration), which gives the
//! properties EVS1–EVS9 that `sim` checks.
//!
//! Our own rules beside Totem's: processors are (node, incarnation), so a restarted node is another processor and a
//! ring id is never used twice; a node takes part only after it has echoed our random cookie (a recording cannot);
//! rings are cliques of nodes that hear each other in both directions, rings merge only when every pair can hear
//! each other, and who did not stay is not taken back for a while: a continuing partial cut costs at most two
//! configuration changes.
//!
//! | file | noun |
//! |---|---|
//! | `packet` | bytes |
//! | `set` `clique` | sets of processors, best clique |
//! | `order` | message store, send queues, reassembly |
//! | `hear` | who hears whom, beacons, merging, hold-down |
//! | `gather` | GATHER and COMMIT |
//! | `token` | token, flow control, delivery |
//! | `recover` | RECOVERY, entering OPERATIONAL |
//!
//! Invariants: an id once committed to is never committed to again; the old ring's messages are taken in only while
//! no commit has been answered (what one member got later, the others would not deliver); nothing of a failed
//! recovery is delivered. Source: Amir, Moser, Melliar-Smith, Agarwal, Ciarfella, "The Totem single-ring ordering
//! and membership protocol" (ACM TOCS 13, 1995); Moser et al., "Extended virtual synchrony" (1994).

mod clique;
mod gather;
mod hear;
pub mod log;
mod order;
mod packet;
mod recover;
mod set;
mod token;

pub use packet::{DecodeError, is_token};

use crate::engine::{
    Dest, Engine, EngineInput, EngineOutput, FrameLane, Guarantee, IoAction, Lane, LeaveReason, Peer,
    SendError,
};
use crate::event::{Member, RingId};
use bytes::Bytes;
use cairn_base::{Boottime, Incarnation, NodeId, Proc};
use hear::Hearing;
use log::{Cause, RingLog, State};
use order::{Order, Queues, Reassembly};
use packet::{Commit, Join, Packet, Token};
use recover::Recovery;
use set::ProcSet;
use std::collections::BTreeMap;
use std::time::Duration;

/// Times of the ring; the formulas that keep them safe together stand in `timing.rs`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingTimers {
    /// T: without a token for this long the ring is broken.
    pub token: Duration,
    /// The last token is sent again after this long without evidence of progress.
    pub retransmit: Duration,
    /// How long the representative keeps the token of an idle ring.
    pub hold: Duration,
    /// Resend period of joins in GATHER.
    pub join: Duration,
    /// C: wait for agreement before silent processors are declared failed.
    pub consensus: Duration,
    /// Beacon period.
    pub merge: Duration,
    /// A peer not heard for this long is not heard.
    pub hear_window: Duration,
    /// First exclusion of a node that did not stay; doubles up to a minute.
    pub hold_down: Duration,
}

#[derive(Clone, Debug)]
pub struct RingConfig {
    pub me: Proc,
    /// 64 random bits of this start of the daemon.
    pub cookie: u64,
    /// All configured nodes in ring order, this one included.
    pub peers: Vec<Peer>,
    pub config_version: u32,
    /// Highest ring sequence that this node has ever stored.
    pub ring_seq: u64,
    /// Largest packet (before sealing) that goes into one datagram.
    pub mtu: usize,
    /// Messages in flight in one rotation.
    pub window: u32,
    /// Messages sent per token visit.
    pub max_messages: u32,
    /// Bytes of user messages that may wait.
    pub user_queue: usize,
    pub timers: RingTimers,
}

impl RingConfig {
    fn place(&self, node: NodeId) -> (usize, NodeId) {
        (self.peers.iter().position(|p| p.node == node).unwrap_or(usize::MAX), node)
    }

    fn member(&self, p: Proc) -> Member {
        let votes = self.peers.iter().find(|x| x.node == p.node).map_or(0, |x| x.votes);
        Member { node: p.node, incarnation: p.incarnation, votes }
    }
}

/// Counters since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RingStats {
    pub tokens: u64,
    pub token_retransmits: u64,
    pub retransmits: u64,
    pub sent: u64,
    pub delivered: u64,
    pub gathers: u64,
    pub configurations: u64,
    /// Packets that authenticated peers sent and that do not decode.
    pub malformed: u64,
    /// Packets of old or not yet confirmed incarnations.
    pub unconfirmed: u64,
}

/// Rule switches for tests of the tests: each breaks one rule on purpose, and a checker must notice.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sabotage {
    pub accept_duplicate_token: bool,
    pub release_early: bool,
    pub safe_as_agreed: bool,
    pub stop_at_gap: bool,
    pub deliver_everything_after_gap: bool,
    pub ring_id_without_incarnation: bool,
    pub keep_failed: bool,
    pub users_always_open: bool,
    pub no_hold_down: bool,
    pub no_freeze: bool,
}

#[derive(Default)]
struct Timers {
    token: Option<Boottime>,
    warning: Option<Boottime>,
    retransmit: Option<Boottime>,
    hold: Option<Boottime>,
    join: Option<Boottime>,
    consensus: Option<Boottime>,
    beacon: Option<Boottime>,
}

impl Timers {
    fn next(&self) -> Boottime {
        let all =
            [self.token, self.warning, self.retransmit, self.hold, self.join, self.consensus, self.beacon];
        all.into_iter().flatten().min().unwrap_or(Boottime::MAX)
    }
}

/// True once when the time has come.
fn due(timer: &mut Option<Boottime>, now: Boottime) -> bool {
    timer.take_if(|t| *t <= now).is_some()
}

struct Gathering {
    proc: ProcSet,
    failed: ProcSet,
    /// Latest join of each processor in this gather, with the time of arrival.
    joins: BTreeMap<Proc, (Join, Boottime)>,
    /// Everybody agrees; the representative's commit token is awaited.
    agreed: bool,
    /// End of patience: from here on newcomers go straight into `failed`.
    cap: Boottime,
    sealed: bool,
    join_no: u32,
    /// Joins that may be sent at once; refilled by the join timer.
    join_tokens: u8,
}

struct Committing {
    commit: Commit,
    next: NodeId,
    packet: Bytes,
    token_seq: u64,
}

pub struct Ring {
    cfg: RingConfig,
    me: Proc,
    state: State,
    started: bool,
    stopped: bool,
    /// When a token was accepted last; of the present ring while OPERATIONAL.
    token_at: Boottime,
    /// Something was queued from outside since the last step.
    pending: bool,
    now: Boottime,
    t: Timers,
    /// The last ring that became a configuration here, with its messages.
    op: Order,
    /// Ring that has been committed to and is not OPERATIONAL yet.
    recovery: Option<Recovery>,
    committing: Option<Committing>,
    /// Highest ring sequence that I ever committed to or heard of.
    max_ring_seq: u64,
    committed_seq: u64,
    /// In a recovery of the old ring's messages everything was received, …
    received: bool,
    /// … and those members' messages must be delivered, as bits of the old ring's member list.
    obligation: u64,
    gather: Gathering,
    hear: Hearing,
    queues: Queues,
    reassembly: Reassembly,
    held: Option<Token>,
    cancel_hold: bool,
    cancel_sent: bool,
    /// MERGE was delivered: these processors are to gather with us.
    merging: Option<ProcSet>,
    /// Ordered announcements to leave, delivered in the present ring.
    leaving: BTreeMap<Proc, LeaveReason>,
    my_leave: Option<LeaveReason>,
    leave_delivered: bool,
    device_master: Option<NodeId>,
    hints: Vec<Proc>,
    stats: RingStats,
    sabotage: Sabotage,
}

/// Visits without new messages before the representative begins to hold the token. Long enough for a safe message
/// to become safe (three rotations) and for a lost one to be asked for again.
const QUIET_VISITS: u32 = 8;
/// The protocol that is spoken here.
const PROTO: u8 = 1;
/// Room for a second header when a message of the old ring is wrapped in RECOVERY.
const HEADERS: usize = 2 * packet::MCAST_HEAD;

type Out<'a> = &'a mut Vec<EngineOutput>;

impl Ring {
    /// The first `step` forms a ring of one; peers are found by their beacons.
    pub fn new(cfg: RingConfig, now: Boottime) -> Self {
        let me = cfg.me;
        assert!(cfg.mtu >= 512, "mtu {} leaves no room for messages", cfg.mtu);
        assert!(me.node != NodeId(0) && cfg.peers.len() <= packet::MAX_NODES);
        // Nothing was ever sent on this ring of one; it only is where the first real one comes from.
        let ring = RingId { seq: cfg.ring_seq, rep: me.node, rep_incarnation: me.incarnation };
        let op = Order::new(ring, vec![cfg.member(me)], me, cfg.window, now);
        Self {
            me,
            state: State::Gather,
            started: false,
            stopped: false,
            pending: true,
            now,
            token_at: now,
            t: Timers::default(),
            op,
            recovery: None,
            committing: None,
            max_ring_seq: cfg.ring_seq,
            committed_seq: cfg.ring_seq,
            received: false,
            obligation: 0,
            gather: Gathering {
                proc: [me].into_iter().collect(),
                failed: ProcSet::default(),
                joins: BTreeMap::new(),
                agreed: false,
                cap: Boottime::MAX,
                sealed: false,
                join_no: 0,
                join_tokens: JOIN_BURST,
            },
            hear: Hearing::default(),
            queues: Queues::new(cfg.mtu - HEADERS, cfg.user_queue),
            reassembly: Reassembly::default(),
            held: None,
            cancel_hold: false,
            cancel_sent: false,
            merging: None,
            leaving: BTreeMap::new(),
            my_leave: None,
            leave_delivered: false,
            device_master: None,
            hints: Vec::new(),
            stats: RingStats::default(),
            sabotage: Sabotage::default(),
            cfg,
        }
    }

    pub fn set_sabotage(&mut self, sabotage: Sabotage) {
        self.sabotage = sabotage;
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// The last regular configuration.
    pub fn ring(&self) -> RingId {
        self.op.ring
    }

    pub fn members(&self) -> &[Member] {
        &self.op.members
    }

    pub fn stats(&self) -> RingStats {
        self.stats
    }

    /// Nodes heard in both directions within the hear window.
    pub fn reachable(&self) -> Vec<NodeId> {
        self.cfg.peers.iter().map(|p| p.node).filter(|&n| self.hears_both_ways(n)).collect()
    }

    fn send(to: Dest, lane: FrameLane, packet: Bytes, out: Out<'_>) {
        out.push(EngineOutput::Io(IoAction::Send { to, lane, packet }));
    }

    fn note(log: RingLog, out: Out<'_>) {
        out.push(EngineOutput::Log(log));
    }

    fn tick(&mut self, out: Out<'_>) {
        let now = self.now;
        if !self.started {
            self.started = true;
            self.t.beacon = Some(now);
            self.enter_gather(None, out);
        }
        for p in std::mem::take(&mut self.hints) {
            self.on_dead(p, Cause::JoinNews, out);
        }
        if due(&mut self.t.beacon, now) {
            self.on_beacon_timer(out);
        }
        if due(&mut self.t.warning, now) && self.state == State::Operational {
            let ms = self.cfg.timers.token.as_millis() as u64 * 3 / 4;
            Self::note(RingLog::TokenWarning { ms }, out);
        }
        if due(&mut self.t.retransmit, now) {
            self.on_retransmit_timer(out);
        }
        if due(&mut self.t.join, now) {
            self.on_join_timer(out);
        }
        if due(&mut self.t.hold, now) {
            self.release_hold(out);
        }
        if due(&mut self.t.consensus, now) {
            self.on_consensus_timer(out);
        }
        if due(&mut self.t.token, now) {
            self.on_token_timer(out);
        }
        self.flush(out);
    }

    /// What was queued goes out as soon as the protocol allows.
    fn flush(&mut self, out: Out<'_>) {
        if self.state != State::Operational || self.queues.is_empty() {
            return;
        }
        if self.op.alone() {
            self.order_alone(out);
        } else if self.held.is_some() {
            self.release_hold(out);
        } else if !self.cancel_sent && self.op.quiet + 1 >= QUIET_VISITS {
            // The representative may be holding the token of an idle ring: once per visit is enough.
            self.cancel_sent = true;
            let rep = self.op.members[0].node;
            if rep != self.me.node {
                Self::send(Dest::Node(rep), FrameLane::Ring, packet::encode_hold_cancel(&self.op.ring), out);
            }
        }
    }

    fn on_packet(&mut self, from: Proc, cookie: u64, packet: &Bytes, out: Out<'_>) {
        if from.node == self.me.node {
            if from != self.me && self.hear.duplicate_is_news(from) {
                Self::note(RingLog::DuplicateNode { other: from }, out);
            }
            return;
        }
        let confirmed = self.note_frame(from, cookie, out);
        if !confirmed && !packet::is_presence(packet) {
            self.stats.unconfirmed += 1;
            return;
        }
        let packet = match packet::decode(packet) {
            Ok(p) => p,
            Err(_) => {
                self.stats.malformed += 1;
                return;
            }
        };
        match packet {
            Packet::Beacon(b) => self.on_beacon(from, cookie, b, out),
            Packet::Join(j) => self.on_join(from, cookie, j, out),
            Packet::Token(t) => self.on_token(t, out),
            Packet::Mcast(m) => self.on_mcast(m, out),
            Packet::Commit(c) => self.on_commit(c, out),
            Packet::HoldCancel(r) => self.on_hold_cancel(r, out),
            Packet::Leave(l) if l.sender == from => self.on_leave(from, out),
            Packet::Leave(_) => self.stats.malformed += 1,
        }
    }

    fn on_hold_cancel(&mut self, ring: RingId, out: Out<'_>) {
        if self.state == State::Operational && ring == self.op.ring {
            self.op.quiet = 0;
            if self.held.is_some() {
                self.release_hold(out);
            } else {
                self.cancel_hold = true;
            }
        }
    }

    fn on_paused(&mut self, gap: Duration, out: Out<'_>) {
        self.gather.joins.clear();
        if gap > self.cfg.timers.token && self.state == State::Operational && !self.op.alone() {
            // The others have gone on without us; the token in hand is worth nothing.
            self.op.last_token = None;
            self.held = None;
            Self::note(RingLog::TokenLost { state: self.state }, out);
            self.enter_gather(Some(Cause::TokenLostOperational), out);
        }
    }

    fn on_token_timer(&mut self, out: Out<'_>) {
        let cause = match self.state {
            State::Operational => Cause::TokenLostOperational,
            State::Gather => Cause::TokenLostGather,
            State::Commit => Cause::TokenLostCommit,
            State::Recovery => Cause::TokenLostRecovery,
        };
        Self::note(RingLog::TokenLost { state: self.state }, out);
        self.enter_gather(Some(cause), out);
    }

    fn on_retransmit_timer(&mut self, out: Out<'_>) {
        let last = match self.state {
            State::Operational => self.op.last_token.as_ref(),
            State::Recovery => self.recovery.as_ref().and_then(|r| r.order.last_token.as_ref()),
            State::Commit | State::Gather => None,
        };
        let again = last.map(|l| (l.to, l.packet.clone())).or_else(|| {
            // No token of the new ring yet: the commit token may have been lost.
            self.committing.as_ref().map(|c| (c.next, c.packet.clone()))
        });
        if let Some((to, packet)) = again {
            self.stats.token_retransmits += 1;
            Self::send(Dest::Node(to), FrameLane::Ring, packet, out);
            self.t.retransmit = Some(self.now + self.cfg.timers.retransmit);
        }
    }

    /// The announcement came back in order: say goodbye to those who do not have it yet, and stop.
    fn finish_leave(&mut self, out: Out<'_>) {
        let removed = self.my_leave == Some(LeaveReason::Removed);
        let bye = packet::Leave { ring: self.op.ring, removed, sender: self.me }.encode();
        for _ in 0..3 {
            Self::send(Dest::All, FrameLane::Ring, bye.clone(), out);
        }
        self.stopped = true;
        self.t = Timers::default();
        out.push(EngineOutput::Stopped);
    }
}

/// Joins sent at once before the join period paces them.
const JOIN_BURST: u8 = 4;

impl Engine for Ring {
    fn local(&self) -> Member {
        self.cfg.member(self.me)
    }

    fn max_message(&self) -> usize {
        order::MAX_MESSAGE
    }

    fn send(&mut self, lane: Lane, guarantee: Guarantee, data: Bytes) -> Result<(), SendError> {
        if self.stopped || self.my_leave.is_some() {
            return Err(SendError::Stopped);
        }
        self.queues.lane(lane, guarantee == Guarantee::Safe, data)?;
        self.pending = true;
        Ok(())
    }

    fn open_users(&mut self, ring: RingId) {
        if ring == self.op.ring {
            self.queues.users_open = true;
            self.pending = true;
        }
    }

    fn leave(&mut self, reason: LeaveReason) {
        if self.my_leave.is_none() {
            self.my_leave = Some(reason);
            self.queues.ring(true, packet::encode_procs(hear::leaving_tag(reason), &ProcSet::default()));
            self.pending = true;
        }
    }

    fn hint_dead(&mut self, node: NodeId, incarnation: Incarnation) {
        self.hints.push(Proc { node, incarnation });
        self.pending = true;
    }

    fn step(&mut self, now: Boottime, ev: EngineInput, out: &mut Vec<EngineOutput>) {
        if self.stopped {
            return;
        }
        self.now = self.now.max(now);
        self.pending = false;
        match ev {
            EngineInput::Frame { from, cookie, packet } => {
                if !self.started {
                    self.tick(out);
                }
                self.on_packet(from, cookie, &packet, out);
            }
            EngineInput::Tick => self.tick(out),
            EngineInput::Paused(gap) => self.on_paused(gap, out),
            EngineInput::PathsChanged => {
                if self.started && self.state != State::Operational {
                    self.enter_gather(Some(Cause::PathsChanged), out);
                }
            }
            EngineInput::DeviceMaster(m) => self.device_master = m,
            EngineInput::Peers { peers, config_version } => {
                assert!(peers.len() <= packet::MAX_NODES);
                self.cfg.peers = peers;
                self.cfg.config_version = config_version;
            }
        }
        if let Some(set) = self.merging.take()
            && self.state == State::Operational
        {
            self.gather.proc.merge(&set);
            self.enter_gather(Some(Cause::Merge), out);
        }
        if self.leave_delivered {
            self.finish_leave(out);
        } else {
            self.flush(out);
            if self.leave_delivered {
                self.finish_leave(out);
            }
        }
        if self.queues.writable() {
            out.push(EngineOutput::Writable);
        }
    }

    fn last_token(&self) -> Option<(RingId, Boottime)> {
        match self.state {
            State::Operational if self.stopped => None,
            State::Operational if self.op.alone() => Some((self.op.ring, self.now)),
            State::Operational => Some((self.op.ring, self.token_at)),
            _ => None,
        }
    }

    fn next_deadline(&self) -> Boottime {
        if self.stopped {
            Boottime::MAX
        } else if self.pending {
            Boottime::ZERO
        } else {
            self.t.next()
        }
    }
}
