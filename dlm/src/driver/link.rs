//! Links between members: one ordered, exactly-once, authenticated lane each way per pair, across reconnects.
//!
//! The member with the lower identity dials. After two plain hellos (identities of both sides, nonces) every frame is
//! sealed; the first one in each direction says which message number is expected next, which proves the key and is
//! where a broken connection is resumed. Messages are kept until the peer has acknowledged them. Nothing here gives up on
//! a peer: only a view without it ends its link.

use super::Node;
use super::seal::{Sealer, Secret, TAG};
use crate::msg::Msg;
use crate::wire;
use cairn_base::{Incarnation, NodeId, Proc, ViewId};
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

const MAGIC: u32 = 0xca17_d132;
const HELLO: usize = 4 + 2 + 10 + 10 + 32;
/// Longest frame that is accepted.
const MAX_FRAME: usize = 64 << 20;
const HANDSHAKE: Duration = Duration::from_secs(5);
const REDIAL: Duration = Duration::from_millis(50);
/// Handshakes of strangers that run at a time.
const MAX_STRANGERS: usize = 64;
/// Messages after which an acknowledgement is sent even without other traffic.
const ACK_EVERY: u64 = 32;

const F_RESUME: u8 = 0;
const F_DATA: u8 = 1;
const F_ACK: u8 = 2;

/// Messages of one direction that the peer may still need.
#[derive(Default)]
struct Lane {
    /// Numbered messages not yet acknowledged; the first has number `base`.
    kept: VecDeque<Arc<[u8]>>,
    base: u64,
    /// Next number to be sealed on the present connection.
    next: u64,
    ack: bool,
}

struct Io {
    stream: Option<TcpStream>,
    sealer: Option<Sealer>,
    pending: Vec<u8>,
    generation: u64,
}

/// The way to one peer.
pub(super) struct Link {
    peer: Proc,
    lane: Mutex<Lane>,
    io: Mutex<Io>,
    /// The socket took no more, or the connection changed: the link's thread goes on.
    stuck: Condvar,
    /// Next number expected from the peer.
    expected: AtomicU64,
    /// Held while a message is taken and delivered: a broken connection's reader may still be at it when the next one starts.
    reading: Mutex<()>,
    closed: AtomicBool,
}

impl Link {
    fn new(peer: Proc) -> Self {
        Self {
            peer,
            lane: Mutex::new(Lane::default()),
            io: Mutex::new(Io { stream: None, sealer: None, pending: Vec::new(), generation: 0 }),
            stuck: Condvar::new(),
            expected: AtomicU64::new(0),
            reading: Mutex::new(()),
            closed: AtomicBool::new(false),
        }
    }

    /// Puts a message into the lane. Called under the lock of the state machine, so lanes have the order of decisions.
    pub(super) fn push(&self, view: ViewId, msg: &Msg) {
        let body = wire::encode(msg);
        let mut frame = Vec::with_capacity(body.len() + 17);
        frame.push(F_DATA);
        frame.extend_from_slice(&[0; 8]); // number, filled in below
        frame.extend_from_slice(&view.0.to_le_bytes());
        frame.extend_from_slice(&body);
        let mut lane = self.lane.lock();
        let no = lane.base + lane.kept.len() as u64;
        frame[1..9].copy_from_slice(&no.to_le_bytes());
        lane.kept.push_back(frame.into());
    }

    fn work(&self) -> bool {
        let lane = self.lane.lock();
        lane.ack || lane.next < lane.base + lane.kept.len() as u64
    }

    /// Writes what waits, without ever blocking; the link's thread takes over when the socket is full.
    pub(super) fn pump(&self) {
        while self.work() {
            let Some(mut io) = self.io.try_lock() else { return };
            if io.stream.is_none() {
                return;
            }
            if !self.fill(&mut io) || !Self::flush(&mut io) {
                self.stuck.notify_all();
                return;
            }
        }
    }

    /// Seals everything that waits. False when the connection broke.
    fn fill(&self, io: &mut Io) -> bool {
        loop {
            let (frame, ack) = {
                let mut lane = self.lane.lock();
                let ack = std::mem::take(&mut lane.ack);
                let at = lane.next.saturating_sub(lane.base) as usize;
                let frame = lane.kept.get(at).cloned();
                if frame.is_some() {
                    lane.next += 1;
                }
                (frame, ack)
            };
            let Some(sealer) = io.sealer.as_mut() else { return false };
            if ack {
                let mut f = vec![F_ACK];
                f.extend_from_slice(&self.expected.load(Ordering::Acquire).to_le_bytes());
                sealer.seal(&f, &mut io.pending);
            }
            match frame {
                Some(f) => sealer.seal(&f, &mut io.pending),
                None if ack => {}
                None => return true,
            }
        }
    }

    /// False when something is left to write or the connection is gone.
    fn flush(io: &mut Io) -> bool {
        while !io.pending.is_empty() {
            let Some(stream) = &io.stream else { return false };
            // SAFETY: the buffer outlives the call.
            let n = unsafe {
                libc::send(
                    stream.as_raw_fd(),
                    io.pending.as_ptr().cast(),
                    io.pending.len(),
                    libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                )
            };
            if n > 0 {
                io.pending.drain(..n as usize);
                continue;
            }
            let e = io::Error::last_os_error();
            match e.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => return false,
                _ => {
                    let _ = stream.shutdown(Shutdown::Both); // the reader notices and resumes
                    io.pending.clear();
                    return true;
                }
            }
        }
        true
    }

    fn acknowledged(&self, upto: u64) -> bool {
        let mut lane = self.lane.lock();
        if upto > lane.base + lane.kept.len() as u64 {
            return false;
        }
        while lane.base < upto {
            lane.kept.pop_front();
            lane.base += 1;
        }
        true
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        let mut io = self.io.lock();
        if let Some(s) = io.stream.take() {
            let _ = s.shutdown(Shutdown::Both);
        }
        io.sealer = None;
        self.stuck.notify_all();
    }

    /// A connection is up: resume after what the peer has. False when its claim is impossible.
    fn connected(&self, stream: &TcpStream, sealer: Sealer, peer_expects: u64) -> io::Result<Option<u64>> {
        if !self.acknowledged(peer_expects) {
            return Ok(None);
        }
        let mut io = self.io.lock();
        {
            let mut lane = self.lane.lock();
            if peer_expects < lane.base {
                return Ok(None); // it lost what it had acknowledged: another life under the same name
            }
            lane.next = lane.base;
            lane.ack = false;
        }
        if let Some(old) = io.stream.replace(stream.try_clone()?) {
            let _ = old.shutdown(Shutdown::Both);
        }
        io.sealer = Some(sealer);
        io.pending.clear();
        io.generation += 1;
        let generation = io.generation;
        drop(io);
        self.stuck.notify_all();
        self.pump();
        Ok(Some(generation))
    }

    fn disconnected(&self, generation: u64) {
        let mut io = self.io.lock();
        if io.generation == generation {
            io.stream = None;
            io.sealer = None;
            io.pending.clear();
        }
        self.stuck.notify_all();
    }
}

impl Link {
    /// Finishes writes that the socket did not take at once. Runs until the link is closed.
    fn write_loop(&self) {
        while !self.closed.load(Ordering::Acquire) {
            let fd = {
                let mut io = self.io.lock();
                if io.stream.is_none() || (io.pending.is_empty() && !self.work()) {
                    self.stuck.wait_for(&mut io, Duration::from_secs(1));
                }
                if io.stream.is_none() || !self.fill(&mut io) || Self::flush(&mut io) {
                    continue;
                }
                io.stream.as_ref().and_then(|s| s.try_clone().ok())
            };
            if let Some(s) = fd {
                let mut p = libc::pollfd { fd: s.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
                // SAFETY: one valid pollfd.
                unsafe { libc::poll(&raw mut p, 1, 100) };
            }
        }
    }

    /// Reads frames of one connection until it ends.
    fn read_loop(&self, stream: &TcpStream, mut opener: Sealer, node: &Weak<Node>) -> io::Result<()> {
        let mut r = BufReader::with_capacity(64 << 10, stream.try_clone()?);
        let mut unacked = 0;
        loop {
            let plain = read_frame(&mut r, &mut opener)?;
            match plain.split_first() {
                Some((&F_DATA, rest)) if rest.len() >= 16 => {
                    let no = u64::from_le_bytes(rest[..8].try_into().expect("8 bytes"));
                    let view = ViewId(u64::from_le_bytes(rest[8..16].try_into().expect("8 bytes")));
                    let reading = self.reading.lock();
                    let expected = self.expected.load(Ordering::Acquire);
                    if no < expected {
                        continue; // sent again after a break, and we had it
                    }
                    if no > expected {
                        return Err(bad("message number skipped"));
                    }
                    let msg = wire::decode(&rest[16..])
                        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
                    let Some(node) = node.upgrade() else { return Ok(()) };
                    self.expected.store(no + 1, Ordering::Release);
                    node.arrived(self.peer, view, msg);
                    drop(reading);
                    unacked += 1;
                    if unacked >= ACK_EVERY || r.buffer().is_empty() && unacked >= ACK_EVERY / 4 {
                        unacked = 0;
                        self.lane.lock().ack = true;
                        self.pump();
                    }
                }
                Some((&F_ACK, rest)) if rest.len() == 8 => {
                    if !self.acknowledged(u64::from_le_bytes(rest.try_into().expect("8 bytes"))) {
                        return Err(bad("acknowledgement of what was not sent"));
                    }
                }
                _ => return Err(bad("unknown frame")),
            }
        }
    }
}

fn bad(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn read_frame(r: &mut impl Read, opener: &mut Sealer) -> io::Result<Vec<u8>> {
    let mut len = [0; 4];
    r.read_exact(&mut len)?;
    let n = u32::from_le_bytes(len) as usize;
    if !(TAG..=MAX_FRAME).contains(&n) {
        return Err(bad("frame length"));
    }
    let mut sealed = Vec::new();
    // Memory grows with what really arrives.
    r.take(n as u64).read_to_end(&mut sealed)?;
    if sealed.len() != n {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    opener.open(len, &sealed).ok_or_else(|| bad("frame is not authentic"))
}

fn hello(from: Proc, to: Proc, nonce: &[u8; 32]) -> [u8; HELLO] {
    let mut b = Vec::with_capacity(HELLO);
    b.extend_from_slice(&MAGIC.to_le_bytes());
    b.extend_from_slice(&wire::VERSION.to_le_bytes());
    for p in [from, to] {
        b.extend_from_slice(&p.node.0.to_le_bytes());
        b.extend_from_slice(&p.incarnation.0.to_le_bytes());
    }
    b.extend_from_slice(nonce);
    b.try_into().expect("length of a hello")
}

fn read_hello(s: &mut TcpStream) -> io::Result<(Proc, Proc, [u8; 32])> {
    let mut b = [0; HELLO];
    s.read_exact(&mut b)?;
    let at = |i: usize| Proc {
        node: NodeId(u16::from_le_bytes([b[i], b[i + 1]])),
        incarnation: Incarnation(u64::from_le_bytes(b[i + 2..i + 10].try_into().expect("8 bytes"))),
    };
    if b[..4] != MAGIC.to_le_bytes() {
        return Err(bad("not a lock manager"));
    }
    if b[4..6] != wire::VERSION.to_le_bytes() {
        return Err(bad("another protocol version"));
    }
    Ok((at(6), at(16), b[26..].try_into().expect("32 bytes")))
}

fn fresh_nonce() -> io::Result<[u8; 32]> {
    let mut n = [0; 32];
    getrandom::fill(&mut n).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(n)
}

/// All links of a member, and its listening socket.
pub(super) struct Links {
    me: Proc,
    listener: TcpListener,
    address: SocketAddr,
    secret: Secret,
    links: Mutex<BTreeMap<Proc, Arc<Link>>>,
    /// Peers that are out of the view for good.
    gone: Mutex<BTreeSet<Proc>>,
    strangers: AtomicUsize,
    failed: AtomicUsize,
    stop: AtomicBool,
}

impl Links {
    pub(super) fn listen(me: Proc, bind: SocketAddr, secret: Secret) -> io::Result<Arc<Self>> {
        let listener = TcpListener::bind(bind)?;
        let address = listener.local_addr()?;
        Ok(Arc::new(Self {
            me,
            listener,
            address,
            secret,
            links: Mutex::new(BTreeMap::new()),
            gone: Mutex::new(BTreeSet::new()),
            strangers: AtomicUsize::new(0),
            failed: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        }))
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn serve(self: &Arc<Self>, node: &Arc<Node>) -> io::Result<()> {
        let (links, node) = (Arc::clone(self), Arc::downgrade(node));
        std::thread::Builder::new()
            .name("dlm-listen".into())
            .spawn(move || links.accept_loop(&node))
            .map(drop)
    }

    fn accept_loop(self: &Arc<Self>, node: &Weak<Node>) {
        loop {
            let accepted = self.listener.accept();
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let Ok((stream, from)) = accepted else {
                std::thread::sleep(REDIAL); // out of descriptors, for instance
                continue;
            };
            if self.strangers.fetch_add(1, Ordering::AcqRel) >= MAX_STRANGERS {
                self.strangers.fetch_sub(1, Ordering::AcqRel);
                continue;
            }
            let (links, node) = (Arc::clone(self), node.clone());
            let run = move || {
                let up = links.answer(&stream, &node);
                links.strangers.fetch_sub(1, Ordering::AcqRel);
                match up {
                    Ok((link, opener, generation)) => links.run(&link, &stream, opener, generation, &node),
                    Err(e) => {
                        links.failed.fetch_add(1, Ordering::AcqRel);
                        tracing::debug!(%from, err = %e, "lock manager: connection refused");
                    }
                }
            };
            if std::thread::Builder::new().name("dlm-peer".into()).spawn(run).is_err() {
                self.strangers.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// Listening side of the handshake.
    fn answer(
        self: &Arc<Self>,
        stream: &TcpStream,
        node: &Weak<Node>,
    ) -> io::Result<(Arc<Link>, Sealer, u64)> {
        let mut s = stream.try_clone()?;
        s.set_nodelay(true)?;
        s.set_read_timeout(Some(HANDSHAKE))?;
        s.set_write_timeout(Some(HANDSHAKE))?;
        let (peer, to, theirs) = read_hello(&mut s)?;
        if to != self.me || peer >= self.me || self.gone.lock().contains(&peer) {
            return Err(bad("not for this member"));
        }
        let ours = fresh_nonce()?;
        s.write_all(&hello(self.me, peer, &ours))?;
        let (opener, sealer) = self.secret.keys(peer, self.me, (&theirs, &ours));
        // Nothing is kept for a stranger before its first sealed frame has opened.
        let (mut opener, mut sealer) = (opener, sealer);
        let peer_expects = parse_resume(&read_frame(&mut s, &mut opener)?)?;
        let link = self.entry(node, peer)?;
        send_resume(&mut s, &mut sealer, &link)?;
        let generation = Self::up(&link, stream, sealer, peer_expects)?;
        Ok((link, opener, generation))
    }

    /// Dialing side.
    fn dial(&self, link: &Link, addr: SocketAddr) -> io::Result<(TcpStream, Sealer, u64)> {
        let stream = TcpStream::connect_timeout(&addr, HANDSHAKE)?;
        let mut s = stream.try_clone()?;
        s.set_nodelay(true)?;
        s.set_read_timeout(Some(HANDSHAKE))?;
        s.set_write_timeout(Some(HANDSHAKE))?;
        let ours = fresh_nonce()?;
        s.write_all(&hello(self.me, link.peer, &ours))?;
        let (from, to, theirs) = read_hello(&mut s)?;
        if from != link.peer || to != self.me {
            return Err(bad("another member answered"));
        }
        let (mut sealer, mut opener) = self.secret.keys(self.me, link.peer, (&ours, &theirs));
        send_resume(&mut s, &mut sealer, link)?;
        let peer_expects = parse_resume(&read_frame(&mut s, &mut opener)?)?;
        let generation = Self::up(link, &stream, sealer, peer_expects)?;
        Ok((stream, opener, generation))
    }

    fn up(link: &Link, stream: &TcpStream, sealer: Sealer, peer_expects: u64) -> io::Result<u64> {
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        link.connected(stream, sealer, peer_expects)?
            .ok_or_else(|| bad("the peer asks for messages that do not exist any more"))
    }

    /// The link of a peer, made when it does not exist: the peer may have a view that we have not seen yet.
    fn entry(self: &Arc<Self>, node: &Weak<Node>, peer: Proc) -> io::Result<Arc<Link>> {
        let mut links = self.links.lock();
        if self.gone.lock().contains(&peer) || self.stop.load(Ordering::Acquire) {
            return Err(bad("not for this member"));
        }
        if let Some(l) = links.get(&peer) {
            return Ok(Arc::clone(l));
        }
        let link = Arc::new(Link::new(peer));
        links.insert(peer, Arc::clone(&link));
        self.start(&link, None, node);
        Ok(link)
    }

    /// The link of a member of the view.
    pub(super) fn open(self: &Arc<Self>, node: &Arc<Node>, peer: Proc, addr: SocketAddr) -> Arc<Link> {
        let mut links = self.links.lock();
        if let Some(l) = links.get(&peer) {
            return Arc::clone(l);
        }
        let link = Arc::new(Link::new(peer));
        links.insert(peer, Arc::clone(&link));
        self.start(&link, (self.me < peer).then_some(addr), &Arc::downgrade(node));
        link
    }

    fn start(self: &Arc<Self>, link: &Arc<Link>, dial: Option<SocketAddr>, node: &Weak<Node>) {
        let l = Arc::clone(link);
        let spawned = std::thread::Builder::new().name("dlm-write".into()).spawn(move || l.write_loop());
        if let Err(e) = spawned {
            tracing::error!(peer = %link.peer, err = %e, "lock manager: no thread for a link");
        }
        let Some(addr) = dial else { return };
        let (links, link, node) = (Arc::clone(self), Arc::clone(link), node.clone());
        let spawned = std::thread::Builder::new().name("dlm-dial".into()).spawn(move || {
            while !link.closed.load(Ordering::Acquire) {
                match links.dial(&link, addr) {
                    Ok((stream, opener, generation)) => links.run(&link, &stream, opener, generation, &node),
                    Err(e) => tracing::debug!(peer = %link.peer, err = %e, "lock manager: cannot connect"),
                }
                std::thread::sleep(REDIAL);
            }
        });
        if let Err(e) = spawned {
            tracing::error!(err = %e, "lock manager: no thread for a link");
        }
    }

    /// Serves one connection to its end.
    fn run(&self, link: &Link, stream: &TcpStream, opener: Sealer, generation: u64, node: &Weak<Node>) {
        let end = link.read_loop(stream, opener, node);
        if let Err(e) = end
            && !link.closed.load(Ordering::Acquire)
        {
            tracing::debug!(peer = %link.peer, err = %e, "lock manager: connection ended, resuming");
        }
        let _ = stream.shutdown(Shutdown::Both);
        link.disconnected(generation);
    }

    /// A peer is out of the view.
    pub(super) fn remove(&self, peer: Proc) {
        let mut links = self.links.lock();
        self.gone.lock().insert(peer);
        if let Some(l) = links.remove(&peer) {
            l.close();
        }
    }

    /// Everything that was said has been written to the sockets.
    pub(super) fn drained(&self) -> bool {
        self.links.lock().values().all(|l| !l.work() && l.io.lock().pending.is_empty())
    }

    /// Breaks every connection, as a network does.
    #[cfg(test)]
    pub(super) fn break_all(&self) {
        for l in self.links.lock().values() {
            if let Some(s) = &l.io.lock().stream {
                let _ = s.shutdown(Shutdown::Both);
            }
        }
    }

    #[cfg(test)]
    pub(super) fn handshakes_failed(&self) -> usize {
        self.failed.load(Ordering::Acquire)
    }

    pub(super) fn shutdown(&self) {
        if self.stop.swap(true, Ordering::AcqRel) {
            return;
        }
        for l in self.links.lock().values() {
            l.close();
        }
        // Wakes the listener.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_millis(200));
    }
}

fn send_resume(s: &mut TcpStream, sealer: &mut Sealer, link: &Link) -> io::Result<()> {
    let mut f = vec![F_RESUME];
    f.extend_from_slice(&link.expected.load(Ordering::Acquire).to_le_bytes());
    let mut out = Vec::new();
    sealer.seal(&f, &mut out);
    s.write_all(&out)
}

fn parse_resume(f: &[u8]) -> io::Result<u64> {
    match f.split_first() {
        Some((&F_RESUME, rest)) if rest.len() == 8 => {
            Ok(u64::from_le_bytes(rest.try_into().expect("8 bytes")))
        }
        _ => Err(bad("no resume frame")),
    }
}
