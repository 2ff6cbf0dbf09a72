//! A bare ring on a node, recording what the checker needs.

use super::evs::{Event, Trace};
use super::{Birth, Host};
use crate::engine::{Engine, EngineInput, EngineOutput, Guarantee, IoAction, Lane, Peer, SendError};
use crate::ring::log::RingLog;
use crate::ring::{Ring, RingConfig, RingTimers, Sabotage};
use bytes::{BufMut, Bytes, BytesMut};
use cairn_base::Boottime;
use std::time::Duration;

/// Times of the `fast` profile.
pub fn fast_timers() -> RingTimers {
    let ms = Duration::from_millis;
    RingTimers {
        token: ms(1000),
        retransmit: ms(122),
        hold: ms(88),
        join: ms(20),
        consensus: ms(1200),
        merge: ms(100),
        hear_window: ms(320),
        hold_down: ms(2000),
    }
}

/// A message that says who it is and whose every byte can be checked.
pub fn payload(id: u64, len: usize) -> Bytes {
    let mut b = BytesMut::with_capacity(len.max(8));
    b.put_u64_le(id);
    for i in 8..len.max(8) {
        b.put_u8((id as usize).wrapping_mul(31).wrapping_add(i) as u8);
    }
    b.freeze()
}

/// The id, if every byte is as [`payload`] made it.
pub fn message_id(data: &[u8]) -> Option<u64> {
    let id = u64::from_le_bytes(*data.first_chunk()?);
    (payload(id, data.len()) == data).then_some(id)
}

pub struct RingHost {
    pub ring: Ring,
    pub trace: Trace,
    pub logs: Vec<(Boottime, RingLog)>,
    ended: bool,
    out: Vec<EngineOutput>,
}

impl RingHost {
    pub fn config(b: &Birth) -> RingConfig {
        RingConfig {
            me: b.me,
            cookie: b.cookie,
            peers: b.nodes.iter().map(|&node| Peer { node, votes: 1 }).collect(),
            config_version: 1,
            ring_seq: b.ring_seq,
            mtu: 1400,
            window: 50,
            max_messages: 17,
            user_queue: 4 << 20,
            timers: fast_timers(),
        }
    }

    pub fn new(b: &Birth, sabotage: Sabotage) -> Self {
        let mut ring = Ring::new(Self::config(b), b.now);
        ring.set_sabotage(sabotage);
        Self { ring, trace: Trace::new(b.me), logs: Vec::new(), ended: false, out: Vec::new() }
    }

    pub fn send(&mut self, id: u64, len: usize, safe: bool) -> Result<(), SendError> {
        let guarantee = if safe { Guarantee::Safe } else { Guarantee::Agreed };
        self.ring.send(Lane::User, guarantee, payload(id, len))?;
        self.trace.push(Event::Sent { id, safe });
        Ok(())
    }
}

impl Host for RingHost {
    fn step(&mut self, now: Boottime, ev: EngineInput, io: &mut Vec<IoAction>) {
        let mut out = std::mem::take(&mut self.out);
        self.ring.step(now, ev, &mut out);
        for o in out.drain(..) {
            match o {
                EngineOutput::Io(action) => io.push(action),
                EngineOutput::Transitional { old, members } => {
                    let members = members.iter().map(|m| m.proc()).collect();
                    self.trace.push(Event::Transitional { old, members });
                }
                EngineOutput::Regular { ring, members, left, .. } => {
                    let members = members.iter().map(|m| m.proc()).collect();
                    let left = left.iter().map(|(m, how)| (m.proc(), *how)).collect();
                    self.trace.push(Event::Regular { ring, members, left, at: now });
                    self.ring.open_users(ring);
                }
                EngineOutput::Deliver { from, safe, seq, data, .. } => {
                    let id = message_id(&data).unwrap_or(u64::MAX);
                    self.trace.push(Event::Delivered { id, from: from.proc(), safe, seq });
                }
                EngineOutput::Log(log) => self.logs.push((now, log)),
                EngineOutput::Writable => {}
                EngineOutput::Stopped => {
                    self.ended = true;
                    self.trace.push(Event::Stopped);
                }
            }
        }
        self.out = out;
    }

    fn next_deadline(&self) -> Boottime {
        self.ring.next_deadline()
    }

    fn ended(&self) -> bool {
        self.ended
    }
}
