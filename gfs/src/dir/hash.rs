//! The hash table of a directory: slots, splitting leaves, doubling the table.
//!
//! The table is the directory's contents: stuffed in the dinode while it fits, else in blocks with a metadata header. A leaf of depth d
//! stands in `2^(depth − d)` adjacent slots that begin at a multiple of that number.

use super::leaf::{LeafBuf, area};
use super::records::{self, OwnedRecord};
use super::{DirPlan, Name};
use crate::bmap::Bottom;
use crate::cache::Buf;
use crate::inode::Locked;
use crate::ondisk::dinode::{DIR_MAX_DEPTH, Dinode, Time};
use crate::ondisk::dirent::rec_min;
use crate::ondisk::header::{MetaHeader, MetaType};
use crate::ondisk::leaf::Leaf;
use crate::ondisk::{pointer_at, put_pointer};
use crate::rgrp::Reservation;
use crate::trans::Trans;
use crate::{BlockNo, Error, Result};

impl Locked<'_> {
    /// Table slot of a hash. The table is never smaller than the block size asks for, so depth is not 0; a damaged one still gives slot 0.
    pub(super) fn slot_of(&self, hash: u32) -> u32 {
        hash.checked_shr(32 - u32::from(self.d.depth)).unwrap_or(0)
    }

    /// Block of the table that holds a slot, where its pointers begin, the slot's place among them, and how many follow from there.
    fn table_block(&self, index: u32) -> Result<(Buf, usize, usize, usize)> {
        let all = 1usize << self.d.depth;
        if self.d.height == 0 {
            let index = index as usize;
            return Ok((self.buf.clone(), Dinode::SIZE, index, all - index));
        }
        let per_block = self.geo().inptrs();
        let (lblk, slot) = (index as usize / per_block, index as usize % per_block);
        let Some(at) = self.map(lblk as u64, 1)?.at else {
            return Err(Error::Corrupt {
                block: self.inode.no.addr,
                what: format!("hash table has a hole at block {lblk}"),
            });
        };
        let buf = self.fs.volume().cache().read(self.glock(), at, MetaType::JournaledData)?;
        Ok((buf, MetaHeader::SIZE, slot, (per_block - slot).min(all - index as usize)))
    }

    pub(super) fn table_get(&self, index: u32) -> Result<u64> {
        let (buf, base, slot, _) = self.table_block(index)?;
        Ok(buf.with(|b| pointer_at(b, base, slot)))
    }

    /// The whole table.
    fn table_read(&self) -> Result<Vec<u64>> {
        let all = 1u32 << self.d.depth;
        let mut table = Vec::with_capacity(all as usize);
        while (table.len() as u32) < all {
            let (buf, base, slot, n) = self.table_block(table.len() as u32)?;
            buf.with(|b| table.extend((slot..slot + n).map(|s| pointer_at(b, base, s))));
        }
        Ok(table)
    }

    /// Writes slots from `index` on; all their blocks exist.
    fn table_write(&self, trans: &Trans, index: u32, pointers: &[u64]) -> Result<()> {
        let mut done = 0;
        while done < pointers.len() {
            let (buf, base, slot, n) = self.table_block(index + done as u32)?;
            let n = n.min(pointers.len() - done);
            let mut bytes = trans.modify(&buf);
            for (i, pointer) in pointers[done..done + n].iter().enumerate() {
                put_pointer(&mut bytes, base, slot + i, *pointer);
            }
            done += n;
        }
        Ok(())
    }

    /// Blocks of the table, indirect ones included, at a depth. None while it is stuffed.
    fn table_blocks(&self, depth: u16) -> u64 {
        let geo = self.geo();
        let bytes = 8usize << depth;
        if bytes <= geo.stuffed() { 0 } else { geo.tree_blocks(bytes.div_ceil(geo.jbsize()) as u64) }
    }

    /// What inserting a name into the hashed directory will take.
    pub(super) fn hash_plan(&self, name: Name<'_>) -> Result<DirPlan> {
        if self.leaf_with_room(name)?.is_some() {
            return Ok(DirPlan { alloc: 0, touched: 1 });
        }
        let first = self.first_leaf(name)?;
        if first.head.next != 0 {
            return Ok(DirPlan { alloc: 1, touched: 2 });
        }
        // Damage of what the split or the doubling will read is found here, where nothing has been changed yet.
        if first.head.depth < DIR_MAX_DEPTH {
            self.leaf_slots(name, &first)?;
            self.table_read()?;
        }
        let all = area(&first.buf.read(), first.buf.block()).collect()?;
        Ok(self.split_plan(all, first.head.depth, self.d.depth, name))
    }

    /// The first of a leaf's slots, and how many they are.
    fn leaf_slots(&self, name: Name<'_>, leaf: &LeafBuf) -> Result<(u32, u32)> {
        let len = 1u32 << (u32::from(self.d.depth) - u32::from(leaf.head.depth));
        let start = self.slot_of(name.hash) & !(len - 1);
        let block = leaf.buf.block();
        for slot in [start, start + len - 1] {
            if self.table_get(slot)? != block.0 {
                let what =
                    format!("leaf of depth {} is not in slot {slot} of its directory", leaf.head.depth);
                return Err(Error::Corrupt { block, what });
            }
        }
        Ok((start, len))
    }

    /// As if one leaf of depth `d` with these records were split in a table of depth `depth` until the name fits.
    pub(super) fn split_plan(
        &self,
        mut all: Vec<OwnedRecord>,
        d: u16,
        depth: u16,
        name: Name<'_>,
    ) -> DirPlan {
        let used = |all: &[OwnedRecord]| all.iter().map(|r| rec_min(r.name.len())).sum::<usize>();
        let (mut d, mut new_depth, mut leaves) = (d, depth, 0u64);
        loop {
            leaves += 1;
            if d == DIR_MAX_DEPTH {
                break;
            }
            d += 1;
            new_depth = new_depth.max(d);
            let shift = 32 - u32::from(d);
            all.retain(|r| r.head.hash >> shift == name.hash >> shift);
            if used(&all) + rec_min(name.bytes.len()) <= self.leaf_room() {
                break;
            }
        }
        // Slots of a split leaf may lie in several blocks of the table; when it is doubled all of it is written.
        let old = if self.d.is_exhash() { self.table_blocks(depth) } else { 0 };
        let new = self.table_blocks(new_depth);
        let grown = (new - old.min(new)) + if new > old { u64::from(self.geo().max_height()) } else { 0 };
        DirPlan { alloc: leaves + grown, touched: 1 + leaves + new + u64::from(self.geo().max_height()) }
    }

    fn first_leaf(&self, name: Name<'_>) -> Result<LeafBuf> {
        self.leaf_at(self.inode.no.addr, self.table_get(self.slot_of(name.hash))?)
    }

    /// Split, double or chain until a leaf has room for the name.
    pub(super) fn hash_make_room(
        &mut self,
        trans: &Trans,
        res: Option<&Reservation>,
        name: Name<'_>,
        now: Time,
    ) -> Result<()> {
        while self.leaf_with_room(name)?.is_none() {
            let res = res.ok_or_else(|| Self::no_reservation(self.inode.no.addr))?;
            let first = self.first_leaf(name)?;
            if first.head.next != 0 || first.head.depth == DIR_MAX_DEPTH {
                self.chain(trans, res, name, now)?;
                continue;
            }
            if first.head.depth == self.d.depth {
                self.double(trans, res)?;
            }
            self.split(trans, res, name, &first)?;
        }
        Ok(())
    }

    fn new_leaf(
        &mut self,
        trans: &Trans,
        res: &Reservation,
        head: &Leaf,
        all: &[OwnedRecord],
    ) -> Result<Buf> {
        let (at, _) = self.take(trans, res, 1)?;
        let buf = self.init_meta(trans, at, MetaType::Leaf)?;
        let mut bytes = trans.modify(&buf);
        head.encode(&mut bytes);
        records::pack(&mut bytes, Leaf::SIZE, all);
        drop(bytes);
        Ok(buf)
    }

    /// Split a leaf in two: the new one takes the lower half of its slots, and the names that belong there.
    fn split(&mut self, trans: &Trans, res: &Reservation, name: Name<'_>, old: &LeafBuf) -> Result<()> {
        let depth = u32::from(self.d.depth);
        let (start, len) = self.leaf_slots(name, old)?;
        let block = old.buf.block();
        let all = area(&old.buf.read(), block).collect()?;
        let divider = (u64::from(start + len / 2)) << (32 - depth);
        let (lower, upper): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|r| u64::from(r.head.hash) < divider);
        let head =
            |entries: usize| Leaf { depth: old.head.depth + 1, entries: entries as u16, ..old.head.clone() };
        let new_head = Leaf { inode: self.inode.no.addr.0, dist: 1, ..head(lower.len()) };
        let new = self.new_leaf(trans, res, &new_head, &lower)?;
        {
            let mut bytes = trans.modify(&old.buf);
            head(upper.len()).encode(&mut bytes);
            records::pack(&mut bytes, Leaf::SIZE, &upper);
        }
        self.table_write(trans, start, &vec![new.block().0; len as usize / 2])
    }

    /// Write every pointer twice.
    fn double(&mut self, trans: &Trans, res: &Reservation) -> Result<()> {
        let geo = self.geo();
        let doubled: Vec<u64> = self.table_read()?.into_iter().flat_map(|p| [p, p]).collect();
        let bytes = 8 * doubled.len();
        if bytes > geo.stuffed() {
            if self.d.height == 0 {
                self.unstuff(trans, Some(res), Bottom::HashTable, |dir, trans, at, table| {
                    let buf = dir.fs.volume().cache().read(dir.glock(), at, MetaType::JournaledData)?;
                    trans.modify(&buf)[MetaHeader::SIZE..MetaHeader::SIZE + table.len()]
                        .copy_from_slice(table);
                    Ok(())
                })?;
            }
            self.fill(trans, res, 0, bytes.div_ceil(geo.jbsize()) as u64, Bottom::HashTable, |_, _, _| {
                Ok(())
            })?;
        }
        self.d.depth += 1;
        self.d.size = bytes as u64;
        self.table_write(trans, 0, &doubled)
    }

    /// Append an empty leaf to the name's chain.
    fn chain(&mut self, trans: &Trans, res: &Reservation, name: Name<'_>, now: Time) -> Result<()> {
        let chain = self.chain_at(self.slot_of(name.hash))?;
        let last = chain.last().expect("invariant: a chain has a first leaf");
        let head = Leaf {
            depth: last.head.depth,
            inode: self.inode.no.addr.0,
            dist: chain.len() as u32 + 1,
            sec: now.sec,
            nsec: now.nsec,
            ..Leaf::default()
        };
        let new = self.new_leaf(trans, res, &head, &[])?;
        let linked = Leaf { next: new.block().0, ..last.head.clone() };
        linked.encode(&mut trans.modify(&last.buf));
        Ok(())
    }

    /// The next leaves to free when the directory dies: about `most` of them, and the slots that lead to them.
    pub(crate) fn dir_free_step(&self, most: usize) -> Result<FreeStep> {
        let table = self.table_read()?;
        let mut step = FreeStep { leaves: Vec::new(), slots: 0..0 };
        let mut at = 0;
        for run in table.chunk_by(|a, b| a == b) {
            let slots = at..at + run.len();
            at = slots.end;
            if run[0] == 0 {
                continue;
            }
            let full = step.leaves.len() >= most || step.slots.len() >= MAX_CLEARED_SLOTS;
            if full || (!step.leaves.is_empty() && step.slots.end != slots.start) {
                break;
            }
            let (mut from, mut next) = (self.inode.no.addr, run[0]);
            while next != 0 {
                let leaf = self.leaf_at(from, next)?;
                (from, next) = (leaf.buf.block(), leaf.head.next);
                step.leaves.push(from);
                if step.leaves.len() as u64 > self.d.blocks {
                    return Err(Error::Corrupt {
                        block: from,
                        what: "more leaves than the directory has blocks".to_owned(),
                    });
                }
            }
            step.slots = if step.slots.is_empty() { slots } else { step.slots.start..slots.end };
        }
        Ok(step)
    }

    pub(crate) fn dir_clear_slots(&self, trans: &Trans, step: &FreeStep) -> Result<()> {
        self.table_write(trans, step.slots.start as u32, &vec![0; step.slots.len()])
    }
}

/// Slots that one step of a directory's end zeroes, unless a single leaf has more.
const MAX_CLEARED_SLOTS: usize = 16384;

/// Leaves, and the run of slots that leads to them and to nothing else.
pub(crate) struct FreeStep {
    pub(crate) leaves: Vec<BlockNo>,
    pub(crate) slots: std::ops::Range<usize>,
}
