//! The ring of a node, with a record of everything it says for the checker of extended virtual synchrony.

use bytes::{BufMut, Bytes, BytesMut};
use cairn_base::{Boottime, Incarnation, NodeId};
use membership::engine::{Engine, EngineInput, EngineOutput, Guarantee, Lane, LeaveReason, SendError};
use membership::event::{Member, RingId};
use membership::ring::Ring;
use membership::sim::evs::{Event, Trace};

/// Bytes put before each message: its name in the record.
const NAME: usize = 8;

pub(crate) struct Tap {
    ring: Ring,
    pub(crate) trace: Trace,
    next: u64,
}

impl Tap {
    pub(crate) fn new(ring: Ring) -> Self {
        let me = ring.local().proc();
        let next = u64::from(me.node.0) << 56 | me.incarnation.0 << 40;
        Self { ring, trace: Trace::new(me), next }
    }
}

impl Engine for Tap {
    fn local(&self) -> Member {
        self.ring.local()
    }

    fn max_message(&self) -> usize {
        self.ring.max_message() - NAME
    }

    fn send(&mut self, lane: Lane, guarantee: Guarantee, data: Bytes) -> Result<(), SendError> {
        let mut named = BytesMut::with_capacity(NAME + data.len());
        named.put_u64_le(self.next);
        named.extend_from_slice(&data);
        self.ring.send(lane, guarantee, named.freeze())?;
        // the messages of a synchronisation round end with their ring, sent or not
        if lane == Lane::Sync {
            self.next += 1;
            return Ok(());
        }
        self.trace.push(Event::Sent { id: self.next, safe: guarantee == Guarantee::Safe });
        self.next += 1;
        Ok(())
    }

    fn open_users(&mut self, ring: RingId) {
        self.ring.open_users(ring);
    }

    fn leave(&mut self, reason: LeaveReason) {
        self.ring.leave(reason);
    }

    fn hint_dead(&mut self, node: NodeId, incarnation: Incarnation) {
        self.ring.hint_dead(node, incarnation);
    }

    fn step(&mut self, now: Boottime, ev: EngineInput, out: &mut Vec<EngineOutput>) {
        let from = out.len();
        self.ring.step(now, ev, out);
        for o in &mut out[from..] {
            match o {
                EngineOutput::Transitional { old, members } => {
                    let members = members.iter().map(|m| m.proc()).collect();
                    self.trace.push(Event::Transitional { old: *old, members });
                }
                EngineOutput::Regular { ring, members, left, .. } => {
                    let members = members.iter().map(|m| m.proc()).collect();
                    let left = left.iter().map(|(m, how)| (m.proc(), *how)).collect();
                    self.trace.push(Event::Regular { ring: *ring, members, left, at: now });
                }
                EngineOutput::Deliver { lane: Lane::Sync, data, .. } => *data = data.slice(NAME..),
                EngineOutput::Deliver { from, safe, seq, data, .. } => {
                    let id = data.first_chunk().map_or(u64::MAX, |b| u64::from_le_bytes(*b));
                    *data = data.slice(NAME..);
                    self.trace.push(Event::Delivered { id, from: from.proc(), safe: *safe, seq: *seq });
                }
                EngineOutput::Stopped => self.trace.push(Event::Stopped),
                EngineOutput::Io(_) | EngineOutput::Log(_) | EngineOutput::Writable => {}
            }
        }
    }

    fn last_token(&self) -> Option<(RingId, Boottime)> {
        self.ring.last_token()
    }

    fn next_deadline(&self) -> Boottime {
        self.ring.next_deadline()
    }
}
