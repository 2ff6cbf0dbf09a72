//! Sealed frames: what goes over the network between daemons, and what of it is believed.
//!
//! ```text
//!   0 magic CA17 | 2 version | 3 key epoch | 4 sender node | 6 lane | 7 path | 8 incarnation | 16 cookie | 24 sequence | 32 ciphertext, tag
//! ```
//!
//! The key is derived from the cluster key and (cluster name, node, incarnation, cookie), the nonce is (lane, sequence): unique,
//! because a life has one cookie and counts its frames. The 32 bytes of the head are authenticated with the packet.
//! A frame is believed if its tag is right, it is new (a window per sender life and lane, moved only by good frames), and
//! its life is not lower than one that has been confirmed. Everything before the tag is cheap and changes nothing.

use crate::engine::FrameLane;
use bytes::Bytes;
use cairn_base::{Incarnation, NodeId, Proc};
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{ChaCha20Poly1305, Key, Nonce};
use hkdf::Hkdf;
use sha2::Sha256;
use std::collections::BTreeMap;

const MAGIC: u16 = 0xCA17;
const VERSION: u8 = 1;
const HEAD: usize = 32;
const TAG: usize = 16;
/// Longest datagram that is looked at.
pub(super) const MAX_FRAME: usize = 2048;
/// Lives of one node whose keys are kept.
const LIVES: usize = 4;
/// Frames by which one may overtake another.
const WINDOW: u64 = 1024;
const WORDS: usize = (WINDOW / 64) as usize;

/// Why a frame was not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Form,
    UnknownNode,
    OldLife,
    Replay,
    Tag,
}

/// Which sequence numbers were seen: a ring of bits behind the highest.
#[derive(Clone)]
struct Window {
    highest: u64,
    bits: [u64; WORDS],
}

impl Window {
    /// Sequence numbers start at 1.
    const fn new() -> Self {
        Self { highest: 0, bits: [0; WORDS] }
    }

    fn is_new(&self, seq: u64) -> bool {
        if seq == 0 || seq + WINDOW <= self.highest {
            return false;
        }
        seq > self.highest || self.bits[Self::word(seq)] >> (seq % 64) & 1 == 0
    }

    fn mark(&mut self, seq: u64) {
        if seq > self.highest {
            if seq - self.highest >= WINDOW {
                self.bits = [0; WORDS];
            } else {
                for s in self.highest + 1..=seq {
                    self.bits[Self::word(s)] &= !(1 << (s % 64));
                }
            }
            self.highest = seq;
        }
        self.bits[Self::word(seq)] |= 1 << (seq % 64);
    }

    const fn word(seq: u64) -> usize {
        (seq % WINDOW / 64) as usize
    }
}

struct Life {
    incarnation: Incarnation,
    cookie: u64,
    cipher: ChaCha20Poly1305,
    windows: [Window; 3],
}

#[derive(Default)]
struct Peer {
    confirmed: Incarnation,
    lives: Vec<Life>,
}

/// The sealing and opening end of one life of a node.
pub(super) struct Sealer {
    key: Vec<u8>,
    cluster: String,
    me: Proc,
    cookie: u64,
    cipher: ChaCha20Poly1305,
    next: [u64; 3],
    peers: BTreeMap<NodeId, Peer>,
}

impl Sealer {
    /// `nodes`: all configured nodes; frames of others are dropped.
    pub(super) fn new(key: &[u8], cluster: &str, me: Proc, cookie: u64, nodes: &[NodeId]) -> Self {
        Self {
            cipher: derive(key, cluster, me, cookie),
            key: key.to_vec(),
            cluster: cluster.to_owned(),
            me,
            cookie,
            next: [1; 3],
            peers: nodes.iter().map(|n| (*n, Peer::default())).collect(),
        }
    }

    pub(super) fn seal(&mut self, lane: FrameLane, packet: &[u8]) -> Vec<u8> {
        let seq = self.next[lane as usize];
        self.next[lane as usize] += 1;
        let mut frame = Vec::with_capacity(HEAD + packet.len() + TAG);
        frame.extend_from_slice(&MAGIC.to_le_bytes());
        frame.extend_from_slice(&[VERSION, 0]);
        frame.extend_from_slice(&self.me.node.0.to_le_bytes());
        frame.extend_from_slice(&[lane as u8, 0]);
        frame.extend_from_slice(&self.me.incarnation.0.to_le_bytes());
        frame.extend_from_slice(&self.cookie.to_le_bytes());
        frame.extend_from_slice(&seq.to_le_bytes());
        let sealed = self
            .cipher
            .encrypt(&nonce(lane as u8, seq), Payload { msg: packet, aad: &frame })
            .expect("a packet is far below the limit of the cipher");
        frame.extend_from_slice(&sealed);
        frame
    }

    /// The sender's life and cookie, and the packet.
    pub(super) fn open(&mut self, frame: &[u8]) -> Result<(Proc, u64, Bytes), Refused> {
        if frame.len() < HEAD + TAG || frame.len() > MAX_FRAME {
            return Err(Refused::Form);
        }
        let (head, sealed) = frame.split_at(HEAD);
        let u64_at = |i: usize| u64::from_le_bytes(head[i..i + 8].try_into().expect("eight bytes"));
        let magic = u16::from_le_bytes([head[0], head[1]]);
        let lane = head[6];
        if magic != MAGIC || head[2] != VERSION || head[3] != 0 || lane > 2 {
            return Err(Refused::Form);
        }
        let node = NodeId(u16::from_le_bytes([head[4], head[5]]));
        let proc = Proc { node, incarnation: Incarnation(u64_at(8)) };
        let (cookie, seq) = (u64_at(16), u64_at(24));
        if proc == self.me && cookie == self.cookie {
            return Err(Refused::Replay);
        }
        let peer = self.peers.get_mut(&node).ok_or(Refused::UnknownNode)?;
        if proc.incarnation < peer.confirmed {
            return Err(Refused::OldLife);
        }
        let known = peer.lives.iter().position(|l| l.incarnation == proc.incarnation && l.cookie == cookie);
        if let Some(i) = known
            && !peer.lives[i].windows[lane as usize].is_new(seq)
        {
            return Err(Refused::Replay);
        }
        let fresh = known.is_none().then(|| derive(&self.key, &self.cluster, proc, cookie));
        let cipher = fresh.as_ref().or(known.map(|i| &peer.lives[i].cipher)).expect("one of the two");
        let packet = cipher
            .decrypt(&nonce(lane, seq), Payload { msg: sealed, aad: head })
            .map_err(|_| Refused::Tag)?;
        // authentic from here on
        let i = match (known, fresh) {
            (Some(i), _) => i,
            (None, Some(cipher)) => {
                if peer.lives.len() >= LIVES {
                    // the lowest life goes; it can only be one that nobody will confirm any more
                    let lowest =
                        (0..peer.lives.len()).min_by_key(|i| peer.lives[*i].incarnation).unwrap_or(0);
                    peer.lives.remove(lowest);
                }
                let windows = [Window::new(), Window::new(), Window::new()];
                peer.lives.push(Life { incarnation: proc.incarnation, cookie, cipher, windows });
                peer.lives.len() - 1
            }
            (None, None) => return Err(Refused::Tag),
        };
        peer.lives[i].windows[lane as usize].mark(seq);
        Ok((proc, cookie, packet.into()))
    }

    /// That life is alive now (it echoed our cookie): lower ones are never believed again.
    pub(super) fn confirm(&mut self, p: Proc) {
        if let Some(peer) = self.peers.get_mut(&p.node)
            && p.incarnation > peer.confirmed
        {
            peer.confirmed = p.incarnation;
            peer.lives.retain(|l| l.incarnation >= p.incarnation);
        }
    }
}

fn derive(key: &[u8], cluster: &str, p: Proc, cookie: u64) -> ChaCha20Poly1305 {
    let mut info = b"cairn ring 1\0".to_vec();
    info.extend_from_slice(&(cluster.len() as u32).to_le_bytes());
    info.extend_from_slice(cluster.as_bytes());
    info.extend_from_slice(&p.node.0.to_le_bytes());
    info.extend_from_slice(&p.incarnation.0.to_le_bytes());
    info.extend_from_slice(&cookie.to_le_bytes());
    let mut derived = [0u8; 32];
    Hkdf::<Sha256>::new(None, key)
        .expand(&info, &mut derived)
        .expect("32 bytes are within the limit of HKDF");
    ChaCha20Poly1305::new(&Key::from(derived))
}

fn nonce(lane: u8, seq: u64) -> Nonce {
    let mut bytes = [0u8; 12];
    bytes[0] = lane;
    bytes[4..].copy_from_slice(&seq.to_le_bytes());
    Nonce::from(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: &[u8] = &[9; 32];

    fn proc(node: u16, incarnation: u64) -> Proc {
        Proc { node: NodeId(node), incarnation: Incarnation(incarnation) }
    }

    fn sealer(key: &[u8], p: Proc, cookie: u64) -> Sealer {
        Sealer::new(key, "c", p, cookie, &[NodeId(1), NodeId(2), NodeId(3)])
    }

    #[test]
    fn a_sealed_packet_opens_once() {
        let (mut a, mut b) = (sealer(KEY, proc(1, 5), 11), sealer(KEY, proc(2, 1), 22));
        let frame = a.seal(FrameLane::Ring, b"token");
        let (from, cookie, packet) = b.open(&frame).unwrap();
        assert_eq!((from, cookie, &packet[..]), (proc(1, 5), 11, &b"token"[..]));
        assert_eq!(b.open(&frame), Err(Refused::Replay));
        // the same number on another lane is another frame
        assert!(b.open(&a.seal(FrameLane::Join, b"join")).is_ok());
    }

    #[test]
    fn any_changed_bit_and_any_other_key_are_refused() {
        let (mut a, mut b) = (sealer(KEY, proc(1, 5), 11), sealer(KEY, proc(2, 1), 22));
        let frame = a.seal(FrameLane::Ring, b"token");
        for i in 0..frame.len() * 8 {
            let mut bad = frame.clone();
            bad[i / 8] ^= 1 << (i % 8);
            // the path is not part of what is judged, but it is sealed as well
            assert!(b.open(&bad).is_err(), "bit {i}");
        }
        assert!(b.open(&frame).is_ok(), "the attempts moved nothing");
        let mut stranger = sealer(&[8; 32], proc(1, 5), 11);
        stranger.seal(FrameLane::Ring, b"a number that was used");
        assert_eq!(b.open(&stranger.seal(FrameLane::Ring, b"token")), Err(Refused::Tag));
    }

    #[test]
    fn a_confirmed_life_bars_all_lower_ones() {
        let mut b = sealer(KEY, proc(2, 1), 22);
        let old = sealer(KEY, proc(1, 5), 11).seal(FrameLane::Join, b"recorded");
        assert!(b.open(&sealer(KEY, proc(1, 6), 12).seal(FrameLane::Join, b"now")).is_ok());
        b.confirm(proc(1, 6));
        assert_eq!(b.open(&old), Err(Refused::OldLife));
    }

    #[test]
    fn frames_may_overtake_within_the_window() {
        let (mut a, mut b) = (sealer(KEY, proc(1, 5), 11), sealer(KEY, proc(2, 1), 22));
        let frames: Vec<_> = (0..1500u32).map(|i| a.seal(FrameLane::Ring, &i.to_le_bytes())).collect();
        assert!(b.open(&frames[1100]).is_ok());
        assert!(b.open(&frames[200]).is_ok(), "900 behind");
        assert_eq!(b.open(&frames[200]), Err(Refused::Replay));
        assert_eq!(
            b.open(&frames[50]),
            Err(Refused::Replay),
            "1050 behind: cannot be told from a repetition"
        );
        assert!(b.open(&frames[1499]).is_ok());
        assert_eq!(b.open(&frames[1100]), Err(Refused::Replay));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(sealer(KEY, proc(2, 1), 22).open(&bytes).is_err());
        }

        #[test]
        fn the_window_is_a_set(seqs in proptest::collection::vec(1u64..3000, 1..400)) {
            let mut w = Window::new();
            let mut seen = std::collections::BTreeSet::new();
            let mut highest = 0;
            for s in seqs {
                let too_old = s + WINDOW <= highest;
                prop_assert_eq!(w.is_new(s), !too_old && !seen.contains(&s));
                if w.is_new(s) {
                    w.mark(s);
                    seen.insert(s);
                    highest = highest.max(s);
                }
            }
        }
    }
}
