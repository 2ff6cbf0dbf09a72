//! Metadata buffers of one mount, owned by glocks.
//!
//! A [`Buf`] is the one in-memory copy of a block on this node. Its content is an `Arc` that is replaced on write while
//! someone else still looks at the old one, so a log flush takes snapshots for the price of a reference count, and a
//! reader never holds a lock: [`Buf::read`] gives a frozen picture.
//!
//! Invariants. A block is cached under one glock only, and only while that glock is held in a state that allows it:
//! [`MetaCache::drop_glock`] is part of giving it up. A buffer that the log still needs (pinned, in a running flush, not
//! yet written in place) is never evicted: the log holds a reference, and only buffers that nobody refers to go.
//! For every block the cache remembers the flush that last logged it, also after its content was evicted: while that copy
//! is in the live part of the journal, giving up the glock must revoke it.
//!
//! Journaled file data (JDATA regular files, the quota file) lives here too: [`MetaCache::read_data`], no header, no type.

use crate::disk::Disk;
use crate::glock::Glock;
use crate::lockspace::GlockName;
use crate::ondisk::header::{MetaHeader, MetaType};
use crate::{BlockNo, Error, Result};
use lun::aligned::AlignedBuf;
use parking_lot::{MappedRwLockWriteGuard, Mutex, RwLock, RwLockWriteGuard};
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Content of one block at one moment.
pub type Content = Arc<AlignedBuf>;

const SHARDS: usize = 64;
/// Entries looked at for each insertion into a full cache.
const EVICT_STEPS: usize = 8;

/// One cached block. Clones share it.
#[derive(Clone)]
pub struct Buf(Arc<Inner>);

struct Inner {
    block: BlockNo,
    gl: GlockName,
    /// Journaled file data: no metadata header, logged with escaping.
    is_data: bool,
    content: RwLock<Content>,
    /// In the set that the next flush will log.
    pinned: AtomicBool,
    /// Thrown out of the cache while somebody kept the handle: must not be changed any more.
    stale: AtomicBool,
    recently_used: AtomicBool,
}

/// A block's bytes, writable. Obtained from `Trans::modify`; holds the buffer's content lock, so keep it short and never
/// start a transaction, wait, or take another buffer's that somebody may hold the other way round.
pub struct BufMut<'a>(MappedRwLockWriteGuard<'a, [u8]>);

impl Buf {
    pub fn block(&self) -> BlockNo {
        self.0.block
    }

    pub fn glock(&self) -> GlockName {
        self.0.gl
    }

    pub fn is_data(&self) -> bool {
        self.0.is_data
    }

    /// The content as of now. Later changes do not show in it.
    pub fn read(&self) -> Content {
        Arc::clone(&self.0.content.read())
    }

    /// Runs `f` on the content without taking a reference: for the shortest looks.
    pub fn with<T>(&self, f: impl FnOnce(&[u8]) -> T) -> T {
        f(&self.0.content.read())
    }

    pub fn is_pinned(&self) -> bool {
        self.0.pinned.load(Ordering::Acquire)
    }

    /// True for the caller that pinned it.
    pub(crate) fn pin(&self) -> bool {
        !self.0.pinned.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn unpin(&self) {
        self.0.pinned.store(false, Ordering::Release);
    }

    /// Only for the transaction layer: everybody else goes through `Trans::modify`.
    pub(crate) fn write(&self) -> BufMut<'_> {
        assert!(
            !self.0.stale.load(Ordering::Acquire),
            "block {}: changed after its glock {} was given up",
            self.0.block,
            self.0.gl
        );
        BufMut(RwLockWriteGuard::map(self.0.content.write(), |c| &mut **Arc::make_mut(c)))
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} of {})", self.0.block, self.0.gl)
    }
}

impl Deref for BufMut<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}
impl DerefMut for BufMut<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

struct Entry {
    buf: Option<Buf>,
    gl: GlockName,
    /// Sequence number of the last flush with a copy of this block; 0 = none.
    logged: u64,
}

#[derive(Default)]
struct Shard {
    entries: FxHashMap<u64, Entry>,
    /// Second-chance queue of the entries; may hold blocks that are gone.
    queue: VecDeque<u64>,
}

pub struct MetaCache {
    disk: Arc<Disk>,
    shards: Vec<Mutex<Shard>>,
    by_glock: Vec<Mutex<FxHashMap<GlockName, FxHashSet<u64>>>>,
    /// Blocks each shard may keep before it looks for something to evict.
    shard_capacity: usize,
    buffers: AtomicUsize,
    /// Copies logged by flushes before this one lie before the journal's tail.
    tail_sequence: AtomicU64,
}

fn mix(n: u64) -> usize {
    (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 48) as usize
}

impl MetaCache {
    /// `capacity` in blocks; what the log needs may exceed it.
    pub fn new(disk: Arc<Disk>, capacity: usize) -> Self {
        Self {
            disk,
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            by_glock: (0..SHARDS).map(|_| Mutex::default()).collect(),
            shard_capacity: capacity.div_ceil(SHARDS).max(4),
            buffers: AtomicUsize::new(0),
            tail_sequence: AtomicU64::new(0),
        }
    }

    fn shard(&self, block: u64) -> &Mutex<Shard> {
        &self.shards[mix(block) % SHARDS]
    }

    fn glock_set(&self, gl: GlockName) -> &Mutex<FxHashMap<GlockName, FxHashSet<u64>>> {
        &self.by_glock[mix(gl.number ^ ((gl.ty as u64) << 56)) % SHARDS]
    }

    /// Blocks that the cache keeps when nobody needs them.
    pub fn capacity(&self) -> usize {
        self.shard_capacity * SHARDS
    }

    /// Buffers in memory.
    pub fn len(&self) -> usize {
        self.buffers.load(Ordering::Relaxed)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The block as metadata of type `ty`.
    /// Errors: `Corrupt` naming the block when it is something else, or when another glock's cache holds it already
    /// (two owners of one block); `WouldBlock` on a no-wait thread that would have to read the disk.
    pub fn read(&self, gl: &Arc<Glock>, block: BlockNo, ty: MetaType) -> Result<Buf> {
        self.read_one_of(gl, block, &[ty])
    }

    /// The block as metadata of one of these types.
    pub fn read_one_of(&self, gl: &Arc<Glock>, block: BlockNo, types: &[MetaType]) -> Result<Buf> {
        self.read_named(gl.name(), block, types)
    }

    pub(crate) fn read_named(&self, gl: GlockName, block: BlockNo, types: &[MetaType]) -> Result<Buf> {
        let buf = match self.lookup(gl, block, false)? {
            Some(buf) => buf,
            None => self.load(gl, block, false, |b| check_type(b, types, block))?,
        };
        buf.with(|b| check_type(b, types, block))?;
        Ok(buf)
    }

    /// The block as journaled file data: no type.
    pub fn read_data(&self, gl: &Arc<Glock>, block: BlockNo) -> Result<Buf> {
        match self.lookup(gl.name(), block, true)? {
            Some(buf) => Ok(buf),
            None => self.load(gl.name(), block, true, |_| Ok(())),
        }
    }

    /// A zero-filled buffer for a block that has just been allocated; the disk is not read. The caller writes a metadata
    /// header into it within the transaction that adds it.
    pub fn new_block(&self, gl: &Arc<Glock>, block: BlockNo) -> Result<Buf> {
        self.fresh(gl.name(), block, false)
    }

    /// As [`Self::new_block`], for journaled file data.
    pub fn new_data(&self, gl: &Arc<Glock>, block: BlockNo) -> Result<Buf> {
        self.fresh(gl.name(), block, true)
    }

    /// Reads those blocks that are not cached, in one batch. A hint: what fails here fails again, with its error, when
    /// it is asked for by type.
    pub fn prefetch(&self, gl: &Arc<Glock>, blocks: &[BlockNo]) {
        let missing: Vec<BlockNo> = blocks
            .iter()
            .copied()
            .filter(|b| self.shard(b.0).lock().entries.get(&b.0).is_none_or(|e| e.buf.is_none()))
            .collect();
        if missing.is_empty() || may_not_wait() {
            return;
        }
        let bsize = self.disk.geometry().block_size as usize;
        let mut bufs: Vec<AlignedBuf> = missing.iter().map(|_| AlignedBuf::zeroed(bsize)).collect();
        let mut runs: Vec<(BlockNo, &mut [u8])> =
            missing.iter().copied().zip(bufs.iter_mut().map(|b| &mut **b)).collect();
        if self.disk.read_blocks(&mut runs).is_err() {
            return;
        }
        for (block, content) in missing.into_iter().zip(bufs) {
            if MetaHeader::decode(&content).is_ok() {
                // losing the race against another reader, or against a second owner, is that reader's business
                let _ = self.insert(gl.name(), block, false, content);
            }
        }
    }

    /// The cached buffer of a block, whoever owns it.
    pub(crate) fn get(&self, block: BlockNo) -> Option<Buf> {
        self.shard(block.0).lock().entries.get(&block.0)?.buf.clone()
    }

    fn lookup(&self, gl: GlockName, block: BlockNo, is_data: bool) -> Result<Option<Buf>> {
        let shard = self.shard(block.0).lock();
        let Some(buf) = shard.entries.get(&block.0).and_then(|e| e.buf.as_ref()) else { return Ok(None) };
        if buf.0.gl != gl {
            return Err(two_owners(block, gl, buf.0.gl));
        }
        if buf.0.is_data != is_data {
            let what = "used both as metadata and as file data".to_owned();
            return Err(Error::Corrupt { block, what });
        }
        buf.0.recently_used.store(true, Ordering::Relaxed);
        Ok(Some(buf.clone()))
    }

    fn load(
        &self,
        gl: GlockName,
        block: BlockNo,
        is_data: bool,
        check: impl FnOnce(&[u8]) -> Result<()>,
    ) -> Result<Buf> {
        if may_not_wait() {
            return Err(Error::WouldBlock);
        }
        let mut content = AlignedBuf::zeroed(self.disk.geometry().block_size as usize);
        self.disk.read(block, &mut content)?;
        check(&content)?;
        self.insert(gl, block, is_data, content)
    }

    /// Puts content just read into the cache, unless somebody else was faster: then theirs.
    fn insert(&self, gl: GlockName, block: BlockNo, is_data: bool, content: AlignedBuf) -> Result<Buf> {
        let mut shard = self.shard(block.0).lock();
        let (mut logged, mut known) = (0, false);
        if let Some(entry) = shard.entries.get(&block.0) {
            if let Some(buf) = &entry.buf {
                return if buf.0.gl == gl && buf.0.is_data == is_data {
                    Ok(buf.clone())
                } else {
                    Err(two_owners(block, gl, buf.0.gl))
                };
            }
            if entry.gl != gl {
                return Err(two_owners(block, gl, entry.gl));
            }
            (logged, known) = (entry.logged, true);
        }
        Ok(self.put(&mut shard, gl, block, is_data, content, logged, known))
    }

    #[allow(clippy::too_many_arguments)] // one place that builds an entry
    fn put(
        &self,
        shard: &mut Shard,
        gl: GlockName,
        block: BlockNo,
        is_data: bool,
        content: AlignedBuf,
        logged: u64,
        known: bool,
    ) -> Buf {
        let buf = Buf(Arc::new(Inner {
            block,
            gl,
            is_data,
            content: RwLock::new(Arc::new(content)),
            pinned: AtomicBool::new(false),
            stale: AtomicBool::new(false),
            recently_used: AtomicBool::new(true),
        }));
        shard.entries.insert(block.0, Entry { buf: Some(buf.clone()), gl, logged });
        if !known {
            shard.queue.push_back(block.0);
            self.glock_set(gl).lock().entry(gl).or_default().insert(block.0);
        }
        self.buffers.fetch_add(1, Ordering::Relaxed);
        self.evict(shard);
        buf
    }

    fn fresh(&self, gl: GlockName, block: BlockNo, is_data: bool) -> Result<Buf> {
        let zeroed = AlignedBuf::zeroed(self.disk.geometry().block_size as usize);
        let mut shard = self.shard(block.0).lock();
        if let Some(entry) = shard.entries.get(&block.0) {
            // a freed block leaves the cache with `forget`: whatever is here still belongs to somebody
            return Err(two_owners(block, gl, entry.gl));
        }
        Ok(self.put(&mut shard, gl, block, is_data, zeroed, 0, false))
    }

    /// Drops a few buffers that nobody refers to, oldest first, with a second chance for those used since.
    fn evict(&self, shard: &mut Shard) {
        if shard.queue.len() <= self.shard_capacity {
            return;
        }
        let tail = self.tail_sequence.load(Ordering::Acquire);
        for _ in 0..EVICT_STEPS {
            let Some(block) = shard.queue.pop_front() else { return };
            let Some(entry) = shard.entries.get_mut(&block) else { continue };
            if let Some(buf) = &entry.buf {
                let idle = Arc::strong_count(&buf.0) == 1 && !buf.is_pinned();
                if idle && !buf.0.recently_used.swap(false, Ordering::Relaxed) {
                    entry.buf = None;
                    self.buffers.fetch_sub(1, Ordering::Relaxed);
                }
            }
            if entry.buf.is_none() && entry.logged < tail {
                let gl = entry.gl;
                shard.entries.remove(&block);
                let mut sets = self.glock_set(gl).lock();
                if let Some(set) = sets.get_mut(&gl) {
                    set.remove(&block);
                    if set.is_empty() {
                        sets.remove(&gl);
                    }
                }
            } else {
                shard.queue.push_back(block);
            }
        }
    }

    /// Blocks known under a glock, ascending.
    pub(crate) fn blocks_of(&self, gl: GlockName) -> Vec<u64> {
        let mut blocks: Vec<u64> =
            self.glock_set(gl).lock().get(&gl).map(|s| s.iter().copied().collect()).unwrap_or_default();
        blocks.sort_unstable();
        blocks
    }

    /// Is any block of this glock in the set of the next flush?
    pub(crate) fn any_pinned(&self, gl: GlockName) -> bool {
        self.blocks_of(gl).into_iter().any(|b| self.get(BlockNo(b)).is_some_and(|buf| buf.is_pinned()))
    }

    /// Blocks of this glock whose last copy was logged by flush `tail` or a later one.
    pub(crate) fn logged_since(&self, gl: GlockName, tail: u64) -> Vec<u64> {
        let mut blocks = self.blocks_of(gl);
        blocks.retain(|b| self.shard(*b).lock().entries.get(b).is_some_and(|e| e.logged >= tail.max(1)));
        blocks
    }

    /// Flush `sequence` contains a copy of this block.
    pub(crate) fn note_logged(&self, block: BlockNo, sequence: u64) {
        if let Some(entry) = self.shard(block.0).lock().entries.get_mut(&block.0) {
            entry.logged = sequence;
        }
    }

    /// The block's copies in the journal do not count any more (they are revoked).
    pub(crate) fn note_revoked(&self, block: BlockNo) {
        self.note_logged(block, 0);
    }

    /// A durable header has moved the journal's tail to flush `sequence`.
    pub(crate) fn tail_moved(&self, sequence: u64) {
        self.tail_sequence.store(sequence, Ordering::Release);
    }

    /// Takes a freed block out of the cache. Returns its buffer and the flush that last logged it (0 = none).
    pub(crate) fn forget(&self, block: BlockNo) -> (Option<Buf>, u64) {
        let mut shard = self.shard(block.0).lock();
        let Some(entry) = shard.entries.remove(&block.0) else { return (None, 0) };
        if let Some(buf) = &entry.buf {
            buf.0.stale.store(true, Ordering::Release);
            self.buffers.fetch_sub(1, Ordering::Relaxed);
        }
        let mut sets = self.glock_set(entry.gl).lock();
        if let Some(set) = sets.get_mut(&entry.gl) {
            set.remove(&block.0);
            if set.is_empty() {
                sets.remove(&entry.gl);
            }
        }
        (entry.buf, entry.logged)
    }

    /// Throws out everything of a glock that is being given up.
    /// Panics when the log still needs one of the blocks: the sync that must come before was left out.
    pub(crate) fn drop_glock(&self, gl: GlockName) {
        let blocks = self.glock_set(gl).lock().remove(&gl).unwrap_or_default();
        for block in blocks {
            let mut shard = self.shard(block).lock();
            let Some(entry) = shard.entries.remove(&block) else { continue };
            if let Some(buf) = entry.buf {
                assert!(!buf.is_pinned(), "glock {gl} given up with block {block} not yet logged");
                buf.0.stale.store(true, Ordering::Release);
                self.buffers.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

/// A no-wait thread must not wait for the disk; but inside a transaction it has begun to change things and must finish.
fn may_not_wait() -> bool {
    crate::glock::is_nowait() && !crate::trans::in_transaction()
}

fn two_owners(block: BlockNo, gl: GlockName, other: GlockName) -> Error {
    Error::Corrupt { block, what: format!("wanted under glock {gl} but belongs to glock {other}") }
}

fn check_type(b: &[u8], types: &[MetaType], block: BlockNo) -> Result<()> {
    let found = MetaHeader::decode(b).map_err(|e| e.at(block))?;
    if types.contains(&found.ty) {
        return Ok(());
    }
    let wanted = types.iter().map(|t| t.name()).collect::<Vec<_>>().join(" or ");
    Err(Error::Corrupt { block, what: format!("{} where a {wanted} was expected", found.ty.name()) })
}
