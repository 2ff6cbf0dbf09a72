//! Keeps what the kernel caches (attributes, names, pages) true while glocks are taken and given up.
//!
//! The rule: whatever the kernel caches, this node holds the glock for; before it gives the glock up, the kernel no longer has it.
//!
//! * A reply that can be cached is written while the glock is held, and the demotion begins with the gate shut and no users.
//! * Attributes: one notification that takes no lock. ENOENT shortly after a reply that may create the inode means that the reply is on
//!   its way: repeat. (Not for as long as FORGETs are owed: those may be for an earlier inode of the same number, which the kernel keeps
//!   outside its table. Beside such a one, replies give attributes no lifetime.) What is dropped is dropped of every inode of the block that the
//!   kernel has not forgotten, deleted ones included.
//!   A reply gives attributes a lifetime only when the kernel's inode has them already, or is made by it: the kernel marks them valid before it
//!   fills them in, and readers take no lock, so that a stat beside the reply would show the old ones as valid (seen: once in 500,000 stats of a file
//!   that both mounts append to; `fuse_change_attributes` of Linux 6.18 and before). See [`SETTLED`].
//!   A notification also makes the kernel throw away attributes in a reply that is written and not yet taken in, so it is sent only when there is something with
//!   a lifetime.
//! * The size by which the kernel reads, maps and seeks: see [`super::size`].
//! * Names: the epoch of the mount steps. The notifications for single names take locks that requests hold, and deadlock.
//! * Pages: removed range by range around READs that wait (their pages are locked, and hold nothing). A pass that takes long is waiting for
//!   a READ or buffered WRITE that arrived later: those are let in under the mode still held, and what they touched is passed over again.
//! * A store into a shared mapping asks nobody: while handles for reading and writing are open here, READs take EX, and giving EX up for SH
//!   removes pages as well.
//!
//! What is waited for during a demotion: running users, page READs and write-back, all of which end without any other lock.
//! Lock order: the shard of [`Nodes`] and a node's traffic are leaves.

use super::node::{Node, Nodes};
use super::notify::{Known, Notify};
use super::range::{Pages, RangeSet};
use super::size::{Agreement, Sizes};
use super::traffic::{Errand, STUCK};
use crate::glock::{Glock, GlockName, GlockType, KernelCache, LockState};
use crate::ops::Attr;
use crate::workers::Workers;
use crate::{BlockNo, InodeNo, Result};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Lifetime of what is covered by a glock.
pub(super) const LONG: Duration = Duration::from_secs(3600);
/// A glock given up so short a time ago will be again: what is handed out then is asked for again anyway, and without lifetime an inode needs no
/// notifications.
const CONTENDED: Duration = Duration::from_secs(1);
/// Attributes that were told without a lifetime so long ago, and have not changed, are in the kernel's inode: a thread takes microseconds from our
/// write of the reply until it has filled them in.
const SETTLED: Duration = Duration::from_millis(100);
/// A buffered WRITE whose own page keeps the drop of its pages waiting goes on after so many ticks of quiet: that page is not up to date, nothing
/// is lost. It is met where a page was read and has gone again without our knowledge: by a pass that stood in line before the WRITE, by the kernel itself, or
/// in a direct READ that looked like one of pages (in the stress about one in 150 ordered WRITEs).
/// A drop that is merely slow must not be taken for it, or the WRITE ends beside an old page: so a thread is at it, no READ
/// and no write-back is waited for, and this thread was woken in time at each tick, as everybody is whom a busy processor keeps from unlocking a page
/// (on a processor that stays busy: for [`OWN_PAGE_BUSY`]).
/// The drop is then left behind, and removes pages some time later, when the next WRITE may have filled them: that one is ordered as well.
const OWN_PAGE: u32 = 20;
const TICK: Duration = Duration::from_millis(5);
const OWN_PAGE_BUSY: Duration = Duration::from_secs(1);
/// How long the reply that creates an inode may take from our write to the kernel's table (it takes microseconds).
const REPLY_LIMIT: Duration = Duration::from_secs(1);

/// Counters, for `cairn top` and tests.
#[derive(Default, Debug)]
pub struct CoherenceStats {
    pub demotions: AtomicU64,
    pub passes: AtomicU64,
    /// Rounds of passes beyond the first.
    pub repeats: AtomicU64,
    /// Attribute notifications repeated because the inode was not there yet.
    pub owed: AtomicU64,
    pub epochs: AtomicU64,
    /// WRITEs that dropped their pages before they were applied.
    pub ordered_writes: AtomicU64,
    /// Of these: went on because their own page was in the way.
    pub own_page: AtomicU64,
    /// Replies to GETATTR and LOOKUP with attributes.
    pub attributes: AtomicU64,
    /// Notifications that made the kernel's size of a file greater; threads for making it smaller; READs answered without (zeros up to the old size).
    pub grown: AtomicU64,
    pub shrunk: AtomicU64,
    pub zeros: AtomicU64,
    /// READs ahead that failed so that a buffered write could have their page.
    pub failed_ahead: AtomicU64,
    /// Write-back of a mapped page that found the node without EX: must stay 0.
    pub late_write_back: AtomicU64,
}

struct Epoch {
    /// Steps begun; what is handed out from now on belongs to this one at least.
    begun: AtomicU64,
    /// Steps that the kernel has made.
    done: AtomicU64,
    step: Mutex<()>,
}

/// The kernel's caches of one mount.
pub struct Coherence {
    pub(super) nodes: Nodes,
    notify: OnceLock<Notify>,
    clustered: bool,
    has_epoch: OnceLock<bool>,
    epoch: Epoch,
    unmounted: AtomicBool,
    born: Instant,
    /// See [`CONTENDED`].
    contended: AtomicU64,
    pub(super) helpers: Workers,
    pub(super) sizes: Arc<Sizes>,
    pub stats: CoherenceStats,
    #[cfg(test)]
    pub(super) sabotage: super::tests::Sabotage,
}

/// Parts of the protocol that tests switch off to see that their checks notice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    Attributes,
    Pages,
    Names,
    WriterTakesExclusive,
    WriteOrder,
    Sizes,
}

impl Coherence {
    pub(super) fn new(clustered: bool, root: InodeNo) -> Self {
        Self {
            nodes: Nodes::new(root),
            notify: OnceLock::new(),
            clustered,
            has_epoch: OnceLock::new(),
            epoch: Epoch { begun: AtomicU64::new(1), done: AtomicU64::new(1), step: Mutex::new(()) },
            unmounted: AtomicBool::new(false),
            born: Instant::now(),
            contended: AtomicU64::new(CONTENDED.as_micros() as u64),
            helpers: Workers::new("gfs-pages", 1024),
            sizes: Arc::default(),
            stats: CoherenceStats::default(),
            #[cfg(test)]
            sabotage: super::tests::Sabotage::default(),
        }
    }

    #[cfg(test)]
    pub(super) fn does(&self, part: Part) -> bool {
        !self.sabotage.skips(part)
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "tests switch parts off")]
    pub(super) const fn does(&self, _part: Part) -> bool {
        true
    }

    /// The mount exists: notifications can be sent. Before that the kernel has nothing.
    pub(super) fn connect(&self, notify: Notify) {
        let has_epoch = self.clustered && notify.epoch();
        if self.clustered && !has_epoch {
            tracing::info!("the kernel has no dentry epoch (before Linux 6.16): names are not cached");
        }
        let _ = self.has_epoch.set(has_epoch);
        let _ = self.notify.set(notify);
    }

    /// The mount has gone, and with it what the kernel had and owed.
    pub(super) fn disconnect(&self) {
        self.unmounted.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_clustered(&self) -> bool {
        self.clustered
    }

    /// For how long after a demotion an inode counts as contended, and the kernel is told nothing to keep of it.
    pub fn set_contended(&self, time: Duration) {
        self.contended.store(time.as_micros() as u64, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        self.born.elapsed().as_micros() as u64 + 1
    }

    fn is_contended(&self, node: &Node) -> bool {
        let at = node.demoted_at.load(Ordering::Relaxed);
        at != 0 && self.now() - at < self.contended.load(Ordering::Relaxed)
    }

    /// See [`SETTLED`].
    fn has_settled(&self, node: &Node, attr: &Attr) -> bool {
        self.stats.attributes.fetch_add(1, Ordering::Relaxed);
        node.tell(attr, self.now()) >= SETTLED.as_micros() as u64
    }

    /// Lifetime of attributes in the reply to a GETATTR, under the inode's glock.
    pub(super) fn attr_ttl(&self, node: &Node, attr: &Attr, agreement: Agreement) -> Duration {
        if !self.clustered {
            return LONG;
        }
        if agreement == Agreement::Ignored {
            node.untell();
            return Duration::ZERO;
        }
        if !self.has_settled(node, attr) || self.is_contended(node) {
            return Duration::ZERO;
        }
        node.keeps_attributes.store(true, Ordering::Release);
        LONG
    }

    /// The same in the reply to a LOOKUP, which creates the kernel's inode (`first`), or may do so.
    pub(super) fn entry_attr_ttl(
        &self,
        node: &Node,
        attr: &Attr,
        first: bool,
        agreement: Agreement,
    ) -> Duration {
        if !self.clustered {
            return LONG;
        }
        if agreement == Agreement::Ignored {
            node.untell();
            return Duration::ZERO;
        }
        let settled = self.has_settled(node, attr);
        if !(first || settled) || self.is_contended(node) || node.is_mixed() {
            return Duration::ZERO;
        }
        node.entry_at.store(self.now(), Ordering::Release);
        node.keeps_attributes.store(true, Ordering::Release);
        LONG
    }

    /// The same in replies that the kernel installs without a sufficient check whether they are still true.
    pub(super) fn unchecked_attr_ttl(&self, node: &Node, attr: &Attr) -> Duration {
        if !self.clustered {
            return LONG;
        }
        node.tell(attr, self.now());
        Duration::ZERO
    }

    /// Lifetime of a name of directory `dir`, under the directory's glock.
    pub(super) fn name_ttl(&self, dir: &Node) -> Duration {
        if !self.clustered {
            return LONG;
        }
        if self.has_epoch.get() != Some(&true) || self.is_contended(dir) {
            return Duration::ZERO;
        }
        self.names_handed_out(dir);
        LONG
    }

    /// Names of the directory have, or may have, a lifetime from here on.
    pub(super) fn names_handed_out(&self, dir: &Node) {
        dir.names_epoch.fetch_max(self.epoch.begun.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    fn drop_attributes(&self, notify: &Notify, node: &Node, id: u64) {
        let limit = REPLY_LIMIT.as_micros() as u64;
        let owed = || {
            let at = node.entry_at.load(Ordering::Acquire);
            at != 0 && node.lookups() > 0 && self.now() - at < limit && !self.unmounted.load(Ordering::SeqCst)
        };
        let mut pause = Duration::from_micros(20);
        while notify.attributes(id) == Known::No && owed() {
            self.stats.owed.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        }
    }

    /// All names of the mount are asked for again, unless those of this directory are already.
    fn drop_names(&self, notify: &Notify, dir: &Node) {
        if dir.names_epoch.load(Ordering::SeqCst) < self.epoch.done.load(Ordering::SeqCst)
            || !self.does(Part::Names)
        {
            return;
        }
        let _step = self.epoch.step.lock();
        let epoch = self.epoch.begun.fetch_add(1, Ordering::SeqCst) + 1;
        notify.epoch();
        self.epoch.done.store(epoch, Ordering::SeqCst);
        self.stats.epochs.fetch_add(1, Ordering::Relaxed);
    }

    fn drop_pages(&self, notify: &Notify, glock: &Arc<Glock>, node: &Node, id: u64) {
        self.stats.passes.fetch_add(1, Ordering::Relaxed);
        node.traffic.pass_begins();
        let mut todo = RangeSet::all();
        loop {
            let ranges = node.traffic.without_waiting(todo);
            glock.begin_pass(STUCK);
            for range in ranges.iter() {
                let (offset, len) = range.bytes();
                if notify.pages(id, offset, len) != Known::Yes {
                    break;
                }
            }
            glock.end_pass();
            match node.traffic.pass_again() {
                Some(again) => todo = again,
                None => break,
            }
            self.stats.repeats.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The order of a WRITE against READs of the same pages, around `apply`. The caller has the inode's glock pinned in EX.
    /// `own`: the page that the WRITE may have locked: it ends with the first one that is not up to date.
    /// `misplaced`: with these pages the kernel did not put the data where they went.
    pub(super) fn ordered_write<T>(
        self: &Arc<Self>,
        glock: &Arc<Glock>,
        node: &Arc<Node>,
        ino: InodeNo,
        pages: Pages,
        own: Option<u64>,
        apply: impl FnOnce() -> Result<(T, bool)>,
    ) -> Result<T> {
        struct Opened<'a>(&'a Arc<Glock>, &'a Node, super::traffic::GateTicket);
        impl Drop for Opened<'_> {
            fn drop(&mut self) {
                self.1.traffic.open_gate(self.2);
                self.0.shut_window();
            }
        }
        let gate = node.traffic.shut_gate(pages);
        glock.open_window();
        let _opened = Opened(glock, node, gate);
        let mut is_locked = false;
        while node.traffic.settle(gate)? {
            self.stats.ordered_writes.fetch_add(1, Ordering::Relaxed);
            node.traffic.drop_begins(gate);
            if let Some(own) = own.filter(|_| !is_locked) {
                is_locked = !self.drop_own_page(node, ino, own);
            }
            // In this order: what is read of these while the drop of its own page is waited for is dropped, too.
            pages.without(own).for_each(|pages| self.drop_range(ino, pages));
        }
        let (value, misplaced) = apply()?;
        if misplaced {
            node.traffic.drop_begins(gate);
            if let Some(own) = own {
                self.drop_own_page(node, ino, own);
            }
            pages.without(own).for_each(|pages| self.drop_range(ino, pages));
        }
        Ok(value)
    }

    fn drop_range(&self, ino: InodeNo, pages: Pages) {
        let (offset, len) = pages.bytes();
        if let Some(notify) = self.notify.get() {
            notify.pages(self.nodes.id(ino), offset, len);
        }
    }

    /// False when the drop was left behind, because the WRITE itself has the page locked.
    fn drop_own_page(self: &Arc<Self>, node: &Arc<Node>, ino: InodeNo, page: u64) -> bool {
        let page = Pages::page(page);
        let errand = Arc::new(Errand::default());
        let (me, of_node, its) = (Arc::clone(self), Arc::clone(node), Arc::clone(&errand));
        self.helpers.run(move || {
            its.begins();
            me.drop_range(ino, page);
            its.done(|| of_node.traffic.left_drop_ended());
        });
        let (mut quiet, mut since) = (0, Instant::now());
        while quiet < OWN_PAGE && since.elapsed() < OWN_PAGE_BUSY {
            let asleep = Instant::now();
            if errand.wait(TICK) {
                return true;
            }
            if !errand.has_begun() || !node.traffic.is_quiet(page) {
                (quiet, since) = (0, Instant::now());
            } else if asleep.elapsed() < 2 * TICK {
                quiet += 1;
            } else {
                quiet = 0;
            }
        }
        self.stats.own_page.fetch_add(1, Ordering::Relaxed);
        errand.leave(|| node.traffic.drop_left_behind())
    }

    /// The kernel's size of a file becomes at least this. False: it did not.
    pub(super) fn make_greater(&self, ino: InodeNo, size: u64) -> bool {
        let Some(notify) = self.notify.get() else { return false };
        let known = notify.grow(self.nodes.id(ino), size);
        if known == Known::Unmounted && !self.unmounted.load(Ordering::SeqCst) {
            tracing::warn!(ino = ino.addr.0, size, err = %std::io::Error::last_os_error(), "the kernel does not take a notification of a size");
        }
        known != Known::Unmounted
    }

    /// Attributes changed without the kernel's knowledge, under the glock; at once and from any thread.
    pub(super) fn attributes_changed(&self, ino: InodeNo) {
        if let Some(notify) = self.notify.get() {
            notify.attributes(self.nodes.id(ino));
        }
    }
}

impl KernelCache for Coherence {
    fn drop_caches(&self, glock: &Arc<Glock>, from: LockState, to: LockState) {
        let GlockName { ty: GlockType::Inode, number } = glock.name() else { return };
        let Some(notify) = self.notify.get() else { return };
        // Beside the inode that is there the kernel may still know deleted ones of this block.
        for (id, node) in self.nodes.at(BlockNo(number)) {
            self.drop_caches_of(notify, &node, id, glock, from, to);
        }
    }
}

impl Coherence {
    fn drop_caches_of(
        &self,
        notify: &Notify,
        node: &Node,
        id: u64,
        glock: &Arc<Glock>,
        from: LockState,
        to: LockState,
    ) {
        if self.unmounted.load(Ordering::SeqCst) {
            return;
        }
        self.stats.demotions.fetch_add(1, Ordering::Relaxed);
        let writers = node.writers.load(Ordering::SeqCst) > 0;
        let pages = (to != LockState::Shared || writers)
            && (node.traffic.may_have_pages() || (writers && from == LockState::Exclusive));
        if to != LockState::Shared {
            node.demoted_at.store(self.now(), Ordering::Relaxed);
            node.size.lock().forget_writes();
        }
        if (to == LockState::Unlocked || pages)
            && node.keeps_attributes.swap(false, Ordering::AcqRel)
            && self.does(Part::Attributes)
        {
            self.drop_attributes(notify, node, id);
        }
        if to != LockState::Shared {
            self.drop_names(notify, node);
        }
        if pages && self.does(Part::Pages) {
            self.drop_pages(notify, glock, node, id);
        }
    }
}
