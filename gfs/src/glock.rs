//! Glocks: the cluster-wide lock of one thing (inode, resource group, journal, …), cached at this node.
//!
//! A glock keeps the mode the lock manager granted until another node wants it, and hands it to local *holders* meanwhile:
//! EX excludes the other local holders, SH and DF share among their kind, node-scope EX shares among those who say so, and a *pin* keeps the
//! node's mode without excluding anybody. When the lock manager calls back, the glock goes through
//!
//! ```text
//!            other node asks         hold time over          users = 0                caches dropped, flushed
//!   Held(m) ───────────────► Grace ─────────────────► Drain ───────────► Drop, Flush ───────────────► Held(m')
//!                         users still come in     gate shut: new users queue; until Flush write-back passes,
//!                                                 and page requests while a window is open
//! ```
//!
//! A mode stays as long as giving it up took the last time, or half as long as getting it took (two nodes that do the same come to the same time by
//! either); [`Glocks::set_min_hold`] is the least, [`MAX_HOLD`] the most. So nodes that both work with a thing work for as long as they hand it over. But it
//! stays only while it is used. One thread's operations leave gaps, so where a use was seen to follow soon, [`GAP`] is waited for the next one.
//!
//! Invariants: the node never uses a mode the lock manager has not granted; one request per glock is outstanding; a local waiter
//! that caused a request gets one turn before the mode is given up again; the other node's request goes before the rest of the local queue.
//! Nobody waits for a glock inside a transaction, and a demotion takes no other glock.
//! Sources: Documentation/filesystems/gfs2-glocks.rst (modes, flags, holders) in the Linux tree; the state table is ours.

mod context;
mod demote;
mod queue;
#[cfg(test)]
mod tests;

pub use crate::lockspace::{GlockName, GlockType, LockState, Lvb};
pub use context::{CancelToken, Class, TransactionScope, as_request, is_nowait, nowait, transaction_scope};

use crate::lockspace::{Granted, LockEvents, LockSpace};
use crate::workers::Workers;
use crate::{Error, Result};
use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
use queue::{Inner, Kind, Phase, Waiter};
use rustc_hash::FxHashMap;
use std::any::Any;
use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

/// How a holder is asked for. `Default` is an ordinary request that waits.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct AcquireFlags(u16);

impl AcquireFlags {
    pub const NONE: Self = Self(0);
    /// `Errno(EAGAIN)` rather than wait for anybody; a question to the lock manager may still be asked.
    pub const TRY: Self = Self(1);
    /// As `TRY`, and the holders on other nodes get one callback.
    pub const TRY_1CB: Self = Self(1 | 2);
    /// May be granted while locks of a dead node wait for recovery (NOEXP of GFS2). For whoever replays journals.
    pub const RECOVERY: Self = Self(4);
    /// A stronger cached mode is not good enough.
    pub const EXACT: Self = Self(8);
    /// Do not run `instantiate`.
    pub const SKIP: Self = Self(16);
    /// Shared or deferred, whatever is there.
    pub const ANY: Self = Self(32);
    /// With `Exclusive`: shares with other local holders that say so too.
    pub const NODE_SCOPE: Self = Self(64);
    /// The mode is given up with the last holder.
    pub const NOCACHE: Self = Self(128);
    /// With `Exclusive`: only keeps the node's mode; excludes no local holder.
    pub const PIN: Self = Self(256);
    /// With `TRY`: a demotion that nobody's use delays any more is waited for. So `EAGAIN` says that somebody uses or wants the lock, here or
    /// elsewhere, and not that it was a bad moment to ask. The wait depends on no other glock.
    pub const SETTLED: Self = Self(512);

    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for AcquireFlags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What the owner of cached things does when a glock changes. Called on worker threads without any lock held.
pub trait GlockOps: Send + Sync {
    /// The node is about to go from `from` down to `to`: flush the log, write in place, make durable, revoke, drop buffers.
    /// On error the lock is *not* given up, ever: the mount has to withdraw.
    fn release(&self, glock: &Arc<Glock>, from: LockState, to: LockState) -> Result<()>;

    /// First use after the mode was taken anew: read the object. Called once per grant from unlocked, under the caller's holder.
    fn instantiate(&self, glock: &Arc<Glock>, state: LockState) -> Result<()>;

    /// Another node wants `wanted`. For types whose holder lives long (iopen, freeze): begin what will end in dropping it.
    fn callback(&self, _glock: &Arc<Glock>, _wanted: LockState) {}
}

/// What the kernel caches under a glock. Called with the gate shut and without users, before `GlockOps::release`.
pub trait KernelCache: Send + Sync {
    fn drop_caches(&self, glock: &Arc<Glock>, from: LockState, to: LockState);
}

/// Counters of one glock, for `cairn top` and tests.
#[derive(Default, Debug)]
pub struct GlockStats {
    /// Acquisitions that had to wait or ask.
    pub waits: AtomicU64,
    /// Nanoseconds spent in them.
    pub wait_nanos: AtomicU64,
    pub demotions: AtomicU64,
}

type Slot = Arc<dyn Any + Send + Sync>;

/// One glock of a mount. Exists as long as somebody refers to it or the node holds a mode of it.
pub struct Glock {
    name: GlockName,
    glocks: Weak<Glocks>,
    inner: Mutex<Inner>,
    /// Users went to zero, or a demotion step ended.
    changed: Condvar,
    object: RwLock<Option<Slot>>,
    buffers: OnceLock<Slot>,
    pub stats: GlockStats,
}

impl std::fmt::Debug for Glock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.inner.try_lock() {
            Some(inner) => write!(f, "{} {inner:?}", self.name),
            None => write!(f, "{} (busy)", self.name),
        }
    }
}

impl Glock {
    pub fn name(&self) -> GlockName {
        self.name
    }

    /// The mode this node has now; it can change at once unless the caller is a holder.
    pub fn state(&self) -> LockState {
        self.inner.lock().state
    }

    /// What the file system keeps for this glock (in-memory inode, resource group), if it is a `T`.
    pub fn object<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        self.object.read().clone()?.downcast().ok()
    }

    /// Sets the object and returns the one before.
    pub fn set_object(&self, object: Option<Slot>) -> Option<Slot> {
        std::mem::replace(&mut *self.object.write(), object)
    }

    /// Second slot, for the buffers cached under this glock: made once, kept as long as the glock.
    pub fn buffers<T: Any + Send + Sync>(&self, make: impl FnOnce() -> T) -> Arc<T> {
        let slot = Arc::clone(self.buffers.get_or_init(|| Arc::new(make())));
        slot.downcast().unwrap_or_else(|_| panic!("glock {}: two kinds of buffer lists", self.name))
    }

    /// The buffer slot if it was made.
    pub fn buffers_if_any<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        Arc::clone(self.buffers.get()?).downcast().ok()
    }

    /// True while nobody holds or waits.
    pub fn is_idle(&self) -> bool {
        let inner = self.inner.lock();
        inner.users() == 0
            && inner.queue.is_empty()
            && inner.phase == Phase::Held
            && inner.requested.is_none()
    }

    /// How many local requests wait for it.
    pub fn waiters(&self) -> usize {
        self.inner.lock().queue.len()
    }

    /// True when other nodes wait for a mode of this glock: a long holder may want to end early.
    pub fn is_wanted(&self) -> bool {
        self.inner.lock().demand.is_some()
    }

    /// The object must be read again on next use.
    pub fn forget_instance(&self) {
        self.inner.lock().instantiated = false;
    }

    /// Gives the mode up as if another node had asked for something only compatible with `to`.
    pub fn demote(self: &Arc<Self>, to: LockState) {
        let mut inner = self.inner.lock();
        inner.add_demand(to);
        self.run_queue(inner);
    }

    fn glocks(&self) -> Option<Arc<Glocks>> {
        self.glocks.upgrade()
    }
}

/// Right to use a glock until dropped. `Send`: a reply may be written by another thread.
pub struct Holder {
    glock: Arc<Glock>,
    kind: Kind,
    nocache: bool,
}

impl std::fmt::Debug for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}", self.glock.name, self.kind)
    }
}

impl Holder {
    pub fn glock(&self) -> &Arc<Glock> {
        &self.glock
    }

    /// The mode of this holder; the node's own mode may be stronger.
    pub fn state(&self) -> LockState {
        self.kind.state()
    }

    /// Lock value block, `None` where none was ever stored or it was lost with its writer.
    pub fn lvb(&self) -> Option<Lvb> {
        self.glock.inner.lock().lvb
    }

    /// Stores the value block; it reaches the lock manager when this node leaves EX.
    pub fn set_lvb(&self, lvb: Lvb) {
        assert!(
            matches!(self.kind, Kind::Exclusive | Kind::Scoped),
            "glock {}: value block set under {:?}",
            self.glock.name,
            self.kind
        );
        self.glock.inner.lock().lvb = Some(lvb);
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let mut inner = self.glock.inner.lock();
        inner.leave(self.kind);
        if self.nocache && inner.users() == 0 {
            inner.add_demand(LockState::Unlocked);
        }
        if inner.phase != Phase::Held && inner.users() == 0 && !inner.is_looked_after() {
            self.glock.changed.notify_all();
        }
        if inner.needs_attention() {
            self.glock.run_queue(inner);
        }
    }
}

const SHARDS: usize = 32;
type Shard = RwLock<FxHashMap<GlockName, Arc<Glock>>>;

/// All glocks of one mount.
pub struct Glocks {
    space: Arc<dyn LockSpace>,
    clustered: bool,
    shards: [Shard; SHARDS],
    ops: OnceLock<Arc<dyn GlockOps>>,
    kernel: OnceLock<Arc<dyn KernelCache>>,
    workers: Workers,
    withdrawn: AtomicBool,
    why: OnceLock<String>,
    min_hold_micros: AtomicU64,
    me: Weak<Self>,
}

struct Events(Weak<Glocks>);

impl LockEvents for Events {
    fn completed(&self, name: GlockName, result: Result<Granted>) {
        if let Some(glocks) = self.0.upgrade()
            && let Some(glock) = glocks.find(name)
        {
            glock.completed(result);
        }
    }

    fn blocked(&self, name: GlockName, wanted: LockState) {
        if let Some(glocks) = self.0.upgrade()
            && let Some(glock) = glocks.find(name)
        {
            glock.blocked(&glocks, wanted);
        }
    }
}

/// A mode that takes long to give up stays so long at most when another node wants it.
pub const MAX_HOLD: Duration = Duration::from_millis(50);
/// From one use of a glock to the next, where a thread does one operation after the other.
const GAP: Duration = Duration::from_millis(1);

/// Upper bound of demotions that run at the same time (each has a thread).
const MAX_DEMOTIONS: usize = 4096;

/// What a request at the lock manager is allowed to take in `acquire_all` while other glocks are held.
const FIRST_PATIENCE: Duration = Duration::from_millis(2);
const MAX_PATIENCE: Duration = Duration::from_millis(200);

/// From one to two times as long, by chance: two nodes of which each holds what the other wants would else give up, and begin anew, at the same time for ever (seen for 15 s).
fn between(patience: Duration) -> Duration {
    let chance = std::hash::RandomState::new().build_hasher().finish();
    patience + patience.mul_f64((chance % 1024) as f64 / 1024.0)
}

impl Glocks {
    pub fn new(space: Arc<dyn LockSpace>) -> Arc<Self> {
        let glocks = Arc::new_cyclic(|me: &Weak<Self>| Self {
            clustered: space.is_clustered(),
            space,
            shards: std::array::from_fn(|_| RwLock::default()),
            ops: OnceLock::new(),
            kernel: OnceLock::new(),
            workers: Workers::new("glock", MAX_DEMOTIONS),
            withdrawn: AtomicBool::new(false),
            why: OnceLock::new(),
            min_hold_micros: AtomicU64::new(2_000),
            me: me.clone(),
        });
        glocks.space.attach(Arc::new(Events(glocks.me.clone())));
        glocks
    }

    /// Once, before the first acquire that must instantiate or flush.
    pub fn set_ops(&self, ops: Arc<dyn GlockOps>) {
        assert!(self.ops.set(ops).is_ok(), "glock operations are set once");
    }

    /// Once, when the kernel mount begins.
    pub fn set_kernel_cache(&self, kernel: Arc<dyn KernelCache>) {
        assert!(self.kernel.set(kernel).is_ok(), "the kernel cache is set once");
    }

    /// How long a mode that has users stays at least before it is given up.
    pub fn set_min_hold(&self, hold: Duration) {
        self.min_hold_micros.store(hold.as_micros() as u64, Ordering::Relaxed);
    }

    pub fn space(&self) -> &Arc<dyn LockSpace> {
        &self.space
    }

    /// False when this node is alone: then nothing is ever called back.
    pub fn is_clustered(&self) -> bool {
        self.clustered
    }

    fn shard(&self, name: GlockName) -> &Shard {
        &self.shards[rustc_hash::FxBuildHasher.hash_one(name) as usize >> 7 & (SHARDS - 1)]
    }

    fn find(&self, name: GlockName) -> Option<Arc<Glock>> {
        self.shard(name).read().get(&name).cloned()
    }

    /// The glock of this name, made on first use.
    pub fn get(&self, name: GlockName) -> Arc<Glock> {
        if let Some(glock) = self.find(name) {
            return glock;
        }
        let mut shard = self.shard(name).write();
        Arc::clone(shard.entry(name).or_insert_with(|| {
            Arc::new(Glock {
                name,
                glocks: self.me.clone(),
                inner: Mutex::new(Inner::default()),
                changed: Condvar::new(),
                object: RwLock::new(None),
                buffers: OnceLock::new(),
                stats: GlockStats::default(),
            })
        }))
    }

    /// All glocks there are now.
    pub fn all(&self) -> Vec<Arc<Glock>> {
        let mut all: Vec<_> =
            self.shards.iter().flat_map(|s| s.read().values().cloned().collect::<Vec<_>>()).collect();
        all.sort_by_key(|g| g.name);
        all
    }

    /// Asks for a holder. Waits unless told otherwise by flags or by [`nowait`].
    pub fn acquire(&self, name: GlockName, state: LockState, flags: AcquireFlags) -> Result<Holder> {
        self.acquire_on(&self.get(name), state, flags)
    }

    /// As [`Glocks::acquire`], for a glock at hand.
    pub fn acquire_on(&self, glock: &Arc<Glock>, state: LockState, flags: AcquireFlags) -> Result<Holder> {
        self.acquire_until(glock, state, flags, None)
    }

    fn acquire_until(
        &self,
        glock: &Arc<Glock>,
        state: LockState,
        flags: AcquireFlags,
        deadline: Option<Instant>,
    ) -> Result<Holder> {
        assert!(state != LockState::Unlocked, "glock {}: a holder of nothing", glock.name);
        if self.withdrawn.load(Ordering::Relaxed) {
            return Err(self.withdrawal());
        }
        let request = context::request_for(glock.name);
        let kind = Kind::of(state, flags);
        let node = if request.node_exclusive { LockState::Exclusive } else { state };
        let mut inner = glock.inner.lock();
        let first = inner.queue.is_empty() || inner.passes(request.class);
        if first && inner.admits(request.class) && inner.fits(kind, node, flags) {
            inner.enter(kind);
            let ready = inner.instantiated || flags.contains(AcquireFlags::SKIP);
            drop(inner);
            let holder =
                Holder { glock: Arc::clone(glock), kind, nocache: flags.contains(AcquireFlags::NOCACHE) };
            if !ready {
                self.instantiate(&holder)?;
            }
            return Ok(holder);
        }
        self.acquire_slow(glock, inner, kind, node, flags, request.class, deadline)
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "cold half of acquire_until, split for the size of the hot half"
    )]
    #[cold]
    fn acquire_slow(
        &self,
        glock: &Arc<Glock>,
        mut inner: MutexGuard<'_, Inner>,
        kind: Kind,
        node: LockState,
        flags: AcquireFlags,
        class: Class,
        deadline: Option<Instant>,
    ) -> Result<Holder> {
        // Alone on the volume the lock manager answers inside the call, so a no-wait thread may ask it when nobody else is in the way.
        let alone = !self.clustered && inner.queue.is_empty() && inner.users() == 0;
        if is_nowait() && !alone {
            return Err(Error::WouldBlock);
        }
        if inner.phase == Phase::Stuck {
            drop(inner);
            return Err(self.withdrawal_of(glock));
        }
        if flags.contains(AcquireFlags::TRY) {
            let moving = inner.requested.is_some() || !matches!(inner.phase, Phase::Held | Phase::Grace);
            let waits = flags.contains(AcquireFlags::SETTLED) && inner.is_going_down_alone();
            if !inner.queue.is_empty() || moving && !waits {
                return Err(Error::Errno(libc::EAGAIN));
            }
        }
        context::check_cancelled()?;
        context::assert_no_transaction(glock.name);
        if inner.went_idle_at.take().is_some_and(|at| at.elapsed() < GAP) {
            inner.uses_follow = true;
        }
        let started = Instant::now();
        let waiter = Arc::new(Waiter::new(kind, node, flags, class));
        if inner.passes(class) {
            inner.queue.push_front(Arc::clone(&waiter));
        } else {
            inner.queue.push_back(Arc::clone(&waiter));
        }
        glock.changed.notify_all();
        glock.run_queue(inner);
        let result = waiter.wait(glock, deadline, &self.withdrawn);
        glock.stats.waits.fetch_add(1, Ordering::Relaxed);
        glock.stats.wait_nanos.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
        match result {
            Ok(()) => {}
            Err(Error::Withdrawn(_)) => return Err(self.withdrawal_of(glock)),
            Err(error) => return Err(error),
        }
        let holder =
            Holder { glock: Arc::clone(glock), kind, nocache: flags.contains(AcquireFlags::NOCACHE) };
        if !flags.contains(AcquireFlags::SKIP) {
            self.instantiate(&holder)?;
        }
        Ok(holder)
    }

    /// Holders of several glocks, without deadlock: waits for one with nothing held, gives each further one a bounded time, and on
    /// failure drops all and begins with the one that failed. A name that occurs twice is held once, in the stronger mode.
    /// The result is in ascending order of names.
    pub fn acquire_all(&self, wanted: &[(GlockName, LockState)]) -> Result<Vec<Holder>> {
        let mut list: Vec<(GlockName, LockState)> = wanted.to_vec();
        list.sort_by_key(|(name, state)| (*name, *state != LockState::Exclusive));
        list.dedup_by_key(|(name, _)| *name);
        let mut first = 0;
        let mut patience = FIRST_PATIENCE;
        'again: loop {
            let mut held: Vec<Option<Holder>> = list.iter().map(|_| None).collect();
            let order = std::iter::once(first).chain((0..list.len()).filter(|i| *i != first));
            for (step, index) in order.enumerate() {
                let (name, state) = list[index];
                let deadline = (step > 0).then(|| Instant::now() + between(patience));
                match self.acquire_until(&self.get(name), state, AcquireFlags::NONE, deadline) {
                    Ok(holder) => held[index] = Some(holder),
                    Err(Error::Errno(libc::ETIMEDOUT)) => {
                        first = index;
                        patience = (patience * 2).min(MAX_PATIENCE);
                        continue 'again;
                    }
                    Err(error) => return Err(error),
                }
            }
            return Ok(held.into_iter().flatten().collect());
        }
    }

    fn instantiate(&self, holder: &Holder) -> Result<()> {
        let glock = &holder.glock;
        {
            let mut inner = glock.inner.lock();
            loop {
                if inner.instantiated {
                    return Ok(());
                }
                let Some(ops) = self.ops.get() else { return Ok(()) };
                if is_nowait() {
                    return Err(Error::WouldBlock);
                }
                if !inner.instantiating {
                    inner.instantiating = true;
                    drop(inner);
                    let result = ops.instantiate(glock, holder.state());
                    inner = glock.inner.lock();
                    inner.instantiating = false;
                    inner.instantiated = result.is_ok();
                    glock.changed.notify_all();
                    return result;
                }
                glock.changed.wait(&mut inner);
            }
        }
    }

    /// Stops all locking of this mount: waiters fail, nothing is given up any more. The lock manager must be told by fencing.
    pub fn withdraw(&self, why: &str) {
        let _ = self.why.set(why.to_owned());
        self.withdrawn.store(true, Ordering::SeqCst);
        for glock in self.all() {
            let mut inner = glock.inner.lock();
            inner.fail_all(&Error::Withdrawn(why.to_owned()));
            inner.phase = Phase::Stuck;
            glock.changed.notify_all();
        }
    }

    pub fn is_withdrawn(&self) -> bool {
        self.withdrawn.load(Ordering::Relaxed)
    }

    fn withdrawal(&self) -> Error {
        Error::Withdrawn(self.why.get().cloned().unwrap_or_default())
    }

    fn withdrawal_of(&self, glock: &Glock) -> Error {
        match self.why.get() {
            Some(_) => self.withdrawal(),
            None => {
                Error::Lock { name: glock.name.to_string(), what: "could not be given up cleanly".to_owned() }
            }
        }
    }

    /// Gives up every mode, flushing what they cover; for unmount, when no holder is left. The names still in use after `limit`.
    pub fn release_all(&self, limit: Duration) -> Result<(), Vec<GlockName>> {
        let deadline = Instant::now() + limit;
        let all = self.all();
        for glock in &all {
            glock.demote(LockState::Unlocked);
        }
        let mut left = Vec::new();
        for glock in all {
            let mut inner = glock.inner.lock();
            while inner.state != LockState::Unlocked
                || inner.requested.is_some()
                || inner.phase != Phase::Held
            {
                if glock.changed.wait_until(&mut inner, deadline).timed_out() {
                    left.push(glock.name);
                    break;
                }
            }
        }
        if left.is_empty() { Ok(()) } else { Err(left) }
    }

    /// Drops from the table what nobody refers to, and gives up modes of glocks for which `drop_mode` says so.
    pub fn shrink(&self, mut drop_mode: impl FnMut(&Glock) -> bool) {
        for glock in self.all() {
            if glock.is_idle() && drop_mode(&glock) {
                glock.demote(LockState::Unlocked);
            }
        }
        for shard in &self.shards {
            shard.write().retain(|_, glock| {
                Arc::strong_count(glock) > 1
                    || glock.object.read().is_some()
                    || glock.state() != LockState::Unlocked
                    || !glock.is_idle()
            });
        }
    }
}

type Waiters = VecDeque<Arc<Waiter>>;
