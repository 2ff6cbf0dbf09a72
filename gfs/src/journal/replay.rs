//! Replay of a journal: any journal, written by us or by a kernel.
//!
//! A journal is a ring. The *head* is the valid header with the highest sequence number; what lies between its tail and
//! itself is live. Replay reads the live part twice: pass 0 collects revokes (copies of a block logged before its revoke must
//! not be put back) and the list of copies, pass 1 writes the copies that count. A later copy of a block replaces an earlier one. Then
//! the dead node's totals are folded into the master file, and a clean header goes behind the head.
//!
//! Everything on the way is hostile until checked: the walk always advances and never passes the head, tables are bounded,
//! no copy may land on the superblock, on the journal itself or beyond the device. Every complaint names the journal and the
//! journal block. All of it is idempotent, apart from the totals: a crash between the folding of the deltas and the clean
//! header adds them twice, which the next first mount sets right.
//!
//! The caller holds the journal's glock EX and knows that its owner is dead or is itself.

use super::log::JournalMap;
use crate::disk::Disk;
use crate::ondisk::dinode::{Dinode, Time};
use crate::ondisk::header::{MAGIC, MetaHeader, MetaType, has_magic};
use crate::ondisk::log::{
    LD_JDATA, LD_METADATA, LD_REVOKE, LHF_RECOVERY, LHF_UNMOUNT, LogDescriptor, LogHeader,
};
use crate::ondisk::statfs::StatfsChange;
use crate::ondisk::{pointer_at, put_u32};
use crate::{BlockNo, Error, JournalId, Result};
use lun::aligned::AlignedBuf;
use std::collections::BTreeMap;

/// Journal blocks read at once.
const WINDOW: u32 = 256;
/// Copies written at once.
const BATCH: usize = 128;
/// Above so many revoked addresses only those that matter are kept.
const MANY_REVOKES: usize = 1 << 20;

/// What one replay did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Replayed {
    /// Copies of metadata and of journaled data in the live part.
    pub metadata: u64,
    pub jdata: u64,
    /// Copies of each kind that no revoke forbade.
    pub metadata_replayed: u64,
    pub jdata_replayed: u64,
    /// Revoked addresses (a lower bound in journals with more than a million).
    pub revokes: u64,
    /// Blocks written.
    pub written: u64,
}

/// One copy in the log.
#[derive(Clone, Copy)]
struct Copy {
    /// Journal block of the copy.
    at: u32,
    to: u64,
    jdata: bool,
    escaped: bool,
}

/// Reads journal blocks through a window, so that a walk costs few requests.
struct Ring<'a> {
    disk: &'a Disk,
    jid: JournalId,
    map: &'a dyn JournalMap,
    window: AlignedBuf,
    /// First journal block in the window, and how many.
    from: u32,
    count: u32,
}

impl<'a> Ring<'a> {
    fn new(disk: &'a Disk, jid: JournalId, map: &'a dyn JournalMap) -> Self {
        let bsize = disk.geometry().block_size as usize;
        Self { disk, jid, map, window: AlignedBuf::zeroed(bsize * WINDOW as usize), from: 0, count: 0 }
    }

    fn error(&self, at: u32, what: impl Into<String>) -> Error {
        Error::Journal { jid: self.jid, at, what: what.into() }
    }

    /// Journal block `at`, and with it what follows.
    fn block(&mut self, at: u32) -> Result<&[u8]> {
        let bsize = self.disk.geometry().block_size as usize;
        if at < self.from || at - self.from >= self.count {
            let count = WINDOW.min(self.map.len() - at);
            // neighbours in the ring are mostly neighbours on the device: one request for each run
            let mut runs: Vec<(BlockNo, &mut [u8])> = Vec::new();
            let mut rest = &mut self.window[..bsize * count as usize];
            let mut i = 0;
            while i < count {
                let first = self.map.block(at + i);
                let mut n = 1;
                while i + n < count && self.map.block(at + i + n).0 == first.0 + u64::from(n) {
                    n += 1;
                }
                let (run, more) = rest.split_at_mut(bsize * n as usize);
                runs.push((first, run));
                rest = more;
                i += n;
            }
            self.disk.read_blocks(&mut runs)?;
            (self.from, self.count) = (at, count);
        }
        let o = (at - self.from) as usize * bsize;
        Ok(&self.window[o..o + bsize])
    }

    fn after(&self, at: u32, n: u32) -> u32 {
        ((u64::from(at) + u64::from(n)) % u64::from(self.map.len())) as u32
    }

    /// Blocks from `a` forward to `b`.
    fn distance(&self, a: u32, b: u32) -> u32 {
        ((u64::from(b) + u64::from(self.map.len()) - u64::from(a)) % u64::from(self.map.len())) as u32
    }
}

/// The valid header with the highest sequence number. `Error::Journal` when there is none.
pub fn find_head(disk: &Disk, jid: JournalId, map: &dyn JournalMap) -> Result<LogHeader> {
    let mut ring = Ring::new(disk, jid, map);
    let mut best: Option<LogHeader> = None;
    for at in 0..map.len() {
        let Ok(h) = LogHeader::decode_at(ring.block(at)?, at) else { continue };
        match &best {
            // behind the head the ring holds what is one round older
            Some(b) if h.sequence < b.sequence => break,
            _ => best = Some(h),
        }
    }
    best.ok_or_else(|| ring.error(0, "no valid log header"))
}

/// What pass 0 found.
#[derive(Default)]
struct Live {
    copies: Vec<Copy>,
    /// Revoked address → journal block of its latest revoke.
    revokes: BTreeMap<u64, u32>,
}

impl Live {
    /// Is this copy older than a revoke of its block? Positions are compared as distances from the tail.
    fn is_revoked(&self, ring: &Ring<'_>, tail: u32, copy: &Copy) -> bool {
        let Some(&revoke) = self.revokes.get(&copy.to) else { return false };
        ring.distance(tail, copy.at) < ring.distance(tail, revoke)
    }
}

/// Walks the live part once, over headers and descriptors. `visit` gets each descriptor's place and bytes.
fn walk(
    ring: &mut Ring<'_>,
    head: &LogHeader,
    mut visit: impl FnMut(&mut Ring<'_>, u32, LogDescriptor) -> Result<()>,
) -> Result<()> {
    let len = ring.map.len();
    if head.tail >= len || head.blkno >= len {
        return Err(ring.error(head.blkno, format!("tail {} in a ring of {len} blocks", head.tail)));
    }
    let geo = ring.disk.geometry();
    let mut at = head.tail;
    let mut left = ring.distance(head.tail, head.blkno);
    while left > 0 {
        let block = ring.block(at)?;
        let header = match MetaHeader::decode(block) {
            Ok(h) => h,
            Err(e) => return Err(ring.error(at, e.to_string())),
        };
        let step = match header.ty {
            MetaType::LogHeader => match LogHeader::decode_at(block, at) {
                Ok(_) => 1,
                Err(e) => return Err(ring.error(at, e.to_string())),
            },
            MetaType::LogDescriptor => match LogDescriptor::decode(block, &geo) {
                Ok(d) if d.length > left => {
                    return Err(ring.error(at, format!("a chunk of {} blocks passes the head", d.length)));
                }
                Ok(d) => {
                    visit(ring, at, d)?;
                    d.length
                }
                Err(e) => return Err(ring.error(at, e.to_string())),
            },
            other => return Err(ring.error(at, format!("{} inside the log", other.name()))),
        };
        at = ring.after(at, step);
        left -= step;
    }
    Ok(())
}

/// Pass 0: copies in log order, then revokes.
fn scan(ring: &mut Ring<'_>, head: &LogHeader) -> Result<Live> {
    let geo = ring.disk.geometry();
    let device_blocks = ring.disk.blocks();
    let mut live = Live::default();
    walk(ring, head, |ring, at, d| {
        if d.kind == LD_REVOKE {
            return Ok(());
        }
        let entries: Vec<(u64, bool)> = {
            let block = ring.block(at)?;
            (0..d.count as usize)
                .map(|i| match d.kind {
                    LD_JDATA => LogDescriptor::jdata(block, i),
                    _ => (LogDescriptor::address(block, i), false),
                })
                .collect()
        };
        debug_assert!(matches!(d.kind, LD_METADATA | LD_JDATA));
        for (i, (to, escaped)) in entries.into_iter().enumerate() {
            let copy = ring.after(at, 1 + i as u32);
            live.copies.push(Copy { at: copy, to, jdata: d.kind == LD_JDATA, escaped });
        }
        Ok(())
    })?;
    let mut wanted: Option<Vec<u64>> = None;
    walk(ring, head, |ring, at, d| {
        if d.kind != LD_REVOKE {
            return Ok(());
        }
        let mut left = d.count as usize;
        for i in 0..d.length {
            let place = ring.after(at, i);
            let (base, room) = match i {
                0 => (LogDescriptor::SIZE, geo.ldptrs()),
                _ => (MetaHeader::SIZE, geo.inptrs()),
            };
            let block = ring.block(place)?;
            if i > 0
                && let Err(e) = MetaHeader::expect(block, MetaType::LogBlock)
            {
                return Err(ring.error(place, e.to_string()));
            }
            for k in 0..room.min(left) {
                let address = pointer_at(block, base, k);
                if address < device_blocks
                    && wanted.as_ref().is_none_or(|w| w.binary_search(&address).is_ok())
                {
                    live.revokes.insert(address, place);
                }
            }
            left -= room.min(left);
        }
        // a hostile journal can name more addresses than memory holds; only those with copies matter
        if wanted.is_none() && live.revokes.len() > MANY_REVOKES {
            let mut all: Vec<u64> = live.copies.iter().map(|c| c.to).collect();
            all.sort_unstable();
            all.dedup();
            live.revokes.retain(|a, _| all.binary_search(a).is_ok());
            wanted = Some(all);
        }
        Ok(())
    })?;
    Ok(live)
}

/// Device blocks of the journal itself as ascending ranges.
fn own_blocks(map: &dyn JournalMap) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for at in 0..map.len() {
        let b = map.block(at).0;
        match ranges.last_mut() {
            Some((_, end)) if *end == b => *end += 1,
            _ => ranges.push((b, b + 1)),
        }
    }
    ranges.sort_unstable();
    ranges
}

/// Puts back every live copy that no revoke forbids, and makes it durable. The journal stays as it is.
pub fn replay(disk: &Disk, jid: JournalId, map: &dyn JournalMap, head: &LogHeader) -> Result<Replayed> {
    let mut ring = Ring::new(disk, jid, map);
    let live = scan(&mut ring, head)?;
    let own = own_blocks(map);
    let mut done = Replayed { revokes: live.revokes.len() as u64, ..Replayed::default() };
    // the latest copy of each block wins, so only that one is read and written
    let mut latest: BTreeMap<u64, Copy> = BTreeMap::new();
    for copy in &live.copies {
        let counts = if copy.jdata {
            (&mut done.jdata, &mut done.jdata_replayed)
        } else {
            (&mut done.metadata, &mut done.metadata_replayed)
        };
        *counts.0 += 1;
        if live.is_revoked(&ring, head.tail, copy) {
            continue;
        }
        *counts.1 += 1;
        let i = own.partition_point(|&(_, end)| end <= copy.to);
        let inside = own.get(i).is_some_and(|&(start, _)| start <= copy.to);
        if inside || copy.to <= disk.geometry().sb_block() || copy.to >= disk.blocks() {
            return Err(ring.error(copy.at, format!("a copy for block {}, which no log may write", copy.to)));
        }
        latest.insert(copy.to, *copy);
    }
    let latest: Vec<Copy> = latest.into_values().collect();
    let bsize = disk.geometry().block_size as usize;
    let mut bytes = AlignedBuf::zeroed(bsize * BATCH);
    for batch in latest.chunks(BATCH) {
        let buf = &mut bytes[..bsize * batch.len()];
        let mut runs: Vec<(BlockNo, &mut [u8])> =
            batch.iter().zip(buf.chunks_mut(bsize)).map(|(c, b)| (map.block(c.at), b)).collect();
        disk.read_blocks(&mut runs)?;
        for (copy, b) in batch.iter().zip(buf.chunks_mut(bsize)) {
            if copy.escaped {
                put_u32(b, 0, MAGIC);
            }
            if !copy.jdata && !has_magic(b) {
                let what = format!("the copy for metadata block {} has no magic number", copy.to);
                return Err(ring.error(copy.at, what));
            }
        }
        // runs of neighbours become one write
        let mut writes: Vec<(BlockNo, &[u8])> = Vec::new();
        let mut i = 0;
        while i < batch.len() {
            let mut n = 1;
            while i + n < batch.len() && batch[i + n].to == batch[i].to + n as u64 {
                n += 1;
            }
            writes.push((BlockNo(batch[i].to), &buf[bsize * i..bsize * (i + n)]));
            i += n;
        }
        disk.write_blocks(&writes)?;
        done.written += batch.len() as u64;
    }
    disk.flush()?;
    Ok(done)
}

/// Adds the deltas that the head carries to the master totals, and clears the dead node's file. Returns the new totals, or
/// `None` when there was nothing to add. The caller holds the glock of the master statfs file EX.
pub fn fold_statfs(
    disk: &Disk,
    head: &LogHeader,
    statfs: BlockNo,
    statfs_change: BlockNo,
) -> Result<Option<StatfsChange>> {
    let geo = disk.geometry();
    let local = StatfsChange { total: head.local_total, free: head.local_free, dinodes: head.local_dinodes };
    let load = |addr: BlockNo| -> Result<(AlignedBuf, StatfsChange)> {
        let mut buf = AlignedBuf::zeroed(geo.block_size as usize);
        disk.read(addr, &mut buf)?;
        let di = Dinode::decode_at(&buf, &geo, addr).map_err(|e| e.at(addr))?;
        if !di.is_stuffed() || di.size < StatfsChange::SIZE as u64 {
            return Err(Error::Corrupt {
                block: addr,
                what: format!("totals in a file of {} bytes", di.size),
            });
        }
        let totals = StatfsChange::decode(&buf[Dinode::SIZE..]).map_err(|e| e.at(addr))?;
        Ok((buf, totals))
    };
    let (mut master, totals) = load(statfs)?;
    let (mut change, deltas) = load(statfs_change)?;
    let sum = totals.plus(local);
    let mut writes: Vec<(BlockNo, &[u8])> = Vec::new();
    if !local.is_zero() {
        sum.encode(&mut master[Dinode::SIZE..]);
        writes.push((statfs, &master));
    }
    if !deltas.is_zero() {
        StatfsChange::default().encode(&mut change[Dinode::SIZE..]);
        writes.push((statfs_change, &change));
    }
    if writes.is_empty() {
        return Ok(None);
    }
    disk.write_blocks(&writes)?;
    disk.flush()?;
    Ok(Some(sum))
}

/// Writes the header that says "clean" behind the head. `by` is the journal of the recovering node.
pub fn write_clean_header(
    disk: &Disk,
    map: &dyn JournalMap,
    head: &LogHeader,
    jinode: BlockNo,
    by: JournalId,
    now: Time,
) -> Result<LogHeader> {
    let blkno = (head.blkno + 1) % map.len();
    let addr = map.block(blkno);
    let clean = LogHeader {
        jid: by.0,
        sequence: head.sequence.wrapping_add(1),
        flags: LHF_UNMOUNT | LHF_RECOVERY,
        tail: 0,
        blkno,
        nsec: now.nsec,
        sec: now.sec,
        addr: addr.0,
        jinode: jinode.0,
        ..LogHeader::default()
    };
    let mut buf = AlignedBuf::zeroed(disk.geometry().block_size as usize);
    clean.encode(&mut buf);
    disk.write_durable(addr, &buf)?;
    Ok(clean)
}
