//! Resource groups: who may use which block.
//!
//! An allocation first takes a [`Reservation`]: the group's glock EX (shared with other allocators of this node) and a claim
//! on so many of its free blocks, so that inside the transaction nothing waits and nothing runs out. Freeing takes the groups of
//! the blocks the same way. The glocks of one reservation are taken in ascending order.
//!
//! Invariants: a block that was freed is not given out before the flush that frees it is durable (`allocatable` leaves it out
//! until then); a change of state that the format does not know is corruption, found before anything is changed; the group's header,
//! its bitmap, this node's statfs deltas and the value block change in the same transaction.
//!
//! Policy: the goal's group first, then groups that this node already holds or that are its own by index (index ≡ journal id
//! modulo journals), so that nodes stay out of each other's way; then any that is free to take; then any.

use crate::cache::{Buf, MetaCache};
use crate::disk::Disk;
use crate::geometry::Geometry;
use crate::glock::{AcquireFlags, Glock, Glocks, Holder};
use crate::journal::log::{FlushReason, Log};
use crate::lockspace::{GlockName, GlockType, LockState};
use crate::ondisk::bitmap::{self, BlockState};
use crate::ondisk::header::MetaType;
use crate::ondisk::lvb::RgrpLvb;
use crate::ondisk::rgrp::{RGF_NOALLOC, RGF_TRIMMED, Rgrp as Header};
use crate::ondisk::rindex::RindexEntry;
use crate::trans::Trans;
use crate::{BlockNo, Error, JournalId, Result};
use freemap::FreeMap;
use parking_lot::{Mutex, MutexGuard, RwLock};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

mod freemap;
mod pick;
#[cfg(test)]
mod tests;

/// A run of blocks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Extent {
    pub start: BlockNo,
    pub len: u32,
}

/// What a group is known to hold while its glock is.
struct Loaded {
    /// The RG block and the RB blocks.
    bufs: Vec<Buf>,
    header: Header,
    /// Free blocks that may be given out now.
    allocatable: FreeMap,
    unlinked: u32,
    /// Where the last allocation ended.
    next: u32,
}

#[derive(Default)]
struct GroupState {
    loaded: Option<Loaded>,
    /// Counts loads, so that what a durable flush gives back is not put into a later one.
    load: u64,
    /// Blocks promised to reservations.
    claimed: u32,
}

/// One resource group of the mount.
pub struct Group {
    index: usize,
    entry: RindexEntry,
    /// Header of the next group, for `rg_skip`; 0 in the last one.
    next_addr: AtomicU64,
    glock: Arc<Glock>,
    state: Mutex<GroupState>,
    /// Free blocks when last seen: a hint, never trusted.
    free_hint: AtomicU32,
    /// Blocks freed by flushes not yet durable.
    pending: AtomicU32,
    /// May hold UNLINKED dinodes.
    unlinked_hint: AtomicU32,
}

struct Shared {
    geo: Geometry,
    disk: Arc<Disk>,
    cache: Arc<MetaCache>,
    glocks: Arc<Glocks>,
    log: Arc<Log>,
    jid: JournalId,
    journals: u32,
    table: RwLock<Arc<[Arc<Group>]>>,
    /// The table must be read again (the rindex glock was given up).
    stale: AtomicBool,
    /// Group of the last allocation.
    last: AtomicUsize,
}

/// All resource groups of a mounted volume.
#[derive(Clone)]
pub struct Rgrps(Arc<Shared>);

/// The glocks of some groups, EX, and a claim on blocks of one of them. Outlives the transaction that uses it.
pub struct Reservation {
    shared: Arc<Shared>,
    held: Vec<Held>,
    /// Index in `held` of the group that gives blocks.
    from: Option<usize>,
    claim: Cell<u32>,
    /// Last block allocated near, or wanted near.
    goal: Cell<BlockNo>,
    /// A block of the claim that was set aside for the dinode: load of the group, and place in it.
    picked: Cell<Option<(u64, u32)>>,
}

struct Held {
    group: Arc<Group>,
    holder: Holder,
    changed: Cell<bool>,
}

fn rgrp_name(addr: u64) -> GlockName {
    GlockName { ty: GlockType::Rgrp, number: addr }
}

impl Group {
    pub fn entry(&self) -> &RindexEntry {
        &self.entry
    }

    fn loaded(&self) -> Result<parking_lot::MappedMutexGuard<'_, Loaded>> {
        MutexGuard::try_map(self.state.lock(), |s| s.loaded.as_mut()).map_err(|_| self.unread())
    }

    fn unread(&self) -> Error {
        corrupt(self.entry.addr, "resource group used without having been read".to_owned())
    }

    /// Reads header and bitmap, under the glock.
    fn load(&self, s: &Shared) -> Result<()> {
        let mut st = self.state.lock();
        if st.loaded.is_some() {
            return Ok(());
        }
        let addr = self.entry.addr;
        let blocks: Vec<BlockNo> = (0..u64::from(self.entry.length)).map(|i| BlockNo(addr + i)).collect();
        if blocks.len() > 1 {
            s.cache.prefetch(&self.glock, &blocks);
        }
        let mut bufs = Vec::with_capacity(blocks.len());
        for (i, &b) in blocks.iter().enumerate() {
            let ty = if i == 0 { MetaType::Rgrp } else { MetaType::RgrpBitmap };
            bufs.push(s.cache.read(&self.glock, b, ty)?);
        }
        let mut header = bufs[0].with(Header::decode).map_err(|e| e.at(BlockNo(addr)))?;
        let mut allocatable = FreeMap::new(self.entry.data);
        let mut counts = [0u64; 4];
        for (buf, part) in bufs.iter().zip(self.entry.parts(&s.geo)) {
            buf.with(|b| {
                let bits = &b[part.offset..part.offset + part.bytes];
                for (sum, n) in counts.iter_mut().zip(bitmap::count(bits)) {
                    *sum += n;
                }
                allocatable.set_from_bitmap(part.first, bits);
            });
        }
        let (free, unlinked) = (counts[0] as u32, counts[BlockState::Unlinked as usize] as u32);
        let dinodes = counts[BlockState::Dinode as usize] as u32 + unlinked;
        if (header.free, header.dinodes) != (free, dinodes) {
            tracing::warn!(fs = %s.disk.name(), blk = addr,
                "resource group counts {} free blocks and {} dinodes, its bitmap {free} and {dinodes}: the bitmap is used",
                header.free, header.dinodes);
            (header.free, header.dinodes) = (free, dinodes);
        }
        self.free_hint.store(free, Ordering::Relaxed);
        self.unlinked_hint.store(unlinked, Ordering::Relaxed);
        self.pending.store(0, Ordering::Relaxed);
        st.load += 1;
        st.loaded = Some(Loaded { bufs, header, allocatable, unlinked, next: 0 });
        Ok(())
    }

    fn forget(&self) {
        let mut st = self.state.lock();
        assert!(
            st.claimed == 0,
            "resource group {} given up with {} blocks claimed",
            self.entry.addr,
            st.claimed
        );
        st.loaded = None;
        st.load += 1;
        self.pending.store(0, Ordering::Relaxed);
    }

    fn claim(&self, n: u32) -> bool {
        let mut st = self.state.lock();
        let Some(l) = &st.loaded else { return false };
        let open = l.allocatable.count().saturating_sub(st.claimed);
        self.free_hint.store(open, Ordering::Relaxed);
        if l.header.flags & RGF_NOALLOC != 0 || open < n {
            return false;
        }
        st.claimed += n;
        true
    }

    /// Blocks freed in a flush that is durable now.
    fn give_back(&self, load: u64, first: u32, n: u32) {
        let mut st = self.state.lock();
        if st.load != load {
            return;
        }
        if let Some(l) = &mut st.loaded {
            l.allocatable.add(first, n);
            self.free_hint.store(l.allocatable.count().saturating_sub(st.claimed), Ordering::Relaxed);
            self.pending.fetch_sub(n, Ordering::Relaxed);
        }
    }
}

impl Loaded {
    fn state(&self, s: &Shared, e: &RindexEntry, k: u32) -> BlockState {
        let (i, at) = e.locate(&s.geo, k);
        let part = e.part(&s.geo, i);
        self.bufs[i as usize].with(|b| bitmap::get(&b[part.offset..part.offset + part.bytes], at))
    }

    /// The first of `n` blocks from `k` on that is not in this state: its address and state.
    fn first_other(
        &self,
        s: &Shared,
        e: &RindexEntry,
        k: u32,
        n: u32,
        state: BlockState,
    ) -> Option<(u64, BlockState)> {
        let (mut k, end) = (k, k + n);
        while k < end {
            let (i, at) = e.locate(&s.geo, k);
            let part = e.part(&s.geo, i);
            let stop = (part.bytes * 4).min(at + (end - k) as usize);
            let found = self.bufs[i as usize].with(|b| {
                let bits = &b[part.offset..part.offset + part.bytes];
                let run = bitmap::run(bits, at, stop, state);
                (at + run < stop).then(|| (run as u32, bitmap::get(bits, at + run)))
            });
            if let Some((run, other)) = found {
                return Some((e.data0 + u64::from(k + run), other));
            }
            k += (stop - at) as u32;
        }
        None
    }

    /// Sets `n` blocks from `k` on; their old states have been checked.
    fn set(&self, s: &Shared, e: &RindexEntry, trans: &Trans, k: u32, n: u32, to: BlockState) {
        let mut k = k;
        let end = k + n;
        while k < end {
            let (i, at) = e.locate(&s.geo, k);
            let part = e.part(&s.geo, i);
            let here = (part.bytes * 4 - at).min((end - k) as usize);
            let mut b = trans.modify(&self.bufs[i as usize]);
            let bits = &mut b[part.offset..part.offset + part.bytes];
            for j in at..at + here {
                bitmap::set(bits, j, to);
            }
            k += here as u32;
        }
    }

    fn write_header(&mut self, g: &Group, jid: JournalId, trans: &Trans) {
        let (h, e) = (&mut self.header, &g.entry);
        match g.next_addr.load(Ordering::Relaxed) {
            0 => {}
            next => h.skip = (next - e.addr) as u32,
        }
        (h.data0, h.data, h.bitbytes) = (e.data0, e.data, e.bitbytes);
        // the checksum covers the journal id that the log would put in
        h.jid = jid.0;
        h.encode(&mut trans.modify(&self.bufs[0]));
    }

    fn lvb(&self) -> RgrpLvb {
        RgrpLvb {
            flags: self.header.flags,
            free: self.header.free,
            dinodes: self.header.dinodes,
            igeneration: self.header.igeneration,
            unlinked: self.unlinked,
        }
    }
}

impl Rgrps {
    /// `entries` as read and validated from the rindex.
    pub(crate) fn new(
        disk: Arc<Disk>,
        cache: Arc<MetaCache>,
        glocks: Arc<Glocks>,
        log: Arc<Log>,
        journals: u32,
        entries: &[RindexEntry],
    ) -> Result<Self> {
        let shared = Shared {
            geo: disk.geometry(),
            jid: log.jid(),
            disk,
            cache,
            glocks,
            log,
            journals: journals.max(1),
            table: RwLock::new(Arc::from(Vec::new())),
            stale: AtomicBool::new(false),
            last: AtomicUsize::new(usize::MAX),
        };
        let rgrps = Self(Arc::new(shared));
        rgrps.set_table(entries)?;
        Ok(rgrps)
    }

    /// Takes over the table; groups that were known keep what is loaded.
    /// Errors: `Corrupt` when a known group is not what it was (a volume only ever grows at its end).
    pub(crate) fn set_table(&self, entries: &[RindexEntry]) -> Result<()> {
        let s = &self.0;
        let mut table = s.table.write();
        if let Some(g) = table.iter().find(|g| entries.get(g.index) != Some(&g.entry)) {
            return Err(corrupt(g.entry.addr, "resource group has gone from the rindex".to_owned()));
        }
        let groups: Vec<Arc<Group>> = entries
            .iter()
            .enumerate()
            .map(|(index, entry)| {
                let next_addr = entries.get(index + 1).map_or(0, |e| e.addr);
                if let Some(g) = table.get(index) {
                    g.next_addr.store(next_addr, Ordering::Relaxed);
                    return Arc::clone(g);
                }
                Arc::new(Group {
                    index,
                    entry: *entry,
                    next_addr: AtomicU64::new(next_addr),
                    glock: s.glocks.get(rgrp_name(entry.addr)),
                    state: Mutex::default(),
                    free_hint: AtomicU32::new(u32::MAX),
                    pending: AtomicU32::new(0),
                    unlinked_hint: AtomicU32::new(u32::MAX),
                })
            })
            .collect();
        *table = Arc::from(groups);
        s.stale.store(false, Ordering::Release);
        Ok(())
    }

    pub(crate) fn is_stale(&self) -> bool {
        self.0.stale.load(Ordering::Acquire)
    }

    pub(crate) fn mark_stale(&self) {
        self.0.stale.store(true, Ordering::Release);
    }

    pub fn groups(&self) -> Arc<[Arc<Group>]> {
        Arc::clone(&self.0.table.read())
    }

    /// Sum of the data blocks of all groups.
    pub fn total_blocks(&self) -> u64 {
        self.groups().iter().map(|g| u64::from(g.entry.data)).sum()
    }

    /// The group whose data blocks include `block`.
    pub fn group_of(&self, block: BlockNo) -> Option<Arc<Group>> {
        let table = self.0.table.read();
        let at = table.partition_point(|g| g.entry.end() <= block.0);
        table.get(at).filter(|g| g.entry.contains(block.0)).cloned()
    }

    fn by_addr(&self, addr: u64) -> Option<Arc<Group>> {
        let table = self.0.table.read();
        let at = table.partition_point(|g| g.entry.addr < addr);
        table.get(at).filter(|g| g.entry.addr == addr).cloned()
    }

    /// Hook of the glock layer: first use after the glock was taken anew.
    pub(crate) fn instantiate(&self, glock: &Glock) -> Result<()> {
        match self.by_addr(glock.name().number) {
            Some(group) => group.load(&self.0),
            None => Ok(()),
        }
    }

    /// Hook of the glock layer: the glock is given up, everything is in place.
    pub(crate) fn forget(&self, glock: &Glock) {
        if let Some(group) = self.by_addr(glock.name().number) {
            group.forget();
        }
    }

    /// Claims `want` blocks (at least `min`; at most as many as one group has) near `goal`. Takes the group's glock.
    /// Errors: `ENOSPC`, after trying every group and making freed blocks usable by a flush; `WouldBlock` on a no-wait thread.
    pub fn reserve(&self, goal: BlockNo, want: u32, min: u32) -> Result<Reservation> {
        self.reserve_touching(goal, want, min, &[])
    }

    /// As [`Self::reserve`], and holds the groups of `touch` too: for operations that allocate and free (or unlink) at once.
    pub fn reserve_touching(
        &self,
        goal: BlockNo,
        want: u32,
        min: u32,
        touch: &[BlockNo],
    ) -> Result<Reservation> {
        assert!(min <= want && want > 0, "a reservation of {min} to {want} blocks");
        let s = &self.0;
        if s.disk.is_read_only() {
            return Err(Error::Errno(libc::EROFS));
        }
        let touch = self.groups_of(touch)?;
        let table = self.groups();
        if table.is_empty() {
            return Err(Error::Errno(libc::ENOSPC));
        }
        let start = self.group_of(goal).map_or_else(|| self.default_start(&table), |g| g.index);
        let order = || (0..table.len()).map(|i| &table[(start + i) % table.len()]);

        for group in order() {
            let ours = group.glock.state() == LockState::Exclusive;
            let preferred = group.index as u32 % s.journals == s.jid.0 % s.journals || group.index == start;
            if (ours || preferred)
                && group.free_hint.load(Ordering::Relaxed) >= want
                && let Some(r) = self.try_group(group, &touch, AcquireFlags::TRY, want, goal)?
            {
                return Ok(r);
            }
        }
        for group in order() {
            if group.free_hint.load(Ordering::Relaxed) >= want
                && let Some(r) = self.try_group(group, &touch, AcquireFlags::TRY_1CB, want, goal)?
            {
                return Ok(r);
            }
        }
        // for `want`, then for less; blocks freed lately become usable in between
        for n in [want, (want / 4).max(min), min] {
            for group in order() {
                if let Some(r) = self.try_group(group, &touch, AcquireFlags::NONE, n, goal)? {
                    return Ok(r);
                }
            }
            if table.iter().any(|g| g.pending.load(Ordering::Relaxed) > 0) {
                s.log.flush(FlushReason::AllocationRetry)?;
                for group in order() {
                    if let Some(r) = self.try_group(group, &touch, AcquireFlags::NONE, n, goal)? {
                        return Ok(r);
                    }
                }
            }
        }
        Err(Error::Errno(libc::ENOSPC))
    }

    fn default_start(&self, table: &[Arc<Group>]) -> usize {
        match self.0.last.load(Ordering::Relaxed) {
            usize::MAX => self.0.jid.0 as usize % self.0.journals as usize % table.len(),
            last => last % table.len(),
        }
    }

    /// `None`: not available this way.
    fn try_group(
        &self,
        group: &Arc<Group>,
        touch: &[Arc<Group>],
        how: AcquireFlags,
        want: u32,
        goal: BlockNo,
    ) -> Result<Option<Reservation>> {
        let held = match self.hold(group, touch, how) {
            Ok(held) => held,
            Err(Error::Errno(libc::EAGAIN)) => return Ok(None),
            Err(e) => return Err(e),
        };
        if !group.claim(want) {
            return Ok(None);
        }
        self.0.last.store(group.index, Ordering::Relaxed);
        let from = held.iter().position(|h| Arc::ptr_eq(&h.group, group));
        Ok(Some(Reservation {
            shared: Arc::clone(&self.0),
            held,
            from,
            claim: Cell::new(want),
            picked: Cell::default(),
            goal: Cell::new(goal),
        }))
    }

    fn hold(&self, group: &Arc<Group>, touch: &[Arc<Group>], how: AcquireFlags) -> Result<Vec<Held>> {
        let mut all: Vec<&Arc<Group>> = touch.iter().collect();
        if !touch.iter().any(|g| Arc::ptr_eq(g, group)) {
            all.push(group);
            all.sort_by_key(|g| g.index);
        }
        all.into_iter()
            .map(|g| {
                let how = if Arc::ptr_eq(g, group) { how } else { AcquireFlags::NONE };
                self.hold_one(g, how)
            })
            .collect()
    }

    fn hold_one(&self, group: &Arc<Group>, how: AcquireFlags) -> Result<Held> {
        let flags = how | AcquireFlags::NODE_SCOPE;
        let holder = self.0.glocks.acquire_on(&group.glock, LockState::Exclusive, flags)?;
        // a group that joined the table after its glock was first held has not been read by the hook
        group.load(&self.0)?;
        Ok(Held { group: Arc::clone(group), holder, changed: Cell::new(false) })
    }

    fn groups_of(&self, blocks: &[BlockNo]) -> Result<Vec<Arc<Group>>> {
        let mut groups = Vec::with_capacity(blocks.len());
        for &block in blocks {
            groups.push(self.group_of(block).ok_or_else(|| outside(block))?);
        }
        groups.sort_by_key(|g| g.index);
        groups.dedup_by_key(|g| g.index);
        Ok(groups)
    }

    /// Holds the groups of these blocks, for freeing or unlinking them; claims nothing.
    pub fn lock_for(&self, blocks: &[BlockNo]) -> Result<Reservation> {
        let groups = self.groups_of(blocks)?;
        let mut held = Vec::with_capacity(groups.len());
        for g in &groups {
            held.push(self.hold_one(g, AcquireFlags::NONE)?);
        }
        let shared = Arc::clone(&self.0);
        Ok(Reservation {
            shared,
            held,
            from: None,
            claim: Cell::new(0),
            goal: Cell::default(),
            picked: Cell::default(),
        })
    }

    /// State of one block, read under the group's glock SH.
    pub fn block_state(&self, block: BlockNo) -> Result<BlockState> {
        let group = self.group_of(block).ok_or_else(|| outside(block))?;
        let _holder = self.0.glocks.acquire_on(&group.glock, LockState::Shared, AcquireFlags::NONE)?;
        group.load(&self.0)?;
        let l = group.loaded()?;
        Ok(l.state(&self.0, &group.entry, (block.0 - group.entry.data0) as u32))
    }

    /// UNLINKED dinodes of one group; `None` when somebody has its glock.
    pub fn unlinked_in(&self, group: &Arc<Group>) -> Result<Option<Vec<BlockNo>>> {
        let how = AcquireFlags::TRY | AcquireFlags::SETTLED;
        let holder = self.0.glocks.acquire_on(&group.glock, LockState::Shared, how);
        let _holder = match holder {
            Err(Error::Errno(libc::EAGAIN)) => return Ok(None),
            other => other?,
        };
        group.load(&self.0)?;
        let l = group.loaded()?;
        let mut found = Vec::new();
        if l.unlinked > 0 {
            for (buf, part) in l.bufs.iter().zip(group.entry.parts(&self.0.geo)) {
                let content = buf.read();
                let bits = &content[part.offset..part.offset + part.bytes];
                let mut k = 0;
                while let Some(at) = bitmap::find(bits, k, bits.len() * 4, BlockState::Unlinked) {
                    found.push(BlockNo(group.entry.data0 + u64::from(part.first) + at as u64));
                    k = at + 1;
                }
            }
        }
        Ok(Some(found))
    }
}

fn corrupt(block: u64, what: String) -> Error {
    Error::Corrupt { block: BlockNo(block), what }
}

fn outside(block: BlockNo) -> Error {
    Error::Corrupt { block, what: "address outside every resource group".to_owned() }
}

impl Reservation {
    /// Blocks claimed and not yet used.
    pub fn left(&self) -> u32 {
        self.claim.get()
    }

    /// Metadata blocks that allocating and freeing so many blocks may change, for `TransSize`: headers, bitmap blocks, statfs.
    pub fn trans_blocks(&self, allocs: u32, frees: u32) -> u32 {
        let groups: u32 =
            self.held.iter().map(|h| h.group.entry.length.min(1 + allocs.saturating_add(frees))).sum();
        groups + 1
    }

    /// The group that gives blocks.
    pub fn group(&self) -> Option<&Arc<Group>> {
        self.from.map(|i| &self.held[i].group)
    }

    /// Where the search begins, instead of the reservation's goal.
    pub fn set_goal(&self, goal: BlockNo) {
        self.goal.set(goal);
    }

    fn giver(&self) -> &Held {
        &self.held[self.from.expect("allocation from a reservation that claims nothing")]
    }

    fn held_for(&self, block: BlockNo) -> Result<&Held> {
        self.held.iter().find(|h| h.group.entry.contains(block.0)).ok_or_else(|| Error::Corrupt {
            block,
            what: "freed without its resource group being held".to_owned(),
        })
    }

    /// Takes a run of 1 to `n` blocks out of the claim, state USED. The caller asks again for the rest.
    pub fn alloc_blocks(&self, trans: &Trans, n: u32) -> Result<Extent> {
        let extent = self.take(trans, n, BlockState::Used, |_| ())?.0;
        trans.statfs(-i64::from(extent.len), 0);
        Ok(extent)
    }

    /// Takes one block as a dinode, the picked one if there is one. The number is its generation and its formal inode number.
    pub fn alloc_dinode(&self, trans: &Trans) -> Result<(BlockNo, u64)> {
        let (extent, generation) = self.take(trans, 1, BlockState::Dinode, |header| {
            // 0 is no inode number
            let generation = header.igeneration.max(1);
            header.igeneration = generation + 1;
            header.dinodes += 1;
            generation
        })?;
        trans.statfs(-1, 1);
        Ok((extent.start, generation))
    }

    fn take<T>(
        &self,
        trans: &Trans,
        n: u32,
        to: BlockState,
        update: impl FnOnce(&mut Header) -> T,
    ) -> Result<(Extent, T)> {
        let n = n.min(self.claim.get());
        assert!(n > 0, "allocation beyond the reservation");
        let h = self.giver();
        let (s, g) = (&*self.shared, &*h.group);
        let mut guard = g.state.lock();
        let l = guard.loaded.as_mut().ok_or_else(|| g.unread())?;
        let goal = self.goal.get().0;
        let from = if g.entry.contains(goal) { (goal - g.entry.data0) as u32 + 1 } else { l.next };
        let picked = if to == BlockState::Dinode { self.picked.take() } else { None };
        let (k, len) = match picked {
            Some((_, k)) => (k, 1),
            None => l
                .allocatable
                .find_run(from, n)
                .ok_or_else(|| corrupt(g.entry.addr, "fewer free blocks than were claimed".to_owned()))?,
        };
        if let Some((block, state)) = l.first_other(s, &g.entry, k, len, BlockState::Free) {
            return Err(corrupt(block, format!("{state:?} in the bitmap although taken as free")));
        }
        h.changed.set(true);
        if picked.is_none() {
            l.allocatable.remove(k, len);
        }
        l.set(s, &g.entry, trans, k, len, to);
        l.header.free -= len;
        let more = update(&mut l.header);
        l.next = (k + len) % g.entry.data;
        l.write_header(g, self.shared.jid, trans);
        guard.claimed -= len;
        drop(guard);
        self.claim.set(self.claim.get() - len);
        let start = BlockNo(g.entry.data0 + u64::from(k));
        self.goal.set(BlockNo(start.0 + u64::from(len) - 1));
        Ok((Extent { start, len }, more))
    }

    /// Errors: `Corrupt` unless the bitmap calls this block of a held group a dinode.
    pub fn require_dinode(&self, block: BlockNo) -> Result<()> {
        let g = &*self.held_for(block)?.group;
        let state = g.loaded()?.state(&self.shared, &g.entry, (block.0 - g.entry.data0) as u32);
        match state {
            BlockState::Dinode => Ok(()),
            _ => Err(corrupt(block.0, format!("a dinode, but {state:?} in the bitmap"))),
        }
    }

    /// The dinode's last link is gone: DINODE → UNLINKED. Nothing is freed yet.
    pub fn unlink_dinode(&self, trans: &Trans, block: BlockNo) -> Result<()> {
        let h = self.held_for(block)?;
        let g = &*h.group;
        let mut l = g.loaded()?;
        let k = (block.0 - g.entry.data0) as u32;
        let state = l.state(&self.shared, &g.entry, k);
        if state != BlockState::Dinode {
            return Err(corrupt(block.0, format!("unlinked dinode is {state:?} in the bitmap")));
        }
        h.changed.set(true);
        l.set(&self.shared, &g.entry, trans, k, 1, BlockState::Unlinked);
        l.unlinked += 1;
        g.unlinked_hint.store(l.unlinked, Ordering::Relaxed);
        l.write_header(g, self.shared.jid, trans);
        Ok(())
    }

    /// Frees blocks in state USED. Copies of them in the log are revoked, cached buffers dropped.
    pub fn free_blocks(&self, trans: &Trans, extent: Extent) -> Result<()> {
        self.release(trans, extent, &[BlockState::Used], |l, n, _| l.header.free += n)?;
        trans.statfs(i64::from(extent.len), 0);
        Ok(())
    }

    /// The dinode itself goes: UNLINKED (or DINODE, when a creation fails) → FREE.
    pub fn free_dinode(&self, trans: &Trans, block: BlockNo) -> Result<()> {
        let extent = Extent { start: block, len: 1 };
        self.release(trans, extent, &[BlockState::Unlinked, BlockState::Dinode], |l, _, was| {
            l.header.free += 1;
            l.header.dinodes = l.header.dinodes.saturating_sub(1);
            if was == BlockState::Unlinked {
                l.unlinked = l.unlinked.saturating_sub(1);
            }
        })?;
        trans.statfs(1, -1);
        Ok(())
    }

    fn release(
        &self,
        trans: &Trans,
        extent: Extent,
        from: &[BlockState],
        count: impl FnOnce(&mut Loaded, u32, BlockState),
    ) -> Result<()> {
        let h = self.held_for(extent.start)?;
        let g = &h.group;
        if extent.len == 0 || extent.start.0 + u64::from(extent.len) > g.entry.end() {
            return Err(corrupt(extent.start.0, format!("freeing {} blocks leaves the group", extent.len)));
        }
        let k = (extent.start.0 - g.entry.data0) as u32;
        let mut guard = g.state.lock();
        let load = guard.load;
        let l = guard.loaded.as_mut().ok_or_else(|| g.unread())?;
        let was = l.state(&self.shared, &g.entry, k);
        if !from.contains(&was) {
            return Err(corrupt(extent.start.0, format!("freed although {was:?} in the bitmap")));
        }
        if let Some((block, state)) = l.first_other(&self.shared, &g.entry, k, extent.len, was) {
            return Err(corrupt(
                block,
                format!("freed with {was:?} blocks although {state:?} in the bitmap"),
            ));
        }
        h.changed.set(true);
        l.set(&self.shared, &g.entry, trans, k, extent.len, BlockState::Free);
        l.header.flags &= !RGF_TRIMMED;
        count(l, extent.len, was);
        g.unlinked_hint.store(l.unlinked, Ordering::Relaxed);
        l.write_header(g, self.shared.jid, trans);
        g.pending.fetch_add(extent.len, Ordering::Relaxed);
        drop(guard);
        for i in 0..u64::from(extent.len) {
            trans.revoke(BlockNo(extent.start.0 + i));
        }
        let (group, n) = (Arc::clone(g), extent.len);
        trans.on_durable(Box::new(move || group.give_back(load, k, n)));
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        for (i, h) in self.held.iter().enumerate() {
            let mut st = h.group.state.lock();
            if self.from == Some(i) {
                st.claimed -= self.claim.get();
                if let Some((load, k)) = self.picked.get()
                    && st.load == load
                    && let Some(l) = &mut st.loaded
                {
                    l.allocatable.add(k, 1);
                }
            }
            if h.changed.get()
                && let Some(l) = &st.loaded
            {
                h.holder.set_lvb(l.lvb().encode());
            }
        }
    }
}
