//! Directories: names to inode numbers.
//!
//! A small directory is *linear*: its records stand in the dinode. A larger one is *hashed*: its contents are a table of 2^depth leaf
//! addresses, indexed by the top bits of the name's hash; a leaf of depth d is in 2^(depth − d) adjacent slots. A leaf that is full is split
//! in two; when its depth is already the table's, the table is doubled first; at the greatest depth leaves are chained.
//!
//! An insert has two halves, so that nothing can fail after something was changed that matters: [`Locked::dir_plan`] (before the transaction)
//! says how many blocks it can take, [`Locked::dir_make_room`] splits until the name has a place, and only then [`Locked::dir_place`] writes
//! the record. Each split and each doubling leaves a valid directory.
//!
//! *Positions.* A cookie is (32 bits of hash, 31 bits of a second hash) of a name: the same on every node, and untouched by inserts, removes,
//! splits. Records are returned in that order, `.` and `..` among them.
//!
//! Locks: the directory's glock, EX to change.

mod hash;
mod leaf;
pub(crate) mod records;

use crate::inode::Locked;
use crate::ondisk::checksum::disk_hash;
use crate::ondisk::dinode::{DIF_EXHASH, DIR_MAX_DEPTH, Dinode, Time};
use crate::ondisk::dirent::{NAME_MAX, put_target, rec_min};
use crate::ondisk::leaf::Leaf;
use crate::rgrp::Reservation;
use crate::trans::Trans;
use crate::{BlockNo, Error, InodeNo, Result};
use records::{Area, Found, OwnedRecord};

pub(crate) use records::Target;

/// What an insert will take at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct DirPlan {
    /// Blocks to allocate.
    pub(crate) alloc: u64,
    /// Metadata blocks, old and new, that will be changed, the dinode not counted.
    pub(crate) touched: u64,
}

/// A name, checked and hashed.
#[derive(Clone, Copy)]
pub(crate) struct Name<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) hash: u32,
}

impl<'a> Name<'a> {
    /// Errors: ENAMETOOLONG; EINVAL for what can never be a name.
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Self> {
        if bytes.len() > NAME_MAX {
            return Err(Error::Errno(libc::ENAMETOOLONG));
        }
        if bytes.is_empty() || bytes.contains(&b'/') || bytes.contains(&0) {
            return Err(Error::Errno(libc::EINVAL));
        }
        Ok(Self { bytes, hash: disk_hash(bytes) })
    }

    pub(crate) fn is_dots(&self) -> bool {
        matches!(self.bytes, b"." | b"..")
    }

    fn need(&self) -> usize {
        rec_min(self.bytes.len())
    }
}

pub(crate) const DOT: &[u8] = b".";
pub(crate) const DOTDOT: &[u8] = b"..";

/// One name of a directory listing.
#[derive(Clone, Copy, Debug)]
pub struct DirEntry<'a> {
    pub ino: InodeNo,
    /// `mode >> 12`, as in `d_type`.
    pub ty: u16,
    pub name: &'a [u8],
    /// Position behind this entry.
    pub next: u64,
}

/// Position of a name in the order of listings. Never the greatest value, so that "behind it" exists.
fn cookie(hash: u32, name: &[u8]) -> u64 {
    // FNV-1a: independent of the CRC that is the first half.
    let second = name
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    let low = ((second ^ (second >> 32)) & 0x7fff_ffff).min(0x7fff_fffe);
    (u64::from(hash) << 31) | low
}

impl Locked<'_> {
    fn linear(bytes: &[u8], at: BlockNo) -> Area<'_> {
        Area { at, bytes, base: Dinode::SIZE }
    }

    pub(crate) fn require_dir(&self) -> Result<()> {
        if self.d.is_dir() { Ok(()) } else { Err(Error::Errno(libc::ENOTDIR)) }
    }

    /// Look a name up. The dinode is that of a directory.
    pub(crate) fn dir_find(&self, name: Name<'_>) -> Result<Option<Target>> {
        if !self.d.is_exhash() {
            let bytes = self.buf.read();
            let found = Self::linear(&bytes, self.buf.block()).find(name.hash, name.bytes)?;
            return Ok(found.map(|f| f.target));
        }
        Ok(self.leaf_find(name)?.map(|(_, found)| found.target))
    }

    /// What inserting this name will take. The name is not there.
    pub(crate) fn dir_plan(&self, name: Name<'_>) -> Result<DirPlan> {
        let need = name.need();
        if self.d.is_exhash() {
            return self.hash_plan(name);
        }
        let bytes = self.buf.read();
        let area = Self::linear(&bytes, self.buf.block());
        let used = area.used()?;
        if used + need <= area.room() {
            return Ok(DirPlan::default());
        }
        // Becomes hashed: one leaf with all records, and whatever that leaf then needs.
        let mut plan = DirPlan { alloc: 1, touched: 1 };
        if used + need > self.leaf_room() {
            let more = self.split_plan(area.collect()?, 0, self.geo().new_hash_depth(), name);
            plan.alloc += more.alloc;
            plan.touched += more.touched;
        }
        Ok(plan)
    }

    /// Split, double, convert until this name fits somewhere. The dinode is to be saved by the caller.
    pub(crate) fn dir_make_room(
        &mut self,
        trans: &Trans,
        res: Option<&Reservation>,
        name: Name<'_>,
        now: Time,
    ) -> Result<()> {
        if !self.d.is_exhash() {
            let bytes = self.buf.read();
            let area = Self::linear(&bytes, self.buf.block());
            if area.gap(name.need())?.is_some() {
                return Ok(());
            }
            if area.used()? + name.need() <= area.room() {
                let all = area.collect()?;
                records::pack(&mut trans.modify(&self.buf), Dinode::SIZE, &all);
                return Ok(());
            }
            let all = area.collect()?;
            let res = res.ok_or_else(|| Self::no_reservation(self.buf.block()))?;
            self.make_exhash(trans, res, &all, now)?;
        }
        self.hash_make_room(trans, res, name, now)
    }

    /// Write the record for which [`Self::dir_make_room`] has made room. The dinode is to be saved by the caller.
    pub(crate) fn dir_place(
        &mut self,
        trans: &Trans,
        name: Name<'_>,
        target: Target,
        now: Time,
    ) -> Result<()> {
        if self.d.is_exhash() {
            self.leaf_place(trans, name, target, now)?;
        } else {
            let gap = Self::linear(&self.buf.read(), self.buf.block()).gap(name.need())?;
            let gap = gap.ok_or_else(|| Self::no_reservation(self.buf.block()))?;
            records::place(&mut trans.modify(&self.buf), gap, name.hash, target, name.bytes);
        }
        self.d.entries += 1;
        Ok(())
    }

    /// Delete a name that is there. The dinode is to be saved by the caller.
    pub(crate) fn dir_remove(&mut self, trans: &Trans, name: Name<'_>, now: Time) -> Result<()> {
        let (buf, found) = self.dir_locate(name)?;
        {
            let mut bytes = trans.modify(&buf);
            records::remove(&mut bytes, &found);
            if self.d.is_exhash() {
                let mut head = Leaf::decode(&bytes).map_err(|e| e.at(buf.block()))?;
                head.entries = head.entries.saturating_sub(1);
                head.sec = now.sec;
                head.nsec = now.nsec;
                head.encode(&mut bytes);
            }
        }
        self.d.entries = self.d.entries.saturating_sub(1);
        Ok(())
    }

    /// Let a name that is there lead to another inode.
    pub(crate) fn dir_retarget(&mut self, trans: &Trans, name: Name<'_>, target: Target) -> Result<()> {
        let (buf, found) = self.dir_locate(name)?;
        put_target(&mut trans.modify(&buf), found.offset, target.num, target.ty);
        Ok(())
    }

    fn dir_locate(&self, name: Name<'_>) -> Result<(crate::cache::Buf, Found)> {
        let found = if self.d.is_exhash() {
            self.leaf_find(name)?
        } else {
            Self::linear(&self.buf.read(), self.buf.block())
                .find(name.hash, name.bytes)?
                .map(|found| (self.buf.clone(), found))
        };
        found.ok_or(Error::Errno(libc::ENOENT))
    }

    /// All entries from position `from` on, in order, until `sink` returns false.
    pub(crate) fn dir_read(
        &self,
        from: u64,
        mut sink: impl FnMut(DirEntry<'_>) -> Result<bool>,
    ) -> Result<()> {
        if !self.d.is_exhash() {
            let bytes = self.buf.read();
            Self::emit(&[Self::linear(&bytes, self.buf.block())], from, &mut sink)?;
            return Ok(());
        }
        let hash = (from >> 31).min(u64::from(u32::MAX)) as u32;
        if from >> 31 > u64::from(u32::MAX) {
            return Ok(());
        }
        let depth = u32::from(self.d.depth);
        let mut index = self.slot_of(hash);
        while index < 1 << depth {
            let chain = self.chain_at(index)?;
            let areas: Vec<_> = chain.iter().map(|leaf| (leaf.buf.block(), leaf.buf.read())).collect();
            let areas: Vec<Area<'_>> =
                areas.iter().map(|(at, bytes)| Area { at: *at, bytes, base: Leaf::SIZE }).collect();
            if !Self::emit(&areas, from, &mut sink)? {
                return Ok(());
            }
            let width = 1u32 << (depth - u32::from(chain[0].head.depth));
            index = (index & !(width - 1)) + width;
        }
        Ok(())
    }

    fn emit(
        areas: &[Area<'_>],
        from: u64,
        sink: &mut impl FnMut(DirEntry<'_>) -> Result<bool>,
    ) -> Result<bool> {
        let mut all = Vec::new();
        for area in areas {
            for r in area.records() {
                let r = r?;
                let key = cookie(r.head.hash, r.name);
                if key >= from {
                    all.push((key, r));
                }
            }
        }
        all.sort_unstable_by(|a, b| (a.0, a.1.name).cmp(&(b.0, b.1.name)));
        for (key, r) in all {
            if !sink(DirEntry { ino: r.head.num, ty: r.head.ty, name: r.name, next: key + 1 })? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn no_reservation(block: BlockNo) -> Error {
        Error::Corrupt { block, what: "directory insert needs more blocks than were planned".to_owned() }
    }

    /// The inode that `..` leads to.
    pub(crate) fn dir_parent(&self) -> Result<InodeNo> {
        match self.dir_find(Name::new(DOTDOT)?)? {
            Some(target) => Ok(target.num),
            None => Err(Error::Corrupt { block: self.buf.block(), what: "directory without ..".to_owned() }),
        }
    }

    /// Turn a linear directory into a hashed one with a single leaf.
    fn make_exhash(
        &mut self,
        trans: &Trans,
        res: &Reservation,
        all: &[OwnedRecord],
        now: Time,
    ) -> Result<()> {
        let geo = self.geo();
        let (at, _) = self.take(trans, res, 1)?;
        let leaf = self.init_meta(trans, at, crate::ondisk::header::MetaType::Leaf)?;
        let head = Leaf {
            entries: all.len() as u16,
            inode: self.inode.no.addr.0,
            dist: 1,
            sec: now.sec,
            nsec: now.nsec,
            ..Leaf::default()
        };
        {
            let mut bytes = trans.modify(&leaf);
            head.encode(&mut bytes);
            records::pack(&mut bytes, Leaf::SIZE, all);
        }
        let mut bytes = trans.modify(&self.buf);
        bytes[Dinode::SIZE..].fill(0);
        for i in 0..geo.new_hash_ptrs() {
            crate::ondisk::put_pointer(&mut bytes, Dinode::SIZE, i, at.0);
        }
        drop(bytes);
        self.d.depth = geo.new_hash_depth();
        self.d.size = 8 << self.d.depth;
        self.d.flags |= DIF_EXHASH;
        self.d.payload_format = 0;
        assert!(self.d.depth <= DIR_MAX_DEPTH, "depth follows from the block size");
        Ok(())
    }
}

/// Payload of a new linear directory: `.` and `..`.
pub(crate) fn init_linear(bytes: &mut [u8], own: InodeNo, parent: InodeNo) {
    use crate::ondisk::dirent::Dirent;
    let record = |num, name: &[u8]| OwnedRecord {
        head: Dirent { num, hash: disk_hash(name), ty: 4, ..Dirent::default() },
        name: name.to_vec(),
    };
    records::pack(bytes, Dinode::SIZE, &[record(own, DOT), record(parent, DOTDOT)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_follow_the_hash_and_never_overflow() {
        for n in 0..2000 {
            let name = format!("name{n}").into_bytes();
            let hash = disk_hash(&name);
            let c = cookie(hash, &name);
            assert_eq!((c >> 31) as u32, hash);
            assert!(((c + 1) >> 31) as u32 == hash && i64::try_from(c + 1).is_ok());
        }
    }

    #[test]
    fn names_are_checked() {
        assert!(matches!(Name::new(&[b'a'; 256]), Err(Error::Errno(libc::ENAMETOOLONG))));
        assert!(matches!(Name::new(b""), Err(Error::Errno(libc::EINVAL))));
        assert!(matches!(Name::new(b"a/b"), Err(Error::Errno(libc::EINVAL))));
        assert!(Name::new(&[b'a'; 255]).is_ok());
    }

    #[test]
    fn new_directory_is_what_mkfs_writes() {
        let mut bytes = vec![0; 4096];
        let own = InodeNo { addr: BlockNo(7), formal: 3 };
        init_linear(&mut bytes, own, InodeNo { addr: BlockNo(9), formal: 4 });
        let all: Vec<_> = Area { at: BlockNo(7), bytes: &bytes, base: Dinode::SIZE }
            .records()
            .map(|r| r.map(|r| (r.head.rec_len, r.name.to_vec(), r.head.num.addr.0)))
            .collect::<Result<_>>()
            .unwrap();
        assert_eq!(all, [(48, b".".to_vec(), 7), (4096 - 280, b"..".to_vec(), 9)]);
    }
}
