//! Recovery of one journal: replay, clean header, and later the dead node's totals.
//!
//! The dead node's unsynced statfs deltas stay where its log has put them, in its statfs_change file: whoever uses that
//! journal next goes on with them, and a survivor moves them to the master file in a transaction of its own when it finds
//! the locks free ([`Volume::statfs_sync`]). So nothing of it is counted twice or lost by a crash in the middle, and the locks
//! that everybody waits for open without it.

use super::mount::journal_glock;
use super::system::{Extents, Journal, SysReader};
use super::{Volume, inode_glock};
use crate::disk::Disk;
use crate::glock::AcquireFlags;
use crate::journal::replay::{self, Replayed};
use crate::lockspace::LockState;
use crate::ondisk::dinode::{Dinode, Time};
use crate::ondisk::header::MetaType;
use crate::ondisk::log::LogHeader;
use crate::ondisk::rgrp::Rgrp;
use crate::ondisk::rindex::RindexEntry;
use crate::ondisk::statfs::StatfsChange;
use crate::trans::TransSize;
use crate::{BlockNo, Error, JournalId, Result};
use cairn_base::events;
use lun::aligned::AlignedBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Blocks read in one batch.
const BATCH: usize = 256;

/// What recovery of a journal did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Recovered {
    /// The journal was clean: nothing was done.
    pub clean: bool,
    pub replay: Replayed,
}

pub(super) fn is_clean(disk: &Disk, journal: &Journal, map: &Extents) -> Result<bool> {
    Ok(replay::find_head(disk, journal.jid, map)?.is_clean())
}

/// Brings one journal, whose glock the caller holds EX, into the clean state. Returns its clean head.
/// `by` goes into the clean header: the journal of the mount that recovers.
pub(super) fn recover(
    disk: &Disk,
    journal: &Journal,
    map: &Extents,
    by: JournalId,
) -> Result<(LogHeader, Recovered)> {
    let (fs, jid, started) = (disk.name(), journal.jid, Instant::now());
    tracing::info!("fsid={fs}: jid={jid}: Looking at journal...");
    let head = replay::find_head(disk, jid, map)?;
    if head.is_clean() {
        tracing::info!("fsid={fs}: jid={jid}: Done");
        return Ok((head, Recovered { clean: true, replay: Replayed::default() }));
    }
    let found = started.elapsed();
    tracing::info!("fsid={fs}: jid={jid}: Replaying journal...0x{:x} to 0x{:x}", head.tail, head.blkno);
    let done = replay::replay(disk, jid, map, &head)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = Time { sec: now.as_secs() as i64, nsec: now.subsec_nanos() };
    let clean = replay::write_clean_header(disk, map, &head, journal.dinode, by, now)?;
    let (copies, counted) = (done.metadata + done.jdata, done.metadata_replayed + done.jdata_replayed);
    tracing::info!("fsid={fs}: jid={jid}: Replayed {counted} of {copies} blocks");
    tracing::info!("fsid={fs}: jid={jid}: Found {} revoke tags", done.revokes);
    tracing::info!(name: "journal_replayed", event = events::JOURNAL_REPLAYED, %fs, jid = jid.0,
        dur_us = started.elapsed().as_micros() as u64, head_us = found.as_micros() as u64,
        "fsid={fs}: jid={jid}: Journal replayed in {} ms", started.elapsed().as_millis());
    tracing::info!("fsid={fs}: jid={jid}: Done");
    Ok((clean, Recovered { clean: false, replay: done }))
}

/// Sums of the counters of all groups, from their headers.
pub(super) fn sum_groups(disk: &Disk, rindex: &[RindexEntry]) -> Result<StatfsChange> {
    let bsize = disk.geometry().block_size as usize;
    let mut sums = StatfsChange::default();
    for chunk in rindex.chunks(BATCH) {
        let mut bufs: Vec<AlignedBuf> = chunk.iter().map(|_| AlignedBuf::zeroed(bsize)).collect();
        let mut runs: Vec<(BlockNo, &mut [u8])> =
            chunk.iter().map(|e| BlockNo(e.addr)).zip(bufs.iter_mut().map(|b| &mut **b)).collect();
        disk.read_blocks(&mut runs)?;
        for (e, buf) in chunk.iter().zip(&bufs) {
            let h = Rgrp::decode(buf).map_err(|err| err.at(BlockNo(e.addr)))?;
            sums.total += i64::from(e.data);
            sums.free += i64::from(h.free);
            sums.dinodes += i64::from(h.dinodes);
        }
    }
    Ok(sums)
}

impl Volume {
    /// Replays the journal of a mount that is proved dead. Several survivors may try; the one that gets the journal's glock does it.
    /// `None`: another node is at it, or the journal is in use. Safe to repeat, also after a crash in the middle.
    pub fn recover_journal(&self, jid: JournalId) -> Result<Option<Recovered>> {
        let by = self.writer()?.log.jid();
        let Some(journal) = self.system.journals.get(jid.0 as usize) else {
            return Err(Error::Journal { jid, at: 0, what: "there is no such journal".to_owned() });
        };
        self.disk.check()?;
        tracing::info!("fsid={}: jid={jid}: Trying to acquire journal lock...", self.name());
        if jid == by {
            // our own holder would not keep us out
            tracing::info!("fsid={}: jid={jid}: Busy", self.name());
            return Ok(None);
        }
        let flags = AcquireFlags::TRY | AcquireFlags::RECOVERY | AcquireFlags::NOCACHE;
        let _holder = match self.glocks.acquire(journal_glock(jid), LockState::Exclusive, flags) {
            Ok(holder) => holder,
            Err(Error::Errno(libc::EAGAIN)) => {
                tracing::info!("fsid={}: jid={jid}: Busy", self.name());
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        let map = SysReader(&self.disk).journal(journal)?;
        let (_, done) = recover(&self.disk, journal, &map, by)?;
        self.statfs.adopt(jid);
        if let Some(recovered) = &*self.on_recovered.lock() {
            recovered();
        }
        Ok(Some(done))
    }

    /// Moves the deltas in a dead node's statfs_change file to the master file, in one transaction of ours. False: somebody uses
    /// the file, or its dead user's locks are not free yet.
    pub(super) fn fold_statfs(&self, jid: JournalId) -> Result<bool> {
        let log = self.log()?;
        let addr = self.system.journals[jid.0 as usize].statfs_change;
        let flags = AcquireFlags::TRY | AcquireFlags::NOCACHE;
        let change = match self.glocks.acquire(inode_glock(addr), LockState::Exclusive, flags) {
            Err(Error::Errno(libc::EAGAIN)) => return Ok(false),
            other => other?,
        };
        let statfs = inode_glock(self.system.statfs);
        let master = self.glocks.acquire(statfs, LockState::Exclusive, AcquireFlags::NONE)?;
        let from = self.cache.read(change.glock(), addr, MetaType::Dinode)?;
        let to = self.cache.read(master.glock(), self.system.statfs, MetaType::Dinode)?;
        let decode = |b: &[u8]| StatfsChange::decode(&b[Dinode::SIZE..]);
        let deltas = from.with(decode).map_err(|e| e.at(from.block()))?;
        if deltas.is_zero() {
            return Ok(true);
        }
        let total = to.with(decode).map_err(|e| e.at(to.block()))?.plus(deltas);
        let trans = log.begin(TransSize::new(2, 0))?;
        StatfsChange::default().encode(&mut trans.modify(&from)[Dinode::SIZE..]);
        total.encode(&mut trans.modify(&to)[Dinode::SIZE..]);
        Ok(true)
    }
}
