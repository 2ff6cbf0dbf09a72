//! Contents of directories: records, hash tables, leaves and their chains.

use super::{Checker, Entry, EntryKind, Fault};
use crate::Result;
use crate::ondisk::bitmap::BlockState;
use crate::ondisk::checksum::disk_hash;
use crate::ondisk::dinode::Dinode;
use crate::ondisk::dirent::Records;
use crate::ondisk::leaf::Leaf;
use crate::ondisk::u64_at;
use std::collections::BTreeSet;

/// The hashes that may stand in a leaf: first and last.
type HashRange = (u64, u64);

fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

impl Checker<'_> {
    /// Everything in a directory. `table` holds the pieces of its hash table with their block numbers. Returns the blocks
    /// claimed for leaves.
    pub(super) fn directory(
        &mut self,
        di: &Dinode,
        dinode: &[u8],
        table: Vec<(u64, Vec<u8>)>,
        unlinked: bool,
    ) -> Result<u64> {
        let dir = di.num.addr.0;
        let first = self.entries.len();
        let mut counted = 0;
        let mut leaves = 0;
        if di.is_exhash() {
            leaves = self.hashed(di, table, &mut counted)?;
        } else {
            let wanted = self.geo.stuffed() as u64;
            if di.size != wanted {
                self.report.add(Fault::DirSize { dir, found: di.size, wanted });
            }
            let mut names = BTreeSet::new();
            counted = self.records(dir, dir, dinode, Dinode::SIZE, None, &mut names);
        }
        // the unlink has cleared the count, not the entries
        if counted != u64::from(di.entries) && !(unlinked && di.entries == 0) {
            self.report.add(Fault::DirEntries { dir, found: di.entries.into(), counted });
        }
        for (kind, name) in [(EntryKind::Dot, "."), (EntryKind::DotDot, "..")] {
            let n = self.entries[first..].iter().filter(|e| e.kind == kind).count();
            if n != 1 {
                self.report.add(Fault::DotEntry { dir, name });
            }
        }
        Ok(leaves)
    }

    fn hashed(&mut self, di: &Dinode, pieces: Vec<(u64, Vec<u8>)>, counted: &mut u64) -> Result<u64> {
        let dir = di.num.addr.0;
        let slots = 1usize << di.depth;
        let mut bytes = vec![0u8; slots * 8];
        for (l, piece) in pieces {
            let from = (l as usize).saturating_mul(self.geo.jbsize());
            if let Some(room) = bytes.get_mut(from..) {
                let n = room.len().min(piece.len());
                room[..n].copy_from_slice(&piece[..n]);
            }
        }
        let table: Vec<u64> = (0..slots).map(|i| u64_at(&bytes, 8 * i)).collect();
        let mut owned = 0;
        let mut start = 0;
        while start < slots {
            let leaf = table[start];
            let len = table[start..].iter().take_while(|&&p| p == leaf).count();
            if leaf == 0 {
                self.report.add(Fault::HashTable { dir, why: format!("slot {start} is empty") });
            } else if !len.is_power_of_two() || !start.is_multiple_of(len) {
                let why = format!("leaf {leaf} has {len} slots from {start}");
                self.report.add(Fault::HashTable { dir, why });
                owned += self.chain(di, leaf, None, (0, u64::from(u32::MAX)), counted)?;
            } else {
                let shift = 32 - u32::from(di.depth);
                let range = ((start as u64) << shift, (((start + len) as u64) << shift) - 1);
                let depth = di.depth - len.trailing_zeros() as u16;
                owned += self.chain(di, leaf, Some(depth), range, counted)?;
            }
            start += len;
        }
        Ok(owned)
    }

    /// A leaf and those chained to it.
    fn chain(
        &mut self,
        di: &Dinode,
        first: u64,
        depth: Option<u16>,
        range: HashRange,
        counted: &mut u64,
    ) -> Result<u64> {
        let dir = di.num.addr.0;
        let mut names = BTreeSet::new();
        let mut buf = self.buffer();
        let (mut at, mut owned) = (first, 0);
        while at != 0 {
            // a block that is claimed already ends the chain, so loops end
            if !self.claim(dir, at, BlockState::Used) {
                break;
            }
            owned += 1;
            self.read(at, &mut buf)?;
            let leaf = match Leaf::decode(&buf) {
                Ok(leaf) => leaf,
                Err(e) => {
                    self.report.add(Fault::DirRecord { dir, block: at, why: e.to_string() });
                    break;
                }
            };
            if let Some(wanted) = depth
                && leaf.depth != wanted
            {
                self.report.add(Fault::LeafDepth { dir, leaf: at, found: leaf.depth, wanted });
            }
            let n = self.records(dir, at, &buf, Leaf::SIZE, Some(range), &mut names);
            if n != u64::from(leaf.entries) {
                self.report.add(Fault::LeafEntries { dir, leaf: at, found: leaf.entries.into(), counted: n });
            }
            *counted += n;
            at = leaf.next;
        }
        Ok(owned)
    }

    /// The records of one block. Returns how many are used.
    fn records(
        &mut self,
        dir: u64,
        block: u64,
        bytes: &[u8],
        start: usize,
        range: Option<HashRange>,
        names: &mut BTreeSet<Vec<u8>>,
    ) -> u64 {
        let mut used = 0;
        for record in Records::new(bytes, start) {
            let r = match record {
                Ok(r) => r,
                Err(e) => {
                    self.report.add(Fault::DirRecord { dir, block, why: e.to_string() });
                    break;
                }
            };
            if r.head.is_empty() {
                continue;
            }
            used += 1;
            let wanted = disk_hash(r.name);
            if r.head.hash != wanted {
                let (name, found) = (text(r.name), r.head.hash);
                self.report.add(Fault::EntryHash { dir, block, name, found, wanted });
            } else if let Some((low, high)) = range
                && !(low..=high).contains(&u64::from(wanted))
            {
                self.report.add(Fault::EntryLeaf { dir, leaf: block, name: text(r.name) });
            }
            if r.name.iter().any(|&c| c == 0 || c == b'/') {
                let why = format!("a name with a slash or a NUL at byte {}", r.offset);
                self.report.add(Fault::DirRecord { dir, block, why });
            }
            if !names.insert(r.name.to_vec()) {
                self.report.add(Fault::DuplicateName { dir, name: text(r.name) });
            }
            let kind = match r.name {
                b"." => EntryKind::Dot,
                b".." => EntryKind::DotDot,
                _ => EntryKind::Name,
            };
            self.entries.push(Entry {
                dir,
                block,
                offset: r.offset as u16,
                ty: r.head.ty,
                target: r.head.num.addr.0,
                formal: r.head.num.formal,
                kind,
            });
        }
        used
    }

    /// The name of an entry, read again; for messages.
    pub(super) fn name_of(&self, entry: &Entry) -> String {
        let mut buf = self.buffer();
        let Ok(()) = self.read(entry.block, &mut buf) else { return "?".to_owned() };
        match Records::new(&buf, entry.offset.into()).next() {
            Some(Ok(r)) => text(r.name),
            _ => "?".to_owned(),
        }
    }
}
