//! UDP under the ring: one socket, one datagram per packet and peer, sealed.

use super::seal::{MAX_FRAME, Refused, Sealer};
use super::{DaemonError, Wire};
use crate::config::Config;
use crate::engine::{Dest, EngineInput, IoAction};
use crate::ring::is_token;
use cairn_base::{Boottime, NodeId, Proc};
use nix::sys::socket::{setsockopt, sockopt};
use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

/// Datagrams taken in one turn, so that a flood cannot keep the loop from its timers.
const PER_TURN: usize = 512;

/// Receive buffer asked for; the kernel may give less.
const BUFFER: usize = 4 << 20;

pub(super) struct UdpWire {
    socket: UdpSocket,
    peers: BTreeMap<NodeId, SocketAddr>,
    sealer: Sealer,
    refused: u64,
    complained: Boottime,
}

impl UdpWire {
    pub(super) fn open(config: &Config, me: Proc, cookie: u64, key: &[u8]) -> Result<Self, DaemonError> {
        let mut peers = BTreeMap::new();
        for node in &config.nodes {
            let addr = (node.addr.as_str(), node.port)
                .to_socket_addrs()
                .ok()
                .and_then(|mut found| found.next())
                .ok_or_else(|| {
                    DaemonError::Wire(format!("address {:?} of {} is not known", node.addr, node.name))
                })?;
            peers.insert(NodeId(node.id), addr);
        }
        let own = peers
            .remove(&me.node)
            .ok_or_else(|| DaemonError::Wire(format!("node {} is not configured", me.node)))?;
        // CF-14: an address that is not ours cannot be bound
        let socket = UdpSocket::bind(own).map_err(|e| DaemonError::Wire(format!("CF-14: {own}: {e}")))?;
        socket.set_nonblocking(true).map_err(|e| DaemonError::Wire(e.to_string()))?;
        let _ = setsockopt(&socket, sockopt::RcvBuf, &BUFFER);
        let nodes: Vec<NodeId> = config.nodes.iter().map(|n| NodeId(n.id)).collect();
        let sealer = Sealer::new(key, &config.name, me, cookie, &nodes);
        Ok(Self { socket, peers, sealer, refused: 0, complained: Boottime::ZERO })
    }
}

impl Wire for UdpWire {
    fn fds(&self, out: &mut Vec<RawFd>) {
        out.push(self.socket.as_raw_fd());
    }

    fn receive(&mut self, now: Boottime, out: &mut Vec<EngineInput>) {
        let mut buf = [0; MAX_FRAME + 1];
        for _ in 0..PER_TURN {
            let len = match self.socket.recv(&mut buf) {
                Ok(len) => len,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                // ICMP errors of earlier sends: a peer that is not there
                Err(_) => continue,
            };
            match self.sealer.open(&buf[..len]) {
                Ok((from, cookie, packet)) => out.push(EngineInput::Frame { from, cookie, packet }),
                Err(Refused::Replay | Refused::OldLife) => {}
                Err(why) => {
                    self.refused += 1;
                    if now.since(self.complained) >= Duration::from_secs(1) {
                        self.complained = now;
                        tracing::warn!("{} frames refused so far, the last: {why:?}", self.refused);
                    }
                }
            }
        }
        // Whatever was sent before a token is seen before it, else the ring asks for messages that are already here.
        out.sort_by_key(|e| matches!(e, EngineInput::Frame { packet, .. } if is_token(packet)));
    }

    fn discard(&mut self) {
        let mut buf = [0; 1];
        for _ in 0..65_536 {
            match self.socket.recv(&mut buf) {
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
                _ => {}
            }
        }
    }

    fn act(&mut self, _now: Boottime, action: &IoAction) {
        match action {
            IoAction::Send { to, lane, packet } => {
                // one frame for all: a sequence number names one frame per sender and lane, whoever gets it
                let frame = self.sealer.seal(*lane, packet);
                match to {
                    Dest::Node(node) => {
                        if let Some(addr) = self.peers.get(node) {
                            let _ = self.socket.send_to(&frame, addr);
                        }
                    }
                    Dest::All => {
                        for addr in self.peers.values() {
                            let _ = self.socket.send_to(&frame, addr);
                        }
                    }
                }
            }
            IoAction::Confirm { peer, .. } => self.sealer.confirm(*peer),
            IoAction::Persist { .. } => {}
        }
    }
}
