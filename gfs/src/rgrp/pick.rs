//! Which block becomes a dinode, chosen before the transaction, because its glocks must be had before.

use super::{Reservation, Rgrps, corrupt, outside};
use crate::glock::AcquireFlags;
use crate::{BlockNo, Result};

impl Rgrps {
    /// Claims `want` blocks of the group of `block`, and picks this block for the dinode. `None`: it is not free, or the group has less.
    pub fn reserve_dinode_at(&self, block: BlockNo, want: u32) -> Result<Option<Reservation>> {
        let group = self.group_of(block).ok_or_else(|| outside(block))?;
        let res = self.try_group(&group, &[], AcquireFlags::NONE, want, block)?;
        Ok(match res {
            Some(res) if res.pick_at(block)? => Some(res),
            _ => None,
        })
    }
}

impl Reservation {
    /// Chooses the block that [`Self::alloc_dinode`] will take, so that its glock can be had before the transaction.
    pub fn pick_dinode(&self) -> Result<BlockNo> {
        assert!(self.claim.get() > 0 && self.picked.get().is_none(), "one dinode of a claim is picked once");
        let g = &*self.giver().group;
        let mut guard = g.state.lock();
        let load = guard.load;
        let l = guard.loaded.as_mut().ok_or_else(|| g.unread())?;
        let goal = self.goal.get().0;
        let from = if g.entry.contains(goal) { (goal - g.entry.data0) as u32 + 1 } else { l.next };
        let (k, _) = l
            .allocatable
            .find_run(from, 1)
            .ok_or_else(|| corrupt(g.entry.addr, "fewer free blocks than were claimed".to_owned()))?;
        l.allocatable.remove(k, 1);
        self.picked.set(Some((load, k)));
        Ok(BlockNo(g.entry.data0 + u64::from(k)))
    }

    /// Another one than was picked, if the group has another.
    pub fn pick_next_dinode(&self) -> Result<BlockNo> {
        let g = &*self.giver().group;
        if let Some((load, k)) = self.picked.take() {
            let mut guard = g.state.lock();
            if guard.load == load
                && let Some(l) = guard.loaded.as_mut()
            {
                l.allocatable.add(k, 1);
            }
            drop(guard);
            self.goal.set(BlockNo(g.entry.data0 + u64::from(k)));
        }
        self.pick_dinode()
    }

    /// Picks this block; false when it is not to be had.
    fn pick_at(&self, block: BlockNo) -> Result<bool> {
        let g = &*self.giver().group;
        let k = (block.0 - g.entry.data0) as u32;
        let mut guard = g.state.lock();
        let load = guard.load;
        let l = guard.loaded.as_mut().ok_or_else(|| g.unread())?;
        let free = l.allocatable.find_run(k, 1).is_some_and(|(found, _)| found == k);
        if free {
            l.allocatable.remove(k, 1);
            self.picked.set(Some((load, k)));
        }
        Ok(free)
    }
}
