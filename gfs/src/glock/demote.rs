//! What runs without the glock's mutex: requests to the lock manager, their answers, and the way down.

use super::queue::{Inner, Phase, Todo, exceeds};
use super::{AcquireFlags, GAP, Glock, GlockType, Glocks, LockState, MAX_HOLD};
use crate::lockspace::{Granted, RequestFlags};
use crate::{Error, Result};
use parking_lot::MutexGuard;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

fn request_flags(glock: &Glock, flags: AcquireFlags) -> RequestFlags {
    let name = glock.name();
    RequestFlags {
        try_lock: flags.contains(AcquireFlags::TRY),
        try_1cb: flags.contains(AcquireFlags::TRY_1CB),
        recovery: flags.contains(AcquireFlags::RECOVERY),
        release_at_fence: name.is_released_at_fence(),
        lvb: match name.ty {
            GlockType::Inode | GlockType::Rgrp | GlockType::Quota => true,
            GlockType::NonDisk => name.number == CONTROL,
            _ => false,
        },
    }
}

/// Number of the control lock among the non-disk ones.
const CONTROL: u64 = 4;

impl Glock {
    /// Looks what the new state allows, and does it after giving the mutex back.
    pub(super) fn run_queue(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>) {
        match inner.next_step() {
            Todo::Nothing => {}
            Todo::Request(want, flags) => {
                drop(inner);
                if let Some(glocks) = self.glocks() {
                    glocks.space.request(self.name, want, request_flags(self, flags), None);
                }
            }
            Todo::Demote => {
                if inner.phase == Phase::Drain {
                    inner.phase = Phase::Drop;
                }
                drop(inner);
                if let Some(glocks) = self.glocks() {
                    let glock = Arc::clone(self);
                    glocks.workers.run(move || glock.go_down());
                }
            }
        }
    }

    /// Another node is blocked by what we have.
    pub(super) fn blocked(self: &Arc<Self>, glocks: &Arc<Glocks>, wanted: LockState) {
        let limit = match wanted {
            LockState::Unlocked => return,
            LockState::Shared => LockState::Shared,
            LockState::Deferred => LockState::Deferred,
            LockState::Exclusive => LockState::Unlocked,
        };
        let mut inner = self.inner.lock();
        // A late callback for what is already given up; with a request under way it may belong to the grant that is coming.
        if !exceeds(inner.state, limit) && inner.requested.is_none() {
            return;
        }
        inner.add_demand(limit);
        self.changed.notify_all();
        let long_held = matches!(self.name.ty, GlockType::Iopen | GlockType::NonDisk);
        self.run_queue(inner);
        if long_held {
            let glock = Arc::clone(self);
            glocks.workers.run(move || {
                if let Some(glocks) = glock.glocks()
                    && let Some(ops) = glocks.ops.get()
                {
                    ops.callback(&glock, wanted);
                }
            });
        }
    }

    /// The lock manager's answer to the outstanding request.
    pub(super) fn completed(self: &Arc<Self>, result: Result<Granted>) {
        let mut inner = self.inner.lock();
        let wanted = inner.requested.take();
        let asker = inner.asker.take();
        let going_down = inner.phase == Phase::Flush;
        match result {
            Ok(granted) => {
                if inner.state == LockState::Unlocked || granted.state == LockState::Unlocked {
                    inner.instantiated = false;
                }
                inner.state = granted.state;
                inner.granted_at = Some(Instant::now());
                if granted.state == LockState::Unlocked {
                    inner.lvb = None;
                } else if !going_down {
                    inner.lvb = granted.lvb;
                }
                let took = inner.moving_since.take().map_or(Duration::ZERO, |at| at.elapsed());
                if going_down {
                    inner.phase = Phase::Held;
                    // What is cheap to give up now, as SH is, may be dear the next time.
                    inner.giving_up_took = took.max(inner.giving_up_took / 2);
                } else {
                    inner.getting_took = took;
                }
            }
            // Two nodes convert SH to EX: one of them begins again from unlocked.
            Err(Error::Errno(libc::EDEADLK)) if inner.state == LockState::Shared && !going_down => {
                inner.add_demand(LockState::Unlocked);
            }
            Err(error) if going_down => {
                tracing::error!(glock = %self.name, ?wanted, err = %error, "the lock manager did not take a lock back");
                inner.phase = Phase::Stuck;
                inner.fail_all(&error);
            }
            Err(error) => {
                if let Some(asker) = asker {
                    let before = inner.queue.len();
                    inner.queue.retain(|w| !Arc::ptr_eq(w, &asker));
                    if inner.queue.len() < before {
                        asker.decide(Err(error));
                    }
                }
            }
        }
        self.changed.notify_all();
        self.run_queue(inner);
    }

    /// The worker's part of a demotion: from Grace to the gate, or from Drop to the lock manager.
    fn go_down(self: &Arc<Self>) {
        let Some(glocks) = self.glocks() else { return };
        let mut inner = self.inner.lock();
        if inner.phase == Phase::Grace {
            let least = Duration::from_micros(glocks.min_hold_micros.load(Ordering::Relaxed));
            let hold = least.max(inner.giving_up_took.max(inner.getting_took / 2).min(MAX_HOLD));
            if let Some(at) = inner.granted_at {
                self.stay_while_used(&mut inner, at + hold);
            }
            if inner.phase != Phase::Grace {
                return;
            }
            inner.went_idle_at = (inner.users() == 0).then(Instant::now);
            if inner.users() > 0 {
                inner.phase = Phase::Drain;
                // Whoever waits only to be refused is refused now.
                self.run_queue(inner);
                return;
            }
            inner.phase = Phase::Drop;
        }
        if inner.phase != Phase::Drop {
            return;
        }
        inner.moving_since = Some(Instant::now());
        let from = inner.state;
        let to = inner.demand.take().unwrap_or(LockState::Unlocked);
        self.stats.demotions.fetch_add(1, Ordering::Relaxed);
        drop(inner);
        if let Some(kernel) = glocks.kernel.get() {
            kernel.drop_caches(self, from, to);
        }
        // Mapped pages that the kernel wrote back are users of their own; they are in before the flush.
        {
            let mut inner = self.inner.lock();
            while inner.users() > 0 && inner.phase == Phase::Drop {
                self.changed.wait(&mut inner);
            }
            if inner.phase != Phase::Drop {
                return;
            }
            inner.phase = Phase::Flush;
        }
        let released = match glocks.ops.get() {
            Some(ops) => ops.release(self, from, to),
            None => Ok(()),
        };
        let mut inner = self.inner.lock();
        if let Err(error) = released {
            tracing::error!(glock = %self.name, ?from, ?to, err = %error, "a lock cannot be given up cleanly and is kept");
            inner.phase = Phase::Stuck;
            inner.fail_all(&error);
            self.changed.notify_all();
            return;
        }
        if inner.phase != Phase::Flush {
            return;
        }
        assert!(inner.users() == 0, "glock {}: user during the flush: {inner:?}", self.name);
        let lvb = if from == LockState::Exclusive { inner.lvb } else { None };
        inner.requested = Some(to);
        inner.asker = None;
        drop(inner);
        glocks.space.request(self.name, to, request_flags(self, AcquireFlags::NONE), lvb.as_ref());
    }

    /// In Grace: returns at `until`, or when nobody here makes use of the mode (any more).
    fn stay_while_used(&self, inner: &mut MutexGuard<'_, Inner>, until: Instant) {
        while inner.phase == Phase::Grace {
            let now = Instant::now();
            let was_idle = inner.users() == 0 && !inner.head_covered();
            // Who waits for a stronger mode gets it by giving this one up.
            if now >= until || was_idle && (!inner.uses_follow || !inner.queue.is_empty()) {
                return;
            }
            let uses = inner.uses;
            let quiet = self.changed.wait_until(inner, until.min(now + GAP)).timed_out();
            let idle = was_idle && inner.uses == uses && !inner.head_covered();
            if quiet && idle && Instant::now() < until {
                inner.uses_follow = false;
                return;
            }
        }
    }

    fn wait_unused(&self) {
        let mut inner = self.inner.lock();
        while inner.users() > 0 && inner.phase != Phase::Stuck {
            self.changed.wait(&mut inner);
        }
    }

    /// Lets page requests pass the shut gate, under the mode still held. For a pinned writer that waits for them.
    pub fn open_window(self: &Arc<Self>) {
        let mut inner = self.inner.lock();
        inner.windows += 1;
        self.run_queue(inner);
    }

    /// Ends [`Glock::open_window`]; page requests that are inside go on.
    pub fn shut_window(self: &Arc<Self>) {
        self.inner.lock().windows -= 1;
    }

    /// From `delay` on page requests pass the shut gate: what the demotion waits for then may be one of them.
    pub fn begin_pass(self: &Arc<Self>, delay: Duration) {
        let mut inner = self.inner.lock();
        inner.window_at = Some(Instant::now() + delay);
        for waiter in &inner.queue {
            waiter.look_again();
        }
    }

    /// Ends [`Glock::begin_pass`], and returns when those who came in have left.
    pub fn end_pass(self: &Arc<Self>) {
        {
            let mut inner = self.inner.lock();
            inner.window_at = None;
            if std::mem::take(&mut inner.window_opened) {
                inner.windows -= 1;
            }
        }
        self.wait_unused();
    }
}
