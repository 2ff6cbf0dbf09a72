//! Leaves of a hashed directory: finding and placing names in a chain.

use super::records::{self, Area, Found};
use super::{Name, Target};
use crate::cache::Buf;
use crate::inode::Locked;
use crate::ondisk::dinode::Time;
use crate::ondisk::header::MetaType;
use crate::ondisk::leaf::Leaf;
use crate::trans::Trans;
use crate::{BlockNo, Error, Result};

/// More leaves than a chain can have without being a loop: every leaf holds a name, and no more names than this share 17 hash bits in
/// a directory that anybody can still list.
const MAX_CHAIN: usize = 1 << 16;

/// A leaf, its header decoded and checked.
pub(super) struct LeafBuf {
    pub(super) buf: Buf,
    pub(super) head: Leaf,
}

/// The records of a leaf block.
pub(super) fn area(bytes: &[u8], at: BlockNo) -> Area<'_> {
    Area { at, bytes, base: Leaf::SIZE }
}

impl Locked<'_> {
    /// Bytes for records in a leaf.
    pub(super) fn leaf_room(&self) -> usize {
        self.geo().block_size as usize - Leaf::SIZE
    }

    pub(super) fn leaf_at(&self, from: BlockNo, at: u64) -> Result<LeafBuf> {
        let Some(at) = self.checked(from, at)? else {
            return Err(Error::Corrupt { block: from, what: "directory slot without a leaf".to_owned() });
        };
        let buf = self.fs.volume().cache().read(self.glock(), at, MetaType::Leaf)?;
        let head = buf.with(Leaf::decode).map_err(|e| e.at(at))?;
        if head.depth > self.d.depth {
            let what = format!("leaf of depth {} in a directory of depth {}", head.depth, self.d.depth);
            return Err(Error::Corrupt { block: at, what });
        }
        Ok(LeafBuf { buf, head })
    }

    /// Calls `f` for each leaf of the chain that table slot `index` leads to, until it gives an answer.
    pub(super) fn in_chain<T>(
        &self,
        index: u32,
        mut f: impl FnMut(LeafBuf) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        let (mut from, mut next) = (self.inode.no.addr, self.table_get(index)?);
        for _ in 0..MAX_CHAIN {
            let leaf = self.leaf_at(from, next)?;
            (from, next) = (leaf.buf.block(), leaf.head.next);
            if let Some(answer) = f(leaf)? {
                return Ok(Some(answer));
            }
            if next == 0 {
                return Ok(None);
            }
        }
        Err(Error::Corrupt { block: from, what: "chain of leaves without end".to_owned() })
    }

    /// The whole chain of a table slot; never empty.
    pub(super) fn chain_at(&self, index: u32) -> Result<Vec<LeafBuf>> {
        let mut chain = Vec::new();
        self.in_chain(index, |leaf| {
            chain.push(leaf);
            Ok(None::<()>)
        })?;
        Ok(chain)
    }

    pub(super) fn leaf_find(&self, name: Name<'_>) -> Result<Option<(Buf, Found)>> {
        self.in_chain(self.slot_of(name.hash), |leaf| {
            let found = area(&leaf.buf.read(), leaf.buf.block()).find(name.hash, name.bytes)?;
            Ok(found.map(|found| (leaf.buf, found)))
        })
    }

    /// A leaf of the name's chain that has, or after packing would have, room for it.
    pub(super) fn leaf_with_room(&self, name: Name<'_>) -> Result<Option<LeafBuf>> {
        self.in_chain(self.slot_of(name.hash), |leaf| {
            let bytes = leaf.buf.read();
            let area = area(&bytes, leaf.buf.block());
            let fits = area.gap(name.need())?.is_some() || area.used()? + name.need() <= area.room();
            Ok(fits.then_some(leaf))
        })
    }

    pub(super) fn leaf_place(
        &mut self,
        trans: &Trans,
        name: Name<'_>,
        target: Target,
        now: Time,
    ) -> Result<()> {
        let Some(mut leaf) = self.leaf_with_room(name)? else {
            return Err(Self::no_reservation(self.inode.no.addr));
        };
        let block = leaf.buf.block();
        let gap = area(&leaf.buf.read(), block).gap(name.need())?;
        let mut bytes = trans.modify(&leaf.buf);
        let gap = match gap {
            Some(gap) => gap,
            None => {
                let all = area(&bytes, block).collect()?;
                records::pack(&mut bytes, Leaf::SIZE, &all);
                area(&bytes, block).gap(name.need())?.ok_or_else(|| Self::no_reservation(block))?
            }
        };
        records::place(&mut bytes, gap, name.hash, target, name.bytes);
        leaf.head.entries = leaf.head.entries.saturating_add(1);
        leaf.head.sec = now.sec;
        leaf.head.nsec = now.nsec;
        leaf.head.encode(&mut bytes);
        Ok(())
    }
}
