//! Contents of regular files: reading, writing, size, holes.
//!
//! Three forms. *Stuffed*: small contents stand in the dinode, are changed like metadata and need no block. *Ordered*: blocks of their
//! own, cached in [`Pages`](crate::pages::Pages); the log writes them in place before it commits the metadata that leads to them, so that a
//! new block never shows what was in it before. *Journaled* (JDATA flag): the blocks go through the log like metadata.
//!
//! Invariant: bytes behind the end of the file are zero in memory. On disk they may be anything: a crash can come after data was written in
//! place and before the size that would show it was committed. So a page that is read is zeroed behind the end ([`Locked::load`]), and a file that
//! grows over blocks which it has already zeroes them first ([`Locked::zero_behind_end`]).
//!
//! Locks: the inode's glock, EX for everything that changes.

use crate::bmap::{Bottom, Extent, Plan};
use crate::cache::Buf;
use crate::glock::is_nowait;
use crate::inode::Locked;
use crate::ondisk::dinode::{DIF_TRUNC_IN_PROG, Dinode, Time};
use crate::ops::Fs;
use crate::rgrp::Reservation;
use crate::trans::{Trans, TransSize};
use crate::{BlockNo, Error, Result};
use lun::aligned::AlignedBuf;
use std::sync::Arc;

/// File blocks that one transaction maps at most, in bytes.
const CHUNK_BYTES: u64 = 1 << 20;
/// Journaled data blocks in one transaction at most.
const JDATA_CHUNK: u64 = 64;

impl Locked<'_> {
    fn bsize(&self) -> u64 {
        u64::from(self.geo().block_size)
    }

    fn stuffed_room(&self) -> u64 {
        self.geo().stuffed() as u64
    }

    fn chunk_blocks(&self) -> u64 {
        if self.d.is_jdata() { JDATA_CHUNK } else { CHUNK_BYTES / self.bsize() + 1 }
    }

    /// Greatest size a file can have.
    fn max_size(&self) -> u64 {
        let geo = self.geo();
        geo.tree_capacity(geo.max_height()).saturating_mul(self.bsize()).min(i64::MAX as u64)
    }

    // ---- reading

    /// Bytes of the file from `offset` on. Less than asked for only at the end of the file. `cache` says whether what must be read is kept.
    pub(crate) fn read_at(&self, offset: u64, out: &mut [u8], cache: bool) -> Result<usize> {
        let len = self.d.size.saturating_sub(offset).min(out.len() as u64) as usize;
        let out = &mut out[..len];
        if len == 0 {
            return Ok(0);
        }
        if self.d.height == 0 {
            let from = Dinode::SIZE + offset as usize;
            self.buf.with(|b| out.copy_from_slice(&b[from..from + len]));
            return Ok(len);
        }
        if self.d.is_jdata() {
            self.read_journaled(offset, out)?;
            return Ok(len);
        }
        let pages = &self.inode.pages;
        let mut done = 0;
        while done < len {
            done += pages.read(offset + done as u64, &mut out[done..]);
            if done == len {
                break;
            }
            if is_nowait() {
                return Err(Error::WouldBlock);
            }
            let at = offset + done as u64;
            let lblk = at / self.bsize();
            let wanted = (offset + len as u64).div_ceil(self.bsize()) - lblk;
            let last = self.d.size.div_ceil(self.bsize());
            let ahead = if cache { pages.read_ahead(lblk, wanted).min(last - lblk) } else { wanted };
            let extent = self.map(lblk, ahead)?;
            match extent.at {
                None => {
                    let end = (extent.end() * self.bsize()).min(offset + len as u64);
                    let n = (end - at) as usize;
                    out[done..done + n].fill(0);
                    done += n;
                }
                Some(_) if cache => self.load(extent)?,
                Some(from) => {
                    // One block at a time may be cached and newer than the device: leave those to the cache.
                    let n = pages.uncached(lblk, extent.len);
                    if n == 0 {
                        continue;
                    }
                    let mut bytes = AlignedBuf::zeroed((n * self.bsize()) as usize);
                    self.fs.volume().disk().read(from, &mut bytes)?;
                    let skip = (at % self.bsize()) as usize;
                    let n = (bytes.len() - skip).min(len - done);
                    out[done..done + n].copy_from_slice(&bytes[skip..skip + n]);
                    done += n;
                }
            }
        }
        Ok(len)
    }

    /// Reads a mapped run into the cache.
    fn load(&self, extent: Extent) -> Result<()> {
        let Some(at) = extent.at else { return Ok(()) };
        let mut bytes = AlignedBuf::zeroed((extent.len * self.bsize()) as usize);
        self.fs.volume().disk().read(at, &mut bytes)?;
        let valid = self.d.size.saturating_sub(extent.lblk * self.bsize()).min(bytes.len() as u64);
        bytes[valid as usize..].fill(0);
        for (i, block) in bytes.chunks_exact(self.bsize() as usize).enumerate() {
            let i = i as u64;
            self.inode.pages.insert_clean(extent.lblk + i, BlockNo(at.0 + i), block);
        }
        self.fs.relieve();
        Ok(())
    }

    fn read_journaled(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            let from = (at % self.bsize()) as usize;
            let n = (self.bsize() as usize - from).min(out.len() - done);
            match self.map(at / self.bsize(), 1)?.at {
                None => out[done..done + n].fill(0),
                Some(block) => {
                    let buf = self.fs.volume().cache().read_data(self.glock(), block)?;
                    buf.with(|b| out[done..done + n].copy_from_slice(&b[from..from + n]));
                }
            }
            done += n;
        }
        Ok(())
    }

    // ---- writing

    /// Writes bytes at `offset`. Less than asked for only when space ran out in the middle.
    /// On a no-wait thread: all of it, or `WouldBlock` with nothing changed.
    pub(crate) fn write_at(&mut self, offset: u64, data: &[u8], now: Time, kill_priv: bool) -> Result<usize> {
        let end = offset.checked_add(data.len() as u64).ok_or(Error::Errno(libc::EFBIG))?;
        if end > self.max_size() {
            return Err(Error::Errno(libc::EFBIG));
        }
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let room = self.chunk_blocks() * self.bsize() - at % self.bsize();
            let n = (data.len() - done).min(room as usize);
            if is_nowait() && n < data.len() {
                return Err(Error::WouldBlock);
            }
            match self.write_chunk(at, &data[done..done + n], now, kill_priv) {
                Ok(n) => done += n,
                Err(Error::Errno(libc::ENOSPC)) if done > 0 => break,
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    /// One transaction's worth. Returns how much of it was written: less when the resource group had less room.
    fn write_chunk(&mut self, offset: u64, data: &[u8], now: Time, kill_priv: bool) -> Result<usize> {
        let end = offset + data.len() as u64;
        if self.d.height == 0 && end <= self.stuffed_room() {
            self.write_stuffed(offset, data, now, kill_priv)?;
            return Ok(data.len());
        }
        let bsize = self.bsize();
        let first = offset / bsize;
        let mut data = data;
        let mut n = end.div_ceil(bsize) - first;
        let zeroed = self.zero_behind_end(offset)?;
        let journaled = self.prepare_edges(offset, end)?;
        let mut plan = self.plan(first, n)?;
        let res = if plan.data + plan.meta > 0 {
            let least = self.plan(first, 1)?;
            let res = self.reserve(&plan, &least)?;
            if u64::from(res.left()) < plan.data + plan.meta {
                if is_nowait() {
                    return Err(Error::WouldBlock);
                }
                while n > 1 && u64::from(res.left()) < plan.data + plan.meta {
                    n /= 2;
                    plan = self.plan(first, n)?;
                }
                data = &data[..data.len().min(((first + n) * bsize - offset) as usize)];
            }
            Some(res)
        } else {
            None
        };
        let bitmaps = res.as_ref().map_or(0, |r| r.trans_blocks(r.left(), 0));
        let copies = if self.d.is_jdata() { n as u32 + 1 } else { 0 };
        let trans = self.fs.volume().begin(TransSize::new(bitmaps + plan.touched as u32 + 1 + copies, 0))?;
        self.fs.atomically(&trans, || {
            self.map_range(&trans, res.as_ref(), first, n)?;
            self.copy_in(&trans, offset, data)?;
            let grows = offset + data.len() as u64 > self.d.size;
            self.d.size = self.d.size.max(offset + data.len() as u64);
            self.touch(now);
            if kill_priv {
                self.d.mode = crate::ops::without_privileges(self.d.mode);
            }
            if !self.d.is_jdata() && (grows || res.is_some() || zeroed) {
                trans.ordered(Arc::clone(&self.inode.pages) as _);
            }
            self.save(&trans);
            Ok(())
        })?;
        trans.commit();
        drop(journaled);
        Ok(data.len())
    }

    fn reserve(&self, plan: &Plan, least: &Plan) -> Result<Reservation> {
        let blocks =
            |plan: &Plan| u32::try_from(plan.data + plan.meta).map_err(|_| Error::Errno(libc::ENOSPC));
        let want = blocks(plan)?;
        self.fs.volume().rgrps()?.reserve(BlockNo(self.d.goal_meta), want, blocks(least)?.clamp(1, want))
    }

    fn write_stuffed(&mut self, offset: u64, data: &[u8], now: Time, kill_priv: bool) -> Result<()> {
        let trans = self.fs.volume().begin(TransSize::new(1, 0))?;
        let from = Dinode::SIZE + offset as usize;
        {
            let mut bytes = trans.modify(&self.buf);
            let old = Dinode::SIZE + self.d.size as usize;
            if old < from {
                bytes[old..from].fill(0);
            }
            bytes[from..from + data.len()].copy_from_slice(data);
        }
        self.d.size = self.d.size.max(offset + data.len() as u64);
        self.touch(now);
        if kill_priv {
            self.d.mode = crate::ops::without_privileges(self.d.mode);
        }
        self.save(&trans);
        trans.commit();
        Ok(())
    }

    /// Has those blocks in memory of which only a part will be written. For journaled data all blocks of the range, and the buffers are
    /// returned so that they stay.
    fn prepare_edges(&self, offset: u64, end: u64) -> Result<Vec<Buf>> {
        let bsize = self.bsize();
        let mut kept = Vec::new();
        if self.d.height == 0 {
            return Ok(kept);
        }
        let (first, last) = (offset / bsize, (end - 1) / bsize);
        if self.d.is_jdata() {
            for lblk in first..=last {
                if let Some(at) = self.map(lblk, 1)?.at {
                    kept.push(self.fs.volume().cache().read_data(self.glock(), at)?);
                }
            }
            return Ok(kept);
        }
        if !offset.is_multiple_of(bsize) || (end < (first + 1) * bsize) {
            self.keep_page(first)?;
        }
        if !end.is_multiple_of(bsize) && last != first {
            self.keep_page(last)?;
        }
        Ok(kept)
    }

    /// A page of the cache that stays until it is changed, read from its block if it has one.
    fn keep_page(&self, lblk: u64) -> Result<()> {
        while !self.inode.pages.keep(lblk) {
            let extent = self.map(lblk, 1)?;
            if extent.at.is_none() {
                return Ok(());
            }
            if is_nowait() {
                return Err(Error::WouldBlock);
            }
            self.load(extent)?;
        }
        Ok(())
    }

    /// Gives every block of the range a place, out of the dinode if need be.
    fn map_range(&mut self, trans: &Trans, res: Option<&Reservation>, first: u64, n: u64) -> Result<()> {
        let jdata = self.d.is_jdata();
        if self.d.height == 0 {
            let pages = Arc::clone(&self.inode.pages);
            self.unstuff(trans, res, Bottom::Data, |file, trans, at, contents| {
                if jdata {
                    let buf = file.fs.volume().cache().new_data(file.glock(), at)?;
                    trans.modify(&buf)[..contents.len()].copy_from_slice(contents);
                } else {
                    pages.write(0, at, 0, contents);
                    trans.ordered(pages as _);
                }
                Ok(())
            })?;
        }
        let Some(res) = res else { return Ok(()) };
        self.fill(trans, res, first, n, Bottom::Data, |file, trans, extent| {
            let Some(at) = extent.at.filter(|_| jdata) else { return Ok(()) };
            for i in 0..extent.len {
                let buf = file.fs.volume().cache().new_data(file.glock(), BlockNo(at.0 + i))?;
                drop(trans.modify(&buf));
            }
            Ok(())
        })
    }

    /// Puts bytes into blocks that are all mapped; partly written old ones are in memory.
    fn copy_in(&self, trans: &Trans, offset: u64, data: &[u8]) -> Result<()> {
        let bsize = self.bsize();
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let extent = self.map(at / bsize, (offset + data.len() as u64).div_ceil(bsize) - at / bsize)?;
            let Some(start) = extent.at else {
                let what = format!("file block {} is not mapped after mapping it", extent.lblk);
                return Err(Error::Corrupt { block: self.inode.no.addr, what });
            };
            for i in 0..extent.len {
                let from = ((offset + done as u64) % bsize) as usize;
                let n = (bsize as usize - from).min(data.len() - done);
                let (block, bytes) = (BlockNo(start.0 + i), &data[done..done + n]);
                if self.d.is_jdata() {
                    let buf = self.fs.volume().cache().read_data(self.glock(), block)?;
                    trans.modify(&buf)[from..from + n].copy_from_slice(bytes);
                } else {
                    self.inode.pages.write(extent.lblk + i, block, from, bytes);
                }
                done += n;
            }
        }
        Ok(())
    }

    // ---- size

    /// Changes the size. Errors: EFBIG, ENOSPC (contents that no longer fit into the dinode).
    pub(crate) fn set_size(&mut self, size: u64, now: Time) -> Result<()> {
        if size > self.max_size() {
            return Err(Error::Errno(libc::EFBIG));
        }
        if size < self.d.size {
            return self.shrink(size, now);
        }
        let zeroed = self.zero_behind_end(size)?;
        self.grow_to(size, zeroed, now)
    }

    /// Second half of a growth; `zeroed`: pages behind the old end are zero and dirty.
    fn grow_to(&mut self, size: u64, zeroed: bool, now: Time) -> Result<()> {
        let unstuffs = self.d.height == 0 && size > self.stuffed_room();
        let res = if unstuffs && self.d.size > 0 {
            self.fs.reserve_some(BlockNo(self.d.goal_meta), 1, &[])?
        } else {
            None
        };
        let bitmaps = res.as_ref().map_or(0, |r| r.trans_blocks(1, 0));
        let trans = self.fs.volume().begin(TransSize::new(bitmaps + 2, 0))?;
        self.fs.atomically(&trans, || {
            if unstuffs {
                self.map_range(&trans, res.as_ref(), 0, 1)?;
            } else if self.d.height == 0 {
                let (from, to) = (Dinode::SIZE + self.d.size as usize, Dinode::SIZE + size as usize);
                trans.modify(&self.buf)[from..to].fill(0);
            }
            if zeroed {
                trans.ordered(Arc::clone(&self.inode.pages) as _);
            }
            self.d.size = size;
            self.touch(now);
            self.save(&trans);
            Ok(())
        })?;
        trans.commit();
        Ok(())
    }

    /// Zeroes, in memory, what the file's blocks hold between its end and `to`, before it grows over them. True when pages are dirty now,
    /// which the transaction that raises the size must order before itself. Nothing of it can be seen before that.
    fn zero_behind_end(&self, to: u64) -> Result<bool> {
        let (bsize, end) = (self.bsize(), self.d.size);
        // Journaled contents never get ahead of the size.
        if self.d.height == 0 || self.d.is_jdata() || to <= end {
            return Ok(false);
        }
        let mut lblk = end / bsize;
        if !end.is_multiple_of(bsize) {
            self.keep_page(lblk)?;
        }
        let (mut zeroed, mut since) = (false, 0);
        let last = to.div_ceil(bsize);
        while lblk < last {
            // A hole may reach over exabytes: it is passed in as many steps as the tree has levels and pointers. What is mapped at once
            // has its pointers in one block.
            let extent = self.map(lblk, last - lblk)?;
            if let Some(at) = extent.at {
                for i in 0..extent.len {
                    let from = end.saturating_sub((lblk + i) * bsize) as usize;
                    let zeros = vec![0; bsize as usize - from];
                    self.inode.pages.write(lblk + i, BlockNo(at.0 + i), from, &zeros);
                }
                (zeroed, since) = (true, since + extent.len);
            }
            lblk = extent.end();
            if since >= self.chunk_blocks() {
                if is_nowait() {
                    return Err(Error::WouldBlock);
                }
                self.inode.pages.write_out_all()?;
                since = 0;
            }
        }
        Ok(zeroed)
    }

    fn shrink(&mut self, size: u64, now: Time) -> Result<()> {
        let bsize = self.bsize();
        let stuffed = self.d.height == 0;
        let tail = (!stuffed && !size.is_multiple_of(bsize)).then_some((size, size.next_multiple_of(bsize)));
        let kept = match tail {
            Some((from, to)) => self.prepare_edges(from, to)?,
            None => Vec::new(),
        };
        let trans = self.fs.volume().begin(TransSize::new(2, 0))?;
        self.fs.atomically(&trans, || {
            if stuffed {
                trans.modify(&self.buf)[Dinode::SIZE + size as usize..].fill(0);
            } else {
                trans.wait_ordered();
                self.inode.pages.discard(size.div_ceil(bsize), u64::MAX);
                if let Some((from, to)) = tail {
                    self.zero_mapped(&trans, from, to)?;
                }
                self.d.flags |= DIF_TRUNC_IN_PROG;
            }
            self.d.size = size;
            self.touch(now);
            self.save(&trans);
            Ok(())
        })?;
        trans.commit();
        drop(kept);
        if stuffed { Ok(()) } else { self.finish_truncate() }
    }

    /// Zeroes a part of one block if it is mapped; it is in memory.
    fn zero_mapped(&self, trans: &Trans, from: u64, to: u64) -> Result<()> {
        let lblk = from / self.bsize();
        if from < to && self.map(lblk, 1)?.at.is_some() {
            self.copy_in(trans, from, &vec![0; (to - from) as usize])?;
            if !self.d.is_jdata() {
                trans.ordered(Arc::clone(&self.inode.pages) as _);
            }
        }
        Ok(())
    }

    /// Second half of a truncate: frees what lies behind the end, and clears the flag that says so.
    pub(crate) fn finish_truncate(&mut self) -> Result<()> {
        self.free_range(self.d.size.div_ceil(self.bsize()), u64::MAX, Bottom::Data)?;
        let trans = self.fs.volume().begin(TransSize::new(1, 0))?;
        self.d.flags &= !DIF_TRUNC_IN_PROG;
        if self.d.size == 0 {
            trans.modify(&self.buf)[Dinode::SIZE..].fill(0);
            self.d.height = 0;
            self.d.goal_meta = self.inode.no.addr.0;
            self.d.goal_data = self.d.goal_meta;
        }
        self.save(&trans);
        trans.commit();
        Ok(())
    }

    // ---- holes

    /// Frees the whole blocks of `[from, to)` and zeroes the rest of it. The size stays.
    pub(crate) fn punch(&mut self, from: u64, to: u64, now: Time) -> Result<()> {
        let to = to.min(self.d.size.next_multiple_of(self.bsize()));
        if from >= to {
            return Ok(());
        }
        let bsize = self.bsize();
        if self.d.height == 0 {
            let to = to.min(self.d.size);
            let trans = self.fs.volume().begin(TransSize::new(1, 0))?;
            if from < to {
                trans.modify(&self.buf)[Dinode::SIZE + from as usize..Dinode::SIZE + to as usize].fill(0);
            }
            self.touch(now);
            self.save(&trans);
            trans.commit();
            return Ok(());
        }
        let (whole_from, whole_to) = (from.div_ceil(bsize), to / bsize);
        let edges: Vec<(u64, u64)> = if whole_from > whole_to {
            vec![(from, to)]
        } else {
            [(from, whole_from * bsize), (whole_to * bsize, to)].into_iter().filter(|(a, b)| a < b).collect()
        };
        let mut kept = Vec::new();
        for (a, b) in &edges {
            kept.append(&mut self.prepare_edges(*a, *b)?);
        }
        let trans = self.fs.volume().begin(TransSize::new(4, 0))?;
        self.fs.atomically(&trans, || {
            for (a, b) in &edges {
                self.zero_mapped(&trans, *a, *b)?;
            }
            if whole_from < whole_to {
                trans.wait_ordered();
                self.inode.pages.discard(whole_from, whole_to);
            }
            self.touch(now);
            self.save(&trans);
            Ok(())
        })?;
        trans.commit();
        drop(kept);
        if whole_from < whole_to { self.free_range(whole_from, whole_to, Bottom::Data) } else { Ok(()) }
    }

    /// Gives every block of `[from, to)` a place, zero-filled where there was none, and raises the size to `size`.
    pub(crate) fn allocate(&mut self, from: u64, to: u64, size: u64, now: Time) -> Result<()> {
        if to > self.max_size() {
            return Err(Error::Errno(libc::EFBIG));
        }
        if self.d.height == 0 && to <= self.stuffed_room() {
            return self.set_size(size.max(self.d.size), now);
        }
        // Before new blocks come, which are zero anyway.
        let zeroed = self.zero_behind_end(size)?;
        let bsize = self.bsize();
        let (mut lblk, end) = (from / bsize, to.div_ceil(bsize));
        while lblk < end {
            let mut n = (end - lblk).min(self.chunk_blocks());
            let mut plan = self.plan(lblk, n)?;
            if plan.data + plan.meta > 0 || self.d.height == 0 {
                let res = self.reserve(&plan, &self.plan(lblk, 1)?)?;
                while n > 1 && u64::from(res.left()) < plan.data + plan.meta {
                    n /= 2;
                    plan = self.plan(lblk, n)?;
                }
                self.allocate_chunk(&res, lblk, n, &plan)?;
                drop(res);
                self.inode.pages.write_out_all()?;
            }
            lblk += n;
        }
        self.grow_to(size.max(self.d.size), zeroed, now)
    }

    fn allocate_chunk(&mut self, res: &Reservation, lblk: u64, n: u64, plan: &Plan) -> Result<()> {
        let copies = if self.d.is_jdata() { n as u32 + 1 } else { 0 };
        let size = TransSize::new(res.trans_blocks(res.left(), 0) + plan.touched as u32 + 1 + copies, 0);
        let trans = self.fs.volume().begin(size)?;
        self.fs.atomically(&trans, || {
            let jdata = self.d.is_jdata();
            let holes: Vec<Extent> =
                if self.d.height == 0 || jdata { Vec::new() } else { self.holes(lblk, n)? };
            let all_new = self.d.height == 0;
            let had_contents = all_new && self.d.size > 0;
            self.map_range(&trans, Some(res), lblk, n)?;
            if !jdata {
                let new = if all_new { vec![Extent { lblk, at: None, len: n }] } else { holes };
                for hole in new {
                    self.zero_new(hole, had_contents)?;
                }
                trans.ordered(Arc::clone(&self.inode.pages) as _);
            }
            self.save(&trans);
            Ok(())
        })?;
        trans.commit();
        Ok(())
    }

    /// Zero pages for blocks that were holes a moment ago. Block 0 of a file whose contents were stuffed holds them.
    fn zero_new(&self, hole: Extent, had_contents: bool) -> Result<()> {
        let mut lblk = hole.lblk;
        while lblk < hole.end() {
            let run = self.map(lblk, hole.end() - lblk)?;
            for i in 0..run.len {
                if let Some(at) = run.at
                    && !(had_contents && run.lblk + i == 0)
                {
                    self.inode.pages.write(run.lblk + i, BlockNo(at.0 + i), 0, &[]);
                }
            }
            lblk = run.end();
        }
        Ok(())
    }

    fn holes(&self, lblk: u64, n: u64) -> Result<Vec<Extent>> {
        let mut holes = Vec::new();
        let mut at = lblk;
        while at < lblk + n {
            let extent = self.map(at, lblk + n - at)?;
            if extent.at.is_none() {
                holes.push(extent);
            }
            at = extent.end();
        }
        Ok(holes)
    }

    /// First byte at or after `offset` that is data (or in a hole). The end of the file is a hole. `None`: there is none.
    pub(crate) fn seek(&self, offset: u64, data: bool) -> Result<Option<u64>> {
        let size = self.d.size;
        if offset >= size {
            return Ok(None);
        }
        let mut at = offset;
        if self.d.height > 0 {
            let end = size.div_ceil(self.bsize());
            while at < size {
                let lblk = at / self.bsize();
                let extent = self.map(lblk, end - lblk)?;
                if extent.at.is_some() == data {
                    return Ok(Some(at));
                }
                at = extent.end() * self.bsize();
            }
        } else if data {
            return Ok(Some(offset));
        }
        Ok((!data).then_some(size))
    }
}

impl Fs {
    /// Makes room when the data cache is over its limit: clean pages go, those not used lately first; then a writer waits for its own data.
    pub(crate) fn relieve(&self) {
        if !self.budget.is_full() {
            return;
        }
        for all in [false, true] {
            for inode in self.inodes.all() {
                inode.pages.evict(all);
                if self.budget.has_room() {
                    return;
                }
            }
        }
    }
}
