//! Freeing a range of a file's blocks, in as many transactions as the log needs.
//!
//! One step looks for the next blocks to free (children before their parent, left to right), at most so many that one transaction holds
//! them, takes the resource groups' glocks, and then frees them in one transaction: pointers zeroed, bitmap bits cleared, `di_blocks` lowered.
//! After each step the file is whole; what is left is found again from the pointers that are not yet zero.
//!
//! An indirect block goes when nothing is left in it.

use super::{Bottom, base};
use crate::cache::Buf;
use crate::inode::Locked;
use crate::ondisk::{pointer_at, put_pointer};
use crate::rgrp::Extent as Blocks;
use crate::trans::TransSize;
use crate::{BlockNo, Result};

/// Blocks that one step frees at most. Each costs at most one revoke, and a bitmap block is shared by thousands.
const STEP_BLOCKS: usize = 8192;
/// Resource groups that one step touches at most.
const STEP_GROUPS: usize = 2;
/// Blocks in which one step zeroes pointers at most.
const STEP_CLEARS: usize = 128;

/// What one transaction will do.
#[derive(Default)]
struct Step {
    /// Pointers to zero: block, base of its array, first slot and end.
    clear: Vec<(Buf, usize, usize, usize)>,
    /// Bottom blocks, then indirect blocks.
    free: Vec<BlockNo>,
    indirect: usize,
    groups: Vec<u64>,
    /// Distinct blocks in `clear`.
    clears: usize,
    full: bool,
}

impl Locked<'_> {
    /// Free every block that maps something in `[from, to)`. The glock is EX and stays; the dinode is saved with each step.
    /// Cached data of the range must be gone already. On error some of the range is freed.
    pub(crate) fn free_range(&mut self, from: u64, to: u64, bottom: Bottom) -> Result<()> {
        loop {
            let mut step = Step::default();
            if self.d.height > 0 && from < to {
                self.collect(&self.buf.clone(), 0, 0, (from, to), &mut step)?;
            }
            if step.free.is_empty() {
                return Ok(());
            }
            let vol = self.fs.volume();
            let groups = vol.rgrps()?.lock_for(&step.free)?;
            // Data of ordered files was never logged; everything else may have copies in the journal.
            let revokes =
                if bottom == Bottom::Data && !self.d.is_jdata() { step.indirect } else { step.free.len() };
            let bitmaps = groups.trans_blocks(0, step.free.len() as u32);
            let trans = vol.begin(TransSize::new(bitmaps + step.clears as u32 + 1, revokes as u32))?;
            for (buf, base, first, end) in &step.clear {
                let mut bytes = trans.modify(buf);
                for slot in *first..*end {
                    put_pointer(&mut bytes, *base, slot, 0);
                }
            }
            // A block that the bitmap does not call used is damage from before: no pointer leads to it any more, the rest is freed.
            let mut damage = Ok(());
            for run in runs(&step.free) {
                damage = damage.and(groups.free_blocks(&trans, run));
            }
            self.d.blocks = self.d.blocks.saturating_sub(step.free.len() as u64).max(1);
            self.save(&trans);
            trans.commit();
            damage?;
        }
    }

    /// Adds to the step what can be freed below `buf`. True when nothing will be left in `buf`.
    fn collect(
        &self,
        buf: &Buf,
        level: usize,
        first: u64,
        range: (u64, u64),
        step: &mut Step,
    ) -> Result<bool> {
        let (base, slots, span) = (base(level), self.slots(level), self.span(level));
        let bytes = buf.read();
        let bottom = level + 1 == usize::from(self.d.height);
        let start = (range.0.saturating_sub(first) / span).min(slots as u64) as usize;
        let end = (range.1.saturating_sub(first).div_ceil(span)).min(slots as u64) as usize;
        let mut run: Option<(usize, usize)> = None;
        let flush = |run: &mut Option<(usize, usize)>, step: &mut Step| {
            if let Some((a, b)) = run.take() {
                step.clear.push((buf.clone(), base, a, b));
            }
        };
        let mut emptied = 0;
        for slot in start..end {
            if step.full {
                break;
            }
            let Some(at) = self.checked(buf.block(), pointer_at(&bytes, base, slot))? else { continue };
            let goes = bottom || {
                let child = self.indirect(at)?;
                self.collect(&child, level + 1, first.saturating_add(slot as u64 * span), range, step)?
            };
            if goes && step.admit(self.fs.volume().rgrps()?.group_of(at).map(|g| g.entry().addr), at) {
                if !bottom {
                    step.indirect += 1;
                    step.drop_clears(at);
                }
                emptied += 1;
                run = match run {
                    Some((a, b)) if b == slot => Some((a, slot + 1)),
                    other => {
                        let mut other = other;
                        flush(&mut other, step);
                        Some((slot, slot + 1))
                    }
                };
            }
        }
        flush(&mut run, step);
        if emptied > 0 {
            step.clears += 1;
            step.full |= step.clears >= STEP_CLEARS;
        }
        let live = (0..slots).filter(|s| pointer_at(&bytes, base, *s) != 0).count();
        Ok(live == emptied)
    }
}

impl Step {
    /// A block that is freed itself needs no zeroed pointers. Its entries are the latest.
    fn drop_clears(&mut self, at: BlockNo) {
        let keep = self.clear.iter().rposition(|(buf, ..)| buf.block() != at).map_or(0, |i| i + 1);
        self.clears -= usize::from(keep < self.clear.len());
        self.clear.truncate(keep);
    }

    /// False when the transaction has no room for one more.
    fn admit(&mut self, group: Option<u64>, at: BlockNo) -> bool {
        let Some(group) = group else { return false };
        if !self.groups.contains(&group) {
            if self.groups.len() == STEP_GROUPS {
                self.full = true;
                return false;
            }
            self.groups.push(group);
        }
        if self.free.len() >= STEP_BLOCKS {
            self.full = true;
            return false;
        }
        self.free.push(at);
        true
    }
}

/// The blocks as runs. Resource groups have headers between them, so that no run leaves its group.
pub(crate) fn runs(blocks: &[BlockNo]) -> Vec<Blocks> {
    let mut sorted = blocks.to_vec();
    sorted.sort_unstable();
    let mut runs: Vec<Blocks> = Vec::new();
    for at in sorted {
        match runs.last_mut() {
            Some(run) if run.start.0 + u64::from(run.len) == at.0 => run.len += 1,
            _ => runs.push(Blocks { start: at, len: 1 }),
        }
    }
    runs
}
