//! The active items list: committed blocks that are not yet durable in their place.
//!
//! Each flush makes one entry; the journal's tail is the first block of the oldest entry that still has blocks. What is
//! written in place is the content *as committed*, never what running transactions have made of the buffer since, so a block that
//! changes all the time does not hold the tail.
//!
//! Invariants: a block is in one entry only, that of the newest durable flush that logged it. Two in-place writes of one
//! block never run at the same time. A block leaves when its in-place write is durable, or when a flush that
//! revokes it takes it out, or when a newer flush that contains it is durable.

use crate::cache::{Buf, Content};
use crate::disk::{Disk, FlushMark};
use crate::{BlockNo, Result};
use parking_lot::{Condvar, Mutex};
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::{BTreeMap, VecDeque};

/// In-place writes handed to the device in one batch.
const BATCH: usize = 1024;

struct Item {
    sequence: u64,
    content: Content,
    /// Keeps the block in the cache: a read must not find the old content on disk.
    _buf: Buf,
    written: bool,
}

struct Entry {
    /// Journal block where the flush begins.
    first: u32,
    left: usize,
}

#[derive(Default)]
struct Lists {
    entries: BTreeMap<u64, Entry>,
    items: FxHashMap<u64, Item>,
    writing: FxHashSet<u64>,
    /// Written in place, waiting for a device flush: (mark, block, sequence), nearly in order of the marks.
    in_place: VecDeque<(FlushMark, u64, u64)>,
}

#[derive(Default)]
pub(super) struct Ail {
    lists: Mutex<Lists>,
    written: Condvar,
}

/// A block as one flush has committed it.
pub(super) struct Committed {
    pub(super) buf: Buf,
    pub(super) content: Content,
}

impl Lists {
    fn leave(&mut self, sequence: u64) {
        let gone = {
            let entry = self.entries.get_mut(&sequence).expect("invariant: every item has its entry");
            entry.left -= 1;
            entry.left == 0
        };
        if gone {
            self.entries.remove(&sequence);
        }
    }

    fn remove(&mut self, block: u64) {
        if let Some(item) = self.items.remove(&block) {
            self.leave(item.sequence);
        }
    }
}

impl Ail {
    /// Flush `sequence`, beginning at journal block `first`, is durable with these blocks.
    pub(super) fn commit(&self, sequence: u64, first: u32, blocks: Vec<Committed>) {
        if blocks.is_empty() {
            return;
        }
        let mut l = self.lists.lock();
        l.entries.insert(sequence, Entry { first, left: blocks.len() });
        for Committed { buf, content } in blocks {
            let block = buf.block().0;
            l.remove(block);
            l.items.insert(block, Item { sequence, content, _buf: buf, written: false });
        }
    }

    /// These blocks are revoked by the flush that is being written: they will not be written in place any more, and no write of
    /// them is under way afterwards.
    pub(super) fn revoke(&self, blocks: &[u64]) {
        let mut l = self.lists.lock();
        for &b in blocks {
            l.remove(b);
        }
        self.wait_writing(&mut l, blocks);
    }

    fn wait_writing(&self, l: &mut parking_lot::MutexGuard<'_, Lists>, blocks: &[u64]) {
        while blocks.iter().any(|b| l.writing.contains(b)) {
            self.written.wait(l);
        }
    }

    /// Writes these blocks (`None`: all) in place, as far as they are here, and waits for the writes; not for durability.
    pub(super) fn write_back(&self, disk: &Disk, only: Option<&[u64]>) -> Result<()> {
        let wanted: Vec<u64> = match only {
            Some(blocks) => blocks.to_vec(),
            None => {
                let mut all: Vec<u64> = self.lists.lock().items.keys().copied().collect();
                all.sort_unstable();
                all
            }
        };
        for chunk in wanted.chunks(BATCH) {
            let picked: Vec<(u64, u64, Content)> = {
                let mut l = self.lists.lock();
                self.wait_writing(&mut l, chunk);
                let lists = &mut *l;
                let picked: Vec<_> = chunk
                    .iter()
                    .filter_map(|b| lists.items.get(b).map(|i| (*b, i)))
                    .filter(|(_, i)| !i.written)
                    .map(|(b, i)| (b, i.sequence, Content::clone(&i.content)))
                    .collect();
                lists.writing.extend(picked.iter().map(|p| p.0));
                picked
            };
            if picked.is_empty() {
                continue;
            }
            let runs: Vec<(BlockNo, &[u8])> = picked.iter().map(|(b, _, c)| (BlockNo(*b), &***c)).collect();
            let result = disk.write_blocks(&runs);
            let mut l = self.lists.lock();
            let lists = &mut *l;
            for (block, sequence, _) in &picked {
                lists.writing.remove(block);
                if let (Ok(mark), Some(item)) = (&result, lists.items.get_mut(block))
                    && item.sequence == *sequence
                {
                    item.written = true;
                    lists.in_place.push_back((*mark, *block, *sequence));
                }
            }
            self.written.notify_all();
            drop(l);
            if let Err(e) = result {
                return Err(disk.withdraw(&format!("metadata write failed: {e}")));
            }
        }
        Ok(())
    }

    /// These blocks and others that wait for their in-place write, [`BATCH`] at least where there are so many; those of the oldest flushes first.
    pub(super) fn with_oldest(&self, blocks: &[u64]) -> Vec<u64> {
        let mut all = blocks.to_vec();
        let room = BATCH.saturating_sub(blocks.len());
        if room > 0 {
            let l = self.lists.lock();
            let mut others: Vec<(u64, u64)> =
                l.items.iter().filter(|(_, i)| !i.written).map(|(b, i)| (i.sequence, *b)).collect();
            drop(l);
            if others.len() > room {
                others.select_nth_unstable(room);
                others.truncate(room);
            }
            all.extend(others.into_iter().map(|(_, b)| b));
            all.sort_unstable();
            all.dedup();
        }
        all
    }

    /// Lets go of blocks whose in-place write has become durable.
    pub(super) fn reap(&self, disk: &Disk) {
        let durable = disk.durable();
        let mut l = self.lists.lock();
        while let Some(&(mark, block, sequence)) = l.in_place.front()
            && mark <= durable
        {
            l.in_place.pop_front();
            if l.items.get(&block).is_some_and(|i| i.sequence == sequence && i.written) {
                l.remove(block);
            }
        }
    }

    /// Sequence number and first journal block of the oldest flush that is still needed.
    pub(super) fn oldest(&self) -> Option<(u64, u32)> {
        self.lists.lock().entries.first_key_value().map(|(s, e)| (*s, e.first))
    }

    pub(super) fn len(&self) -> usize {
        self.lists.lock().items.len()
    }
}
