//! The metadata tree of an inode: from a logical block of the file to a block of the volume.
//!
//! `di_height` 0 means that the contents stand in the dinode itself ("stuffed"). Height h: the dinode's payload is an array of pointers,
//! and h − 1 levels of indirect blocks lie below; the lowest level points at data. Pointer 0 is a hole, at every level.
//!
//! ```text
//!   dinode   [p0 p1 … ]          level 0
//!              │   └► indirect   level 1 … h-2
//!              └► indirect [q0 q1 … ]   level h-1: data
//! ```
//!
//! Reading needs the inode's glock in any mode; changing needs EX, a transaction, and a reservation taken before it. [`Locked::plan`] tells
//! how many blocks a range will need at most, so that nothing can run out in the middle.
//! Freeing ranges is in [`truncate`].

pub(crate) mod truncate;

use crate::cache::Buf;
use crate::inode::Locked;
use crate::ondisk::dinode::Dinode;
use crate::ondisk::header::{MetaHeader, MetaType};
use crate::ondisk::{pointer_at, put_pointer};
use crate::rgrp::Reservation;
use crate::trans::Trans;
use crate::{BlockNo, Error, Result};

/// More levels than any legal tree has.
const MAX_LEVELS: usize = 12;

/// A run of logical blocks that is either mapped to a run of volume blocks or a hole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Extent {
    pub(crate) lblk: u64,
    /// `None`: a hole.
    pub(crate) at: Option<BlockNo>,
    pub(crate) len: u64,
}

impl Extent {
    pub(crate) fn end(&self) -> u64 {
        self.lblk + self.len
    }
}

/// What mapping a range will take at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Plan {
    /// Holes in the range: data blocks to allocate.
    pub(crate) data: u64,
    /// Indirect blocks to allocate.
    pub(crate) meta: u64,
    /// Metadata blocks, old and new, that will be changed, the dinode not counted.
    pub(crate) touched: u64,
}

/// Kind of the blocks at the bottom of the tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Bottom {
    /// File data.
    Data,
    /// Blocks of a directory's hash table: they carry a header and belong to the log.
    HashTable,
}

/// Where the pointers of a level begin in their block.
fn base(level: usize) -> usize {
    if level == 0 { Dinode::SIZE } else { MetaHeader::SIZE }
}

impl Locked<'_> {
    fn slots(&self, level: usize) -> usize {
        let geo = self.geo();
        if level == 0 { geo.diptrs() } else { geo.inptrs() }
    }

    /// Logical blocks below one pointer of `level`.
    fn span(&self, level: usize) -> u64 {
        let below = usize::from(self.d.height) - 1 - level;
        let mut n: u64 = 1;
        for _ in 0..below {
            n = n.saturating_mul(self.geo().inptrs() as u64);
        }
        n
    }

    fn path(&self, lblk: u64) -> [usize; MAX_LEVELS] {
        let mut path = [0; MAX_LEVELS];
        let inptrs = self.geo().inptrs() as u64;
        let mut rest = lblk;
        for level in (1..usize::from(self.d.height)).rev() {
            path[level] = (rest % inptrs) as usize;
            rest /= inptrs;
        }
        path[0] = rest as usize;
        path
    }

    fn indirect(&self, at: BlockNo) -> Result<Buf> {
        self.fs.volume().cache().read(self.glock(), at, MetaType::Indirect)
    }

    /// A pointer found on disk, which must lead into the space that resource groups manage.
    pub(crate) fn checked(&self, from: BlockNo, pointer: u64) -> Result<Option<BlockNo>> {
        if pointer == 0 {
            return Ok(None);
        }
        let at = BlockNo(pointer);
        if at == self.inode.no.addr || !self.fs.manages(at) {
            let what = format!("pointer {at} of inode {} leads outside the file data", self.inode.no.addr);
            return Err(Error::Corrupt { block: from, what });
        }
        Ok(Some(at))
    }

    /// What `lblk` is mapped to, and how many blocks after it (at most `max` in all) go on in the same way. The length of a hole may fall
    /// short of the whole hole.
    pub(crate) fn map(&self, lblk: u64, max: u64) -> Result<Extent> {
        self.map_level(lblk, max).map(|(extent, _)| extent)
    }

    /// As [`Self::map`], with the level at which a hole begins.
    fn map_level(&self, lblk: u64, max: u64) -> Result<(Extent, usize)> {
        let height = usize::from(self.d.height);
        assert!(height > 0 && max > 0, "stuffed contents have no map");
        if lblk >= self.geo().tree_capacity(height as u32) {
            return Ok((Extent { lblk, at: None, len: max }, 0));
        }
        let path = self.path(lblk);
        let mut buf = self.buf.clone();
        for (level, &slot) in path.iter().enumerate().take(height) {
            let (base, slots) = (base(level), self.slots(level));
            let here = buf.block();
            let bytes = buf.read();
            let pointer = pointer_at(&bytes, base, slot);
            let bottom = level + 1 == height;
            if pointer != 0 && !bottom {
                self.checked(here, pointer)?;
                buf = self.indirect(BlockNo(pointer))?;
                continue;
            }
            let span = self.span(level);
            let mut len = span - lblk % span;
            let step = u64::from(pointer != 0);
            let mut next = slot + 1;
            while len < max
                && next < slots
                && pointer_at(&bytes, base, next) == pointer + step * (next - slot) as u64
            {
                len = len.saturating_add(span);
                next += 1;
            }
            let len = len.min(max);
            let at = self.checked(here, pointer)?;
            if at.is_some() {
                self.checked(here, pointer + len - 1)?;
            }
            return Ok((Extent { lblk, at, len }, level));
        }
        unreachable!("the lowest level of the tree was passed")
    }

    /// What mapping `[lblk, lblk + n)` will take, unstuffing included.
    pub(crate) fn plan(&self, lblk: u64, n: u64) -> Result<Plan> {
        let geo = self.geo();
        let end = lblk + n;
        let stuffed = self.d.height == 0;
        let height = u32::from(self.d.height).max(1);
        let new_height = geo.height_for(end).max(height);
        if new_height > geo.max_height() {
            return Err(Error::Errno(libc::EFBIG));
        }
        let growth = u64::from(new_height - height);
        let mut plan = Plan { meta: growth, touched: growth, ..Plan::default() };
        // Indirect blocks at levels `from`..height that cover [a, b).
        let indirect = |from: u32, a: u64, b: u64| -> u64 {
            let mut covered = 1u64;
            let mut sum = 0;
            for _ in (from.max(1)..new_height).rev() {
                covered = covered.saturating_mul(geo.inptrs() as u64);
                sum += (b - 1) / covered - a / covered + 1;
            }
            sum
        };
        plan.touched += indirect(1, lblk, end);
        if stuffed {
            plan.data = n + u64::from(self.d.size > 0 && lblk > 0);
            plan.meta += indirect(1, lblk, end);
            return Ok(plan);
        }
        let mut pos = lblk;
        while pos < end {
            let (extent, level) = self.map_level(pos, end - pos)?;
            if extent.at.is_none() {
                plan.data += extent.len;
                let level =
                    if pos >= geo.tree_capacity(height) { 0 } else { level as u32 + new_height - height };
                plan.meta += indirect(level + 1, extent.lblk, extent.end());
            }
            pos = extent.end();
        }
        Ok(plan)
    }

    /// Take one block of the reservation for a metadata block of this tree, with its header.
    fn new_meta(&mut self, trans: &Trans, res: &Reservation, ty: MetaType) -> Result<Buf> {
        let (at, _) = self.take(trans, res, 1)?;
        self.init_meta(trans, at, ty)
    }

    pub(crate) fn init_meta(&self, trans: &Trans, at: BlockNo, ty: MetaType) -> Result<Buf> {
        trans.create(self.fs.volume().cache(), self.glock(), at, ty)
    }

    /// Up to `n` adjacent blocks of the reservation, accounted to this inode.
    pub(crate) fn take(&mut self, trans: &Trans, res: &Reservation, n: u64) -> Result<(BlockNo, u64)> {
        let run = res.alloc_blocks(trans, n.try_into().unwrap_or(u32::MAX))?;
        let len = u64::from(run.len);
        self.d.blocks = self.d.blocks.saturating_add(len);
        self.d.goal_meta = run.start.0 + len - 1;
        self.d.goal_data = self.d.goal_meta;
        Ok((run.start, len))
    }

    /// Raise the tree until it can map block `last`.
    fn grow(&mut self, trans: &Trans, res: &Reservation, last: u64) -> Result<()> {
        let geo = self.geo();
        let height = u32::from(self.d.height);
        assert!(height > 0, "stuffed contents have no tree");
        let new_height = geo.height_for(last + 1);
        if new_height <= height {
            return Ok(());
        }
        let diptrs = geo.diptrs();
        let payload = self.buf.read()[Dinode::SIZE..].to_vec();
        if payload.iter().any(|b| *b != 0) {
            let mut top = None;
            for _ in height..new_height {
                let buf = self.new_meta(trans, res, MetaType::Indirect)?;
                let mut bytes = trans.modify(&buf);
                match top {
                    None => bytes[MetaHeader::SIZE..MetaHeader::SIZE + 8 * diptrs]
                        .copy_from_slice(&payload[..8 * diptrs]),
                    Some(below) => put_pointer(&mut bytes, MetaHeader::SIZE, 0, below),
                }
                top = Some(buf.block().0);
            }
            let mut bytes = trans.modify(&self.buf);
            bytes[Dinode::SIZE..].fill(0);
            put_pointer(&mut bytes, Dinode::SIZE, 0, top.expect("invariant: at least one level was added"));
        }
        self.d.height = new_height as u16;
        Ok(())
    }

    /// Map all holes of `[lblk, lblk + n)` to new blocks, and report each run of them. [`Self::plan`] says what the reservation and the
    /// transaction must hold. The caller saves the dinode.
    pub(crate) fn fill(
        &mut self,
        trans: &Trans,
        res: &Reservation,
        lblk: u64,
        n: u64,
        bottom: Bottom,
        mut on_new: impl FnMut(&Self, &Trans, Extent) -> Result<()>,
    ) -> Result<()> {
        let end = lblk + n;
        self.grow(trans, res, end - 1)?;
        let height = usize::from(self.d.height);
        let mut pos = lblk;
        while pos < end {
            let path = self.path(pos);
            let mut buf = self.buf.clone();
            for (level, &slot) in path.iter().enumerate().take(height - 1) {
                let pointer = buf.with(|b| pointer_at(b, base(level), slot));
                buf = match self.checked(buf.block(), pointer)? {
                    Some(at) => self.indirect(at)?,
                    None => {
                        let below = self.new_meta(trans, res, MetaType::Indirect)?;
                        put_pointer(&mut trans.modify(&buf), base(level), slot, below.block().0);
                        below
                    }
                };
            }
            let (level, slots) = (height - 1, self.slots(height - 1));
            let mut slot = path[level];
            while slot < slots && pos < end {
                let bytes = buf.read();
                let want = (slots - slot).min((end - pos) as usize);
                let hole =
                    (slot..slot + want).take_while(|s| pointer_at(&bytes, base(level), *s) == 0).count();
                drop(bytes);
                if hole == 0 {
                    slot += 1;
                    pos += 1;
                    continue;
                }
                let (start, len) = self.take(trans, res, hole as u64)?;
                {
                    let mut bytes = trans.modify(&buf);
                    for i in 0..len {
                        put_pointer(&mut bytes, base(level), slot + i as usize, start.0 + i);
                    }
                }
                if bottom == Bottom::HashTable {
                    for i in 0..len {
                        self.init_meta(trans, BlockNo(start.0 + i), MetaType::JournaledData)?;
                    }
                }
                on_new(self, trans, Extent { lblk: pos, at: Some(start), len })?;
                slot += len as usize;
                pos += len;
            }
        }
        Ok(())
    }

    /// Move stuffed contents into a block of their own, which then is logical block 0; `store` puts them there. An inode without contents
    /// only gets its height. The reservation must hold one block. The caller saves the dinode.
    pub(crate) fn unstuff(
        &mut self,
        trans: &Trans,
        res: Option<&Reservation>,
        bottom: Bottom,
        store: impl FnOnce(&Self, &Trans, BlockNo, &[u8]) -> Result<()>,
    ) -> Result<()> {
        assert!(self.d.height == 0, "unstuffing an inode that is not stuffed");
        let size = self.d.size as usize;
        let mut first = 0;
        if size > 0 {
            let contents = self.buf.read()[Dinode::SIZE..Dinode::SIZE + size].to_vec();
            let res = res.expect("invariant: a reservation comes with contents");
            let (at, _) = self.take(trans, res, 1)?;
            if bottom == Bottom::HashTable {
                self.init_meta(trans, at, MetaType::JournaledData)?;
            }
            store(self, trans, at, &contents)?;
            first = at.0;
        }
        let mut bytes = trans.modify(&self.buf);
        bytes[Dinode::SIZE..].fill(0);
        put_pointer(&mut bytes, Dinode::SIZE, 0, first);
        drop(bytes);
        self.d.height = 1;
        Ok(())
    }
}
