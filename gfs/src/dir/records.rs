//! Editing the records of one directory block: a linear directory's dinode or a leaf.
//!
//! Deleting a record gives its bytes to the record before it, or empties it when it is the first of the block. The slack behind the name
//! of a used record is the free space of the block; [`pack`] joins it all at the end.
//!
//! Everything here works on plain bytes: no locks, no I/O. `base` is where the records begin (232 in a dinode, 104 in a leaf); a fault on
//! disk is [`Error::Corrupt`](crate::Error::Corrupt) with the block's number.

use crate::ondisk::dirent::{self, Dirent, Records, rec_min};
use crate::{BlockNo, InodeNo, Result};

/// What a directory entry says about its target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Target {
    pub(crate) num: InodeNo,
    /// `mode >> 12`.
    pub(crate) ty: u16,
}

/// Where a name was found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) offset: usize,
    /// Record before it, none when it is the first of the block.
    previous: Option<usize>,
    pub(crate) target: Target,
}

/// A record taken out of a block, to be packed into another one.
#[derive(Clone, Debug)]
pub(crate) struct OwnedRecord {
    pub(crate) head: Dirent,
    pub(crate) name: Vec<u8>,
}

/// A block with records: where it lies, its bytes, and where the records begin.
#[derive(Clone, Copy)]
pub(crate) struct Area<'a> {
    pub(crate) at: BlockNo,
    pub(crate) bytes: &'a [u8],
    pub(crate) base: usize,
}

impl<'a> Area<'a> {
    /// All records, an empty first one included.
    fn all(self) -> impl Iterator<Item = Result<dirent::Record<'a>>> {
        Records::new(self.bytes, self.base).map(move |r| r.map_err(|e| e.at(self.at)))
    }

    /// The used records, in place order.
    pub(crate) fn records(self) -> impl Iterator<Item = Result<dirent::Record<'a>>> {
        self.all().filter(|r| !matches!(r, Ok(r) if r.head.is_empty()))
    }

    /// Look a name up.
    pub(crate) fn find(self, hash: u32, name: &[u8]) -> Result<Option<Found>> {
        let mut previous = None;
        for r in self.all() {
            let r = r?;
            if !r.head.is_empty() && r.head.hash == hash && r.name == name {
                let target = Target { num: r.head.num, ty: r.head.ty };
                return Ok(Some(Found { offset: r.offset, previous, target }));
            }
            previous = Some(r.offset);
        }
        Ok(None)
    }

    /// First record whose free part holds `need` bytes.
    pub(crate) fn gap(self, need: usize) -> Result<Option<usize>> {
        for r in self.all() {
            let r = r?;
            if r.head.slack() >= need {
                return Ok(Some(r.offset));
            }
        }
        Ok(None)
    }

    /// Bytes that packed records would take.
    pub(crate) fn used(self) -> Result<usize> {
        self.records().map(|r| r.map(|r| rec_min(r.name.len()))).sum()
    }

    /// Bytes there are for records.
    pub(crate) fn room(self) -> usize {
        self.bytes.len() - self.base
    }

    /// All used records, taken out.
    pub(crate) fn collect(self) -> Result<Vec<OwnedRecord>> {
        self.records().map(|r| r.map(|r| OwnedRecord { head: r.head, name: r.name.to_vec() })).collect()
    }
}

fn head_at(block: &[u8], offset: usize) -> Dirent {
    Dirent::decode(&block[offset..]).expect("invariant: the record was walked before it is edited")
}

/// Put a record into the free part of the record at `offset`, which [`Area::gap`] found for it.
pub(crate) fn place(block: &mut [u8], offset: usize, hash: u32, target: Target, name: &[u8]) {
    let host = head_at(block, offset);
    let used = usize::from(host.rec_len) - host.slack();
    if used > 0 {
        dirent::put_rec_len(block, offset, used as u16);
    }
    let head =
        Dirent { num: target.num, hash, rec_len: host.slack() as u16, ty: target.ty, ..Dirent::default() };
    dirent::put_record(block, offset + used, head, name);
}

/// Delete the record that [`Area::find`] returned; nothing may have changed in between.
pub(crate) fn remove(block: &mut [u8], found: &Found) {
    match found.previous {
        None => dirent::clear_target(block, found.offset),
        Some(previous) => {
            let joined = head_at(block, previous).rec_len + head_at(block, found.offset).rec_len;
            dirent::put_rec_len(block, previous, joined);
        }
    }
}

/// Fill a block with these records, without gaps; the last one takes what is left. None: one empty record.
pub(crate) fn pack(block: &mut [u8], base: usize, all: &[OwnedRecord]) {
    block[base..].fill(0);
    let mut at = base;
    for (i, r) in all.iter().enumerate() {
        let rec_len = if i + 1 == all.len() { block.len() - at } else { rec_min(r.name.len()) };
        dirent::put_record(block, at, Dirent { rec_len: rec_len as u16, ..r.head }, &r.name);
        at += rec_len;
    }
    if all.is_empty() {
        dirent::put_sentinel(block, base, (block.len() - base) as u16);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ondisk::checksum::disk_hash;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const BASE: usize = 104;

    fn area(bytes: &[u8]) -> Area<'_> {
        Area { at: BlockNo(1), bytes, base: BASE }
    }

    fn target(n: u64) -> Target {
        Target { num: InodeNo { addr: BlockNo(n), formal: n }, ty: 8 }
    }

    #[test]
    fn garbage_is_an_error_and_never_a_panic() {
        proptest!(|(bytes in proptest::collection::vec(any::<u8>(), BASE..600))| {
            let _ = area(&bytes).collect();
            let _ = area(&bytes).find(1, b"x");
            let _ = area(&bytes).gap(48);
            let _ = area(&bytes).used();
        });
    }

    #[test]
    fn prop_block_matches_a_map() {
        proptest!(|(ops in proptest::collection::vec((any::<bool>(), 0u64..40, 1usize..60), 1..200))| {
            let mut block = vec![0; 512];
            pack(&mut block, BASE, &[]);
            let mut model = BTreeMap::new();
            for (add, key, len) in ops {
                let name = format!("{key:0len$}").into_bytes();
                let (hash, need) = (disk_hash(&name), rec_min(name.len()));
                let found = area(&block).find(hash, &name).unwrap();
                prop_assert_eq!(found.map(|f| f.target.num.addr.0), model.get(&name).copied());
                match (add, found) {
                    (true, None) => {
                        let mut gap = area(&block).gap(need).unwrap();
                        if gap.is_none() && area(&block).used().unwrap() + need <= area(&block).room() {
                            let all = area(&block).collect().unwrap();
                            pack(&mut block, BASE, &all);
                            gap = area(&block).gap(need).unwrap();
                            prop_assert!(gap.is_some(), "packing joins all free bytes");
                        }
                        if let Some(at) = gap {
                            place(&mut block, at, hash, target(key + 1), &name);
                            model.insert(name, key + 1);
                        }
                    }
                    (true, Some(f)) => {
                        dirent::put_target(&mut block, f.offset, target(key + 100).num, 8);
                        model.insert(name, key + 100);
                    }
                    (false, Some(f)) => {
                        remove(&mut block, &f);
                        model.remove(&name);
                    }
                    (false, None) => {}
                }
                let now: BTreeMap<Vec<u8>, u64> =
                    area(&block).records().map(|r| r.unwrap()).map(|r| (r.name.to_vec(), r.head.num.addr.0)).collect();
                prop_assert_eq!(&now, &model);
            }
        });
    }
}
