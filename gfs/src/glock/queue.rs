//! The state of one glock under its mutex: counters of holders, the queue of waiters, who may enter when.

use super::{AcquireFlags, Class, Glock, LockState, Lvb, Waiters, context};
use crate::{Error, Result};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How a holder counts among the local ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Shared,
    Deferred,
    Exclusive,
    /// Exclusive for the node, shared among local holders of this kind.
    Scoped,
    Pin,
}

impl Kind {
    pub(super) fn of(state: LockState, flags: AcquireFlags) -> Self {
        match state {
            LockState::Exclusive if flags.contains(AcquireFlags::PIN) => Self::Pin,
            LockState::Exclusive if flags.contains(AcquireFlags::NODE_SCOPE) => Self::Scoped,
            LockState::Exclusive => Self::Exclusive,
            LockState::Deferred => Self::Deferred,
            LockState::Shared | LockState::Unlocked => Self::Shared,
        }
    }

    pub(super) fn state(self) -> LockState {
        match self {
            Self::Shared => LockState::Shared,
            Self::Deferred => LockState::Deferred,
            Self::Exclusive | Self::Scoped | Self::Pin => LockState::Exclusive,
        }
    }
}

/// Where the glock stands on its way down (table in the parent module).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Phase {
    #[default]
    Held,
    Grace,
    Drain,
    Drop,
    /// Kernel caches are gone; nobody enters until the lock manager has answered.
    Flush,
    /// Could not be given up: kept until the node is fenced.
    Stuck,
}

#[derive(Default)]
pub(super) struct Inner {
    pub(super) state: LockState,
    pub(super) phase: Phase,
    /// Outstanding at the lock manager.
    pub(super) requested: Option<LockState>,
    /// The waiter for which it was asked, by identity; it alone gets a refusal.
    pub(super) asker: Option<Arc<Waiter>>,
    /// What others let us keep at most.
    pub(super) demand: Option<LockState>,
    /// Page requests may pass the shut gate.
    pub(super) windows: u32,
    /// The same, from this moment on: the kernel's page pass probably waits for one of them.
    pub(super) window_at: Option<Instant>,
    /// `window_at` has become one of `windows`.
    pub(super) window_opened: bool,
    pub(super) queue: Waiters,
    pub(super) instantiated: bool,
    pub(super) instantiating: bool,
    pub(super) lvb: Option<Lvb>,
    pub(super) granted_at: Option<Instant>,
    /// How long it took to get the mode, and to give one up (from the shut gate on); since when one of the two is under way.
    pub(super) getting_took: Duration,
    pub(super) giving_up_took: Duration,
    pub(super) moving_since: Option<Instant>,
    /// Holders so far.
    pub(super) uses: u64,
    /// Use follows use: a demotion waits for the next one, as long as the mode may stay.
    pub(super) uses_follow: bool,
    /// A demotion found no use at this moment and went on; whoever comes soon after shows that it should have waited.
    pub(super) went_idle_at: Option<Instant>,
    shared: u32,
    deferred: u32,
    scoped: u32,
    pins: u32,
    exclusive: bool,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} {:?} requested {:?} demand {:?} holders sh={} df={} ns={} pin={} ex={} waiting {} windows {}",
            self.state,
            self.phase,
            self.requested,
            self.demand,
            self.shared,
            self.deferred,
            self.scoped,
            self.pins,
            self.exclusive,
            self.queue.len(),
            self.windows
        )
    }
}

/// True when a node that may keep `limit` at most has to go down from `state`.
pub(super) fn exceeds(state: LockState, limit: LockState) -> bool {
    state != limit && state != LockState::Unlocked && limit != LockState::Exclusive
}

impl Inner {
    pub(super) fn users(&self) -> u32 {
        self.shared + self.deferred + self.scoped + self.pins + u32::from(self.exclusive)
    }

    pub(super) fn enter(&mut self, kind: Kind) {
        self.uses += 1;
        match kind {
            Kind::Shared => self.shared += 1,
            Kind::Deferred => self.deferred += 1,
            Kind::Scoped => self.scoped += 1,
            Kind::Pin => self.pins += 1,
            Kind::Exclusive => {
                assert!(!self.exclusive, "two exclusive holders");
                self.exclusive = true;
            }
        }
    }

    pub(super) fn leave(&mut self, kind: Kind) {
        match kind {
            Kind::Shared => self.shared -= 1,
            Kind::Deferred => self.deferred -= 1,
            Kind::Scoped => self.scoped -= 1,
            Kind::Pin => self.pins -= 1,
            Kind::Exclusive => self.exclusive = false,
        }
    }

    /// Whether the node's mode is good for a holder that needs `node`.
    fn covers(&self, node: LockState, flags: AcquireFlags) -> bool {
        if flags.contains(AcquireFlags::EXACT) {
            return self.state == node;
        }
        match self.state {
            LockState::Unlocked => false,
            LockState::Exclusive => true,
            LockState::Shared | LockState::Deferred => {
                self.state == node || (flags.contains(AcquireFlags::ANY) && node != LockState::Exclusive)
            }
        }
    }

    fn compatible(&self, kind: Kind) -> bool {
        match kind {
            Kind::Shared => !self.exclusive && self.scoped == 0 && self.deferred == 0,
            Kind::Deferred => !self.exclusive && self.scoped == 0 && self.shared == 0,
            Kind::Scoped => !self.exclusive && self.shared == 0 && self.deferred == 0,
            Kind::Exclusive => !self.exclusive && self.scoped == 0 && self.shared == 0 && self.deferred == 0,
            Kind::Pin => true,
        }
    }

    pub(super) fn fits(&self, kind: Kind, node: LockState, flags: AcquireFlags) -> bool {
        // Shared holders of kind ANY mix with deferred ones.
        let any = flags.contains(AcquireFlags::ANY) && !self.exclusive && self.scoped == 0;
        self.covers(node, flags) && (any || self.compatible(kind))
    }

    /// Whether a request of this class may enter now as far as the gate is concerned.
    pub(super) fn admits(&self, class: Class) -> bool {
        match self.phase {
            Phase::Held | Phase::Grace => true,
            Phase::Drain | Phase::Drop => self.passes(class),
            Phase::Flush | Phase::Stuck => false,
        }
    }

    /// Whether it goes before the queue: those for which a demotion, or a user, waits.
    pub(super) fn passes(&self, class: Class) -> bool {
        match class {
            Class::Ordinary => false,
            Class::Page => self.windows > 0 || self.window_at.is_some_and(|at| Instant::now() >= at),
            Class::WriteBack | Class::Pinned => true,
        }
    }

    pub(super) fn add_demand(&mut self, to: LockState) {
        self.demand = match self.demand {
            Some(before) if before != to => Some(LockState::Unlocked),
            _ => Some(to),
        };
    }

    /// Whether releasing a holder must look at the queue or at a demotion.
    pub(super) fn needs_attention(&self) -> bool {
        !self.queue.is_empty() || self.demand.is_some() || self.phase != Phase::Held
    }

    /// In Grace, and the demotion waits for the next use: it looks from time to time, and need not be told of each that ends.
    pub(super) fn is_looked_after(&self) -> bool {
        self.phase == Phase::Grace && self.uses_follow && self.queue.is_empty()
    }

    /// On the way down, without users: ends with nobody's help but the lock manager's.
    pub(super) fn is_going_down_alone(&self) -> bool {
        matches!(self.phase, Phase::Drain | Phase::Drop | Phase::Flush) && self.users() == 0
    }

    /// Whether the head of the queue could use the present mode.
    pub(super) fn head_covered(&self) -> bool {
        self.queue.front().is_some_and(|w| self.covers(w.node, w.flags))
    }

    pub(super) fn fail_all(&mut self, error: &Error) {
        for waiter in self.queue.drain(..) {
            waiter.decide(Err(error.clone()));
        }
    }

    /// Lets in whoever may enter: the head of the queue while the gate is open, those who pass it otherwise.
    fn grant_waiters(&mut self) {
        if matches!(self.phase, Phase::Held | Phase::Grace) {
            while let Some(head) = self.queue.front() {
                if self.fits(head.kind, head.node, head.flags) {
                    let head = self.queue.pop_front().expect("it has a front");
                    self.enter(head.kind);
                    head.decide(Ok(()));
                } else if head.flags.contains(AcquireFlags::TRY) && self.covers(head.node, head.flags) {
                    let head = self.queue.pop_front().expect("it has a front");
                    head.decide(Err(Error::Errno(libc::EAGAIN)));
                } else {
                    break;
                }
            }
        }
        let mut index = 0;
        while let Some(waiter) = self.queue.get(index) {
            if self.passes(waiter.class)
                && self.admits(waiter.class)
                && self.fits(waiter.kind, waiter.node, waiter.flags)
            {
                let waiter = self.queue.remove(index).expect("index is inside");
                self.enter(waiter.kind);
                waiter.decide(Ok(()));
            } else if waiter.flags.contains(AcquireFlags::TRY)
                && !self.admits(waiter.class)
                && !(waiter.flags.contains(AcquireFlags::SETTLED) && self.is_going_down_alone())
            {
                let waiter = self.queue.remove(index).expect("index is inside");
                waiter.decide(Err(Error::Errno(libc::EAGAIN)));
            } else {
                index += 1;
            }
        }
    }
}

/// What a look at the queue found to be done without the mutex.
pub(super) enum Todo {
    Nothing,
    /// Ask the lock manager.
    Request(LockState, AcquireFlags),
    /// Start, or go on with, the demotion on a worker.
    Demote,
}

impl Inner {
    pub(super) fn next_step(&mut self) -> Todo {
        self.grant_waiters();
        if self.phase == Phase::Drain && self.users() == 0 {
            return Todo::Demote;
        }
        if self.phase != Phase::Held || self.requested.is_some() {
            return Todo::Nothing;
        }
        if let Some(limit) = self.demand {
            if exceeds(self.state, limit) {
                self.phase = Phase::Grace;
                return Todo::Demote;
            }
            self.demand = None;
        }
        let Some(head) = self.queue.front() else { return Todo::Nothing };
        if self.covers(head.node, head.flags) {
            return Todo::Nothing; // a local holder is in the way
        }
        if self.users() > 0 {
            if head.flags.contains(AcquireFlags::TRY) {
                let head = self.queue.pop_front().expect("it has a front");
                head.decide(Err(Error::Errno(libc::EAGAIN)));
                return self.next_step();
            }
            return Todo::Nothing;
        }
        match (self.state, head.node) {
            (LockState::Unlocked, want) | (LockState::Shared, want @ LockState::Exclusive) => {
                self.requested = Some(want);
                self.moving_since = Some(Instant::now());
                self.asker = Some(Arc::clone(head));
                Todo::Request(want, head.flags)
            }
            (LockState::Exclusive, want @ LockState::Shared) => {
                self.demand = Some(want);
                self.phase = Phase::Grace;
                Todo::Demote
            }
            _ => {
                self.demand = Some(LockState::Unlocked);
                self.phase = Phase::Grace;
                Todo::Demote
            }
        }
    }
}

const WAITING: u8 = 0;
const GRANTED: u8 = 1;
const FAILED: u8 = 2;

/// One thread that waits for a holder.
pub(super) struct Waiter {
    pub(super) kind: Kind,
    pub(super) node: LockState,
    pub(super) flags: AcquireFlags,
    pub(super) class: Class,
    thread: Thread,
    decision: AtomicU8,
    error: Mutex<Option<Error>>,
}

/// A waiter looks this often whether its request was cancelled or the mount withdrawn, should a wake-up have been missed.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Waiter {
    pub(super) fn new(kind: Kind, node: LockState, flags: AcquireFlags, class: Class) -> Self {
        Self {
            kind,
            node,
            flags,
            class,
            thread: std::thread::current(),
            decision: AtomicU8::new(WAITING),
            error: Mutex::new(None),
        }
    }

    /// Under the glock's mutex, after removing it from the queue.
    pub(super) fn decide(&self, result: Result<()>) {
        let decision = match result {
            Ok(()) => GRANTED,
            Err(error) => {
                *self.error.lock() = Some(error);
                FAILED
            }
        };
        self.decision.store(decision, Ordering::Release);
        self.thread.unpark();
    }

    /// A page request sleeps only until the window opens.
    pub(super) fn look_again(&self) {
        if self.class == Class::Page {
            self.thread.unpark();
        }
    }

    pub(super) fn wait(
        self: &Arc<Self>,
        glock: &Arc<Glock>,
        deadline: Option<Instant>,
        withdrawn: &AtomicBool,
    ) -> Result<()> {
        loop {
            if let Some(result) = self.result() {
                return result;
            }
            let mut give_up = context::check_cancelled().err();
            let mut rest = LOOK_AGAIN;
            if self.class == Class::Page {
                let mut inner = glock.inner.lock();
                match inner.window_at {
                    Some(_) if inner.passes(Class::Page) => {
                        inner.window_at = None;
                        inner.windows += 1;
                        inner.window_opened = true;
                        glock.run_queue(inner);
                        continue;
                    }
                    Some(at) => rest = rest.min(at.saturating_duration_since(Instant::now())),
                    None => {}
                }
            }
            if let Some(deadline) = deadline {
                rest = rest.min(deadline.saturating_duration_since(Instant::now()));
                if rest.is_zero() {
                    give_up = Some(Error::Errno(libc::ETIMEDOUT));
                }
            }
            if withdrawn.load(Ordering::Relaxed) {
                give_up = Some(Error::Withdrawn(String::new()));
            }
            if let Some(error) = give_up {
                let mut inner = glock.inner.lock();
                if let Some(result) = self.result() {
                    return result;
                }
                inner.queue.retain(|other| !Arc::ptr_eq(other, self));
                glock.run_queue(inner);
                return Err(error);
            }
            std::thread::park_timeout(rest);
        }
    }

    fn result(&self) -> Option<Result<()>> {
        match self.decision.load(Ordering::Acquire) {
            WAITING => None,
            GRANTED => Some(Ok(())),
            _ => Some(Err(self.error.lock().take().unwrap_or(Error::WouldBlock))),
        }
    }
}
