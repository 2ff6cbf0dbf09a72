//! Cached contents of one regular file: pages of one block each, clean or dirty.
//!
//! A dirty page knows its place on the volume (blocks are allocated when data is written, not when it is written out), so it can be written
//! out by anybody at any time: by the log before it commits the metadata that points to it ([`OrderedData`]), by fsync, by age, under
//! pressure, when the glock goes. Nothing here takes a glock.
//!
//! Invariants. One write-out of a file runs at a time, so an older version of a page never lands after a newer one; a page changed while it
//! is being written stays dirty (its content is an `Arc` that is replaced, the write goes on with the old one). Pages whose blocks are to be
//! freed are discarded *before* that, and [`Pages::discard`] waits for a running write-out: no write reaches a block that is not the file's any
//! more. Clean pages may go at any time.

use crate::disk::{Disk, FlushMark};
use crate::trans::OrderedData;
use crate::{BlockNo, Error, Result};
use lun::aligned::AlignedBuf;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Longest single write to the device.
const MAX_WRITE: usize = 1 << 20;

/// Memory that the file data of one mount takes.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: usize,
    used: AtomicUsize,
    dirty: AtomicUsize,
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit: limit.max(1 << 20), used: AtomicUsize::new(0), dirty: AtomicUsize::new(0) })
    }
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
    pub(crate) fn dirty(&self) -> usize {
        self.dirty.load(Ordering::Relaxed)
    }
    pub(crate) fn is_full(&self) -> bool {
        self.used() > self.limit
    }
    /// Making room goes on until there is some: looking for it costs more than the room for one page is worth.
    pub(crate) fn has_room(&self) -> bool {
        self.used() < self.limit - self.limit / 8
    }
    /// A writer that finds this writes its own file out before it goes on.
    pub(crate) fn is_mostly_dirty(&self) -> bool {
        self.dirty() > self.limit / 2
    }
}

type Bytes = Arc<AlignedBuf>;

struct Page {
    /// Its block on the volume.
    at: BlockNo,
    bytes: Bytes,
    dirty: bool,
    /// Used since the last look of [`Pages::evict`].
    recent: bool,
    /// A partial write is about to change it: it must not go before.
    kept: bool,
}

#[derive(Default)]
struct State {
    pages: BTreeMap<u64, Page>,
    dirty: usize,
    dirty_since: Option<Instant>,
    writing: bool,
    /// A write-out failed, and fsync has not yet told anybody.
    failed: Option<Error>,
    /// Block behind the last read, and how many blocks to read ahead.
    next_read: u64,
    window: u64,
    /// The last write-out.
    mark: Option<FlushMark>,
}

pub(crate) struct Pages {
    disk: Arc<Disk>,
    budget: Arc<Budget>,
    block_size: usize,
    state: Mutex<State>,
    written: Condvar,
}

/// Blocks to read ahead at most, in bytes.
const MAX_WINDOW: usize = 1 << 20;

impl Pages {
    pub(crate) fn new(disk: Arc<Disk>, budget: Arc<Budget>) -> Self {
        let block_size = disk.geometry().block_size as usize;
        Self { disk, budget, block_size, state: Mutex::default(), written: Condvar::new() }
    }

    fn charge(&self, pages: usize) {
        self.budget.used.fetch_add(pages * self.block_size, Ordering::Relaxed);
    }

    fn discharge(&self, page: &Page, state: &mut State) {
        self.budget.used.fetch_sub(self.block_size, Ordering::Relaxed);
        if page.dirty {
            self.set_dirty(state, -1);
        }
    }

    fn set_dirty(&self, state: &mut State, by: isize) {
        state.dirty = state.dirty.strict_add_signed(by);
        if by > 0 {
            self.budget.dirty.fetch_add(self.block_size, Ordering::Relaxed);
            state.dirty_since.get_or_insert_with(Instant::now);
        } else {
            self.budget.dirty.fetch_sub(self.block_size, Ordering::Relaxed);
            if state.dirty == 0 {
                state.dirty_since = None;
            }
        }
    }

    /// Copies cached bytes of the range to `out` as far as pages go from its beginning. Returns how many.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> usize {
        let size = self.block_size as u64;
        let mut state = self.state.lock();
        let mut done = 0;
        let first = offset / size;
        for (expected, (lblk, page)) in (first..).zip(state.pages.range_mut(first..)) {
            if done == out.len() || *lblk != expected {
                break;
            }
            page.recent = true;
            let from = ((offset + done as u64) % size) as usize;
            let n = (self.block_size - from).min(out.len() - done);
            out[done..done + n].copy_from_slice(&page.bytes[from..from + n]);
            done += n;
        }
        done
    }

    /// How many pages from `lblk` on, at most `n`, are not cached.
    pub(crate) fn uncached(&self, lblk: u64, n: u64) -> u64 {
        let state = self.state.lock();
        state.pages.range(lblk..lblk + n).next().map_or(n, |(first, _)| first - lblk)
    }

    /// Blocks to read from `lblk` on, of which `wanted` are asked for now: more when the reader goes on where it was.
    pub(crate) fn read_ahead(&self, lblk: u64, wanted: u64) -> u64 {
        let most = (MAX_WINDOW / self.block_size) as u64;
        let mut state = self.state.lock();
        let sequential = lblk == state.next_read || lblk == 0;
        state.window = if sequential { (state.window * 2).max(wanted * 2).min(most) } else { 0 };
        state.next_read = lblk + wanted.max(state.window);
        wanted.max(state.window)
    }

    /// Keeps a cached page until [`Pages::write`] has changed it. False when it is not cached.
    pub(crate) fn keep(&self, lblk: u64) -> bool {
        self.state.lock().pages.get_mut(&lblk).is_some_and(|page| {
            page.kept = true;
            true
        })
    }

    /// A page just read from its block; a page that is there already stays.
    pub(crate) fn insert_clean(&self, lblk: u64, at: BlockNo, bytes: &[u8]) {
        let mut state = self.state.lock();
        state.pages.entry(lblk).or_insert_with(|| {
            self.charge(1);
            Page { at, bytes: Arc::new(AlignedBuf::copy_of(bytes)), dirty: false, recent: true, kept: false }
        });
    }

    /// Changes `[from, from + data.len())` of a page whose block is `at`. A page that is not cached is taken as zero: its block is new, or
    /// all of it is written; for anything else call [`Pages::keep`] first.
    pub(crate) fn write(&self, lblk: u64, at: BlockNo, from: usize, data: &[u8]) {
        let mut state = self.state.lock();
        let state = &mut *state;
        let page = state.pages.entry(lblk).or_insert_with(|| {
            self.charge(1);
            Page {
                at,
                bytes: Arc::new(AlignedBuf::zeroed(self.block_size)),
                dirty: false,
                recent: true,
                kept: false,
            }
        });
        assert!(page.at == at, "page {lblk} is cached for block {}, written for block {at}", page.at);
        Arc::make_mut(&mut page.bytes)[from..from + data.len()].copy_from_slice(data);
        page.recent = true;
        page.kept = false;
        if !std::mem::replace(&mut page.dirty, true) {
            self.set_dirty(state, 1);
        }
    }

    pub(crate) fn has_dirty(&self) -> bool {
        let state = self.state.lock();
        state.dirty > 0 || state.writing
    }

    /// How long the oldest dirty page has waited.
    pub(crate) fn dirty_age(&self) -> Option<Duration> {
        self.state.lock().dirty_since.map(|t| t.elapsed())
    }

    /// Writes every page that is dirty now to its place and waits. Not durable before a device flush.
    pub(crate) fn write_out_all(&self) -> Result<()> {
        let mut state = self.state.lock();
        while state.writing {
            self.written.wait(&mut state);
        }
        if state.dirty == 0 {
            return Ok(());
        }
        let mut batch: Vec<(BlockNo, u64, Bytes)> = state
            .pages
            .iter_mut()
            .filter(|(_, page)| page.dirty)
            .map(|(lblk, page)| {
                page.dirty = false;
                (page.at, *lblk, Arc::clone(&page.bytes))
            })
            .collect();
        let count = batch.len();
        state.dirty -= count;
        state.dirty_since = None;
        state.writing = true;
        drop(state);
        batch.sort_unstable_by_key(|(at, ..)| *at);
        let result = self.put(&batch);
        let mut state = self.state.lock();
        state.writing = false;
        self.budget.dirty.fetch_sub(count * self.block_size, Ordering::Relaxed);
        if let Ok(mark) = &result {
            state.mark = Some(*mark);
        }
        if let Err(error) = &result {
            state.failed = Some(error.clone());
            for (_, lblk, _) in &batch {
                if let Some(page) = state.pages.get_mut(lblk)
                    && !std::mem::replace(&mut page.dirty, true)
                {
                    self.set_dirty(&mut state, 1);
                }
            }
        }
        drop(state);
        self.written.notify_all();
        result.map(|_| ())
    }

    /// What was written out is durable afterwards.
    pub(crate) fn make_durable(&self) -> Result<()> {
        let mark = self.state.lock().mark;
        match mark {
            Some(mark) if !self.disk.is_durable(mark) => self.disk.flush(),
            _ => Ok(()),
        }
    }

    /// Adjacent blocks become one write.
    fn put(&self, batch: &[(BlockNo, u64, Bytes)]) -> Result<FlushMark> {
        let most = MAX_WRITE / self.block_size;
        let runs: Vec<&[(BlockNo, u64, Bytes)]> =
            batch.chunk_by(|a, b| a.0.0 + 1 == b.0.0).flat_map(|run| run.chunks(most)).collect();
        let joined: Vec<AlignedBuf> = runs
            .iter()
            .filter(|run| run.len() > 1)
            .map(|run| {
                let mut all = AlignedBuf::zeroed(run.len() * self.block_size);
                for (slot, (_, _, bytes)) in all.chunks_exact_mut(self.block_size).zip(*run) {
                    slot.copy_from_slice(bytes);
                }
                all
            })
            .collect();
        let mut joined = joined.iter();
        let writes: Vec<(BlockNo, &[u8])> = runs
            .iter()
            .map(|run| {
                let bytes: &[u8] = if run.len() > 1 {
                    joined.next().expect("one buffer for each long run")
                } else {
                    &run[0].2
                };
                (run[0].0, bytes)
            })
            .collect();
        self.disk.write_blocks(&writes)
    }

    /// What a failed write-out left behind, once.
    pub(crate) fn take_failure(&self) -> Result<()> {
        self.state.lock().failed.take().map_or(Ok(()), Err)
    }

    /// Throws away pages of `[from, to)`, dirty ones too, and waits until none of them is being written.
    pub(crate) fn discard(&self, from: u64, to: u64) {
        let mut state = self.state.lock();
        let gone: Vec<u64> = state.pages.range(from..to).map(|(lblk, _)| *lblk).collect();
        for lblk in gone {
            if let Some(page) = state.pages.remove(&lblk) {
                self.discharge(&page, &mut state);
            }
        }
        self.wait_written(state);
    }

    fn wait_written(&self, mut state: MutexGuard<'_, State>) {
        while state.writing {
            self.written.wait(&mut state);
        }
    }

    /// Throws away everything; the glock goes, and dirty pages have been written.
    pub(crate) fn clear(&self) {
        let mut state = self.state.lock();
        assert!(state.dirty == 0 && !state.writing, "file data given up with {} dirty pages", state.dirty);
        let pages = std::mem::take(&mut state.pages);
        self.budget.used.fetch_sub(pages.len() * self.block_size, Ordering::Relaxed);
        state.window = 0;
    }

    /// Drops clean pages: those not used since the last call, or all of them.
    pub(crate) fn evict(&self, all: bool) {
        let mut state = self.state.lock();
        if state.writing {
            // pages on their way to the device count as clean, but the device may still return what was there before
            return;
        }
        let before = state.pages.len();
        state.pages.retain(|_, page| {
            page.dirty || page.kept || (std::mem::replace(&mut page.recent, false) && !all)
        });
        let gone = before - state.pages.len();
        self.budget.used.fetch_sub(gone * self.block_size, Ordering::Relaxed);
    }
}

impl OrderedData for Pages {
    fn write_out(&self) -> Result<()> {
        self.write_out_all()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        let (used, dirty) = (state.pages.len() * self.block_size, state.dirty * self.block_size);
        self.budget.used.fetch_sub(used, Ordering::Relaxed);
        self.budget.dirty.fetch_sub(dirty, Ordering::Relaxed);
    }
}
