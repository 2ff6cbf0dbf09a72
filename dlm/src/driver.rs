//! A member of a lock space in a process: threads, clocks, sockets and callbacks around [`Core`]. Decides nothing.
//!
//! The calling thread runs the state machine under one mutex, puts messages into the lanes of its peers while it holds
//! it (so that lanes keep the order of decisions), and afterwards, without it, writes to the sockets and runs the
//! callbacks. Callbacks run one at a time, in the order of their decisions, on whatever thread is there; a callback
//! may call back into the node.

mod link;
mod seal;

use crate::core::{Action, Completion, Config, Core, CoreView, DumpState, Event, RebuildReport};
use crate::msg::PlockAnswer;
use crate::name::ResName;
use crate::plock::PlockRange;
use crate::types::{Flags, LockError, LockId, Lvb, Mode};
use cairn_base::{Boottime, Proc, ViewId};
use link::{Link, Links};
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Longest wait of the ticker.
const TICK: Duration = Duration::from_millis(500);

/// Where answers go. Called without any lock of the node held.
pub trait Callbacks: Send + Sync {
    fn completed(&self, done: Completion);
    /// A granted lock stands in the way of `mode`.
    fn blocked(&self, lock: LockId, user: u64, mode: Mode);
    fn plock_done(&self, ticket: u64, answer: PlockAnswer);
    fn rebuilt(&self, _report: &RebuildReport) {}
}

/// How a member is started.
#[derive(Clone)]
pub struct NodeConfig {
    pub core: Config,
    /// Where peers reach us; port 0 picks one (see [`Node::address`]).
    pub bind: SocketAddr,
    /// Bound into the keys of every link, so that a frame of one space means nothing in another.
    pub cluster: String,
    pub lockspace: String,
    pub key: Vec<u8>,
}

/// A view with the addresses of its members.
#[derive(Clone, Debug)]
pub struct View {
    pub id: ViewId,
    pub members: Vec<(Proc, SocketAddr)>,
    pub left_clean: Vec<Proc>,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    #[error("lock space {space}: cannot listen on {addr}: {source}")]
    Listen { space: String, addr: SocketAddr, source: std::io::Error },
    #[error("lock space {space}: cannot start a thread: {source}")]
    Thread { space: String, source: std::io::Error },
    #[error("lock space {space}: the cluster key is empty")]
    NoKey { space: String },
    #[error(transparent)]
    Lock(#[from] LockError),
}

enum Call {
    Done(Completion),
    Block(LockId, u64, Mode),
    Plock(u64, PlockAnswer),
    Rebuilt(RebuildReport),
}

struct Inner {
    core: Core,
    out: Vec<Action>,
    links: BTreeMap<Proc, Arc<Link>>,
    calls: VecDeque<Call>,
    /// Some thread is running callbacks.
    delivering: bool,
}

/// One member of one lock space.
pub struct Node {
    me: Proc,
    inner: Mutex<Inner>,
    /// Signalled when a rebuild is over and when the ticker has something to do.
    changed: Condvar,
    callbacks: Mutex<Option<Arc<dyn Callbacks>>>,
    links: Arc<Links>,
    stop: AtomicBool,
}

fn now() -> Boottime {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut t) };
    Boottime(t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64)
}

impl Node {
    /// Listens and starts the threads. Nothing is decided before the first view.
    pub fn start(cfg: NodeConfig) -> Result<Arc<Self>, NodeError> {
        let space = cfg.lockspace.clone();
        if cfg.key.is_empty() {
            return Err(NodeError::NoKey { space });
        }
        let me = cfg.core.me;
        let secret = seal::Secret::new(&cfg.key, &cfg.cluster, &cfg.lockspace);
        let links = Links::listen(me, cfg.bind, secret).map_err(|source| NodeError::Listen {
            space: space.clone(),
            addr: cfg.bind,
            source,
        })?;
        let node = Arc::new(Self {
            me,
            inner: Mutex::new(Inner {
                core: Core::new(cfg.core),
                out: Vec::with_capacity(16),
                links: BTreeMap::new(),
                calls: VecDeque::new(),
                delivering: false,
            }),
            changed: Condvar::new(),
            callbacks: Mutex::new(None),
            links,
            stop: AtomicBool::new(false),
        });
        node.links.serve(&node).map_err(|source| NodeError::Thread { space: space.clone(), source })?;
        let ticker = Arc::downgrade(&node);
        std::thread::Builder::new()
            .name("dlm-tick".into())
            .spawn(move || {
                while let Some(n) = ticker.upgrade() {
                    if n.stop.load(Ordering::Acquire) {
                        return;
                    }
                    n.tick();
                }
            })
            .map_err(|source| NodeError::Thread { space, source })?;
        Ok(node)
    }

    pub fn me(&self) -> Proc {
        self.me
    }

    /// Where this member listens.
    pub fn address(&self) -> SocketAddr {
        self.links.address()
    }

    /// Where answers go; set before the first request.
    pub fn set_callbacks(&self, c: Arc<dyn Callbacks>) {
        *self.callbacks.lock() = Some(c);
    }

    fn tick(&self) {
        let mut g = self.inner.lock();
        let wait = g.core.next_deadline().map_or(TICK, |t| t.since(now()).min(TICK));
        if !wait.is_zero() {
            self.changed.wait_for(&mut g, wait);
        }
        drop(g);
        let _ = self.with(|core, out| core.step(now(), Event::Tick, out));
    }

    /// Runs the state machine once and does what it asked for.
    fn with<R>(&self, f: impl FnOnce(&mut Core, &mut Vec<Action>) -> R) -> R {
        let mut g = self.inner.lock();
        let inner = &mut *g;
        let r = f(&mut inner.core, &mut inner.out);
        if inner.out.is_empty() {
            return r;
        }
        let view = inner.core.view().unwrap_or_default();
        let mut touched: Vec<Arc<Link>> = Vec::new();
        for a in inner.out.drain(..) {
            match a {
                Action::Send { to, msg } => {
                    if let Some(l) = inner.links.get(&to) {
                        l.push(view, &msg);
                        if !touched.iter().any(|t| Arc::ptr_eq(t, l)) {
                            touched.push(Arc::clone(l));
                        }
                    }
                }
                Action::Complete(c) => inner.calls.push_back(Call::Done(c)),
                Action::Block { lock, user, mode } => inner.calls.push_back(Call::Block(lock, user, mode)),
                Action::PlockDone { ticket, answer } => inner.calls.push_back(Call::Plock(ticket, answer)),
                Action::Rebuilt(r) => {
                    self.changed.notify_all();
                    inner.calls.push_back(Call::Rebuilt(r));
                }
                Action::PeerError { from, what } => tracing::error!(peer = %from, "lock manager: {what}"),
            }
        }
        let deliver = !inner.delivering && !inner.calls.is_empty();
        if deliver {
            inner.delivering = true;
        }
        drop(g);
        for l in touched {
            l.pump();
        }
        if deliver {
            self.deliver();
        }
        r
    }

    /// Runs callbacks until none is left; only one thread does at a time.
    fn deliver(&self) {
        let callbacks = self.callbacks.lock().clone();
        loop {
            let mut g = self.inner.lock();
            let Some(call) = g.calls.pop_front() else {
                g.delivering = false;
                return;
            };
            drop(g);
            let Some(c) = &callbacks else { continue };
            match call {
                Call::Done(d) => c.completed(d),
                Call::Block(lock, user, mode) => c.blocked(lock, user, mode),
                Call::Plock(ticket, answer) => c.plock_done(ticket, answer),
                Call::Rebuilt(r) => c.rebuilt(&r),
            }
        }
    }

    /// The next totally ordered, quorate view of the lock space.
    pub fn set_view(self: &Arc<Self>, view: View) -> Result<(), LockError> {
        {
            let mut g = self.inner.lock();
            let members: Vec<Proc> = view.members.iter().map(|(p, _)| *p).collect();
            let gone: Vec<Proc> = g.links.keys().copied().filter(|p| !members.contains(p)).collect();
            for p in gone {
                g.links.remove(&p);
                self.links.remove(p);
            }
            for (p, addr) in &view.members {
                if *p != self.me {
                    let link = self.links.open(self, *p, *addr);
                    g.links.insert(*p, link);
                }
            }
        }
        let members = view.members.iter().map(|(p, _)| *p).collect();
        let v = CoreView { id: view.id, members, left_clean: view.left_clean };
        self.with(|core, out| {
            core.check();
            core.step(now(), Event::View(v), out)
        })
    }

    /// No write of `who` takes effect any more.
    pub fn fenced(&self, who: Proc) {
        let _ = self.with(|core, out| core.step(now(), Event::Fenced(who), out));
    }

    /// The journal of `who` is replayed. Also told to every member.
    pub fn recovered(&self, who: Proc) {
        let _ = self.with(|core, out| core.step(now(), Event::Recovered { who, spread: true }, out));
    }

    /// Quorum is lost: nothing is granted until `resume` or the next view.
    pub fn suspend(&self) {
        let _ = self.with(|core, out| core.step(now(), Event::Suspend, out));
    }

    pub fn resume(&self) {
        let _ = self.with(|core, out| core.step(now(), Event::Resume, out));
    }

    /// Waits until this member knows every slice and gate of its view. False when the time ran out.
    pub fn wait_settled(&self, limit: Duration) -> bool {
        let until = std::time::Instant::now() + limit;
        let mut g = self.inner.lock();
        while !g.core.settled() {
            if self.changed.wait_until(&mut g, until).timed_out() {
                return g.core.settled();
            }
        }
        true
    }

    /// See [`Core::founder`].
    pub fn founder(&self) -> bool {
        self.inner.lock().core.founder()
    }

    /// Dead members whose gates are shut, with "fenced already".
    pub fn gates(&self) -> Vec<(Proc, bool)> {
        self.inner.lock().core.gates().collect()
    }

    pub fn request(
        &self,
        name: &ResName,
        mode: Mode,
        flags: Flags,
        user: u64,
        timeout: Option<Duration>,
    ) -> Result<LockId, LockError> {
        let r = self.with(|core, out| core.request(now(), name, mode, flags, user, timeout, out));
        if timeout.is_some() {
            self.changed.notify_all();
        }
        r
    }

    pub fn convert(
        &self,
        lock: LockId,
        mode: Mode,
        flags: Flags,
        lvb: Option<&Lvb>,
        timeout: Option<Duration>,
    ) -> Result<(), LockError> {
        let r = self.with(|core, out| core.convert(now(), lock, mode, flags, lvb, timeout, out));
        if timeout.is_some() {
            self.changed.notify_all();
        }
        r
    }

    pub fn unlock(&self, lock: LockId, flags: Flags, lvb: Option<&Lvb>) -> Result<(), LockError> {
        self.with(|core, out| core.unlock(now(), lock, flags, lvb, out))
    }

    pub fn cancel(&self, lock: LockId) -> Result<(), LockError> {
        self.with(|core, out| core.cancel(now(), lock, out))
    }

    /// `noted` gets the ticket before any answer to it can be delivered.
    pub fn plock_lock(
        &self,
        root: &ResName,
        range: PlockRange,
        wait: bool,
        noted: impl FnOnce(u64),
    ) -> Result<u64, LockError> {
        self.with(|core, out| core.plock_lock(now(), root, range, wait, out).inspect(|t| noted(*t)))
    }

    pub fn plock_unlock(
        &self,
        root: &ResName,
        range: PlockRange,
        noted: impl FnOnce(u64),
    ) -> Result<u64, LockError> {
        self.with(|core, out| core.plock_unlock(now(), root, range, out).inspect(|t| noted(*t)))
    }

    pub fn plock_test(
        &self,
        root: &ResName,
        range: PlockRange,
        noted: impl FnOnce(u64),
    ) -> Result<u64, LockError> {
        self.with(|core, out| core.plock_test(now(), root, range, out).inspect(|t| noted(*t)))
    }

    pub fn plock_cancel(&self, ticket: u64) {
        self.with(|core, out| core.plock_cancel(now(), ticket, out));
    }

    pub fn dump(&self) -> DumpState {
        self.inner.lock().core.dump()
    }

    /// Everything is released and nothing will be asked any more; waits (bounded) until what was said has arrived.
    pub fn leave(&self, limit: Duration) -> Result<(), LockError> {
        self.with(|core, _| core.leave())?;
        let until = std::time::Instant::now() + limit;
        while !self.links.drained() && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Closes links and ends the threads. Peers learn of it from membership only.
    pub fn shutdown(&self) {
        self.stop.store(true, Ordering::Release);
        self.changed.notify_all();
        self.links.shutdown();
    }

    pub(crate) fn arrived(&self, from: Proc, view: ViewId, msg: crate::msg::Msg) {
        let _ = self.with(|core, out| core.step(now(), Event::Msg { from, view, msg }, out));
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.shutdown();
    }
}

#[cfg(test)]
mod tests;
